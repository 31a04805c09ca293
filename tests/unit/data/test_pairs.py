import json
from pathlib import Path

import numpy as np
import pytest

from kdscale.config.sections import DataSection
from kdscale.data.pairs import PairLoader, TokenizerPair, build_pairs, pieces_of
from kdscale.data.sources import Document
from kdscale.data.tokenizer import load_tokenizer
from kdscale.errors import DataError, PayloadError
from kdscale.paired import PairedBatch
from tests.conftest import make_tokenizer
from tests.pairs import make_pair, make_vocabulary
from tests.unit.data.test_loader import PARTS, assert_same


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, text_dir: Path) -> TokenizerPair:
    directory = tmp_path_factory.mktemp("pair")
    return make_pair(
        make_vocabulary(text_dir, directory / "own.model"), make_tokenizer(directory / "teacher", every_byte=True)
    )


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory, text_dir: Path, pair: TokenizerPair) -> PairLoader:
    corpus = build_pairs(section(text_dir, tmp_path_factory.mktemp("cache")), pair, lambda *_: None)
    return PairLoader(corpus.train, "isolated", 40, 4, seed=0)


def section(text_dir: Path, cache: Path, **fields) -> DataSection:
    named = {"train": [str(text_dir / "train.jsonl")], "heldout": [str(text_dir / "heldout.jsonl")]}
    return DataSection(**{**named, "cache_dir": str(cache), "row_tokens": 40, **fields})


def assert_spans_are_text(batch: PairedBatch, pair: TokenizerPair) -> None:
    """Each span says the same on both sides, and its places are those of its tokens among the labels."""
    own, theirs = pair.spellings
    labels, teacher_labels = batch.labels(), batch.teacher.labels()
    ours, others = batch.span_places()
    for (row, a, b, c, d), (first, past), (other_first, other_past) in zip(
        batch.spans_S5.tolist(), ours.tolist(), others.tolist(), strict=True
    ):
        mine, other = batch.ids_RL[row, a:b], batch.teacher.ids_RL[row, c:d]
        said, also = (b"".join(spelling[one] or b"" for one in ids) for spelling, ids in ((own, mine), (theirs, other)))
        assert said == also
        assert batch.bytes_RL[row, a:b].sum() == len(said) == batch.teacher_bytes_RL[row, c:d].sum()
        assert labels[first:past].tolist() == mine.tolist()
        assert teacher_labels[other_first:other_past].tolist() == other.tolist()


