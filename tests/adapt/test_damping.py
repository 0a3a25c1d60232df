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
    assert within_noise(loss, torch.tensor(5e-5).double(), torch.float32)
    assert not within_noise(loss, torch.tensor(5e-3).double(), torch.float32)


def test_intervals_grow_to_their_ceiling_and_stay():
    cadence = Cadence((2, 10), (4, 20), 0.1)
    for name, ceiling in (("update", 10), ("invert", 20)):
        due = [step for step in range(2000) if getattr(cadence(step), name)]
        gaps = [b - a for a, b in zip(due, due[1:], strict=False)]
        assert due[0] == 0 and gaps == sorted(gaps) and gaps[-1] == ceiling
        assert all(gap <= max(0.1 * at, gaps[0]) for at, gap in zip(due, gaps, strict=False))


def test_a_fixed_cadence_counts_steps():
    cadence = Cadence.fixed(5, 10)
    assert [step for step in range(21) if cadence(step).update] == [0, 5, 10, 15, 20]
    assert [step for step in range(21) if cadence(step).invert] == [0, 10, 20]
    assert Cadence((3, 3), (6, 6), growth=0.0)(6).invert


@pytest.mark.parametrize("bounds", [(0, 1), (5, 2), (1.5, 3)])
def test_invalid_intervals_raise(bounds):
    with pytest.raises(HyperparameterError, match="update"), as_installed():
        Cadence(update=bounds)
