"""State that all stages of a run share: run directory, images, plans, network."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from numpy.typing import NDArray

from cxrdist.config import Network, TrainConfig, deciding
from cxrdist.data.cache import open_cache
from cxrdist.data.index import Index
from cxrdist.data.labels import MISSING, NEGATIVE, POSITIVE, UNCERTAIN, settle_uncertain
from cxrdist.data.plan import Plan, balanced_copies, copies_of, cut, plan_epoch, refuse_uncrossed
from cxrdist.distributed import StopVote, on_main, together
from cxrdist.documents import MOST_BYTES
from cxrdist.environment import settings
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.external import keep_seen, seen_before
from cxrdist.files import judging, now, read_bytes, read_recipe, write_json, write_text
from cxrdist.info import ShardsInfo, read_info
from cxrdist.model.densenet import Classifier
from cxrdist.model.description import Cover
from cxrdist.model.layout import InitialWeights
from cxrdist.model.networks import norms_of_one_value
from cxrdist.model.weights import apply_weights, read_weights
from cxrdist.precision import uses_tf32
from cxrdist.run import RunDirectory, environment
from cxrdist.terminal import table
from cxrdist.train.background import (
    BackgroundLoss,
    describe_text_boxes,
    open_backgrounds,
    read_text_boxes,
    refuse_other_text_boxes,
)
from cxrdist.train.checkpoint import has_checkpoint
from cxrdist.train.stages import rates_of
from cxrdist.train.step import Batches, TrainingData, num_passes

# Fields that older recipes lack, with the values that describe what their runs did.
ADDED = {f.name: f.default for f in fields(TrainConfig) if f.metadata.get("newer")}


@dataclass(frozen=True)
class Training:
    """State that all stages of a run share.

    Attributes:
        run: the run directory; written by the main rank only.
        samples: int64 [m], sample numbers of the training split.
        copies: int64 [m], copies of each in an epoch.
        validation: the validation split with its copies, warped alike in every epoch.
        backgrounds: losses by stage.
    """

    accelerator: Accelerator
    run: RunDirectory
    recipe: TrainConfig
    model: Classifier
    data: TrainingData
    samples: NDArray[np.int64]
    copies: NDArray[np.int64]
    validation: Batches
    vote: StopVote
    backgrounds: Mapping[str, BackgroundLoss] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Return the number of images of an epoch, each copy counted."""
        return int(self.copies.sum())

    def plan(self, stage: str, epoch: int) -> Plan:
        """Draw the plan of an epoch, which is the same for any number of ranks."""
        recipe = self.recipe
        return plan_epoch(
            self.samples,
            self.copies,
            recipe.augmentation,
            recipe.global_batch_size,
            (recipe.seed, stage, epoch),
        )


def recipe_yaml(config: TrainConfig) -> str:
    """Format the resolved recipe, without paths and outputs; --config reads it back."""
    return yaml.safe_dump(_fields(config), sort_keys=False)


def fixed_recipe(config: TrainConfig) -> str:
    """Format the recipe without `max_images_per_rank`, which may change when a run resumes.

    A field that older versions lack is left out if its value describes what they did, so that their
    checkpoints still match.
    """
    known = _fields(replace(config, max_images_per_rank=None))
    known["network"] = _whole_network(known["network"])
    kept = {k: v for k, v in known.items() if k not in ADDED or v != ADDED[k]}
    return yaml.safe_dump(kept, sort_keys=False)


def _fields(config: TrainConfig) -> dict[str, Any]:
    known = deciding(config)
    for stage in known["stages"].values():  # older recipes lack these fields and mean the same
        if stage["background"] is None:
            del stage["background"]
        if stage["block_decay"] == 1:
            del stage["block_decay"]
    if config.augmentation.draws == "free":
        del known["augmentation"]["draws"]
    given = {k: v for k, v in known["network"].items() if v is not None}
    if "block_config" in given:
        given["block_config"] = list(given["block_config"])
    return {**known, "network": given}


