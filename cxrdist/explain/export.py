"""Explain a split: relevance arrays, their ledger, and heat maps, on any number of ranks."""

import io
import re
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cxrdist.config import ExplainConfig
from cxrdist.data.cache import read_rows
from cxrdist.data.index import Index
from cxrdist.distributed import gather, together
from cxrdist.errors import CxrdistError, refuse_below_one
from cxrdist.evaluate.predictions import Subject, open_subject, rank_batches
from cxrdist.explain.heatmap import overlay
from cxrdist.explain.relevance import Attribution, Explainer
from cxrdist.model.densenet import Classifier
from cxrdist.run import atomic_file, write_table
from cxrdist.terminal import progress

LEDGER_COLUMNS = (
    "key",
    "class",
    "logit",
    "relevance_sum",
    "bias_share",
    "epsilon_share",
    "picture",
)
Row = tuple[int, int, list[str]]


def explain(config: ExplainConfig) -> None:
    """Write relevance/KEY.npz, relevance.csv and heatmaps/ of a split.

    Batches are cut before ranks are known, so the files are the same bytes for any number of ranks
    (with the same number of threads).

    Raises:
        CxrdistError: run, shards, classes or numbers cannot be used.
    """
    refuse_below_one(config, "limit", "batch_size")
    subject = open_subject(config.run, config.shards, config.cache)
    accelerator = subject.accelerator
    classes = together(accelerator, lambda: choose_classes(config.classes, subject.model))
    numbers = choose_samples(subject.index, config.split, config.limit)
    explainer = Explainer(subject.model, flat=config.flat)
    rows: list[Row] = []
    batches = list(rank_batches(numbers, config.batch_size, accelerator))
    total = sum(map(len, batches))
    with progress(total, "explaining", "images", show=accelerator.is_main_process) as bar:
        for batch in batches:
            images = read_rows(subject.images, batch, accelerator.device)
            attribution = explainer.attribute(images, classes)
            rows += _write_batch(subject, config.split, batch, classes, attribution)
            bar.update(len(batch))
    rows = sorted(gather(accelerator, rows))
    if accelerator.is_main_process:
        table = subject.run.relevance_table(config.split)
        write_table(table, LEDGER_COLUMNS, [row for _, _, row in rows])
        print(
            f"explained {len(numbers)} images for {', '.join(classes)}; "
            f"heat maps are in {subject.run.heatmaps(config.split)}"
        )
    accelerator.wait_for_everyone()


def choose_classes(classes: str, model: Classifier) -> list[str]:
    """Read ``all`` or names with commas between them.

    Raises:
        CxrdistError: a name is no class of the model.
    """
    names = model.classes if classes == "all" else [name.strip() for name in classes.split(",")]
    for name in names:
        if name not in model.classes:
            raise CxrdistError(
                f"--classes: no class {name!r}; expected all or some of {', '.join(model.classes)}"
            )
    return list(names)


def choose_samples(index: Index, split: str, limit: int | None) -> NDArray[np.int64]:
    """Sample numbers to explain; with a limit the classes take turns, and images without label.

    Returns:
        int64 [n], ascending.
    """
    numbers = index.numbers(split)
    targets = index.targets()
    by_class = [[n for n in numbers if has[n]] for has in (*targets.T, ~targets.any(axis=1))]
    in_turn = dict.fromkeys(n for turn in zip_longest(*by_class) for n in turn if n is not None)
    return np.array(sorted(list(in_turn)[:limit]), dtype=np.int64)


def picture_name(key: str, name: str) -> str:
    """File name of a heat map; a class name may hold characters that a file name may not."""
    safe = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "-", name)
    return f"{key}.{safe}.png"


def _write_batch(
    subject: Subject,
    split: str,
    batch: NDArray[np.int64],
    classes: list[str],
    attribution: Attribution,
) -> list[Row]:
    """Write the files of a batch; give the rows of relevance.csv with their places in it."""
    relevance = attribution.relevance.float().cpu().numpy()
    ledger = torch.stack(
        [
            attribution.logits,
            attribution.relevance_sum,
            attribution.bias_share,
            attribution.epsilon_share,
        ],
        dim=2,
    ).tolist()
    rows: list[Row] = []
    for i, number in enumerate(batch.tolist()):
        key = subject.index.samples[number].key
        _write_relevance(subject.run.relevance(split) / f"{key}.npz", relevance[i], classes)
        pictures = write_pictures(
            subject.run.heatmaps(split), key, subject.images[number], relevance[i], classes
        )
        for k, name in enumerate(classes):
            digits = [f"{value:.9g}" for value in ledger[i][k]]
            rows.append((number, k, [key, name, *digits, pictures[k]]))
    return rows


def _write_relevance(path: Path, relevance: NDArray[np.float32], classes: list[str]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, relevance=relevance, classes=np.array(classes))
    with atomic_file(path) as partial:
        partial.write_bytes(buffer.getvalue())


def write_pictures(
    directory: Path,
    key: str,
    image: NDArray[np.uint8],
    relevance: NDArray[np.float32],
    classes: list[str],
) -> list[str]:
    """Write the X-ray as the network saw it, and one heat map a class over it.

    Args:
        directory: where the pictures go: KEY.png and KEY.CLASS.png.
        key: of the sample.
        image: uint8 [H, W].
        relevance: float32 [classes, H, W].
        classes: names of the K classes.

    Returns:
        File names of the heat maps.
    """
    _save(directory / f"{key}.png", Image.fromarray(np.asarray(image)))
    names = [picture_name(key, name) for name in classes]
    for name, values in zip(names, relevance, strict=True):
        _save(directory / name, overlay(np.asarray(image), values))
    return names


def _save(path: Path, picture: Image.Image) -> None:
    with atomic_file(path) as partial:
        picture.save(partial, "PNG")
