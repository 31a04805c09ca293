"""The DeepSpeed JSON: what the user wrote, filled in; contradictions refused by name. Pure: no DeepSpeed, no torch."""

from typing import Any

from kdscale.config.schema import RunConfig
from kdscale.config.sections import Dtype, ParallelSection
from kdscale.errors import ConfigError
from kdscale.topology import BatchCut, Topology

GATHERED_AT_ONCE = 1 << 26
"""Elements of the largest block of a sharded teacher whose weights come by one collective: for a moment it stands twice in
memory, in the buffer in which it comes and as what it is copied to. For larger ones the collectives are not what takes time."""
_NEVER = 2**31  # kdscale prints the steps


def topology_of(parallel: ParallelSection) -> Topology:
    return Topology(parallel.pipeline, parallel.data)


def student_dtype(config: RunConfig) -> Dtype:
    """``student.dtype``, or what the ``deepspeed`` section says of bf16 where that is ``auto``."""
    bf16 = config.precision("bf16")
    if config.student.dtype != "auto" or bf16 == "auto":
        return config.student.dtype
    return "bfloat16" if bf16 else "float32"


def check_settings(config: RunConfig) -> None:
    """Raises: ConfigError for what ``student_settings`` would refuse, before anything starts."""
    student_settings(config, "bfloat16" if student_dtype(config) == "bfloat16" else "float32")


def batch_cut(config: RunConfig) -> BatchCut:
    return BatchCut(config.train.batch_rows, config.train.micro_rows, config.student.parallel.data)


def student_settings(config: RunConfig, dtype: str) -> dict[str, Any]:
    """The student's full DeepSpeed config; ``dtype`` is ``"float32"`` or ``"bfloat16"``.

    Raises:
        ConfigError: the ``deepspeed`` section sets a value that kdscale derives, to something else.
    """
    cut = batch_cut(config)
    derived: dict[str, Any] = {
        "train_batch_size": cut.rows,
        "train_micro_batch_size_per_gpu": cut.micro_rows,
        "gradient_accumulation_steps": cut.micro_steps,
        "gradient_clipping": config.train.clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        # torch's AdamW: portable, resumes bit for bit, and needs no compiler. Fused, it passes over the states once: on a
        # processor a step of 42 M parameters takes 0.05 s instead of 0.3.
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.train.lr,
                "betas": list(config.train.betas),
                "weight_decay": config.train.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
    }
    where = {
        "train_batch_size": "train.batch_rows",
        "train_micro_batch_size_per_gpu": "train.micro_rows",
        "gradient_accumulation_steps": "train.batch_rows / (train.micro_rows x data ranks)",
        "gradient_clipping": "train.clip",
        "bf16": "student.dtype",
        "optimizer": "train.lr, train.betas and train.weight_decay",
    }
    for key, value in derived.items():
        given = config.deepspeed.get(key, value)
        if given not in (value, "auto", {"enabled": "auto"}):
            raise ConfigError(
                f"deepspeed.{key} = {given!r} contradicts {where[key]}, from which kdscale derives {value!r};"
                f" remove deepspeed.{key} or change {where[key]}"
            )
    unsupported = {"scheduler": bool(config.deepspeed.get("scheduler"))}
    unsupported["fp16"] = config.precision("fp16") not in (False, None, "auto")
    for key, given in unsupported.items():
        if given:
            way_out = "train.schedule" if key == "scheduler" else "student.dtype: bfloat16"
            raise ConfigError(f"deepspeed.{key} is not supported; use {way_out}")
    for key in ("offload_optimizer", "offload_param"):
        # DeepSpeed copies its files on disk into a checkpoint between two collectives, where a fault hangs the other ranks.
        if (config.deepspeed.get("zero_optimization", {}).get(key) or {}).get("device") == "nvme":
            raise ConfigError(f"deepspeed.zero_optimization.{key}.device = nvme is not supported; use cpu")
    return {"steps_per_print": _NEVER, "zero_allow_untested_optimizer": True, **config.deepspeed, **derived}


def teacher_settings(ranks: int, dtype: str) -> dict[str, Any]:
    """The teacher's DeepSpeed config: ZeRO-3 over its ranks, or nothing sharded where there is only one."""
    zero: dict[str, Any] = {"stage": 0}
    if ranks > 1:
        # Everything is sharded, norms included, so that a rank holds its share of the parameters and no more.
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": _NEVER,
    }
