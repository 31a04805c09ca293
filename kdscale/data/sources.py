"""Files and datasets to rows and documents: text, jsonl, parquet, Arrow, Hugging Face dataset directories and hub names."""

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.errors import DataError

Row = tuple[Any, str]
"""What a line or row holds, and its place: ``file:line`` or ``file row N``."""
_FIELDS = "text, prompt + completion, or messages"
_REFUSED = {
    **dict.fromkeys((".gz", ".zst", ".zip", ".xz", ".bz2"), "unpack it"),
    **dict.fromkeys(
        (".json", ".csv", ".tsv"), "write its rows as .jsonl or .parquet, or name it .txt where it is one plain text"
    ),
}
"""What would be read as one plain text, markup and all, and the way out."""


@dataclass(frozen=True)
class Document:
    """One document, before tokenization."""

    kind: Literal["text", "completion", "messages"]
    place: str
    """``file`` or ``file:line``."""
    text: str = ""
    """The text, or the completion."""
    prompt: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    ends: bool = True
    """Whether the document is over where its text is; one that was cut off (``"ends": false``) gets no end token."""
    teacher: Any = None
    """What stands in the field that names its teacher."""


@dataclass(frozen=True)
class Source:
    """A file, a dataset directory or a hub name (``NAME`` or ``NAME:SPLIT``)."""

    kind: Literal["text", "jsonl", "parquet", "arrow", "directory", "hub"]
    name: str


def find_sources(patterns: list[str]) -> list[Source]:
    """What the patterns stand for, globs sorted. Raises: DataError: one finds nothing, or a kind of file that is not read."""
    found: list[Source] = []
    for pattern in patterns:
        # Names may have a glob's signs in them.
        if Path(pattern).is_dir():
            found.append(Source("directory", pattern))
        elif Path(pattern).is_file():
            found.append(_file(pattern))
        elif any(sign in pattern for sign in "*?["):
            matches = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
            if not matches:
                raise DataError(f"{pattern} matches no file")
            found += [_file(match) for match in matches]
        elif _looks_like_hub(pattern):
            found.append(Source("hub", pattern))
        else:
            raise DataError(
                f"{pattern} does not exist (data.train and data.heldout take files, globs, dataset directories"
                " and hub names)"
            )
    return found


