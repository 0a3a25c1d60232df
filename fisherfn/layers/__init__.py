"""The registry of layer families: one file a family, one line here."""

from fisherfn.layers.base import Call, Family
from fisherfn.layers.fallback import FALLBACK
from fisherfn.layers.fallback import Facts as FallbackFacts
from fisherfn.layers.linear import LINEAR
from fisherfn.layers.norm import BATCH_NORM, couples_examples

FAMILIES: dict[str, Family] = {family.name: family for family in (LINEAR, BATCH_NORM, FALLBACK)}

__all__ = ["BATCH_NORM", "FALLBACK", "FAMILIES", "LINEAR", "Call", "FallbackFacts", "Family", "couples_examples"]
