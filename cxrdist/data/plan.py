"""The plan: order and augmentation of an epoch, a pure function of (seed, stage, epoch)."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import Augmentation
from cxrdist.data.labels import POSITIVE
from cxrdist.errors import CxrdistError, choices

MOST_BALANCED_COPIES = 50
"""Copies per image, at most, when balancing: with more the network would memorise the images."""


@dataclass(frozen=True)
class Draws:
    """Parameters of the warp of n images, one of each per image."""

    degrees: NDArray[np.float32]
    """Counter-clockwise."""
    shift_x: NDArray[np.float32]
    """Fraction of the width, to the right."""
    shift_y: NDArray[np.float32]
    """Fraction of the height, downwards."""
    flip: NDArray[np.bool_]
    """Mirrored left to right."""

    def rows(self, rows: slice | NDArray[np.int64]) -> "Draws":
        """Return the draws of some of the images."""
        return Draws(self.degrees[rows], self.shift_x[rows], self.shift_y[rows], self.flip[rows])


@dataclass(frozen=True)
class Plan:
    """One epoch: the order of the samples, their warps, and the bounds of the steps."""

    samples: NDArray[np.int64]
    """int64 [n], sample numbers, each repeated once per copy."""
    draws: Draws
    """The warps of the n images."""
    bounds: NDArray[np.int64]
    """int64 [steps + 1]; step i takes rows bounds[i] to bounds[i + 1]. Sizes differ by at most one,
    so that no step is tiny."""

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the epoch."""
        return len(self.bounds) - 1

    def step_size(self, step: int) -> int:
        """Return the number of images in a step, over all ranks."""
        return int(self.bounds[step + 1] - self.bounds[step])

    def rank_rows(self, step: int, rank: int, world_size: int) -> slice:
        """Return the rows of a step that a rank takes; slices differ by at most one image."""
        start, own = int(self.bounds[step]), cut(self.step_size(step), rank, world_size)
        return slice(start + own.start, start + own.stop)

    def digest(self, rows: slice) -> int:
        """Return the sum of a hash of (row, sample) over some rows, modulo 2^64.

        Summed over all ranks it equals the digest of the whole plan only if each row was taken
        exactly once, with its sample, whichever rank took it.
        """
        first = np.uint64(rows.start)
        # SplitMix64 with the sample as seed: before each output its state grows by 2^64 divided by
        # the golden ratio, so that row i has output i of its sample.
        positions = first + np.arange(rows.stop - rows.start, dtype=np.uint64) + np.uint64(1)
        mixed = positions * np.uint64(0x9E3779B97F4A7C15) + self.samples[rows].astype(np.uint64)
        # The finaliser of SplitMix64 (Steele et al. 2014, figure 17).
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64))


