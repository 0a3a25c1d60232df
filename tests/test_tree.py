"""Tree arithmetic against the flat vector; flatten and unflatten are inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import fisherfn as ff
from fisherfn.tree import split
from tests import oracles, strategies, zoo
from tests.oracles import close, vec


@given(strategies.trees(), st.floats(-3, 3))
def test_arithmetic_is_that_of_the_flat_vector(x, scale):
    y = {name: torch.full_like(leaf, 0.5) + leaf.sin() for name, leaf in x.items()}
    close(vec(ff.tree.add(x, y)), vec(x) + vec(y))
    close(vec(ff.tree.add(x, y, scale=scale)), vec(x) + scale * vec(y))
    close(vec(ff.tree.scale(x, scale)), scale * vec(x))
    close(ff.tree.dot(x, y), vec(x) @ vec(y))
    close(ff.tree.norm(x), vec(x).norm())
    close(vec(ff.tree.zeros_like(x)), torch.zeros_like(vec(x)))


def test_add_takes_a_tensor_as_scale_and_leaves_its_arguments():
    x = {"w": torch.ones(2), "b": torch.zeros(1)}
    y = ff.tree.add(x, x, scale=torch.tensor(-0.5))
    assert y["w"].tolist() == [0.5, 0.5] and x["w"].tolist() == [1, 1]


def test_names_match_whatever_their_order():
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    y = {"b": torch.tensor([10.0, 20.0]), "a": torch.tensor([5.0, 6.0])}
    assert ff.tree.dot(x, y).item() == 1 * 5 + 2 * 6 + 3 * 10 + 4 * 20
    close(ff.tree.add(x, y), {"a": torch.tensor([6.0, 8.0]), "b": torch.tensor([13.0, 24.0])})


def test_other_names_are_refused():
    with pytest.raises(ff.errors.StructureError, match="bias"):
        ff.tree.add({"w": torch.ones(1)}, {"w": torch.ones(1), "bias": torch.ones(1)})


def test_flatten_names_every_leaf_once_and_unflatten_inverts_it():
    problem = zoo.pick("scale-vector")
    state = problem.build().init(problem.params, damping=0.1)
    flat = ff.tree.flatten(state)
    assert all(isinstance(path, str) and isinstance(leaf, torch.Tensor) for path, leaf in flat.items())
    assert any("damping" in path for path in flat) and any("first" in path for path in flat)
    again = ff.tree.unflatten(state, {path: leaf.clone() for path, leaf in flat.items()})
    assert type(again) is type(state)
    close(ff.tree.flatten(again), flat)


def test_the_flat_state_survives_weights_only(tmp_path):
    problem = zoo.pick("mlp-categorical")
    run = zoo.sampled(problem)
    state, _ = run.ng.invert(run.ng.update(run.ng.init(problem.params), run.stats)[0])
    torch.save(ff.tree.flatten(state), tmp_path / "state.pt")
    loaded = ff.tree.unflatten(run.ng.init(problem.params), torch.load(tmp_path / "state.pt", weights_only=True))
    nat = run.ng.precondition(state, run.stats.grads)
    for name, leaf in run.ng.precondition(loaded, run.stats.grads).items():
        assert torch.equal(leaf, nat[name])


def test_unflatten_refuses_missing_and_unknown_paths():
    tree = {"a": torch.ones(1), "b": {"c": torch.ones(2)}}
    flat = ff.tree.flatten(tree)
    for wrong in ({k: v for k, v in flat.items() if "c" not in k}, {**flat, "zzz": torch.ones(1)}):
        with pytest.raises(ff.errors.StructureError):
            ff.tree.unflatten(tree, wrong)


def test_the_oracle_agrees_on_order():
    """`vec` is params order, row-major: what leaves the library is in this order."""
    tree = {"b": torch.arange(4.0).reshape(2, 2), "a": torch.ones(1)}
    assert list(ff.tree.flatten(tree)) == ["b", "a"]
    assert oracles.vec(tree).tolist() == [0, 1, 2, 3, 1]


def test_an_empty_leaf_takes_the_shape_of_what_was_saved():
    """Leaves that follow the batch's shape are empty before the first batch; others keep theirs."""
    like = {"taps": torch.zeros(1, 0, 3), "fixed": torch.zeros(2)}
    saved = {"taps": torch.ones(1, 4, 3), "fixed": torch.ones(2)}
    close(ff.tree.unflatten(like, saved), saved)
    for wrong in ({"taps": torch.ones(4, 3)}, {"fixed": torch.ones(3)}):
        with pytest.raises(ff.errors.StructureError):
            ff.tree.unflatten(like, {**saved, **wrong})


def test_only_a_tensor_fits_where_a_tensor_belongs():
    like = {"a": torch.ones(2), "b": ()}
    assert ff.tree.fits({"a": torch.ones(2), "b": ()}, like, int)
    for wrong in (None, 1.0, torch.ones(2).numpy(), {"w": torch.ones(2)}, torch.ones(3), torch.ones(2).double()):
        assert not ff.tree.fits({"a": wrong, "b": ()}, like, int)
    assert not ff.tree.fits({"a": torch.ones(2), "b": torch.ones(2)}, like, int)
    assert not ff.tree.fits({"a": None, "b": ()}, like, torch.Tensor)


