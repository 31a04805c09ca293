"""Whether a run needs a teacher, by what is on disk. No torch: ``kdscale show`` asks too."""

from pathlib import Path

from kdscale.config.sections import TargetsSection

MANIFEST = "MANIFEST.json"
"""Of a recording; written last."""


def is_whole(directory: Path) -> bool:
    """Whether recording into ``directory`` came to its end."""
    return (directory / MANIFEST).is_file()


def needs_no_teacher(targets: TargetsSection) -> bool:
    """Whether a run asks for no targets, or for recorded ones alone."""
    match targets.source:
        case "live":
            return False
        case "recording" | "none":
            return True
        case "live+record":
            assert targets.recording is not None
            return is_whole(Path(targets.recording))
