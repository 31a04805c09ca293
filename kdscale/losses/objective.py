"""What the student minimises at a step: soft and hard loss in one formula."""

from dataclasses import dataclass

from kdscale.config.schedule import Schedule, value_at
from kdscale.config.sections import LossSection
from kdscale.losses.divergence import Divergence


@dataclass(frozen=True)
class Objective:
    """``(1 - hard_weight) * s(temperature) * D + hard_weight * CE + layer_weight * L``; the hard term is at temperature 1, and L
    is the sum over pairs of layers of ``losses.layers.layer_distance``."""

    divergence: Divergence
    temperature: float = 1.0
    hard_weight: float = 0.0
    layer_weight: float = 0.0

    @property
    def soft_factor(self) -> float:
        """What the divergence is multiplied by: its weight and its temperature factor."""
        return (1 - self.hard_weight) * self.divergence.temperature_factor(self.temperature)


def objective_at(loss: LossSection, step: int, steps: int) -> Objective:
    """The objective of step ``step`` (from 0) of ``steps``."""

    def now(value: float | Schedule) -> float:
        return value_at(value, step, steps)

    kind = Divergence(loss.divergence, beta=now(loss.beta), skew=now(loss.skew), head_mass=loss.head_mass)
    layer_weight = 0.0 if loss.layers is None else now(loss.layers.weight)
    return Objective(kind, now(loss.temperature), now(loss.hard_weight), layer_weight)
