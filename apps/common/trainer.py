"""The training of one net, as configured: task, optimizer, pictures. Read from top to bottom."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import fisherfn as ff
from common import optimizers, ranks, runs
from common.config import ConfigError, filled
from common.data import Data, Split, enlarged
from common.loop import Epoch, Settings, Snapshot, Task, Watch, start, train
from common.models import Model, ModelError, initialise, resolve
from common.plots import loss_curves, reconstructions
from common.results import Results
from common.runs import Training
from common.steps import Optimizer
from common.train_config import TrainConfig

TUNED = Path(__file__).parents[1] / "configs" / "tuned.yml"
"""Settings found by `apps/search.py`, by model, data and optimizer; used if the command line gives none."""

FIXED: dict[str, float] = {"lr": 1.0, "damping": 1.0, "kl_bound": 0.01, "momentum": 0.9}
"""Settings of a natural gradient with fixed numbers, for studies at matched damping and for cg_steps."""

METHOD_OPTIONS = {
    "damping_form": "damping_form",
    "structure": "structure",
    "coarse_space": "coarse",
    "krylov": "krylov",
    "coarse_form": "form",
}
"""Options that only some methods have, and the names of the methods' own arguments."""

CURVATURE = (
    "damping", "kl_bound", "ema", *METHOD_OPTIONS, "cg_steps", "fisher", "fisher_samples", "fisher_batch_size",
    "update_every", "invert_every",
)  # fmt: skip
FIRST_ORDER = {"sgd": ("momentum", "nesterov"), "adam": ("beta_1", "beta_2")}
"""Options of the optimizers without curvature, besides learning rate and weight decay."""


def tuned(app: str, model: str, data: str, optim: str) -> dict[str, Any]:
    """Return the recorded settings of a first-order optimizer for this model and data, or the trainer's defaults."""
    if optim in ff.METHODS:  # these choose their own settings
        return {}
    table = yaml.safe_load(TUNED.read_text())
    return {**table["default"][app][optim], **table["tuned"].get(model, {}).get(data, {}).get(optim, {})}


def make_task(config: TrainConfig, data: Data) -> tuple[Task, nn.Module]:
    """Build model and data; inputs are flattened for nets of linear layers, else brought to the net's size."""
    name = config.model or config.model_for(data)
    spec = resolve(name, data, inputs=config.inputs)
    data = enlarged(data, spec.size) if spec.size else data
    net = spec.build(data)
    if not isinstance(net, nn.Module):
        raise ModelError(f"model {name!r}: its function returned {type(net).__name__}; it should return an nn.Module")
    initialise(net, config.init_params, torch.Generator().manual_seed(config.seed))
    net = net.to(config.device)
    model, params, context = ff.functional(net.train())
    predict, _, _ = ff.functional(copy.deepcopy(net).eval())
    splits = [_examples(split, spec, config.device) for split in (data.train, data.test)]
    likelihood = data.reconstruction if spec.task == "reconstruct" else data.prediction
    if likelihood is None:
        raise ConfigError(f"{data.name} has no labels for {name} to predict: choose an autoencoder")
    per_output = splits[0][1][0].numel() if spec.task == "reconstruct" else 1
    drops = _drops(name, model, params, context, splits[0][0][:2])
    return Task(model, predict, params, context, likelihood, splits[0], splits[1], per_output, drops), net


def _drops(name: str, model: Any, params: dict[str, Tensor], context: dict[str, Tensor], x: Tensor) -> bool:
    """Return True if the model needs dropout seeds; raise `ModelError` if it cannot take the data."""
    try:
        with torch.no_grad():
            model(params, x, context)
    except ff.errors.NoiseError:
        return True
    except ff.FisherfnError:
        raise
    except Exception as error:  # of one's own model
        said = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model {name!r} fails for inputs of shape {list(x.shape)}, {type(error).__name__}: {said}; choose a model "
            "and --inputs (flat or image) that fit the data"
        ) from error
    return False


NUMBERS = ("lr", "momentum", "weight_decay", "beta_1", "beta_2", "damping", "kl_bound", "ema")
"""The options that enter a step as numbers, so that one vmapped step can have a value per model."""


def make_optimizer(config: TrainConfig, task: Task) -> Optimizer:
    """Return the optimizer that `--optim` names, for this task."""
    ng = ranks.spread(natural_gradient(config, task)) if config.optim in ff.METHODS else None
    return optimizer_with(config, task, ng, numbers(config))


