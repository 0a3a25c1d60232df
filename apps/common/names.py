"""From a name on the command line to the thing it names: a registry's entry, or one's own `pkg.module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def is_own(name: str) -> bool:
    """Whether `name` has the form `pkg.module:function` of one's own code rather than a registry's."""
    return ":" in name


def lookup(name: str, registry: Mapping[str, T], what: str, error: type[Exception]) -> T:
    """The registry's entry, or `error` naming the nearest name and listing all."""
    if name in registry:
        return registry[name]
    raise error(unknown(name, registry, what))


def unknown(name: str, known: Iterable[str], what: str) -> str:
    """The message for a name that is not among `known`; upper and lower case count as near."""
    known = list(known)
    near = nearest(name, known, cutoff=0.4)
    hint = f", did you mean {near}?" if near else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}, or your own as 'pkg.module:function'."


def nearest(name: str, known: Iterable[str], cutoff: float) -> str | None:
    """The known name that `name` is most like, whatever its case and dashes; None where none is like it."""
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.replace("-", "_").casefold(), folded, n=1, cutoff=cutoff)
    return folded[near[0]] if near else None


def own(name: str, what: str, error: type[Exception]) -> Callable[..., Any]:
    """Import `pkg.module:function`; the current folder is importable, as under `python -m`.

    Only a module or attribute that is not there becomes `error`: what goes wrong inside the module is its author's and
    keeps its own traceback.
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
    # a script's path starts with the script's folder, not the caller's; at the end, so that it shadows nothing
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        # an import that fails *inside* the module names another module: not ours to reword
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise
        searched = f"the current folder ({os.getcwd()}) and the Python path"
        raise error(f"{what} {name!r}: no module {missing.name!r} in {searched}; check its spelling.") from missing
