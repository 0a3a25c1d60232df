"""Recurrent nets: cells, and torch's fused nets, whose own kernels are the oracle, one example at a time."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check, check_chunks, check_fisher, check_vmap, kinds, normal, same, tapped_gradients
from tests.nets import Cell, Readout
from tests.oracles import close, fisher_matrix
from tests.zoo import from_net, sampled


@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_a_cell_written_with_linear_layers_is_used_once_a_step(fisher):
    problem = from_net(nn.Sequential(Cell(2, 3), Readout(2)), (3, 4, 2), "categorical")
    run = check(problem, {"0.inner": "linear", "0.outer": "linear"}, fisher)
    for key, width in (("0.inner", 4), ("0.outer", 2)):
        assert run.stats.tap(key).a.shape == (1, 3, 4, width)
        assert "used 4 times" in str(run.ng.layout)


class Unrolled(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell(2, 2)

    def forward(self, x):
        state = None
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
        return Readout(2)(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell], ids=lambda c: c.__name__)
def test_torchs_single_cells_are_exact(cell):
    problem = from_net(Unrolled(cell), (3, 3, 2), "categorical")
    run = sampled(problem, "type2")
    assert kinds(run.ng) == {"cell.weight_ih": "linear", "cell.weight_hh": "linear"}
    close(run.ng.fisher(run.stats).dense(), fisher_matrix(problem, "type2"))


# ----------------------------------------------------------------------------------------------- whole nets in one call


class Fused(nn.Module):
    """Use all outputs and all final states."""

    def __init__(self, make, time_first=False, start=False, **options):
        super().__init__()
        self.net, self.time_first = make(2, 3, batch_first=not time_first, **options), time_first
        directions = 1 + self.net.bidirectional
        if start:  # an initial state that is trained
            self.start = nn.Parameter(torch.zeros(self.net.num_layers * directions, 1, 3))

    def forward(self, x):
        start = self.start.expand(-1, len(x), -1).contiguous() if hasattr(self, "start") else None
        start = (start, torch.tanh(start)) if start is not None and isinstance(self.net, nn.LSTM) else start
        out, final = self.net(x.transpose(0, 1) if self.time_first else x, start)
        finals = final if isinstance(final, tuple) else (final,)
        out = out.transpose(0, 1) if self.time_first else out
        return Readout(2)(torch.cat([out.flatten(1), *(each.transpose(0, 1).flatten(1) for each in finals)], 1))


FUSED = {
    "lstm": lambda: Fused(nn.LSTM),
    "gru": lambda: Fused(nn.GRU),
    "rnn": lambda: Fused(nn.RNN),
    "rnn relu": lambda: Fused(nn.RNN, nonlinearity="relu"),
    "time first": lambda: Fused(nn.LSTM, time_first=True),
    "time first both": lambda: Fused(nn.GRU, time_first=True, bidirectional=True),
    "no bias": lambda: Fused(nn.LSTM, bias=False),
    "two layers": lambda: Fused(nn.GRU, num_layers=2),
    "both directions": lambda: Fused(nn.LSTM, bidirectional=True),
    "two layers both directions": lambda: Fused(nn.RNN, num_layers=2, bidirectional=True, bias=False),
    "projected": lambda: Fused(nn.LSTM, proj_size=2, bidirectional=True),
    "trained start": lambda: Fused(nn.GRU, start=True),
    "trained start lstm": lambda: Fused(nn.LSTM, start=True, time_first=True),
}


CASES = [(name, "type2") for name in FUSED] + [("time first both", "mc"), ("projected", "empirical")]


@pytest.mark.parametrize(("name", "fisher"), CASES)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_fused_net_is_exact_in_linear_layers(name, fisher):
    problem = from_net(FUSED[name](), (3, 4, 2), "categorical", blocks={"any": ()})
    run = sampled(problem, fisher)
    weights = [key for key in problem.params if key.startswith("net.weight")]
    start = {"start": "elementwise"} if "start" in problem.params else {}
    assert kinds(run.ng) == dict.fromkeys(weights, "linear") | start
    for key in weights:  # every step of every example, the bias of this matrix as a column
        width = problem.params[key].shape[1] + (name not in {"no bias", "two layers both directions"})
        width -= "weight_hr" in key
        assert run.stats.tap(key).a.shape == (1, 3, 4, width)
    check_fisher(problem, run, fisher)
    check_chunks(problem, run)
    close(run.stats.outputs, problem.model(problem.params, problem.x))
    each = oracles.columns(problem, "empirical").T * len(problem.x) ** 0.5  # torch has no rule for vmap here
    found = {
        name: leaf for key in weights + list(start) for name, leaf in tapped_gradients(run.ng, run.stats, key).items()
    }
    for n in range(len(problem.x)):
        expected = oracles.unvec(problem.params, each[n])
        same({name: leaf[n] for name, leaf in found.items()}, expected, tol=1e-10)
    close(dict(run.stats.grads), oracles.mean_gradient(problem))


@pytest.mark.parametrize("traced", [1, 2, 4])
def test_as_many_examples_as_steps(traced):
    problem, traced_with = (from_net(FUSED["time first both"](), (n, 4, 2), "categorical") for n in (5, traced))
    ng = traced_with.build(fisher="empirical")
    stats = ng.stats(problem.params, problem.batch)
    close(ng.fisher(stats).dense(), fisher_matrix(problem, "empirical"))


def test_a_frozen_bias_and_a_frozen_matrix_stay_out():
    def trained(name):
        return name not in {"net.bias_ih_l0", "net.weight_hh_l0"}

    problem = from_net(FUSED["lstm"](), (3, 4, 2), "categorical", trained=trained, blocks={"any": ()})
    run = sampled(problem, "type2")
    assert kinds(run.ng) == {"net": "linear", "net.bias_hh_l0": "elementwise"}
    close(run.ng.fisher(run.stats).dense(), fisher_matrix(problem, "type2"))


@pytest.mark.parametrize("time_first", [False, True])
def test_dropout_between_the_layers_goes_with_the_examples(time_first):
    net = Fused(nn.LSTM, time_first=time_first, num_layers=2, dropout=0.5).double().train()
    x, y = normal(4, 5, 2), torch.tensor([0, 1, 1, 0])
    model, params, context = ff.functional(net)
    with zoo.as_installed(), pytest.raises(ff.errors.NoiseError, match="dropout_seeds"):
        model(params, x, context)
    context = context | {"dropout": ff.dropout_seeds(4, zoo.generator())}
    ng = ff.natural_gradient(model, params, x, likelihood=ff.Categorical(), context=context, fisher="empirical")
    assert set(kinds(ng).values()) == {"linear"}
    whole, _ = model(params, x, context)
    assert oracles.differs(whole, functional_call(net.eval(), params, (x,)), 1e-3), "nothing was dropped"
    net.train()
    for n in range(4):
        alone, _ = model(params, x[n : n + 1], context | {"dropout": context["dropout"][n : n + 1]})
        close(alone, whole[n : n + 1])
    stats = ng.stats(params, (x, y), context=context)
    parts = ng.stats(params, (x, y), context=context, chunk_size=3)
    close(ng.fisher(parts).dense(), ng.fisher(stats).dense())


def test_dropout_of_a_single_layer_needs_no_seeds():
    """torch drops between layers only, and warns about it."""
    with pytest.warns(UserWarning, match="dropout option"):
        net = Fused(nn.GRU, dropout=0.5).double().train()
    model, params, context = ff.functional(net)
    close(model(params, normal(2, 3, 2), context)[0], functional_call(net, params, (normal(2, 3, 2),)))


def test_models_together_under_vmap_are_the_single_ones():
    problem = from_net(FUSED["both directions"](), (3, 4, 2), "categorical", blocks={"any": ()})
    ng = problem.build(method="kfac", fisher="type2")

    def step(params):
        return ng.step(params, ng.init(params, damping=0.1), problem.batch)[0]

    check_vmap(step, problem.params)


def test_a_packed_sequence_is_refused_with_the_remedy():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 2), batch_first=True)
            return Readout(2)(nn.utils.rnn.pad_packed_sequence(self.net(packed)[0], batch_first=True)[0])

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError, match="lstm on a packed sequence.*padded batch"):
        from_net(Packed(), (3, 4, 2), "categorical", blocks={"any": ()}).build()
