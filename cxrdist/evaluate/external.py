"""External validation: shards that a run was not trained on, converted for its model.

Their classes are mapped to the model's, and images of unknown classes are put into no split. The
prediction is chosen among all classes of the model, even if the set has fewer, because that is what
the model would predict in use.
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
from cxrdist.data.cache import Images, open_cache
from cxrdist.data.chestxray14 import LABELS
from cxrdist.data.index import Index, read_index
from cxrdist.data.label_map import LabelMap, combiner
from cxrdist.data.records import is_of_nih
from cxrdist.distributed import gather, together
from cxrdist.documents import Sha256, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.metrics import ExternalInfo
from cxrdist.evaluate.scored import MEND
from cxrdist.evaluate.seen import Match, Prints, find_matches, read_seen, take_prints, write_seen
from cxrdist.files import read_document, write_table
from cxrdist.info import RunInfo, WeightsInfo, origins, read_info
from cxrdist.run import RunDirectory, external_subset

IN_NO_SPLIT = ""  # the split of a sample that is not used


class _Made(TypedDict):
    """The members of relevance.json that identify its shards."""

    index_sha256: NotRequired[Sha256]
    split: NotRequired[Text]


class _Evaluated(_Made):
    """The members of any result file that identify its shards."""

    external: NotRequired[ExternalInfo]
    how: NotRequired[_Made]


@dataclass(frozen=True)
class Choices:
    """How an external set is evaluated.

    Attributes:
        label_map: from a label of the set to the model's, or to None to leave it out; labels that
            are not in the map keep their names.
        seen: ``drop`` leaves out images that the network has seen, ``report`` marks them.
    """

    label_map: LabelMap = field(default_factory=dict)
    seen: Literal["drop", "report"] = "drop"


@dataclass(frozen=True)
class Overlap:
    """The images of an external set that the network has seen.

    Attributes:
        matches: why an image counts as seen, by sample number.
        patients_told: number of images whose patient is known and was searched for among those of
            the training.
        not_known: why it is unknown what the network has seen; None if it is known.
    """

    matches: Mapping[int, Match]
    patients_told: int
    not_known: str | None


@dataclass(frozen=True)
class External:
    """An external set, converted for the model.

    Attributes:
        index: its samples with the model's classes; unused samples are in no split.
        matches: why an image counts as seen, by sample number.
        others: key and class of each image whose class the model does not have.
        info: the member ``external`` of metrics.json.
    """

    index: Index
    matches: Mapping[int, Match]
    others: list[tuple[str, str]]
    info: ExternalInfo


def read_own(run: RunDirectory) -> RunInfo | None:
    """Read run.json of a model's training; None for a model without one."""
    return read_info(run) if run.info.is_file() else None


def choose_subset(own: RunInfo | None, index: Index, split: str, name: str | None) -> str:
    """Choose the subset of the results: the split for the run's own shards, else external/NAME.

    Shards are a run's own if their index has the sha256 in run.json, wherever they are stored.
    For a model without run.json all shards count as its own unless a name is given.

    Raises:
        CxrdistError: a name is given for the run's own shards, or it is not a valid directory name.
    """
    is_own = own is not None and own["shards"]["index_sha256"] == index.sha256
    if is_own and name is not None:
        raise CxrdistError(
            f"--name {name}: is for an external set, and --shards {index.directory} are the run's "
            "own; leave --name out"
        )
    if is_own or (own is None and name is None):
        return split
    where = index.directory
    # The path `.` has a name only when it is absolute; a remote path always is.
    folder = where.absolute().name if isinstance(where, Path) else where.name
    return external_subset(name or (folder if split == "test" else f"{folder}-{split}"))


def refuse_other_set(run: RunDirectory, subset: str, index: Index, split: str) -> None:
    """Check that existing results of a subset belong to these shards and this split.

    Raises:
        CxrdistError: they belong to others.
    """
    for path in (run.metrics(subset), run.relevance_info(subset), run.text(subset)):
        if not path.is_file():
            continue
        document = read_document(path, _Evaluated, f"remove {path.parent} to start over")
        how = document.get("how", document)
        sha256 = document.get("index_sha256", how.get("index_sha256"))
        existing = sha256, document.get("split", how.get("split", split))
        if existing != (index.sha256, split):
            raise CxrdistError(
                f"{path.parent}: holds results of other shards or of another split; choose another "
                "name with --name"
            )


def refuse_choices(choices: Choices | None, shards: Path) -> None:
    """Reject options for external sets if the shards are the run's own.

    Raises:
        CxrdistError: such an option is given.
    """
    if choices is None or choices == Choices():
        return
    option = "--label-map" if choices.label_map else f"--seen {choices.seen}"
    raise CxrdistError(
        f"{option}: is for an external set, and --shards {shards} are the run's own; leave it out"
    )


