"""The GAN trainer: optimizers of either player, exact resume, FID, pictures, and errors that teach."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from PIL import Image

import fisherfn as ff
from common import runs
from common.checkpoints import load_checkpoint
from common.config import ConfigError, read
from common.data import DataError, load
from common.gan import loop, quality, trainer
from common.gan.config import DATA, PLAYERS, GanConfig
from common.gan.pictures import ANIMATED, COLUMNS, ENLARGED, grid
from common.gan.quality import Quality, classifier_features
from common.gan.trainer import make_table, run
from common.models.gan import GANS
from common.results import read_metrics

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "apps/configs/gan").glob("*/*.yml"))


def configured(*more: str) -> GanConfig:
    common = "--data own:digits --width 0.02 --z_dim 5 --batch_size 12 --crit_repeats 2 --fid none --quiet"
    natural = "--T_cov 2 --T_inv 3 --damping 0.1"
    return read(GanConfig, [*common.split(), *natural.split(), *more])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint.pt")[0]


def equal(one: Path, two: Path) -> bool:
    first, second = tensors(one), tensors(two)
    return first.keys() == second.keys() and all(torch.equal(first[path], second[path]) for path in first)


@pytest.mark.parametrize("optim", ["adam", "sgda", "kfac", "exactNG", "kfac without a generator's damping"])
def test_optimizers_play_both_parts_and_resume_exactly(own, optim):
    optim, *auto = optim.split(" ", 1)
    names = ("--gen_optim", optim, "--crit_optim", optim, *(["--gen_damping", "auto"] if auto else []))
    straight = run(configured(*names, "--n_epochs", "2", "--result_name", "straight"))
    assert straight == Path("results/train_gan/straight")
    metrics = read_metrics(straight)
    assert [(m["epoch"], m["step"], m["skipped"]) for m in metrics] == [(0, 0, 0), (1, 2, 0), (2, 4, 0)]
    before, after = (ff.tree.flatten(loop.start(make_table(configured(*names), load("own:digits"))).params), {})
    after = {path.removeprefix("params/"): t for path, t in tensors(straight).items() if path.startswith("params/")}
    assert before.keys() == after.keys()
    moved = {path.partition("/")[0] for path in before if not torch.equal(before[path], after[path])}
    assert moved == {"generator", "critic"}
    run(configured(*names, "--n_epochs", "1", "--result_name", "parts"))
    assert equal(straight, run(configured(*names, "--n_epochs", "2", "--result_name", "parts", "--resume")))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_stopped_within_an_epoch_goes_on_as_if_it_had_not(own, stop, monkeypatch):
    straight = run(configured("--n_epochs", "2", "--result_name", "straight"))

    class Killed(Exception):
        pass

    whole = runs.watched

    def killed(results, save_every, signals, step, at):
        whole(results, save_every, signals, step, at)
        if step == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "watched", killed)
        with pytest.raises(Killed):
            run(configured("--n_epochs", "2", "--result_name", "parts", "--save_every", "1"))
    resumed = run(configured("--n_epochs", "2", "--result_name", "parts", "--resume"))
    assert equal(straight, resumed)
    one, two = ([{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(f)] for f in (straight, resumed))
    assert one == two  # the mean losses of the broken epoch included


def test_a_round_is_by_hand_what_it_is_in_the_loop(own):
    """Adam for both: the critic's steps one after the other, then the generator's against the new critic."""
    table = make_table(configured("--gen_optim", "adam", "--crit_optim", "adam"), load("own:digits"))
    start = loop.start(table)
    (_, last) = loop.train(table._replace(rules=table.rules._replace(num_epochs=1)), start, lambda at: {})
    draws, game = loop.generator_of(0, 0, stream=1), table.game
    params, context, state = dict(start.params), dict(start.context), dict(start.state)
    losses = {"gen_loss": 0.0, "crit_loss": 0.0}  # means over the epoch's steps
    for index in range(2):
        for repeat in range(2):
            real = table.images[torch.randint(24, (12,), generator=draws)]
            fake, _ = game.images(params["generator"], torch.randn(12, 5, generator=draws), context["generator"])
            mix = torch.rand(12, 1, 1, 1, generator=draws)
            batch = torch.cat([real, fake]), torch.tensor([-2.0] * 12 + [2.0] * 12), mix
            new = table.optimizers["critic"].step(
                params["critic"], state["critic"], batch, context["critic"], (), 2 * index + repeat
            )
            params["critic"], state["critic"], context["critic"] = new.params, new.state, new.context
            losses["crit_loss"] += float(new.info.loss) / 4
        z = torch.randn(12, 5, generator=draws)
        seen = {"generator": context["generator"], "critic": params["critic"], "critic_buffers": context["critic"]}
        new = table.optimizers["generator"].step(
            params["generator"], state["generator"], (z, -torch.ones(12)), seen, (), index
        )
        params["generator"], state["generator"] = new.params, new.state
        context["generator"] = new.context["generator"]
        losses["gen_loss"] += float(new.info.loss) / 2
    assert {name: last.metrics[name] for name in losses} == pytest.approx(losses)
    by_hand, looped = ff.tree.flatten((params, context)), ff.tree.flatten((last.snapshot.params, last.snapshot.context))
    assert by_hand.keys() == looped.keys() and all(torch.equal(by_hand[path], looped[path]) for path in by_hand)


def test_a_step_that_is_not_ok_leaves_its_player_as_it_was(own):
    table = make_table(configured(), load("own:digits"))
    start = loop.start(table)
    params = {**start.params, "critic": {name: p * torch.nan for name, p in start.params["critic"].items()}}
    at, bad = loop._round(table, start._replace(params=params), torch.Generator().manual_seed(0))
    assert len(bad) == 3 and (at.skipped, at.in_a_row, at.step) == (1, 1, 1)
    for name in ("generator", "critic"):
        same = ff.tree.map(lambda a, b: torch.equal(a, b) or bool(a.isnan().all()), at.params[name], params[name])
        assert all(same.values()), name
    with pytest.raises(ff.errors.NonFiniteError):
        list(loop.train(table, start._replace(params=params), lambda at: {}))


def test_failed_rounds_in_a_row_are_counted_across_epochs(own, monkeypatch):
    def fail(table, at, draws):
        return at._replace(step=at.step + 1, batches=at.batches + 1, in_a_row=at.in_a_row + 1), []

    table = make_table(configured("--n_epochs", "2"), load("own:digits"))
    monkeypatch.setattr(loop, "_round", fail)
    *_, last = loop.train(table, loop.start(table), lambda at: {})
    assert last.snapshot.in_a_row == 2 * table.rounds


def test_the_generators_own_damping_and_clip_are_its_alone(own, monkeypatch):
    made = []
    plain = trainer.optimizers.natural

    def noted(ng, **settings):
        made.append((settings["damping"], settings["kl_bound"], settings["penalty"] is not None))
        return plain(ng, **settings)

    monkeypatch.setattr(trainer.optimizers, "natural", noted)
    more = ("--damping", "0.1", "--kl_bound", "0.2")
    make_table(configured(*more), load("own:digits"))
    make_table(configured(*more, "--gen_damping", "3", "--gen_kl_bound", "0"), load("own:digits"))
    assert made == [(0.1, 0.2, False), (0.1, 0.2, True), (3.0, 0.0, False), (0.1, 0.2, True)]


@pytest.mark.parametrize("optim", ["adam", "sgda", "kfac"])
def test_every_number_of_the_configuration_reaches_its_player(own, monkeypatch, optim):
    name, made = {"adam": "adam", "sgda": "sgd", "kfac": "natural"}[optim], []
    build = getattr(trainer.optimizers, name)
    monkeypatch.setattr(trainer.optimizers, name, lambda *args, **kw: made.append(kw) or build(*args, **kw))
    numbers = (
        "--gen_lr 0.2 --crit_lr 0.3 --beta_1 0.4 --beta_2 0.6 --momentum 0.7 --weight_decay 0.08 --ema 0.5 "
        "--damping 0.1 --kl_bound 0.05 --T_cov 4 --T_inv 9"
    )
    make_table(configured("--gen_optim", optim, "--crit_optim", optim, *numbers.split()), load("own:digits"))
    expected = {
        "adam": {"betas": (0.4, 0.6)},
        "sgda": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.08},
        "kfac": {"momentum": 0.7, "weight_decay": 0.08, "ema": 0.5, "damping": 0.1, "kl_bound": 0.05,
                 "cadence": ff.Cadence.fixed(4, 9)},
    }[optim]  # fmt: skip
    generator, critic = made
    assert generator.pop("penalty") is None and callable(critic.pop("penalty"))
    assert generator == {"lr": 0.2, **expected} and critic == {"lr": 0.3, **expected}


def test_the_seed_decides_nets_and_noise(own):
    tables = [make_table(configured("--seed", seed), load("own:digits")) for seed in ("0", "0", "1")]
    first, same, other = (ff.tree.flatten(loop.start(table).params) for table in tables)
    weights = [path for path in first if path.endswith("weight") and first[path].ndim > 1]
    assert all(torch.equal(first[path], same[path]) for path in first)
    assert weights and not any(torch.equal(first[path], other[path]) for path in weights)


def test_each_epoch_has_noise_of_its_own(own, monkeypatch):
    drawn, plain = [], torch.randn
    table = make_table(configured("--gen_optim", "adam", "--crit_optim", "adam"), load("own:digits"))
    monkeypatch.setattr(loop.torch, "randn", lambda *size, **how: drawn.append(plain(*size, **how)) or drawn[-1])
    list(loop.train(table._replace(rules=table.rules._replace(num_epochs=2)), loop.start(table), lambda at: {}))
    assert len(drawn) == len({tuple(z.flatten().tolist()) for z in drawn}) == 2 * 2 * 3  # critic twice, generator


def test_the_weight_of_the_penalty_is_the_configurations(own):
    def penalty(weight):
        table = make_table(configured("--c_lambda", weight), load("own:digits"))
        game, images = table.game, table.images[:4]
        batch = torch.cat([images, -images]), torch.zeros(8), torch.full((4, 1, 1, 1), 0.5)
        return float(game.critic.penalty(game.critic.params, batch, game.critic.context))

    assert penalty("6") == pytest.approx(3 * penalty("2")) != 0


def test_shown_images_are_those_of_the_generator_in_evaluation_mode(own):
    """Each image is then its own, whatever the others are; in training mode batch norm mixes them."""
    config = configured()
    table = make_table(config, load("own:digits"))
    start, game = loop.start(table), table.game
    params, buffers = start.params["generator"], start.context["generator"]
    z = torch.randn(6, config.z_dim, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([game.shown(params, one, buffers)[0] for one in z.split(1)])
    found = trainer.fakes(config, game, start, 6, seed=4)
    torch.testing.assert_close(found, (alone + 1) / 2)
    assert not torch.allclose(found, (game.images(params, z, buffers)[0] + 1) / 2, atol=1e-3)


def test_real_images_are_brought_to_the_range_of_the_generator(own):
    data = load("own:digits")
    assert torch.equal(make_table(configured(), data).images, 2 * data.train.inputs - 1)


@pytest.mark.parametrize("bound", ["0.2", "0"])
def test_the_generator_finds_its_own_damping_and_the_critic_keeps_its_number(own, bound, monkeypatch):
    made, plain = [], trainer.optimizers.adaptive

    def noted(opt, cadence):
        made.append(opt)
        return plain(opt, cadence)

    monkeypatch.setattr(trainer.optimizers, "adaptive", noted)
    more = ("--damping", "0.1", "--gen_kl_bound", bound, "--gen_damping", "auto")
    table = make_table(configured(*more), load("own:digits"))
    assert isinstance(loop.start(table).state["generator"], ff.AdaptiveState)
    table = table._replace(rules=table.rules._replace(num_epochs=2))
    *_, last = loop.train(table, loop.start(table), lambda at: {})
    state = last.snapshot.state
    assert float(state["generator"].curvature.damping) not in (0.1, 1.0)
    assert float(state["critic"].curvature.damping) == pytest.approx(0.1)
    (opt,) = made
    assert not opt.look_back, "the other player moves this one's loss"
    assert (opt.rule, opt.kl_bound) == (("clip", 0.2) if bound == "0.2" else ("model", None))


def test_a_critic_with_a_penalty_cannot_find_its_damping(own):
    with pytest.raises(ConfigError, match="without a penalty.*--gen_damping auto"):
        make_table(configured("--damping", "auto"), load("own:digits"))


def test_each_players_steps_are_counted_for_its_own_cadence(own):
    table = make_table(configured(), load("own:digits"))
    seen = {"generator": [], "critic": []}

    def counted(name):
        optimizer = table.optimizers[name]
        return optimizer._replace(step=lambda *args: (seen[name].append(args[-1]), optimizer.step(*args))[1])

    table = table._replace(optimizers={name: counted(name) for name in seen})
    list(loop.train(table._replace(rules=table.rules._replace(num_epochs=2)), loop.start(table), lambda at: {}))
    assert seen == {"generator": list(range(4)), "critic": list(range(8))}


# ------------------------------------------------------------------------------------------------------------ quality


class Pixels(torch.nn.Module):
    num_features = 4

    def forward(self, images):
        return images[:, 0, :2, :2].flatten(1)


def test_the_distance_is_frechets():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(2, 1200, 1, 28, 28, generator=generator)
    fake = (fake * 0.5 + 0.2).roll(1, 0)
    one, two = (Pixels()(x).double().numpy() for x in (real, fake))
    covariances = np.cov(one.T), np.cov(two.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    measure = Quality(Pixels(), real)
    assert measure.fid(fake) == pytest.approx(expected, rel=1e-5)
    assert measure.fid(fake) == pytest.approx(expected, rel=1e-5)  # a second time: earlier fakes are forgotten
    assert measure.fid(real) == pytest.approx(0, abs=1e-6)


def test_features_are_what_the_classifiers_last_layer_is_fed(own, monkeypatch):
    monkeypatch.setattr(quality, "EPOCHS", 2)
    data = load("own:digits")
    config = configured()
    features, accuracy = classifier_features(config, data)
    folder = Path("results/train_cnn/features-TINY")
    assert read_metrics(folder)[-1]["test_accuracy"] == accuracy
    trained = tensors(folder)
    padded = torch.nn.functional.pad(data.test.inputs, (2, 2, 2, 2))
    with torch.no_grad():
        logits = features(data.test.inputs) @ trained["params/11.weight"].T + trained["params/11.bias"]
        torch.testing.assert_close(features.body(padded), features(data.test.inputs))
    assert float((logits.argmax(1) == data.test.labels).double().mean()) == pytest.approx(accuracy)
    written = (folder / "checkpoint.pt").stat().st_mtime_ns
    classifier_features(config, data)
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == written  # trained once
    monkeypatch.setattr(quality, "EPOCHS", 3)
    classifier_features(config, data)
    assert read_metrics(folder)[-1]["epoch"] == 3  # what was interrupted is finished


def test_fid_is_measured_when_due_and_pictures_are_made(own, drawn, monkeypatch):
    monkeypatch.setattr(quality, "EPOCHS", 1)
    more = "--fid classifier --fid_every 2 --fid_samples 70 --n_epochs 3 --result_name r".split()
    folder = run(configured(*more))
    metrics = read_metrics(folder)
    assert [m["epoch"] for m in metrics if "fid" in m] == [0, 2, 3]
    assert [m["epoch"] for m in metrics if "fid_test" in m] == [0]
    assert {p.name for p in folder.glob("samples/*")} == {f"epoch-000{k}.png" for k in range(4)}
    assert {p.name for p in folder.glob("*.png")} | {p.name for p in folder.glob("*.gif")} == {
        "samples.png", "samples.gif", "curves.png",
    }  # fmt: skip
    with Image.open(folder / "samples.gif") as animation:
        assert animation.n_frames == len({p.read_bytes() for p in folder.glob("samples/*")}) <= ANIMATED


def test_a_grid_shows_each_image_where_it_belongs(tmp_path):
    images = torch.arange(10.0).div(10).reshape(10, 1, 1, 1).expand(10, 1, 3, 3)
    grid(images, tmp_path / "g.png")
    with Image.open(tmp_path / "g.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 4 * ENLARGED, COLUMNS * 4 * ENLARGED)
    assert [int(pixels[0, 8 * k]) for k in range(8)] == [round(255 * k / 10) for k in range(8)]
    assert [int(pixels[8, 8 * k]) for k in range(3)] == [204, 230, 255]


# ------------------------------------------------------------------------------------------------------ configurations


def test_every_shipped_configuration_is_complete_and_read():
    found = {(path.parent.name, path.stem) for path in CONFIGS}
    names = ("adam", "sgda", "kfac1", "kfac2", "kfac3")
    assert found == {(data, name) for data in ("MNIST", "CIFAR10", "DIGITS") for name in names}
    for path in CONFIGS:
        config = read(GanConfig, ["--config", str(path)])
        assert config.data == path.parent.name
        players = {"adam": ("adam", "adam"), "sgda": ("sgda", "sgda"), "kfac1": ("kfac", "adam"),
                   "kfac2": ("kfac", "kfac"), "kfac3": ("adam", "kfac")}  # fmt: skip
        assert (config.gen_optim, config.crit_optim) == players[path.stem]
        keys = set(yaml.safe_load(path.read_text()))
        assert {"n_epochs", "batch_size", "z_dim", "gen_optim", "crit_optim", "gen_lr", "crit_lr", "data"} <= keys


def test_the_originals_keys_are_all_known(tmp_path):
    keys = """n_epochs: 3
