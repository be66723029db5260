"""Explain a split: relevance, its ledger, heat maps and a test of them, on any number of ranks."""

import hashlib
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import ExplainConfig
from cxrdist.data.cache import Masks, open_masks, read_mask_rows, read_rows
from cxrdist.distributed import finish, gather, local_ranks, together
from cxrdist.errors import RunFailedError
from cxrdist.evaluate.predictions import Subject, open_subject, rank_batches
from cxrdist.explain import flipping, outside, randomisation
from cxrdist.explain.description import RelevanceInfo, read_description, under_way
from cxrdist.explain.flipping import Flipping, flip_pixels
from cxrdist.explain.maps import (
    BATCHES_A_SHARD,
    Map,
    decode,
    encode,
    read_ledgers,
    read_map,
    read_unit,
    write_maps,
)
from cxrdist.explain.nearest import find_nearest, was_trained_on, write_nearest
from cxrdist.explain.outside import Look, Sums
from cxrdist.explain.pictures import picture_names, safe_name, save_picture, write_pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.explain.targets import (
    Targets,
    choose_samples,
    choose_targets,
    mistaken_samples,
)
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import one_network
from cxrdist.run import locked, read_document, sweep, write_json, write_table
from cxrdist.terminal import progress

LEDGER_COLUMNS = (
    "key",
    "class",
    "logit",
    "relevance_sum",
    "bias_share",
    "epsilon_share",
    "picture",
)
TESTED_IMAGES = 8
"""Images of pixel flipping and randomisation: their mean tells a right map from a wrong one."""

_OPTIONS = (
    "split",
    "limit",
    "preset",
    "composite",
    "flat",
    "biases",
    "format",
    "batch_size",
)
# KEY.png, KEY.CLASS.png, KEY.npz, where a key ends in digits of a hash, and NNNNNN.tar.
_MADE = re.compile(r"[\w-]*[0-9a-f]{8}(\..+)?\.(png|npz)|\d{6,}\.tar", re.DOTALL)
Row = tuple[int, int, list[str]]
Tested = tuple[int, Flipping, randomisation.Found]


@dataclass(frozen=True)
class _Work:
    """What each rank needs to explain its part."""

    subject: Subject
    split: str
    targets: Targets
    explainer: Explainer
    is_compact: bool
    with_pictures: bool
    masks: Masks | None
    """Of all samples; None where no explained one has any."""

    def lungs_of(self, number: int) -> NDArray[np.bool_] | None:
        """Return the mask of a sample, bool [S, S]; None if it has none."""
        index = self.subject.index
        if self.masks is None or not index.samples[number].mask_sha256:
            return None
        size_px, here = index.image_size_px, torch.device("cpu")
        pixels = read_mask_rows(self.masks, np.array([number]), size_px, here)
        return pixels[0, 0].numpy() > 0


class _Explained(NamedTuple):
    """What is known of a sample whose map is written."""

    number: int
    ledger: NDArray[np.float64]
    """[K, 4], as in `Map`."""
    look: Look | None
    """None if its relevance is zero everywhere, or nobody asks any more."""
    relevance: NDArray[np.float32] | None
    """[S, S], of the likeliest class; None as the look is."""


