"""Directories at fsspec URLs (``file://``, ``s3://``, ``gs://``, ...): fetched once per node, and written file by file.

A store promises no renames, so the last file of a directory is what makes it whole; on this side a directory is staged and
renamed. fsspec's drivers of object stores are packages of their own (``s3fs``, ``gcsfs``, ``adlfs``).
"""

import fcntl
import glob
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from kdscale import log
from kdscale.errors import StorageError

_LOG = log.get(__name__)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


def is_url(name: str) -> bool:
    return _SCHEME.match(name) is not None


def model_cache() -> Path:
    """Where models from URLs lie on this node: ``KDSCALE_MODEL_CACHE``, or below the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KDSCALE_MODEL_CACHE") or Path(base) / "kdscale" / "models")


@contextmanager
def _told(url: str, what: str) -> Iterator[None]:
    """Whatever a driver raises, as a StorageError: each has exceptions of its own."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(f"{url} on {socket.gethostname()}: cannot {what}: {reason}") from error


@dataclass(frozen=True)
class Store:
    """A directory at a URL."""

    url: str

    def __post_init__(self) -> None:
        """Raises: StorageError for a URL that other processes cannot open."""
        match = _SCHEME.match(self.url)
        if match is None:
            raise StorageError(f"{self.url} is no URL; give one like s3://bucket/path or file:///path")
        if match[1] == "memory":
            raise StorageError(
                f"{self.url}: memory:// ends with its process, and a run has several; use file:// or a store"
            )

    def _open(self) -> tuple[Any, str]:
        with _told(self.url, "open it (its driver may be missing: s3fs, gcsfs, adlfs, ...)"):
            system, path = fsspec.core.url_to_fs(self.url)
            # What others have written since is seen.
            system.invalidate_cache()
            return system, path.rstrip("/")

    def files(self) -> dict[str, tuple[int, str]]:
        """(bytes, what changes when the content does) of every file, by path below the URL. Raises: StorageError."""
        system, root = self._open()
        with _told(self.url, "list it"):
            found = system.find(root, detail=True) if system.exists(root) else {}
            return {
                path.removeprefix(root).lstrip("/"): (int(info["size"]), str(system.ukey(path)))
                for path, info in found.items()
            }

    def get(self, name: str, to: Path) -> None:
        """Fetch one file. Raises: StorageError, OSError when it cannot be written here."""
        system, root = self._open()
        to.parent.mkdir(parents=True, exist_ok=True)
        with _told(f"{self.url}/{name}", "read it"):
            system.get_file(f"{root}/{name}", str(to))

    def put(self, name: str, source: Path) -> None:
        """Write one file. Raises: StorageError."""
        system, root = self._open()
        with _told(f"{self.url}/{name}", "write it"):
            path = f"{root}/{name}"
            system.makedirs(system._parent(path), exist_ok=True)
            system.put_file(str(source), path)

    def rename(self, name: str, to: str) -> None:
        """Of one file. Raises: StorageError."""
        system, root = self._open()
        with _told(f"{self.url}/{name}", "rename it"):
            system.mv(f"{root}/{name}", f"{root}/{to}")

    def remove(self, names: list[str]) -> None:
        """In this order. Raises: StorageError."""
        system, root = self._open()
        for name in names:
            with _told(f"{self.url}/{name}", "remove it"):
                system.rm_file(f"{root}/{name}")


def download(store: Store, names: dict[str, int], to: Path) -> None:
    """Fetch ``names`` (with their bytes) into the new directory ``to``, which is whole or not there.

    Raises:
        StorageError: a file cannot be read, has another size, or a name leads out of the directory.
        OSError: it cannot be written here.
    """
    staging = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.partial")
    staging.mkdir(parents=True)
    try:
        for name, num_bytes in names.items():
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise StorageError(f"{store.url}: the name {name!r} leads out of it")
            store.get(name, staging / name)
            found = (staging / name).stat().st_size
            if found != num_bytes:
                raise StorageError(f"{store.url}/{name}: {found} bytes came, it lists {num_bytes}; it is being changed")
        staging.rename(to)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_partials(directory: Path) -> None:
    """What downloads of ``directory`` have left that were killed. The caller holds its lock: none is in progress."""
    for partial in directory.parent.glob(f".{glob.escape(directory.name)}.{'[0-9a-f]' * 8}.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def fetch(url: str, cache: Path, wanted: Callable[[str], bool]) -> Path:
    """The directory at ``url`` (its files that are ``wanted``), fetched once per node: whoever comes second waits for the
    first. Another content at the URL is another directory.

    Raises:
        StorageError: nothing there, or it cannot be read.
    """
    store = Store(url.rstrip("/"))
    files = {name: facts for name, facts in sorted(store.files().items()) if wanted(name)}
    if not files:
        raise StorageError(f"{url} holds no model; check the URL and who may read it")
    key = hashlib.sha256(repr((store.url, files)).encode()).hexdigest()[:16]
    directory = cache / f"{store.url.rpartition('/')[2] or 'model'}-{key}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{directory.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.is_dir():
                _remove_partials(directory)
                num_bytes = sum(size for size, _ in files.values())
                _LOG.info("fetching %s (%.1f GiB) to %s", url, num_bytes / 2**30, directory)
                download(store, {name: size for name, (size, _) in files.items()}, directory)
    except OSError as error:
        raise StorageError(f"{url} cannot be kept in {cache} on {socket.gethostname()}: {error}") from error
    return directory
