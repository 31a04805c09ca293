"""A cluster that a run has started for itself, and whose head is killed: the run ends at once, and says so."""

import time
from pathlib import Path

import pytest

from tests.failure.runs import config_of, wait_for_progress
from tests.runs import assert_nothing_left, finish, marked_running, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_run_ends_with_its_cluster(tmp_path: Path, teacher_dir: Path, text_dir: Path, name: str):
    """By itself Ray would wait a minute for the one, and take the loss of the other for that of a rank, to be started again."""
    config = config_of(tmp_path, teacher_dir, text_dir, teacher={"ranks": 1})
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_progress(directory, process, log, 1)
    (daemon,) = [one for one in marked_running(f"/{name}") if one.name() == name]
    daemon.kill()
    began = time.monotonic()
    assert finish(process, log) == 1
    assert time.monotonic() - began < 30, "not a minute"
    assert_nothing_left()
    assert not (directory / "access.json").exists()
    assert f"PlacementError: Ray's {name}, which this run had started for itself, has ended" in log.read_text()
