"""``launch/ray_head.sh`` and ``launch/submit.sh``: a run on a cluster that outlives it."""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdscale.engine.checkpoint import newest
from kdscale.node import free_port
from tests.failure.runs import config_of, ranks_of
from tests.runs import OURS, PATIENCE_S, assert_nothing_left, marked_running, steps, write_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def shell(*command: str, env: dict[str, str], within_s: float = PATIENCE_S) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", *command],
        cwd=ROOT,
        env=os.environ | OURS | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=within_s,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of whoever submits to a head of this test's own."""
    # Not tmp_path: Ray's sockets lie below it, and the path of a Unix socket is short.
    with tempfile.TemporaryDirectory(prefix="kdscale-") as temp:
        jobs = free_port()
        env = {
            "KDSCALE_VENV": sys.prefix,
            "KDSCALE_RAY_TEMP": temp,
            "KDSCALE_RAY_PORT": str(free_port()),
            "KDSCALE_JOBS_PORT": str(jobs),
            "KDSCALE_AGENT_PORT": str(free_port()),
            "KDSCALE_CPUS": "3",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path_factory.mktemp("secrets") / "token"),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{jobs}",
        }
        code, text = shell("launch/ray_head.sh", env=env)
        try:
            assert code == 0, text
            yield env
        finally:
            code, text = shell("launch/ray_head.sh", "--stop", env=env)
            assert code == 0, text
        assert_nothing_left(within_s=15)


@contextmanager
def uploaded(config: Path) -> Iterator[str]:
    """The name of a config like this one in the tree of kdscale, which is what is uploaded."""
    inside = ROOT / "configs" / f".test-{os.getpid()}.yaml"
    inside.write_text(config.read_text())
    try:
        yield str(inside.relative_to(ROOT))
    finally:
        inside.unlink()


def test_submitted_runs_train_and_go_on(cluster: dict[str, str], tmp_path: Path, teacher_dir: Path, text_dir: Path):
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    files = {"KDSCALE_FILES": str(tmp_path)}
    with uploaded(write_config(tmp_path, teacher_dir, text_dir, teacher={"ranks": 2})) as name:
        code, text = shell("launch/submit.sh", name, "run.dir=here", "train.steps=6", env=cluster | files)
        assert code == 0, text
        assert "step 6/6" in text
        assert token.read_text() not in text
        summary = json.loads((tmp_path / "here" / "tiny" / "summary.json").read_text())
        assert summary["steps"] == 6
        assert summary["teacher_ranks"] == 2
        changed = "checkpoint.allow_changed=[train.steps]"
        code, text = shell("launch/submit.sh", name, "run.dir=here", "train.steps=9", changed, env=cluster | files)
        assert code == 0, text
        assert "going on from step 6" in text
        code, text = shell("launch/submit.sh", name, "run.dir=here", "loss.temperature=-1", env=cluster | files)
        assert code == 1, text
        assert "loss.temperature" in text


def test_a_stopped_job_has_saved_and_goes_on(
    cluster: dict[str, str], tmp_path: Path, teacher_dir: Path, text_dir: Path
):
    """`ray job stop` gives it time: the step it had reached is the one it goes on from, and nothing of it stays."""
    directory = tmp_path / "here" / "tiny"
    files = {"KDSCALE_FILES": str(tmp_path)}
    config = config_of(tmp_path, teacher_dir, text_dir, checkpoint={"every_steps": 100_000})
    with uploaded(config) as name:
        code, text = shell("launch/submit.sh", "--no-wait", name, "run.dir=here", env=cluster | files)
        assert code == 0, text
        job = re.search(r"raysubmit_\w+", text)
        assert job is not None, text
        deadline = time.monotonic() + PATIENCE_S
        while not (done := steps(directory)) or done[-1] < 5:
            assert time.monotonic() < deadline, shell_ray("logs", job[0], env=cluster)
            time.sleep(0.2)
        stopped = shell_ray("stop", job[0], env=cluster)
        assert "was stopped" in stopped, stopped
        gone_by = time.monotonic() + 10
        while left := [*ranks_of("TeacherRank"), *ranks_of("StudentRank"), *marked_running("kdscale.driver")]:
            assert time.monotonic() < gone_by, left
            time.sleep(0.2)
        saved = newest(directory / "checkpoints")
        assert saved is not None
        assert saved.step == steps(directory)[-1] >= 5, "the stop itself saved"
        assert f"saved at step {saved.step}" in shell_ray("logs", job[0], env=cluster)
        last = f"train.steps={saved.step + 3}"
        code, text = shell("launch/submit.sh", name, "run.dir=here", last, env=cluster | files)
        assert code == 0, text
        assert f"going on from step {saved.step}" in text
        assert steps(directory) == list(range(1, saved.step + 4))


def shell_ray(command: str, job: str, env: dict[str, str]) -> str:
    """`ray job COMMAND JOB`, and what it says."""
    code, text = shell("-c", f"RAY_AUTH_MODE=token {sys.prefix}/bin/ray job {command} {job}", env=env)
    assert code == 0, text
    return text


def test_another_token_opens_nothing(cluster: dict[str, str], tmp_path: Path):
    other = tmp_path / "token"
    other.write_text("0" * 64)
    other.chmod(0o600)
    code, text = shell("launch/submit.sh", "configs/quickstart.yaml", env=cluster | {"RAY_AUTH_TOKEN_PATH": str(other)})
    assert code != 0
    assert "submitted successfully" not in text


@pytest.mark.parametrize("script", ["ray_head.sh", "ray_worker.sh", "submit.sh", "job.sh", "deepspeed.sh"])
def test_scripts_teach(script: str):
    code, text = shell(f"launch/{script}", "--help", env={})
    assert code == 0
    assert text.startswith(f"usage: bash launch/{script}")


def test_a_worker_without_the_token_is_told(tmp_path: Path):
    env = {"KDSCALE_VENV": sys.prefix, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    code, text = shell("launch/ray_worker.sh", "127.0.0.1:1", env=env)
    assert code == 1
    assert "holds no token" in text


@pytest.mark.parametrize("script", [["ray_head.sh"], ["ray_worker.sh", "127.0.0.1:1"]])
def test_sockets_and_logs_lie_where_the_help_says(script: list[str], tmp_path: Path):
    """A `ray` that only writes down how it was called stands in the environment's place; nothing starts."""
    ray, said, token = tmp_path / "bin" / "ray", tmp_path / "said", tmp_path / "token"
    ray.parent.mkdir()
    ray.write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    ray.chmod(0o700)
    token.write_text("0" * 64)
    token.chmod(0o600)
    env = {"KDSCALE_VENV": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(token), "KDSCALE_RAY_TEMP": str(tmp_path / "ray")}
    (tmp_path / "ray").mkdir()
    code, text = shell(f"launch/{script[0]}", *script[1:], env=env)
    assert code == 0, text
    assert f"--temp-dir {tmp_path / 'ray'} " in said.read_text().splitlines()[0]
