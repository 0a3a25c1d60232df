"""A model of the time, traffic and memory of a data-parallel K-FAC step, from measured compute and a given network.

Assumptions: all ranks are equally fast, and their batches are of equal size; messages do not overlap with compute;
a sum of S bytes takes `2 S (P - 1)/P / bandwidth + 2 log2(P) latency`, and a gather of S bytes in all half of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import fisherfn as ff

DIAGONAL_ABOVE = 8192
"""Width above which K-FAC keeps only the diagonal of a factor."""

AGREEMENT = 64
"""Bytes per rank of an agreement."""


class Shape(NamedTuple):
    """The shape of a block: group, outputs, inputs, and whether its rows are one-hot, as below an embedding."""

    k: int
    o: int
    i: int
    one_hot: bool = False


class Network(NamedTuple):
    """A network between ranks: bytes per second per rank, and seconds per message."""

    bandwidth: float
    latency: float


class Compute(NamedTuple):
    """Measured seconds on one rank with its batch, without messages.

    Attributes:
        gradient: loss and gradient.
        statistics: sampled labels, their backward pass and the moments.
        inversion: inverses of all blocks.
        step: multiplication with the inverses, and the update; every rank does all of it.
    """

    gradient: float
    statistics: float
    inversion: float
    step: float


class Cadence(NamedTuple):
    """Steps between statistics, and between inverses."""

    update: int = 10
    invert: int = 100


USUAL = Cadence()
"""Statistics every 10 steps, inverses every 100."""


class Traffic(NamedTuple):
    """Bytes of payload per message: gradient in every step, moments and inverses in steps that refresh them."""

    gradient: int
    moments: int
    inverses: int


def triangle(width: int, limit: int, diagonal: bool = False) -> int:
    """Return the numbers of a symmetric factor on the wire: its upper triangle, or its diagonal if it is wide."""
    return width if diagonal or width > limit else width * (width + 1) // 2


def traffic(shapes: Mapping[str, Shape], limit: int, itemsize: int = 4, others: int = 0) -> Traffic:
    """Return the payload of each message; `others` counts parameters in no block."""
    gradient = others + sum(k * o * i for k, o, i, _ in shapes.values())
    factors = sum(k * (triangle(i, limit, hot) + triangle(o, limit)) for k, o, i, hot in shapes.values())
    return Traffic(gradient * itemsize, factors * itemsize, factors * itemsize)


def memory(
    shapes: Mapping[str, Shape], limit: int, itemsize: int = 4, others: int = 0, owners: int = 1
) -> dict[str, int]:
    """Return the bytes that a rank holds between steps; factors and inverses are square.

    Every rank has all factors and inverses. With `owners` above 1, that many ranks precondition what they own, and the
    inverses are those of the rank that has most.
    """

    def square(width: int, diagonal: bool = False) -> int:
        return width if diagonal or width > limit else width * width

    each = {key: k * (square(i, hot) + square(o)) for key, (k, o, i, hot) in shapes.items()}
    factors, owner = sum(each.values()), _owner(shapes, limit, owners)
    largest = max(sum(size for key, size in each.items() if owner[key] == rank) for rank in range(owners))
    parameters = others + sum(k * o * i for k, o, i, _ in shapes.values())
    return {
        "parameters": parameters * itemsize,
        "gradient": parameters * itemsize,
        "momentum": parameters * itemsize,
        "factors": factors * itemsize,
        "inverses": largest * itemsize,
    }


def share(shapes: Mapping[str, Shape], limit: int, ranks: int) -> float:
    """Return the largest part of the inversions that one rank has, by its cost in multiplications."""
    each = ff.distributed.inversion_costs(shapes, limit)  # type: ignore[arg-type]
    owner = _owner(shapes, limit, ranks)
    work = [sum(cost for key, cost in each.items() if owner[key] == rank) for rank in range(ranks)]
    return max(work) / sum(work)


def _owner(shapes: Mapping[str, Shape], limit: int, ranks: int) -> dict[str, int]:
    """Return the rank that owns each block."""
    return ff.distributed.inversion_owners(ff.distributed.inversion_costs(shapes, limit), ranks)  # type: ignore[arg-type]


def added(size: float, ranks: int, network: Network) -> float:
    """Return the seconds of a sum of `size` bytes over ranks."""
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return 2 * (size * (ranks - 1) / ranks / network.bandwidth + rounds * network.latency)


def seconds(
    compute: Compute,
    sent: Traffic,
    part: float,
    ranks: int,
    network: Network,
    cadence: Cadence = USUAL,
    owner: bool = False,
) -> float:
    """Return the average seconds per step; `part` is the largest share of the inversions of one rank.

    With `owner`, owners precondition: a gather of preconditioned gradients in every step replaces the inverses.
    """
    agreements = added(AGREEMENT * ranks, ranks, network)  # two gathers
    messages = agreements + added(sent.gradient, ranks, network)
    messages += added(sent.moments, ranks, network) / cadence.update
    if owner:  # a gather takes half of the time of a sum; the masks of an inversion are a message without size
        messages += added(sent.gradient, ranks, network) / 2 + added(0, ranks, network) / cadence.invert
    else:
        messages += added(sent.inverses, ranks, network) / cadence.invert
    own = compute.gradient + compute.step * (part if owner else 1) + compute.statistics / cadence.update
    return own + compute.inversion * part / cadence.invert + (messages if ranks > 1 else 0.0)


def speed_up(
    compute: Compute, shapes: Mapping[str, Shape], limit: int, ranks: int, network: Network,
    cadence: Cadence = USUAL, owner: bool = False,
) -> float:  # fmt: skip
    """Return how many times as many examples per second all ranks process as one, with equal batches per rank."""
    sent = traffic(shapes, limit)
    one = seconds(compute, sent, 1.0, 1, network, cadence)
    return ranks * one / seconds(compute, sent, share(shapes, limit, ranks), ranks, network, cadence, owner)
