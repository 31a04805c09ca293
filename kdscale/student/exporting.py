"""The student as a directory that transformers loads, and whether that is still the student."""

from collections.abc import Callable
from pathlib import Path

import torch

from kdscale import log
from kdscale.batch import Batch, ExampleBatch, TokenBatch
from kdscale.config.schema import RunConfig
from kdscale.engine import process
from kdscale.engine.export import write_model
from kdscale.errors import ModelError
from kdscale.evaluate.plain import plain_logits
from kdscale.student.layout import Student, whole_head
from kdscale.topology import Topology

_LOG = log.get(__name__)
_EXPORTED = 1e-2, 1e-2
"""Most and mean difference of an exported student's logits, as shares of the largest."""
_COMPARED_COLUMNS = 512
"""Of the row, from its beginning: logits of all of a long one, over a large vocabulary, take gigabytes beside the engine."""
_MERGED_ROUNDED = 1e-1, 1e-2
"""The same where adapters were merged into bfloat16 weights: the sum is rounded once, and the forwards round in other
places."""


def export(
    student: Student,
    row: Batch,
    directory: Path,
    save_reader: Callable[[Path], None],
    config: RunConfig,
    topology: Topology,
    rank: int,
    *,
    dtype: torch.dtype,
    parameters: int,
) -> float | None:
    """Write ``directory``, and load it back plainly on one rank that holds the loss. Every rank calls it.

    ``dtype``, ``parameters``: the whole student's.

    Returns how far its logits are from the engine's on the beginning of ``row``; none for a student above
    ``evaluate.canary_max_gib``, as a plain one may not fit beside the engine.

    Raises:
        ModelError: too far. The directory stays, to be looked at.
    """
    state = student.whole_state()
    if rank == 0:
        write_model(student.model, state, directory, save_reader, config.export.shard_bytes)
    process.barrier()
    num_bytes = parameters * dtype.itemsize
    if num_bytes > config.evaluate.canary_max_gib * 2**30:
        if rank == 0:
            _LOG.warning(
                "the exported student was not checked: its %.1f GiB are above evaluate.canary_max_gib",
                num_bytes / 2**30,
            )
        return None
    difference, mean, largest = _differences(student, row, directory, config, topology, rank, dtype)
    rounded = config.student.lora is not None and dtype != torch.float32
    most, most_mean = _MERGED_ROUNDED if rounded else _EXPORTED
    if not (difference <= 1e-3 + most * largest and mean <= 1e-3 + most_mean * largest):
        raise ModelError(
            f"the exported student's logits differ from the engine's by up to {difference:.3g}, {mean:.3g} on average (the"
            f" largest is {largest:.3g}); not usable"
        )
    return difference


@torch.no_grad()
def _differences(
    student: Student,
    row: Batch,
    directory: Path,
    config: RunConfig,
    topology: Topology,
    rank: int,
    dtype: torch.dtype,
) -> list[float]:
    """The largest difference of the logits, the mean one, and the largest logit; on all ranks."""
    # Both sides forward the same shape: others would round otherwise.
    shown = row if isinstance(row, ExampleBatch) else beginning(row)
    hidden, device = student.hidden([shown]), student.engine.device
    found = torch.zeros(3, device=device)
    if topology.holds_loss(rank):
        with whole_head(student) as head:
            if topology.data_rank(rank) == 0:
                ours = head.logits(hidden[0])
                off = (ours - plain_logits(shown, directory, ours.shape[1], dtype, config.task, device)).abs()
                found.copy_(torch.stack([off.max(), off.mean(), ours.abs().max()]))
    return [float(one) for one in process.sum_over_ranks(found).tolist()]


def beginning(row: TokenBatch) -> TokenBatch:
    """The first columns of a single row, as far as something is trained on."""
    (trained_N,) = row.predicts_RL[0].nonzero()
    columns = max(_COMPARED_COLUMNS, int(trained_N[0]) + 2)
    ids, segments, positions, predicts = (
        plane_RL[:, :columns] for plane_RL in (row.ids_RL, row.segments_RL, row.positions_RL, row.predicts_RL.copy())
    )
    predicts[:, -1] = False  # what it predicts is cut off
    return TokenBatch(row.number, ids, segments, positions, predicts)
