"""The benchmark: what it computes from its timings, and that each peer computes what it is timed for."""

import functools
import json
import math

import pytest
import torch
from torch import nn

import benchmark
import fisherfn as ff
from common.benchmark import clock, contenders, latency, optimizers, peers, report
from common.benchmark.contenders import Contender, Cost, Cycle, Parts, cost
from common.benchmark.ours import COMPILED, FORWARD_BACKWARD, GRAM, IN_TOTAL, VARIANTS, kfac, prepared
from common.benchmark.problems import WORKLOADS, posed, problem
from common.config import ConfigError

# ------------------------------------------------------------------------------------------------------ the mean step


def test_the_mean_step_counts_each_kind_as_often_as_it_happens():
    joint = Parts(4.0, step_with_statistics=10.0, step_with_both=30.0)
    # 20 steps: 1 with inverses, 3 more with statistics, 16 without either
    assert math.isclose(Cycle(5, 20).mean(cost(joint)), (30 + 3 * 10 + 16 * 4) / 20)
    apart = Parts(4.0, statistics=6.0, inverses=20.0)
    assert cost(apart) == cost(joint) == Cost(4.0, 6.0, 20.0)
    assert cost(Parts(4.0, statistics=6.0, step_with_inverses=24.0)) == Cost(4.0, 6.0, 20.0)
    assert Cycle(5, 20).mean(cost(Parts(4.0))) == 4.0


def test_a_timing_is_the_median_between_the_quartiles():
    assert clock.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)
    assert clock.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_slow_calls_are_timed_in_fewer_rounds(monkeypatch):
    calls = []
    durations = {"a": 1.0, "b": clock.BUDGET / 2, "c": clock.BUDGET * 9}
    monkeypatch.setattr(clock, "milliseconds", lambda step, gpu: calls.append(step()) or durations[step()])
    found = clock.measure({"A": lambda: "a", "B": lambda: "b", "C": lambda: "c"}, rounds=4, device="cpu", title="")
    assert "".join(calls) == "abc" + "abc" + "a" + "ab" + "a"  # a round of warming up, then four
    assert {key: timing.ms for key, timing in found.items()} == {key.upper(): ms for key, ms in durations.items()}


# ------------------------------------------------------------------------------------------------------- what is timed


def test_a_contender_that_fails_later_is_named_and_the_others_are_timed():
    rounds = iter([None, None, ValueError("roots")])

    def fails_at_last():
        error = next(rounds)
        if error:
            raise error

    steps = {"well": lambda: None, "ill": fails_at_last}
    timings, failed = clock.measure_forgiving(steps, ["ill"], rounds=5, device="cpu", title="")
    assert list(timings) == ["well"] and str(failed["ill"]) == "roots"
    with pytest.raises(RuntimeError):
        clock.measure({"ours": lambda: torch.linalg.cholesky(-torch.eye(1))}, rounds=2, device="cpu", title="")


@pytest.mark.parametrize("name", WORKLOADS)
def test_everyone_trains_the_same_net_on_the_same_batch(name):
    one = problem(name, batch_size=3)
    train = one.training()
    train.backward()
    outputs, _ = one.model(one.params, one.batch[0], one.context)
    theirs = one.loss(train.net(train.x), train.y)
    torch.testing.assert_close(one.likelihood.nll(outputs, one.batch[1]).mean(), theirs)
    assert all(p.grad is not None for p in train.net.parameters())
    assert all(p.grad is None for p in one.net.parameters())