def check_options(config: TrainConfig, swept: Collection[str] = ()) -> None:
    """Raise `ConfigError` if an option was given, or has several values, that only other optimizers have."""
    own = {*FIRST_ORDER.get(config.optim, ("momentum", *CURVATURE))}
    if config.optim == "exactNG":  # it keeps no average
        own.remove("ema")
    others = {name for options in (*FIRST_ORDER.values(), CURVATURE) for name in options} - own
    for field in dataclasses.fields(config):
        given = field.name in swept or getattr(config, field.name) not in (field.default, "auto")
        if field.name in others and given:
            raise ConfigError(_foreign(field.name, config.optim))
    if config.fisher != "mc" and config.fisher_samples != 1:
        raise ConfigError(f"fisher_samples goes with fisher mc, not {config.fisher}: leave it out")


def _foreign(name: str, optim: str) -> str:
    return f"{name} is no option of {optim}: leave it out, or choose another optim"


def numbers(config: TrainConfig) -> dict[str, float]:
    """Return the options among `NUMBERS` that have a value."""
    found = {name: _number(getattr(config, name)) for name in NUMBERS}
    return {name: value for name, value in found.items() if value is not None}


def optimizer_with(
    config: TrainConfig, task: Task, ng: ff.NaturalGradient | None, given: Mapping[str, Any]
) -> Optimizer:
    """Return the optimizer with these numbers, which may be tensors that are batched under `torch.vmap`.

    Args:
        config: all other settings.
        task: the model.
        ng: the natural gradient; None for sgd and adam.
        given: values of `NUMBERS`; a natural gradient chooses those of lr, momentum and damping that are missing.
    """
    whole = min(config.batch_size, len(task.train[0])) if config.compile else None
    shared: dict[str, Any] = {"weight_decay": given["weight_decay"], "compiled_batch": whole}
    if ng is None:
        lr = _tuned(given.get("lr"), "lr")
        if config.optim == "sgd":
            momentum = given.get("momentum", FIXED["momentum"])
            return optimizers.sgd(
                task.model, task.likelihood, lr=lr, momentum=momentum, nesterov=config.nesterov, **shared
            )
        betas = (given["beta_1"], given["beta_2"])
        return optimizers.adam(task.model, task.likelihood, lr=lr, betas=betas, **shared)
    fixed: dict[str, Any] = {name: given.get(name, value) for name, value in FIXED.items()}
    if config.cg_steps is not None:
        if (config.optim, config.fisher) != ("exactNG", "type2") or config.structure == "block":
            raise ConfigError(
                "cg_steps goes with optim exactNG, fisher type2 and structure full: leave it out otherwise"
            )
        return optimizers.implicit(ng, **fixed, iterations=config.cg_steps, **shared)
    if all(name in given for name in ("lr", "damping", "kl_bound")):
        return optimizers.natural(
            ng, **fixed, ema=given["ema"], cadence=cadence(config), fisher_batch_size=config.fisher_batch_size, **shared
        )
    if config.fisher_batch_size is not None:
        raise ConfigError("fisher_batch_size goes with fixed numbers: give lr, damping and kl_bound, too")
    auto: dict[str, Any] = {name: given.get(name, "auto") for name in ("lr", "momentum", "damping")}
    adaptive = ff.adaptive(ng, **auto, **_length(ng, given), ema=given["ema"], weight_decay=given["weight_decay"])
    return optimizers.adaptive(adaptive, cadence(config), compiled_batch=whole)


