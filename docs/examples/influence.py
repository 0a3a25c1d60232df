"""Influence functions: which training examples change the loss of a query, and by how much?

A model is trained with a penalty λ/2 ‖θ‖². Without some of its examples the optimum moves by (F + λI)⁻¹ times a
difference of mean gradients, so the loss of a query changes by a difference of mean scores. The factors of K-FAC and
E-KFAC come from one pass and two passes over the data; conjugate gradients with the exact Fisher, preconditioned by
E-KFAC, give the scores without an approximation of the curvature. The predictions are compared with 64 models that are
retrained at once, each without a tenth of the examples.
"""

import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch.func import functional_call, vmap

import fisherfn as ff

STEPS = {"train": 400, "retrain": 100}
CG_STEPS = 40


def diabetes():
    """Return a table of 442 patients: ten standardised columns and the progression of the disease."""
    data = load_diabetes()
    x, y = torch.from_numpy(data.data), torch.from_numpy(data.target)[:, None]
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y))
    net = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return "regression on a table", (x, y), net, ff.Gaussian(), 0.03


def digits():
    """Return 8 × 8 images of digits."""
    data = load_digits()
    x, y = torch.from_numpy(data.data)[:700] / 16, torch.from_numpy(data.target)[:700]
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    return "classifier of digits", (x, y), net, ff.Categorical(), 0.01


def main(out: Path, small: bool = False) -> dict:
    """Score, retrain and compare on both problems; draw `influence.png`."""
    found = {}
    for problem in (diabetes, digits):
        name, (x, y), net, likelihood, decay = problem()
        rng = torch.Generator().manual_seed(0)
        order = torch.randperm(len(x), generator=rng)[: 60 if small else len(x)]
        queries, kept = order[: 8 if small else 40], order[8 if small else 40 :]
        found[name] = study(net.double(), (x[kept], y[kept]), (x[queries], y[queries]), likelihood, decay, rng, small)
        for method, result in found[name]["scores"].items():
            print(f"{name}, {method:22} correlation {result['correlation']:.3f}, {result['seconds']:.2f} s")
    draw(out / "influence.png", found)
    return found


