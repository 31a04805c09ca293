"""A whole run of a student cut into stages."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdscale.engine.checkpoint import newest
from tests.runs import assert_nothing_left, finish, run, start, steps, wait_for_step, write_config

pytestmark = pytest.mark.slow


def test_whole_pipeline_run(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Two stages, interrupted and resumed; then `eval` and `export` on what it left; then the same data parallel."""
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        student={"layers": [0, 3], "dtype": "float32", "parallel": {"pipeline": 2, "data": 1}},
        train={"steps": 60, "batch_rows": 4, "micro_rows": 1, "lr": 1e-3},
        checkpoint={"every_steps": 25},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(directory, 5, process, log)
    process.send_signal(signal.SIGINT)
    assert finish(process, log) == 130, log.read_text()
    assert_nothing_left()
    saved = newest(directory / "checkpoints")
    assert saved is not None
    assert saved.step == steps(directory)[-1] < 60

    assert run("train", str(config), log=log) == 0, log.read_text()
    assert_nothing_left()
    assert steps(directory) == list(range(1, 61))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["student_ranks"] == 2
    assert summary["canary"].startswith("ok: ")
    assert summary["export_max_logit_difference"] < 1e-4
    assert summary["kl_after"] < summary["kl_before"]
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(row["coverage"] == 1.0 and row["kl"] > 0 and row["gradient_norm"] > 0 for row in metrics)
    assert sum(row["num_tokens"] for row in metrics) == summary["tokens_trained"]

    assert run("eval", str(config), "--model", str(directory / "student"), log=log) == 0, log.read_text()
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation["kl"] == pytest.approx(summary["kl_after"], rel=1e-3)

    assert run("export", str(config), "--out", str(tmp_path / "exported"), log=log) == 0, log.read_text()
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "exported", directory / "student"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoModelForCausalLM.from_pretrained(directory / "student").config.use_cache

    # Neither stages nor the interruption changed what was learned.
    plain = ["run.name=plain", "student.parallel.pipeline=1"]
    assert run("train", str(config), *plain, log=log) == 0, log.read_text()
    rows = (tmp_path / "runs" / "plain" / "metrics.jsonl").read_text().splitlines()
    for one, other in zip(metrics, map(json.loads, rows), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3), one["step"]
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2), one["step"]
    assert_nothing_left()


def test_family_that_cannot_be_cut_is_refused_before_anything_starts(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    fields = {"model_type": "bloom", "vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    student = {"init": "config", "config": fields, "layers": None, "parallel": {"pipeline": 2}}
    config = write_config(tmp_path, teacher_dir, text_dir, student=student)
    log = tmp_path / "log"
    assert run("train", str(config), log=log) == 1
    assert "a model of type bloom cannot be cut into stages; supported are llama" in log.read_text()