def test_results_of_a_run_are_written_and_shown(tmp_path, capsys):
    page = tmp_path / "page.md"
    names = ["about", "mean step", "parts", "refresh", "exact"]
    page.write_text("Before.\n" + "".join(f"<!-- table: {name} -->\nold\n<!-- end of table -->\n" for name in names))
    config = benchmark.BenchmarkConfig(
        rounds=1,
        workloads="cuda_convnet",
        batch_size=4,
        threads=1,
        compile=False,
        page=str(page),
        result_dir=str(tmp_path),
    )
    benchmark.main(config)
    found = json.loads((tmp_path / "benchmark.json").read_text())["workloads"]["cuda_convnet"]
    assert set(found["contenders"]) == {"SGD", *VARIANTS}
    assert set(found["refresh"]) == {*ff.METHODS, "ekfac, without inversion"}
    assert set(found["exact"]) == {"forward and backward", "exact natural gradient", "its Gram matrix"}
    text = page.read_text()
    assert text.startswith("Before.\n") and "old" not in text and "lanczos" in text
    assert (tmp_path / "images" / "performance.png").exists()
    assert "average time per step, relative to SGD" in capsys.readouterr().out


def test_percentiles_are_of_single_steps():
    """The values below which half and 99 in a hundred of 1 to 101 milliseconds lie."""
    assert latency.spread([float(ms) for ms in range(1, 102)]) == (51.0, 100.0, 101.0)


def test_all_kinds_of_refresh_are_timed_with_the_same_number_of_updates_and_inversions(monkeypatch):
    calls = []
    one = prepared(problem("cuda_convnet", 4), "kfac")
    step = ff.NaturalGradient.step
    monkeypatch.setattr(ff.NaturalGradient, "step", lambda *args, **more: calls.append(more) or step(*args, **more))
    keys = [block.key for block in one.ng.layout.blocks]
    for refreshes in latency.cadences(one).values():
        calls.clear()
        assert len(latency.run(one, refreshes, 20, "cpu")) == 20
        for refresh, times in (("invert", 2), ("update", 4)):
            due = [keys if call[refresh] is True else sorted(call[refresh] or ()) for call in calls[1:]]
            assert sorted(key for each in due for key in each) == sorted(times * keys)
    found = {"p50": 2.0, "p99": 3.0, "longest": 4.0}
    workload = {"latency": {"steps": {"staggered": found}, "build_ms_per_layer": 5.0}}
    row = report.latency({"workloads": {"AE_MNIST": workload}}).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["staggered", "2.0", "3.0", "4.0", "1.50", "5.0"]


def small(*given):
    """A workload whose steps are quick to compile."""
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    return posed(net, (torch.rand(4, 1, 4, 4), torch.arange(4) % 3), ff.Categorical())


def test_compiled_steps_move_the_weights_as_plain_ones(monkeypatch):
    monkeypatch.setattr(ff, "compile", functools.partial(ff.compile, backend="eager"))
    one = small()
    for label, build in COMPILED.items():
        plain, compiled = kfac(one, VARIANTS[label.removesuffix(", compiled")]), build(one)
        for part, call in plain.calls().items():
            moved, _, info = call()
            ff.check(info)
            for name, leaf in compiled.calls()[part]()[0].items():
                torch.testing.assert_close(leaf, moved[name])


def test_a_workload_has_to_exist():
    with pytest.raises(ConfigError, match="workloads must be among AE_CURVES.*, got 'W1'"):
        benchmark.chosen(benchmark.BenchmarkConfig(workloads="AE_MNIST, W1"))


# ------------------------------------------------------------------------------------------------------------ tables


def numbers():
    def parts(**ms):
        return {name: {"ms": value, "low": 1.0, "high": 9.0, "peak_mib": None} for name, value in ms.items()}

    def one(**ms):
        return {"parts": parts(**ms), "covers": "all", "note": "", "error": ""}

    broken = {"parts": {}, "covers": "–", "note": "", "error": "ValueError: no such layer"}
    found = {"SGD": one(step=2.0), "fisherfn": one(step=4.0, statistics=6.0, inverses=20.0), "Other": broken}
    refresh = parts(kfac=3.0, lanczos=12.0)
    return {"about": {"torch": "2"}, "workloads": {"AE_MNIST": {"contenders": found, "refresh": refresh, "exact": {}}}}


