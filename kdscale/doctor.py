"""Whether this machine can run kdscale, one line a check."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console

from kdscale.config.schema import RunConfig
from kdscale.estimate import cores_and_gpus
from kdscale.storage import is_url

_GPU_LIMIT_S = 30
_SHM_FLOOR = 256 << 20
_MEMORY_FLOOR = 4 << 30
Verdict = Literal["ok", "warn", "fail"]
_STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Check:
    verdict: Verdict
    what: str
    found: str


def report(config: RunConfig | None, console: Console) -> bool:
    """Print every check; whether none failed."""
    good = True
    for check in checks(config):
        good &= check.verdict != "fail"
        mark = f"[{_STYLE[check.verdict]}]{check.verdict:>4}[/]"
        console.print(f"{mark}  {check.what}: {check.found}", highlight=False, soft_wrap=True)
    return good


def checks(config: RunConfig | None) -> Iterator[Check]:
    """All checks; with a config also what it asks of this machine."""
    yield from _versions()
    yield _at_least("shared memory", shutil.disk_usage("/dev/shm").free, _SHM_FLOOR, "enlarge /dev/shm (--shm-size)")
    yield _at_least("memory", psutil.virtual_memory().available, _MEMORY_FLOOR, "close other programs")
    cores = len(os.sched_getaffinity(0))
    yield Check("ok" if cores > 1 else "warn", "cores", f"{cores} usable" + ("" if cores > 1 else "; two or more help"))
    try:
        gpus = _gpus()
        yield Check("ok", "GPUs", f"{len(gpus)}: {', '.join(gpus)}" if gpus else "none; runs on CPU")
    except subprocess.TimeoutExpired:
        gpus = []
        yield Check(
            "fail", "GPUs", f"nvidia-smi took longer than {_GPU_LIMIT_S} s; its driver hangs: restart this machine"
        )
    yield _token()
    if config is not None:
        yield from _needs(config, cores, len(gpus))


def _versions() -> Iterator[Check]:
    for line in importlib.metadata.requires("kdscale") or []:
        requirement = Requirement(line)
        if requirement.marker is not None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("fail", requirement.name, f"not installed; needs {requirement.specifier}")
            continue
        good = requirement.specifier.contains(version, prereleases=True)
        found = version if good else f"{version}, needs {requirement.specifier}; bash launch/install.sh"
        yield Check("ok" if good else "fail", requirement.name, found)


def _at_least(what: str, free: int, floor: int, way_out: str) -> Check:
    found = f"{free / 2**30:.1f} GiB free"
    return Check("ok", what, found) if free >= floor else Check("warn", what, f"{found}; {way_out}")


def _gpus() -> list[str]:
    """Raises: subprocess.TimeoutExpired where the driver hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_LIMIT_S, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _token() -> Check:
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return Check("warn", "Ray token", "RAY_AUTH_MODE = disabled; fine on loopback, never on a network")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Check("ok", "Ray token", "from RAY_AUTH_TOKEN")
    if not file.is_file():
        return Check("ok", "Ray token", "none yet; a local run makes one")
    open_to_others = file.stat().st_mode & 0o077
    if open_to_others:
        return Check("warn", "Ray token", f"{file} can be read by others; chmod 600 {file}")
    return Check("ok", "Ray token", str(file))


def _needs(config: RunConfig, cores: int, gpus: int) -> Iterator[Check]:
    if config.cluster.address is None:
        threads, wanted = cores_and_gpus(config)
        yield Check("ok" if wanted <= gpus else "fail", "GPUs the config needs", f"{wanted}, this machine has {gpus}")
        verdict: Verdict = "ok" if threads <= 2 * cores else "warn"
        yield Check(verdict, "threads the config starts", f"{threads} on {cores} cores")
    port = config.stream.directory_port
    if port:
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        found = f"{port} is taken; set stream.directory_port" if taken else f"{port} is free"
        yield Check("fail" if taken else "ok", "directory port", found)
    models = {"teacher.model": config.teacher.model, "student.model": config.student.model}
    models |= {f"teachers.others.{name}.model": one.model for name, one in config.teachers.others.items()}
    for name, model in models.items():
        if model is not None and _is_path(model):
            yield _there(name, model, (Path(model) / "config.json").is_file())
    if (tokenizer := config.alignment.tokenizer) is not None and (_is_path(tokenizer) or tokenizer.endswith(".model")):
        yield _there("alignment.tokenizer", tokenizer, Path(tokenizer).exists())


def _is_path(name: str) -> bool:
    """Rather than a name of the hub, which has one slash at most, or a URL."""
    return name.startswith((".", "/")) or (name.count("/") > 1 and not is_url(name)) or Path(name).exists()


def _there(name: str, path: str, there: bool) -> Check:
    return Check("ok" if there else "fail", name, path + ("" if there else " is not there"))
