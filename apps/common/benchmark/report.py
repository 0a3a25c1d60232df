"""Tables of the numbers, for the terminal and for a page with other text around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.benchmark.contenders import CYCLES, Cost, Cycle, Parts, cost
from common.benchmark.large import LARGE
from common.benchmark.ours import FORWARD_BACKWARD
from common.benchmark.problems import WORKLOADS

UNIT = "SGD"
"""The contender that is the unit of time."""

Numbers = Mapping[str, Any]
"""Results of a run as in its JSON: `about`, and for each of `workloads` its contenders, refreshes and exact steps."""


def costs(workload: Numbers, name: str) -> Cost:
    """Return the costs of a contender, in milliseconds."""
    parts = workload["contenders"][name]["parts"]
    return cost(Parts(**{part: timing["ms"] for part, timing in parts.items()}))


def mean_step(workload: Numbers, name: str, cycle: Cycle = CYCLES[0]) -> float | None:
    """Return the average step relative to SGD; None if the contender did not run."""
    if name not in workload["contenders"] or not workload["contenders"][name]["parts"]:
        return None
    return cycle.mean(costs(workload, name)) / costs(workload, UNIT).step


def contenders(numbers: Numbers) -> list[str]:
    """Return all contenders that were timed on any workload, in order."""
    return list(dict.fromkeys(name for one in numbers["workloads"].values() for name in one["contenders"]))


# tables ---------------------------------------------------------------------------------------------------------------


def tables(numbers: Numbers) -> dict[str, str]:
    """Return the tables by their names in a page."""
    return {
        "about": about(numbers),
        "mean step": mean_steps(numbers),
        "parts": parts(numbers),
        "refresh": refreshes(numbers),
        "exact": exact(numbers),
    }


def about(numbers: Numbers) -> str:
    """List the circumstances of the run, one line per fact."""
    facts = [(name.replace("_", " "), shown(value)) for name, value in numbers["about"].items()]
    return table(["", ""], facts)


def mean_steps(numbers: Numbers) -> str:
    """Return the table of the average step relative to SGD, for all contenders and workloads, in both cadences."""
    workloads = numbers["workloads"]
    rows = []
    for cycle in CYCLES:
        for name in contenders(numbers):
            ours = name.startswith("fisherfn")
            if cycle == CYCLES[0] or ours:
                often = "" if cycle == CYCLES[0] else f" ({cycle.update_every}, {cycle.invert_every})"
                means = [number(mean_step(one, name, cycle)) for one in workloads.values()]
                rows.append([name + often, *(f"**{mean}**" if ours else mean for mean in means)])
    return table(["average time per step, relative to SGD", *titles(workloads)], rows)


def parts(numbers: Numbers) -> str:
    """Return the tables of the parts of an average step, one per workload."""
    head = ["step, ms", "quartiles", "step", "statistics", "inverses", "covers"]
    return "\n\n".join(
        table([f"{title(name)}, relative to SGD", *head], [made_of(workload, one) for one in workload["contenders"]])
        for name, workload in numbers["workloads"].items()
    )


def made_of(workload: Numbers, name: str) -> list[str]:
    """Return one line of `parts`, or the error of a contender that did not run."""
    one, unit = workload["contenders"][name], costs(workload, UNIT).step
    if not one["parts"]:
        return [name, "–", "–", "–", "–", "–", f"`{one['error']}`"]
    step = one["parts"]["step"]
    found = [number(part / unit) if part else "" for part in costs(workload, name)]
    remark = "; ".join(filter(None, [one["covers"], one["note"]]))
    return [name, f"{step['ms']:.1f}", f"{step['low']:.1f} – {step['high']:.1f}", *found, remark]


def refreshes(numbers: Numbers) -> str:
    """Return the table of statistics and factors of every method, relative to SGD steps and to K-FAC."""
    workloads = {name: one for name, one in numbers["workloads"].items() if one["refresh"]}
    methods = list(dict.fromkeys(method for one in workloads.values() for method in one["refresh"]))

    def cells(method: str, one: Numbers) -> list[str]:
        ms = one["refresh"][method]["ms"]
        return [number(ms / costs(one, UNIT).step), number(ms / one["refresh"]["kfac"]["ms"])]

    head = [cell for name in titles(workloads) for cell in (name, "relative to K-FAC")]
    rows = [[method, *(cell for one in workloads.values() for cell in cells(method, one))] for method in methods]
    return table(["refresh, relative to an SGD step", *head], rows)


def exact(numbers: Numbers) -> str:
    """Return the table of the exact natural gradient, relative to a forward and backward pass of the same batch."""
    workloads = {name: one for name, one in numbers["workloads"].items() if one["exact"]}
    kinds = list(dict.fromkeys(kind for one in workloads.values() for kind in one["exact"]))
    rows = [
        [kind, *(number(one["exact"][kind]["ms"] / one["exact"][FORWARD_BACKWARD]["ms"]) for one in workloads.values())]
        for kind in kinds
    ]
    return table([f"relative to {FORWARD_BACKWARD}", *titles(workloads)], rows)


def memory(numbers: Numbers) -> str:
    """Return the table of the peak memory of a call in addition to that before it, if it was measured."""
    rows = [
        [title(name), f"{contender}: {part.replace('_', ' ')}", f"{timing['peak_mib']:.1f}"]
        for name, workload in numbers["workloads"].items()
        for contender, one in [*workload["contenders"].items(), ("refresh", {"parts": workload["refresh"]})]
        for part, timing in one["parts"].items()
        if timing["peak_mib"] is not None
    ]
    return table(["", "", "MiB"], rows) if rows else ""


def latency(numbers: Numbers) -> str:
    """Return the table of percentiles of step times, and of build times, if they were measured."""
    rows = [
        [
            title(name), label, *(f"{spread[at]:.1f}" for at in ("p50", "p99", "longest")),
            number(spread["p99"] / spread["p50"]), f"{one['latency']['build_ms_per_layer']:.1f}",
        ]
        for name, one in numbers["workloads"].items()
        for label, spread in one.get("latency", {}).get("steps", {}).items()
    ]  # fmt: skip
    head = ["", "refresh", "p50, ms", "p99, ms", "longest, ms", "p99 / p50", "build per layer, ms"]
    return table(head, rows) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table with aligned columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def title(name: str) -> str:
    """Return the title of a workload."""
    return LARGE[name].title if name in LARGE else WORKLOADS[name].title


def titles(workloads: Iterable[str]) -> list[str]:
    """Return the titles of several workloads."""
    return [title(name) for name in workloads]


def number(value: float | None) -> str:
    """Format a number with two decimals; a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def shown(value: Any) -> str:
    """Format a fact as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# the page -------------------------------------------------------------------------------------------------------------

MARKED = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.S)


def filled(page: str, found: Mapping[str, str]) -> str:
    """Replace each marked table of a page by the one with the same name.

    A table is between `<!-- table: NAME -->` and `<!-- end of table -->`.
    """
    missing = found.keys() - {match["name"] for match in MARKED.finditer(page)}
    if missing:
        raise ValueError(f"the page has no place for {', '.join(sorted(missing))}: mark it with <!-- table: NAME -->.")
    return MARKED.sub(lambda match: f"{match[1]}{found[match['name']]}\n{match[3]}", page)
