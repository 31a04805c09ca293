"""Which steps are on-policy, and whose weights write their text: pure functions of the step. No torch.

So a run's numbers depend on no clock: the batch of an on-policy step ``n`` follows from seed, ``n`` and the weights after
``version(n)`` steps, whoever writes it, whenever, and however often.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kdscale.config.on_policy import OnPolicySection


@dataclass(frozen=True)
class Plan:
    """Of one run. Steps count from 0; version ``v`` are the weights after ``v`` steps."""

    fraction: float
    refresh_steps: int
    lag_steps: int
    seed: int

    @classmethod
    def of(cls, section: OnPolicySection, seed: int) -> "Plan":
        return cls(section.fraction, section.refresh_steps, section.lag_steps, seed)

    @cached_property
    def _phase(self) -> float:
        return float(np.random.Generator(np.random.Philox(key=[self.seed, 0])).random())

    def ordinal(self, step: int) -> int:
        """On-policy steps before ``step``: within 1 of ``fraction * step``."""
        return int(self.fraction * step + self._phase)

    def on_policy(self, step: int) -> bool:
        return self.ordinal(step + 1) > self.ordinal(step)

    def version(self, step: int) -> int:
        """Whose weights write the text of on-policy step ``step``: the last multiple of ``refresh_steps`` that is at least
        ``lag_steps`` before it; near the beginning, the weights the run started with."""
        return max(0, step - self.lag_steps) // self.refresh_steps * self.refresh_steps

    def written_by(self, version: int) -> list[int]:
        """The on-policy steps whose text the weights of ``version`` write."""
        if version % self.refresh_steps:
            return []
        first = 0 if version == 0 else version + self.lag_steps
        return [step for step in range(first, version + self.lag_steps + self.refresh_steps) if self.on_policy(step)]

    def needed(self, done: int) -> list[int]:
        """Versions up to ``done`` that steps from ``done`` on still need: what a run that goes on there must have."""
        first = max(0, done - self.lag_steps - self.refresh_steps + 1)
        return [version for version in range(first, done + 1) if any(step >= done for step in self.written_by(version))]
