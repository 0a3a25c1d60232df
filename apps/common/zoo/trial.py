"""One net of the zoo in one mode: is it built, how much of it is in layers, is a step right, and what does it cost.

Times are CPU times of one thread, because other processes share the machine: the median of interleaved repeats. (The
clock of the process is coarse where its CPU time is limited.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fisherfn as ff
from common.zoo.nets import BATCH, Problem, make

MODES = ("eval", "train")
EVERY_UPDATE, EVERY_INVERT = 5, 10
SECONDS = 3.0
"""CPU time for the repeats of a net in one mode."""
FEWEST, MOST = 2, 15
"""Repeats, whatever they take."""
LEAST = 2**18
"""Bytes that a forward and backward pass has to hold for its memory to be measured: a system counts in pages."""


@dataclass
class Result:
    """Findings for a net in one mode.

    Attributes:
        name: `source/net`.
        mode: "eval" or "train".
        built: whether `ff.natural_gradient` took the net.
        error: type of the error that refused it, or that came later.
        typed: whether that error is one of the library's own.
        message: its first line.
        cause: why it was refused, in one word.
        entries: numbers in the parameters that the outputs depend on.
        in_layers: those of them that are in layers.
        tensors: parameters that the outputs depend on.
        tensors_in_layers: those of them that are in layers.
        causes: one-word causes of the parameters outside all layers, with their number of entries.
        one_by_one: whether the fallback runs example by example.
        gradient_error: the largest error of a parameter's gradient against autograd's, relative.
        sound: whether a K-FAC step was finite and a direction of descent.
        cost: time of a step with statistics every 5 and inverses every 10 steps, in forward and backward passes.
        pass_ms: milliseconds of a forward and backward pass.
        memory: most memory held during a step with statistics and inverses, in that of a forward and backward pass.
        state: numbers in the state, per number in the parameters.
        build_seconds: time of the build.
    """

    name: str
    mode: str
    built: bool = False
    error: str = ""
    typed: bool = True
    message: str = ""
    cause: str = ""
    entries: int = 0
    in_layers: int = 0
    tensors: int = 0
    tensors_in_layers: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    one_by_one: bool = False
    gradient_error: float | None = None
    sound: bool | None = None
    cost: float | None = None
    pass_ms: float | None = None
    memory: float | None = None
    state: float | None = None
    build_seconds: float | None = None


def try_net(name: str, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Try a net in both modes; results as plain dicts."""
    torch.set_num_threads(1)
    return [dataclasses.asdict(try_mode(name, mode, seconds)) for mode in MODES]


def try_mode(name: str, mode: str, seconds: float = SECONDS) -> Result:
    """Try a net in one mode; an error is part of the result."""
    result = Result(name, mode)
    try:
        _fill(result, make(name), mode, seconds)
    except Exception as error:  # whatever a net does is a finding
        result.error, result.typed = type(error).__name__, isinstance(error, ff.FisherfnError)
        result.message = str(error)
        result.cause = word(error)
    return result


def word(error: Exception) -> str:
    """Return one word for the cause of an error."""
    said = str(error)
    for sign, cause in (
        (" seeds: its input", "dropout"),
        ("branches on a random number", "layer-drop"),
        ("the fused", "fused-recurrence"),
        ("autograd.Function", "autograd-function"),
        ("couples the examples", "batch-norm"),
        ("batch norm", "batch-norm"),
        ("global generator", "random"),
        ("in place", "in-place"),
        ("compare the examples", "coupled"),
        ("changed its", "state"),
        ("must return one tensor", "outputs"),
        ("and not on", "batch-size"),
        ("differentiates", "autograd"),
    ):
        if sign in said:
            return cause
    return type(error).__name__.removesuffix("Error").lower()


