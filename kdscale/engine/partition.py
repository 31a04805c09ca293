"""Where DeepSpeed keeps the master weight and the optimizer state of each parameter: in this process, and in its files.

Every ZeRO stage, with or without bfloat16 and pipelines, ends in the same: some float32 tensors a rank (the *slots*), each
with AdamW's `step`, `exp_avg` and `exp_avg_sq`, and fragments of parameters in them. This is the one file that knows how
each of DeepSpeed's optimizers lays them out. A checkpoint carries the fragments of each rank as JSON, so that another
number of ranks, another stage or another pipeline can read what it needs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from kdscale.engine.fragments import Fragment, Place
from kdscale.engine.sharding import gathered
from kdscale.engine.training import Engine
from kdscale.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def digest(parameter: nn.Parameter) -> str:
    """``dtype:sha256`` of a whole parameter's bytes."""
    raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{parameter.dtype}:{hashlib.sha256(raw.data).hexdigest()}"


class Partition:
    """This rank's slots and fragments."""

    def __init__(self, engine: Engine, parameters: Mapping[str, nn.Parameter]) -> None:
        """``parameters`` are those this rank holds (sharded or whole), by the student's own names.

        Raises:
            ConfigError: the deepspeed section brings an optimizer wrapper whose layout is not known here.
        """
        self._engine = engine
        self.trained = {name: one for name, one in parameters.items() if one.requires_grad}
        self._frozen = {name: one for name, one in parameters.items() if not one.requires_grad}
        self._digests: dict[str, str] | None = None
        self.slots, self.fragments = self._lay_out()

    def _lay_out(self) -> tuple[list[torch.Tensor], list[Fragment]]:
        optimizer, engine = self._engine.optimizer, self._engine
        match optimizer:
            case DeepSpeedZeroOptimizer_Stage3():
                return optimizer.fp32_partitioned_groups_flat, self._sharded(optimizer)
            case DeepSpeedZeroOptimizer():
                return optimizer.single_partition_of_fp32_groups, self._flat(optimizer)
            case BF16_Optimizer():
                return optimizer.fp32_groups_flat_partition, self._flat(optimizer)
            case FP16_UnfusedOptimizer():
                (masters,) = optimizer.fp32_groups
                (models,) = optimizer.fp16_groups
                file = Path(engine._get_ckpt_name("", "")).name
                state: Place = [file, "optimizer", "optimizer_state_dict", "state"]
                places: list[Place] = [[file, "optimizer", "fp32_groups", 0, slot] for slot in range(len(masters))]
                return masters, self._whole(models, places, state)
            case torch.optim.Optimizer():
                slots = optimizer.param_groups[0]["params"]
                file = Path(engine._get_ckpt_name("", "")).name
                return slots, self._whole(slots, self._module_places(file, slots), [file, "optimizer", "state"])
            case _:
                raise ConfigError(
                    f"the deepspeed section makes DeepSpeed use {type(optimizer).__name__}, whose states kdscale cannot find"
                    " again in a checkpoint; use plain ZeRO 0 to 3 (configs/deepspeed/)"
                )

    def _whole(self, models: list[nn.Parameter], masters: list[Place], state: Place) -> list[Fragment]:
        """Nothing is sharded: a slot a parameter."""
        names = {id(parameter): name for name, parameter in self.trained.items()}
        return [
            Fragment(names[id(one)], list(one.shape), 0, one.numel(), slot, 0, masters[slot], [*state, slot])
            for slot, one in enumerate(models)
        ]

    def _module_places(self, file: str, slots: list[nn.Parameter]) -> list[Place]:
        """Where the model's own weights are stored: float32 without ZeRO has no others."""
        stages = getattr(self._engine.module, "forward_funcs", None)
        found: dict[int, Place] = {}
        if stages is None:
            for name, one in self._engine.module.named_parameters():
                found[id(one)] = [file, "module", name]
        else:
            for number, module in enumerate(stages):
                for name, one in module.named_parameters():
                    found[id(one)] = [Path(self._engine.module.ckpt_layer_path("", number)).name, name]
        return [found[id(one)] for one in slots]

    def _flat(self, optimizer: Any) -> list[Fragment]:
        """ZeRO 1 and 2: all parameters in a row, cut into equal parts."""
        file = Path(self._engine._get_zero_ckpt_name("", "")).name
        found = []
        for name, one in self.trained.items():
            if (mapping := one._hp_mapping) is None:  # type: ignore[attr-defined]
                continue  # lies on other ranks
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            slot = mapping.param_group_index
            master: Place = [file, "optimizer_state_dict", "single_partition_of_fp32_groups", slot]
            state: Place = [file, "optimizer_state_dict", "base_optimizer_state", "state", slot]
            shape = list(one.shape)
            found.append(Fragment(name, shape, here.start, here.numel, slot, there.start, master, state))
        return found

    def _sharded(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> list[Fragment]:
        """ZeRO-3: every parameter cut into equal parts, the last one padded."""
        file = Path(self._engine._get_zero_ckpt_name("", "")).name
        rank = dist.get_rank(group=optimizer.dp_process_group)
        found = []
        for name, one in self.trained.items():
            slot, offset, part = optimizer.grad_position[optimizer.get_param_id(one)]
            start = rank * part
            numel = min(part, one.ds_numel - start)  # type: ignore[attr-defined]
            if numel <= 0:
                continue  # all padding
            master: Place = [file, "optimizer_state_dict", "fp32_flat_groups", slot]
            state: Place = [file, "optimizer_state_dict", "optimizer_state_dict", "state", slot]
            shape = list(one.ds_shape)  # type: ignore[attr-defined]
            found.append(Fragment(name, shape, start, numel, slot, offset, master, state))
        return found

    def describe(self) -> dict[str, Any]:
        """The fragments, and a digest of each frozen parameter, as plain values; every rank calls it."""
        return {"fragments": [asdict(fragment) for fragment in self.fragments], "frozen": self.frozen_digests()}

    def frozen_digests(self) -> dict[str, str]:
        """``digest`` of each frozen parameter, which are in no slot; every rank calls it."""
        if self._digests is None:
            self._digests = {}
            for name, one in self._frozen.items():
                with gathered([one]):
                    self._digests[name] = digest(one)
        return self._digests

    def forget_digests(self) -> None:
        """Frozen parameters were loaded."""
        self._digests = None

    # ---- taking values over ----

    def open_states(self, step: float) -> None:
        """Give every slot an optimizer state of zeros after ``step`` steps, as AdamW does in its first."""
        states = self._engine.basic_optimizer.state
        for slot in self.slots:
            count = torch.tensor(step, dtype=torch.float32, device=slot.device)
            states[slot] = {"step": count} | {moment: torch.zeros_like(slot) for moment in MOMENTS}

    @torch.no_grad()
    def write(self, name: str, key: str, value: torch.Tensor) -> None:
        """Put this rank's fragments of a whole float32 ``value`` in place; ``key`` is ``master`` or one of ``MOMENTS``."""
        states = self._engine.basic_optimizer.state
        for fragment in self.by_name(name):
            slot = self.slots[fragment.slot]
            tensor = slot.detach() if key == "master" else states[slot][key]
            part = value.reshape(-1)[fragment.start : fragment.start + fragment.numel]
            tensor.view(-1)[fragment.offset : fragment.offset + fragment.numel].copy_(part)

    @torch.no_grad()
    def write_model(self, name: str, value: torch.Tensor) -> None:
        """Put a whole float32 ``value`` into the parameter the model computes with; every rank calls it."""
        parameter = self.trained[name]
        with gathered([parameter], write=True):
            parameter.copy_(value.to(parameter.dtype))

    def by_name(self, name: str) -> list[Fragment]:
        return [fragment for fragment in self.fragments if fragment.name == name]
