"""Labelled texts and images: files to examples in memory-mapped Arrow, and batches of them.

R = rows, L = tokens or pixels in a row.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdscale.batch import ExampleBatch
from kdscale.config.sections import DataSection
from kdscale.data.corpus import Corpus, Progress, Stored, cached, fingerprint_of, part_of
from kdscale.data.images import Pixels
from kdscale.data.loader import Order
from kdscale.data.sources import find_sources, read_rows, text_of
from kdscale.data.tokenizer import Tokenizer
from kdscale.errors import DataError

_VERSION = 1
_BATCH = 256
Reader = Tokenizer | Pixels
"""By what inputs are read: texts by a tokenizer, images by how their pixels are."""


class Examples:
    """Examples of the training or the held-out part, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._stored = Stored(path)
        labels = [batch.column(1).to_numpy() for batch in self._stored.batches]
        self.labels = np.concatenate([np.zeros(0, np.int32), *labels]).astype(np.int32)
        """int32, by example."""

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: int) -> np.ndarray:
        """Token ids, int32, or an image's bytes, uint8."""
        batch, row = self._stored.find(index)
        value = batch.column(0)[row]
        if isinstance(value, pa.ListScalar):
            ids: np.ndarray = value.values.to_numpy()
            return ids
        return np.frombuffer(value.as_buffer(), np.uint8)


def build_examples(
    data: DataSection, reader: Reader, classes: tuple[str, ...], progress: Progress, known: str | None = None
) -> Corpus[Examples]:
    """Read the examples that ``data`` names, or find them in the cache; ``known``: see ``fingerprint_of``.

    A label is a number from 0, or one of the names in ``classes``.

    Raises:
        DataError: a row that is no example, naming file and line; or a part without any.
    """
    settings = data.model_dump(include={"row_tokens", "heldout_every"})
    read_by = ["examples", _VERSION, settings, reader.fingerprint, classes]
    fingerprint = fingerprint_of(read_by, data, progress, known)
    directory = cached(
        Path(data.cache_dir) / fingerprint[:32], lambda staging: _write(data, reader, classes, staging, progress)
    )
    train, heldout = (Examples(directory / f"{name}.arrow") for name in ("train", "heldout"))
    return Corpus(train, heldout, fingerprint)


def _write(data: DataSection, reader: Reader, classes: tuple[str, ...], directory: Path, progress: Progress) -> None:
    writers = {name: _Writer(directory / f"{name}.arrow", reader) for name in ("train", "heldout")}
    done = 0
    for name, patterns in (("train", data.train), ("heldout", data.heldout)):
        for source in find_sources(patterns):
            for row, place in read_rows(source):
                writers[part_of(name, done, data)].add(
                    _inputs(row, reader, data.row_tokens, place), _label(row, classes, place)
                )
                done += 1
                if done % 100 == 0:
                    progress(done, None, "reading example")
    progress(done, done, "reading example")
    facts = {name: writer.close() for name, writer in writers.items()}
    if not facts["train"]:
        raise DataError(f"{', '.join(data.train)}: no example to train on")
    if not facts["heldout"]:
        raise DataError(
            f"no held-out example: {facts['train']} training examples are fewer than data.heldout_every ="
            f" {data.heldout_every}; lower it or name files in data.heldout"
        )
    (directory / "corpus.json").write_text(json.dumps(facts))


def _inputs(row: Any, reader: Reader, row_tokens: int, place: str) -> Any:
    name = "image" if isinstance(reader, Pixels) else "text"
    if not isinstance(row, dict) or row.get(name) is None:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{place}: an example has {name} and label; there is {found or 'nothing'}")
    if isinstance(reader, Pixels):
        return reader.read(row[name], place).tobytes()
    ids = reader.encode(text_of(row, name, place), row_tokens)
    if not ids:
        raise DataError(f"{place}: the text has no token")
    return ids


def _label(row: dict[str, Any], classes: tuple[str, ...], place: str) -> int:
    label = row.get("label")
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return label
    known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
    raise DataError(
        f"{place}: label = {label!r} is no class of the teacher, which has {len(classes)} (0 to {len(classes) - 1}: {known})"
    )


class _Writer:
    def __init__(self, path: Path, reader: Reader) -> None:
        kind = pa.binary(reader.size) if isinstance(reader, Pixels) else pa.list_(pa.int32())
        self._schema = pa.schema([("inputs", kind), ("label", pa.int32())])
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._rows: list[tuple[Any, int]] = []
        self._count = 0

    def add(self, inputs: Any, label: int) -> None:
        self._rows.append((inputs, label))
        self._count += 1
        if len(self._rows) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(column, field.type)
                for column, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows = []

    def close(self) -> int:
        """Finish the file; how many examples it holds."""
        self._flush()
        self._writer.close()
        self._file.close()
        return self._count


class ExampleLoader:
    """Examples of one split, in the order of ``Order``; texts in rows of ``row_tokens``."""

    def __init__(self, examples: Examples, row_tokens: int, batch_rows: int, seed: int) -> None:
        self._examples = examples
        self._row_tokens = row_tokens
        self._order = Order(len(examples), batch_rows, seed)

    @property
    def num_rows(self) -> int:
        return self._order.num_rows

    @property
    def steps_per_epoch(self) -> float:
        return self._order.steps_per_epoch

    def batch(self, number: int, rows: slice = slice(None)) -> ExampleBatch:
        """See ``Loader``."""
        return self._stack(number, self._order.of_batch(number, rows))

    def heldout_batches(self, max_examples: int, rows_per_batch: int) -> list[ExampleBatch]:
        """Batches of examples spread evenly over the split, at most ``max_examples`` in all."""
        spread = self._order.spread(max_examples, rows_per_batch)
        return [self._stack(number, chosen.tolist()) for number, chosen in enumerate(spread)]

    def _stack(self, number: int, chosen: list[int]) -> ExampleBatch:
        rows = [self._examples.inputs(index) for index in chosen]
        # A text's row is as wide wherever it stands: a recording finds it by its bytes.
        width = len(rows[0]) if rows[0].dtype == np.uint8 else self._row_tokens
        inputs_RL = np.zeros((len(rows), width), rows[0].dtype)
        for inputs_L, row in zip(inputs_RL, rows, strict=True):
            inputs_L[: len(row)] = row
        return ExampleBatch(
            number=number,
            inputs_RL=inputs_RL,
            lengths_R=np.array([len(row) for row in rows], np.int32),
            labels_R=self._examples.labels[chosen],
            trained_R=np.ones(len(rows), np.bool_),
        )
