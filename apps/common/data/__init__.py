"""Data by name: `load("MNIST", data_path="…")`, or your own by `load("pkg.module:function")`.

To add a source, write a `function(data_path: str | None, seed: int) -> Data` whose randomness only depends on the
seed; give its name to `load` as `pkg.module:function` (the current folder is importable), or enter it below.
"""

from __future__ import annotations

import os

from common.data import cifar, curves, digits, faces, idx, svhn
from common.data.base import Data, DataError, Loader, Split, checked
from common.data.download import fetch
from common.data.sizes import enlarged
from common.names import is_own, lookup, own

__all__ = ["DATA", "Data", "DataError", "Loader", "Split", "enlarged", "load"]

DATA: dict[str, Loader] = {
    "CURVES": curves.load,
    "DIGITS": digits.load,
    "MNIST": idx.mnist,
    "FACES": faces.load,
    "F_MNIST": idx.fashion,
    "D_MNIST": idx.deep_mnist,
    "MNIST_RESTRICTED": idx.restricted,
    "CIFAR10": cifar.cifar10,
    "CIFAR100": cifar.cifar100,
    "CIFAR10_RESTRICTED": cifar.restricted,
    "SVHN": svhn.load,
}


def load(name: str, *, data_path: str | os.PathLike[str] | None = None, seed: int = 0, download: bool = False) -> Data:
    """Load data by `name`: one of `DATA`, or your own as "pkg.module:function".

    Args:
        name: a name in `DATA`, or a loader `function(data_path, seed) -> Data` as "pkg.module:function".
        data_path: the folder with the files, in the data set's own folder or flat; None is `./data`.
        seed: random seed of generated curves and patches, shuffles and splits.
        download: fetch missing published files (needs pooch) and verify their checksums.

    Raises:
        DataError: an unknown name, a missing file, or an invalid one.
    """
    path = None if data_path is None else os.fspath(data_path)
    loader = own(name, "data", DataError) if is_own(name) else lookup(name, DATA, "data", DataError)
    if download:
        fetch(name, path)
    return checked(loader(path, seed), name)
