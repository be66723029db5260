"""Checks of a recipe, and of a recipe with its shards and ranks, before anything is trained."""

from cxrdist.config import TrainConfig
from cxrdist.data.folds import cut_fold, read_fold
from cxrdist.data.index import Index, read_index
from cxrdist.data.labels import read_uncertain
from cxrdist.errors import CxrdistError, refuse_below_one
from cxrdist.model.networks import block_names, norms_of_one_value, refuse_small_squares
from cxrdist.train.background import check_backgrounds, check_regions
from cxrdist.train.stages import check_stages, rates_of
from cxrdist.train.training import Training


def refuse_bad_recipe(config: TrainConfig) -> None:
    """Make sure that a recipe can be trained, as far as that is known without its shards.

    Raises:
        CxrdistError: a field has an invalid value.
    """
    check_stages(config.stages, block_names(config.network))
    check_backgrounds(config)
    refuse_below_one(config, "global_batch_size", "max_images_per_rank", "save_steps")
    read_uncertain(config.uncertain)
    if config.balance == "classes" and config.copies:
        raise CxrdistError(
            f"balance: classes chooses the copies from the counts, but copies has {config.copies}; "
            "leave one out, such as with --balance none or --copies {}"
        )
    if config.fold is not None:
        read_fold(config.fold)
    if config.average is not None and not 0 < config.average < 1:
        raise CxrdistError(
            f"average: is {config.average}, expected a decay between 0 and 1, such as 0.999; "
            "leave it out for the weights as they are"
        )
    if config.max_gradient_norm is not None and not config.max_gradient_norm > 0:
        raise CxrdistError(
            f"max_gradient_norm: is {config.max_gradient_norm}, expected a norm above 0; leave it "
            "out for gradients as they are"
        )


def trainable_index(config: TrainConfig) -> Index:
    """Read the index of shards that the recipe can be trained on, cut to its fold.

    Raises:
        CxrdistError: they lack images, regions or size.
    """
    shards, index = config.shards, cut_fold(read_index(config.shards), config.fold)
    for split in ("train", "val"):
        if not index.numbers(split):
            raise CxrdistError(
                f"--shards {shards}: have no images in {split}; training needs train and val, pack "
                "with --split 0.7/0.1/0.2"
            )
    check_regions(config, index)
    refuse_small_squares(config.network, index.image_size_px, f"--shards {shards}")
    return index


def refuse_large_world(config: TrainConfig, world_size: int) -> None:
    """Make sure that each rank has an image in a step.

    Raises:
        CxrdistError: there are more ranks than images.
    """
    if world_size > config.global_batch_size:
        raise CxrdistError(
            f"global_batch_size: {config.global_batch_size} images for {world_size} ranks; "
            "launch at most as many ranks as images in a step"
        )


def refuse_single_values(training: Training) -> None:
    """Make sure that no BatchNorm has to find the variance of one value.

    One does where its features are of 1 x 1 px, in a step of one image.

    Raises:
        CxrdistError: one would have to.
    """
    recipe, world_size = training.recipe, training.accelerator.num_processes
    model, size_px = training.model, training.model.image_size_px
    blocks = norms_of_one_value(model.shape, len(model.normalisation.mean), size_px)
    stages = recipe.stages.items()
    moving = blocks if recipe.frozen_batch_norm == "moving" else set[str]()
    trained = [n for n, stage in stages if blocks & (moving | rates_of(stage, model.shape).keys())]
    smallest = training.num_images // -(-training.num_images // recipe.global_batch_size)
    if recipe.batch_norm == "per_rank":
        smallest = max(1, smallest // world_size)
    if recipe.max_images_per_rank:
        smallest = min(smallest, recipe.max_images_per_rank)
    if trained and smallest == 1:
        raise CxrdistError(
            f"global_batch_size: {recipe.global_batch_size} images leave BatchNorm with one image "
            f"of {size_px} px, which has no variance in stage {trained[0]}; take a larger batch, "
            "larger images, or batch_norm: synchronised"
        )
