"""Two tokenizers of one run: what is taken, and what is refused before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from kdscale.config.schema import RunConfig
from kdscale.data.pairs import TokenizerPair
from kdscale.data.tokenizer import HuggingFaceTokenizer
from kdscale.errors import IdentityError, ModelError
from kdscale.prepare import prepare, run_identity
from tests.conftest import make_model, make_tokenizer
from tests.pairs import SIZE, make_vocabulary


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, text_dir: Path) -> Path:
    return make_vocabulary(text_dir, tmp_path_factory.mktemp("own") / "own.model")


def config(teacher: Path, tokenizer: Path, **student: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"train": ["none"]},
            "teacher": {"model": str(teacher)},
            "student": student or {"layers": [0]},
            "alignment": {"method": "gold", "tokenizer": str(tokenizer)},
        }
    )


def test_text_is_read_by_the_tokenizer_that_the_data_names(teacher_dir: Path, tmp_path: Path):
    """It agrees with the teacher's on ids, and ends documents its own way: every rank loads it."""
    own = make_tokenizer(tmp_path / "own", eos_token="<|end|>")
    fields = {"teacher": {"model": str(teacher_dir)}, "student": {"layers": [0]}}
    found = {}
    for name, data in (("teacher's", {}), ("own", {"tokenizer": str(own)})):
        prepared = prepare(RunConfig.model_validate(fields | {"data": {"train": ["none"], **data}}))
        assert isinstance(prepared.reader, HuggingFaceTokenizer)
        found[name] = prepared.reader.decode([prepared.reader.eos_id or 0])
    assert found == {"teacher's": "<eos>", "own": "<|end|>"}


def test_the_wire_speaks_the_teachers_tokens(teacher_dir: Path, own: Path):
    prepared = prepare(config(teacher_dir, own))
    assert isinstance(prepared.reader, TokenizerPair)
    assert prepared.reader.vocab_size == SIZE
    assert prepared.meaning.tokenizer == prepared.reader.teacher.fingerprint
    assert prepared.meaning.vocab_size == prepared.reader.teacher.vocab_size
    assert run_identity(config(teacher_dir, own), prepared)["student_tokenizer"] == prepared.reader.student.fingerprint


def test_a_students_directory_must_hold_that_tokenizer(teacher_dir: Path, own: Path, tmp_path: Path, text_dir: Path):
    student = tmp_path / "student"
    make_model("llama").save_pretrained(student)
    pair = prepare(config(teacher_dir, own)).reader
    assert isinstance(pair, TokenizerPair)
    pair.save(student)
    of_model = {"init": "model", "model": str(student)}
    assert isinstance(prepare(config(teacher_dir, own, **of_model)).reader, TokenizerPair)
    other = make_vocabulary(text_dir, tmp_path / "other.model", SIZE - 5)
    with pytest.raises(IdentityError, match=r"set alignment.tokenizer to the student's directory"):
        prepare(config(teacher_dir, other, **of_model))


def test_a_vocabulary_that_transformers_reads_otherwise_is_refused(teacher_dir: Path, text_dir: Path, tmp_path: Path):
    lines = [json.loads(line)["text"] for line in (text_dir / "train.jsonl").read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(ModelError, match=r"cannot be exported: .*`kdscale tokenizer train` makes one"):
        prepare(config(teacher_dir, tmp_path / "unigram.model"))


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_rows_longer_than_a_model_reads_are_refused(teacher_dir: Path, longer: str):
    """Some models fail at the first long document, others train on beyond their positions without a word."""
    of_teacher = json.loads((teacher_dir / "config.json").read_text())["max_position_embeddings"]
    of_student = {"model_type": "llama", "max_position_embeddings": of_teacher - 1}
    fields = {
        "data": {"train": ["none"], "row_tokens": of_teacher + (longer == "teacher")},
        "teacher": {"model": str(teacher_dir)},
        "student": {"layers": [0]} if longer == "teacher" else {"init": "config", "config": of_student},
    }
    most = of_teacher - (longer == "student")
    with pytest.raises(ModelError, match=rf"row_tokens = .*: the {longer}.* reads texts of {most} tokens at most"):
        prepare(RunConfig.model_validate(fields))