def read_choices(run: RunDirectory, subset: str) -> Choices:
    """Read how an external set was evaluated, so that other commands use the same images.

    Raises:
        CxrdistError: metrics.json is damaged.
    """
    path = run.metrics(subset)
    if not path.is_file():
        return Choices()
    info = read_document(path, _Evaluated, MEND).get("external")
    return Choices(info["label_map"], info["seen"]) if info else Choices()


def map_labels(index: Index, classes: list[str], labels: LabelMap) -> Index:
    """Map the labels of an external set to the model's classes.

    With one class per image, images of a class that the model does not have are put into no split.
    With several labels per image, labels that the set does not have count as missing.

    The set has the model's task. The map is from its labels to those of the model, or to None to
    leave one out.

    Raises:
        CxrdistError: the map names a label that the set or the model lacks, or they share no class.
    """
    for theirs, ours in labels.items():
        if theirs not in index.classes:
            raise CxrdistError(
                f"--label-map: {theirs!r:.80} is not a class of --shards {index.directory}, which "
                f"have {', '.join(index.classes)}"
            )
        if ours is not None and ours not in classes:
            raise CxrdistError(
                f"--label-map: {ours!r:.80} is not a class of the model, which has "
                f"{', '.join(classes)}"
            )
    merged = {name: [t for t in index.classes if labels.get(t, t) == name] for name in classes}
    if not any(merged.values()):
        raise CxrdistError(
            f"--shards {index.directory}: have the classes {', '.join(index.classes)}, the model "
            f"{', '.join(classes)}; none is in both: map their classes to the model's with "
            "--label-map"
        )
    # With one class per image, a class that the set does not have is absent instead of missing.
    is_multilabel = index.task == "multilabel"
    combine = combiner({n: theirs for n, theirs in merged.items() if theirs or is_multilabel})
    samples = [
        s._replace(**combine(s.label, s.uncertain, s.missing, s.assumed_absent))
        for s in index.samples
    ]
    if not is_multilabel:
        samples = [s if s.label else s._replace(split=IN_NO_SPLIT) for s in samples]
    return replace(index, classes=classes, samples=samples)


