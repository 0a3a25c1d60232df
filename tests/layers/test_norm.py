"""Batch norm's affine part in evaluation mode: examples are independent, so per-example gradients are the oracle."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

import fisherfn as ff


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
