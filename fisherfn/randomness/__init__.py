"""Random numbers of a model as a function of seeds: dropout, and everything else that it draws by itself."""

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
]
