"""Adaptive K-FAC takes the steps of kfac-jax, the reference implementation of Martens & Grosse 2015.

Both sides: the exact Fisher of one fixed batch, no running average, inverses at every step, factored damping with the
same π, step size and momentum from the quadratic model with λ, ρ from it without λ, λ adapted at every step; float64.
"""

import numpy as np
import pytest
import torch

import fisherfn as ff
from fisherfn.adapt import damping as rules
from tests.optional.installed import need

jax = need("jax", extra="reference")
kfac_jax = need("kfac_jax", extra="reference")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, WIDTHS, EXAMPLES = 20, (5, 8, 7, 4), 30


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(seed=0):
    """A tanh net with biases, inputs and classes, as arrays."""
    rng = np.random.default_rng(seed)
    layers = [
        (rng.normal(size=(i, o)) / np.sqrt(i), 0.1 * rng.normal(size=o))
        for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)
    ]
    x = rng.normal(size=(EXAMPLES, WIDTHS[0]))
    return layers, x, {"classes": rng.integers(WIDTHS[-1], size=EXAMPLES), "reals": rng.normal(size=(EXAMPLES, 4))}


def theirs(layers, x, y, kind, start):
    """Losses, step sizes, momenta, λ and ρ of every step, and the last parameters, from kfac-jax."""
    jnp = jax.numpy

    def loss_of(params, batch):
        h, y = batch
        for number, (w, b) in enumerate(params):
            h = h @ w + b
            h = jnp.tanh(h) if number < len(params) - 1 else h
        if kind == "classes":
            kfac_jax.register_softmax_cross_entropy_loss(h, y)
            return -jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], axis=1).mean()
        kfac_jax.register_normal_predictive_distribution(h, y, variance=1.0)
        return 0.5 * ((h - y) ** 2).sum(axis=1).mean()

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_of), l2_reg=0.0, use_adaptive_learning_rate=True, use_adaptive_momentum=True,
        use_adaptive_damping=True, initial_damping=start, damping_adaptation_interval=1,
        damping_adaptation_decay=rules.DECAY, num_burnin_steps=0, estimation_mode="fisher_exact", curvature_ema=0.0,
        inverse_update_period=1, min_damping=1e-12, multi_device=False,
    )  # fmt: skip
    params, batch = [tuple(map(jnp.asarray, layer)) for layer in layers], (jnp.asarray(x), jnp.asarray(y))
    state = optimizer.init(params, jax.random.PRNGKey(0), batch)
    rows = []
    for step in range(STEPS):
        params, state, stats = optimizer.step(
            params, state, jax.random.PRNGKey(step), batch=batch, global_step_int=step
        )
        keys = ("loss", "learning_rate", "momentum", "damping", "rho")
        rows.append([float(stats[key]) for key in keys])
    return np.array(rows), [np.asarray(leaf) for layer in params for leaf in layer]


def ours(layers, x, y, kind, start, monkeypatch):
    """The same from `ff.adaptive`."""
    monkeypatch.setattr(ff.adapt.optimizer, "FLOOR", 0.0)

    def model(params, h):
        for number in range(len(layers)):
            h = torch.nn.functional.linear(h, params[f"w{number}"], params[f"b{number}"])
            h = torch.tanh(h) if number < len(layers) - 1 else h
        return h

    params = {f"w{n}": torch.tensor(w.T.copy()) for n, (w, _) in enumerate(layers)}
    params |= {f"b{n}": torch.tensor(b) for n, (_, b) in enumerate(layers)}
    batch = (torch.tensor(x), torch.tensor(y))
    likelihood = ff.Categorical() if kind == "classes" else ff.Gaussian()
    ng = ff.natural_gradient(model, params, batch[0], likelihood=likelihood, method="kfac", fisher="type2")
    opt = ff.adaptive(ng, rule="model", ema=0.0, model_examples=EXAMPLES, look_back=False)
    unit = float(ng.trace(ng.update(ng.init(params, damping=1.0), ng.stats(params, batch))[0]))
    unit /= sum(leaf.numel() for leaf in params.values())
    monkeypatch.setattr(ff.adapt.optimizer, "START", start / unit)
    state, rows = opt.init(params), []
    for _ in range(STEPS):
        params, state, info = opt.step(params, state, batch)
        assert not info.adapted.rejected
        found = info.adapted
        rows.append(
            [float(v) for v in (info.loss, found.learning_rate, found.momentum, found.damping, found.reduction_ratio)]
        )
    return np.array(rows), [params[f"{kind}{n}"].numpy().T for n in range(len(layers)) for kind in "wb"]


@pytest.mark.parametrize("kind", ["classes", "reals"])
def test_twenty_steps_are_those_of_kfac_jax(kind, monkeypatch):
    layers, x, targets = problem()
    expected, last = theirs(layers, x, targets[kind], kind, start=0.5)
    got, params = ours(layers, x, targets[kind], kind, 0.5, monkeypatch)
    names = ("loss", "learning rate", "momentum", "damping", "reduction ratio")
    for column, name in enumerate(names):
        np.testing.assert_allclose(got[:, column], expected[:, column], rtol=1e-5, atol=1e-8, err_msg=name)
    for mine, reference in zip(params, last, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-8)
