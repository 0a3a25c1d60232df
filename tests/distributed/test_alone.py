"""A group of one rank: the data-parallel calls are those of one process."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import fisherfn as ff
from fisherfn import errors as E
from fisherfn.adapt.quadratic import without_examples
from fisherfn.distributed import Ranks, data_parallel, inversion_owners
from fisherfn.distributed.build import owner_sends_less, shared
from fisherfn.distributed.preconditioners import OwnerPreconditions
from fisherfn.distributed.ranks import Shard, crossing
from fisherfn.distributed.stats import ReducedStats, stand_in
from fisherfn.stats.processes import spread
from tests import zoo
from tests.distributed import equal


@pytest.fixture(autouse=True)
def group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "exactNG", "twolevel_kfac"])
@pytest.mark.parametrize("id", ["language", "conv-groups"])
def test_one_rank_takes_the_step_of_one_process(id, method):
    problem, x, y = equal.batch(id, 4)
    ng = problem.build(method=method)
    expected = equal.trained(ng, problem.params, x, y, "step", steps=2)
    close(equal.trained(data_parallel(ng), problem.params, x, y, "step", steps=2), expected)


def test_other_example_shapes_keep_the_ranks():
    model, params, context = ff.functional(torch.nn.Linear(4, 3))
    x = torch.randn(6, 5, 4)
    ng = ff.natural_gradient(model, params, x[:, :2], likelihood=ff.Categorical(), context=context)
    longer = data_parallel(ng).for_shape(params, x, context=context)
    assert isinstance(longer, ff.distributed.DataParallel) and longer.layout.input_shapes == ((5, 4),)


def test_adaptive_steps_and_all_views_are_those_of_one_process():
    problem, x, y = equal.batch()
    ng, messages = problem.build(method="exactNG"), []
    alone = data_parallel(ng, observe=lambda what, size: messages.append(what))
    close(
        equal.trained(alone, problem.params, x, y, "adaptive", 2),
        equal.trained(ng, problem.params, x, y, "adaptive", 2),
    )
    assert "scalars" in messages
    noise = alone.noise((x, y), zoo.generator(0))
    stats, same = alone.stats(problem.params, (x, y), noise=noise), ng.stats(problem.params, (x, y), noise=noise)
    again = alone.reduced(ff.join([alone.local.stats(problem.params, (x, y), noise=noise)]))
    again = ff.tree.map(lambda leaf: leaf, again)
    for found in (stats, again):
        close(found.grads, same.grads)
        for key in found.layers:
            close({"g": found.lazy_tap(key).outputs()}, {"g": same.lazy_tap(key).outputs()})
            close({"W": found.lazy_loss_tap(key).mean_gradient()}, {"W": same.gradient(key)})
            close(
                {"g": found.lazy_tap(key).window(slice(1, 2)).outputs()}, {"g": same.lazy_tap(key).outputs()[:, :, 1:2]}
            )


def test_shared_out_inversions_are_the_methods_own():
    problem, x, y = equal.batch()
    for method in (ff.ekfac(), ff.two_level(ff.kfac())):
        ng = problem.build(method=method)
        stats = ng.stats(problem.params, (x, y), generator=zoo.generator(0))
        both = [ng.method, shared(ng.method, ng, Ranks())]
        shapes = ng.layout.block_shapes
        states = [each.init(shapes, torch.float64, torch.device("cpu"), torch.tensor(0.1)) for each in both]
        new = [each.update(s[0], stats.lazy_taps, torch.tensor(0.0)) for each, s in zip(both, states, strict=True)]
        inverses = [each.invert(n.factors, torch.tensor(0.1)) for each, n in zip(both, new, strict=True)]
        gradients = {key: stats.gradient(key) for key in shapes}
        mine, its = (each.precondition(i.factors, gradients, True) for each, i in zip(both, inverses, strict=True))
        close(its.matrices, mine.matrices)
        close(both[1].matvec(new[1].factors, gradients), both[0].matvec(new[0].factors, gradients))
        assert both[1].name == both[0].name and both[1].inverse_kind == both[0].inverse_kind
        for flag in ("couples", "inverts_updated"):
            assert hasattr(both[0], flag) and getattr(both[1], flag) == getattr(both[0], flag)
        close({"t": both[1].trace(new[1].factors, shapes)}, {"t": both[0].trace(new[0].factors, shapes)})
        close({"t": both[1].eigenvalues(new[1].factors, shapes)}, {"t": both[0].eigenvalues(new[0].factors, shapes)})
        assert all(both[1].overlap(new[1].factors, stats.lazy_taps))
        if method.name == "ekfac":
            logdets = [each.logdet(i.factors, shapes) for each, i in zip(both, inverses, strict=True)]
            close({"d": logdets[1]}, {"d": logdets[0]})


@pytest.mark.parametrize("method", [ff.kfac(), ff.two_level(ff.ekfac(), coarse="residual")])
def test_owners_of_a_group_of_one_are_the_method_itself(method):
    problem, x, y = equal.batch()
    ng = problem.build(method=method)
    made = shared(ng.method, ng, Ranks(), OwnerPreconditions)
    owning = replace(data_parallel(ng), method=made)
    random, same = zoo.generator(0), zoo.generator(0)
    state, its = (each.init(problem.params, damping=0.1) for each in (owning, ng))
    nat, state, info = owning.step(problem.params, state, (x, y), generator=random, inner=True)
    expected, its, wanted = ng.step(problem.params, its, (x, y), generator=same, inner=True)
    close(nat, expected)
    close({"inner": info.inner}, {"inner": wanted.inner})
    whole = owning.gathered(state)
    close(ff.tree.flatten(whole.inverses), ff.tree.flatten(its.inverses))
    close(ff.tree.flatten(owning.owned(whole).inverses), ff.tree.flatten(state.inverses))
    grads = owning.stats(problem.params, (x, y), curvature=False).grads
    close(owning.precondition(state, grads), ng.precondition(its, grads))
    if method.name == "kfac":
        stats, same = (each.stats(problem.params, (x, y), generator=zoo.generator(1)) for each in (owning, ng))
        close(owning.fisher_divergence(state, stats), ng.fisher_divergence(its, same))
        with pytest.raises(E.StructureError, match="no rank has all inverses"):
            owning.inverse(state).logdet()
        lacking = state._replace(inverses=dict.fromkeys(state.inverses, ()))
        with pytest.raises(E.StructureError, match="pass ng.gathered"):
            ng.precondition(lacking, grads)
        with pytest.raises(E.RankError, match="ng.owned"):
            owning.precondition(lacking, grads)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_auto_counts_the_bytes_of_both_forms(size):
    """Both are gathers whose parts are padded to the longest, or sums of at most twice the whole."""
    widths = [(40, 3), (20, 20), (2, 60), (5, 5)]  # the most numbers of a gradient are not in the largest triangles
    net = torch.nn.Sequential(*(torch.nn.Linear(i, o, bias=False) for i, o in chained(widths)))
    params = {name: p.detach() for name, p in net.named_parameters()}
    ng = ff.natural_gradient(
        lambda params, x: torch.func.functional_call(net, params, (x,)), params, torch.ones(2, 40), method="kfac",
        likelihood=ff.Gaussian(),
    )  # fmt: skip
    shapes = ng.layout.block_shapes
    owner = inversion_owners({key: float(s.i**3 + s.o**3) for key, s in shapes.items()}, size)
    triangles, matrices = [0] * size, [0] * size
    for key, s in shapes.items():
        triangles[owner[key]] += s.i * (s.i + 1) // 2 + s.o * (s.o + 1) // 2
        matrices[owner[key]] += s.i * s.o
    rarely, often = (min(size * max(each), 2 * sum(each)) for each in (triangles, matrices))
    found = [owner_sends_less(ng.method, ng, size, every) for every in range(1, 8)]
    assert found == [often * every < rarely for every in range(1, 8)]
    assert not owner_sends_less(ff.exact(), ng, size, 1)
    assert crossing([10, 0, 0]) == 20 and crossing([10, 10, 9]) == 30


def chained(widths):
    """The widths of layers of which each reads what the one before returns."""
    flat = [width for pair in widths for width in pair]
    return list(zip(flat, flat[1:], strict=False))


def test_steps_of_sharded_parameters_are_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    problem, x, y = equal.batch()
    ng = data_parallel(problem.build(method="kfac"))
    shards = {name: distribute_tensor(p, mesh, [Shard(0)]) for name, p in problem.params.items()}
    found, expected = [], []
    for params, results in ((shards, found), (problem.params, expected)):
        state, random = ng.init(params, damping=0.1), zoo.generator(0)
        nat, state, _ = ng.step(params, state, (x, y), generator=random)
        grads = ng.stats(params, (x, y), curvature=False).grads
        results += [nat, grads, ng.precondition(state, grads)]
    for mine, whole in zip(found, expected, strict=True):
        assert all(leaf.placements == (Shard(0),) for leaf in mine.values())
        close({name: leaf.full_tensor() for name, leaf in mine.items()}, whole)


def test_failures_are_typed():
    problem, x, y = equal.batch()
    ng = data_parallel(problem.build(method="kfac"))
    with pytest.raises(E.RankError, match="ShapeError"):
        ng.stats(problem.params, (x[:, :-1], y), generator=zoo.generator(0))
    with pytest.raises(E.EmptyBatchError, match="no rank"):
        ng.stats(problem.params, (x[:0], y[:0]), generator=zoo.generator(0))
    with pytest.raises(E.EmptyBatchError, match="nothing|no statistics"):
        ff.join([])
    with pytest.raises(E.StructureError, match="already"):
        ff.join([ng.stats(problem.params, (x, y), generator=zoo.generator(0))])
    with pytest.raises(E.RankError, match="rank 0 of 1"), Ranks()._answered("test"):
        raise RuntimeError("closed")


def test_a_shard_knows_its_place():
    shard = Shard(1, (3, 0, 2))
    assert (shard.start, shard.own, shard.total) == (3, 0, 5)
    assert not shard.weighted(torch.full((2,), torch.nan)).any()
    assert stand_in((torch.ones(0, 3), torch.ones(0)))[0].shape == (1, 3)


@pytest.mark.parametrize("wanted", [0, 3, 8, 100])
def test_the_parts_of_all_ranks_are_that_of_the_batch(wanted):
    counts = (3, 0, 5, 4)
    found = []
    for rank, own in enumerate(counts):
        shard = Shard(rank, counts)
        stats = SimpleNamespace(shard=shard)
        found += [shard.start + at for at in ReducedStats.part(stats, wanted, max(own, 1))]  # or one stand-in
    assert found == spread(wanted, sum(counts))


def test_a_tap_of_a_group_has_the_type_and_the_windows_of_one_process():
    problem, x, y = equal.batch()
    ng = problem.build(method="kfac")
    alone = data_parallel(ng)
    noise = alone.noise((x, y), zoo.generator(0))
    stats, same = alone.stats(problem.params, (x, y), noise=noise), ng.stats(problem.params, (x, y), noise=noise)
    for wanted in (0, 2, len(x), 100):
        assert stats.part(wanted, len(x)) == same.part(wanted, len(x)) == spread(wanted, len(x))
    for key in stats.layers:
        found, expected = stats.lazy_tap(key), same.lazy_tap(key)
        assert found.dtype == expected.dtype
        close({"mean": found.mean(lambda tap: tap.outputs().mean(2))}, {"mean": expected.outputs().mean(2)})
        close(
            {str(at): part.g for at, part in enumerate(found.windows())},
            {str(at): part.g for at, part in enumerate(expected.windows())},
        )


def test_a_rank_without_examples_adds_nothing_to_the_quadratic_model():
    problem, x, y = equal.batch()
    ng = data_parallel(problem.build(method="kfac"))
    directions = [zoo.random_tree(problem.params, seed) for seed in (1, 2)]
    model = without_examples(directions, torch.zeros(0))
    assert not model.slope.any() and not model.curvature.any() and len(model.losses) == 0
    close({"gram": model.gram[0, 1]}, {"gram": ff.tree.dot(*directions)})
    assert ng._stand_in_context(None) is None


def test_step_sizes_of_the_quadratic_model_are_those_of_one_process():
    """For classes the default rule is the KL bound, whose steps do not depend on the scale of the model."""
    problem, x, y = equal.batch()
    found = []
    for ng in (problem.build(method="kfac"), data_parallel(problem.build(method="kfac"))):
        opt = ff.adaptive(ng, rule="model")
        state = opt.init(problem.params)
        _, _, info = opt.step(problem.params, state, (x, y), generator=zoo.generator(0))
        found.append(info.adapted._asdict())
    close(found[1], found[0])


def test_sharded_parameters_are_refused():
    """FSDP2 makes parameters of this type; the test distributes one over a mesh of one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    problem, x, y = equal.batch()
    for placement in (Shard(0), Replicate()):
        params = {name: distribute_tensor(p, mesh, [placement]) for name, p in problem.params.items()}
        with pytest.raises(E.StructureError, match=r"is a DTensor.*full_tensor"):
            ff.natural_gradient(problem.model, params, x, likelihood=problem.likelihood)
    net = torch.nn.Linear(2, 3)
    net.weight = torch.nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(E.StructureError, match="'weight' is a DTensor"):
        ff.functional(net)


def test_dropout_seeds_of_a_group_are_those_of_one_process():
    problem, _, _ = equal.batch()
    ng = data_parallel(problem.build(method="kfac"))
    assert torch.equal(ng.dropout_seeds(5, zoo.generator(0)), ff.dropout_seeds(5, zoo.generator(0)))


def test_a_distributed_module_is_unwrapped():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
    wrapped = torch.nn.parallel.DistributedDataParallel(net)
    model, params, context = ff.functional(wrapped)
    x = torch.ones(4, 2)
    assert set(params) == {"module.0.weight", "module.0.bias"}
    assert torch.equal(model(params, x, context)[0], net(x))
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context)
    assert [block.key for block in ng.layout.layers] == ["module.0"]


def test_gradients_of_one_rank_stay_as_they_are():
    from fisherfn.optim import ranks

    grads = {"w": torch.arange(3.0)}
    assert ranks.averaged(grads, 4) is grads
    ranks.alone("anything")
    ng = zoo.pick("mlp-categorical").build()
    assert ranks.spread(ng) is ng and ranks.dropout(ng) is None and not ranks.several()
