"""A trained model and the shards to use it on: its own, or an external set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from cxrdist.data.cache import Images, open_cache
from cxrdist.data.folds import cut_fold
from cxrdist.data.index import Index, read_index
from cxrdist.distributed import entering, say, start, together
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.external import (
    Choices,
    External,
    choose_subset,
    find_overlap,
    map_labels,
    read_choices,
    read_own,
    refuse_choices,
    refuse_other_set,
    take_external,
)
from cxrdist.files import locked, refuse_unwritable
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import Ensemble, load_predictor
from cxrdist.run import RunDirectory


@dataclass(frozen=True)
class OpenedRun:
    """A trained model and the shards to use it on, on this rank, before any image is decoded.

    Attributes:
        model: one network or an ensemble, in evaluation mode, on the device.
        index: the shards converted for the model: for an external set, labels are the model's and
            unused samples are in no split.
        subset: train, val, test or external/NAME; the directory of the results in the run.
        packed: the shards as packed; differs from `index` only for an external set.
        choices: how to evaluate an external set; None for the run's own shards.
    """

    accelerator: Accelerator
    run: RunDirectory
    model: Classifier | Ensemble
    index: Index
    subset: str
    packed: Index
    split: str
    choices: Choices | None


@dataclass(frozen=True)
class LoadedRun(OpenedRun):
    """A trained model and the images to use it on, on this rank.

    Attributes:
        images: uint8 [samples, size, size].
        external: the external set; None for the run's own shards.
    """

    images: Images
    external: External | None = None


def open_run_on(
    run: Path, shards: Path, split: str, name: str | None = None, choices: Choices | None = None
) -> OpenedRun:
    """Load a model, and open the shards to use it on, the run's own or an external set.

    Without a `name`, an external set is named after its directory; without `choices`, it is
    evaluated as the last time (`read_choices`).

    Raises:
        CxrdistError: there is no model, the shards are incomplete, their task, classes or image
            size differ from the model's, or they have no image in the split.
    """
    accelerator, directory = start(), RunDirectory(run)
    model = together(accelerator, lambda: load_predictor(run))

    def prepare() -> OpenedRun:
        packed = read_index(shards)
        index, chosen = packed, None
        subset = choose_subset(read_own(directory), index, split, name)
        if subset == split:
            # First: a fold changes which images are in the split that `refuse_unlike` checks.
            index = _splits_of_training(index, model, split)
        refuse_unlike(index, model, split)
        if subset == split:
            _refuse_other_classes(index, model)
            refuse_choices(choices, shards)
            packed = index
        else:
            refuse_other_set(directory, subset, packed, split)
            chosen = choices or read_choices(directory, subset)
            index = map_labels(packed, model.classes, chosen.label_map)
        on_device = model.to(accelerator.device)
        return OpenedRun(accelerator, directory, on_device, index, subset, packed, split, chosen)

    opened = together(accelerator, prepare)
    if opened.choices is None and not directory.info.is_file():
        say(
            accelerator,
            f"{run}: holds no run.json, so it is unknown whether it was trained on {shards}; they "
            "count as its own; give --name to evaluate them as an external set",
        )
    return opened


@contextmanager
def writing(
    opened: OpenedRun, file_of: Callable[[str], Path], pictures_of: Callable[[str], Path]
) -> Iterator[Path]:
    """Lock a directory of pictures, and yield the file of the results that belong to them.

    Both paths are functions of the subset. The lock keeps two commands from mixing their files.

    Raises:
        CxrdistError, RunFailedError: the file cannot be written, or another command holds the lock.
    """

    def prepare() -> tuple[Path, Path]:
        file = file_of(opened.subset)
        refuse_unwritable(file)
        return file, pictures_of(opened.subset)

    accelerator = opened.accelerator
    file, pictures = together(accelerator, prepare)
    with entering(accelerator, locked(pictures), here=accelerator.is_main_process):
        yield file


def load_images(opened: OpenedRun, cache: Path | None) -> LoadedRun:
    """Decode the shards, or take their decoded images from `cache`; find images seen in training.

    Raises:
        CxrdistError: no image of an external set is left.
    """
    images = open_cache(opened.packed, cache, opened.accelerator)
    loaded = LoadedRun(**vars(opened), images=images)
    if (choices := opened.choices) is None:
        return loaded
    accelerator, packed, mapped = opened.accelerator, opened.packed, opened.index
    numbers = np.array(mapped.numbers(opened.split), dtype=np.int64)
    overlap = find_overlap(accelerator, opened.run, packed, images, numbers, cache)
    external = together(
        accelerator,
        lambda: take_external(opened.subset, packed, mapped, opened.split, choices, overlap),
    )
    return replace(loaded, index=external.index, external=external)


def refuse_unlike(index: Index, model: Classifier | Ensemble, split: str) -> None:
    """Check that the model can take the images of a split.

    Raises:
        CxrdistError: it cannot, or there are none.
    """
    shards = index.directory
    if index.task != model.task:
        raise CxrdistError(
            f"--shards {shards}: are {index.task}, the model is {model.task}; give shards like "
            "those that it was trained on"
        )
    if (index.image_size_px, index.fit) != (model.image_size_px, model.fit):
        raise CxrdistError(
            f"--shards {shards}: have images of {index.image_size_px} px (--fit {index.fit}), the "
            f"model was trained at {model.image_size_px} px (--fit {model.fit}); pack with --size "
            f"{model.image_size_px} --fit {model.fit}"
        )
    if index.lungs_only != model.lungs_only:
        kinds = {True: "of the lungs only", False: "of whole images"}
        raise CxrdistError(
            f"--shards {shards}: are {kinds[index.lungs_only]}, the model was trained on shards "
            f"{kinds[model.lungs_only]}; pack {'with' if model.lungs_only else 'without'} "
            "--lungs-only"
        )
    if not index.numbers(split):
        there = [name for name, counts in index.totals().items() if counts["images"]]
        raise CxrdistError(
            f"--split {split}: --shards {shards} have no images in it, only in "
            f"{' and '.join(there)}; choose another split"
        )


def _refuse_other_classes(index: Index, model: Classifier | Ensemble) -> None:
    if index.classes != model.classes:
        raise CxrdistError(
            f"--shards {index.directory}: have the classes {', '.join(index.classes)}, the model "
            f"{', '.join(model.classes)}; give shards of the model's classes"
        )


def _splits_of_training(index: Index, model: Classifier | Ensemble, split: str) -> Index:
    """Split train and val as in the model's training.

    Raises:
        CxrdistError: train or val was asked for, but the members of an ensemble have other ones.
    """
    if not isinstance(model, Ensemble):
        return cut_fold(index, model.fold)
    if model.has_folds and split != "test":
        raise CxrdistError(
            f"--split {split}: each member of this ensemble was trained on another fold of train "
            f"and val; evaluate test, or the fold of a member with --run RUN/{model.names[0]}"
        )
    return index
