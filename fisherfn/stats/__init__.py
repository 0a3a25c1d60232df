"""Collection of statistics from a network: interception, zero taps and pullbacks, sampled labels, layout."""

from fisherfn.stats.batch import FISHERS, Batch, checked, pair
from fisherfn.stats.block_taps import lazy
from fisherfn.stats.blocks import Block
from fisherfn.stats.build import build
from fisherfn.stats.chunks import independent, join, window
from fisherfn.stats.collector import Collector, FisherKind, known_likelihood
from fisherfn.stats.functional import functional, run
from fisherfn.stats.implicit import ImplicitFisher
from fisherfn.stats.layout import Layout
from fisherfn.stats.statistics import LayerStats, Stats

__all__ = [
    "FISHERS",
    "Batch",
    "Block",
    "Collector",
    "FisherKind",
    "ImplicitFisher",
    "LayerStats",
    "Layout",
    "Stats",
    "build",
    "checked",
    "functional",
    "independent",
    "join",
    "known_likelihood",
    "lazy",
    "pair",
    "run",
    "window",
]