def explain(config: ExplainConfig) -> None:
    """Write relevance, its table and description, heatmaps/, mean_maps/ and nearest.csv of a split.

    Batches are cut before ranks are known, so the files are the same bytes for any number of ranks
    (with the same number of threads). What a killed command has finished is kept by the next one
    with the same model, shards and options; what was made otherwise is made anew.

    Raises:
        CxrdistError: run, shards, classes or numbers cannot be used.
    """
    subject = open_subject(config.run, config.shards, config.cache, config.split, config.name)
    accelerator = subject.accelerator
    model = together(accelerator, lambda: one_network(subject.model))
    targets = together(accelerator, lambda: choose_targets(config, model))
    explainer = together(accelerator, lambda: _explainer(config, model))
    numbers = together(accelerator, lambda: _choose_numbers(config, subject))
    is_compact = config.format == "webdataset"
    has_masks = any(subject.index.samples[number].mask_sha256 for number in numbers)
    masks = open_masks(subject.packed, config.cache, accelerator) if has_masks else None
    work = _Work(subject, config.split, targets, explainer, is_compact, config.pictures, masks)
    with ExitStack() as stack:

        def prepare() -> _Left | None:
            if not accelerator.is_main_process:
                return None
            stack.enter_context(locked(subject.run.relevance_info(subject.place).parent))
            return _prepare(work, _how(config, subject, targets, numbers))

        left = gather(accelerator, [together(accelerator, prepare)])[0]
        found = _explain_units(work, numbers, config.batch_size, look=not left.is_tested)
        rows = sorted(gather(accelerator, found.rows))
        looks, sums = gather(accelerator, found.looks), gather(accelerator, [found.sums])
        tested = [] if left.is_tested else gather(accelerator, _test(work, config))
        nearest = find_nearest(subject, numbers) if left.lacks_nearest else []
        if accelerator.is_main_process:
            if nearest:
                write_nearest(subject, nearest)
            _finish(work, [row for _, _, row in rows], sorted(tested, key=lambda row: row[0]))
            if not left.is_tested:
                _write_outside(work, sorted(looks), sums)
            print(_said(work, len(numbers)))
        finish(accelerator)


def _explainer(config: ExplainConfig, model: Classifier) -> Explainer:
    return Explainer(
        model,
        preset=config.preset,
        composite=config.composite,
        flat=config.flat,
        biases=config.biases,
    )


def _choose_numbers(config: ExplainConfig, subject: Subject) -> NDArray[np.int64]:
    """The samples to explain, int64 [n]; with a limit the mistakes of `evaluate` come first."""
    calibration = subject.model.calibration
    thresholds = calibration.thresholds if calibration else None
    mistakes = mistaken_samples(subject.run, subject.place, subject.index, thresholds)
    return choose_samples(subject.index, config.split, config.limit, mistakes)


def _how(
    config: ExplainConfig, subject: Subject, targets: Targets, numbers: NDArray[np.int64]
) -> dict[str, object]:
    """Return all that the bytes of the relevance depend on, but for the machine and its threads."""
    description = read_document(subject.run.model / "model.json", dict[str, object])
    description.pop("calibration", None)  # no map depends on it, and evaluate may come later
    weights = (subject.run.model / "model.safetensors").read_bytes()
    parts = (weights, json.dumps(description).encode())
    return {
        "model_sha256": [hashlib.sha256(part).hexdigest() for part in parts],
        "index_sha256": subject.index.sha256,
        "samples_sha256": hashlib.sha256(numbers.tobytes()).hexdigest(),
        "maps": targets.names,
        **{name: getattr(config, name) for name in _OPTIONS},
        "torch": torch.__version__,
        "device": subject.accelerator.device.type,
    }


class _Left(NamedTuple):
    """What an earlier command has left to do."""

    is_tested: bool
    """Whether the relevance is there, made in this way, tested and described."""
    lacks_nearest: bool
    """Whether nearest training images are to be looked for: the report shows them beside maps."""


def _prepare(work: _Work, how: dict[str, object]) -> _Left:
    """Clear away what a killed command left half-written, and relevance that was made otherwise."""
    run, place = work.subject.run, work.subject.place
    directories = run.relevance(place), run.heatmaps(place), run.nearest_pictures(place)
    info, nearest = run.relevance_info(place), run.nearest(place)
    found = _read_info(info) if info.is_file() else None
    can_look = work.with_pictures and was_trained_on(run, work.subject.index)
    if found and found["how"] == how:
        for directory in (*directories, info.parent):
            sweep(directory, alone=True)
        return _Left(_is_tested(work, found), can_look and not nearest.is_file())
    for directory in directories:
        _clear(directory)
    for table in (run.relevance_table(place), nearest):
        table.unlink(missing_ok=True)
    write_json(info, under_way(how))
    return _Left(False, can_look)


def _is_tested(work: _Work, found: RelevanceInfo) -> bool:
    """Return whether all of relevance.json is there, and with pictures those of the mean maps."""
    outside = found["outside"]
    if outside is None or found["pixel_flipping"] is None or found["randomisation"] is None:
        return False
    names = outside["classes"] if work.with_pictures else {}
    return all(_mean_map(work, name).is_file() for name in names)


