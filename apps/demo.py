"""Train the CURVES autoencoder with SGD, Adam and K-FAC; print a table and draw a picture.

`make demo` or `python apps/demo.py`. One seed and one batch size. SGD and Adam have the best settings of an
equal-budget search (apps/configs/tuned.yml, written by apps/search.py); K-FAC chooses its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from common.config import option, parse
from common.plots import loss_curves
from common.results import read_metrics
from common.runs import reported
from common.train_config import TrainConfig
from common.trainer import run


@dataclass(frozen=True)
class DemoConfig:
    """The settings of the demonstration."""

    data: str = option("CURVES", "data set")
    model: str | None = option("AE_CURVES_TANH", "net; default: the one for the data")
    data_path: str | None = option(None, "folder with the data files; default: ./data")
    num_epochs: int = option(15, "epochs per optimizer")
    seed: int = option(0, "seed of initialisation, data order and labels")
    result_dir: str = option("results", "folder for the results")


def demo(config: DemoConfig) -> None:
    """Train with all three, print the table and draw the picture."""
    runs = {}
    plain = config.data.replace(":", "-")  # a file name for data given as pkg.module:load
    for optim, name in (("sgd", "SGD"), ("adam", "Adam"), ("kfac", "K-FAC")):
        full = dataclasses.replace(
            TrainConfig(),
            **dataclasses.asdict(config),
            optim=optim,
            result_name=f"{plain}-{optim}",
            overwrite=True,
        )
        print(f"\n{name} on {config.data}")
        folder = run(full, app="demo")
        runs[name] = read_metrics(folder)
    print("\n" + table(runs))
    picture = folder.parent / f"{plain}.png"
    loss_curves(runs, picture)
    print(f"\nThe picture is {picture}.")


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Return a table with one row per epoch and the runs in columns; losses in nats per output."""
    head = f"{'':7}" + "".join(f"{name:^36}" for name in runs)
    units = f"{'epoch':>5}  " + f"{'train loss':>12}{'test loss':>12}{'seconds':>10}  " * len(runs)
    lines = [head, units]
    for epochs in zip(*runs.values(), strict=True):
        cells = "".join(f"{m['train_loss']:12.5f}{m['test_loss']:12.5f}{m['seconds']:10.1f}  " for m in epochs)
        lines.append(f"{epochs[0]['epoch']:5.0f}  {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    with reported():
        demo(parse(DemoConfig, description=__doc__ or ""))
