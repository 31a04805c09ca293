"""Malformed tokenizer files: what they do to the libraries that read them is done to another process."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdscale.config import load_config
from kdscale.data.trial import require_sound
from kdscale.errors import ModelError
from kdscale.prepare import prepare
from tests.conftest import make_model, make_tokenizer
from tests.runs import write_config

PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
PANICS = {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}}
ABORTS = {"padding": {"strategy": {"Fixed": 10**12}, **PADDING}}


def damage(directory: Path, changes: dict[str, Any]) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "what"), [(PANICS, "panicked: PanicException: `stride` must be"), (ABORTS, "ended by SIGABRT")]
)
def test_a_crash_is_a_typed_error(tmp_path: Path, changes: dict[str, Any], what: str):
    make_tokenizer(tmp_path)
    require_sound(str(tmp_path))
    damage(tmp_path, changes)
    with pytest.raises(ModelError, match=rf"tokenizer\.json is malformed: the process that tried to read it {what}"):
        require_sound(str(tmp_path))


def test_what_is_refused_in_good_order_is_left_to_the_loader(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer.model").write_bytes(b"not one")
    require_sound(str(tmp_path))
    require_sound(str(tmp_path / "tokenizer.model"))
    require_sound("some/name-of-the-hub")


@pytest.mark.parametrize("whose", ["teacher.model", "data.tokenizer"])
def test_a_run_tries_before_it_reads(tmp_path: Path, teacher_dir: Path, text_dir: Path, whose: str):
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    damage(tmp_path / "model", ABORTS)
    config = load_config(write_config(tmp_path, teacher_dir, text_dir), [f"{whose}={tmp_path / 'model'}"])
    with pytest.raises(ModelError, match="ended by SIGABRT"):
        prepare(config)
