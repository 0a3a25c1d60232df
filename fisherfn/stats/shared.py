"""Tensors that all examples share, followed from a parameter to the call in which they meet the batch.

A parameter, or the output of a layer whose input is shared (position embeddings of `[1, T]` indices, a net on a grid),
reaches the batch in a later broadcast. The calls before it are small: they are repeated for one copy per example by
`torch.vmap`, and the copies replace the shared tensor in the broadcast. The gradient with respect to a zero tap, added
to the copies at their origin, is then exactly the per-example output-gradient.

The build finds these calls (`fisherfn.stats.scout`); later runs follow its steps (`Followed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.func import vmap

from fisherfn import tree
from fisherfn.errors import StructureError
from fisherfn.layers import Call, Family, meeting, per_example, spreads, works_in_place
from fisherfn.stats.steps import Place, Plan, Step, name_of, tensors_among, tensors_of
from fisherfn.types import PyTree

Copies: TypeAlias = Callable[[int], Tensor]
"""Function that copies a shared tensor once per example, for a given number of examples: `[N, *shape]`."""


class Shared(NamedTuple):
    """A tensor that all examples share. It is retained so that no other tensor gets the same identity."""

    tensor: Tensor
    origins: frozenset[str]
    copies: Copies


class Ledger:
    """The shared tensors of a run, by identity."""

    def __init__(self) -> None:
        self.entries: dict[int, Shared] = {}

    def add(self, tensor: Tensor, origins: frozenset[str], copies: Copies) -> None:
        """Record a shared tensor, unless it is already known (a cast to the same type returns its input)."""
        self.entries.setdefault(id(tensor), Shared(tensor, origins, _once(copies)))

    def among(self, *arguments: PyTree) -> dict[int, Shared]:
        """Return the shared tensors among the arguments of a call."""
        if not self.entries:
            return {}
        return {id(leaf): self.entries[id(leaf)] for leaf in tree.leaves(arguments) if id(leaf) in self.entries}

    def is_shared(self, tensor: Any) -> bool:
        """Return True if this very tensor was recorded."""
        return id(tensor) in self.entries

    def derive(self, func: Callable[..., Any], args: Any, kwargs: Any, shared: dict[int, Shared], output: Any) -> None:
        """Record the output of a call on shared tensors; an in-place call replaces the entry of its tensor."""
        changed = id(args[0]) if args and works_in_place(func, args, kwargs) else None
        if changed is not None:
            del self.entries[changed]

        def copies(examples: int) -> Any:
            def one(*each: Tensor) -> Any:
                own = dict(zip(shared, each, strict=True))
                if changed is not None:
                    own[changed] = own[changed].clone()
                return _call(func, args, kwargs, own)

            return vmap(one)(*(entry.copies(examples) for entry in shared.values()))

        origins, together = origins_of(shared), _once(copies)
        if isinstance(output, Tensor):
            self.add(output, origins, together)
            return

        def one_of(place: int) -> Copies:
            return lambda examples: together(examples)[place]

        for place, part in enumerate(output):
            self.add(part, origins, one_of(place))

    def add_layer(
        self, func: Callable[..., Any], weight: str, shared: dict[int, Shared], output: Tensor, copies: Copies
    ) -> None:
        """Record the output of a layer whose input is shared by all examples."""
        self.add(output, origins_of(shared) | {weight}, copies)

    @staticmethod
    def meet(
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        shared: dict[int, Shared],
        place: Place,
        inputs: tuple[Place | None, ...] = (),
    ) -> Tensor:
        """Run a call with shared tensors replaced by copies per example: at once, or with `inputs` per example."""
        if inputs:
            return per_example(
                lambda new: _call(func, args, kwargs, new),
                tensors_among(args, kwargs),
                inputs,
                {key: entry.copies for key, entry in shared.items()},
                place,
            )
        if spreads(func):
            whole: Tensor = func(*args, **kwargs)  # a view: only its shape is used
            ((_, entry),) = shared.items()
            copies = meeting(entry.copies(whole.shape[place.axis] // place.repeats), *place).expand(whole.shape)
            # the result of `repeat` has its own memory, and may be viewed in another shape
            return copies.contiguous() if whole.is_contiguous() else copies
        shapes = [leaf.shape for leaf in tensors_among(args, kwargs)]
        examples = torch.broadcast_shapes(*shapes)[place.axis] // place.repeats
        laid = {key: meeting(entry.copies(examples), *place) for key, entry in shared.items()}
        met: Tensor = _call(func, args, kwargs, laid)
        return met


class Followed(Ledger):
    """The shared tensors of a run that follows the steps of the build."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self._taken = 0

    def take(self, func: Callable[..., Any], args: Any, kwargs: Any, shared: dict[int, Shared]) -> Any:
        """Run a call on shared tensors in the way that the build found."""
        if self._meets(func):  # runs once, on the copies
            step = self.next(func)
            assert step.place is not None
            return self.meet(func, args, kwargs, shared, step.place, step.inputs)
        output = func(*args, **kwargs)
        if not tensors_of(output):
            return output
        self.next(func)
        self.derive(func, args, kwargs, shared, output)
        return output

    def _meets(self, func: Callable[..., Any]) -> bool:
        """Return True if the next step is a call of this function in which shared tensors meet the batch."""
        if self._taken >= len(self.plan.steps):
            return False
        step = self.plan.steps[self._taken]
        return step.function == name_of(func) and step.place is not None

    def next(self, func: Callable[..., Any]) -> Step:
        """Return the next step, which must be a call of this function.

        Raises:
            StructureError: the step belongs to another function.
        """
        if self._taken >= len(self.plan.steps) or self.plan.steps[self._taken].function != name_of(func):
            raise self._another_path(f"a call of {name_of(func)}")
        self._taken += 1
        return self.plan.steps[self._taken - 1]

    def finish(self) -> None:
        """Raise unless every step was taken."""
        if self._taken != len(self.plan.steps):
            raise self._another_path(f"{self._taken} calls instead of {len(self.plan.steps)}")

    @staticmethod
    def _another_path(found: str) -> StructureError:
        return StructureError(
            f"the model takes another path than at the build, {found} on parameters that all examples share: its path "
            "depends on its input. Build with inputs that take the same path."
        )


