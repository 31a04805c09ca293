"""Text read by two tokenizers: documents cut at the same bytes for both, rows of the same pieces, and where they meet.

S = spans.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdscale.batch import TokenBatch
from kdscale.config.sections import DataSection
from kdscale.data.corpus import Corpus, Progress, Stored, cached, fingerprint_of, opening_tokens, part_of, parts_of
from kdscale.data.loader import Loader, stack
from kdscale.data.packing import Packing, build_row
from kdscale.data.sources import Document, find_sources, read_documents
from kdscale.data.spans import align, cut
from kdscale.data.spelling import Spelling, match, token_ends
from kdscale.data.tokenizer import Tokenizer
from kdscale.errors import DataError, ModelError
from kdscale.paired import Matches, PairedBatch

_VERSION = 2
_INTS, _FLAGS = pa.list_(pa.int32()), pa.list_(pa.bool_())
_SCHEMA = pa.schema(
    [
        *(("ids", _INTS), ("trained", _FLAGS), ("bytes", _INTS)),
        *(("teacher_ids", _INTS), ("teacher_trained", _FLAGS), ("teacher_bytes", _INTS)),
        ("spans", _INTS),
    ]
)
_BATCH = 256


class TokenizerPair:
    """By what inputs are read where the student has a tokenizer of its own."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer) -> None:
        self.student, self.teacher = student, teacher
        self.vocab_size = student.vocab_size
        self.fingerprint = hashlib.sha256(f"{student.fingerprint} {teacher.fingerprint}".encode()).hexdigest()

    @cached_property
    def spellings(self) -> tuple[Spelling, Spelling]:
        """The student's and the teacher's. Raises: ModelError."""
        return self.student.spelling(), self.teacher.spelling()

    @cached_property
    def matches(self) -> Matches:
        """What both vocabularies have; the ends of documents are one token like any other.

        Raises: ModelError: nothing.
        """
        found = match(*self.spellings)
        if not len(found):
            raise ModelError(
                "the tokenizers of student and teacher have no token in common; one of them is not of text"
            )
        if self.student.eos_id is None or self.teacher.eos_id is None:
            return found
        pairs = {**dict(zip(found.student_M.tolist(), found.teacher_M.tolist(), strict=True))}
        pairs = {
            own: other for own, other in pairs.items() if own != self.student.eos_id and other != self.teacher.eos_id
        }
        pairs[self.student.eos_id] = self.teacher.eos_id
        return Matches(np.array(list(pairs), np.int64), np.array(list(pairs.values()), np.int64))

    def save(self, directory: Path) -> None:
        """The student's; see ``Tokenizer``."""
        self.student.save(directory)


@dataclass(frozen=True)
class Side:
    """One tokenizer's reading of a document or a piece of one, by token."""

    ids: np.ndarray
    """int32."""
    trained: np.ndarray
    """bool."""
    bytes: np.ndarray
    """int32; how many bytes of the text each stands for."""

    def cut(self, first: int, past: int) -> "Side":
        return Side(self.ids[first:past], self.trained[first:past], self.bytes[first:past])


@dataclass(frozen=True)
class Piece:
    """A stretch of text that goes into one row, read by both."""

    student: Side
    teacher: Side
    spans_S4: np.ndarray
    """int32; see ``Span``."""


class PairSplit:
    """Pieces of the training or the held-out part, memory-mapped; a piece is what ``Split`` calls a document."""

    def __init__(self, path: Path, *, all_trained: bool) -> None:
        self._stored = Stored(path)
        longest = [
            np.maximum(*(batch.column(name).value_lengths().to_numpy() for name in ("ids", "teacher_ids")))
            for batch in self._stored.batches
        ]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *longest]).astype(np.int64)
        """Tokens by piece, of the side that has more, int64: so rows of equal length hold the same pieces on both sides."""
        self.all_trained = all_trained
        self.routes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, tokens: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """See ``Split``; the student's."""
        side = self.piece(index).student
        return side.ids[tokens], side.trained[tokens]

    def piece(self, index: int) -> Piece:
        batch, row = self._stored.find(index)
        columns = [batch.column(name)[row].values.to_numpy(zero_copy_only=False) for name in _SCHEMA.names]
        return Piece(Side(*columns[:3]), Side(*columns[3:6]), columns[6].reshape(-1, 4))


