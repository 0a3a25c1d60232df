"""Composite calls (attention, recurrent nets, layers with a foreign scale) as the elementary calls they consist of.

The layer families (`fisherfn.layers`) then see linear layers, norms and products only.
"""

from fisherfn.decompositions.affine import without_affine
from fisherfn.decompositions.elementary import Elementary, is_packed_recurrence

__all__ = ["Elementary", "is_packed_recurrence", "without_affine"]
