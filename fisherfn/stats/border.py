"""Torch's errors at the library's border: what a model does that torch's function transforms cannot follow.

Each entry of the table was seen to have one cause. Any other error is the model's own and passes as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
        "the model computes with complex outputs, and gradients are taken of real ones. Return "
        "torch.view_as_real(outputs), and write the likelihood for real and imaginary parts.",
    ),
    (
        ("Expected more than 1 value per channel when training",),
        "batch norm in training mode met a single value per channel: its batch had one example, or the per-example "
        "gradients of a parameter outside all layers were taken. Call net.eval(), or pass more examples.",
    ),
    (
        ("element mutated in a function transform", "vmap: inplace arithmetic"),
        "the model writes into a tensor in place that all examples share. Write y = y + z instead of y += z there, or "
        "begin with y = y.clone().",
    ),
)


@contextlib.contextmanager
def border() -> Iterator[None]:
    """Turn an error of torch with a known cause into `ModelError`, which names it and a remedy.

    Raises:
        ModelError: the model does what torch's function transforms cannot follow.
    """
    try:
        yield
    except FisherfnError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        said = str(error)
        for needles, text in CAUSES:
            if any(needle in said for needle in needles):
                raise ModelError(text) from error
        raise
