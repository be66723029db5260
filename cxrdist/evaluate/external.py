"""External validation: shards that a run was not trained on, as its model takes them.

Their classes become the model's, and images of classes that it does not know are in no split. What
the model predicts is chosen among all of its classes, also where the set has fewer: that is what it
would say in use.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from cxrdist.config import location
from cxrdist.data.audit import PRE_TRAINING_SOURCES
from cxrdist.data.cache import Images, open_cache
from cxrdist.data.index import Index, Sample, read_index
from cxrdist.data.label_map import LabelMap, combine_cells
from cxrdist.data.labels import labels_of
from cxrdist.data.records import KNOWN_NAMES, LabelCells
from cxrdist.distributed import gather, together
from cxrdist.documents import Sha256, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.provenance import ExternalInfo
from cxrdist.evaluate.seen import Match, Prints, find_matches, read_seen, take_prints, write_seen
from cxrdist.info import RunInfo, WeightsInfo, read_info
from cxrdist.model.layout import CHEXNET_LABELS
from cxrdist.run import RunDirectory, external_place, read_document, write_table

IN_NO_SPLIT = ""  # the split of a sample that is not used
MEND = "run `cxrdist evaluate` again"


class _Made(TypedDict):
    """What relevance.json says of its shards."""

    index_sha256: NotRequired[Sha256]
    split: NotRequired[Text]


class _Evaluated(TypedDict):
    """What a file of a place says of its shards."""

    index_sha256: NotRequired[Sha256]
    split: NotRequired[Text]
    external: NotRequired[ExternalInfo]
    how: NotRequired[_Made]


@dataclass(frozen=True)
class Choices:
    """How an external set is evaluated.

    Attributes:
        label_map: their label: the model's, None to leave it out; others keep their names.
        seen: ``drop`` leaves out images that the network has seen, ``report`` marks them.
    """

    label_map: LabelMap = field(default_factory=dict)
    seen: Literal["drop", "report"] = "drop"


@dataclass(frozen=True)
class Overlap:
    """What of an external set the network has seen.

    Attributes:
        matches: by sample number why an image counts as seen.
        patients_told: images whose patient is told, and so was looked for among those of the
            training.
        not_known: why it is not known what the network has seen; None if it is.
    """

    matches: Mapping[int, Match]
    patients_told: int
    not_known: str | None


@dataclass(frozen=True)
class External:
    """An external set as the model takes it.

    Attributes:
        index: its samples with the model's classes; what is not used is in no split.
        matches: by sample number why the network has seen an image.
        others: key and class of each image whose class the model does not know.
        info: for metrics.json.
    """

    index: Index
    matches: Mapping[int, Match]
    others: list[tuple[str, str]]
    info: ExternalInfo


def read_own(run: RunDirectory) -> RunInfo | None:
    """Read what a run was trained on; None for a model without its run.json."""
    return read_info(run) if run.info.is_file() else None


def choose_place(own: RunInfo | None, index: Index, split: str, name: str | None) -> str:
    """Name the place of results: the split for the run's own shards, else that of an external set.

    Shards are a run's own if their index has the sha256 that run.json names, wherever they lie.
    Those of a model without run.json count as its own unless they are given a name.

    Raises:
        CxrdistError: own shards are given a name, or the name is none for a directory.
    """
    is_own = own is not None and own["shards"]["index_sha256"] == index.sha256
    if is_own and name is not None:
        raise CxrdistError(
            f"--name {name}: --shards {index.directory} are the run's own, no external set; leave "
            "--name out"
        )
    if is_own or (own is None and name is None):
        return split
    where = index.directory
    folder = where.absolute().name if isinstance(where, Path) else where.name
    return external_place(name or (folder if split == "test" else f"{folder}-{split}"))


def refuse_other_set(run: RunDirectory, place: str, index: Index, split: str) -> None:
    """Make sure that the results in a place are of these shards and this split, if there are any.

    Raises:
        CxrdistError: they are of others.
    """
    for path in (run.metrics(place), run.relevance_info(place), run.text(place)):
        if not path.is_file():
            continue
        found = read_document(path, _Evaluated, f"remove {path.parent} to begin anew")
        made = found.get("how", found)
        sha256 = found.get("index_sha256", made.get("index_sha256"))
        there = sha256, found.get("split", made.get("split", split))
        if there != (index.sha256, split):
            raise CxrdistError(
                f"{path.parent}: holds results of other shards or of another split; give these "
                "another name with --name"
            )


def refuse_choices(choices: Choices | None, shards: Path) -> None:
    """Refuse options of an external set for shards that are none.

    Raises:
        CxrdistError: one is given.
    """
    if choices is None or choices == Choices():
        return
    option = "--label-map" if choices.label_map else f"--seen {choices.seen}"
    raise CxrdistError(
        f"{option}: is for an external set, and --shards {shards} are the run's own; leave it out"
    )


def read_choices(run: RunDirectory, place: str) -> Choices:
    """Read how an external set was evaluated, so that other commands take the same images.

    Raises:
        CxrdistError: metrics.json is damaged.
    """
    path = run.metrics(place)
    if not path.is_file():
        return Choices()
    found = read_document(path, _Evaluated, MEND).get("external")
    return Choices(found["label_map"], found["seen"]) if found else Choices()


def as_model_takes(index: Index, classes: list[str], labels: LabelMap) -> Index:
    """Give the samples of an external set the model's classes.

    Of one class per image, images of a class that the model does not know are in no split. Of
    several labels, those that the set does not have are missing.

    Args:
        index: of the external set, of the model's task.
        classes: the model's.
        labels: their label: the model's, None to leave it out.

    Raises:
        CxrdistError: the map names a label that one side does not have, or no class is shared.
    """
    for theirs, ours in labels.items():
        if theirs not in index.classes:
            raise CxrdistError(
                f"--label-map: {theirs!r:.80} is no class of --shards {index.directory}, which "
                f"have {', '.join(index.classes)}"
            )
        if ours is not None and ours not in classes:
            raise CxrdistError(
                f"--label-map: {ours!r:.80} is no class of the model, which has "
                f"{', '.join(classes)}"
            )
    parts = {name: [t for t in index.classes if labels.get(t, t) == name] for name in classes}
    if not any(parts.values()):
        raise CxrdistError(
            f"--shards {index.directory}: have the classes {', '.join(index.classes)}, the model "
            f"{', '.join(classes)}; none is in both: name theirs and the model's in --label-map"
        )
    lacking = {name for name in classes if not parts[name]} if index.task == "multilabel" else set()
    known: dict[tuple[str, ...], LabelCells] = {}
    samples = [_relabelled(sample, parts, lacking, known) for sample in index.samples]
    if index.task == "multiclass":
        samples = [s if s.label else s._replace(split=IN_NO_SPLIT) for s in samples]
    return replace(index, classes=classes, samples=samples)


def _relabelled(
    sample: Sample,
    parts: Mapping[str, list[str]],
    lacking: set[str],
    known: dict[tuple[str, ...], LabelCells],
) -> Sample:
    """The sample with the model's labels; few combinations are frequent, so they are kept."""
    cells = (sample.label, sample.uncertain, sample.missing, sample.assumed_absent)
    if cells not in known:
        ours = combine_cells(parts, *(set(labels_of(cell)) for cell in cells))
        missing = {*labels_of(ours["missing"]), *lacking}
        known[cells] = {**ours, "missing": "|".join(name for name in parts if name in missing)}
    return sample._replace(**known[cells])


