"""The canary of a run: every teacher it is served by, against a plain forward of the same files."""

from collections.abc import Mapping
from pathlib import Path

import torch

from kdscale.batch import Batch
from kdscale.config.schema import RunConfig
from kdscale.config.teachers import ALONE
from kdscale.engine import process
from kdscale.engine.directories import model_here
from kdscale.evaluate.canary import comparable, run_canary, served_topk
from kdscale.evaluate.views import TargetSources, teachers_of
from kdscale.head import Head
from kdscale.stream.protocol import Known
from kdscale.stream.source import TeacherSource
from kdscale.stream.whole import needs_no_teacher


def not_checked(config: RunConfig) -> str | None:
    """Why there is nothing to compare, as a line for the summary; none where there is."""
    spec, on_disk = config.target_spec(0), needs_no_teacher(config.targets)
    if config.targets.source == "none":
        return "not checked: no teacher (targets.source = none)"
    if config.evaluate.canary_rows == 0:
        return "not checked: evaluate.canary_rows = 0"
    if on_disk and comparable(spec) != spec:
        return (
            f"not checked: {spec.payload} in {spec.encoding} on disk tells no log-probabilities that could be compared"
        )
    return None


def check_canaries(
    config: RunConfig,
    teachers: Mapping[str, Known],
    batch: Batch,
    source: TargetSources,
    heads: Mapping[str, Head],
    device: torch.device,
) -> str:
    """Compare ``evaluate.canary_rows`` rows of ``batch``; ``heads`` are the teachers', where they are needed. The line for
    the summary.

    Raises: CanaryError; what the sources raise.
    """
    rows = batch.asked.cut(slice(0, config.evaluate.canary_rows))
    lines = {
        name: _check(config, name, teachers[name], rows, one, heads.get(name), device)
        for name, one in teachers_of(source).items()
    }
    return lines.get(ALONE) or "; ".join(f"{name}: {line}" for name, line in lines.items())


def _check(
    config: RunConfig,
    name: str,
    known: Known,
    rows: Batch,
    source: TeacherSource,
    head: Head | None,
    device: torch.device,
) -> str:
    teacher, spec = config.named_teachers[name], config.target_spec(0)
    directory = model_here(Path(known.directory), teacher.model, known.meaning.teacher)
    gib = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 2**30
    if gib > config.evaluate.canary_max_gib:
        return f"not checked: the teacher's files are {gib:.1f} GiB, above evaluate.canary_max_gib"
    # Teachers may compute elsewhere, in a dtype that their own device has; what is on disk doesn't say.
    stats = source.teacher_stats()
    dtype = getattr(torch, stats[0]["dtype"]) if stats else process.resolve_dtype(teacher.dtype, device)
    served = served_topk(rows, spec, source, head)
    kind = (directory, known.meaning.vocab_size, dtype, config.task)
    return run_canary(rows, served, *kind, of_hidden=spec.payload == "hidden").line()
