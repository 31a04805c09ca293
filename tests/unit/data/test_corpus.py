"""A corpus is found again by all that its tokens follow from, and neither made nor read at many times its size."""

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdscale.config.sections import DataSection
from kdscale.data.corpus import Corpus, Split, build_corpus, cached, fingerprint_of
from kdscale.data.tokenizer import load_tokenizer
from kdscale.errors import DataError
from tests.conftest import CHAT_TEMPLATE, documents, make_tokenizer

CHAT = [{"role": "user", "content": "Which variable?"}, {"role": "assistant", "content": "The loop variable."}]


def section(tmp_path: Path, rows: list[dict[str, Any]], **fields: Any) -> DataSection:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(train=[str(file)], cache_dir=str(tmp_path / "cache"), heldout_every=3, **fields)


def build(data: DataSection, tokenizer: Path) -> Corpus[Split]:
    return build_corpus(data, load_tokenizer(str(tokenizer)), lambda done, total, what: None)


def peak_bytes(act: Callable[[], object]) -> int:
    """What ``act`` held at most, of Python's and NumPy's memory."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_another_end_token_or_chat_template_is_another_corpus(tmp_path: Path):
    ways = {
        "first": make_tokenizer(tmp_path / "first"),
        "end token": make_tokenizer(tmp_path / "end", eos_token="<|end|>"),
        "template": make_tokenizer(tmp_path / "chat", chat=CHAT_TEMPLATE.replace("<|end|>", ".<|end|>")),
    }
    data = section(tmp_path, [{"messages": CHAT}, *({"text": text} for text in documents(5))])
    tokenizers = {way: load_tokenizer(str(directory)) for way, directory in ways.items()}
    assert len({one.fingerprint for one in tokenizers.values()}) == 1, "they read text alike"
    corpora = {way: build(data, directory) for way, directory in ways.items()}
    assert len({one.fingerprint for one in corpora.values()}) == 3
    for way, tokenizer in tokenizers.items():
        conversation, text = (corpora[way].train.document(index)[0] for index in range(2))
        assert conversation.tolist() == tokenizer.render(CHAT)[0], way
        assert text[-1] == tokenizer.eos_id, way
    assert build(data, ways["template"]).fingerprint == corpora["template"].fingerprint


def test_an_end_token_that_stands_nowhere_makes_no_other_corpus(tmp_path: Path):
    ways = [make_tokenizer(tmp_path / end, chat=None, eos_token=f"<{end}>") for end in ("eos", "|end|")]
    rows = [{"text": text} for text in documents(6)]
    first, second = (build(section(tmp_path, rows, append_eos=False), directory).fingerprint for directory in ways)
    assert first == second
    assert first != build(section(tmp_path, rows), ways[0]).fingerprint


def test_part_of_a_document_is_read_alone(tmp_path: Path, tokenizer_dir: Path):
    long = " ".join(documents(200))
    rows = [{"prompt": long, "completion": long}, *({"text": text} for text in documents(2))]
    split = build(section(tmp_path, rows), tokenizer_dir).train
    ids, trained = split.document(0)
    assert len(ids) > 20_000
    assert 0 < trained.sum() < len(ids)
    middle = int(trained.argmax())
    for part in (slice(0, 7), slice(middle - 5, middle + 36), slice(len(ids) - 3, len(ids)), slice(None)):
        some_ids, some_trained = split.document(0, part)
        assert np.array_equal(some_ids, ids[part])
        assert np.array_equal(some_trained, trained[part])
    before = pa.total_allocated_bytes()
    piece = split.document(0, slice(9, 49))
    assert pa.total_allocated_bytes() - before < 1000, f"{len(piece[0])} of {len(ids)} tokens are an array"


def test_documents_wait_to_be_written_in_a_few_bytes_a_token(tmp_path: Path, tokenizer_dir: Path):
    rows = [{"text": " ".join(documents(60))}] * 100
    # What the first corpus of a process imports is none of it.
    build(section(tmp_path, rows[:3]), tokenizer_dir)
    data = section(tmp_path, rows)
    found: list[Corpus[Split]] = []
    peak = peak_bytes(lambda: found.append(build(data, tokenizer_dir)))
    assert peak < 8 * (found[0].train.lengths.sum() + found[0].heldout.lengths.sum())


def fingerprint(train: list[Path], heldout: list[Path]) -> str:
    data = DataSection(train=[*map(str, train)], heldout=[*map(str, heldout)], heldout_every=5)
    return fingerprint_of([], data, lambda done, total, what: None)


def test_what_is_held_out_may_not_be_trained_on(tmp_path: Path):
    held, other, copy = (tmp_path / name for name in ("held.jsonl", "other.jsonl", "copy.jsonl"))
    held.write_text('{"text": "A held-out one."}\n')
    other.write_text('{"text": "Another."}\n')
    shutil.copy(held, copy)
    for train in (held, copy, tmp_path / "*.jsonl"):
        with pytest.raises(
            DataError, match=r"data\.heldout: .*/held\.jsonl has the content of .*name train files that"
        ):
            fingerprint([other, train], [held])
    with pytest.raises(DataError, match=r"data\.train: .*held\.jsonl has the content of .*copy\.jsonl.*name it once"):
        fingerprint([copy, other, held], [])
    assert fingerprint([other, other], [held]), "what is trained on may be trained on twice"
    assert fingerprint([held], [held]), "and who names the same for both measures on it"


def test_what_is_known_is_not_read_again(tmp_path: Path, tokenizer_dir: Path):
    """A rank finds the corpus that the run is about, or makes it, and takes no other for it."""
    data, tokenizer = section(tmp_path, [{"text": text} for text in documents(6)]), load_tokenizer(str(tokenizer_dir))
    file, elsewhere = Path(data.train[0]), data.model_copy(update={"cache_dir": str(tmp_path / "elsewhere")})

    def of(data: DataSection, known: str | None) -> Corpus[Split]:
        return build_corpus(data, tokenizer, lambda done, total, what: None, known=known)

    first = of(data, None)
    assert of(elsewhere, first.fingerprint).fingerprint == first.fingerprint
    file.unlink()
    assert [*of(data, first.fingerprint).train.lengths] == [*first.train.lengths]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(7)))
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"hold something else on .* than where the run was started"):
        of(elsewhere, first.fingerprint)


def test_a_corpus_is_made_aside_of_others_and_readable_as_any_directory(tmp_path: Path):
    """What was killed is removed, once nothing has been written to it for a day."""
    names = [letter * 32 for letter in "abcd"]
    left = [tmp_path / f".{name}.{name[:8]}.partial" for name in names]
    old = time.time() - 2 * 86400
    for directory in left:
        directory.mkdir()
        (directory / "train.arrow").touch()
        os.utime(directory, (old, old))
    for directory in left[:2]:
        os.utime(directory / "train.arrow", (old, old))
    aside: list[Path] = []

    def write(staging: Path) -> None:
        aside.append(staging)
        # The other makes the same meanwhile, under the same process id.
        if len(aside) == 1:
            cached(tmp_path / names[0], write)
        (staging / "corpus.json").write_text("{}")

    made = cached(tmp_path / names[0], write)
    (tmp_path / "plain").mkdir()
    assert len(set(aside)) == 2
    assert made.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(tmp_path.iterdir()) == sorted([*left[2:], made, tmp_path / "plain"])
