"""One optimizer step of a classifier, for several families, ZeRO stages and cuts; rank 0 saves the gradient each took.

The optimizer is plain SGD with a large rate, so that the parameters move by the gradient itself, far above rounding.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale.batch import DenseTargets, ExampleBatch
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.layout import DataParallelStudent
from kdscale.student.step import MicroBatch
from kdscale.topology import BatchCut
from tests.classes import DIGITS, PIXELS, TOPICS, example_batch, make_classifier, task_of
from tests.distributed.launch import join, leave

RATE, ROWS, TEMPERATURE, HARD = 1e2, 8, 2.0, 0.3


def step_batch(family: str) -> tuple[ExampleBatch, torch.Tensor]:
    """Examples, one of them not trained on, and log-probabilities [R, V] to learn from."""
    batch = example_batch(family, ROWS)
    classes = DIGITS if task_of(family) == "image-classification" else TOPICS
    logits = 3 * torch.randn(ROWS, classes, generator=torch.Generator().manual_seed(0))
    return batch, torch.log_softmax(logits / TEMPERATURE, -1)


def gradient(case: dict[str, Any], rank: int, world: int) -> dict[str, np.ndarray]:
    family, cut = case["family"], BatchCut(ROWS, case["micro_rows"], world)
    model = make_classifier(family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": cut.micro_rows,
        "gradient_accumulation_steps": cut.micro_steps,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    batch, logp_RV = step_batch(family)
    pixels = PIXELS if batch.of_images else None
    student = DataParallelStudent(model, logp_RV.shape[1], 1 << 20, settings, rank, pixels)
    micro = []
    for number in range(cut.micro_steps):
        rows = cut.rows_of(rank, number)
        part = batch.cut(rows)
        labels_T = torch.from_numpy(part.labels())
        logp_TV = logp_RV[rows][torch.from_numpy(part.trained_R)]
        micro.append(MicroBatch(part, DenseTargets(labels_T, logp_TV, TEMPERATURE)))
    objective = Objective(Divergence("forward_kl"), temperature=TEMPERATURE, hard_weight=HARD)
    result = student.step(cut).train(micro, objective, batch.num_tokens, RATE)
    after = student.whole_state()
    if rank != 0:
        return {}
    moved = {name: ((before[name] - after[name]) / RATE).numpy() for name in before}
    return moved | {"loss": np.array([result.loss, result.num_tokens])}


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    for number, case in enumerate(json.loads(sys.argv[5])):
        found = gradient(case, rank, world)
        if rank == 0:
            np.savez(out / f"{number}.npz", **found)
    leave()


if __name__ == "__main__":
    main()
