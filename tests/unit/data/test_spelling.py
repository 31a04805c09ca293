import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdscale.data.spelling import match, spell_byte_level, spell_piece, token_ends
from kdscale.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer, require_exportable
from kdscale.errors import ModelError
from tests.conftest import make_tokenizer
from tests.pairs import SIZE, make_vocabulary

TEXT = "  def f(x):\n\n\treturn 'naïve ☕' * 12.50  # the end\n"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory, text_dir: Path) -> Path:
    return make_vocabulary(text_dir, tmp_path_factory.mktemp("vocabulary") / "own.model")


@pytest.fixture(scope="module")
def bytes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("bytes"), every_byte=True)


def test_tokens_of_both_kinds():
    assert spell_byte_level("Ġnaï".replace("ï", "Ã¯")) == " naï".encode()
    assert spell_byte_level("Ċ") == b"\n"
    assert spell_piece("▁▁the") == b"  the"
    assert spell_piece("<0xE2>") == b"\xe2"
    assert spell_piece("<0xe2>") == b"<0xe2>"


def test_tokens_spell_the_text(vocabulary: Path, bytes_dir: Path):
    for tokenizer in (SentencePieceTokenizer(vocabulary), load_tokenizer(str(bytes_dir))):
        ids, characters = tokenizer.encode_placed(TEXT)
        assert ids == tokenizer.encode(TEXT)
        spelling = tokenizer.spelling()
        assert len(spelling) == tokenizer.vocab_size
        assert b"".join(spelling[one] for one in ids) == TEXT.encode()
        ends = token_ends(ids, characters, spelling, TEXT)
        assert ends.tolist() == np.cumsum([len(spelling[one]) for one in ids]).tolist()


def test_a_vocabulary_is_the_same_again_and_exact(vocabulary: Path, text_dir: Path, tmp_path: Path):
    again = make_vocabulary(text_dir, tmp_path / "again.model")
    assert again.read_bytes() == vocabulary.read_bytes()
    tokenizer = SentencePieceTokenizer(vocabulary)
    assert tokenizer.vocab_size == SIZE
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.spelling()[tokenizer.encode("\n")[0]] == b"\n"


def test_what_is_saved_reads_alike_in_transformers(vocabulary: Path, tmp_path: Path):
    own = SentencePieceTokenizer(vocabulary)
    require_exportable(own, "it")
    own.save(tmp_path)
    saved = load_tokenizer(str(tmp_path))
    text = json.loads(Path(__file__).parents[2].joinpath("conftest.py").read_text().splitlines()[0].replace('"""', '"'))
    assert saved.encode(text) == own.encode(text)
    assert saved.decode(saved.encode(text)) == text
    assert saved.spelling()[256:] == own.spelling()[256:]


def test_a_space_before_the_text_is_none_of_it():
    spelling = [b" a", b"b", None]
    assert token_ends([2, 0, 1, 2], [(0, 0), (0, 1), (1, 2), (2, 2)], spelling, "ab").tolist() == [0, 1, 2, 2]


def test_a_changed_text_is_placed_by_characters():
    """The letter was read as another, the double space as one; the last two tokens share a character."""
    spelling = [b"A", b" ", b"\xe2", b"\x98\x95"]
    ends = token_ends([0, 1, 2, 3], [(0, 1), (1, 3), (3, 4), (3, 4)], spelling, "\uff21  ☕")
    assert ends.tolist() == [3, 5, 5, 8]


def test_matches_are_one_to_one_and_prefer_pieces_to_bytes():
    student = [None, b"A", b"the", b"A", b"x", None]
    teacher = [b"the", None, b"A", b" y", b""]
    found = match(student, teacher)
    assert sorted(zip(found.student_M.tolist(), found.teacher_M.tolist(), strict=True)) == [(2, 0), (3, 2)]
    assert found.partners(5).tolist() == [2, -1, 3, -1, -1]
    assert found.reversed().partners(6).tolist() == [-1, -1, 0, 2, -1, -1]


def test_tokens_of_no_bytes_are_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="neither byte-level BPE's nor SentencePiece's"):
        HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend)).spelling()
