"""FACES: 25×25 patches of the Olivetti faces, after Hinton & Salakhutdinov (Science 313, 2006, supporting material).

`newfaces_rot_single.mat` is their set of 165,600 patches. Without it, patches are cut from the 400 faces themselves
(`olivettifaces.mat`, 64×64, ten of each of 40 people) as they describe it: rotated by −90° to 90°, scaled by 1.4 to
1.8, cropped and subsampled, thirty people for training and ten for testing. The crop is taken to be the central 64×64
pixels of the enlarged face: 64 / 1.4 ≈ 64 / √2, so whatever the rotation, the patch stays inside the face.

Pixels are standardised as theirs: each with mean zero, all divided by one number that makes the mean variance one.
Squared errors are therefore in the published units, 1 per pixel for a constant output, and published learning rates and
damping apply. In [0, 1] the errors would be 55 times smaller.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fisherfn as ff
from common.data.base import Data, Split
from common.data.files import candidates, command, find, missing, read_mat

FOLDERS = ("olivetti", "faces", "FACES")
PUBLISHED, PHOTOS = "newfaces_rot_single.mat", "olivettifaces.mat"
TRAIN, TEST, TOTAL = 103_500, 41_400, 165_600  # the first and the last patches: as in the original, 20,700 are unused
SIZE, FACE = 25, 64
PEOPLE, IMAGES, TRAIN_PEOPLE = 40, 10, 30
PATCHES = 69  # of each photograph: 20,700 for training and 6,900 for testing
ANGLE = math.pi / 2
SCALES = 1.4, 1.8
OVERSAMPLING = 2  # samples a side of a patch pixel, averaged: they lie up to 1.8 photograph pixels apart otherwise
CHUNK = 2_000

log = logging.getLogger(__name__)


def load(data_path: str | None, seed: int) -> Data:
    """Patches [N, 1, 25, 25], standardised, without labels; searched for in `olivetti/` under `data_path`, then in it.

    103,500 for training and 41,400 for testing from `newfaces_rot_single.mat` (`newfaces_single`, [625, 165600]);
    otherwise 20,700 and 6,900 sampled with `seed` from `olivettifaces.mat` (`faces`, [4096, 400], 0 to 255).
    """
    tried = candidates(data_path, FOLDERS)
    path = find(tried, [PUBLISHED]) or find(tried, [PHOTOS])
    if path is None:
        remedy = f"put one there, or, for the second, {command('FACES', 'train_mlp', tried[-1])}"
        raise missing("FACES", f"{PUBLISHED} or {PHOTOS}", tried, remedy)
    log.info("FACES: read from %s", path)
    train, test = published(path) if path.name == PUBLISHED else drawn(path, seed)
    train, test = standardised(train, test)
    return Data("FACES", Split(train, None), Split(test, None), "AE_FACES", ff.Gaussian(), None)


def published(path: Path) -> tuple[Tensor, Tensor]:
    """Return the published patches of the file, [N, 1, 25, 25]."""
    values = read_mat(path, (SIZE * SIZE, TOTAL), ["newfaces_single"])
    # copies, so that the 20,700 between them and the file's own array can go; columns are MATLAB's column-major images
    parts = (torch.from_numpy(values[:, part].T).float() for part in (slice(TRAIN), slice(TOTAL - TEST, TOTAL)))
    train, test = (part.reshape(-1, 1, SIZE, SIZE).transpose(2, 3).contiguous() for part in parts)
    return train, test


def drawn(path: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Patches in [0, 1] of the photographs of the first thirty and of the last ten people, each in random order."""
    values = torch.from_numpy(read_mat(path, (FACE * FACE, PEOPLE * IMAGES), ["faces"]))
    photos = values.T.reshape(-1, 1, FACE, FACE).transpose(2, 3).float() / 255  # columns are column-major images
    generator = torch.Generator().manual_seed(seed)
    train, test = (patches(part, generator) for part in photos.tensor_split([TRAIN_PEOPLE * IMAGES]))
    return train, test


def patches(photos: Tensor, generator: torch.Generator) -> Tensor:
    """PATCHES random patches of each photograph [M, 1, 64, 64], as [M PATCHES, 1, 25, 25], shuffled."""
    which = torch.arange(len(photos)).repeat_interleave(PATCHES)
    which = which[torch.randperm(len(which), generator=generator)]
    turns = _turns(len(which), generator)
    pieces = zip(torch.split(which, CHUNK), torch.split(turns, CHUNK), strict=True)
    return torch.cat([_cut(photos[index], turn) for index, turn in pieces])


def _turns(count: int, generator: torch.Generator) -> Tensor:
    # [count, 2, 3]: patch coordinates in [-1, 1]² to the photograph's; enlarging by s shows 1/s of it
    angle, scale = torch.rand(2, count, generator=generator)
    angle, scale = ANGLE * (2 * angle - 1), SCALES[0] + (SCALES[1] - SCALES[0]) * scale
    cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros(count)
    return torch.stack([cos, -sin, zero, sin, cos, zero], 1).reshape(count, 2, 3)


def _cut(photos: Tensor, turns: Tensor) -> Tensor:
    fine = SIZE * OVERSAMPLING
    grid = F.affine_grid(turns, [len(photos), 1, fine, fine], align_corners=False)
    # a patch's corner can leave the photograph by a third of a pixel at scale 1.4 and 45°: repeat the border there
    samples = F.grid_sample(photos, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(samples, OVERSAMPLING)


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise both parts by the statistics of the training part; a standardised set is unchanged."""
    train = train - (mean := train.mean(0))
    scale = train.var(0, unbiased=False).mean().sqrt()
    return train / scale, (test - mean) / scale
