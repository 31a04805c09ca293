"""Numbers the forwards of a ZeRO-3 group: which requests each rank takes into the next one. Pure; no socket, no torch.

ZeRO-3 gathers weights by collectives, so every rank must run every forward, in the same order. Requests arrive at any
rank; each is computed by the rank it arrived at. Invariants (``tests/unit/teacher/test_sequencer.py``):

- forwards are numbered 0, 1, 2, ... without gaps, and none is empty on all ranks;
- each request is dealt exactly once, to the rank it arrived at, in order of arrival;
- a rank's share holds at most ``max_batch_tokens``, rows padded to the longest of them, except a single larger request, which
  runs alone;
- in deterministic mode a forward holds exactly one request.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """One forward of the whole group; a rank with an empty share runs one dummy token."""

    number: int
    shares: tuple[tuple[int, ...], ...]
    """Request numbers (each rank's own count), by rank."""


class Sequencer:
    def __init__(self, ranks: int, max_batch_tokens: int, *, one_request: bool = False) -> None:
        self._queues: list[deque[tuple[int, int, int]]] = [deque() for _ in range(ranks)]
        self._max_batch_tokens = max_batch_tokens
        self.one_request = one_request
        """Whether a forward holds exactly one."""
        self._next_number = 0
        self._next_rank = 0

    def ring(self, rank: int, request: int, rows: int, columns: int) -> None:
        """Request ``request`` of ``rows`` rows, each of ``columns`` tokens, has arrived at ``rank``."""
        self._queues[rank].append((request, rows, columns))

    @property
    def waiting(self) -> int:
        """Requests not dealt yet."""
        return sum(len(requests) for requests in self._queues)

    def next_forward(self) -> Forward | None:
        """Deal the next forward; none when nothing waits."""
        if not self.waiting:
            return None
        shares = self._one() if self.one_request else tuple(self._share(requests) for requests in self._queues)
        forward = Forward(self._next_number, shares)
        self._next_number += 1
        return forward

    def _share(self, requests: deque[tuple[int, int, int]]) -> tuple[int, ...]:
        share: list[int] = []
        all_rows = widest = 0
        while requests:
            request, rows, columns = requests[0]
            all_rows, widest = all_rows + rows, max(widest, columns)
            if share and all_rows * widest > self._max_batch_tokens:
                break
            requests.popleft()
            share.append(request)
        return tuple(share)

    def _one(self) -> tuple[tuple[int, ...], ...]:
        # Ranks take turns, so that no rank's queue starves behind another's.
        ranks = len(self._queues)
        turn = next(
            rank % ranks for rank in range(self._next_rank, self._next_rank + ranks) if self._queues[rank % ranks]
        )
        self._next_rank = turn + 1
        request, *_ = self._queues[turn].popleft()
        return tuple((request,) if rank == turn else () for rank in range(ranks))
