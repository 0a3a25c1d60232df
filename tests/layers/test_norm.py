"""Batch norm. Evaluated, examples are independent and per-example gradients the oracle; in training they are not.

Output-gradients are N · ∂(mean loss)/∂s then. The other norms: test_affine.py.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fisherfn as ff
from tests.layers import unit_weights
from tests.layers.checks import dense, kinds, normal, same
from tests.nets import MeanPool
from tests.oracles import close


def evaluated_net() -> torch.nn.Module:
    """Running statistics and affine parameters far from their defaults."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).double().eval()
    with torch.no_grad():
        for tensor in (net[1].running_mean, net[1].weight, net[1].bias):
            tensor.copy_(torch.randn(4, generator=generator))
        net[1].running_var.copy_(0.5 + torch.rand(4, generator=generator))
    return net


def test_taps_in_evaluation_mode_are_the_per_example_gradients():
    net = evaluated_net()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (5,), generator=generator)
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert [block.kind for block in ng.layout.blocks] == ["linear", "batch norm", "linear"]

    def loss(p, x_n, y_n):
        return torch.nn.functional.cross_entropy(functional_call(net, p, (x_n[None],)), y_n[None])

    expected = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    a, g = ng.stats(params, (x, y), context=context).taps["1"]
    per_example = torch.einsum("ksnto,knti->nkoi", g, a)[:, :, 0]
    torch.testing.assert_close(per_example[..., 0], expected["1.weight"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(per_example[..., 1], expected["1.bias"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_context", [False, True])
def test_other_couplings_are_refused_with_or_without_a_context(with_context):
    """Centring over the batch is no batch norm: no layer's rows are an example's, and nothing else can serve."""
    generator = torch.Generator().manual_seed(2)
    params = {"w": torch.randn(2, 3, generator=generator, dtype=torch.float64)}
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def centred(p, x):
        h = torch.nn.functional.linear(x, p["w"])
        return h - h.mean(0)

    context = {"unused": torch.zeros(1)} if with_context else None
    model = (lambda p, x, c: (centred(p, x), c)) if with_context else centred
    with pytest.raises(ff.errors.CoverageError, match="couples the examples"):
        ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), context=context)


# ------------------------------------------------------------------------------------------------ in a conv net


def conv_net(momentum=0.1):
    generator = torch.Generator().manual_seed(3)
    body = [nn.Conv2d(2, 4, 2, bias=False, groups=2), nn.BatchNorm2d(4, momentum=momentum), nn.Tanh()]
    head = [nn.ConvTranspose2d(4, 3, 2, 2), nn.BatchNorm2d(3, momentum=momentum), nn.Softplus(), MeanPool()]
    net = nn.Sequential(*body, *head, nn.Linear(3, 2)).double().train()
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return net


KINDS = {"0": "conv", "1": "batch norm", "3": "conv transpose", "4": "batch norm", "7": "linear"}
X, Y = normal(5, 2, 3, 3), torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_torch_moves_them(momentum):
    """Once a step; neither the module's nor the given ones."""
    net = conv_net(momentum)
    model, params, context = ff.functional(net)
    before = {name: leaf.clone() for name, leaf in context.items()}
    ng = ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert kinds(ng) == KINDS
    state = ng.init(params)
    for k in range(2):
        _, state, info = ng.step(params, state, (X + k, Y), context=context)
        assert all(torch.equal(context[name], leaf) for name, leaf in before.items()), "the given context moved"
        context = info.context
        before = {name: leaf.clone() for name, leaf in context.items()}
        net(X + k)
        for name, buffer in net.named_buffers():
            close(context[name].double(), buffer.double())


def test_output_gradients_are_n_times_those_of_the_mean_loss():
    """Check every layer, including the cross-example terms; the rows are the inputs of each layer."""
    net = conv_net()
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, X, likelihood=ff.Categorical(), fisher="empirical", context=context)
    stats = ng.stats(params, (X, Y), context=context)
    outputs = {}
    for key in KINDS:
        net[int(key)].register_forward_hook(lambda mod, args, out, key=key: outputs.__setitem__(key, (args[0], out)))
    loss = nn.functional.cross_entropy(net(X), Y)
    close(stats.loss, loss.detach())
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    same(dict(stats.grads), dict(zip(dict(net.named_parameters()), grads, strict=True)))
    for key, (x, out) in outputs.items():
        (g,) = torch.autograd.grad(loss, out, retain_graph=True)
        tap, module = stats.tap(key), net[int(key)]
        expected = torch.stack([unit_weights.as_kto(module, len(X) * g[n : n + 1]) for n in range(len(X))], dim=1)
        close(tap.g[:, 0], expected)
        if KINDS[key] == "batch norm":
            over = (0, 2, 3)
            normalised = x - x.mean(over, keepdim=True)
            normalised = normalised / (x.var(over, keepdim=True, correction=0) + module.eps).sqrt()
            rows = normalised.detach().flatten(2).transpose(0, 1).unsqueeze(-1)
        elif KINDS[key] == "conv transpose":
            continue  # its columns may come in another order; the gradient above saw them
        else:
            rows = torch.stack([unit_weights.unit_rows(module, x[n : n + 1].detach()) for n in range(len(X))], dim=1)
        close(dense(tap.a)[..., : rows.shape[-1]], rows)
