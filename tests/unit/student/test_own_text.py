"""What a run that goes on must find in its checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from kdscale.config.schema import RunConfig
from kdscale.errors import CheckpointError
from kdscale.student.own_text import OwnText


def test_older_weights_must_be_there(tmp_path: Path):
    fields: dict[str, Any] = {"data": {"train": ["x"]}, "teacher": {"model": "t"}, "student": {"layers": [0]}}
    config = RunConfig.model_validate(fields | {"on_policy": {"fraction": 1.0, "refresh_steps": 4, "lag_steps": 2}})
    nothing: Any = None  # is asked only once the weights are there
    own = OwnText(config, tmp_path / "exchange", nothing, nothing, 0, 1)
    with pytest.raises(CheckpointError, match=r"holds no weights of step 4, which write text for steps from 6 on"):
        own.begin(6, tmp_path)
    (tmp_path / "weights-4-0123456789abcdef.safetensors").write_bytes(b"weights")
    own.begin(6, tmp_path)
    assert own.files() == {"weights-4-0123456789abcdef.safetensors": b"weights"}
    own.after_step(7)
    assert list(own.files()) == ["weights-4-0123456789abcdef.safetensors"]
