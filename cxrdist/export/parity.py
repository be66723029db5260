"""Parity: how far the logits of an exported network are from PyTorch's, on the same images."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from itertools import chain, islice
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.data.index import read_index
from cxrdist.data.shards import read_shard
from cxrdist.documents import Real, Sha256
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.evaluate.loaded_run import refuse_unlike
from cxrdist.files import now
from cxrdist.info import Count
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import Ensemble

MOST_IMAGES = 100
RANDOM_SQUARES = 17  # two batches and a batch of one image
BATCH_SIZE = 8
SEED = 0
# Each program adds float32 values in another order: logits of a DenseNet121 differ by about 1e-5.
MOST_DIFFERENCE = 1e-4


class Parity(TypedDict):
    """The comparison of an exported network with PyTorch."""

    images: Count
    source: str
    """A readable description of the images."""
    index_sha256: Sha256 | None
    """Of the shards that contain them; None for random squares."""
    largest_difference: Real
    """The largest absolute difference of a logit."""
    runtime: str
    """The program that ran the exported network, with its version."""
    measured: str
    """ISO time, UTC."""


@dataclass(frozen=True)
class Squares:
    """Images on which the exported network is compared; see `Parity`."""

    pixels: Tensor
    """uint8 [N, 1, S, S]."""
    source: str
    index_sha256: str | None


def read_squares(shards: Path | None, model: Classifier | Ensemble) -> Squares:
    """Read the first images of a test split (pack shuffles them), or make random squares.

    Raises:
        CxrdistError: the shards are incomplete, have no test split, or do not fit the model.
    """
    if shards is None:
        shape = (RANDOM_SQUARES, 1, model.image_size_px, model.image_size_px)
        pixels = torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED)
        )
        return Squares(pixels, "squares of random grey values, which are not X-rays", None)
    index = read_index(shards)
    if not index.numbers("test"):
        raise CxrdistError(
            f"--shards {shards}: have no test images, on which the export is compared; "
            "give shards with a test split, or leave --shards out"
        )
    refuse_unlike(index, model, "test")
    # All images of a shard are in one split.
    packed = [shard for shard in index.packed() if shard.samples[0].split == "test"]
    samples = chain.from_iterable(read_shard(shard) for shard in packed)
    squares = [square for square, _ in islice(samples, MOST_IMAGES)]
    source = f"X-rays of the test split ({len(index.numbers('test'))} images)"
    return Squares(torch.from_numpy(np.stack(squares)).unsqueeze(1), source, index.sha256)


@torch.inference_mode()
def measure_parity(
    model: Classifier | Ensemble,
    exported: Callable[[Tensor], NDArray[np.float32]],
    squares: Squares,
    runtime: str,
) -> Parity:
    """Compare the logits batch by batch; the last batch is smaller, to test any batch size.

    Args:
        model: the model in PyTorch, in evaluation mode, on the CPU.
        exported: returns the logits, float32 [B, classes], of uint8 images [B, 1, S, S].
        squares: the images to compare on.
        runtime: the program that runs the exported network, with its version.

    Raises:
        RunFailedError: a logit differs by more than `MOST_DIFFERENCE`, or is not finite.
    """
    differences = [
        np.abs(exported(images) - model(images).numpy()).max()
        for images in squares.pixels.split(BATCH_SIZE)
    ]
    # Not Python's max, which may pass over a NaN.
    largest = float(np.max(differences))
    if not largest <= MOST_DIFFERENCE:  # also true for NaN
        raise RunFailedError(
            f"logits by {runtime} differ from PyTorch's by up to {_rounded_up(largest)} on "
            f"{len(squares.pixels)} {squares.source}, expected at most {MOST_DIFFERENCE:g}; "
            f"nothing was written; try another version of {runtime.split()[0]}"
        )
    return {
        "images": len(squares.pixels),
        "source": squares.source,
        "index_sha256": squares.index_sha256,
        "largest_difference": largest,
        "runtime": runtime,
        "measured": now(),
    }


def describe_parity(parity: Parity) -> str:
    """Return a sentence that says what was compared and how large the difference is."""
    largest, how = parity["largest_difference"], "equal PyTorch's"
    if largest:
        how = f"differ from PyTorch's by at most {_rounded_up(largest)}"
    return f"logits by {parity['runtime']} {how} on {parity['images']} {parity['source']}"


def _rounded_up(value: float) -> str:
    """Write a bound with two digits, rounded up: rounded down, the value would exceed it."""
    return f"{Decimal(value).normalize(Context(2, ROUND_CEILING)):g}"
