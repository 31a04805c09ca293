"""Files to examples and batches: a pure function of what lies on disk, and every bad row is named."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kdscale.config.sections import DataSection
from kdscale.data.corpus import Corpus
from kdscale.data.examples import ExampleLoader, Examples, build_examples
from kdscale.data.tokenizer import load_tokenizer
from kdscale.errors import DataError
from tests.classes import PIXELS, digits
from tests.unit.data.test_loader import assert_same

CLASSES = tuple(map(str, range(10)))
ROWS = [{"image": image.tolist(), "label": int(label)} for image, label in zip(*digits(12), strict=True)]


def build(tmp_path: Path, train: list[str], **fields: Any) -> Corpus[Examples]:
    section = DataSection(train=train, cache_dir=str(tmp_path / "cache"), **({"heldout_every": 4} | fields))
    return build_examples(section, PIXELS, CLASSES, lambda done, total, what: None)


def write_parquet(path: Path, rows: list[dict]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def contents(corpus: Corpus[Examples]) -> list[tuple[bytes, int]]:
    parts = (corpus.train, corpus.heldout)
    return [(part.inputs(n).tobytes(), int(part.labels[n])) for part in parts for n in range(len(part))]


def test_every_kind_of_file_holds_the_same_examples(tmp_path: Path):
    ways = {"parquet": write_parquet(tmp_path / "a.parquet", ROWS), "jsonl": str(tmp_path / "a.jsonl")}
    Path(ways["jsonl"]).write_text("".join(json.dumps(row | {"label": str(row["label"])}) + "\n" for row in ROWS))
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        ways[name] = str(tmp_path / f"{name}.arrow")
        with pa.OSFile(ways[name], "wb") as out, new(out, table.schema) as writer:
            writer.write_table(table)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = [Image.fromarray(np.array(row["image"], np.uint8)) for row in ROWS]
    columns = {"image": images, "label": [row["label"] for row in ROWS]}
    ways["dataset"] = str(tmp_path / "dataset")
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(ways["dataset"])
    found = {name: build(tmp_path, [path]) for name, path in ways.items()}
    assert len({corpus.fingerprint for corpus in found.values()}) == len(ways), (
        "each was read, none taken from the cache"
    )
    for name, corpus in found.items():
        assert (len(corpus.train), len(corpus.heldout)) == (9, 3)
        assert contents(corpus) == contents(found["parquet"]), name
    image, label = contents(found["parquet"])[0]
    assert (list(image), label) == (np.ravel(ROWS[0]["image"]).tolist(), ROWS[0]["label"])


def test_batches_are_a_pure_function_of_seed_and_number(tmp_path: Path):
    corpus = build(tmp_path, [write_parquet(tmp_path / "a.parquet", ROWS)])
    loader = ExampleLoader(corpus.train, 16, 4, seed=3)
    again = ExampleLoader(corpus.train, 16, 2, seed=3)
    assert loader.steps_per_epoch == 9 / 4
    first_epoch = np.concatenate([again.batch(n).inputs_RL for n in range(5)])[:9]
    assert {row.tobytes() for row in first_epoch} == {image for image, _ in contents(corpus)[:9]}
    for number in (0, 1, 7):
        batch, halves = loader.batch(number), [again.batch(2 * number + half) for half in (0, 1)]
        np.testing.assert_array_equal(batch.inputs_RL, np.concatenate([half.inputs_RL for half in halves]))
        np.testing.assert_array_equal(batch.labels(), np.concatenate([half.labels() for half in halves]))
        known = dict(contents(corpus))
        assert [known[row.tobytes()] for row in batch.inputs_RL] == batch.labels().tolist()
        assert_same(loader.batch(number, slice(1, 3)), batch.cut(slice(1, 3)))
    other = ExampleLoader(corpus.train, 16, 4, seed=4)
    assert not np.array_equal(other.batch(0).inputs_RL, loader.batch(0).inputs_RL)
    held = ExampleLoader(corpus.heldout, 16, 1, seed=3).heldout_batches(99, rows_per_batch=2)
    assert [batch.num_tokens for batch in held] == [2, 1]
    assert sum(batch.num_tokens for batch in ExampleLoader(corpus.train, 16, 1, 0).heldout_batches(4, 3)) == 4


def test_texts_are_cut_as_their_tokenizer_cuts(tmp_path: Path, tokenizer_dir: Path):
    path = tmp_path / "a.jsonl"
    texts = [
        "The loop variable is bound to each item of the sequence in turn.",
        "A class.",
        "Functions.",
        "Exceptions.",
    ]
    path.write_text("".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts)))
    tokenizer = load_tokenizer(str(tokenizer_dir))
    section = DataSection(train=[str(path)], cache_dir=str(tmp_path / "cache"), row_tokens=6, heldout_every=4)
    corpus = build_examples(section, tokenizer, ("a", "b"), lambda done, total, what: None)
    expected = [tokenizer.encode(text)[:6] for text in texts]
    assert [corpus.train.inputs(n).tolist() for n in range(3)] == expected[:3]
    assert corpus.heldout.inputs(0).tolist() == expected[3]
    batch = ExampleLoader(corpus.train, 6, 3, seed=0).batch(0)
    assert batch.inputs_RL.shape == (3, 6)
    assert sorted(batch.lengths_R.tolist()) == sorted(map(len, expected[:3]))
    longer = section.model_copy(update={"row_tokens": 7})
    assert build_examples(longer, tokenizer, ("a", "b"), lambda d, t, w: None).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": ROWS[0]["image"], "label": 10}], r"label = 10 is no class of the teacher, which has 10 \(0 to 9"),
        ([{"image": ROWS[0]["image"], "label": -1}], "label = -1 is no class"),
        ([{"image": ROWS[0]["image"], "label": "ten"}], "label = 'ten' is no class"),
        ([{"image": ROWS[0]["image"], "label": 1.0}], "label = 1.0 is no class"),
        ([{"image": ROWS[0]["image"]}], "label = None is no class"),
        ([{"picture": 1, "label": 1}], "an example has image and label; there is picture, label"),
        ([{"image": [[0.0, float("nan")]], "label": 1}], "the image has 1 pixels that are no numbers"),
        ([{"image": [[0, 1]], "label": 1}], r"the image is \[1, 2, 1\]"),
    ],
)
def test_bad_rows_are_named(rows: list[dict], message: str, tmp_path: Path):
    path = write_parquet(tmp_path / "bad.parquet", rows)
    with pytest.raises(DataError, match=rf"^{path} row 0: {message}"):
        build(tmp_path, [path])
    assert not list((tmp_path / "cache").iterdir()), "nothing half-made stays"


def test_empty_parts_and_files_without_rows_are_refused(tmp_path: Path):
    whole = write_parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(
        DataError, match=r"no held-out example: 12 training examples are fewer than data.heldout_every = 50"
    ):
        build(tmp_path, [whole], heldout_every=50)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), empty)
    with pytest.raises(DataError, match=r"empty\.parquet is empty"):
        build(tmp_path, [whole], heldout=[str(empty)])
    text = tmp_path / "a.txt"
    text.write_text("no rows here")
    with pytest.raises(DataError, match=r"a\.txt has no rows"):
        build(tmp_path, [str(text)])
    broken = tmp_path / "broken.arrow"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"cannot read .* as Arrow"):
        build(tmp_path, [str(broken)])
