"""The registry of methods: one paper, one file, one line here."""

from collections.abc import Callable

from fisherfn.base import Method
from fisherfn.methods.deflation import deflation
from fisherfn.methods.ekfac import ekfac
from fisherfn.methods.exact import exact
from fisherfn.methods.kfac import kfac
from fisherfn.methods.kfac_corrected import kfac_corrected
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
    "twolevel_kfac": two_level,
    "exactNG": exact,
}

__all__ = ["METHODS", "deflation", "ekfac", "exact", "kfac", "kfac_corrected", "kpsvd", "lanczos", "two_level"]
