"""A SentencePiece vocabulary made from the training text."""

import io
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from kdscale.config.sections import DataSection
from kdscale.data.corpus import part_of, parts_of
from kdscale.data.sources import find_sources, read_documents
from kdscale.durable import write_durably
from kdscale.errors import DataError

_MOST_BYTES = 1 << 20
"""Of a line; longer ones are left out."""


def train_vocabulary(data: DataSection, out: Path, size: int) -> int:
    """Write a SentencePiece BPE model of ``size`` tokens, made from the training documents of ``data``; returns its true size.

    It spells every text exactly: nothing is normalized, no space is put before a text, a line's end is a token, and bytes
    without a piece are their own (Kudo & Richardson 2018, arXiv 1808.06226). The same text gives the same file.

    Raises:
        DataError: missing or broken text, messages, or too little text for ``size``.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(data),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=_MOST_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"no vocabulary of {size} tokens can be made of {', '.join(data.train)}: {error}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, model.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).GetPieceSize())


def _lines(data: DataSection) -> Iterator[str]:
    number = 0
    for source in find_sources(data.train):
        for document in read_documents(source):
            if part_of("train", number, data) == "train":
                if document.kind == "messages":
                    raise DataError(
                        f"{document.place}: what is said around messages is a template's; use prompt + completion, or text"
                    )
                for text, _ in parts_of(document, data):
                    yield from text.splitlines(keepends=True)
            number += 1
