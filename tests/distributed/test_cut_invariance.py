"""One optimizer step's gradient is the same however it is cut: micro-batches x accumulation x data ranks x ZeRO stages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdscale.batch import SoftTargets, TopkTargets
from kdscale.losses import sparse
from tests.conftest import PADDED_VOCAB, make_model
from tests.distributed import cut_ranks
from tests.distributed.launch import run_ranks


def reference(*, untied: bool) -> dict[str, np.ndarray]:
    """The gradient of sum / tokens in float64, by plain autograd through the whole batch."""
    model = make_model("qwen2" if untied else "llama").double()
    vocab = PADDED_VOCAB - 9
    batch, targets = cut_ranks.step_batch(vocab)
    joined = SoftTargets.join(targets)
    assert isinstance(joined, TopkTargets)
    logits = model(input_ids=torch.from_numpy(batch.ids_RL).long(), use_cache=False).logits
    logits = logits[torch.from_numpy(batch.predicts_RL)][:, :vocab]
    soft = sparse.divergence(
        "forward_kl", logits, joined.ids_TK, joined.logp_TK.double(), joined.tail_logp_T.double()
    ).sum()
    hard = torch.nn.functional.cross_entropy(logits, joined.labels_T.long(), reduction="sum")
    loss = (0.7 * soft + 0.3 * hard) / batch.num_tokens
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()} | {
        "loss": np.array([loss.item(), batch.num_tokens])
    }


def cases(world: int) -> list[dict]:
    if world == 1:
        cuts = [(0, 8), (0, 1), (1, 2)]
    else:
        cuts = [(stage, micro) for stage in range(4) for micro in (4, 1)]
    return [
        {"name": f"{world}-{stage}-{micro}-{untied}", "stage": stage, "micro_rows": micro, "untied": untied}
        for stage, micro in cuts
        for untied in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_gradient_does_not_depend_on_the_cut(world: int, tmp_path: Path):
    run_ranks(cut_ranks.__name__, world, str(tmp_path), json.dumps(cases(world)))
    for case in cases(world):
        expected = reference(untied=case["untied"])
        found = np.load(tmp_path / f"{case['name']}.npz")
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            error = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
            assert error < 1e-5, f"{case['name']} {name}: off by {error:.1e}"
        whole = np.concatenate([found[name].ravel() for name in sorted(expected) if name != "loss"])
        same = np.concatenate([expected[name].ravel() for name in sorted(expected) if name != "loss"])
        assert np.linalg.norm(whole - same) / np.linalg.norm(same) < 1e-6, case["name"]
