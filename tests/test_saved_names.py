"""Files pickled before 0.1.0 name classes by module: these names stay, and what is pickled comes back whole."""

import importlib
import pickle

import pytest
import torch

import fisherfn as ff
from tests import zoo

NAMES = (
    "fisherfn.natgrad.NaturalGradient",
    "fisherfn.natgrad.State",
    "fisherfn.types.Info",
    "fisherfn.stats.statistics.Stats",
    "fisherfn.stats.statistics.LayerStats",
    "fisherfn.stats.layout.Layout",
    "fisherfn.stats.layout.Block",
    "fisherfn.stats.layout.Use",
    "fisherfn.stats.steps.Place",
    "fisherfn.stats.steps.Step",
    "fisherfn.layers.conv.Facts",
    "fisherfn.layers.conv_transpose.Facts",
    "fisherfn.layers.einsum.Axes",
    "fisherfn.layers.embedding.Facts",
    "fisherfn.layers.fallback.Facts",
    "fisherfn.layers.norm.Facts",
    "fisherfn.likelihoods.Bernoulli",
    "fisherfn.likelihoods.Callback",
    "fisherfn.likelihoods.Categorical",
    "fisherfn.likelihoods.Gaussian",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_name_is_a_class(name):
    module, _, attribute = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_the_saved_fields_of_a_use_are_read_by_position():
    """A use of versions before 0.1.0 is a tuple of nine, the configuration first."""
    use = zoo.pick("conv").build().layout.layers[0].uses[0]
    assert len(use) == 9 and use[0] is use.config and type(use)(*use) == use


def test_state_and_statistics_are_pickled_whole():
    problem = zoo.pick("conv")
    ng = problem.build(fisher="type2")
    stats = ng.stats(problem.params, problem.batch)
    state = ng.invert(ng.update(ng.init(problem.params), stats)[0])[0]
    again, saved = pickle.loads(pickle.dumps((state, stats)))
    assert saved.layout == ng.layout and isinstance(again, ff.State)
    nat, expected = ng.precondition(again, saved), ng.precondition(state, stats)
    assert all(torch.equal(nat[name], leaf) for name, leaf in expected.items())
