"""The student with its loss inside: base -> trained positions -> head with loss. Tensors in, tensors out.

R = rows, L = columns, T = positions trained on, D = hidden size.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from kdscale.batch import SoftTargets, TokenBatch
from kdscale.engine.models import base_hidden, head_of
from kdscale.head import Head, HeadSpec
from kdscale.losses.fused import fused_loss
from kdscale.losses.objective import Objective


class HeadWithLoss(nn.Module):
    """Takes the place of the model's lm_head, with its very parameters (tied or not) under the same names.

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
        self._next: tuple[Objective, SoftTargets | None] | None = None

    def expect(self, objective: Objective, targets: SoftTargets | None) -> None:
        """What the next forward's loss is: modules take tensors only, so this comes beside them."""
        self._next = objective, targets

    def forward(self, hidden_TD: torch.Tensor, labels_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss sum, statistics) as ``fused_loss`` gives them."""
        assert self._next is not None, "expect() comes before every forward with labels"
        objective, targets = self._next
        self._next = None
        return fused_loss(
            hidden_TD,
            self.weight,
            self.bias,
            self.spec,
            labels_T,
            targets,
            objective,
            chunk_bytes=self._chunk_bytes,
            teacher_head=self.teacher_head,
        )


class StudentModule(nn.Module):
    """What DeepSpeed trains. Parameter names are the model's own behind ``model.``."""

    def __init__(self, model: PreTrainedModel, vocab_size: int, chunk_bytes: int) -> None:
        super().__init__()
        model.set_output_embeddings(HeadWithLoss(*head_of(model, vocab_size), chunk_bytes))
        self.model = model

    @property
    def head(self) -> HeadWithLoss:
        head = self.model.get_output_embeddings()
        assert isinstance(head, HeadWithLoss)
        return head

    def forward(
        self,
        ids_RL: torch.Tensor,
        positions_RL: torch.Tensor,
        trained_T: torch.Tensor,
        labels_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """(loss sum, statistics) of what ``head.expect`` was told; without labels the hidden states of the trained
        positions, ([T, D],).

        ``trained_T`` indexes the flattened rows: positions that are not trained on never meet the head.
        """
        hidden_TD = base_hidden(self.model, ids_RL, positions_RL).flatten(0, 1)[trained_T]
        if labels_T is None:
            return (hidden_TD,)
        loss, stats = self.head(hidden_TD, labels_T)
        return loss, stats


def flatten_batch(batch: TokenBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, positions, indices of the trained positions) on ``device``."""
    trained_T = torch.from_numpy(batch.predicts_RL.reshape(-1).nonzero()[0])
    return (
        torch.from_numpy(batch.ids_RL).long().to(device),
        torch.from_numpy(batch.positions_RL).long().to(device),
        trained_T.to(device),
    )
