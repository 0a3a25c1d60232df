"""SPRING against its published recursion with dense Jacobians."""

import pytest
import torch

import fisherfn as ff
from fisherfn.errors import HyperparameterError, StructureError
from tests.adapt.problems import built, mlp
from tests.adapt.problems import flat as vector
from tests.test_terms import MODELS, dense, flat, net, problem, terms_of


def recursion(J, r, phi, momentum, damping):
    """One step as published: J and r with rows over all examples, divided by the root of their number."""
    zeta = r - J @ (momentum * phi)
    gram = J @ J.T + damping * torch.eye(len(J), dtype=J.dtype)
    return momentum * phi + J.T @ torch.linalg.solve(gram, zeta)


@MODELS
def test_three_steps_are_the_published_recursion(inside):
    params, batch = problem()
    ng = ff.sum_of_terms(terms_of(batch, inside), params, method="exact")
    spring = ff.spring(ng, momentum=0.8)
    state, phi = spring.init(params, damping=1e-2), torch.zeros(26, dtype=torch.float64)
    for _ in range(3):
        J, r = stacked(params, batch, (inside, net), (1.0, 2.5))
        phi = recursion(J, r, phi, 0.8, 1e-2)
        direction, state, info = spring.step(params, state, batch)
        ff.check(info)
        torch.testing.assert_close(flat(direction), phi, rtol=1e-7, atol=1e-8)
        params = ff.tree.add(params, direction, scale=-0.1)
    loss, _, _ = dense(ff.tree.add(params, direction, scale=0.1), batch, (inside, net), (1.0, 2.5))
    torch.testing.assert_close(info.loss, loss)


def stacked(params, batch, models, weights):
    """The Jacobian and the residuals of all terms as rows, scaled by the root of weight over examples."""
    rows, residuals = [], []
    for (x, y), model, weight in zip(batch.values(), models, weights, strict=True):
        J = torch.func.jacrev(model)(params, x)
        scale = (weight / len(x)) ** 0.5
        residual = (model(params, x) - y).reshape(-1)
        rows.append(scale * torch.cat([J[name].reshape(len(residual), -1) for name in params], -1))
        residuals.append(scale * residual)
    return torch.cat(rows), torch.cat(residuals)


@pytest.mark.parametrize("likelihood", [ff.Gaussian(), ff.Bernoulli()], ids=["squared loss", "cross entropy"])
@pytest.mark.parametrize("examples", [3, 12], ids=["few examples", "few parameters"])
@pytest.mark.parametrize("method", ["exact", "kfac"])
def test_a_direction_is_pulled_by_its_share_of_the_damping(method, examples, likelihood):
    """φ ← (F̂ + λI)⁻¹ (∇ + λμφ), with the dense matrix of any method whose damping is λI."""
    case = mlp(likelihood, examples=examples)
    built_method = ff.exact() if method == "exact" else ff.kfac(damping_form="eigen")
    ng, batch = built(case, built_method, fisher="type2"), (case.x, case.y)
    state = ff.spring(ng, momentum=0.5).init(case.params, damping=0.1)
    phi = ff.tree.map(torch.ones_like, case.params)
    direction, state, _ = ff.spring(ng, momentum=0.5).step(case.params, state._replace(direction=phi), batch)
    F = ng.approximation(state.curvature).dense()
    grads = vector(ng.stats(case.params, batch).grads)
    expected = torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), grads + 0.05)
    torch.testing.assert_close(vector(direction), expected, rtol=1e-8, atol=1e-10)
    stats = ng.stats(case.params, batch)
    near = ff.tree.scale(phi, 0.5)
    nat, _, info = ng.step_from(ng.init(case.params, damping=0.1), stats, stats, inner=True, near=near)
    torch.testing.assert_close(vector(nat), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(info.inner, grads @ expected)


@pytest.mark.parametrize("structure", ["full", "block"])
def test_a_damping_near_the_rounding_errors_of_the_fisher(structure):
    """Steps stay in the span of the rows: divided by such a λ, rounding errors would outweigh them elsewhere.

    The oracle is least squares with the rows [J; √λ I], whose condition is only the root of that of F + λI.
    """
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, d, generator=g, dtype=torch.float64) for d in (20, 1))
    x = x * torch.logspace(0, -6, 20, dtype=torch.float64)
    params = {"w": torch.randn(1, 20, generator=g, dtype=torch.float64)}
    ng = ff.natural_gradient(
        lambda p, x: x @ p["w"].mT, params, x, likelihood=ff.Gaussian(), method=ff.exact(structure), fisher="type2"
    )
    J, r = x / 6**0.5, ((x @ params["w"].mT - y) / 6**0.5).squeeze(1)
    damping, near = 10 * torch.finfo(torch.float64).eps * J.square().sum(), 1e-3 * torch.randn(20, generator=g).double()
    spring = ff.spring(ng, momentum=0.5)
    state = spring.init(params, damping=damping)._replace(direction={"w": near.reshape(1, 20) / 0.5})
    direction, _, info = spring.step(params, state, (x, y))
    ff.check(info)

    def objective(step):
        return (J @ step - r).square().sum() + damping * (step - near).square().sum()

    root = damping.sqrt() * torch.eye(20, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat([J, root]), torch.cat([r, damping.sqrt() * near]), driver="gelsd").solution
    moved = direction["w"].squeeze(0) - near
    beside = moved - torch.linalg.pinv(J) @ (J @ moved)
    assert beside.norm() <= 1e-9 * moved.norm()
    assert objective(direction["w"].squeeze(0)) <= 1.1 * objective(best)


