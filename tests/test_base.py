"""Methods inherit defaults that equal their own cheaper ways; they are dataclasses that are copied and compared."""

import copy
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch.utils import _pytree as pytree

import fisherfn as ff
from fisherfn.base import LayerMethod, factorwise
from fisherfn.taps import ChunkedTap
from fisherfn.types import Shape
from tests import drawn
from tests.methods.protocol import METHODS
from tests.oracles import close

ONE = torch.ones((), dtype=torch.float64)
DEFAULTS = ("apply_tap", "overlap_block", "trace_block", "eigenvalues_block", "logdet_block")
OVERRIDING = {
    "kfac": ff.kfac(),
    "kfac, eigen": ff.kfac("eigen"),
    "kfac, reduce": ff.kfac(sharing="reduce"),
    "kfac, narrow": ff.kfac(diagonal_above=3),
    "ekfac": ff.ekfac(),
    "ekfac, eigen": ff.ekfac("eigen"),
    "kpsvd": ff.kpsvd(),
    "lanczos": ff.lanczos(),
    "kfac_cor, eigen": ff.kfac_corrected("eigen"),
}
EVERY = pytest.mark.parametrize("method", OVERRIDING.values(), ids=OVERRIDING)


def with_defaults(method):
    """Return the method with the functions of `LayerMethod` in the place of its own cheaper ones."""
    own = {name: getattr(LayerMethod, name) for name in DEFAULTS}
    plain = type(f"Plain{type(method).__name__}", (type(method),), own)
    return plain(**{field.name: getattr(method, field.name) for field in fields(method)})


def taps(examples=5):
    """Two layers: groups, and one-hot rows at several positions."""
    return {
        "groups": drawn.tap("dense", (2, 2, examples, 1, 3, 4))[0],
        "words": drawn.tap("one-hot", (1, 2, examples, 3, 2, 5), 3)[0],
    }


def losses(examples=4):
    return {
        "groups": drawn.tap("dense", (2, 1, examples, 1, 3, 4), 8)[0],
        "words": drawn.tap("one-hot", (1, 1, examples, 3, 2, 5), 9)[0],
    }


def shapes_of(taps):
    return {key: Shape(tap.sizes.k, tap.sizes.o, tap.sizes.i, tap.one_hot) for key, tap in taps.items()}


def fitted(method, given=None):
    """Return factors and inverses after one update, and the shapes of the blocks."""
    given = given or taps()
    shapes = shapes_of(given)
    empty, _ = method.init(shapes, ONE.dtype, ONE.device, 0.1 * ONE)
    factors, ok, _ = method.update(empty, given, 0 * ONE)
    inverses, also, _ = method.invert(factors, 0.1 * ONE)
    assert all((*ok.values(), *also.values()))
    return factors, inverses, shapes


def same(found, expected, tol=1e-9):
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        close(a, b, tol)


# ---------------------------------------------------------------------------------------------------- the defaults


@EVERY
def test_defaults_equal_what_a_method_overrides(method):
    plain = with_defaults(method)
    factors, inverses, shapes = fitted(method)
    same(plain.overlap(factors, taps(7)), method.overlap(factors, taps(7)))
    close(plain.trace(factors, shapes), method.trace(factors, shapes))
    spectra = [each.eigenvalues(factors, shapes).sort().values for each in (plain, method)]
    close(*spectra, tol=1e-7)
    close(plain.logdet(inverses, shapes), method.logdet(inverses, shapes))
    given = losses()
    for inner in (False, True):
        same(plain.precondition(inverses, given, inner), method.precondition(inverses, given, inner))


@EVERY
def test_numbers_are_those_of_the_dense_operators(method):
    """Trace, eigenvalues and determinants over blocks and groups, from products with unit matrices."""
    factors, inverses, shapes = fitted(method)

    def dense(product):
        return [
            torch.stack([product(key, unit.reshape(1, *shape[1:3]).expand(*shape[:3])).flatten(1) for unit in units], 1)
            for key, shape in shapes.items()
            for units in [torch.eye(shape.o * shape.i).double()]
        ]

    forward = [m for each in dense(lambda key, W: method.matvec_block(factors[key], W)) for m in each]
    back = [m for each in dense(lambda key, W: method.apply(inverses[key], W)) for m in each]
    W = {key: drawn.normal(*shape[:3]) for key, shape in shapes.items()}
    products = torch.cat([each.flatten() for each in method.matvec(factors, W).values()])
    close(products, torch.block_diag(*forward) @ torch.cat([each.flatten() for each in W.values()]))
    close(method.trace(factors, shapes), sum(m.trace() for m in forward))
    spectrum = torch.cat([torch.linalg.eigvalsh(m) for m in forward]).sort().values
    close(method.eigenvalues(factors, shapes).sort().values, spectrum)
    close(method.logdet(inverses, shapes), sum(torch.linalg.slogdet(m).logabsdet for m in back))


