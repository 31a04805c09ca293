"""Where a student's soft targets come from, as its config says."""

from pathlib import Path

from kdscale.config.schema import RunConfig
from kdscale.evaluate.quality import HIDDEN
from kdscale.evaluate.views import TargetSources
from kdscale.stream.client import FlightSource
from kdscale.stream.combining import combined
from kdscale.stream.filling import Filling
from kdscale.stream.protocol import Access, Known
from kdscale.stream.recording import Provenance, Recording
from kdscale.stream.source import NoTargets
from kdscale.stream.whole import needs_no_teacher


def open_source(
    config: RunConfig, teachers: dict[str, Known], corpus_fingerprint: str, access: Access | None, rank: int
) -> TargetSources:
    """The served teacher or several together, the recorded one, the one that is being recorded, or none.

    Raises:
        RecordingError, IdentityError: there is no recording, or one of something else.
    """
    targets = config.targets
    if targets.source == "none":
        return NoTargets()
    meaning = next(iter(teachers.values())).meaning
    provenance = Provenance.of(config, meaning, corpus_fingerprint)
    if needs_no_teacher(targets):
        assert targets.recording is not None
        return Recording(Path(targets.recording), provenance)
    assert access is not None
    who, by_row = f"student-{rank}", config.run.deterministic
    every = {
        name: FlightSource(access, one.meaning, config.stream, who, by_row=by_row, teacher=name)
        for name, one in teachers.items()
    }
    if len(every) > 1:
        return combined(every, config)
    (live,) = every.values()
    if targets.source == "live":
        return live
    assert targets.recording is not None
    return Filling(
        live,
        Path(targets.recording),
        provenance,
        meaning=meaning,
        row_tokens=config.data.row_tokens,
        heldout=HIDDEN,
        rank=rank,
    )
