r"""Multi-head attention as elementary calls: its only parameters are those of its projections, which are linear layers.

`nn.MultiheadAttention` reaches torch as one composite call. This file writes it out, so that its projections become
ordinary linear layers. With one input for query, key and value the fused projection is one layer of `3E` outputs; with
several inputs it is used once for each, and every use takes its own part of the outputs.

Vaswani et al. 2017, *Attention is all you need*, section 3.2. n example, l query position, s key position, e embedding,
h head, d entry of a head.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fisherfn.errors import ShapeError

Projected = tuple[Tensor, Tensor, Tensor]


def multi_head_attention(
    query: Float[Tensor, "l *n e"],
    key: Float[Tensor, "s *n ke"],
    value: Float[Tensor, "s *n ve"],
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `F.multi_head_attention_forward`, with all its options but `static_k` and `static_v`."""
    if is_causal and attn_mask is None:
        raise ShapeError(
            "is_causal=True says that attn_mask is the causal mask: pass attn_mask, too, as torch requires it."
        )
    batched = query.ndim == 3
    if not batched:
        batches = {id(x): x.unsqueeze(1) for x in (query, key, value)}  # identical inputs stay identical
        query, key, value = (batches[id(x)] for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        projected = tuple(
            F.linear(x, w, b)  # type: ignore[arg-type]
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    else:
        projected = _fused(query, key, value, in_proj_weight, in_proj_bias)
    q, k, v = projected
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(-1, k.shape[1], -1)])
        v = torch.cat([v, bias_v.expand(-1, v.shape[1], -1)])
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
    heads = tuple(rearrange(x, "l n (h d) -> n h l d", h=num_heads) for x in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, heads, added=k.shape[0] - key.shape[0])
    p = dropout_p if training else 0.0
    q_heads, k_heads, v_heads = heads
    shown = attention_weights(q_heads, k_heads, mask, p) if need_weights else None
    mixed = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, mask, p) if shown is None else shown @ v_heads
    merged = rearrange(mixed, "n h l d -> n l (h d)").transpose(0, 1)
    out = F.linear(merged, out_proj_weight, out_proj_bias)
    shown = shown.mean(1) if shown is not None and average_attn_weights else shown
    if not batched:
        return out.squeeze(1), None if shown is None else shown.squeeze(0)
    return out, shown


def scaled_dot_product_attention(
    query: Float[Tensor, "*n l d"],
    key: Float[Tensor, "*m s d"],
    value: Float[Tensor, "*m s e"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*n l e"]:
    r"""Compute $\mathrm{softmax}(q k^\top / \sqrt d + \text{mask})\, v$ by its definition.

    The fused kernels have no rule for `torch.vmap`, which would run them on one model, sample or example at a time.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    if is_causal:
        attends = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        causal = _additive(~attends, query)
        if attn_mask is None:
            return attention_weights(query, key, causal, dropout_p, scale, barred=False) @ value
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # in this function true means: attend
        attn_mask = _additive(~attn_mask, query)
    if is_causal and attn_mask is not None:  # torch's fused kernel applies both
        attn_mask = causal + attn_mask
    return attention_weights(query, key, attn_mask, dropout_p, scale) @ value


def attention_weights(
    query: Float[Tensor, "*n l d"],
    key: Float[Tensor, "*n s d"],
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None = None,
    barred: bool = True,
) -> Float[Tensor, "*n l s"]:
    """Compute the softmax of the scores plus `mask`; a query that may attend to no key gets zero weights.

    `barred=False` promises that there is no such query.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))  # applied to both factors, or the product overflows in half precision
    scores: Tensor = (query * root) @ (key * math.copysign(root, scale)).mT
    if mask is None:
        weights = scores.softmax(-1)
    else:
        # in half precision a score could make a finite mask infinite
        scores = scores.float() if scores.dtype == torch.float16 else scores
        none = mask.isneginf().all(-1, keepdim=True) if barred else None
        weights = (scores + (mask if none is None else mask.masked_fill(none, 0.0))).softmax(-1).to(query.dtype)
        weights = weights if none is None else weights.masked_fill(none, 0.0)
    return F.dropout(weights, dropout_p) if dropout_p > 0 else weights


def _fused(query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None) -> Projected:
    e = query.shape[-1]
    if query is key and key is value:
        q, k, v = F.linear(query, weight, bias).split(e, -1)
        return q, k, v
    if key is value:
        keys_values = F.linear(key, weight, bias)
        return F.linear(query, weight, bias)[..., :e], keys_values[..., e : 2 * e], keys_values[..., 2 * e :]
    q, k, v = (F.linear(x, weight, bias)[..., i * e : (i + 1) * e] for i, x in enumerate((query, key, value)))
    return q, k, v


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, heads: tuple[Tensor, ...], added: int
) -> Float[Tensor, "..."] | None:
    """Return the summand of the scores: -inf where attention is barred, broadcast over `[n, head, l, s]`."""
    n, h = heads[0].shape[:2]
    masks = []
    if attn_mask is not None:
        mask = F.pad(_additive(attn_mask, heads[0]), (0, added))
        masks.append(mask.unflatten(0, (n, h)) if mask.ndim == 3 else mask)
    if padding is not None:
        masks.append(F.pad(_additive(padding, heads[0]), (0, added))[:, None, None])
    return reduce(torch.add, masks) if masks else None


def _additive(mask: Bool[Tensor, "*s"] | Float[Tensor, "*s"], like: Tensor) -> Float[Tensor, "*s"]:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