def _fill(result: Result, problem: Problem, mode: str, seconds: float) -> None:
    _settle(problem)
    net = problem.net.train(mode == "train")
    batch = (problem.x, problem.y)
    model, params, context = ff.functional(net)
    if mode == "train":
        context = context | {"dropout": ff.dropout_seeds(BATCH, torch.Generator().manual_seed(1))}
    began = time.thread_time()
    ng = ff.natural_gradient(model, params, problem.x, likelihood=problem.likelihood, context=context, unused="ignore")
    result.built, result.build_seconds = True, time.thread_time() - began
    _coverage(result, ng.layout)
    generator = torch.Generator().manual_seed(2)
    stats = ng.stats(params, batch, generator=generator, context=context)
    truth = gradients(model, params, batch, context, problem.likelihood)
    result.gradient_error = relative_error(stats.grads, truth)
    del stats
    state = ng.init(params, damping=0.1)
    nat, state, info = ng.step(params, state, batch, generator=generator, context=context, inner=True)
    finite = all(bool(torch.isfinite(leaf).all()) for leaf in nat.values())
    descends = float(ff.tree.dot(truth, nat)) > 0 if finite else False
    result.sound = finite and descends and all(bool(ok) for ok in info.ok.values())
    numbers = sum(leaf.numel() for leaf in ff.tree.leaves((state.factors, state.inverses)) if isinstance(leaf, Tensor))
    result.state = numbers / sum(p.numel() for p in params.values())
    del nat, truth, info

    def forward_backward() -> None:
        outputs = _outputs(_run(net, problem.x))
        problem.likelihood.nll(outputs, problem.y).mean().backward()
        net.zero_grad()

    def step(update: bool, invert: bool) -> Callable[[], Any]:
        return lambda: ng.step(
            params, state, batch, generator=generator, context=context, update=update, invert=invert, inner=True
        )

    calls = {"pass": forward_backward, "plain": step(False, False), "update": step(True, False)}
    calls["invert"] = step(True, True)
    times = interleaved(calls, seconds)
    both = EVERY_INVERT // EVERY_UPDATE
    cycle = (EVERY_INVERT - both) * times["plain"] + (both - 1) * times["update"] + times["invert"]
    result.pass_ms = 1e3 * times["pass"]
    result.cost = cycle / EVERY_INVERT / times["pass"] if times["pass"] else None
    passed, taken = peak_bytes(forward_backward), peak_bytes(calls["invert"])
    result.memory = taken / passed if passed >= LEAST and taken else None


def _settle(problem: Problem) -> None:
    """Give batch norm the statistics of the batch, as training would; with those of a new net, activations explode."""
    norms = [module for module in problem.net.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            _run(problem.net.train(), problem.x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _coverage(result: Result, layout: ff.Layout) -> None:
    sizes = {name: math.prod(shape) for name, shape in layout.shapes}
    inside = [name for block in layout.layers for name in block.names]
    used = [name for name in layout.names if name not in layout.unused]
    result.entries, result.tensors = sum(sizes[name] for name in used), len(used)
    result.in_layers, result.tensors_in_layers = sum(sizes[name] for name in inside), len(inside)
    causes: Counter[str] = Counter()
    for block in layout.fallbacks:
        causes[block.cause] += sum(sizes[name] for name in block.names)
    result.causes, result.one_by_one = dict(causes), bool(layout.one_by_one)


def _run(net: torch.nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return net(**x)
    return net(*x) if isinstance(x, tuple) else net(x)


def _outputs(found: Any) -> Tensor:
    outputs: Tensor = found if isinstance(found, Tensor) else found.logits
    return outputs


def gradients(
    model: Callable[..., Any], params: Mapping[str, Tensor], batch: Any, context: Any, likelihood: Any
) -> dict[str, Tensor]:
    """Return autograd's gradient of the mean loss, zero where the outputs do not depend on a parameter."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    outputs, _ = model(leaves, batch[0], context)
    loss = likelihood.nll(_outputs(outputs), batch[1]).mean()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}


def relative_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return the largest error of a tensor, relative to its norm or to a thousandth of the whole gradient's."""
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in truth.values()))
    return max(
        float((found[name] - g).double().norm()) / max(float(g.double().norm()), 1e-3 * whole, 1e-30)
        for name, g in truth.items()
    )


def interleaved(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median CPU time of each call; all are repeated in turn until their time is over."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = {name: _timed(call) for name, call in calls.items()}  # the first call of a kind is slower
    rounds = min(MOST, max(FEWEST, round(seconds / max(sum(first.values()), 1e-6))))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_timed(call))
    return {name: statistics.median(each) for name, each in times.items()}


def _timed(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the most memory that a call holds beyond what is held before it; 0 where the system cannot tell."""
    if sys.platform != "linux":
        return 0
    library = ctypes.CDLL(None)
    library.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: larger tensors go back to the system when they are freed
    call()
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(key + ":")]
    return 1024 * int(line.split()[1])