@EVERY
def test_an_update_of_nothing_is_the_estimate_of_one_batch(method):
    """With no weight on the old factors, `update_block` and `update_blocks` are `estimate`."""
    given = taps()
    empty, _ = method.init(shapes_of(given), ONE.dtype, ONE.device, ONE)
    updated, _, _ = method.update(empty, given, 0 * ONE)
    for key, tap in given.items():
        expected = method.blend(empty[key], method.estimate(tap, empty[key]), 0 * ONE)
        same(updated[key], expected)
        same(LayerMethod.update_block(method, empty[key], tap, 0 * ONE, True)[0], expected)
        same(list(LayerMethod.update_blocks(method, empty, {key: tap}, {key: 0 * ONE}, True))[0][1], expected)


def test_the_default_average_is_factor_by_factor():
    old, new = {"s": torch.tensor([1.0, 2.0])}, {"s": torch.tensor([5.0, 4.0])}
    close(factorwise(old, new, torch.tensor(0.75))["s"], torch.tensor([2.0, 2.5]))
    close(LayerMethod.blend(ff.kfac(), old, new, torch.tensor(0.75))["s"], torch.tensor([2.0, 2.5]))


@EVERY
def test_matrices_and_rows_in_one_call_share_the_inner_product(method):
    _, inverses, _ = fitted(method)
    given = losses()
    mixed = {"groups": given["groups"].mean_gradient(), "words": given["words"]}
    same(method.precondition(inverses, mixed, True), method.precondition(inverses, given, True))
    found = method.precondition(inverses, mixed, True)
    products = {key: (given[key].mean_gradient() * nat).sum() for key, nat in found.matrices.items()}
    close(found.inner, sum(products.values()))
    assert method.precondition(inverses, mixed, False).inner == ()


def test_a_block_too_large_to_be_dense_is_refused():
    plain = with_defaults(ff.kfac())
    factors, _, _ = fitted(plain)
    with pytest.raises(ff.errors.TooLargeError, match="a layer's block"):
        plain.trace_block(factors["groups"], Shape(2, 100, 100))


@METHODS
def test_a_batch_that_is_not_finite_is_a_mask_of_its_block(method):
    given, made = taps(), ff.METHODS[method]()
    given["words"].g[0, 0, 1, 0, 0] = torch.nan
    empty, _ = made.init(shapes_of(given), ONE.dtype, ONE.device, ONE)
    for inverting in (False, True):
        ok = made.update(empty, given, 0 * ONE, inverting).ok
        assert bool(ok["groups"]) and not bool(ok["words"])
        assert list(ok) == list(given)


@EVERY
def test_chunks_are_the_whole(method):
    whole, chunked = fitted(method), fitted(method, {key: ChunkedTap(tap, 2) for key, tap in taps().items()})
    same(method.precondition(chunked[1], losses(), True), method.precondition(whole[1], losses(), True), tol=1e-6)


# ---------------------------------------------------------------------------------------------- methods as objects


@METHODS
def test_a_method_is_copied_pickled_and_compared_by_its_hyperparameters(method):
    made = ff.METHODS[method]()
    for other in (copy.deepcopy(made), copy.copy(made), pickle.loads(pickle.dumps(made)), ff.METHODS[method]()):
        assert other == made and hash(other) == hash(made) and repr(other) == repr(made)
    assert made.name == method


@METHODS
def test_another_hyperparameter_is_another_method_that_is_checked_again(method):
    made = ff.METHODS[method]()
    other = replace(made, **ANOTHER[method])
    assert other != made and len({made, other, copy.deepcopy(other)}) == 2
    (name, _), *_ = ANOTHER[method].items()
    with pytest.raises((ff.errors.UnknownNameError, ff.errors.HyperparameterError)):
        replace(made, **{name: REFUSED[name]})
    with pytest.raises(FrozenInstanceError):
        setattr(made, name, ANOTHER[method][name])


ANOTHER = {
    "kfac": {"sharing": "reduce"},
    "ekfac": {"damping_form": "eigen"},
    "kpsvd": {"iterations": 7},
    "deflation": {"floor": 0.5},
    "kfac_cor": {"diagonal_above": 3},
    "lanczos": {"damping_form": "eigen"},
    "kl_optimal": {"relative_damping": 0.5},
    "twolevel_kfac": {"coarse": "spectral"},
    "exactNG": {"structure": "block"},
}
REFUSED = {
    "sharing": "none",
    "damping_form": "none",
    "iterations": 0,
    "relative_damping": 0.0,
    "floor": 0.0,
    "diagonal_above": -1,
    "coarse": "none",
    "structure": "none",
}


@METHODS
def test_kinds_of_inverse_are_true(method):
    assert ff.METHODS[method]().inverse_kind == ("general" if method == "twolevel_kfac" else "symmetric")