class PairLoader(Loader):
    """``Loader`` of both sides' rows.

    Raises:
        DataError: no row trains any token.
    """

    def __init__(self, split: PairSplit, packing: Packing, row_tokens: int, batch_rows: int, seed: int) -> None:
        self._pairs = split
        super().__init__(split, packing, row_tokens, batch_rows, seed)

    def _batch(self, number: int, rows: np.ndarray) -> PairedBatch:
        found = [self._paired_row(int(row)) for row in rows]
        student, teacher = (
            [[one.student for one in row] for row in found],
            [[one.teacher for one in row] for row in found],
        )
        own, others = self._rows_of(number, student), self._rows_of(number, teacher)
        spans = []
        for place, row in enumerate(found):
            before = np.zeros(2, np.int32)
            for piece in row:
                columns = piece.spans_S4 + np.repeat(before, 2)
                usable = _all_predicted(own.predicts_RL[place], columns[:, :2])
                usable &= _all_predicted(others.predicts_RL[place], columns[:, 2:])
                spans.append(np.insert(columns[usable], 0, place, axis=1))
                before += np.array([len(piece.student.ids), len(piece.teacher.ids)], np.int32)
        return PairedBatch(
            number=number,
            ids_RL=own.ids_RL,
            segments_RL=own.segments_RL,
            positions_RL=own.positions_RL,
            predicts_RL=own.predicts_RL,
            teacher=others,
            spans_S5=np.concatenate(spans).astype(np.int32),
            bytes_RL=self._bytes(student),
            teacher_bytes_RL=self._bytes(teacher),
        )

    def _rows_of(self, number: int, rows: list[list[Side]]) -> TokenBatch:
        built = [build_row([(one.ids, one.trained) for one in row], self._row_tokens, self._packing) for row in rows]
        return stack(number, built)

    def _paired_row(self, row: int) -> list[Piece]:
        table = self._table
        return [self._pairs.piece(int(one)) for one in table.documents[table.starts[row] : table.starts[row + 1]]]

    def _bytes(self, rows: list[list[Side]]) -> np.ndarray:
        found = np.zeros((len(rows), self._row_tokens), np.int32)
        for place, row in enumerate(rows):
            joined = np.concatenate([side.bytes for side in row])
            found[place, : len(joined)] = joined
        return found


def _all_predicted(predicts_L: np.ndarray, columns_S2: np.ndarray) -> np.ndarray:
    """bool [S]; whether every token from a column to past another is predicted by the one before it."""
    before = np.concatenate([[0, 0], np.cumsum(predicts_L)])  # at c, predicted tokens in front of column c
    first, past = columns_S2.T
    return np.asarray(before[past] - before[first] == past - first)


def build_pairs(
    data: DataSection, pair: TokenizerPair, progress: Progress, known: str | None = None
) -> Corpus[PairSplit]:
    """Tokenize what ``data`` names by both, or find it in the cache; ``known``: see ``fingerprint_of``.

    Raises:
        DataError: missing, broken or empty text, naming file and line; or messages, which templates surround differently.
    """
    settings = data.model_dump(include={"loss_on", "append_eos", "heldout_every", "row_tokens"})
    endings = [one.eos_id for one in (pair.student, pair.teacher)] if data.append_eos else None
    fingerprint = fingerprint_of(["pairs", _VERSION, settings, pair.fingerprint, endings], data, progress, known)
    directory = cached(Path(data.cache_dir) / fingerprint[:32], lambda staging: _write(data, pair, staging, progress))
    facts = json.loads((directory / "corpus.json").read_text())
    train, heldout = (PairSplit(directory / f"{name}.arrow", all_trained=facts[name]) for name in ("train", "heldout"))
    return Corpus(train, heldout, fingerprint)


def read_side(
    document: Document, data: DataSection, tokenizer: Tokenizer, spelling: Spelling
) -> tuple[Side, np.ndarray]:
    """A document as one tokenizer reads it, and where its tokens end, bytes from its beginning. Raises: DataError."""
    ids: list[int] = []
    trained: list[bool] = []
    ends, before = [], 0
    for number, (text, trains) in enumerate(parts_of(document, data)):
        found, characters = tokenizer.encode_placed(text)
        skipped = opening_tokens(tokenizer, found) if number else 0
        ends.append(before + token_ends(found, characters, spelling, text)[skipped:])
        ids, trained = ids + found[skipped:], trained + [trains] * (len(found) - skipped)
        before += len(text.encode())
    if data.append_eos and document.ends:
        assert tokenizer.eos_id is not None
        ids, trained = [*ids, tokenizer.eos_id], [*trained, True]
        ends.append(np.array([before], np.int64))
    all_ends = np.concatenate(ends)
    lengths = np.diff(all_ends, prepend=0).astype(np.int32)
    return Side(np.array(ids, np.int32), np.array(trained, np.bool_), lengths), all_ends


