"""Which steps are on-policy, and whose weights write for them."""

from hypothesis import given
from hypothesis import strategies as st

from kdscale.on_policy.schedule import Plan

PLANS = st.builds(
    Plan,
    fraction=st.floats(0, 1),
    refresh_steps=st.integers(1, 9),
    lag_steps=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
STEPS = st.integers(0, 10_000)


@given(PLANS, STEPS, st.integers(0, 300))
def test_the_share_is_kept_in_every_stretch(plan: Plan, first: int, length: int):
    found = [plan.on_policy(step) for step in range(first, first + length)]
    assert abs(sum(found) - plan.fraction * length) < 1 + 1e-6
    assert sum(found) == plan.ordinal(first + length) - plan.ordinal(first)


@given(PLANS, STEPS)
def test_weights_are_as_old_as_allowed(plan: Plan, step: int):
    version = plan.version(step)
    assert 0 <= version <= step
    assert version % plan.refresh_steps == 0
    assert step - version < plan.lag_steps + plan.refresh_steps
    assert version == 0 or step - version >= plan.lag_steps


@given(PLANS, STEPS)
def test_what_a_version_writes_is_what_names_it(plan: Plan, around: int):
    """Every on-policy step stands with one version, its own."""
    for version in range(around, around + 10):
        assert plan.written_by(version) == [
            step for step in range(version, version + 30) if plan.on_policy(step) and plan.version(step) == version
        ]


@given(PLANS, STEPS)
def test_a_run_that_goes_on_needs_what_its_coming_steps_name(plan: Plan, done: int):
    coming = [step for step in range(done, done + 30) if plan.on_policy(step)]
    assert plan.needed(done) == sorted({plan.version(step) for step in coming if plan.version(step) <= done})


def test_ends_of_the_share():
    none, every = (Plan(fraction, 2, 1, seed=3) for fraction in (0.0, 1.0))
    assert not any(none.on_policy(step) for step in range(100))
    assert all(every.on_policy(step) for step in range(100))
    assert [every.version(step) for step in range(8)] == [0, 0, 0, 2, 2, 4, 4, 6]
