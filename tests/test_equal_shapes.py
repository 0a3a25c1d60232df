"""Blocks of equal shapes are inverted together: each ends as it does alone, whatever the others contain."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fisherfn as ff
from fisherfn import equal_shapes, tree
from fisherfn.errors import NotPositiveDefiniteError
from fisherfn.methods.dense import dense
from fisherfn.methods.kfac_by_term import kfac_by_term
from fisherfn.types import Shape
from tests import drawn, zoo

LAYERED = {
    **{name: make for name, make in ff.METHODS.items() if name not in ("exactNG", "twolevel_kfac")},
    "dense": dense,
    "kfac_by_term": kfac_by_term,
    "eigen": lambda: ff.kfac("eigen"),
    "lanczos, eigen": lambda: ff.lanczos("eigen"),
    "narrow": lambda: ff.kfac(diagonal_above=2),
}
DAMPING = torch.tensor(0.1, dtype=torch.float64)


def updated(method, examples=5):
    """Return factors of five blocks: three of one shape with two groups, one of another, and one with words."""
    taps = {name: drawn.tap("dense", (2, 2, examples, 1, 3, 4), seed)[0] for seed, name in enumerate("acd")}
    taps = {"a": taps["a"], "b": drawn.tap("dense", (2, 2, examples, 1, 4, 3), 7)[0], "c": taps["c"], "d": taps["d"]}
    taps["words"] = drawn.tap("one-hot", (1, 2, examples, 3, 2, 5), 3)[0]
    shapes = {key: Shape(tap.sizes.k, tap.sizes.o, tap.sizes.i, tap.one_hot) for key, tap in taps.items()}
    empty, _ = method.init(shapes, torch.float64, torch.device("cpu"), DAMPING)
    return method.update(empty, taps, 0 * DAMPING).factors


def alone(method, factors):
    """Return the results of inverting one block at a time."""
    return {key: method.invert({key: block}, DAMPING) for key, block in factors.items()}


def check(found, expected, keys):
    for key in keys:
        one = expected[key]
        torch.testing.assert_close(found.factors[key], one.factors[key], rtol=1e-12, atol=1e-12)
        assert found.ok[key].shape == () and found.ok[key] == one.ok[key]
        for name, values in one.diagnostics.items():
            assert found.diagnostics[name][key].shape == ()
            torch.testing.assert_close(found.diagnostics[name][key], values[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERED)
def test_each_block_is_inverted_as_it_is_alone(name):
    method = LAYERED[name]()
    factors = updated(method)
    found = method.invert(factors, DAMPING)
    assert list(found.factors) == list(found.ok) == list(factors)
    check(found, alone(method, factors), factors)
    assert all(list(of_block) == list(factors) for of_block in found.diagnostics.values())


@pytest.mark.parametrize("name", LAYERED)
def test_a_block_that_is_not_finite_leaves_the_others_as_they_are(name):
    method = LAYERED[name]()
    factors = updated(method)
    broken = factors | {"c": tree.map(lambda leaf: leaf * torch.nan, factors["c"])}
    found = method.invert(broken, DAMPING)
    assert [key for key in factors if not found.ok[key]] == ["c"]
    check(found, alone(method, factors), [key for key in factors if key != "c"])


@pytest.mark.parametrize("name", ["kfac", "lanczos"])
def test_a_factor_that_is_not_positive_definite_leaves_the_others_as_they_are(name):
    method = LAYERED[name]()
    factors = updated(method)
    broken = factors | {"c": tree.map(torch.neg, factors["c"])}
    found = method.invert(broken, DAMPING)
    assert [key for key in factors if not found.ok[key]] == ["c"]
    check(found, alone(method, factors), [key for key in factors if key != "c"])


def test_a_step_names_the_only_bad_block_among_equal_ones():
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4))).double()
    model, params, context = ff.functional(net)
    batch = (torch.randn(5, 3, generator=zoo.generator(0)).double(), torch.zeros(5, 3).double())
    ng = ff.natural_gradient(model, params, batch[0], likelihood=ff.Gaussian(), context=context)
    state = ng.init(params, damping=0.1)
    keys = list(state.factors)
    bad = state._replace(factors=state.factors | {keys[2]: tree.map(lambda x: x - 1, state.factors[keys[2]])})
    _, info = ng.invert(bad)
    assert [key for key in keys if not info.ok[key]] == [keys[2]]
    with pytest.raises(NotPositiveDefiniteError, match=keys[2]):
        ff.check(info)


class Calls(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def factorisations(method, widths, members=None):
    shapes = {str(n): Shape(1, o, i) for n, (o, i) in enumerate(widths)}
    factors, _ = method.init(shapes, torch.float32, torch.device("cpu"), torch.tensor(0.1))
    with Calls() as calls:
        if members is None:
            method.invert(factors, torch.tensor(0.1))
        else:
            group = ff.members.repeat(factors, members)
            torch.vmap(method.invert)(group, torch.full((members,), 0.1))
    return calls.names.count("linalg_cholesky_ex")


@pytest.mark.parametrize("members", [None, 4])
def test_equal_layers_take_one_factorisation_per_side(members):
    assert factorisations(ff.kfac(), [(8, 9)] * 12, members) == 2
    assert factorisations(ff.kfac(), [(8, 9), (9, 8), (8, 9)], members) == 4
    assert factorisations(ff.lanczos(), [(3, 2)] * 5, members) == 2


def test_wide_layers_are_inverted_one_by_one():
    method = ff.kfac()
    assert factorisations(method, [(method.joined_up_to, 2)] * 3) == 2
    assert factorisations(method, [(method.joined_up_to + 1, 2)] * 3) == 6


def test_blocks_of_other_types_are_not_joined():
    blocks = {"a": torch.ones(1, 2), "b": torch.ones(1, 2).double(), "c": torch.ones(2, 2), "d": torch.ones(1, 2)}
    assert equal_shapes.sort(blocks, 2) == [["a", "d"], ["b"], ["c"]]
    assert equal_shapes.sort(blocks, 1) == [["a"], ["b"], ["c"], ["d"]]


def test_counts_are_added_over_groups_and_of_numbers_the_largest_counts():
    assert torch.stack(equal_shapes.summary(torch.tensor([1, 2, 3, 4]), 2)).tolist() == [3, 7]
    assert torch.stack(equal_shapes.summary(torch.tensor([1.0, 2.0, 4.0, 3.0]), 2)).tolist() == [2, 4]


def test_ekfac_finds_the_eigenvectors_of_equal_layers_together_and_each_as_alone():
    method, rho = ff.ekfac(), torch.tensor(0.3, dtype=torch.float64)
    taps = {name: drawn.tap("dense", (2, 2, 5, 1, 3, 4), seed)[0] for seed, name in enumerate("abcd")}
    more = {name: drawn.tap("dense", (2, 2, 5, 1, 3, 4), seed + 9)[0] for seed, name in enumerate("abcd")}
    empty, _ = method.init(dict.fromkeys(taps, Shape(2, 3, 4)), torch.float64, torch.device("cpu"), DAMPING)
    once = method.update(empty, taps, 0 * rho).factors
    with Calls() as calls:
        found = method.update(once, more, rho, frozenset("abd")).factors
    assert calls.names.count("_linalg_eigh") == 2
    assert found["c"].QA is once["c"].QA
    for key in taps:
        one = method.update({key: once[key]}, {key: more[key]}, rho, key != "c").factors[key]
        torch.testing.assert_close(found[key], one, rtol=1e-12, atol=1e-12)
    between = method.between_passes(found)
    torch.testing.assert_close(between["c"], method.between_passes({"c": found["c"]})["c"], rtol=1e-12, atol=1e-12)


def test_an_inverse_of_ekfac_shares_its_basis_with_the_factors():
    method = ff.ekfac()
    factors = updated(method)
    assert method.invert(factors, DAMPING).factors["c"].QA is factors["c"].QA
    assert replace(method) == method
