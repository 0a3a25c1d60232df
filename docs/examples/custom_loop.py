"""A custom loop: damping that follows the quadratic model, a KL clip and a schedule, in plain Python.

Damping is a tensor in the state, and the Fisher an operator: the Levenberg-Marquardt rule is a few lines. Every five
steps the change of the loss is compared with the prediction of the quadratic model. Damping decreases if the
prediction was good and increases if it was poor. The picture shows the losses next to those of fixed dampings, and the
chosen damping.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call

import fisherfn as ff

SETTINGS = (("adapted, from 1", 1.0, True), ("adapted, from 1e-4", 1e-4, True)) + tuple(
    (f"fixed, {damping:g}", damping, False) for damping in (1.0, 1e-2, 1e-4)
)
STYLES = (("#0072B2", "-"), ("#56B4E9", "-"), ("#D55E00", "--"), ("#E69F00", "-."), ("#CC79A7", ":"))


def spirals(examples: int, generator: torch.Generator):
    """Return two spirals with one and a half turns, one class each."""
    y = torch.randint(0, 2, (examples,), generator=generator)
    along = torch.rand(examples, generator=generator).sqrt()
    angle = 3 * torch.pi * along + torch.pi * y
    x = torch.stack((torch.cos(angle), torch.sin(angle)), 1) * along.unsqueeze(1)
    return (x + 0.02 * torch.randn(x.shape, generator=generator)).double(), y


def train(ng, params, data, steps, damping, adapt):
    """Minibatches; the parameters at the end, losses and dampings of every step."""
    generator = torch.Generator().manual_seed(2)
    state, losses, dampings = ng.init(params, damping=damping), [], []
    for step in range(steps):
        chosen = torch.randint(0, len(data[0]), (128,), generator=generator)
        batch = data[0][chosen], data[1][chosen]
        lr = 0.5 * (1 + math.cos(math.pi * step / steps))  # from 1 to 0

        stats = ng.stats(params, batch, generator=generator)
        state, updated = ng.update(state, stats)
        state, inverted = ng.invert(state)
        for info in (updated, inverted):
            ff.check(info)
        nat = ng.precondition(state, stats.grads)
        nat = ff.kl_clip(nat, ff.tree.dot(stats.grads, nat), lr=lr, kl_bound=0.1)
        move = ff.tree.scale(nat, -lr)
        new = ff.tree.add(params, move)
        if adapt and step % 5 == 4:
            promised = ff.tree.dot(stats.grads, move) + ff.tree.dot(move, ng.fisher(stats) @ move) / 2
            after = ng.stats(new, batch, curvature=False).loss
            ratio = ff.adapt.reduction_ratio(after - stats.loss, promised)  # also for a promised increase
            factor = 0.75 if ratio > 0.75 else 1.33 if ratio < 0.25 else 1.0
            state = state._replace(damping=state.damping * factor)
        params = new
        losses.append(stats.loss.item())
        dampings.append(state.damping.item())
    return params, losses, dampings


def main(out: Path, small: bool = False) -> dict:
    """Train with the rule and without, print the losses, draw `custom_loop.png`."""
    rng = torch.Generator().manual_seed(0)
    data = spirals(200 if small else 1000, rng)
    tanh, linear = torch.nn.Tanh(), torch.nn.Linear
    net = torch.nn.Sequential(linear(2, 20), tanh, linear(20, 20), tanh, linear(20, 2))
    draws = {n: torch.randn(p.shape, generator=rng).double() for n, p in net.named_parameters()}
    params = {n: d / d.shape[-1] ** 0.5 for n, d in draws.items()}

    def model(params, x):
        return functional_call(net, params, (x,))

    ng = ff.natural_gradient(model, params, data[0], likelihood=ff.Categorical(), method=ff.kfac())
    runs = {}
    for name, damping, adapt in SETTINGS:
        end, losses, dampings = train(ng, params, data, 10 if small else 200, damping, adapt)
        loss = ng.stats(end, data, curvature=False).loss.item()
        wrong = (model(end, data[0]).argmax(1) != data[1]).sum()
        print(f"{name:20} loss {loss:.4f}, {wrong} of {len(data[0])} wrong, last damping {dampings[-1]:.1e}")
        runs[name] = {"losses": losses, "dampings": dampings, "loss": loss}
    draw(out / "custom_loop.png", runs)
    return runs


def draw(file: Path, runs: dict) -> None:
    """Losses of the batches, smoothed, and dampings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, run), (colour, style) in zip(runs.items(), STYLES, strict=True):
        smooth = torch.tensor(run["losses"]).unfold(0, 10, 1).mean(1)
        left.semilogy(range(10, len(smooth) + 10), smooth, color=colour, linestyle=style, label=name)
        right.semilogy(run["dampings"], color=colour, linestyle=style)
    left.set(title="Loss, mean of the last ten batches", xlabel="step")
    right.set(title="Damping λ", xlabel="step")
    figure.legend(title="damping", loc="outside right center")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
