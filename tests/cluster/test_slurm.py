"""``launch/slurm.sbatch`` with two nodes that are both this machine. Slurm's own commands are stood in for by scripts that
start processes here; the rest is what runs on a cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdscale.node import free_port
from tests.runs import OURS, assert_nothing_left, finish, steps, wait_for_step, write_config

ROOT = Path(__file__).parents[2]
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node-[a-b]" ]] || exit 9
printf 'node-a\\nnode-b\\n'
"""
SRUN = """#!/bin/bash
# One task on each node of --nodelist, with an agent's port of its own; SIGTERM goes to all of them.
echo "srun $*" >&2
while [[ "$1" == --* ]]; do
  [[ "$1" != --nodelist=* ]] || IFS=, read -ra names <<<"${1#*=}"
  shift
done
pids=()
for number in "${!names[@]}"; do
  SLURM_PROCID="$number" KDSCALE_AGENT_PORT="$SECOND_AGENT_PORT" "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || code=$?; done
done
exit "$code"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a batch script."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    # Not tmp_path: the path of a Unix socket is short.
    with tempfile.TemporaryDirectory(prefix="kdscale-") as temp:
        yield {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_CPUS_ON_NODE": "2",
            "KDSCALE_VENV": sys.prefix,
            "KDSCALE_NETWORK": "127.0.0.0/8",
            "KDSCALE_RAY_TEMP": temp,
            "KDSCALE_RAY_PORT": str(free_port()),
            "KDSCALE_JOBS_PORT": str(free_port()),
            "KDSCALE_AGENT_PORT": str(free_port()),
            "SECOND_AGENT_PORT": str(free_port()),
            "KDSCALE_MASTER_PORT": str(free_port()),
            "KDSCALE_CPUS": "2",
        }


def batch(slurm: dict[str, str], log: Path, *arguments: str, **changed: str) -> "subprocess.Popen[bytes]":
    """Start the script as Slurm does: a copy of it, from elsewhere."""
    script = Path(slurm["HOME"]) / "slurm_script"
    shutil.copy(ROOT / "launch" / "slurm.sbatch", script)
    env = {name: value for name, value in (os.environ | OURS | slurm | changed).items() if value}
    with log.open("ab") as out:
        return subprocess.Popen(
            ["bash", str(script), *arguments], env=env, cwd=script.parent, stdout=out, stderr=subprocess.STDOUT
        )


@pytest.mark.slow
def test_a_job_saves_on_sigterm_and_goes_on_with_other_students(
    slurm: dict[str, str], tmp_path: Path, teacher_dir: Path, text_dir: Path
):
    train = {"steps": 4000, "micro_rows": 1, "schedule": "constant"}
    config = write_config(
        tmp_path, teacher_dir, text_dir, train=train, teacher={"ranks": 2}, student={"parallel": {"data": 2}}
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    log.touch()

    job = batch(slurm, log, str(config))
    wait_for_step(directory, 6, job, log)
    tokens = list((tmp_path / ".ray").iterdir())
    assert [(token.name, token.stat().st_mode & 0o777) for token in tokens] == [("kdscale-77.token", 0o600)]
    token = tokens[0].read_text()
    job.send_signal(signal.SIGTERM)
    assert finish(job, log, within_s=40) == 130, log.read_text()
    assert "stopped, saved at step" in log.read_text()
    assert_nothing_left()
    saved = steps(directory)[-1]

    job = batch(slurm, log, str(config), f"train.steps={saved + 6}", KDSCALE_STUDENTS="deepspeed")
    assert finish(job, log) == 0, log.read_text()
    text = log.read_text()
    assert f"going on from step {saved}" in text
    assert "bash launch/ray_worker.sh" in text
    assert steps(directory) == list(range(1, saved + 7))
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["student_ranks"], summary["teacher_ranks"]) == (2, 2)
    assert token not in text
    assert list((tmp_path / ".ray").iterdir()) == []
    assert_nothing_left()


def test_help_needs_no_slurm():
    done = subprocess.run(
        ["bash", "launch/slurm.sbatch", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: sbatch [SBATCH OPTION]... launch/slurm.sbatch CONFIG")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"SLURM_JOB_ID": ""}, "no Slurm job"),
        ({"KDSCALE_NETWORK": ""}, "KDSCALE_NETWORK is not set"),
        ({"SLURM_SUBMIT_DIR": "/"}, "submit from there"),
        ({"KDSCALE_TEACHER_NODES": "2"}, "leaves none of 2 nodes"),
        ({"KDSCALE_STUDENTS": "mpi"}, "ray or deepspeed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    slurm: dict[str, str], tmp_path: Path, changed: dict[str, str], says: str
):
    log = tmp_path / "log"
    assert batch(slurm, log, "configs/quickstart.yaml", **changed).wait(timeout=20) == 2
    assert says in log.read_text()
    assert not (tmp_path / ".ray").exists()
