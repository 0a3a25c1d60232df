"""The registry of methods: one paper, one file, one line here."""

from collections.abc import Callable

from fisherfn.base import Method
from fisherfn.methods.kfac import kfac

METHODS: dict[str, Callable[..., Method]] = {
    "kfac": kfac,
}

__all__ = ["METHODS", "kfac"]
