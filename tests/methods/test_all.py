"""Requirements on every method by name: a new line in `ff.METHODS` is tested automatically.

The cases: a plain net, one with shared positions, one with a parameter that no layer claims; grouped convolutions, a
convolutional autoencoder, an embedding with a layer norm.
"""

import torch
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import oracles, zoo
from tests.methods.protocol import METHODS, PROBLEMS, SHAPED_BY_BATCH, at, build, sampled, stack, steps, structure
from tests.oracles import close

# ------------------------------------------------------------------------------------------------ the protocol


@METHODS
def test_the_name_builds_without_arguments_and_equals_its_builder(method):
    problem, ng = build("mlp-categorical", method)
    other = problem.build(method=ff.METHODS[method]())
    (nat, _, _), (same, _, _) = steps(problem, ng, 1)[0], steps(problem, other, 1)[0]
    close(same, nat, tol=1e-12)


@METHODS
@PROBLEMS
def test_steps_are_finite_descending_and_like_params(method, id):
    problem, ng = build(id, method)
    for nat, _, info in steps(problem, ng, damping=1e-1):
        assert {n: (v.shape, v.dtype) for n, v in nat.items()} == {
            n: (v.shape, v.dtype) for n, v in problem.params.items()
        }
        assert list(nat) == list(problem.params)
        assert all(torch.isfinite(leaf).all() for leaf in nat.values())
        assert info.ok and all(bool(ok) for ok in info.ok.values())
        assert info.inner > 0, "not a descent direction"
        ff.check(info)


@METHODS
@PROBLEMS
def test_the_structure_of_the_state_is_fixed(method, id):
    problem, ng = build(id, method)
    first = ng.init(problem.params)
    shapes = [leaf.shape for leaf in pytree.tree_leaves(first)]
    trace = steps(problem, ng)
    for _, state, _ in trace:
        assert type(state) is type(first) and structure(state) == structure(first)
        assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(state))
        if method not in SHAPED_BY_BATCH:
            assert [leaf.shape for leaf in pytree.tree_leaves(state)] == shapes
    dtypes = [[leaf.dtype for leaf in pytree.tree_leaves(state)] for _, state, _ in trace]
    assert dtypes[0] == dtypes[-1] == [leaf.dtype for leaf in pytree.tree_leaves(first)]
    assert structure(trace[0][2]) == structure(trace[-1][2])


@METHODS
@PROBLEMS
def test_saved_and_resumed_is_the_straight_run(method, id, tmp_path):
    problem, ng = build(id, method)
    state = steps(problem, ng, 2)[-1][1]
    torch.save(ff.tree.flatten(state), tmp_path / "state.pt")
    again = ff.tree.unflatten(state, torch.load(tmp_path / "state.pt", weights_only=True))
    results = [ng.step(problem.params, s, problem.batch, generator=zoo.generator(9))[:2] for s in (state, again)]
    assert all(torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, results), strict=True))


# ------------------------------------------------------------------------------------------------- its limits


@METHODS
@PROBLEMS
def test_before_the_first_invert_precondition_is_grad_over_damping(method, id):
    problem, run = sampled(id, method)
    grads = zoo.random_tree(problem.params)
    state = run.ng.init(problem.params, damping=0.25)
    close(run.ng.precondition(state, grads), ff.tree.scale(grads, 4.0))
    close(run.ng.precondition(state, run.stats), ff.tree.scale(dict(run.stats.grads), 4.0))
    updated, _ = run.ng.update(state, run.stats)
    close(run.ng.precondition(updated, grads), ff.tree.scale(grads, 4.0))


@METHODS
@PROBLEMS
def test_large_damping_gives_grad_over_damping(method, id):
    problem, ng = build(id, method)
    damping = 1e14  # factored damping errs by O(1/√λ)
    nat, _, _ = steps(problem, ng, 1, damping=damping)[0]
    close(ff.tree.scale(nat, damping), oracles.mean_gradient(problem), tol=1e-5)


@METHODS
@PROBLEMS
def test_damping_is_read_from_the_state(method, id):
    """A scheduled damping needs no rebuild: replace the leaf, invert again."""
    problem, run = sampled(id, method)
    small, large = (run.ng.init(problem.params, damping=d) for d in (0.1, 10.0))
    state, _ = run.ng.update(small, run.stats)
    moved, _ = run.ng.invert(state._replace(damping=large.damping))
    direct, _ = run.ng.invert(run.ng.update(large, run.stats)[0])
    grads = run.stats.grads
    close(run.ng.precondition(moved, grads), run.ng.precondition(direct, grads))
    close(run.ng(problem.params, run.stats, damping=10.0), run.ng.precondition(direct, run.stats))


