"""Bad input and dying parts: a typed error, a non-zero exit, an intact checkpoint, and nothing left behind."""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray

from kdscale.cluster.placement import Ask, cluster, require_memory, reserve
from kdscale.config.sections import ClusterSection
from kdscale.engine.checkpoint import newest, verify
from kdscale.errors import CheckpointError, PlacementError
from tests.conftest import make_tokenizer
from tests.failure.runs import ranks_of
from tests.runs import (
    KDSCALE,
    PATIENCE_S,
    assert_nothing_left,
    finish,
    run,
    start,
    steps,
    wait_for_file,
    wait_for_step,
    write_config,
)


def refused(*arguments: str, timeout: float = PATIENCE_S) -> tuple[int, str]:
    done = subprocess.run([*KDSCALE, *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    return done.returncode, done.stderr


def test_unknown_key_exits_2_and_is_named():
    code, error = refused("train", "configs/quickstart.yaml", "loss.divergense=jsd")
    assert code == 2
    assert "loss.divergence" in error
    assert "Traceback" not in error


def test_show_starts_nothing_and_needs_no_torch(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = write_config(tmp_path, teacher_dir, text_dir, teacher={"ranks": 2, "replicas": 2})
    done = subprocess.run(
        [*KDSCALE, "show", str(config)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 replicas: ZeRO-3 over 2 ranks" in done.stdout
    assert "5 CPU" in done.stdout
    assert "top-64 + tail" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_show_says_unknown_for_what_it_cannot_know(tmp_path: Path, text_dir: Path):
    config = write_config(tmp_path, Path("some/hub-name"), text_dir)
    done = subprocess.run(
        [*KDSCALE, "show", str(config)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "unknown" in done.stdout


def test_doctor_runs():
    done = subprocess.run([*KDSCALE, "doctor"], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout
    assert "ok  torch" in done.stdout


@pytest.mark.slow
def test_bad_input_is_refused_before_anything_starts(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = str(write_config(tmp_path, teacher_dir, text_dir))
    code, error = refused("train", config, f"teacher.model={tmp_path / 'none'}")
    assert (code, "ModelError" in error, "none is not a directory" in error) == (1, True, True)

    other = tmp_path / "other"
    make_tokenizer(other, vocab_size=280)
    code, error = refused("train", config, f"data.tokenizer={other}")
    assert (code, "IdentityError" in error, "one tokenizer" in error) == (1, True, True)

    empty = tmp_path / "runs" / "tiny" / "checkpoints" / "step-5"
    empty.mkdir(parents=True)
    code, error = refused("train", config)
    assert (code, "CheckpointError" in error, "none is whole" in error) == (1, True, True)
    assert_nothing_left()


@pytest.mark.slow
def test_broken_text_ends_a_started_run(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    config, log = write_config(tmp_path, teacher_dir, text_dir), tmp_path / "log"
    assert run("train", str(config), f"data.train=[{broken}]", log=log) == 1
    assert "DataError" in log.read_text()
    assert "broken.jsonl:2: broken JSON" in log.read_text()
    assert_nothing_left()


@pytest.mark.slow
def test_dead_teacher_rank_ends_the_run_with_its_checkpoint_intact(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = write_config(
        tmp_path,
        teacher_dir,
        text_dir,
        teacher={"ranks": 2, "restarts": 0},
        train={"steps": 2000, "batch_rows": 4, "micro_rows": 2},
        checkpoint={"every_steps": 20},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(directory, 25, process, log)
    wait_for_file(directory / "checkpoints" / "step-20" / "MANIFEST.json", process, log)
    ranks = ranks_of("TeacherRank")
    assert len(ranks) == 2
    ranks[1].kill()
    began = time.monotonic()
    assert finish(process, log, within_s=40) == 1
    assert time.monotonic() - began < 15 + 10, "15 s, and slack for a busy machine"
    assert "TeacherError: teacher, rank" in log.read_text()
    assert_nothing_left()
    saved = newest(directory / "checkpoints")
    assert saved is not None
    assert saved.step >= 20

    # A checkpoint that was damaged since is named and skipped; alone, it is refused.
    (shard,) = list(saved.directory.rglob("*optim_states.pt"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(saved.directory)
    for directory in saved.directory.parent.glob("step-*"):
        if directory != saved.directory:
            shutil.rmtree(directory)
    with pytest.raises(CheckpointError, match="none is whole"):
        newest(saved.directory.parent)


@pytest.mark.slow
def test_another_configuration_does_not_go_on_from_a_checkpoint(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Refused by name before anything starts; allowed by name it goes on, on other ranks too, and the summary tells."""
    config, log = write_config(tmp_path, teacher_dir, text_dir), tmp_path / "log"
    assert run("train", str(config), log=log) == 0, log.read_text()
    log.unlink()
    resolved = (tmp_path / "runs" / "tiny" / "config.yaml").read_text()
    changed = ["loss.hard_weight=0.5", "train.steps=16"]
    assert run("train", str(config), *changed, log=log) == 1
    assert (tmp_path / "runs" / "tiny" / "config.yaml").read_text() == resolved, "a refused run changes nothing"
    text = log.read_text()
    assert "CheckpointError" in text
    assert "loss.hard_weight: checkpoint 0.0, now 0.5" in text
    assert "--allow-changed loss.hard_weight,train.steps" in text
    assert "starting Ray" not in text
    assert run("train", str(config), *changed, "--allow-changed", "loss.hardweight", log=log) == 2
    assert "did you mean loss.hard_weight?" in log.read_text()
    assert run("train", str(config), "train.steps=10", "--allow-changed", "train.steps", log=log) == 1
    assert "was written after 12 steps and train.steps = 10" in log.read_text()

    ranks = ["student.parallel.data=2", "deepspeed.zero_optimization.stage=3"]
    allowed = ["--allow-changed", "loss.hard_weight,train.steps"]
    assert run("train", str(config), *changed, *ranks, *allowed, log=log) == 0, log.read_text()
    assert "going on from step 12, parameter by parameter" in log.read_text()
    runs = tmp_path / "runs" / "tiny"
    assert steps(runs) == list(range(1, 17))
    summary = json.loads((runs / "summary.json").read_text())
    changes = {one["name"]: (one["step"], one["then"], one["now"]) for one in summary["changes_on_resume"]}
    assert changes == {
        "loss.hard_weight": (12, 0.0, 0.5),
        "train.steps": (12, 12, 16),
        "student.parallel.data": (12, 1, 2),
        "deepspeed.zero_optimization.stage": (12, 1, 3),
    }
    assert summary["kl_before"] > summary["kl_after"]

    assert run("train", str(config), "loss.hard_weight=0.5", "--resume", "never", log=log) == 0, log.read_text()
    assert (runs / "checkpoints.1" / "step-16" / "MANIFEST.json").is_file(), "the earlier run's checkpoints are kept"
    assert json.loads((runs / "summary.json").read_text())["hard_weight"] == 0.5
    assert_nothing_left()


@pytest.mark.slow
def test_too_few_cpus_are_named_in_time():
    settings = ClusterSection(wait_seconds=3)
    # Not tmp_path: Ray's sockets lie below it, and the path of a Unix socket is short.
    with tempfile.TemporaryDirectory(prefix="kdscale-") as temp, cluster(settings, [Ask("one", 1, 1, 0)], temp, print):
        began = time.monotonic()
        needs = r"teacher was not placed .* needs 2 x 2 CPU, 1 free of 1"
        with pytest.raises(PlacementError, match=needs), reserve(Ask("teacher", 2, 2, 0), settings.wait_seconds):
            pytest.fail("four CPUs were placed on one")
        assert time.monotonic() - began < 15
        with reserve(Ask("teacher", 1, 1, 0), settings.wait_seconds):
            assert ray.available_resources().get("CPU", 0) == 0


@pytest.mark.parametrize(
    ("address", "rule"),
    [("127.0.0.1:9", "refused"), ("ray://127.0.0.1:10001", "ray job submit"), ("127.0.0.1:none", "invalid literal")],
)
def test_no_cluster_at_the_address(address: str, rule: str):
    began = time.monotonic()
    with (
        pytest.raises(PlacementError, match=rf"cannot join or start Ray \(cluster.address = {address}\): .*{rule}"),
        cluster(ClusterSection(address=address), [], None, print),
    ):
        pytest.fail("joined a cluster that is not there")
    assert time.monotonic() - began < 10


def test_too_little_memory_is_named():
    free = psutil.virtual_memory().total * 2
    with pytest.raises(PlacementError, match=r"the teacher needs about .* GiB of memory; .* free here"):
        require_memory(free, "the teacher")
    require_memory(1 << 20, "the teacher")
