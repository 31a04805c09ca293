"""A model from a directory, trained further on task data without a teacher."""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.runs import assert_nothing_left, run, write_config

pytestmark = pytest.mark.slow


def write_task(directory: Path) -> Path:
    """Prompts and completions: the completion is what is trained on."""
    directory.mkdir()
    rows = [
        {"prompt": f"Shorten {n}.{k}: {sentence}", "completion": " ".join(sentence.split()[:4])}
        for n in range(8)
        for k, sentence in enumerate(SENTENCES)
    ]
    for name, part in (("train", rows[:40]), ("heldout", rows[40:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory


def steps(directory: Path) -> list[tuple[float, int, str]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(step["loss"], step["num_tokens"], step["rows_digest"]) for step in map(json.loads, lines)]


def test_it_trains_as_beside_a_teacher(tmp_path: Path, teacher_dir: Path):
    """The very steps of training on labels while a teacher is served; better than the model it began with."""
    task = write_task(tmp_path / "task")
    beside = write_config(
        tmp_path,
        teacher_dir,
        task,
        run={"deterministic": True, "name": "beside"},
        student={"init": "model", "model": str(teacher_dir), "layers": None},
        loss={"hard_weight": 1.0},
    )
    fields = yaml.safe_load(beside.read_text())
    for section in ("teacher", "targets", "loss"):
        del fields[section]
    del fields["student"]["init"]
    fields["run"]["name"] = "task"
    alone = tmp_path / "task.yaml"
    alone.write_text(yaml.safe_dump(fields))
    log, runs = tmp_path / "log", tmp_path / "runs"

    assert run("train", str(beside), log=log) == 0, log.read_text()
    log.unlink()
    assert run("finetune", str(alone), log=log) == 0, log.read_text()
    assert steps(runs / "task") == steps(runs / "beside")
    assert "loading the teacher" not in log.read_text()

    summary, control = (json.loads((runs / name / "summary.json").read_text()) for name in ("task", "beside"))
    assert (summary["teacher_ranks"], summary["kl_after"], summary["perplexity_teacher"]) == (0, None, None)
    assert summary["canary"] == "not checked: no teacher (targets.source = none)"
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
    for key in ("perplexity_before", "perplexity_after"):
        assert summary[key] == pytest.approx(control[key], rel=1e-5)
    # Completions alone are trained on: a few tokens of each row.
    assert 0 < sum(tokens for _, tokens, _ in steps(runs / "task")) < 12 * 4 * 24

    other = make_tokenizer(tmp_path / "other")
    make_model("llama", seed=1).save_pretrained(other)
    log.unlink()
    assert run("finetune", str(alone), f"student.model={other}", "train.steps=20", log=log) == 1
    assert "student.files (the files of student.model)" in log.read_text()
    assert_nothing_left()
