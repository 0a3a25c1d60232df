"""The cost model of data-parallel steps: published sizes of nets, and cases that can be computed by hand."""

import pytest

import scaling
from common import cost_model
from common.cost_model import Cadence, Compute, Network, Shape, added, memory, seconds, share, speed_up, traffic

SMALL = {"a": Shape(1, 2, 3), "b": Shape(2, 4, 1), "words": Shape(1, 2, 5, True)}
COMPUTE = Compute(1.0, 2.0, 4.0, 0.5)
IDEAL = Network(1e30, 0.0)


@pytest.mark.parametrize(("net", "parameters"), [(scaling.resnet50, 25_557_032), (scaling.gpt2, 124_439_808)])
def test_the_shapes_have_the_published_number_of_parameters(net, parameters):
    shapes, others = net()
    assert others + sum(k * o * i for k, o, i, _ in shapes.values()) == parameters


def test_payloads_are_one_number_per_parameter_and_triangles():
    sent = traffic(SMALL, 8192, itemsize=4, others=7)
    assert sent.gradient == 4 * (7 + 6 + 8 + 10)
    assert sent.moments == sent.inverses == 4 * ((6 + 3) + 2 * (1 + 10) + (5 + 3))
    assert traffic(SMALL, 2).moments == 4 * ((3 + 3) + 2 * (1 + 4) + (5 + 3))  # wide factors are diagonals
    assert memory(SMALL, 8192)["factors"] == 4 * ((9 + 4) + 2 * (1 + 16) + (5 + 4))


def test_a_step_takes_its_parts():
    sent, network = traffic(SMALL, 8192), Network(100.0, 0.25)
    assert added(40, 4, network) == pytest.approx(2 * (40 * 3 / 4 / 100 + 2 * 0.25))
    assert added(40, 1, network) == 0
    assert seconds(COMPUTE, sent, 1.0, 1, network, Cadence(2, 4)) == 1.0 + 0.5 + 2.0 / 2 + 4.0 / 4
    messages = [added(size, 4, network) for size in (4 * cost_model.AGREEMENT, *sent)]
    expected = 2.5 + 0.25 * 1.0 + messages[0] + messages[1] + messages[2] / 2 + messages[3] / 4
    assert seconds(COMPUTE, sent, 0.25, 4, network, Cadence(2, 4)) == pytest.approx(expected)


def test_owners_that_precondition_hold_their_inverses_and_send_one_more_gradient():
    assert memory(SMALL, 8192, owners=2)["inverses"] == 4 * 2 * (1 + 16)  # the other rank has 9 + 4 and 5 + 4
    assert memory(SMALL, 8192, owners=2)["factors"] == memory(SMALL, 8192)["factors"]
    sent, network = traffic(SMALL, 8192), Network(100.0, 0.25)
    messages = [added(size, 4, network) for size in (4 * cost_model.AGREEMENT, *sent, 0)]
    expected = 1.0 + 0.25 * 0.5 + 2.0 / 2 + 0.25 * 4.0 / 4 + messages[0] + 1.5 * messages[1] + messages[2] / 2
    found = seconds(COMPUTE, sent, 0.25, 4, network, Cadence(2, 4), owner=True)
    assert found == pytest.approx(expected + messages[4] / 4)
    assert speed_up(COMPUTE, SMALL, 8192, 8, IDEAL, owner=True) > speed_up(COMPUTE, SMALL, 8192, 8, IDEAL)


def test_the_speed_up_is_ideal_without_inversions_and_messages():
    assert speed_up(Compute(1.0, 2.0, 0.0, 0.5), SMALL, 8192, 8, IDEAL) == pytest.approx(8)
    assert speed_up(COMPUTE, SMALL, 8192, 2, IDEAL) > 2  # inversions are shared out, batches grow
    assert share(SMALL, 8192, 1) == 1.0
    work = (27 + 8, 2 * (1 + 64), 8)
    assert share(SMALL, 8192, 2) == work[1] / sum(work)


def test_it_predicts_and_draws(tmp_path, capsys):
    page = tmp_path / "page.md"
    (tmp_path / "images").mkdir()
    page.write_text(f"before\n{scaling.START}\nold\n{scaling.END}\nafter\n")
    scaling.main(scaling.ScalingConfig(page=str(page)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 8 + 1 + 2 + 2 + 1 + 2 + 2 and "old" not in page.read_text()
    assert page.read_text().endswith(f"{scaling.END}\nafter\n")
    assert (tmp_path / "images" / "scaling.png").stat().st_size > 10_000


def test_it_measures_one_process():
    lines = scaling.measured(scaling.ScalingConfig(measure=1, batch_size=2), "cpu")
    assert lines[0].startswith("1 ranks") and len(lines) == 4 and "predicted" not in "".join(lines)
