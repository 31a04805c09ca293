"""A real engine that saves again and again, to be killed in the midst of it.

    python -m tests.failure.saver_process ROOT

Loading takes seconds, so one process loads, and forks a child for each line it reads (nothing is computed before the fork,
so there are no threads to lose). A child goes on from the newest checkpoint under ROOT/checkpoints, says so in one line
of JSON (pid, step, and whether the restored weights are those that were saved), stops itself until SIGCONT, and then saves
``SAVES`` times. When it has ended the parent says how, in a line of its own.
"""

import hashlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from kdscale.engine import process
from kdscale.engine.checkpoint import find
from kdscale.engine.fragments import index_files
from kdscale.engine.partition import Partition
from kdscale.engine.restore import restore
from kdscale.engine.saver import Saver
from kdscale.engine.training import Engine, training_engine

# Making an engine imports these, two seconds in each child if the parent has not.
for name in (
    "torch._dynamo.convert_frame",
    "torch._functorch.aot_autograd",
    "torch.export",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "networkx",
):
    importlib.import_module(name)

SAVES = 2
KEEP = 2
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 2**31,
}


def digest(engine: Engine) -> str:
    """Of all weights."""
    hashed = hashlib.sha256()
    for parameter in engine.module.parameters():
        hashed.update(parameter.detach().numpy().tobytes())
    return hashed.hexdigest()


def train(engine: Engine) -> None:
    loss = engine(torch.ones(1, 8)).square().sum()
    engine.backward(loss)
    engine.step()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def work(root: Path) -> None:
    torch.set_num_threads(1)
    member = process.Member(0, 1)
    member.join(member.open_store("127.0.0.0/8", None), "127.0.0.0/8", None, 60.0, 60.0, 0)
    engine = training_engine(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), SETTINGS)
    partition = Partition(engine, dict(engine.module.named_parameters()))
    found = find(root, "auto")
    same = True
    if found is not None:
        restore(engine, partition, found, 0, 1)
        same = digest(engine) == found.notes["digest"]
    step = 0 if found is None else found.step
    say(pid=os.getpid(), step=step, same=same)
    os.kill(os.getpid(), signal.SIGSTOP)
    saver = Saver(engine, root, step, rank=0, world=1, keep=KEEP, limit_s=60.0)
    for number in range(step + 1, step + 1 + SAVES):
        train(engine)
        small = index_files(0, partition.describe())
        saver.begin(number, identity={}, notes={"digest": digest(engine)}, small=small)
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.fault == "", outcome
    process.leave_group()


def main() -> None:
    root = Path(sys.argv[1]) / "checkpoints"
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            work(root)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say(ended=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
