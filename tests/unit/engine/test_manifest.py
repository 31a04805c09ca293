import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kdscale.durable import seal_of
from kdscale.engine.manifest import MANIFEST, Content, Entry, Layout, key_of, render, verify
from kdscale.errors import CheckpointError

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
FILES = {"shards/a.pt": 0, "shards/b.pt": 1, "state-0.safetensors": 0, "state-1.safetensors": 1}


def content_of(directory: Path, step: int = 5) -> Content:
    files = {}
    for name, rank in FILES.items():
        path = directory / name
        files[name] = Entry(rank, path.stat().st_size, seal_of(path, step, rank, name))
    return Content(step, Layout(2, 1, 2, 1, "float32"), {"seed": 0}, {"kl": 1.5}, {"environment.torch": "2"}, files)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step-5"
    (directory / "shards").mkdir(parents=True)
    for number, name in enumerate(FILES):
        (directory / name).write_bytes(bytes([number]) * 100)
    (directory / MANIFEST).write_bytes(render(content_of(directory), KEY))
    return directory


def test_what_was_written_is_what_is_read(checkpoint: Path):
    found = verify(checkpoint, KEY)
    assert found.signed
    assert found.content == content_of(checkpoint)
    assert not verify(checkpoint, None).signed


def test_another_key_is_refused(checkpoint: Path):
    with pytest.raises(CheckpointError, match="not signed with the key of this run"):
        verify(checkpoint, OTHER_KEY)


def test_shards_swapped_between_ranks_are_refused_though_their_hashes_are_swapped_too(checkpoint: Path):
    """Names are part of what is hashed, so this needs no key to be seen."""
    first, second = checkpoint / "shards/a.pt", checkpoint / "shards/b.pt"
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)
    content = content_of_manifest(checkpoint)
    swapped = dict(content.files)
    swapped["shards/a.pt"] = replace(swapped["shards/a.pt"], sha256=content.files["shards/b.pt"].sha256)
    swapped["shards/b.pt"] = replace(swapped["shards/b.pt"], sha256=content.files["shards/a.pt"].sha256)
    (checkpoint / MANIFEST).write_bytes(render(replace(content, files=swapped), OTHER_KEY))
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged"):
        verify(checkpoint, None)


def content_of_manifest(checkpoint: Path) -> Content:
    return verify_text(json.loads((checkpoint / MANIFEST).read_text())["content"])


def verify_text(fields: dict) -> Content:
    files = {name: Entry(**entry) for name, entry in fields["files"].items()}
    return Content(**{**fields, "layout": Layout(**fields["layout"]), "files": files})


@pytest.mark.parametrize(
    "change",
    [
        {"step": 6},
        {"identity": {"seed": 1}},
        {"notes": {}},
        {"environment": {}},
        {"layout": Layout(2, 2, 1, 1, "float32")},
    ],
    ids=str,
)
def test_an_edited_manifest_is_refused_with_its_hash_redone(checkpoint: Path, change: dict):
    (checkpoint / MANIFEST).write_bytes(render(replace(content_of(checkpoint), **change), OTHER_KEY))
    with pytest.raises(CheckpointError, match="not signed"):
        verify(checkpoint, KEY)


def test_a_manifest_that_only_looks_the_same_is_refused(checkpoint: Path):
    path = checkpoint / MANIFEST
    text = path.read_text()
    for other in (text + "\n", text.replace(" ", "  "), json.dumps(json.loads(text) | {"more": 1})):
        path.write_text(other)
        with pytest.raises(CheckpointError, match="not the text that was written"):
            verify(checkpoint, KEY)


def test_another_version_is_named(checkpoint: Path):
    (checkpoint / MANIFEST).write_bytes(render(replace(content_of(checkpoint), version=1), KEY))
    with pytest.raises(CheckpointError, match="of version 1, this kdscale reads 2"):
        verify(checkpoint, KEY)


def test_what_is_not_in_the_manifest_is_refused(checkpoint: Path, tmp_path: Path):
    extra = checkpoint / "shards" / "layer_09-model_states.pt"
    extra.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"layer_09.*is not in its manifest"):
        verify(checkpoint, KEY)
    extra.unlink()
    extra.symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="neither a plain file nor a directory"):
        verify(checkpoint, KEY)
    extra.unlink()
    # A file's own bytes, through a link to somewhere else.
    shutil.move(checkpoint / "shards" / "a.pt", tmp_path / "a.pt")
    (checkpoint / "shards" / "a.pt").symlink_to(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="neither a plain file nor a directory"):
        verify(checkpoint, KEY)


def test_a_file_outside_is_refused(checkpoint: Path, tmp_path: Path):
    (tmp_path / "outside").write_bytes(b"x")
    entry = Entry(0, 1, seal_of(tmp_path / "outside", 5, 0, "../outside"))
    content = content_of(checkpoint)
    files = {**content.files, "../outside": entry}
    (checkpoint / MANIFEST).write_bytes(render(replace(content, files=files), KEY))
    with pytest.raises(CheckpointError, match=r"\.\./outside is missing"):
        verify(checkpoint, KEY)


def test_key_is_made_once_and_for_its_owner_alone(tmp_path: Path):
    assert key_of(tmp_path) is None
    key = key_of(tmp_path, make=True)
    assert key is not None
    assert len(key) == 32
    assert key_of(tmp_path, make=True) == key_of(tmp_path) == key
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("not a key")
    with pytest.raises(CheckpointError, match="not a key of 32 bytes"):
        key_of(tmp_path)


def test_fields_are_what_the_manifest_shows(checkpoint: Path):
    shown = json.loads((checkpoint / MANIFEST).read_text())
    assert shown["content"] == asdict(content_of(checkpoint))
    assert KEY.hex() not in (checkpoint / MANIFEST).read_text()
