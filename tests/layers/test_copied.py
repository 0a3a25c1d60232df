"""Weights that are computed from parameters, and calls of no layer family: per-example gradients by autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check_chunks, check_fisher, check_gradients, kinds, normal, readout_of, same
from tests.nets import Readout, outside
from tests.oracles import close
from tests.zoo import from_net, sampled

# ------------------------------------------------------------------------------------------- reparametrised modules


class ScaledStdConv(nn.Conv2d):
    """A convolution of NFNets (Brock et al. 2021): batch norm standardises the kernel, a gain scales it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        kernel = F.batch_norm(flat, None, None, (self.gain * 0.4).view(-1), training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, kernel.reshape_as(self.weight), self.bias, self.stride, self.padding)


class StdConv(nn.Conv2d):
    """A convolution of BiT (Kolesnikov et al. 2020)."""

    def forward(self, x):
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(var + 1e-5), self.bias)


class LowRank(nn.Module):
    """LoRA merged into one product (Hu et al. 2021)."""

    def __init__(self, rank=2):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.zeros(rank, 4)), nn.Parameter(torch.zeros(4, rank))

    def forward(self, weight):
        return weight + 0.5 * self.B @ self.A


def low_rank():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


IMAGES, VECTORS, TIME_FIRST = (3, 2, 3, 3), (3, 4), (3, 5, 4)
MODULES = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), VECTORS),
    "weight norm of columns": (lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), VECTORS),
    "weight norm of kernels": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 2, groups=2)), IMAGES),
    "weight norm, transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose2d(2, 2, 2), dim=1), IMAGES),
    "weight norm over time": (lambda: parametrizations.weight_norm(nn.Linear(4, 2)), TIME_FIRST),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), VECTORS),
    "spectral norm of kernels": (lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)).eval(), IMAGES),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), (3, 3)),
    "standardised by batch norm": (lambda: ScaledStdConv(2, 3, 2, padding=1), IMAGES),
    "standardised": (lambda: StdConv(2, 3, 2), IMAGES),
    "low rank": (low_rank, VECTORS),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*performance drop")
def test_a_reparametrised_layer_is_exact_without_the_fallback(name):
    make, shape = MODULES[name]
    problem = from_net(nn.Sequential(make(), Readout(2)), shape, "categorical", blocks={"any": ()})
    run = sampled(problem, "type2")
    assert set(kinds(run.ng).values()) <= {"copied", "elementwise", "matmul"}  # B A is a layer itself
    assert not run.ng.layout.couples, "a normalised kernel is no batch norm"
    check_fisher(problem, run, "type2")
    check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight norm", "spectral norm"])
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
def test_the_older_forms_by_hooks(make):
    net = nn.Sequential(make(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    model, params, context = ff.functional(net)
    x, y = normal(4, 4), torch.tensor([0, 1, 1, 0])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert not ng.layout.fallbacks and "copied" in kinds(ng).values()
    density = zoo.LIKELIHOODS["categorical"][1]
    problem = zoo.Problem(lambda p, x: model(p, x, context)[0], params, x, y, ff.Categorical(), density, {})
    stats = ng.stats(params, (x, y), context=context)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_spectral_norm_in_training_mode_falls_back_and_is_exact():
    """Its power iteration writes into buffers."""
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)).double().train()
    model, params, context = ff.functional(net)
    x, y = normal(4, 4), torch.tensor([0, 1, 1, 0])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    (block,) = ng.layout.fallbacks
    assert block.weight == "0.parametrizations.weight.original"
    stats = ng.stats(params, (x, y), context=context)
    density = zoo.LIKELIHOODS["categorical"][1]
    problem = zoo.Problem(lambda p, x: model(p, x, context)[0], params, x, y, ff.Categorical(), density, {})
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_the_kernel_of_a_frozen_net_with_a_trained_low_rank_update():
    """A and B alone are trained, as in fine-tuning."""
    layer = low_rank()
    trained = lambda name: name.endswith((".A", ".B"))  # noqa: E731
    problem = from_net(nn.Sequential(layer, Readout(2)), (4, 4), "categorical", trained=trained, blocks={"any": ()})
    run = sampled(problem, "mc")
    assert kinds(run.ng) == {"0.parametrizations.weight.0": "matmul", "0.parametrizations.weight.0.B": "copied"}
    check_fisher(problem, run, "mc")


