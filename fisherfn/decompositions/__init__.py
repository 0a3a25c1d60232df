"""Composite calls (attention, recurrent nets, layers with a foreign scale) as the elementary calls they consist of.

The layer families (`fisherfn.layers`) then see linear layers, norms and products only.
"""

from fisherfn.decompositions.affine import without_affine
from fisherfn.decompositions.elementary import Elementary, refuse

__all__ = ["Elementary", "refuse", "without_affine"]
