"""Prompts of steps, and rows of what was written on from them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdscale.config.on_policy import OnPolicySection
from kdscale.errors import DataError
from kdscale.on_policy.rows import Prompts, Written, batch_of, from_tensors, heldout_prompts, to_tensors, written
from kdscale.on_policy.schedule import Plan
from kdscale.spec import Continuation, Prompt
from tests.unit.data.test_prompts import EOS, Documents, plain

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
TEXTS = st.lists(st.builds(Written, TOKENS, TOKENS), min_size=1, max_size=9)
SECTION = OnPolicySection(prompt_tokens=3, new_tokens=2)
PLAN = Plan(0.5, 2, 1, seed=7)


@given(TEXTS, st.integers(1, 3))
def test_rows_train_on_completions_alone(texts: list[Written], per_row: int):
    batch = batch_of(5, texts, per_row, 36)
    assert batch.number == 5
    assert batch.num_rows == -(-len(texts) // per_row)
    assert batch.labels().tolist() == [token for one in texts for token in one.completion]
    # A text begins where its positions do, and sees nothing of its neighbour.
    inside = batch.segments_RL != 0
    assert batch.ids_RL[inside].tolist() == [token for one in texts for token in (*one.prompt, *one.completion)]
    assert batch.positions_RL[inside].tolist() == [
        place for one in texts for place in range(len(one.prompt) + len(one.completion))
    ]


@given(TEXTS, st.integers(0, 1000))
def test_texts_travel_as_tensors(texts: list[Written], version: int):
    assert from_tensors(to_tensors(texts, version)) == (texts, version)


def test_an_end_is_learned_and_a_cut_is_not():
    prompts = [Prompt((3,), 0), Prompt((4,), 1), Prompt((5,), 2)]
    made = written(prompts, [Continuation((7,), "end"), Continuation((8, 9), "length"), Continuation((), "end")], 1)
    assert [one.completion for one in made] == [(7, 1), (8, 9), (1,)]


def test_every_prompt_is_written_on_from_once_an_epoch():
    documents = Documents(*(plain(number, number, EOS) for number in range(10, 22)))
    prompts = Prompts(documents, SECTION, PLAN, 4, EOS)  # type: ignore[arg-type]
    steps = [step for step in range(40) if PLAN.on_policy(step)][:6]
    found = [one for step in steps for one in prompts.of_step(step)]
    for epoch in (found[:12], found[12:]):
        assert sorted(one.ids[0] for one in epoch) == list(range(10, 22))
    assert [one.ids for one in found[:12]] != [one.ids for one in found[12:]], "in another order"
    assert len({one.number for one in found}) == len(found), "each with draws of its own"
    again = Prompts(documents, SECTION, PLAN, 4, EOS)  # type: ignore[arg-type]
    assert again.of_step(steps[3]) == prompts.of_step(steps[3])


def test_long_prompts_are_left_out_and_heldout_ones_have_other_draws():
    conversation = [False] * 4 + [True]
    documents = Documents(([5, 6, 7, 8, 9], conversation), ([5, 6, 9], [False, False, True]), plain(7, EOS))
    assert [one.ids for one in heldout_prompts(documents, SECTION, EOS)] == [(5, 6), (7,)]  # type: ignore[arg-type]
    few = SECTION.model_copy(update={"heldout_prompts": 1})
    (one,) = heldout_prompts(documents, few, EOS)  # type: ignore[arg-type]
    assert one.number >= 2**40
    with pytest.raises(DataError, match=r"on_policy\.prompt_tokens = 3: the text holds no prompt so short"):
        heldout_prompts(Documents(([5, 6, 7, 8, 9], conversation)), SECTION, EOS)  # type: ignore[arg-type]


def test_tensors_are_what_an_exchange_carries():
    made = to_tensors([Written((1, 2), (3,))], 4)
    assert made["ids"].dtype == torch.int32
    assert np.array_equal(made["ids"].numpy(), [1, 2, 3])