def take_external(
    place: str, packed: Index, mapped: Index, split: str, choices: Choices, overlap: Overlap
) -> External:
    """Take the images of an external set that are to be used, and describe it.

    Args:
        place: of its results.
        packed: its index.
        mapped: the same as the model takes it.
        split: that is used.
        choices: how it is evaluated.
        overlap: what of the split the network has seen.

    Raises:
        CxrdistError: no image is left.
    """
    matches, images = overlap.matches, len(mapped.numbers(split))
    pairs = zip(packed.samples, mapped.samples, strict=True)
    others = [(a.key, a.label) for a, b in pairs if a.split == split and b.split == IN_NO_SPLIT]
    if not images:
        raise CxrdistError(
            f"--shards {packed.directory}: no image of {split} has a class of the model; name "
            "their classes and the model's in --label-map"
        )
    if choices.seen == "drop":
        if images == len(matches):
            raise CxrdistError(
                f"--shards {packed.directory}: the network has seen all {images} images of "
                f"{split}, so that nothing is left to score; --seen report scores and marks them"
            )
        samples = list(mapped.samples)
        for number in matches:
            samples[number] = samples[number]._replace(split=IN_NO_SPLIT)
        mapped = replace(mapped, samples=samples)
    theirs = {choices.label_map.get(name, name) for name in packed.classes}
    info: ExternalInfo = {
        "name": place.removeprefix("external/"),
        "shards": str(packed.directory),
        "label_map": choices.label_map,
        "classes": [name for name in mapped.classes if name in theirs],
        "other_classes": dict(sorted(Counter(label for _, label in others).items())),
        "images": images,
        "seen": choices.seen,
        "seen_images": len(matches),
        "reasons": dict(sorted(Counter(match.why for match in matches.values()).items())),
        "patients_told": overlap.patients_told,
        "not_known": overlap.not_known,
    }
    return External(mapped, matches, others, info)


