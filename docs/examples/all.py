"""Redraw all pictures of the gallery: `python docs/examples/all.py [FOLDER [NAME …]]`."""

import importlib.util
import sys
import time
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
PICTURES = HERE.parent / "images" / "gallery"
EXAMPLES = (
    "fisher_blocks",
    "spectra",
    "training_curves",
    "ensemble_sweep",
    "sparse_autoencoders",
    "custom_loop",
    "physics",
    "laplace",
    "influence",
    "ising",
    "continual",
)


def load(name: str):
    """Import an example as a module, from any current folder."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(out: Path = PICTURES, names: tuple[str, ...] = EXAMPLES) -> None:
    """Run the examples, one after the other."""
    out.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names, 1):
        print(f"[{index}/{len(names)}] {name}", flush=True)
        start = time.perf_counter()
        load(name).main(out)
        print(f"      {out / name}.png, {time.perf_counter() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(*(Path(folder) for folder in sys.argv[1:2]), *([tuple(sys.argv[2:])] if len(sys.argv) > 2 else []))
