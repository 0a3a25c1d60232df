"""Blocks that are iterated on together: each gets what it gets alone, and NaN in one block stays there."""

import pytest
import torch
from torch.utils import _pytree as pytree

from fisherfn import rearrangement
from fisherfn.taps import ChunkedTap, Tap
from fisherfn.types import Shape
from tests.drawn import TOGETHER
from tests.methods.kronecker import ITERATIVE, TIGHT, as_installed, taps_of  # noqa: F401
from tests.oracles import close

EVERY = pytest.mark.parametrize("method", ITERATIVE)


def drawn():
    """A tap of each size."""
    return {key: Tap(*taps_of(sizes, seed)) for seed, (key, sizes) in enumerate(TOGETHER.items())}


def updated(method, taps, before=None, rho=0.0):
    """The result of one update."""
    shapes = {key: Shape(tap.sizes.k, tap.sizes.o, tap.sizes.i) for key, tap in taps.items()}
    one = torch.ones((), dtype=torch.float64)
    empty, _ = method.init(shapes, one.dtype, one.device, one)
    return method.update(before or empty, taps, rho * one)


def same(found, expected, tol=1e-9):
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        close(a, b, tol)


@EVERY
def test_each_block_gets_what_it_gets_alone(monkeypatch, method):
    taps, make = drawn(), ITERATIVE[method](iterations=2)
    other = {key: Tap(tap.a.flip(1), tap.g) for key, tap in taps.items()}
    old = updated(make, taps).factors
    together = updated(make, other, old, 0.5)
    monkeypatch.setattr(rearrangement, "JOINED", 0)
    alone = updated(make, other, old, 0.5)
    assert list(together.factors) == list(taps), "the order of blocks is part of the state's structure"
    same(together.factors, alone.factors)
    for name, residuals in alone.diagnostics.items():
        assert residuals["linear"] > 1e-4, "converged: what is compared is rounding"
        close(together.diagnostics[name], residuals, tol=1e-6)


@EVERY
def test_a_block_that_is_not_finite_spoils_no_other(method):
    taps, make = drawn(), ITERATIVE[method]()
    a, g = taps["groups"]
    bad = updated(make, {**taps, "groups": Tap(a, g.where(torch.arange(g.shape[-1]) > 0, torch.nan))})
    assert {key: bool(ok) for key, ok in bad.ok.items()} == {key: key != "groups" for key in taps}
    clean = updated(make, taps).factors
    for key in taps.keys() - {"groups"}:
        same(bad.factors[key], clean[key])


@EVERY
def test_chunks_are_iterated_on_block_by_block_and_give_the_same(method):
    """Where examples cannot meet there are no Gram matrices: another route to the same triplets."""
    taps, make = {key: drawn()[key] for key in ("linear", "wide")}, ITERATIVE[method](iterations=TIGHT)
    chunks = {key: ChunkedTap(tap, 3) for key, tap in taps.items()}
    same(updated(make, taps).factors, updated(make, chunks).factors, tol=1e-6)
