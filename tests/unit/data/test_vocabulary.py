"""``kdscale tokenizer train``, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdscale.cli import app
from kdscale.config.sections import DataSection
from kdscale.data.tokenizer import load_tokenizer
from kdscale.data.vocabulary import train_vocabulary
from kdscale.errors import ConfigError, DataError


@pytest.fixture
def config(tmp_path: Path, text_dir: Path) -> Path:
    path = tmp_path / "run.yaml"
    fields = {
        "data": {"train": [str(text_dir / "train.jsonl")]},
        "teacher": {"model": "none"},
        "student": {"layers": [0]},
    }
    path.write_text(json.dumps(fields))
    return path


def test_the_command_writes_a_model(config: Path, tmp_path: Path):
    out = tmp_path / "made" / "own.model"
    result = CliRunner().invoke(app, ["tokenizer", "train", str(config), str(out), "--size", "330"])
    assert result.exit_code == 0, result.output
    assert "330 tokens" in result.stdout
    assert load_tokenizer(str(out)).vocab_size == 330


def test_what_cannot_be_made_is_refused(config: Path, tmp_path: Path, text_dir: Path):
    result = CliRunner().invoke(app, ["tokenizer", "train", str(config), str(tmp_path / "own")])
    assert isinstance(result.exception, ConfigError)
    assert "a SentencePiece file's name ends in .model" in str(result.exception)
    with pytest.raises(DataError, match="no vocabulary of 100000 tokens can be made of"):
        train_vocabulary(DataSection(train=[str(text_dir / "train.jsonl")]), tmp_path / "large.model", 100_000)
    assert not (tmp_path / "large.model").exists()
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(DataError, match=r"chat.jsonl:1: what is said around messages is a template's"):
        train_vocabulary(DataSection(train=[str(chat)]), tmp_path / "chat.model", 330)


def test_held_out_documents_are_no_part_of_it(tmp_path: Path, text_dir: Path):
    lines = (text_dir / "train.jsonl").read_text().splitlines()
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join([*lines[:4], json.dumps({"text": "ⴵⴵⴵ ⴵⴵⴵ"}), *lines[4:9]]))
    for heldout, known in (([], False), (["elsewhere.jsonl"], True)):
        train_vocabulary(DataSection(train=[str(path)], heldout=heldout, heldout_every=5), tmp_path / "own.model", 320)
        assert ("ⴵ".encode() in load_tokenizer(str(tmp_path / "own.model")).spelling()) == known
