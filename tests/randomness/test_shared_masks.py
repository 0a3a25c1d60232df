"""Dropout and random numbers where no example enters: one mask for the batch, from the upper half of every seed."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import kinds
from tests.nets import Readout, outside
from tests.oracles import close
from tests.randomness.test_dropout import X, Y, build, masked_problem, seeds

E = ff.errors
POSITIONS = 4


class Net(nn.Module):
    """Examples `[N, 3]` repeated over positions, with `how(net, h)` between two layers."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.outer, self.how = nn.Linear(3, 5), nn.Linear(5, 2), how
        self.table, self.grid = nn.Embedding(POSITIONS, 5), nn.Linear(1, 5)
        self.free = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x):
        h = self.how(self, self.inner(x).unsqueeze(1).expand(-1, POSITIONS, -1))
        return Readout(2)(self.outer(torch.tanh(h)))


def table(net):
    return net.table(torch.arange(POSITIONS))


def line(net):
    return net.grid(torch.linspace(-1, 1, POSITIONS, dtype=net.free.dtype).unsqueeze(1))


SHARED = {
    "a table of positions": lambda net, h: h + F.dropout(table(net), 0.5),
    "with a leading one": lambda net, h: h + F.dropout(table(net)[None], 0.5),
    "two masks": lambda net, h: h + F.dropout(table(net), 0.5) * F.dropout(line(net), 0.5),
    "before a layer": lambda net, h: h + net.grid(F.dropout(table(net)[:, :1], 0.5)),
    "a net on a grid": lambda net, h: h * F.dropout(line(net), 0.5),
    "whole channels": lambda net, h: h * F.dropout1d(line(net).T[None], 0.5).mT,
    "alpha": lambda net, h: h + F.alpha_dropout(table(net), 0.5, True),
    "of a vector": lambda net, h: h * F.dropout(net.free, 0.5),
    "of a weight": lambda net, h: h + F.linear(h[..., :4], F.dropout(net.table.weight.T, 0.5)),
    "beside a mask per example": lambda net, h: F.dropout(h, 0.5) + F.dropout(table(net), 0.5),
    "one number": lambda net, h: h + torch.rand([]) * net.free,
    "one random scale": lambda net, h: h * (1 + torch.empty(1, dtype=h.dtype).normal_()),
    "noise on a table": lambda net, h: h + table(net) + torch.randn(POSITIONS, 5, dtype=h.dtype),
    "random signs": lambda net, h: h + table(net) * (2 * torch.bernoulli(torch.full((POSITIONS, 1), 0.5)) - 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_all_examples_have_the_mask_of_the_step(name):
    """Compare parts of the batch, chunks and the Fisher; no layer is lost."""
    module, before = Net(SHARED[name]).double().train(), torch.get_rng_state()
    model, params, context, ng = build(module, X, seeds(), unused="ignore")
    whole, _ = model(params, X, context)
    other, _ = model(params, X, {**context, "dropout": seeds(seed=1)})
    assert oracles.differs(other, whole, 1e-3)
    for part in (slice(1, 3), torch.tensor([5, 0, 3]), torch.tensor([2])):
        close(model(params, X[part], {**context, "dropout": context["dropout"][part]})[0], whole[part])
    assert "fallback" not in kinds(ng).values()
    stats = ng.stats(params, (X, Y), context=context)
    used = {key: p for key, p in params.items() if key not in ng.layout.unused}
    problem = masked_problem(module, used, context, lambda p, x, c: model({**params, **p}, x, c))
    close(problem.model(used, problem.x), stats.outputs)
    close({key: stats.grads[key] for key in used}, oracles.mean_gradient(problem))
    for chunk_size in (4, 1):
        parts = ng.stats(params, (X, Y), context=context, chunk_size=chunk_size)
        close(parts.outputs, whole)
        close(ng.fisher(parts).dense(), ng.fisher(stats).dense())
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


@pytest.mark.parametrize("name", ["a table of positions", "before a layer", "of a weight", "beside a mask per example"])
def test_the_fisher_is_that_of_the_masked_net(name):
    module = Net(SHARED[name]).double().train()
    for key, p in module.named_parameters():  # none of them unused: the oracle has them all
        p.requires_grad_(
            key.partition(".")[0] in ("inner", "outer") or (key == "table.weight" and "weight" not in name)
        )
    model, params, context, ng = build(module, X, seeds())
    stats = ng.stats(params, (X, Y), context=context)
    problem = masked_problem(module, params, context, model)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_a_mask_keeps_as_many_entries_as_it_should_and_layers_have_masks_of_their_own():
    class Alone(nn.Module):
        def forward(self, x):
            shared, again = (F.dropout(torch.ones(50, 40), 0.3, self.training) for _ in range(2))
            return torch.stack([shared, again, F.dropout(x, 0.3, self.training)[0]]).expand(len(x), 3, 50, 40)

    model, _, _ = ff.functional(nn.Sequential(Alone(), nn.Dropout(0.0)).train())
    ones, alive = torch.ones(2, 50, 40), []
    for seed in range(20):
        alive.append((model({}, ones, {"dropout": seeds(2, seed=seed)})[0][0] > 0).double())
    alive = torch.stack(alive)
    assert ((alive.mean((0, 2, 3)) - 0.7).abs() < 0.01).all()
    rows = alive.flatten(2).flatten(0, 1) - 0.7
    C = rows @ rows.T / rows.shape[1]
    assert (C - C.diagonal().diag()).abs().max() < 0.03, "two steps, layers or an example have one mask"


def test_beside_a_parameter_that_runs_on_single_examples():
    module = Net(lambda net, h: F.dropout(h, 0.5) * outside(net.free) + F.dropout(table(net), 0.5)).double().train()
    module.grid.requires_grad_(False)
    model, params, context, ng = build(module, X, seeds())
    assert kinds(ng)["free"] == "fallback"
    stats, problem = ng.stats(params, (X, Y), context=context), masked_problem(module, params, context, model)
    close(dict(stats.grads), oracles.mean_gradient(problem))
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


def gradients():
    """A function of parameters and seeds, and the parameters."""
    module = Net(SHARED["a table of positions"]).double().train()
    for part in (module.inner, module.outer, module.grid, module.free):
        part.requires_grad_(False)
    _, params, context, ng = build(module, X, seeds())

    def found(params, given):
        return dict(ng.stats(params, (X, Y), context={**context, "dropout": given}).grads)

    return found, params


def test_models_together_under_vmap_have_their_own_masks():
    found, params = gradients()
    both = [seeds(seed=0), seeds(seed=1)]
    together = vmap(found, in_dims=(None, 0))(params, torch.stack(both))
    for member, given in enumerate(both):
        close({key: leaf[member] for key, leaf in together.items()}, found(params, given))


def test_a_compiled_step_takes_the_masks_of_its_seeds():
    found, params = gradients()
    compiled = ff.compile(found, backend="eager")
    for seed in (0, 1):
        close(compiled(params, seeds(seed=seed)), found(params, seeds(seed=seed)))


def test_the_drop_in_optimizer_trains_it():
    module = Net(SHARED["two masks"]).double().train()
    opt = ff.optim.NaturalGradient(module, likelihood=ff.Categorical(), lr=0.3, damping=0.1)
    losses = [float(opt.step((X, Y))) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5]) and not opt.layout.fallbacks


def test_a_watched_pass_over_a_shared_mask_is_refused_with_the_remedy():
    module = Net(SHARED["two masks"]).double().train()
    opt = ff.optim.NaturalGradient(module, likelihood=ff.Categorical(), lr=0.3, damping=0.1)
    with (
        zoo.as_installed(),
        pytest.raises(E.StructureError, match=r"all examples share.*step\(\(x, y\)\)"),
        opt.watch(X),
    ):
        module(X)


# ------------------------------------------------------------------------------------------------------- the seeds


def test_the_upper_half_is_that_of_the_step():
    for seed in range(50):
        upper = seeds(100, seed=seed) >> 32
        assert bool((upper == upper[0]).all()) and 0 < int(upper[0]) < 2**31
    assert len({int(seeds(3, seed=seed)[0] >> 32) for seed in range(200)}) == 200
    assert seeds(0).shape == (0,)


WRONG = {
    "of two calls": lambda: torch.cat([seeds(3, seed=0), seeds(3, seed=1)]),
    "made by hand": lambda: torch.arange(6),
}


@pytest.mark.parametrize("kind", WRONG)
def test_seeds_that_do_not_agree_are_refused(kind):
    model, params, context = ff.functional(Net(SHARED["a table of positions"]).double().train())
    with zoo.as_installed(), pytest.raises(E.NoiseError, match="seeds do not agree.*one call of ff.dropout_seeds"):
        model(params, X, {**context, "dropout": WRONG[kind]()})
    plain, own, rest = ff.functional(Net(lambda net, h: F.dropout(h, 0.5)).double().train())
    plain(own, X, {**rest, "dropout": WRONG[kind]()})  # masks of examples do not need it


# ------------------------------------------------------------------------------------- numbers that decide the path


def layer_drop(net, h):
    return h if torch.rand([]) < 0.1 else h + table(net)


def rounded(net, h):
    return h + table(net) * float(1 - torch.rand(1))


@pytest.mark.parametrize("how", [layer_drop, rounded])
def test_a_model_that_reads_a_random_number_is_refused(how):
    with zoo.as_installed(), pytest.raises(E.NoiseError, match="branches on a random number.*layerdrop"):
        build(Net(how).double().train(), X, seeds(), unused="ignore")


def same_ends(h):
    """Whether the last example is the first, up to dropped entries."""
    return bool(((h[-1] == 0) | (h[0] == 0) | (h[-1] == h[0])).all())


OTHER_PATHS = {
    "one less": lambda net, h: h + F.dropout(table(net), 0.5) if same_ends(h) else h + table(net),
    "one more": lambda net, h: h + (F.dropout(table(net), 0.5) if not same_ends(h) else table(net)),
    "of another shape": lambda net, h: h + F.dropout(table(net) if same_ends(h) else table(net)[None], 0.5),
}


@pytest.mark.parametrize("name", OTHER_PATHS)
def test_calls_that_copies_of_one_example_do_not_make_are_refused(name):
    """Copies of the first example say which axis of a mask has the examples."""
    model, params, context = ff.functional(
        Net(lambda net, h: OTHER_PATHS[name](net, F.dropout(h, 0.5))).double().train()
    )
    model(params, X[:1].expand(6, -1), {**context, "dropout": seeds()})
    with zoo.as_installed(), pytest.raises(E.StructureError, match="path depends on the values of its input"):
        model(params, X, {**context, "dropout": seeds()})


def test_a_model_that_draws_by_numpys_global_generator_is_refused():
    state = numpy.random.get_state()
    module = Net(lambda net, h: h + table(net) * float(numpy.random.rand())).double().eval()
    model, params, context = ff.functional(module)
    with zoo.as_installed(), pytest.raises(E.NoiseError, match="numpy's global generator"):
        ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), context=context, unused="ignore")
    assert all(numpy.array_equal(a, b) for a, b in zip(state, numpy.random.get_state(), strict=True))
