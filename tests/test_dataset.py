"""Factors of a data set by `ng.fit`: those of one large batch, however the examples are split."""

import pytest
import torch
from torch.utils import _pytree as pytree

import fisherfn as ff
from fisherfn import dataset, tree
from tests import zoo
from tests.oracles import close, vec

EXACT = {**{name: build() for name, build in ff.METHODS.items()}, "kfac, reduce": ff.kfac(sharing="reduce")}


def split(batch, *sizes):
    """Batches of these sizes."""
    parts = [leaf.split(sizes) for leaf in tree.leaves(batch)]
    return [tree.replace_leaves(batch, list(leaves)) for leaves in zip(*parts, strict=True)]


def whole(ng, problem):
    """The state after one update with all examples."""
    state = ng.init(problem.params, damping=0.1)
    state, _ = ng.update(state, ng.stats(problem.params, problem.batch))
    return ng.invert(state)[0]


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("id", ["mlp-categorical", "sequence-pooled"])
def test_any_batches_give_the_factors_of_one_large_batch(method, id):
    problem = zoo.pick(id)
    ng = problem.build(method=EXACT[method], fisher="type2")
    n, v = len(problem.x), zoo.random_tree(problem.params)
    expected = whole(ng, problem)
    for sizes in ((1, n - 1), (2, 1, n - 3), (n,)):
        state, info = ng.fit(problem.params, split(problem.batch, *sizes), damping=0.1)
        ff.check(info)
        close(ng.matvec(state, v), ng.matvec(expected, v), tol=1e-10)
        close(ng.precondition(state, v), ng.precondition(expected, v), tol=1e-10)
        close(info.loss, mean_loss(ng, problem))


