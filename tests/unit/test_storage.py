"""Directories at URLs, by fsspec's local store; and by one that fails when it is told to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdscale.engine.directories import model_digest, model_here, resolve_model
from kdscale.errors import IdentityError, ModelError, StorageError
from kdscale.storage import Store, download, fetch, is_url, model_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDSCALE_MODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def everything(name: str) -> bool:
    return True


def test_urls_are_told_from_paths_and_hub_names():
    assert is_url("s3://bucket/model")
    assert not any(map(is_url, ["models/teacher", "/models/teacher", "org/model", "."]))


@pytest.mark.parametrize(("url", "says"), [("memory://x", "ends with its process"), ("here", "is no URL")])
def test_urls_that_cannot_serve(url: str, says: str):
    with pytest.raises(StorageError, match=says):
        Store(url)


def test_a_missing_driver_is_named():
    with pytest.raises(StorageError, match=r"nonesuch://bucket/x on \S+: cannot open it .*s3fs.*nonesuch"):
        Store("nonesuch://bucket/x").files()


def test_files_come_and_go(tmp_path: Path):
    store, source = Store(f"file://{tmp_path}/store"), tmp_path / "source"
    source.write_bytes(b"12345")
    assert store.files() == {}
    store.put("step-1/a/b", source)
    store.put("step-1/c", source)
    assert {name: size for name, (size, _) in store.files().items()} == {"step-1/a/b": 5, "step-1/c": 5}
    store.rename("step-1/c", "step-1/d")
    store.remove(["step-1/a/b"])
    assert store.files().keys() == {"step-1/d"}
    store.get("step-1/d", tmp_path / "there" / "d")
    assert (tmp_path / "there" / "d").read_bytes() == b"12345"
    with pytest.raises(StorageError, match=r"step-1/c on .* cannot read it"):
        store.get("step-1/c", tmp_path / "c")


@pytest.mark.parametrize(
    ("names", "says"), [({"a": 1, "gone": 1}, "cannot read it"), ({"a": 2}, "1 bytes came"), ({"../a": 1}, "leads out")]
)
def test_a_directory_is_whole_or_not_there(tmp_path: Path, names: dict[str, int], says: str):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(b"1")
    with pytest.raises(StorageError, match=says):
        download(Store(f"file://{tmp_path}/store"), names, tmp_path / "here" / "copy")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_directory_is_fetched_once_and_again_when_it_changes(tmp_path: Path):
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "a").write_text("first")
    one = fetch(f"file://{remote}", tmp_path / "cache", everything)
    kept = (one / "a").stat().st_ino
    assert fetch(f"file://{remote}/", tmp_path / "cache", everything) == one
    assert (one / "a").stat().st_ino == kept
    (remote / "a").write_text("other")
    os.utime(remote / "a", (1, 1))
    two = fetch(f"file://{remote}", tmp_path / "cache", everything)
    assert two != one
    assert ((one / "a").read_text(), (two / "a").read_text()) == ("first", "other")
    with pytest.raises(StorageError, match="holds no model"):
        fetch(f"file://{tmp_path}/empty", tmp_path / "cache", everything)


def test_what_a_killed_download_left_goes_with_the_next(tmp_path: Path):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    (remote / "a").write_text("model")
    first = fetch(f"file://{remote}", cache, everything)
    # As if the process had died in the middle of it, and another one were at work on another model.
    left, others = cache / f".{first.name}.0a1b2c3d.partial", cache / ".another-0123456789abcdef.0a1b2c3d.partial"
    first.rename(left)
    others.mkdir()
    assert fetch(f"file://{remote}", cache, everything) == first
    assert {path.name for path in cache.iterdir()} == {first.name, f".{first.name}.lock", others.name}


def test_processes_of_a_node_share_one_copy(tmp_path: Path):
    remote = tmp_path / "remote"
    remote.mkdir()
    for number in range(20):
        (remote / f"{number}.json").write_bytes(os.urandom(100_000))
    code = "import sys, pathlib; from kdscale.storage import fetch; print(fetch(sys.argv[1], pathlib.Path(sys.argv[2]), bool))"
    command = [sys.executable, "-c", code, f"file://{remote}", str(tmp_path / "cache")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert len({out for out, _ in said}) == 1, said
    assert {path.name for path in Path(said[0][0].strip()).iterdir()} == {f"{number}.json" for number in range(20)}
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".partial")] == []


def test_a_model_at_a_url_is_the_same_model(teacher_dir: Path, cache: Path):
    (teacher_dir / "training_args.bin").write_bytes(b"a pickle that nobody asked for")
    try:
        found = resolve_model(f"file://{teacher_dir}")
    finally:
        (teacher_dir / "training_args.bin").unlink()
    assert found.parent == cache == model_cache()
    assert not (found / "training_args.bin").exists()
    digest = model_digest(teacher_dir)
    assert model_digest(found) == digest
    # Where another node found it, this one has nothing.
    elsewhere = Path("/nonexistent/of/the/driver")
    assert model_here(elsewhere, f"file://{teacher_dir}", digest) == found
    assert model_here(teacher_dir, "whatever", digest) == teacher_dir
    with pytest.raises(IdentityError, match="is another one"):
        model_here(elsewhere, f"file://{teacher_dir}", "0" * 32)


def test_a_node_without_the_model_says_which_and_where():
    with pytest.raises(ModelError, match=r"node \S+ has no model in /models/teacher: .* by a URL"):
        model_here(Path("/models/teacher"), "/models/teacher", "0" * 32)
