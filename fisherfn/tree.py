"""Arithmetic on trees of tensors. This is the only file that uses `torch.utils._pytree`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfn import masked
from fisherfn.errors import ShapeError, StructureError, expect
from fisherfn.types import PyTree, at_least_single, single

T = TypeVar("T", bound=PyTree)


def plain(inputs: PyTree) -> PyTree:
    """Convert a mapping of named inputs to a dict sorted by name; return other inputs unchanged.

    >>> import collections
    >>> list(plain(collections.UserDict(mask=torch.ones(1), ids=torch.ones(1))))
    ['ids', 'mask']
    """
    if not isinstance(inputs, Mapping) or not all(isinstance(name, str) for name in inputs):
        return inputs
    return {name: inputs[name] for name in sorted(inputs)}


def map(fn: Callable[..., Any], tree: T, *rest: PyTree) -> T:
    """Apply `fn` leaf by leaf.

    >>> map(lambda x: 2 * x, {"w": torch.ones(2)})
    {'w': tensor([2., 2.])}
    """
    _same_structure(tree, *rest)
    trees = (tree, *rest)
    if all(type(each) is dict and all(isinstance(leaf, Tensor) for leaf in each.values()) for each in trees):
        # flat dicts of tensors: ten times faster than the general case
        return {name: fn(*(each[name] for each in (tree, *rest))) for name in tree}  # type: ignore[return-value]
    return pytree.tree_map(fn, tree, *rest)  # type: ignore[no-any-return]


def leaves(tree: PyTree) -> list[Any]:
    """Return the leaves in a fixed order (dicts by insertion)."""
    if isinstance(tree, Tensor):
        return [tree]
    return pytree.tree_leaves(tree)


def replace_leaves(tree: T, new: Sequence[Any]) -> T:
    """Return the same tree with other leaves, in the order of `leaves`."""
    return pytree.tree_unflatten(list(new), pytree.tree_structure(tree))  # type: ignore[no-any-return]


def add(x: T, y: PyTree, *, scale: float | Tensor = 1.0) -> T:
    """Return `x + scale · y`.

    >>> add({"w": torch.ones(2)}, {"w": torch.ones(2)}, scale=-0.5)
    {'w': tensor([0.5000, 0.5000])}
    """
    if isinstance(scale, Tensor):
        return map(lambda a, b: torch.addcmul(a, b, scale.to(b.dtype)), x, y)
    return map(lambda a, b: torch.add(a, b, alpha=scale), x, y)  # one pass over the memory


def scale(x: T, factor: float | Tensor) -> T:
    """Return `factor · x`."""
    return map(lambda a: factor * a, x)


def zeros_like(x: T) -> T:
    """Return a tree of zeros."""
    return map(torch.zeros_like, x)


def dot(x: PyTree, y: PyTree) -> Shaped[Tensor, ""]:
    """Return the inner product over all entries of all leaves, in at least float32.

    >>> dot({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.ones(2), "b": torch.ones(1)})
    tensor(3.)
    """
    return torch.stack(dots(x, y)).sum()


def dots(x: PyTree, y: PyTree) -> list[Shaped[Tensor, ""]]:
    """Return the inner product of each leaf with its counterpart, in at least float32."""
    # in float16 squares of numbers below 0.0002 vanish, and those above 256 overflow
    return leaves(map(lambda a, b: (single(a) * b).sum(), x, y))


def norm(x: PyTree) -> Shaped[Tensor, ""]:
    """Return the Euclidean norm over all entries, in at least float32."""
    return dot(x, x).sqrt()


def select(mask: Shaped[Tensor, ""], x: T, y: PyTree) -> T:
    """Return `x` if the scalar mask is true, else `y`; an `x` that is not selected may contain NaN.

    Leaves whose shape follows the batch may have different shapes in `x` and `y`. Under `vmap` and in a trace, which
    must return one shape, `kept` says what replaces an unselected one.
    """
    _same_structure(x, y)
    return choose(mask, lambda: x, lambda: y)


def choose(mask: Shaped[Tensor, ""], x: Callable[[], T], y: Callable[[], PyTree]) -> T:
    """Return `select(mask, x(), y())`; if the mask can be read, only one tree is computed, and none copied."""
    if masked.readable(mask):
        return x() if mask else y()  # type: ignore[no-any-return]

    yes, no = x(), y()
    if masked.is_concrete(mask) and any(a.shape != b.shape for a, b in zip(leaves(yes), leaves(no), strict=True)):
        # this waits for the device, but keeps shapes, which `torch.where` cannot
        return yes if mask else no  # type: ignore[no-any-return]
    # leaves that both trees share need no choice, and two leaves that are one tensor stay one
    pairs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def collect(a: Tensor, b: Tensor) -> Tensor:
        if a is not b:
            pairs[id(a), id(b)] = a, kept(a, b)
        return a

    map(collect, yes, no)
    news, olds = zip(*pairs.values(), strict=True) if pairs else ((), ())
    found = dict(zip(pairs, masked.where(mask, news, olds), strict=True))
    return map(lambda a, b: found.get((id(a), id(b)), a), yes, no)


def kept(new: Tensor, old: Tensor) -> Tensor:
    """Return `old` if it has the shape of `new`, else what replaces it in that shape.

    An empty leaf becomes zeros. Any other becomes NaN, with which the checks of the next step fail: zeros could change
    its result silently.
    """
    if new.shape == old.shape:
        return old
    return torch.full_like(new, torch.nan if old.numel() and new.is_floating_point() else 0)


def finite(x: PyTree) -> Shaped[Tensor, ""]:
    """Return a 0-d mask that is true if every leaf is finite (by sums, which read each leaf once)."""
    # half-precision sums overflow long before their terms
    sums = [leaf.sum(dtype=at_least_single(leaf.dtype)) for leaf in leaves(x)]
    return torch.isfinite(torch.stack(sums)).all() if sums else torch.tensor(True)


def finite_inputs(x: PyTree) -> Shaped[Tensor, ""]:
    """Return a 0-d mask that is true if every entry of the data is finite; unlike in `finite`, sums may overflow.

    Data may be as large as their type allows, such as an attention mask that contains the lowest number.

    >>> finite_inputs(torch.full((3,), torch.finfo(torch.float32).min))
    tensor(True)
    """
    # the extremes show infinities and NaN, in a fraction of the time of a mask for each number
    extremes = [extreme for leaf in leaves(x) if leaf.numel() for extreme in (leaf.amin(), leaf.amax())]
    return torch.isfinite(torch.stack(extremes)).all() if extremes else torch.tensor(True)


def finite_each(x: dict[str, Tensor]) -> dict[str, Shaped[Tensor, ""]]:
    """Return `finite` of each of many tensors, in few calls.

    >>> finite_each({"w": torch.ones(2), "b": torch.tensor([float("nan")])})
    {'w': tensor(True), 'b': tensor(False)}
    """
    sums = [leaf.sum(dtype=at_least_single(leaf.dtype)) for leaf in x.values()]
    return dict(zip(x, torch.isfinite(torch.stack(sums)).unbind(), strict=True)) if sums else {}


def fits(tree: PyTree, like: PyTree, leaf: type | tuple[type, ...]) -> bool:
    """Return True if a tree has the structure of another one, and its shapes and types; an empty leaf fits any size.

    The content of nodes of the type `leaf` is not compared: with `Tensor`, the structure alone.
    """
    if isinstance(like, leaf):
        return isinstance(tree, leaf)
    if isinstance(like, Tensor) or isinstance(tree, Tensor):
        if not (isinstance(like, Tensor) and isinstance(tree, Tensor)):
            return False
        same = tree.shape == like.shape or (like.numel() == 0 and tree.ndim == like.ndim)
        return same and tree.dtype == like.dtype
    if isinstance(like, dict) and isinstance(tree, dict):
        return tree.keys() == like.keys() and all(fits(tree[name], node, leaf) for name, node in like.items())
    if isinstance(like, tuple):
        same = type(tree) is type(like) and len(tree) == len(like)
        return same and all(fits(node, other, leaf) for node, other in zip(tree, like, strict=True))
    return bool(pytree.tree_structure(tree) == pytree.tree_structure(like))


def split(tree: PyTree) -> tuple[list[Tensor], Hashable]:
    """Split a tree into its tensors, each once, and a key for everything else.

    Keys are equal if the trees agree in structure, in all leaves that are not tensors, in the shapes, strides, types
    and devices of tensors, and in which leaves are the same tensor.

    >>> x = torch.ones(2)
    >>> split({"w": x, "b": x})[0]
    [tensor([1., 1.])]
    """
    found: dict[int, tuple[int, Tensor]] = {}

    def key(node: Any) -> Hashable:
        if isinstance(node, Tensor):
            place, _ = found.setdefault(id(node), (len(found), node))
            return place, node.shape, node.stride(), node.dtype, node.device
        if type(node) is dict:
            return dict, *((name, key(child)) for name, child in node.items())
        if isinstance(node, tuple):
            return type(node), *(key(child) for child in node)
        children, spec = pytree.tree_flatten(node, is_leaf=lambda child: child is not node)
        return (spec, *(key(child) for child in children)) if not spec.is_leaf() else (type(node), node)

    known = key(tree)
    return [tensor for _, tensor in found.values()], known


def flatten(tree: PyTree) -> dict[str, Tensor]:
    """Return the leaves as a flat `{path: tensor}`, which `torch.load(weights_only=True)` can read.

    >>> list(flatten({"0": {"A": torch.ones(1), "G": torch.ones(1)}}))
    ['0/A', '0/G']
    """
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return {"/".join(_name(step) for step in path): leaf for path, leaf in pairs}


def unflatten(like: T, flat: dict[str, Tensor]) -> T:
    """Invert `flatten`, in the structure of `like`.

    An empty leaf in `like` (one whose shape follows the batch, before the first batch) accepts any shape with the same
    number of axes.

    Raises:
        StructureError: paths or shapes differ from those of `like`.
    """
    expected = flatten(like)
    missing, extra = expected.keys() - flat.keys(), flat.keys() - expected.keys()
    if missing or extra:
        raise StructureError(
            f"the saved tree has another structure: missing {sorted(missing)[:4]}, unexpected {sorted(extra)[:4]}. "
            "Rebuild the model and the method with which it was saved."
        )
    for path, leaf in expected.items():
        follows = leaf.numel() == 0 and flat[path].ndim == leaf.ndim
        if flat[path].shape != leaf.shape and not follows:
            raise StructureError(f"{path!r} was saved as {tuple(flat[path].shape)}, expected {tuple(leaf.shape)}.")
    _, spec = pytree.tree_flatten(like)
    return pytree.tree_unflatten([flat[path] for path in expected], spec)  # type: ignore[no-any-return]


def register(
    cls: type[T], flatten_fn: Callable[[T], tuple[list[Any], Any]], unflatten_fn: Callable[[Any, Any], T]
) -> None:
    """Register `cls` as a node of trees: `flatten_fn` returns children and static information."""

    def with_keys(node: T) -> tuple[list[tuple[Any, Any]], Any]:
        children, static = flatten_fn(node)
        return [(pytree.SequenceKey(index), child) for index, child in enumerate(children)], static

    pytree.register_pytree_node(
        cls,
        flatten_fn,
        lambda children, static: unflatten_fn(list(children), static),
        flatten_with_keys_fn=with_keys,
    )


def check_leaves(
    values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], of: str = "", rule: str = "as at the build"
) -> None:
    """Raise unless every value is a tensor of real or complex numbers with the shape of its name; `of` says whose.

    Raises:
        StructureError: a value that is no tensor.
        ShapeError: another shape, or a tensor of integers or flags.
    """
    for name, leaf in values.items():
        expect(leaf, Tensor, f"{name!r}{of}", "pass a tree of tensors like params")
        if leaf.shape != tuple(shapes[name]):
            raise ShapeError(f"{name!r}{of} has shape {tuple(leaf.shape)}, expected {tuple(shapes[name])} {rule}.")
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ShapeError(f"{name!r}{of} has type {leaf.dtype}, expected floating-point numbers {rule}.")


def _name(step: Any) -> str:
    if isinstance(step, pytree.MappingKey):
        return str(step.key)
    if isinstance(step, pytree.GetAttrKey):
        return step.name
    return str(step.idx)


def _same_structure(tree: PyTree, *rest: PyTree) -> None:
    for other in rest:
        if isinstance(tree, dict) and isinstance(other, dict) and tree.keys() != other.keys():
            wrong = sorted(tree.keys() ^ other.keys(), key=str)
            raise StructureError(f"the trees differ in {wrong[:4]}: both must have the same names.")