def _length(ng: ff.NaturalGradient, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rule of adaptive steps, and their KL bound; 0 is the rule without one, which "auto" need not be."""
    kl_bound = given.get("kl_bound")
    if kl_bound is None or isinstance(kl_bound, Tensor) or kl_bound > 0:
        return {"kl_bound": kl_bound}
    searches = ng.method.name == "exactNG" and not {"lr", "momentum"} & given.keys()
    return {"rule": "line_search" if searches else "model"}


def cadence(config: TrainConfig) -> ff.Cadence:
    """Return the cadence of statistics and inverses: as given, else growing intervals."""
    if config.optim == "exactNG":  # it keeps no average, and one batch's Fisher does not suit the next
        default = ff.Cadence.fixed(1, 1)
    else:
        default = ff.Cadence()
    update, invert = default.update, default.invert
    if config.update_every is not None:
        update = (config.update_every, config.update_every)
    if config.invert_every is not None:
        invert = (config.invert_every, config.invert_every)
    return ff.Cadence(update, invert, default.growth)


def natural_gradient(config: TrainConfig, task: Task) -> ff.NaturalGradient:
    """Build the natural gradient of this task."""
    x = task.train[0][: config.batch_size]
    return ff.natural_gradient(
        task.model, task.params, x, likelihood=task.likelihood, method=method(config), fisher=config.fisher,
        samples=config.fisher_samples, context=task.seeded(task.context, x.shape[0], torch.Generator().manual_seed(0)),
    )  # fmt: skip


def method(config: TrainConfig) -> ff.Method:
    """Build the method that `--optim` names, with those of its options that were given."""
    build = ff.METHODS[config.optim]
    known = inspect.signature(build).parameters
    options: dict[str, Any] = {}
    if config.optim == "twolevel_kfac":
        published = config.coarse_space in ("tselepidis", "tpselepedis")
        options = {"form": "additive" if published else "balanced"}
        if config.damping_form is not None:
            options["fine"] = ff.kfac(damping_form=config.damping_form)
            config = dataclasses.replace(config, damping_form=None)
    for name, parameter in METHOD_OPTIONS.items():
        if getattr(config, name) is not None:
            if parameter not in known:
                raise ConfigError(_foreign(name, config.optim))
            options[parameter] = getattr(config, name)
    return build(**options)


class Supervised(Training[TrainConfig]):
    """The training of one net on examples with targets: labels, or the inputs themselves."""

    spreads = True

    def __init__(self, config: TrainConfig, data: Data) -> None:
        super().__init__(config, data)
        self.task, net = make_task(config, data)
        ranks.check_options(config, net)
        self.optimizer = make_optimizer(config, self.task)

    @staticmethod
    def completed(config: TrainConfig, data: Data) -> TrainConfig:
        """Return the configuration with the default model and, for first-order optimizers, the tuned settings.

        Raises:
            ConfigError: an option that the optimizer does not have.
        """
        check_options(config)
        model = config.model or config.model_for(data)
        config = filled(config, {"model": model})
        settings = tuned(config.app, model, data.name, config.optim)
        open_ones = {name: value for name, value in settings.items() if _number(getattr(config, name)) is None}
        return dataclasses.replace(config, **open_ones)

    def start(self) -> Snapshot:
        """Return the snapshot before the first step."""
        return start(self.task, self.optimizer)

    def epochs(self, at: Snapshot, watch: Watch) -> Iterator[Epoch]:
        """Train from a snapshot and yield each epoch."""
        config = self.config
        label = f"{self.data.name} {config.optim}"
        rules = Settings(config.num_epochs, config.batch_size, config.seed, config.num_workers, not config.quiet, label)
        return train(self.task, self.optimizer, at, rules, watch)

    def described(self) -> str:
        """Return all settings as a file that `--config` reads, and the coverage report of a natural gradient."""
        config = self.config
        report = f"\n{natural_gradient(config, self.task).layout}\n" if config.optim in ff.METHODS else ""
        return super().described() + report

    def line(self, metrics: dict[str, float]) -> str:
        """Format the metrics of an epoch for the terminal."""
        accuracy = f"  test accuracy {metrics['test_accuracy']:.3f}" if "test_accuracy" in metrics else ""
        skipped = f"  {metrics['skipped']:.0f} steps skipped as not ok" if metrics["skipped"] else ""
        losses = f"train loss {metrics['train_loss']:.5f}  test loss {metrics['test_loss']:.5f}"
        return f"epoch {metrics['epoch']:3.0f}  {losses}{accuracy}  {metrics['seconds']:7.1f} s{skipped}"

    def draw(self, results: Results, at: Snapshot) -> None:
        """Draw losses per epoch and per second, and for autoencoders reconstructions of test images."""
        loss_curves({results.path.name: results.metrics()}, results.path / "loss.png")
        task = self.task
        if task.per_output == 1:
            return
        x = task.test[0][:10]
        with torch.no_grad():
            outputs, _ = task.predict(at.params, x, at.context)
        images = outputs.sigmoid() if isinstance(task.likelihood, ff.Bernoulli) else outputs
        shape = (-1, *self.data.test.inputs.shape[1:])
        reconstructions(x.reshape(shape).cpu(), images.reshape(shape).cpu(), results.path / "reconstructions.png")


def run(config: TrainConfig, app: str | None = None) -> Path:
    """Train as configured and return the result folder; see `common.runs.run`."""
    return runs.run(Supervised, config, app)


def _examples(split: Split, spec: Model, device: str) -> tuple[Tensor, Tensor]:
    x = (split.inputs.flatten(1) if spec.inputs == "flat" else split.inputs).to(device)
    return x, x if spec.task == "reconstruct" or split.labels is None else split.labels.to(device)


def _tuned(value: float | str | None, name: str) -> float:
    number = _number(value)
    if number is None:
        raise ConfigError(f"{name} is open: give --{name}, or enter it in {TUNED.name}")
    return number


def _number(value: float | str | None) -> float | None:
    """Return a number, or None if it is open, for which "auto" is another word."""
    return None if isinstance(value, str) else value
