"""What patterns stand for, and every file or row that is not text, named."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdscale.data.sources import Source, find_sources, read_documents, source_digest
from kdscale.errors import DataError

LONE = "\\ud83d"
"""As JSON has it."""


def test_kinds_go_by_suffix_whatever_its_case(tmp_path: Path):
    kinds = {"a.jsonl": "jsonl", "b.JSONL": "jsonl", "c.Parquet": "parquet", "d.arrow": "arrow", "e.md": "text"}
    for name in kinds:
        (tmp_path / name).touch()
    assert [Path(one.name).name for one in find_sources([f"{tmp_path}/*"])] == sorted(kinds)
    assert [find_sources([str(tmp_path / name)])[0].kind for name in kinds] == list(kinds.values())


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("a.json", "write its rows as .jsonl"), ("a.CSV", "write its rows as .jsonl"), ("a.jsonl.gz", "unpack it")],
)
def test_what_would_be_read_markup_and_all_is_refused(name: str, way_out: str, tmp_path: Path):
    (tmp_path / name).touch()
    for pattern in (name, "*"):
        with pytest.raises(DataError, match=rf"{name}: \{Path(name).suffix.lower()} files are not read .*{way_out}"):
            find_sources([str(tmp_path / pattern)])


def test_names_may_have_a_globs_signs_in_them(tmp_path: Path):
    file = tmp_path / "part[1]*.jsonl"
    file.touch()
    directory = tmp_path / "set[1]"
    directory.mkdir()
    assert find_sources([str(file), str(directory)]) == [
        Source("jsonl", str(file)),
        Source("directory", str(directory)),
    ]
    with pytest.raises(DataError, match=r"\[2\]\.jsonl matches no file"):
        find_sources([str(tmp_path / "part[2].jsonl")])


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt"):
        source_digest(Source("text", str(tmp_path / "gone.txt")))


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (f'{{"text": "a {LONE}"}}', "text"),
        (f'{{"prompt": "{LONE}", "completion": "b"}}', "prompt"),
        (f'{{"prompt": "a", "completion": "{LONE} b"}}', "completion"),
        (f'{{"messages": [{{"role": "user", "content": "{LONE}"}}]}}', "messages"),
        (f'{{"messages": [{{"role": "user", "content": [{{"text": "{LONE}"}}]}}]}}', "messages"),
    ],
)
def test_half_a_surrogate_pair_is_named(row: str, field: str, tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a whole one: \U0001f600"}) + "\n" + row + "\n")
    documents = read_documents(Source("jsonl", str(file)))
    assert next(documents).text.endswith("\U0001f600")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {field} has '\\ud83d', half of a surrogate pair"):
        next(documents)


def test_strings_of_other_bytes_are_named(tmp_path: Path):
    """Arrow takes any bytes for a string."""
    offsets, latin = pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer("na\xefv".encode("latin-1"))
    table = pa.table({"text": pa.StringArray.from_buffers(1, offsets, latin)})
    parquet, arrow, directory = (tmp_path / name for name in ("a.parquet", "a.arrow", "a"))
    pq.write_table(table, parquet)
    with pa.OSFile(str(arrow), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(directory)
    for source in find_sources([str(parquet), str(arrow), str(directory)]):
        with pytest.raises(DataError, match=rf"^{source.name} is not UTF-8 text"):
            list(read_documents(source))
