"""Tensors that all examples share, followed from a parameter to where they meet the batch.

A parameter, or the output of a layer that no example enters (position embeddings of `[1, T]` indices, a net on a grid),
reaches the batch one broadcast later. Up to there its calls are small: they are run once more for a copy per example,
by `torch.vmap`, and the copies take the shared tensor's place in the broadcast. A zero tap added to the copies at their
origin then has exactly the per-example output-gradient.

The build finds out which calls these are (`fisherfn.stats.scout`); later runs follow its steps (`Followed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
"""Makes a copy of a shared tensor for each of so many examples, `[N, *shape]`."""


class Shared(NamedTuple):
    """A tensor that all examples share (kept, so that its identity stays its own)."""

    tensor: Tensor
    origins: frozenset[str]
    copies: Copies


class Ledger:
    """The shared tensors of a run, by identity."""

    def __init__(self) -> None:
        self.entries: dict[int, Shared] = {}

    def add(self, tensor: Tensor, origins: frozenset[str], copies: Copies) -> None:
        """Note a shared tensor. A call that returns what it was given (a cast to the same type) adds nothing."""
        self.entries.setdefault(id(tensor), Shared(tensor, origins, _once(copies)))

    def among(self, *arguments: PyTree) -> dict[int, Shared]:
        """The shared tensors among the arguments of a call."""
        if not self.entries:
            return {}
        return {id(leaf): self.entries[id(leaf)] for leaf in tree.leaves(arguments) if id(leaf) in self.entries}

    def is_shared(self, tensor: Any) -> bool:
        """Whether this very tensor was noted."""
        return id(tensor) in self.entries

    def derive(self, func: Callable[..., Any], args: Any, kwargs: Any, shared: dict[int, Shared], output: Any) -> None:
        """Note the output of a call that no example enters; one in place makes the tensor another."""
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
        for place, part in enumerate(output):
            self.add(part, origins, partial(_part, together, place))

    def add_layer(
        self, func: Callable[..., Any], weight: str, shared: dict[int, Shared], output: Tensor, copies: Copies
    ) -> None:
        """Note the output of a layer that no example enters."""
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
        """Run a call with a copy per example in the place of shared tensors: at once, or with `inputs` one by one."""
        if inputs:
            return per_example(
                lambda new: _call(func, args, kwargs, new),
                tensors_among(args, kwargs),
                inputs,
                {key: entry.copies for key, entry in shared.items()},
                place,
            )
        if spreads(func):
            whole: Tensor = func(*args, **kwargs)  # a view: only its shape is wanted
            ((_, entry),) = shared.items()
            copies = meeting(entry.copies(whole.shape[place.axis] // place.repeats), *place).expand(whole.shape)
            # what `repeat` returns has memory of its own, and may be viewed in another shape
            return copies.contiguous() if whole.is_contiguous() else copies
        shapes = [leaf.shape for leaf in tensors_among(args, kwargs)]
        examples = torch.broadcast_shapes(*shapes)[place.axis] // place.repeats
        laid = {key: meeting(entry.copies(examples), *place) for key, entry in shared.items()}
        met: Tensor = _call(func, args, kwargs, laid)
        return met


class Followed(Ledger):
    """The shared tensors of a run that takes the steps of the build."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self._taken = 0

    def take(self, func: Callable[..., Any], args: Any, kwargs: Any, shared: dict[int, Shared]) -> Any:
        """Run a call that reads shared tensors, as the build's did."""
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
        """Whether the next step is a call of this function in which shared tensors meet the batch."""
        if self._taken >= len(self.plan.steps):
            return False
        step = self.plan.steps[self._taken]
        return step.function == name_of(func) and step.place is not None

    def next(self, func: Callable[..., Any]) -> Step:
        """The next step, which must be this function's.

        Raises:
            StructureError: it is another's.
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
            f"the model takes another path than at the build, {found} on parameters that all examples share: it "
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
    """Inputs and outputs, for each of so many examples, of a layer that no example enters.

    A family that wants its examples on the first axis gets them merged with what is there. `tapped` adds the tap to
    the outputs, given the inputs.
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
    """The same tensor for each example, without copying it."""
    return tensor.expand(examples, *tensor.shape)


def _part(outputs: Callable[[int], Any], place: int, examples: int) -> Tensor:
    part: Tensor = outputs(examples)[place]
    return part


def origins_of(shared: Mapping[int, Shared]) -> frozenset[str]:
    """The weights that shared tensors come from."""
    return frozenset[str]().union(*(entry.origins for entry in shared.values()))


def _call(func: Callable[..., Any], args: Any, kwargs: Any, new: Mapping[int, Tensor]) -> Any:
    """Run a call with other tensors for some of its own, by identity."""
    new_args, new_kwargs = _replaced((args, kwargs), new)
    return func(*new_args, **new_kwargs)


def _replaced(arguments: PyTree, new: Mapping[int, Tensor]) -> Any:
    return tree.map(lambda leaf: new.get(id(leaf), leaf), arguments)


def _once(copies: Callable[[int], Any]) -> Callable[[int], Any]:
    """Make copies once for each number of examples: they are used wherever the tensor is."""
    made: dict[int, Any] = {}

    def kept(examples: int) -> Any:
        if examples not in made:
            made[examples] = copies(examples)
        return made[examples]

    return kept
