"""Random numbers of a model as a function of seeds: dropout, and everything else that it draws by itself."""

from fisherfn.randomness.dropout import (
    SeededDropout,
    Sizes,
    axes_of_examples,
    draws_globally,
    dropout_seeds,
    drops,
    need_seeds,
)

__all__ = [
    "SeededDropout",
    "Sizes",
    "axes_of_examples",
    "draws_globally",
    "dropout_seeds",
    "drops",
    "need_seeds",
]
