"""Parameters that no layer covers and that take the plain gradient, uncovered="gradient"."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherfn as ff
from tests.layers.checks import check_vmap, same
from tests.nets import outside
from tests.oracles import close
from tests.zoo import as_installed

E = ff.errors
CLASSES = 3


class Beside(nn.Module):
    """A scale that no layer covers, with or without a batch norm before it."""

    def __init__(self, norm=False):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))) * outside(self.scale))


def batch():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=rng).double(), torch.randint(CLASSES, (8,), generator=rng)


def build(net, x, **more):
    model, params, context = ff.functional(net.double())
    more = {"fisher": "type2", **more}
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, **more)
    return ng, params, context


def gradient(net, x, y):
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), [p for p in net.parameters() if p.requires_grad])
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("method", list(ff.METHODS))
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_uncovered_parameters_take_the_gradient_and_others_the_step_without_them(method, chunk_size):
    net, (x, y) = Beside(), batch()
    ng, params, context = build(net, x, method=method, uncovered="gradient")
    nat, state, info = ng.step(
        params, ng.init(params, damping=0.1), (x, y), context=context, inner=True, chunk_size=chunk_size
    )
    ff.check(info)
    expected = gradient(net, x, y)
    close(nat["scale"], expected["scale"])
    close(info.inner, ff.tree.dot(expected, nat))
    stats = ng.stats(params, (x, y), context=context, chunk_size=chunk_size)
    close(dict(stats.grads), expected)
    for grads in (stats, stats.grads, expected):  # the same from statistics and from a tree
        close(ng.precondition(state, grads), nat)
    net.scale.requires_grad_(False)
    alone, rest, context = build(net, x, method=method)
    others, _, _ = alone.step(rest, alone.init(rest, damping=0.1), (x, y), context=context)
    close({name: nat[name] for name in others}, others)


def test_uncovered_parameters_have_no_curvature():
    net, (x, y) = Beside(), batch()
    ng, params, context = build(net, x, uncovered="gradient")
    stats = ng.stats(params, (x, y), context=context)
    state, _ = ng.update(ng.init(params), stats)
    assert not ng.matvec(state, params)["scale"].any() and not (ng.fisher(stats) @ params)["scale"].any()
    assert "scale" not in {block.key for block in ng.layout.blocks} and not ng.layout.fallbacks


def test_plain_gradients_work_with_batch_norm_in_training_mode():
    net, (x, y) = Beside(norm=True).train(), batch()
    with as_installed(), pytest.raises(E.CoverageError, match='uncovered="gradient"'):
        build(net, x)
    ng, params, context = build(net, x, uncovered="gradient", fisher="empirical")
    expected = gradient(net, x, y)
    nat, _, info = ng.step(params, ng.init(params), (x, y), context=context)
    close(nat["scale"], expected["scale"])
    same(dict(ng.stats(params, (x, y), context=context).grads), expected)


def test_the_report_says_so():
    net, (x, _) = Beside(), batch()
    report = str(build(net, x, uncovered="gradient")[0].layout)
    (line,) = [line for line in report.splitlines() if line.startswith("scale")]
    assert "gradient" in line and "read by __setitem__; plain gradient, no curvature" in line
    assert report.endswith("\n43 entries covered: 43 by 2 layers; 5 take the plain gradient")


def test_where_layers_cover_all_it_changes_nothing():
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), batch()
    steps = []
    for uncovered in ("fallback", "gradient"):
        ng, params, context = build(net, x, uncovered=uncovered)
        steps.append(ng.step(params, ng.init(params), (x, y), context=context)[0])
        assert not ng.layout.uncovered and "all 43 entries covered" in str(ng.layout)
    close(*steps)


def test_a_gradient_that_is_not_finite_is_seen():
    """Finite loss, infinite slope of the root at zero."""

    def model(p, x):
        return F.linear(x, p["w"]) * outside(p["s"]).abs().sqrt()

    params = {"w": torch.ones(CLASSES, 4).double(), "s": torch.ones(CLASSES).double()}
    x, y = batch()
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2", uncovered="gradient")
    params = params | {"s": torch.tensor([0.0, 1.0, 1.0]).double()}
    state = ng.init(params)
    _, new, info = ng.step(params, state, (x, y))
    with pytest.raises(E.NonFiniteError, match="gradient"):
        ff.check(info)
    assert int(new.count) == 0


def test_models_together_under_vmap_are_the_single_ones():
    net, (x, y) = Beside(), batch()
    ng, params, context = build(net, x, uncovered="gradient")

    def step(params):
        return ng.step(params, ng.init(params, damping=0.1), (x, y), context=context)[0]

    check_vmap(step, params)


def test_another_length_shares_the_state():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.Linear(4, CLASSES), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.first(x * outside(self.scale)).mean(1)

    x = torch.randn(4, 3, 4).double()
    ng, params, context = build(Sequence(), x, uncovered="gradient")
    longer = ng.for_shape(params, torch.randn(4, 5, 4).double(), context=context)
    assert longer.layout.uncovered == ng.layout.uncovered


def test_no_layer_at_all_and_another_word():
    def model(p, x):
        return x[:, :CLASSES] * outside(p["s"])

    x, _ = batch()
    with as_installed(), pytest.raises(E.CoverageError, match="no parameter is in a layer"):
        ff.natural_gradient(
            model, {"s": torch.ones(CLASSES).double()}, x, likelihood=ff.Categorical(), uncovered="gradient"
        )
    with as_installed(), pytest.raises(E.UnknownNameError, match="gradient"):
        build(Beside(), x, uncovered="gradients")
