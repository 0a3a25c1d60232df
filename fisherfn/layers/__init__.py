"""The registry of layer families: one file per family, one line here."""

from collections.abc import Callable, Sequence
from typing import Any

from fisherfn.layers.base import Call, Family
from fisherfn.layers.conv import CONV
from fisherfn.layers.conv_transpose import CONV_TRANSPOSE
from fisherfn.layers.copied import COPIED, per_example
from fisherfn.layers.einsum import EINSUM, as_grouped_product
from fisherfn.layers.elementwise import ELEMENTWISE, broadcasts, changes_input, meeting, spreads, works_in_place
from fisherfn.layers.embedding import EMBEDDING
from fisherfn.layers.fallback import FALLBACK
from fisherfn.layers.fallback import Config as FallbackConfig
from fisherfn.layers.linear import LINEAR
from fisherfn.layers.matmul import MATMUL, is_transpose, untransposed
from fisherfn.layers.norm import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, LAYER_NORM, RMS_NORM
from fisherfn.layers.routed import Orders, as_experts
from fisherfn.layers.tied import KINDS as TIED_KINDS
from fisherfn.layers.tied import TIED, balance, ratio, squares, swapped_columns, swapped_rows

_NORMS = (BATCH_NORM, INSTANCE_NORM, GROUP_NORM, LAYER_NORM, RMS_NORM)
_ALL = (LINEAR, MATMUL, EINSUM, CONV, CONV_TRANSPOSE, *_NORMS, EMBEDDING, TIED, ELEMENTWISE, COPIED, FALLBACK)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

_BY_FUNCTION = {function: [f for f in _ALL if function in f.functions] for each in _ALL for function in each.functions}


def families(function: Callable[..., Any]) -> Sequence[Family]:
    """Return the families whose layers may reach torch as this function."""
    return _BY_FUNCTION.get(function, ())


__all__ = [
    "COPIED",
    "ELEMENTWISE",
    "EMBEDDING",
    "FALLBACK",
    "FAMILIES",
    "LINEAR",
    "TIED",
    "TIED_KINDS",
    "Call",
    "FallbackConfig",
    "Family",
    "as_grouped_product",
    "balance",
    "broadcasts",
    "changes_input",
    "families",
    "is_transpose",
    "meeting",
    "Orders",
    "as_experts",
    "works_in_place",
    "per_example",
    "ratio",
    "spreads",
    "squares",
    "swapped_columns",
    "swapped_rows",
    "untransposed",
]
