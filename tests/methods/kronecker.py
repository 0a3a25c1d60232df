"""Common parts of the tests of Kronecker approximations: hand-made statistics, and results as dense blocks.

`given` makes a problem out of any inputs and output-gradients, through the public interface: one layer without bias,
and a likelihood whose gradient in the outputs is its target.
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

import fisherfn as ff
from fisherfn import rows
from tests import kron_oracles, zoo
from tests.zoo import Sampled

TIGHT = 10
"""Number of iterations: the dimension of the symmetric factors in most of these tests, enough to converge."""

# Built once each: at every call, run-time type checks would make a builder's inner functions anew.
ITERATIVE = {
    "kpsvd": cache(ff.kpsvd),
    "deflation": cache(ff.deflation),
    "lanczos": cache(ff.lanczos),
    "kfac_cor": cache(ff.kfac_corrected),
}
TWO_TERMS = {name: ITERATIVE[name] for name in ("deflation", "lanczos", "kfac_cor")}
FAMILY = {"kfac": cache(ff.kfac), **ITERATIVE, "ekfac": cache(ff.ekfac)}


def drawn(share, *strategies, **named):
    """Hypothesis for tests of many methods: a share of the profile's examples."""
    examples = max(1, int(settings().max_examples * share))
    return lambda test: settings(max_examples=examples)(given_by(*strategies, **named)(test))


@pytest.fixture(autouse=True)
def as_installed():
    """Turn off run-time type checks in the importing modules, where they take nine tenths of the time."""
    with zoo.as_installed():
        yield


# ------------------------------------------------------------------------------------------- statistics by hand


class Linear:
    """An NLL linear in the outputs: its gradient is the target, and a draw's is the noise."""

    def nll(self, outputs, targets):
        return (outputs * targets).flatten(1).sum(1)

    def sample(self, outputs, noise):
        return noise


@dataclass(frozen=True)
class Given:
    """A `Problem`-like: one layer, its matrices in `params["weight"]`."""

    params: dict
    run: Sampled

    def stats(self, a, g):
        """The statistics of another batch, of any size."""
        x, noise = raw(a, g)
        return self.run.ng.stats(self.params, (x, noise[:, 0]), noise=noise, samples=noise.shape[1])


def raw(a, g):
    """`[N, K·i, T]` and `[N, S, K·o, T]` of `a [K, N, T, i]` and `g [K, S, N, T, o]`."""
    x, y = a.permute(1, 0, 3, 2).flatten(1, 2), g.permute(2, 1, 0, 4, 3).flatten(2, 3)
    return x, y * g.shape[1] ** 0.5  # a draw counts as 1/S


def given(a, g, method=None):
    """A layer that sees these inputs and output-gradients: K groups of a 1×1 convolution, or a linear layer."""
    x, noise = raw(a, g)
    params, ng = layer(len(a), g.shape[-1], a.shape[-1], x.shape[-1], noise.shape[1])
    ng = replace(ng, method=method or FAMILY["kfac"]())
    problem = Given(params, Sampled(ng, None, noise, None))
    return replace(problem, run=replace(problem.run, stats=problem.stats(a, g)))


@cache
def layer(groups, o, i, positions, samples):
    """Its parameters, and a build."""

    def model(params, x):
        if groups == 1:
            return F.linear(x.mT, params["weight"]).mT
        return F.conv1d(x, params["weight"], groups=groups)

    shape, x = (o, i) if groups == 1 else (groups * o, i, 1), normal(2, groups * i, positions)
    params = {"weight": normal(*shape)}
    ng = ff.natural_gradient(model, params, x, likelihood=Linear(), samples=samples)
    assert not ng.layout.fallbacks
    return params, ng


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=zoo.generator(seed), dtype=torch.float64)


