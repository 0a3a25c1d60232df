"""Pictures whose losses span less than a decade; the fixture `plain_numbers` of conftest.py reads their axes."""

from itertools import product

import pytest

from common.gan import pictures
from common.sweep import report

LOSSES = (0.31, 0.42, 0.55, 0.63)


@pytest.mark.parametrize("swept", [("lr",), ("lr", "damping")])
def test_a_sweep(tmp_path, swept):
    values = dict.fromkeys(swept, (1.0, 0.1))
    rows = [dict(zip(swept, row, strict=True)) for row in product(*values.values())]
    lines = [
        {"run": run, "epoch": epoch, "train_loss": LOSSES[run] * (1.5 - epoch / 4)}
        for run in range(len(rows))
        for epoch in range(3)
    ]
    report.draw(tmp_path / "sweep.png", values, rows, lines, "train_loss")


def test_the_scores_of_a_gan(tmp_path):
    run = [{"step": i, "seconds": i, "fid": 30.0 - 5 * i, "crit_loss": 1.0, "gen_loss": 1.0} for i in range(3)]
    pictures.curves({"one": run}, tmp_path / "gan.png")
