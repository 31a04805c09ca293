"""Where a student's soft targets come from, as its config says."""

from pathlib import Path

from kdscale.config.schema import RunConfig
from kdscale.evaluate.quality import HIDDEN
from kdscale.stream.client import FlightSource
from kdscale.stream.filling import Filling
from kdscale.stream.protocol import Access, Meaning
from kdscale.stream.recording import Provenance, Recording
from kdscale.stream.source import NoTargets, TeacherSource
from kdscale.stream.whole import needs_no_teacher


def open_source(
    config: RunConfig, meaning: Meaning, corpus_fingerprint: str, access: Access | None, rank: int
) -> TeacherSource:
    """The served teacher, the recorded one, the one that is being recorded, or none.

    Raises:
        RecordingError, IdentityError: there is no recording, or one of something else.
    """
    targets = config.targets
    if targets.source == "none":
        return NoTargets()
    provenance = Provenance.of(config, meaning, corpus_fingerprint)
    if needs_no_teacher(targets):
        assert targets.recording is not None
        return Recording(Path(targets.recording), provenance)
    assert access is not None
    live = FlightSource(access, meaning, config.stream, f"student-{rank}", by_row=config.run.deterministic)
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
