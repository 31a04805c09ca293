"""What one teacher rank has done so far; carried over when its replica is rebuilt. Plain values only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counters:
    """Sums since the teacher was first started, up to the last heartbeat of each lost generation."""

    forwards: int = 0
    tokens: int = 0
    """Real tokens read."""
    dummy_tokens: int = 0
    """Tokens run without a request, to keep step with the other ranks."""
    targets: int = 0
    """Positions answered."""


NOTHING_YET = Counters()
