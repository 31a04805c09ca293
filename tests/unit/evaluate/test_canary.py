"""The canary lets equal targets pass and names what is wrong with others."""

import pytest
import torch

from kdscale.errors import CanaryError
from kdscale.evaluate.canary import TOLERANCE, comparable, compare
from kdscale.spec import ENCODINGS, Encoding, Payload, TargetSpec
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import schema
from tests.targets import topk_of_logits

EXACT = TOLERANCE[torch.float32]
LOGITS = 3 * torch.randn(40, 200, generator=torch.Generator().manual_seed(0))


def test_equal_targets_pass():
    report = compare(topk_of_logits(LOGITS, 16), torch.log_softmax(LOGITS, -1), EXACT)
    assert report.num_tokens == 40
    assert report.top1_agreement == 1
    assert report.max_logp_difference < 1e-5
    assert report.line().startswith("ok: 40 positions")


@pytest.mark.parametrize(
    "served",
    [torch.roll(LOGITS, 1, 0), LOGITS / 2, torch.cat([LOGITS[:, 1:], LOGITS[:, :1]], 1)],
    ids=["shifted by one position", "at another temperature", "with other ids"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_of_something_else_end_the_run(served: torch.Tensor, dtype: torch.dtype):
    with pytest.raises(CanaryError, match="the served teacher differs from a plain forward"):
        compare(topk_of_logits(served, 16), torch.log_softmax(LOGITS, -1), TOLERANCE[dtype])


def test_the_likeliest_are_compared_where_none_is_likely():
    """A high temperature spreads a vocabulary so that every entry is below e^-6."""
    logits = 3 * torch.randn(40, 2000, generator=torch.Generator().manual_seed(0))
    served, plain_TV = topk_of_logits(logits, 16, temperature=50.0), torch.log_softmax(logits / 50, -1)
    assert served.logp_TK.max() < -6
    assert compare(served, plain_TV, EXACT).top1_agreement == 1
    with pytest.raises(CanaryError, match="the served teacher differs from a plain forward"):
        compare(served, torch.roll(plain_TV, 1, 0), EXACT)


def test_a_near_tie_among_few_examples_is_no_fault():
    tied = torch.tensor([[1.0, 1.001, -2.0], [3.0, 0.0, 0.0]])
    other = torch.tensor([[1.001, 1.0, -2.0], [3.0, 0.0, 0.0]])
    assert compare(topk_of_logits(tied, 3), torch.log_softmax(other, -1), EXACT).top1_agreement == 0.5
    with pytest.raises(CanaryError):
        compare(topk_of_logits(tied.repeat(20, 1), 3), torch.log_softmax(other.repeat(20, 1), -1), EXACT)


@pytest.mark.parametrize(
    ("payload", "encoding"), [(name, one) for name, several in ENCODINGS.items() for one in several]
)
def test_what_is_compared_travels_finely_enough(payload: Payload, encoding: Encoding):
    """A float32 teacher's own numbers pass after the journey that the canary asks for, whatever the run asks for."""
    asked = comparable(TargetSpec(payload, k=16, encoding=encoding, layers=(1,)))
    assert comparable(asked) == asked
    if asked.payload != "topk":
        assert (asked.payload, asked.layers) == (payload, (1,))
        return
    spec = TargetSpec("topk", k=asked.k, encoding=asked.encoding)
    served = decode(encode(topk_of_logits(LOGITS, spec.k), spec, schema(spec, 200, 8), 200), spec, 200)
    assert compare(served, torch.log_softmax(LOGITS, -1), EXACT).top1_agreement == 1
