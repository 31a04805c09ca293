"""One optimizer step's gradient is the same however it is cut: micro-batches x accumulation x data ranks x ZeRO stages x
pipeline stages."""

import json
from pathlib import Path
from typing import Any

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


def one_case(world: int, stage: int, micro_rows: int, **others: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"stage": stage, "micro_rows": micro_rows, "pipeline": 1, "untied": False}
    fields |= {"clip": 0.0, "recompute": False, "frozen": "", "dtype": "float32", "by_time": False} | others
    return fields | {"name": "-".join([f"{world}", *(f"{key}={value}" for key, value in fields.items())])}


def cases(world: int) -> list[dict[str, Any]]:
    """All cuts of the step over so many ranks, tied and untied."""
    match world:
        case 1:
            cuts = [(1, 0, 8), (1, 0, 1), (1, 1, 2)]
        case 2:
            # Data parallel first: DeepSpeed goes on looking for the stages of a process that once had some.
            cuts = [(1, stage, micro) for stage in range(4) for micro in (4, 1)]
            cuts += [(2, stage, micro) for stage in (0, 1) for micro in (8, 2, 1)]
        case _:
            cuts = [(2, stage, micro) for stage in (0, 1) for micro in (4, 1)]
    found = [
        one_case(world, stage, micro, pipeline=pipeline, untied=untied)
        for pipeline, stage, micro in cuts
        for untied in (False, True)
    ]
    if world > 1:
        found.append(one_case(world, 1, 2, pipeline=2, recompute=True))
        found += [one_case(world, 1, 2, pipeline=2, untied=untied, by_time=True) for untied in (False, True)]
    if world == 4:
        found.append(one_case(world, 1, 4, pipeline=4))
    return found


def assert_same(found: Any, expected: dict[str, np.ndarray], name: str, scale: float = 1.0) -> None:
    parameters = sorted(expected.keys() - {"loss"})
    for key in parameters:
        error = np.linalg.norm(found[key] - scale * expected[key]) / np.linalg.norm(scale * expected[key])
        assert error < 1e-5, f"{name} {key}: off by {error:.1e}"
    whole = np.concatenate([found[key].ravel() for key in parameters])
    same = scale * np.concatenate([expected[key].ravel() for key in parameters])
    assert np.linalg.norm(whole - same) / np.linalg.norm(same) < 1e-6, name
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradient_does_not_depend_on_the_cut(world: int, tmp_path: Path):
    run_ranks(cut_ranks.__name__, world, str(tmp_path), json.dumps(cases(world)))
    expected = {untied: reference(untied=untied) for untied in (False, True)}
    for one in cases(world):
        found = np.load(tmp_path / f"{one['name']}.npz")
        assert set(found) == {*expected[one["untied"]], "norm"}
        assert_same(found, expected[one["untied"]], one["name"])


@pytest.mark.slow
def test_pipelines_clip_by_the_norm_of_all_stages(tmp_path: Path):
    """A tied weight lies on two stages and counts once."""
    clipped = [one_case(2, 1, 2, pipeline=2, untied=untied, clip=0.5) for untied in (False, True)]
    run_ranks(cut_ranks.__name__, 2, str(tmp_path), json.dumps(clipped))
    for one in clipped:
        expected = reference(untied=one["untied"])
        norm = np.sqrt(sum((expected[name] ** 2).sum() for name in expected if name != "loss"))
        assert norm > 1
        found = np.load(tmp_path / f"{one['name']}.npz")
        assert found["norm"] == pytest.approx(norm, rel=1e-5)
        # DeepSpeed adds 1e-6 to the norm it divides by.
        assert_same(found, expected, one["name"], scale=0.5 / (norm + 1e-6))


@pytest.mark.slow
def test_frozen_and_bfloat16_pipelines(tmp_path: Path):
    """A frozen tied embedding stays, and nothing else's gradient changes; bfloat16 is right to its own rounding."""
    frozen = one_case(2, 1, 2, pipeline=2, frozen="embed_tokens")
    rounded = [one_case(2, 1, 2, pipeline=2, untied=untied, dtype="bfloat16") for untied in (False, True)]
    run_ranks(cut_ranks.__name__, 2, str(tmp_path), json.dumps([frozen, *rounded]))
    found = dict(np.load(tmp_path / f"{frozen['name']}.npz"))
    assert not found.pop("model.embed_tokens.weight").any()
    assert_same(found, {key: value for key, value in reference(untied=False).items() if key in found}, frozen["name"])
    for one in rounded:
        found, expected = np.load(tmp_path / f"{one['name']}.npz"), reference(untied=one["untied"])
        for key in expected:
            error = np.linalg.norm(found[key] - expected[key]) / np.linalg.norm(expected[key])
            assert error < 5e-2, f"{one['name']} {key}: off by {error:.1e}"
