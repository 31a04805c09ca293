"""Students that learn from inside the teacher, end to end: live, killed and gone on with, recorded, and without it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdscale.engine.checkpoint import verify
from kdscale.engine.shards import Shards
from tests.runs import assert_nothing_left, run, start, wait_for_step, write_config

pytestmark = pytest.mark.slow


def measured(directory: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["layer_loss"], line["gradient_norm"]) for line in lines]


def trained(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Master weights of a checkpoint, projections among them."""
    shards = Shards(verify(directory / "checkpoints" / f"step-{step}").directory)
    return {name: shards.read(name, "master") for name in shards.names}


def test_from_inside_the_teacher(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    narrow = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    narrow |= {"num_hidden_layers": 2, "vocab_size": 320, "num_key_value_heads": 2, "tie_word_embeddings": True}
    layers = {"pairs": {0: 0, 1: 2, 2: 3}, "distance": "cosine", "weight": 0.5}
    sections: dict[str, Any] = {
        "run": {"deterministic": True},
        "teacher": {"ranks": 2},
        "student": {"init": "config", "layers": None, "config": narrow, "parallel": {"data": 2}},
        "loss": {"layers": layers},
        "train": {"steps": 24, "lr": 1e-2},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    config = write_config(tmp_path, teacher_dir, text_dir, **sections)
    log, runs, out = tmp_path / "log", tmp_path / "runs", tmp_path / "out"

    # Live, which fills a recording; then from that, killed and gone on with: the same numbers.
    sources = {name: (f"targets.source={name}", f"targets.recording={out}") for name in ("live+record", "recording")}
    assert run("train", str(config), "run.name=live", *sources["live+record"], log=log) == 0, log.read_text()
    assert (out / "MANIFEST.json").exists()
    killed = ("train", str(config), "run.name=killed", *sources["recording"])
    process = start(*killed, log=log)
    wait_for_step(runs / "killed", 2, process, log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_left(within_s=15)
    assert not (runs / "killed" / "summary.json").exists()
    assert run(*killed, log=log) == 0, log.read_text()

    steps = measured(runs / "live")
    assert len(steps) == 24
    assert steps[-1][2] < 0.8 * steps[0][2], "layers come nearer to the teacher's"
    weights = trained(runs / "live", 24)
    projections = {name: one for name, one in weights.items() if name.startswith("loss.layers.")}
    assert [list(one.shape) for one in projections.values()] == [[32, 16]] * 3
    assert measured(runs / "killed") == steps
    again = trained(runs / "killed", 24)
    assert again.keys() == weights.keys()
    assert all(torch.equal(one, again[name]) for name, one in weights.items())

    summary = json.loads((runs / "live" / "summary.json").read_text())
    assert summary["layer_loss"] == steps[-1][2]
    assert summary["kl_after"] < summary["kl_before"]
    # Three layers of 32 numbers beside the top 64 of under 2^16 ids.
    assert summary["bytes_per_token"] == 2 + 64 * 4 + 2 + 2 + 3 * 64

    # Nothing of the projections is exported, by the run or from its checkpoint.
    exported = load_file(runs / "live" / "student" / "model.safetensors")
    assert not [name for name in exported if "projection" in name]
    assert run("export", str(runs / "live"), "--out", str(tmp_path / "again"), log=log) == 0, log.read_text()
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert exported.keys() == again.keys()
    assert all(torch.equal(one, again[name]) for name, one in exported.items())

    # Other layers are another student.
    log.unlink()
    other = ("run.name=killed", *sources["recording"], "loss.layers.pairs={1: 1}")
    assert run("train", str(config), *other, log=log) == 1
    assert "loss.layers.pairs: checkpoint {'0': 0, '1': 2, '2': 3}, now {'1': 1}" in log.read_text()
    assert_nothing_left()
