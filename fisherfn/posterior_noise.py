"""The random numbers of a posterior: from a generator, or made before the call and checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.errors import NoiseError, StructureError, expect, expect_count
from fisherfn.randomness import sampling

_REMEDY = "sample before the call, and pass noise=posterior.noise(generator, samples=S)"


def normal_numbers(
    shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator, samples: int
) -> dict[str, Tensor]:
    """Return standard normal numbers in float64: by name a tensor with the samples as first axis.

    Raises:
        HyperparameterError: fewer than one sample.
        StructureError: no generator.
        NoiseError: a call inside `torch.vmap`.
    """
    expect(generator, torch.Generator, "generator", "pass a torch.Generator")
    expect_count("samples", samples)
    with sampling(_REMEDY):
        return {
            name: torch.randn((samples, *shape), generator=generator, dtype=torch.float64, device=generator.device)
            for name, shape in shapes.items()
        }


def checked_numbers(
    shapes: Mapping[str, tuple[int, ...]],
    noise: dict[str, Tensor] | None,
    generator: torch.Generator | None,
    samples: int | None,
) -> dict[str, Tensor]:
    """Return the noise if it has a number for each sample and entry; without noise, that of a generator.

    Raises:
        HyperparameterError: fewer than one sample.
        NoiseError: neither noise nor a generator, or a generator inside `torch.vmap`.
        StructureError: noise with other names.
        ShapeError: noise of another shape, or of another number of samples.
    """
    if noise is None:
        if generator is None:
            raise NoiseError(f"samples need random numbers: pass generator=torch.Generator(), or {_REMEDY}.")
        return normal_numbers(shapes, generator, 1 if samples is None else samples)
    expect(noise, dict, "noise", _REMEDY)
    if wrong := sorted(noise.keys() ^ shapes.keys(), key=str)[:4]:
        raise StructureError(f"noise differs from the blocks and unused parameters in {wrong}: {_REMEDY}.")
    if samples is None:
        first = next(iter(noise.values()))
        samples = len(first) if isinstance(first, Tensor) and first.ndim else 1
    expect_count("samples", samples)
    wanted = {name: (samples, *shape) for name, shape in shapes.items()}
    tree.check_leaves(noise, wanted, " of noise", "as posterior.noise returns")
    return noise
