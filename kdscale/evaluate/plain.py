"""A model directory as transformers alone reads it: what served targets and exported students are compared with.

T = positions, V = true vocabulary or classes.
"""

from pathlib import Path

import torch

from kdscale.batch import Batch, ExampleBatch
from kdscale.engine import classifiers
from kdscale.engine.attention import attend_by_document
from kdscale.engine.described import pixels_of
from kdscale.engine.models import load_model
from kdscale.spec import Task


@torch.no_grad()
def plain_logits(
    batch: Batch, directory: Path, vocab_size: int, dtype: torch.dtype, task: Task, device: torch.device
) -> torch.Tensor:
    """Float32 logits [T, V] of an unsharded model at the trained positions of ``batch``. Raises: ModelError."""
    model = load_model(directory, dtype, task).eval()
    model.to(device)  # type: ignore[arg-type]
    if isinstance(batch, ExampleBatch):
        return classifiers.plain_logits(model, batch, pixels_of(directory, task), device)
    if device.type == "cpu":
        # The same roundings on both sides: what is compared is the weights, to the last bit.
        attend_by_document(model)
    ids, positions = (torch.from_numpy(one).long().to(device) for one in (batch.ids_RL, batch.positions_RL))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[torch.from_numpy(batch.predicts_RL).to(device)].float()[:, :vocab_size]
