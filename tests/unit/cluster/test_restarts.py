"""The budget of restarts."""

from kdscale.cluster.restarts import Restarts


def test_waits_double_up_to_a_minute_and_the_budget_ends():
    restarts = Restarts(allowed=8, first_wait_s=1.5, forget_s=600)
    waits = []
    while restarts.spend(lived_s=10):
        waits.append(restarts.wait_s)
    assert waits == [1.5, 3, 6, 12, 24, 48, 60, 60]
    assert restarts.total == 8
    assert not restarts.spend(lived_s=10)


def test_a_long_life_begins_anew():
    restarts = Restarts(allowed=1, first_wait_s=1, forget_s=600)
    assert restarts.spend(lived_s=0)
    assert restarts.spend(lived_s=601)
    assert (restarts.wait_s, str(restarts)) == (1, "restart 1 of 1")
    assert not restarts.spend(lived_s=600)


def test_no_restart_allowed():
    assert not Restarts(allowed=0, first_wait_s=1, forget_s=1).spend(lived_s=1000)
