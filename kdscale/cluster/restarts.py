"""How often what is lost may start again, and how long it waits before."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_LONGEST_WAIT_S = 60.0


@dataclass
class Restarts:
    """A budget of restarts in a row: who has lived long enough begins anew."""

    allowed: int
    first_wait_s: float
    """Before the first restart; doubles with each further one, 60 s at most."""
    forget_s: float
    """A life of more seconds is long enough."""
    clock: Callable[[], float] = time.monotonic
    """Seconds."""
    in_a_row: int = 0
    total: int = 0
    _served_from: float | None = None

    def serves(self) -> None:
        """What may be lost is of use by now. Starting and loading, however long they take, are no life."""
        if self._served_from is None:
            self._served_from = self.clock()

    def spend(self) -> bool:
        """It is lost; whether another one may follow."""
        lived_s = 0.0 if self._served_from is None else self.clock() - self._served_from
        self._served_from = None
        self.in_a_row = 1 if lived_s > self.forget_s else self.in_a_row + 1
        if self.in_a_row > self.allowed:
            return False
        self.total += 1
        return True

    @property
    def wait_s(self) -> float:
        """To wait before the restart that was granted last."""
        return min(_LONGEST_WAIT_S, self.first_wait_s * 2.0 ** min(self.in_a_row - 1, 60))

    def __str__(self) -> str:
        return f"restart {self.in_a_row} of {self.allowed}"
