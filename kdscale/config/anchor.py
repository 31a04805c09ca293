"""Relative paths of a config made absolute: a rank may start in another directory than the command."""

import glob
from pathlib import Path

from kdscale.config.schema import RunConfig

_MADE = {("run", "dir"), ("data", "cache_dir"), ("targets", "recording")}
"""May be made where they are missing; the others may also be names of a hub, so that only what exists is taken for a path."""
_FOUND = {
    ("data", "tokenizer"),
    ("alignment", "tokenizer"),
    ("teacher", "model"),
    ("student", "model"),
}
_LISTED = {("data", "train"), ("data", "heldout")}


def anchored(config: RunConfig, base: Path) -> RunConfig:
    """``config`` with its relative paths (globs included) starting from ``base``, an absolute directory."""

    def at_base(value: str, *, made: bool = False) -> str:
        path = base / value
        if made or path.exists():
            return str(path)
        # By the rules of ``find_sources``.
        if not Path(value).is_absolute() and any(glob.iglob(value, root_dir=base, recursive=True)):
            return str(Path(glob.escape(str(base))) / value)
        return value

    fields = config.model_dump()
    for section, name in _MADE | _FOUND:
        if (value := fields[section][name]) is not None:
            fields[section][name] = at_base(value, made=(section, name) in _MADE)
    for other in fields["teachers"]["others"].values():
        other["model"] = at_base(other["model"])
    for section, name in _LISTED:
        fields[section][name] = [at_base(value) for value in fields[section][name]]
    return RunConfig.model_validate(fields)
