"""Descriptions of a model: model.json, and the note in a file of converted weights."""

from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired, TypedDict

from cxrdist.config import CoverHow, CoverSplit, Depth, Fit, Network
from cxrdist.data.index import Classes, SidePx
from cxrdist.documents import CONTROL, Between, Distinct, Matching, Real, Sha256, Text
from cxrdist.errors import CxrdistError
from cxrdist.info import Count, Task, WeightsInfo

# Bounds for untrusted files, far beyond real models: a published network has a std of 1/2048.
MOST_OUTPUTS = 100_000
LEAST_STD = 1e-6
MOST_GREY = 1e9

MOST_MEMBERS = 20

Member = Annotated[str, Matching(r"member-\d{1,2}", "member-NUMBER")]
# Lone surrogates, which JSON can hold, cannot be encoded as UTF-8.
Label = Annotated[str, Matching(rf"[^{CONTROL}\ud800-\udfff]{{0,255}}", "at most 255 characters")]


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of grey values scaled to 0..1.

    The number of values is the number of input channels. The default is ImageNet's, in the layout
    of torchvision, timm and the published CheXNet copies.
    """

    mean: tuple[Annotated[float, Between(-MOST_GREY, MOST_GREY)], ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Between(LEAST_STD, MOST_GREY)], ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Raise CxrdistError unless there are one or three means, and as many deviations."""
        channels = len(self.mean), len(self.std)
        if channels not in ((1, 1), (3, 3)):
            raise CxrdistError(
                f"has {channels[0]} mean and {channels[1]} std, expected one or three of each"
            )


@dataclass(frozen=True)
class Cover:
    """How burned-in text was covered in the images of a model's training and test.

    Attributes:
        how: ``black`` or ``fill``, as in `cxrdist.data.boxes.cover`.
        split: the covered images: ``train``, ``val``, ``test`` or ``all``.
    """

    how: CoverHow
    split: CoverSplit

    @property
    def is_of_training(self) -> bool:
        """Return whether the network was trained on covered images."""
        return self.split in ("all", "train")


@dataclass(frozen=True)
class Calibration:
    """Temperatures and thresholds by class, chosen on the validation split after training.

    Attributes:
        temperatures: the logit of a class divided by its temperature is calibrated.
        rule: how the thresholds were chosen, such as ``youden`` or ``sensitivity=0.95``.
        thresholds: uncalibrated logits; a class is called if its logit is at least its threshold.
        reasons: why a class has no temperature or no threshold.
        fewest: fewest positives, and fewest negatives, that a class needed.
        index_sha256: of the shards that contain the validation split.
        images: of the validation split.
        patients: of the validation split.
    """

    # Ten times wider at both ends than the range from which `evaluate` chooses, 0.01 to 100.
    temperatures: dict[str, Annotated[float, Between(1e-3, 1e3)]]
    rule: Text
    thresholds: dict[str, Real]
    reasons: dict[str, Text]
    fewest: Count
    index_sha256: Sha256
    images: Count
    patients: Count


class ModelFile(TypedDict):
    """The content of model.json."""

    format: Literal["cxrdist-model-1"]
    architecture: Network
    task: Task
    classes: Classes
    normalisation: Normalisation
    image_size_px: SidePx
    fit: Fit
    depth: NotRequired[Depth | None]
    cover: NotRequired[Cover | None]
    calibration: NotRequired[Calibration | None]
    fold: NotRequired[Text | None]
    """The fold that was its validation split, such as 2/5; None for the packed splits."""
    lungs_only: NotRequired[bool]
    """Whether everything but the lungs was black in its images; false if missing."""
    weights: NotRequired[WeightsInfo | None]
    """The weights that the training started from."""


class EnsembleFile(TypedDict):
    """The content of model.json of an ensemble, whose members are runs in its own directory."""

    format: Literal["cxrdist-ensemble-1"]
    members: Annotated[list[Member], Between(2, MOST_MEMBERS), Distinct()]
    calibration: NotRequired[Calibration | None]
    """The calibration of the ensemble; each member has its own, too."""


class WeightsNote(TypedDict):
    """The note that `cxrdist weights convert` writes into the header of safetensors."""

    layout: Text
    labels: NotRequired[Annotated[list[Label], Between(1, MOST_OUTPUTS)] | None]
    normalisation: Normalisation
    started_from: NotRequired[WeightsInfo | None]
