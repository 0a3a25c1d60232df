r"""CURVES: thin smooth strokes through three random points, after Hinton & Salakhutdinov (Science 313, 2006).

The published file `digs3pts_1.mat` is read if it is found. Otherwise similar curves are generated: a quadratic
curve `p(t)` with `p(0), p(½), p(1)` the three points, whose ink `i` at a pixel `q` saturates,

$$ x(q) = 1 - e^{-\kappa i(q)}, \qquad
   i(q) = \frac{1}{\sqrt{2\pi}\,\sigma} \int e^{-|q - p(t)|^2 / 2\sigma^2} \, |p'(t)| \, dt, $$

anti-aliased by construction. The Gaussian is a product over the two axes, so the integral is one small matrix product
per image. σ and κ are chosen by two numbers of the published set, cross-entropies per pixel in nats: 0.157 for the best
constant output (where the original's weight-decayed runs stay), and for the entropy of the grey values, which is a
lower bound for any net, a little less than the 0.0703 of its best runs. The generated curves have 0.156 and 0.067, with
a mean pixel of 0.044.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

import fisherfn as ff
from common.data.base import Data, DataError, Split
from common.data.files import candidates, find, read_mat

FOLDERS = ("curves", "CURVES")
FILE = "digs3pts_1.mat"
TRAIN, TEST = 20_000, 10_000  # as published
SIZE = 28
SIGMA, INK = 0.75, 1.1  # pixels; see above
MARGIN = 3.0  # pixels: such a curve overshoots its points' box by an eighth at most, so 22 / 8 stays inside
FAINT = 1e-12  # smaller values are set to zero: the tails of a Gaussian are denormal numbers, which are slow
FAR = -70.0  # exponent below which a Gaussian is zero: no grey above FAINT changes in single precision
STEPS = 96  # of the integral; longest curves then move by less than a stroke's width a step
CHUNK = 100  # images drawn at once: what they need fits into the cache

log = logging.getLogger(__name__)


def load(data_path: str | None, seed: int) -> Data:
    """20,000 training and 10,000 test images, [N, 1, 28, 28] in [0, 1], without labels.

    `digs3pts_1.mat` under `data_path` (flat or in `curves/`) is used if present: `bdata` [20000, 784] and
    `bdatatest` [10000, 784]; the names may differ, the shapes may not. Otherwise the curves are generated from
    `seed` in a few seconds.
    """
    path = find(candidates(data_path, FOLDERS), [FILE])
    log.info("CURVES: %s", f"read from {path}" if path else f"drawn, seed {seed}")
    train, test = published(path) if path else draw(TRAIN + TEST, seed).tensor_split([TRAIN])
    return Data("CURVES", Split(train, None), Split(test, None), "AE_CURVES", ff.Bernoulli(), None)


def published(path: Path) -> tuple[Tensor, Tensor]:
    """Return the published training and test images, each [N, 1, 28, 28]."""
    return _images(path, TRAIN, ["bdata"]), _images(path, TEST, ["bdatatest"])


def _images(path: Path, count: int, keys: list[str]) -> Tensor:
    values = torch.from_numpy(read_mat(path, (count, SIZE * SIZE), keys)).float()
    if values.min() < 0 or values.max() > 1:
        raise DataError(f"{path}: pixels should lie in [0, 1], found {values.min():g} to {values.max():g}.")
    return values.reshape(count, 1, SIZE, SIZE)


def draw(count: int, seed: int) -> Tensor:
    """Generate `count` images [count, 1, 28, 28] in [0, 1], determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    points = MARGIN + (SIZE - 2 * MARGIN) * torch.rand(count, 3, 2, generator=generator)
    return torch.cat([render(chunk) for chunk in torch.split(points, CHUNK)]).unsqueeze(1)


def render(points: Tensor) -> Tensor:
    """Draw strokes [N, 28, 28] through `points` [N, 3, 2], given as (x, y) in pixels."""
    middle, length = _path(points)  # [N, STEPS, 2], [N, STEPS]
    pixels = torch.arange(SIZE) + 0.5
    exponent = -(middle.unsqueeze(-1) - pixels).square() / (2 * SIGMA**2)  # [N, STEPS, 2, 28]
    across = torch.exp(torch.where(exponent > FAR, exponent, -torch.inf))
    rows = across[:, :, 1] * length.unsqueeze(-1)
    ink = rows.transpose(1, 2) @ across[:, :, 0] / (math.sqrt(2 * math.pi) * SIGMA)
    grey = -torch.expm1(-INK * ink)
    return torch.where(grey > FAINT, grey, 0.0)


def _path(points: Tensor) -> tuple[Tensor, Tensor]:
    # midpoints and lengths of the curve's STEPS pieces; Lagrange's quadratic through t = 0, ½, 1
    t = torch.linspace(0, 1, 2 * STEPS + 1)
    weights = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], 1)
    path = weights @ points  # [N, 2 STEPS + 1, 2]
    return path[:, 1::2], path[:, ::2].diff(dim=1).norm(dim=-1)
