"""Continuations: greedy as transformers' own, drawn from the distribution, independent of what stands beside them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kdscale.engine.attention import attend_by_document
from kdscale.engine.generation import write_on
from kdscale.spec import Continuation, Prompt, Sampling

CPU = torch.device("cpu")
PROMPTS = [Prompt((5, 9, 3), 0), Prompt((7,), 1), Prompt((11, 4, 8, 2, 6), 2)]


@pytest.fixture(scope="module")
def model(teacher_dir: Path) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    attend_by_document(loaded)
    return loaded


def decode(ids: Sequence[int]) -> str:
    return "".join(f"<{one}>" for one in ids)


def written(
    model: PreTrainedModel, prompts: list[Prompt], sampling: Sampling, ends: Sequence[int] = ()
) -> list[Continuation]:
    return write_on(model, prompts, sampling, 100, ends, decode, CPU)


def test_greedy_is_the_likeliest_token_each_time(model: PreTrainedModel):
    found = written(model, PROMPTS, Sampling(6, temperature=0))
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = list(prompt.ids)
        for token in one.ids:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :100]
            assert int(logits.argmax()) == token
            ids.append(token)
        assert len(one.ids) == 6
        assert one.finish == "length"
    assert model.config._attn_implementation == "kdscale_documents", "as it was before"


def test_a_continuation_does_not_depend_on_its_neighbours(model: PreTrainedModel):
    sampling = Sampling(8, temperature=1.3, top_p=0.9, seed=4)
    together = written(model, PROMPTS, sampling)
    assert [written(model, [one], sampling)[0] for one in PROMPTS] == together
    assert written(model, PROMPTS, replace(sampling, seed=5)) != together
    again = [replace(one, number=one.number + 10) for one in PROMPTS]
    assert written(model, again, sampling) != together, "another sample of the same prompts"


def test_settings_of_the_models_own_change_nothing(model: PreTrainedModel):
    """As instruct models ship them."""
    sampling = Sampling(8, temperature=1.3, seed=4)
    plain = written(model, PROMPTS, sampling, [99])
    own = model.generation_config
    model.generation_config = GenerationConfig(repetition_penalty=1.9, top_k=2, suppress_tokens=[*range(50)])
    try:
        assert written(model, PROMPTS, sampling, [99]) == plain
        assert model.generation_config.repetition_penalty == 1.9
    finally:
        model.generation_config = own


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.5)])
def test_tokens_are_drawn_from_the_distribution(model: PreTrainedModel, top_k: int, top_p: float):
    draws, temperature = 4000, 0.7
    sampling = Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
    found = Counter(one.ids[0] for one in written(model, [Prompt((5, 9), n) for n in range(draws)], sampling))
    logits = model(input_ids=torch.tensor([[5, 9]]), use_cache=False).logits[0, -1, :100].detach().double()
    p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    if top_k:
        p[top_k:] = 0
    p[1:][p.cumsum(0)[:-1] >= top_p] = 0
    p /= p.sum()
    assert set(found) <= {int(token) for token, share in zip(order, p, strict=True) if share > 0}
    expected = p * draws
    counts = torch.tensor([found[int(token)] for token in order], dtype=torch.float64)
    likely = expected > 5
    chi2 = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert chi2 < freedom + 5 * (2 * freedom + 1) ** 0.5


def test_end_and_stop(model: PreTrainedModel):
    (whole,) = written(model, PROMPTS[:1], Sampling(12, temperature=0))
    end = whole.ids[4]
    (ended,) = written(model, PROMPTS[:1], Sampling(12, temperature=0), ends=[end])
    assert ended == Continuation(whole.ids[: whole.ids.index(end)], "end")
    text = decode(whole.ids[2:4])
    length = next(n for n in range(13) if text in decode(whole.ids[:n]))
    (stopped,) = written(model, PROMPTS[:1], Sampling(12, temperature=0, stop=(text,)))
    assert stopped == Continuation(whole.ids[:length], "stop")


def test_padding_of_the_vocabulary_is_never_drawn(model: PreTrainedModel):
    assert model.config.vocab_size > 100
    found = write_on(model, PROMPTS, Sampling(40, temperature=50.0), 50, (), decode, CPU)
    assert max(token for one in found for token in one.ids) < 50


def test_without_a_prompt_a_rank_runs_along(model: PreTrainedModel):
    assert written(model, [], Sampling(3)) == []
