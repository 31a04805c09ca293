"""Damage of every kind to a real checkpoint of two ranks; half of it forged consistently. None may be loaded."""

import hashlib
import hmac
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdscale.durable import seal_of
from kdscale.engine.checkpoint import find, newest, verify
from kdscale.engine.manifest import MANIFEST
from kdscale.errors import CheckpointError
from tests.distributed.launch import run_ranks
from tests.failure import two_savers

Damage = Callable[[Path], None]
"""Done to ``run``, a copy of the run's directory, at checkpoints/step-2; step-1 lies beside it."""
RANDOM = random.Random(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    run_ranks(two_savers.__name__, 2, str(directory))
    return directory


def step(run: Path, number: int = 2) -> Path:
    return run / "checkpoints" / f"step-{number}"


# ---- as a disk does it ----


def flip(name: str, at: float, bit: int) -> Damage:
    def damage(run: Path) -> None:
        path = step(run) / name
        raw = bytearray(path.read_bytes())
        raw[int(at * len(raw))] ^= 1 << bit
        path.write_bytes(raw)

    return damage


def truncate(name: str, share: float) -> Damage:
    def damage(run: Path) -> None:
        path = step(run) / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def append(name: str) -> Damage:
    return lambda run: (step(run) / name).write_bytes((step(run) / name).read_bytes() + b"\0") and None


def delete(name: str) -> Damage:
    return lambda run: (step(run) / name).unlink()


def swap(run: Path, first: Path, second: Path) -> None:
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def swap_steps(name: str) -> Damage:
    return lambda run: swap(run, step(run) / name, step(run, 1) / name)


def swap_names(first: str, second: str) -> Damage:
    return lambda run: swap(run, step(run) / first, step(run) / second)


# ---- as a forger does it: hashes and the manifest's own hash are redone, the signature cannot be ----


def forge(edit: Callable[[Path, dict[str, Any]], None], key: bytes | None = None) -> Damage:
    """``edit`` changes files and the manifest's content; every hash is made right again."""

    def damage(run: Path) -> None:
        directory = step(run)
        envelope = json.loads((directory / MANIFEST).read_text())
        content = envelope["content"]
        edit(directory, content)
        for name, entry in content["files"].items():
            path = directory / name
            if path.is_file():
                entry["num_bytes"] = path.stat().st_size
                entry["sha256"] = seal_of(path, content["step"], entry["rank"], name)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        envelope["sha256"] = hashlib.sha256(canonical).hexdigest()
        if key is not None:
            envelope["hmac_sha256"] = hmac.new(key, canonical, hashlib.sha256).hexdigest()
        (directory / MANIFEST).write_text(json.dumps(envelope, indent=1, sort_keys=True) + "\n")

    return damage


def then(damage: Damage) -> Callable[[Path, dict[str, Any]], None]:
    """The same damage as above, to be made consistent."""
    return lambda directory, content: damage(directory.parents[1])


def put(*path: str, value: Any) -> Callable[[Path, dict[str, Any]], None]:
    def edit(directory: Path, content: dict[str, Any]) -> None:
        at = content
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value

    return edit


def drop(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def edit(directory: Path, content: dict[str, Any]) -> None:
        del content["files"][name]
        (directory / name).unlink()

    return edit


def add(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def edit(directory: Path, content: dict[str, Any]) -> None:
        (directory / name).write_bytes(b"more")
        content["files"][name] = {"rank": 0, "num_bytes": 0, "sha256": ""}

    return edit


def other_ranks(directory: Path, content: dict[str, Any]) -> None:
    for entry in content["files"].values():
        entry["rank"] = 1 - entry["rank"]


def older_as_newer(run: Path) -> None:
    """Step 1, whole and signed, under the name of step 2."""
    shutil.rmtree(step(run))
    shutil.copytree(step(run, 1), step(run))


def manifest_of_the_other(run: Path) -> None:
    shutil.copy(step(run, 1) / MANIFEST, step(run) / MANIFEST)


def link(run: Path) -> None:
    path = step(run) / "shards" / "elsewhere.pt"
    path.symlink_to(run / "outside.pt")


def damages(names: list[str]) -> Iterator[tuple[str, Damage]]:
    for name in names:
        for _ in range(14):
            at, bit = RANDOM.random(), RANDOM.randrange(8)
            yield f"bit {bit} of {name} at {at:.3f}", flip(name, at, bit)
            if name != MANIFEST:
                yield f"the same, hashes redone: {name} at {at:.3f}", forge(then(flip(name, at, bit)))
        for share in (0.0, 0.5, 0.99):
            yield f"{name} cut to {share}", truncate(name, share)
            if name != MANIFEST:
                yield f"{name} cut to {share}, hashes redone", forge(then(truncate(name, share)))
        yield f"{name} longer", append(name)
        yield f"{name} gone", delete(name)
        if name != MANIFEST:
            yield f"{name} gone, and from the manifest", forge(drop(name))
            yield f"{name} of the other step", swap_steps(name)
            yield f"{name} of the other step, hashes redone", forge(then(swap_steps(name)))
    pairs = [(a, b) for a in names for b in names if a < b and MANIFEST not in (a, b)]
    for first, second in pairs:
        yield f"{first} and {second} swapped", swap_names(first, second)
        yield f"{first} and {second} swapped, hashes redone", forge(then(swap_names(first, second)))
    for name, edit in {
        "another seed": put("identity", "seed", value=2),
        "other notes": put("notes", "tokens", value=1),
        "another step": put("step", value=3),
        "a later step": put("step", value=10**9),
        "another world": put("layout", "world", value=1),
        "another stage": put("layout", "zero_stage", value=3),
        "another dtype": put("layout", "dtype", value="bfloat16"),
        "another environment": put("environment", "environment.torch", value="1.0"),
        "no files": put("files", value={}),
        "other ranks": other_ranks,
        "another file": add("shards/layer_00-model_states.pt"),
        "a file outside": put("files", "../../outside.pt", value={"rank": 0, "num_bytes": 0, "sha256": ""}),
        "an absolute path": put("files", "/etc/hostname", value={"rank": 0, "num_bytes": 0, "sha256": ""}),
        "an older version": put("version", value=1),
        "no version": put("version", value=None),
    }.items():
        yield f"forged: {name}", forge(edit)
        yield f"forged with a key of one's own: {name}", forge(edit, key=b"0" * 32)
    yield "the older one as the newer", older_as_newer
    yield "the other step's manifest", manifest_of_the_other
    yield "a file more", lambda run: (step(run) / "shards" / "more.pt").write_bytes(b"x") and None
    yield "a link", link


@pytest.mark.slow
def test_no_damage_is_loaded(run: Path, tmp_path: Path):
    whole = verify(step(run))
    assert whole.signed
    assert newest(run / "checkpoints") == whole
    names = sorted(path.relative_to(step(run)).as_posix() for path in step(run).rglob("*") if path.is_file())
    assert sum("optim_states" in name for name in names) == 2
    (run / "outside.pt").write_bytes(b"outside")
    cases = list(damages(names))
    assert len(cases) >= 200
    forged = [name for name, _ in cases if "redone" in name or "forged" in name or "from the manifest" in name]
    assert len(forged) >= 100
    accepted, refused, fell_back = [], 0, 0
    for number, (name, damage) in enumerate(cases):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        damage(copy)
        try:
            verify(step(copy))
        except CheckpointError:
            refused += 1
        else:
            accepted.append(name)
        try:
            found = newest(copy / "checkpoints")
            assert found is not None
            assert found.step == 1, name
            fell_back += 1
        except CheckpointError:
            # Swapped with the older one, which is damaged then too.
            assert "other step" in name
        shutil.rmtree(copy)
    assert (accepted, refused) == ([], len(cases))
    assert fell_back > 150


@pytest.mark.slow
def test_without_its_key_a_checkpoint_counts_only_where_it_is_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # Another test of this process may have set the loggers up as a run does.
    monkeypatch.setattr(logging.getLogger("kdscale"), "propagate", True)
    moved = tmp_path / "moved" / "checkpoints"
    shutil.copytree(run / "checkpoints", moved)
    with pytest.raises(CheckpointError, match="none is whole and signed by the run"):
        newest(moved)
    assert "its signature cannot be checked without the run's key" in caplog.text
    caplog.clear()
    found = find(moved, str(moved / "step-2"))
    assert found is not None
    assert (found.step, found.signed) == (2, False)
    assert "its signature cannot be checked" in caplog.text
    # Its hashes count all the same.
    flip("shards/mp_rank_00_model_states.pt", 0.5, 0)(moved.parent)
    with pytest.raises(CheckpointError, match="is damaged"):
        find(moved, str(moved / "step-2"))
    # With another run's key beside it, it is refused.
    (moved.parent / ".checkpoint-key").write_text("00" * 32)
    with pytest.raises(CheckpointError, match="not signed with the key of this run"):
        find(moved, str(moved / "step-1"))
