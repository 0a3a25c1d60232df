"""The same noise gives the same step on a GPU and on the CPU, and all results are on the device.

Everything is float64, where both round the same sums to within 1e-8 of each other.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import zoo
from tests.methods.protocol import METHODS, at, stack
from tests.nets import MeanPool
from tests.oracles import close, differs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available()")

DAMPING = 0.1


class Case(NamedTuple):
    """A model on one device, with all that a step needs but the noise."""

    model: Any
    params: dict[str, torch.Tensor]
    context: Any
    batch: tuple[torch.Tensor, torch.Tensor]
    likelihood: Any

    def build(self, **kwargs):
        return ff.natural_gradient(
            self.model, self.params, self.batch[0], likelihood=self.likelihood, context=self.context, **kwargs
        )


def moved(tree, device):
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def to_gpu(case):
    return case._replace(**{name: moved(getattr(case, name), "cuda") for name in ("params", "context", "batch")})


def from_zoo(id):
    problem = zoo.pick(id)
    return Case(problem.model, problem.params, None, problem.batch, problem.likelihood)


def batch_norm_case():
    """Convolutions with batch norm in training mode, whose buffers are the context."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2), MeanPool(), nn.Linear(2, 3)
    )
    generator = zoo.generator(3)
    model, params, context = ff.functional(net.double().train())
    params = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
    x, y = torch.randn(6, 1, 4, 4, generator=generator, dtype=zoo.DTYPE), torch.tensor([0, 1, 2, 0, 1, 1])
    return Case(model, params, context, (x, y), ff.Categorical())


def case(id):
    return batch_norm_case() if id == "batch-norm" else from_zoo(id)


NETS = pytest.mark.parametrize(
    "id", ["mlp-categorical", "scale-vector", "batch-norm", "conv-groups", "conv-transpose", "transformer"]
)


def both(id, method="kfac", **kwargs):
    """The case and its natural gradient, here and there."""
    here = case(id)
    there = to_gpu(here)
    return here, here.build(method=method, **kwargs), there, there.build(method=method, **kwargs)


def noises(ng, case, count=2):
    return [ng.noise(case.batch, zoo.generator(k)) for k in range(count)]


def everything(case, ng, noises):
    """Two rounds of the parts, so that a warm state goes in, then a step."""
    params, state = case.params, ng.init(case.params, damping=DAMPING)
    for noise in noises:
        stats = ng.stats(params, case.batch, noise=noise, context=case.context)
        state, updated = ng.update(state, stats)
        state, inverted = ng.invert(state)
        nat = ng.precondition(state, stats)
        params = ff.tree.add(params, nat, scale=-0.1)
    again = ng.precondition(state, stats.grads)
    stepped, state, info = ng.step(params, state, case.batch, noise=noises[0], inner=True, context=case.context)
    return {
        "stats": stats, "infos": (updated, inverted, info), "state": state, "nat": nat, "from the gradient": again,
        "stepped": stepped, "matvec": ng.matvec(state, nat),
    }  # fmt: skip


def on_gpu(tree):
    leaves = pytree.tree_leaves(tree)
    return bool(leaves) and all(leaf.is_cuda for leaf in leaves)


def same(there, here, tol=1e-8):
    close(moved(there, "cpu"), here, tol)


# ------------------------------------------------------------------------------------------------------- methods


@METHODS
@NETS
def test_a_step_is_the_same_there(method, id):
    here, ng_here, there, ng_there = both(id, method, samples=2)
    assert ng_there.layout == ng_here.layout
    draws = noises(ng_here, here)
    drawn_there = noises(ng_there, there)
    assert on_gpu(drawn_there) and all(map(torch.equal, moved(drawn_there, "cpu"), draws))
    found, expected = everything(there, ng_there, drawn_there), everything(here, ng_here, draws)
    for name in ("nat", "from the gradient", "stepped", "matvec"):
        same(found[name], expected[name])
    info_there, info_here = found["infos"][-1], expected["infos"][-1]
    same(info_there.inner, info_here.inner)
    same(info_there.loss, info_here.loss)
    assert all(bool(ok) for ok in info_there.ok.values())
    if here.context is not None:
        same(info_there.context, info_here.context)
        assert differs(info_here.context["1.running_mean"], here.context["1.running_mean"])
    for name, tree in found.items():
        assert on_gpu(tree), name


@METHODS
@pytest.mark.parametrize("id", ["mlp-categorical", "mlp-bernoulli", "batch-norm"])
def test_adaptive_steps_are_the_same_there(method, id):
    here, ng, there, ng_there = both(id, method, fisher="type2")
    found = []
    for each, builder in ((here, ng), (there, ng_there)):
        opt, params = ff.adaptive(builder), each.params
        state = opt.init(params)
        for _ in range(3):
            params, state, info = opt.step(params, state, each.batch, context=each.context)
        found.append((params, state.update, tuple(info.adapted)))
    assert on_gpu(found[1])
    same(dict(enumerate(found[1][2])), dict(enumerate(found[0][2])), 1e-6)
    same(found[1][0], found[0][0], 1e-6)


