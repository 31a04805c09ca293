"""The training loop of one rank: pull, step, report, save. Knows no Ray."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import xxhash

from kdscale.batch import Batch
from kdscale.config.schema import RunConfig
from kdscale.data.reading import AnyLoader
from kdscale.engine.process import seed_step
from kdscale.engine.training import learning_rate
from kdscale.errors import DivergedError
from kdscale.losses.objective import objective_at
from kdscale.metrics import StepMetrics
from kdscale.paired import PairedBatch
from kdscale.spec import TargetSpec
from kdscale.stream.prefetch import Prefetcher
from kdscale.stream.source import TargetSource
from kdscale.student.own_text import OwnText
from kdscale.student.step import MicroBatch, Signals, Step, StepResult
from kdscale.topology import BatchCut, Topology


@dataclass(frozen=True)
class Totals:
    """Sums over the steps trained so far, earlier parts of a resumed run included."""

    tokens: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    checkpoint_stall_seconds: float = 0.0
    rollout_steps: int = 0
    """On-policy ones."""
    rollout_tokens: int = 0
    rollout_wait_seconds: float = 0.0
    staleness_steps: int = 0
    most_staleness_steps: int = 0
    covered_tokens: int = 0
    """With a teacher signal."""
    unaligned_bytes: int = 0

    def plus(self, metrics: StepMetrics) -> "Totals":
        stale = metrics.staleness_steps
        return Totals(
            self.tokens + metrics.num_tokens,
            self.seconds + metrics.seconds,
            self.wait_seconds + metrics.wait_seconds,
            self.checkpoint_stall_seconds + metrics.checkpoint_stall_seconds,
            self.rollout_steps + (stale is not None),
            self.rollout_tokens + metrics.rollout_tokens,
            self.rollout_wait_seconds + metrics.rollout_wait_seconds,
            self.staleness_steps + (stale or 0),
            max(self.most_staleness_steps, stale or 0),
            self.covered_tokens + round((metrics.coverage or 0) * metrics.num_tokens),
            self.unaligned_bytes + (metrics.unaligned_bytes or 0),
        )


@dataclass(frozen=True)
class Outcome:
    """Where the loop ended."""

    step: int
    totals: Totals
    stopped: bool
    """Asked to stop before the last step."""


class Batches(Protocol):
    """What steps train on."""

    def batch(self, number: int, rows: slice = slice(None)) -> Batch: ...


class Saving(Protocol):
    """What the loop knows of checkpoints; see ``student.saving``."""

    def signals(self) -> Signals: ...

    def after_step(self, done: int, heard: Signals, totals: Totals, *, last: bool) -> None: ...

    def take_stall_seconds(self) -> float: ...


class Trainer:
    """Batch number = step number = the only cursor: step ``n`` trains on batch ``n``, wherever it starts."""

    def __init__(
        self,
        config: RunConfig,
        loader: AnyLoader,
        cut: BatchCut,
        topology: Topology,
        rank: int,
        step: Step,
        *,
        emit: Callable[[StepMetrics], None],
        saving: Saving,
        own_text: OwnText | None = None,
    ) -> None:
        """``own_text``: what on-policy steps train on, and the loader's batches in the others; none trains on the loader's."""
        self._config = config
        self._train = config.train
        self._own_text = own_text
        self._batches: Batches = own_text or loader
        self._cut = cut
        self._rank, self._data_rank = rank, topology.data_rank(rank)
        self._step = step
        self._emit = emit
        self._saving = saving

    def requests(self, start: int) -> Iterator[tuple[Callable[[], Batch], TargetSpec]]:
        """What gives this rank's micro-batches from step ``start`` on, in the order they are trained on, and what each asks
        for."""
        for number in range(start, self._train.steps):
            for micro in range(self._cut.micro_steps):
                yield partial(self._share, number, micro), self._config.target_spec(number)

    def _share(self, number: int, micro: int) -> Batch:
        return self._batches.batch(number, self._cut.rows_of(self._data_rank, micro))

    def prefetch(self, start: int, source: TargetSource) -> Prefetcher:
        """Requests for everything from step ``start`` on, as far ahead as the window allows; asks at once."""
        return Prefetcher(source, self.requests(start), self._config.stream.in_flight)

    def run(self, start: int, totals: Totals, prefetcher: Prefetcher | None) -> Outcome:
        """Train from step ``start``; without a prefetcher this rank's micro-batches come without soft targets."""
        tokens_only = (batch() for batch, _ in self.requests(start)) if prefetcher is None else None
        for number in range(start, self._train.steps):
            began = time.monotonic()
            digest = xxhash.xxh3_64()
            seed_step(self._config.run.seed, number, self._rank)
            rollout = self._own_text.rollout(number) if self._own_text is not None else None
            rollout_wait_s = time.monotonic() - began
            objective = objective_at(self._config.loss, number, self._train.steps)
            if rollout is not None:
                # No label of what the student wrote is a true one.
                objective = replace(objective, hard_weight=0.0)
            batch = self._batches.batch(number)
            result = self._step.train(
                self._fetch(prefetcher, tokens_only, digest),
                objective,
                batch.num_tokens,
                learning_rate(number, self._train),
                signals=self._saving.signals,
            )
            _require_finite(number + 1, result, self._config)
            metrics = self._metrics(batch, result, digest.hexdigest(), time.monotonic() - began)
            if rollout is not None:
                metrics = replace(
                    metrics,
                    rollout_tokens=result.num_tokens,
                    staleness_steps=rollout.staleness_steps,
                    rollout_wait_seconds=rollout_wait_s,
                )
            totals = totals.plus(metrics)
            self._emit(metrics)
            done = number + 1
            last = done == self._train.steps
            self._saving.after_step(done, result.heard, totals, last=last)
            if result.heard.stop and not last:
                return Outcome(done, totals, stopped=True)
        return Outcome(self._train.steps, totals, stopped=False)

    def _fetch(
        self, prefetcher: Prefetcher | None, tokens_only: Iterator[Batch] | None, digest: xxhash.xxh3_64
    ) -> Iterator[MicroBatch]:
        for _ in range(self._cut.micro_steps):
            if prefetcher is None:
                assert tokens_only is not None
                micro = MicroBatch(next(tokens_only), None)
            else:
                fetched = prefetcher.next()
                micro = MicroBatch(fetched.batch, fetched.targets, fetched.waited_s)
            digest.update(micro.batch.inputs.tobytes())
            yield micro

    def _tells_kl(self, number: int) -> bool:
        """Whether step ``number`` has a KL at temperature 1. A mean of distributions at another temperature tells none: it is not
        the mean's distribution at that temperature."""
        mixed = self._config.teachers.combine == "mixture"
        return self._config.loss.soft and not (mixed and self._config.target_spec(number).temperature != 1)

    def _metrics(self, batch: Batch, result: StepResult, rows_digest: str, seconds: float) -> StepMetrics:
        means, soft = result.means, self._config.loss.soft
        number, paired = batch.number, batch if isinstance(batch, PairedBatch) else None
        return StepMetrics(
            step=number + 1,
            num_tokens=result.num_tokens,
            rows_digest=rows_digest,
            loss=result.loss,
            soft=means["soft"],
            hard=means["hard"],
            kl=means["kl"] if self._tells_kl(number) and math.isfinite(means["kl"]) else None,
            top1_agreement=means["top1_agree"],
            teacher_entropy=means["teacher_entropy"],
            teacher_kept_mass=means["teacher_kept_mass"],
            student_kept_mass=means["student_kept_mass"],
            # The prefetcher refuses a batch whose targets do not cover what was asked.
            coverage=(paired.coverage if paired is not None else 1.0) if soft else None,
            unaligned_bytes=paired.unaligned_bytes if paired is not None and soft else None,
            gradient_norm=result.gradient_norm,
            learning_rate=learning_rate(number, self._train),
            seconds=seconds,
            wait_seconds=result.wait_seconds,
            checkpoint_stall_seconds=self._saving.take_stall_seconds(),
            tokens_per_second=result.num_tokens / seconds,
            layer_loss=means["layer_loss"] if self._config.loss.layers is not None else None,
        )


def _require_finite(step: int, result: StepResult, config: RunConfig) -> None:
    """Every rank sees the same numbers, so all of them raise. Raises: DivergedError."""
    norm = result.gradient_norm
    if math.isfinite(result.loss) and (norm is None or math.isfinite(norm)) and result.sound:
        return
    gradient = "not told" if norm is None else f"{norm:g}"
    raise DivergedError(
        f"step {step}: the loss is {result.loss:g} and the gradient's norm {gradient}; both must stay finite, so this step was"
        f" not saved. Lower train.lr ({config.train.lr:g}) and go on with --allow-changed train.lr, from the newest checkpoint"
        " or, with --resume PATH, from an older one"
    )