# ---------------------------------------------------------------------------------------------- calls of no family

M = (4, 4)
WAYS = {
    "matrix product": ((4,), lambda w, h: h @ torch.diag(w)),
    "einsum of three": (M, lambda w, h: torch.einsum("nti,ij,ntj->nt", h, w, h)),
    "normalised": (M, lambda w, h: F.linear(h, w / w.norm())),
    "examples on axis 1": (M, lambda w, h: F.linear(h.transpose(0, 1), w.tanh()).transpose(0, 1)),
    "merged": (M, lambda w, h: F.linear(h.flatten(0, 1), w.tanh()).unflatten(0, h.shape[:2])),
    "innermost": (
        M,
        lambda w, h: F.linear(h.transpose(0, 1).flatten(0, 1), w.tanh()).unflatten(0, (3, -1)).transpose(0, 1),
    ),
    "both halves": (M, lambda w, h: halves(F.linear(torch.cat([h, h.square()]), w.tanh()))),
    "parts of a matrix": ((8, 4), lambda w, h: F.linear(h, w.chunk(2)[0]) * F.linear(h, w.chunk(2)[1])),
    "row by row": (M, lambda w, h: torch.stack([F.linear(h, w[e : e + 1]).tanh() for e in range(4)], 1)),
    "transposed part": ((6, 4), lambda w, h: h @ w[:3].T),
    "the other side": (M, lambda w, h: (w.tanh() @ h.mT).mT),
    "twice": (M, lambda w, h: F.linear(torch.tanh(F.linear(h, w * 0.5)), w * w)),
    "bias of a frozen kernel": ((2,), lambda w, h: F.conv1d(h.mT, torch.ones(2, 4, 2).to(h), w)),
    "bias of a frozen norm": ((3,), lambda w, h: F.batch_norm(h, torch.zeros(3).to(h), torch.ones(3).to(h), None, w)),
    "computed table": ((5, 2), lambda w, h: F.embedding((h > 0).sum(-1), w / w.norm(dim=-1, keepdim=True))),
    "convolution with itself": ((2, 4, 2), lambda w, h: F.conv1d(h.mT, w / w.norm())),
    "norm of all entries": (M, lambda w, h: F.linear(h, torch._weight_norm(w, torch.tensor(2.0).to(h), -1))),
    "queries": (M, lambda w, h: F.scaled_dot_product_attention(w.expand(len(h), 4, 4), h, h)),
}


def halves(y):
    a, b = y.chunk(2)
    return a * b


@pytest.mark.parametrize("way", WAYS)
def test_every_call_is_exact(way):
    shape, how = WAYS[way]
    problem = readout_of(how, shape)
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher)
        assert kinds(run.ng) == {"w": "elementwise" if way == "queries" else "copied"}
        check_fisher(problem, run, fisher)
        check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)


@pytest.mark.parametrize("way", ["innermost", "both halves", "examples on axis 1"])
@pytest.mark.parametrize("traced", [1, 3, 4])
def test_as_many_examples_as_anything_else(way, traced):
    shape, how = WAYS[way]
    problem = readout_of(how, shape, 5)
    ng = readout_of(how, shape, traced).build(fisher="empirical")
    assert kinds(ng) == {"w": "copied"}
    stats = ng.stats(problem.params, problem.batch)
    close(ng.fisher(stats).dense(), oracles.fisher_matrix(problem, "empirical"))


def test_the_report_names_the_call():
    (block,) = readout_of(WAYS["normalised"][1], M).build().layout.blocks
    assert block.why == "seen in the trace, copies for linear; one dense block"


