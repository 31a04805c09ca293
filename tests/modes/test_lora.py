"""Students of adapters, end to end: trained (also from inside the teacher), saved, gone on with, exported, and deployed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.config.hardware import cpu_sums_int8
from kdscale.engine.capture import load_shard
from tests.conftest import make_model, make_tokenizer
from tests.runs import assert_nothing_left, run, write_config

pytestmark = pytest.mark.slow


def elements(value: object) -> int:
    """Of all tensors in nested lists and dicts."""
    match value:
        case torch.Tensor():
            return value.numel()
        case dict():
            return sum(map(elements, value.values()))
        case list() | tuple():
            return sum(map(elements, value))
    return 0


def test_from_adapters_to_a_file_to_deploy(tmp_path: Path, text_dir: Path):
    teacher = make_tokenizer(tmp_path / "teacher", every_byte=True)
    make_model("llama").save_pretrained(teacher)
    lora = {"rank": 2, "alpha": 4, "dropout": 0.1}
    student = {"layers": [0, 3], "lora": lora, "dtype": "float32", "parallel": {"data": 2}}
    fields = {"train": {"steps": 12, "batch_rows": 4, "micro_rows": 2, "lr": 2e-2}, "student": student}
    fields |= {"deepspeed": {"zero_optimization": {"stage": 3}}, "export": {"shard_gib": 5e-5}}
    fields |= {"loss": {"layers": {"pairs": {1: 2, 2: 4}}}}
    config = write_config(tmp_path, teacher, text_dir, run={"deterministic": True}, **fields)
    log, tiny = tmp_path / "log", tmp_path / "runs" / "tiny"
    assert run("train", str(config), log=log) == 0, log.read_text()

    summary = json.loads((tiny / "summary.json").read_text())
    adapters, projections = 2 * 2 * (2 * 64 + 2 * 48 + 3 * 96), 2 * 32 * 32
    assert summary["student_parameters_trained"] == adapters
    assert summary["kl_after"] < 0.9 * summary["kl_before"]
    assert summary["export_max_logit_difference"] < 1e-3
    layer_losses = [json.loads(line)["layer_loss"] for line in (tiny / "metrics.jsonl").read_text().splitlines()]
    assert layer_losses[-1] < 0.9 * layer_losses[0]
    # Adapters and projections with two moments each, and nothing of the base that they stand on.
    saved = sum(elements(load_shard(file)) for file in (tiny / "checkpoints" / "step-12" / "shards").glob("*.pt"))
    trained = adapters + projections
    assert 3 * trained <= saved < 4 * trained < summary["student_parameters"] - adapters
    student_dir = tiny / "student"
    assert len(list(student_dir.glob("*.safetensors"))) > 1
    exported = {name: value for file in student_dir.glob("*.safetensors") for name, value in load_file(file).items()}
    assert not [name for name in exported if "lora" in name or "base_layer" in name or "projection" in name]

    # A checkpoint's export is the run's, to the last bit.
    assert run("export", str(tiny), "--out", str(tmp_path / "again"), log=log) == 0, log.read_text()
    again = {
        name: value for file in (tmp_path / "again").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert exported.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in exported.items())

    assert run("export", str(tiny), "--format", "gguf", "--type", "q8_0", log=log) == 0, log.read_text()
    assert "student-q8_0.gguf" in log.read_text()
    report = json.loads((tiny / "student-q8_0.gguf.json").read_text())
    assert 0 < report["kl"] < 0.02
    assert report["num_tokens"] == summary["heldout_tokens"], "on the run's held-out text"
    loaded = AutoModelForCausalLM.from_pretrained(tiny, gguf_file="student-q8_0.gguf")
    plain = AutoModelForCausalLM.from_pretrained(student_dir)
    ids = AutoTokenizer.from_pretrained(tiny, gguf_file="student-q8_0.gguf")(
        "Functions may return", return_tensors="pt"
    )
    ours, theirs = (torch.log_softmax(one.eval()(**ids).logits, -1) for one in (loaded, plain))
    assert (ours - theirs).abs().max() < 0.2
    if cpu_sums_int8():
        assert run("export", str(tiny), "--format", "int8", log=log) == 0, log.read_text()
        assert "student-int8: " in log.read_text()
        report = json.loads((tiny / "student-int8.json").read_text())
        assert 0 < report["kl"] < 0.02
        assert report["num_tokens"] == summary["heldout_tokens"], "on the run's held-out text"
        assert len(list((tiny / "student-int8").glob("*.safetensors"))) > 1, "in shards as the run's export"
        ours = torch.log_softmax(AutoModelForCausalLM.from_pretrained(tiny / "student-int8").eval()(**ids).logits, -1)
        assert 0 < (ours - theirs).abs().max() < 0.3
    assert not list(tiny.glob(".*partial*"))
    assert not list(tiny.glob(".export-*"))

    # Other adapters, and another base under the same ones, are other students.
    make_model("llama", seed=1).save_pretrained(teacher)
    for change, refusal in (
        ("student.lora.rank=8", "student.lora.rank: checkpoint 2, now 8"),
        ("train.steps=16", "teacher (the files of teacher.model)"),
    ):
        log.unlink()
        assert run("train", str(config), change, log=log) == 1
        assert refusal in log.read_text()
    assert_nothing_left()
