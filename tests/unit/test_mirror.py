"""Checkpoints in a mirror, by fsspec's local store. What they hold is plain bytes; manifest, signature and hashes are real."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from kdscale.config.schema import RunConfig
from kdscale.durable import seal_of
from kdscale.engine.manifest import MANIFEST, Content, Entry, Layout, key_of, render
from kdscale.errors import CheckpointError, StorageError
from kdscale.mirror import Mirror, find, mirror_of
from kdscale.storage import Store

WAIT_S = 20.0


def config(run_dir: Path, mirror: str | None, name: str = "tiny") -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": name, "dir": str(run_dir)},
            "data": {"train": ["text"]},
            "teacher": {"model": "teacher"},
            "student": {"layers": [0]},
            "checkpoint": {"mirror": mirror},
        }
    )


def save(root: Path, step: int) -> Path:
    """A whole, signed checkpoint of two files."""
    key = key_of(root.parent, make=True)
    assert key is not None
    directory = root / f"step-{step}"
    entries = {}
    for name in ("shards/a.pt", "state-0.safetensors"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name} of step {step}".encode())
        entries[name] = Entry(0, path.stat().st_size, seal_of(path, step, 0, name))
    content = Content(step, Layout(1, 1, 1, 1, "float32"), {}, {}, {}, entries)
    (directory / MANIFEST).write_bytes(render(content, key))
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "tiny" / "checkpoints"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def there(tmp_path: Path, root: Path) -> RunConfig:
    """The run on another host, which has its key and nothing else."""
    key_of(root.parent, make=True)
    other = tmp_path / "there" / "tiny"
    other.mkdir(parents=True)
    shutil.copy(root.parent / ".checkpoint-key", other)
    return config(tmp_path / "there", f"file://{tmp_path}/mirror/")


def mirrored(there: RunConfig, root: Path, *steps: int, keep: int = 2, start: int = 0) -> Mirror:
    mirror = Mirror(str(mirror_of(there)), keep, start)
    for step in steps:
        mirror.offer(save(root, step))
        assert mirror.wait(WAIT_S)
    return mirror


def test_another_host_goes_on_from_the_newest(there: RunConfig, root: Path, tmp_path: Path):
    mirror = mirrored(there, root, 5, 10, 15)
    assert (mirror.copied, mirror.failures) == (3, 0)
    store = Store(f"file://{tmp_path}/mirror/tiny")
    assert {name.partition("/")[0] for name in store.files()} == {"step-10", "step-15"}
    found = find(there, "auto")
    assert found is not None
    assert (found.step, found.signed) == (15, True)
    assert (found.directory / "shards/a.pt").read_bytes() == (root / "step-15/shards/a.pt").read_bytes()
    # What is here is not asked for again.
    shutil.rmtree(tmp_path / "mirror")
    again = find(there, "auto")
    assert again is not None
    assert again.step == 15


def test_what_is_half_copied_or_damaged_is_skipped(there: RunConfig, root: Path, tmp_path: Path):
    mirrored(there, root, 5, 10, 15, keep=9)
    copy = tmp_path / "mirror" / "tiny"
    (copy / "step-15" / MANIFEST).unlink()
    shard = copy / "step-10" / "shards" / "a.pt"
    shard.write_bytes(shard.read_bytes()[::-1])
    (copy / "step-5" / "left by an interrupted copy").write_text("not of this checkpoint")
    found = find(there, "auto")
    assert found is not None
    assert found.step == 5
    assert [path.name for path in found.directory.parent.iterdir()] == ["step-5"]


def test_none_whole_is_refused(there: RunConfig, root: Path, tmp_path: Path):
    mirrored(there, root, 5)
    (tmp_path / "mirror" / "tiny" / "step-5" / "shards" / "a.pt").unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 checkpoint\(s\) and none is whole"):
        find(there, "auto")
    assert find(there, "never") is None


def test_starting_over_leaves_nothing_to_go_on_from(there: RunConfig, root: Path, tmp_path: Path):
    """A run that starts over and is lost before its first checkpoint may not go on from what was there before it."""
    mirrored(there, root, 5, 10)
    assert find(there, "never") is None
    assert find(there, "auto") is None
    copied = Store(f"file://{tmp_path}/mirror/tiny").files()
    assert {name for name in copied if MANIFEST in name} == {f"step-{step}/{MANIFEST}.superseded" for step in (5, 10)}


def test_without_the_key_nothing_counts(there: RunConfig, root: Path, tmp_path: Path):
    mirrored(there, root, 5)
    (tmp_path / "there" / "tiny" / ".checkpoint-key").unlink()
    with pytest.raises(CheckpointError, match=r"holds step-5, but .* copy \.checkpoint-key"):
        find(there, "auto")


def test_an_edited_manifest_is_refused(there: RunConfig, root: Path, tmp_path: Path):
    mirrored(there, root, 5)
    manifest = tmp_path / "mirror" / "tiny" / "step-5" / MANIFEST
    envelope: dict[str, Any] = json.loads(manifest.read_text())
    envelope["content"]["notes"] = {"totals": {}}
    manifest.write_text(json.dumps(envelope, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="none is whole"):
        find(there, "auto")


def test_an_empty_mirror_is_a_fresh_start(there: RunConfig):
    assert find(there, "auto") is None


def test_steps_of_an_earlier_try_count_no_more(there: RunConfig, root: Path, tmp_path: Path):
    mirrored(there, root, 20, 40)
    # It went on from step 20 elsewhere, and got to 25.
    mirrored(there, root, 25, start=20)
    found = find(there, "auto")
    assert found is not None
    assert found.step == 25
    assert (tmp_path / "mirror" / "tiny" / "step-40" / f"{MANIFEST}.superseded").is_file()


class Failing(LocalFileSystem):
    """Takes nothing while ``full``."""

    protocol = "failing"
    full = True

    def put_file(self, *arguments: Any, **named: Any) -> None:
        if Failing.full:
            raise OSError(28, "No space left on device")
        super().put_file(*arguments, **named)


def test_a_store_that_fails_is_counted_and_tried_again(there: RunConfig, root: Path, tmp_path: Path):
    fsspec.register_implementation("failing", Failing, clobber=True)
    mirror = Mirror(f"failing://{tmp_path}/mirror/tiny", 2, 0)
    mirror.offer(save(root, 5))
    assert mirror.wait(WAIT_S)
    assert (mirror.copied, mirror.failures) == (0, 1)
    Failing.full = False
    mirror.offer(save(root, 10))
    assert mirror.wait(WAIT_S)
    assert (mirror.copied, mirror.failures) == (1, 1)
    found = find(there, "auto")
    assert found is not None
    assert found.step == 10


def test_a_mirror_that_cannot_be_read_is_no_fresh_start(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot open it"):
        find(config(tmp_path, "nonesuch://bucket"), "auto")


def test_each_run_has_its_own_place():
    assert mirror_of(config(Path("runs"), "s3://bucket/runs/", "a")) == "s3://bucket/runs/a"
    assert mirror_of(config(Path("runs"), None)) is None


@pytest.mark.parametrize("mirror", ["/backup", "memory://x"])
def test_what_is_no_url_is_refused_at_load(mirror: str):
    with pytest.raises(ValueError, match="a URL that other processes can open"):
        config(Path("runs"), mirror)


def test_a_checkpoint_that_is_pruned_while_it_waits_is_copied_whole(
    there: RunConfig, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A store slower than saves are pruned."""
    put, first, go_on = Store.put, threading.Event(), threading.Event()

    def slowly(store: Store, name: str, source: Path) -> None:
        first.set()
        assert go_on.wait(WAIT_S)
        put(store, name, source)

    monkeypatch.setattr(Store, "put", slowly)
    mirror = Mirror(str(mirror_of(there)), 2, 0)
    mirror.offer(save(root, 5))
    assert first.wait(WAIT_S)
    for step in (10, 15):
        mirror.offer(save(root, step))
    for step in (5, 10, 15):
        shutil.rmtree(root / f"step-{step}")
    go_on.set()
    assert mirror.wait(WAIT_S)
    assert (mirror.copied, mirror.failures) == (2, 0)
    assert list(root.glob(".step-*")) == [], "its own names of the files are gone too"
    found = find(there, "auto")
    assert found is not None
    assert found.step == 15


def test_what_a_failed_copy_left_is_removed_by_a_later_one(there: RunConfig, root: Path, tmp_path: Path):
    left = tmp_path / "mirror" / "tiny" / "step-5" / "shards" / "a.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    mirrored(there, root, 10)
    store = Store(f"file://{tmp_path}/mirror/tiny")
    assert {name.partition("/")[0] for name in store.files()} == {"step-10"}
