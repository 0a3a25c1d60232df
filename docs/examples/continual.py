"""Continual learning: five tasks in turn, with a quadratic penalty from the Fisher of the earlier ones.

Each task tells two digits apart (0 or 1, 2 or 3, …) with the same two outputs. After a task, its Fisher F is kept, and
training on the next task adds c/2 (θ − θ*)ᵀ (F₁ + F₂ + …)(θ − θ*), with θ* the parameters after the last task. The
Fisher is its diagonal (elastic weight consolidation), K-FAC or the full matrix. All strengths c are trained at once.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.func import functional_call, grad, vmap

import fisherfn as ff

STRENGTHS = torch.logspace(-1, 3, 9).double()
COLORS = {"no penalty": "0.5", "diagonal": "#E69F00", "K-FAC": "#009E73", "full Fisher": "#0072B2"}


def tasks(seed: int):
    """Return (train, test) of each pair of digits; the label says whether it is the larger one."""
    data = load_digits()
    x, y = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    pairs = [(x[y // 2 == pair], y[y // 2 == pair] % 2) for pair in range(5)]
    return [((x[:250], y[:250]), (x[250:], y[250:])) for x, y in pairs]


def main(out: Path, small: bool = False) -> dict:
    """Train with each Fisher and every strength on three orders of the examples; draw `continual.png`."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()

    def model(params, x):
        return functional_call(net, params, (x,))

    found = {name: [] for name in FISHERS}
    for seed in range(1 if small else 3):
        rng = torch.Generator().manual_seed(seed)
        start = {
            n: torch.randn(p.shape, generator=rng).double() / p.shape[-1] ** 0.5 for n, p in net.named_parameters()
        }
        pairs = tasks(seed)[: 2 if small else 5]
        for name, fisher in FISHERS.items():
            found[name].append(in_turn(model, start, pairs, fisher, steps=5 if small else 200))
    accuracy = {name: torch.stack(each).mean(0) for name, each in found.items()}  # [strength, task trained, task]
    for name, each in accuracy.items():
        final = each[:, -1].mean(-1)
        best = int(final.argmax())
        print(f"{name:12} accuracy over all tasks {final[best]:.3f}, first task {each[best, -1, 0]:.3f}, "
              f"last {each[best, -1, -1]:.3f}, c = {STRENGTHS[best]:.3g}")  # fmt: skip
    draw(out / "continual.png", accuracy)
    return {"accuracy": accuracy}


def in_turn(model, params, pairs, fisher, steps):
    """Return the test accuracy [strength, task trained, task] along the tasks, for every strength at once."""
    measure, product = fisher(model, params, pairs[0][0][0])
    models = {name: p.expand(len(STRENGTHS), *p.shape) for name, p in params.items()}
    curvatures, rows = [], []
    for train, _ in pairs:

        def one(p, c, curvatures, train=train):
            new = trained(model, p, c, train, lambda v: [product(each, v) for each in curvatures], steps)
            return new, measure(new, train), torch.stack([correct(model, new, test) for _, test in pairs])

        models, measured, accuracy = vmap(one)(models, STRENGTHS, curvatures)
        curvatures.append(measured)
        rows.append(accuracy)
    return torch.stack(rows, 1)


# Fishers: functions that measure one for a task, and multiply by it ----------------------------------------------


def none(model, params, x):
    """No penalty."""
    return (lambda params, batch: torch.zeros(())), (lambda curvature, v: ff.tree.scale(v, 0.0))


def diagonal(model, params, x):
    """The diagonal of the exact Fisher."""
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2")

    def measure(params, batch):
        flat = ng.fisher(ng.stats(params, batch)).diag()
        return dict(zip(params, flat.split([p.numel() for p in params.values()]), strict=True))

    def product(entries, v):
        return {name: entries[name].reshape(leaf.shape) * leaf for name, leaf in v.items()}

    return measure, product


def by_method(method):
    """The approximation of a method, from all examples of the task."""

    def fisher(model, params, x):
        ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), method=method, fisher="type2")
        return (lambda params, batch: ng.fit(params, [batch])[0]), ng.matvec

    return fisher


FISHERS = {
    "no penalty": none,
    "diagonal": diagonal,
    "K-FAC": by_method(ff.kfac()),
    "full Fisher": by_method(ff.exact()),
}


def trained(model, params, strength, batch, penalties, steps, lr=0.01):
    """Minimise loss and penalty by Adam; `penalties` multiplies by the Fisher of each earlier task."""
    anchor, mean, square = params, ff.tree.scale(params, 0.0), ff.tree.scale(params, 0.0)

    def loss(p):
        return ff.Categorical().nll(model(p, batch[0]), batch[1]).mean()

    for step in range(1, steps + 1):
        g, moved = grad(loss)(params), ff.tree.add(params, anchor, scale=-1.0)
        for each in penalties(moved):
            g = ff.tree.add(g, each, scale=strength)
        mean = ff.tree.map(lambda m, v: 0.9 * m + 0.1 * v, mean, g)
        square = ff.tree.map(lambda s, v: 0.99 * s + 0.01 * v * v, square, g)
        one, two = 1 - 0.9**step, 1 - 0.99**step
        params = ff.tree.map(
            lambda p, m, s, one=one, two=two: p - lr * (m / one) / ((s / two).sqrt() + 1e-8), params, mean, square
        )
    return params


def correct(model, params, test):
    """Return the share of correct predictions."""
    return (model(params, test[0]).argmax(-1) == test[1]).double().mean()


def draw(file: Path, accuracy) -> None:
    """Draw the accuracy over all tasks by strength, and that of the first task along the tasks at the best strength."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, each in accuracy.items():
        final = each[:, -1].mean(-1)
        axes[0].semilogx(STRENGTHS, final, "o-", markersize=3, color=COLORS[name], label=name)
        axes[1].plot(range(1, each.shape[1] + 1), each[final.argmax(), :, 0], "o-", color=COLORS[name], label=name)
    axes[0].set(title="Accuracy over all tasks, at the end", xlabel="strength c of the penalty", ylabel="accuracy")
    axes[1].set(title="Accuracy on the first task", xlabel="tasks trained", xticks=range(1, each.shape[1] + 1))
    axes[1].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
