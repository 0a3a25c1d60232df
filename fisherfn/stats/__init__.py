"""Network in, taps out: interception, zero taps and pullbacks, label sources, layout."""

from fisherfn.stats.build import build
from fisherfn.stats.collect import LayerStats, Sources, Stats, check_batch, collect, gradient, join
from fisherfn.stats.functional import functional
from fisherfn.stats.labels import FISHERS, check_noise, need
from fisherfn.stats.layout import Block, Layout

__all__ = [
    "FISHERS",
    "Block",
    "LayerStats",
    "Layout",
    "Sources",
    "Stats",
    "build",
    "check_batch",
    "check_noise",
    "collect",
    "functional",
    "gradient",
    "join",
    "need",
]
