"""Prompts with numbers, lines of continuations, and the file as it grows."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdscale.config.sections import GenerateSection
from kdscale.data.prompts import PromptStore
from kdscale.data.tokenizer import load_tokenizer
from kdscale.errors import DataError, IdentityError
from kdscale.generate import Writing, batches, line, prompts_of
from kdscale.spec import Continuation, Prompt
from tests.conftest import make_tokenizer
from tests.unit.data.test_prompts import EOS, Documents, plain


def prompts(*documents: tuple[list[int], list[bool]], **settings: Any) -> list[Prompt]:
    section = GenerateSection(**{"prompt_tokens": 3, "new_tokens": 2, **settings})
    tokenizer: Any = SimpleNamespace(decode=str, eos_id=EOS)
    found = prompts_of(Documents(*documents), section, tokenizer)  # type: ignore[arg-type]
    return [one for batch in batches(found, section.samples, 0, 3) for one in batch]


def test_samples_and_limit():
    found = prompts(plain(*range(10, 40)), samples=2, limit=2)
    assert [(one.number, one.ids[0]) for one in found] == [(0, 10), (1, 10), (2, 15), (3, 15)]


def test_writing_goes_on_within_the_samples_of_a_prompt():
    store = PromptStore([(7, 8), (9,)])
    found = list(batches(store, samples=3, first=2, rows=3))
    assert [[(one.number, one.ids) for one in batch] for batch in found] == [
        [(2, (7, 8)), (3, (9,)), (4, (9,))],
        [(5, (9,))],
    ]


def test_no_prompt_is_an_error():
    with pytest.raises(DataError, match="no prompt"):
        prompts(([5], [True])[:0] or ([EOS], [True]))


def test_a_line_is_a_document_of_prompt_and_completion():
    tokenizer: Any = SimpleNamespace(decode=lambda ids: "".join(f" {one}" for one in ids))
    written = Continuation((7, 8, 9), "stop")
    assert line(Prompt((3, 5), 4), written, tokenizer, [3], (" 8", " 9")) == {
        **{"number": 4, "prompt": " 5", "completion": " 7", "ends": True}
    }
    cut = line(Prompt((5,), 4), Continuation((7,), "length"), tokenizer, [], ())
    assert cut is not None
    assert cut["ends"] is False
    assert line(Prompt((5,), 4), Continuation((8,), "stop"), tokenizer, [], (" 8",)) is None, "nothing is left"


def test_parts_of_a_cut_character_are_left_out(tmp_path: Path):
    tokenizer = load_tokenizer(str(make_tokenizer(tmp_path, every_byte=True)))

    def of(text: str, tokens: int) -> list[str]:
        """The prompts of ``text``, each of ``tokens``."""
        section = GenerateSection(prompt_tokens=tokens, new_tokens=1)
        found = prompts_of(Documents(plain(*tokenizer.encode(text))), section, tokenizer)  # type: ignore[arg-type]
        return [tokenizer.decode(found.ids(place)) for place in range(len(found))]

    # A coffee cup is three bytes, each of them a token.
    assert of("q\u2615z", 3) == ["q"]
    assert of("qzx\u2615zz", 3) == ["qzx", "z"], "the second would begin with two bytes of the cup"
    assert of("qzx\ufffd", 6) == ["qzx\ufffd"], "what the text says itself stays"
    assert of("\u2615zzz", 2) == ["zz"], "of parts alone nothing stays"
    cup = tuple(tokenizer.encode("z\u2615"))
    found = [line(Prompt((5,), 0), Continuation(cup[:-1], end), tokenizer, [], ()) for end in ("length", "stop")]
    assert [one and one["completion"] for one in found] == ["z", "z\ufffd"]


def entry(number: int) -> dict[str, Any]:
    return {"number": number, "prompt": "a", "completion": f"b{number}", "ends": True}


def test_a_file_goes_on_after_its_last_whole_batch(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    writing = Writing(out, {"teacher": "t"}, 2, 6)
    writing.add([entry(0), None])
    writing.add([entry(2), entry(3)])
    writing.close()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes() + b'{"number": 4, "pro')  # torn by a kill

    again = Writing(out, {"teacher": "t"}, 2, 6)
    assert (again.first, again.lines, again.left_out) == (2, 1, 1)
    again.add([entry(2), entry(3)])
    again.add([entry(4), entry(5)])
    assert not out.exists()
    again.finish()
    assert [json.loads(one)["number"] for one in out.read_text().splitlines()] == [0, 2, 3, 4, 5]
    assert not partial.exists()
    assert Writing(out, {"teacher": "t"}, 2, 6).whole


def test_what_something_else_has_written_is_refused(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    Writing(out, {"sampling": {"top_p": 1.0}}, 2, 6).close()
    with pytest.raises(IdentityError, match=r"sampling\.top_p: recorded 1\.0, now 0\.5"):
        Writing(out, {"sampling": {"top_p": 0.5}}, 2, 6)
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(IdentityError, match="name another file"):
        Writing(tmp_path / "other.jsonl", {}, 2, 6)


def test_damage_is_named(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    Writing(out, {}, 2, 6).close()
    (tmp_path / "out.jsonl.partial").write_text("nonsense\n")
    with pytest.raises(DataError, match="damaged"):
        Writing(out, {}, 2, 6)
