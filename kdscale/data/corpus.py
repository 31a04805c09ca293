"""Text files to a tokenized corpus in memory-mapped Arrow, made once per (text, tokenizer, settings)."""

import hashlib
import json
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from kdscale.config.sections import DataSection
from kdscale.config.teachers import Routing
from kdscale.data.sources import Document, find_sources, read_documents, source_digest
from kdscale.data.tokenizer import Tokenizer
from kdscale.errors import DataError

_VERSION = 2
_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))])
_ROUTED = _SCHEMA.append(pa.field("route", pa.int8()))
_BATCH = 256
_LEFTOVER_S = 86400.0
Progress = Callable[[int, int | None, str], None]
"""(done, total or None, what)."""
Part = TypeVar("Part")


class Stored:
    """Rows of an Arrow file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        # Batch by batch: joining them would copy the corpus into memory.
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self.batches)])

    def find(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds row ``index``, and its place there."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.batches[number], index - int(self._firsts[number])


class Split:
    """Documents of the training or the held-out part, memory-mapped."""

    def __init__(self, path: Path, *, all_trained: bool) -> None:
        self._stored = Stored(path)
        lengths = [batch.column(0).value_lengths().to_numpy() for batch in self._stored.batches]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)
        """Tokens by document, int64."""
        self.all_trained = all_trained
        """Whether every token of every document may be trained on."""
        routes = [batch.column("route").to_numpy() for batch in self._stored.batches if "route" in batch.schema.names]
        self.routes = np.concatenate(routes) if routes else None
        """By document, int8; see ``TokenBatch.routes_RL``."""

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, tokens: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, trained bool) of one document, or of the given ``tokens`` of it."""
        batch, row = self._stored.find(index)
        # Cut first: what is trained lies in bits, and becomes an array token by token.
        ids, trained = (batch.column(name)[row].values[tokens] for name in ("ids", "trained"))
        return ids.to_numpy(), trained.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Corpus(Generic[Part]):
    """What a run is trained on and measured with, as its models read it."""

    train: Part
    heldout: Part
    fingerprint: str


def build_corpus(
    data: DataSection,
    tokenizer: Tokenizer,
    progress: Progress,
    routing: Routing | None = None,
    known: str | None = None,
) -> Corpus[Split]:
    """Tokenize what ``data`` names, or find it in the cache; ``known``: see ``fingerprint_of``.

    Several processes may build the same corpus at once: each writes aside, the first to finish is used.

    Raises:
        DataError: missing, broken or empty text, or a document of an unknown teacher, naming file and line.
    """
    fingerprint = _fingerprint(data, tokenizer, progress, routing, known)
    directory = cached(
        Path(data.cache_dir) / fingerprint[:32], lambda staging: _write(data, tokenizer, staging, progress, routing)
    )
    facts = json.loads((directory / "corpus.json").read_text())
    train, heldout = (Split(directory / f"{name}.arrow", all_trained=facts[name]) for name in ("train", "heldout"))
    return Corpus(train, heldout, fingerprint)


def cached(directory: Path, write: Callable[[Path], None]) -> Path:
    """``directory`` as ``write`` has filled it, now or before; ``corpus.json`` is what says that it is whole."""
    if not (directory / "corpus.json").is_file():
        _remove_leftovers(directory.parent)
        # Processes of two containers may have one id.
        staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
        staging.mkdir(parents=True)
        try:
            write(staging)
            try:
                staging.rename(directory)
            except OSError:
                if not (directory / "corpus.json").is_file():
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def _remove_leftovers(cache: Path) -> None:
    """What processes left that were killed: nothing in it was written to for a day."""
    for partial in cache.glob(f".{'[0-9a-f]' * 32}.*.partial"):
        # Another process may be removing it, or renaming it into place.
        with suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir())) > _LEFTOVER_S:
                shutil.rmtree(partial, ignore_errors=True)


def _fingerprint(
    data: DataSection, tokenizer: Tokenizer, progress: Progress, routing: Routing | None, known: str | None
) -> str:
    settings = data.model_dump(include={"loss_on", "append_eos", "heldout_every"})
    opening = tokenizer.encode("")
    ending = tokenizer.eos_id if data.append_eos else None
    read_by = [_VERSION, settings, tokenizer.fingerprint, ending, tokenizer.chat_template]
    read_by += [opening] if opening else []
    return fingerprint_of(read_by + ([asdict(routing)] if routing else []), data, progress, known)


def fingerprint_of(read_by: list[Any], data: DataSection, progress: Progress, known: str | None = None) -> str:
    """Identity of what ``data`` names, together with how it is read (plain values).

    ``known``: what it is where the run began. Where the corpus of that name lies in the cache, nothing is read for it: many ranks
    would all read the whole text, of which they need the tokens alone.

    Raises: DataError: something is missing, both trained on and held out, or not what is ``known``.
    """
    if known is not None and (Path(data.cache_dir) / known[:32] / "corpus.json").is_file():
        return known
    digest = hashlib.sha256()
    digest.update(json.dumps(read_by).encode())
    named: list[list[tuple[str, str]]] = [[], []]
    for part, found in zip((data.train, data.heldout), named, strict=True):
        sources = find_sources(part)
        for done, source in enumerate(sources, start=1):
            content = source_digest(source)
            digest.update(content.encode())
            found.append((content, source.name))
            progress(done, len(sources), "reading text")
        digest.update(b"|")
    _require_apart(data, *named)
    if known not in (None, digest.hexdigest()):
        raise DataError(
            f"{', '.join(data.train + data.heldout)} (data.train, data.heldout) hold something else on {socket.gethostname()}"
            " than where the run was started, or are read by another tokenizer; give every node with ranks the same files"
        )
    return digest.hexdigest()


