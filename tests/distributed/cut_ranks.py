"""One optimizer step on a tiny model, for several ZeRO stages, cuts and pipelines; rank 0 saves the gradient each took.

The optimizer is plain SGD with a large rate, so that the parameters move by the gradient itself, far above rounding.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdscale.batch import SoftTargets, TokenBatch
from kdscale.engine.models import freeze
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.layout import DataParallelStudent, PipelineStudent
from kdscale.student.step import MicroBatch
from kdscale.topology import BatchCut, Topology
from tests.conftest import PADDED_VOCAB, make_model
from tests.distributed.launch import join, leave
from tests.targets import topk_of_logits

RATE = 1e3
ROWS, COLUMNS, K = 8, 16, 6


def step_batch(vocab: int) -> tuple[TokenBatch, list[SoftTargets]]:
    """Rows with very unequal numbers of trained tokens (two have none), and their targets row by row."""
    rng = np.random.default_rng(0)
    predicts = np.zeros((ROWS, COLUMNS), bool)
    for row, count in enumerate([15, 1, 0, 7, 12, 0, 3, 9]):
        predicts[row, :count] = True
    batch = TokenBatch(
        number=0,
        ids_RL=rng.integers(0, vocab, (ROWS, COLUMNS), dtype=np.int32),
        segments_RL=np.ones((ROWS, COLUMNS), np.int32),
        positions_RL=np.repeat(np.arange(COLUMNS, dtype=np.int32)[None], ROWS, 0),
        predicts_RL=predicts,
    )
    generator = torch.Generator().manual_seed(0)
    targets = []
    for row in range(ROWS):
        labels = torch.from_numpy(batch.cut(slice(row, row + 1)).labels())
        logits = 3 * torch.randn(len(labels), vocab, generator=generator)
        targets.append(replace(topk_of_logits(logits, K, dtype=torch.float32), labels_T=labels))
    return batch, targets


def gradient(case: dict[str, Any], rank: int, world: int) -> dict[str, np.ndarray]:
    topology = Topology(case["pipeline"], world // case["pipeline"])
    cut = BatchCut(ROWS, case["micro_rows"], topology.data)
    model = make_model("qwen2" if case["untied"] else "llama").to(getattr(torch, case["dtype"]))
    if case["frozen"]:
        freeze(model, [case["frozen"]])
    if case["recompute"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": cut.micro_rows,
        "gradient_accumulation_steps": cut.micro_steps,
        "bf16": {"enabled": case["dtype"] == "bfloat16"},
        "gradient_clipping": case["clip"],  # left out, DeepSpeed clips at 1
        "optimizer": {"type": "SGD", "params": {"lr": RATE}},
        "zero_optimization": {"stage": case["stage"]},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    vocab_size, chunk_bytes = PADDED_VOCAB - 9, 4 * PADDED_VOCAB * 3
    student: DataParallelStudent | PipelineStudent
    if topology.pipeline > 1:
        shape = (case["micro_rows"], step_batch(vocab_size)[0].ids_RL.shape[1]) if case["by_time"] else None
        student = PipelineStudent(model, vocab_size, chunk_bytes, settings, topology, rank, shape)
    else:
        student = DataParallelStudent(model, vocab_size, chunk_bytes, settings, rank)
    batch, targets = step_batch(vocab_size)
    micro = []
    for number in range(cut.micro_steps):
        rows = cut.rows_of(topology.data_rank(rank), number)
        # Whoever does not hold the loss has no targets.
        soft = SoftTargets.join(targets[rows]) if topology.holds_loss(rank) else None
        micro.append(MicroBatch(batch.cut(rows), soft))
    objective = Objective(Divergence("forward_kl"), hard_weight=0.3)
    result = student.step(cut).train(micro, objective, batch.num_tokens, RATE)
    after = student.whole_state()
    if rank != 0:
        return {}
    moved = {name: ((before[name].float() - after[name].float()) / RATE).numpy() for name in before}
    return moved | {"loss": np.array([result.loss, result.num_tokens]), "norm": np.array(result.gradient_norm)}


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    for case in json.loads(sys.argv[5]):
        found = gradient(case, rank, world)
        if rank == 0:
            np.savez(out / f"{case['name']}.npz", **found)
    leave()


if __name__ == "__main__":
    main()
