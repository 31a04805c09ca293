"""What a student learns from the teacher's layers: its own states, through learned projections, beside the teacher's.

T = positions trained on, D = width of the student's states, E = of the teacher's, N = layers asked for.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from kdscale.config.layers import LayersSection
from kdscale.engine.described import width_of
from kdscale.engine.layers import PROJECTED, blocks_of
from kdscale.losses.layers import layer_distance


class LayerLoss(nn.Module):
    """The pairs of ``loss.layers``. Its parameters are no part of the model: trained and saved with it, never exported."""

    def __init__(self, layers: LayersSection, model: PreTrainedModel, teacher_width: int, seed: int) -> None:
        """Raises: ModelError for a model whose blocks cannot be found."""
        super().__init__()
        blocks_of(model)
        self.student_layers = tuple(layers.pairs)
        self._distance = layers.distance
        self._columns = [layers.teacher_layers.index(teacher) for teacher in layers.pairs.values()]
        learned = layers.projection == "learned"
        self.projections = nn.ModuleList(
            projection(width_of(model.config), teacher_width, seed + number) if learned else nn.Identity()
            for number in range(len(layers.pairs))
        ).to(model.dtype)
        self._teacher_TNE: torch.Tensor | None = None

    def expect(self, teacher_TNE: torch.Tensor | None) -> None:
        """The teacher's states for the next forward: modules take the student's tensors only, so this comes beside them."""
        self._teacher_TNE = teacher_TNE

    def forward(self, *states: torch.Tensor) -> torch.Tensor:
        """Sum over pairs and positions of the distances, float32, of the student's states [T, D] of ``student_layers``."""
        teacher_TNE, self._teacher_TNE = self._teacher_TNE, None
        assert teacher_TNE is not None, "expect() comes before every forward"
        # One projection after the other, always all of them: ZeRO-3's ranks gather them together.
        distances = [
            layer_distance(self._distance, project(student_TD), teacher_TNE[:, column]).sum()
            for project, student_TD, column in zip(self.projections, states, self._columns, strict=True)
        ]
        return torch.stack(distances).sum()


def parameters_of(model: PreTrainedModel, layers: LayerLoss | None) -> dict[str, nn.Parameter]:
    """All that is trained or frozen, by the names in a checkpoint: the model's own, and those of projections."""
    projections = {} if layers is None else dict(layers.named_parameters(prefix=PROJECTED))
    return {**dict(model.named_parameters()), **projections}


def projection(width: int, teacher_width: int, seed: int) -> nn.Linear:
    """``teacher_width x width`` without bias: the identity where they are equal, else orthogonal rows or columns, drawn."""
    linear = nn.Linear(width, teacher_width, bias=False)
    if width == teacher_width:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return linear
