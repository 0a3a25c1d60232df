"""One weight as embedding and output layer: one block of two uses, against brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherfn as ff
from tests import oracles, zoo
from tests.layers.checks import check_chunks, check_fisher, check_gradients, kinds, normal
from tests.nets import Language
from tests.oracles import close
from tests.zoo import from_net, sampled


class Twice(nn.Module):
    """The embedding used for two inputs, the output layer on the mean alone."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)

    def forward(self, ids):
        h = self.words(ids) * torch.tanh(self.words(ids.flip(1)))
        return F.linear(torch.tanh(h).mean(1), self.words.weight)


class HeadFirst(nn.Module):
    """The output layer's product before the embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(4, 3)

    def forward(self, ids):
        scores = F.linear((ids.unsqueeze(-1) == torch.arange(3)).double(), self.words.weight)
        return scores.mean(1) + self.words(ids).square().sum((1, 2)).unsqueeze(1) * torch.arange(4)


NETS = {
    "bias": (lambda: Language(), (3, 3), 4),
    "no bias": (lambda: Language(bias=False), (3, 3), 4),
    "padding": (lambda: padded(Language(bias=False)), (4, 3), 4),
    "twice": (lambda: Twice(), (3, 4), 5),
    "head first": (lambda: HeadFirst(), (3, 2), 4),
}


def padded(net):
    net.words.padding_idx = 1
    return net


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fisher", zoo.FISHERS)
def test_a_tied_embedding_is_one_exact_block(name, fisher):
    make, shape, vocabulary = NETS[name]
    problem = from_net(make(), shape, "categorical", vocabulary=vocabulary, blocks={"any": ()})
    run = sampled(problem, fisher)
    assert kinds(run.ng)["words"] == "tied embedding" and not run.ng.layout.fallbacks
    check_fisher(problem, run, fisher)
    check_gradients(problem, run.ng, run.stats)
    check_chunks(problem, run)


def test_the_bias_of_the_output_layer_is_a_block_of_its_own():
    problem = from_net(Language(), (3, 3), "categorical", vocabulary=4)
    assert kinds(problem.build())["head.bias"] == "elementwise"


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_kfac_gives_both_uses_their_size(size):
    """A small embedding has small inputs of the output layer, and far smaller output-gradients: the trace is kept."""
    problem = from_net(Language(bias=False), (6, 3), "categorical", vocabulary=4)
    small = {name: size * leaf if name == "words.weight" else leaf for name, leaf in problem.params.items()}
    problem = zoo.replace(problem, params=small)
    run = sampled(problem, "type2", method="kfac")
    state, _ = run.ng.update(run.ng.init(problem.params), run.stats)
    at = oracles.positions(problem.params, ("words.weight",))
    exact = oracles.fisher_matrix(problem, "type2")[at[:, None], at]
    assert float(run.ng.fisher_error(state, run.stats)["words"]) < 0.9
    zeros = {name: torch.zeros_like(leaf) for name, leaf in problem.params.items()}
    units = torch.eye(12, dtype=torch.float64).reshape(12, 4, 3)
    trace = sum(float((run.ng.matvec(state, zeros | {"words.weight": e})["words.weight"] * e).sum()) for e in units)
    assert 0.3 < trace / float(exact.trace()) < 3


def test_a_bias_that_the_head_does_not_own_and_a_third_kind_of_use_fall_back():
    def model(p, ids):
        h = F.embedding(ids, p["w"]).mean(1)
        return F.linear(torch.tanh(h), p["w"]) + (h @ torch.tanh(p["w"]).T)

    params, ids = {"w": normal(4, 3)}, torch.tensor([[0, 1], [2, 3], [1, 1]])
    problem = zoo.from_model(model, params, ids, "categorical", zoo.generator(), {})
    run = sampled(problem, "type2")
    assert kinds(run.ng) == {"w": "fallback"}
    close(run.ng.fisher(run.stats).dense(), oracles.fisher_matrix(problem, "type2"))


def test_models_together_under_vmap_are_the_single_ones():
    problem = from_net(Language(), (3, 3), "categorical", vocabulary=4)
    ng = problem.build(method="kfac", samples=2)
    noise = ng.noise(problem.batch, zoo.generator())
    many = {name: torch.stack([p, 0.5 * p]) for name, p in problem.params.items()}

    def step(params):
        return ng.step(params, ng.init(params, damping=0.1), problem.batch, noise=noise)[0]

    together = torch.vmap(step)(many)
    for m in range(2):
        close({name: leaf[m] for name, leaf in together.items()}, step({name: p[m] for name, p in many.items()}))


def test_a_large_vocabulary_has_no_matrix_and_no_weight_per_example(monkeypatch):
    """50 257 words: a dense factor would be 20 GB, the gradients of 4 examples 100 million numbers."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, leaf.numel() if isinstance(leaf, torch.Tensor) else 0)
            return out

    words, width, examples, length = 50_257, 128, 4, 2
    net = Language(words, width, length, bias=False).float()
    ids = torch.randint(words, (examples, length), generator=zoo.generator())
    model, params, context = ff.functional(net)
    ng = ff.natural_gradient(model, params, ids, likelihood=ff.Categorical(), context=context)
    assert kinds(ng)["words"] == "tied embedding"
    with Largest():
        state = ng.init(params, damping=0.1)
        _, state, info = ng.step(params, state, (ids, ids), generator=zoo.generator(), context=context)
    ff.check(info)
    assert largest <= 2 * words * width, f"{largest:,} numbers in one tensor"
