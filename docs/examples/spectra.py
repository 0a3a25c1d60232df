"""Eigenvalues of the Fisher and of its approximations, for one layer of an autoencoder in training.

A natural gradient divides by these numbers plus the damping. If an approximation has them too large, its steps are too
short; if too small, too long. The picture shows all eigenvalues of a layer's block, and their ratio to the true ones.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call

import fisherfn as ff

METHODS = {
    "K-FAC": (ff.kfac(), "#E69F00", "--"),
    "E-KFAC": (ff.ekfac(), "#009E73", "-."),
    "KPSVD": (ff.kpsvd(), "#56B4E9", "--"),
    "K-FAC corrected": (ff.kfac_corrected(), "#CC79A7", ":"),
    "Deflation": (ff.deflation(), "#D55E00", ":"),
}
LAYER = "2"  # 20 inputs, 8 outputs


def spots(examples: int, generator: torch.Generator):
    """Images of 8×8 with one bright spot each, `[N, 64]` in (0, 1)."""
    centre = 1 + 5 * torch.rand(examples, 2, 1, generator=generator)
    width = 0.7 + torch.rand(examples, 1, 1, generator=generator)
    profile = torch.exp(-((torch.arange(8) - centre) ** 2) / (2 * width**2))
    return torch.einsum("ni,nj->nij", *profile.unbind(1)).reshape(examples, 64)


def autoencoder(generator: torch.Generator):
    """64-20-8-20-64 with tanh, in double precision."""
    tanh, linear = torch.nn.Tanh(), torch.nn.Linear
    net = torch.nn.Sequential(linear(64, 20), tanh, linear(20, 8), tanh, linear(8, 20), tanh, linear(20, 64))
    draws = {n: torch.randn(p.shape, generator=generator).double() for n, p in net.named_parameters()}
    return lambda p, x: functional_call(net, p, (x,)), {n: d / d.shape[-1] ** 0.5 for n, d in draws.items()}


def spectrum(ng, state, params):
    """Eigenvalues of the layer's block of a state, largest first, from its products with unit vectors."""
    names = [n for n in params if n.startswith(LAYER)]
    sizes = [params[n].numel() for n in names]

    def column(v):
        parts = {n: part.reshape(params[n].shape) for n, part in zip(names, v.split(sizes), strict=True)}
        product = ng.matvec(state, {**ff.tree.zeros_like(params), **parts})
        return torch.cat([product[n].reshape(-1) for n in names])

    return torch.linalg.eigvalsh(torch.vmap(column)(torch.eye(sum(sizes)).double())).flip(0)


def main(out: Path, small: bool = False) -> dict:
    """Train, print the distances, draw `spectra.png`."""
    rng = torch.Generator().manual_seed(0)
    model, params = autoencoder(rng)
    x = spots(64 if small else 256, rng).double()

    def build(method):
        return ff.natural_gradient(model, params, x, likelihood=ff.Bernoulli(), method=method, samples=4)

    ng = build(ff.kfac())
    state = ng.init(params, damping=1.0)
    for step in range(5 if small else 60):
        nat, state, info = ng.step(params, state, (x, x), generator=rng, invert=step % 5 == 0)
        ff.check(info)
        params = ff.tree.add(params, nat, scale=-0.5)

    stats = ng.stats(params, (x, x), generator=rng)
    truth = torch.linalg.eigvalsh(ng.fisher(stats).block(LAYER)).flip(0)
    spectra, errors = {}, {}
    for name, (method, _, _) in METHODS.items():
        ng = build(method)
        state, info = ng.update(ng.init(params), stats)
        ff.check(info)
        spectra[name] = spectrum(ng, state, params)
        errors[name] = ng.fisher_error(state, stats)[LAYER].item()
        away, negative = (spectra[name] - truth).norm() / truth.norm(), (spectra[name] < 0).sum()
        print(f"{name:16} error of the matrix {errors[name]:.2f}, of the spectrum {away:.2f}, {negative} negative")
    draw(out / "spectra.png", truth, spectra)
    return {"truth": truth, "spectra": spectra, "errors": errors}


def draw(file: Path, truth: torch.Tensor, spectra: dict) -> None:
    """The eigenvalues, and their ratios to the true ones; negative ones are left out."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    truth, index = truth.numpy(), torch.arange(1, len(truth) + 1).numpy()
    left.semilogy(index, truth, color="black", label="sampled Fisher")
    right.axhline(1, color="black")
    for name, values in ((name, values.numpy()) for name, values in spectra.items()):
        style, there = {"color": METHODS[name][1], "linestyle": METHODS[name][2]}, values > 0
        left.semilogy(index[there], values[there], label=name, **style)
        right.semilogy(index[there], (values / truth)[there], **style)
    left.set(
        title="Eigenvalues of the layer's block", xlabel="from the largest to the smallest", ylim=(truth[-1] / 3, None)
    )
    left.legend()
    right.set(title="Divided by those of the Fisher", xlabel="from the largest to the smallest", ylim=(0.3, None))
    right.set_yticks([0.5, 1, 2, 5], ["½", "1", "2", "5"])
    right.minorticks_off()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
