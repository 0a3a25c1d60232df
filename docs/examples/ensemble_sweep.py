"""Sixty-four models at once: a grid of learning rates and dampings in one vmapped natural-gradient step.

Damping is a tensor in the state, so a sweep is `torch.vmap` over it. The picture shows the loss of every setting after
the last step. A single run of one setting ends at the same loss.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call

import fisherfn as ff


def moons(examples: int, generator: torch.Generator):
    """Return two interleaved half circles, one class each."""
    y = torch.randint(0, 2, (examples,), generator=generator)
    angle, side = torch.pi * torch.rand(examples, generator=generator), 1.0 - 2 * y
    x = torch.stack((torch.cos(angle) * side + y, torch.sin(angle) * side + 0.4 * y), 1)
    return (x + 0.15 * torch.randn(x.shape, generator=generator)).double(), y


def main(out: Path, small: bool = False) -> dict:
    """Train the grid at once, and its best setting alone; draw `ensemble_sweep.png`."""
    rng = torch.Generator().manual_seed(0)
    batch = moons(32 if small else 128, rng)
    tanh, linear = torch.nn.Tanh(), torch.nn.Linear
    net = torch.nn.Sequential(linear(2, 16), tanh, linear(16, 16), tanh, linear(16, 2))
    draws = {n: torch.randn(p.shape, generator=rng).double() for n, p in net.named_parameters()}
    params = {n: d / d.shape[-1] ** 0.5 for n, d in draws.items()}
    ng = ff.natural_gradient(
        lambda p, x: functional_call(net, p, (x,)),
        params,
        batch[0],
        likelihood=ff.Categorical(),
        method=ff.kfac(),
        fisher="type2",
    )
    size, steps = (2, 5) if small else (8, 60)
    rates, dampings = torch.logspace(-2, 1, size), torch.logspace(-5, 0, size)
    lr, damping = (each.flatten() for each in torch.meshgrid(rates, dampings, indexing="ij"))

    def step(params, state, lr):
        nat, state, info = ng.step(params, state, batch)
        return ff.tree.add(params, nat, scale=-lr), state, info.loss

    start = time.perf_counter()
    models = {n: p.expand(len(lr), *p.shape) for n, p in params.items()}
    states = torch.vmap(lambda p, damping: ng.init(p, damping=damping))(models, damping)
    for _ in range(steps):
        models, states, losses = torch.vmap(step)(models, states, lr)
    print(f"{len(lr)} models, {steps} steps: {time.perf_counter() - start:.1f} s")

    best = int(losses.nan_to_num(torch.inf).argmin())
    start = time.perf_counter()
    one, state = params, ng.init(params, damping=damping[best])
    for _ in range(steps):
        one, state, alone = step(one, state, lr[best])
    print(f"the best of them alone: {time.perf_counter() - start:.1f} s")
    print(f"rate {lr[best]:.3g}, damping {damping[best]:.2g}: loss {losses[best]:.10f}, alone {alone:.10f}")
    draw(out / "ensemble_sweep.png", losses.reshape(size, size), rates, dampings, best)
    return {"losses": losses, "best": best, "alone": alone}


def draw(file: Path, losses: torch.Tensor, rates: torch.Tensor, dampings: torch.Tensor, best: int) -> None:
    """Draw losses as colours and numbers; grey if above 1 or not finite."""
    figure, ax = plt.subplots(figsize=(7.2, 5.6), layout="constrained")
    there = losses.log10().masked_fill(~(losses < 1), torch.nan)
    image = ax.imshow(there.numpy(), cmap="viridis_r", origin="lower")
    ax.set_facecolor("0.8")
    row, column = divmod(best, len(dampings))
    ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=3))
    middle = there.nanmean()
    for i, j in torch.cartesian_prod(torch.arange(len(rates)), torch.arange(len(dampings))).tolist():
        if losses[i, j] < 1:
            colour = "white" if there[i, j] > middle else "black"
            ax.text(j, i, f"{losses[i, j]:.2g}", ha="center", va="center", color=colour, fontsize=8)
    ax.set_xticks(range(len(dampings)), [f"{d:.0e}" for d in dampings.tolist()])
    ax.set_yticks(range(len(rates)), [f"{r:.2g}" for r in rates.tolist()])
    ax.set(title="Loss after the last step; grey: above 1, or not finite", xlabel="damping λ", ylabel="learning rate")
    figure.colorbar(image, label="log₁₀ loss")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
