"""Fault injection: runs are killed, stopped, given a full disk or a damaged checkpoint, resumed, and compared.

`python apps/soak.py` cycles through all optimizers of classifiers and GANs for ten minutes. Each round trains a small
net with a checkpoint every few steps, injects a fault at a random moment, and resumes until the run is finished. It
compares the last checkpoint and the metrics bit by bit with those of an uninterrupted run.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fisherfn as ff
from common.checkpoints import CheckpointError, load_checkpoint
from common.config import POSITIVE, SEED, check_listed, listed, option, parse
from common.gan.config import PLAYERS
from common.results import CHECKPOINT, read_metrics
from common.runs import reported
from common.train_config import OPTIMIZERS

APPS = Path(__file__).parent
COMMON = "--data DIGITS --num_epochs 3 --save_every 2 --quiet true"
CURVATURE = "--damping 1 --kl_bound 0.01"
"""Options of natural gradients."""
RUNS = {
    "train_mlp": "--model ToyNet --lr 0.1 --optim {}",
    "train_gan": "--width 0.02 --batch_size 128 --crit_repeats 1 --fid none --gen_optim {} --crit_optim {}",
}
GAN = "gan:"
"""Prefix of an optimizer's name that both players of a GAN use."""
KNOWN = (*OPTIMIZERS, *(GAN + name for name in PLAYERS))
ATTEMPTS = 20
"""Number of times that a run is resumed before it counts as lost."""


@dataclass(frozen=True)
class SoakConfig:
    """The settings: duration, optimizers, seed."""

    minutes: float = option(10.0, "duration of the whole test", check=POSITIVE)
    optims: str = option(",".join(KNOWN), "comma-separated optimizers; gan:… for both players of a GAN")
    seed: int = option(0, "seed of moments and faults", check=SEED)
    result: str = option("results/soak.json", "file for the counts")

    def __post_init__(self) -> None:
        check_listed("optims", self.optims, KNOWN)


@dataclass(frozen=True)
class Fault:
    """A fault that is injected into a running trainer.

    Attributes:
        strike: action on the process; None for no action.
        codes: the correct exit codes afterwards, including 0 if the run may have finished before.
        after: action on the result folder after the process ended.
        limit: largest size of a file in bytes.
    """

    strike: signal.Signals | None
    codes: tuple[int, ...]
    after: Callable[[Path, random.Random], None] = lambda folder, dice: None
    limit: int | None = None


def truncate(folder: Path, dice: random.Random) -> None:
    """Truncate the newest checkpoint, if there is an older one."""
    path = folder / CHECKPOINT
    if (folder / "checkpoint.1.pt").exists():
        content = path.read_bytes()
        path.unlink()  # the older one may be the same file with another name
        path.write_bytes(content[: dice.randrange(len(content))])


FAULTS = {
    "kill -9": Fault(signal.SIGKILL, (-signal.SIGKILL, 0)),
    "SIGTERM": Fault(signal.SIGTERM, (128 + signal.SIGTERM, -signal.SIGTERM, 0)),
    "SIGINT": Fault(signal.SIGINT, (128 + signal.SIGINT, -signal.SIGINT, 1, 0)),
    "kill -9, checkpoint truncated": Fault(signal.SIGKILL, (-signal.SIGKILL, 0), truncate),
    "full disk": Fault(None, (1,), limit=4096),
}


def soak(config: SoakConfig) -> dict[str, dict[str, int]]:
    """Run rounds until the time is over; return counts by fault: injected, survived, lost."""
    optims = listed(config.optims)
    dice = random.Random(config.seed)
    counts: dict[str, Counter[str]] = {name: Counter(injected=0, survived=0, lost=0) for name in FAULTS}
    ends = time.monotonic() + 60 * config.minutes
    with tempfile.TemporaryDirectory() as folder:
        for optim, name in itertools.cycle(itertools.product(optims, FAULTS)):
            if time.monotonic() > ends:
                break
            problem = disturbed(Path(folder), optim, FAULTS[name], dice)
            counts[name]["injected"] += 1
            counts[name]["lost" if problem else "survived"] += 1
            print(f"{optim:14} {name:32} {problem or 'equals the undisturbed run'}", flush=True)
    path = Path(config.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(counts, indent=1))
    print("\n" + "\n".join(f"{name:32} {dict(count)}" for name, count in counts.items()))
    return {name: dict(count) for name, count in counts.items()}


def disturbed(root: Path, optim: str, fault: Fault, dice: random.Random) -> str | None:
    """Run one round; return a description of the problem, or None."""
    straight = root / trainee(optim)[0] / f"{optim.replace(':', '-')}-straight"
    if not straight.exists():
        began = time.monotonic()
        code, printed = command(root, optim, straight.name)
        (straight / "seconds").write_text(str(time.monotonic() - began))
        if code:
            return f"the undisturbed run failed: {printed}"
    seconds = float((straight / "seconds").read_text())
    folder = straight.with_name(straight.name.replace("straight", "disturbed"))
    code, printed = command(root, optim, folder.name, "--overwrite", fault=fault, moment=dice.uniform(0, seconds))
    if code not in fault.codes:
        return f"exit code {code}: {printed}"
    if folder.exists():
        fault.after(folder, dice)
    for _ in range(ATTEMPTS):
        again = "--resume" if (folder / CHECKPOINT).exists() else "--overwrite"
        code, printed = command(root, optim, folder.name, again)
        if code == 0:
            return difference(straight, folder)
    return f"cannot be resumed: {printed}"


def trainee(optim: str) -> tuple[str, list[str]]:
    """Return the trainer of this optimizer and its arguments, except the name of the result."""
    app, name = "train_gan" if optim.startswith(GAN) else "train_mlp", optim.removeprefix(GAN)
    given = CURVATURE if name in ff.METHODS else ""
    return app, [*COMMON.split(), *given.split(), *RUNS[app].replace("{}", name).split()]


def command(
    root: Path, optim: str, name: str, *more: str, fault: Fault | None = None, moment: float = 0.0
) -> tuple[int, str]:
    """Train; return the exit code and the last line of errors."""

    def limited() -> None:
        if fault and fault.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.limit, fault.limit))

    app, told = trainee(optim)
    args = [sys.executable, str(APPS / f"{app}.py"), *told, "--result_dir", str(root), "--result_name", name, *more]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=limited)
    if fault and fault.strike:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(fault.strike)
    _, printed = process.communicate()
    lines = printed.strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def difference(straight: Path, folder: Path) -> str | None:
    """Describe the difference between two results, or return None."""
    try:
        one, two = (load_checkpoint(path / CHECKPOINT)[0] for path in (straight, folder))
    except CheckpointError as error:
        return str(error)
    if one.keys() != two.keys() or not all(torch.equal(one[path], two[path]) for path in one):
        return "the checkpoint differs from the undisturbed run's"
    found = [
        [{name: m[name] for name in m if name != "seconds"} for m in read_metrics(path)] for path in (straight, folder)
    ]
    return None if found[0] == found[1] else "the metrics differ from the undisturbed run's"


if __name__ == "__main__":
    with reported():
        if any(count["lost"] for count in soak(parse(SoakConfig, description=__doc__ or "")).values()):
            raise SystemExit(1)
