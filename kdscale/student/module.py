"""The student with its loss inside: base -> trained positions -> head with loss. Tensors in, tensors out.

R = rows, L = columns, T = positions trained on, D = hidden size.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from kdscale.batch import Batch, ExampleBatch, SoftTargets
from kdscale.data.images import Pixels
from kdscale.engine.classifiers import example_tensors
from kdscale.engine.layers import caught_layers
from kdscale.engine.models import head_module, head_of, hidden_states, set_head
from kdscale.head import Head, HeadSpec
from kdscale.losses.aligned import AlignedTargets, Alignment, aligned_loss
from kdscale.losses.fused import STATS, fused_loss
from kdscale.losses.objective import Objective
from kdscale.losses.spans import SpanPlaces
from kdscale.paired import PairedBatch
from kdscale.student.layers import LayerLoss

Targets = SoftTargets | AlignedTargets
SUMS = (*STATS, "layer_loss")
"""Names of a student's statistics: the fused loss's, and the distance of its layers to the teacher's, summed over pairs and
positions (0 without ``loss.layers``)."""


class HeadWithLoss(nn.Module):
    """Takes the place of the model's head, with its very parameters (tied or not) under the same names.

    The loss lives in this forward, because ZeRO-3 gathers a module's parameters around its forward and nowhere else.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, spec: HeadSpec, chunk_bytes: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.teacher_head: Head | None = None
        """Not a parameter of the student; needed for hidden targets."""
        self.spec = spec
        self._chunk_bytes = chunk_bytes
        self.alignment: Alignment | None = None
        """Of a student with a tokenizer of its own."""
        self._next: tuple[Objective, Targets | None] | None = None

    def expect(self, objective: Objective, targets: Targets | None) -> None:
        """What the next forward's loss is: modules take tensors only, so this comes beside them."""
        self._next = objective, targets

    def forward(
        self, hidden_TD: torch.Tensor, labels_T: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(loss sum, statistics) as ``fused_loss`` gives them; without labels what came in, for a classifier's own forward."""
        if labels_T is None:
            return hidden_TD
        assert self._next is not None, "expect() comes before every forward with labels"
        objective, targets = self._next
        self._next = None
        student = (hidden_TD, self.weight, self.bias, self.spec, labels_T)
        chunk_bytes, teacher = self._chunk_bytes, self.teacher_head
        if isinstance(targets, AlignedTargets):
            assert self.alignment is not None
            beside = (targets, objective, self.alignment)
            return aligned_loss(*student, *beside, chunk_bytes=chunk_bytes, teacher_head=teacher)
        return fused_loss(*student, targets, objective, chunk_bytes=chunk_bytes, teacher_head=teacher)


class StudentModule(nn.Module):
    """What DeepSpeed trains. Parameter names are the model's own behind ``model.``; ``layers.`` has those of the projections."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        chunk_bytes: int,
        pixels: Pixels | None = None,
        layers: LayerLoss | None = None,
    ) -> None:
        """``pixels``: how the model reads images; none reads text. ``layers``: what it learns from inside the teacher."""
        super().__init__()
        set_head(model, HeadWithLoss(*head_of(model, vocab_size), chunk_bytes))
        self.model = model
        self.layers = layers
        self._pixels = pixels
        self._layer_weight = 0.0

    def expect(self, objective: Objective, targets: Targets | None) -> None:
        """See ``HeadWithLoss.expect``."""
        self._layer_weight = objective.layer_weight
        if self.layers is not None and isinstance(targets, SoftTargets):
            self.layers.expect(targets.layers_TND)
            targets = replace(targets, layers_TND=None)
        self.head.expect(objective, targets)

    @property
    def head(self) -> HeadWithLoss:
        head = head_module(self.model)
        assert isinstance(head, HeadWithLoss)
        return head

    def forward(
        self,
        inputs_RL: torch.Tensor,
        beside: torch.Tensor,
        trained_T: torch.Tensor,
        labels_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """(loss sum, statistics ``SUMS``) of what ``expect`` was told; without labels the hidden states of the trained
        positions, ([T, D],).

        ``beside``: see ``hidden_states``. ``trained_T`` indexes the flattened rows: positions that are not trained on never
        meet the head.
        """
        wanted = self.layers.student_layers if self.layers is not None and labels_T is not None else ()
        with caught_layers(self.model, wanted) as caught:
            hidden_TD = hidden_states(self.model, inputs_RL, beside, self._pixels)[trained_T]
        if labels_T is None:
            return (hidden_TD,)
        loss, stats = self.head(hidden_TD, labels_T)
        layer_loss = loss.new_zeros(())
        if self.layers is not None:
            layer_loss = self.layers(*(caught[layer].flatten(0, 1)[trained_T] for layer in wanted))
            loss = loss + self._layer_weight * layer_loss
        return loss, torch.cat([stats, layer_loss.detach().reshape(1)])


def flatten_batch(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, positions, indices of the trained positions) on ``device``; of examples (inputs, lengths, indices)."""
    trained_T = torch.from_numpy(batch.trained.reshape(-1).nonzero()[0])
    if isinstance(batch, ExampleBatch):
        return *example_tensors(batch, device), trained_T.to(device)
    return (
        torch.from_numpy(batch.ids_RL).long().to(device),
        torch.from_numpy(batch.positions_RL).long().to(device),
        trained_T.to(device),
    )


def targets_on(batch: Batch, targets: SoftTargets | None, device: torch.device) -> Targets | None:
    """The targets of ``batch`` as the head takes them, on ``device``."""
    if targets is None:
        return None
    if not isinstance(batch, PairedBatch):
        return targets.each(lambda tensor: tensor.to(device, non_blocking=True))
    places = (torch.from_numpy(one) for one in batch.span_places())
    return AlignedTargets(targets, *(SpanPlaces(one[:, 0], one[:, 1]) for one in places)).to(device)
