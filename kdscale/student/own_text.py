"""The student's side of on-policy distillation: its weights out, its own text in, and how near it is to the teacher there.

Agarwal et al. 2024 (GKD), arXiv 2306.13649. Who writes is elsewhere (``kdscale.on_policy``). No Ray.
"""

import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kdscale.batch import Batch, TokenBatch
from kdscale.config.schema import RunConfig
from kdscale.data.reading import AnyLoader
from kdscale.engine.export import trained_state
from kdscale.engine.process import sum_over_ranks
from kdscale.errors import CheckpointError
from kdscale.evaluate.quality import divergence_sums, share_of, teacher_view
from kdscale.head import Head
from kdscale.on_policy.exchange import Exchange
from kdscale.on_policy.rows import batch_of, from_tensors, texts_per_row
from kdscale.on_policy.schedule import Plan
from kdscale.stream.source import TeacherSource
from kdscale.student.layout import Student, whole_head
from kdscale.student.worker import StudentSetup
from kdscale.topology import Topology

_HELDOUT_ROWS = 2
"""Of one request."""


@dataclass(frozen=True)
class Rollout:
    """What an on-policy step trains on."""

    batch: TokenBatch
    staleness_steps: int
    """How many steps older than the step are the weights that wrote it, as the text itself says."""


@dataclass(frozen=True)
class OwnQuality:
    """Means over what the student wrote behind held-out prompts, at temperature 1, in nats a token."""

    num_tokens: int
    kl: float
    """KL(teacher ‖ student)."""
    reverse_kl: float
    """KL(student ‖ teacher): on the student's own text, per token that of whole sequences."""


class OwnText:
    """One rank's part. Every rank calls ``begin``, ``after_step`` and ``measure`` at the same points; ``batch`` and ``rollout``
    may be called from several threads.

    Raises:
        OnPolicyError: the text is damaged, or was not written in time.
    """

    def __init__(
        self, config: RunConfig, exchange: Path, student: Student, loader: AnyLoader, rank: int, ranks: int
    ) -> None:
        """``loader``: what other steps train on."""
        assert config.on_policy is not None
        self._config, self._section = config, config.on_policy
        self._exchange = Exchange(exchange)
        self._student, self._loader, self._rank, self._ranks = student, loader, rank, ranks
        self._plan = Plan.of(config.on_policy, config.run.seed)
        self._per_row = texts_per_row(config)
        self._done = 0
        self._published: list[int] = []
        self._closed = threading.Event()
        # All micro-batches of a step are cut from it.
        self._read = lru_cache(maxsize=4)(self._wait)

    # ---- weights out ----

    def begin(self, start: int, checkpoint: Path | None) -> None:
        """Let the weights be known that steps from ``start`` on need; older ones than the student's own lie in ``checkpoint``.

        Raises: CheckpointError when they don't.
        """
        self._done = start
        for version in self._plan.needed(start):
            if version < start:
                self._take_over(version, start, checkpoint)
        self._publish_if_needed()

    def _take_over(self, version: int, start: int, checkpoint: Path | None) -> None:
        file = next(checkpoint.glob(f"weights-{version}-*.safetensors"), None) if checkpoint is not None else None
        if file is None:
            raise CheckpointError(
                f"{checkpoint} holds no weights of step {version}, which write text for steps from {start} on: it was saved"
                " without on_policy, or with another refresh_steps, lag_steps or fraction. Set them back, or start a run of its"
                " own from the exported student (student.init: model)"
            )
        if self._rank == 0:
            self._exchange.put_file(file.name, file.read_bytes())
            self._published.append(version)

    def after_step(self, done: int) -> None:
        """``done`` steps are trained: publish the weights if they will write, drop what has served."""
        self._done = done
        self._publish_if_needed()
        for version in [one for one in self._published if one < done]:
            steps = self._plan.written_by(version)
            if not steps or steps[-1] < done:
                self._exchange.drop(f"weights-{version}")
                for step in steps:
                    self._exchange.drop(f"rollout-{step}")
                self._published.remove(version)

    def _publish_if_needed(self) -> None:
        done, ends = self._done, (0, self._config.train.steps)
        if not (self._plan.written_by(done) or (done in ends and self._config.evaluate.quality)):
            return
        state = trained_state(self._student.model, self._rank)
        if self._rank == 0:
            self._exchange.put(f"weights-{done}", state)
            self._published.append(done)

    def files(self) -> dict[str, bytes]:
        """For a checkpoint: older weights that coming steps still need, on rank 0; the newest are the student's own.

        Raises: OnPolicyError when they are gone: nothing could go on from such a checkpoint.
        """
        if self._rank != 0:
            return {}
        older = [version for version in self._plan.needed(self._done) if version < self._done]
        return dict(self._exchange.file(f"weights-{version}") for version in older)

    # ---- text in ----

    def rollout(self, step: int) -> Rollout | None:
        """What on-policy step ``step`` trains on, once it is written; none for another step."""
        return self._read(step) if self._plan.on_policy(step) else None

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """What step ``step`` trains on, once it is there, or the given ``rows`` of it."""
        rollout = self.rollout(step)
        return self._loader.batch(step, rows) if rollout is None else rollout.batch.cut(rows)

    def _wait(self, step: int) -> Rollout:
        tensors = self._exchange.wait(f"rollout-{step}", self._section.give_up_seconds, self._closed.is_set)
        texts, version = from_tensors(tensors)
        return Rollout(batch_of(step, texts, self._per_row, self._config.data.row_tokens), step - version)

    def close(self) -> None:
        """Nobody waits for text any more."""
        self._closed.set()

    # ---- the measure ----

    def measure(self, source: TeacherSource, teacher_head: Head, device: torch.device) -> dict[str, Any]:
        """``OwnQuality`` of the student as it is, on what it writes behind held-out prompts."""
        name = f"heldout-{self._done}"
        texts, _ = from_tensors(self._exchange.wait(name, self._section.give_up_seconds, self._closed.is_set))
        per_request = _HELDOUT_ROWS * self._per_row
        requests = [texts[first : first + per_request] for first in range(0, len(texts), per_request)]
        row_tokens = self._config.data.row_tokens
        every: list[Batch] = [batch_of(number, one, self._per_row, row_tokens) for number, one in enumerate(requests)]
        view = teacher_view(
            share_of(every, self._rank, self._ranks), source, teacher_head, self._config.stream.in_flight, device
        )
        hidden = self._student.hidden(view.batches)
        with whole_head(self._student) as head:
            sums = divergence_sums(hidden, head, view, ("forward_kl", "reverse_kl"))
        kl, reverse_kl, tokens = sum_over_ranks(sums.to(device)).tolist()
        return asdict(OwnQuality(int(tokens), kl / tokens, reverse_kl / tokens))


def open_own_text(
    setup: StudentSetup, student: Student, loader: AnyLoader, topology: Topology, rank: int, start: int
) -> OwnText | None:
    """What the config asks for, ready for step ``start``; none without on_policy. Raises: CheckpointError."""
    if setup.exchange is None:
        return None
    own = OwnText(setup.config, Path(setup.exchange), student, loader, topology.data_rank(rank), topology.data)
    own.begin(start, Path(setup.resume_from) if setup.resume_from is not None else None)
    return own
