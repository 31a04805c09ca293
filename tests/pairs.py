"""A second tokenizer for tests: SentencePiece, made of the tiny text, beside the tiny byte-level one."""

from functools import cache
from pathlib import Path

from kdscale.config.sections import DataSection
from kdscale.data.pairs import TokenizerPair
from kdscale.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from kdscale.data.vocabulary import train_vocabulary

SIZE = 340
"""256 of them single bytes."""


def make_vocabulary(text_dir: Path, out: Path, size: int = SIZE) -> Path:
    train_vocabulary(DataSection(train=[str(text_dir / "train.jsonl")], heldout=["none"]), out, size)
    return out


@cache
def make_pair(vocabulary: Path, teacher: Path) -> TokenizerPair:
    student, other = SentencePieceTokenizer(vocabulary), load_tokenizer(str(teacher))
    assert isinstance(other, HuggingFaceTokenizer)
    return TokenizerPair(student, other)
