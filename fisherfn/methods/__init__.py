"""The registry of methods: one paper, one file, one line here."""

from collections.abc import Callable

from fisherfn.base import Method
from fisherfn.errors import UnknownNameError, expect, unknown
from fisherfn.methods.deflation import deflation
from fisherfn.methods.dense import dense
from fisherfn.methods.ekfac import ekfac
from fisherfn.methods.exact import exact
from fisherfn.methods.kfac import kfac
from fisherfn.methods.kfac_by_term import kfac_by_term
from fisherfn.methods.kfac_corrected import kfac_corrected
from fisherfn.methods.kl_optimal import kl_optimal
from fisherfn.methods.kpsvd import kpsvd
from fisherfn.methods.lanczos import lanczos
from fisherfn.methods.two_level import two_level

METHODS: dict[str, Callable[..., Method]] = {
    "kfac": kfac,
    "ekfac": ekfac,
    "kpsvd": kpsvd,
    "deflation": deflation,
    "kfac_cor": kfac_corrected,
    "lanczos": lanczos,
    "kl_optimal": kl_optimal,
    "twolevel_kfac": two_level,
    "exactNG": exact,
}
"""Builders of the methods for any net, by the names of the papers. `dense` and `kfac_by_term` serve special nets."""

ALIASES = {"kfac_corrected": "kfac_cor", "two_level": "twolevel_kfac", "exact": "exactNG"}
"""Builders whose name is not the published one."""

UNNAMED = {
    "dense": "for layers of up to 4,096 parameters",
    "kfac_by_term": "for a sum of terms (ff.sum_of_terms)",
}
"""Methods without a name for `method=`, and the nets that they are for."""


def named(method: Method | str) -> Method:
    """Return the method of this name, a key of `METHODS` or the name of a builder; return a method as it is.

    Raises:
        UnknownNameError: no method has this name.
        StructureError: neither a name nor a method.
    """
    if isinstance(method, str):
        if method in UNNAMED:
            raise UnknownNameError(
                f"{method!r} is not among the names of methods, because it is {UNNAMED[method]} only: pass the method "
                f"itself, method=ff.{method}()."
            )
        key = ALIASES.get(method, method)
        if key not in METHODS:
            raise unknown("method", method, METHODS)
        return METHODS[key]()
    expect(method, Method, "method", f"pass ff.kfac() or another method, or one of the names {', '.join(METHODS)}")
    return method


__all__ = [
    "METHODS",
    "deflation",
    "dense",
    "ekfac",
    "exact",
    "kfac",
    "kfac_by_term",
    "kfac_corrected",
    "kl_optimal",
    "kpsvd",
    "lanczos",
    "named",
    "two_level",
]
