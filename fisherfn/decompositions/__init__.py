"""Decomposition of composite calls (attention, recurrent nets, layers with a computed scale) into elementary calls.

The layer families (`fisherfn.layers`) then see only linear layers, norms and products.
"""

from fisherfn.decompositions.affine import without_affine
from fisherfn.decompositions.elementary import Elementary, refuse

__all__ = ["Elementary", "refuse", "without_affine"]