def test_rows_of_both_sides_are_the_same_text(loader: PairLoader, pair: TokenizerPair):
    seen = set()
    for number in range(-(-loader.num_rows // 4)):
        batch = loader.batch(number)
        assert_spans_are_text(batch, pair)
        for row in range(batch.num_rows):
            for segment in range(1, batch.segments_RL[row].max() + 1):
                texts = [
                    tokenizer.decode(side.ids_RL[row][side.segments_RL[row] == segment])
                    for tokenizer, side in ((pair.student, batch), (pair.teacher, batch.teacher))
                ]
                assert texts[0].removesuffix("</s>") == texts[1].removesuffix("<eos>")
                seen.add(texts[0])
        assert batch.asked is batch.teacher
        assert 0.8 < batch.coverage <= 1
        assert batch.unaligned_bytes == batch.num_bytes - batch.bytes_RL[batch.aligned()].sum()
    assert len(seen) > 50
    again = loader.batch(3)
    assert all(np.array_equal(a, b) for a, b in zip(loader.batch(3).planes(), again.planes(), strict=True))


def test_cut_rows_keep_their_spans(loader: PairLoader, pair: TokenizerPair):
    batch = loader.batch(0)
    rows = batch.rows()
    assert sum(len(row.spans_S5) for row in rows) == len(batch.spans_S5)
    for part in PARTS[:2]:
        assert_same(loader.batch(0, part), batch.cut(part))
    for row in [*rows, batch.cut(slice(1, 3))]:
        assert_spans_are_text(row, pair)
    assert sum(row.unaligned_bytes for row in rows) == batch.unaligned_bytes
    assert sum(row.teacher_num_bytes for row in rows) == batch.teacher_num_bytes
    nothing = batch.untrained()
    assert nothing.num_tokens == nothing.teacher.num_tokens == len(nothing.spans_S5) == nothing.num_bytes == 0
    with pytest.raises(PayloadError, match="4 rows of the student's stand beside 1 of the teacher's"):
        PairedBatch(0, *batch.planes(), batch.teacher.cut(slice(0, 1)), batch.spans_S5, batch.bytes_RL, batch.bytes_RL)


def test_one_tokenizer_on_both_sides_aligns_every_token(text_dir: Path, tmp_path: Path, pair: TokenizerPair):
    same = TokenizerPair(pair.teacher, pair.teacher)
    assert same.matches.student_M.tolist() == same.matches.teacher_M.tolist()
    corpus = build_pairs(section(text_dir, tmp_path), same, lambda *_: None)
    batch = PairLoader(corpus.train, "isolated", 40, 4, seed=0).batch(0)
    assert batch.coverage == 1
    assert batch.unaligned_bytes == 0
    assert len(batch.spans_S5) == batch.num_tokens == batch.teacher.num_tokens
    assert (batch.ids_RL == batch.teacher.ids_RL).all()


def test_another_end_token_is_another_corpus(text_dir: Path, tmp_path: Path, pair: TokenizerPair):
    other = load_tokenizer(str(make_tokenizer(tmp_path / "other", every_byte=True, eos_token="<|end|>")))
    pairs = [pair, TokenizerPair(pair.student, other)]
    assert len({one.fingerprint for one in pairs}) == 1, "they read text alike"
    corpora = [build_pairs(section(text_dir, tmp_path), one, lambda *_: None) for one in pairs]
    last = [one.train.piece(len(one.train) - 1).teacher for one in corpora]
    assert [side.ids[-1] for side in last] == [one.teacher.eos_id for one in pairs]
    unended = [
        build_pairs(section(text_dir, tmp_path, append_eos=False), one, lambda *_: None).fingerprint for one in pairs
    ]
    assert len({*unended, *(one.fingerprint for one in corpora)}) == 3
    assert unended[0] == unended[1]


def test_documents_ends_are_one_token(pair: TokenizerPair):
    matches = dict(zip(pair.matches.student_M.tolist(), pair.matches.teacher_M.tolist(), strict=True))
    assert matches[pair.student.eos_id] == pair.teacher.eos_id
    assert len(set(matches.values())) == len(matches) > 256


def test_only_answers_are_spans_of_prompts_with_answers(pair: TokenizerPair, text_dir: Path, tmp_path: Path):
    document = Document("completion", "here", text=" an answer.", prompt="A prompt, and")
    (piece,) = pieces_of(document, section(text_dir, tmp_path), pair)
    for side in (piece.student, piece.teacher):
        assert side.bytes[~side.trained].sum() == len("A prompt, and")
        assert side.bytes.sum() == len("A prompt, and an answer.")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "A prompt, and", "completion": " an answer."}) + "\n")
    corpus = build_pairs(section(text_dir, tmp_path, train=[str(rows)]), pair, lambda *_: None)
    batch = PairLoader(corpus.train, "isolated", 40, 1, seed=0).batch(0)
    assert batch.num_bytes == batch.teacher_num_bytes == len(" an answer.")


def test_what_cannot_be_paired_is_refused(pair: TokenizerPair, text_dir: Path, tmp_path: Path):
    messages = Document("messages", "chat.jsonl:3", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(DataError, match=r"chat.jsonl:3: the chat templates of two tokenizers"):
        pieces_of(messages, section(text_dir, tmp_path), pair)
    with pytest.raises(DataError, match=r"no held-out text: 50 documents are fewer than data.heldout_every = 60"):
        build_pairs(section(text_dir, tmp_path, heldout=[], heldout_every=60), pair, lambda *_: None)
    # The teacher's one token is more of the student's than a row has room for.
    file = tmp_path / "signs.jsonl"
    file.write_text(json.dumps({"text": "<|end|>"}) + "\n")
    with pytest.raises(DataError, match=r"no held-out text: .*signs\.jsonl \(data\.heldout\) has no stretch of text"):
        build_pairs(
            section(text_dir, tmp_path, heldout=[str(file)], row_tokens=2, append_eos=False), pair, lambda *_: None
        )
