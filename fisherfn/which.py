"""The choice of some blocks of a net for a refresh, given by their keys."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from fisherfn.errors import StructureError

Which: TypeAlias = bool | frozenset[str]
"""The blocks to refresh: all (True), none (False), or those with these keys."""


def chosen(asked: Collection[str] | object, keys: Collection[str], coupled: str = "") -> Which:
    """Return which blocks to refresh, given their keys, or a flag for all.

    Args:
        asked: keys of blocks, or a flag.
        keys: the keys of all blocks.
        coupled: the name of a method that couples the blocks; else empty.

    Raises:
        StructureError: no block has such a key, or the method couples the blocks.
    """
    if not isinstance(asked, Collection):
        return bool(asked)
    wrong = [asked] if isinstance(asked, str) else [key for key in asked if key not in keys]
    if wrong:
        raise StructureError(f"pass blocks as a set of the keys {', '.join(map(repr, keys))}; got {wrong[0]!r}.")
    if asked and coupled:
        raise StructureError(
            f"{coupled} couples its blocks, so it updates and inverts them together: pass True or False."
        )
    found = frozenset(asked)
    return len(found) > 0 if len(found) in (0, len(keys)) else found


def includes(which: Which, key: str) -> bool:
    """Return True if a block is among those to refresh."""
    return which if isinstance(which, bool) else key in which
