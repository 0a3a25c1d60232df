"""Experts on rows that are sorted by their expert: `grouped_mm`, as transformers' mixtures of experts call it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.overrides import handle_torch_function, has_torch_function

import fisherfn as ff
from fisherfn.layers import routed
from tests import zoo
from tests.layers.checks import check_chunks, check_fisher, check_gradients, check_vmap, kinds, normal
from tests.nets import Readout
from tests.oracles import close
from tests.zoo import from_net, sampled

E = ff.errors
pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
EXPERTS, WIDTH, EACH = 3, 4, 2


def product(x, weight, offs):
    """`grouped_mm` by its definition, for float64 and for oracles that vmap: torch's own does neither."""
    if has_torch_function((x, weight)):
        return handle_torch_function(product, (x, weight), x, weight, offs=offs)
    expert = (torch.arange(len(x)).unsqueeze(-1) >= offs).sum(-1)
    return torch.einsum("rko,rk->ro", torch.einsum("ri,kio->rko", x, weight), hot(expert).to(x))


def hot(expert):
    return expert.unsqueeze(-1) == torch.arange(EXPERTS)


class Mixture(nn.Module):
    """Each token goes to its top experts, with a gate; `[N, T, 4]` in."""

    def __init__(self, product=product, turned=True, time_first=False):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = (nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDTH)) for _ in range(2))
        self.product, self.turned, self.time_first = product, turned, time_first

    def of_experts(self, x, weight, ends):
        return self.product(x, weight.transpose(-2, -1) if self.turned else weight, offs=ends)

    def forward(self, x):
        h = x.transpose(0, 1) if self.time_first else x
        tokens = h.flatten(0, 1)
        gates, experts = self.router(tokens).softmax(-1).topk(EACH, -1)
        perm = experts.flatten().argsort(stable=True)
        ends = hot(experts.flatten()).sum(0).cumsum(0).to(torch.int32)
        inner = torch.tanh(self.of_experts(tokens[perm // EACH], self.up, ends))
        out = self.of_experts(inner, self.down, ends) * gates.flatten()[perm].unsqueeze(-1)
        joined = out[perm.argsort()].unflatten(0, (-1, EACH)).sum(1).unflatten(0, h.shape[:2])
        return Readout(2)(joined.transpose(0, 1) if self.time_first else joined)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The definition is taken for torch's own."""
    monkeypatch.setattr(routed, "GROUPED", product)


def case(fisher="type2", **how):
    problem = from_net(Mixture(**how), (4, 3, WIDTH), "categorical")
    return problem, sampled(problem, fisher)


WAYS = {
    "as transformers": {},
    "weights as they are": {"turned": False},
    "time first": {"time_first": True},
    "labels of the data": {"fisher": "empirical"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_exact(way):
    problem, run = case(**WAYS[way])
    assert kinds(run.ng) == {"up": "einsum", "down": "einsum", "router": "linear"}
    close(run.stats.outputs, problem.model(problem.params, problem.x))
    check_gradients(problem, run.ng, run.stats)
    check_fisher(problem, run, WAYS[way].get("fisher", "type2"))
    check_chunks(problem, run)


def test_an_expert_sees_its_own_rows_only():
    _, run = case()
    tap = run.stats.tap("up")
    seen = tap.a.abs().sum(-1) > 0  # [K, N, rows]
    assert bool((seen.sum(0) == 1).all()) and seen.shape == (EXPERTS, 4, 3 * EACH)
    assert not tap.g.abs().amax((1, -1))[~seen].any()


def test_models_together_under_vmap():
    problem, run = case()
    check_vmap(lambda params: dict(run.ng.stats(params, problem.batch).grads), problem.params)


def test_torchs_own_product_is_known(monkeypatch):
    monkeypatch.undo()
    net = Mixture(F.grouped_mm)
    for p in net.parameters():
        p.data = normal(*p.shape).float() / 2
    model, params, context = ff.functional(net)
    x, y = normal(4, 3, WIDTH, seed=1).float(), torch.tensor([0, 1, 1, 0])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)
    assert kinds(ng) == {"up": "einsum", "down": "einsum", "router": "linear"}
    grads = ng.stats(params, (x, y), fisher="empirical", context=context).grads
    names = list(params)
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), [net.get_parameter(name) for name in names])
    close(dict(grads), dict(zip(names, expected, strict=True)), tol=1e-5)


def chosen(weight, x):
    """Give each expert as many tokens; a large number makes a token take the place of another."""
    tokens = x.flatten(0, 1)
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (len(tokens) // EXPERTS)
    rows = torch.where(tokens[:, 0] > 50, 1, torch.arange(len(tokens)))
    return product(tokens[rows], weight, offs=ends).unflatten(0, (len(x), -1)).mean(1)


def test_tokens_with_different_numbers_of_experts_are_refused():
    params = {"w": normal(EXPERTS, WIDTH, 2)}
    x, y = normal(4, 3, WIDTH), torch.zeros(4, dtype=torch.long)
    ng = ff.natural_gradient(lambda p, x: chosen(p["w"], x), params, x, likelihood=ff.Categorical(), fisher="empirical")
    assert kinds(ng) == {"w": "einsum"}
    ng.stats(params, (x, y))
    x[0, 0, 0] = 100
    with zoo.as_installed(), pytest.raises(E.StructureError, match="top-k"):
        ng.stats(params, (x, y))
    losses = vmap(lambda x: ng.stats(params, (x, y)).loss)(x[None])
    assert bool(losses.isnan().all())


def test_rows_in_an_order_that_is_not_known_fall_back():
    """Rows that were not gathered."""

    def model(p, x):
        ends = torch.full((EXPERTS,), 2 * len(x), dtype=torch.int32)
        return product(x.flatten(0, 1), p["w"], offs=ends).unflatten(0, (len(x), -1)).mean(1)

    params, x = {"w": normal(EXPERTS, WIDTH, 2)}, normal(4, 2, WIDTH)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical")
    assert "einsum" not in kinds(ng).values()
