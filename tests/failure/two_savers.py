"""Two ranks that leave two checkpoints of a tiny engine under ROOT/checkpoints: ``RANK WORLD PORT_FILE ROOT``."""

import sys
from pathlib import Path

import torch

from kdscale.engine.saver import Saver
from kdscale.engine.training import training_engine
from tests.distributed.launch import join, leave
from tests.failure.saver_process import SETTINGS, train


def main() -> None:
    rank, world, port_file, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    engine = training_engine(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), SETTINGS)
    saver = Saver(engine, root / "checkpoints", 0, rank=rank, world=world, keep=2, limit_s=60.0)
    for step in (1, 2):
        train(engine)
        # Else both steps may have the same random state, and what is swapped with its like is not damaged.
        torch.rand(1)
        saver.begin(step, identity={"seed": 1}, notes={"tokens": 100 * step})
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.fault == "", outcome
    leave()


if __name__ == "__main__":
    main()
