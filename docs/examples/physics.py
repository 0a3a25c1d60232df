"""A physics-informed net: the heat equation u_t = c·u_xx by Adam, K-FAC and the exact natural gradient.

The model returns residuals at points (t, x). It carries u and its derivatives through the layers together, so that
layers are recognised. With a Gaussian likelihood the loss is half the mean square of the residuals, and the exact
natural gradient is the Gauss-Newton step. The picture shows the losses, the solution, and the error of each net.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import linear

import fisherfn as ff

SPEED = 0.1  # c; on [0, 1]², u(0, x) = sin πx, u(t, 0) = u(t, 1) = 0
WIDTHS = (2, 24, 24, 1)
COLOURS = {"Adam": "#E69F00", "K-FAC": "#56B4E9", "exact NG": "#0072B2"}


def jet(params, points):
    """The net's value, its derivatives by t and x, and the second by x, at every point: `[N, 4]`."""
    by_t, by_x, by_xx = (torch.tensor(d).to(points).expand_as(points) for d in ([1, 0], [0, 1], [0, 0]))
    h = torch.stack((points, by_t, by_x, by_xx), 1)
    value = torch.tensor([[1], [0], [0], [0]]).to(points)  # the only one that a bias changes
    for i in range(len(WIDTHS) - 1):
        if i > 0:
            y, y_t, y_x, y_xx = h.unbind(1)
            y, slope = torch.tanh(y), 1 - torch.tanh(y) ** 2
            h = torch.stack((y, slope * y_t, slope * y_x, slope * (y_xx - 2 * y * y_x**2)), 1)
        h = linear(h, params[f"{i}.weight"]) + value * params[f"{i}.bias"]
    return h.squeeze(-1)


def solution(params, points):
    """Impose the initial and the boundary values, for any net."""
    t, x = points.unbind(-1)
    return torch.sin(torch.pi * x) + t * x * (1 - x) * jet(params, points)[:, 0]


def residuals(params, points):
    """The model: u_t − c·u_xx of the solution, `[N, 1]`."""
    t, x = points.unbind(-1)
    n, n_t, n_x, n_xx = jet(params, points).unbind(-1)
    u_t = x * (1 - x) * (n + t * n_t)
    u_xx = -(torch.pi**2) * torch.sin(torch.pi * x) + t * (x * (1 - x) * n_xx + 2 * (1 - 2 * x) * n_x - 2 * n)
    return (u_t - SPEED * u_xx).unsqueeze(-1)


def loss(params, points):
    """Return the loss of a Gaussian likelihood with variance one for residuals that should be zero."""
    return residuals(params, points).square().mean() / 2


def natural(params, points, steps, method, damping):
    """Train by natural gradients with the best of ten halvings per step; return parameters, losses, coverage."""
    batch = (points, torch.zeros(len(points), 1).to(points))
    ng = ff.natural_gradient(residuals, params, points, likelihood=ff.Gaussian(), method=method, fisher="type2")
    state, losses = ng.init(params, damping=damping, ema=0.5), []
    for _ in range(steps):
        nat, state, info = ng.step(params, state, batch)
        ff.check(info)
        losses.append(info.loss.item())
        tried = [ff.tree.add(params, nat, scale=-(0.5**k)) for k in range(10)]
        params = min(tried, key=lambda new: loss(new, points).item())
    return params, losses, f"damping {damping:g}\n{ng.layout}"


def adam(params, points, steps, lr):
    """Train by Adam on the same points."""
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer, losses = torch.optim.Adam(params.values(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(params, points)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return {name: p.detach() for name, p in params.items()}, losses, f"rate {lr:g}"


def main(out: Path, small: bool = False) -> dict:
    """Train, print the results, draw `physics.png`."""
    rng, params = torch.Generator().manual_seed(0), {}
    for i, (d_in, d_out) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:], strict=True)):
        params[f"{i}.weight"] = torch.randn(d_out, d_in, generator=rng, dtype=torch.float64) / d_in**0.5
        params[f"{i}.bias"] = torch.zeros(d_out, dtype=torch.float64)
    points = torch.rand(60 if small else 400, 2, generator=rng, dtype=torch.float64)
    rates, slow, fast = ((1e-2,), 40, 10) if small else ((1e-2, 3e-2, 1e-1), 700, 80)
    runs = [("Adam", adam, (slow, lr)) for lr in rates]
    runs += [("K-FAC", natural, (fast, ff.kfac("eigen"), 1e-5)), ("exact NG", natural, (fast, ff.exact(), 1e-7))]

    axis = torch.linspace(0, 1, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    truth = torch.exp(-SPEED * torch.pi**2 * grid[:, 0]) * torch.sin(torch.pi * grid[:, 1])
    losses, errors = {}, {}
    for name, train, settings in runs:
        start = time.perf_counter()
        found, values, note = train(params, points, *settings)
        seconds, u = time.perf_counter() - start, solution(found, grid)
        error = (u - truth).abs()
        print(f"{name}: {len(values)} steps in {seconds:.1f} s, loss {values[-1]:.1e}, error {error.max():.1e}\n{note}")
        if name not in losses or values[-1] < losses[name][-1]:  # the best of Adam's learning rates
            losses[name], errors[name] = values, error
    draw(out / "physics.png", losses, errors, u)
    return {"losses": losses, "errors": {name: error.max().item() for name, error in errors.items()}}


def draw(file: Path, losses: dict, errors: dict, u: torch.Tensor) -> None:
    """Draw losses and solution above, errors below."""
    figure, axes = plt.subplot_mosaic([["loss", "loss", "u"], list(errors)], figsize=(10, 6.2), layout="constrained")
    for name, values in losses.items():
        axes["loss"].loglog(range(1, len(values) + 1), values, color=COLOURS[name], label=name)
    axes["loss"].set(title="Loss: half the mean squared residual", xlabel="step")
    axes["loss"].legend()
    shown = {"origin": "lower", "extent": (0, 1, 0, 1)}
    image = axes["u"].imshow(u.reshape(61, 61).T.numpy(), cmap="viridis", **shown)
    axes["u"].set(title="Solution u", xlabel="time t", ylabel="x")
    figure.colorbar(image, ax=axes["u"])
    for name, error in errors.items():
        powers = error.reshape(61, 61).T.clamp(min=1e-16).log10().numpy()
        image = axes[name].imshow(powers, cmap="cividis", vmin=-9, vmax=-3, **shown)
        axes[name].set(title=f"{name}: log₁₀ |error|, at most {error.max():.0e}", xlabel="time t", ylabel="x")
        axes[name].title.set_fontsize("medium")
    figure.colorbar(image, ax=axes[name], extend="min")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
