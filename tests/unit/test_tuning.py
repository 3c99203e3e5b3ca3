"""The ladder of learning rates and the search for an intrinsic dimension."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import Diverged, OutOfMemory
from rankwise.studies.intrinsic_dimension import bisect
from rankwise.tuning import Tuned, tune


@given(st.integers(-6, 6))
def test_the_best_rung_is_found_from_either_side(best):
    tuned = tune(lambda rate: abs(rate - 2.0**best), start=1.0, most=99)
    assert tuned.rate == 2.0**best
    assert tuned.bracketed
    assert {2.0 ** (best - 1), 2.0 ** (best + 1)} <= tuned.tried.keys()


def test_a_search_that_is_cut_short_says_so():
    tuned = tune(lambda rate: -rate, start=1.0, most=4)
    assert not tuned.bracketed
    assert tuned.rate == max(tuned.tried)


def test_a_rate_that_diverges_is_no_candidate():
    def loss(rate: float) -> float:
        if rate > 1:
            raise Diverged("step 3: expected a finite loss, found nan")
        return 1 - rate

    assert tune(loss, start=1.0).rate == 1.0


@given(st.integers(2, 16), st.integers(0, 20))
def test_bisection_finds_the_smallest_dimension_that_reaches_the_goal(high, smallest):
    asked = []

    def best(dimension: int) -> Tuned:
        asked.append(dimension)
        return Tuned(1.0, 1.0 if dimension >= 2**smallest else 2.0, {}, True)

    found = bisect(best, goal=1.5, low=2, high=high)
    assert found.d90 == (None if smallest > high else 2 ** max(smallest, 2))
    assert len(asked) == len(set(asked)) <= 2 + high.bit_length()
    assert list(found.tried) == sorted(asked)


def test_never_reached():
    assert bisect(lambda d: Tuned(1.0, 2.0, {}, True), 1.5, 2, 8).d90 is None


def test_tune_never_asks_twice():
    asked = []
    tune(lambda rate: asked.append(rate) or abs(rate - 8), start=1.0)
    assert len(asked) == len(set(asked))
    with pytest.raises(ZeroDivisionError):
        tune(lambda rate: 1 / 0, start=1.0)


def test_a_run_that_had_no_memory_says_nothing_about_its_rate():
    def loss(rate: float) -> float:
        raise OutOfMemory("step 1: out of memory")

    with pytest.raises(OutOfMemory):
        tune(loss, start=1.0)
