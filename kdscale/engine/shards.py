"""A checkpoint's master weights and optimizer states by parameter, whichever ranks wrote them. One parameter at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale.engine.capture import SHARDS, load_shard
from kdscale.engine.partition import Fragment, Place
from kdscale.errors import CheckpointError


def index_file(rank: int) -> str:
    """Where a rank's fragments are listed, inside the checkpoint."""
    return f"index-{rank}.json"


def index_files(rank: int, index: dict[str, Any]) -> dict[str, bytes]:
    """What ``Partition.describe`` gave, as a file of the checkpoint: its content by its path."""
    return {index_file(rank): json.dumps(index).encode()}


@dataclass(frozen=True)
class _Listed:
    """What the ranks list of one parameter."""

    shape: list[int]
    fragments: list[Fragment]


class Shards:
    """The trained parameters of a checkpoint, by the student's own names."""

    def __init__(self, directory: Path) -> None:
        """``directory`` holds a verified checkpoint. Raises: CheckpointError for one without an index."""
        self._directory = directory
        self._files: dict[str, Any] = {}
        self.by_rank: list[dict[str, Any]] = []
        """Each rank's index."""
        try:
            while (path := directory / index_file(len(self.by_rank))).is_file():
                self.by_rank.append(json.loads(path.read_text()))
            self.frozen: dict[str, str] = {}
            self._listed: dict[str, _Listed] = {}
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
        listed = self._listed.setdefault(fragment.name, _Listed(fragment.shape, []))
        # Without ZeRO every rank lists all of it.
        if all((fragment.start, fragment.numel) != (other.start, other.numel) for other in listed.fragments):
            listed.fragments.append(fragment)

    @property
    def names(self) -> list[str]:
        return list(self._listed)

    def shape(self, name: str) -> list[int]:
        return self._listed[name].shape

    def read(self, name: str, key: str) -> torch.Tensor:
        """A whole parameter in float32: its master weight (``master``) or a moment (``exp_avg``, ``exp_avg_sq``).

        Raises:
            CheckpointError: the ranks' fragments don't make it whole.
        """
        listed = self._listed[name]
        whole = torch.empty(listed.shape, dtype=torch.float32)
        flat, done = whole.view(-1), 0
        for fragment in sorted(listed.fragments, key=lambda one: one.start):
            # A weight that is tied over two stages lies on both, cut in different places.
            known = done - fragment.start
            if known < 0:
                break
            if known < fragment.numel:
                part = self._tensor(fragment, key).reshape(-1)[fragment.offset : fragment.offset + fragment.numel]
                flat[done : done + fragment.numel - known].copy_(part[known:])
                done += fragment.numel - known
        if done != flat.numel():
            raise CheckpointError(f"{self._directory}: {key} of {name} is not whole; it ends after {done} elements")
        return whole

    def optimizer_steps(self) -> float:
        """Steps that AdamW's bias correction counts. Raises: CheckpointError where slots differ."""
        states = [self._at(one.state) for listed in self._listed.values() for one in listed.fragments]
        found = {float(state["step"]) for state in states}
        if len(found) != 1:
            raise CheckpointError(f"{self._directory}: the optimizer's steps differ: {sorted(found)}")
        return found.pop()

    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counts: global_steps, global_samples, skipped_steps."""
        file = min((self._directory / SHARDS).glob("*mp_rank_*_model_states.pt"))
        state = self._file(file.name)
        return {name: int(state[name]) for name in ("global_steps", "global_samples", "skipped_steps")}

    def _tensor(self, fragment: Fragment, key: str) -> torch.Tensor:
        tensor = self._at(fragment.master) if key == "master" else self._at(fragment.state)[key]
        assert isinstance(tensor, torch.Tensor)
        return tensor.detach()

    def _at(self, place: Place) -> Any:
        file, *keys = place
        found = self._file(str(file))
        try:
            for key in keys:
                found = found[key]
        except (KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"{self._directory / SHARDS / str(file)} holds no {keys}: {error!r}") from error
        return found

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = load_shard(self._directory / SHARDS / name, mapped=True)
        return self._files[name]


def require_same_frozen(directory: Path, digests: Mapping[str, str], shards: Shards) -> None:
    """``digests`` of frozen parameters against those in the checkpoint; of another dtype there is nothing to compare.

    Raises:
        CheckpointError: naming the first that differs.
    """
    for name, digest in digests.items():
        stored = shards.frozen.get(name, digest)
        if stored.split(":")[0] == digest.split(":")[0] and stored != digest:
            raise CheckpointError(
                f"{directory}: the frozen parameter {name} is not the one it was trained with; give the student the same"
                " start (student.init, student.model, run.seed, versions)"
            )
