"""The nets of the zoo: small configurations with random weights, each with a batch of inputs and targets.

A name is `source/net`. The sources are the packages that nets come from: `torch` (written here), `timm`, `torchvision`
and `transformers`. A package is imported only when one of its nets is made.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fisherfn as ff
from common.zoo import plain, presets

BATCH = 8
CLASSES = 10
TOKENS = 12
"""Tokens of a sequence."""
VOCABULARY = 99


class Problem(NamedTuple):
    """A net with a batch for it."""

    net: nn.Module
    x: Any
    y: Any
    likelihood: ff.Likelihood


def names() -> list[str]:
    """Return the names of all nets, those of one source together."""
    return [f"{source}/{name}" for source, nets in SOURCES.items() for name in nets]


def make(name: str) -> Problem:
    """Make the net of this name, with weights and data from the global generator at seed 0."""
    source, _, net = name.partition("/")
    torch.manual_seed(0)
    with torch.random.fork_rng():
        return MAKERS[source](net)


def torchvision() -> Any:
    """Import torchvision, even if its compiled operators were built for another torch.

    The operators (non-maximum suppression and the like) then are missing, and the nets of the zoo use none.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # the operators go with it
        return importlib.import_module("torchvision")


_KEPT: list[Any] = []


def preload() -> None:
    """Import the packages that are installed, so that a forked process has them."""
    with contextlib.suppress(ImportError):
        torchvision()
    for name in ("timm", "transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def installed(name: str) -> bool:
    """Whether the packages that a net comes from are installed."""
    needed = {"torch": [], "timm": ["torchvision", "timm"]}.get(name.partition("/")[0], [name.partition("/")[0]])
    return all(importlib.util.find_spec(package) for package in needed)


def _classes(*shape: int, of: int = CLASSES) -> Tensor:
    return torch.randint(of, (BATCH, *shape))


def _classifier(net: nn.Module, x: Any) -> Problem:
    return Problem(net, x, _classes(), ff.Categorical())


def _torch(name: str) -> Problem:
    net, x, target = plain.NETS[name]()
    if isinstance(target, int):
        return Problem(net, x, _classes(of=target), ff.Categorical())
    if target.is_floating_point():
        return Problem(net, x, target, ff.Gaussian())
    return Problem(net, x, target, ff.Categorical())


def _timm(name: str) -> Problem:
    torchvision()
    timm = importlib.import_module("timm")
    size, options = presets.TIMM[name]
    net = timm.create_model(name, num_classes=CLASSES, **options)
    return _classifier(net, torch.randn(BATCH, 3, size, size))


def _torchvision(name: str) -> Problem:
    models = importlib.import_module(torchvision().__name__ + ".models")
    shape, options = presets.TORCHVISION[name]
    net = presets.torchvision_net(models, name, {"num_classes": CLASSES, **options})
    return _classifier(net, torch.randn(BATCH, *shape))


def _transformers(name: str) -> Problem:
    torchvision()  # some models look whether it is there
    library = importlib.import_module("transformers")
    kind, options = presets.TRANSFORMERS[name]
    made = getattr(library, name)
    values = {**presets.SMALL, **presets.KINDS[kind], **options}
    config = made.config_class(**{option: value for option, value in values.items() if value is not None})
    net = made(config)
    x = inputs(kind, config)
    classes = VOCABULARY if kind in ("causal", "masked", "pair") else config.num_labels
    y = _classes(TOKENS, of=classes) if kind in ("causal", "masked", "pair") else _classes(of=classes)
    return Problem(net, x, y, ff.Categorical())


def inputs(kind: str, config: Any) -> Mapping[str, Tensor]:
    """Return the inputs of a kind of net: token ids with a mask as tokenizers pad, pictures, or a waveform."""
    if kind == "image":
        size = config.image_size if isinstance(getattr(config, "image_size", 32), int) else config.image_size[0]
        return {"pixel_values": torch.randn(BATCH, 3, size, size)}
    if kind == "audio":
        return {"input_values": torch.randn(BATCH, 800)}
    ids = torch.randint(5, VOCABULARY, (BATCH, TOKENS))
    ids[:, -4] = 2  # the end of the text, before what is padding in half of the sequences
    mask = torch.ones_like(ids)
    if kind != "causal":
        mask[BATCH // 2 :, -3:] = 0
    if kind == "pair":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(5, VOCABULARY, ids.shape)}
    return {"input_ids": ids, "attention_mask": mask}


SOURCES: dict[str, list[str]] = {
    "torch": list(plain.NETS),
    "timm": list(presets.TIMM),
    "torchvision": list(presets.TORCHVISION),
    "transformers": list(presets.TRANSFORMERS),
}
MAKERS: dict[str, Callable[[str], Problem]] = {
    "torch": _torch,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
