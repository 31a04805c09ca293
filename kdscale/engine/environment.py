"""What computes: versions, instruction set and threads, which decide the last bits of every number."""

import platform

import deepspeed
import torch
import transformers

import kdscale


def environment(device: torch.device) -> dict[str, str]:
    """This rank's environment, by the names under which it is compared when a run goes on from a checkpoint."""
    facts = {
        "python": platform.python_version(),
        "kdscale": kdscale.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    return {f"environment.{name}": value for name, value in facts.items()}
