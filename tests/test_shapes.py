"""One state for batches of other lengths and sizes: against builds of their own, and against the whole data set."""

import copy
from collections import OrderedDict, UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.nets import outside
from tests.oracles import close
from tests.zoo import as_installed, generator

E = ff.errors
ALL = list(ff.METHODS)
WORDS, CLASSES = 7, 3


class Tagger(nn.Module):
    """A label for each word, from the word and the sentence."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.last = nn.Embedding(WORDS, 4), nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, ids):
        h = torch.tanh(self.inner(self.embed(ids)))
        return self.last(h + h.mean(1, keepdim=True))


def batch(length, examples=6, seed=0):
    rng = generator(seed)
    ids = torch.randint(WORDS, (examples, length), generator=rng)
    return ids, torch.randint(CLASSES, (examples, length), generator=rng)


BATCHES = [batch(3, seed=1), batch(5, seed=2), batch(3, 4, seed=3), batch(2, seed=4)]


def build(net, x, **more):
    model, params, context = ff.functional(net)
    return ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, **more), params


# ------------------------------------------------------------------------------------------------- other lengths


@pytest.mark.parametrize("method", ALL)
def test_steps_on_other_lengths_are_those_of_builds_of_their_own(method):
    net = Tagger().double()
    ng, params = build(net, BATCHES[0][0], method=method, fisher="type2")
    state = other = ng.init(params, damping=0.1)
    for x, y in BATCHES:
        nat, state, info = ng.for_shape(params, x, context={}).step(params, state, (x, y), context={}, inner=True)
        ff.check(info)
        again, _ = build(net, x, method=method, fisher="type2")
        wanted, other, _ = again.step(params, other, (x, y), context={}, inner=True)
        for name in nat:
            assert torch.equal(nat[name], wanted[name])
    # what the states hold serves the natural gradient of any shape
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    for found, wanted in zip(*(each.precondition(state, grads).values() for each in (ng, again)), strict=True):
        assert torch.equal(found, wanted)


def test_another_shape_without_for_shape_is_still_an_error():
    ng, params = build(Tagger(), BATCHES[0][0], fisher="type2")
    with as_installed(), pytest.raises(E.ShapeError, match="5"):
        ng.stats(params, BATCHES[1], context={})


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        h = self.first(x)
        if x.shape[1] > 2:  # on long inputs, in another way as well
            h = h + F.linear(x, self.first.weight.square())
        return self.last(h.mean(1))


def test_a_shape_on_which_parameters_are_in_other_blocks_is_refused():
    ng, params = build(Branches(), torch.randn(6, 2, 4))
    with as_installed(), pytest.raises(E.StructureError, match=r"first\.weight") as caught:
        ng.for_shape(params, torch.randn(6, 3, 4), context={})
    assert len(str(caught.value)) < 400


def test_the_drop_in_keeps_one_state_for_all_lengths():
    net = Tagger().double()
    ng, params = build(net, BATCHES[0][0], fisher="type2")
    opt = ff.optim.NaturalGradient(
        net, likelihood=ff.Categorical(), lr=0.5, damping=0.1, momentum=0.0, kl_bound=None, fisher="type2",
        update_every=1, invert_every=1,
    )  # fmt: skip
    state = ng.init(params, damping=0.1)
    for x, y in BATCHES * 2:
        nat, state, info = ng.for_shape(params, x, context={}).step(params, state, (x, y), context={})
        params = ff.tree.add(params, nat, scale=-0.5)
        close(opt.step((x, y)), info.loss)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-9, atol=1e-12)
    assert len(opt._curvature._by_kind) == 3 and int(opt.curvature.count) == 8
    its_net, its = copy.deepcopy((net, opt))
    assert torch.equal(its.step(BATCHES[1]), opt.step(BATCHES[1]))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), its_net.parameters(), strict=True))


def test_watched_passes_of_other_lengths():
    """The empirical Fisher of every length is that of the pure function."""
    net = Tagger().double()
    ng, params = build(net, BATCHES[0][0], fisher="empirical")
    pre = ff.optim.Preconditioner(net, example_inputs=BATCHES[0][0], update_every=1, invert_every=1)
    state = ng.init(params, damping=0.1)
    for x, y in BATCHES:
        net.zero_grad()
        with pre.watch():
            loss = F.cross_entropy(net(x).mT, y, reduction="sum") / len(x)
        loss.backward()
        pre.step()
        nat, state, _ = ng.for_shape(params, x, context={}).step(params, state, (x, y), context={})
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.grad, nat[name], rtol=1e-9, atol=1e-12)


class Normed(nn.Module):
    def __init__(self, uncovered):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(6)) if uncovered else None

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(h if self.scale is None else h @ torch.diag(outside(self.scale)))


def test_a_change_of_mode_is_checked_as_a_build_is():
    """Per-example gradients of a parameter behind batch norm exist in evaluation mode alone."""
    x, y = torch.randn(8, 4), torch.zeros(8).long()
    for uncovered in (False, True):
        net = Normed(uncovered).eval()
        opt = ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1, example_inputs=x)
        opt.step((x, y))
        net.train()
        if uncovered:
            with as_installed(), pytest.raises(E.FisherfnError, match="training mode"):
                opt.step((x, y))
        else:
            opt.step((x, y))
            assert int(opt.curvature.count) == 1 and opt._curvature.steps == 2
        net.eval()
        opt.step((x, y))


# --------------------------------------------------------------------------------------------- batches of other sizes


def factors(ng, params, batches, **more):
    state = ng.init(params, ema=1 - 1e-9)
    for each in batches:
        state, info = ng.update(state, ng.stats(params, each, context={}), **more)
        ff.check(info)
    return state


@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 5, 2], [1, 11], [10, 1, 1]], ids=str)
def test_a_pass_over_unequal_batches_gives_the_factors_of_the_whole_set(sizes):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    x, y = torch.randn(12, 4).double(), torch.randint(CLASSES, (12,))
    ng, params = build(net, x, fisher="type2")
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    state, whole = factors(ng, params, parts), factors(ng, params, [(x, y)])
    close(ng.approximation(state).dense(), ng.approximation(whole).dense())
    assert float(state.examples) * len(sizes) == 12 and int(state.count) == len(sizes)
    if sizes[0] != sizes[-1]:  # counted alike, they do not
        equal = factors(ng, params, parts, weight=1.0)
        assert (ng.approximation(equal).dense() - ng.approximation(whole).dense()).abs().max() > 1e-4


def test_a_weight_counts_as_so_many_examples():
    net = nn.Linear(4, CLASSES).double()
    x, y = torch.randn(8, 4).double(), torch.randint(CLASSES, (8,))
    ng, params = build(net, x, fisher="type2")
    one, two = (ng.stats(params, (x[s], y[s]), context={}) for s in (slice(4), slice(4, 8)))
    A = [factors(ng, params, [(x[s], y[s])]).factors["weight"].A for s in (slice(4), slice(4, 8))]
    state, _ = ng.update(ng.init(params, ema=1 - 1e-12), one, weight=3.0)
    state, _ = ng.update(state, two, weight=torch.tensor(1.0))
    close(state.factors["weight"].A, 0.75 * A[0] + 0.25 * A[1])
    for weight in (0.0, -1, "2"):
        with as_installed(), pytest.raises(E.HyperparameterError, match="weight"):
            ng.update(state, one, weight=weight)


@pytest.mark.parametrize("ema", [0.3, 0.95])
def test_equal_batches_are_averaged_as_before_and_a_small_one_weighs_less(ema):
    """ρ = min(1 − 1/k, ema) for equal sizes; a batch of half the size weighs half beside the old ones."""
    net = nn.Linear(1, CLASSES).double()
    ng, params = build(net, torch.ones(4, 1).double(), fisher="type2")
    like = {
        size: ng.stats(params, (torch.ones(size, 1).double(), torch.zeros(size).long()), context={}) for size in (4, 2)
    }

    def share(sizes):
        state = ng.init(params, ema=ema)
        for size in sizes[:-1]:
            state, _ = ng.update(state, like[size])
        before = ff.tree.map(torch.zeros_like, state.factors)
        state, _ = ng.update(state._replace(factors=before), like[sizes[-1]])
        whole, _ = ng.update(ng.init(params), like[4])
        return float((state.factors["weight"].A / whole.factors["weight"].A).flatten()[0])

    for k in range(1, 8):
        assert abs(share([4] * k) - (1 - min(1 - 1 / k, ema))) < 1e-12
    many = 200
    full, half = share([4] * many), share([4] * (many - 1) + [2])
    assert abs(full - (1 - ema)) < 1e-12
    assert abs(half - 0.5 * full / (ema + 0.5 * full)) < 0.01


def test_a_state_of_before_examples_were_counted_goes_on():
    net = nn.Linear(4, CLASSES).double()
    x, y = torch.randn(8, 4).double(), torch.randint(CLASSES, (8,))
    ng, params = build(net, x, fisher="type2")
    stats = ng.stats(params, (x, y), context={})
    state, _ = ng.update(ng.init(params), stats)
    old, _ = ng.update(
        state._replace(examples=torch.zeros_like(state.examples), block_count=(), block_examples=()), stats
    )
    new, _ = ng.update(state, stats)
    assert float(old.examples) == float(new.examples) == 8
    close(old.factors["weight"].A, new.factors["weight"].A)
    net, its_net = nn.Linear(4, CLASSES).double(), nn.Linear(4, CLASSES).double()
    opts = [ff.optim.NaturalGradient(each, likelihood=ff.Categorical(), lr=0.1, damping=0.1) for each in (net, its_net)]
    opts[0].step((x, y))
    saved = copy.deepcopy({"net": net.state_dict(), "opt": opts[0].state_dict()})
    del saved["opt"]["curvature"]["state"]["examples"]
    its_net.load_state_dict(saved["net"]), opts[1].load_state_dict(saved["opt"])
    assert torch.equal(opts[0].step((x, y)), opts[1].step((x, y)))
    assert torch.equal(net.weight, its_net.weight)


# ------------------------------------------------------------------------------------------------- several inputs


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(WORDS, 4), nn.Linear(4, CLASSES)

    def forward(self, ids=None, mask=None):
        mask = mask.unsqueeze(-1)
        return self.last((self.embed(ids) * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["step", "preconditioner", "watch"])
def test_inputs_by_name_are_inputs_in_order(kind, way):
    nets = [ByName().double()]
    nets.append(copy.deepcopy(nets[0]))
    ids, mask, y = torch.randint(WORDS, (8, 3)), torch.rand(8, 3).double(), torch.randint(CLASSES, (8,))
    # in another order than that of the forward, as a loader may give them
    for net, x in zip(nets, [(ids, mask), kind(mask=mask, ids=ids)], strict=True):
        if way == "step":
            ff.optim.NaturalGradient(net, likelihood=ff.Categorical(), lr=0.1).step((x, y))
            continue
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), example_inputs=x)
        if way == "watch":
            with pre.watch():
                loss = F.cross_entropy(net(ids, mask), y)
        else:
            loss = F.cross_entropy(net(ids, mask), y)
        loss.backward()
        if way == "watch":
            pre.step()
        else:
            pre.step((x, None) if isinstance(x, tuple) else x)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q) and (way == "step" or torch.equal(p.grad, q.grad))


def test_targets_inside_the_inputs_are_refused_with_the_way_out():
    inputs = {"ids": torch.zeros(4, 3).long(), "mask": torch.ones(4, 3), "labels": torch.zeros(4).long()}
    opt = ff.optim.NaturalGradient(ByName(), likelihood=ff.Categorical(), lr=0.1)
    with as_installed(), pytest.raises(E.StructureError, match='pop\\("labels"\\)'):
        opt.step(inputs)
