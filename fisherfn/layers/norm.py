r"""Normalisations: the affine part $y_c = w_c \hat x_c + b_c$, one 1×1 layer (1×2 with bias) per channel or entry c.

The layer's input is the normalised $\hat x$, recomputed here from the same call without its affine part; the
normalisation itself has no parameters. Batch, instance and group norm have their channels on axis 1, layer and RMS
norm normalise (and scale) the last axes; K counts channels or entries, T all other positions. In training mode batch
norm's output-gradients are $N \cdot \partial(\text{mean loss})/\partial y$, cross-example terms included
(docs/conventions.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Size, Tensor
from torch.nn import functional as F

from fisherfn.calls import bind
from fisherfn.layers.base import Call, Family


class Config(NamedTuple):
    """The shape of the weight, and True if it applies to the last axes, False if to axis 1."""

    shape: Size
    last: bool


Facts = Config
"""The name of `Config` in layouts saved before 0.1.0."""


_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_INSTANCE = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
_GROUP = ("input", "num_groups", "weight", "bias", "eps")
_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")


def frozen_batch_norm(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Tensor] | None:
    """Return batch norm in training mode with the batch's statistics held fixed; None in evaluation mode."""
    given = bind(_BATCH, args, kwargs)
    if not given.get("training", False):
        return None

    def frozen() -> Tensor:
        x, weight = given["input"], given.get("weight")
        # statistics in the weight's type: under autocast the input is less precise, and torch requires equal types
        exact = x.detach() if weight is None else x.detach().to(weight.dtype)
        var, mean = torch.var_mean(exact, [0, *range(2, x.ndim)], correction=0)
        return F.batch_norm(x, mean, var, weight, given.get("bias"), eps=given.get("eps", 1e-5))

    return frozen


def match_batch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    given = bind(_BATCH, args, kwargs)
    if given.get("weight") is None:
        return None
    # batch statistics are recomputed without the buffers, which the model's own call has already updated
    mean, var = (None, None) if given.get("training", False) else (given["running_mean"], given["running_var"])
    x = F.batch_norm(given["input"], mean, var, training=given.get("training", False), eps=given.get("eps", 1e-5))
    return _call(x, given, last=False)


def match_instance(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    given = bind(_INSTANCE, args, kwargs)
    if given.get("weight") is None:
        return None
    own = given.get("use_input_stats", True)
    mean, var = (None, None) if own else (given["running_mean"], given["running_var"])
    x = F.instance_norm(given["input"], mean, var, use_input_stats=own, eps=given.get("eps", 1e-5))
    return _call(x, given, last=False)


def match_group(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    given = bind(_GROUP, args, kwargs)
    if given.get("weight") is None:
        return None
    x = F.group_norm(given["input"], given["num_groups"], eps=given.get("eps", 1e-5))
    return _call(x, given, last=False)


def match_layer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    given = bind(_LAYER, args, kwargs)
    if given.get("weight") is None:
        return None
    x = F.layer_norm(given["input"], given["normalized_shape"], eps=given.get("eps", 1e-5))
    return _call(x, given, last=True)


def match_rms(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    given = bind(_RMS, args, kwargs)
    if given.get("weight") is None:
        return None
    x = F.rms_norm(given["input"], given["normalized_shape"], eps=given.get("eps"))
    return _call(x, given, last=True)


def _call(normalised: Tensor, given: dict[str, Any], last: bool) -> Call:
    return Call(normalised, given["weight"], given.get("bias"), Config(given["weight"].shape, last))


def rows(x: Float[Tensor, "n *axes"], config: Config) -> Float[Tensor, "k n t 1"]:
    return _channels_first(x.unsqueeze(0), config).squeeze(1)


def columns(g: Float[Tensor, "s n *axes"], config: Config) -> Float[Tensor, "k s n t 1"]:
    return _channels_first(g, config)


def _channels_first(x: Float[Tensor, "s n *axes"], config: Config) -> Float[Tensor, "k s n t 1"]:
    s, n, k = x.shape[0], x.shape[1], config.shape.numel()
    if config.last:
        return x.reshape(s, n, -1, k).movedim(-1, 0).unsqueeze(-1)
    return x.reshape(s, n, k, -1).movedim(2, 0).unsqueeze(-1)


def to_matrix(weight: Float[Tensor, "*shape"], config: Config) -> Float[Tensor, "k 1 1"]:
    return weight.reshape(-1, 1, 1)


def from_matrix(matrix: Float[Tensor, "k 1 1"], config: Config) -> Float[Tensor, "*shape"]:
    return matrix.reshape(config.shape)


def weight_gradient(x: Tensor, g: Tensor, config: Config, shape: Size) -> Float[Tensor, "*shape"]:
    """Compute `Σ g x̂` entry by entry, without a copy that has channels first."""
    product = g * x
    if config.last:
        return product.reshape(-1, *shape).sum(0)
    return product.transpose(0, 1).flatten(1).sum(1)


def _family(name: str, function: Callable[..., Any], match: Callable[..., Call | None], **more: Any) -> Family:
    return Family(name, (function,), match, rows, columns, to_matrix, from_matrix, weight_gradient, **more)


BATCH_NORM = _family("batch norm", F.batch_norm, match_batch, uncoupled=frozen_batch_norm)
INSTANCE_NORM = _family("instance norm", F.instance_norm, match_instance)
GROUP_NORM = _family("group norm", F.group_norm, match_group)
LAYER_NORM = _family("layer norm", F.layer_norm, match_layer, any_axis=True)
RMS_NORM = _family("rms norm", F.rms_norm, match_rms, any_axis=True)
