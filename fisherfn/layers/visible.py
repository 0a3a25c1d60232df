"""Values of masks, where they can be looked at."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def holds(mask: Bool[Tensor, ""]) -> bool:
    """Return a mask's value; true where values cannot be looked at (`torch.vmap`, a trace)."""
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        return True
    try:
        return bool(mask)
    except RuntimeError:  # under torch.vmap
        return True
