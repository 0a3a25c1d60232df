"""Predict the speed of data-parallel K-FAC on many ranks, and compare the prediction with a measurement.

`python apps/scaling.py --page docs/distributed.md` writes the tables of the page and docs/images/scaling.png.
`torchrun --nproc_per_node=2 apps/scaling.py --measure 20` measures steps, messages and the network of this machine,
and predicts the steps from the parts; `python apps/scaling.py --measure 20 --threads 2` is one process to compare with.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fisherfn as ff
from common import ranks
from common.atomic import replace_text
from common.config import POSITIVE, option, parse
from common.cost_model import (
    DIAGONAL_ABOVE,
    Compute,
    Network,
    Shape,
    Traffic,
    added,
    memory,
    share,
    speed_up,
    traffic,
)  # fmt: skip
from common.models.mlp import chain
from common.plots import INK, PALETTE, new_figure, save_figure
from common.runs import reported

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
"""The MNIST autoencoder."""

KINDS = {"plain": (False, False), "with statistics": (True, False), "with inverses": (True, True)}
NETWORKS = {"InfiniBand, 25 GB/s, 10 µs": Network(25e9, 1e-5), "Ethernet, 1.25 GB/s, 50 µs": Network(1.25e9, 5e-5)}
OWNERS = (2, 8, 32)
"""Numbers of ranks that precondition what they own, for the table of memory."""
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
START, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"


@dataclass(frozen=True)
class ScalingConfig:
    """The settings of a prediction or a measurement."""

    measure: int | None = option(None, "rounds of a measurement on this machine; default: only predict", check=POSITIVE)
    batch_size: int = option(512, "global batch of the measurement", check=POSITIVE)
    threads: int = option(1, "threads per process", check=POSITIVE)
    page: str | None = option(None, "page whose tables are written")


def resnet50() -> tuple[dict[str, Shape], int]:
    """Return the shapes of the layers of a ResNet-50 for 1,000 classes, and the parameters of its batch norms."""
    shapes, others, channels = {"stem": Shape(1, 64, 3 * 49)}, 2 * 64, 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name, out = f"{stage}.{block}", 4 * width
            shapes |= {
                f"{name}.a": Shape(1, width, channels),
                f"{name}.b": Shape(1, width, 9 * width),
                f"{name}.c": Shape(1, out, width),
            }
            others += 2 * (2 * width + out)
            if block == 0:
                shapes[f"{name}.shortcut"] = Shape(1, out, channels)
                others += 2 * out
            channels = out
    return shapes | {"classes": Shape(1, 1000, 2049)}, others


def gpt2() -> tuple[dict[str, Shape], int]:
    """Return the shapes of the layers of GPT-2 small, with tied embedding, and the parameters of its layer norms."""
    d, shapes = 768, {"words": Shape(1, 768, 50257, True), "positions": Shape(1, 768, 1024, True)}
    for layer in range(12):
        for name, out, into in (("qkv", 3 * d, d), ("out", d, d), ("up", 4 * d, d), ("down", d, 4 * d)):
            shapes[f"{layer}.{name}"] = Shape(1, out, into + 1)  # with its bias
    return shapes, 2 * d * 25


# milliseconds on one H200 from docs/gpu.md; GPT-2 is twelve of the measured blocks, without the vocabulary
NETS = {
    "ResNet-50": (resnet50(), Compute(0.0830, 0.2287 - 0.0830, 0.4196 - 0.2287, 0.0)),
    "GPT-2 small": (gpt2(), Compute(12 * 0.0088, 12 * (0.0181 - 0.0088), 12 * (0.0394 - 0.0181), 0.0)),
}


def predicted() -> list[str]:
    """Return the tables: speed-up by ranks, and traffic and memory per rank."""
    lines = ["| speed-up of K-FAC | " + " | ".join(f"{n:,} ranks" for n in RANKS) + " |", "|---" * 9 + "|"]
    for form, owner in (("", False), (", owners precondition", True)):
        for net, ((shapes, _), compute) in NETS.items():
            for title, network in NETWORKS.items():
                found = (speed_up(compute, shapes, DIAGONAL_ABOVE, n, network, owner=owner) for n in RANKS)
                lines.append(f"| {net}, {title}{form} | " + " | ".join(f"{value:,.1f}" for value in found) + " |")
    lines += ["", "| MiB sent per message | gradient | moments | inverses |", "|---" * 4 + "|"]
    for net, ((shapes, others), _) in NETS.items():
        cells = " | ".join(f"{n / 2**20:,.0f}" for n in traffic(shapes, DIAGONAL_ABOVE, others=others))
        lines.append(f"| {net} | {cells} |")
    sizes = " | ".join(f"inverses, owners on {n}" for n in OWNERS)
    held_by_all = "parameters | factors | inverses"
    lines += ["", f"| MiB held per rank | {held_by_all} | {sizes} | largest share of inversions, 8 ranks |"]
    lines.append("|---" * (5 + len(OWNERS)) + "|")
    for net, ((shapes, others), _) in NETS.items():
        held = memory(shapes, DIAGONAL_ABOVE, others=others)
        own = [memory(shapes, DIAGONAL_ABOVE, owners=n)["inverses"] for n in OWNERS]
        numbers = (held["parameters"], held["factors"], held["inverses"], *own)
        cells = " | ".join(f"{number / 2**20:,.0f}" for number in numbers)
        lines.append(f"| {net} | {cells} | {share(shapes, DIAGONAL_ABOVE, 8):.2f} |")
    return lines


def draw(path: Path) -> None:
    """Draw speed-up by ranks, for each net and network."""
    figure = new_figure(width=7.5, height=4.6)
    axes = figure.subplots()
    axes.plot(RANKS, RANKS, color=INK, linewidth=0.8, linestyle=":", label="ideal")
    for color, (net, ((shapes, _), compute)) in zip(PALETTE, NETS.items(), strict=False):
        for style, (title, network) in zip(("-", "--"), NETWORKS.items(), strict=True):
            found = [speed_up(compute, shapes, DIAGONAL_ABOVE, n, network) for n in RANKS]
            axes.plot(RANKS, found, style, marker="o", markersize=3, color=color, label=f"{net}, {title}")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="predicted speed-up over one rank")
    axes.set_xticks(RANKS, [str(n) for n in RANKS])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------- measurement


def measured(config: ScalingConfig, device: str) -> list[str]:
    """Return measured and predicted milliseconds per kind of step, and the bytes per message, of these ranks."""
    del device
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model, params, context = ff.functional(chain(WIDTHS, lambda width: torch.nn.ReLU()))
    x = torch.rand(config.batch_size, WIDTHS[0])
    alone = ff.natural_gradient(model, params, x[:8], likelihood=ff.Bernoulli(), context=context)
    sent: dict[str, int] = defaultdict(int)
    size = torch.distributed.get_world_size() if ranks.several() else 1

    def observe(what: str, payload: int) -> None:
        sent[what] += payload

    spread = partial(ff.distributed.data_parallel, alone, observe=observe)
    forms = {"own": alone, "all": alone}
    if size > 1:
        # a group of this rank alone does all of a rank's own work, packing included, and sends nothing to others
        groups = [torch.distributed.new_group([rank]) for rank in range(size)]
        own = ff.distributed.data_parallel(alone, group=groups[torch.distributed.get_rank()])
        forms = {"own": own, "all": spread(), "owner": spread(precondition="owner")}
    states = {who: ng.init(params, damping=1.0) for who, ng in forms.items()}
    mine = x[ranks.part(len(x))]

    def step(who: str, update: bool, invert: bool) -> Callable[[], object]:
        random = torch.Generator().manual_seed(0)
        return lambda: forms[who].step(
            params,
            states[who],
            (mine, mine),
            update=update,
            invert=invert,
            context=context,
            generator=random,
        )

    calls = {(who, kind): step(who, *KINDS[kind]) for who in forms for kind in KINDS}
    if size > 1:
        calls |= {("net", "long"): message(1 << 22), ("net", "short"): message(1)}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(config.measure or 1):  # interleaved, so that a busy minute meets all of them
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - began)
    middle = {key: statistics.median(each) for key, each in times.items()}
    lines = [f"{size} ranks with {config.threads} threads each, global batch {config.batch_size}"]
    for kind in KINDS:
        text = f"{kind}: {1e3 * middle['all', kind]:.0f} ms"
        lines.append(text + (f", predicted {1e3 * foretold(kind, middle, alone, size):.0f} ms" if size > 1 else ""))
    if size > 1:
        owners = ", ".join(f"{kind} {1e3 * middle['owner', kind]:.0f} ms" for kind in KINDS)
        lines.append(f"owners precondition: {owners}")
        held = (sum(leaf.nbytes for leaf in ff.tree.leaves(states[who].inverses)) for who in ("all", "owner"))
        lines.append("bytes of inverses on rank 0: {:,}, if owners precondition {:,}".format(*held))
        for who, text in (("all", ""), ("owner", ", owners precondition")):
            sent.clear()
            calls[who, "with inverses"]()
            counted = ", ".join(f"{what} {n:,}" for what, n in sent.items())
            lines.append(f"bytes per step with inverses{text}: {counted}")
    return lines


def message(numbers: int) -> Callable[[], object]:
    """Return a call that adds up numbers over ranks."""
    payload, group = torch.zeros(numbers), ff.distributed.Ranks()
    return lambda: group.total("measurement", [payload])


def foretold(kind: str, middle: dict[tuple[str, str], float], ng: ff.NaturalGradient, size: int) -> float:
    """Return the predicted seconds of a step, from the parts that a rank takes alone and the messages' own speed."""
    latency = middle["net", "short"] / (2 * max(1, (size - 1).bit_length()))
    network = Network(2 * 4 * (1 << 22) * (size - 1) / size / middle["net", "long"], latency)
    own = [middle["own", each] for each in KINDS]
    compute = Compute(own[0], max(own[1] - own[0], 0.0), max(own[2] - own[1], 0.0), 0.0)
    shapes = {key: Shape(*shape) for key, shape in ng.layout.block_shapes.items()}
    sent: Traffic = traffic(shapes, DIAGONAL_ABOVE)
    found = compute.gradient + added(sent.gradient, size, network) + added(64 * size, size, network)
    if kind != "plain":
        found += compute.statistics + added(sent.moments, size, network)
    if kind == "with inverses":
        found += compute.inversion * share(shapes, DIAGONAL_ABOVE, size) + added(sent.inverses, size, network)
    return found


def main(config: ScalingConfig) -> None:
    """Predict, or measure."""
    if config.measure is not None:
        with ranks.joined("cpu") as device:
            lines = measured(config, device)
            if ranks.first():
                print("\n".join(lines))
        return
    lines = predicted()
    print("\n".join(lines))
    if config.page is None:
        return
    page = Path(config.page)
    draw(page.parent / "images" / "scaling.png")
    before, _, rest = page.read_text().partition(START)
    replace_text(page, before + START + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    with reported():
        main(parse(ScalingConfig, description=__doc__))