def pieces_of(document: Document, data: DataSection, pair: TokenizerPair) -> list[Piece]:
    """A document in pieces of at most ``data.row_tokens`` tokens on either side. Raises: DataError."""
    if document.kind == "messages":
        raise DataError(
            f"{document.place}: the chat templates of two tokenizers put other text around messages; use prompt + completion"
        )
    tokenizers = (pair.student, pair.teacher)
    (student, student_ends), (teacher, teacher_ends) = (
        read_side(document, data, one, spelling) for one, spelling in zip(tokenizers, pair.spellings, strict=True)
    )
    spans = align(student_ends, teacher_ends)
    # In order on both sides: a piece's lie together.
    placed = np.array(spans, np.int64).reshape(-1, 4)
    pieces = []
    for first, past, teacher_first, teacher_past in cut(spans, (len(student.ids), len(teacher.ids)), data.row_tokens):
        here = slice(np.searchsorted(placed[:, 0], first), np.searchsorted(placed[:, 1], past, side="right"))
        shifted = placed[here] - [first, first, teacher_first, teacher_first]
        pieces.append(
            Piece(student.cut(first, past), teacher.cut(teacher_first, teacher_past), shifted.astype(np.int32))
        )
    return pieces


def _write(data: DataSection, pair: TokenizerPair, directory: Path, progress: Progress) -> None:
    for whose, tokenizer in (("student's", pair.student), ("teacher's", pair.teacher)):
        if data.append_eos and tokenizer.eos_id is None:
            raise DataError(f"data.append_eos = true, but the {whose} tokenizer has no end token; set it to false")
    writers = {name: _PairWriter(directory / f"{name}.arrow") for name in ("train", "heldout")}
    done = 0
    for name, sources in (("train", data.train), ("heldout", data.heldout)):
        for source in find_sources(sources):
            for document in read_documents(source):
                writer = writers[part_of(name, done, data)]
                for piece in pieces_of(document, data, pair):
                    writer.add(piece)
                done += 1
                if done % 100 == 0:
                    progress(done, None, "tokenizing document")
    progress(done, done, "tokenizing document")
    facts = {name: writer.close() for name, writer in writers.items()}
    if not writers["train"].num_spans:
        raise DataError(
            f"{', '.join(data.train)}: no stretch of text that both tokenizers end at; are they of the same script?"
        )
    if not writers["heldout"].num_spans and (data.heldout or done >= data.heldout_every):
        held = f"{', '.join(data.heldout)} (data.heldout)" if data.heldout else "what data.heldout_every holds out"
        raise DataError(
            f"no held-out text: {held} has no stretch of text that both tokenizers end at; name other files in data.heldout"
        )
    if not writers["heldout"].num_spans:
        raise DataError(
            f"no held-out text: {done} documents are fewer than data.heldout_every = {data.heldout_every}; lower it or name"
            " files in data.heldout"
        )
    (directory / "corpus.json").write_text(json.dumps(facts))


class _PairWriter:
    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._pieces: list[Piece] = []
        self.num_spans = 0
        self._all_trained = True

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.num_spans += len(piece.spans_S4)
        self._all_trained &= bool(piece.student.trained.all()) and len(piece.student.ids) > 1
        if len(self._pieces) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pieces:
            sides = [[one.student for one in self._pieces], [one.teacher for one in self._pieces]]
            values = [[getattr(one, name) for one in side] for side in sides for name in ("ids", "trained", "bytes")]
            values.append([one.spans_S4.reshape(-1) for one in self._pieces])
            columns = [pa.array(rows, field.type) for rows, field in zip(values, _SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._pieces = []

    def close(self) -> bool:
        """Finish the file; whether every token was trained."""
        self._flush()
        self._writer.close()
        self._file.close()
        return self._all_trained