def test_tables_are_in_sgd_steps_and_hide_no_failure():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.mean_steps(numbers()).splitlines()]
    # 2 + 3/10 + 10/100 SGD steps, and with the trainers' cycle 2 + 3/5 + 10/10
    assert rows[0] == ["average time per step, relative to SGD", "MNIST autoencoder"]
    assert rows[2:] == [
        ["SGD", "1.00"], ["fisherfn", "**2.40**"], ["Other", "–"], ["fisherfn (5, 10)", "**3.60**"],
    ]  # fmt: skip
    parts = report.parts(numbers())
    assert "`ValueError: no such layer`" in parts
    ours = [cell.strip() for cell in parts.splitlines()[3].split("|")[1:-1]]
    assert ours == ["fisherfn", "4.0", "1.0 – 9.0", "2.00", "3.00", "10.00", "all"]
    lanczos = [cell.strip() for cell in report.refreshes(numbers()).splitlines()[-1].split("|")[1:-1]]
    assert lanczos == ["lanczos", "6.00", "4.00"]


def test_a_page_keeps_its_text_around_the_tables():
    page = "one\n<!-- table: a -->\nx\n<!-- end of table -->\ntwo\n<!-- table: b -->\n<!-- end of table -->\n"
    filled = report.filled(page, {"a": "A", "b": "B"})
    assert filled == page.replace("x\n", "A\n").replace("b -->\n", "b -->\nB\n")
    assert report.filled(filled, {"a": "A", "b": "B"}) == filled
    with pytest.raises(ValueError, match="no place for c"):
        report.filled(page, {"a": "A", "b": "B", "c": "C"})


# ------------------------------------------------------------------------------------------------------------- peers


def mlp(bias=True):
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.ReLU(), nn.Linear(5, 3, bias=bias))


def cnn():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2, stride=2), nn.Flatten(), nn.Linear(8, 3))


def images():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2))


