"""Translation of torch's errors: what a model does that torch's function transforms cannot follow.

Each entry of the table has one observed cause. Any other error comes from the model and is raised unchanged.
"""

from __future__ import annotations

import contextlib
import linecache
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import jaxtyping
import torch

from fisherfn.errors import FisherfnError, ModelError

_DIFFERENTIATES = (
    "the model differentiates inside its forward (torch.autograd.grad, .backward() or requires_grad_()), which cannot "
    "be nested in the library's own differentiation. Use torch.func, which nests: "
    "slope = torch.func.grad(lambda x: energy(x).sum())(x)."
)
_CHECKPOINTS = (
    "the model uses activation checkpointing or other hooks on saved tensors, which torch.func does not support. Turn "
    "checkpointing off; chunk_size= bounds the memory of a step."
)

CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("setup_context staticmethod",),
        "the model runs a torch.autograd.Function of the old form: one of its own, use_reentrant checkpointing, or a "
        "full backward hook. Give the function forward(...) without ctx and setup_context(ctx, inputs, output); turn "
        "checkpointing off (chunk_size= bounds memory); remove backward hooks.",
    ),
    (("saved tensor hooks",), _CHECKPOINTS),
    (("Tensor.requires_grad_()",), _DIFFERENTIATES),
    (("does not require grad and does not have a grad_fn",), _DIFFERENTIATES),
    (
        ("Inference tensors", "Cannot set version_counter for inference"),
        "tensors made under torch.inference_mode() take part in the model, and autograd cannot use them. Use "
        "torch.no_grad() there, or clone such inputs and parameters outside inference_mode.",
    ),
    (
        ("data pointer of Tensor", "Can't call numpy()", "doesn't have storage"),
        "the model leaves torch (numpy(), data_ptr() or an extension), where its values cannot be followed. Write that "
        "part with torch operations, or compute it beforehand and pass it as an input.",
    ),
    (
        ("can't retain_grad", "cannot register a hook on a tensor that doesn't require gradient"),
        "the model calls retain_grad() or registers a hook on a tensor in its forward, and some of the library's runs "
        "record no gradients. Leave that out, or guard it with `if h.requires_grad:`.",
    ),
    (
        ("only for real scalar outputs",),
        "the model's outputs are complex, and gradients need real ones. Return "
        "torch.view_as_real(outputs), and write the likelihood for real and imaginary parts.",
    ),
    (
        ("Expected more than 1 value per channel when training",),
        "batch norm in training mode met a single value per channel: its batch had one example, or the per-example "
        "gradients of a parameter outside all layers were taken. Call net.eval(), or pass more examples.",
    ),
    (
        ("sparse tensors", "(sparse, dense)"),
        "the model asks for the sparse gradient of an embedding (sparse=True) whose weight is no parameter by itself, "
        "or is used elsewhere too. Pass sparse=False.",
    ),
    (
        (
            "mutate a captured Tensor",
            "mutating directly with `.data`",
            "a leaf Variable that requires grad",
        ),
        "the model changes a parameter, or another tensor from outside of it, while it runs (a weight is clipped or "
        "normalised in place). Compute the changed weight and use it, F.linear(x, weight.clamp(min=0)), or change the "
        "parameters between steps.",
    ),
    (
        ("functions with out=... arguments",),
        "the model writes a result into a tensor that exists (out=), which has no derivative. Leave out= out, and use "
        "the new tensor that the function returns.",
    ),
    (
        ("element mutated in a function transform", "vmap: inplace arithmetic"),
        "the model writes into a tensor in place that all examples share. Write y = y + z instead of y += z there, or "
        "begin with y = y.clone().",
    ),
)


LONGEST = 399
"""The maximal length of a message that says why a model is refused, in characters."""

_CALLS = str(Path(__file__).with_name("functional.py"))
_OURS = str(Path(__file__).parents[1])
_NOT_THE_MODEL = (_OURS, "<", *(str(Path(module.__file__ or "").parent) for module in (torch, jaxtyping)))
_BETWEEN = ("contextlib.py", "functools.py")


@contextlib.contextmanager
def border() -> Iterator[None]:
    """Turn an error of torch with a known cause into `ModelError`, which names it and a remedy.

    Errors raised while the model runs also name the line of the model.

    Raises:
        ModelError: the model does something that torch's function transforms cannot follow.
    """
    try:
        yield
    except FisherfnError as error:
        error.args = (with_line(str(error), error), *error.args[1:])
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        said = str(error)
        for needles, text in CAUSES:
            if any(needle in said for needle in needles):
                raise ModelError(with_line(text, error)) from error
        raise


def with_line(text: str, error: BaseException) -> str:
    """Add the line of the model where an error arose, if there is one and the message stays short."""
    found = _line(error)
    if found is None:
        return text
    file, number, code = found
    place = f"{file}, line {number}"
    if place in text:
        return text
    for more in (f" It is {place}: {code}", f" It is {place}."):
        if len(text) + len(more) <= LONGEST:
            return text + more
    return text


def _line(error: BaseException) -> tuple[str, int, str] | None:
    """Return file, number and code of the innermost line of the model that an error came from."""
    inside, found = False, None
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if found and file.startswith(_OURS):  # the frames that follow belong to the library
            break
        inside = inside or (file == _CALLS and frame.f_code.co_name == "call")
        if inside and not file.startswith(_NOT_THE_MODEL) and Path(file).name not in _BETWEEN:
            found = Path(file).name, number, linecache.getline(file, number).strip()
    return found


def brief(error: BaseException, longest: int = 100) -> str:
    """Return the first line of an error, cut where it is long."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first if len(first) <= longest else first[: longest - 2].rstrip() + " …"


def listed(names: Iterable[str], longest: int = 80) -> str:
    """Return names in quotes, as many as fit into `longest` characters."""
    quoted = [repr(name) for name in names]
    shown = quoted[:1]
    for name in quoted[1:]:
        if len(", ".join([*shown, name])) > longest:
            break
        shown.append(name)
    more = len(quoted) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
