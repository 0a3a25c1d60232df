"""The training loop alone: its order of the examples, and the randomness of each epoch."""

import pytest
import torch

import fisherfn as ff
from common.loop import Settings, Snapshot, Task, generator_of, train
from common.steps import Optimizer, Stepped

EXAMPLES = torch.arange(10.0).unsqueeze(1)


def recorded(seed):
    """Return the examples of every batch and the numbers that were drawn for it, by epoch; nothing is trained."""
    task = Task(lambda p, x, c: (x, c), lambda p, x, c: (x, c), {}, {}, ff.Gaussian(), *[(EXAMPLES, EXAMPLES)] * 2, 1)
    batches, draws = [[]], [[]]
    info = ff.Info(loss=torch.zeros(()), ok={"all": torch.tensor(True)})

    def draw(batch, generator):
        batches[-1].append(batch[0].flatten().tolist())
        draws[-1].append(float(torch.rand((), generator=generator)))
        return ()

    optimizer = Optimizer(lambda params: (), draw, lambda *given: Stepped({}, (), {}, info))
    for epoch in train(task, optimizer, Snapshot({}, {}, (), 0, 0, 0.0), Settings(3, 4, seed, progress=False)):
        if epoch.snapshot.epoch in (1, 2):
            batches.append([]), draws.append([])
    return batches, draws


def test_an_epoch_has_every_example_once_in_an_order_of_its_own_and_labels_of_its_own():
    batches, draws = recorded(seed=5)
    orders = [sum(epoch, []) for epoch in batches]
    assert [[len(batch) for batch in epoch] for epoch in batches] == [[4, 4, 2]] * 3
    assert all(sorted(order) == EXAMPLES.flatten().tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len(set(sum(draws, []))) == 9
    assert recorded(seed=5) == (batches, draws)
    other = recorded(seed=6)
    assert other[0] != batches and not set(sum(other[1], [])) & set(sum(draws, []))


def test_the_streams_of_an_epoch_are_independent():
    seeds = {
        generator_of(seed, epoch, stream).initial_seed() for seed in range(3) for epoch in range(4) for stream in (0, 1)
    }
    assert len(seeds) == 3 * 4 * 2


def test_buffers_go_on_from_step_to_step_and_a_failed_step_changes_nothing():
    """The second of three steps fails a check."""
    task = Task(lambda p, x, c: (x, c), lambda p, x, c: (x, c), {}, {}, ff.Gaussian(), *[(EXAMPLES, EXAMPLES)] * 2, 1)

    def step(params, state, batch, context, noise, index):
        info = ff.Info(loss=torch.zeros(()), ok={"all": torch.tensor(index != 1)})
        grown = {name: values[name] + len(batch[0]) for name, values in (("w", params), ("seen", context))}
        return Stepped({"w": grown["w"]}, state + 1, {"seen": grown["seen"]}, info)

    zero = torch.zeros(())
    first = Snapshot({"w": zero}, {"seen": zero}, zero, 0, 0, 0.0)
    optimizer = Optimizer(lambda params: (), lambda batch, generator: (), step)
    *_, last = train(task, optimizer, first, Settings(1, 4, progress=False))
    assert (float(last.snapshot.params["w"]), float(last.snapshot.context["seen"])) == (6, 6)  # 4 + 2 of 10 examples
    assert (float(last.snapshot.state), last.snapshot.step, last.metrics["skipped"]) == (2, 3, 1)


def test_failures_in_a_row_are_counted_across_epochs():
    """Two of three steps of an epoch fail, then the first of the next one: three in a row, as in a sweep."""
    task = Task(lambda p, x, c: (x, c), lambda p, x, c: (x, c), {}, {}, ff.Gaussian(), *[(EXAMPLES, EXAMPLES)] * 2, 1)

    def step(params, state, batch, context, noise, index):
        ok = {"all": torch.tensor(index not in (1, 2, 3))}
        return Stepped({}, (), {}, ff.Info(loss=torch.zeros(()), checks={"loss": ok["all"]}, ok=ok))

    optimizer = Optimizer(lambda params: (), lambda batch, generator: (), step)
    epochs = train(task, optimizer, Snapshot({}, {}, (), 0, 0, 0.0), Settings(3, 4, 0, progress=False))
    next(epochs), next(epochs)
    with pytest.raises(ff.errors.NonFiniteError):
        next(epochs)
