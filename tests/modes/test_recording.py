"""A corpus scored once, and students that learn from the record."""

import json
import signal
import time
from pathlib import Path

import pytest

from kdscale import supervise
from tests.failure.runs import ranks_of
from tests.runs import assert_nothing_left, finish, run, start, wait_for_file, wait_for_step, write_config

pytestmark = pytest.mark.slow


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_recording_teaches_as_its_teacher_does(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Killed and gone on with it equals one made at once; training from it equals live training, bit for bit."""
    config = write_config(tmp_path, teacher_dir, text_dir, run={"deterministic": True}, train={"steps": 24})
    log, runs = tmp_path / "log", tmp_path / "runs"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run("record", str(config), str(whole), log=log) == 0, log.read_text()

    process = start("record", str(config), str(halves), log=log)
    wait_for_file(halves / "PROVENANCE.json", process, log)
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)
    assert not (halves / "MANIFEST.json").exists()
    assert run("record", str(config), str(halves), log=log) == 0, log.read_text()
    files, again = (
        {path.name: path.read_bytes() for path in one.iterdir() if path.name != ".filling.lock"}
        for one in (whole, halves)
    )
    assert again == files
    assert set(files) == {
        *("PROVENANCE.json", "MANIFEST.json", "head.arrow", "train-00000.arrow", "heldout-00000.arrow")
    }

    assert run("train", str(config), "run.name=live", log=log) == 0, log.read_text()
    recorded = [f"targets.recording={halves}", "targets.source=recording"]
    assert run("train", str(config), "run.name=recorded", *recorded, log=log) == 0, log.read_text()
    assert losses(runs / "recorded") == losses(runs / "live")
    live, without = (json.loads((runs / name / "summary.json").read_text()) for name in ("live", "recorded"))
    assert live["epochs"] > 1, "rows come again in another order"
    for key in ("kl_before", "kl_after", "perplexity_teacher", "bytes_per_token"):
        assert without[key] == live[key], key
    assert without["teacher_ranks"] == 0
    assert without["canary"].startswith("ok")
    assert_nothing_left()


def test_what_was_recorded_otherwise_is_refused(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = write_config(tmp_path, teacher_dir, text_dir, evaluate={"quality": False})
    log, out = tmp_path / "log", tmp_path / "out"
    assert run("record", str(config), str(out), log=log) == 0, log.read_text()
    recorded = [f"targets.recording={out}", "targets.source=recording"]
    assert run("train", str(config), *recorded, "loss.temperature=2", "data.row_tokens=40", log=log) == 1
    assert "is a recording of something else: rows: recorded 'isolated 48', now 'isolated 40'" in log.read_text()
    assert "targets.temperature: recorded 1.0, now 2.0" in log.read_text()
    assert run("train", str(config), *recorded, "data.heldout_tokens=96", log=log) == 0, log.read_text()
    assert run("train", str(config), *recorded, "evaluate.quality=true", "run.name=other", log=log) == 1
    assert "CoverageError" in log.read_text(), "held-out rows were not recorded"
    assert_nothing_left()


def test_the_first_epoch_fills_a_recording_and_lets_the_teacher_go(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Two student ranks that each keep what they ask for; losses are those of live training. Then no teacher is started."""
    sections = {
        "run": {"deterministic": True},
        # Of which 22 are the first epoch: the second goes on behind what is asked for ahead of time.
        "train": {"steps": 40},
        "student": {"layers": [0, 3], "parallel": {"data": 2}},
    }
    config = write_config(tmp_path, teacher_dir, text_dir, **sections)
    log, runs, out = tmp_path / "log", tmp_path / "runs", tmp_path / "out"
    assert run("train", str(config), "run.name=live", log=log) == 0, log.read_text()
    filling = ["targets.source=live+record", f"targets.recording={out}"]
    process = start("train", str(config), "run.name=filling", *filling, log=log)
    wait_for_file(out / "MANIFEST.json", process, log)
    deadline = time.monotonic() + 15
    # A fast machine is through with the rest of the steps before anybody has looked.
    while process.poll() is None and ranks_of("TeacherRank"):
        assert time.monotonic() < deadline, "the teacher was not let go"
        time.sleep(0.1)
    assert finish(process, log) == 0, log.read_text()
    assert "the recording is whole: letting the teacher go" in log.read_text()
    assert losses(runs / "filling") == losses(runs / "live")
    kept, live = (json.loads((runs / name / "summary.json").read_text()) for name in ("filling", "live"))
    assert kept["teacher_ranks"] == 1, "as of when it was let go"
    assert (kept["kl_before"], kept["kl_after"]) == (live["kl_before"], live["kl_after"])
    assert max(kept["teacher_tokens_per_rank"]) < max(live["teacher_tokens_per_rank"])

    assert run("train", str(config), "run.name=again", *filling, log=log) == 0, log.read_text()
    again = json.loads((runs / "again" / "summary.json").read_text())
    assert again["teacher_ranks"] == 0
    assert losses(runs / "again") == losses(runs / "live")
    assert_nothing_left()


def test_a_stop_keeps_what_has_arrived_and_one_run_alone_fills(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = write_config(tmp_path, teacher_dir, text_dir, train={"steps": 400}, evaluate={"quality": False})
    log, out = tmp_path / "log", tmp_path / "out"
    filling = ["targets.source=live+record", f"targets.recording={out}"]
    for command in (["train", str(config), *filling], ["record", str(config), str(out), f"run.dir={tmp_path}/others"]):
        with supervise.filling(out):
            assert run(*command, log=log) == 1
        assert f"another process works on {out}; wait for it to end, or name another directory" in log.read_text()
        log.unlink()

    process = start("train", str(config), *filling, log=log)
    wait_for_step(tmp_path / "runs" / "tiny", 2, process, log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log) == 130, log.read_text()
    assert list(out.glob("train-r0-*.arrow")), "what was asked for is not asked for again"
    assert not list(out.glob("*.partial"))
    assert_nothing_left()