@METHODS
@NETS
def test_an_empty_state_is_one_there_too(method, id):
    """Statistics of no example and systems of no unknown: what solvers are not always ready for."""
    here, _, there, ng = both(id, method)
    state = ng.init(there.params, damping=torch.tensor(0.25))
    assert on_gpu(state)
    grads = {name: torch.ones_like(p) for name, p in there.params.items()}
    same(ng.precondition(state, grads), {name: torch.full_like(p, 4.0) for name, p in here.params.items()})
    nat, after, info = ng.step(there.params, state, there.batch, update=False, invert=False, context=there.context)
    assert all(bool(ok) for ok in info.ok.values()) and on_gpu((nat, after))


@METHODS
@NETS
def test_two_models_at_once(method, id):
    here, ng_here, there, ng_there = both(id, method)
    members = [ff.tree.add(here.params, zoo.random_tree(here.params, m), scale=0.1) for m in range(2)]
    states = [ng_here.init(p, damping=d) for p, d in zip(members, (0.05, 0.5), strict=True)]
    draws = noises(ng_here, here)

    def step(ng, batch, params, state, noise, *context):
        nat, state, info = ng.step(
            params, state, batch, noise=noise, inner=True, context=context[0] if context else None
        )
        return nat, info.inner, ng.matvec(state, nat)

    contexts = () if here.context is None else (here.context,)  # buffers move, so each model has its own
    stacked = moved((stack(members), stack(states), torch.stack(draws), *(stack([c, c]) for c in contexts)), "cuda")
    found = torch.vmap(lambda *member: step(ng_there, there.batch, *member))(*stacked)
    assert on_gpu(found)
    for m in range(2):
        nat, inner, product = step(ng_here, here.batch, members[m], states[m], draws[m], *contexts)
        same(at(found[0], m), nat)
        same(found[1][m], inner)
        same(at(found[2], m), product)


@METHODS
def test_a_state_travels(method):
    """CPU, file, GPU, a step, and back: nothing is lost on the way, and the step is that of the CPU."""
    here, ng_here, there, ng_there = both("conv-transpose", method)
    draw = noises(ng_here, here)[0]
    _, state, _ = ng_here.step(here.params, ng_here.init(here.params, damping=DAMPING), here.batch, noise=draw)
    flat = ff.tree.flatten(state)
    arrived = ff.tree.unflatten(ng_there.init(there.params), moved(flat, "cuda"))
    back = moved(ff.tree.flatten(arrived), "cpu")
    assert back.keys() == flat.keys() and all(torch.equal(back[path], leaf) for path, leaf in flat.items())
    nat_there, _, _ = ng_there.step(there.params, arrived, there.batch, noise=draw.cuda())
    nat_here, _, _ = ng_here.step(here.params, state, here.batch, noise=draw)
    same(nat_there, nat_here)


