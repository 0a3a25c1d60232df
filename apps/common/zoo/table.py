"""Results of the zoo as Markdown: a summary by source, then a line per net."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

BEGIN, END = "<!-- table: zoo -->", "<!-- end: zoo -->"
Result = dict[str, Any]


def tables(results: Sequence[Result]) -> str:
    """Return the summary and the table by net."""
    return f"{summary(results)}\n\n{by_net(results)}"


def summary(results: Sequence[Result]) -> str:
    """Return one line per source and one for all: what builds, what is in layers, medians of cost and memory."""
    head = [
        "nets from", "nets", "built, eval", "built, train", "entries in layers", "tensors in layers", "sound steps",
        "largest gradient error", "median cost", "median memory", "untyped errors",
    ]  # fmt: skip
    sources = list(dict.fromkeys(result["name"].partition("/")[0] for result in results))
    rows = [_summary(source, [r for r in results if r["name"].startswith(source + "/")]) for source in sources]
    large = [r for r in results if r["entries"] >= 1_000_000]
    rows += [_summary("over a million entries", large)] if large else []
    return _markdown(head, [*rows, [f"**{cell}**" for cell in _summary("all", results)]])


def _summary(title: str, results: Sequence[Result]) -> list[str]:
    built = {mode: [r["built"] for r in results if r["mode"] == mode] for mode in ("eval", "train")}
    stepped = [r["sound"] for r in results if r["sound"] is not None]
    return [
        title,
        str(len({r["name"] for r in results})),
        *(_per_cent(sum(each), len(each)) for each in built.values()),
        _per_cent(sum(r["in_layers"] for r in results), sum(r["entries"] for r in results), 2),
        _per_cent(sum(r["tensors_in_layers"] for r in results), sum(r["tensors"] for r in results), 2),
        f"{sum(stepped)} of {len(stepped)}",
        _number(max(_known(results, "gradient_error"), default=None), ".0e"),
        _number(_median(_known(results, "cost")), ".1f"),
        _number(_median(_known(results, "memory")), ".1f"),
        str(sum(not r["typed"] for r in results)),
    ]


def by_net(results: Sequence[Result]) -> str:
    """Return one line per net, evaluation and training mode with a slash between where they differ."""
    head = ["net", "entries", "in layers, %", "tensors, %", "why not", "gradient error", "step", "cost", "memory"]
    nets = dict.fromkeys(result["name"] for result in results)
    return _markdown(head, [_net(name, [r for r in results if r["name"] == name]) for name in nets])


def _net(name: str, modes: Sequence[Result]) -> list[str]:
    def both(cells: Iterable[str]) -> str:
        each = list(cells)
        return each[0] if len(set(each)) == 1 else " / ".join(each)

    return [
        f"`{name}`",
        f"{max(r['entries'] for r in modes):,}",
        both(_share(r["in_layers"], r["entries"]) for r in modes),
        both(_share(r["tensors_in_layers"], r["tensors"]) for r in modes),
        both(_why(r) for r in modes),
        both(_number(r["gradient_error"], ".0e") for r in modes),
        both({True: "sound", False: "not sound", None: "–"}[r["sound"]] for r in modes),
        both(_number(r["cost"], ".1f") for r in modes),
        both(_number(r["memory"], ".1f") for r in modes),
    ]


def short(result: Result) -> str:
    """Return a result in a few words, for the terminal."""
    if not result["built"] or result["error"]:
        return f"{result['mode']} {result['error']} ({result['cause']})"
    share = _share(result["in_layers"], result["entries"])
    return f"{result['mode']} {share} % in layers, cost {_number(result['cost'], '.1f')}"


def _why(result: Result) -> str:
    if not result["built"]:
        return f"not built: {result['cause']}"
    causes = sorted(result["causes"], key=lambda cause: -result["causes"][cause])
    words = [*causes, *(["one by one"] if result["one_by_one"] else []), *([result["error"]] * bool(result["error"]))]
    return ", ".join(words)


def _share(part: int, whole: int) -> str:
    if not whole:
        return "–"
    return "100" if part == whole else f"{min(100 * part / whole, 99.99):.2f}"


def _per_cent(part: int, whole: int, digits: int = 1) -> str:
    return f"{100 * part / whole:.{digits}f} %" if whole else "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _known(results: Iterable[Result], key: str) -> list[float]:
    return [r[key] for r in results if r[key] is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
