import json
import subprocess
from pathlib import Path

import pytest
import torch

from kdscale.config import load_config
from kdscale.evaluate.fidelity import Fidelity, Positions
from kdscale.head import Head, HeadSpec
from kdscale.probe import overrides, recommend, settings
from kdscale.spec import TargetSpec
from tests.runs import KDSCALE, PATIENCE_S, write_config


def fidelity(size: int, angle: float) -> Fidelity:
    return Fidelity(TargetSpec("topk", k=size), size, 0.1, 0.1, angle, 0.0, 1.0, 1.0)


def test_the_smallest_within_the_angle_is_recommended():
    found = [fidelity(10, 9.0), fidelity(20, 4.0), fidelity(30, 1.0)]
    assert recommend(found, 5.0) is found[1]
    assert recommend(found, 0.5) is None


def test_overrides_are_what_the_command_line_takes():
    assert overrides(TargetSpec("sampled", 12, encoding="uint8")) == [
        "targets.payload=sampled",
        "targets.encoding=uint8",
        "targets.k=12",
        "targets.sampler=threshold",
    ]


def test_settings_have_the_temperature_of_the_loss(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Also where the run asks for `hidden`, which has none."""
    sections = {"targets": {"payload": "hidden"}, "loss": {"temperature": 2.0}}
    config = load_config(write_config(tmp_path, teacher_dir, text_dir, **sections))
    weight = torch.zeros(300, 4)
    head = Head(weight, None, HeadSpec(300))
    positions = Positions(torch.zeros(2).int(), torch.zeros(2, 4), head, torch.zeros(2, 4), head)
    found = settings(config, positions)
    assert {one.temperature for one in found if one.payload != "hidden"} == {2.0}
    assert {one.payload for one in found} == {"topk", "sampled", "hidden", "dense"}


@pytest.mark.slow
def test_probe_measures_every_payload_of_the_users_models(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config, out = write_config(tmp_path, teacher_dir, text_dir), tmp_path / "probe.json"
    command = [*KDSCALE, "probe", str(config), "--tokens", "100", "--rate", "5000", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "smallest within 5 degrees: targets.payload=" in done.stdout
    figures = json.loads(out.read_text())
    assert figures["student_tokens_per_second"] == 5000
    payloads = {one["spec"]["payload"] for one in figures["settings"]}
    assert payloads == {"topk", "sampled", "hidden", "dense"}
    exact = next(one for one in figures["settings"] if one["spec"]["payload"] == "dense")
    assert exact["angle_degrees"] < 0.1
    done = subprocess.run(
        [*KDSCALE, "probe", str(config), "--tokens", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--tokens 0" in done.stderr
