"""One process of a group: device, dtype, threads, seeds, and the process group under DeepSpeed."""

import hashlib
import os
import random
import socket
from datetime import timedelta

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist

from kdscale import tunnel
from kdscale.config.hardware import cpu_has_bfloat16
from kdscale.config.sections import Dtype
from kdscale.credentials import Keys
from kdscale.errors import PlacementError
from kdscale.node import address_in

# DeepSpeed builds this extension with g++ at every start, leaves tens of MB per rank in /dev/shm, and a process killed
# in the build leaves a lock on which every later start waits for ever. gloo and NCCL train the same without it. Said before
# DeepSpeed has looked: it would compile programs to find out what else could be built, which nothing here asks for.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


class Member:
    """One rank on its way into a process group: rank 0 opens the store, then all join."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self._listener: socket.socket | None = None
        self._door: tunnel.Exit | tunnel.Entrance | None = None

    def open_store(self, network: str, keys: Keys | None, port: int = 0) -> tuple[str, int]:
        """Rank 0: listen for the group on this node's address in ``network`` alone (torch's own store would listen on
        all addresses), at ``port`` or any free one; returns where. With ``keys``, only who has them reaches the store.

        Raises: PlacementError when the port is taken, or for a plain store off loopback.
        """
        host, _ = address_in(network)
        if keys is None:
            tunnel.require_loopback(host)
            self._listener = tunnel.listen(host, port)
            address: tuple[str, int] = self._listener.getsockname()
            return address
        self._listener = tunnel.listen("127.0.0.1", 0)
        self._door = tunnel.Exit(host, port, self._listener.getsockname(), keys)
        return self._door.address

    def join(
        self,
        address: tuple[str, int],
        network: str,
        keys: Keys | None,
        timeout_s: float,
        collective_s: float,
        gpus_per_rank: int,
        local_rank: int = 0,
    ) -> torch.device:
        """Become part of the group whose store is at ``address``; returns this rank's device.

        Blocks until all ranks are there, ``timeout_s`` at most. A collective of the group may take ``collective_s``. Of
        several visible GPUs the rank takes number ``local_rank``.

        Raises: PlacementError when the store does not take ``keys``, or no GPU is there.
        """
        device = use_device(gpus_per_rank, local_rank)
        _, interface = address_in(network)
        os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
        # What DeepSpeed reads of the launcher's variables; LOCAL_SIZE apart from WORLD_SIZE keeps it off shared memory.
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.world), LOCAL_RANK=str(local_rank), LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
        timeout = timedelta(seconds=collective_s)
        if keys is not None and self._listener is not None:
            address = self._listener.getsockname()
        elif keys is not None:
            self._door = tunnel.Entrance(address, keys, timeout_s)
            address = self._door.address
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address[0],
            address[1],
            self.world,
            is_master=self._listener is not None,
            timeout=timedelta(seconds=timeout_s),
            # The store owns the descriptor from here on.
            master_listen_fd=self._listener.detach() if self._listener is not None else None,
        )
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        return device


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def use_device(gpus_per_rank: int, local_rank: int = 0) -> torch.device:
    """This rank's device. Raises: PlacementError when a GPU is asked for and none is visible."""
    if not gpus_per_rank:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlacementError("gpus_per_rank = 1, but no GPU is visible to this rank; set it to 0 to run on CPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def resolve_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The dtype ``auto`` stands for: bfloat16 where the hardware multiplies it fast, else float32."""
    match name:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            fast = device.type == "cuda" or cpu_has_bfloat16()
            return torch.bfloat16 if fast else torch.float32


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """What optimizer step ``step`` draws (dropout) depends on these three alone: not on what was drawn before, on where a
    run was resumed, or on what else draws in this process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def set_threads(threads: int, *, deterministic: bool) -> None:
    torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else every torch.empty is filled, and DeepSpeed makes one of reduce_bucket_size elements (2 GB) in each step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """``values`` summed over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on any rank; every rank must ask."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def same_on_all_ranks(text: str, device: torch.device) -> bool:
    """Whether every rank says the same; every rank must ask."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return ends.tolist() == [number, -number]


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


_TEXT_BYTES = 1024


def text_of_ranks(text: str, device: torch.device) -> list[str]:
    """What each rank says, by rank, cut to 1 KiB; every rank must ask."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [text]
    raw = text.encode()[:_TEXT_BYTES]
    mine = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else 0
    found = [torch.empty(_TEXT_BYTES, dtype=torch.uint8, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine.to(device))
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in found]
