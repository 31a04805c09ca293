from pathlib import Path

import pytest

from kdscale.engine.checkpoint import find, newest
from kdscale.engine.staging import by_age, clean, publish, set_aside, staging_directory, step_of
from kdscale.errors import CheckpointError


def make(root: Path, *steps: int) -> None:
    for step in steps:
        (root / f"step-{step}").mkdir(parents=True)


def test_only_whole_names_count(tmp_path: Path):
    make(tmp_path, 2, 10, 1)
    staging_directory(tmp_path, 11, "a1b2").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [step for step, _ in by_age(tmp_path)] == [10, 2, 1]
    assert by_age(tmp_path / "none") == []
    assert step_of(tmp_path / "step-7") == 7
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2", "step-10", "step-x"}


def test_publishing_keeps_the_newest(tmp_path: Path):
    make(tmp_path, 1, 2, 3)
    staging = staging_directory(tmp_path, 4, "a1b2")
    staging.mkdir()
    publish(staging, tmp_path / "step-4", keep=2)
    assert [step for step, _ in by_age(tmp_path)] == [4, 3]
    assert (tmp_path / "latest").read_text() == "step-4"


def test_later_steps_are_set_aside_and_nothing_is_lost(tmp_path: Path):
    root = tmp_path / "checkpoints"
    make(root, 1, 2, 3)
    set_aside(root, after=2)
    assert [step for step, _ in by_age(root)] == [2, 1]
    assert [step for step, _ in by_age(tmp_path / "checkpoints.1")] == [3]
    set_aside(root, after=2)
    assert not (tmp_path / "checkpoints.2").exists()
    assert find(root, "never") is None
    assert by_age(root) == []
    assert [step for step, _ in by_age(tmp_path / "checkpoints.2")] == [2, 1]


def test_none_whole_is_refused_and_none_at_all_is_a_fresh_start(tmp_path: Path):
    assert newest(tmp_path) is None
    make(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"holds 1 checkpoint\(s\) and none is whole.*--resume never"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        find(tmp_path, str(tmp_path / "step-5"))
