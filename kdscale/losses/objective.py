"""What the student minimises: soft and hard loss in one formula, and which payload can carry which divergence."""

from dataclasses import dataclass

from kdscale.config.schema import LossSection
from kdscale.errors import ConfigError

SUPPORT: dict[str, tuple[str, ...]] = {"topk": ("forward_kl", "reverse_kl", "jsd")}


def check_support(payload: str, divergence: str) -> None:
    """Raises: ConfigError when the payload does not carry what the divergence needs."""
    carried = SUPPORT.get(payload, ())
    if divergence not in carried:
        raise ConfigError(
            f"loss.divergence = {divergence} cannot be had from targets.payload = {payload}, which carries"
            f" {', '.join(carried) or 'none'}"
        )


@dataclass(frozen=True)
class Objective:
    """``(1 - hard_weight) * s(temperature) * D + hard_weight * CE``; the hard term is at temperature 1."""

    divergence: str
    temperature: float
    hard_weight: float
    beta: float = 0.5

    @staticmethod
    def from_config(loss: LossSection) -> "Objective":
        return Objective(loss.divergence, loss.temperature, loss.hard_weight, loss.beta)

    @property
    def soft_factor(self) -> float:
        """Factor of the divergence: its weight times s(temperature) = temperature^2, which keeps the soft gradient's size
        about independent of the temperature for the KL family (Hinton et al. 2015, section 2)."""
        return (1 - self.hard_weight) * self.temperature**2
