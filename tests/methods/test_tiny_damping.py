"""λ below the working precision of the statistics: no method divides by numerical noise."""

import pytest
import torch
from torch.nn import functional as F

import fisherfn as ff
from tests.oracles import close, vec
from tests.zoo import generator

EIGEN = ("kfac", "ekfac", "kpsvd", "deflation", "kfac_cor", "lanczos", "kl_optimal")
ALL = {name: make() for name, make in ff.METHODS.items()} | {"dense": ff.dense()}
ALL |= {f"{name}, eigen": ff.METHODS[name](damping_form="eigen") for name in EIGEN}
ALL |= {f"two-level, {coarse}": ff.two_level(coarse=coarse) for coarse in ("residual", "tselepidis")}


def model(params, x):
    return F.linear(torch.tanh(F.linear(x, params["w"], params["b"])), params["v"])


def problem(method, dtype):
    """Return a classifier: the output-gradients of its classes sum to zero, so that both blocks are singular."""
    rng, shapes = generator(0), {"v": (4, 3), "w": (3, 3), "b": (3,)}
    params = {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    x, y = torch.randn(9, 3, generator=rng, dtype=torch.float64).to(dtype), torch.randint(4, (9,), generator=rng)
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="type2", method=method)
    return ng, params, (x, y)


def step(method, dtype, damping):
    ng, params, batch = problem(method, dtype)
    nat, state, info = ng.step(params, ng.init(params, damping=damping), batch)
    ff.check(info)
    return nat, info


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_a_step_is_no_noise(method):
    """Directions on which F is zero have no gradient: without noise the step stays as long as with a larger λ."""
    fine, _ = step(method, torch.float64, 1e-9)
    for damping in (0.0, 1e-12):
        for dtype in (torch.float32, torch.float64):
            nat, _ = step(method, dtype, damping)
            assert vec(nat).norm() < 10 * vec(fine).norm()


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-2])
def test_the_floor_of_the_eigenvalues_is_reported_as_jitter(damping):
    """ε tr F of each block: E-KFAC has the trace of F itself."""
    ng, params, batch = problem(ff.ekfac("eigen"), torch.float32)
    stats = ng.stats(params, batch)
    _, _, info = ng.step(params, ng.init(params, damping=damping), batch)
    for key, jitter in info.diagnostics["jitter"].items():
        floor = torch.finfo(torch.float32).eps * ng.fisher(stats).block(key).trace()
        close(jitter.double(), (floor.double() - damping).clamp(min=0), tol=1e-3)


@pytest.mark.parametrize("form", ["factored", "eigen"])
@pytest.mark.parametrize("method", [ff.kfac, ff.ekfac, ff.lanczos])
def test_without_damping_and_statistics_there_is_no_inverse(method, form):
    ng, params, _ = problem(method(damping_form=form), torch.float64)
    _, info = ng.invert(ng.init(params, damping=0.0))
    assert not any(info.ok.values())
