"""Copies and pickles of the drop-in classes: a copy works only on the copied net."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from fisherfn.base import Method
from fisherfn.errors import StructureError
from fisherfn.methods import named
from fisherfn.natgrad import NaturalGradient
from fisherfn.optim.network import Network
from fisherfn.optim.options import Options
from fisherfn.optim.ranks import spread
from fisherfn.types import Model


class Copies:
    """Makes a curvature copyable: its pure functions are bound to a net, and in a copy to the copied net.

    Watched statistics that were not used yet stay with the original.
    """

    network: Network
    ng: NaturalGradient | None
    held: Callable[[], Any]
    _options: Options
    _rest: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__({name: copy.deepcopy(value, memo) for name, value in self._unbound().items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        for what in ("method", "likelihood"):
            if not _pickles(getattr(self._options, what)):
                raise StructureError(
                    f"an optimizer with this {what} cannot be pickled, because it contains local functions. Pass the "
                    "method by name and the likelihood as a class or function of a module, or save state_dict()."
                )
        return self._unbound()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not {"_options", "_form"} <= state.keys():
            raise StructureError(
                "an older version of fisherfn pickled this optimizer. Save state_dict() with that version, make the "
                "optimizer again and load it with load_state_dict()."
            )
        vars(self).update(state)
        if isinstance(state["ng"], _Unbound):
            self.ng = spread(state["ng"].bound(self.network.model(), self._options.method))

    def _unbound(self) -> dict[str, Any]:
        ng = None if self.ng is None else _Unbound.of(self.ng)
        rest = None if self._rest is None else self.held()
        new: dict[str, Any] = {"_passes": [], "_by_kind": {}, "_steps_of": {}, "_written": [], "_rest": rest, "ng": ng}
        return vars(self) | new


class _Unbound(NamedTuple):
    """The fields of a natural gradient without the functions that belong to one net."""

    fields: dict[str, Any]

    @classmethod
    def of(cls, ng: NaturalGradient) -> _Unbound:
        return cls({field.name: getattr(ng, field.name) for field in fields(ng) if field.name not in _BOUND})

    def bound(self, model: Model, method: Method | str) -> NaturalGradient:
        method = named(method)
        return NaturalGradient(model=model, method=method, **self.fields)


_BOUND = ("model", "method", "ranks")


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True
