"""Generators where none can be used: inside `torch.vmap`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fisherfn.errors import NoiseError


@contextmanager
def sampling(remedy: str) -> Iterator[None]:
    """Turn torch's refusal to sample inside `torch.vmap` into `NoiseError` with a remedy."""
    try:
        yield
    except RuntimeError as error:
        if "called random operation" not in str(error):
            raise
        raise NoiseError(f"torch.vmap refuses generators in the function that it maps: {remedy}.") from error