def test_select_keeps_the_old_where_it_can_and_else_marks_it():
    new, old = {"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.full((5,), 7.0), "b": torch.full((2,), 7.0)}
    close(ff.tree.select(torch.tensor(True), new, old), new)
    close(ff.tree.select(torch.tensor(False), new, old), old)
    both = torch.vmap(lambda mask: ff.tree.select(mask, new, old))(torch.tensor([True, False]))
    assert both["b"].tolist() == [[1, 1], [7, 7]]
    assert both["a"].tolist()[0] == [1, 1, 1] and both["a"][1].isnan().all()


def test_an_empty_leaf_becomes_zeros_and_so_does_one_that_cannot_be_nan():
    mask, count = torch.tensor([True, False]), torch.ones(3, dtype=torch.int64)
    for new, old in ((torch.ones(3), torch.ones(0)), (count, count[:2])):
        assert torch.vmap(lambda m, a=new, b=old: ff.tree.select(m, a, b))(mask).tolist() == [[1, 1, 1], [0, 0, 0]]
        group = ff.members.select(mask, new.expand(2, -1), old.expand(2, -1))
        assert group.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_split_tells_trees_apart_that_a_graph_would_confuse():
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    tensors, known = split({"a": x, "b": y})
    assert [id(t) for t in tensors] == [id(x), id(y)]
    assert split({"a": y, "b": x})[1] == known
    others = [
        {"a": x, "b": x},
        {"b": x, "a": y},
        {"a": x, "b": y.double()},
        {"a": x, "b": torch.ones(2, 4)},
        {"a": x, "b": torch.ones(3, 2).mT},
        {"a": x, "b": 1.0},
        (x, y),
        [x, y],
    ]
    assert len({known, *(split(other)[1] for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("other", [{"a": 1.0}, {"a": 1.0, "c": 2.0}, {"a": 1.0, "b": 2.0, "c": 3.0}])
def test_trees_with_other_names_are_refused_as_many_as_there_may_be(other):
    x, y = ({name: torch.tensor(value) for name, value in each.items()} for each in ({"a": 1.0, "b": 2.0}, other))
    for function in (ff.tree.add, ff.tree.dot, lambda one, two: ff.tree.select(torch.tensor(True), one, two)):
        with pytest.raises(ff.errors.StructureError, match="must have the same names"):
            function(x, y)


def test_sums_of_half_precision_do_not_overflow():
    """Finite numbers whose sum is beyond their own type."""
    half = {"w": torch.full((10,), 6e4, dtype=torch.float16)}
    assert ff.tree.finite(half) and ff.tree.finite_each(half)["w"] and ff.tree.finite_inputs(half)
    half["w"][3] = torch.inf
    assert not ff.tree.finite(half) and not ff.tree.finite_each(half)["w"] and not ff.tree.finite_inputs(half)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_in_the_inputs(number):
    x = {"a": torch.randn(3, 4), "b": torch.zeros(0, 2)}
    assert ff.tree.finite_inputs(x)
    x["a"][1, 2] = number
    assert not ff.tree.finite_inputs(x)


@pytest.mark.parametrize("mask", [True, False])
def test_a_choice_is_the_same_whether_the_mask_can_be_read_or_not(mask):
    """Under vmap and in a trace the mask has no value; a tree that is not chosen may contain NaN."""
    x, y = {"w": torch.full((3,), 1.0 if mask else torch.nan)}, {"w": torch.full((3,), torch.nan if mask else 2.0)}
    mask = torch.tensor(mask)
    read = ff.tree.select(mask, x, y)["w"]
    batched = torch.vmap(lambda m: ff.tree.select(m, x, y)["w"])(mask.reshape(1))[0]
    traced = make_fx(lambda m: ff.tree.select(m, x, y)["w"])(~mask)(mask)  # traced with the other value
    assert torch.equal(read, batched) and torch.equal(read, traced)


def test_a_mask_that_can_be_read_copies_nothing_and_computes_one_side():
    x, y = {"w": torch.ones(3)}, {"w": torch.zeros(3)}
    assert ff.tree.select(torch.tensor(True), x, y)["w"] is x["w"]
    assert ff.tree.choose(torch.tensor(True), lambda: x, lambda: pytest.fail("computed")) is x


@pytest.mark.parametrize("scale", [-0.5, torch.tensor(-0.5)])
def test_a_sum_with_a_scale(scale):
    assert ff.tree.add({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])}, scale=scale)["w"].tolist() == [0.5, 0]


def test_two_leaves_that_are_one_tensor_stay_one():
    one, other = torch.ones(3), torch.zeros(3)
    found = torch.vmap(lambda mask: ff.tree.select(mask, (one, one), (other, other)))(torch.tensor([True]))
    traced = make_fx(lambda mask: ff.tree.select(mask, (one, one), (other, other)))(torch.tensor(True))
    assert found[0].tolist() == found[1].tolist() == [[1, 1, 1]]
    assert sum(node.target is torch.ops.aten.where.self for node in traced.graph.nodes) == 1


def test_a_norm_does_not_overflow_in_half_precision():
    assert float(ff.tree.norm({"w": torch.full((4,), 300.0, dtype=torch.float16)})) == 600.0


@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, 1e-4), (torch.float16, 1000.0), (torch.bfloat16, 1.01)])
def test_an_inner_product_of_half_precision_is_that_of_its_numbers_in_double(dtype, number):
    """The square of 1e-4 vanishes in float16, that of 1000 overflows, and a sum of bfloat16 has three digits."""
    x, y = torch.full((300,), number, dtype=dtype), torch.full((300,), -number, dtype=dtype)
    for one, other in ((x, y), (x.float(), y), (x, y.float())):
        found = ff.tree.dot({"a": one, "b": one[:1]}, {"a": other, "b": other[:1]})
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), x.double() @ y.double() - x[0].double() ** 2, rtol=1e-6, atol=0)
