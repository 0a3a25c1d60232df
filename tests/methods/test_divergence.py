"""`ng.fisher_divergence` against the divergence of dense normal distributions."""

import pytest
import torch

import fisherfn as ff
from fisherfn.base import LayerMethod
from tests import zoo
from tests.methods.kronecker import FAMILY
from tests.oracles import close

DAMPING = 0.3


def dense_inverse(ng, state, key):
    """The matrix of a block's damped inverse, from its action on trees."""
    zeros = {block.key: torch.zeros(block.shape, dtype=zoo.DTYPE) for block in ng.layout.blocks}
    units = torch.eye(zeros[key].numel(), dtype=zoo.DTYPE).reshape(-1, *zeros[key].shape)

    def act(unit):
        return ng.layout.matrices(ng.precondition(state, ng.layout.tree(zeros | {key: unit})))[key]

    return torch.vmap(act)(units).flatten(1)


@pytest.mark.parametrize("form", ["factored", "eigen"])
@pytest.mark.parametrize("name", [*FAMILY, "kl_optimal"])
@pytest.mark.parametrize("id", ["conv-groups", "tokens"])
def test_the_divergence_is_that_of_the_dense_matrices(name, form, id):
    problem = zoo.pick(id)
    run = zoo.sampled(problem, method=ff.METHODS[name](damping_form=form))
    state, _ = run.ng.invert(run.ng.update(run.ng.init(problem.params, damping=DAMPING), run.stats)[0])
    for key, found in run.ng.fisher_divergence(state, run.stats).items():
        P, F = dense_inverse(run.ng, state, key), run.ng.fisher(run.stats, "block").block(key)
        F = F + DAMPING * torch.eye(len(F), dtype=F.dtype)
        wanted = 0.5 * ((P @ F).trace() - len(F) - torch.slogdet(P)[1] - torch.slogdet(F)[1])
        close(1 + found, 1 + wanted, tol=1e-9)  # some blocks are exactly a product
        assert found > -1e-12


def test_the_default_of_a_method_is_its_own_way_to_compute_the_traces():
    problem = zoo.pick("conv-groups")
    run = zoo.sampled(problem, method="lanczos")
    state, _ = run.ng.invert(run.ng.update(run.ng.init(problem.params, damping=DAMPING), run.stats)[0])
    for key, tap in run.stats.taps.items():
        pairs = zip(
            LayerMethod.cross_block(run.ng.method, state.inverses[key], tap),
            run.ng.method.cross_block(state.inverses[key], tap),
            strict=True,
        )
        for default, own in pairs:
            close(default, own)


@pytest.mark.parametrize("name", ["exactNG", "twolevel_kfac"])
def test_a_method_without_blocks_has_no_divergence_per_block(name):
    problem = zoo.pick("mlp-gaussian")
    run = zoo.sampled(problem, method=name)
    with pytest.raises(ff.errors.StructureError, match="no divergence per block"):
        run.ng.fisher_divergence(run.ng.init(problem.params), run.stats)
