"""Classifiers of images and of texts by the road of language models: Ray, Flight, DeepSpeed, exact resume, export."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from kdscale.cli import app
from kdscale.data.images import Pixels
from kdscale.errors import KdscaleError
from tests.classes import make_classifier, save_classifier, task_of, write_digits, write_topics
from tests.distributed.launch import run_ranks
from tests.modes import class_ranks
from tests.runs import assert_nothing_left, run, start, wait_for_step, write_config

pytestmark = pytest.mark.slow

CASES = [
    {"family": family, "stage": stage, "micro_rows": micro_rows}
    for family, stage, micro_rows in [
        ("vit", 0, 4),
        ("vit", 3, 2),
        ("bert", 1, 1),
        ("bert", 3, 4),
        ("llama", 2, 2),
        ("llama", 3, 1),
    ]
]


def reference(family: str) -> dict[str, np.ndarray]:
    """The gradient of sum / examples in float64, by plain autograd through transformers' own forward of each example."""
    model = make_classifier(family).double()
    batch, logp_RV = class_ranks.step_batch(family)
    rows = []
    for row in np.flatnonzero(batch.trained_R):
        inputs = torch.from_numpy(batch.inputs_RL[row, : batch.lengths_R[row]])[None]
        if batch.of_images:
            rows.append(model(pixel_values=(inputs.view(1, 1, 8, 8).double() / 255 - 0.5) / 0.5).logits)
        else:
            rows.append(model(input_ids=inputs.long()).logits)
    logits, tau = torch.cat(rows), class_ranks.TEMPERATURE
    teacher = logp_RV[torch.from_numpy(batch.trained_R)].double()
    soft = tau**2 * torch.nn.functional.kl_div(
        torch.log_softmax(logits / tau, -1), teacher, reduction="batchmean", log_target=True
    )
    hard = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels()).long())
    loss = (1 - class_ranks.HARD) * soft + class_ranks.HARD * hard
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: np.zeros(1) if grad is None else grad.numpy() for name, grad in found.items()} | {
        "loss": np.array([loss.item(), batch.num_tokens])
    }


def test_loss_and_gradients_of_classification_are_plain_torchs(tmp_path: Path):
    """Over two ranks, ZeRO 0 to 3, with gradients accumulated or not."""
    run_ranks(class_ranks.__name__, 2, str(tmp_path), json.dumps(CASES))
    for number, case in enumerate(CASES):
        found, expected = np.load(tmp_path / f"{number}.npz"), reference(case["family"])
        assert set(found) == set(expected)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
        whole = np.concatenate([found[name].ravel() for name in expected if expected[name].any()])
        same = np.concatenate([expected[name].ravel() for name in expected if expected[name].any()])
        error = np.linalg.norm(whole - same) / np.linalg.norm(same)
        assert error < 1e-5, f"{case}: off by {error:.1e}"


def classification(tmp_path: Path, family: str, **sections: dict[str, Any]) -> Path:
    """A tiny deterministic run of two student ranks."""
    teacher, data = tmp_path / "teacher", tmp_path / "data"
    data.mkdir()
    (write_digits if family == "vit" else write_topics)(data)
    save_classifier(teacher, family)
    suffix = "parquet" if family == "vit" else "jsonl"
    config = write_config(
        tmp_path,
        teacher,
        data,
        run={"deterministic": True},
        data={
            "train": [str(data / f"train.{suffix}")],
            "heldout": [str(data / f"heldout.{suffix}")],
            "row_tokens": 48,
            "heldout_tokens": 40,
        },
        teacher={"ranks": 2 if family == "vit" else 1, "dtype": "float32"},
        student={"layers": [0, 3], "parallel": {"data": 2}, "dtype": "float32"},
        targets={"payload": "dense"},
        loss={"temperature": 2.0, "hard_weight": 0.1},
        train={"steps": 24, "batch_rows": 8, "micro_rows": 2, "lr": 3e-3},
        checkpoint={"every_steps": 10},
        **sections,
    )
    config.write_text(f"task: {task_of(family)}\n{config.read_text()}")
    return config


def lines(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "wait_seconds", "tokens_per_second", "checkpoint_stall_seconds"}
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def trained_undisturbed(tmp_path: Path, family: str) -> Path:
    """The config of a run that has been trained, measured and exported."""
    config, log, directory = classification(tmp_path, family), tmp_path / "log", tmp_path / "runs" / "whole"
    assert run("train", str(config), "run.name=whole", log=log) == 0, log.read_text()
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["canary"].startswith("ok: "), summary["canary"]
    assert summary["payload"] == "dense"
    assert summary["bytes_per_token"] == pytest.approx(4 * (10 if family == "vit" else 3) + 2)
    assert (summary["teacher_ranks"], summary["student_ranks"]) == (2 if family == "vit" else 1, 2)
    assert summary["tokens_trained"] == 24 * 8
    assert summary["heldout_tokens"] == (40 if family == "vit" else 10)
    assert summary["kl_after"] < 0.7 * summary["kl_before"]
    assert summary["top1_agreement_after"] > summary["top1_agreement_before"]
    assert summary["export_max_logit_difference"] < 1e-5
    assert_reloads(directory / "student", tmp_path / "data", family, summary)
    assert_nothing_left()
    return config


