"""Random numbers of a model as a function of seeds: dropout and all other noise that the model samples itself."""

from fisherfn.randomness.draws import Draw, draws_of
from fisherfn.randomness.dropout import (
    SeededDropout,
    Sizes,
    draws_globally,
    dropout_seeds,
    drops,
    refuse,
    require_seeds,
)
from fisherfn.randomness.generators import sampling

__all__ = [
    "Draw",
    "SeededDropout",
    "Sizes",
    "draws_globally",
    "draws_of",
    "dropout_seeds",
    "drops",
    "refuse",
    "require_seeds",
    "sampling",
]
