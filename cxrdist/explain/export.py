"""Explain a split: relevance, its ledger, heat maps and a test of them, on any number of ranks."""

import hashlib
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import ExplainConfig
from cxrdist.data.cache import read_rows
from cxrdist.distributed import finish, gather, local_ranks, together
from cxrdist.errors import RunFailedError, refuse_below_one
from cxrdist.evaluate.predictions import Subject, open_subject, rank_batches
from cxrdist.explain.maps import BATCHES_A_SHARD, Map, encode, read_ledgers, write_maps
from cxrdist.explain.nearest import find_nearest, was_trained_on, write_nearest
from cxrdist.explain.pictures import picture_names, write_pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.explain.sanity import Flipping, RelevanceInfo, flip_pixels, summarise
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
FLIPPED_IMAGES = 8
"""Images of the pixel flipping: their mean tells a right map from a wrong one."""

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


@dataclass(frozen=True)
class _Work:
    """What each rank needs to explain its part."""

    subject: Subject
    split: str
    targets: Targets
    explainer: Explainer
    is_compact: bool
    with_pictures: bool


def explain(config: ExplainConfig) -> None:
    """Write relevance, relevance.csv, relevance.json, heatmaps/ and nearest.csv of a split.

    Batches are cut before ranks are known, so the files are the same bytes for any number of ranks
    (with the same number of threads). What a killed command has finished is kept by the next one
    with the same model, shards and options; what was made otherwise is made anew.

    Raises:
        CxrdistError: run, shards, classes or numbers cannot be used.
    """
    refuse_below_one(config, "limit", "batch_size")
    subject = open_subject(config.run, config.shards, config.cache, config.split, config.name)
    accelerator = subject.accelerator
    model = together(accelerator, lambda: one_network(subject.model))
    targets = together(accelerator, lambda: choose_targets(config, model))
    explainer = together(accelerator, lambda: _explainer(config, model))
    numbers = together(accelerator, lambda: _choose_numbers(config, subject))
    is_compact = config.format == "webdataset"
    work = _Work(subject, config.split, targets, explainer, is_compact, config.pictures)
    with ExitStack() as stack:

        def prepare() -> _Left | None:
            if not accelerator.is_main_process:
                return None
            stack.enter_context(locked(subject.run.relevance_info(subject.place).parent))
            return _prepare(work, _how(config, subject, targets, numbers))

        left = gather(accelerator, [together(accelerator, prepare)])[0]
        rows = sorted(gather(accelerator, _explain_units(work, numbers, config.batch_size)))
        flippings = [] if left.is_tested else gather(accelerator, _flip(work, config.limit))
        nearest = find_nearest(subject, numbers) if left.lacks_nearest else []
        if accelerator.is_main_process:
            if nearest:
                write_nearest(subject, nearest)
            _finish(work, [row for _, _, row in rows], sorted(flippings, key=lambda pair: pair[0]))
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
) -> dict[str, Any]:
    """All that the bytes of the relevance depend on, but for the machine and its threads."""
    description = read_document(subject.run.model / "model.json", dict[str, Any])
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
    """Whether the relevance is there, made in this way and tested."""
    lacks_nearest: bool
    """Whether nearest training images are to be looked for: the report shows them beside maps."""


def _prepare(work: _Work, how: dict[str, Any]) -> _Left:
    """Clear away what a killed command left half-written, and relevance that was made otherwise."""
    run, place = work.subject.run, work.subject.place
    directories = run.relevance(place), run.heatmaps(place), run.nearest_pictures(place)
    info, nearest = run.relevance_info(place), run.nearest(place)
    found = _read_info(info) if info.is_file() else None
    can_look = work.with_pictures and was_trained_on(run, work.subject.index)
    if found and found["how"] == how:
        for directory in (*directories, info.parent):
            sweep(directory, alone=True)
        return _Left(found["sanity"] is not None, can_look and not nearest.is_file())
    for directory in directories:
        _clear(directory)
    for table in (run.relevance_table(place), nearest):
        table.unlink(missing_ok=True)
    write_json(info, {"how": how, "sanity": None})
    return _Left(False, can_look)


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
    return read_document(path, RelevanceInfo, "remove it to explain the split anew")


def _explain_units(work: _Work, numbers: NDArray[np.int64], batch_size: int) -> list[Row]:
    """Explain this rank's share of the samples, a batch or a shard at a time.

    While a unit is computed, threads write the one before it.
    """
    accelerator = work.subject.accelerator
    unit_size = batch_size * (BATCHES_A_SHARD if work.is_compact else 1)
    units = list(rank_batches(numbers, unit_size, accelerator))
    rows: list[Row] = []
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
            ledgers = _finished(work, place, unit)
            if ledgers is None:
                started = _Unit(place, unit, _start(work, unit, batch_size, pool))
                rows += waiting.finish(work) if waiting else []
                waiting = started
            else:
                rows += _rows(work, unit, ledgers)
            bar.update(len(unit))
        rows += waiting.finish(work) if waiting else []
    return rows


