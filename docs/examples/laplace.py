"""Error bars by the Laplace approximation: a posterior from a fitted K-FAC state, with the prior chosen by evidence.

With a Gaussian prior of precision δ and N examples the posterior around the trained parameters has the precision
N F + δ I = N (F + λ I), λ = δ/N: a damped Fisher. Its log-determinant gives the evidence of a prior, its inverse the
variance of a prediction, and a state of K-FAC has both without forming a matrix. `ff.laplace` does the same for every
Kronecker method, with a prior per block that maximises the evidence.
"""

import dataclasses
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call, jacrev, vmap

import fisherfn as ff

NOISE = 0.2  # standard deviation, known here
LABELS = {
    "kfac": "K-FAC",
    "kl_optimal": "KL-optimal",
    "ekfac": "E-KFAC",
    "kfac_cor": "K-FAC corrected",
    "lanczos": "Lanczos",
    "deflation": "Deflation",
    "kpsvd": "KPSVD",
}
PRIORS = torch.logspace(-3, 3, 61).double()  # δ


def observations(examples: int, rng: torch.Generator):
    """Return a noisy wave on both sides of a gap."""
    x = torch.empty(examples, 1).uniform_(1, 4, generator=rng).double()
    x[::2] *= -1
    return x, torch.sin(1.5 * x) + 0.3 * x + NOISE * torch.randn(examples, 1, generator=rng).double()


def network(rng: torch.Generator):
    """1-32-32-1 with tanh, in double precision."""
    linear, tanh = torch.nn.Linear, torch.nn.Tanh()
    net = torch.nn.Sequential(linear(1, 32), tanh, linear(32, 32), tanh, linear(32, 1))
    draws = {n: torch.randn(p.shape, generator=rng).double() for n, p in net.named_parameters()}
    return lambda p, x: functional_call(net, p, (x,)), {n: d / d.shape[-1] ** 0.5 for n, d in draws.items()}


def main(out: Path, small: bool = False) -> dict:
    """Train, choose the prior, predict, draw `laplace.png`."""
    rng = torch.Generator().manual_seed(0)
    x, y = observations(60 if small else 160, rng)
    model, params = network(rng)
    likelihood, kfac = ff.Gaussian(variance=NOISE**2), ff.kfac(damping_form="eigen")  # adds exactly λI
    ng = ff.natural_gradient(model, params, x, likelihood=likelihood, method=kfac, fisher="type2")
    params = train(ng, params, (x, y), prior=0.1, steps=60 if small else 400)

    stats = ng.stats(params, (x, y))  # one batch: all data
    state, _ = ng.update(ng.init(params), stats)
    curvatures = {"K-FAC": ng.approximation(state), "exact Fisher": ng.fisher(stats)}
    grid = torch.linspace(-6, 6, 60 if small else 241).double()[:, None]
    J = vmap(jacrev(lambda p, one: model(p, one[None])[0, 0]), (None, 0))(params, grid)

    found = {}
    for name, curvature in curvatures.items():
        evidence = torch.stack([log_evidence(curvature, stats.loss, params, len(x), prior) for prior in PRIORS])
        prior = PRIORS[evidence.argmax()]
        damping = prior / len(x)
        if name == "K-FAC":
            fitted, _ = ng.invert(state._replace(damping=damping))
            solve = ng.inverse(fitted).__matmul__
        else:
            solve = lambda j, damping=damping: curvature.solve(j, damping)  # noqa: B023, E731 - used in this round
        variance = vmap(lambda j: ff.tree.dot(j, solve(j)) / len(x))(J)  # noqa: B023
        found[name] = {"evidence": evidence, "prior": prior, "deviation": variance.sqrt(), "curvature": curvature}
        print(f"{name:12} prior precision {prior:.2g}, log evidence {evidence.max():.1f}")
    posteriors = {name: posterior_of(ng, name, params, (x, y), grid) for name in list(LABELS)[: 2 if small else None]}
    draw(out / "laplace.png", (x, y), grid, model(params, grid), found, posteriors)
    return {
        "posteriors": posteriors,
        "found": found,
        "params": params,
        "grid": grid,
        "jacobian": J,
        "loss": stats.loss,
        "examples": len(x),
    }


