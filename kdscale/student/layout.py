"""A student on its ranks, data parallel or cut into stages: the two faces everything else is the same behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from kdscale.batch import Batch
from kdscale.data.images import Pixels
from kdscale.engine.export import whole_state
from kdscale.engine.models import head_of
from kdscale.engine.partition import Partition
from kdscale.engine.pipeline import Pipeline
from kdscale.engine.sharding import gathered
from kdscale.engine.stages import Sample
from kdscale.engine.training import Engine, training_engine
from kdscale.head import Head
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.layers import LayerLoss, parameters_of
from kdscale.student.module import HeadWithLoss, StudentModule, flatten_batch
from kdscale.student.pipeline_step import Lesson, PipelineHead, PipelineStep
from kdscale.student.step import DataParallelStep, Step
from kdscale.topology import BatchCut, Topology


class Student(Protocol):
    """What a job does with its student. Every rank calls every method, in the same order."""

    model: PreTrainedModel
    """The whole student's shape; its weights may lie elsewhere."""
    engine: Engine
    partition: Partition
    """What of the trained parameters lies on this rank, and where."""
    head: HeadWithLoss
    """With its weights only on ranks that hold the loss."""

    def step(self, cut: BatchCut) -> Step: ...

    def hidden(self, batches: list[Batch]) -> list[torch.Tensor]:
        """Hidden states [T, D] of each batch's trained positions, on ranks that hold the loss; elsewhere nothing.

        In a pipeline the batches have one shape, and every rank has as many.
        """
        ...

    def whole_state(self) -> dict[str, torch.Tensor]:
        """All parameters by the model's own names on rank 0; elsewhere nothing."""
        ...


@contextmanager
def whole_head(student: Student) -> Iterator[Head]:
    """The student's head, for ranks that hold the loss; all of them must enter. For measuring: it wants no gradient, which
    the fused loss makes for whatever wants one."""
    head = student.head
    with gathered(head.parameters()):
        yield Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.spec)


class DataParallelStudent:
    """Every rank runs the whole model, sharded by ZeRO 0 to 3."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        chunk_bytes: int,
        settings: dict[str, Any],
        rank: int,
        pixels: Pixels | None = None,
        layers: LayerLoss | None = None,
    ) -> None:
        """``pixels``, ``layers``: see ``StudentModule``."""
        self.model, self._rank = model, rank
        self._module = StudentModule(model, vocab_size, chunk_bytes, pixels, layers)
        self.engine = training_engine(self._module, settings)
        self.partition = Partition(self.engine, parameters_of(model, layers))
        self.head = self._module.head

    def step(self, cut: BatchCut) -> Step:
        return DataParallelStep(self.engine, self._module, cut.micro_steps, cut.data)

    @torch.no_grad()
    def hidden(self, batches: list[Batch]) -> list[torch.Tensor]:
        self.engine.eval()
        return [self.engine(*flatten_batch(batch, self.engine.device))[0] for batch in batches]

    def whole_state(self) -> dict[str, torch.Tensor]:
        return whole_state(self.model, self._rank)


class PipelineStudent:
    """Ranks run stages of the model, in ``topology.data`` copies."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        chunk_bytes: int,
        settings: dict[str, Any],
        topology: Topology,
        rank: int,
        sample_shape: tuple[int, int] | None = None,
    ) -> None:
        """``sample_shape``: rows and columns of a micro-batch, to cut the model by the time its parts take on one; none cuts
        it by trained parameters."""
        self.model, self._topology, self._rank = model, topology, rank
        self.head = HeadWithLoss(*head_of(model, vocab_size), chunk_bytes)
        model.set_output_embeddings(self.head)
        self._last = PipelineHead(self.head)
        sample = None if sample_shape is None else self._sample(*sample_shape)
        self._pipeline = Pipeline(model, self._last, PipelineHead.WEIGHT, settings, topology, sample)
        self._last.take_sums(self._pipeline.engine.device)
        self.engine = self._pipeline.engine
        self.partition = Partition(self.engine, self._pipeline.parameters)

    def _sample(self, rows: int, columns: int) -> Sample:
        """Whole rows of one document, trained on their labels."""
        ids_RL = torch.zeros(rows, columns, dtype=torch.long)
        objective = Objective(Divergence("forward_kl"), hard_weight=1.0)

        def before_head() -> None:
            device = self.head.weight.device
            lesson = Lesson(torch.zeros(rows * columns, dtype=torch.int32, device=device), objective, None, 1.0)
            self._last.expect(torch.arange(rows * columns, device=device), lesson)

        return Sample((ids_RL, torch.arange(columns).repeat(rows, 1)), before_head)

    def step(self, cut: BatchCut) -> Step:
        return PipelineStep(self._pipeline, self._last, cut, self._topology, self._rank)

    def hidden(self, batches: list[Batch]) -> list[torch.Tensor]:
        def feed() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for batch in batches:
                ids_RL, positions_RL, trained_T = flatten_batch(batch, self.engine.device)
                if self._topology.holds_loss(self._rank):
                    self._last.expect(trained_T, None)
                yield ids_RL, positions_RL

        self._pipeline.evaluate(feed(), len(batches))
        return self._last.take_hidden()

    def whole_state(self) -> dict[str, torch.Tensor]:
        return self._pipeline.whole_state()
