"""Taps, loss and gradients against hooks and autograd; chunked = whole; vmap = loop; nothing mutated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fisherfn as ff
from tests import oracles, strategies, zoo
from tests.oracles import close
from tests.zoo import FISHERS, sampled

EVERY = pytest.mark.parametrize("make", zoo.cases())
LINEAR = pytest.mark.parametrize("make", zoo.cases("linear", "blocks"))
KINDS = pytest.mark.parametrize("fisher", FISHERS)


def per_example(tap):
    """W_sn = Σ_t g_snt a_ntᵀ: [S, N, o, i] (one group)."""
    return torch.einsum("ksnto,knti->snoi", tap.g, tap.a)


# ------------------------------------------------------------------------------------------- loss and gradients


@EVERY
@KINDS
def test_loss_and_gradients_are_those_of_the_data(make, fisher):
    """Whatever the Fisher's labels."""
    problem = make()
    stats = sampled(problem, fisher).stats
    density = problem.density(problem.model(problem.params, problem.x))
    close(stats.grads, oracles.mean_gradient(problem))
    zero = problem.likelihood.nll(problem.model(problem.params, problem.x), problem.y).mean()
    constant = -density.log_prob(problem.y).reshape(len(problem.x), -1).sum(1).mean() - zero  # free of the parameters
    close(stats.loss + constant, oracles.mean_nll(problem))
    close(stats.outputs, problem.model(problem.params, problem.x))
    assert list(stats.grads) == list(problem.params)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_loss_of_discrete_targets_has_no_hidden_constant(likelihood):
    problem = zoo.from_net(zoo.mlp(3, 2), (4, 3), likelihood)
    close(sampled(problem).stats.loss, oracles.mean_nll(problem))


@pytest.mark.parametrize("make", zoo.cases())
def test_gradients_alone_need_no_draw(make):
    """curvature=False: no generator, no noise, and the gradients all the same."""
    problem = make()
    ng = problem.build(fisher="mc")
    stats = ng.stats(problem.params, problem.batch, curvature=False)
    close(stats.grads, oracles.mean_gradient(problem))
    nat = ng.precondition(ng.init(problem.params, damping=0.5), stats)
    close(nat, ff.tree.scale(oracles.mean_gradient(problem), 2.0))


# --------------------------------------------------------------------------------------------------------- taps


@LINEAR
@KINDS
def test_taps_multiply_to_the_per_example_gradients(make, fisher):
    """Σ_t g a ᵀ is the gradient of one example's log-likelihood; type-2 columns are free up to a rotation."""
    problem = make()
    run = sampled(problem, fisher)
    U = oracles.columns(problem, fisher, run.draws) * len(problem.x) ** 0.5
    for key, names in problem.blocks.items():
        W = per_example(run.stats.taps[key])
        V = U[oracles.matrix_positions(problem.params, names)]
        if fisher == "type2":
            W_n = W.flatten(2).transpose(0, 1)  # [N, S, P]
            V_n = V.reshape(len(V), -1, len(problem.x)).permute(2, 1, 0)
            close(W_n.mT @ W_n, V_n.mT @ V_n)
        else:
            close(W.flatten(0, 1).flatten(1), V.T)


@pytest.mark.parametrize("make", zoo.cases("linear", "blocks"))
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_taps_are_inputs_and_output_gradients(make, fisher):
    """a with the 1 of the bias last, g at every position; positions in the order of use."""
    problem = make()
    run = sampled(problem, fisher)
    for key, (a_nti, g_nsto) in oracles.taps(problem, fisher, run.draws).items():
        tap = run.stats.taps[key]
        close(tap.a, a_nti[None])
        close(tap.g, g_nsto.transpose(0, 1)[None])


def test_a_bare_position_has_length_one():
    run = sampled(zoo.pick("mlp-categorical"), samples=3)
    assert run.stats.taps["0"].a.shape == (1, 5, 1, 4) and run.stats.taps["0"].g.shape == (1, 3, 5, 1, 4)


def test_all_axes_between_batch_and_features_are_positions():
    taps = sampled(zoo.pick("two-axes")).stats.taps
    assert taps["0"].a.shape == (1, 3, 6, 3) and taps["0"].g.shape == (1, 2, 3, 6, 3)


@given(strategies.problems(), strategies.fishers())
def test_gradients_of_drawn_nets(problem, fisher):
    stats = sampled(problem, fisher).stats
    close(stats.grads, oracles.mean_gradient(problem))


