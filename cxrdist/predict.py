"""Predict image files with a trained model."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import PredictConfig
from cxrdist.data.images import read_square
from cxrdist.data.records import SEPARATOR, images_in
from cxrdist.data.shards import sample_key
from cxrdist.errors import CxrdistError, refuse_below_one
from cxrdist.evaluate.metrics import predicted_classes, to_probabilities
from cxrdist.explain.export import write_pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier, load_model
from cxrdist.precision import use_full_float32
from cxrdist.run import refuse_unwritable, write_table
from cxrdist.terminal import progress


def predict(config: PredictConfig) -> None:
    """Write a CSV of probabilities, and with ``explain`` heat maps into a folder beside it.

    Raises:
        CxrdistError: run, images or options cannot be used; nothing is written then.
    """
    refuse_below_one(config, "batch_size")
    refuse_unwritable(config.out)
    use_full_float32()
    model = load_model(config.run)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    files = find_images(config.images)
    explainer = Explainer(model) if config.explain else None
    heatmaps = config.out.with_name(f"{config.out.stem}-heatmaps")
    logits = []
    with progress(len(files), "predicting", "images") as bar:
        for start in range(0, len(files), config.batch_size):
            batch = files[start : start + config.batch_size]
            fit = config.fit or model.fit
            squares = np.stack([read_square(f, model.image_size_px, fit) for f in batch])
            logits.append(_logits(model, squares))
            if explainer is not None:
                _write_heatmaps(explainer, model, heatmaps, batch, squares)
            bar.update(len(batch))
    _write_table(config.out, files, np.concatenate(logits), model)
    print(f"predicted {len(files)} images: {config.out}")
    if config.explain:
        print(f"heat maps: {heatmaps}")


def find_images(paths: list[Path]) -> list[Path]:
    """All PNG, JPEG and DICOM files of files and folders, in the given order, folders sorted.

    Raises:
        CxrdistError: a path does not exist or a folder has no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = images_in(path)
            if not inside:
                raise CxrdistError(
                    f"{path}: has no PNG, JPEG or DICOM file; name a folder that has some"
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise CxrdistError(f"{path}: no such file or folder; name PNG, JPEG or DICOM files")
    return files


@torch.inference_mode()
def _logits(model: Classifier, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
    images = torch.from_numpy(squares).unsqueeze(1).to(model.mean.device)
    logits: NDArray[np.float32] = model(images).cpu().numpy()
    return logits


def _write_heatmaps(
    explainer: Explainer,
    model: Classifier,
    directory: Path,
    files: list[Path],
    squares: NDArray[np.uint8],
) -> None:
    images = torch.from_numpy(squares).unsqueeze(1).to(model.mean.device)
    relevance = explainer.attribute(images).relevance.float().cpu().numpy()
    for file, square, values in zip(files, squares, relevance, strict=True):
        write_pictures(directory, sample_key(str(file)), square, values, model.classes)


def _write_table(
    out: Path, files: list[Path], logits: NDArray[np.float32], model: Classifier
) -> None:
    """Write path, prob_CLASS..., predicted; the class is that of the logits, as in `evaluate`."""
    columns = ["path", *(f"prob_{name}" for name in model.classes), "predicted"]
    rows = [
        [
            path,
            *(f"{value:.9g}" for value in probabilities),
            SEPARATOR.join(predicted_classes(row.tolist(), model.classes, model.task)),
        ]
        for path, probabilities, row in zip(files, to_probabilities(logits), logits, strict=True)
    ]
    write_table(out, columns, rows)
