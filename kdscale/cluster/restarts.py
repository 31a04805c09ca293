"""How often what is lost may start again, and how long it waits before. Pure."""

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
    in_a_row: int = 0
    total: int = 0

    def spend(self, lived_s: float) -> bool:
        """A life has ended after ``lived_s``; whether another one may follow."""
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