def find_overlap(
    accelerator: Accelerator,
    run: RunDirectory,
    index: Index,
    images: Images,
    numbers: NDArray[np.int64],
    cache: Path | None,
) -> Overlap:
    """Find what of an external set the network has seen; must be called on every rank.

    The main rank looks. Where a run holds no seen.npz, as those of older versions, its shards are
    looked at if they are still where they were.

    Args:
        accelerator: of this rank.
        run: the run directory of the model.
        index: of the external set.
        images: uint8 [samples, S, S], of its samples.
        numbers: int64 [N], of the samples to look at.
        cache: directory of the decoded images.
    """
    own = together(accelerator, lambda: read_own(run))
    kept, own_index, reason = together(accelerator, lambda: _find_kept(run, own))
    own_images = open_cache(own_index, cache, accelerator) if own_index else None

    def look() -> Overlap | None:
        if not accelerator.is_main_process:
            return None
        seen = kept
        if own_index is not None and own_images is not None:
            print(f"{run.root}: holds no seen.npz; its train and val images are read anew")
            seen = take_seen(own_index, own_images)
        matches, told = _find_matches(index, images, numbers, own, seen)
        return Overlap(matches, told, reason)

    found = gather(accelerator, [together(accelerator, look)])
    return next(overlap for overlap in found if overlap is not None)


def _find_kept(
    run: RunDirectory, own: RunInfo | None
) -> tuple[Prints | None, Index | None, str | None]:
    """Find what is known of a run's train and val images.

    Returns:
        seen.npz; else the run's shards, if they are still where they were; else why nothing is
        known.

    Raises:
        CxrdistError: seen.npz is damaged, or of other shards than run.json names.
    """
    unknown = "what the network has seen of it is not known, because"
    if own is None:
        return None, None, f"{unknown} the run holds no run.json"
    digest = own["shards"]["index_sha256"]
    if run.seen.is_file():
        seen = read_seen(run.seen)
        if seen.index_sha256 != digest:
            raise CxrdistError(
                f"{run.seen}: is of other shards than run.json names; copy the run directory again"
            )
        return seen, None, None
    where = own["shards"]["path"]
    try:
        index = read_index(location(where))
    except (CxrdistError, OSError):
        return None, None, f"{unknown} the run holds no seen.npz and its shards are not at {where}"
    if index.sha256 != digest:
        return None, None, f"{unknown} the run holds no seen.npz and the shards at {where} changed"
    return None, index, None


def take_seen(index: Index, images: Images) -> Prints:
    """Take what is kept of the train and val images of a run's shards."""
    numbers = np.array([*index.numbers("train"), *index.numbers("val")], np.int64)
    return take_prints(images, index.samples, numbers, index.sha256)


def seen_before(init: str) -> Prints | None:
    """Read what the run that another one starts from has seen; None where that is not known.

    Args:
        init: what the weights are from.

    Raises:
        CxrdistError: its seen.npz is damaged.
    """
    earlier = RunDirectory(Path(init))
    return read_seen(earlier.seen) if earlier.root.is_dir() and earlier.seen.is_file() else None


