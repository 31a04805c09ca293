"""Whole runs on real Ray, real DeepSpeed ranks and real streams, with tiny real models."""

import json
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow.flight import FlightUnavailableError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.engine.checkpoint import newest
from kdscale.engine.partition import MOMENTS
from kdscale.engine.shards import Shards
from kdscale.errors import StreamError
from kdscale.stream.directory import list_endpoints
from kdscale.stream.protocol import Access, call, connect
from tests.failure.runs import ranks_of, wait_for_words
from tests.runs import (
    KDSCALE,
    PATIENCE_S,
    assert_nothing_left,
    finish,
    marked,
    marked_running,
    run,
    start,
    steps,
    wait_for_checkpoint,
    wait_for_file,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow

SUMMARY_FIELDS = {
    *("steps", "tokens_trained", "tokens_per_second", "wall_seconds", "canary", "payload", "bytes_per_token"),
    *("teacher_parameters", "student_parameters", "teacher_ranks", "student_ranks", "teacher_tokens_per_rank"),
    *("dummy_token_share", "teacher_wait_share", "kl_before", "kl_after", "perplexity_teacher"),
    *("top1_agreement_before", "top1_agreement_after", "perplexity_before", "perplexity_after"),
}


def test_whole_run(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Two teacher ranks, two student ranks under ZeRO-3; then the same command, `eval` and `export` on what it left."""
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        teacher={"ranks": 2},
        student={"layers": [0, 3], "parallel": {"data": 2}},
        train={"steps": 40, "batch_rows": 8, "micro_rows": 2, "lr": 1e-3},
        deepspeed={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        evaluate={"efficiency": True},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    assert run("train", str(config), log=log) == 0, log.read_text()
    assert_nothing_left()

    summary = json.loads((directory / "summary.json").read_text())
    assert set(summary) >= SUMMARY_FIELDS
    assert summary["canary"].startswith("ok: ")
    assert summary["teacher_ranks"] == summary["student_ranks"] == 2
    halves = summary["teacher_parameters_per_rank"]
    assert all(abs(held - summary["teacher_parameters"] / 2) < 0.01 * summary["teacher_parameters"] for held in halves)
    tokens = summary["teacher_tokens_per_rank"]
    assert min(tokens) > 0.8 * max(tokens)
    assert summary["dummy_token_share"] < 0.05
    assert summary["kl_after"] < 0.9 * summary["kl_before"]
    assert summary["student_parameters"] < summary["teacher_parameters"]
    assert summary["student_peak_memory_bytes"] > 0
    assert steps(directory) == list(range(1, 41))
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(row["coverage"] == 1.0 for row in metrics)
    assert sum(row["num_tokens"] for row in metrics) == summary["tokens_trained"]

    student = AutoModelForCausalLM.from_pretrained(directory / "student")
    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    assert tokenizer.decode(student.generate(**tokenizer("The loop", return_tensors="pt"), max_new_tokens=4)[0])
    assert summary["export_max_logit_difference"] < 1e-4

    # Nothing is left to train: the same command measures and ends, and loses nothing.
    assert run("train", str(config), log=log) == 0, log.read_text()
    again = json.loads((directory / "summary.json").read_text())
    for name in ("kl_before", "kl_after", "tokens_trained"):
        assert again[name] == pytest.approx(summary[name], rel=1e-4)
    assert steps(directory) == list(range(1, 41))

    assert run("eval", str(config), "--model", str(directory / "student"), log=log) == 0, log.read_text()
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation["kl"] == pytest.approx(summary["kl_after"], rel=1e-3)

    assert run("export", str(config), "--out", str(tmp_path / "exported"), log=log) == 0, log.read_text()
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "exported", directory / "student"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_nothing_left()


def test_interrupted_and_killed_runs_go_on(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """SIGINT, then SIGKILL to the driver, then SIGKILL to the supervisor, at random moments: each start goes on where the
    last one saved, and what comes out is, bit for bit, what a run comes to that nothing interrupts."""
    moments = random.Random(time.time_ns())
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        run={"deterministic": True},
        train={"steps": 90, "batch_rows": 4, "micro_rows": 2},
        checkpoint={"every_steps": 10},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"

    process = start("train", str(config), log=log)
    wait_for_step(directory, 1, process, log)
    second = subprocess.run(
        [*KDSCALE, "train", str(config)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert second.returncode == 1
    assert "another process works on" in second.stderr
    wait_for_step(directory, 12, process, log)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert finish(process, log) == 130, log.read_text()
    assert time.monotonic() - asked < 10
    assert_nothing_left()
    saved = newest(directory / "checkpoints")
    assert saved is not None
    assert saved.step == steps(directory)[-1] > 11, "the stop itself saved"

    # From a named checkpoint; a rank that is lost then costs no more than where it is lost later.
    process = start("train", str(config), "--resume", str(saved.directory), log=log)
    later = saved.step // 10 * 10 + 10
    behind = wait_for_words(f"checkpoints/step-{later} (", process, log, within_s=PATIENCE_S)
    ranks_of("StudentRank")[0].kill()
    behind = wait_for_words("going on from step ", process, log, PATIENCE_S, behind)
    wait_for_words(", every rank from its own shards", process, log, PATIENCE_S, behind)
    assert int(log.read_text()[behind:].partition(",")[0]) >= later
    wait_for_step(directory, saved.step + 12 + moments.randrange(10), process, log)
    wait_for_checkpoint(directory, saved.step + 1, process, log)
    time.sleep(moments.uniform(0, 0.1))
    (driver,) = marked_running("kdscale.driver")
    driver.kill()
    assert finish(process, log, within_s=30) == 128 + signal.SIGKILL
    assert_nothing_left()
    assert newest(directory / "checkpoints").step > saved.step

    process = start("train", str(config), log=log)
    wait_for_step(directory, saved.step + 35 + moments.randrange(10), process, log)
    time.sleep(moments.uniform(0, 0.1))
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)

    assert run("train", str(config), log=log) == 0, log.read_text()
    assert steps(directory) == list(range(1, 91))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["steps"] == 90
    assert summary["kl_after"] < summary["kl_before"]
    assert summary["changes_on_resume"] == []
    assert "going on from step" in log.read_text()
    assert "every rank from its own shards, bit for bit" in log.read_text()

    assert run("train", str(config), "run.name=through", log=log) == 0, log.read_text()
    assert_same_numbers(directory, tmp_path / "runs" / "through")
    assert_nothing_left()


def assert_same_numbers(one: Path, other: Path) -> None:
    """Metrics of every step but for times, master weights, optimizer states, and the exported student."""
    times = {"seconds", "wait_seconds", "checkpoint_stall_seconds", "tokens_per_second"}
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (one, other)]
    assert len(lines[0]) == len(lines[1])
    for here, there in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert {name: here[name] for name in here.keys() - times} == {
            name: there[name] for name in there.keys() - times
        }
    found = [newest(path / "checkpoints") for path in (one, other)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].step == found[1].step == len(lines[0])
    here, there = (Shards(checkpoint.directory) for checkpoint in found)
    assert here.names == there.names
    for name in here.names:
        for key in ("master", *MOMENTS):
            assert torch.equal(here.read(name, key), there.read(name, key)), f"{name}: {key}"
    exported = [(path / "student" / "model.safetensors").read_bytes() for path in (one, other)]
    assert exported[0] == exported[1]


def test_served_teacher(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """`kdscale teacher` in one place, `kdscale train --teacher-endpoints` in another; labels-only beside it."""
    config = write_config(tmp_path, teacher_dir, text_dir, teacher={"ranks": 2})
    endpoints, log, teacher_log = tmp_path / "teacher.json", tmp_path / "log", tmp_path / "teacher.log"
    teacher = start("teacher", str(config), "--write", str(endpoints), log=teacher_log)
    wait_for_file(endpoints, teacher, teacher_log)
    assert run("train", str(config), "--teacher-endpoints", str(endpoints), log=log) == 0, log.read_text()
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["teacher_ranks"] == 2
    other = ["run.name=labels", "loss.hard_weight=1"]
    assert run("train", str(config), *other, "--teacher-endpoints", str(endpoints), log=log) == 0, log.read_text()
    labels = json.loads((tmp_path / "runs" / "labels" / "summary.json").read_text())
    assert labels["payload"] is None
    assert labels["teacher_wait_share"] == 0
    assert labels["kl_before"] == pytest.approx(summary["kl_before"], rel=1e-5)
    teacher.send_signal(signal.SIGTERM)
    assert finish(teacher, teacher_log, within_s=30) == 130
    assert not endpoints.exists()
    assert_nothing_left()


def test_served_teacher_over_tls(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """The access file alone holds the secrets; who lacks its certificates gets nothing, and a plain teacher is refused."""
    config = write_config(
        *(tmp_path, teacher_dir, text_dir),
        teacher={"ranks": 2},
        train={"steps": 4},
        stream={"tls": "always", "give_up_seconds": 20},
    )
    endpoints, log, teacher_log = tmp_path / "teacher.json", tmp_path / "log", tmp_path / "teacher.log"
    teacher = start("teacher", str(config), "--write", str(endpoints), log=teacher_log)
    wait_for_file(endpoints, teacher, teacher_log)
    access = Access.load(endpoints)
    assert access.credentials is not None
    with pytest.raises(StreamError, match="does not answer a plain connection"):
        list_endpoints(replace(access, credentials=None))
    for endpoint in list_endpoints(access).endpoints:
        with connect(endpoint.address) as client, pytest.raises(FlightUnavailableError):
            call(client, "stats", access.token, 10)
    assert run("train", str(config), "--teacher-endpoints", str(endpoints), log=log) == 0, log.read_text()
    assert steps(tmp_path / "runs" / "tiny") == [1, 2, 3, 4]

    plain = tmp_path / "plain.json"
    replace(access, credentials=None).save(plain)
    assert run("train", str(config), "run.name=plain", "--teacher-endpoints", str(plain), log=log) == 1
    assert "plain.json holds no certificates" in log.read_text()
    secrets = [access.token, "PRIVATE KEY", "BEGIN CERTIFICATE", *access.credentials.key_pem.splitlines()]
    for process in marked():
        shown = " ".join([*process.cmdline(), *process.environ().values()])
        assert [secret for secret in secrets if secret in shown] == [], process.cmdline()[0]
    teacher.send_signal(signal.SIGTERM)
    assert finish(teacher, teacher_log, within_s=30) == 130
    assert not endpoints.exists()
    plain.unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {log, teacher_log} <= set(written)
    for path in written:
        content = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == [], path
    assert_nothing_left()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_diverging_student_ends_the_run(tmp_path: Path, teacher_dir: Path, text_dir: Path, stage: int):
    """The second step's loss is finite and its gradient is not: ZeRO 0 would train on with weights that are no numbers, ZeRO 1
    leave out every step. Neither is saved."""
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        student={"dtype": "float32"},
        train={"lr": 1e30, "warmup_steps": 0},
        deepspeed={"zero_optimization": {"stage": stage}},
        checkpoint={"every_steps": 1, "keep": 9},
        evaluate={"quality": False},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    assert run("train", str(config), log=log) == 1
    assert "DivergedError: student, rank 0: step 2: the loss is " in log.read_text()
    assert "Lower train.lr (1e+30)" in log.read_text()
    assert steps(directory) == [1]
    assert {path.name for path in (directory / "checkpoints").glob("step-*")} == {"step-1"}
    assert "starting the student again" not in log.read_text()
    assert_nothing_left()
