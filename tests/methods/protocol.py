"""Common parts of the tests over all methods: the methods by name, the cases, and a few plain iterations."""

import functools
import inspect

import pytest
import torch
from torch.utils import _pytree as pytree

import fisherfn as ff
from tests import zoo

METHODS = pytest.mark.parametrize("method", sorted(ff.METHODS))
IDS = [
    "mlp-categorical",
    "sequence-pooled",
    "scale-matrix",
    "patches",
    "language",
    "conv-groups",
    "conv-transpose",
    "tokens",
]
"""Names of the nets in the zoo that every method meets."""

TRAINED = [name for name in ff.METHODS if name != "kl_optimal"]
"""The methods of whole training runs and compiled steps, which are slow: kpsvd stands for kl_optimal (same state)."""

PROBLEMS = pytest.mark.parametrize("id", IDS)
SHAPED_BY_BATCH = {"exactNG", "twolevel_kfac"}  # their leaves follow the batch


@functools.cache
def build(id, method, samples=1):
    """Problem and build, made once for all tests: neither changes."""
    problem = zoo.pick(id)
    return problem, problem.build(method=method, samples=samples)


@functools.cache
def sampled(id, method):
    """Problem, build and statistics, made once for all tests: none of them changes."""
    problem = zoo.pick(id)
    return problem, zoo.sampled(problem, method=method)


def brief(method):
    """The method with few iterations, where the graph is looked at and not the result."""
    few = {"iterations": 2} if "iterations" in inspect.signature(ff.METHODS[method]).parameters else {}
    return ff.METHODS[method](**few)


def steps(problem, ng, count=3, **hyper):
    """States, steps and infos of a few plain iterations."""
    params, state, trace = problem.params, ng.init(problem.params, **hyper), []
    for k in range(count):
        nat, state, info = ng.step(params, state, problem.batch, generator=zoo.generator(k), inner=True)
        params = ff.tree.add(params, nat, scale=-0.01)
        trace.append((nat, state, info))
    return trace


def structure(tree):
    return pytree.tree_structure(tree)


def at(tree, m):
    return pytree.tree_map(lambda leaf: leaf[m], tree)


def stack(trees):
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
