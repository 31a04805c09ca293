"""Teachers of every kind over two ranks of ZeRO-3; each rank saves what it finds for rows of its own, forward after forward."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from kdscale.batch import Batch, DenseTargets, ExampleBatch
from kdscale.engine.settings import teacher_settings
from kdscale.engine.sharding import InferenceModel
from kdscale.spec import TargetSpec
from kdscale.teacher.model import Score, TeacherModel
from tests.classes import DIGITS, PIXELS, TOPICS, example_batch, task_of
from tests.distributed.family_ranks import VOCAB, packed_batches
from tests.distributed.launch import join, leave

RANKS, FORWARDS = 2, 3
CLASSIFIER = "-classifier"
"""Ends the names of those among the models."""


def batch_of(name: str, rank: int, number: int) -> Batch | None:
    """What a rank scores in a forward: of other shapes each time, and once nothing."""
    if number == 1 and rank == 0:
        return None
    if name.endswith(CLASSIFIER):
        return example_batch(name.removesuffix(CLASSIFIER), 3 + rank + number, seed=rank)
    batch = list(packed_batches())[rank]
    return batch.cut(slice(0, 1)) if number == 2 else batch


def run_model(directory: Path, rank: int, device: torch.device) -> None:
    classifies, family = directory.name.endswith(CLASSIFIER), directory.name.removesuffix(CLASSIFIER)
    images = classifies and task_of(family) == "image-classification"
    outcomes = (DIGITS if images else TOPICS) if classifies else VOCAB
    task = task_of(family) if classifies else "language-modelling"
    inference = InferenceModel(str(directory), teacher_settings(RANKS, "float32"), torch.float32, device, task)
    assert inference.parameters_held() < 0.51 * inference.parameters_total() + 64
    model = TeacherModel(inference, outcomes, device, PIXELS if images else None)
    found = {}
    for number in range(FORWARDS):
        batch = batch_of(directory.name, rank, number)
        answers = model.forward([] if batch is None else [Score(batch, TargetSpec("dense", encoding="float32"))])
        for answer in answers:
            assert isinstance(answer, DenseTargets)
            assert isinstance(batch, ExampleBatch) == classifies
            found[str(number)] = answer.logp_TV.contiguous()
    save_file(found, directory / f"found-{rank}.safetensors")


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    device = join(rank, world, port_file)
    for name in sys.argv[5].split(","):
        run_model(out / name, rank, device)
    leave()


if __name__ == "__main__":
    main()
