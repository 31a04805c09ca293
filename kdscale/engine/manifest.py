"""MANIFEST.json: what a checkpoint holds and belongs to. It is written last, and signed with a key that lies elsewhere.

A checkpoint is refused unless its manifest is the very text that was written, its files are those of the manifest and no
others (DeepSpeed finds files by pattern), all of them plain files, and each has its hash, over step, rank, name and bytes.
The hash of the content can be redone by whoever edits it; the signature (HMAC-SHA256) cannot without the run's key,
``.checkpoint-key`` in the run's directory, beside ``checkpoints/`` and not in it.
"""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdscale.durable import seal_of, write_durably
from kdscale.errors import CheckpointError

MANIFEST = "MANIFEST.json"
VERSION = 2
_KEY_FILE = ".checkpoint-key"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Entry:
    """One file."""

    rank: int
    """Who wrote it."""
    num_bytes: int
    sha256: str
    """See ``durable.seal``."""


@dataclass(frozen=True)
class Layout:
    """How the student lay on its ranks."""

    world: int
    pipeline: int
    data: int
    zero_stage: int
    dtype: str


@dataclass(frozen=True)
class Content:
    """What is signed."""

    step: int
    layout: Layout
    identity: dict[str, Any]
    notes: dict[str, Any]
    environment: dict[str, str]
    """Versions, instruction set and threads of rank 0, which decide the last bits of every number."""
    files: dict[str, Entry]
    """By path inside the checkpoint, ``/`` between its parts."""
    version: int = VERSION


@dataclass(frozen=True)
class Verified:
    """What a checkpoint says of itself, found true."""

    content: Content
    signed: bool
    """With the run's key; else that key was not there to check with."""


def key_of(run: Path, *, make: bool = False) -> bytes | None:
    """The key of the run in directory ``run``, made (mode 0600) where asked to; none where there is none.

    Raises:
        CheckpointError: it is not a key.
        OSError: it cannot be read or made.
    """
    path = run / _KEY_FILE
    if make and not path.exists():
        write_durably(path, secrets.token_hex(_KEY_BYTES).encode(), mode=0o600)
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise CheckpointError(f"{path} is not a key of {_KEY_BYTES} bytes in hex; put the right one back")
    return key


def render(content: Content, key: bytes) -> bytes:
    """The text of the manifest."""
    fields = asdict(content)
    canonical = _canonical(fields)
    return _text(fields, hashlib.sha256(canonical).hexdigest(), hmac.new(key, canonical, hashlib.sha256).hexdigest())


def _text(fields: dict[str, Any], digest: str, signature: str) -> bytes:
    envelope = {"content": fields, "sha256": digest, "hmac_sha256": signature}
    return (json.dumps(envelope, indent=1, sort_keys=True) + "\n").encode()


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def verify(directory: Path, key: bytes | None, share: tuple[int, int] = (0, 1)) -> Verified:
    """Check everything there is to check; without ``key`` all but the signature. ``share``: (this rank, ranks) of a group that
    hashes the files together, each rank first of all what it has written itself.

    Raises:
        CheckpointError: naming what is wrong.
    """
    try:
        raw = (directory / MANIFEST).read_bytes()
        envelope = json.loads(raw)
        fields, digest, signature = envelope["content"], envelope["sha256"], envelope["hmac_sha256"]
        canonical = _canonical(fields)
        if fields["version"] != VERSION:
            raise CheckpointError(
                f"{directory}: its manifest is of version {fields['version']}, this kdscale reads {VERSION}; go on with the"
                " kdscale that wrote it"
            )
        if raw != _text(fields, digest, signature) or hashlib.sha256(canonical).hexdigest() != digest:
            raise CheckpointError(f"{directory / MANIFEST} is damaged: it is not the text that was written")
        if key is not None and not hmac.compare_digest(hmac.new(key, canonical, hashlib.sha256).hexdigest(), signature):
            raise CheckpointError(
                f"{directory / MANIFEST} is not signed with the key of this run ({_KEY_FILE}): it was edited, or comes from"
                " another run, beside whose own key it can be read"
            )
        content = _content(fields)
        _require_files(directory, content, share)
        return Verified(content, key is not None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory} is not a whole checkpoint: {error!r}") from error


def _content(fields: dict[str, Any]) -> Content:
    return Content(
        step=int(fields["step"]),
        layout=Layout(**fields["layout"]),
        identity=dict(fields["identity"]),
        notes=dict(fields["notes"]),
        environment=dict(fields["environment"]),
        files={name: Entry(**entry) for name, entry in fields["files"].items()},
    )


def _require_files(directory: Path, content: Content, share: tuple[int, int]) -> None:
    present = files_of(directory) - {MANIFEST}
    if missing := sorted(content.files.keys() - present):
        raise CheckpointError(f"{directory} is damaged: {missing[0]} is missing ({len(missing)} file(s))")
    if extra := sorted(present - content.files.keys()):
        raise CheckpointError(f"{directory}: {extra[0]} is not in its manifest ({len(extra)} file(s)); remove it")
    for name, entry in content.files.items():
        path = directory / name
        size = path.stat().st_size
        if size != entry.num_bytes:
            raise CheckpointError(f"{path} is damaged: {size} bytes, {entry.num_bytes} were written")
        if not 0 <= entry.rank < content.layout.world:
            raise CheckpointError(f"{path}: rank {entry.rank} of {content.layout.world} cannot have written it")
        mine = entry.rank % share[1] == share[0]
        if mine and seal_of(path, content.step, entry.rank, name) != entry.sha256:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")


def files_of(directory: Path) -> set[str]:
    """Paths of all files below ``directory``. Raises: CheckpointError for anything but plain files in directories."""
    found = set()
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(parent) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise CheckpointError(f"{path} is neither a plain file nor a directory; remove it")
        found |= {(Path(parent) / name).relative_to(directory).as_posix() for name in files}
    return found
