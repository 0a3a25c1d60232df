"""Network in, taps out: interception, zero taps and pullbacks, label sources, layout."""

from fisherfn.stats.build import build
from fisherfn.stats.chunks import in_chunks, window
from fisherfn.stats.collect import Sources, check_batch, collect
from fisherfn.stats.functional import functional, run
from fisherfn.stats.implicit import ImplicitFisher
from fisherfn.stats.labels import FISHERS, check_noise, need
from fisherfn.stats.layout import Block, Layout
from fisherfn.stats.statistics import LayerStats, Stats

__all__ = [
    "FISHERS",
    "Block",
    "ImplicitFisher",
    "LayerStats",
    "Layout",
    "Sources",
    "Stats",
    "build",
    "check_batch",
    "check_noise",
    "collect",
    "functional",
    "in_chunks",
    "need",
    "run",
    "window",
]