def weights(student: Path) -> dict[str, torch.Tensor]:
    return load_file(student / "model.safetensors")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_commands_without_ranks(config: Path, tmp_path: Path) -> None:
    """What needs neither teacher nor student to run, of the run that has been trained."""
    directory, again = tmp_path / "runs" / "whole", tmp_path / "again"
    summary = json.loads((directory / "summary.json").read_text())

    def command(*arguments: str) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments])

    # The checkpoint's student is the run's, and is read like it.
    assert command("export", str(directory), "--out", str(again)).exit_code == 0
    assert_same(weights(again), weights(directory / "student"))
    names = {path.name for path in (directory / "student").iterdir()}
    assert {path.name for path in again.iterdir()} == names
    # transformers notes in one file whether it may ask the hub, which is this process's matter.
    for beside in names - {"model.safetensors", "tokenizer_config.json"}:
        assert (again / beside).read_bytes() == (directory / "student" / beside).read_bytes(), beside
    said = command("show", str(config)).output
    assert f"all as float32, {summary['bytes_per_token']:g} bytes an example" in said
    assert f"{summary['tokens_trained']} in 24 steps" in said
    size = 4 * sum(one.numel() for one in weights(again).values())
    assert re.search(rf"student: weights per rank +│ +{size / 1024:.1f} KiB", said), said

    before = {*directory.iterdir()}
    for arguments, refusal in (
        (["export", str(directory), "--format", "gguf"], "a GGUF file is a language model"),
        (["export", str(again), "--format", "gguf"], "only causal language models can be written so"),
        (["probe", str(config)], "targets.payload: dense is exact and small; nothing to probe"),
    ):
        error = command(*arguments).exception
        assert isinstance(error, KdscaleError), error
        assert refusal in str(error)
    assert {*directory.iterdir()} == before


def test_text_classification_from_end_to_end(tmp_path: Path):
    assert_commands_without_ranks(trained_undisturbed(tmp_path, "bert"), tmp_path)


def test_image_classification_from_end_to_end(tmp_path: Path):
    """Undisturbed; then from a recording of the teacher, killed and gone on with: equal to the last bit."""
    config, log, runs = trained_undisturbed(tmp_path, "vit"), tmp_path / "log", tmp_path / "runs"
    assert_commands_without_ranks(config, tmp_path)
    assert run("record", str(config), str(tmp_path / "out"), log=log) == 0, log.read_text()
    recorded = ("targets.source=recording", f"targets.recording={tmp_path / 'out'}")
    process = start("train", str(config), "run.name=killed", *recorded, log=log)
    wait_for_step(runs / "killed", 3, process, log)
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)
    assert len(lines(runs / "killed")) < 24
    assert run("train", str(config), "run.name=killed", *recorded, log=log) == 0, log.read_text()
    assert "going on from step" in log.read_text()
    assert lines(runs / "killed") == lines(runs / "whole")
    assert_same(weights(runs / "killed" / "student"), weights(runs / "whole" / "student"))
    live, without = (json.loads((runs / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert without["teacher_ranks"] == 0
    for measure in ("kl_before", "kl_after", "accuracy_teacher", "accuracy_after"):
        assert without[measure] == live[measure], measure

    assert run("eval", str(config), "run.name=killed", *recorded, log=log) == 0, log.read_text()
    found = json.loads((runs / "killed" / "evaluation.json").read_text())
    for measure, called in (("kl",) * 2, ("top1_agreement",) * 2, ("accuracy", "accuracy_student")):
        assert found[called] == live[f"{measure}_after"], measure
    assert found["canary"].startswith("ok: ")
    assert_nothing_left()


def assert_reloads(student: Path, data: Path, family: str, summary: dict[str, Any]) -> None:
    """Plain transformers finds the accuracy that the run reports, on held-out examples as they lie on disk."""
    if family == "vit":
        rows = pq.read_table(data / "heldout.parquet").to_pylist()
        model = AutoModelForImageClassification.from_pretrained(student).eval()
        bytes_RP = torch.tensor([row["image"] for row in rows], dtype=torch.uint8).flatten(1)
        logits = model(pixel_values=Pixels.load(student).values(bytes_RP)).logits
    else:
        rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text().splitlines()]
        model = AutoModelForSequenceClassification.from_pretrained(student).eval()
        tokenizer = AutoTokenizer.from_pretrained(student)
        ids = [tokenizer(row["text"], truncation=True, max_length=48, return_tensors="pt")["input_ids"] for row in rows]
        logits = torch.cat([model(input_ids=one).logits for one in ids])
    right = (logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).double().mean().item()
    assert right == pytest.approx(summary["accuracy_after"])
