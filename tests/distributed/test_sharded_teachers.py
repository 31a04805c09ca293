"""Teachers over two ranks of ZeRO-3 against plain transformers, for every family of language models and classifiers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdscale.batch import ExampleBatch, TokenBatch
from tests.classes import CLASSIFIERS, make_classifier, save_classifier
from tests.conftest import FAMILIES, make_model
from tests.distributed import sharded_ranks
from tests.distributed.launch import run_ranks
from tests.distributed.sharded_ranks import CLASSIFIER
from tests.distributed.test_pipeline_families import plain_logits


def plain_examples(model, batch: ExampleBatch) -> torch.Tensor:
    """Logits of the trained rows, each alone in a plain forward."""
    found = []
    for row in batch.trained_R.nonzero()[0]:
        inputs = torch.from_numpy(batch.inputs_RL[row, : batch.lengths_R[row]])[None]
        fields = {"pixel_values": (inputs.view(1, 1, 8, 8).float() / 255 - 0.5) / 0.5} if batch.of_images else {}
        found.append(model(**(fields or {"input_ids": inputs.long()})).logits)
    return torch.cat(found)


@pytest.mark.slow
@torch.no_grad()
def test_two_ranks_equal_plain_transformers(tmp_path: Path):
    models = {family: make_model(family) for family in FAMILIES}
    models |= {f"{family}{CLASSIFIER}": make_classifier(family) for family in CLASSIFIERS}
    for name, model in models.items():
        if name.endswith(CLASSIFIER):
            save_classifier(tmp_path / name, name.removesuffix(CLASSIFIER))
        else:
            model.save_pretrained(tmp_path / name)
    run_ranks(sharded_ranks.__name__, sharded_ranks.RANKS, str(tmp_path), ",".join(models))
    for name, model in models.items():
        for rank in range(sharded_ranks.RANKS):
            found = load_file(tmp_path / name / f"found-{rank}.safetensors")
            assert len(found) == sharded_ranks.FORWARDS - (rank == 0)
            for number, logp_TV in found.items():
                batch = sharded_ranks.batch_of(name, rank, int(number))
                if isinstance(batch, ExampleBatch):
                    logits = plain_examples(model, batch)
                else:
                    assert isinstance(batch, TokenBatch)
                    logits = torch.cat([plain_logits(model, batch, row) for row in range(batch.num_rows)])
                torch.testing.assert_close(
                    logp_TV, logits.log_softmax(-1), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