@dataclass(frozen=True)
class _Unit:
    """Samples whose files appear together: a batch, or the shard of several."""

    place: Path
    numbers: NDArray[np.int64]
    encoded: list[Future[tuple[bytes, NDArray[np.float64]]]]

    def finish(self, work: _Work) -> list[Row]:
        """Write the maps when all are encoded; give the rows of relevance.csv."""
        found = [future.result() for future in self.encoded]
        keys = _keys(work, self.numbers)
        write_maps(self.place, list(zip(keys, (data for data, _ in found), strict=True)))
        return _rows(work, self.numbers, [ledger for _, ledger in found])


def _start(
    work: _Work, unit: NDArray[np.int64], batch_size: int, pool: ThreadPoolExecutor
) -> list[Future[tuple[bytes, NDArray[np.float64]]]]:
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
) -> tuple[bytes, NDArray[np.float64]]:
    """Write the pictures of a sample, which stand before its map does; give the map's bytes."""
    key, names = work.subject.index.samples[number].key, work.targets.names
    if work.with_pictures:
        heatmaps = work.subject.run.heatmaps(work.subject.place)
        write_pictures(heatmaps, key, work.subject.images[number], relevance, names)
    return encode(Map(key, names, relevance, ledger), half=work.is_compact), ledger


def _finished(
    work: _Work, place: Path, unit: NDArray[np.int64]
) -> list[NDArray[np.float64]] | None:
    """The ledgers of a unit whose files all stand already, else None."""
    keys = _keys(work, unit)
    if work.with_pictures:
        heatmaps = work.subject.run.heatmaps(work.subject.place)
        names = [name for key in keys for name in picture_names(key, work.targets.names)]
        if not all((heatmaps / name).is_file() for name in names):
            return None
    return read_ledgers(place, keys, len(work.targets.names))


def _keys(work: _Work, numbers: NDArray[np.int64]) -> list[str]:
    return [work.subject.index.samples[number].key for number in numbers.tolist()]


def _num_threads(work: _Work) -> int:
    """Threads that draw and encode, on each rank of a node."""
    _, num_ranks = local_ranks(work.subject.accelerator)
    return max(1, min(8, len(os.sched_getaffinity(0)) // num_ranks))


def _rows(work: _Work, numbers: NDArray[np.int64], ledgers: list[NDArray[np.float64]]) -> list[Row]:
    """The rows of relevance.csv with their places in it."""
    rows: list[Row] = []
    for number, key, ledger in zip(numbers.tolist(), _keys(work, numbers), ledgers, strict=True):
        made = ledger_rows(key, work.targets.names, ledger, with_pictures=work.with_pictures)
        rows += [(number, k, row) for k, row in enumerate(made)]
    return rows


def ledger_rows(
    key: str, names: list[str], ledger: NDArray[np.float64], *, with_pictures: bool
) -> list[list[str]]:
    """A sample's rows of relevance.csv, one per class; what is not known stays empty.

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


def _flip(work: _Work, limit: int | None) -> list[tuple[int, Flipping]]:
    """Flip pixels of this rank's share of a few samples of the split."""
    subject, model = work.subject, one_network(work.subject.model)
    most = min(limit or FLIPPED_IMAGES, FLIPPED_IMAGES)
    numbers = choose_samples(subject.index, work.split, most)
    return [
        (
            number,
            flip_pixels(
                model, work.explainer, subject.images[number], work.targets.classes, number
            ),
        )
        for batch in rank_batches(numbers, 1, subject.accelerator)
        for number in batch.tolist()
    ]


def _finish(work: _Work, rows: list[list[str]], flippings: list[tuple[int, Flipping]]) -> None:
    """Write relevance.csv, and what the tests found into relevance.json."""
    run, place = work.subject.run, work.subject.place
    write_table(run.relevance_table(place), LEDGER_COLUMNS, rows)
    if flippings:
        info = _read_info(run.relevance_info(place))
        flipping = summarise([found for _, found in flippings])
        info["sanity"] = {"ledger_residual": ledger_residual(rows), "pixel_flipping": flipping}
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
    """What the user reads in the end."""
    run, place = work.subject.run, work.subject.place
    directory = run.heatmaps(place) if work.with_pictures else run.relevance(place)
    sanity = _read_info(run.relevance_info(place))["sanity"]
    if sanity is None:
        raise RunFailedError(f"{run.relevance_info(place)}: was replaced by another command")
    residual, flipping = sanity["ledger_residual"], sanity["pixel_flipping"]
    ledger = "no ledger" if residual is None else f"ledger closed to {residual:.1e}"
    return (
        f"explained {num_images} images for {', '.join(work.targets.names)}: {ledger}; covering "
        f"{flipping['covered_share']:.0%} of an image takes "
        f"{flipping['area_over_relevant_first']:.2f} of the probability on average if the most "
        f"relevant goes first, {flipping['area_over_random_order']:.2f} in random order\n"
        f"{'heat maps' if work.with_pictures else 'relevance'}: {directory}"
    )
