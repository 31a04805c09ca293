"""A corpus is found again by all that its tokens follow from, and neither made nor read at many times its size."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdscale.config.sections import DataSection
from kdscale.data.corpus import Corpus, Split, build_corpus
from kdscale.data.tokenizer import load_tokenizer
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