def layer_copies(
    shared: Mapping[int, Shared],
    family: Family,
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    call: Call,
    output: Tensor,
    tapped: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Copies, Copies]:
    """Return functions that copy the input and the output of a layer with a shared input once per example.

    If the family needs the examples on the first axis, they are merged with the axis that is already there. `tapped`
    adds the tap to the outputs, given the inputs.
    """
    merged = not family.any_axis
    kept = output if shared else output.clone()  # the model may change its output in place

    def rows(copies: Tensor) -> Tensor:
        return copies.flatten(0, 1) if merged else copies

    def pair(examples: int) -> tuple[Tensor, Tensor]:
        x, y = rows(spread(call.input, examples)), rows(spread(kept, examples))
        if shared:
            copies = {key: rows(entry.copies(examples)) for key, entry in shared.items()}
            new_args, new_kwargs = _replaced((args, kwargs), copies)
            again = family.match(func, new_args, new_kwargs)
            assert again is not None
            x, y = again.input, func(*new_args, **new_kwargs)
        y = tapped(x, y)
        return x, y.unflatten(0, (examples, -1)) if merged else y

    both = _once(pair)
    return lambda examples: both(examples)[0], lambda examples: both(examples)[1]


def spread(tensor: Shaped[Tensor, "*shape"], examples: int) -> Shaped[Tensor, "n *shape"]:
    """Expand a tensor to one view per example, without copying."""
    return tensor.expand(examples, *tensor.shape)


def origins_of(shared: Mapping[int, Shared]) -> frozenset[str]:
    """Return the names of the weights from which shared tensors were computed."""
    return frozenset[str]().union(*(entry.origins for entry in shared.values()))


def _call(func: Callable[..., Any], args: Any, kwargs: Any, new: Mapping[int, Tensor]) -> Any:
    """Run a call with some of its tensors replaced, by identity."""
    new_args, new_kwargs = _replaced((args, kwargs), new)
    return func(*new_args, **new_kwargs)


def _replaced(arguments: PyTree, new: Mapping[int, Tensor]) -> Any:
    return tree.map(lambda leaf: new.get(id(leaf), leaf), arguments)


def _once(copies: Callable[[int], Any]) -> Callable[[int], Any]:
    """Cache the copies for each number of examples, since several calls may use the same shared tensor."""
    made: dict[int, Any] = {}

    def kept(examples: int) -> Any:
        if examples not in made:
            made[examples] = copies(examples)
        return made[examples]

    return kept
