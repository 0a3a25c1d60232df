"""Freed memory that stays with the process, for programs that allocate large tensors in every step.

The allocator of glibc returns blocks above 32 MiB to the system as soon as they are freed. The next tensor of this size
gets new pages, which the system must clear first. For a vmapped group of wide models that takes longer than the
arithmetic on them.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of `mallopt` (glibc, malloc.h)."""


def keep_freed_memory() -> bool:
    """Let the allocator keep freed blocks for later ones; return False where it is not glibc's.

    The process then keeps the most memory that it needed at any time. Call it before the first large tensor.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # -1: never give back the end of the heap; 0: no block outside the heap
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1)) and bool(mallopt(M_MMAP_MAX, 0))
