"""Several teachers, end to end: each document goes to its own, a run is killed and gone on with, and mixtures are learned."""

import json
import signal
import time
from pathlib import Path

import pytest

from kdscale.stream.directory import list_endpoints
from kdscale.stream.protocol import Access, call, connect
from tests.conftest import documents, make_colleague
from tests.runs import assert_nothing_left, finish, run, start, wait_for_file, write_config

pytestmark = pytest.mark.slow


def write_routed(directory: Path) -> Path:
    """Documents in turn of the teachers ``left`` and ``right``; every fifth names none."""
    directory.mkdir()
    rows = [{"text": text, "of": ("left", "right")[n % 2]} for n, text in enumerate(documents(60))]
    for row in rows[::5]:
        del row["of"]
    for name, part in (("train", rows[:48]), ("heldout", rows[48:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory


def steps(directory: Path) -> list[tuple[str, float, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(one["rows_digest"], one["loss"], one["gradient_norm"]) for one in map(json.loads, lines)]


def test_each_document_has_its_teacher(tmp_path: Path, teacher_dir: Path):
    """Two teachers, one of them in two replicas; killed and gone on with, every number is that of a run without faults."""
    other = make_colleague(tmp_path / "other", seed=5)
    text = write_routed(tmp_path / "text")
    config = write_config(
        tmp_path,
        teacher_dir,
        text,
        run={"deterministic": True},
        data={"teacher_column": "of"},
        teachers={"main": "left", "default": "left", "others": {"right": {"model": str(other), "replicas": 2}}},
        # Coarse targets of float32 teachers: the canary asks for finer ones.
        targets={"encoding": "uint4"},
        student={"layers": [0, 3], "dtype": "float32"},
        # Their layers are nothing that the student could learn in so few steps.
        train={"steps": 14, "lr": 1e-2},
    )
    log, runs = tmp_path / "log", tmp_path / "runs"
    assert run("train", str(config), "run.name=whole", log=log) == 0, log.read_text()
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    left, right = summary["teachers"]["left"], summary["teachers"]["right"]
    assert (left["replicas"], left["ranks"], right["replicas"], right["ranks"]) == (1, 1, 2, 2)
    assert (left["parameters"], right["parameters"]) != (right["parameters"], left["parameters"])
    assert left["targets"] > 0
    assert right["targets"] > 0
    # Training, held-out text once, and two rows of the canary for each teacher: none has scored what is another's.
    assert summary["canary"].startswith("left: ok")
    assert "right: ok" in summary["canary"]
    assert summary["kl_after"] < summary["kl_before"]

    process = start("train", str(config), "run.name=halves", log=log)
    wait_for_file(runs / "halves" / "checkpoints" / "step-5" / "MANIFEST.json", process, log)
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)
    assert run("train", str(config), "run.name=halves", log=log) == 0, log.read_text()
    assert steps(runs / "halves") == steps(runs / "whole")
    assert json.loads((runs / "halves" / "summary.json").read_text())["kl_after"] == summary["kl_after"]

    # A checkpoint belongs to all of them.
    make_colleague(other, seed=6)
    log.unlink()
    assert run("train", str(config), "run.name=halves", "train.steps=16", log=log) == 1
    assert "teachers.others.right (the files of teachers.others.right.model)" in log.read_text()
    assert_nothing_left()


def test_a_mixture_of_teachers_served_elsewhere(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """One directory for both, and for one that joins beside one of them; who asks for another mixture of names is told which
    there are."""
    other = make_colleague(tmp_path / "other", seed=5)
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        teachers={
            "combine": "mixture",
            "others": {"right": {"model": str(other)}},
            "weights": {"main": 0.25, "right": 0.75},
        },
        student={"layers": [0, 3], "dtype": "float32"},
        targets={"payload": "sampled"},
        train={"steps": 10, "lr": 1e-2},
    )
    endpoints, log, teacher_log = tmp_path / "teacher.json", tmp_path / "log", tmp_path / "teacher.log"
    teacher = start("teacher", str(config), "--write", str(endpoints), log=teacher_log)
    wait_for_file(endpoints, teacher, teacher_log)
    join_log = tmp_path / "join.log"
    joiner = start("teacher", str(config), "--join", str(endpoints), "--only", "right", log=join_log)
    access = Access.load(endpoints)
    while len(found := list_endpoints(access, "right").endpoints) < 2:
        assert joiner.poll() is None, join_log.read_text()
        time.sleep(0.2)
    assert len(list_endpoints(access, "main").endpoints) == 1
    assert run("train", str(config), "--teacher-endpoints", str(endpoints), log=log) == 0, log.read_text()
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    main, right = summary["teachers"]["main"], summary["teachers"]["right"]
    assert main["targets"] == right["targets"] > summary["tokens_trained"]
    assert summary["kl_after"] < summary["kl_before"]
    assert summary["canary"].count("ok: ") == 2
    for endpoint in found:
        with connect(endpoint.address, access.credentials) as client:
            assert call(client, "stats", access.token, 10)["tokens"] > 0, f"{endpoint.replica} was not asked"
    joiner.send_signal(signal.SIGTERM)
    assert finish(joiner, join_log) == 130, join_log.read_text()
    renamed = ["teachers.others={left: {model: " + str(other) + "}}", "teachers.weights={main: 0.5, left: 0.5}"]
    assert run("train", str(config), *renamed, "--teacher-endpoints", str(endpoints), "run.name=x", log=log) == 1
    assert "no teacher is called 'left' here; there are main, right" in log.read_text()
    teacher.send_signal(signal.SIGTERM)
    assert finish(teacher, teacher_log, within_s=30) == 130
    assert_nothing_left()