@pytest.mark.parametrize("method", ["kfac", "ekfac", "exactNG"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_batch_may_be_shorter_than_a_chunk(method, place):
    """The last batch of a data set often is; the factors are those of one large batch."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method=method, fisher="type2")
    sizes = [2, len(problem.x) - 3]
    sizes.insert(place, 1)
    state, info = ng.fit(problem.params, split(problem.batch, *sizes), damping=0.1, chunk_size=1)
    ff.check(info)
    v = zoo.random_tree(problem.params)
    close(ng.precondition(state, v), ng.precondition(whole(ng, problem), v), tol=1e-10)
    assert info.checks["chunks"]


def mean_loss(ng, problem):
    return ng.stats(problem.params, problem.batch, curvature=False).loss


def test_an_average_that_forgets_would_be_another_state():
    """The guard of the test above: batches differ."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac", fisher="type2")
    state = ng.init(problem.params, damping=0.1, ema=0.2)
    for batch in split(problem.batch, 2, 1, len(problem.x) - 3):
        state, _ = ng.update(state, ng.stats(problem.params, batch))
    v = zoo.random_tree(problem.params)
    gap = vec(ng.matvec(state, v)) - vec(ng.matvec(whole(ng, problem), v))
    assert gap.norm() > 1e-3 * vec(ng.matvec(state, v)).norm()


def test_both_passes_sample_the_same_labels():
    """With one batch, the trace of E-KFAC's eigenvalues is that of the Fisher that gave its basis."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="ekfac", fisher="mc")
    state, _ = ng.fit(problem.params, [problem.batch], generator=zoo.generator(3))
    stats = ng.stats(problem.params, problem.batch, generator=zoo.generator(3))
    expected, _ = ng.update(ng.init(problem.params), stats)
    for one, other in zip(tree.leaves(state.factors), tree.leaves(expected.factors), strict=True):
        close(one, other)
    after = zoo.generator(3)
    ng.stats(problem.params, problem.batch, generator=after)
    generator = zoo.generator(3)
    ng.fit(problem.params, [problem.batch], generator=generator)
    assert torch.equal(generator.get_state(), after.get_state()), "two passes advance the generator like one"


def test_further_batches_continue_the_mean():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac", fisher="type2")
    first, *more = split(problem.batch, 2, 1, len(problem.x) - 3)
    state, _ = ng.fit(problem.params, [first], damping=0.1)
    for batch in more:
        state, _ = ng.update(state, ng.stats(problem.params, batch))
    v = zoo.random_tree(problem.params)
    close(ng.matvec(state, v), ng.matvec(whole(ng, problem), v), tol=1e-10)


def test_what_cannot_be_fitted_is_refused():
    problem = zoo.pick("mlp-categorical")
    for method in ("kfac", "ekfac", "exactNG"):
        ng = problem.build(method=method, fisher="type2")
        with pytest.raises(ff.errors.EmptyBatchError, match="no batch"):
            ng.fit(problem.params, [])
        with pytest.raises(ff.errors.EmptyBatchError):
            ng.fit(problem.params, [tree.map(lambda leaf: leaf[:0], problem.batch)])
    with pytest.raises(ff.errors.StructureError, match="2 times"):
        problem.build(method="ekfac", fisher="type2").fit(problem.params, iter([problem.batch]))


def test_joined_statistics_of_many_examples_are_processed_in_chunks(monkeypatch):
    """A method that iterates is given enough steps to converge, in whichever way it multiplies."""
    problem = zoo.pick("mlp-categorical")
    for method in (ff.kpsvd(iterations=10), ff.exact(), ff.kl_optimal()):
        monkeypatch.setattr(dataset, "AT_ONCE", 2048)
        ng = problem.build(method=method, fisher="type2")
        v = zoo.random_tree(problem.params)
        whole, _ = ng.fit(problem.params, split(problem.batch, 2, len(problem.x) - 2), damping=0.1)
        monkeypatch.setattr(dataset, "AT_ONCE", 2)
        chunked, _ = ng.fit(problem.params, split(problem.batch, 2, len(problem.x) - 2), damping=0.1)
        close(ng.matvec(chunked, v), ng.matvec(whole, v), tol=1e-7)


def test_a_method_of_one_pass_keeps_its_factors_between_passes():
    problem = zoo.pick("mlp-categorical")
    state = problem.build(method="kfac").init(problem.params)
    assert ff.kfac().between_passes(state.factors) is state.factors


def test_a_bad_batch_is_a_mask_and_the_state_is_empty():
    problem = zoo.pick("mlp-gaussian")
    ng = problem.build(method="kfac", fisher="type2")
    bad = problem.x.clone()
    bad[0, 0] = torch.nan
    state, info = ng.fit(problem.params, [(bad, problem.y), problem.batch])
    with pytest.raises(ff.errors.NonFiniteError):
        ff.check(info)
    assert all(torch.isfinite(leaf).all() for leaf in pytree.tree_leaves(state.factors))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_batch_counts_wherever_it_stands(place):
    """Its factors are finite, so that only its own mask tells."""
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac", fisher="type2")
    batches = [problem.batch] * 3
    batches[place] = (problem.x, torch.full_like(problem.y, 1000))
    state, info = ng.fit(problem.params, batches)
    assert not info.checks["targets"] and info.checks["inputs"] and int(state.count) == 0
    with pytest.raises(ff.errors.TargetError):
        ff.check(info)


def test_models_are_fitted_together_under_vmap():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(method="kfac", fisher="type2")
    members = [tree.scale(problem.params, s) for s in (1.0, 0.5)]
    stacked = {name: torch.stack([m[name] for m in members]) for name in problem.params}
    batches = split(problem.batch, 2, len(problem.x) - 2)
    states = torch.vmap(lambda p: ng.fit(p, batches, damping=0.1)[0])(stacked)
    v = zoo.random_tree(problem.params)
    for m, params in enumerate(members):
        alone, _ = ng.fit(params, batches, damping=0.1)
        mine = pytree.tree_map(lambda leaf, m=m: leaf[m], states)
        close(ng.precondition(mine, v), ng.precondition(alone, v), tol=1e-10)
