import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.engine.randomness import random_state, set_random_state
from kdscale.errors import CheckpointError


def draw() -> tuple:
    return (torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random(), random.gauss(0, 1))


def test_every_generator_goes_on_where_it_was(tmp_path: Path):
    # An odd number of normal draws: the second of the last pair is kept for the next.
    random.gauss(0, 1)
    np.random.standard_normal(1)
    (tmp_path / "state").write_bytes(random_state())
    expected = [draw() for _ in range(3)]
    draw()
    set_random_state(tmp_path / "state")
    assert [draw() for _ in range(3)] == expected


def test_what_is_no_state_is_refused(tmp_path: Path):
    path = tmp_path / "state"
    with pytest.raises(CheckpointError, match="holds no random state"):
        set_random_state(path)
    path.write_bytes(random_state()[:-8])
    with pytest.raises(CheckpointError, match="holds no random state"):
        set_random_state(path)
