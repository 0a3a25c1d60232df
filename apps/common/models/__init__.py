"""Models by name, one file per family: fully connected nets, convolutional classifiers, convolutional autoencoders.

To add a model, write a `build(data: Data) -> nn.Module` that ends in logits; name it as `pkg.module:build` (the
current folder is importable), or add it to the `MODELS` of its family. Your own model receives the inputs of its
trainer: flattened inputs `[N, C·H·W]` in train_mlp, images `[N, C, H, W]` in the others. Its task is its attribute
`task`, or that of its module; without one, labels are predicted if the data has any.
"""

from __future__ import annotations

import sys
from typing import cast, get_args

from common.data import Data
from common.models import autoencoder, cnn, mlp
from common.models.base import Inputs, Model, ModelError, Task
from common.models.initialisation import SCHEMES, initialise
from common.names import is_own, lookup, own

__all__ = ["AUTOENCODERS", "CNNS", "MLPS", "MODELS", "SCHEMES", "Model", "ModelError", "initialise", "resolve"]

MLPS, CNNS, AUTOENCODERS = mlp.MODELS, cnn.MODELS, autoencoder.MODELS
MODELS: dict[str, Model] = {**MLPS, **CNNS, **AUTOENCODERS}


def resolve(name: str, data: Data | None = None, *, inputs: Inputs = "flat") -> Model:
    """Return the model with this `name`: one of `MODELS`, or your own `build(data) -> nn.Module` as "pkg.module:build".

    For your own model, `inputs` gives the kind of inputs, and `data` the task if the model declares none.
    """
    if not is_own(name):
        return lookup(name, MODELS, "model", ModelError)
    build = own(name, "model", ModelError)
    task = getattr(build, "task", None) or getattr(sys.modules.get(build.__module__), "task", None)
    if task is None and data is None:
        raise ModelError(f"model {name!r}: declares no task; set `task` to one of {get_args(Task)}, or pass the data.")
    if task is None:
        task = "reconstruct" if data is None or data.train.labels is None else "predict"
    if task not in get_args(Task):
        raise ModelError(f"model {name!r}: its task is {task!r}; it should be one of {get_args(Task)}.")
    return Model(build, cast(Task, task), inputs)
