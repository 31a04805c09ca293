"""The contract of every source of soft targets, live or recorded."""

from typing import Protocol

from kdscale.batch import SoftTargets, TokenBatch
from kdscale.spec import TargetSpec


class TargetSource(Protocol):
    """Gives the soft targets of a batch: a pure function of (teacher, tokens, spec), so it may be asked again."""

    def fetch(self, batch: TokenBatch, spec: TargetSpec) -> SoftTargets:
        """The targets of the batch's trained positions, in row-major order.

        Raises:
            StreamError: no endpoint could serve the request in time.
            IdentityError: the endpoint serves another teacher.
        """
        ...
