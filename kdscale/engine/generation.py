"""Continuations by a causal language model: batched, with a cache of keys and values, in lockstep over the ranks of ZeRO-3."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdscale.engine.attention import attend_by_kernel
from kdscale.spec import Continuation, Prompt, Sampling

_TAIL_TOKENS = 16
"""Of a continuation, are looked at for a text that stops it, beyond the tokens the text itself may take."""


@torch.no_grad()
def write_on(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    vocab_size: int,
    ends: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    device: torch.device,
) -> list[Continuation]:
    """A continuation of each prompt.

    Under ZeRO-3 every rank of the group must call, with whatever prompts it has: ranks that are done, or have none, run along
    until the last one is.

    Args:
        vocab_size: the true one; rows of the head beyond it are never drawn.
        ends: ids of the tokens that end a text; the first one also fills up short rows.
        decode: ids to text, for ``sampling.stop``.
    """
    rows = list(prompts) or [Prompt((0,), 0)]
    columns = max(len(one.ids) for one in rows)
    ids_RL = torch.full((len(rows), columns), ends[0] if ends else 0)
    seen_RL = torch.zeros((len(rows), columns), dtype=torch.long)
    for row, prompt in enumerate(rows):
        # On the left, so that all rows go on in the same column.
        ids_RL[row, columns - len(prompt.ids) :] = torch.tensor(prompt.ids)
        seen_RL[row, columns - len(prompt.ids) :] = 1
    settings = GenerationConfig(
        max_new_tokens=sampling.new_tokens,
        do_sample=False,  # the last processor has drawn
        num_beams=1,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    criteria = StoppingCriteriaList([_AtText(sampling.stop, columns, decode)] if sampling.stop else [])
    with attend_by_kernel(model), _no_settings_of_its_own(model):
        written_RL: torch.Tensor = model.generate(  # type: ignore[operator]
            ids_RL.to(device),
            attention_mask=seen_RL.to(device),
            generation_config=settings,
            logits_processor=_processors(sampling, rows, columns, vocab_size),
            stopping_criteria=criteria,
        )
    new_RL = written_RL[:, columns:].cpu().tolist()
    return [_finished(new, sampling, ends, decode) for new, _ in zip(new_RL, prompts, strict=False)]


@contextmanager
def _no_settings_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """transformers takes what a call leaves open from the model's own file (Qwen 2.5 ships a repetition penalty): text would then
    not be drawn from the model's distribution, and would depend on the padding of its row."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def end_tokens(model: PreTrainedModel, eos_id: int | None) -> list[int]:
    """The tokens that end a text, by the model's own account or the tokenizer's."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if named is None:
        named = [] if eos_id is None else [eos_id]
    return list(named) if isinstance(named, list) else [named]


def _finished(
    new: list[int], sampling: Sampling, ends: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Continuation:
    """What was written before the row's end; behind it is filling."""
    for place, one in enumerate(new):
        if one in ends:
            return Continuation(tuple(new[:place]), "end")
    text = decode(new) if sampling.stop else ""
    stopped = any(stop in text for stop in sampling.stop)
    return Continuation(tuple(new), "stop" if stopped else "length")


def _processors(sampling: Sampling, rows: list[Prompt], columns: int, vocab_size: int) -> LogitsProcessorList:
    found: list[LogitsProcessor] = [_TrueVocabulary(vocab_size)]
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            found.append(TopPLogitsWarper(sampling.top_p))
        found.append(_Draw(sampling, [one.number for one in rows], columns))
    return LogitsProcessorList(found)


class _TrueVocabulary(LogitsProcessor):
    """Rows that only pad the head are no tokens."""

    def __init__(self, vocab_size: int) -> None:
        self._size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._size :] = -torch.inf
        return scores


class _Draw(LogitsProcessor):
    """Leaves one token per row, drawn by that row's own numbers: transformers' sampling draws for the batch as a whole, so a
    continuation would depend on its neighbours."""

    def __init__(self, sampling: Sampling, numbers: list[int], columns: int) -> None:
        self._columns = columns
        self._uniforms_RN = torch.from_numpy(
            np.stack(
                [
                    np.random.Generator(np.random.Philox(key=[sampling.seed, number])).random(sampling.new_tokens)
                    for number in numbers
                ]
            )
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self._columns
        if place >= self._uniforms_RN.shape[1]:
            return scores  # running along until another rank is done
        uniform_R1 = self._uniforms_RN[:, place, None].to(scores.device)
        line_RV = torch.softmax(scores.float(), -1).cumsum(-1, dtype=torch.float64)
        drawn_R1 = torch.searchsorted(line_RV, uniform_R1 * line_RV[:, -1:], right=True)
        drawn_R1.clamp_max_(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_R1, 0.0)


class _AtText(StoppingCriteria):
    """A row is done once one of the texts stands in what it has written."""

    def __init__(self, stop: tuple[str, ...], columns: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._stop, self._columns, self._decode = stop, columns, decode
        # A token may be a single byte.
        self._tokens = _TAIL_TOKENS + max(len(one.encode()) for one in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        new_RL = input_ids[:, self._columns :][:, -self._tokens :].tolist()
        texts = [self._decode(new) for new in new_RL]
        found = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)
