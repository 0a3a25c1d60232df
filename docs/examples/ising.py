"""The ground state of a quantum spin chain: a restricted Boltzmann machine trained by SPRING with the centred Fisher.

H = −Σ σᶻᵢσᶻᵢ₊₁ − g Σ σˣᵢ on a ring of n spins. The net gives log ψ of each of the 2ⁿ configurations. All are used, with
the weights p = |ψ|². The metric S is the covariance of the scores O = ∇ log ψ. The gradient of the energy is twice
their covariance with the local energies. The picture shows the relative error of the energy against exact
diagonalisation.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import eigsh
from torch.nn.functional import linear

import fisherfn as ff

FIELDS = {0.5: "#0072B2", 1.0: "#D55E00", 2.0: "#009E73"}  # g: ordered, critical, disordered
RUNS = {"SPRING": (0.9, "-"), "without momentum": (0.0, ":")}
DAMPING, RATE = 1e-4, 0.1


class LocalEnergy:
    """The energy as a likelihood of log ψ: a linear loss, whose weighted gradient has the mean Cov(O, E).

    Targets are the centred local energies. `ff.Weighted` gives each configuration its weight N p.
    """

    def nll(self, outputs, targets):
        """Return (E − Ē) log ψ."""
        return targets * outputs[:, 0]

    def fisher_sqrt(self, outputs):
        """Return one column of ones: the Fisher of a configuration is O Oᵀ."""
        return torch.ones_like(outputs).unsqueeze(0)


def chain(spins):
    """Return all configurations `[2^n, n]`, their neighbours' energies, and the indices after each spin's flip."""
    codes = torch.arange(2**spins)
    bits = 2 ** torch.arange(spins)
    states = 1 - 2 * (codes.unsqueeze(1) // bits % 2).double()
    return states, -(states * states.roll(1, 1)).sum(1), codes.unsqueeze(1) ^ bits


def ground_energy(diagonal, flips, field):
    """Return the lowest eigenvalue by exact diagonalisation."""
    rows = np.repeat(np.arange(len(flips)), flips.shape[1])
    hops = coo_array((np.full(rows.shape, -field), (rows, flips.flatten().numpy())))
    return eigsh(hops + diags_array(diagonal.numpy()), k=1, which="SA")[0][0]


def log_psi(params, states):
    """Return log ψ of a restricted Boltzmann machine: a sum over hidden units of log 2 cosh."""
    hidden = linear(states, params["hidden.weight"], params["hidden.bias"])
    return torch.logaddexp(hidden, -hidden).sum(1, keepdim=True)


def train(spins, field, momentum, steps):
    """Return the relative error of the energy at every step."""
    states, diagonal, flips = chain(spins)
    exact = ground_energy(diagonal, flips, field)
    rng = torch.Generator().manual_seed(0)
    shapes = {"hidden.weight": (2 * spins, spins), "hidden.bias": (2 * spins,)}
    params = {name: 0.1 * torch.randn(s, generator=rng, dtype=torch.float64) for name, s in shapes.items()}
    model, params = ff.centred(log_psi, params)
    ng = ff.natural_gradient(
        model, params, states, likelihood=ff.Weighted(LocalEnergy()), method="exact", fisher="type2"
    )
    spring = ff.spring(ng, momentum=momentum)
    state, errors = spring.init(params, damping=DAMPING), []
    for _ in range(steps):
        log = model(params, states)[:, 0]
        p = torch.softmax(2 * log, 0)
        local = diagonal - field * (log[flips] - log.unsqueeze(1)).exp().sum(1)
        energy = p @ local
        errors.append(((energy - exact) / abs(exact)).item())
        batch = states, (local - energy, len(p) * p)
        direction, state, info = spring.step(params, state, batch)
        ff.check(info)
        params = ff.tree.add(params, ff.norm_clip(direction, lr=RATE, norm=0.3), scale=-RATE)
    return errors


def main(out: Path, small: bool = False, spins: int = 10) -> dict:
    """Train at three fields, print the errors, draw `ising.png`."""
    spins, steps = (4, 40) if small else (spins, 100)
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    errors = {}
    for field, colour in FIELDS.items():
        for name, (momentum, line) in RUNS.items():
            found = train(spins, field, momentum, steps)
            errors[field, name] = found
            within = next((step for step, error in enumerate(found) if error < 1e-4), math.inf)
            print(f"g = {field}, {name}: error {found[-1]:.1e} after {steps} steps, below 1e-4 after {within}")
            axis.semilogy(found, line, color=colour, label=f"g = {field}" if momentum else None)
    axis.axhline(1e-4, color="0.6", lw=0.8)
    axis.set(
        xlabel="step",
        ylabel="relative error of the energy",
        title=f"{spins} spins, SPRING (dotted: μ = 0)",
    )
    axis.legend()
    figure.savefig(out / "ising.png", dpi=110)
    plt.close(figure)
    return {"errors": errors}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), spins=int(sys.argv[2]) if len(sys.argv) > 2 else 10)
