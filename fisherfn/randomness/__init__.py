"""Random numbers of a model as a function of seeds: dropout, and everything else that it draws by itself."""

from fisherfn.randomness.dropout import (
    SeededDropout,
    Sizes,
    axes_of_examples,
    dropout_seeds,
    drops,
    refuse,
    require_seeds,
)

__all__ = [
    "SeededDropout",
    "Sizes",
    "axes_of_examples",
    "dropout_seeds",
    "drops",
    "refuse",
    "require_seeds",
]