def cut(size: int, number: int, count: int) -> slice:
    """Return one of `count` slices of `size` rows; their lengths differ by at most one."""
    return slice(size * number // count, size * (number + 1) // count)


def plan_epoch(
    samples: NDArray[np.int64],
    copies: NDArray[np.int64],
    augmentation: Augmentation,
    batch_size: int,
    key: tuple[int, str, int],
) -> Plan:
    """Plan an epoch.

    Every second copy of an image is mirrored, so that 8 copies are 4 pairs as in the paper
    (section 2.3); a last copy without a partner is mirrored at random. Free draws give each copy
    its own rotation and shift; crossed ones give each image k rotations and k shifts.

    Args:
        samples: int64 [m], sample numbers of the split.
        copies: int64 [m], copies per sample; for crossed draws see `refuse_uncrossed`.
        augmentation: ranges of the draws, and whether they are crossed.
        batch_size: images per step over all ranks, at most.
        key: seed, name of the stage, epoch.
    """
    random = np.random.Generator(np.random.Philox(key=_philox_key(key)))
    rows = np.repeat(samples, copies)
    copy = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
    order = random.permutation(len(rows))
    # Crossed draws are shared by the copies of an image, so they are made before the shuffle.
    if augmentation.draws == "crossed":
        draws = _crossed_draws(random, copy, copies, augmentation).rows(order)
    else:
        draws = _free_draws(random, copy[order], np.repeat(copies, copies)[order], augmentation)
    num_steps = -(-len(rows) // batch_size)
    bounds = np.arange(num_steps + 1, dtype=np.int64) * len(rows) // num_steps
    return Plan(rows[order], draws, bounds)


def _free_draws(
    random: np.random.Generator,
    copy: NDArray[np.int64],
    copies: NDArray[np.int64],
    augmentation: Augmentation,
) -> Draws:
    """Draw a rotation and a shift for each of n rows, and a flip for a copy without a partner."""
    is_alone = (copies % 2 == 1) & (copy == copies - 1)
    return Draws(
        degrees=_uniform(random, augmentation.degrees, len(copy)),
        shift_x=_uniform(random, augmentation.shift_x, len(copy)),
        shift_y=_uniform(random, augmentation.shift_y, len(copy)),
        flip=((copy % 2 == 1) | is_alone & (random.random(len(copy)) < 0.5)) & augmentation.flip,
    )


def _crossed_draws(
    random: np.random.Generator,
    copy: NDArray[np.int64],
    copies: NDArray[np.int64],
    augmentation: Augmentation,
) -> Draws:
    """Draw n rows that combine each image's rotations, shifts and mirror (paper, section 2.3).

    The paper mirrors last, but `warp` mirrors first. Rotation and horizontal shift of a mirrored
    copy are therefore negated: it becomes the mirror image of the copy before it.

    ``copy`` is int64 [n], the number of a copy among those of its image, which are consecutive;
    ``copies`` is int64 [m], copies per image (see `refuse_uncrossed`).
    """
    mirrors = 2 if augmentation.flip else 1
    factor = np.repeat(np.sqrt(copies // mirrors).round().astype(np.int64), copies)
    first = np.arange(len(copy)) - copy
    # Each image has a draw per row, of which it uses the first k.
    rotation, shift = first + copy // mirrors // factor, first + copy // mirrors % factor
    flip = copy % mirrors == 1
    sign = np.where(flip, -1, 1).astype(np.float32)
    return Draws(
        degrees=_uniform(random, augmentation.degrees, len(copy))[rotation] * sign,
        shift_x=_uniform(random, augmentation.shift_x, len(copy))[shift] * sign,
        shift_y=_uniform(random, augmentation.shift_y, len(copy))[shift],
        flip=flip,
    )


def refuse_uncrossed(copies: NDArray[np.int64], augmentation: Augmentation) -> None:
    """Check that crossed draws are possible with the copies of each image, int64 [m].

    Raises:
        CxrdistError: a number of copies is not k rotations x k shifts, x 2 with the mirror.
    """
    if augmentation.draws != "crossed":
        return
    mirrors, product = (2, "2 x k x k") if augmentation.flip else (1, "k x k")
    for number in np.unique(copies).tolist():
        if mirrors * math.isqrt(number // mirrors) ** 2 != number:
            fitting = ", ".join(str(mirrors * k * k) for k in range(1, 8))
            raise CxrdistError(
                f"--copies: images with {number} {'copies' if number > 1 else 'copy'} in an epoch "
                f"cannot have augmentation.draws crossed, which takes {product} copies of every "
                f"image ({fitting} ...); change copies, or give --augmentation.draws free"
            )


def copies_of(
    targets: NDArray[np.int8], classes: list[str], copies: dict[str, int]
) -> NDArray[np.int64]:
    """Return the copies of each sample, int64 [samples], from those of each class; 1 if unnamed.

    A sample with several labels gets the copies of the label that has most. ``targets`` are int8
    [samples, classes].

    Raises:
        CxrdistError: a class is unknown.
    """
    for name in copies:
        if name not in classes:
            raise CxrdistError(
                f"--copies: no class {name!r} in the shards; {choices(name, classes)}. For your "
                "own classes use the recipe finetune, or scratch with --init none: they balance "
                "the classes by their counts"
            )
    by_class = np.array([copies.get(name, 1) for name in classes], dtype=np.int64)
    return np.where(targets == POSITIVE, by_class, 1).max(axis=1, initial=1)


def balanced_copies(targets: NDArray[np.int8], classes: list[str]) -> dict[str, int]:
    """Choose copies per class that make each class about as frequent as the most frequent one.

    They are the nearest whole numbers, 1 to `MOST_BALANCED_COPIES`; 1 for a class without images.
    ``targets`` are int8 [m, classes] of the training split, with one label per image.
    """
    counts = (targets == POSITIVE).sum(axis=0)
    wanted = np.rint(counts.max() / np.maximum(counts, 1))
    chosen = np.where(counts > 0, np.clip(wanted, 1, MOST_BALANCED_COPIES), 1)
    return {name: int(number) for name, number in zip(classes, chosen, strict=True)}


def _philox_key(key: tuple[int, str, int]) -> NDArray[np.uint64]:
    # Philox has a key of 128 bits. The NULs keep (1, "2x") and (12, "x") apart.
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64)


def _uniform(random: np.random.Generator, limit: float, count: int) -> NDArray[np.float32]:
    return random.uniform(-limit, limit, count).astype(np.float32)
