"""A checkpoint's master weights and optimizer states by parameter, whichever ranks wrote them. One parameter at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdscale.engine.capture import load_shard
from kdscale.engine.fragments import SHARDS, Fragment, Index, Place
from kdscale.errors import CheckpointError


class Shards(Index):
    """The trained parameters of a checkpoint, by the student's own names."""

    def __init__(self, directory: Path) -> None:
        """See ``Index``. Raises: CheckpointError."""
        super().__init__(directory)
        self._files: dict[str, Any] = {}

    def read(self, name: str, key: str) -> torch.Tensor:
        """A whole parameter in float32: its master weight (``master``) or a moment (``exp_avg``, ``exp_avg_sq``).

        Raises:
            CheckpointError: the ranks' fragments don't make it whole.
        """
        listed = self.listed[name]
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
            raise CheckpointError(f"{self.directory}: {key} of {name} is not whole; it ends after {done} elements")
        return whole

    def optimizer_steps(self) -> float:
        """Steps that AdamW's bias correction counts. Raises: CheckpointError where slots differ."""
        states = [self._at(one.state) for listed in self.listed.values() for one in listed.fragments]
        found = {float(state["step"]) for state in states}
        if len(found) != 1:
            raise CheckpointError(f"{self.directory}: the optimizer's steps differ: {sorted(found)}")
        return found.pop()

    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counts: global_steps, global_samples, skipped_steps."""
        file = min((self.directory / SHARDS).glob("*mp_rank_*_model_states.pt"))
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
            raise CheckpointError(f"{self.directory / SHARDS / str(file)} holds no {keys}: {error!r}") from error
        return found

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = load_shard(self.directory / SHARDS / name, mapped=True)
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
