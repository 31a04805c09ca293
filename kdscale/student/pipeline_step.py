"""One optimizer step of a student cut into stages: the first reads tokens, the last pulls targets and holds the loss.

R = rows, L = columns, T = positions trained on, D = hidden size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from kdscale.batch import SoftTargets
from kdscale.engine.families import Activations
from kdscale.engine.pipeline import Pipeline
from kdscale.engine.scale import backward_factor
from kdscale.engine.training import set_learning_rate
from kdscale.losses.objective import Objective
from kdscale.student.module import SUMS, HeadWithLoss, flatten_batch
from kdscale.student.step import MicroBatch, Signals, StepResult, step_result
from kdscale.topology import BatchCut, Topology


@dataclass(frozen=True)
class Lesson:
    """What the head makes of one micro-batch's hidden states."""

    labels_T: torch.Tensor
    objective: Objective
    targets: SoftTargets | None
    factor: float
    """What the loss sum is multiplied by before backward."""


class PipelineHead(nn.Module):
    """The last module: trained positions -> head with loss.

    How many positions are trained differs from micro-batch to micro-batch, and what stages send each other must not: so
    whole rows arrive, and the rest comes beside them, through a queue that the last stage's own iterator fills.
    """

    WEIGHT = "head.weight"

    def __init__(self, head: HeadWithLoss) -> None:
        super().__init__()
        self.head = head
        self._expected: deque[tuple[torch.Tensor, Lesson | None]] = deque()
        self._stats: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []

    def expect(self, trained_T: torch.Tensor, lesson: Lesson | None) -> None:
        """What a coming micro-batch trains on (indices of the flattened rows); without a lesson its hidden states are
        kept."""
        self._expected.append((trained_T, lesson))

    def forward(self, inputs: Activations) -> torch.Tensor:
        """The loss sum times the lesson's factor, a scalar (0 without a lesson)."""
        hidden_RLD, _ = inputs
        trained_T, lesson = self._expected.popleft()
        hidden_TD = hidden_RLD.flatten(0, 1)[trained_T]
        if lesson is None:
            self._hidden.append(hidden_TD)
            return hidden_TD.new_zeros(())
        self.head.expect(lesson.objective, lesson.targets)
        loss, stats = self.head(hidden_TD, lesson.labels_T)
        # A pipeline learns from no layers.
        self._stats.append(torch.cat([loss.detach().reshape(1), stats, stats.new_zeros(1)]).double())
        return loss * lesson.factor

    def take_sums(self, device: torch.device) -> torch.Tensor:
        """Loss and statistics since the last call, float64 [1 + S]; zeros where this stage is not the last."""
        stats, self._stats = self._stats, []
        return sum(stats, torch.zeros(1 + len(SUMS), dtype=torch.float64, device=device))

    def take_hidden(self) -> list[torch.Tensor]:
        """Hidden states [T, D] of the micro-batches without a lesson since the last call."""
        hidden, self._hidden = self._hidden, []
        return hidden


class PipelineStep:
    """DeepSpeed pipeline x data, ZeRO 0 or 1. Ranks take from ``micro_batches`` what their stage needs of it."""

    def __init__(self, pipeline: Pipeline, head: PipelineHead, cut: BatchCut, topology: Topology, rank: int) -> None:
        self._pipeline = pipeline
        self._head = head
        self._cut = cut
        self._reads_tokens, self._holds_loss = topology.reads_tokens(rank), topology.holds_loss(rank)
        self._waited_s = 0.0

    def train(
        self,
        micro_batches: Iterable[MicroBatch],
        objective: Objective,
        num_tokens_step: int,
        rate: float,
        *,
        signals: Callable[[], Signals] = Signals,
    ) -> StepResult:
        """See ``Step``."""
        engine = self._pipeline.engine
        factor = backward_factor(num_tokens_step, self._cut.micro_steps, self._cut.data)
        set_learning_rate(engine, rate)
        self._waited_s = 0.0
        self._pipeline.train(self._feed(micro_batches, objective, factor))
        sums = self._head.take_sums(engine.device)
        return step_result(engine, sums, self._waited_s, num_tokens_step, self._cut.data, signals())

    def _feed(
        self, micro_batches: Iterable[MicroBatch], objective: Objective, factor: float
    ) -> Iterator[Activations | None]:
        device = self._pipeline.engine.device
        for micro in micro_batches:
            ids_RL, positions_RL, trained_T = flatten_batch(micro.batch, device)
            if self._holds_loss:
                labels_T = torch.from_numpy(micro.batch.labels()).to(device)
                soft = micro.targets
                if soft is not None:
                    soft = soft.each(lambda tensor: tensor.to(device, non_blocking=True))
                self._head.expect(trained_T, Lesson(labels_T, objective, soft, factor))
                self._waited_s += micro.waited_s
            yield (ids_RL, positions_RL) if self._reads_tokens else None
