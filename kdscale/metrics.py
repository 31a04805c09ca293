"""One object a step: what is measured while training, and its file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdscale import log

_LOG = log.get(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. Losses are means in nats over the step's trained tokens; times are seconds."""

    step: int
    """Steps done, this one included."""
    num_tokens: int
    rows_digest: str
    """xxh3 of the token rows rank 0 trained on, in order: tells one batch from another."""
    loss: float
    soft: float
    hard: float
    kl: float | None
    """Forward KL at temperature 1, over what the payload tells of it; none where it tells nothing."""
    top1_agreement: float
    """This and the next three are means over what targets tell of: with another tokenizer over spans."""
    teacher_entropy: float
    teacher_kept_mass: float
    student_kept_mass: float
    coverage: float | None
    """Share of trained tokens that had a soft target, or (with another tokenizer) lay in a span that had; none when training on
    labels only."""
    gradient_norm: float | None
    """Before clipping; none where DeepSpeed does not tell it."""
    learning_rate: float
    seconds: float
    wait_seconds: float
    """Time spent waiting for soft targets, mean over ranks."""
    checkpoint_stall_seconds: float
    """Training stood still for checkpoints, between the step before and this one."""
    tokens_per_second: float
    rollout_tokens: int = 0
    """Trained tokens that the student itself wrote: all of an on-policy step's."""
    staleness_steps: int | None = None
    """On-policy: how many steps older than this one the weights were that wrote its text."""
    rollout_wait_seconds: float = 0.0
    """Time rank 0 stood waiting for that text."""
    unaligned_bytes: int | None = None
    """Bytes of trained tokens outside any span that a teacher with another tokenizer ends at too; none where there is none."""
    layer_loss: float | None = None
    """Distance of the student's layers to the teacher's (no nats), summed over pairs; none without ``loss.layers``."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class MetricsFile:
    """``metrics.jsonl``: each step stands once, also after a resume."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep the lines of steps up to ``resume_step``; the run goes on behind them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step]
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text("".join(f"{line}\n" for line in kept))
        aside.replace(path)
        self._path, self._torn = path, False
        # Unbuffered: what a full disk refuses is not tried again behind the next line.
        self._file = path.open("ab", buffering=0)
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        """The newest step's."""

    def write(self, metrics: StepMetrics) -> None:
        """A line that cannot be written is missing, and the log says so once: training goes on."""
        self.last = metrics.as_dict()
        # A line that failed may have left half of itself.
        line = (("\n" if self._torn else "") + json.dumps(self.last) + "\n").encode()
        try:
            whole, fault = self._file.write(line) == len(line), "no space is left"
        except OSError as error:
            whole, fault = False, str(error)
        if not whole and not self._torn:
            _LOG.warning("%s misses steps from %d on: %s", self._path, metrics.step, fault)
        self._torn = not whole

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines that are JSON objects; a killed run or a full disk may have left half of one."""
    if not path.is_file():
        return []
    whole = []
    for line in path.read_text().splitlines():
        try:
            json.loads(line)
        except ValueError:
            continue
        whole.append(line)
    return whole
