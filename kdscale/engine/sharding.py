"""ZeRO: a model spread over ranks for inference, and its parameters made whole for a moment."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from kdscale.engine.attention import attend_by_document
from kdscale.engine.models import load_model, require_known_head
from kdscale.engine.settings import GATHERED_AT_ONCE
from kdscale.spec import Task


class InferenceModel:
    """A language model or classifier over the ranks of this process group, by ZeRO-3 where there are several.

    Raises: ModelError for a model that cannot be read, or whose logits kdscale would not compute as it does.
    """

    def __init__(
        self,
        directory: str,
        settings: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        task: Task = "language-modelling",
    ) -> None:
        # transformers shards while it loads if this object lives; it must also outlive the model.
        self._keep_alive = HfDeepSpeedConfig(settings) if settings["zero_optimization"]["stage"] == 3 else None
        model = load_model(directory, dtype, task)
        if device.type == "cpu" and task == "language-modelling":
            attend_by_document(model)
        self.model: PreTrainedModel = model if self._keep_alive else model.to(device)  # type: ignore[arg-type]
        self.model.eval()
        if self._keep_alive:
            _gather_by_block(model)
        # One rank needs no engine: stage 0 leaves the module as it is.
        self.engine = deepspeed.initialize(model=self.model, config=settings)[0] if self._keep_alive else None
        if task == "language-modelling":
            require_known_head(self.model, gathered)

    def parameters_held(self) -> int:
        """Parameters this rank keeps between forwards."""
        return sum(local_numel(parameter) for parameter in self.model.parameters())

    def parameters_total(self) -> int:
        return sum(full_numel(parameter) for parameter in self.model.parameters())


def _gather_by_block(model: PreTrainedModel) -> None:
    """Let a block's weights come by one collective instead of one for each of its parameters: over gloo, a forward of a small
    model takes half the time."""
    # What transformers keeps on one device; tables are gathered alone, without a copy.
    names = {name for name in model._no_split_modules or () if not name.endswith("Embeddings")}
    for module in model.modules():
        if type(module).__name__ in names and sum(map(full_numel, module.parameters())) <= GATHERED_AT_ONCE:
            set_z3_leaf_module(module, True)


def local_numel(parameter: nn.Parameter) -> int:
    """Elements of ``parameter`` on this rank, ZeRO-3's padding included."""
    shard = getattr(parameter, "ds_tensor", None)
    return int(parameter.numel() if shard is None else shard.numel())


def full_numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Whole parameters inside the context, on every rank; all ranks must enter.

    What is written inside is kept with ``write`` only: then what rank 0 wrote, on every rank.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None, enabled=bool(sharded)):
        yield
