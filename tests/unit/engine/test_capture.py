import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import nn

from kdscale.engine.capture import HostCapture
from kdscale.errors import CheckpointError

NOTHING = nn.Module()


def capture(root: Path, module: nn.Module = NOTHING) -> HostCapture:
    engine = HostCapture(module)
    engine.create(CheckpointCommitInfo(tag="shards", save_dir=str(root), save_latest=False))
    return engine


def test_what_training_changes_afterwards_is_not_in_it(tmp_path: Path):
    flat = torch.arange(1000.0)
    weights: OrderedDict = OrderedDict(a=flat[10:20].view(2, 5), tied=flat[10:20].view(2, 5), none=torch.empty(0))
    weights._metadata = {"version": 1}
    state = {"module": weights, "groups": [{"lr": 0.1, "betas": (0.9, torch.tensor(2.0))}], "shape": torch.Size([2])}
    engine = capture(tmp_path)
    engine.save(state, str(tmp_path / "shards" / "x.pt"))
    flat.zero_()
    state["groups"][0]["lr"] = 0.2
    captured = engine.take()
    assert captured.fault is None
    (found,) = captured.files.values()
    assert list(captured.files) == ["shards/x.pt"]
    assert found["module"]["a"].tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert found["module"]["a"] is found["module"]["tied"], "one tensor under two names is kept once"
    assert found["module"]["a"].untyped_storage().nbytes() == 40, "not the whole flat buffer"
    assert captured.num_bytes == 44
    assert found["module"]._metadata == {"version": 1}
    assert found["groups"][0]["lr"] == 0.1
    assert found["groups"][0]["betas"] == (0.9, torch.tensor(2.0))
    assert list(tmp_path.iterdir()) == [], "no disk was touched"
    assert engine.take().files == {}


def test_a_member_of_an_enumeration_is_kept_as_its_value(tmp_path: Path):
    """Whatever Python pickles it as: files are read without unpickling anything that could run."""
    engine = capture(tmp_path)
    engine.save({"zero_stage": ZeroStageEnum.weights}, str(tmp_path / "x.pt"))
    (found,) = engine.take().files.values()
    assert type(found["zero_stage"]) is int
    assert found["zero_stage"] == ZeroStageEnum.weights


def test_frozen_weights_are_not_saved_with_a_model_and_not_copied_with_a_stage(tmp_path: Path):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].requires_grad_(False)
    module[2].weight = module[0].weight
    engine = capture(tmp_path, module)
    engine.save({"module": module.state_dict()}, str(tmp_path / "x.pt"))
    (found,) = engine.take().files.values()
    assert set(found["module"]) == {"1.weight", "1.bias", "2.bias"}, "a tied one has two names"
    assert found["module"]["1.weight"].data_ptr() != module[1].weight.data_ptr()
    assert torch.equal(found["module"]["1.weight"], module[1].weight)
    engine = capture(tmp_path, module)
    engine.save(module.state_dict(), str(tmp_path / "layer.pt"))
    (found,) = engine.take().files.values()
    assert found["0.weight"].data_ptr() == module[0].weight.data_ptr()
    assert found["1.weight"].data_ptr() != module[1].weight.data_ptr()


def test_a_fault_is_kept_and_not_raised(tmp_path: Path):
    engine = capture(tmp_path)
    engine.save({"w": torch.ones(2)}, str(tmp_path / "shards" / "x.pt"))
    engine.save({"lock": threading.Lock()}, str(tmp_path / "shards" / "y.pt"))
    engine.save({"w": torch.ones(2)}, str(tmp_path / "shards" / "z.pt"))
    captured = engine.take()
    assert "lock" in str(captured.fault)
    assert captured.files == {}, "half a checkpoint is not kept in memory"


def test_a_refusal_keeps_nothing(tmp_path: Path):
    engine = HostCapture(NOTHING)
    engine.refuse(OSError("still hangs"))
    engine.create(CheckpointCommitInfo(tag="shards", save_dir=str(tmp_path), save_latest=False))
    engine.save({"w": torch.ones(2)}, str(tmp_path / "x.pt"))
    captured = engine.take()
    assert (str(captured.fault), captured.files) == ("still hangs", {})


def test_only_listed_objects_are_loaded(tmp_path: Path):
    class Surprise:
        def __reduce__(self):
            return (print, ("unpickled",))

    path = tmp_path / "x.pt"
    torch.save({"w": Surprise()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        HostCapture(NOTHING).load(str(path))
    torch.save({"w": torch.ones(2)}, path)
    assert HostCapture(NOTHING).load(str(path))["w"].tolist() == [1, 1]