def take_external(
    subset: str, packed: Index, mapped: Index, split: str, choices: Choices, overlap: Overlap
) -> External:
    """Select the images of an external set to use, and describe the set.

    Its index is given as packed, and mapped to the model's classes.

    Raises:
        CxrdistError: no image is left.
    """
    matches, images = overlap.matches, len(mapped.numbers(split))
    # Counted first: below, seen images are put into no split as well.
    pairs = zip(packed.samples, mapped.samples, strict=True)
    others = [(a.key, a.label) for a, b in pairs if a.split == split and b.split == IN_NO_SPLIT]
    if not images:
        raise CxrdistError(
            f"--shards {packed.directory}: no image of {split} has a class of the model; map "
            "their classes to the model's with --label-map"
        )
    if choices.seen == "drop":
        if images == len(matches):
            raise CxrdistError(
                f"--shards {packed.directory}: the network has seen all {images} images of "
                f"{split}, so nothing is left to score; give --seen report to score and mark them"
            )
        samples = list(mapped.samples)
        for number in matches:
            samples[number] = samples[number]._replace(split=IN_NO_SPLIT)
        mapped = replace(mapped, samples=samples)
    theirs = {choices.label_map.get(name, name) for name in packed.classes}
    info: ExternalInfo = {
        "name": subset.removeprefix("external/"),
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
    """Find which samples of an external set the network has seen; call it on every rank.

    The samples have the numbers int64 [N], the set the images uint8 [samples, S, S]. The main rank
    does the search. Runs of older versions have no seen.npz: then the run's shards are read, if
    they are still at their path.
    """
    own = together(accelerator, lambda: read_own(run))
    recorded, own_index, reason = together(accelerator, lambda: _find_record(run, own))
    # On every rank, since the ranks of a node share the decoding and wait for each other.
    own_images = open_cache(own_index, cache, accelerator) if own_index else None

    def look() -> Overlap | None:
        if not accelerator.is_main_process:
            return None
        seen = recorded
        if own_index is not None and own_images is not None:
            print(f"{run.root}: holds no seen.npz; its train and val images are read again")
            seen = take_seen(own_index, own_images)
        matches, num_known = _find_matches(index, images, numbers, own, seen)
        return Overlap(matches, num_known, reason)

    # Only the main rank has an overlap, but all ranks must leave out the same images.
    of_ranks = gather(accelerator, [together(accelerator, look)])
    return next(overlap for overlap in of_ranks if overlap is not None)


def _find_record(
    run: RunDirectory, own: RunInfo | None
) -> tuple[Prints | None, Index | None, str | None]:
    """Find a record of a run's train and val images.

    Returns:
        seen.npz, else the index of the run's shards if they are still at their path, else the
        reason why neither exists; the other two are None.

    Raises:
        CxrdistError: seen.npz is damaged, or belongs to other shards than run.json.
    """
    unknown = "it is not known which of its images the network has seen, because"
    if own is None:
        return None, None, f"{unknown} the run holds no run.json"
    digest = own["shards"]["index_sha256"]
    if run.seen.is_file():
        seen = read_seen(run.seen)
        if seen.index_sha256 != digest:
            raise CxrdistError(
                f"{run.seen}: belongs to other shards than run.json; copy the run directory again"
            )
        return seen, None, None
    where = own["shards"]["path"]
    try:
        index = read_index(location(where))
    except (CxrdistError, OSError):
        # No error: the set can be scored, and the reason is kept with its results.
        return None, None, f"{unknown} the run holds no seen.npz and its shards are not at {where}"
    if index.sha256 != digest:
        return None, None, f"{unknown} the run holds no seen.npz and the shards at {where} changed"
    return None, index, None


def take_seen(index: Index, images: Images) -> Prints:
    """Compute the prints of the train and val images of a run's shards."""
    numbers = np.array([*index.numbers("train"), *index.numbers("val")], np.int64)
    return take_prints(images, index.samples, numbers, index.sha256)


def seen_before(init: str) -> Prints | None:
    """Read seen.npz of the run that a training starts from (--init); None if there is none.

    Raises:
        CxrdistError: the seen.npz is damaged.
    """
    # --init may also be the name of published weights, a file or a URL.
    earlier = RunDirectory(Path(init))
    return read_seen(earlier.seen) if earlier.root.is_dir() and earlier.seen.is_file() else None


def keep_seen(run: RunDirectory, index: Index, images: Images, earlier: Prints | None) -> None:
    """Write seen.npz of a run before its first step; a resumed run already has it.

    A run that starts from another run has also seen that run's images (`earlier`).

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
    """Find the samples, by number, that are of the pre-training or match the prints of a run.

    Returns:
        Matches by sample number, and the number of images whose patient is known, or 0 if no
        patient of the run is known.
    """
    matches: dict[int, Match] = {}
    num_known = 0
    if own is not None and started_from_chexnet(own["weights"]):
        samples = index.samples
        listed = [n for n in numbers.tolist() if is_of_nih(samples[n].source, samples[n].path)]
        matches |= dict.fromkeys(listed, Match("pre-training list", "ChestX-ray14"))
    if seen is not None:
        prints = take_prints(images, index.samples, numbers, index.sha256)
        num_known = int(prints.patients.any(axis=1).sum()) if seen.patients.any() else 0
        by_row = find_matches(prints, seen)
        # These replace matches by list, because they name the image that was seen.
        matches |= {int(numbers[row]): match for row, match in by_row.items()}
    return dict(sorted(matches.items())), num_known


def started_from_chexnet(weights: WeightsInfo) -> bool:
    """Return whether a network's weights derive from a published one trained on ChestX-ray14.

    Such a network is recognised by the labels of its outputs. Runs of cxrdist are skipped, because
    their training images are in their own seen.npz.
    """
    return any(
        not link.get("trained_on") and {*LABELS} <= {*(link.get("labels") or [])}
        for link in origins(weights)
    )


def write_lists(run: RunDirectory, subset: str, external: External) -> None:
    """Write seen.csv (key, why, of) and left_out.csv (key, label) beside the metrics."""
    samples = external.index.samples
    seen = [(samples[number].key, *match) for number, match in external.matches.items()]
    write_table(run.inside(subset, "seen.csv"), ("key", *Match._fields), seen)
    write_table(run.inside(subset, "left_out.csv"), ("key", "label"), external.others)


def summary(info: ExternalInfo) -> str:
    """Return the terminal lines about an external set."""
    name = info["name"]
    lines = []
    if info["other_classes"]:
        counts = ", ".join(f"{n} of {label}" for label, n in info["other_classes"].items())
        lines.append(
            f"{name}: images of classes that the model does not know are left out: {counts} "
            "(listed in left_out.csv)"
        )
    if info.get("not_known"):
        lines.append(f"{name}: {info['not_known']}")
    reasons = ", ".join(f"{why} {n}" for why, n in info["reasons"].items())
    done = "left out of the scores" if info["seen"] == "drop" else "scored too, and marked"
    lines.append(
        f"{name}: the network has seen {info['seen_images']} of {info['images']} images"
        + (f" ({reasons}); they are {done} (listed in seen.csv)" if reasons else "")
    )
    return "\n".join(lines)
