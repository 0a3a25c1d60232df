"""Operators on nets with parameters that are in no block: unused ones, and those that take the plain gradient."""

import pytest
import torch
from torch.nn import functional as F

import fisherfn as ff
from tests import zoo
from tests.nets import outside
from tests.oracles import close, unvec, vec

METHODS = pytest.mark.parametrize("method", [*ff.METHODS, ff.dense(), ff.kfac("eigen")], ids=str)
LEFT_OUT = pytest.mark.parametrize("left_out", [("idle",), ("scale",), ("idle", "scale")], ids="+".join)
STRUCTURES = pytest.mark.parametrize("structure", ["full", "block"])
DAMPING = 0.3


def model(params, x):
    h = torch.tanh(F.linear(x, params["w"], params["b"]))
    h = h * outside(params["scale"]) if "scale" in params else h
    return F.linear(h, params["v"])


def problem(left_out, method="kfac"):
    """Return a natural gradient, its parameters (some of them in no block) and a batch, with 9 and 2 outputs."""
    shapes = {"idle": (2, 2), "v": (2, 3), "scale": (3,), "w": (3, 4), "b": (3,)}
    rng = zoo.generator(0)
    params = {
        name: torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5
        for name, shape in shapes.items()
        if name in left_out or name in ("v", "w", "b")
    }
    x, y = (torch.randn(9, d, generator=rng, dtype=torch.float64) for d in (4, 2))
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Gaussian(), fisher="type2", method=method, unused="ignore", uncovered="gradient"
    )
    assert {*ng.layout.unused, *dict(ng.layout.uncovered)} == set(left_out)
    return ng, params, (x, y)


def fisher_of_blocks(params, x, left_out, structure):
    """Return the Fisher from one Jacobian per example, with zero rows and columns for parameters in no block."""

    def of_one(one):
        return torch.func.jacrev(lambda p: model(p, one.unsqueeze(0))[0])(params)

    J = torch.cat([leaf.flatten(2) for leaf in torch.func.vmap(of_one)(x).values()], 2)
    dense = torch.einsum("ncp,ncq->pq", J, J) / len(x)
    layer = {"v": 1, "w": 2, "b": 2}
    place = torch.cat([torch.full((p.numel(),), 0 if name in left_out else layer[name]) for name, p in params.items()])
    coupled = (place.unsqueeze(0) == place.unsqueeze(1)) if structure == "block" else torch.ones_like(dense).bool()
    return torch.where(coupled & (place > 0).unsqueeze(0) & (place > 0).unsqueeze(1), dense, 0.0)


def by_columns(product, params):
    eye = torch.eye(len(vec(params)), dtype=torch.float64)
    return torch.stack([vec(product(unvec(params, column))) for column in eye], 1)


@LEFT_OUT
@STRUCTURES
def test_scalars_and_solutions_of_the_fisher_are_those_of_its_matrix(left_out, structure):
    ng, params, batch = problem(left_out)
    F, dense = ng.fisher(ng.stats(params, batch), structure), fisher_of_blocks(params, batch[0], left_out, structure)
    v, eye = zoo.random_tree(params), torch.eye(len(dense), dtype=torch.float64)
    close(F.dense(), dense)
    close(vec(F @ v), dense @ vec(v))
    close(F.diag(), dense.diagonal())
    close(F.trace(), dense.trace())
    close(F.spectrum(), torch.linalg.eigvalsh(dense))
    close(F.logdet(DAMPING), torch.logdet(dense + DAMPING * eye))
    assert F.logdet() == -torch.inf
    close(vec(F.solve(v, DAMPING)), torch.linalg.solve(dense + DAMPING * eye, vec(v)))
    assert vec(F.solve(v, 0.0)).isnan().all()  # F is singular


@METHODS
@LEFT_OUT
def test_scalars_of_a_state_are_those_of_its_matrices(method, left_out):
    ng, params, batch = problem(left_out, method)
    state, _ = ng.update(ng.init(params, damping=DAMPING), ng.stats(params, batch))
    state, info = ng.invert(state)
    ff.check(info)
    approximation, inverse = ng.approximation(state), ng.inverse(state)
    dense, eye = by_columns(lambda v: ng.matvec(state, v), params), torch.eye(len(vec(params)), dtype=torch.float64)
    close(approximation.dense(), dense)
    close(approximation.trace(), dense.trace())
    close(approximation.spectrum(), torch.linalg.eigvalsh(dense))
    close(approximation.logdet(DAMPING), torch.logdet(dense + DAMPING * eye))
    dense = by_columns(lambda v: ng.precondition(state, v), params)
    close(inverse.dense(), dense)
    torch.testing.assert_close(inverse.logdet(), torch.slogdet(dense)[1], rtol=1e-8, atol=1e-8)  # equal infinities too
    assert (inverse.logdet() == -torch.inf) == ("idle" in left_out)  # their steps are zero