def _require_apart(data: DataSection, train: list[tuple[str, str]], heldout: list[tuple[str, str]]) -> None:
    """By (digest, name) of each source. Raises: DataError when what is held out is trained on, too."""
    # Who names the same for both means to measure on it, as ``compare.text_rows`` does.
    if data.train == data.heldout:
        return
    seen: dict[str, str] = {}
    for digest, name in train:
        if digest in seen and not data.heldout:
            raise DataError(
                f"data.train: {name} has the content of {seen[digest]}, and data.heldout_every = {data.heldout_every} holds out"
                " documents of the one that are trained on in the other; name it once, or name files in data.heldout"
            )
        seen[digest] = name
    for digest, name in heldout:
        if digest in seen:
            raise DataError(
                f"data.heldout: {name} has the content of {seen[digest]} in data.train, so that it is trained on, too; name"
                " train files that leave it out"
            )


def _write(
    data: DataSection, tokenizer: Tokenizer, directory: Path, progress: Progress, routing: Routing | None
) -> None:
    if data.append_eos and tokenizer.eos_id is None:
        raise DataError("data.append_eos = true, but the tokenizer has no end token; set it to false")
    schema = _SCHEMA if routing is None else _ROUTED
    writers = {name: _SplitWriter(directory / f"{name}.arrow", schema) for name in ("train", "heldout")}
    done = 0
    for name, sources in (("train", data.train), ("heldout", data.heldout)):
        for source in find_sources(sources):
            for document in read_documents(source, data.teacher_column):
                route = None if routing is None else _route(document, routing)
                writers[part_of(name, done, data)].add(*_tokens(document, data, tokenizer), route)
                done += 1
                if done % 100 == 0:
                    progress(done, None, "tokenizing document")
    progress(done, done, "tokenizing document")
    facts = {name: writer.close() for name, writer in writers.items()}
    if not writers["train"].num_trained:
        raise DataError(f"{', '.join(data.train)}: no token to train on (data.loss_on=all trains on prompts too)")
    if not writers["heldout"].num_documents:
        raise DataError(
            f"no held-out text: {writers['train'].num_documents} training documents are fewer than data.heldout_every ="
            f" {data.heldout_every}; lower it or name files in data.heldout"
        )
    (directory / "corpus.json").write_text(json.dumps(facts))


def part_of(named: str, number: int, data: DataSection) -> str:
    """Where row ``number`` of all goes, which stands in the files named for ``named``."""
    every = data.heldout_every
    return "heldout" if named == "train" and not data.heldout and number % every == every - 1 else named


def _route(document: Document, routing: Routing) -> int:
    """The place of the document's teacher among all. Raises: DataError."""
    name = routing.default if document.teacher is None else document.teacher
    if name not in routing.names:
        known = f"the teachers are {', '.join(routing.names)}"
        if name is None:
            raise DataError(
                f"{document.place}: no {routing.column} names its teacher (data.teacher_column); {known}, and"
                " teachers.default may name one for such documents"
            )
        raise DataError(f"{document.place}: {routing.column} = {name!r} is no teacher; {known}")
    return routing.names.index(name)


def parts_of(document: Document, data: DataSection) -> list[tuple[str, bool]]:
    """A document's texts, each tokenized for itself, and whether they are trained on; not of messages."""
    if document.kind == "completion":
        return [(document.prompt, data.loss_on == "all"), (document.text, True)]
    return [(document.text, True)]


def _tokens(document: Document, data: DataSection, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, trained bool); arrays, for lists of Python's numbers are some ten times as large."""
    if document.kind == "messages":
        try:
            rendered, of_assistant = tokenizer.render(document.messages)
        except DataError as error:
            raise DataError(f"{document.place}: {error}") from error
        return np.array(rendered, np.int32), np.array(of_assistant, np.bool_) | (data.loss_on == "all")
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    for number, (text, trains) in enumerate(parts_of(document, data)):
        found = tokenizer.encode(text)
        ids.append(np.array(found, np.int32)[opening_tokens(tokenizer, found) if number else 0 :])
        trained.append(np.full(len(ids[-1]), trains))
    if data.append_eos and document.ends:
        ids.append(np.array([tokenizer.eos_id], np.int32))
        trained.append(np.ones(1, np.bool_))
    return np.concatenate(ids), np.concatenate(trained)


def opening_tokens(tokenizer: Tokenizer, ids: list[int]) -> int:
    """How many of a text's tokens open it, whatever it says: they open a document, not its second half."""
    opening = tokenizer.encode("")
    return len(opening) if ids[: len(opening)] == opening else 0


class _SplitWriter:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._schema = schema
        self._writer = pa.ipc.new_file(self._file, schema)
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._routes: list[int | None] = []
        self.num_documents = 0
        self.num_trained = 0
        self._all_trained = True

    def add(self, ids: np.ndarray, trained: np.ndarray, route: int | None) -> None:
        self._ids.append(ids)
        self._trained.append(trained)
        self._routes.append(route)
        self.num_documents += 1
        # The first token of a document is predicted by nothing.
        self.num_trained += int(np.count_nonzero(trained[1:]))
        self._all_trained &= bool(trained.all())
        if len(self._ids) == _BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._ids:
            values = (self._ids, self._trained, self._routes)
            # Without a routing the schema has no third column.
            columns = [pa.array(value, field.type) for value, field in zip(values, self._schema, strict=False)]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._ids, self._trained, self._routes = [], [], []

    def close(self) -> bool:
        """Finish the file; whether every token was trained."""
        self._flush()
        self._writer.close()
        self._file.close()
        return self._all_trained