def pose(build, labels, shape=(4,)):
    """A float64 problem of 7 examples."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build().double()
    x = torch.randn(7, *shape, generator=generator, dtype=torch.float64)
    outputs = net(x)
    y = torch.randint(3, (7,), generator=generator) if labels else (outputs > 0).double()
    return posed(net, (x, y), ff.Categorical() if labels else ff.Bernoulli())


PROBLEMS = {
    "labels": lambda: pose(mlp, True),
    "binary": lambda: pose(mlp, False),
    "convolutions": lambda: pose(cnn, True, (2, 6, 6)),
    "images": lambda: pose(images, False, (2, 6, 6)),
}


def ours(one, fisher, damping):
    """Precondition the gradient by K-FAC with factored damping."""
    ng = ff.natural_gradient(
        one.model, one.params, one.batch[0], likelihood=one.likelihood, fisher=fisher, context=one.context
    )
    return list(ng(one.params, ng.stats(one.params, one.batch, context=one.context), damping=damping).values())


def flat(nat):
    return [tensor for tensors in nat.values() for tensor in tensors]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("posing", PROBLEMS)
@pytest.mark.parametrize(("name", "tolerance"), [("curvlinops", 1e-8), ("nngeometry", 1e-6)])
def test_peers_with_factored_damping_find_our_natural_gradient(name, tolerance, posing):
    """The second adds its damping in single precision."""
    pytest.importorskip(name)
    one, damping = PROBLEMS[posing](), 0.3
    adapter = getattr(peers, name)(one, fisher="empirical", damping=damping)
    expected = ours(one, "empirical", damping)
    for theirs, mine in zip(flat(adapter.natural_gradient()), expected, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.filterwarnings("ignore")
def test_backpack_finds_our_natural_gradient_where_there_are_no_biases():
    """It takes weight and bias apart."""
    pytest.importorskip("backpack")
    one, damping = pose(lambda: mlp(bias=False), True), 0.3
    adapter = peers.backpack(one, fisher="type2", damping=damping)
    expected = ours(one, "type2", damping)
    for theirs, mine in zip(flat(adapter.natural_gradient()), expected, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_singd_ends_in_the_damped_inverses_that_it_is_to_replace():
    """`K Kᵀ → (A + λI)⁻¹` and `C Cᵀ → (G + λI)⁻¹`: every factor damped by λ."""
    pytest.importorskip("singd")
    one, damping = pose(mlp, True), 0.3
    adapter = peers.singd(one, damping=damping, rate=0.5)
    for _ in range(400):
        adapter.contender.parts.step_with_statistics()
    ng = ff.natural_gradient(
        one.model, one.params, one.batch[0], likelihood=one.likelihood, fisher="empirical", context=one.context
    )
    stats = ng.stats(one.params, one.batch, context=one.context)
    for key, layer in zip(["0", "2"], adapter.natural_gradient().values(), strict=True):
        tap = stats.tap(key)
        A = torch.einsum("knti,kntj->ij", tap.a, tap.a) / 7 + damping * torch.eye(tap.a.shape[-1])
        G = torch.einsum("ksnti,ksntj->ij", tap.g, tap.g) / 7 + damping * torch.eye(tap.g.shape[-1])
        grad = torch.cat([stats.grads[f"{key}.weight"], stats.grads[f"{key}.bias"].unsqueeze(1)], 1)
        expected = torch.linalg.solve(G, grad) @ torch.linalg.inv(A)
        theirs = torch.cat([layer[0], layer[1].unsqueeze(1)], 1)
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*peers.PEERS, *optimizers.OPTIMIZERS])
def test_a_contender_moves_every_weight_and_stays_finite(name, monkeypatch):
    pytest.importorskip("singd"), pytest.importorskip("pytorch_optimizer")
    for module in (peers, optimizers):
        monkeypatch.setattr(module, "RATE", 1e-3)
    one = pose(mlp, True)
    nets = []
    training = type(one).training
    monkeypatch.setattr(type(one), "training", lambda self: nets.append(training(self)) or nets[-1])
    contender = contenders.attempted((peers.PEERS | optimizers.OPTIMIZERS)[name], one)
    assert not contender.error
    for part, step in contender.calls().items():
        before = [p.detach().clone() for p in nets[0].net.parameters()]
        step()
        after = list(nets[0].net.parameters())
        assert all(p.isfinite().all() for p in after)
        if "step" in part:
            assert all(not torch.equal(p, old) for p, old in zip(after, before, strict=True))


def test_the_error_of_a_failed_peer_is_recorded():
    def fails(_):
        raise ValueError("no such layer\nand more")

    assert contenders.attempted(fails, None) == Contender(None, covers="–", error="ValueError: no such layer")


def test_layers_that_are_not_covered_are_named():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.ConvTranspose2d(2, 1, 3))
    assert contenders.coverage(net, (nn.Conv2d,)) == "not BatchNorm2d, ConvTranspose2d"
    assert contenders.coverage(net[:1], (nn.Conv2d,)) == "all"


def test_labels_are_drawn_from_the_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        binary = peers.drawn(torch.full((4000, 2), math.log(3)), torch.zeros(1, 2))
        labels = peers.drawn(torch.tensor([[0.0, math.log(3)]]).expand(4000, 2), torch.zeros(1))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    # a standard deviation is 0.005 and 0.007
    assert abs(binary.mean() - 0.75) < 0.02 and abs(labels.double().mean() - 0.75) < 0.03


def test_without_a_compiler_plain_steps_are_timed_and_the_error_is_shown(monkeypatch):
    def no_compiler(fn, **options):
        def failing(*args, **kwargs):
            raise RuntimeError("no C++ compiler")

        return failing

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(benchmark, "problem", small)
    found = benchmark.measure("cuda_convnet", benchmark.BenchmarkConfig(rounds=1, batch_size=2))
    assert "RuntimeError: no C++ compiler" in found["contenders"]["fisherfn, compiled"]["error"]
    assert found["contenders"]["fisherfn"]["parts"] and list(found["exact"]) == [FORWARD_BACKWARD, IN_TOTAL, GRAM]
