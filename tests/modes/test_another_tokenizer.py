"""A student whose tokenizer is not its teacher's, end to end: a vocabulary made, trained on spans, gone on with, exported."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdscale.config.hardware import cpu_sums_int8
from kdscale.data.tokenizer import load_tokenizer
from tests.conftest import make_model, make_tokenizer
from tests.pairs import make_vocabulary
from tests.runs import assert_nothing_left, run, start, wait_for_step, write_config

pytestmark = pytest.mark.slow
TIMES = ("seconds", "wait_seconds", "checkpoint_stall_seconds", "tokens_per_second")


def steps_of(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_a_student_learns_across_tokenizers(tmp_path: Path, text_dir: Path):
    """Two ranks of ZeRO-3 learn by GOLD from a remote teacher; killed and gone on with, bit for bit."""
    teacher = make_tokenizer(tmp_path / "teacher", every_byte=True)
    make_model("llama").save_pretrained(teacher)
    vocabulary = make_vocabulary(text_dir, tmp_path / "own.model")
    sections = {
        "run": {"deterministic": True},
        "student": {"layers": [0, 3], "parallel": {"data": 2}},
        "alignment": {"method": "gold", "tokenizer": str(vocabulary)},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "train": {"steps": 14, "batch_rows": 4, "micro_rows": 2, "lr": 5e-3},
        "loss": {"hard_weight": 0.2},
    }
    config = write_config(tmp_path, teacher, text_dir, **sections)
    log, runs = tmp_path / "log", tmp_path / "runs"
    assert run("train", str(config), log=log) == 0, log.read_text()

    summary = json.loads((runs / "tiny" / "summary.json").read_text())
    assert summary["bits_per_byte_after"] < 0.9 * summary["bits_per_byte_before"]
    assert summary["bits_per_byte_teacher"] > 0
    assert summary["kl_after"] is summary["top1_agreement_after"] is summary["perplexity_teacher"] is None
    assert 0.8 < summary["aligned_share"] <= 1
    assert summary["unaligned_bytes"] >= 0
    assert summary["matched_tokens"] > 256
    assert summary["canary"].startswith("ok")
    assert summary["export_max_logit_difference"] < 1e-3
    printed = log.read_text()
    assert "bits per byte" in printed
    assert "of the tokens aligned" in printed
    assert "perplexity" not in printed
    whole = steps_of(runs / "tiny")
    assert all(0.8 < step["coverage"] <= 1 and step["kl"] is None and math.isfinite(step["soft"]) for step in whole)
    assert whole[-1]["soft"] < whole[0]["soft"]

    # Killed behind a checkpoint, the rest is the same to the last bit.
    process = start("train", str(config), "run.name=halves", log=log)
    wait_for_step(runs / "halves", 7, process, log)
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)
    assert run("train", str(config), "run.name=halves", log=log) == 0, log.read_text()
    assert "going on from step" in log.read_text()
    assert steps_of(runs / "halves") == whole

    # What was exported reads text by its own tokenizer, in transformers alone.
    student_dir = runs / "halves" / "student"
    tokenizer = AutoTokenizer.from_pretrained(student_dir)
    own = load_tokenizer(str(vocabulary))
    text = "The loop variable is bound\n  to each item, naïve ☕."
    assert tokenizer(text)["input_ids"] == own.encode(text)
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    assert model.config.vocab_size == own.vocab_size
    written = model.generate(**tokenizer("The loop", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith("The loop")
    assert run("export", str(runs / "halves"), "--out", str(tmp_path / "again"), log=log) == 0, log.read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    # And to deploy it, it is measured on text that it reads itself.
    if cpu_sums_int8():
        assert run("export", str(runs / "halves"), "--format", "int8", log=log) == 0, log.read_text()
        assert json.loads((runs / "halves" / "student-int8.json").read_text())["top1_agreement"] > 0.9
    assert_nothing_left()


def test_sorted_probabilities_from_a_recording(tmp_path: Path, text_dir: Path, teacher_dir: Path):
    """ULD, by hidden states; a fresh model with a vocabulary of its own, whose targets were recorded."""
    vocabulary, log, out = make_vocabulary(text_dir, tmp_path / "own.model"), tmp_path / "log", tmp_path / "out"
    fields = {
        "model_type": "llama",
        "vocab_size": 340,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        student={"init": "config", "config": fields | {"num_attention_heads": 4}, "layers": None},
        alignment={"method": "uld", "tokenizer": str(vocabulary)},
        targets={"payload": "hidden"},
        train={"steps": 8, "batch_rows": 4, "micro_rows": 2, "lr": 5e-3},
    )
    assert run("record", str(config), str(out), log=log) == 0, log.read_text()
    recorded = ["targets.source=recording", f"targets.recording={out}"]
    assert run("train", str(config), *recorded, log=log) == 0, log.read_text()
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["teacher_ranks"] == 0
    assert summary["bits_per_byte_teacher"] > 0
    soft = [step["soft"] for step in steps_of(tmp_path / "runs" / "tiny")]
    assert soft[-1] < soft[0]
    assert_nothing_left()
