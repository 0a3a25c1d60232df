"""Side effects of every method: no mutation, types kept, bad batches refused, one graph for all values."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import zoo
from tests.methods.protocol import IDS, METHODS, PROBLEMS, at, brief, build, stack, steps
from tests.oracles import close, vec

# ------------------------------------------------------------------------------------------------ purity, dtypes


@METHODS
@PROBLEMS
def test_nothing_is_mutated_and_equal_arguments_give_equal_results(method, id):
    problem, ng = build(id, method)
    state = steps(problem, ng, 2)[-1][1]
    noise = ng.noise(problem.batch, zoo.generator())
    stats = ng.stats(problem.params, problem.batch, noise=noise)
    grads = zoo.random_tree(problem.params)
    arguments = (problem.params, problem.batch, state, noise, grads)
    before, rng = copy.deepcopy(arguments), torch.get_rng_state()

    def everything():
        s, _ = ng.invert(ng.update(state, stats)[0])
        return (
            ng.step(problem.params, state, problem.batch, noise=noise, inner=True),
            (s, ng.precondition(s, grads), ng.precondition(s, stats), ng.matvec(s, grads)),
            (
                ng(problem.params, stats),
                ng.init(problem.params),
                ff.kl_clip(grads, torch.tensor(1.0), lr=1.0, kl_bound=1.0),
            ),
        )

    first, second = everything(), everything()
    for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(pytree.tree_leaves(arguments), pytree.tree_leaves(before), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), rng)
    results = {leaf.data_ptr() for leaf in pytree.tree_leaves(first[0][0]) if leaf.numel()}
    assert not results & {leaf.data_ptr() for leaf in pytree.tree_leaves(arguments) if leaf.numel()}


@METHODS
@PROBLEMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_nets(method, id, dtype):
    """Steps come in the net's type, the state in at least float32, and the direction is that of float64."""
    exact = zoo.pick(id)
    problem = zoo.to(exact, dtype)
    ng = problem.build(method=method, fisher="type2")
    nat, state, info = ng.step(problem.params, ng.init(problem.params, damping=0.1), problem.batch, inner=True)
    assert all(leaf.dtype == dtype for leaf in nat.values())
    low = {leaf.dtype for leaf in pytree.tree_leaves(state)} & {torch.bfloat16, torch.float16}
    assert not low, "a factor in half precision"
    double = exact.build(method=method, fisher="type2")
    reference, _, _ = double.step(exact.params, double.init(exact.params, damping=0.1), exact.batch)
    cosine = torch.nn.functional.cosine_similarity(vec(nat).double(), vec(reference), dim=0)
    assert cosine > (0.9999 if dtype == torch.float32 else 0.95)
    ff.check(info)


# ------------------------------------------------------------------------------------------------- bad statistics


@METHODS
@pytest.mark.parametrize("where", ["x", "y"])
def test_a_bad_batch_leaves_the_state_as_it_was(method, where):
    problem = zoo.pick("mlp-gaussian")
    ng = problem.build(method=method)
    state = steps(problem, ng, 2)[-1][1]
    x, y = problem.x.clone(), problem.y.clone()
    (x if where == "x" else y)[0, 0] = torch.nan
    _, after, info = ng.step(problem.params, state, (x, y), generator=zoo.generator(), inner=True)
    assert not all(bool(ok) for ok in info.ok.values())
    assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, (state, after)), strict=True))
    with pytest.raises(ff.errors.FisherfnError):
        ff.check(info)


@METHODS
def test_a_bad_member_does_not_touch_its_neighbours(method):
    problem = zoo.pick("mlp-gaussian")
    ng = problem.build(method=method)
    noise = ng.noise(problem.batch, zoo.generator())
    start = ng.init(problem.params, damping=0.1)
    _, warm, _ = ng.step(problem.params, start, problem.batch, noise=noise)
    good = problem.x
    bad = good.clone()
    bad[2, 1] = torch.inf

    def step(state, x):
        return ng.step(problem.params, state, (x, problem.y), noise=noise)

    nats, states, infos = torch.vmap(step)(stack([warm] * 3), torch.stack([good, bad, good]))
    nat, after, _ = step(warm, good)
    for m in (0, 2):
        close(at(nats, m), nat, tol=1e-10)
        assert all(bool(ok[m]) for ok in infos.ok.values())
    assert not all(bool(ok[1]) for ok in infos.ok.values())
    for a, b in zip(*map(pytree.tree_leaves, (at(states, 1), warm)), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ one graph


@pytest.mark.parametrize("id", ["no-bias", "language"])
@pytest.mark.parametrize("method", ff.METHODS)
def test_a_state_shares_no_memory_with_the_batch_or_the_parameters(method, id):
    """A loop may write the next batch into the same memory, or move the parameters in place."""
    problem, ng = build(id, brief(method))
    noise = ng.noise(problem.batch, zoo.generator())
    _, state, _ = ng.step(problem.params, ng.init(problem.params, damping=0.1), problem.batch, noise=noise)
    given = {leaf.untyped_storage().data_ptr() for leaf in ff.tree.leaves((problem.params, problem.batch, noise))}
    assert not given & {leaf.untyped_storage().data_ptr() for leaf in ff.tree.leaves(state) if leaf.numel()}


@pytest.mark.parametrize(
    ("method", "id"),
    [(name, "scale-matrix") for name in ff.METHODS] + [("kfac", id) for id in IDS if id != "scale-matrix"],
)
def test_a_traced_step_serves_other_values(method, id):
    """make_fx records one path: were a tensor branched on in Python, other values would betray it.

    Tracing is slow. A branch is in a method's code or in a layer's, so every method on one net and one method on every
    net will do.
    """
    problem, ng = build(id, brief(method))
    noise = ng.noise(problem.batch, zoo.generator())
    _, warm, _ = ng.step(problem.params, ng.init(problem.params, damping=0.1), problem.batch, noise=noise)
    warm = ff.tree.map(torch.clone, warm)  # make_fx would confuse two leaves that are one tensor

    def step(params, state, x, y, noise):
        nat, state, info = ng.step(params, state, (x, y), noise=noise, inner=True)
        return nat, state, info.loss, info.inner

    traced = make_fx(step)(problem.params, warm, *problem.batch, noise)
    other = ff.tree.add(problem.params, zoo.random_tree(problem.params), scale=0.3)
    damped = warm._replace(damping=torch.tensor(2.0, dtype=torch.float64))
    x = problem.x.flip(0) * 1.5 if problem.x.is_floating_point() else problem.x.flip(0)
    values = other, damped, x, problem.y, 1 - noise
    for got, want in zip(*map(pytree.tree_leaves, (traced(*values), step(*values))), strict=True):
        close(got, want, tol=1e-9)
