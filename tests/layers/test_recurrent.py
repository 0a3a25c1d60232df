"""Recurrent nets: cells written with linear layers work, torch's fused ones are refused by name."""

import pytest
from torch import nn

import fisherfn as ff
from tests import zoo
from tests.layers.checks import check
from tests.nets import Cell, Readout
from tests.oracles import close, fisher_matrix
from tests.zoo import from_net


@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_a_cell_written_with_linear_layers_is_used_once_a_step(fisher):
    problem = from_net(nn.Sequential(Cell(2, 3), Readout(2)), (3, 4, 2), "categorical")
    run = check(problem, {"0.inner": "linear", "0.outer": "linear"}, fisher)
    for key, width in (("0.inner", 4), ("0.outer", 2)):
        assert run.stats.tap(key).a.shape == (1, 3, 4, width)
        assert "used 4 times" in str(run.ng.layout)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda f: f.__name__)
def test_fused_cells_are_refused_by_name(fused, training):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = fused(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    with zoo.as_installed(), pytest.raises(ff.errors.CoverageError) as caught:
        from_net(Fused().train(training), (3, 4, 2), "categorical").build()
    message = str(caught.value).lower()
    assert fused.__name__.lower() in message and ("linear" in message or "cell" in message), "what is it, what to do"


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell], ids=lambda c: c.__name__)
def test_torchs_single_cells_are_exact_or_refused(cell):
    class Unrolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(2, 2)

        def forward(self, x):
            state = None
            for x_t in x.unbind(1):
                state = self.cell(x_t, state)
            return Readout(2)(state[0] if isinstance(state, tuple) else state)

    problem = from_net(Unrolled(), (3, 3, 2), "categorical")
    try:
        run = zoo.sampled(problem, "type2")
    except ff.errors.CoverageError as error:
        assert "cell" in str(error).lower()
        return
    close(run.ng.fisher(run.stats).dense(), fisher_matrix(problem, "type2"))
