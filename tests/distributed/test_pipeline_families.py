"""Students cut into two stages against plain transformers, for every family that can be cut."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FAMILIES, make_model
from tests.distributed import family_ranks
from tests.distributed.launch import run_ranks


def plain_logits(model, batch, row: int) -> torch.Tensor:
    """Logits at a row's trained positions, each document alone in a plain forward."""
    found = []
    for segment in range(1, batch.segments_RL[row].max() + 1):
        here = batch.segments_RL[row] == segment
        ids = torch.from_numpy(batch.ids_RL[row][here]).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        found.append(logits[torch.from_numpy(batch.predicts_RL[row][here])][:, : family_ranks.VOCAB])
    return torch.cat(found)


@pytest.mark.slow
def test_two_stages_equal_plain_transformers(tmp_path: Path):
    run_ranks(family_ranks.__name__, 2, str(tmp_path), ",".join(FAMILIES))
    batches = list(family_ranks.packed_batches())
    for family in FAMILIES:
        model = make_model(family)
        plain = [torch.cat([plain_logits(model, batch, row) for row in range(batch.num_rows)]) for batch in batches]
        found = load_file(tmp_path / f"{family}.logits")
        for number, logits in enumerate(plain):
            torch.testing.assert_close(
                found[f"{number}"], logits, rtol=1e-4, atol=1e-4, msg=lambda m, f=family: f"{f}: {m}"
            )
        labels = torch.cat([torch.from_numpy(batch.labels()).long() for batch in batches])
        loss = torch.nn.functional.cross_entropy(torch.cat(plain), labels)
        loss.backward()
        trained = load_file(tmp_path / f"{family}.trained")
        torch.testing.assert_close(trained.pop("loss"), loss.detach(), rtol=1e-5, atol=0)
        assert trained.keys() == {name for name, _ in model.named_parameters()}, family
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            moved = parameter.detach() - trained[name]
            off = (moved - parameter.grad).norm() / (1e-4 + parameter.grad.norm())
            assert off < 1e-2, f"{family} {name}: the step is off its gradient by {off:.1e}"
