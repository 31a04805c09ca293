"""Parameters put together from the fragments that ranks list and hold."""

import pickle
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from kdscale.engine.capture import load_shard
from kdscale.engine.fragments import SHARDS, Fragment, index_file, index_files
from kdscale.engine.partition import digest
from kdscale.engine.shards import Shards, require_same_frozen
from kdscale.errors import CheckpointError

WEIGHT = torch.arange(6.0).reshape(2, 3)
FROZEN = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)


def write_rank(directory: Path, rank: int, start: int, numel: int, *, steps: float = 7.0) -> None:
    """A rank that holds ``numel`` elements of the weight, behind two of padding."""
    file = f"part_{rank}.pt"
    flat = torch.cat([torch.full((2,), torch.nan), WEIGHT.view(-1)[start : start + numel]])
    state = {"step": torch.tensor(steps), "exp_avg": 10 * flat, "exp_avg_sq": 100 * flat}
    (directory / SHARDS).mkdir(exist_ok=True)
    torch.save({"masters": [flat], "states": {0: state}}, directory / SHARDS / file)
    fragment = Fragment("weight", [2, 3], start, numel, 0, 2, [file, "masters", 0], [file, "states", 0])
    index = {"fragments": [asdict(fragment)], "frozen": {"embedding": digest(FROZEN)}}
    for name, data in index_files(rank, index).items():
        (directory / name).write_bytes(data)


def test_a_parameter_is_put_together_from_all_ranks(tmp_path: Path):
    write_rank(tmp_path, 0, 0, 4)
    write_rank(tmp_path, 1, 4, 2)
    shards = Shards(tmp_path)
    assert shards.names == ["weight"]
    assert torch.equal(shards.read("weight", "master"), WEIGHT)
    assert torch.equal(shards.read("weight", "exp_avg"), 10 * WEIGHT)
    assert torch.equal(shards.read("weight", "exp_avg_sq"), 100 * WEIGHT)
    assert shards.optimizer_steps() == 7


def test_ranks_that_hold_the_same_count_once(tmp_path: Path):
    write_rank(tmp_path, 0, 0, 6)
    write_rank(tmp_path, 1, 0, 6)
    assert torch.equal(Shards(tmp_path).read("weight", "master"), WEIGHT)


def test_copies_that_are_cut_differently_are_one_parameter(tmp_path: Path):
    """A weight tied over two stages of two data ranks each."""
    for rank, (start, numel) in enumerate([(0, 4), (4, 2), (0, 2), (2, 4)]):
        write_rank(tmp_path, rank, start, numel)
    assert torch.equal(Shards(tmp_path).read("weight", "exp_avg"), 10 * WEIGHT)


@pytest.mark.parametrize("second", [(5, 1), (1, 3), None], ids=["gap", "nothing new", "end missing"])
def test_a_parameter_that_is_not_whole_is_refused(tmp_path: Path, second: tuple[int, int] | None):
    write_rank(tmp_path, 0, 0, 4)
    if second is not None:
        write_rank(tmp_path, 1, *second)
    with pytest.raises(CheckpointError, match="master of weight is not whole; it ends after 4 elements"):
        Shards(tmp_path).read("weight", "master")


def test_ranks_of_other_steps_are_refused(tmp_path: Path):
    write_rank(tmp_path, 0, 0, 4)
    write_rank(tmp_path, 1, 4, 2, steps=8.0)
    with pytest.raises(CheckpointError, match=r"the optimizer's steps differ: \[7.0, 8.0\]"):
        Shards(tmp_path).optimizer_steps()


def test_without_an_index_nothing_is_read(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no index-0\.json"):
        Shards(tmp_path)
    (tmp_path / index_file(0)).write_text('{"fragments": [{"name": "x"}], "frozen": {}}')
    with pytest.raises(CheckpointError, match="the index of its shards cannot be read"):
        Shards(tmp_path)


def test_a_place_that_is_not_there_is_named(tmp_path: Path):
    write_rank(tmp_path, 0, 0, 6)
    torch.save({"masters": []}, tmp_path / SHARDS / "part_0.pt")
    with pytest.raises(CheckpointError, match=r"part_0.pt holds no \['masters', 0\]"):
        Shards(tmp_path).read("weight", "master")


def test_only_tensors_and_plain_values_are_unpickled(tmp_path: Path):
    torch.save({"masters": [Fraction(1, 2)]}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other.pt cannot be read.*"):
        load_shard(tmp_path / "other.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(1))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_shard(tmp_path / "plain.pt")


def test_frozen_parameters_must_be_the_same(tmp_path: Path):
    write_rank(tmp_path, 0, 0, 6)
    shards = Shards(tmp_path)
    require_same_frozen(tmp_path, {"embedding": digest(FROZEN)}, shards)
    # Of another dtype there is nothing to compare.
    require_same_frozen(tmp_path, {"embedding": digest(torch.nn.Parameter(FROZEN.float()))}, shards)
    with pytest.raises(CheckpointError, match="the frozen parameter embedding is not the one it was trained with"):
        require_same_frozen(tmp_path, {"embedding": digest(torch.nn.Parameter(2 * FROZEN))}, shards)
