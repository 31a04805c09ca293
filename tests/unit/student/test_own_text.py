"""What a run that goes on must find in its checkpoint, and what steps train on."""

from pathlib import Path
from typing import Any

import pytest

from kdscale.config.schema import RunConfig
from kdscale.data.loader import Loader
from kdscale.errors import CheckpointError, OnPolicyError
from kdscale.on_policy.exchange import Exchange
from kdscale.on_policy.rows import Written, to_tensors
from kdscale.student.own_text import OwnText
from tests.unit.data.test_loader import Watched, assert_same

FIELDS: dict[str, Any] = {
    "data": {"train": ["x"], "row_tokens": 24},
    "teacher": {"model": "t"},
    "student": {"layers": [0]},
}


def test_older_weights_must_be_there(tmp_path: Path):
    section = {"fraction": 1.0, "refresh_steps": 4, "lag_steps": 2, "prompt_tokens": 6, "new_tokens": 4}
    config = RunConfig.model_validate(FIELDS | {"on_policy": section})
    nothing: Any = None  # is asked only once the weights are there
    own = OwnText(config, tmp_path / "exchange", nothing, nothing, 0, 1)
    with pytest.raises(CheckpointError, match=r"holds no weights of step 4, which write text for steps from 6 on"):
        own.begin(6, tmp_path)
    (tmp_path / "weights-4-0123456789abcdef.safetensors").write_bytes(b"weights")
    own.begin(6, tmp_path)
    assert own.files() == {"weights-4-0123456789abcdef.safetensors": b"weights"}
    own.after_step(7)
    assert list(own.files()) == ["weights-4-0123456789abcdef.safetensors"]
    (tmp_path / "exchange" / "weights-4-0123456789abcdef.safetensors").unlink()
    with pytest.raises(OnPolicyError, match=r"has no weights-4 any more, which coming steps need"):
        own.files()


def test_some_rows_of_a_step_are_those_of_the_whole(tmp_path: Path):
    section = {"fraction": 0.5, "prompt_tokens": 6, "new_tokens": 4}
    config = RunConfig.model_validate(FIELDS | {"on_policy": section})
    texts = [Written((5, 6), (7, number)) for number in range(8)]
    for step in range(4):
        Exchange(tmp_path).put(f"rollout-{step}", to_tensors(texts, 0))
    nothing: Any = None  # writes nothing here
    loader = Loader(Watched([24] * 20), "isolated", 24, 4, seed=0)
    own = OwnText(config, tmp_path, nothing, loader, 0, 1)
    assert {own.rollout(step) is None for step in range(4)} == {True, False}
    for step in range(4):
        assert own.batch(step).num_rows == 4
        assert_same(own.batch(step, slice(1, 3)), own.batch(step).cut(slice(1, 3)))