def test_a_call_that_mixes_examples_raises():
    """A mean over the batch, behind the call or in it: refused, as no per-example gradient exists."""

    def model(p, x):
        h = torch.einsum("nti,ij->ntj", x, p["w"].tanh())
        return Readout(2)(h - h.mean(0))

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError):
        ff.natural_gradient(model, {"w": normal(4, 4)}, normal(3, 2, 4), likelihood=ff.Categorical())

    def cumulated(p, x):
        return Readout(2)(torch.einsum("ni,ij,mi->nj", x, p["w"].tanh(), x))

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError):
        ff.natural_gradient(cumulated, {"w": normal(4, 4)}, normal(3, 4), likelihood=ff.Categorical())


def raw_distances(h, w):
    """Distances by the kernel of `torch.cdist`, whose derivative is wrong under two nested vmaps."""
    return torch.ops.aten._cdist_forward(h, w, 2.0, None)


@pytest.mark.parametrize(("function", "kind"), [(raw_distances, "fallback"), (torch.cdist, "elementwise")])
def test_calls_that_torch_batches_wrongly_use_the_fallback(function, kind):
    problem = readout_of(lambda w, h: function(h, w), (3, 4))
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher)
        assert kinds(run.ng) == {"w": kind}
        check_fisher(problem, run, fisher)


def test_prelu_is_computed_by_its_definition():
    problem = readout_of(lambda w, h: F.prelu(h, w), (3,))
    for fisher in zoo.FISHERS:
        run = sampled(problem, fisher)
        assert kinds(run.ng) == {"w": "elementwise"}
        check_fisher(problem, run, fisher)


class Beside(nn.Module):
    """A computed weight beside a batch norm, in a model that branches on values."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.norm(self.inner(x))
        return self.head(torch.tanh(h) if x.abs().sum() > 0 else h)


def test_copied_weights_work_with_batch_norm_in_training_mode_and_branches():
    """The fallback could not: examples are coupled, and values are branched on. The gradient is autograd's."""
    net = Beside().double().train()
    model, params, context = ff.functional(net)
    x, y = normal(5, 3), torch.tensor([0, 1, 1, 0, 1])
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert not ng.layout.fallbacks and ng.layout.couples
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    stats = ng.stats(params, (x, y), context=context)
    same(dict(stats.grads), dict(zip(dict(net.named_parameters()), grads, strict=True)))


def test_watched_passes_are_those_of_the_library():
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = normal(5, 3), torch.tensor([0, 1, 1, 0, 1])
    found = []
    for watched in (True, False):
        pre = ff.optim.Preconditioner(net, likelihood=ff.Categorical(), damping=0.1, example_inputs=x)
        net.zero_grad()
        if watched:
            with pre.watch():
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            pre.step()
        else:
            F.cross_entropy(net(x), y).backward()
            pre.step((x, y))
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    close(found[0], found[1])


class Everything(nn.Module):
    """A recurrent net, dropout with the examples on axis 1, experts, a normalised head and a parameter beside them."""

    def __init__(self):
        super().__init__()
        self.words, self.net = nn.Embedding(5, 3), nn.LSTM(3, 4)
        self.experts = nn.Parameter(torch.linspace(-1.0, 1.0, 24).reshape(2, 4, 3))
        self.head = parametrizations.weight_norm(nn.Linear(6, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, ids):
        h = F.dropout(self.net(self.words(ids).transpose(0, 1))[0], 0.5, self.training)[-1]
        return self.head(torch.einsum("ni,eio->neo", h, self.experts).tanh().flatten(1)) * outside(self.scale)


def test_a_compiled_step_is_the_step():
    net, ids = Everything().double().train(), torch.randint(5, (4, 3), generator=zoo.generator())
    model, params, context = ff.functional(net)
    context = context | {"dropout": ff.dropout_seeds(4, zoo.generator())}
    ng = ff.natural_gradient(
        model, params, ids, likelihood=ff.Categorical(), fisher="type2", context=context, uncovered="gradient"
    )
    assert set(kinds(ng).values()) == {"embedding", "linear", "einsum", "copied", "elementwise"}
    assert [name for name, _ in ng.layout.uncovered] == ["scale"]
    batch, state = (ids, torch.tensor([0, 1, 1, 0])), ng.init(params, damping=0.1)
    compiled = ff.compile(ng.step, backend="eager")
    found, expected = (step(params, state, batch, context=context)[0] for step in (compiled, ng.step))
    close(found, expected)
