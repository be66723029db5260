"""The note: what a user of an exported network needs to know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.config import Depth, Fit
from cxrdist.data.index import Classes, SidePx
from cxrdist.documents import Real, Sha256, Text
from cxrdist.export.parity import Parity, Squares, measure_parity
from cxrdist.files import sha256_of
from cxrdist.info import Task
from cxrdist.model.densenet import Classifier
from cxrdist.model.description import Cover, Normalisation
from cxrdist.model.ensemble import Ensemble
from cxrdist.run import RunDirectory, environment

USE = "research only, not a medical device"
GRAPH_INPUT = (
    "images: uint8 [batch, 1, size, size], grey values 0 to 255; the normalisation is in the graph"
)
LIBRARY_OUTPUT = (
    "logits: float32 [batch, classes], not divided by temperatures, to be compared with thresholds"
)
GRAPH_OUTPUT = (
    f"{LIBRARY_OUTPUT}; calibrated_probabilities: float32 [batch, classes], sigmoid(logit / "
    "temperature) of each class against the rest; those of a class without a temperature are "
    "sigmoid(logit), not calibrated"
)
LIBRARY_INPUT = (
    "float32 [batch, channels, size, size]: grey values divided by 255, the same in each channel, "
    "then (x - mean) / std"
)


class ExportNote(TypedDict):
    """The metadata of an exported network."""

    format: Literal["cxrdist-export-1"]
    use: str
    network: str
    classes: Classes
    """In the order of the outputs."""
    task: Task
    """Whether an image has one of the classes or any number of them."""
    input: str
    output: str
    image_size_px: SidePx
    normalisation: Normalisation | None
    """For grey values 0 to 1; None for an ensemble, whose members have their own in the graph."""
    fit: Fit
    """How images were made square for the training."""
    depth: Depth | None
    """Bit depth of images that do not declare it."""
    cover: Cover | None
    """How burned-in text was covered in the training images; None where it was not."""
    lungs_only: bool
    """Whether all but the lungs was black in the training images."""
    temperatures: dict[str, Real]
    """By class; a class without one is not calibrated."""
    thresholds: dict[str, Real]
    """By class: the least logit at which the class is called."""
    operating_points: Text | None
    """The rule by which the thresholds were chosen on the validation split."""
    source_sha256: dict[str, Sha256]
    """The sha256 of each file of weights, by its path in the run directory."""
    versions: dict[str, str]
    parity: Parity


@dataclass(frozen=True)
class Source:
    """A run, its model in evaluation mode on the CPU, and images to compare the export on."""

    run: RunDirectory
    model: Classifier | Ensemble
    squares: Squares


def describe_export(
    source: Source,
    exported: Callable[[Tensor], NDArray[np.float32]],
    runtime: str,
    *,
    in_graph: bool,
) -> ExportNote:
    """Describe an exported network, after comparing its logits with PyTorch's.

    Args:
        source: the run.
        exported: as in `measure_parity`.
        runtime: as in `measure_parity`.
        in_graph: whether normalisation and calibration are in the graph.

    Raises:
        RunFailedError: the logits differ.
    """
    model, calibration = source.model, source.model.calibration
    members = [] if isinstance(model, Classifier) else model.names
    files = [f"{name}/model/model.safetensors" for name in members] or ["model/model.safetensors"]
    return {
        "format": "cxrdist-export-1",
        "use": USE,
        "network": title_of(model),
        "classes": model.classes,
        "task": model.task,
        "input": GRAPH_INPUT if in_graph else LIBRARY_INPUT,
        "output": GRAPH_OUTPUT if in_graph else LIBRARY_OUTPUT,
        "image_size_px": model.image_size_px,
        "normalisation": model.normalisation if isinstance(model, Classifier) else None,
        "fit": model.fit,
        "depth": model.depth,
        "cover": model.cover,
        "lungs_only": model.lungs_only,
        "temperatures": dict(calibration.temperatures) if calibration else {},
        "thresholds": dict(calibration.thresholds) if calibration else {},
        "operating_points": calibration.rule if calibration else None,
        "source_sha256": {file: sha256_of(source.run.inside(file)) for file in files},
        "versions": environment()["versions"],
        "parity": measure_parity(model, exported, source.squares, runtime),
    }


def title_of(model: Classifier | Ensemble) -> str:
    """Return a readable name of the network."""
    if isinstance(model, Classifier):
        return model.shape.title
    return f"mean of {len(model.names)} networks, the first a {model.first.shape.title}"
