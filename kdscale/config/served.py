"""What flows without a student lay over a config: a teacher that is served, joins a run, is recorded, or writes."""

import hashlib
import os
import re
from pathlib import Path

from kdscale.config.load import load_config, quoted
from kdscale.config.schema import RunConfig
from kdscale.errors import ConfigError

_ASKED = ["targets.source=live", "targets.recording=null"]
"""Wherever a student's targets come from, here the teacher is asked."""


def run_name(out: Path) -> str:
    """What the run that writes ``out`` is called: a lock lies under its name, so that no other path may have the same."""
    whole = out.resolve()
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9._-]', '-', whole.name)[:100]}-{digest}"


def load_served(path: str | Path, overrides: list[str] | None, name: str) -> RunConfig:
    """Like ``load_config``. The run is called ``name``, whatever the config calls its students' run, unless an override says
    otherwise.

    Raises:
        ConfigError: see ``load_config``.
    """
    return load_config(path, [quoted("run.name", name), *(overrides or []), *_ASKED])


def load_recorded(path: str | Path, overrides: list[str] | None, name: str) -> RunConfig:
    """Like ``load_served``, of a teacher whose targets are kept.

    Raises:
        ConfigError: also for targets that a recording cannot hold.
    """
    config = load_served(path, overrides, name)
    if (refusal := config.recording_refusal) is not None:
        raise ConfigError(f"{path}: {refusal}")
    return config
