"""What fine-tuning means, and what contradicts it."""

from pathlib import Path

import pytest

from kdscale.config.finetune import load_finetune
from kdscale.config.load import dump_resolved, load_config
from kdscale.errors import ConfigError

TASK = """\
data:
  train: [task.jsonl]
student:
  model: some/student
loss:
  chunk_mib: 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "task.yaml"
    path.write_text(TASK)
    return path


def test_it_is_a_run_on_labels_alone_from_a_directory(file: Path, tmp_path: Path):
    config = load_finetune(file, ["train.steps=7"])
    assert (config.student.init, config.student.model) == ("model", "some/student")
    assert (config.targets.source, config.loss.hard_weight, config.loss.soft) == ("none", 1.0, False)
    assert (config.loss.chunk_mib, config.train.steps) == (8, 7)
    assert config.teacher.model == "some/student", "its tokenizer"
    # What it resolves to says it all: the other commands need no second kind of config.
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.model=big", r"teacher: fine-tuning learns from the true labels alone; remove the section"),
        ("targets.source=live", r"override 'targets.source=live'|targets: fine-tuning learns from the true labels"),
        ("loss.hard_weight=0.5", r"override 'loss.hard_weight=0.5': loss.hard_weight = 0.5: fine-tuning learns"),
        ("loss.temperature=2", r"loss.temperature is about what is learned from a teacher"),
        ("student.init=teacher_layers", r"student.init = teacher_layers, .* set student.model"),
        ("student.model=null", r"student.model = None: fine-tuning starts from a model directory"),
        ("student.layers=[0]", r"student.init = model reads student.model; student.layers is not read"),
        ("student=small", r"student = 'small' is no section"),
        ("trains.steps=1", r"unknown key trains; did you mean train\?"),
    ],
)
def test_what_contradicts_it_is_refused(file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_finetune(file, [override])


def test_sections_set_to_nothing_are_absent(file: Path):
    assert load_finetune(file, ["teacher=null", "targets=null", "loss=null"]).targets.source == "none"


def test_a_run_without_a_teacher_learns_nothing_soft(file: Path):
    with pytest.raises(ConfigError, match=r"targets.source = none has no teacher .* set loss.hard_weight: 1"):
        load_config(file, ["teacher.model=some/student", "student.init=model", "targets.source=none"])
