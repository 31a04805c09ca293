"""A DeepSpeed engine around a module, and the learning rate as a pure function of the step."""

from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine as Engine
from torch import nn

from kdscale.config.schedule import progress
from kdscale.config.sections import TrainSection
from kdscale.engine.capture import install

__all__ = ["Engine", "finite_weights", "gradient_norm", "learning_rate", "set_learning_rate", "training_engine"]


def training_engine(module: nn.Module, settings: dict[str, Any]) -> Engine:
    """DeepSpeed's engine for ``module``, which it casts, places and shards as ``settings`` say."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=parameters, config=settings)
    install(engine)
    return engine


def learning_rate(step: int, train: TrainSection) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then from ``lr`` to ``final_lr_share * lr``."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    span = max(1, train.steps - 1 - train.warmup_steps)
    done = min(1.0, (step - train.warmup_steps) / span)
    share = 1.0 - (1.0 - train.final_lr_share) * progress(train.schedule, done)
    return train.lr * share


def set_learning_rate(engine: Engine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def finite_weights(engine: Engine) -> bool:
    """Whether all trained weights that lie on this rank are finite numbers."""
    return all(bool(one.isfinite().all()) for one in engine.module.parameters() if one.requires_grad)


def gradient_norm(engine: Engine) -> float | None:
    """Norm of the last step's gradient before clipping; none where DeepSpeed does not tell it: without clipping, and with
    float32 at ZeRO 0."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(torch.as_tensor(norm))