@METHODS
@PROBLEMS
def test_matvec_is_linear_symmetric_and_positive_on_average(method, id):
    """vᵀF̂w = wᵀF̂v, undamped; its trace is the Fisher's up to the approximation, so certainly positive."""
    problem, run = sampled(id, method)
    v, w = zoo.random_tree(problem.params, 1), zoo.random_tree(problem.params, 2)
    results = []
    for damping in (1e-3, 1e3):
        state, _ = run.ng.invert(run.ng.update(run.ng.init(problem.params, damping=damping), run.stats)[0])
        Fv, Fw = run.ng.matvec(state, v), run.ng.matvec(state, w)
        close(ff.tree.dot(w, Fv), ff.tree.dot(v, Fw), tol=1e-6)
        close(run.ng.matvec(state, ff.tree.add(v, w, scale=2.0)), ff.tree.add(Fv, Fw, scale=2.0))
        results.append(Fv)
    close(results[1], results[0])
    probes = [zoo.random_tree(problem.params, seed) for seed in range(40)]
    assert sum(ff.tree.dot(p, run.ng.matvec(state, p)) for p in probes) > 0


@METHODS
@PROBLEMS
def test_the_one_shot_call_is_one_cycle_from_nothing(method, id):
    problem, run = sampled(id, method)
    state, _ = run.ng.invert(run.ng.update(run.ng.init(problem.params, damping=0.2), run.stats)[0])
    close(run.ng(problem.params, run.stats, damping=0.2), run.ng.precondition(state, run.stats))


# ---------------------------------------------------------------------------------------------- vmap and chunks


@METHODS
@PROBLEMS
def test_vmap_over_models_is_the_loop(method, id):
    """Params, state (its damping too) and noise along a leading axis; two steps, so that a warm state goes in."""
    problem, ng = build(id, method, samples=2)
    members = [ff.tree.add(problem.params, zoo.random_tree(problem.params, m), scale=0.1) for m in range(2)]
    noises = [ng.noise(problem.batch, zoo.generator(m)) for m in range(2)]
    states = [ng.init(p, damping=d, ema=0.9) for p, d in zip(members, (0.05, 5.0), strict=True)]

    def two_steps(params, state, noise):
        nat, state, _ = ng.step(params, state, problem.batch, noise=noise)
        return ng.step(ff.tree.add(params, nat, scale=-0.1), state, problem.batch, noise=noise, inner=True)

    nats, stacked, infos = torch.vmap(two_steps)(stack(members), stack(states), torch.stack(noises))
    for m in range(2):
        nat, state, info = two_steps(members[m], states[m], noises[m])
        close(at(nats, m), nat, tol=1e-10)
        close(infos.loss[m], info.loss, tol=1e-10)
        close(infos.inner[m], info.inner, tol=1e-10)
        assert all(bool(infos.ok[key][m]) == bool(ok) for key, ok in info.ok.items())
        close(ng.matvec(at(stacked, m), nat), ng.matvec(state, nat), tol=1e-8)


@METHODS
def test_a_sweep_inits_and_steps_under_vmap(method):
    """Hyperparameters are tensors: one vmap over dampings."""
    problem, ng = build("mlp-categorical", method)
    noise = ng.noise(problem.batch, zoo.generator())
    dampings = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)

    def step(damping):
        nat, _, _ = ng.step(problem.params, ng.init(problem.params, damping=damping), problem.batch, noise=noise)
        return nat

    together = torch.vmap(step)(dampings)
    for m, damping in enumerate(dampings):
        close(at(together, m), step(damping), tol=1e-10)


@METHODS
@PROBLEMS
def test_chunked_is_whole(method, id):
    problem, run = sampled(id, method)
    chunked = run.ng.stats(problem.params, problem.batch, noise=run.noise, chunk_size=2)
    state = run.ng.init(problem.params, damping=0.1)
    whole, parts = (run.ng.invert(run.ng.update(state, stats)[0])[0] for stats in (run.stats, chunked))
    close(run.ng.precondition(parts, run.stats.grads), run.ng.precondition(whole, run.stats.grads), tol=1e-7)
    close(run.ng.precondition(whole, chunked), run.ng.precondition(whole, run.stats), tol=1e-7)


@METHODS
@PROBLEMS
def test_the_factored_gradient_route_is_the_matrix_route(method, id):
    """precondition(state, stats) = precondition(state, stats.grads), and inner = ⟨∇, nat⟩."""
    problem, run = sampled(id, method)
    state, _ = run.ng.invert(run.ng.update(run.ng.init(problem.params, damping=0.1), run.stats)[0])
    nat = run.ng.precondition(state, run.stats.grads)
    close(run.ng.precondition(state, run.stats), nat)
    stepped, _, info = run.ng.step(problem.params, state, problem.batch, noise=run.noise, inner=True)
    close(info.inner, ff.tree.dot(oracles.mean_gradient(problem), stepped))
