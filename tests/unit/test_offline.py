"""Where a checkpoint's student may be written."""

from pathlib import Path

import pytest

from kdscale.config import RunConfig
from kdscale.deploy import to_gguf, to_int8
from kdscale.errors import CheckpointError, ConfigError
from kdscale.offline import export_checkpoint


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a run without a checkpoint: what is refused for its place is refused before one is looked for."""
    return RunConfig.model_validate(
        {
            "run": {"name": "tiny", "dir": str(tmp_path / "runs")},
            "data": {"train": ["text.jsonl"]},
            "teacher": {"model": str(tmp_path / "teacher")},
            "student": {"layers": [0]},
        }
    )


def test_what_lies_at_out_is_not_replaced(config: RunConfig, tmp_path: Path):
    taken = tmp_path / "data"
    taken.mkdir()
    (taken / "notes.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"data exists and is no hf export of kdscale; name another one, or move it"):
        export_checkpoint(config, "auto", taken)
    for out in (taken, taken / "notes.txt"):
        with pytest.raises(ConfigError, match=r"exists and is no GGUF file; name another one, or move it away"):
            to_gguf(config, "auto", out, "q8_0", None)
        with pytest.raises(ConfigError, match=r"exists and is no int8 export of kdscale"):
            to_int8(config, "auto", out, None)
    assert (taken / "notes.txt").read_text() == "years of work"


def test_a_run_s_own_export_is_replaced(config: RunConfig, tmp_path: Path):
    own = tmp_path / "runs" / "tiny" / "student"
    own.mkdir(parents=True)
    (own / "config.json").write_text("of a version that left no mark")
    for out in (None, own, own / ".." / "student"):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            export_checkpoint(config, "auto", out)
