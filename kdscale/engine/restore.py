"""Going on from a checkpoint: the very state where the ranks are laid out as they were, else parameter by parameter."""

from pathlib import Path
from typing import Literal

from kdscale.engine.capture import install
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.fragments import SHARDS
from kdscale.engine.partition import MOMENTS, Partition
from kdscale.engine.process import any_rank
from kdscale.engine.randomness import set_random_state, state_file
from kdscale.engine.shards import Shards, require_same_frozen
from kdscale.engine.training import Engine
from kdscale.errors import CheckpointError

Way = Literal["exact", "converted"]


def restore(engine: Engine, partition: Partition, checkpoint: Checkpoint, rank: int, world: int) -> Way:
    """Bring ``engine`` to where ``checkpoint`` was saved; every rank calls it. Returns the way that was taken:

    ``exact``: each rank holds the very fragments that this rank wrote, and DeepSpeed loads its own files: bit for bit,
    random state included.
    ``converted``: other ranks, another ZeRO stage, pipeline or dtype. Master weights, optimizer states and counters are
    the same numbers. Random states are left behind: what a step draws depends on (seed, step, rank) alone, see
    ``process.seed_step``.

    Raises:
        CheckpointError: on every rank, when the checkpoint is not of this student, or a file cannot be read.
    """
    held = partition.describe()
    same, shards, fault = False, None, None
    try:
        shards = Shards(checkpoint.directory)
        same = world == len(shards.by_rank) and shards.by_rank[rank]["fragments"] == held["fragments"]
        # Most are not in the checkpoint: they must be there already.
        require_same_frozen(checkpoint.directory, held["frozen"], shards)
    except CheckpointError as error:
        fault = error
    _agree(fault, engine, checkpoint)
    assert shards is not None
    if any_rank(not same, engine.device):
        _convert(engine, partition, shards, checkpoint)
        return "converted"
    install(engine)
    # Not strict: frozen weights are missing. That all others are there was told by the fragments.
    path, _ = engine.load_checkpoint(str(checkpoint.directory), tag=SHARDS, load_module_strict=False)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {checkpoint.directory / SHARDS}")
    _take_settings(engine)
    partition.forget_digests()
    set_random_state(checkpoint.directory / state_file(rank))
    return "exact"


def _take_settings(engine: Engine) -> None:
    """Settings of this run in place of those that DeepSpeed has restored with the states."""
    params = engine.optimizer_params() or {}
    given = {name: params[name] for name in ("betas", "weight_decay") if name in params}
    for group in engine.optimizer.param_groups:
        group.update(given)
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()


def _convert(engine: Engine, partition: Partition, shards: Shards, checkpoint: Checkpoint) -> None:
    """Every rank reads the fragments it holds now, one parameter at a time, from whichever rank's file has them."""
    fault = None
    try:
        if engine.zero_nvme_offload_optimizer():
            raise CheckpointError(
                f"{checkpoint.directory} is of other ranks or another ZeRO stage, and deepspeed.zero_optimization"
                ".offload_optimizer keeps the states on NVMe, where they cannot be converted; go on with the checkpoint's"
                " own, or without the offload"
            )
        _require_same_parameters(partition, shards, checkpoint.directory)
        counters = shards.counters()
        partition.open_states(shards.optimizer_steps())
        for name in partition.trained:
            for key in ("master", *MOMENTS):
                partition.write(name, key, shards.read(name, key))
    except CheckpointError as error:
        fault = error
    # Before the ranks meet in the gathers below.
    _agree(fault, engine, checkpoint)
    for name in partition.trained:
        partition.write_model(name, shards.read(name, "master"))
    for name, count in counters.items():
        setattr(engine, name, count)


def _require_same_parameters(partition: Partition, shards: Shards, directory: Path) -> None:
    for name, parameter in partition.trained.items():
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        if name not in shards.names or shards.shape(name) != shape:
            there = f"{shards.shape(name)}" if name in shards.names else "nothing of that name"
            raise CheckpointError(
                f"{directory} is not of this student: {name} is {shape} here, and {there} in the checkpoint"
            )


def _agree(fault: CheckpointError | None, engine: Engine, checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError on every rank, when it is one rank's."""
    if any_rank(fault is not None, engine.device):
        raise fault or CheckpointError(f"{checkpoint.directory} could not be restored: another rank failed")
