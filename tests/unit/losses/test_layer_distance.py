"""Distances of hidden states against their definitions in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.losses.layers import layer_distance
from kdscale.spec import LayerDistance


def reference(name: LayerDistance, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    if name == "mse":
        return ((s - t) ** 2).sum(-1) / s.shape[-1]
    # Patient KD's equation 7 is twice this.
    unit_s, unit_t = (one / np.sqrt((one**2).sum(-1, keepdims=True)) for one in (s, t))
    return ((unit_s - unit_t) ** 2).sum(-1) / 2


@given(st.sampled_from(["mse", "cosine"]), st.integers(0, 7), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients(name: LayerDistance, tokens: int, width: int, seed: int):
    rng = np.random.default_rng(seed)
    s, t = rng.normal(size=(tokens, width)), 3 * rng.normal(size=(tokens, width))
    student, teacher = torch.from_numpy(s).requires_grad_(), torch.from_numpy(t)
    found = layer_distance(name, student, teacher)
    np.testing.assert_allclose(found.detach().numpy(), reference(name, s, t), rtol=1e-9, atol=1e-12)
    found.sum().backward()
    step = 1e-6
    for place in np.ndindex(*s.shape):
        up, down = s.copy(), s.copy()
        up[place] += step
        down[place] -= step
        slope = (reference(name, up, t).sum() - reference(name, down, t).sum()) / (2 * step)
        assert abs(float(student.grad[place]) - slope) < 1e-6 * max(1.0, abs(slope))


@pytest.mark.parametrize("name", ["mse", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_states_have_no_distance_and_no_gradient(name: LayerDistance, dtype: torch.dtype):
    states = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    student = states.clone().requires_grad_()
    found = layer_distance(name, student, states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.zeros(5), rtol=0, atol=1e-6)
    found.sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(states), rtol=0, atol=1e-6)


def test_cosine_is_about_directions_alone():
    s, t = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer_distance("cosine", s, t), layer_distance("cosine", 100 * s, 0.01 * t))
    assert layer_distance("cosine", torch.zeros(1, 8), t[:1]).item() == 1
    torch.testing.assert_close(layer_distance("cosine", -t, t), torch.full((4,), 2.0))
