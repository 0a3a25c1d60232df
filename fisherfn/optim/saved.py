"""The saved form of a curvature: flat tensors and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisherfn import tree
from fisherfn.adapt import AdaptiveState, adaptive
from fisherfn.errors import StructureError, expect
from fisherfn.natgrad import NaturalGradient
from fisherfn.optim.network import Network
from fisherfn.optim.options import Options
from fisherfn.state import State
from fisherfn.stats.swap import versions

VERSION = 1
"""Version of the saved form."""


class Saved:
    """Saves and loads the state, the number of steps and the random generator of a curvature."""

    network: Network
    ng: NaturalGradient | None
    steps: int
    forget: Callable[..., None]
    _options: Options
    _adaptive: dict[str, Any] | None
    _damping: float
    _generator: torch.Generator
    _state: State | None
    _rest: AdaptiveState | None
    _saved: dict[str, Tensor]
    _written: list[int]

    def changed(self) -> bool:
        """Return True if something else has changed the weights since the last step."""
        return bool(self._written) and self._written != versions(self.network.values())

    def held(self) -> State | AdaptiveState | None:
        """Return the state, if there is one; it undoes no update if the weights were changed since the last step."""
        if self._rest is None:
            return self._state
        return self._rest.unseen() if self.changed() else self._rest

    def state_dict(self) -> dict[str, Any]:
        """Return flat tensors and numbers, which `torch.load(weights_only=True)` can read."""
        held = self.held()
        flat = dict(self._saved) if held is None else tree.flatten(held)
        return {"version": VERSION, "steps": self.steps, "generator": self._generator.get_state(), "state": flat}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a saved state; before the first batch it is kept until the layers are found."""
        self.loading(saved)()

    def loading(self, saved: dict[str, Any]) -> Callable[[], None]:
        """Check a saved state, and return a function that continues from it.

        Raises:
            StructureError: not a saved form of this library, or that of another net or method.
        """
        expect(saved, dict, "a saved curvature", "pass what state_dict() returned")
        if saved.keys() != {"version", "steps", "generator", "state"} or saved["version"] != VERSION:
            raise StructureError(
                f"the saved curvature has entries {sorted(saved)} and version {saved.get('version')}, expected version "
                f"{VERSION}: load what state_dict() of this class returned."
            )
        known = None if self.ng is None else self._restored(self.ng, saved["state"])

        def load() -> None:
            if known is None:
                self._saved = dict(saved["state"])
            else:
                self._hold(known)
            self.steps = int(saved["steps"])
            self._generator.set_state(saved["generator"].cpu())
            self.forget()

        return load

    def _hold(self, state: State | AdaptiveState) -> None:
        self._written = []
        self._state = state.curvature if isinstance(state, AdaptiveState) else state
        self._rest = state if isinstance(state, AdaptiveState) else None

    def _restored(self, ng: NaturalGradient, saved: dict[str, Tensor]) -> State | AdaptiveState:
        params = self.network.values()
        if self._adaptive is not None:
            rest = adaptive(ng, **self._adaptive).init(params)
            return _loaded(saved, rest, rest.curvature.damping.device) if saved else rest
        empty = ng.init(params, damping=self._damping, ema=self._options.ema)
        device = next(iter(params.values())).device
        if saved:  # from a version that did not count examples, or not those of each block
            counts = {"block_count": saved["count"], "block_examples": saved.get("examples", empty.examples)}
            counts = {name: each.to(device).repeat(len(ng.layout.blocks)) for name, each in counts.items()}
            saved = {"examples": empty.examples} | counts | saved
        return _loaded(saved, empty, device) if saved else empty


def _loaded(saved: dict[str, Tensor], like: Any, device: torch.device) -> Any:
    """Return a saved state in the structure and types of another one, as torch's optimizers load theirs."""
    moved = {path: leaf.to(device) for path, leaf in renamed(saved, list(tree.flatten(like))).items()}
    return tree.map(lambda leaf, other: leaf.to(other.dtype), tree.unflatten(like, moved), like)


def renamed(saved: dict[str, Tensor], paths: list[str]) -> dict[str, Tensor]:
    """Return a saved tree with these paths: one of the two nets may be in a wrapper, whose name is part of each path.

    Wrappers are those of `torch.compile`, `DataParallel` and `DistributedDataParallel`.
    """
    unwrapped = {unwrapped_path(path): path for path in paths}
    found = {unwrapped.get(unwrapped_path(path), path): leaf for path, leaf in saved.items()}
    return found if len(unwrapped) == len(paths) and len(found) == len(saved) else saved


def unwrapped_path(path: str) -> str:
    """Return a path of a saved tree without the names of wrappers; a wrapped single layer is named by its weight."""
    names = ([name for name in part.split(".") if name not in ("_orig_mod", "module")] for part in path.split("/"))
    return "/".join(".".join(name) or "weight" for name in names)
