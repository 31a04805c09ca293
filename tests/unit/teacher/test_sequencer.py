"""The sequencer's stated invariants, over random arrivals."""

from hypothesis import given
from hypothesis import strategies as st

from kdscale.teacher.sequencer import Forward, Sequencer

arrivals = st.lists(st.tuples(st.integers(0, 2), st.tuples(*[st.integers(0, 12)] * 2), st.booleans()), max_size=60)
Size = tuple[int, int]
"""(rows, tokens of a row)."""


def play(
    sequencer: Sequencer, events: list[tuple[int, Size, bool]]
) -> tuple[list[Forward], list[list[tuple[int, Size]]]]:
    """Ring for each event, deal a forward where it says so, then drain; returns forwards and arrivals by rank."""
    rung: list[list[tuple[int, Size]]] = [[], [], []]
    forwards = []
    for rank, size, deal in events:
        request = len(rung[rank])
        rung[rank].append((request, size))
        sequencer.ring(rank, request, *size)
        if deal:
            forwards.append(sequencer.next_forward())
    while (forward := sequencer.next_forward()) is not None:
        forwards.append(forward)
    assert None not in forwards
    return forwards, rung  # type: ignore[return-value]


@given(arrivals, st.integers(1, 100))
def test_each_request_is_dealt_once_in_order(events: list[tuple[int, Size, bool]], limit: int):
    forwards, rung = play(Sequencer(3, limit), events)
    for rank in range(3):
        dealt = [request for forward in forwards for request in forward.shares[rank]]
        assert dealt == [request for request, _ in rung[rank]]


@given(arrivals, st.integers(1, 100))
def test_forwards_are_numbered_without_gaps_and_never_empty(events: list[tuple[int, Size, bool]], limit: int):
    forwards, _ = play(Sequencer(3, limit), events)
    assert [forward.number for forward in forwards] == list(range(len(forwards)))
    assert all(any(forward.shares) for forward in forwards)


@given(arrivals, st.integers(1, 100))
def test_a_share_stays_within_the_limit_unless_alone(events: list[tuple[int, Size, bool]], limit: int):
    forwards, rung = play(Sequencer(3, limit), events)
    for forward in forwards:
        for rank, share in enumerate(forward.shares):
            sizes = [dict(rung[rank])[request] for request in share]
            computed = sum(rows for rows, _ in sizes) * max((columns for _, columns in sizes), default=0)
            assert computed <= limit or len(share) == 1


@given(arrivals)
def test_deterministic_mode_runs_one_request_a_forward(events: list[tuple[int, Size, bool]]):
    forwards, rung = play(Sequencer(3, 10, one_request=True), events)
    assert all(sum(len(share) for share in forward.shares) == 1 for forward in forwards)
    assert len(forwards) == sum(len(requests) for requests in rung)


def test_nothing_waiting_deals_nothing():
    assert Sequencer(2, 10).next_forward() is None


def test_ranks_take_turns_in_deterministic_mode():
    sequencer = Sequencer(2, 10, one_request=True)
    for rank in (0, 0, 1, 1):
        sequencer.ring(rank, 0, 1, 5)
    ranks = []
    while (forward := sequencer.next_forward()) is not None:
        ranks.append(next(rank for rank, share in enumerate(forward.shares) if share))
    assert ranks == [0, 1, 0, 1]
