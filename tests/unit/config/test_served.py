"""What a teacher alone lays over a config: a name of its own, and that it is asked."""

from pathlib import Path

import pytest

from kdscale.config.load import dump_resolved, load_resolved
from kdscale.config.served import load_recorded, load_served, run_name
from kdscale.errors import ConfigError

FILE = """\
run: {name: students}
data: {train: [text.jsonl]}
teacher: {model: some/teacher}
student: {layers: [0, 1]}
loss: {hard_weight: 1}
"""
MOVING = "loss.temperature={start: 4, end: 1}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("name", ["teacher", "2024", "1e3", "null", "on", "2024-01-01"])
def test_a_name_is_a_name_whatever_yaml_makes_of_it(file: Path, tmp_path: Path, name: str):
    config = load_served(file, None, name)
    assert config.run.name == name
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == config


def test_an_override_gives_another_name(file: Path):
    assert load_served(file, ["run.name=second"], "teacher").run.name == "second"
    assert load_recorded(file, ["run.name=second"], "2024").run.name == "second"
    with pytest.raises(ConfigError, match=r"run\.name: 'no name' must match"):
        load_served(file, None, "no name")
    assert load_served(file, ["run.name=second"], "no name").run.name == "second"


@pytest.mark.parametrize("out", ["my file.jsonl", ".", "..", "/", "\u00fc" * 80, "x" * 200])
def test_what_writes_a_path_has_a_name_whatever_the_path(file: Path, out: str):
    name = run_name(Path(out))
    assert load_served(file, None, name).run.name == name


def test_other_paths_are_written_under_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert run_name(Path("a/out.jsonl")) == run_name(tmp_path / "link" / "out.jsonl")
    assert run_name(Path("a/out.jsonl")).startswith("out.jsonl-")
    assert len({run_name(Path(one)) for one in ("a/out.jsonl", "b/out.jsonl", "a/x y", "a/x z", "a/x-z")}) == 5


@pytest.mark.parametrize(
    "source",
    [
        ["targets.source=none"],
        ["targets.source=recording", "targets.recording=recordings/x"],
        ["targets.source=live+record", "targets.recording=recordings/x"],
    ],
)
def test_the_teacher_is_asked_wherever_its_students_have_their_targets_from(file: Path, source: list[str]):
    for load in (load_served, load_recorded):
        targets = load(file, source, "teacher").targets
        assert (targets.source, targets.recording) == ("live", None)


def test_targets_of_many_temperatures_are_not_recorded(file: Path):
    rule = r"loss.temperature changes .* targets.payload = topk holds one .*targets.payload: hidden"
    with pytest.raises(ConfigError, match=rule):
        load_recorded(file, [MOVING], "out")
    assert load_recorded(file, [MOVING, "targets.payload=hidden"], "out").targets.payload == "hidden"
    assert load_recorded(file, ["loss.temperature={start: 2, end: 2}"], "out").loss.temperature
    load_served(file, [MOVING], "teacher")
