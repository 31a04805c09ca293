"""The budget of restarts."""

from kdscale.cluster.restarts import Restarts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lost_after(restarts: Restarts, clock: Clock, *, loading_s: float = 0, served_s: float = 0) -> bool:
    """A life of so long; whether another one follows."""
    clock.now += loading_s
    if served_s:
        restarts.serves()
        clock.now += served_s
    return restarts.spend()


def test_waits_double_up_to_a_minute_and_the_budget_ends():
    clock = Clock()
    restarts = Restarts(allowed=8, first_wait_s=1.5, forget_s=600, clock=clock)
    waits = []
    while lost_after(restarts, clock, served_s=10):
        waits.append(restarts.wait_s)
    assert waits == [1.5, 3, 6, 12, 24, 48, 60, 60]
    assert restarts.total == 8
    assert not lost_after(restarts, clock, served_s=10)


def test_a_long_life_begins_anew():
    clock = Clock()
    restarts = Restarts(allowed=1, first_wait_s=1, forget_s=600, clock=clock)
    assert lost_after(restarts, clock)
    assert lost_after(restarts, clock, served_s=601)
    assert (restarts.wait_s, str(restarts)) == (1, "restart 1 of 1")
    assert not lost_after(restarts, clock, served_s=600)


def test_starting_and_loading_are_no_life():
    """Else what never comes to serve, each time after a long time, would be started for ever."""
    clock = Clock()
    restarts = Restarts(allowed=2, first_wait_s=1, forget_s=600, clock=clock)
    assert lost_after(restarts, clock, served_s=601)
    assert lost_after(restarts, clock, loading_s=900)
    assert not lost_after(restarts, clock, loading_s=900)


def test_a_life_counts_from_its_first_use():
    clock = Clock()
    restarts = Restarts(allowed=1, first_wait_s=1, forget_s=600, clock=clock)
    for _ in range(3):
        restarts.serves()
        clock.now += 300
    assert restarts.spend()
    assert str(restarts) == "restart 1 of 1"


def test_no_restart_allowed():
    clock = Clock()
    assert not lost_after(Restarts(allowed=0, first_wait_s=1, forget_s=1, clock=clock), clock, served_s=1000)