def _mean_map(work: _Work, name: str) -> Path:
    """Return the picture of a class's mean map."""
    return work.subject.run.mean_maps(work.subject.place) / f"{safe_name(name)}.png"


def _clear(directory: Path) -> None:
    """Remove the maps and pictures of a directory; files of other names and folders stay."""
    for path in directory.glob("*"):
        if _MADE.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink()
    sweep(directory, alone=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _read_info(path: Path) -> RelevanceInfo:
    """Read relevance.json.

    Raises:
        CxrdistError: it is damaged.
    """
    return read_description(path, "remove it to explain the split anew")


@dataclass(frozen=True)
class _Found:
    """What this rank has explained."""

    rows: list[Row]
    looks: list[Look]
    sums: Sums

    def add(self, work: _Work, explained: list[_Explained]) -> None:
        """Take the samples of a unit whose maps are written."""
        for one in explained:
            self.rows.extend(_rows(work, one))
            if one.look is not None and one.relevance is not None:
                self.looks.append(one.look)
                image = np.asarray(work.subject.images[one.number])
                self.sums.add(one.look.target, one.relevance, image)


def _explain_units(
    work: _Work, numbers: NDArray[np.int64], batch_size: int, *, look: bool
) -> _Found:
    """Explain this rank's share of the samples, a batch or a shard at a time.

    While a unit is computed, threads write the one before it.
    """
    accelerator = work.subject.accelerator
    unit_size = batch_size * (BATCHES_A_SHARD if work.is_compact else 1)
    units = list(rank_batches(numbers, unit_size, accelerator))
    found = _Found([], [], Sums())
    waiting: _Unit | None = None
    with (
        progress(
            sum(map(len, units)), "explaining", "images", show=accelerator.is_main_process
        ) as bar,
        ThreadPoolExecutor(_num_threads(work)) as pool,
    ):
        for i, unit in enumerate(units):
            place = work.subject.run.relevance(work.subject.place)
            if work.is_compact:
                number = i * accelerator.num_processes + accelerator.process_index
                place /= f"{number:06d}.tar"
            finished = _finished(work, place, unit, look=look)
            if finished is None:
                started = _Unit(place, unit, _start(work, unit, batch_size, pool))
                found.add(work, waiting.finish(work) if waiting else [])
                waiting = started
            else:
                found.add(work, finished)
            bar.update(len(unit))
        found.add(work, waiting.finish(work) if waiting else [])
    return found


@dataclass(frozen=True)
class _Unit:
    """Samples whose files appear together: a batch, or the shard of several."""

    place: Path
    numbers: NDArray[np.int64]
    encoded: list[Future[tuple[bytes, _Explained]]]

    def finish(self, work: _Work) -> list[_Explained]:
        """Write the maps when all are encoded."""
        found = [future.result() for future in self.encoded]
        keys = _keys(work, self.numbers)
        write_maps(self.place, list(zip(keys, (data for data, _ in found), strict=True)))
        return [explained for _, explained in found]


def _start(
    work: _Work, unit: NDArray[np.int64], batch_size: int, pool: ThreadPoolExecutor
) -> list[Future[tuple[bytes, _Explained]]]:
    """Explain the batches of a unit, and let the pool draw and encode them."""
    encoded = []
    for begin in range(0, len(unit), batch_size):
        batch = unit[begin : begin + batch_size]
        images = read_rows(work.subject.images, batch, work.subject.accelerator.device)
        found = work.targets.attribute(work.explainer, images)
        relevance = found.relevance.float().cpu().numpy()
        sums = (found.logits, found.relevance_sum, found.bias_share, found.epsilon_share)
        ledgers = torch.stack(sums, 2).double().cpu().numpy()
        for number, values, ledger in zip(batch.tolist(), relevance, ledgers, strict=True):
            encoded.append(pool.submit(_encode, work, number, values, ledger))
    return encoded


def _encode(
    work: _Work, number: int, relevance: NDArray[np.float32], ledger: NDArray[np.float64]
) -> tuple[bytes, _Explained]:
    """Write the pictures of a sample, which stand before its map does; give the map's bytes."""
    key, targets = work.subject.index.samples[number].key, work.targets
    if work.with_pictures:
        heatmaps = work.subject.run.heatmaps(work.subject.place)
        drawn, names = targets.with_leading(relevance, ledger), targets.names_of(ledger)
        write_pictures(heatmaps, key, work.subject.images[number], drawn, names)
    found = Map(key, targets.names, relevance, ledger)
    data = encode(found, half=work.is_compact)
    # What is measured is what the file holds, so that a map that is read back gives the same.
    return data, _look(work, number, decode(key, data) if work.is_compact else found)


def _look(work: _Work, number: int, found: Map) -> _Explained:
    """Measure where the relevance of a sample lies, for its likeliest class."""
    target = work.targets.likeliest(found.ledger)
    relevance = found.relevance[target].copy()  # or all of its maps stay in memory
    look = outside.look(number, target, relevance, work.lungs_of(number))
    return _Explained(number, found.ledger, look, relevance)


def _finished(
    work: _Work, place: Path, unit: NDArray[np.int64], *, look: bool
) -> list[_Explained] | None:
    """Return the samples of a unit whose files all stand already, else None.

    Args:
        work: what each rank needs.
        place: of the unit's maps.
        unit: numbers of the samples.
        look: whether their maps are measured; else only the ledgers are read, which is fast.
    """
    keys, names = _keys(work, unit), work.targets.names
    number_of = dict(zip(keys, unit.tolist(), strict=True))

    def read(key: str, npz: IO[bytes]) -> _Explained:
        found = read_map(npz, key, names, work.subject.index.image_size_px)
        return _look(work, number_of[key], found)

    explained: list[_Explained] | None = None
    if look:
        explained = read_unit(place, keys, read)
    elif ledgers := read_ledgers(place, keys, len(names)):
        pairs = zip(unit.tolist(), ledgers, strict=True)
        explained = [_Explained(number, ledger, None, None) for number, ledger in pairs]
    return explained if explained and _are_drawn(work, explained) else None


def _are_drawn(work: _Work, explained: list[_Explained]) -> bool:
    """Return whether all pictures of some samples stand already."""
    if not work.with_pictures:
        return True
    heatmaps = work.subject.run.heatmaps(work.subject.place)
    return all(
        (heatmaps / name).is_file()
        for one in explained
        for name in picture_names(
            work.subject.index.samples[one.number].key, work.targets.names_of(one.ledger)
        )
    )


def _keys(work: _Work, numbers: NDArray[np.int64]) -> list[str]:
    return [work.subject.index.samples[number].key for number in numbers.tolist()]


def _num_threads(work: _Work) -> int:
    """Return the threads that draw and encode, on each rank of a node."""
    _, num_ranks = local_ranks(work.subject.accelerator)
    return max(1, min(8, len(os.sched_getaffinity(0)) // num_ranks))


def _rows(work: _Work, one: _Explained) -> list[Row]:
    """Return the rows of relevance.csv of a sample, with their places in it."""
    (key,) = _keys(work, np.array([one.number]))
    names, ledger = (
        work.targets.names_of(one.ledger),
        work.targets.with_leading(one.ledger, one.ledger),
    )
    made = ledger_rows(key, names, ledger, with_pictures=work.with_pictures)
    return [(one.number, k, row) for k, row in enumerate(made)]


def ledger_rows(
    key: str, names: list[str], ledger: NDArray[np.float64], *, with_pictures: bool
) -> list[list[str]]:
    """Return a sample's rows of relevance.csv, one per class; what is not known stays empty.

    Args:
        key: of the sample.
        names: of its K maps.
        ledger: float64 [K, 4], as in `Map`.
        with_pictures: whether its heat maps are drawn.
    """
    pictures = picture_names(key, names)[1:] if with_pictures else [""] * len(names)
    digits = [["" if np.isnan(value) else f"{value:.9g}" for value in row] for row in ledger]
    parts = zip(names, digits, pictures, strict=True)
    return [[key, name, *values, picture] for name, values, picture in parts]


def _test(work: _Work, config: ExplainConfig) -> list[Tested]:
    """Flip pixels, and draw the network anew, on this rank's share of a few samples."""
    subject, model = work.subject, one_network(work.subject.model)
    index, accelerator, classes = subject.index, subject.accelerator, work.targets.classes
    most = min(config.limit or TESTED_IMAGES, TESTED_IMAGES)
    numbers = choose_samples(index, work.split, most)
    batches = list(rank_batches(numbers, 1, accelerator))
    if not batches:
        return []
    # All ranks take the same images for the statistics, and so the same networks.
    images = read_rows(subject.images, numbers, accelerator.device)
    drawn = randomisation.randomise(model, images, lambda other: _explainer(config, other))
    tested = []
    with progress(len(batches), "testing", "images", show=accelerator.is_main_process) as bar:
        for batch in batches:
            (number,) = batch.tolist()
            flipped = flip_pixels(model, work.explainer, subject.images[number], classes, number)
            image = read_rows(subject.images, batch, accelerator.device)
            compared = randomisation.compare_maps(work.explainer, drawn, image, classes)
            tested.append((number, flipped, compared))
            bar.update()
    return tested


def _finish(work: _Work, rows: list[list[str]], tested: list[Tested]) -> None:
    """Write relevance.csv, and what the tests found into relevance.json."""
    run, place = work.subject.run, work.subject.place
    write_table(run.relevance_table(place), LEDGER_COLUMNS, rows)
    if tested:
        info = _read_info(run.relevance_info(place))
        info["ledger_residual"] = ledger_residual(rows)
        info["pixel_flipping"] = flipping.summarise([flipped for _, flipped, _ in tested])
        blocks = randomisation.levels(one_network(work.subject.model))
        info["randomisation"] = randomisation.summarise(blocks, [found for *_, found in tested])
        write_json(run.relevance_info(place), info)


def _write_outside(work: _Work, looks: list[Look], of_ranks: list[Sums]) -> None:
    """Write the mean maps, and where the relevance lies into relevance.json."""
    run, place, names = work.subject.run, work.subject.place, work.targets.classes
    sums = Sums()
    for others in of_ranks:
        sums.merge(others)
    for name in one_network(work.subject.model).classes:
        _mean_map(work, name).unlink(missing_ok=True)
    if work.with_pictures:
        for target in sums.maps:
            num_images = sum(look.target == target for look in looks)
            save_picture(_mean_map(work, names[target]), sums.picture(target, num_images))
    info = _read_info(run.relevance_info(place))
    samples = work.subject.index.samples
    patients = {look.number: samples[look.number].patient for look in looks}
    info["outside"] = outside.summarise(looks, sums, names, patients)
    write_json(run.relevance_info(place), info)


def ledger_residual(rows: list[list[str]]) -> float | None:
    """Largest |logit - its parts| of rows of relevance.csv, relative to the largest |logit|.

    Rules without a ledger have none.
    """
    parts = [row[2:6] for row in rows]
    if any("" in row for row in parts):
        return None
    values = np.array(parts, dtype=np.float64)
    gap, largest = np.abs(values[:, 0] - values[:, 1:].sum(1)).max(), np.abs(values[:, 0]).max()
    return float(gap / largest if largest else gap)  # a dead network gives nothing but zeros


def _said(work: _Work, num_images: int) -> str:
    """Return what the user reads in the end."""
    run, place = work.subject.run, work.subject.place
    directory = run.heatmaps(place) if work.with_pictures else run.relevance(place)
    info = _read_info(run.relevance_info(place))
    residual, flipped, where = info["ledger_residual"], info["pixel_flipping"], info["outside"]
    if flipped is None or where is None:
        raise RunFailedError(f"{run.relevance_info(place)}: was replaced by another command")
    ledger = "no ledger" if residual is None else f"ledger closed to {residual:.1e}"
    regions = ", ".join(
        f"{name.replace('_', ' ')} {region['share']:.1%} (area {region['area']:.1%})"
        for name, region in where["all"]["regions"].items()
    )
    return (
        f"explained {num_images} images for {', '.join(work.targets.names)}: {ledger}; covering "
        f"{flipped['covered_share']:.0%} of an image takes "
        f"{flipped['area_over_relevant_first']:.2f} of the probability on average if the most "
        f"relevant goes first, {flipped['area_over_random_order']:.2f} in random order\n"
        f"relevance for the likeliest class: {regions}\n"
        f"{'heat maps' if work.with_pictures else 'relevance'}: {directory}"
    )
