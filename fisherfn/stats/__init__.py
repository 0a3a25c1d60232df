"""Network in, taps out: interception, zero taps and pullbacks, label sources, layout."""

from fisherfn.stats.build import build
from fisherfn.stats.collect import Sources, carry, check_batch, collect, join_contexts, window
from fisherfn.stats.functional import functional
from fisherfn.stats.labels import FISHERS, check_noise, need
from fisherfn.stats.layout import Block, Layout
from fisherfn.stats.statistics import LayerStats, Stats, join

__all__ = [
    "FISHERS",
    "Block",
    "LayerStats",
    "Layout",
    "Sources",
    "Stats",
    "build",
    "carry",
    "check_batch",
    "check_noise",
    "collect",
    "functional",
    "join",
    "join_contexts",
    "need",
    "window",
]
