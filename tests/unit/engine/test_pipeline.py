import pytest
from torch import nn

from kdscale.engine.pipeline import _require_work
from kdscale.errors import ModelError


def test_stages_without_work_are_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    _require_work([[frozen, nn.Linear(2, 2)], [nn.Linear(2, 2)]])
    with pytest.raises(ModelError, match=r"pipeline = 3: stage 1 would have nothing to train .* as \[1, 0, 1\]"):
        _require_work([[nn.Linear(2, 2)], [], [nn.Linear(2, 2)]])
    with pytest.raises(ModelError, match="stage 0 would have nothing to train"):
        _require_work([[frozen], [nn.Linear(2, 2)]])