@METHODS
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_single_precision_steps_are_sound(method, precision):
    """Wide enough for the fast kernels of products and convolutions, which may round to TensorFloat-32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    try:
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(), MeanPool(), nn.Linear(8, 10),
        )  # fmt: skip
        generator = zoo.generator()
        model, params, context = ff.functional(net.train())
        params = {n: 0.2 * torch.randn(p.shape, generator=generator) + (p.ndim == 1) for n, p in params.items()}
        x, y = torch.randn(32, 3, 12, 12, generator=generator), torch.randint(10, (32,), generator=generator)
        there = to_gpu(Case(model, params, context, (x, y), ff.Categorical()))
        ng = there.build(method=method)
        assert not ng.layout.fallbacks
        state, params, context = ng.init(there.params, damping=DAMPING), there.params, there.context
        for k in range(3):
            nat, state, info = ng.step(
                params, state, there.batch, generator=torch.Generator("cuda").manual_seed(k), inner=True,
                context=context,
            )  # fmt: skip
            assert all(bool(ok) for ok in info.ok.values()) and info.inner > 0
            assert all(bool(leaf.isfinite().all()) for leaf in nat.values())
            params, context = ff.tree.add(params, nat, scale=-0.01), info.context
        ff.check(info)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# ---------------------------------------------------------------------------------------------------- the Fisher


@NETS
@pytest.mark.parametrize("kind", zoo.FISHERS)
def test_the_fisher_is_the_same_there(id, kind):
    here, ng_here, there, ng_there = both(id, fisher=kind)
    draws = noises(ng_here, here)[0] if kind == "mc" else None

    def operators(on, ng, noise):
        stats = ng.stats(on.params, on.batch, noise=noise, context=on.context)
        found = {"loss": stats.loss, **{f"grads {name}": g for name, g in stats.grads.items()}}
        for structure in ("full", "block"):
            F = ng.fisher(stats, structure)
            product, solved = F @ stats.grads, F.solve(stats.grads, DAMPING)
            found |= {f"{structure} F {name}": leaf for name, leaf in product.items()}
            found |= {f"{structure} solve {name}": leaf for name, leaf in solved.items()}
            found |= {f"{structure} dense": F.dense(), f"{structure} trace": F.trace(), f"{structure} diag": F.diag()}
        return found | {"gram": ng.fisher(stats).gram()}

    found, expected = operators(there, ng_there, moved(draws, "cuda")), operators(here, ng_here, draws)
    assert on_gpu(found)
    same(found, expected)


@pytest.mark.parametrize("id", ["mlp-categorical", "conv-transpose", "batch-norm"])
def test_the_implicit_fisher_is_the_same_there(id):
    here, ng_here, there, ng_there = both(id)
    v = zoo.random_tree(here.params)
    F_here = ng_here.implicit_fisher(here.params, here.batch[0], context=here.context)
    F_there = ng_there.implicit_fisher(there.params, there.batch[0], context=there.context)
    same(F_there @ moved(v, "cuda"), F_here @ v)
    solved = F_there.solve(moved(v, "cuda"), 1.0, iterations=10)
    assert on_gpu(solved)
    same(solved.x, F_here.solve(v, 1.0, iterations=10).x)


@METHODS
@pytest.mark.parametrize("id", ["mlp-categorical", "conv-groups", "transformer"])
def test_errors_and_chunks_are_the_same_there(method, id):
    here, ng_here, there, ng_there = both(id, method)
    draw = noises(ng_here, here)[0]

    def errors(on, ng, noise, chunk_size=None):
        stats = ng.stats(on.params, on.batch, noise=noise, chunk_size=chunk_size)
        state, _ = ng.update(ng.init(on.params, damping=DAMPING), stats)
        nat = ng.precondition(ng.invert(state)[0], stats.grads)
        return ng.fisher_error(state, stats), nat

    (error_there, nat_there), (error_here, nat_here) = errors(there, ng_there, draw.cuda()), errors(here, ng_here, draw)
    assert on_gpu(error_there)
    # a difference of squares: an exact method's zero is the square root of rounding
    assert all(abs(float(error_there[key]) - float(error)) < 1e-6 for key, error in error_here.items())
    _, chunked = errors(there, ng_there, draw.cuda(), chunk_size=2)
    same(nat_there, nat_here)
    same(chunked, nat_here, tol=1e-7)


# ----------------------------------------------------------------------------------------------------- randomness


def test_dropout_is_the_same_there_and_takes_seeds_from_anywhere():
    net = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double().train()
    model, params, _ = ff.functional(net)
    x, y, seeds = torch.randn(6, 3, generator=zoo.generator()).double(), torch.arange(6) % 2, zoo.generator()
    context = {"dropout": ff.dropout_seeds(6, seeds)}
    here = Case(model, params, context, (x, y), ff.Categorical())
    outputs, _ = model(params, x, context)
    there = to_gpu(here)
    for given in (context, there.context):
        same(model(there.params, there.batch[0], given)[0], outputs)
    drawn = ff.dropout_seeds(6, torch.Generator("cuda").manual_seed(1))
    assert drawn.is_cuda and differs(model(there.params, there.batch[0], {"dropout": drawn})[0].cpu(), outputs)
    with_cpu_seeds = there._replace(context=context)
    ng_here, ng_there = here.build(fisher="empirical"), with_cpu_seeds.build(fisher="empirical")
    for chunk_size in (None, 2):
        stats_here, stats_there = (
            ng.stats(on.params, on.batch, context=on.context, chunk_size=chunk_size)
            for ng, on in ((ng_here, here), (ng_there, with_cpu_seeds))
        )
        same(dict(stats_there.grads), dict(stats_here.grads))


def test_models_that_sample_from_the_global_generator_of_the_device_raise_and_do_not_advance_it():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.FractionalMaxPool2d(2, output_size=2), nn.Flatten()).double()
    model, params, context = ff.functional(net.cuda())
    x = torch.randn(3, 1, 8, 8, generator=zoo.generator()).double().cuda()
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    with zoo.as_installed(), pytest.raises(ff.errors.NoiseError, match="global generator"):
        ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), fisher="empirical", context=context)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])


@METHODS
def test_the_global_generators_are_left_alone(method):
    there = to_gpu(case("batch-norm"))
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    ng = there.build(method=method)
    everything(there, ng, noises(ng, there, 1))
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"backend": "cudagraphs"}], ids=str)
def test_steps_as_a_cuda_graph(options):
    """Results go back in as arguments, and the first of them is still there at the end."""
    _, _, there, ng = both("mlp-categorical", "kfac")
    compiled = ff.compile(ng.step, **options)
    starts = [(there.params, ng.init(there.params, damping=DAMPING))] * 2
    first = None
    for k in range(5):
        noise = ng.noise(there.batch, torch.Generator("cuda").manual_seed(k))
        found, expected = (
            step(*start, there.batch, noise=noise, inner=True)
            for step, start in zip((compiled, ng.step), starts, strict=True)
        )
        same(ff.tree.flatten(found), ff.tree.flatten(expected))
        first = first or (found[0], ff.tree.map(torch.clone, found[0]))
        starts = [
            (ff.tree.add(params, nat, scale=-0.1), state)
            for (params, _), (nat, state, _) in zip(starts, (found, expected), strict=True)
        ]
    kept, copied = first
    assert all(torch.equal(kept[name], copied[name]) for name in kept)