def posterior_of(ng, name: str, params, data, grid):
    """Fit the posterior of a method, with one prior for all blocks and with one per block."""
    method = ff.METHODS[name](damping_form="eigen")
    posterior = ff.laplace(dataclasses.replace(ng, method=method))
    state, info = posterior.fit(params, list(zip(*(leaf.split(32) for leaf in data), strict=True)))
    ff.check(info)
    one, per_block = (posterior.choose_prior(state, per_block=each) for each in (False, True))
    evidence = [float(posterior.log_marginal_likelihood(each)) for each in (one, per_block)]
    gap = grid[grid[:, 0].abs() < 0.5]
    deviation = float(posterior.predict(per_block, gap)[1].mean().sqrt())
    print(f"{name:12} log evidence {evidence[0]:.1f}, prior per block {evidence[1]:.1f}; deviation {deviation:.2f}")
    return {"evidence": evidence, "prior": per_block.prior, "deviation": deviation}


def train(ng, params, batch, prior: float, steps: int):
    """Natural gradients of the penalised loss, the whole data in a batch."""
    decay = prior / len(batch[0])
    state = ng.init(params, damping=1e-2)
    for step in range(steps):
        stats = ng.stats(params, batch)
        grads = ff.tree.add(dict(stats.grads), params, scale=decay)
        nat, state, info = ng.step_from(state, grads, stats, invert=step % 5 == 0, inner=True)
        ff.check(info)
        params = ff.tree.add(params, ff.kl_clip(nat, info.inner, lr=0.5, kl_bound=1e-2), scale=-0.5)
    return params


def log_evidence(curvature, loss, params, examples: int, prior):
    """Return Laplace's log p(data | δ), up to terms that do not depend on δ."""
    size = sum(p.numel() for p in params.values())
    fit = -examples * loss - prior / 2 * ff.tree.dot(params, params)
    log_precision = size * math.log(examples) + curvature.logdet(prior / examples)
    return fit + size / 2 * prior.log() - log_precision / 2


def draw(file: Path, data, grid, mean, found, posteriors) -> None:
    """Data, fit and two deviations of each posterior; the evidence of every prior and of every method."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained", width_ratios=[1, 1, 0.8, 0.9])
    x, mean = grid[:, 0].numpy(), mean[:, 0].numpy()
    for axis, (name, one), color in zip(axes, found.items(), ("#E69F00", "#0072B2"), strict=False):
        total = (one["deviation"] ** 2 + NOISE**2).sqrt().numpy()
        axis.fill_between(x, mean - 2 * total, mean + 2 * total, color=color, alpha=0.25, label="± 2 deviations")
        axis.plot(x, mean, color=color, label="trained net")
        axis.plot(*(part[:, 0].numpy() for part in data), ".", color="black", markersize=3, label="data")
        axis.set(title=f"Posterior from {name}", xlabel="x", ylim=(-6, 6))
        axes[2].semilogx(PRIORS, one["evidence"] - one["evidence"].max(), color=color, label=name)
        axes[2].axvline(one["prior"], color=color, linestyle=":")
    axes[0].legend(loc="lower right")
    axes[2].set(title="Evidence", xlabel="prior precision δ", ylabel="log evidence, from its maximum", ylim=(-60, 3))
    axes[2].legend()
    rows = {LABELS[name]: one["evidence"] for name, one in posteriors.items()}
    for index, (label, marker) in enumerate((("one prior", "o"), ("one per block", "x"))):
        axes[3].plot([values[index] for values in rows.values()], list(rows), marker, color="#009E73", label=label)
    axes[3].plot(float(found["exact Fisher"]["evidence"].max()), "exact Fisher", "o", color="#0072B2")
    axes[3].set(title="Evidence by method", xlabel="log evidence")
    axes[3].grid(axis="y", alpha=0.3)
    axes[3].legend(loc="center right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
