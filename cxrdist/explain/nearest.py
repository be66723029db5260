"""Find the nearest training image of an explained one, by the features before the output layer.

It shows which images are similar for the network, and copies of an image in different splits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.data.cache import read_rows
from cxrdist.data.gallery import write_gallery
from cxrdist.data.index import Index
from cxrdist.distributed import gather
from cxrdist.evaluate.loaded_run import LoadedRun
from cxrdist.evaluate.predictions import rank_batches
from cxrdist.files import judging, open_table, write_table
from cxrdist.info import read_info
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import one_network
from cxrdist.model.networks import output_layer
from cxrdist.run import RunDirectory
from cxrdist.terminal import progress

BATCH_SIZE = 32
"""Images of one forward pass, without gradients."""


class Nearest(NamedTuple):
    """A row of nearest.csv: the training image that is most similar to an explained image."""

    key: str
    """Of the image that is explained."""
    nearest: str
    """Key of the training image; ``nearest/KEY.png`` is its picture."""
    similarity: float
    """Cosine of their features, -1 to 1; 1 for the same image."""
    label: str
    """Of the training image; several labels are separated by ``|``."""
    patient: str
    """Of the training image."""


COLUMNS = Nearest._fields


def was_trained_on(run: RunDirectory, index: Index) -> bool:
    """Return whether a run was trained on these shards, and they have a train split."""
    if not run.info.is_file():
        return False
    return read_info(run)["shards"]["index_sha256"] == index.sha256 and bool(index.numbers("train"))


def find_nearest(loaded: LoadedRun, numbers: NDArray[np.int64]) -> list[Nearest]:
    """Find the nearest training image of each of the given samples, on all ranks together.

    It takes a forward pass over all training images, and 4 kB of memory per sample. An image is not
    its own neighbour, so a single training image gets no row; of equally similar images the first
    one counts.
    """
    train = np.array(loaded.index.numbers("train"), dtype=np.int64)
    features = dict(gather(loaded.accelerator, _features(loaded, numbers)))
    queries = torch.from_numpy(np.stack([features[number] for number in numbers.tolist()]))
    queries = queries.to(loaded.accelerator.device)
    best = gather(loaded.accelerator, [_best(loaded, train, numbers, queries)])
    similarity, nearest = (np.stack(arrays) for arrays in zip(*best, strict=True))
    # Take the most similar one of the ranks' best, and of equal ones the first image.
    rank = np.lexsort((nearest, -similarity), axis=0)[0], np.arange(len(numbers))
    samples = loaded.index.samples
    rows = []
    for number, other, value in zip(numbers, nearest[rank], similarity[rank], strict=True):
        if other < 0:
            continue
        match = samples[other]
        key = samples[number].key
        rows.append(Nearest(key, match.key, float(value), match.label, match.patient))
    return rows


def pooled(model: Classifier, images: Tensor) -> Tensor:
    """Return the inputs of a network's output layer, float [B, features] of unit length.

    SqueezeNet averages over the image after that layer; here it is done before, which is the same.
    The images are uint8 [B, 1, H, W], on the device of the model, which is in evaluation mode.
    """
    seen: list[Tensor] = []
    layer = model.network.get_submodule(output_layer(model.shape))
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        hook.remove()
    features = seen[0].reshape(*seen[0].shape[:2], -1).mean(2)
    return torch.nn.functional.normalize(features, dim=1)


@torch.inference_mode()
def _features(
    loaded: LoadedRun, numbers: NDArray[np.int64]
) -> list[tuple[int, NDArray[np.float32]]]:
    """Return the features of this rank's share of the samples, float32 [features] each."""
    rows: list[tuple[int, NDArray[np.float32]]] = []
    for batch in rank_batches(numbers, BATCH_SIZE, loaded.accelerator):
        images = read_rows(loaded.images, batch, loaded.accelerator.device)
        features = pooled(one_network(loaded.model), images).cpu().numpy()
        rows += list(zip(batch.tolist(), features, strict=True))
    return rows


@torch.inference_mode()
def _best(
    loaded: LoadedRun, train: NDArray[np.int64], numbers: NDArray[np.int64], queries: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the most similar image of this rank's share of the training images, for each sample.

    The n samples have the features `queries`, float [n, features].

    Returns:
        Similarities and numbers of the images, -2 and -1 where this rank has no image, [n] each.
    """
    accelerator = loaded.accelerator
    similarity = torch.full((len(numbers),), -2.0, device=accelerator.device)
    nearest = torch.full_like(similarity, -1, dtype=torch.int64)
    themselves = torch.from_numpy(numbers).to(accelerator.device)
    batches = list(rank_batches(train, BATCH_SIZE, accelerator))
    total, show = sum(map(len, batches)), accelerator.is_main_process
    with progress(total, "nearest training images", "images", show=show) as bar:
        for batch in batches:
            images = read_rows(loaded.images, batch, accelerator.device)
            others = torch.from_numpy(batch).to(accelerator.device)
            cosines = pooled(one_network(loaded.model), images) @ queries.T
            cosines[others[:, None] == themselves] = -2.0
            value, row = cosines.max(dim=0)  # of equal ones the first
            closer = value > similarity
            similarity[closer], nearest[closer] = value[closer], others[row[closer]]
            bar.update(len(batch))
    return similarity.cpu().numpy(), nearest.cpu().numpy()


def write_nearest(loaded: LoadedRun, nearest: Sequence[Nearest]) -> None:
    """Write the pictures of the nearest training images, and then nearest.csv."""
    subset = loaded.subset
    number_of = {sample.key: number for number, sample in enumerate(loaded.index.samples)}
    numbers = dict.fromkeys(number_of[row.nearest] for row in nearest)
    write_gallery(loaded.run.nearest_pictures(subset), loaded.index, loaded.images, numbers)
    rows = [[*row[:2], f"{row.similarity:.6f}", *row[3:]] for row in nearest]
    # Last: `explain` takes the table as a sign that the pictures exist.
    write_table(loaded.run.nearest(subset), COLUMNS, rows)


def read_nearest(path: Path) -> dict[str, Nearest]:
    """Read nearest.csv, by the key of the explained image; empty if there is none.

    Raises:
        CxrdistError: it was not written by `cxrdist explain`.
    """
    if not path.is_file():
        return {}
    with judging(path, "run `cxrdist explain` again"), open_table(path) as (columns, rows):
        if tuple(columns) != COLUMNS:
            raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
        return {row.key: row for row in map(_read_row, rows)}


def _read_row(row: Mapping[str, str]) -> Nearest:
    key, nearest, similarity, label, patient = row.values()
    if not -1.001 <= float(similarity) <= 1.001:
        raise ValueError("expected a similarity of -1 to 1")
    return Nearest(key, nearest, float(similarity), label, patient)
