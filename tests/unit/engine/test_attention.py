"""Attention by documents against torch's own over a whole mask."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kdscale.engine.attention import attend_by_document
from kdscale.engine.models import base_hidden
from tests.conftest import FAMILIES, PADDED_VOCAB, make_model

ATTEND = AttentionInterface()["kdscale_documents"]
LENGTHS = [[300], [1, 40, 100, 129, 30], [128, 128, 44], [299, 1]]
"""Documents of a row; those of one row cross the tiles' edges of another."""
SWITCHED = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "mixtral", "qwen3_moe")


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def whole_mask(positions_RL: torch.Tensor, window: int | None) -> torch.Tensor:
    """[R, 1, L, L], from the definition: the same document, not later, within the window."""
    columns = torch.arange(positions_RL.shape[1])
    document_RL = (positions_RL == 0).cumsum(-1)
    seen = (document_RL[:, :, None] == document_RL[:, None, :]) & (columns[:, None] >= columns)
    if window is not None:
        seen &= columns[:, None] - columns < window
    return seen[:, None]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_values_and_gradients_are_those_of_the_whole_mask(heads: tuple[int, int], window: int | None):
    torch.manual_seed(0)
    positions = positions_of(LENGTHS)
    rows, columns = positions.shape
    query = torch.randn(rows, heads[0], columns, 16, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(rows, heads[1], columns, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    groups = heads[0] // heads[1]
    expected = scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
        attn_mask=whole_mask(positions, window),
        scale=0.3,
    ).transpose(1, 2)
    found, weights = ATTEND(None, query, key, value, None, scaling=0.3, position_ids=positions, sliding_window=window)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        # Sums over tiles are taken in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_keep_their_hidden_states(family: str):
    """Sliding windows and heads of the families; those it does not know stay as transformers made them."""
    model = make_model(family)
    positions = positions_of([[60, 40], [100]])
    ids = torch.randint(0, PADDED_VOCAB, positions.shape, generator=torch.Generator().manual_seed(0))
    before = model.config._attn_implementation
    expected = base_hidden(model, ids, positions)
    attend_by_document(model)
    assert (model.config._attn_implementation == "kdscale_documents") == (family in SWITCHED)
    if family not in SWITCHED:
        assert model.config._attn_implementation == before
    torch.testing.assert_close(base_hidden(model, ids, positions), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_left_to_transformers():
    model = make_model("llama")
    model.config.attention_dropout = 0.1
    attend_by_document(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_plan_follows_the_positions():
    """Plans are kept by tensor: another one, equal in shape, is another plan."""
    model = make_model("llama")
    attend_by_document(model)
    ids = torch.arange(40)[None] % PADDED_VOCAB
    one, two = positions_of([[40]]), positions_of([[20, 20]])
    whole, cut = base_hidden(model, ids, one), base_hidden(model, ids, two)
    torch.testing.assert_close(whole[:, :20], cut[:, :20], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[:, 20:], cut[:, 20:], atol=1e-3)
    torch.testing.assert_close(cut[:, 20:], base_hidden(model, ids[:, 20:], positions_of([[20]])))


def test_rows_without_positions_are_a_document_each():
    """Then transformers makes one row of positions for all of them."""
    model = make_model("llama")
    ids = torch.randint(0, PADDED_VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    attend_by_document(model)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
