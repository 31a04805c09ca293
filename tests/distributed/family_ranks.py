"""Two stages of a tiny model of each family over packed documents; the last stage saves logits, rank 0 loss and weights."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from kdscale.batch import TokenBatch
from kdscale.data.loader import Loader
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.layout import PipelineStudent, whole_head
from kdscale.student.step import MicroBatch
from kdscale.topology import BatchCut, Topology
from tests.conftest import PADDED_VOCAB, make_model
from tests.distributed.launch import join, leave
from tests.properties.test_packing_properties import Documents

ROWS, COLUMNS, BATCHES, VOCAB = 2, 24, 2, PADDED_VOCAB - 9


def packed_batches() -> Iterator[TokenBatch]:
    loader = Loader(Documents([9, 5, 14, 3, 7, 11, 20, 24]), "isolated", COLUMNS, ROWS, seed=0)
    for number in range(BATCHES):
        batch = loader.batch(number)
        batch.ids_RL[:] %= VOCAB
        assert batch.segments_RL.max() > 1
        yield batch


def run_family(family: str, rank: int, out: Path) -> None:
    topology, cut = Topology(2, 1), BatchCut(ROWS * BATCHES, ROWS, 1)
    settings = {
        "train_batch_size": cut.rows,
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": BATCHES,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    student = PipelineStudent(make_model(family), VOCAB, 1 << 20, settings, topology, rank)
    batches = list(packed_batches())
    hidden = student.hidden(batches)
    assert len(hidden) == (BATCHES if topology.holds_loss(rank) else 0)
    if topology.holds_loss(rank):
        with whole_head(student) as head:
            save_file({f"{n}": head.logits(one) for n, one in enumerate(hidden)}, out / f"{family}.logits")
    micro = [MicroBatch(batch, None) for batch in batches]
    tokens = sum(batch.num_tokens for batch in batches)
    result = student.step(cut).train(micro, Objective(Divergence("forward_kl"), hard_weight=1.0), tokens, 1.0)
    # Once more behind a step: what the stages send each other changes its shape and back.
    student.hidden([batch.cut(slice(0, 1)) for batch in batches])
    state = student.whole_state()
    if rank == 0:
        save_file(state | {"loss": torch.tensor(result.loss)}, out / f"{family}.trained")


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    for family in sys.argv[5].split(","):
        run_family(family, rank, out)
    leave()


if __name__ == "__main__":
    main()
