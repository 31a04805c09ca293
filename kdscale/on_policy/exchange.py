"""What student and writers tell each other: weights one way, text the other, as files in the run's directory.

DIRECTORY/weights-40-CHECKSUM.safetensors    the trained weights after 40 steps
          rollout-42-CHECKSUM.safetensors    what step 42 trains on
          heldout-40-CHECKSUM.safetensors    what the weights after 40 steps write on from held-out prompts

A file has its name when it is whole, and its name says what its bytes must hash to. Nothing here outlives a life of the
student: whatever is missing is made again, the same.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save

from kdscale import log
from kdscale.errors import OnPolicyError

_LOG = log.get(__name__)
_POLL_S, _LONGEST_POLL_S = 0.02, 0.3
_LOG_PERIOD_S = 10.0


class Exchange:
    """One directory, on storage that the student's and the writers' nodes share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, name: str) -> Path | None:
        return next(self._directory.glob(f"{name}-*.safetensors"), None)

    def newest_weights(self) -> int:
        """Newest version whose weights are there; -1 when none are."""
        return max((int(path.name.split("-")[1]) for path in self._directory.glob("weights-*")), default=-1)

    def put(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Raises: OnPolicyError when it cannot be written."""
        content = save(tensors)
        self.put_file(f"{name}-{xxhash.xxh3_64_hexdigest(content)}.safetensors", content)

    def put_file(self, file: str, content: bytes) -> None:
        """A file of another exchange, under its full name. Raises: OnPolicyError."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            aside = self._directory / f".{file}.partial"
            # Not synced: after a crash of the machine the run goes on from its checkpoint, with an exchange of its own.
            aside.write_bytes(content)
            aside.rename(self._directory / file)
        except OSError as error:
            raise OnPolicyError(f"{self._directory / file} cannot be written: {error}") from error

    def file(self, name: str) -> tuple[str, bytes]:
        """(full name, content), for another exchange. Raises: OnPolicyError when it cannot be read."""
        path = self.find(name)
        if path is None:
            raise OnPolicyError(f"{self._directory} has no {name} any more, which coming steps need")
        try:
            return path.name, path.read_bytes()
        except OSError as error:
            raise OnPolicyError(f"{path} cannot be read: {error}") from error

    def get(self, name: str) -> dict[str, torch.Tensor] | None:
        """None: it is not there (yet, or any more). Raises: OnPolicyError when it is damaged."""
        path = self.find(name)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OnPolicyError(f"{path} cannot be read: {error}") from error
        if path.stem.rpartition("-")[2] != xxhash.xxh3_64_hexdigest(content):
            raise OnPolicyError(
                f"{path} is damaged: its bytes are not what its name says; the next start makes it anew"
            )
        try:
            return load(content)
        except SafetensorError as error:
            raise OnPolicyError(f"{path} is no safetensors file: {error}") from error

    def wait(self, name: str, limit_s: float, closed: Callable[[], bool]) -> dict[str, torch.Tensor]:
        """What stands under ``name``, once it is there.

        Raises: OnPolicyError when it is damaged, when no file has come or gone for ``limit_s`` (``on_policy.give_up_seconds``):
            text of later steps is waited for while that of earlier ones is written; or when ``closed`` says that nobody needs it
            any more.
        """
        began = logged = moved = time.monotonic()
        state, pause_s = self._state(), _POLL_S
        while (found := self.get(name)) is None:
            now = time.monotonic()
            if closed():
                raise OnPolicyError(f"nobody waits for {name} any more")
            if (state_now := self._state()) != state:
                state, moved = state_now, now
            if now - moved > limit_s:
                raise OnPolicyError(
                    f"{name} was not written, nor anything else within on_policy.give_up_seconds = {limit_s:g}"
                )
            if now - logged > _LOG_PERIOD_S:
                logged = now
                _LOG.info("waiting for %s to be written, for %.0f s", name, now - began)
            time.sleep(pause_s)
            # Many ranks look, into storage that they share.
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        return found

    def _state(self) -> int:
        """Another number after a file has come or gone."""
        try:
            return self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def drop(self, name: str) -> None:
        if (path := self.find(name)) is not None:
            path.unlink(missing_ok=True)