def _looks_like_hub(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/")) and not Path(name.split(":")[0]).suffix


def _file(name: str) -> Source:
    match Path(name).suffix.lower():
        case ".jsonl" | ".ndjson":
            return Source("jsonl", name)
        case ".parquet":
            return Source("parquet", name)
        case ".arrow":
            return Source("arrow", name)
        case suffix if suffix in _REFUSED:
            raise DataError(f"{name}: {suffix} files are not read (data.train, data.heldout); {_REFUSED[suffix]}")
        case _:
            return Source("text", name)


def source_digest(source: Source) -> str:
    """Identity of a source's content: of the bytes for files, of the dataset's own fingerprint otherwise. Raises: DataError."""
    match source.kind:
        case "directory" | "hub":
            return str(_dataset(source)._fingerprint)
        case _:
            try:
                with open(source.name, "rb") as file:
                    return f"{source.kind} {hashlib.file_digest(file, 'sha256').hexdigest()}"
            except OSError as error:
                raise DataError(f"cannot read {source.name}: {error}") from error


def read_documents(source: Source, teacher_column: str | None = None) -> Iterator[Document]:
    """The documents of a source, in order. Raises: DataError naming file and line."""
    if source.kind != "text":
        for row, place in read_rows(source):
            document = _document(row, place)
            yield document if teacher_column is None else replace(document, teacher=row.get(teacher_column))
        return
    text = _read_text(source.name)
    if not text or text.isspace():
        raise DataError(f"{source.name} is empty")
    yield Document("text", source.name, text)


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source that has any, in order. Raises: DataError naming file and line."""
    try:
        match source.kind:
            case "jsonl":
                yield from _read_jsonl(source.name)
            case "parquet":
                yield from _read_parquet(source.name)
            case "arrow":
                yield from _read_arrow(source.name)
            case "directory" | "hub":
                for number, row in enumerate(_undecoded(_dataset(source))):
                    yield row, f"{source.name} row {number}"
            case "text":
                raise DataError(
                    f"{source.name} has no rows; examples come from jsonl, parquet, Arrow or dataset directories"
                )
    # Arrow, too, takes whatever bytes were written as a string, until it becomes one of Python's.
    except UnicodeDecodeError as error:
        raise DataError(f"{source.name} is not UTF-8 text: {error}") from error


def _read_text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: byte {error.start} cannot be read") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error}") from error


def _read_jsonl(name: str) -> Iterator[Row]:
    empty = True
    try:
        with open(name, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                empty = False
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{name}:{number}: broken JSON: {error}") from error
                yield row, f"{name}:{number}"
    except OSError as error:
        raise DataError(f"cannot read {name}: {error}") from error
    if empty:
        raise DataError(f"{name} is empty")


def _read_parquet(name: str) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(name)
        if not file.metadata.num_rows:
            raise DataError(f"{name} is empty")
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield row, f"{name} row {number}"
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {name} as parquet: {error}") from error


def _read_arrow(name: str) -> Iterator[Row]:
    try:
        mapped = pa.memory_map(name)
        try:
            table = pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid:
            # The datasets library writes streams.
            mapped.seek(0)
            table = pa.ipc.open_stream(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {name} as Arrow: {error}") from error
    if not table.num_rows:
        raise DataError(f"{name} is empty")
    for number, row in enumerate(row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist()):
        yield row, f"{name} row {number}"


def _undecoded(dataset: Any) -> Any:
    """With images as they were stored."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _dataset(source: Source) -> Any:
    import datasets

    try:
        if source.kind == "directory":
            loaded = datasets.load_from_disk(source.name)
        else:
            name, _, split = source.name.partition(":")
            loaded = datasets.load_dataset(name, split=split or "train")
    # The library raises many kinds for one thing: what was named is not to be had.
    except Exception as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"{source.name} is neither a file nor a dataset that can be loaded: {first}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"{source.name} holds splits {', '.join(loaded)}; name the directory of one of them")
    if not len(loaded):
        raise DataError(f"{source.name} is empty")
    return loaded


def _document(row: Any, place: str) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a {type(row).__name__} where an object with {_FIELDS} should be")
    if row.get("messages") is not None:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise DataError(f"{place}: messages must be a list of objects with role and content")
        if not messages:
            raise DataError(f"{place}: messages is empty")
        # A template may write whatever stands in them; parquet's may hold what JSON cannot.
        _require_characters(json.dumps(messages, ensure_ascii=False, default=str), "messages", place)
        return Document("messages", place, messages=messages)
    if row.get("prompt") is not None and row.get("completion") is not None:
        answer, prompt = text_of(row, "completion", place), text_of(row, "prompt", place)
        return Document("completion", place, answer, prompt, ends=_ends(row, place))
    if row.get("text") is not None:
        return Document("text", place, text_of(row, "text", place), ends=_ends(row, place))
    raise DataError(f"{place}: none of {_FIELDS} in {', '.join(map(str, row)) or 'an empty object'}")


def text_of(row: dict[str, Any], name: str, place: str) -> str:
    """The text in field ``name``. Raises: DataError when it is none, or empty where it may not be, or no characters."""
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is a {type(value).__name__}, it must be text")
    if not value.strip() and name != "prompt":
        raise DataError(f"{place}: {name} is empty")
    _require_characters(value, name, place)
    return value


def _require_characters(text: str, name: str, place: str) -> None:
    """Raises: DataError for a lone surrogate, which JSON can escape and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {name} has {text[error.start]!r}, half of a surrogate pair, which is no character; write the pair, or"
            " leave it out"
        ) from error


def _ends(row: dict[str, Any], place: str) -> bool:
    value = row.get("ends")
    if not (value is None or isinstance(value, bool)):
        raise DataError(f"{place}: ends is {value!r}, it must be true or false")
    return value is not False