def keep_seen(run: RunDirectory, index: Index, images: Images, earlier: Prints | None) -> None:
    """Write seen.npz of a run before its first step; one that goes on has it already.

    A run that starts from another one has seen what that one has seen, as far as it has kept it.

    Args:
        run: the run directory.
        index: its shards.
        images: uint8 [samples, S, S], of them.
        earlier: as `seen_before` returns it.

    Raises:
        CxrdistError: the run's own seen.npz is damaged.
    """
    if run.seen.is_file() and read_seen(run.seen).index_sha256 == index.sha256:
        return
    seen = take_seen(index, images)
    write_seen(run.seen, seen.followed_by(earlier) if earlier else seen)


def _find_matches(
    index: Index,
    images: Images,
    numbers: NDArray[np.int64],
    own: RunInfo | None,
    seen: Prints | None,
) -> tuple[dict[int, Match], int]:
    """Find the images of an external set that the network has seen.

    Args:
        index: of the external set.
        images: uint8 [samples, S, S], of its samples.
        numbers: int64 [N], of the samples to look at.
        own: what the run was trained on; None if that is not known.
        seen: of its train and val images; None where nothing is kept of them.

    Returns:
        Matches by sample number, and of how many images both sides tell the patient.
    """
    matches: dict[int, Match] = {}
    told = 0
    if own is not None and started_from_chexnet(own["weights"]):
        listed = [n for n in numbers.tolist() if is_of_chestxray14(index.samples[n])]
        matches |= dict.fromkeys(listed, Match("pre-training list", "ChestX-ray14"))
    if seen is not None:
        prints = take_prints(images, index.samples, numbers, index.sha256)
        told = int(prints.patients.any(axis=1).sum()) if seen.patients.any() else 0
        found = find_matches(prints, seen)
        matches |= {int(numbers[row]): match for row, match in found.items()}
    return dict(sorted(matches.items())), told


def started_from_chexnet(weights: WeightsInfo) -> bool:
    """Whether a network's weights go back to a published one that was trained on ChestX-ray14.

    It is told by the labels of its outputs. What a run of cxrdist was trained on is in its own
    seen.npz.
    """
    link: WeightsInfo | None = weights
    while link:
        labels = link.get("labels") or []
        if not link.get("trained_on") and {*CHEXNET_LABELS} <= {*labels}:
            return True
        link = link.get("started_from")
    return False


def is_of_chestxray14(sample: Sample) -> bool:
    """Return whether an image is of ChestX-ray14, by its source or the name of its file."""
    named = KNOWN_NAMES["ChestX-ray14"].search(sample.path.rsplit("/", 1)[-1])
    return sample.source in PRE_TRAINING_SOURCES or bool(named)


def write_lists(run: RunDirectory, place: str, external: External) -> None:
    """Write seen.csv (key, why, of) and left_out.csv (key, label) beside the metrics."""
    samples = external.index.samples
    seen = [(samples[number].key, *match) for number, match in external.matches.items()]
    write_table(run.inside(place, "seen.csv"), ("key", *Match._fields), seen)
    write_table(run.inside(place, "left_out.csv"), ("key", "label"), external.others)


def summary(info: ExternalInfo) -> str:
    """Return what the user reads of an external set."""
    name = info["name"]
    lines = []
    if info["other_classes"]:
        counts = ", ".join(f"{n} of {label}" for label, n in info["other_classes"].items())
        lines.append(
            f"{name}: images of classes that the model does not know are left out: {counts} "
            "(left_out.csv names them)"
        )
    if info.get("not_known"):
        lines.append(f"{name}: {info['not_known']}")
    reasons = ", ".join(f"{why} {n}" for why, n in info["reasons"].items())
    done = "left out of the scores" if info["seen"] == "drop" else "scored too, and marked"
    lines.append(
        f"{name}: of {info['images']} images the network has seen {info['seen_images']}"
        + (f" ({reasons}); they are {done} (seen.csv names them)" if reasons else "")
    )
    return "\n".join(lines)
