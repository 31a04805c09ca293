"""What a person watching a run sees: phases, steps, and the table at the end. Plain lines without a terminal."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kdscale.metrics import StepMetrics

_PLAIN_PERIOD_S = 5.0


class Display:
    """Progress of one run on standard output."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._steps = steps
        self._began: tuple[float, int] | None = None
        self._wait = self._busy = 0.0
        self._last_plain = float("-inf")
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("starting", total=steps, line="")
            self._progress.start()

    def phase(self, name: str) -> None:
        """The run has come to ``name``."""
        if self._progress is not None:
            self._progress.update(self._task, description=name)
        else:
            self._say(f"[{time.strftime('%H:%M:%S')}] {name}")

    def count(self, done: int, total: int | None, what: str) -> None:
        """Progress inside a phase."""
        of = f" of {total}" if total is not None else ""
        if self._progress is not None:
            self._progress.update(self._task, description=f"{what} {done}{of}")
        elif done == total or time.monotonic() - self._last_plain >= _PLAIN_PERIOD_S:
            self._last_plain = time.monotonic()
            self._say(f"{what} {done}{of}")

    def step(self, metrics: StepMetrics) -> None:
        if self._began is None:
            self._began = (time.monotonic() - metrics.seconds, metrics.step - 1)
        self._wait += metrics.wait_seconds
        self._busy += metrics.seconds
        line = step_line(metrics, self._steps, self._wait / self._busy, self._eta_seconds(metrics.step))
        if self._progress is not None:
            self._progress.update(self._task, description="training", completed=metrics.step, line=line)
        elif metrics.step == self._steps or time.monotonic() - self._last_plain >= _PLAIN_PERIOD_S:
            self._last_plain = time.monotonic()
            self._say(f"step {metrics.step}/{self._steps} {line}")

    def _eta_seconds(self, step: int) -> float:
        assert self._began is not None
        began, first = self._began
        return (time.monotonic() - began) / max(1, step - first) * (self._steps - step)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, summary: dict[str, Any]) -> None:
        """The closing table."""
        self.close()
        self._console.print(summary_table(summary))


def step_line(metrics: StepMetrics, steps: int, wait_share: float, eta_seconds: float) -> str:
    """The one line of a step: losses in nats per token, speed, wait share so far, time left."""
    minutes, seconds = divmod(round(eta_seconds), 60)
    soft = f"soft {metrics.soft:.3f} " if metrics.coverage is not None else ""
    layers = "" if metrics.layer_loss is None else f" layers {metrics.layer_loss:.3f}"
    return (
        f"loss {metrics.loss:.3f} ({soft}hard {metrics.hard:.3f}{layers}) {metrics.tokens_per_second:.0f} tokens/s"
        f" wait {wait_share:.2f} ETA {minutes}:{seconds:02d}"
    )


def summary_table(summary: dict[str, Any]) -> Table:
    """Teacher and student side by side; ``-`` is what was not measured."""

    def number(key: str, form: str = "{:.3f}", scale: float = 1.0) -> str:
        value = summary.get(key)
        return "-" if value is None else form.format(value / scale)

    unit = "token" if summary["task"] == "language-modelling" else "example"
    table = Table(title=f"{summary['name']}: {summary['steps']} steps, {summary['tokens_trained']:,} {unit}s")
    for column in ("", "teacher", "student before", "student after"):
        table.add_column(column, justify="left" if not column else "right")
    million, mib = 1e6, 2**20
    if summary.get("kl_after") is not None:
        taught = "teachers" if summary["teachers"] else "teacher"
        table.add_row(f"KL to the {taught} (nats/{unit})", "0", number("kl_before"), number("kl_after"))
        table.add_row("top-1 agreement", "1", number("top1_agreement_before"), number("top1_agreement_after"))
    if summary.get("on_policy_kl") is not None:
        table.add_row("  on its own text", "0", number("on_policy_kl_before"), number("on_policy_kl"))
    if summary["accuracy_after"] is not None:
        table.add_row("accuracy", number("accuracy_teacher"), number("accuracy_before"), number("accuracy_after"))
    if summary["alignment"] is None:
        measure, form = "perplexity", "{:.1f}"
    else:
        measure, form = "bits_per_byte", "{:.3f}"
    values = (number(f"{measure}_{when}", form) for when in ("teacher", "before", "after"))
    table.add_row(measure.replace("_", " "), *values)
    if summary.get("aligned_share") is not None:
        title = f"{summary['aligned_share']:.1%} of the tokens aligned, {summary['unaligned_bytes']:,} bytes not"
        table.caption = f"{title}; {summary['matched_tokens']:,} tokens are of both vocabularies"
    for name, one in (summary["teachers"] or {}).items():
        ranks = f"{one['ranks']} rank{'s' if one['ranks'] > 1 else ''}"
        table.add_row(f"teacher {name} (M)", f"{one['parameters'] / million:.1f}, {ranks}", "", "")
    table.add_row(
        "parameters (M)",
        number("teacher_parameters", "{:.1f}", million),
        "",
        number("student_parameters", "{:.1f}", million),
    )
    for label, key, form, scale in (
        ("on disk (MiB)", "bytes_on_disk", "{:.0f}", mib),
        (f"forward ({unit}s/s)", "tokens_per_second_forward", "{:.0f}", 1.0),
        ("peak memory (MiB)", "peak_memory_bytes", "{:.0f}", mib),
    ):
        table.add_row(label, number(f"teacher_{key}", form, scale), "", number(f"student_{key}", form, scale))
    return table