# --------------------------------------------------------------------------------------- noise, chunks, and order


def fisher_of(run):
    return run.ng.fisher(run.stats).dense()


@pytest.mark.parametrize("id", ["mlp-categorical", "mlp-gaussian", "mlp-bernoulli", "sequence-out", "scale-vector"])
def test_noise_is_the_draw_of_the_generator(id):
    problem = zoo.pick(id)
    ng = problem.build(samples=3)
    drawn = ng.stats(problem.params, problem.batch, generator=zoo.generator(4))
    fixed = ng.stats(problem.params, problem.batch, noise=ng.noise(problem.batch, zoo.generator(4)))
    assert torch.equal(ng.fisher(drawn).dense(), ng.fisher(fixed).dense())
    other = ng.stats(problem.params, problem.batch, generator=zoo.generator(5))
    assert oracles.differs(ng.fisher(other).dense(), ng.fisher(drawn).dense())


@pytest.mark.parametrize("id", ["mlp-categorical", "mlp-gaussian", "sequence-out", "scale-vector"])
def test_a_slice_of_the_noise_draws_the_very_labels_of_the_whole(id):
    """Ranks and chunks rely on this."""
    problem = zoo.pick(id)
    run = sampled(problem)
    part = slice(1, 3)
    stats = run.ng.stats(problem.params, (problem.x[part], problem.y[part]), noise=run.noise[part])
    for key, tap in run.stats.taps.items():
        close(stats.taps[key].a, tap.a[:, part])
        close(stats.taps[key].g, tap.g[:, :, part])


def test_uniform_noise_of_a_half_precision_net_is_not_coarse():
    """256 levels would never draw a class of probability 1/1000."""
    problem = zoo.to(zoo.pick("mlp-categorical"), torch.bfloat16)
    x = problem.x.repeat(400, 1)
    noise = problem.build().noise((x, problem.y.repeat(400)), zoo.generator())
    assert len(noise.unique()) > 1500


@EVERY
@KINDS
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunked_is_whole(make, fisher, chunk_size):
    """Also with an uneven last chunk, and a chunk larger than the batch."""
    problem = make()
    run = sampled(problem, fisher)
    chunked = run.ng.stats(problem.params, problem.batch, noise=run.noise, chunk_size=chunk_size)
    close(chunked.loss, run.stats.loss)
    close(chunked.grads, dict(run.stats.grads))
    close(chunked.outputs, run.stats.outputs)
    state = run.ng.init(problem.params, damping=0.1)
    whole, parts = (run.ng.invert(run.ng.update(state, stats)[0])[0] for stats in (run.stats, chunked))
    close(ff.tree.flatten(parts), ff.tree.flatten(whole))
    close(run.ng.precondition(whole, chunked), run.ng.precondition(whole, run.stats))
    close(run.ng.fisher(chunked).trace(), run.ng.fisher(run.stats).trace())


def test_chunks_take_the_generators_draw_too():
    problem = zoo.pick("mlp-categorical")
    ng = problem.build(samples=2)
    whole = ng.stats(problem.params, problem.batch, generator=zoo.generator(4))
    parts = ng.stats(problem.params, problem.batch, generator=zoo.generator(4), chunk_size=2)
    state = ng.init(problem.params)
    close(ff.tree.flatten(ng.update(state, parts)[0]), ff.tree.flatten(ng.update(state, whole)[0]))


@EVERY
@KINDS
def test_permuted_examples_change_nothing(make, fisher):
    problem = make()
    run = sampled(problem, fisher)
    order = torch.randperm(len(problem.x), generator=zoo.generator(1))
    noise = None if run.noise is None else run.noise[order]
    permuted = run.ng.stats(problem.params, (problem.x[order], problem.y[order]), noise=noise)
    close(run.ng.fisher(permuted).dense(), fisher_of(run))
    close(permuted.grads, dict(run.stats.grads))


@pytest.mark.parametrize("id", ["mlp-categorical", "sequence-pooled", "scale-vector"])
@given(size=st.integers(1, 7))
def test_the_batch_may_differ_in_size_from_the_trace(id, size):
    problem = zoo.pick(id)
    ng = problem.build(fisher="empirical")
    take = torch.arange(size) % len(problem.x)
    other = zoo.replace(problem, x=problem.x[take], y=problem.y[take])
    stats = ng.stats(problem.params, other.batch)
    close(stats.grads, oracles.mean_gradient(other))
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(other, "empirical"))


