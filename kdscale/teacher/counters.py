"""What one teacher rank says of itself and of its work. Plain values only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counters:
    """Sums since the replica was first started, up to the last heartbeat of each lost generation."""

    forwards: int = 0
    tokens: int = 0
    """Real tokens read."""
    dummy_tokens: int = 0
    """Tokens run without a request, to keep step with the other ranks."""
    targets: int = 0
    """Positions answered."""


NOTHING_YET = Counters()


@dataclass(frozen=True)
class Beat:
    """The answer of a serving rank to a heartbeat."""

    counters: Counters
    forward_seconds: float
    """How long the forward in progress has run; 0 between forwards."""
    in_flight: int
    """Requests that have arrived and are not answered to the last byte."""
