"""Checks of a recipe, and of a recipe with its shards and ranks, before anything is trained."""

from cxrdist.config import TrainConfig
from cxrdist.data.folds import cut_fold, read_fold
from cxrdist.data.index import Index, read_index
from cxrdist.data.labels import read_uncertain
from cxrdist.distributed import read_trackers
from cxrdist.errors import CxrdistError
from cxrdist.model.networks import block_names, refuse_small_squares
from cxrdist.train.background import check_backgrounds, check_regions
from cxrdist.train.stages import check_stages


def refuse_bad_recipe(config: TrainConfig) -> None:
    """Raise CxrdistError if a recipe has an invalid field; its shards are checked later."""
    if (config.run / "index.json").is_file():  # its audit.json and report would be replaced
        raise CxrdistError(f"--run {config.run}: is a directory of shards; name a new one")
    check_stages(config.stages, block_names(config.network))
    check_backgrounds(config)
    # For their errors alone: they are read again where they are used.
    read_uncertain(config.uncertain)
    read_trackers(config.track)
    if config.balance == "classes" and config.copies:
        raise CxrdistError(
            "--balance classes: chooses the copies from the counts, but --copies has "
            f"{config.copies}; leave one out, such as with --balance none or --copies {{}}"
        )
    if config.fold is not None:
        read_fold(config.fold)


def trainable_index(config: TrainConfig) -> Index:
    """Read the index of shards, cut to the fold; raise CxrdistError if they cannot be used."""
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
    """Raise CxrdistError if there are more ranks than images in a step."""
    if world_size > config.global_batch_size:
        raise CxrdistError(
            f"--global-batch-size: {config.global_batch_size} images for {world_size} ranks; "
            "launch at most as many ranks as images in a step"
        )
