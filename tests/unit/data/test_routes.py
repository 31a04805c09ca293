"""Documents that name their teacher: kept through cache, pieces and rows, and every one without a teacher is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdscale.config.sections import DataSection
from kdscale.config.teachers import Routing
from kdscale.data.corpus import Corpus, Split, build_corpus
from kdscale.data.loader import Loader
from kdscale.data.tokenizer import load_tokenizer
from kdscale.errors import DataError
from tests.conftest import documents
from tests.unit.data.test_loader import assert_same

ROUTING = Routing("of", ("general", "code"), None)


def build(tmp_path: Path, tokenizer: Path, rows: list[dict[str, Any]], routing: Routing | None) -> Corpus[Split]:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=[str(file)], heldout_every=5, cache_dir=str(tmp_path / "cache"), teacher_column="of")
    return build_corpus(data, load_tokenizer(str(tokenizer)), lambda done, total, what: None, routing)


def test_every_piece_has_its_documents_route(tmp_path: Path, tokenizer_dir: Path):
    rows = [{"text": text, "of": ("general", "code")[n % 3 == 0]} for n, text in enumerate(documents(40))]
    corpus = build(tmp_path, tokenizer_dir, rows, ROUTING)
    expected = [int(row["of"] == "code") for row in rows]
    assert corpus.train.routes is not None
    assert corpus.train.routes.tolist() == [route for n, route in enumerate(expected) if n % 5 != 4]
    # By the tokens a row holds: no two documents begin alike.
    of_text = {tuple(corpus.train.document(n)[0]): route for n, route in enumerate(corpus.train.routes)}
    loader = Loader(corpus.train, "isolated", 40, 3, seed=0)
    for number in range(-(-loader.num_rows // 3)):
        batch = loader.batch(number)
        assert batch.routes_RL is not None
        assert np.array_equal(batch.routes_RL == -1, batch.segments_RL == 0)
        for row in range(batch.num_rows):
            for segment in range(1, batch.segments_RL[row].max() + 1):
                here = batch.segments_RL[row] == segment
                (route,) = set(batch.routes_RL[row][here].tolist())
                piece = batch.ids_RL[row][here].tolist()
                assert any(route == of_text[text] for text in of_text if _holds(text, piece))
    assert np.array_equal(loader.batch(0).cut(slice(1, 2)).routes_RL, loader.batch(0).routes_RL[1:2])
    assert_same(loader.batch(1, slice(1, 3)), loader.batch(1).cut(slice(1, 3)))
    # Another order of the teachers, or no routing, is another corpus.
    turned = build(tmp_path, tokenizer_dir, rows, Routing("of", ("code", "general"), None))
    plain = build(tmp_path, tokenizer_dir, rows, None)
    assert len({corpus.fingerprint, turned.fingerprint, plain.fingerprint}) == 3
    assert turned.train.routes.tolist() == [1 - route for route in corpus.train.routes]
    assert plain.train.routes is None
    assert Loader(plain.train, "isolated", 40, 3, seed=0).batch(0).routes_RL is None


def _holds(text: tuple[int, ...], piece: list[int]) -> bool:
    return any(list(text[at : at + len(piece)]) == piece for at in range(0, len(text), 40))


@pytest.mark.parametrize(
    ("row", "default", "message"),
    [
        ({"of": "expert"}, "general", r"text.jsonl:2: of = 'expert' is no teacher; the teachers are general, code"),
        ({"of": 1}, None, r"text.jsonl:2: of = 1 is no teacher; the teachers are general, code"),
        (
            {},
            None,
            r"text.jsonl:2: no of names its teacher .*; the teachers are general, code, and teachers.default may",
        ),
    ],
)
def test_a_document_without_a_teacher_is_named(
    tmp_path: Path, tokenizer_dir: Path, row: dict[str, Any], default: str | None, message: str
):
    rows = [{"text": text, "of": "code"} for text in documents(8)]
    rows[1] = {"text": "Two words."} | row
    with pytest.raises(DataError, match=message):
        build(tmp_path, tokenizer_dir, rows, Routing("of", ("general", "code"), default))


def test_the_default_takes_documents_that_name_none(tmp_path: Path, tokenizer_dir: Path):
    rows: list[dict[str, Any]] = [{"text": text, "of": "code"} for text in documents(8)]
    rows[1] = {"text": "Two words."}
    rows[2]["of"] = None
    corpus = build(tmp_path, tokenizer_dir, rows, Routing("of", ("general", "code"), "general"))
    assert corpus.train.routes is not None
    assert corpus.train.routes.tolist() == [1, 0, 0, 1, 1, 1, 1]
