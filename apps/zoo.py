"""Many nets of torch, timm, torchvision and transformers: which of them build, what is in layers, what a step costs.

`python apps/zoo.py` tries every net in evaluation and in training mode, one process per net. Results are lines of a
file; a rerun does what is missing in it. `--page docs/coverage.md` writes the tables between the page's markers.
The extra `zoo` installs the packages; nets of a package that is not installed are left out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common.atomic import replace_text
from common.config import POSITIVE, ConfigError, option, parse
from common.runs import reported
from common.zoo import nets, table, trial

QUICK = (
    "torch/mlp-batch-norm", "torch/cnn-group-norm", "torch/transformer-tied", "torch/deeponet", "torch/lstm",
    "timm/convnext_atto", "timm/vit_tiny_patch16_224", "timm/cait_xxs24_224", "timm/resnet18",
    "torchvision/SwinTransformer", "torchvision/mobilenet_v2", "transformers/GPT2LMHeadModel",
    "transformers/LlamaForCausalLM", "transformers/BertForMaskedLM", "transformers/T5ForConditionalGeneration",
    "transformers/ViTForImageClassification",
)  # fmt: skip
"""Nets of `--quick`: a few from each source."""
PATIENCE = 20
"""Seconds of waiting for a second of CPU time, on a machine with other work."""


@dataclass(frozen=True)
class ZooConfig:
    """Nets to try, and the place of the results."""

    nets: str = option(
        "", "comma-separated parts of names: nets whose names contain one of them are tried; empty: all nets"
    )
    quick: bool = option(False, "try only sixteen nets, with fewer repeats: less than ten minutes")
    seconds: float = option(3.0, "CPU time for the repeats of a net in one mode", check=POSITIVE)
    timeout: int = option(
        300, "limit of CPU seconds per net; a net that exceeds it is recorded as an error", check=POSITIVE
    )
    result: str = option("results/zoo.jsonl", "file for the results; nets with results in it are not tried again")
    again: bool = option(
        False, "repeat nets that failed or have parameters outside layers, for use after a change of the library"
    )
    page: str | None = option(None, "page whose tables are written from the results")


def chosen(config: ZooConfig) -> list[str]:
    """Return the names of the nets to try, of packages that are installed."""
    parts = [part.strip() for part in config.nets.split(",") if part.strip()]
    found = [name for name in nets.names() if not parts or any(part in name for part in parts)]
    if config.quick:
        found = [name for name in found if name in QUICK]
    if not found:
        raise ConfigError(f"nets: no name has a part of {config.nets!r}")
    return [name for name in found if nets.installed(name)]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the newest results of a file; a line that was half written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for line in filter(None, lines):
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[result["name"], result["mode"]] = result
    return list(found.values())


def whole(result: dict[str, Any]) -> bool:
    """Whether nothing is left to wish for a net: built, and every parameter in a layer."""
    return not result["error"] and result["in_layers"] == result["entries"]


def missing(names: Iterable[str], results: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names that have no result in some mode."""
    done = {(result["name"], result["mode"]) for result in results}
    return [name for name in names if not all((name, mode) in done for mode in trial.MODES)]


def run(config: ZooConfig) -> list[dict[str, Any]]:
    """Try what is missing; return all results of the chosen nets."""
    path, names = Path(config.result), chosen(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = missing(names, [result for result in read(path) if not config.again or whole(result)])
    nets.preload()
    began = time.monotonic()
    for number, name in enumerate(left, 1):
        results = alone(name, config.timeout, min(config.seconds, 0.5) if config.quick else config.seconds)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + "".join(json.dumps(result) + "\n" for result in results))
            file.flush()
            os.fsync(file.fileno())
        minutes = (time.monotonic() - began) / 60
        print(f"[{number}/{len(left)}, {minutes:.0f} min] {name}: {'; '.join(map(table.short, results))}", flush=True)
    results = read(path)
    return [result for name in names for result in results if result["name"] == name]


def alone(name: str, timeout: int, seconds: float) -> list[dict[str, Any]]:
    """Return the results of a net, found in a process of its own that may use so much CPU time."""
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name, timeout, seconds))
    process.start()
    sender.close()
    try:
        if receiver.poll(PATIENCE * timeout):
            found: list[dict[str, Any]] = receiver.recv()
            return found
    except EOFError:
        process.join()
    finally:
        process.kill()
        process.join()
    error = "Timeout" if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) else "Crash"
    return [asdict(trial.Result(name, mode, error=error, typed=False, cause=error.lower())) for mode in trial.MODES]


def _send(sender: Connection, name: str, timeout: int, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
    warnings.simplefilter("ignore")
    sender.send(trial.try_net(name, seconds))
    sender.close()


def write(page: Path, results: list[dict[str, Any]]) -> None:
    """Put the tables between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    if text.count(table.BEGIN) != 1 or text.count(table.END) != 1:
        raise ConfigError(f"page: {page} must hold {table.BEGIN} and {table.END} once")
    before, _, rest = text.partition(table.BEGIN)
    _, _, after = rest.partition(table.END)
    replace_text(page, f"{before}{table.BEGIN}\n\n{table.tables(results)}\n\n{table.END}{after}")


if __name__ == "__main__":
    with reported():
        config = parse(ZooConfig, description=__doc__ or "")
        found = run(config)
        print("\n" + table.summary(found))
        if config.page:
            write(Path(config.page), found)
