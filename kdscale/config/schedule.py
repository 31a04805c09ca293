"""Values that move over the steps of a run."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from kdscale.config.section import Section

Shape = Literal["constant", "linear", "cosine"]


class Schedule(Section):
    """A value that goes from ``start`` at the first step to ``end`` at the last."""

    shape: Literal["linear", "cosine"] = "linear"
    """Straight, or slow at both ends."""
    start: float
    """Value at the first step."""
    end: float
    """Value at the last step."""


def _tag(value: Any) -> str:
    return "<schedule>" if isinstance(value, dict | Schedule) else "<number>"


# The tag decides which of both an error speaks of; angle brackets keep it apart from field names.
Scheduled = Annotated[Annotated[float, Tag("<number>")] | Annotated[Schedule, Tag("<schedule>")], Discriminator(_tag)]
"""A number, or a schedule."""


def progress(shape: Shape, done: float) -> float:
    """How far a value has gone from its start (0) to its end (1) when the share ``done`` of the way is behind it."""
    match shape:
        case "constant":
            return 0.0
        case "linear":
            return done
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * done))


def value_at(value: float | Schedule, step: int, steps: int) -> float:
    """The value at ``step`` (from 0) of ``steps``."""
    if not isinstance(value, Schedule):
        return value
    return value.start + (value.end - value.start) * progress(value.shape, min(1.0, step / max(1, steps - 1)))


def ends(value: float | Schedule) -> tuple[float, float]:
    """The extreme values a run sees."""
    return (value.start, value.end) if isinstance(value, Schedule) else (value, value)


def within(allowed: Callable[[float], bool], rule: str) -> Callable[[float | Schedule], float | Schedule]:
    """A validator: every end of the value satisfies ``allowed``; ``rule`` says in words what that is."""

    def check(value: float | Schedule) -> float | Schedule:
        for end in ends(value):
            if not allowed(end):
                raise ValueError(f"{end:g} must {rule}")
        return value

    return check
