"""A student that learns on text of its own, end to end: sharded, stopped in every way, and the same numbers all the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kdscale.engine.checkpoint import newest
from tests.failure.runs import ranks_of, trained, wait_for_words
from tests.runs import assert_nothing_left, finish, run, start, wait_for_file, wait_for_step, write_config

pytestmark = pytest.mark.slow
STEPS = 24


def config_of(tmp_path: Path, teacher_dir: Path, text_dir: Path, **sections: dict[str, Any]) -> Path:
    fields: dict[str, dict[str, Any]] = {
        "run": {"deterministic": True},
        "train": {"steps": STEPS, "batch_rows": 4, "micro_rows": 1, "lr": 3e-3, "schedule": "constant"},
        "on_policy": {
            **{"fraction": 0.6, "refresh_steps": 3, "lag_steps": 2, "prompt_tokens": 6, "new_tokens": 16},
            **{"heldout_prompts": 8, "restart_wait_seconds": 0.1},
        },
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in fields.keys() | sections.keys()}
    return write_config(tmp_path, teacher_dir, text_dir, **merged)


def lines_of(directory: Path) -> list[str]:
    return [line for line in (directory / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def numbers(directory: Path) -> tuple[list[tuple[int, str, float]], dict[str, float]]:
    summary = json.loads((directory / "summary.json").read_text())
    names = ("on_policy_kl_before", "on_policy_kl", "on_policy_reverse_kl", "kl_after", "rollout_tokens")
    return trained(directory), {name: summary[name] for name in names}


def test_lost_writer_and_lost_run_change_no_number(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    sections: dict[str, dict[str, Any]] = {
        "student": {"parallel": {"data": 2}},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "targets": {"payload": "hidden"},
        "loss": {"divergence": "jsd", "hard_weight": 0.3},
    }
    config = config_of(tmp_path, teacher_dir, text_dir, **sections)
    log, whole, broken = tmp_path / "log", tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    assert run("train", str(config), "run.name=whole", log=log) == 0, log.read_text()
    assert_nothing_left()
    lines = [json.loads(line) for line in lines_of(whole)]
    own = [line for line in lines if line["staleness_steps"] is not None]
    assert abs(len(own) - 0.6 * STEPS) < 1
    assert all(line["rollout_tokens"] == line["num_tokens"] > 0 for line in own)
    # Nothing is older than lag and refresh allow, and what is younger is of the beginning.
    assert {line["staleness_steps"] for line in own if line["step"] > 5} == {2, 3, 4}
    assert all(line["rollout_tokens"] == 0 for line in lines if line not in own)
    # No label of one's own text is a true one.
    assert all(line["loss"] == pytest.approx(line["soft"]) for line in own)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["rollout_steps"] == len(own)
    assert summary["on_policy_kl"] < summary["on_policy_kl_before"]
    assert not (whole / "on-policy").exists()

    log.unlink()
    process = start("train", str(config), "run.name=broken", log=log)
    wait_for_step(broken, 3, process, log)
    ranks_of("RolloutRank")[0].kill()
    wait_for_words("starting who writes again (restart 1 of 3)", process, log, within_s=60)
    wait_for_file(broken / "checkpoints" / "step-10" / "MANIFEST.json", process, log)
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)
    saved = newest(broken / "checkpoints")
    assert saved is not None
    assert list(saved.directory.glob("weights-*")), "who writes for the next steps has older ones"
    assert run("train", str(config), "run.name=broken", log=log) == 0, log.read_text()
    assert f"going on from step {saved.step}, every rank from its own shards" in log.read_text()
    assert numbers(broken) == numbers(whole)
    weights = [load_file(one / "student" / "model.safetensors") for one in (whole, broken)]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    assert_nothing_left()


def test_a_writer_lost_for_good_ends_the_run(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Of adapters, in every step; its newest checkpoint is whole."""
    sections: dict[str, dict[str, Any]] = {
        "student": {"lora": {"rank": 2}},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "targets": {"payload": "topk"},
        "loss": {"divergence": "reverse_kl"},
        "train": {"steps": 4000},
        "on_policy": {"fraction": 1.0, "restarts": 0},
    }
    config = config_of(tmp_path, teacher_dir, text_dir, **sections)
    log, tiny = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(tiny, 6, process, log)
    (writer,) = ranks_of("RolloutRank")
    writer.kill()
    assert finish(process, log, within_s=60) == 1
    assert "OnPolicyError: rollouts, rank 0 died" in log.read_text()
    assert "no restart is left (on_policy.restarts = 0)" in log.read_text()
    saved = newest(tiny / "checkpoints")
    assert saved is not None
    assert saved.step >= 5
    assert all(own is not None for own in (json.loads(line)["staleness_steps"] for line in lines_of(tiny)))
    assert_nothing_left()
