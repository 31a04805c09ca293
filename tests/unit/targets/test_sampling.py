import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.targets.sampling import draw_replacement, draw_threshold

DRAWS = {"threshold": draw_threshold, "replacement": draw_replacement}
V, K = 40, 6


def teacher(seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.softmax(scale * torch.randn(V, generator=torch.Generator().manual_seed(seed)), -1)


def estimate(name: str, prob: torch.Tensor, draws: int, k: int = K) -> torch.Tensor:
    """[draws, V]: the distributions that as many independent uniforms stand for."""
    uniforms = torch.from_numpy(np.random.default_rng(0).random(draws))
    many = prob.repeat(draws, 1)
    ids, weights, *_ = DRAWS[name](many.clone(), many.topk(min(k, V)).indices, k, uniforms)
    return torch.zeros(draws, V).scatter_add_(1, ids, weights)


@pytest.mark.parametrize("name", DRAWS)
def test_the_mean_of_many_draws_is_the_distribution(name: str):
    prob, draws = teacher(), 20_000
    found = estimate(name, prob, draws)
    # Four standard errors of each entry's mean, from the draws themselves.
    allowed = 4 * found.std(0) / draws**0.5 + 1e-5
    assert ((found.mean(0) - prob).abs() <= allowed).all()


def test_threshold_sampling_is_quieter():
    """At most 0.6 of the noise of as many draws with replacement."""
    prob = teacher()
    noise = {name: float((estimate(name, prob, 4000) - prob).square().sum(-1).mean()) for name in DRAWS}
    assert noise["threshold"] <= 0.6 * noise["replacement"]


@given(st.integers(0, 999), st.floats(0.1, 12), st.integers(1, V), st.floats(0, 1, exclude_max=True))
@settings(max_examples=80, deadline=None)
def test_threshold_sampling_gives_distinct_tokens_whose_weights_sum_to_one(
    seed: int, scale: float, k: int, uniform: float
):
    prob = teacher(seed, scale)[None]
    ids, weights, count, kept = draw_threshold(prob.clone(), prob.topk(k).indices, k, torch.tensor([uniform]).double())
    used, own = int(count), int(kept)
    assert abs(used - float((prob * k).clamp_max(1).sum())) <= 1.001
    assert len(set(ids[0, :used].tolist())) == used
    assert (weights[0, used:] == 0).all()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(ids[0, :own], prob[0].topk(k).indices[:own])
    torch.testing.assert_close(weights[0, :own], prob[0].topk(k).values[:own])
    if own < used:
        threshold = float(weights[0, used - 1])
        assert (prob[0, ids[0, own:used]] < threshold * (1 + 1e-6)).all()
        assert (weights[0, own:used] == threshold).all()


def test_a_peaked_distribution_needs_few_entries():
    peaked, flat = teacher(scale=12)[None], teacher(scale=0.1)[None]
    counts = [int(draw_threshold(one.clone(), one.topk(20).indices, 20, torch.zeros(1))[2]) for one in (peaked, flat)]
    assert counts[0] < 5
    assert counts[1] == 20


def test_draws_depend_on_the_uniform_alone():
    prob = teacher().repeat(3, 1)
    uniforms = torch.tensor([0.1, 0.7, 0.1]).double()
    for draw in DRAWS.values():
        ids, weights, *_ = draw(prob.clone(), prob.topk(K).indices, K, uniforms)
        assert torch.equal(ids[0], ids[2])
        assert torch.equal(weights[0], weights[2])
        assert not torch.equal(ids[0], ids[1])
