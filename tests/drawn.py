"""Matrices and taps from a seed, small and in float64, with the dense arrays that they stand for."""

import torch
from hypothesis import strategies as st

from fisherfn.rows import OneHot, Phase, Phases
from fisherfn.taps import LazyTap, Sizes, Tap
from tests import zoo

SEEDS = st.integers(0, 99)

TOGETHER = {  # k, s, n, t, o, i
    "linear": (1, 1, 8, 1, 3, 4),
    "shared": (1, 1, 8, 2, 3, 3),
    "groups": (2, 2, 8, 1, 4, 3),
    "half": (1, 1, 4, 1, 3, 4),
    "narrow": (1, 1, 8, 1, 1, 4),
    "wide": (1, 1, 8, 1, 6, 5),
}
"""Blocks of which some are iterated on together: those with one position and as many examples."""


def normal(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


def psd(groups, size, seed=0, rank=None):
    """Return PSD matrices `[k d d]`, of full rank unless one is given."""
    root = normal(groups, size, rank or size + 1, seed=seed)
    return root @ root.mT


def symmetric(groups, size, seed=0):
    root = normal(groups, size, size, seed=seed)
    return root + root.mT


def factor(groups, size, diagonal, seed=0):
    """Return a PSD factor in one of its two forms."""
    found = psd(groups, size, seed)
    return found.diagonal(dim1=-2, dim2=-1).clone() if diagonal else found


def matrix(factor_):
    """Return a factor as matrices, whatever its form."""
    return torch.diag_embed(factor_) if factor_.ndim == 2 else factor_


# ------------------------------------------------------------------------------------------------------------ rows


def one_hot(k, n, t, i, seed):
    index = torch.randint(i + 1, (k, n, t), generator=zoo.generator(seed))  # i itself: an empty row
    dense = torch.zeros(k, n, t, i + 1, dtype=torch.float64).scatter(3, index.unsqueeze(-1), 1.0)[..., :i]
    return OneHot(index, i, torch.float64), dense


def phases(k, n, t, i, seed):
    """Every position is in one of two phases, each with columns of its own; they may overlap."""
    rng = zoo.generator(seed)
    order = torch.randperm(t, generator=rng)
    parts, dense = [], torch.zeros(k, n, t, i, dtype=torch.float64)
    for number, positions in enumerate(p for p in order.tensor_split(2) if len(p)):
        columns = torch.randperm(i, generator=rng)[: 1 + (seed + number) % i]
        part = Phase(normal(k, n, len(positions), len(columns), seed=seed + number), positions, columns)
        for p, position in enumerate(positions):
            for c, column in enumerate(columns):
                dense[:, :, position, column] = part.a[:, :, p, c]
        parts.append(part)
    return Phases(tuple(parts), i), dense


def single_phase(k, n, t, i, seed):
    a, columns = normal(k, n, t, i, seed=seed), torch.randperm(i, generator=zoo.generator(seed))
    return Phases((Phase(a, (), columns),), i), a[..., columns.argsort()]


def plain(k, n, t, i, seed):
    a = normal(k, n, t, i, seed=seed)
    return a, a


STRUCTURED = {"one-hot": one_hot, "phases": phases, "one-phase": single_phase}
ROWS = {"dense": plain, **STRUCTURED}


# ------------------------------------------------------------------------------------------------------------ taps


class Lazy(LazyTap):
    """A lazy tap of an existing one."""

    def __init__(self, tap):
        self.tap = tap
        _, _, _, self.t, _, self.i = tap.sizes

    @property
    def stored(self):
        return self.t * self.i

    @property
    def sizes(self) -> Sizes:
        return self.tap.sizes

    @property
    def dtype(self):
        return self.tap.dtype

    @property
    def one_hot(self):
        return self.tap.one_hot

    def part(self, examples: slice) -> Tap:
        return self.tap.window(examples)

    def window(self, examples):
        return Lazy(self.tap.window(examples))

    def to(self, dtype):
        return Lazy(self.tap.to(dtype))

    def outputs(self):
        return self.tap.outputs()


def tap(kind, sizes, seed=0, lazy=False):
    """Return a tap with rows of this kind, and its W by definition, `[s n k o i]`."""
    k, s, n, t, o, i = sizes
    a, dense = ROWS[kind](k, n, t, i, seed)
    g = normal(k, s, n, t, o, seed=seed + 1)
    made = Tap(a, g)
    return Lazy(made) if lazy else made, torch.einsum("ksnto,knti->snkoi", g, dense)


def sizes(samples=2, positions=3):
    """Draw the sizes of a tap: groups, samples, examples, positions, outputs, inputs."""
    limits = (2, samples, 3, positions, 3, 4)
    return st.tuples(*(st.integers(1, limit) for limit in limits))


N = 8


def labelled(width=4, length=None, seed=0):
    """Eight examples in single precision, and a class of three for each."""
    g = torch.Generator().manual_seed(seed)
    shape = (N, width) if length is None else (N, length, width)
    return torch.randn(shape, generator=g), torch.randint(0, 3, (N,), generator=g)
