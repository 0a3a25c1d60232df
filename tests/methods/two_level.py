"""Two-level methods by dense matrices, from their definitions: vectors and matrices over all parameters, params order.

F by brute force, M from the fine method on its own, column by column. A coarse space enters as any rows that span it:
Q = R₀ᵀ (R₀ F_• R₀ᵀ)⁻¹ R₀ does not depend on their scale, so λ must enter F_c as λ R₀ R₀ᵀ.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import fisherfn as ff
from tests import oracles, strategies, zoo
from tests.oracles import unvec, vec

COARSE = ("nicolaides", "residual", "spectral")
"""The spaces that have every form."""

FORMS = ("multiplicative", "balanced", "additive")
FINE = {
    "kfac": ff.kfac(),
    "kfac-eigen": ff.kfac(damping_form="eigen"),
    "ekfac": ff.ekfac(),
    "kpsvd": ff.kpsvd(),
    "lanczos": ff.lanczos(),
    "kfac_cor": ff.kfac_corrected(damping_form="eigen"),
}


@cache
def method(fine, *args, **kwargs):
    """Two-level over a fine method by name."""
    return ff.two_level(FINE[fine], *args, **kwargs)


@dataclass(frozen=True)
class Case:
    """A problem, its statistics, and those before them; λ and a fine method."""

    problem: Any
    run: Any
    F: torch.Tensor
    fine: str = "kfac"
    damping: float = 0.1
    earlier: tuple = ()

    def updated(self, method):
        """(ng, state) before the inversion."""
        ng = replace(self.run.ng, method=method)
        state = ng.init(self.problem.params, damping=self.damping, ema=0.5)
        for stats in (*self.earlier, self.run.stats):
            state, info = ng.update(state, stats)
            assert all(info.ok.values())
        return ng, state

    @cached_property
    def state(self):
        """Return factors, which are the same for all spaces except tselepidis."""
        return self.updated(method(self.fine))[1]

    def two_level(self, *args, **kwargs):
        """(ng, state) after the inversion."""
        chosen = method(self.fine, *args, **kwargs)
        published = "tselepidis" in (*args, *kwargs.values()) or "tpselepedis" in args
        state = self.updated(chosen)[1] if published else self.state
        return inverted(replace(self.run.ng, method=chosen), state)

    def step(self, v, *args, **kwargs):
        ng, state = self.two_level(*args, **kwargs)
        return vec(ng.precondition(state, unvec(self.problem.params, v)))

    @property
    def v(self):
        return vec(self.v_tree)

    @property
    def v_tree(self):
        return zoo.random_tree(self.problem.params)

    @property
    def damped(self):
        return self.F + self.damping * torch.eye(len(self.F), dtype=self.F.dtype)

    @cached_property
    def M(self):
        return operator(*inverted(*self.updated(FINE[self.fine])), self.problem.params)

    @property
    def exact(self):
        return torch.linalg.solve(self.damped, self.v)

    def layers(self, vector):
        """The part of each layer, a row each."""
        names = self.problem.blocks.values()
        masks = [oracles.positions(self.problem.params, block) for block in names]
        return torch.stack([torch.zeros_like(vector).index_copy(0, at, vector[at]) for at in masks])

    def rows(self, coarse, krylov=False, v=None):
        """Rows that span the space, as their definitions are written, not normalised."""
        v = self.v if v is None else v
        if coarse == "residual":
            first = self.layers(self.M @ (v - self.damped @ (self.M @ v)))
        elif coarse == "spectral":
            first = rows_of(*self.two_level("spectral"))
        else:
            first = self.layers(torch.ones_like(v))
        return torch.cat([first, first @ self.M.T]) if krylov else first


def inverted(ng, state):
    """Invert like `ng.invert`, but from a state of any space."""
    result = ng.method.invert(state.factors, state.damping)
    assert all(result.ok.values())
    return ng, state._replace(inverses=result.factors)


def case(problem, fine="kfac", fisher="mc", damping=0.1):
    run = zoo.sampled(problem, fisher)
    return Case(problem, run, oracles.fisher_matrix(problem, fisher, run.draws), fine, damping)


def full_rank(**kwargs):
    """Two layers, every Kronecker factor of full rank: eigenvectors that the matrix determines."""
    return case(zoo.from_net(zoo.mlp(2, 3, 2), (8, 2), "gaussian-0.3"), **kwargs)


def operator(ng, state, params):
    """The matrix of `ng.precondition`."""
    eye = torch.eye(sum(leaf.numel() for leaf in params.values()), dtype=torch.float64)
    return torch.vmap(lambda e: vec(ng.precondition(state, unvec(params, e))))(eye).T


def rows_of(ng, state):
    """The rows that a state holds, layer after layer."""
    shapes = {block.key: block.shape for block in ng.layout.blocks}
    zeros = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    rows = state.inverses.space.rows
    return torch.stack(
        [vec(ng.layout.tree({**zeros, key: row.reshape(shapes[key])})) for key, R in rows.items() for row in R]
    )


# --------------------------------------------------------------------------------------------------- definitions


def singular(rows):
    """Singular values and right vectors of the rows at unit length."""
    rows = rows[rows.norm(dim=1) > 0]
    _, values, vectors = torch.linalg.svd(rows / rows.norm(dim=1, keepdim=True), full_matrices=False)
    return values, vectors


def span(rows):
    """An orthonormal basis of what they span; a row that nearly depends on the others adds nothing."""
    values, vectors = singular(rows)
    return vectors[values > 1e-5]


def doubtful(rows):
    """Whether a row nearly depends on the others, so that rounding decides."""
    values, _ = singular(rows)
    return bool(((values > 1e-8) & (values < 1e-4)).any())


def coarse_inverse(rows, damped):
    """Q."""
    V = span(rows)
    return V.T @ torch.linalg.solve(V @ damped @ V.T, V)


def combined(form, M, damped, Q):
    """The operator of a fixed space."""
    P = torch.eye(len(M), dtype=M.dtype) - Q @ damped
    return {"multiplicative": P @ M + Q, "balanced": Q + P @ M @ P.T, "additive": M + Q}[form]


# ------------------------------------------------------------------------------------------------------- drawn nets


@st.composite
def mixed(draw):
    """A convolution, ordinary or transposed, and a linear layer on all that it puts out."""
    layer, shape = draw(strategies.convolutions(1) | strategies.transposed_convolutions(1))
    net = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(torch.zeros(1, *shape)).numel(), 2))
    likelihood = draw(st.sampled_from(strategies.LIKELIHOODS))
    return zoo.from_net(net, (draw(st.integers(1, 3)), *shape), likelihood, seed=draw(st.integers(0, 1000)))


NETS = strategies.problems() | mixed() | strategies.read_out(strategies.convolutions(2)) | strategies.embeddings()


def settings(nets=NETS):
    """The arguments of `case`."""
    return st.tuples(nets, st.sampled_from(sorted(FINE)), strategies.fishers(), st.sampled_from([0.01, 0.1, 10.0]))
