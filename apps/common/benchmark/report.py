"""The numbers as tables, for the terminal and for a page that keeps its own text around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.benchmark.contenders import CYCLES, Cost, Cycle, cost
from common.benchmark.large import LARGE
from common.benchmark.ours import FORWARD_BACKWARD
from common.benchmark.problems import WORKLOADS

UNIT = "SGD"
"""The contender that the others are measured in."""

Numbers = Mapping[str, Any]
"""Of a run, as its JSON holds them: `about`, and for each of `workloads` its contenders, refreshes and exact steps."""


def costs(workload: Numbers, name: str) -> Cost:
    """Of a contender, in milliseconds."""
    return cost({part: timing["ms"] for part, timing in workload["contenders"][name]["parts"].items()})


def mean_step(workload: Numbers, name: str, cycle: Cycle = CYCLES[0]) -> float | None:
    """In SGD steps; None where the contender did not run."""
    if name not in workload["contenders"] or not workload["contenders"][name]["parts"]:
        return None
    return cycle.mean(costs(workload, name)) / costs(workload, UNIT).step


def contenders(numbers: Numbers) -> list[str]:
    """All that were timed on any workload, in order."""
    return list(dict.fromkeys(name for one in numbers["workloads"].values() for name in one["contenders"]))


# tables ---------------------------------------------------------------------------------------------------------------


def tables(numbers: Numbers) -> dict[str, str]:
    """By the name that a page calls them."""
    return {
        "about": about(numbers),
        "mean step": mean_steps(numbers),
        "parts": parts(numbers),
        "refresh": refreshes(numbers),
        "exact": exact(numbers),
    }


def about(numbers: Numbers) -> str:
    """Where and when, one line a fact."""
    facts = [(name.replace("_", " "), shown(value)) for name, value in numbers["about"].items()]
    return table(["", ""], facts)


def mean_steps(numbers: Numbers) -> str:
    """The mean step of a training in SGD steps, everyone on every workload, in the peers' usual cycle and ours."""
    workloads = numbers["workloads"]
    rows = []
    for cycle in CYCLES:
        for name in contenders(numbers):
            ours = name.startswith("fisherfn")
            if cycle == CYCLES[0] or ours:
                often = "" if cycle == CYCLES[0] else f" ({cycle.update_every}, {cycle.invert_every})"
                means = [number(mean_step(one, name, cycle)) for one in workloads.values()]
                rows.append([name + often, *(f"**{mean}**" if ours else mean for mean in means)])
    return table(["mean step, in SGD steps", *titles(workloads)], rows)


def parts(numbers: Numbers) -> str:
    """For each workload what a mean step is made of."""
    head = ["step, ms", "quartiles", "step", "statistics", "inverses", "covers"]
    return "\n\n".join(
        table([f"{title(name)}; in SGD steps", *head], [made_of(workload, one) for one in workload["contenders"]])
        for name, workload in numbers["workloads"].items()
    )


def made_of(workload: Numbers, name: str) -> list[str]:
    """One line of `parts`; of a contender that did not run, its error."""
    one, unit = workload["contenders"][name], costs(workload, UNIT).step
    if not one["parts"]:
        return [name, "–", "–", "–", "–", "–", f"`{one['error']}`"]
    step = one["parts"]["step"]
    found = [number(part / unit) if part else "" for part in costs(workload, name)]
    remark = "; ".join(filter(None, [one["covers"], one["note"]]))
    return [name, f"{step['ms']:.1f}", f"{step['low']:.1f} – {step['high']:.1f}", *found, remark]


def refreshes(numbers: Numbers) -> str:
    """Statistics and factors of every method: SGD steps, and K-FAC's refreshes."""
    workloads = {name: one for name, one in numbers["workloads"].items() if one["refresh"]}
    methods = list(dict.fromkeys(method for one in workloads.values() for method in one["refresh"]))

    def cells(method: str, one: Numbers) -> list[str]:
        ms = one["refresh"][method]["ms"]
        return [number(ms / costs(one, UNIT).step), number(ms / one["refresh"]["kfac"]["ms"])]

    head = [cell for name in titles(workloads) for cell in (name, "in K-FAC's")]
    rows = [[method, *(cell for one in workloads.values() for cell in cells(method, one))] for method in methods]
    return table(["refresh, in SGD steps", *head], rows)


def exact(numbers: Numbers) -> str:
    """The exact natural gradient in forwards and backwards of the same batch."""
    workloads = {name: one for name, one in numbers["workloads"].items() if one["exact"]}
    kinds = list(dict.fromkeys(kind for one in workloads.values() for kind in one["exact"]))
    rows = [
        [kind, *(number(one["exact"][kind]["ms"] / one["exact"][FORWARD_BACKWARD]["ms"]) for one in workloads.values())]
        for kind in kinds
    ]
    return table([f"in {FORWARD_BACKWARD}", *titles(workloads)], rows)


def memory(numbers: Numbers) -> str:
    """The most memory that a call holds beyond what is held before it, where that was measured."""
    rows = [
        [title(name), f"{contender}: {part}", f"{timing['peak_mib']:.1f}"]
        for name, workload in numbers["workloads"].items()
        for contender, one in [*workload["contenders"].items(), ("refresh", {"parts": workload["refresh"]})]
        for part, timing in one["parts"].items()
        if timing["peak_mib"] is not None
    ]
    return table(["", "", "MiB"], rows) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, its columns aligned for the terminal."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def title(name: str) -> str:
    """Of a workload."""
    return LARGE[name].title if name in LARGE else WORKLOADS[name].title


def titles(workloads: Iterable[str]) -> list[str]:
    """Of several."""
    return [title(name) for name in workloads]


def number(value: float | None) -> str:
    """Two digits after the point; a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def shown(value: Any) -> str:
    """A fact as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# the page -------------------------------------------------------------------------------------------------------------

MARKED = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.S)


def filled(page: str, found: Mapping[str, str]) -> str:
    """The page with each marked table replaced by the one of that name; all else stays.

    A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
    """
    missing = found.keys() - {match["name"] for match in MARKED.finditer(page)}
    if missing:
        raise ValueError(f"the page has no place for {', '.join(sorted(missing))}: mark it with <!-- table: NAME -->.")
    return MARKED.sub(lambda match: f"{match[1]}{found[match['name']]}\n{match[3]}", page)
