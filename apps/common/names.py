"""Look up names of the command line: an entry of a registry, or the user's own `pkg.module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def is_own(name: str) -> bool:
    """Return True if `name` has the form `pkg.module:function` of user code."""
    return ":" in name


def lookup(name: str, registry: Mapping[str, T], what: str, error: type[Exception]) -> T:
    """Return the entry of the registry, or raise `error` with the closest name and all names."""
    if name in registry:
        return registry[name]
    raise error(unknown(name, registry, what))


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """Return the message for an unknown name, with a suggestion from `known`; case is ignored."""
    known = list(known)
    near = nearest(name, known, cutoff=0.4)
    hint = f", did you mean {near}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}, or your own as 'pkg.module:function'."


def nearest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """Return the known name closest to `name`, ignoring case and dashes; None if none is close."""
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.replace("-", "_").casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def own(name: str, what: str, error: type[Exception]) -> Callable[..., Any]:
    """Import `pkg.module:function`; the current folder is importable, as under `python -m`.

    Only a missing module or attribute raises `error`. Errors inside the module keep their own traceback.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise error(f"{what} {name!r}: write it as 'pkg.module:function', with a module before the colon.")
    function = getattr(_module(module_name, name, what, error), attribute, None)
    if not callable(function):
        fault = "no such function" if function is None else f"no function but {type(function).__name__}"
        where = getattr(sys.modules[module_name], "__file__", None)
        raise error(f"{what} {name!r}: {attribute!r} is {fault} in module {module_name!r} ({where}).")
    return function


def _module(module_name: str, name: str, what: str, error: type[Exception]) -> Any:
    # a script's path has the script's folder, not the current one; append it, so that it shadows nothing
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        # a failing import *inside* the module names another module: raise it unchanged
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise
        searched = f"the current folder ({os.getcwd()}) and the Python path"
        raise error(f"{what} {name!r}: no module {missing.name!r} in {searched}; check its spelling.") from missing
