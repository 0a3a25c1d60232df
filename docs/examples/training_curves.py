"""Training curves: SGD, Adam and three natural gradients on a small autoencoder, each with the best of four settings.

The images have one bright spot each. Every optimizer gets the same budget: four settings and the same batches. The
picture shows the best run of each, and the final losses of all, minus the entropy of the images, a lower bound.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call

import fisherfn as ff

METHODS = {"K-FAC": ff.kfac(), "E-KFAC": ff.ekfac(), "Lanczos": ff.lanczos()}
STYLES = {
    "SGD": ("black", ":"),
    "Adam": ("#E69F00", "--"),
    "K-FAC": ("#0072B2", "-"),
    "E-KFAC": ("#009E73", "-."),
    "Lanczos": ("#56B4E9", "-"),
}
RATES = {"SGD": (1e-2, 3e-2, 1e-1, 3e-1), "Adam": (3e-3, 1e-2, 3e-2, 1e-1)}
DAMPED = [(lr, damping) for lr in (0.3, 1.0) for damping in (0.1, 1.0)]


def spots(examples: int, generator: torch.Generator):
    """Images of 8×8 with one bright spot each, `[N, 64]` in (0, 1)."""
    centre = 1 + 5 * torch.rand(examples, 2, 1, generator=generator)
    width = 0.7 + torch.rand(examples, 1, 1, generator=generator)
    profile = torch.exp(-((torch.arange(8) - centre) ** 2) / (2 * width**2))
    return torch.einsum("ni,nj->nij", *profile.unbind(1)).reshape(examples, 64)


def first_order(model, likelihood, params, batches, kind, lr):
    """SGD with momentum 0.9 or Adam, by torch's own optimizers: the loss of every step."""
    params = {n: p.clone().requires_grad_() for n, p in params.items()}
    kinds = {"SGD": lambda p: torch.optim.SGD(p, lr, momentum=0.9), "Adam": lambda p: torch.optim.Adam(p, lr)}
    optimizer, curve = kinds[kind](params.values()), []
    for x in batches:
        optimizer.zero_grad()
        loss = likelihood.nll(model(params, x), x).mean()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def natural(ng, params, batches, lr, damping):
    """Natural gradients with momentum 0.9 and a KL clip; statistics every 5 steps, inverses every 10."""
    generator, state = torch.Generator().manual_seed(1), ng.init(params, damping=damping)
    velocity, curve = ff.tree.zeros_like(params), []
    for step, x in enumerate(batches):
        due = {"update": step % 5 == 0, "invert": step % 10 == 0}
        nat, state, info = ng.step(params, state, (x, x), generator=generator, inner=True, **due)
        ff.check(info)
        velocity = ff.tree.add(ff.kl_clip(nat, info.inner, lr=lr, kl_bound=0.1), velocity, scale=0.9)
        params = ff.tree.add(params, velocity, scale=-lr)
        curve.append(info.loss.item())
    return curve


def main(out: Path, small: bool = False) -> dict:
    """Try all settings, print the best of each, draw `training_curves.png`."""
    rng = torch.Generator().manual_seed(0)
    tanh, linear = torch.nn.Tanh(), torch.nn.Linear
    net = torch.nn.Sequential(linear(64, 32), tanh, linear(32, 6), tanh, linear(6, 32), tanh, linear(32, 64))
    params = {n: torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5 for n, p in net.named_parameters()}
    data, steps = spots(2000, rng), 10 if small else 150
    batches = [data[torch.randint(0, len(data), (128,), generator=rng)] for _ in range(steps)]
    likelihood = ff.Bernoulli()

    def model(params, x):
        return functional_call(net, params, (x,))

    tried = {
        k: [(f"rate {lr:g}", first_order(model, likelihood, params, batches, k, lr)) for lr in RATES[k]] for k in RATES
    }
    for name, method in METHODS.items():
        ng = ff.natural_gradient(model, params, data[:8], likelihood=likelihood, method=method)
        tried[name] = [(f"rate {lr:g}, λ {λ:g}", natural(ng, params, batches, lr, λ)) for lr, λ in DAMPED]

    floor = torch.tensor([torch.special.entr(torch.cat((x, 1 - x))).sum().item() / len(x) for x in batches])
    runs = {name: [(setting, torch.tensor(curve) - floor) for setting, curve in each] for name, each in tried.items()}
    for name, each in runs.items():
        each.sort(key=lambda run: run[1][-10:].mean().nan_to_num(torch.inf).item())
        ends = ", ".join(f"{setting}: {curve[-10:].mean():.3f}" for setting, curve in each)
        print(f"{name:8} loss above the entropy at the end: {ends}")
    draw(out / "training_curves.png", runs)
    return runs


def draw(file: Path, runs: dict) -> None:
    """Means of ten steps: the best run's all the way, the last of all runs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    for place, (name, each) in enumerate(runs.items()):
        colour, style = STYLES[name]
        smooth = each[0][1].unfold(0, 10, 1).mean(1)
        left.semilogy(range(10, len(smooth) + 10), smooth, color=colour, linestyle=style, label=name)
        ends = [curve[-10:].mean().item() for _, curve in each]
        right.semilogy([place] * len(ends), ends, "o", color=colour, markerfacecolor="none")
        right.semilogy(place, ends[0], "o", color=colour)
    left.set(title="Best of four settings, mean of ten steps", xlabel="step", ylabel="loss − entropy, nats per image")
    left.legend()
    right.set(title="The last ten steps of all settings")
    right.set_xticks(range(len(runs)), runs)
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
