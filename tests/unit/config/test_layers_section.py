"""``loss.layers``: what is refused at load, and what becomes of a request."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdscale.config import load_config
from kdscale.config.load import dump_resolved, load_resolved
from kdscale.errors import CheckpointError, ConfigError
from kdscale.identity import changes, require_resumable, scheduled, settings
from kdscale.stream.protocol import Meaning
from kdscale.stream.recording import Provenance, differences

BASE: dict[str, Any] = {
    "data": {"train": ["text.jsonl"]},
    "teacher": {"model": "some/teacher"},
    "student": {"layers": [0, 1]},
    "train": {"schedule": "constant"},
    "loss": {"layers": {"pairs": {1: 6, 2: 12, 0: 6}}},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_it_is_part_of_the_request_and_of_nothing_without_it(file: Path, tmp_path: Path):
    config = load_config(file)
    assert config.target_spec(0).layers == (6, 12)
    assert config.target_spec(0).as_dict()["layers"] == [6, 12]
    dump_resolved(config, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == config
    plain = load_config(file, ["loss.layers=null"])
    assert not any("layers" in name for name in plain.target_spec(0).as_dict())
    assert not any(name.startswith("loss.layers") for name in settings(plain))


def test_without_soft_targets_there_still_is_a_teacher(file: Path):
    assert load_config(file, ["loss.hard_weight=1"]).loss.soft


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.layers.pairs={}", r"loss.layers.pairs = {}: dictionary should have at least 1 item"),
        ("loss.layers.pairs={-1: 3}", r"layer -1: layers count from 0, the embedding's output"),
        ("loss.layers.distance=l1", r"loss.layers.distance = 'l1': input should be 'mse' or 'cosine'"),
        ("loss.layers.wait=1", r"unknown key loss.layers.wait; did you mean loss.layers.weight\?"),
        ("loss.layers.weight=-1", r"loss.layers.weight: -1 must be 0 or more"),
        ("loss.layers.encoding=uint4", r"loss.layers.encoding = 'uint4': input should be 'bfloat16' or 'int8'"),
        ("student.parallel.pipeline=2", r"loss.layers with student.parallel.pipeline = 2: only the last stage"),
        ("targets.source=none", r"targets.source = none has no teacher, and loss.layers learns from one"),
        ("task=sequence-classification", r"loss.layers: task = sequence-classification has no states of single tokens"),
    ],
)
def test_refused_at_load(file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("override", "name", "allowable"),
    [
        ("loss.layers.weight=2", "loss.layers.weight", True),
        ("loss.layers.distance=mse", "loss.layers.distance", True),
        ("loss.layers.encoding=int8", "loss.layers.encoding", True),
        ("loss.layers.pairs={1: 5}", "loss.layers.pairs", False),
        ("loss.layers=null", "loss.layers.pairs", False),
    ],
)
def test_going_on_with_other_layers(file: Path, override: str, name: str, allowable: bool):
    then, now = (settings(load_config(file, given)) for given in ([], [override]))
    found = changes(then, now)
    assert name in [one.name for one in found]
    with pytest.raises(CheckpointError, match=name):
        require_resumable("step-5", found, deterministic=False, allowed=())
    if allowable:
        require_resumable("step-5", found, deterministic=False, allowed=(name,))


def test_a_moving_weight_moves_over_the_steps(file: Path):
    assert not scheduled(load_config(file))
    assert scheduled(load_config(file, ["loss.layers.weight={start: 1, end: 0}"]))


def test_a_recording_of_other_layers_is_another_one(file: Path):
    meaning = Meaning("teacher", "tokenizer", 300, 32)
    ours, others, none = (
        Provenance.of(load_config(file, given), meaning, "text").as_dict()
        for given in ([], ["loss.layers.pairs={1: 5}"], ["loss.layers=null"])
    )
    assert differences(json.loads(json.dumps(ours)), ours) == []
    assert differences(ours, others) == ["targets.layers: recorded [6, 12], now [5]"]
    assert "targets.layers: recorded [6, 12], now None" in differences(ours, none)
    assert "layers" not in none["targets"]
