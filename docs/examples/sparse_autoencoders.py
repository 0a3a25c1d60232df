"""Sparse autoencoders of a hidden layer, each with its own ℓ1 coefficient: all are trained in one vmapped step.

A classifier of digits gives the activations x. An autoencoder describes each by few features, h = relu(W x + b) and
x ≈ D h + d, and minimises ½ ‖x − D h − d‖² + c Σ h. The left picture shows for every c how many features are active
and how much of the variance is not explained, the right one the mean loss by time, also of Adam with the best of
six rates.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, vmap

import fisherfn as ff
from fisherfn import members


class Sparse:
    """½ ‖x − x̂‖² + c Σ h for outputs (x̂, h) and targets (x, c); only x̂ has a distribution, a Gaussian."""

    def nll(self, outputs, targets):
        """Return the loss of each example."""
        x, c = targets
        return (outputs[:, : x.shape[1]] - x).square().sum(-1) / 2 + c * outputs[:, x.shape[1] :].sum(-1)

    def fisher_sqrt(self, outputs):
        """Return the columns of a root of the outputs' Fisher: one for each entry of x̂."""
        width = outputs.shape[1] // 3  # there are twice as many features as activations
        return torch.eye(width, outputs.shape[1])[:, None].expand(width, *outputs.shape)


class Autoencoder(nn.Module):
    """A sparse autoencoder, whose outputs are the description and the features."""

    def __init__(self, width):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """Return descriptions and features, `[N, width + 2 width]`."""
        h = self.encoder(x).relu()
        return torch.cat([self.decoder(h), h], -1)


def with_unit_columns(params):
    """Return the parameters with columns of D of length one; else large columns would make small features cheap."""
    D = params["decoder.weight"]
    return {**params, "decoder.weight": D / D.norm(dim=0).clamp(min=1e-6)}


def activations(steps):
    """Train a classifier of digits without hyperparameters; return the activations of its hidden layer."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    net, rng = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), torch.Generator().manual_seed(0)
    params = {name: torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5 for name, p in net.named_parameters()}

    def model(params, x):
        return functional_call(net, params, (x,))

    opt = ff.adaptive(ff.natural_gradient(model, params, x, likelihood=ff.Categorical()))
    state, due = opt.init(params), ff.Cadence()
    for step in range(steps):
        part = torch.randperm(len(x), generator=rng)[:256]
        params, state, info = opt.step(params, state, (x[part], y[part]), **due(step)._asdict(), generator=rng)
        ff.check(info)
    hidden = nn.functional.linear(x, params["0.weight"], params["0.bias"]).tanh()
    return (hidden - hidden.mean(0)) / hidden.std()


def main(out: Path, small: bool = False) -> dict:
    """Train all autoencoders by K-FAC without hyperparameters, and by Adam; draw `sparse_autoencoders.png`."""
    torch.set_num_threads(1)
    x = activations(5 if small else 60)
    coefficients = torch.logspace(-2, 0.3, 3 if small else 16)
    rng = torch.Generator().manual_seed(0)
    net = Autoencoder(x.shape[1])
    start = {name: torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5 for name, p in net.named_parameters()}
    start = members.repeat(with_unit_columns(start), len(coefficients))
    orders = [torch.randperm(len(x), generator=rng)[:256] for _ in range(20 if small else 1500)]

    def model(params, x):
        return functional_call(net, params, (x,))

    def batch(c, part):
        return x[part], (x[part], c.expand(len(part)))

    def loss(params, c, part):
        inputs, targets = batch(c, part)
        return Sparse().nll(model(params, inputs), targets).mean()

    def losses(params):
        return vmap(loss, (0, 0, None))(params, coefficients, torch.arange(len(x)))

    first = members.take(start, 0)
    ng = ff.natural_gradient(model, first, x[:256], likelihood=Sparse(), fisher="type2")
    opt, due = ff.adaptive(ng), ff.Cadence()

    def natural(steps):
        params, state = start, vmap(opt.init)(start)
        for step in range(steps):

            def one(params, state, c, step=step):
                new, state, info = opt.step(params, state, batch(c, orders[step]), **due(step)._asdict())
                return with_unit_columns(new), state, info

            params, state, info = vmap(one)(params, state, coefficients)
            ff.check(info)
            yield params

    def adam(steps, rate):
        params = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimizer = torch.optim.Adam(params.values(), lr=rate)  # it treats every number alone, so also every member
        for step in range(steps):
            optimizer.zero_grad()
            vmap(loss, (0, 0, None))(params, coefficients, orders[step]).sum().backward()
            optimizer.step()
            with torch.no_grad():
                params["decoder.weight"].copy_(vmap(with_unit_columns)(params)["decoder.weight"])
            yield {name: p.detach() for name, p in params.items()}

    found = {"K-FAC": timed(natural(10 if small else 250), losses)}
    for rate in (0.01,) if small else (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2):
        found[f"Adam, {rate:g}"] = timed(adam(20 if small else 1500, rate), losses)
    for name, run in found.items():
        seconds, each = run["curve"][-1]
        print(f"{name:12} {len(run['curve']):3} points, {seconds:5.1f} s, mean loss {each.mean():.4f}")
    best = min((name for name in found if name != "K-FAC"), key=lambda name: found[name]["curve"][-1][1].mean())
    runs = {name: found[name] for name in ("K-FAC", best)}
    for run in runs.values():
        outputs = vmap(model, (0, None))(run["params"], x)
        left = (outputs[..., : x.shape[1]] - x).square().sum((1, 2))
        run["left"] = left / (x - x.mean(0)).square().sum()
        run["active"] = (outputs[..., x.shape[1] :] > 0).float().mean(1).sum(1)
    draw(out / "sparse_autoencoders.png", coefficients, runs)
    return {"coefficients": coefficients, "runs": runs, "model": model, "batch": batch, "start": start,
            "orders": orders}  # fmt: skip


def timed(steps, losses):
    """Return the last parameters, and seconds of training with the losses of all members, at every tenth step."""
    curve, began, spent = [], time.perf_counter(), 0.0
    for step, params in enumerate(steps, 1):
        if step % 10 == 0:
            spent += time.perf_counter() - began
            curve.append((spent, losses(params)))
            began = time.perf_counter()
    return {"params": params, "curve": curve}


def draw(file: Path, coefficients, runs) -> None:
    """Draw active features against the variance that is not explained, and the mean loss by time."""
    figure, (one, two) = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for (name, run), color, marker in zip(runs.items(), ("#0072B2", "#D55E00"), "os", strict=True):
        one.plot(run["active"], run["left"], color=color, linewidth=1, zorder=0)
        points = one.scatter(run["active"], run["left"], c=coefficients.log10(), marker=marker, label=name, zorder=1)
        two.plot([s for s, _ in run["curve"]], [each.mean() for _, each in run["curve"]], label=name, color=color)
    one.set(xlabel="active features per example", ylabel="variance not explained", title="A model per coefficient")
    figure.colorbar(points, label="log₁₀ c", ax=one)
    one.legend(frameon=False)
    two.set(xlabel="seconds, all models together", ylabel="mean loss", title="Training", xscale="log", yscale="log")
    two.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