def _whole_network(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a network as older recipes have them: a DenseNet by shape, unnamed."""
    network = Network(**given)
    if not network.is_densenet:
        return given
    growth_rate, block_config = network.dense_shape
    shape = {"growth_rate": growth_rate, "block_config": list(block_config)}
    return {**shape, "dropout": network.dropout}


def refuse_other_run(run: RunDirectory, config: TrainConfig, index: Index, precision: str) -> None:
    """Raise CxrdistError if a run directory holds a run of another recipe or of other shards.

    An unfinished run must also have the same mixed precision, as run.json names only one.
    """
    begun, finished = has_checkpoint(run.checkpoints), (run.model / "model.json").is_file()
    if not run.recipe.is_file() or not (begun or finished):
        return  # without a checkpoint nothing can be mixed up: a corrected recipe may start
    _, old = read_recipe(run.recipe, "copy the run directory again, or give a new one")
    difference = _difference(old, _fields(config))
    if difference:
        raise CxrdistError(
            f"--run {run.root}: holds a run of another recipe ({difference}); "
            "give the same recipe to resume it, or a new directory"
        )
    info = read_info(run)
    refuse_other_text_boxes(config, info.get("text_boxes"))
    if info["shards"]["index_sha256"] != index.sha256:
        raise CxrdistError(
            f"--run {run.root}: was begun with other shards than {index.directory}; "
            "give the same shards to resume it, or a new directory"
        )
    if not finished and info["mixed_precision"] != precision:
        raise CxrdistError(
            f"--run {run.root}: was begun with --mixed_precision {info['mixed_precision']}, is "
            f"launched with {precision}; launch it as before to resume it, or give a new directory"
        )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Return the first field in which two recipes differ; the order of the stages counts."""
    for name in new:
        before = old.get(name, ADDED.get(name))
        if name == "network" and before and _whole_network(before) == _whole_network(new[name]):
            continue
        if name != "max_images_per_rank" and before != new[name]:
            return _first_change(name, before, new[name])
    # Dictionaries are equal in any order.
    same_order = list(old["stages"]) == list(new["stages"])
    return None if same_order else "its stages were in another order"


def _first_change(name: str, old: Any, new: Any) -> str:
    """Name the first field that differs between two values of a field, and its two values."""
    if isinstance(old, dict) and isinstance(new, dict):
        below = next((part for part in {**old, **new} if old.get(part) != new.get(part)), None)
        if below is not None:
            return _first_change(f"{name}.{below}", old.get(below), new.get(below))
    return f"{name} was {old!s:.200}, is {new!s:.200}"


def describe_shards(index: Index) -> ShardsInfo:
    """Describe the shards of a run, for run.json."""
    return {
        "path": str(index.directory),
        "index_sha256": index.sha256,
        "image_size_px": index.image_size_px,
        "fit": index.fit,
        "split": index.split,
        "task": index.task,
        "classes": index.classes,
        "counts": index.counts(),
        "totals": index.totals(),
    }


def _read_audit(index: Index) -> str:
    """Read the audit of the shards, if they have one; raise CxrdistError if it is damaged."""
    path = index.directory / "audit.json"
    if not path.is_file():
        return ""
    with judging(path, "write it anew with cxrdist check --audit"):
        return read_bytes(path.resolve(), MOST_BYTES).decode("utf-8")


def build_training(
    accelerator: Accelerator, run: RunDirectory, config: TrainConfig, index: Index
) -> Training:
    """Read weights and images; only then begin the run directory, or resume it.

    Invalid input is rejected before the run directory is written and before the cache of images is
    opened, except invalid masks: these are read from the cache.
    """
    train, val = (np.array(index.numbers(split)) for split in ("train", "val"))
    stated = index.targets()
    targets = together(accelerator, lambda: _settle_targets(stated, index, config))
    balanced = config.balance == "classes" and index.task == "multiclass"
    by_class = balanced_copies(targets[train], index.classes) if balanced else config.copies
    copies = together(accelerator, lambda: copies_of(targets, index.classes, by_class))
    taken = np.concatenate([train, val])
    together(accelerator, lambda: refuse_uncrossed(copies[taken], config.augmentation))
    weights = together(accelerator, lambda: _read_weights(config))
    together(accelerator, lambda: _refuse_other_weights(run, weights))
    audit = together(accelerator, lambda: _read_audit(index))
    model = _build_model(config, index, weights)
    num_copied, num_images = apply_weights(weights, model), int(copies[train].sum())
    world_size = accelerator.num_processes
    together(accelerator, lambda: _refuse_single_values(config, model, num_images, world_size))
    boxes = together(accelerator, lambda: read_text_boxes(config, index))
    text_boxes = together(accelerator, lambda: describe_text_boxes(config))
    earlier = together(accelerator, lambda: seen_before(config.init))
    images = open_cache(index, config.cache, accelerator)
    backgrounds = open_backgrounds(config, index, boxes, accelerator)
    # Before `keep_seen`, which writes one of the files that this removes.
    on_main(accelerator, lambda: _forget_attempt(run))
    on_main(accelerator, lambda: keep_seen(run, index, images, earlier))
    if accelerator.is_main_process:
        launch = _describe_start(accelerator, weights, num_copied)
        _begin_run(run, config, index, {**launch, "text_boxes": text_boxes}, audit)
        print(f"weights: {weights.source}{f', {num_copied} tensors' if num_copied else ''}")
        if config.balance == "classes":
            print(_describe_balance(index, by_class))
        print(_describe_unknown(stated[train], targets[train]), end="")
        print(epoch_table(targets, index.classes, copies, (train, val)))
        print(_describe_steps(num_images, config))
    model.to(accelerator.device)
    model.to(memory_format=torch.channels_last)  # faster on GPUs, and by 1.1 to 1.3 on CPUs
    # One fixed draw of the expanded validation split, so that epochs can be compared.
    # Its batch size of 1 has no effect, as `validate` cuts batches of its own.
    val_plan = plan_epoch(val, copies[val], config.augmentation, 1, (config.seed, "validation", 0))
    data = TrainingData(images, targets, index.task)
    return Training(
        accelerator,
        run,
        config,
        model,
        data,
        train,
        copies[train],
        Batches(data, val_plan, accelerator.device),
        StopVote(accelerator),
        backgrounds,
    )


def _forget_attempt(run: RunDirectory) -> None:
    """Remove the first files of a training without a checkpoint: the next may have other inputs."""
    if not has_checkpoint(run.checkpoints):
        # The recipe goes first: where it exists, `_begin_run` reads run.json.
        for file in (run.recipe, run.info, run.audit, run.seen):
            file.unlink(missing_ok=True)


def _begin_run(
    run: RunDirectory, config: TrainConfig, index: Index, start: dict[str, Any], audit: str
) -> None:
    """Write the first files of a run, or note in them how it resumes.

    `start` describes the hardware and the weights of this launch; `audit` is empty if the shards
    have none.
    """
    before: dict[str, Any] = {**read_info(run)} if run.recipe.is_file() else {}
    shards = {"format": "cxrdist-run-1", "shards": describe_shards(index)}
    # Later entries replace earlier ones: `started` and `stages` stay as the first launch has them.
    write_json(run.info, {"started": now(), "stages": {}, **before, **shards, **start})
    if audit:
        write_text(run.audit, audit)
    # Last, because the next launch reads run.json where there is a recipe.
    write_text(run.recipe, recipe_yaml(config))


def _refuse_single_values(
    recipe: TrainConfig, model: Classifier, num_images: int, world_size: int
) -> None:
    """Raise CxrdistError if a BatchNorm would compute the variance of a single value.

    It would for features of 1 x 1 px, in a step of one image. `num_images` is that of an epoch,
    with all copies.
    """
    size_px = model.image_size_px
    blocks = norms_of_one_value(model.shape, len(model.normalisation.mean), size_px)
    stages = recipe.stages.items()
    moving = blocks if recipe.frozen_batch_norm == "moving" else set[str]()
    trained = [n for n, stage in stages if blocks & (moving | rates_of(stage, model.shape).keys())]
    if not trained or _fewest_images(recipe, num_images, world_size) > 1:
        return
    cause = f"--global-batch-size: {recipe.global_batch_size} leaves"
    whole = replace(recipe, max_images_per_rank=None)
    if _fewest_images(whole, num_images, world_size) > 1:
        cause = f"--max-images-per-rank: passes of at most {recipe.max_images_per_rank} leave"
    per_rank = recipe.batch_norm == "per_rank" and world_size > 1
    raise CxrdistError(
        f"{cause} BatchNorm with one image of {size_px} px, which has no variance in stage "
        f"{trained[0]}; take a larger number or larger images"
        f"{', or --batch-norm synchronised' if per_rank else ''}"
    )


def _fewest_images(recipe: TrainConfig, num_images: int, world_size: int) -> int:
    """Return the fewest images that a BatchNorm normalises together in an epoch.

    They are those of the first pass of a step (`passes_of`), on all ranks or on one.
    """
    num_steps = -(-num_images // recipe.global_batch_size)
    fewest = []
    for size in (num_images // num_steps, -(-num_images // num_steps)):
        slices = [cut(size, rank, world_size) for rank in range(world_size)]
        sizes = [rows.stop - rows.start for rows in slices]
        count = num_passes(sizes, recipe.max_images_per_rank)
        first = [cut(images, 0, count).stop for images in sizes]
        fewest.append(max(1, min(first)) if recipe.batch_norm == "per_rank" else sum(first))
    return min(fewest)


def _describe_balance(index: Index, by_class: dict[str, int]) -> str:
    """Describe which copies `balance: classes` has chosen, for the terminal."""
    if index.task == "multilabel":
        return (
            "balance: each image once per epoch, as images may have several labels: copies for a "
            "rare one would be copies of the others"
        )
    chosen = ", ".join(f"{name} {number}" for name, number in by_class.items())
    return f"balance: copies of each image in an epoch, from the counts of train: {chosen}"


def _settle_targets(
    stated: NDArray[np.int8], index: Index, config: TrainConfig
) -> NDArray[np.int8]:
    """Replace uncertain labels of the training split, of `Index.targets`, as the recipe says.

    Those of the other splits stay uncertain: no score counts them.

    Returns:
        int8 [samples, classes], as in `TrainingData`.
    """
    targets, train = stated.copy(), index.numbers("train")
    targets[train] = settle_uncertain(stated[train], index.classes, config.uncertain)
    for split in ("train", "val"):
        if not (targets[index.numbers(split)] >= 0).any():
            raise CxrdistError(
                f"--shards {index.directory}: all labels in {split} are uncertain or missing; "
                "training needs known ones in train and val"
            )
    return targets


def _describe_unknown(stated: NDArray[np.int8], learnt: NDArray[np.int8]) -> str:
    """Describe the training labels that the source does not state, in a line or none.

    Both arrays are int8 [T, classes], the labels of the source and those of the loss.
    """
    uncertain, num_missing = stated == UNCERTAIN, int((stated == MISSING).sum())
    if not num_missing and not uncertain.any():
        return ""
    ways = (("positive", POSITIVE), ("negative", NEGATIVE), ("ignored", UNCERTAIN))
    counted = [f"{int((learnt[uncertain] == code).sum())} {way}" for way, code in ways]
    return (
        f"labels of train: {int(uncertain.sum())} uncertain (count as {', '.join(counted)}), "
        f"{num_missing} missing, of {stated.size}; what is ignored or missing has no loss\n"
    )


def epoch_table(
    targets: NDArray[np.int8],
    classes: list[str],
    copies: NDArray[np.int64],
    splits: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> str:
    """Tabulate how many images an epoch and a validation take per class.

    An image of several labels counts in the row of each of them. Targets are those of
    `TrainingData`, copies int64 [samples], and splits the sample numbers of train and of val.
    """
    rows = []
    for name, has in [*zip(classes, (targets == POSITIVE).T, strict=True), ("all", None)]:
        chosen = [split if has is None else split[has[split]] for split in splits]
        counts = [(len(numbers), int(copies[numbers].sum())) for numbers in chosen]
        rows.append([name, *(str(count) for pair in counts for count in pair)])
    return table(rows, ["class", "train", "per epoch", "val", "per validation"])


def _describe_steps(num_images: int, config: TrainConfig) -> str:
    """Describe how many steps an epoch has, for the terminal."""
    batch = config.global_batch_size
    return f"an epoch: {num_images:,} images in {-(-num_images // batch):,} steps of up to {batch}"


def _read_weights(config: TrainConfig) -> InitialWeights:
    """Read the initial weights; one rank downloads them while the others wait for its file."""
    try:
        return read_weights(config.init, architecture=config.network.architecture)
    except CxrdistError as error:
        if config.init not in ("chexnet", "imagenet"):
            raise
        raise CxrdistError(f"{error}. --init none starts from random weights") from error


def _refuse_other_weights(run: RunDirectory, weights: InitialWeights) -> None:
    """Raise CxrdistError if a run would resume with other weights than it began with."""
    if not (run.recipe.is_file() and has_checkpoint(run.checkpoints)):
        return
    began = read_info(run)["weights"].get("sha256")
    if began != weights.record["sha256"]:
        raise CxrdistError(
            f"--init {weights.source}: has the sha256 {weights.record['sha256']}, but the run "
            f"began with {began}; put the file back, or train in a new directory"
        )


def _build_model(config: TrainConfig, index: Index, weights: InitialWeights) -> Classifier:
    torch.manual_seed(config.seed)
    model = Classifier(
        config.network,
        index.classes,
        index.image_size_px,
        weights.normalisation,
        index.fit,
        index.task,
    )
    model.depth, model.fold, model.lungs_only = index.depth, config.fold, index.lungs_only
    model.cover = Cover(index.cover["how"], index.cover["split"]) if index.cover else None
    return model


def _describe_start(
    accelerator: Accelerator, weights: InitialWeights, num_copied: int
) -> dict[str, Any]:
    """Describe the hardware and the weights of this launch, for run.json."""
    device = accelerator.device
    cuda = device.type == "cuda"
    return {
        **environment(),
        "finished": None,
        "world_size": accelerator.num_processes,
        "device": f"cuda: {torch.cuda.get_device_name(device)}" if cuda else device.type,
        "mixed_precision": accelerator.mixed_precision,
        "tf32": uses_tf32(),
        "environment": settings(),
        "weights": weights.describe(num_copied),
    }
