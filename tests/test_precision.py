"""Parameters of several precisions, and parameters of another precision than at the build."""

import pytest
import torch
from torch.nn import functional as F

import fisherfn as ff
from tests import zoo
from tests.oracles import close

METHODS = ("kfac", "ekfac", "kpsvd", "lanczos", "kl_optimal", "twolevel_kfac", "exactNG")
N = 6


def draw(*shape, seed=0):
    return torch.randn(shape, generator=zoo.generator(seed), dtype=torch.float64)


def model(p, x):
    """A layer, a scale, a parameter that no layer covers, and a layer."""
    kind = p["out"].dtype
    h = torch.tanh(F.linear(x, p["in"], p["bias"])).to(p["scale"].dtype) * p["scale"]
    outside = torch.empty_like(p["outside"])
    outside[...] = p["outside"].exp()
    return F.linear(h.to(kind) @ outside.to(kind), p["out"])


SINGLE = {"in": False, "bias": False, "scale": True, "outside": True, "out": True}
PARAMS = {"in": draw(4, 3), "bias": draw(4, seed=1), "scale": draw(4, seed=2), "outside": draw(4, 4, seed=3),
          "out": draw(2, 4, seed=4)}  # fmt: skip
X, Y = draw(N, 3, seed=5), draw(N, 2, seed=6)


def mixed(first_single, reverse):
    """Return parameters of which some are in single precision, and the same numbers in double precision."""
    some = {name: p.float() if SINGLE[name] == first_single else p for name, p in PARAMS.items()}
    names = list(PARAMS)[:: -1 if reverse else 1]
    return {name: some[name] for name in names}, {name: some[name].double() for name in names}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("first_single", [False, True])
def test_a_step_of_single_and_double_parameters_is_that_of_all_in_double(method, first_single, reverse):
    given, double = mixed(first_single, reverse)
    steps = []
    for params in (given, double):
        x = X.to(params["in"].dtype)
        ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), method=method, fisher="type2")
        assert {block.kind for block in ng.layout.blocks} == {"linear", "elementwise", "fallback"}
        y = Y.to(ng.layout.output_dtype)
        nat, state, info = ng.step(params, ng.init(params, damping=0.1), (x, y), inner=True)
        ff.check(info)
        assert {name: leaf.dtype for name, leaf in nat.items()} == {name: p.dtype for name, p in params.items()}
        again = ng.precondition(state, dict(ng.stats(params, (x, y)).grads))
        close({k: v.double() for k, v in again.items()}, {k: v.double() for k, v in nat.items()}, tol=1e-4)
        steps.append({name: leaf.double() for name, leaf in nat.items()})
    close(*steps, tol=1e-4)


def test_adaptive_steps_of_single_and_double_parameters_descend():
    params, _ = mixed(True, False)
    x, y = X.float() if params["in"].dtype == torch.float32 else X, Y
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Gaussian(), fisher="type2")
    y = y.to(ng.layout.output_dtype)
    opt = ff.adaptive(ng)
    state, first = opt.init(params), ng.loss(params, (x, y))
    for _ in range(5):
        params, state, info = opt.step(params, state, (x, y))
        ff.check(info)
    assert ng.loss(params, (x, y)) < first


@pytest.mark.parametrize("built", [torch.float32, torch.float64])
def test_parameters_of_another_precision_than_at_the_build_take_the_same_step(built):
    """States and gradients keep the types of the build."""
    other = torch.float64 if built == torch.float32 else torch.float32
    params, run = ({name: p.to(dtype) for name, p in PARAMS.items()} for dtype in (built, other))
    ng = ff.natural_gradient(model, params, X.to(built), likelihood=ff.Gaussian(), fisher="type2")
    expected = ng.step(params, ng.init(params, damping=0.1), (X.to(built), Y.to(built)))[0]
    nat, state, info = ng.step(run, ng.init(run, damping=0.1), (X.to(other), Y.to(other)))
    ff.check(info)
    assert {leaf.dtype for leaf in nat.values()} == {state.damping.dtype} == {built}
    close(nat, expected, tol=1e-4)


@pytest.mark.parametrize(
    "likelihood", [ff.Bernoulli(), ff.Categorical(), ff.Gaussian()], ids=lambda one: type(one).__name__
)
def test_losses_of_outputs_in_half_precision_are_computed_in_single(likelihood):
    """A loss of 40 has three digits in bfloat16: its change in a step, and so λ and the verdict, would be noise."""
    rng = torch.Generator().manual_seed(0)
    params, x = {"w": torch.randn(8, 64, generator=rng)}, torch.randn(16, 8, generator=rng)
    y = torch.randint(0, 64, (16,)) if isinstance(likelihood, ff.Categorical) else torch.rand(16, 64, generator=rng)

    def model(params, x):
        return (x @ params["w"]).bfloat16()

    ng = ff.natural_gradient(model, params, x, likelihood=likelihood)
    expected = likelihood.nll(model(params, x).float(), y).mean()
    opt = ff.adaptive(ng, look_back=False)
    _, _, info = opt.step(params, opt.init(params), (x, y), generator=rng)
    for found in (ng.loss(params, (x, y)), ng.stats(params, (x, y), generator=rng).loss, info.loss):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
