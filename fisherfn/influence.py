r"""Influence functions: the effect of each training example on the loss of a query, to first order.

With the damped Fisher of the training loss as curvature, removing example n from N changes the loss of query q by

$$\Delta \ell_q \approx \tfrac1N\, \nabla \ell_q^\top (F + \lambda I)^{-1} \nabla \ell_n .$$

The inner product is the score of the pair. It needs the preconditioned gradient of every query, and one inner product
with each gradient of a training example, which is computed from the statistics without forming the gradient.

Koh & Liang 2017, *Understanding black-box predictions via influence functions*; Grosse et al. 2023, *Studying large
language model generalization with influence functions* (E-KFAC).

q query, n example.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfn.errors import ShapeError, StructureError, expect
from fisherfn.lowrank import inner_products
from fisherfn.per_example import example_matrices
from fisherfn.stats import Stats
from fisherfn.types import Tree


def example_gradients(stats: Stats) -> Tree:
    """Return the gradient of each example's loss: a tree like params, with the examples as first axis.

    Precondition all of them at once by `torch.vmap(lambda v: ng.precondition(state, v))(gradients)`.

    Raises:
        StructureError: some parameters are in no block, so their gradients per example were not collected.
    """
    expect(stats, Stats, "stats", "pass what ng.stats(params, batch) returned")
    _check_covered(stats)
    keys = [block.key for block in stats.layout.blocks]
    matrices = {key: example_matrices(stats.lazy_loss_tap(key).precise()).squeeze(0) for key in keys}
    trees: Tree = torch.vmap(stats.layout.tree)(matrices)
    return stats.layout.cast(trees)


def influence_scores(stats: Stats, directions: Tree) -> Float[Tensor, "q n"]:
    r"""Return the inner products $\langle v_q, \nabla \ell_n \rangle$ of directions with the examples' gradients.

    With preconditioned gradients of queries as directions, these are the influence scores.

    Args:
        stats: statistics of training examples; `curvature=False` is enough.
        directions: a tree like params, with the queries as first axis.

    Raises:
        StructureError: names that differ from the parameters, a value that is no tensor, or parameters in no block.
        ShapeError: shapes that differ from the parameters', or no axis of queries.
    """
    expect(stats, Stats, "stats", "pass what ng.stats(params, batch) returned")
    _check_covered(stats)
    layout = stats.layout
    taps = {block.key: stats.lazy_loss_tap(block.key).precise() for block in layout.blocks}

    def of_one(v: Tree) -> Float[Tensor, " n"]:
        parts = [inner_products(taps[key], V.to(taps[key].dtype)) for key, V in layout.matrices(v).items()]
        return torch.stack(parts).sum((0, 1))

    if not isinstance(directions, dict) or directions.keys() != set(layout.names):
        raise StructureError(f"directions must be a tree like params, with {', '.join(map(repr, layout.names))}.")
    for name, v in directions.items():
        expect(v, Tensor, f"the directions of {name!r}", "pass a tensor [Q, …], with the queries as first axis")
    found = {name: v.shape for name, v in directions.items()}
    queries = next(iter(found.values()))[:1]
    wrong = [name for name, shape in layout.shapes if found[name] != (*queries, *shape)]
    if wrong:
        raise ShapeError(
            f"the directions of {wrong[0]!r} have shape {list(found[wrong[0]])}, expected [Q, …] like params with one "
            "number Q of queries for all: one query is v.unsqueeze(0)."
        )
    scores: Tensor = torch.vmap(of_one)(directions)
    return scores


def _check_covered(stats: Stats) -> None:
    if stats.plain:
        names = ", ".join(map(repr, stats.plain))
        raise StructureError(f'no gradients per example of {names}: build with uncovered="fallback".')
