"""run.json: the inputs, environment and progress of a run."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from cxrdist.documents import Between, Real, Sha256
from cxrdist.errors import CxrdistError
from cxrdist.files import read_document
from cxrdist.run import RunDirectory

Task = Literal["multiclass", "multilabel"]
Count = Annotated[int, Between(0, 10**12)]


class Amount(TypedDict):
    """Numbers of images and patients in a subset of the shards."""

    images: Count
    patients: Count


class LabelAmount(Amount):
    """Numbers of images with a label, and of images for which the source does not state it.

    Runs of older versions lack the last three.
    """

    uncertain: NotRequired[Count]
    missing: NotRequired[Count]
    assumed_absent: NotRequired[Count]
    """Images that count as negative although the source does not state the label."""


class ShardsInfo(TypedDict):
    """The shards of the run."""

    path: str
    index_sha256: str
    image_size_px: Count
    fit: NotRequired[str]
    split: str
    task: Task
    classes: list[str]
    counts: dict[str, dict[str, LabelAmount]]
    """By split and class."""
    totals: dict[str, Amount]
    """By split."""


class WeightsInfo(TypedDict):
    """The origin of weights; the chain of `started_from` leads to the first ones.

    It is written to run.json, to model.json and to files of converted weights.
    """

    source: str
    sha256: NotRequired[str | None]
    layout: NotRequired[str | None]
    labels: NotRequired[list[str] | None]
    tensors: NotRequired[Count | None]
    trained_on: NotRequired[dict[str, str | None] | None]
    normalisation: NotRequired[dict[str, list[float]]]
    started_from: NotRequired["WeightsInfo | None"]


def origins(weights: WeightsInfo | None) -> Iterator[WeightsInfo]:
    """Yield weights, those that they were made from, and so on to the first ones."""
    while weights:
        yield weights
        weights = weights.get("started_from")


class GroupInfo(TypedDict):
    """A parameter group of a stage."""

    block: str
    lr: Real
    weight_decay: Real
    tensors: Count
    parameters: Count


class BackgroundInfo(TypedDict):
    """The background loss of a stage."""

    weight: Real
    region: str
    method: Literal["lrp", "gradient"]
    images: Count
    """Images of train with background."""
    without: Count
    """Images of train without background, which have no penalty."""


class TextBoxesInfo(TypedDict):
    """The table of boxes of burned-in text."""

    file: str
    sha256: Sha256


class StageInfo(TypedDict):
    """The progress of a stage."""

    parameter_groups: list[GroupInfo]
    frozen: list[str]
    frozen_batch_norm: NotRequired[Literal["kept", "moving"]]
    """Whether the statistics of frozen blocks moved; runs of older versions kept them."""
    epochs: Count
    steps: Count
    best_epoch: Count
    best_val_loss: Real
    background: NotRequired[BackgroundInfo | None]


class Launch(TypedDict):
    """The hardware of a run from some step on, until that of the next launch."""

    world_size: Count
    device: str
    from_step: Count
    """Number of optimiser steps of all stages that were done before."""


class RunInfo(TypedDict):
    """The content of run.json."""

    format: Literal["cxrdist-run-1"]
    started: str
    """ISO time, UTC."""
    finished: str | None
    shards: ShardsInfo
    weights: WeightsInfo
    versions: dict[str, str]
    git_revision: str | None
    world_size: Count
    """World size of the last launch, as are device and precision."""
    device: str
    launches: NotRequired[list[Launch]]
    """The hardware that each step was done on; missing in runs of older versions."""
    mixed_precision: str
    tf32: NotRequired[Any]
    stages: dict[str, StageInfo]
    text_boxes: NotRequired[TextBoxesInfo | None]
    smoke_test: NotRequired[bool]
    """Whether `cxrdist demo` trained it on the user's images."""


def launches_of(info: RunInfo) -> list[Launch]:
    """Return the hardware of all steps; for a run of an older version, that of its last launch."""
    last: Launch = {"world_size": info["world_size"], "device": info["device"], "from_step": 0}
    return info.get("launches") or [last]


def read_info(run: RunDirectory) -> RunInfo:
    """Read run.json; raise CxrdistError if it is missing or has another format."""
    mend = "copy the run directory again, or train in a new one"
    if not run.info.is_file():
        raise CxrdistError(
            f"--run {run.root}: contains no run.json; give the directory of a `cxrdist train`"
        )
    info = read_document(run.info, RunInfo, mend)
    shards = info["shards"]
    for split, counts in shards["counts"].items():
        if split not in shards["totals"] or not counts.keys() >= set(shards["classes"]):
            raise CxrdistError(f"{run.info}: lacks counts of {split} by class; {mend}")
    return info
