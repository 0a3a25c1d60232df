"""The pictures of docs/natural_gradient.md, all computed by fisherfn: `python docs/figures/natural_gradient.py`.

One model, logistic regression on a number x, written down twice: by slope and intercept, p = σ(w x + b), and by
threshold and steepness, p = σ(eᵏ (x − c)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import fisherfn as ff

IMAGES = Path(__file__).resolve().parents[1] / "images"
GRADIENT, NATURAL, OTHER, QUIET = "#d55e00", "#009e73", "#0072b2", "#8a8a8a"
FLOOR = 1e-9  # of the damping: as good as none
KL = 0.005  # nats per example: size of the drawn ellipses

generator = torch.Generator().manual_seed(3)
X = 1 / 3 + 4 / 3 * torch.rand(200, generator=generator, dtype=torch.float64)
Y = (torch.rand(200, generator=generator, dtype=torch.float64) < torch.sigmoid(4.5 * (X - 1))).double()


@dataclass(frozen=True)
class Way:
    """A way to write the model down: its logits, what its two parameters are called, and the window to draw."""

    name: str
    logits: Callable[[Tensor, Tensor], Tensor]
    axes: tuple[str, str]
    window: tuple[tuple[float, float], tuple[float, float]]

    def model(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model as the library wants it."""
        return self.logits(params["θ"], x)

    @cached_property
    def ng(self) -> ff.NaturalGradient:
        """Its exact natural gradient."""
        some = {"θ": torch.tensor([1.0, 0.1], dtype=torch.float64)}
        return ff.natural_gradient(self.model, some, X, likelihood=ff.Bernoulli(), method=ff.exact(), fisher="type2")

    def look(self, θ: Tensor, damping: float = FLOOR) -> tuple[float, Tensor, Tensor, Tensor]:
        """Loss, gradient, natural gradient and Fisher at θ."""
        stats = self.ng.stats({"θ": θ}, (X, Y))
        natural = self.ng({"θ": θ}, stats, damping=damping)
        return stats.loss.item(), stats.grads["θ"], natural["θ"], self.ng.fisher(stats).dense()


LINE = Way("slope and intercept", lambda θ, x: θ[0] * x + θ[1], ("slope $w$", "intercept $b$"), ((-2, 9), (-9, 2)))
STEP = Way(
    "threshold and steepness",
    lambda θ, x: θ[1].exp() * (x - θ[0]),
    ("threshold $c$", "log steepness $k$"),
    ((-0.6, 2.4), (-0.6, 2.4)),
)


def as_line(θ: Tensor) -> Tensor:
    """(c, k) to (w, b)."""
    w = θ[..., 1].exp()
    return torch.stack([w, -w * θ[..., 0]], -1)


def as_step(θ: Tensor) -> Tensor:
    """(w, b) to (c, k)."""
    return torch.stack([-θ[..., 1] / θ[..., 0], θ[..., 0].log()], -1)


START = {STEP.name: torch.tensor([0.25, 0.4], dtype=torch.float64)}
START[LINE.name] = as_line(START[STEP.name])


# ------------------------------------------------------------------------------------------------------- drawing


def level_lines(ax: Axes, way: Way) -> None:
    """The loss over the plane of the two parameters."""
    (left, right), (low, high) = way.window
    u, v = torch.meshgrid(
        torch.linspace(left, right, 200, dtype=torch.float64),
        torch.linspace(low, high, 200, dtype=torch.float64),
        indexing="xy",
    )
    logits = torch.vmap(lambda θ: way.logits(θ, X))(torch.stack([u, v], -1).reshape(-1, 2))
    loss = torch.nn.functional.softplus(logits) - Y * logits
    levels = [0.42 * 1.25**i for i in range(14)]
    ax.contour(u, v, loss.mean(-1).reshape(200, 200), levels=levels, colors="#d9d9d9", linewidths=0.9)
    ax.set(xlim=way.window[0], ylim=way.window[1], xlabel=way.axes[0], ylabel=way.axes[1], aspect="equal")


def ellipse(θ: Tensor, F: Tensor, kl: float) -> Tensor:
    """The models δ away with ½ δᵀFδ = kl, as points of a closed line."""
    angle = torch.linspace(0, 2 * torch.pi, 181, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    values, vectors = torch.linalg.eigh(F)
    return θ + (2 * kl) ** 0.5 * circle @ (vectors / values.clamp(min=1e-12).sqrt()).mT


def arrow(ax: Axes, start: Tensor, step: Tensor, colour: str) -> None:
    """An arrow in the plane's own coordinates."""
    ax.annotate(
        "", (start + step).tolist(), start.tolist(), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.2}
    )


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture."""
    figure.savefig(IMAGES / f"natural_gradient_{name}.png", dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------ pictures


def metric() -> None:
    """Equal distances around the same models, and the two directions of steepest descent."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 5.7), layout="constrained")
    models = torch.tensor([(c, k) for c in (0.6, 1.0, 1.4) for k in (0.6, 1.1, 1.6, 2.1)], dtype=torch.float64)
    for ax, way, points in zip(panels, (LINE, STEP), (as_line(models), models), strict=True):
        level_lines(ax, way)
        for θ in (START[way.name], *points):
            ax.plot(*ellipse(θ, way.look(θ)[3], KL).mT, color=OTHER, lw=1.3)
            ax.plot(*θ, ".", color=OTHER, ms=4)
        θ = START[way.name]
        _, gradient, natural, _ = way.look(θ)
        length = 0.2 * (way.window[0][1] - way.window[0][0])
        for direction, colour in ((gradient, GRADIENT), (natural, NATURAL)):
            arrow(ax, θ, -length * direction / direction.norm(), colour)
        ax.set_title(way.name, loc="left")
    marks = {f"{KL} nats from its centre": OTHER, "minus gradient": GRADIENT, "minus natural gradient": NATURAL}
    _legend(figure, marks)
    save(figure, "metric")


