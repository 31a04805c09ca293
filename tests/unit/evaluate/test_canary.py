"""The canary lets equal targets pass and names what is wrong with others."""

import pytest
import torch

from kdscale.errors import CanaryError
from kdscale.evaluate.canary import compare
from tests.targets import topk_of_logits

LOGITS = 3 * torch.randn(40, 200, generator=torch.Generator().manual_seed(0))


def test_equal_targets_pass():
    report = compare(topk_of_logits(LOGITS, 16), torch.log_softmax(LOGITS, -1), torch.float32)
    assert report.num_tokens == 40
    assert report.top1_agreement == 1
    assert report.max_logp_difference < 1e-5
    assert report.line().startswith("ok: 40 tokens")


@pytest.mark.parametrize(
    "served",
    [torch.roll(LOGITS, 1, 0), LOGITS / 2, torch.cat([LOGITS[:, 1:], LOGITS[:, :1]], 1)],
    ids=["shifted by one position", "at another temperature", "with other ids"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_of_something_else_end_the_run(served: torch.Tensor, dtype: torch.dtype):
    with pytest.raises(CanaryError, match="the served teacher differs from a plain forward"):
        compare(topk_of_logits(served, 16), torch.log_softmax(LOGITS, -1), dtype)
