"""Prompts out of documents."""

from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdscale.data.prompts import PromptStore, prompts_in

EOS = 1


class Documents:
    """What ``prompts_in`` reads of a corpus."""

    def __init__(self, *documents: tuple[list[int], list[bool]]) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, trained = self._documents[index]
        return np.array(ids, np.int32), np.array(trained)


def plain(*ids: int) -> tuple[list[int], list[bool]]:
    return list(ids), [True] * len(ids)


def prompts(*documents: tuple[list[int], list[bool]]) -> list[tuple[int, ...]]:
    return list(prompts_in(Documents(*documents), 3, 2, EOS))  # type: ignore[arg-type]


def test_plain_text_is_cut_into_pieces_that_begin_with_prompts():
    assert prompts(plain(*range(10, 23), EOS)) == [(10, 11, 12), (15, 16, 17), (20, 21, 22)]
    assert prompts(plain(7, EOS)) == [(7,)], "a short text is a prompt as a whole"
    assert prompts(plain(EOS), plain(7)) == [(7,)], "nothing is no prompt"


def test_of_a_conversation_the_prompt_is_what_is_not_trained_on():
    assert prompts(([5, 6, 7, 8, 9], [False, False, False, False, True])) == [(5, 6, 7, 8)]
    assert prompts(([5, 6, 7], [True, False, True])) == [], "nothing stands before"


def test_only_what_is_asked_for_is_read():
    class Endless(Documents):
        def __len__(self) -> int:
            return 1 << 60

        def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return super().document(0)

    assert len(list(islice(prompts_in(Endless(plain(7, 8)), 3, 2, EOS), 5))) == 5  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple), max_size=8))
def test_a_store_holds_prompts_by_their_places(prompts: list[tuple[int, ...]]):
    store = PromptStore(iter(prompts))
    assert [store.ids(place) for place in range(len(store))] == prompts
    assert store.longest == max(map(len, prompts), default=0)
