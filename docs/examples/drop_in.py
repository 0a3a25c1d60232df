"""A plain PyTorch loop, and the same loop converted by three lines, on the MNIST autoencoder.

`python docs/examples/drop_in.py OUT DIR` reads the digits in DIR (IDX files, as published), trains both loops on three
seeds, prints the losses and draws `drop_in.png` into OUT. Adam has the best of its learning rates on the first seed.
Without DIR it trains on images drawn on the spot. Both start from the same parameters and see the same batches in the
same order.
"""

import gzip
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfn as ff

RATES = (1e-3, 2.2e-3, 4.6e-4)
"""The best of the ten rates that docs/results.md searched on this problem, and its neighbours."""


def loss_fn(outputs, targets):
    """Mean over examples of the cross-entropy summed over pixels."""
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)


def plain(net, loader, epochs, lr):
    """The loop as tutorials write it."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        for x, y in loader:
            loss = loss_fn(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield loss


def converted(net, loader, epochs):
    """The same with an optimizer that takes the batch."""
    optimizer = ff.optim.NaturalGradient(net, likelihood=ff.Bernoulli())
    for _ in range(epochs):
        for x, y in loader:
            loss = optimizer.step((x, y))
        yield loss


def autoencoder(widths, seed):
    """ReLU between all layers, Glorot's uniform weights, biases of 0.01."""
    torch.manual_seed(seed)
    net = nn.Sequential()
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layer = nn.Linear(d_in, d_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.constant_(layer.bias, 0.01)
        net.extend([layer, nn.ReLU()])
    return net[:-1]


def digits(folder):
    """Nine tenths of the images in the folder, `[N, 784]` in [0, 1]."""
    files = sorted(folder.rglob("*images-idx3-ubyte.gz"))
    images = np.frombuffer(gzip.open(files[-1]).read(), np.uint8, offset=16).reshape(-1, 784)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images.copy())[order[: len(images) * 9 // 10]] / 255


def spots(examples, generator):
    """Images of 8×8 with one bright spot each, `[N, 64]` in (0, 1)."""
    centre = 1 + 6 * torch.rand(examples, 2, 1, generator=generator)
    width = 0.7 + torch.rand(examples, 1, 1, generator=generator)
    profile = torch.exp(-((torch.arange(8) - centre) ** 2) / (2 * width**2))
    return torch.einsum("ni,nj->nij", *profile.unbind(1)).reshape(examples, 64)


def run(loop, x, widths, epochs, seed, *rate):
    """Seconds of training and loss over the whole training set after every epoch, in nats per pixel."""
    net = autoencoder(widths, seed)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x, x), batch_size=256, shuffle=True, generator=order)
    points, began = [(0.0, float(measure(net, x)))], time.perf_counter()
    for _ in loop(net, loader, epochs, *rate):
        seconds = points[-1][0] + time.perf_counter() - began
        points.append((seconds, float(measure(net, x))))
        began = time.perf_counter()
    named = " ".join([loop.__name__, *(f"rate {each:g}" for each in rate)])
    print(f"{named:20} seed {seed}: {points[-1][1]:.4f} after {epochs} epochs, {points[-1][0]:.0f} s", flush=True)
    return points


def reached(points, loss):
    """Seconds until the loss is at most this, as far as evaluations after epochs tell."""
    return next((seconds for seconds, value in points if value <= loss), None)


@torch.no_grad()
def measure(net, x):
    """Loss over all of `x`, in nats per pixel."""
    return sum(loss_fn(net(part), part) * len(part) for part in x.split(2048)) / x.numel()


def main(out: Path, small: bool = False, folder: Path | None = None) -> dict:
    """Train, print the losses, draw `drop_in.png`."""
    x = digits(folder) if folder else spots(512, torch.Generator().manual_seed(0))
    hidden = [1000, 500, 250, 30, 250, 500, 1000] if folder else [32, 6, 32]
    widths, epochs = [x.shape[1], *hidden, x.shape[1]], 2 if small else 10
    seeds = range(1 if small else 3)
    natural = [run(converted, x, widths, epochs, seed) for seed in seeds]
    tried = {lr: run(plain, x, widths, epochs, 0, lr) for lr in RATES}
    best = min(RATES, key=lambda lr: tried[lr][-1][1])
    adam = [tried[best], *(run(plain, x, widths, epochs, seed, best) for seed in seeds[1:])]
    for seed, (theirs, ours) in enumerate(zip(adam, natural, strict=True)):
        print(f"seed {seed}: Adam's final loss after {theirs[-1][0]:.1f} s, converted {reached(ours, theirs[-1][1])} s")
    curves = {f"Adam, learning rate {best:g}": adam, "converted loop, K-FAC": natural}
    draw(out / "drop_in.png", curves)
    return curves


def draw(file: Path, curves: dict) -> None:
    """Draw training loss by epoch and by time, one line per run."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
    for (name, runs), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        for index, points in enumerate(runs):
            seconds, losses = zip(*points, strict=True)
            for axes, across in zip(panels, (range(len(points)), seconds), strict=True):
                axes.plot(across, losses, color=colour, label=None if index else name)
    panels[0].set(xlabel="epoch", ylabel="training loss, nats per pixel")
    panels[0].set_ylim(top=1.02 * max(points[1][1] for runs in curves.values() for points in runs))
    panels[1].set(xlabel="seconds of training")
    panels[0].legend(frameon=False)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.suptitle("Three lines changed; three seeds each")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), folder=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
