"""Invalid calls that must raise typed errors; run as a program, it prints those that raise other errors.

A program of its own, because the tests' run-time type checks would refuse these arguments before the library does.
"""

import sys

import numpy as np
import torch

import fisherfn as ff

net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
model, params, context = ff.functional(net)
x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
rng = torch.Generator().manual_seed(0)


LABELS = ff.Categorical()


def build(params=params, x=x, likelihood=LABELS, model=model, **more):
    return ff.natural_gradient(model, params, x, likelihood=likelihood, context=context, **more)


ng, other = build(), build(method="ekfac")
state, foreign = ng.init(params), other.init(params)
stats = ng.stats(params, (x, y), generator=rng, context=context)
F, implicit = ng.fisher(stats), ng.implicit_fisher(params, x, context=context)
lacking = {name: p for name, p in params.items() if name != "0.bias"}
small, small_params, small_context = ff.functional(torch.nn.Linear(4, 2))
elsewhere = build(small_params, model=small).stats(small_params, (x, y), generator=rng, context=small_context)


def of_batch(batch=(x, y), **more):
    return ng.stats(params, batch, **{"generator": rng, "context": context, **more})


CASES = {
    "a net that is none": lambda: ff.functional(None),
    "a model that is none": lambda: build(model=None),
    "params as a list": lambda: build(params=list(params.values())),
    "inputs from numpy": lambda: build(x=x.numpy()),
    "no likelihood": lambda: build(likelihood=None),
    "a likelihood's name": lambda: build(likelihood="categorical"),
    "a method that is a number": lambda: build(method=3),
    "a method not called": lambda: build(method=ff.kfac),
    "half a sample": lambda: build(samples=1.5),
    "no sample": lambda: build(samples=0),
    "a damping in words": lambda: ng.init(params, damping="1"),
    "a damping that is nan": lambda: ng.init(params, damping=float("nan")),
    "a negative damping": lambda: ng.init(params, damping=-1),
    "no ema": lambda: ng.init(params, ema=None),
    "an ema of 1": lambda: ng.init(params, ema=1.0),
    "params lacking one": lambda: ng.init(lacking),
    "inputs alone": lambda: of_batch(x),
    "a batch of three": lambda: of_batch((x, y, y)),
    "targets in words": lambda: of_batch((x, "y")),
    "no targets": lambda: of_batch((x, None)),
    "targets of half the batch": lambda: of_batch((x, y[:3])),
    "targets that are no indices": lambda: of_batch((x, y.float())),
    "inputs of another shape": lambda: of_batch((x[:, :3], y)),
    "an input from numpy": lambda: of_batch((x.numpy(), y)),
    "a seed as generator": lambda: of_batch(generator=3),
    "no generator and no noise": lambda: of_batch(generator=None),
    "noise as a list": lambda: of_batch(noise=[1]),
    "half an example a chunk": lambda: of_batch(chunk_size=1.5),
    "another Fisher": lambda: of_batch(fisher="x"),
    "no context": lambda: ng.step(params, state, (x, y), generator=rng),
    "update: another method's state": lambda: ng.update(foreign, stats),
    "update: no state": lambda: ng.update(None, stats),
    "update: no statistics": lambda: ng.update(state, None),
    "update: inputs as statistics": lambda: ng.update(state, x),
    "update: another net's statistics": lambda: ng.update(state, elsewhere),
    "invert: no state": lambda: ng.invert(None),
    "invert: another method's state": lambda: ng.invert(foreign),
    "step: another method's state": lambda: ng.step(params, foreign, (x, y), generator=rng, context=context),
    "precondition: nothing": lambda: ng.precondition(state, None),
    "precondition: a tree lacking one": lambda: ng.precondition(state, lacking),
    "precondition: a list": lambda: ng.precondition(state, list(params.values())),
    "precondition: another method's state": lambda: ng.precondition(foreign, params),
    "matvec: nothing": lambda: ng.matvec(state, None),
    "fisher: no statistics": lambda: ng.fisher(None),
    "fisher: another structure": lambda: ng.fisher(stats, "x"),
    "fisher: times a tree lacking one": lambda: F @ lacking,
    "fisher: a negative damping": lambda: F.solve(params, -1.0),
    "fisher: a damping in words": lambda: F.solve(params, "a"),
    "fisher: another block": lambda: F.block("nope"),
    "fisher_error: another method's state": lambda: ng.fisher_error(foreign, stats),
    "implicit: inputs of another shape": lambda: ng.implicit_fisher(params, x[:, :2], context=context),
    "implicit: a tree lacking one": lambda: implicit.solve(lacking, 1.0),
    "implicit: no iteration": lambda: implicit.solve(params, 1.0, iterations=0),
    "clip: a negative rate": lambda: ff.kl_clip(params, torch.tensor(1.0), lr=-1, kl_bound=1),
    "clip: not measured": lambda: ff.kl_clip(params, (), lr=1, kl_bound=1),
    "clip: nothing": lambda: ff.kl_clip(None, torch.tensor(1.0), lr=1, kl_bound=1),
    "check: nothing": lambda: ff.check(None),
    "noise: no generator": lambda: ng.noise((x, y), None),
    "tree: unlike trees": lambda: ff.tree.add(params, lacking),
    "seeds: fewer than none": lambda: ff.dropout_seeds(-1, rng),
    "seeds: no generator": lambda: ff.dropout_seeds(3, None),
    "a negative variance": lambda: ff.Gaussian(-1.0),
    "iterations in words": lambda: ff.kpsvd(iterations="3"),
    "no iteration": lambda: ff.kpsvd(iterations=0),
    "fit: no loader": lambda: ng.fit(params, None),
    "fit: no batch": lambda: ng.fit(params, []),
    "solve: no tree": lambda: ff.conjugate_gradients(lambda v: v, None, iterations=1),
    "scores: no stats": lambda: ff.influence_scores(params, params),
    "gradients of examples: no stats": lambda: ff.example_gradients(params),
    "no sweep": lambda: ff.kl_optimal(iterations=0),
    "no damping of the sweeps": lambda: ff.kl_optimal(relative_damping=0.0),
    "a fine method's name": lambda: ff.two_level("kfac"),
    "no vector": lambda: ff.two_level(vectors=0),
    "exact: another structure": lambda: ff.exact("x"),
}
ALLOWED = {
    "a damping from numpy": lambda: ng.init(params, damping=np.float32(0.1)),
    "a damping that is whole": lambda: ng.init(params, damping=1),
    "a batch as a list": lambda: of_batch([x, y]),
    "chunks from numpy": lambda: of_batch(chunk_size=np.int64(3)),
}


def untyped():
    """The cases that raised nothing, or something else than a typed error; and what is allowed and raised."""
    for name, call in CASES.items():
        try:
            call()
        except ff.FisherfnError:
            continue
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            yield f"{name}: nothing"
    for name, call in ALLOWED.items():
        try:
            call()
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {error}"


if __name__ == "__main__":
    found = list(untyped())
    print("\n".join(found))
    sys.exit(bool(found))
