"""Prompts of a step, and what was written on from them as rows to train on: pure functions of the step."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from kdscale.batch import TokenBatch
from kdscale.config.on_policy import OnPolicySection
from kdscale.config.schema import RunConfig
from kdscale.data.corpus import Split
from kdscale.data.loader import Order, stack
from kdscale.data.packing import build_row
from kdscale.data.prompts import PromptStore, prompts_in
from kdscale.errors import DataError
from kdscale.on_policy.schedule import Plan
from kdscale.spec import Continuation, Prompt

_HELDOUT_FIRST = 1 << 40
"""Number of the first held-out prompt: no step's prompts have such numbers, so none has its draws."""


@dataclass(frozen=True)
class Written:
    """A prompt and what was written behind it."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """With the end token, where the text came to an end."""


class Prompts:
    """Which prompts a step writes on from: each once in an epoch of on-policy steps, in the order of (seed, epoch).

    Raises:
        DataError: there is none that is short enough.
    """

    def __init__(self, split: Split, section: OnPolicySection, plan: Plan, num: int, eos_id: int | None) -> None:
        """``num``: prompts of a step."""
        self._plan, self._num = plan, num
        self._prompts = _short_prompts(split, section, eos_id, None)
        self._order = Order(len(self._prompts), num, plan.seed)

    def of_step(self, step: int) -> list[Prompt]:
        chosen = self._order.of_batch(self._plan.ordinal(step))
        return [Prompt(self._prompts.ids(index), step * self._num + place) for place, index in enumerate(chosen)]


def heldout_prompts(split: Split, section: OnPolicySection, eos_id: int | None) -> list[Prompt]:
    """Raises: DataError."""
    found = _short_prompts(split, section, eos_id, section.heldout_prompts)
    return [Prompt(found.ids(number), _HELDOUT_FIRST + number) for number in range(len(found))]


def _short_prompts(split: Split, section: OnPolicySection, eos_id: int | None, most: int | None) -> PromptStore:
    every = prompts_in(split, section.prompt_tokens, section.new_tokens, eos_id)
    found = PromptStore(islice((ids for ids in every if len(ids) <= section.prompt_tokens), most))
    if not len(found):
        raise DataError(
            f"on_policy.prompt_tokens = {section.prompt_tokens}: the text holds no prompt so short (what stands before the first"
            " trained token of a document, or the beginning of plain text); raise it"
        )
    return found


def texts_per_row(config: RunConfig) -> int:
    """How many prompts with their completions a row surely holds."""
    assert config.on_policy is not None
    return config.data.row_tokens // config.on_policy.longest_text


def texts_of_step(config: RunConfig) -> int:
    return config.train.batch_rows * texts_per_row(config)


def batch_of(number: int, texts: list[Written], per_row: int, row_tokens: int) -> TokenBatch:
    """Rows of ``per_row`` texts each, which don't see each other; of a text, its completion is trained on."""
    rows = [texts[start : start + per_row] for start in range(0, len(texts), per_row)]
    return stack(number, [build_row([_piece(one) for one in row], row_tokens, "isolated") for row in rows])


def _piece(text: Written) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([*text.prompt, *text.completion], np.int32)
    return ids, np.arange(len(ids)) >= len(text.prompt)


# ---- as tensors ----


def written(prompts: list[Prompt], continuations: list[Continuation], end: int | None) -> list[Written]:
    """``end`` stands behind a text that came to its end: the student is judged on ending, too."""
    return [
        Written(prompt.ids, (*one.ids, end) if one.finish == "end" and end is not None else one.ids)
        for prompt, one in zip(prompts, continuations, strict=True)
    ]


def to_tensors(texts: list[Written], version: int) -> dict[str, torch.Tensor]:
    """As an exchange carries them, with the version of the weights that wrote them."""
    return {
        "ids": torch.tensor([token for one in texts for token in (*one.prompt, *one.completion)], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(one.prompt) for one in texts], dtype=torch.int32),
        "completion_lengths": torch.tensor([len(one.completion) for one in texts], dtype=torch.int32),
        "version": torch.tensor(version, dtype=torch.int64),
    }


def from_tensors(tensors: dict[str, torch.Tensor]) -> tuple[list[Written], int]:
    """(texts, version)."""
    ids, texts, place = tensors["ids"].tolist(), [], 0
    for prompt, completion in zip(
        tensors["prompt_lengths"].tolist(), tensors["completion_lengths"].tolist(), strict=True
    ):
        middle, end = place + prompt, place + prompt + completion
        texts.append(Written(tuple(ids[place:middle]), tuple(ids[middle:end])))
        place = end
    return texts, int(tensors["version"])
