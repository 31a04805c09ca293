"""Files that outlive a crash: hashed while they are written, synced before they count."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

_PIECE_BYTES = 4 << 20


def seal(step: int, rank: int, name: str) -> "hashlib._Hash":
    """The sha256 that a checkpoint's file is recorded by, before its first byte: over step, rank and name too, so that a
    file taken from another rank or step has another."""
    return hashlib.sha256(f"kdscale step {step} rank {rank} {name}\0".encode())


def seal_of(path: Path, step: int, rank: int, name: str) -> str:
    """``seal`` over the file's bytes. Raises: OSError."""
    digest = seal(step, rank, name)
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


class SealedFile:
    """A file for ``torch.save``: written and hashed in one pass.

    A fault is kept, and what comes after it is swallowed: torch's archive writer, which calls ``write`` from C++, cannot be
    left by an exception. ``close`` raises it.
    """

    def __init__(self, path: Path, digest: "hashlib._Hash", give_up: Callable[[], bool]) -> None:
        """``give_up`` is asked now and then; once it says so, the rest is not written. Raises: OSError."""
        self._file = path.open("xb", buffering=0)
        self._digest, self._give_up = digest, give_up
        self._fault: OSError | None = None
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            self._write_piece(view[start : start + _PIECE_BYTES])
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        if self._fault is None and self._give_up():
            self._fault = InterruptedError(f"{self._file.name}: given up")
        try:
            done = 0
            while self._fault is None and done < len(piece):
                done += self._file.write(piece[done:])
        except OSError as error:
            self._fault = error
            return
        self._digest.update(piece)
        self.num_bytes += len(piece)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> str:
        """Sync; returns the hash. Raises: OSError, also for an earlier fault."""
        with self._file:
            if self._fault is None:
                os.fsync(self._file.fileno())
        if self._fault is not None:
            raise self._fault
        return self._digest.hexdigest()


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put ``data`` in place of ``path``, whole or not at all, also through a crash. Raises: OSError."""
    replace(path, data, mode=mode)
    sync_directory(path.parent)


def replace(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """``write_durably`` but for the name, which the rename as the last act gives: when this raises, it was not given."""
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def sync_file(path: Path) -> None:
    """Make what was written to ``path`` durable. Raises: OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(directory: Path, num_bytes: int) -> None:
    """Raises: OSError when the file system of ``directory`` has less than ``num_bytes`` free."""
    stats = os.statvfs(directory)
    free = stats.f_bavail * stats.f_frsize
    if free < num_bytes:
        raise OSError(
            f"{directory}: {free / 2**20:.0f} MiB are free, the checkpoint takes {num_bytes / 2**20:.0f}; remove files, or"
            " set run.dir to a larger file system"
        )
