"""What a config asks of this machine."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from kdscale import doctor
from kdscale.config import RunConfig
from kdscale.doctor import _needs, checks

TEACHER = {"model": "some/teacher", "ranks": 2, "replicas": 2, "cpus_per_rank": 3, "gpus_per_rank": 1}
STUDENT = {"layers": [0], "cpus_per_rank": 2, "gpus_per_rank": 1, "parallel": {"data": 2}}


@pytest.mark.parametrize(
    ("sections", "threads", "gpus"),
    [
        ({}, 12 + 4, 4 + 2),
        ({"on_policy": {"ranks": 3, "cpus_per_rank": 2, "gpus_per_rank": 1}}, 12 + 4 + 6, 4 + 2 + 3),
        # Whose teacher is not started.
        ({"targets": {"source": "none"}, "loss": {"hard_weight": 1}}, 4, 2),
        ({"targets": {"source": "recording", "recording": "recordings/x"}}, 4, 2),
    ],
)
def test_what_is_started_is_counted(sections: dict[str, Any], threads: int, gpus: int):
    fields = {"data": {"train": ["x"]}, "teacher": TEACHER, "student": STUDENT, "train": {"batch_rows": 2}}
    config = RunConfig.model_validate(fields | sections)

    def verdicts(cores: int, there: int) -> dict[str, tuple[str, str]]:
        return {check.what: (check.verdict, check.found) for check in _needs(config, cores, there)}

    found = verdicts(threads // 2, gpus)
    assert found["GPUs the config needs"] == ("ok", f"{gpus}, this machine has {gpus}")
    assert found["threads the config starts"] == ("ok", f"{threads} on {threads // 2} cores")
    found = verdicts(threads // 2 - 1, gpus - 1)
    assert found["GPUs the config needs"][0] == "fail"
    assert found["threads the config starts"][0] == "warn"


def test_what_the_config_names_is_looked_for(tmp_path: Path):
    there = tmp_path / "model"
    there.mkdir()
    (there / "config.json").write_text("{}")
    fields: dict[str, Any] = {"data": {"train": ["x"]}, "teacher": {"model": str(there)}}
    fields["student"] = {"init": "model", "model": "runs/nowhere/student"}
    fields["alignment"] = {"method": "gold", "tokenizer": "models/none.model"}

    def found() -> dict[str, str]:
        checked = _needs(RunConfig.model_validate(fields), 1, 0)
        return {one.what: one.verdict for one in checked if one.what.endswith(("model", "tokenizer"))}

    assert found() == {"teacher.model": "ok", "student.model": "fail", "alignment.tokenizer": "fail"}
    fields["student"]["model"], fields["alignment"]["tokenizer"] = "some/student", "s3://some/where/else"
    assert found() == {"teacher.model": "ok"}, "what is not on this machine"


def test_a_driver_that_hangs_is_a_failed_check(monkeypatch: pytest.MonkeyPatch):
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(doctor.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    (gpus,) = (one for one in checks(None) if one.what == "GPUs")
    assert gpus.verdict == "fail"
    assert "nvidia-smi took longer than 30 s" in gpus.found
