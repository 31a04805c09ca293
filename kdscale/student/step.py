"""One optimizer step, however it is cut: micro-batches in, global sums out."""

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Protocol

import torch

from kdscale.batch import Batch, SoftTargets
from kdscale.engine.process import sum_over_ranks
from kdscale.engine.scale import backward_factor
from kdscale.engine.training import Engine, finite_weights, gradient_norm, set_learning_rate
from kdscale.losses.blocks import OF_TOLD
from kdscale.losses.objective import Objective
from kdscale.student.module import SUMS, StudentModule, flatten_batch, targets_on


@dataclass(frozen=True)
class MicroBatch:
    """This rank's share of a micro-step; targets are absent when training on labels only."""

    batch: Batch
    targets: SoftTargets | None
    waited_s: float = 0.0
    """How long the trainer stood waiting for it."""


@dataclass(frozen=True)
class Signals:
    """What ranks tell each other beside the sums of a step: 1 from a rank that says so, then how many ranks did."""

    stop: int = 0
    """Was asked to stop."""
    save: int = 0
    """Asks for a checkpoint."""
    written: int = 0
    """Its share of the checkpoint being written lies on disk."""
    failed: int = 0
    """Its share will not be written."""


@dataclass(frozen=True)
class StepResult:
    """Means over the trained tokens of the whole step, all ranks (``OF_TOLD``: over those that targets tell of)."""

    num_tokens: int
    loss: float
    means: dict[str, float]
    """By the names of ``module.SUMS``, without ``count`` and ``told``."""
    gradient_norm: float | None
    """See ``training.gradient_norm``."""
    sound: bool
    """Whether the weights were changed, to finite numbers, on all ranks. DeepSpeed leaves out steps whose gradient is not finite,
    but for float32 at ZeRO 0, where it tells no norm either."""
    wait_seconds: float
    """Time spent waiting for soft targets, mean over the ranks that hold the loss."""
    heard: Signals
    """Of all ranks."""


class Step(Protocol):
    """Every rank calls ``train`` with the same number of micro-batches."""

    def train(
        self,
        micro_batches: Iterable[MicroBatch],
        objective: Objective,
        num_tokens_step: int,
        rate: float,
        *,
        signals: Callable[[], Signals] = Signals,
    ) -> StepResult:
        """One optimizer step at learning rate ``rate``; ``signals`` is asked at its end.

        The gradient is that of ``sum over the step of the objective / num_tokens_step``.
        """
        ...


def step_result(
    engine: Engine, sums: torch.Tensor, waited_s: float, num_tokens_step: int, data_ranks: int, signals: Signals
) -> StepResult:
    """The means that a step amounts to; every rank calls it.

    ``sums`` are this rank's loss and statistics ``SUMS``, float64 [1 + S]; zeros on ranks that hold no loss.
    """
    norm = gradient_norm(engine)
    broken = not engine.was_step_applied() or (norm is None and not finite_weights(engine))
    beside = [waited_s, float(broken), *map(float, astuple(signals))]
    *own, waited, unsound, stop, save, written, failed = sum_over_ranks(
        torch.cat([sums, sums.new_tensor(beside)])
    ).tolist()
    loss, *found = own
    by_name, count = dict(zip(SUMS, found, strict=True)), max(1, num_tokens_step)
    num_tokens, told = int(by_name.pop("count")), max(1, by_name.pop("told"))
    means = {name: value / (told if name in OF_TOLD else count) for name, value in by_name.items()}
    return StepResult(
        num_tokens=num_tokens,
        loss=loss / count,
        means=means,
        gradient_norm=norm,
        sound=not unsound,
        wait_seconds=waited / data_ranks,
        heard=Signals(int(stop), int(save), int(written), int(failed)),
    )


class DataParallelStep:
    """DeepSpeed data parallel, ZeRO 0 to 3."""

    def __init__(self, engine: Engine, module: StudentModule, micro_steps: int, data_ranks: int) -> None:
        self._engine = engine
        self._module = module
        self._micro_steps = micro_steps
        self._data_ranks = data_ranks

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
        engine = self._engine
        device = engine.device
        factor = backward_factor(num_tokens_step, self._micro_steps, self._data_ranks)
        set_learning_rate(engine, rate)
        sums = torch.zeros(1 + len(SUMS), dtype=torch.float64, device=device)
        waited_s = 0.0
        engine.train()
        for micro in micro_batches:
            labels_T = torch.from_numpy(micro.batch.labels()).to(device)
            # A micro-batch with no trained token still runs backward: the other ranks wait in the same collective.
            self._module.expect(objective, targets_on(micro.batch, micro.targets, device))
            loss, stats = engine(*flatten_batch(micro.batch, device), labels_T)
            engine.backward(loss * factor)
            engine.step()
            sums[0] += loss.detach().double()
            sums[1:] += stats.double()
            waited_s += micro.waited_s
        return step_result(engine, sums, waited_s, num_tokens_step, self._data_ranks, signals())