@EVERY
@KINDS
def test_vmap_over_models_is_the_loop(make, fisher):
    problem = make()
    ng = problem.build(fisher=fisher)
    members = [ff.tree.add(problem.params, zoo.random_tree(problem.params, m), scale=0.1) for m in range(3)]
    noises = [ng.noise(problem.batch, zoo.generator(m)) if fisher == "mc" else torch.zeros(1) for m in range(3)]

    def facts(params, noise):
        stats = ng.stats(params, problem.batch, noise=noise if fisher == "mc" else None)
        return stats.loss, stats.grads, ng.fisher(stats).dense()

    stacked = {name: torch.stack([m[name] for m in members]) for name in problem.params}
    losses, grads, dense = torch.vmap(facts)(stacked, torch.stack(noises))
    for m in range(3):
        loss, grad, F = facts(members[m], noises[m])
        close(losses[m], loss, tol=1e-10)
        close({name: leaf[m] for name, leaf in grads.items()}, dict(grad), tol=1e-10)
        close(dense[m], F, tol=1e-10)


# -------------------------------------------------------------------------------------------- batch norm, context


def batch_norm_net():
    """No bias before the norm: its gradient would be zero."""
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().train()


def test_batch_norm_taps_are_n_times_the_gradients_of_the_mean_loss():
    """g_n = N ∂(mean nll)/∂s_n, the cross-example terms of the batch statistics included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = batch_norm_net()
    x = torch.randn(6, 3, generator=zoo.generator(), dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    before = {name: leaf.clone() for name, leaf in net.state_dict().items()}
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    stats = ng.stats(params, (x, y), context=context)
    for name, leaf in net.state_dict().items():
        assert torch.equal(leaf, before[name]), f"{name} of the module was mutated"

    nodes = {}
    for key in ("0", "3"):
        hook = lambda mod, args, out, key=key: nodes.__setitem__(key, (args[0].detach(), out))  # noqa: E731
        net[int(key)].register_forward_hook(hook)
    loss = nn.functional.cross_entropy(net(x), y)
    close(stats.loss, loss.detach())
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    close(dict(stats.grads), dict(zip(dict(net.named_parameters()), grads, strict=True)))
    for key, (a, out) in nodes.items():
        (g,) = torch.autograd.grad(loss, out, retain_graph=True)
        close(stats.taps[key].a[0, :, 0, : a.shape[1]], a)
        close(stats.taps[key].g[0, 0, :, 0], len(x) * g)
    for name, buffer in net.named_buffers():  # the one forward moved them once
        flat = ff.tree.flatten(stats.context)
        (moved,) = [leaf for path, leaf in flat.items() if path.endswith(name)]
        close(moved.double(), buffer.double())


def test_context_reaches_the_model_and_comes_back():
    problem = zoo.pick("one-layer")

    def model(params, x, context):
        return problem.model(params, x) * context["gain"], {"gain": context["gain"] + 1}

    context = {"gain": torch.tensor(2.0, dtype=torch.float64)}
    ng = ff.natural_gradient(
        model, problem.params, problem.x, likelihood=ff.Gaussian(), fisher="empirical", context=context
    )
    stats = ng.stats(problem.params, problem.batch, context=context)
    close(stats.outputs, 2 * problem.model(problem.params, problem.x))
    assert stats.context["gain"].item() == 3 and context["gain"].item() == 2
    nat, _, info = ng.step(problem.params, ng.init(problem.params), problem.batch, context=context)
    assert info.context["gain"].item() == 3


def test_dropout_masks_go_in_as_context():
    problem = zoo.pick("mlp-gaussian")

    def model(params, x, context):
        return problem.model(params, x * context), context

    mask = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    ng = ff.natural_gradient(
        model, problem.params, problem.x, likelihood=problem.likelihood, fisher="type2", context=mask
    )
    masked = zoo.replace(problem, x=problem.x * mask)
    close(
        ng.fisher(ng.stats(problem.params, problem.batch, context=mask)).dense(), oracles.fisher_matrix(masked, "type2")
    )


def test_statistics_are_a_tree_like_any_other():
    s = sampled(zoo.pick("mlp-categorical"))
    doubled = torch.utils._pytree.tree_map(lambda leaf: 2 * leaf if leaf.is_floating_point() else leaf, s.stats)
    assert isinstance(doubled, type(s.stats)) and doubled.layout is s.stats.layout
    close(doubled.loss, 2 * s.stats.loss)
    close(doubled.outputs, 2 * s.stats.outputs)
