"""Prompts found in documents: what a model writes on from. Pure NumPy."""

from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from kdscale.data.corpus import Split


def prompts_in(split: Split, prompt_tokens: int, new_tokens: int, eos_id: int | None) -> Iterator[tuple[int, ...]]:
    """The prompts of ``split`` as token ids, in the order of its documents.

    Of a document that is not trained on as a whole, what stands before its first trained token. Plain text is cut into pieces
    of ``prompt_tokens`` + ``new_tokens``, and each begins with a prompt; a text that is shorter than one is a prompt as a
    whole.
    """
    for index in range(len(split)):
        ids, trained = split.document(index)
        for ids_P in _openings(ids, trained, prompt_tokens, new_tokens, eos_id):
            yield tuple(ids_P.tolist())


class PromptStore:
    """Prompts of a whole corpus by their places, at four bytes a token: as tuples they would take nine times as much."""

    def __init__(self, prompts: Iterable[tuple[int, ...]]) -> None:
        self._ids, self._ends = array("i"), array("q", [0])
        for ids in prompts:
            self._ids.extend(ids)
            self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def ids(self, place: int) -> tuple[int, ...]:
        return tuple(self._ids[self._ends[place] : self._ends[place + 1]])

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(map(int.__sub__, self._ends[1:], self._ends), default=0)


def _openings(
    ids: np.ndarray, trained: np.ndarray, prompt_tokens: int, new_tokens: int, eos_id: int | None
) -> Iterator[np.ndarray]:
    if not trained.all():
        first = int(trained.argmax()) if trained.any() else len(ids)
        if first:
            yield ids[:first]
        return
    if len(ids) and ids[-1] == eos_id:
        ids = ids[:-1]
    for start in range(0, max(len(ids) - prompt_tokens, 0) + 1, prompt_tokens + new_tokens):
        if len(piece := ids[start : start + prompt_tokens]):
            yield piece
