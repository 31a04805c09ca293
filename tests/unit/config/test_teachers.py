"""Several teachers in a config: what goes together, and what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdscale.cli import app
from kdscale.config import load_config
from kdscale.config.teachers import require_one_teacher
from kdscale.errors import ConfigError

FILE = """\
data: {train: [text.jsonl], teacher_column: of}
teacher: {model: some/teacher}
teachers:
  main: general
  default: general
  others:
    code: {model: other/teacher, replicas: 2}
student: {layers: [0, 1]}
"""
MIXED = ["data.teacher_column=null", "teachers.default=null", "teachers.combine=mixture", "targets.payload=sampled"]
WEIGHTS = "teachers.weights={general: 0.75, code: 0.25}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def test_teachers_have_names_and_sections(file: Path):
    config = load_config(file, ["teachers.others.code.ranks=4"])
    assert {name: (one.ranks, one.replicas) for name, one in config.named_teachers.items()} == {
        "general": (1, 1),
        "code": (4, 2),
    }
    assert config.routing is not None
    assert config.routing.names == ("general", "code")
    assert load_config(file, [*MIXED, WEIGHTS]).routing is None
    alone = load_config(file, ["teachers={}", "data.teacher_column=null"])
    assert list(alone.named_teachers) == ["teacher"]
    require_one_teacher(alone, "this")
    with pytest.raises(ConfigError, match="kdscale record asks one teacher, and there are general, code"):
        require_one_teacher(config, "kdscale record")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "code"], "--only code goes with --join"),
        (["--join", "{file}", "--only", "expert"], "--only: no teacher is called expert; there are general, code"),
    ],
)
def test_who_joins_names_teachers_of_the_config(file: Path, arguments: list[str], message: str):
    given = [one.format(file=file) for one in arguments]
    result = CliRunner().invoke(app, ["teacher", str(file), *given])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers.others.code.rank=2"], "unknown key teachers.others.code.rank; did you mean .*ranks"),
        (["teachers.others={a.b: {model: x}}"], "string should match pattern"),
        (["teachers.main=code"], "teachers.main = code is a name in teachers.others too"),
        (["teachers={}"], "data.teacher_column = of: there is one teacher"),
        (["teachers={default: x}", "data.teacher_column=null"], "teachers.default is not read: there is one teacher"),
        (["data.teacher_column=null"], "routing needs data.teacher_column"),
        (["teachers.default=expert"], "teachers.default: no teacher is called expert; there are general, code"),
        ([WEIGHTS], "teachers.weights is not read: with teachers.combine = routing"),
        (["data.packing=joined"], "data.packing = joined: documents see each other there"),
        (["targets.payload=hidden"], "targets.payload = hidden .* routing; use .* topk or sampled or dense"),
        (["targets.source=recording", "targets.recording=x"], "several teachers are asked live"),
        (["task=sequence-classification", "targets.payload=dense"], "sequence-classification has one teacher"),
        (["teachers.others.code.heartbeat_seconds=500"], "students would give up before a lost teacher is noticed"),
        ([*MIXED, WEIGHTS, "targets.payload=topk"], "targets.payload = topk .* mixture; use .* sampled or dense"),
        ([*MIXED, WEIGHTS, "targets.payload=hidden"], "targets.payload = hidden .* mixture; use .* sampled or dense"),
        ([*MIXED, WEIGHTS, "data.teacher_column=of"], "data.teacher_column = of is not read"),
        (MIXED, "teachers.weights has none for general, code"),
        ([*MIXED, "teachers.weights={general: 1, code: 0}"], "shares must be above 0 and sum to 1"),
        ([*MIXED, "teachers.weights={general: 0.7, code: 0.7}"], "shares must be above 0 and sum to 1"),
        ([*MIXED, "teachers.weights={general: 1, expert: 1}"], "teachers.weights: no teacher is called expert"),
    ],
)
def test_what_cannot_work_is_refused(file: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)
