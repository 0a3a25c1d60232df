"""Options of a configuration reach the nets, natural gradients and optimizers that are built, one by one."""

import pytest
import torch

import fisherfn as ff
from common import trainer
from common.config import ConfigError, read
from common.data import load
from common.models import ModelError
from common.train_config import TrainConfig
from common.trainer import make_optimizer, make_task

COMMON = ("--data", "own:load", "--model", "own:build", "--batch_size", "10")


def built(monkeypatch, name, *more):
    """Return the arguments with which the trainer builds the optimizer `common.optimizers.<name>`."""
    made = []
    build = getattr(trainer.optimizers, name)
    monkeypatch.setattr(trainer.optimizers, name, lambda *args, **kw: made.append((args, kw)) or build(*args, **kw))
    config = read(TrainConfig, [*COMMON, *more])
    task, _ = make_task(config, load("own:load"))
    make_optimizer(config, task)
    ((args, settings),) = made
    return args, settings


def test_every_number_of_a_natural_gradient_reaches_it(own, monkeypatch):
    more = (
        "--optim kfac --lr 0.3 --damping 0.04 --kl_bound 0.05 --momentum 0.6 --ema 0.7 --weight_decay 0.08 "
        "--update_every 9 --invert_every 11 --fisher type2 --fisher_samples 3 --fisher_batch_size 6"
    )
    (ng,), settings = built(monkeypatch, "natural", *more.split())
    assert settings == {
        "lr": 0.3, "damping": 0.04, "kl_bound": 0.05, "momentum": 0.6, "ema": 0.7, "weight_decay": 0.08,
        "cadence": ff.Cadence((9, 9), (11, 11), ff.Cadence().growth), "fisher_batch_size": 6, "compiled_batch": None,
    }  # fmt: skip
    assert (ng.fisher_kind, ng.samples, ng.method) == ("type2", 3, ff.kfac())


def test_every_number_of_an_adaptive_natural_gradient_reaches_it(own, monkeypatch):
    more = "--optim ekfac --damping 0.04 --kl_bound 0.05 --momentum 0.6 --ema 0.7 --weight_decay 0.08 --invert_every 7"
    (opt, cadence), _ = built(monkeypatch, "adaptive", *more.split())
    state = opt.init(make_task(read(TrainConfig, COMMON), load("own:load"))[0].params)
    assert (opt.kl_bound, opt.momentum, opt.weight_decay) == (0.05, 0.6, 0.08)
    assert float(state.curvature.damping) == pytest.approx(0.04) and float(state.curvature.ema) == pytest.approx(0.7)
    assert (cadence.update, cadence.invert) == (ff.Cadence().update, (7, 7))


@pytest.mark.parametrize(
    ("more", "rule", "kl_bound"),
    [
        ("--optim kfac", "clip", 1e-3),
        ("--optim kfac --kl_bound 0", "model", None),
        ("--optim kfac --kl_bound 0 --momentum 0.9", "model", None),
        ("--optim exactNG --kl_bound 0", "line_search", None),
        ("--optim exactNG --kl_bound 0 --lr 0.1", "model", None),
    ],
)
def test_a_kl_bound_of_0_is_no_bound_on_a_classifier(own, monkeypatch, more, rule, kl_bound):
    (opt, _), _ = built(monkeypatch, "adaptive", *more.split())
    assert (opt.rule, opt.kl_bound) == (rule, kl_bound)


def test_every_number_of_a_first_order_optimizer_reaches_it(own, monkeypatch):
    with monkeypatch.context() as patch:
        _, sgd = built(patch, "sgd", *"--optim sgd --lr 0.3 --momentum 0.6 --nesterov true --weight_decay 0.08".split())
    _, adam = built(monkeypatch, "adam", *"--optim adam --lr 0.3 --beta_1 0.6 --beta_2 0.7 --weight_decay 0.08".split())
    assert sgd == {"lr": 0.3, "momentum": 0.6, "nesterov": True, "weight_decay": 0.08, "compiled_batch": None}
    assert adam == {"lr": 0.3, "betas": (0.6, 0.7), "weight_decay": 0.08, "compiled_batch": None}


@pytest.mark.parametrize(
    ("optim", "given"),
    [
        ("sgd", "--damping 3"),
        ("sgd", "--beta_1 0.5"),
        ("adam", "--momentum 0.5"),
        ("adam", "--nesterov true"),
        ("adam", "--kl_bound 0"),
        ("adam", "--structure block"),
        ("adam", "--fisher type2"),
        ("adam", "--ema 0.5"),
        ("adam", "--update_every 3"),
        ("kfac", "--nesterov true"),
        ("kfac", "--beta_2 0.9"),
    ],
)
def test_an_option_of_other_optimizers_is_an_error(own, optim, given):
    config = read(TrainConfig, [*COMMON, "--optim", optim, *given.split()])
    with pytest.raises(ConfigError, match=f"{given.split()[0][2:]} is no option of {optim}"):
        trainer.Supervised.completed(config, load("own:load"))


@pytest.mark.parametrize("optim", ["sgd", "adam", "kfac", "exactNG"])
def test_no_option_left_at_its_default_is_an_error(own, optim):
    trainer.Supervised.completed(
        read(TrainConfig, [*COMMON, *f"--optim {optim} --damping auto --momentum auto".split()]), load("own:load")
    )


def test_steps_are_compiled_for_whole_batches_of_any_optimizer(own, monkeypatch):
    examples = len(load("own:load").train[0])
    for optim, factory in (("sgd", "sgd"), ("kfac", "adaptive")):
        for asked, whole in ((7, 7), (10**6, examples)):
            with monkeypatch.context() as patch:
                more = f"--optim {optim} --compile true --batch_size {asked}" + (" --lr 0.3" if optim == "sgd" else "")
                _, settings = built(patch, factory, *more.split())
            assert settings["compiled_batch"] == whole


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("lambda data: None", r"model 'own:wrong': its function returned NoneType; it should return an nn.Module"),
        ("lambda data: nn.Linear(15, 2)", r"fails for inputs of shape \[2, 12\], RuntimeError: .*choose a model and"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_named(own, build, message):
    with (own / "own.py").open("a") as file:
        file.write(f"\nwrong = {build}\n")
    with pytest.raises(ModelError, match=message):
        make_task(read(TrainConfig, ["--data", "own:load", "--model", "own:wrong"]), load("own:load"))


def test_the_seed_and_the_scheme_decide_the_initial_parameters(own):
    def params(*more):
        return make_task(read(TrainConfig, [*COMMON, *more]), load("own:load"))[0].params

    first, same, seed, scheme = params(), params(), params("--seed", "1"), params("--init_params", "kaiming_normal")
    assert all(torch.equal(first[name], same[name]) for name in first)
    weights = [name for name in first if first[name].ndim == 2]
    assert weights and not any(torch.equal(first[name], other[name]) for other in (seed, scheme) for name in weights)


def test_a_recorded_setting_fills_what_is_open_and_leaves_what_is_given(own, monkeypatch):
    monkeypatch.setattr(trainer, "tuned", lambda app, model, data, optim: {"lr": 7.0, "momentum": 0.2})
    data = load("own:load")

    def completed(*more):
        config = trainer.Supervised.completed(read(TrainConfig, [*COMMON, "--optim", "sgd", *more]), data)
        return config.lr, config.momentum

    assert completed() == completed("--lr", "auto") == (7.0, 0.2)
    assert completed("--lr", "0.3") == (0.3, 0.2) and completed("--momentum", "0") == (7.0, 0.0)