def test_without_momentum_it_is_the_natural_gradient():
    case = mlp()
    ng = built(case, "exact", fisher="type2")
    spring = ff.spring(ng, momentum=0.0)
    direction, _, _ = spring.step(case.params, spring.init(case.params, damping=0.1), (case.x, case.y))
    nat, _, _ = ng.step(case.params, ng.init(case.params, damping=0.1), (case.x, case.y))
    torch.testing.assert_close(direction, nat, rtol=1e-9, atol=1e-12)


def test_a_failed_step_leaves_the_state_and_members_have_their_own_momentum():
    case = mlp()
    ng = built(case, "exact", fisher="type2")
    spring = ff.spring(ng)
    before = spring.init(case.params, damping=0.1)
    _, good, _ = spring.step(case.params, before, (case.x, case.y))
    _, after, info = spring.step(case.params, good, (case.x * torch.nan, case.y))
    assert not all(info.ok.values())
    torch.testing.assert_close(after.direction, good.direction)

    def second(momentum):
        each = ff.spring(ng, momentum=momentum)
        return each.step(case.params, good, (case.x, case.y))[0]

    together = torch.vmap(second)(torch.tensor([0.0, 0.9]).double())
    alone = [second(m) for m in (0.0, 0.9)]
    torch.testing.assert_close(together, {n: torch.stack([a[n] for a in alone]) for n in alone[0]})


def test_a_direction_is_clipped_to_a_length():
    direction = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert ff.norm_clip(direction, lr=0.1, norm=1.0) == direction
    clipped = ff.norm_clip(direction, lr=2.0, norm=1.0)
    torch.testing.assert_close(ff.tree.norm(clipped) * 2.0, torch.tensor(1.0))


def test_errors_teach():
    case = mlp()
    ng = built(case, "exact", fisher="type2")
    with pytest.raises(HyperparameterError, match="momentum must lie"):
        ff.spring(ng, momentum=1.0)
    with pytest.raises(StructureError, match=r"ff\.natural_gradient"):
        ff.spring(None)
    with pytest.raises(StructureError, match="symmetric"):
        ff.spring(built(case, ff.two_level(coarse="residual"), fisher="type2"))
    with pytest.raises(StructureError, match=r"spring\.init"):
        ff.spring(ng).step(case.params, ng.init(case.params), (case.x, case.y))
    with pytest.raises(HyperparameterError, match="norm must be positive"):
        ff.norm_clip({"w": torch.ones(1)}, lr=1.0, norm=0.0)


def test_a_state_has_no_graph_of_the_steps_before():
    case = mlp(ff.Gaussian())
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.params.items()}
    ng = ff.natural_gradient(case.model, leaves, case.x, likelihood=ff.Gaussian(), method=ff.exact())
    opt = ff.spring(ng)
    _, state, _ = opt.step(
        leaves, opt.init(leaves), (case.x, case.y), noise=ng.noise((case.x, case.y), torch.Generator())
    )
    assert not any(leaf.requires_grad for leaf in ff.tree.leaves(state))
