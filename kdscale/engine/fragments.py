"""What the ranks list of the shards they wrote: where in them each trained parameter's elements are. Reads no tensor."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.errors import CheckpointError

SHARDS = "shards"
"""The directory of DeepSpeed's own files, inside a checkpoint; DeepSpeed's tag."""
Place = list[str | int]
"""A file in the checkpoint's shards, and the keys that lead to a tensor (or a state) in it."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of a flattened parameter, from ``offset`` on in a slot."""

    name: str
    """The parameter's, in the student itself."""
    shape: list[int]
    """Of the whole parameter."""
    start: int
    numel: int
    slot: int
    offset: int
    master: Place
    """Of the slot's float32 weights."""
    state: Place
    """Of its ``{step, exp_avg, exp_avg_sq}``."""


def index_file(rank: int) -> str:
    """Where a rank's fragments are listed, inside the checkpoint."""
    return f"index-{rank}.json"


def index_files(rank: int, index: dict[str, Any]) -> dict[str, bytes]:
    """What ``Partition.describe`` gave, as a file of the checkpoint: its content by its path."""
    return {index_file(rank): json.dumps(index).encode()}


@dataclass(frozen=True)
class Listed:
    """What the ranks list of one parameter."""

    shape: list[int]
    fragments: list[Fragment]


class Index:
    """Of the trained parameters of a checkpoint, by the student's own names."""

    def __init__(self, directory: Path) -> None:
        """``directory`` holds a verified checkpoint. Raises: CheckpointError for one without an index."""
        self.directory = directory
        """Of the checkpoint."""
        self.by_rank: list[dict[str, Any]] = []
        """Each rank's index."""
        try:
            while (path := directory / index_file(len(self.by_rank))).is_file():
                self.by_rank.append(json.loads(path.read_text()))
            self.frozen: dict[str, str] = {}
            """Digests by name."""
            self.listed: dict[str, Listed] = {}
            """By name."""
            for index in self.by_rank:
                self.frozen |= index["frozen"]
                for fields in index["fragments"]:
                    self._add(Fragment(**fields))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{directory}: the index of its shards cannot be read: {error!r}") from error
        if not self.by_rank:
            raise CheckpointError(
                f"{directory} has no {index_file(0)}: an earlier version of kdscale wrote it; go on from it with that"
                " version, on the same ranks"
            )

    def _add(self, fragment: Fragment) -> None:
        listed = self.listed.setdefault(fragment.name, Listed(fragment.shape, []))
        # Without ZeRO every rank lists all of it.
        if all((fragment.start, fragment.numel) != (other.start, other.numel) for other in listed.fragments):
            listed.fragments.append(fragment)

    @property
    def names(self) -> list[str]:
        return list(self.listed)

    def shape(self, name: str) -> list[int]:
        return self.listed[name].shape
