"""Models under autocast: parameters, statistics and state stay in single precision, a step is the same to rounding."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests.methods.protocol import METHODS

NETS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 8), nn.Tanh(), nn.Linear(8, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(50, 3)
    ),
    "sequence": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(12, 3)),
}
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISION = {"bfloat16": 0.1, "float16": 0.02}


def step(net, method, low):
    """The natural gradient of one batch, all of it with autocast to `low`, or without."""
    plain, params, context = ff.functional(net)

    def model(params, x, context):
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            return plain(params, x, context)

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 2, 6, 6, generator=generator), torch.arange(12) % 3
    ng = ff.natural_gradient(
        model, params, x, likelihood=ff.Categorical(), method=ff.METHODS[method](), fisher="empirical", context=context
    )
    state = ng.init(params, damping=1.0)
    nat, state, info = ng.step(params, state, (x, y), context=context, inner=True)
    ff.check(info)
    return ng, nat, state, info


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("name", NETS)
@METHODS
def test_a_step_is_that_of_single_precision_to_rounding(method, name, low):
    torch.manual_seed(2)
    net = NETS[name]()
    _, exact, _, exact_info = step(net, method, None)
    ng, nat, state, info = step(net, method, LOW[low])
    assert not {leaf.dtype for leaf in pytree.tree_leaves((nat, state))} & set(LOW.values())
    distance = ff.tree.dot(*[ff.tree.add(nat, exact, scale=-1.0)] * 2).sqrt() / ff.tree.dot(exact, exact).sqrt()
    assert 0 < distance < PRECISION[low]
    torch.testing.assert_close(info.inner, exact_info.inner, rtol=PRECISION[low], atol=0)
    kinds = {block.kind for block in ng.layout.blocks}
    assert "fallback" not in kinds, "autocast hides no layer"
