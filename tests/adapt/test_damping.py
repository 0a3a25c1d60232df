"""The reduction ratio and the rule that moves λ by it."""

import pytest
import torch

from fisherfn.adapt import Cadence, adapted_damping, reduction_ratio
from fisherfn.adapt.damping import within_noise
from fisherfn.errors import HyperparameterError
from tests.zoo import as_installed

INF = float("inf")


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        (-1.0, -2.0, 0.5),
        (1.0, -2.0, -0.5),
        (2.0, 1.0, -INF),  # the sign trap: a rise that was foretold is no good step
        (-2.0, 1.0, 1.0),  # a fall that was not foretold is none that λ should rise for
        (float("nan"), -1.0, -INF),
        (INF, -1.0, -INF),
    ],
)
def test_the_reduction_ratio(actual, predicted, expected):
    assert float(reduction_ratio(torch.tensor(actual), torch.tensor(predicted))) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 0.95**5), (0.5, 1.0), (0.2, 0.95**-5), (-INF, 0.95**-5)])
def test_damping_follows_the_ratio(ratio, expected):
    found = adapted_damping(torch.tensor(1.0), torch.tensor(ratio), steps=5)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_damping_has_a_floor_and_may_be_frozen():
    good = torch.tensor(1.0)
    assert float(adapted_damping(torch.tensor(0.1), good, floor=0.5)) == 0.5
    assert float(adapted_damping(torch.tensor(0.1), good, frozen=torch.tensor(True))) == pytest.approx(0.1)


def test_a_change_of_a_few_units_in_the_last_place_is_noise():
    loss = torch.tensor(100.0).double()
    assert within_noise(loss, torch.tensor(5e-5).double())
    assert not within_noise(loss, torch.tensor(5e-3).double())


def marks(first: int, last: int, growth: float, steps: int) -> list[int]:
    """The refreshes by the definition: after step `at` the next one is min(last, max(first, growth · at)) later."""
    due, at = [], 0
    while at < steps:
        due.append(at)
        at += min(last, max(first, int(growth * at)))
    return due


def interval(bounds: tuple[int, int], growth: float, step: int, steps: int) -> int:
    """The interval at a step: that of the last refresh up to it."""
    at = max(mark for mark in marks(*bounds, growth, steps + 1000) if mark <= step)
    return min(bounds[1], max(bounds[0], int(growth * at)))


@pytest.mark.parametrize("growth", [0.0, 0.01, 0.1, 0.37, 3.0])
@pytest.mark.parametrize(("update", "invert"), [((2, 10), (4, 20)), ((5, 5), (4, 20)), ((2, 10), (20, 20)),
                                                ((10, 10), (4, 4)), ((3, 7), (8, 1000)), ((1, 1), (3, 5))])  # fmt: skip
def test_intervals_grow_to_their_ceiling_and_inverses_wait_for_statistics(update, invert, growth):
    cadence, steps = Cadence(update, invert, growth), 3000
    statistics = marks(*update, growth, steps + 1000)
    inverses = {min(at for at in statistics if at >= mark) for mark in marks(*invert, growth, steps)}
    # between statistics that are rarer, too
    inverses |= {mark for mark in marks(*invert, growth, steps) if interval(invert, growth, mark, steps)
                 < interval(update, growth, mark, steps)}  # fmt: skip
    assert [at for at in range(steps) if cadence(at).update] == [at for at in statistics if at < steps]
    assert [at for at in range(steps) if cadence(at).invert] == sorted(at for at in inverses if at < steps)


def test_slow_growth_takes_no_time_and_no_memory():
    assert Cadence((2, 10), (4, 20), 1e-12)(10**9 + 3) == (False, False)
    assert Cadence((2, 10), (4, 20), 5e-324)(10**9) == (True, True)
    assert len(Cadence((2, 10), (4, 20), 1e-9)._phases[2, 10]) == 9  # one for each interval from 2 to 10
    assert [step for step in range(30) if Cadence((2, 10), (4, 20), 1e308)(step).update] == [0, 2, 12, 22]


def test_a_fixed_cadence_counts_steps():
    cadence = Cadence.fixed(5, 10)
    assert [step for step in range(21) if cadence(step).update] == [0, 5, 10, 15, 20]
    assert [step for step in range(21) if cadence(step).invert] == [0, 10, 20]
    assert Cadence((3, 3), (6, 6), growth=0.0)(6).invert


@pytest.mark.parametrize("bounds", [(0, 1), (5, 2), (1.5, 3)])
def test_invalid_intervals_raise(bounds):
    with pytest.raises(HyperparameterError, match="update"), as_installed():
        Cadence(update=bounds)
