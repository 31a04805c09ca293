"""Commands up to where their driver would start: the run they would work on, by its lock, which is held here."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdscale.cli import app
from kdscale.config.served import run_name
from kdscale.errors import ConfigError, PlacementError
from kdscale.supervise import only_one

FILE = """\
run: {name: students, dir: RUNS}
data: {train: [text.jsonl]}
teacher: {model: some/teacher}
student: {layers: [0, 1]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE.replace("RUNS", str(tmp_path / "runs")))
    return path


def refusal(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, [*arguments]).exception


@pytest.mark.parametrize(
    ("command", "out", "flow", "name"),
    [
        ("teacher", [], "serve", "teacher"),
        ("record", ["recordings/2024"], "record", run_name(Path("recordings/2024"))),
        ("generate", ["generated/1e3"], "generate", run_name(Path("generated/1e3"))),
    ],
)
@pytest.mark.parametrize("given", [None, "second"])
def test_a_teacher_s_run_is_called_as_the_user_says(
    file: Path, command: str, out: list[str], flow: str, name: str, given: str | None
):
    directory = file.parent / "runs" / (given or name)
    overrides = [] if given is None else [f"run.name={given}"]
    with only_one(directory / f".{flow}.lock"):
        error = refusal(command, str(file), *out, *overrides)
    assert isinstance(error, PlacementError), error
    assert str(error).startswith(f"another process works on {directory}; ")


def test_who_is_refused_a_run_changes_nothing_in_it(file: Path):
    directory = file.parent / "runs" / "students"
    with only_one(directory / ".train.lock"):
        assert isinstance(refusal("train", str(file), "train.lr=1"), PlacementError)
        assert [path.name for path in directory.iterdir()] == [".train.lock"]


def test_what_no_recording_can_hold_is_refused_before_anything_starts(file: Path):
    error = refusal("record", str(file), str(file.parent / "out"), "loss.temperature={start: 4, end: 1}")
    assert isinstance(error, ConfigError), error
    assert "loss.temperature changes during the run" in str(error)
    assert [path.name for path in file.parent.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--model", "{here}", "--checkpoint", "step-4"], "--checkpoint step-4 does not go with --model"),
        (["teacher", "--join", "{here}/run.yaml", "--write", "out.json"], "--write out.json does not go with --join"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(file: Path, arguments: list[str], message: str):
    command, *options = (one.format(here=file.parent) for one in arguments)
    error = refusal(command, str(file), *options)
    assert isinstance(error, ConfigError), error
    assert message in str(error)


def test_a_copy_of_the_quickstart_s_config_is_shown_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = tmp_path / "my.yaml"
    copy.write_text(Path("configs/quickstart.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert refusal("show", "my.yaml") is None
