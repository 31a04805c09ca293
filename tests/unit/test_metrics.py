import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kdscale.display import Display
from kdscale.metrics import MetricsFile, StepMetrics

STEP = StepMetrics(1, 100, "ab12", 2.0, 1.9, 3.0, 1.8, 0.5, 2.0, 0.9, 0.8, 1.0, 1.0, 1e-3, 2.0, 0.5, 0.0, 50.0)


def test_each_step_stands_once_after_a_resume(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(1, 6):
        first.write(replace(STEP, step=step))
    first.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    again = MetricsFile(path, 3)
    again.write(replace(STEP, step=4, loss=9.0))
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] == 9.0


def test_a_full_disk_costs_lines_and_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    metrics.write(replace(STEP, step=1))
    with path.open("ab") as disk:
        disk.write(b'{"step": 2, "lo')  # what fitted
    disk, metrics._file = metrics._file, Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 - closed below
    metrics.write(replace(STEP, step=2))
    metrics.write(replace(STEP, step=3))
    assert [record.getMessage().count("misses steps from 2 on") for record in caplog.records] == [1]
    metrics.close()
    metrics._file = disk
    metrics.write(replace(STEP, step=4))
    metrics.close()
    again = MetricsFile(path, 4)
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]


def test_plain_lines_without_a_terminal():
    out = StringIO()
    display = Display(10, Console(file=out, width=200))
    display.phase("training")
    display.step(STEP)
    display.step(replace(STEP, step=10, layer_loss=0.25))
    display.close()
    text = out.getvalue()
    assert "training" in text
    assert "step 1/10 loss 2.000 (soft 1.900 hard 3.000) 50 tokens/s wait 0.25" in text
    assert "step 10/10 loss 2.000 (soft 1.900 hard 3.000 layers 0.250)" in text


def test_labels_only_shows_no_soft_loss():
    out = StringIO()
    Display(10, Console(file=out, width=200)).step(replace(STEP, coverage=None))
    assert "soft" not in out.getvalue()
