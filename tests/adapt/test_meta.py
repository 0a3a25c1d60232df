"""Steps on the device "meta", which has shapes but no values: a tensor left on the CPU or a value that is read raises.

It stands in for a GPU, which few machines have; tests/test_devices.py compares values on one.
"""

import pytest
import torch

import fisherfn as ff
from tests.adapt.problems import mlp


def there(tree):
    return ff.tree.map(lambda leaf: leaf.to("meta"), tree)


def build(method, likelihood):
    problem = mlp(likelihood)
    ng = ff.natural_gradient(
        problem.model, problem.params, problem.x, likelihood=likelihood, method=method, fisher="type2"
    )
    return ng, there(problem.params), there((problem.x, problem.y))


OPTIONS = (
    {"lr": 0.1}, {"momentum": torch.tensor(0.5, device="meta")}, {"damping": 0.1, "weight_decay": 0.1},
    {"rule": "line_search"}, {"rule": "clip", "average": 0.9},
)  # fmt: skip


@pytest.mark.parametrize("likelihood", [ff.Bernoulli(), ff.Categorical()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize(
    ("method", "options"), [*((name, {}) for name in ff.METHODS), *(("kfac", options) for options in OPTIONS)], ids=str
)
def test_an_adaptive_step_stays_on_its_device(method, likelihood, options):
    ng, params, batch = build(method, likelihood)
    opt = ff.adaptive(ng, **options)
    state = opt.init(params)
    for update in (True, False):
        params, state, info = opt.step(params, state, batch, update=update, invert=update, lr_scale=0.5)
    assert all(leaf.is_meta for leaf in ff.tree.leaves((params, state, info.adapted, info.ok)))


def test_so_does_one_of_spring_and_a_line_search():
    ng, params, batch = build(ff.exact(), ff.Bernoulli())
    opt = ff.spring(ng)
    direction, state, _ = opt.step(params, opt.init(params), batch)
    direction, state, _ = opt.step(params, state, batch)
    found = ff.line_search(lambda p: ng.loss(p, batch), params, direction)
    assert all(leaf.is_meta for leaf in ff.tree.leaves((direction, state, tuple(found))))
