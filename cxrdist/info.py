"""run.json: what was run, with what, and how far it came."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from cxrdist.documents import Between, Real, Sha256
from cxrdist.errors import CxrdistError
from cxrdist.run import RunDirectory, read_document

Count = Annotated[int, Between(0, 10**12)]


class Amount(TypedDict):
    """How much a part of the shards holds."""

    images: Count
    patients: Count


class LabelAmount(Amount):
    """How many images have a label, and for how many the source does not state it.

    Runs of older versions lack the last three.
    """

    uncertain: NotRequired[Count]
    missing: NotRequired[Count]
    assumed_absent: NotRequired[Count]
    """Images that count as without the label though the source says nothing of it."""


class ShardsInfo(TypedDict):
    """The shards of the run."""

    path: str
    index_sha256: str
    image_size_px: Count
    fit: NotRequired[str]
    split: str
    task: Literal["multiclass", "multilabel"]
    classes: list[str]
    counts: dict[str, dict[str, LabelAmount]]
    """By split and class."""
    totals: dict[str, Amount]
    """By split."""


class WeightsInfo(TypedDict):
    """Where weights come from; the chain of `started_from` leads to the first ones.

    It stands in run.json, in model.json and in files of converted weights.
    """

    source: str
    sha256: NotRequired[str | None]
    layout: NotRequired[str | None]
    labels: NotRequired[list[str] | None]
    tensors: NotRequired[Count | None]
    trained_on: NotRequired[dict[str, str | None] | None]
    normalisation: NotRequired[dict[str, list[float]]]
    started_from: NotRequired["WeightsInfo | None"]


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
    """Of train that have background."""
    without: Count
    """Images of train that have none, and no penalty."""


class TextBoxesInfo(TypedDict):
    """The table of boxes of burned-in text."""

    file: str
    sha256: Sha256


class StageInfo(TypedDict):
    """A stage as far as it has come."""

    parameter_groups: list[GroupInfo]
    frozen: list[str]
    frozen_batch_norm: NotRequired[Literal["kept", "moving"]]
    """Whether the statistics of frozen blocks moved; runs of older versions kept them."""
    epochs: Count
    steps: Count
    best_epoch: Count
    best_val_loss: Real
    background: NotRequired[BackgroundInfo | None]


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
    device: str
    mixed_precision: str
    tf32: NotRequired[Any]
    stages: dict[str, StageInfo]
    text_boxes: NotRequired[TextBoxesInfo | None]
    smoke_test: NotRequired[bool]
    """Whether `cxrdist demo` trained it on images that are not its own."""


def read_info(run: RunDirectory) -> RunInfo:
    """Read run.json.

    Raises:
        CxrdistError: there is none, or it is not one of this format.
    """
    mend = "run `cxrdist train` again"
    if not run.info.is_file():
        raise CxrdistError(
            f"--run {run.root}: holds no run.json; give the directory of a `cxrdist train`"
        )
    info = read_document(run.info, RunInfo, mend)
    shards = info["shards"]
    for split, counts in shards["counts"].items():
        if split not in shards["totals"] or not counts.keys() >= set(shards["classes"]):
            raise CxrdistError(f"{run.info}: lacks counts of {split} by class; {mend}")
    return info
