"""A pipeline trains, saves, trains on; a fresh one of the same kind restores and must repeat the steps after the save."""

import sys
from pathlib import Path

import torch

from kdscale.batch import SoftTargets
from kdscale.engine import checkpoint, process
from kdscale.engine.export import load_checkpoint_weights
from kdscale.engine.restore import restore
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.layout import PipelineStudent
from kdscale.student.step import MicroBatch, StepResult
from kdscale.topology import BatchCut, Topology
from tests.conftest import PADDED_VOCAB, make_model
from tests.distributed.cut_ranks import ROWS, step_batch
from tests.distributed.launch import join

VOCAB = PADDED_VOCAB - 9


class Run:
    def __init__(self, family: str, dtype: torch.dtype, seed: int, rank: int, world: int) -> None:
        self._rank, self._topology = rank, Topology(2, world // 2)
        self._cut = BatchCut(ROWS, 2, self._topology.data)
        settings = {
            "train_batch_size": ROWS,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self._cut.micro_steps,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        model = make_model(family, seed).to(dtype)
        self.student = PipelineStudent(model, VOCAB, 1 << 16, settings, self._topology, rank)
        self._step = self.student.step(self._cut)

    def steps(self, count: int) -> list[StepResult]:
        batch, targets = step_batch(VOCAB)
        rows = [self._cut.rows_of(self._topology.data_rank(self._rank), n) for n in range(self._cut.micro_steps)]
        holds = self._topology.holds_loss(self._rank)
        micro = [MicroBatch(batch.cut(part), SoftTargets.join(targets[part]) if holds else None) for part in rows]
        objective = Objective(Divergence("forward_kl"), hard_weight=0.3)
        return [self._step.train(micro, objective, batch.num_tokens, 1e-2) for _ in range(count)]


def check(family: str, dtype: torch.dtype, rank: int, world: int, out: Path) -> None:
    first = Run(family, dtype, 0, rank, world)
    first.steps(3)
    saved = first.student.whole_state()
    path = checkpoint.save(
        first.student.engine,
        out / f"{family}-{dtype}",
        3,
        identity={},
        notes={},
        index=first.student.partition.describe(),
        rank=rank,
        world=world,
        keep=2,
    )
    expected = first.steps(3)
    again = Run(family, dtype, 1, rank, world)
    found = checkpoint.verify(path)
    assert restore(again.student.engine, again.student.partition, found, rank, world) == "exact"
    assert again.steps(3) == expected, f"{family} {dtype}: {expected}"
    if rank == 0:
        plain = make_model(family, 2).to(dtype)
        load_checkpoint_weights(plain, found)
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, saved[name]), f"{family} {dtype}: {name}"


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    for family in ("llama", "qwen2"):
        for dtype in (torch.float32, torch.bfloat16):
            check(family, dtype, rank, world, out)
    process.leave_group()


if __name__ == "__main__":
    main()