def taps_of(sizes, seed=0, relu=True):
    """Inputs as after a ReLU, and output-gradients whose size depends on them: far from one Kronecker product."""
    k, s, n, t, o, i = sizes
    a, g = normal(k, n, t, i, seed=seed), normal(k, s, n, t, o, seed=seed + 1)
    return (a.clamp(min=0), g * (1 + 3 * a.clamp(min=0)[:, None, ..., :1])) if relu else (a, g)


@st.composite
def drawn_taps(draw, groups=2, draws=2, examples=4, positions=2, width=3):
    """Taps of small drawn sizes `[K, N, T, i]`, `[K, S, N, T, o]`."""
    limits = (groups, draws, examples, positions, width, width)
    return taps_of([draw(st.integers(1, limit)) for limit in limits], draw(st.integers(0, 1000)))


# ------------------------------------------------------------------------------------------------ dense blocks


def dense_taps(stats):
    """{key: (a [K, N, T, i], g [K, S, N, T, o])}."""
    return {key: (rows.dense(tap.a), tap.g) for key, tap in stats.taps.items()}


def blocks(stats):
    """{key: F [K, o·i, o·i]}, the sampled Fisher of each layer, group by group, by definition."""
    taps = dense_taps(stats)
    return {
        key: torch.stack([kron_oracles.block(*one) for one in zip(a, g, strict=True)]) for key, (a, g) in taps.items()
    }


def pairs_of(factors):
    """The Kronecker products that a block's factors stand for, the leading one first: [(A [K, …], G [K, …])]."""
    terms = (factors.first, factors.second) if hasattr(factors, "first") else (factors,)
    return [(term.A, term.G) for term in terms]


def dense(factors):
    """F̂ [K, o·i, o·i] of one block."""
    if hasattr(factors, "scale"):
        return torch.stack([_rotated(*one) for one in zip(factors.QA, factors.QG, factors.scale, strict=True)])
    pairs = pairs_of(factors)
    groups = [[(A[k], G[k]) for A, G in pairs] for k in range(len(pairs[0][0]))]
    return torch.stack([kron_oracles.kron_sum(*group) for group in groups])


def _rotated(QA, QG, scale):
    Q = torch.kron(kron_oracles.matrix(QG).contiguous(), kron_oracles.matrix(QA).contiguous())
    return (Q * scale.reshape(-1)) @ Q.T


def sizes_of(factors, F):
    """(o, i) of a block."""
    A, _ = pairs_of(factors)[0]
    return F.shape[-1] // A.shape[-1], A.shape[-1]


def kinds_of(factors):
    """Between which kinds of input and output factors the block's fit is best."""
    A, G = pairs_of(factors)[0]
    return tuple("diagonal" if x.ndim == 2 else "symmetric" for x in (A, G))


def norm(blocks_k):
    return blocks_k.square().sum().sqrt()


def optimum(F_k, factors, rank):
    """Least error of one block over all groups."""
    sizes, kinds = sizes_of(factors, F_k), kinds_of(factors)
    return torch.stack([kron_oracles.optimum(F, *sizes, rank, *kinds) for F in F_k]).norm()


# ----------------------------------------------------------------------------------------------- fitted methods


def fit(run, params, method, **hyper):
    """(ng, state, info) of one update with another method on the same statistics."""
    ng = replace(run.ng, method=method)
    state, info = ng.update(ng.init(params, **hyper), run.stats)
    assert all(info.ok.values())
    return ng, state, info


def solved(ng, state, params, v):
    """(matrices of v, matrices of the preconditioned v, info of the inversion), by block key."""
    state, info = ng.invert(state)
    assert all(info.ok.values())
    return ng.layout.matrices(v), ng.layout.matrices(ng.precondition(state, v)), info


def solve(dense_k, V):
    """dense⁻¹ vec(V), group by group."""
    rows_k = zip(dense_k, V, strict=True)
    return torch.stack([torch.linalg.solve(M, W.reshape(-1)).reshape(W.shape) for M, W in rows_k])