def study(net, train, queries, likelihood, decay, rng, small):
    """Return the scores of each method, and the measured changes of the queries' losses."""

    def model(params, x):
        return functional_call(net, params, (x,))

    params = {n: torch.randn(p.shape, generator=rng).double() / p.shape[-1] ** 0.5 for n, p in net.named_parameters()}
    ng = ff.natural_gradient(model, params, train[0], likelihood=likelihood, method=ff.kfac("eigen"), fisher="type2")
    steps = {name: max(2, count // 10) if small else count for name, count in STEPS.items()}
    start = time.perf_counter()
    params = trained(ng, params, train, decay, steps["train"])
    print(f"training: {time.perf_counter() - start:.1f} s, slope {slope(ng, params, train, decay):.1e}")
    scores = {}
    for name, score in METHODS.items():
        start = time.perf_counter()
        scores[name] = {"scores": score(ng, params, train, queries, decay), "seconds": time.perf_counter() - start}

    models, examples = 4 if small else 64, len(train[0])
    subsets = torch.stack([torch.randperm(examples, generator=rng)[: examples - examples // 10] for _ in range(models)])
    start = time.perf_counter()
    losses, slopes = retrained(ng, params, train, queries, subsets, decay, steps["retrain"])
    print(f"retraining {models} models: {time.perf_counter() - start:.1f} s, largest slope {slopes.max():.1e}")
    change = losses - likelihood.nll(model(params, queries[0]), queries[1])
    for result in scores.values():
        S = result["scores"]
        result["predicted"] = S.mean(1) - torch.stack([S[:, subset].mean(1) for subset in subsets])
        result["correlation"] = correlation(result["predicted"], change)
    return {"scores": scores, "change": change, "params": params, "ng": ng, "train": train, "queries": queries}


def trained(ng, params, batch, decay, steps):
    """Minimise the mean loss plus the penalty by K-FAC, all data in one batch."""
    state = ng.init(params, damping=3 * decay, ema=0.0)
    for _ in range(steps):
        stats = ng.stats(params, batch)
        grads = ff.tree.add(dict(stats.grads), params, scale=decay)
        nat, state, info = ng.step_from(state, grads, stats, inner=True)
        params = ff.tree.add(params, ff.kl_clip(nat, info.inner, lr=0.2, kl_bound=1e-1), scale=-0.2)
    return params


def slope(ng, params, batch, decay):
    """Return the norm of the penalised gradient, which is zero at the optimum."""
    return ff.tree.norm(ff.tree.add(dict(ng.stats(params, batch, curvature=False).grads), params, scale=decay))


def retrained(ng, params, train, queries, subsets, decay, steps):
    """Return the queries' losses of one model per subset, all trained at once from the same parameters, and slopes."""

    def losses(subset):
        batch = train[0][subset], train[1][subset]
        moved = trained(ng, params, batch, decay, steps)
        return ng.likelihood.nll(ng.model(moved, queries[0]), queries[1]), slope(ng, moved, batch, decay)

    return vmap(losses, chunk_size=16)(subsets)


# scores ----------------------------------------------------------------------------------------------------------


def by_factors(method):
    """Return the scores with a method's damped inverse; its factors come from batches of 100."""

    def score(ng, params, train, queries, decay):
        mine = ff.natural_gradient(ng.model, params, train[0], likelihood=ng.likelihood, method=method, fisher="type2")
        state, info = mine.fit(params, batches(train), damping=decay)
        ff.check(info)
        return scores_of(mine, params, train, queries, lambda v: mine.precondition(state, v))

    return score


def by_conjugate_gradients(ng, params, train, queries, decay):
    """Return the scores with the exact Fisher of all data; E-KFAC is the preconditioner."""
    mine = ff.natural_gradient(
        ng.model, params, train[0], likelihood=ng.likelihood, method=ff.ekfac("eigen"), fisher="type2"
    )
    state, _ = mine.fit(params, batches(train), damping=decay)
    parts = [(len(x) / len(train[0]), mine.fisher(mine.stats(params, (x, y)))) for x, y in batches(train)]

    def product(v):
        result = ff.tree.scale(v, decay)
        for share, fisher in parts:
            result = ff.tree.add(result, fisher @ v, scale=share)
        return result

    def solve(v):
        return ff.conjugate_gradients(
            product, v, iterations=CG_STEPS, precondition=lambda r: mine.precondition(state, r)
        )

    residuals = vmap(solve)(query_gradients(mine, params, queries)).residuals[:, -1]
    print(f"conjugate gradients: largest relative residual {residuals.max():.1e} after {CG_STEPS} steps")
    return scores_of(mine, params, train, queries, lambda v: solve(v).x)


def by_gradients(ng, params, train, queries, decay):
    """Return the inner products of gradients: the scores without any curvature."""
    return scores_of(ng, params, train, queries, lambda v: v)


METHODS = {
    "gradients alone": by_gradients,
    "K-FAC": by_factors(ff.kfac("eigen")),
    "E-KFAC": by_factors(ff.ekfac("eigen")),
    "exact Fisher (CG)": by_conjugate_gradients,
}


def scores_of(ng, params, train, queries, solve):
    """Return one score per query and training example, batch by batch."""
    directions = vmap(solve)(query_gradients(ng, params, queries))
    stats = (ng.stats(params, batch, curvature=False) for batch in batches(train))
    return torch.cat([ff.influence_scores(part, directions) for part in stats], 1)


def query_gradients(ng, params, queries):
    """Return the gradients of all queries, a tree with the queries as first axis."""
    return ff.example_gradients(ng.stats(params, queries, curvature=False))


def batches(data, size=100):
    """Return the data in batches."""
    return list(zip(*(leaf.split(size) for leaf in data), strict=True))


def correlation(predicted, measured):
    """Return the mean over queries of the correlation over retrained models."""
    a, b = (v - v.mean(0) for v in (predicted, measured))
    return float(((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean())


def draw(file: Path, found) -> None:
    """Draw measured against predicted changes of every query and model, for K-FAC and the exact Fisher."""
    shown = ("K-FAC", "E-KFAC", "exact Fisher (CG)")
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 6.6), layout="constrained")
    for row, (problem, result) in zip(axes, found.items(), strict=True):
        for axis, name in zip(row, shown, strict=True):
            one = result["scores"][name]
            axis.plot(one["predicted"].flatten(), result["change"].flatten(), ".", markersize=2, color="#0072B2")
            limit = float(result["change"].abs().quantile(0.995))
            axis.plot([-limit, limit], [-limit, limit], color="0.5", linewidth=1)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), title=f"{name}: correlation {one['correlation']:.2f}")
            axis.set_xlabel("predicted change of a query's loss")
        row[0].set_ylabel(f"{problem}\nmeasured change")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
