"""Products with a parameter of any axes: experts, heads, batched matrices. Per-example gradients by autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check_chunks, check_fisher, check_gradients, kinds, normal, readout_of
from tests.nets import Readout
from tests.oracles import close
from tests.zoo import from_model, from_net, sampled

E = torch.einsum
# the weight's shape, the call on h [N, 3, 4], the block K×out×in and the positions
WAYS = {
    "linear": ((4, 2), lambda w, h: E("nti,io->nto", h, w), (1, 2, 4), 3),
    "weight first": ((2, 4), lambda w, h: E("oi,nti->nto", w, h), (1, 2, 4), 3),
    "experts on one input": ((3, 4, 2), lambda w, h: E("nti,eio->nteo", h, w), (1, 6, 4), 3),
    "experts on their own": ((3, 4, 2), lambda w, h: E("nei,eio->neo", h, w), (3, 2, 4), 1),
    "experts first": ((3, 4, 2), lambda w, h: E("eni,eio->neo", h.transpose(0, 1), w), (3, 2, 4), 1),
    "experts with tokens": ((2, 3, 4), lambda w, h: E("neti,eoi->neto", torch.stack([h, h * h], 1), w), (2, 3, 4), 3),
    "heads": ((4, 2, 3), lambda w, h: E("nti,ihd->nhtd", h, w), (1, 6, 4), 3),
    "heads put together": ((3, 4, 2), lambda w, h: E("nhd,hde->ne", h, w), (1, 2, 12), 1),
    "scale": ((4,), lambda w, h: E("nti,i->nti", h, w), (4, 1, 1), 3),
    "scale and sum": ((3, 4), lambda w, h: E("nti,ti->ni", h, w), (4, 1, 3), 1),
    "tokens summed": ((4, 2), lambda w, h: E("nti,io->no", h, w), (1, 2, 4), 1),
    "ellipsis": ((4, 2), lambda w, h: E("...i,io->...o", h, w), (1, 2, 4), 3),
    "implicit": ((4, 2), lambda w, h: E("nti,io", h, w).movedim(0, 0), (1, 2, 4), 3),
    "list of operands": ((4, 2), lambda w, h: E("nti, io -> nto", [h, w]), (1, 2, 4), 3),
    "repeated use": ((4, 4), lambda w, h: E("nti,io->nto", torch.tanh(E("nti,io->nto", h, w)), w), (1, 4, 4), 6),
    "bmm": ((3, 4, 2), lambda w, h: torch.bmm(h.transpose(0, 1), w).transpose(0, 1), (3, 2, 4), 1),
    "bmm, merged": ((2, 4, 2), lambda w, h: merged_bmm(w, h), (2, 2, 4), 3),
    "bmm, weight first": ((3, 2, 4), lambda w, h: torch.bmm(w, h.permute(1, 2, 0)).permute(2, 0, 1), (3, 2, 4), 1),
    "baddbmm": (
        (3, 4, 2),
        lambda w, h: torch.baddbmm(h.new_ones(3, 1, 2), h.transpose(0, 1), w).transpose(0, 1),
        (3, 2, 4),
        1,
    ),
    "matmul": ((3, 4, 2), lambda w, h: h.unsqueeze(-2) @ w, (3, 2, 4), 1),
    "matmul on one input": ((2, 4, 2), lambda w, h: h.unsqueeze(1) @ w, (1, 4, 4), 3),
    "matmul, weight first": ((3, 2, 4), lambda w, h: (w @ h.unsqueeze(-1)).squeeze(-1), (3, 2, 4), 1),
    "matrix, weight first": ((2, 4), lambda w, h: w @ h.mT, (1, 2, 4), 3),
    "matmul of two groups": ((2, 3, 4, 2), lambda w, h: torch.stack([h, h * h], 1).unsqueeze(-2) @ w, (6, 2, 4), 1),
}


def merged_bmm(w, h):
    both = torch.stack([h, h * h]).flatten(1, 2)
    return torch.bmm(both, w).unflatten(1, h.shape[:2]).transpose(0, 1)


@pytest.mark.parametrize("way", WAYS)
def test_every_product_is_exact(way):
    shape, how, block, positions = WAYS[way]
    problem = readout_of(how, shape)
    run = sampled(problem, "mc")
    assert kinds(run.ng) == {"w": "einsum"} and run.ng.layout.block("w").shape == block
    assert run.stats.tap("w").a.shape == (block[0], 3, positions, block[2])
    check_fisher(problem, run, "mc")
    check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)
    matrix = run.ng.layout.block("w").matrix(problem.params)
    close(run.ng.layout.block("w").tensors(matrix), problem.params)


OTHERS = {
    "of three": ((4, 4), lambda w, h: E("nti,ij,ntj->nt", h, w, h), "copied"),
    "with itself": ((4, 4), lambda w, h: E("nti,ij,jk->ntk", h, w, w), "copied"),
    "weight summed alone": ((4, 2), lambda w, h: E("nti,io->nti", h, w), "copied"),
    "diagonal": ((4, 4), lambda w, h: E("nti,ii->nti", h, w), "copied"),
    "broadcast": ((2, 1), lambda w, h: E("nti,io->nto", h.unflatten(-1, (2, 2)).sum(-1), w.expand(2, 3)), "copied"),
    "in two ways": ((4, 4), lambda w, h: E("nti,io->nto", h, w) + E("nti,oi->nto", h, w), "fallback"),
}


@pytest.mark.parametrize("way", OTHERS)
def test_other_products_are_exact_too(way):
    shape, how, kind = OTHERS[way]
    problem = readout_of(how, shape)
    run = sampled(problem, "type2")
    assert kinds(run.ng) == {"w": kind}
    check_fisher(problem, run, "type2")


@pytest.mark.parametrize("traced", [1, 2, 3, 4])
@pytest.mark.parametrize("way", ["experts first", "bmm, merged", "experts with tokens"])
def test_as_many_examples_as_experts(way, traced):
    shape, how, _, _ = WAYS[way]
    problem, ng = readout_of(how, shape, 5), readout_of(how, shape, traced).build(fisher="empirical")
    assert kinds(ng) == {"w": "einsum"}
    stats = ng.stats(problem.params, problem.batch)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


class Mixture(nn.Module):
    """Two experts of two layers each, mixed by a gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, 2)
        self.inner, self.shift = nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(2, 1, 4))
        self.outer = nn.Parameter(torch.zeros(2, 4, 2))

    def forward(self, x):
        h = torch.tanh(torch.baddbmm(self.shift, x.expand(2, -1, -1), self.inner))
        return torch.einsum("ne,enh,eho->no", self.gate(x).softmax(-1), h, self.outer)