def flow(way: Way, natural: bool, steps: int, rate: float) -> Tensor:
    """Many small steps."""
    points = [START[way.name]]
    for _ in range(steps):
        _, gradient, nat, _ = way.look(points[-1])
        points.append(points[-1] - rate * (nat if natural else gradient))
    return torch.stack(points)


def losses(way: Way, natural: bool, rate: float, steps: int = 20) -> list[float]:
    """The loss after each of some large steps; infinity where they leave the plane."""
    θ, found = START[way.name], []
    for _ in range(steps + 1):
        loss, gradient, nat, _ = way.look(θ)
        found.append(loss if loss == loss and loss < 1e3 else float("inf"))
        θ = θ - rate * (nat if natural else gradient)
        if not θ.isfinite().all() or θ.abs().max() > 1e2:
            return found + [float("inf")] * (steps + 1 - len(found))
    return found


def paths() -> None:
    """The way downhill of both, in both ways to write the model; and the loss at the best learning rate of each."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.7), layout="constrained")
    line, step = flow(LINE, False, 600, 0.1), flow(STEP, False, 600, 0.1)
    natural_line, natural_step = flow(LINE, True, 300, 0.02), flow(STEP, True, 300, 0.02)
    for ax, way, to in ((left, LINE, (lambda θ: θ, as_line)), (middle, STEP, (as_step, lambda θ: θ))):
        level_lines(ax, way)
        ax.plot(*to[0](line).mT, color=GRADIENT, lw=2)
        ax.plot(*to[1](step).mT, color=GRADIENT, lw=2, ls="--")
        ax.plot(*to[0](natural_line).mT, color=NATURAL, lw=4, alpha=0.45)
        ax.plot(*to[1](natural_step).mT, color="#00553e", lw=1.4, ls="--")
        ax.plot(*START[way.name], "o", color="black", ms=5)
        ax.set_title(f"seen by {way.name}", loc="left")
    for way, style in ((LINE, "-"), (STEP, "--")):
        for natural, colour in ((False, GRADIENT), (True, NATURAL)):
            rate, best = min(_rates(way, natural), key=lambda pair: (round(pair[1][-1], 4), sum(pair[1])))
            print(f"{way.name}, natural={natural}: rate {rate:.3g}, loss {best[-1]:.6f} after {len(best) - 1} steps")
            right.plot(best, style, color=colour, lw=2)
    right.set(xlabel="step", ylabel="loss in nats", ylim=(0.37, None))
    right.set_title("large steps, each at its best learning rate", loc="left")
    right.grid(color="#eeeeee")
    _legend(
        figure,
        {
            "gradient by slope and intercept": GRADIENT,
            "… by threshold and steepness (dashed)": GRADIENT,
            "natural gradient, likewise": NATURAL,
        },
        {"… by threshold and steepness (dashed)": "--"},
    )
    save(figure, "paths")


def _rates(way: Way, natural: bool) -> Iterator[tuple[float, list[float]]]:
    for exponent in range(-6, 7):
        rate = 10 ** (exponent / 4)
        yield rate, losses(way, natural, rate)


def damping() -> None:
    """From the natural gradient to the gradient; and how sure a sampled Fisher is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    θ = START[LINE.name]
    level_lines(left, LINE)
    dampings = [10**e for e in torch.linspace(-5, 2, 71).tolist()]
    ends = torch.stack([θ - LINE.look(θ, λ)[2] for λ in dampings])
    left.plot(*ends.mT, color=NATURAL, lw=2)
    left.plot(*θ, "o", color="black", ms=5)
    for λ in (1e-3, 1e-2, 1e-1, 1.0):
        end = θ - LINE.look(θ, λ)[2]
        left.plot(*end, "o", color=NATURAL, ms=5)
        left.annotate(f"λ = {λ:g}", end.tolist(), (-40, -4) if λ == 1 else (8, -4), textcoords="offset points")
    left.set(xlim=(0, 6.5), ylim=(-6.5, 0))
    left.set_title("where $-(F + λI)^{-1}∇$ leads", loc="left")
    right.set_aspect("equal", adjustable="datalim")
    for seed in range(8):
        stats = LINE.ng.stats({"θ": θ}, (X[:8], Y[:8]), fisher="mc", generator=torch.Generator().manual_seed(seed))
        right.plot(*ellipse(θ, LINE.ng.fisher(stats).dense(), KL).mT, color=QUIET, lw=1)
    exact = LINE.look(θ)[3]
    right.plot(*ellipse(θ, exact, KL).mT, color=OTHER, lw=2.4)
    right.plot(*ellipse(θ, exact + 0.05 * torch.eye(2), KL).mT, color=NATURAL, lw=2.4)
    right.set(xlabel=LINE.axes[0], ylabel=LINE.axes[1])
    right.set_title(f"what is {KL} nats away", loc="left")
    marks = {
        "the Fisher of all 200": OTHER,
        "of 8, labels drawn once": QUIET,
        "of all, damped by 0.05": NATURAL,
    }
    _legend(figure, marks)
    save(figure, "damping")


def _legend(figure: plt.Figure, colours: dict[str, str], styles: dict[str, str] | None = None) -> None:
    styles = styles or {}
    handles = [plt.Line2D([], [], color=c, lw=2.4, ls=styles.get(n, "-"), label=n) for n, c in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


if __name__ == "__main__":
    plt.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium"}
    )
    metric()
    paths()
    damping()