batch_size: 16
device: cpu
z_dim: 7
gen_optim: kfac
crit_optim: sgda
gen_lr: 0.1
crit_lr: 0.2
clipping: 0.3
damping: 0.4
T_cov: 5
T_inv: 6
momentum: 0.7
beta_1: 0.4
beta_2: 0.8
c_lambda: 9.0
crit_repeats: 2
weight_decay: 0.01
data_root: there
data: MNIST
"""
    (tmp_path / "c.yml").write_text(keys)
    config = read(GanConfig, ["--config", str(tmp_path / "c.yml"), "--T_inv", "60"])
    assert (config.num_epochs, config.update_every, config.invert_every, config.data_path) == (3, 5, 60, "there")
    assert (config.gen_lr, config.crit_lr, config.c_lambda, config.weight_decay) == (0.1, 0.2, 9.0, 0.01)


@pytest.mark.parametrize(
    "line, message",
    [
        ("gen_optm: adam", "unknown key gen_optm; did you mean gen_optim?"),
        ("gen_optim: adm", "gen_optim must be one of adam, sgda, .*got adm; did you mean adam?"),
        ("gen_lr: -0.1", "gen_lr must be > 0, got -0.1"),
        ("crit_lr: fast", "crit_lr must be float, got fast"),
        ("crit_repeats: 0", "crit_repeats must be > 0, got 0"),
        ("c_lambda: .nan", "c_lambda must be finite, got nan"),
        ("z_dim: 1.5", "z_dim must be int, got 1.5"),
        ("data:", f"data must be {'str'}, got null"),
        ("fid: good", "fid must be one of classifier, inception, none"),
        ("width: 0", "width must be > 0"),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(tmp_path, line, message):
    (tmp_path / "c.yml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        read(GanConfig, ["--config", str(tmp_path / "c.yml")])


def test_missing_data_and_unusable_choices_say_what_to_do(own):
    with pytest.raises(DataError, match="MNIST"):
        run(configured("--data", "MNIST", "--data_path", "nowhere"))
    with pytest.raises(ConfigError, match="fid inception needs torch-fidelity and a download.*Try --fid classifier"):
        run(configured("--fid", "inception"))
    assert not Path("results").exists()


def command(name: str) -> list[str]:
    more = f"--width 0.02 --n_epochs 1 --batch_size 500 --fid none --result_name {name}".split()
    return [
        sys.executable,
        str(ROOT / "apps/train_gan.py"),
        "--config",
        str(ROOT / "apps/configs/gan/DIGITS/kfac2.yml"),
        *more,
    ]


def test_the_command_line_runs_a_shipped_configuration(own):
    done = subprocess.run(command("kfac2"), capture_output=True, text=True, check=True)
    assert re.search(r"epoch   1  generator +-?\d+\.\d+  critic", done.stdout)
    assert Path("results/train_gan/kfac2/samples.gif").is_file()


def test_the_command_line_refuses_an_existing_result(own):
    Path("results/train_gan/kfac2").mkdir(parents=True)
    again = subprocess.run(command("kfac2"), capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr


def test_choices_are_what_there_is():
    assert set(PLAYERS) == {"adam", "sgda", *ff.METHODS} and set(GANS) == {"dcgan", "residual"}
    assert {"DIGITS", "MNIST", "CIFAR10"} <= set(DATA)