class Experts(Mixture):
    """The same with the products one after another."""

    def forward(self, x):
        h = torch.tanh(torch.baddbmm(self.shift, x.expand(2, -1, -1), self.inner))
        return (self.gate(x).softmax(-1).unsqueeze(-1) * torch.einsum("enh,eho->neo", h, self.outer)).sum(1)


@pytest.mark.parametrize(("net", "last"), [(Mixture, "copied"), (Experts, "einsum")])
@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_a_mixture_of_experts(net, last, fisher):
    problem = from_net(net(), (4, 3), "categorical", blocks={"any": ()})
    run = sampled(problem, fisher)
    assert kinds(run.ng) == {"gate": "linear", "inner": "einsum", "shift": "elementwise", "outer": last}
    check_fisher(problem, run, fisher)
    check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)


def test_kfac_of_experts_is_kfac_of_each():
    """One Kronecker pair per expert: the step is that of linear layers written out."""

    def together(p, x):
        return Readout(2)(E("nei,eio->neo", x, p["w"]))

    def written_out(p, x):
        return Readout(2)(torch.stack([F.linear(x[:, e], p[f"w{e}"]) for e in range(3)], 1))

    w, x = normal(3, 4, 2), normal(5, 3, 4, seed=1)
    steps = []
    for model, params in ((together, {"w": w}), (written_out, {f"w{e}": w[e].T.contiguous() for e in range(3)})):
        problem = from_model(model, params, x, "categorical", zoo.generator(), {})
        ng = problem.build(method=ff.kfac(), fisher="type2")
        steps.append(ng.step(params, ng.init(params, damping=0.1), problem.batch)[0])
    close(steps[0]["w"], torch.stack([steps[1][f"w{e}"].T for e in range(3)]))


def test_a_layer_that_no_example_enters():
    """A table of experts' products on a fixed grid, added to every example."""
    grid = normal(3, 2, seed=5)

    def model(p, x):
        return Readout(2)(torch.tanh(x + E("gi,eio->geo", grid, p["w"]).flatten(1)))

    problem = from_model(model, {"w": normal(2, 2, 2)}, normal(4, 3, 4), "categorical", zoo.generator(), {})
    run = sampled(problem, "type2")
    assert kinds(run.ng) == {"w": "einsum"} and "no example enters" in str(run.ng.layout)
    check_fisher(problem, run, "type2")
