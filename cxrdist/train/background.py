"""The background loss of a stage: its regions, and the penalty for using them."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cxrdist.config import Background, TrainConfig
from cxrdist.data.cache import open_masks
from cxrdist.data.foreground import FULL, Foreground, foreground_of, has_mask
from cxrdist.data.index import Index
from cxrdist.data.regions import Region, read_regions
from cxrdist.data.square_boxes import SquareBoxes, boxes_in_squares
from cxrdist.data.tables import MOST_BYTES
from cxrdist.errors import CxrdistError
from cxrdist.explain.background import share_of_contrast, squared_gradient
from cxrdist.files import judging, read_bytes
from cxrdist.info import BackgroundInfo, TextBoxesInfo
from cxrdist.model.augment import warp, warp_masks
from cxrdist.model.densenet import Classifier


@dataclass(frozen=True)
class BackgroundLoss:
    """The term that a stage adds to its loss: its weight times the mean penalty of the images."""

    recipe: Background
    foreground: Foreground
    info: BackgroundInfo

    def penalties(
        self,
        model: Classifier,
        images: Tensor,
        matrices: Tensor,
        targets: Tensor,
        foreground: Tensor,
        turn: int | None,
    ) -> Tensor:
        """Return the penalty of each image, which is 0 for one without a background.

        In the other images, what a warp brings in from outside is background too. The arguments are
        as in `step.Slice`; without a turn, the mean of both shares of `share_of_contrast` counts.

        Returns:
            Floats [B] in the precision of the model, never in that of autocast.
        """
        has_background = (foreground < FULL).flatten(1).any(1)
        background = warp_masks(foreground, matrices) < FULL
        with torch.autocast(images.device.type, enabled=False):
            warped = warp(images, matrices)
            if self.recipe.method == "lrp":
                penalties = share_of_contrast(model, warped, targets, background, turn)
            else:
                penalties = squared_gradient(model, warped, targets, background)
        return penalties * has_background


def check_backgrounds(config: TrainConfig) -> None:
    """Reject background losses that are invalid, and boxes of text that are missing or not used."""
    has_text = False
    for name, stage in config.stages.items():
        if stage.background is None:
            continue
        field = f"--stages.{name}.background"
        if stage.background.method == "lrp" and not config.network.is_densenet:
            raise CxrdistError(
                f"{field}.method: lrp is for DenseNets, and --network.architecture is "
                f"{config.network.architecture}; take the method gradient, or a DenseNet"
            )
        try:
            has_text |= "text" in read_regions(stage.background.region)
        except CxrdistError as error:
            raise CxrdistError(f"{field}.{error}") from error
    if has_text and config.text_boxes is None:
        raise CxrdistError(
            "--text-boxes: is missing, and a stage has the background region text; give the CSV "
            "that cxrdist find-text makes"
        )
    if config.text_boxes is not None and not has_text:
        raise CxrdistError(
            "--text-boxes: no stage of the recipe has the background region text; leave it out"
        )


def check_regions(config: TrainConfig, index: Index) -> None:
    """Raise CxrdistError if train has no masks but needs them, or its text is covered already."""
    regions = _needed(config)
    train = [index.samples[number] for number in index.numbers("train")]
    if "masks" in regions and not any(sample.mask_sha256 for sample in train):
        raise CxrdistError(
            f"--shards {index.directory}: no image of train has a mask, which the background "
            "region masks needs; pack with --masks, or take the region thorax"
        )
    if "text" in regions and index.cover and index.cover["split"] in ("all", "train"):
        raise CxrdistError(
            f"--shards {index.directory}: their burned-in text is covered already; give shards "
            "that were packed without --text-boxes, or leave out the background region text"
        )


def _recipes(config: TrainConfig) -> dict[str, tuple[Background, tuple[Region, ...]]]:
    """Return the background loss and its regions, for each stage that has one."""
    return {
        name: (stage.background, read_regions(stage.background.region))
        for name, stage in config.stages.items()
        if stage.background
    }


def _needed(config: TrainConfig) -> set[Region]:
    return {region for _, regions in _recipes(config).values() for region in regions}


def open_backgrounds(
    config: TrainConfig, index: Index, boxes: SquareBoxes, accelerator: Accelerator
) -> dict[str, BackgroundLoss]:
    """Open the masks for the background losses, and return these losses by stage."""
    masks = open_masks(index, config.cache, accelerator) if "masks" in _needed(config) else None
    train = np.array(index.numbers("train"))
    if masks is not None and not has_mask(masks, train, index.image_size_px).any():
        raise CxrdistError(
            f"--shards {index.directory}: each mask of train covers nothing or everything; pack "
            "with other --masks, or take the background region thorax"
        )
    opened = {}
    for name, (recipe, regions) in _recipes(config).items():
        foreground = foreground_of(regions, index.image_size_px, masks, boxes)
        num_images = int(foreground.has_background(train).sum())
        info: BackgroundInfo = {
            "weight": recipe.weight,
            "region": ",".join(regions),
            "method": recipe.method,
            "images": num_images,
            "without": len(train) - num_images,
        }
        opened[name] = BackgroundLoss(recipe, foreground, info)
    return opened


def read_text_boxes(config: TrainConfig, index: Index) -> SquareBoxes:
    """Return the boxes of text of train and val in their squares, if a stage needs them."""
    if config.text_boxes is None:
        return {}
    train, val = (index.numbers(split) for split in ("train", "val"))
    boxes = boxes_in_squares(index, np.array(train + val), config.text_boxes, "--text-boxes")
    if not boxes.keys() & {*train}:
        raise CxrdistError(
            f"--text-boxes {config.text_boxes}: no image of train has text in it; leave out the "
            "background region text"
        )
    return boxes


def describe_text_boxes(config: TrainConfig) -> TextBoxesInfo | None:
    """Describe the CSV of boxes for run.json; raise CxrdistError if it cannot be read."""
    if config.text_boxes is None:
        return None
    # Resolved, because `read_bytes` rejects links, and a file that the user names may be one.
    with judging(config.text_boxes, "make it with cxrdist find-text"):
        content = read_bytes(config.text_boxes.resolve(), MOST_BYTES)
    return {"file": config.text_boxes.name, "sha256": hashlib.sha256(content).hexdigest()}


def refuse_other_text_boxes(config: TrainConfig, before: TextBoxesInfo | None) -> None:
    """Raise CxrdistError if a run would resume with other boxes than it began with."""
    boxes = describe_text_boxes(config)
    if boxes and before and boxes["sha256"] != before["sha256"]:
        raise CxrdistError(
            f"--text-boxes {config.text_boxes}: has the sha256 {boxes['sha256']}, but the run "
            f"began with {before['sha256']}; put the file back, or train in a new directory"
        )


def describe_background(info: BackgroundInfo) -> str:
    """Describe a stage's background loss, for the terminal."""
    without = f"; {info['without']} have no background, so no penalty" if info["without"] else ""
    return (
        f"background: {info['weight']:g} times the penalty ({info['method']}) of "
        f"{info['region']}, on {info['images']} images of train{without}"
    )
