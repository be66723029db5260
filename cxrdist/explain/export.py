"""Explain a split on any number of ranks: relevance, its ledger, heat maps, sanity checks."""

import hashlib
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import ExplainConfig, deciding
from cxrdist.data.cache import Masks, open_masks, read_rows, unpack_masks
from cxrdist.data.regions import is_constant
from cxrdist.distributed import entering, finish, gather, local_ranks, together
from cxrdist.errors import RunFailedError
from cxrdist.evaluate.loaded_run import LoadedRun, load_images, open_run_on
from cxrdist.evaluate.predictions import rank_batches
from cxrdist.explain import flipping, outside, randomisation
from cxrdist.explain.description import RelevanceInfo, read_description, under_way
from cxrdist.explain.flipping import Flipping, flip_pixels
from cxrdist.explain.maps import (
    BATCHES_PER_SHARD,
    Map,
    decode,
    encode,
    read_ledgers,
    read_map,
    read_unit,
    to_maps,
    write_maps,
)
from cxrdist.explain.nearest import find_nearest, was_trained_on, write_nearest
from cxrdist.explain.outside import Look, Sums
from cxrdist.explain.pictures import picture_names, safe_name, save_picture, write_pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.explain.targets import Targets, choose_samples, choose_targets, mistaken_samples
from cxrdist.files import locked, read_document, remove_made, sweep, write_json, write_table
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import one_network
from cxrdist.terminal import counted, percentage, progress

SHARES = ("logit", "relevance_sum", "bias_share", "epsilon_share")
LEDGER_COLUMNS = ("key", "class", *SHARES, "picture")
TESTED_IMAGES = 8
"""Images for pixel flipping and randomisation; enough to tell a right map from a wrong one."""

MEND = "remove it to explain the split again"

# Files that may be removed: KEY.png, KEY.CLASS.png, KEY.npz (a key ends in digits of a hash), and
# NNNNNN.tar.
MADE = re.compile(r"[\w-]*[0-9a-f]{8}(\..+)?\.(png|npz)|\d{6,}\.tar", re.DOTALL)
Rows = list[list[str]]
"""Rows of relevance.csv."""
Tested = tuple[int, Flipping, randomisation.Comparison]
"""Number of a sample, and the results of its tests."""


@dataclass(frozen=True)
class _Inputs:
    """Inputs that each rank needs to explain its share of the samples."""

    loaded: LoadedRun
    model: Classifier
    targets: Targets
    explainer: Explainer
    is_compact: bool
    with_pictures: bool
    masks: Masks | None
    """Lung masks of all samples; None if no explained sample has one."""

    def lungs_of(self, number: int) -> NDArray[np.bool_] | None:
        """Return the mask of a sample, bool [S, S]; None if it covers nothing or everything."""
        if self.masks is None:
            return None
        mask = unpack_masks(self.masks[[number]], self.loaded.index.image_size_px)[0].astype(bool)
        return None if is_constant(mask) else mask


class _Explained(NamedTuple):
    """Results of a sample whose map is written."""

    number: int
    ledger: NDArray[np.float64]
    """[K, 4], as in `Map`."""
    look: Look | None
    """None if its relevance is zero everywhere, or if it is no longer needed."""
    relevance: NDArray[np.float32] | None
    """[S, S], of the likeliest class; None if the look is no longer needed."""


def explain(config: ExplainConfig) -> None:
    """Write relevance, its table and description, heatmaps/, mean_maps/ and nearest.csv of a split.

    Batches do not depend on the number of ranks, so the files are the same bytes for any number
    (with the same number of threads). After a killed command, the next one with the same model,
    shards and options keeps finished files; relevance of other settings is computed again.

    Raises:
        CxrdistError: run, shards, classes or numbers cannot be used.
    """
    opened = open_run_on(config.run, config.shards, config.split, config.name)
    accelerator = opened.accelerator
    # Wrong options are refused before `load_images` decodes the images.
    model = together(accelerator, lambda: one_network(opened.model))
    targets = together(accelerator, lambda: choose_targets(config, model))
    explainer = together(accelerator, lambda: _explainer(config, model))
    loaded = load_images(opened, config.cache)
    numbers = together(accelerator, lambda: _choose_numbers(config, loaded))
    is_compact = config.format == "webdataset"
    has_masks = any(loaded.index.samples[number].mask_sha256 for number in numbers)
    masks = open_masks(loaded.packed, config.cache, accelerator) if has_masks else None
    inputs = _Inputs(loaded, model, targets, explainer, is_compact, config.pictures, masks)
    is_main = accelerator.is_main_process
    directory = together(accelerator, lambda: loaded.run.relevance_info(loaded.subset).parent)
    with entering(accelerator, locked(directory), here=is_main):

        def prepare() -> _Todo | None:
            if not is_main:
                return None
            return _prepare(inputs, _settings(config, loaded, targets, numbers))

        # Only the main rank, which is the first, has prepared anything.
        todo = gather(accelerator, [together(accelerator, prepare)])[0]
        results = _explain_units(inputs, numbers, config.batch_size, look=not todo.is_tested)
        rows_by_number = sorted(gather(accelerator, results.rows))
        looks, sums = gather(accelerator, results.looks), Sums()
        for others in gather(accelerator, [results.sums]):
            sums.merge(others)
        tested = [] if todo.is_tested else gather(accelerator, _test(inputs, config))
        nearest = find_nearest(loaded, numbers) if todo.lacks_nearest else []
        if is_main:
            if todo.lacks_nearest:
                write_nearest(loaded, nearest)
            table = [row for _, rows in rows_by_number for row in rows]
            write_table(loaded.run.relevance_table(loaded.subset), LEDGER_COLUMNS, table)
            if not todo.is_tested:
                _write_mean_maps(inputs, looks, sums)
                _finish(inputs, table, sorted(tested, key=lambda row: row[0]), sorted(looks), sums)
            print(_summary(inputs, len(numbers)))
        finish(accelerator)


def _explainer(config: ExplainConfig, model: Classifier) -> Explainer:
    return Explainer(
        model,
        preset=config.preset,
        composite=config.composite,
        flat=config.flat,
        biases=config.biases,
    )


def _choose_numbers(config: ExplainConfig, loaded: LoadedRun) -> NDArray[np.int64]:
    """Return the samples to explain, int64 [n]; with a limit, mistakes of `evaluate` first."""
    calibration = loaded.model.calibration
    thresholds = calibration.thresholds if calibration else None
    mistakes = mistaken_samples(loaded.run, loaded.subset, loaded.index, thresholds)
    return choose_samples(loaded.index, config.split, config.limit, mistakes)


def _settings(
    config: ExplainConfig, loaded: LoadedRun, targets: Targets, numbers: NDArray[np.int64]
) -> dict[str, object]:
    """Return everything that the relevance depends on, except the machine and its threads."""
    description = read_document(loaded.run.model / "model.json", dict[str, object])
    description.pop("calibration", None)  # maps do not depend on it, and evaluate may add it later
    weights = (loaded.run.model / "model.safetensors").read_bytes()
    files = (weights, json.dumps(description).encode())
    return {
        "model_sha256": [hashlib.sha256(data).hexdigest() for data in files],
        "index_sha256": loaded.index.sha256,
        "samples_sha256": hashlib.sha256(numbers.tobytes()).hexdigest(),
        "maps": targets.names,
        **deciding(config),
        "torch": torch.__version__,
        "device": loaded.accelerator.device.type,
    }


class _Todo(NamedTuple):
    """What remains to be done after an earlier command."""

    is_tested: bool
    """Whether the relevance exists with these settings, and its tests are done."""
    lacks_nearest: bool
    """Whether nearest training images are missing; the report shows them beside the maps."""


def _prepare(inputs: _Inputs, how: dict[str, object]) -> _Todo:
    """Remove half-written files of a killed command, and relevance of other settings."""
    run, subset = inputs.loaded.run, inputs.loaded.subset
    directories = run.relevance(subset), run.heatmaps(subset), run.nearest_pictures(subset)
    info, nearest = run.relevance_info(subset), run.nearest(subset)
    earlier = read_description(info, MEND) if info.is_file() else None
    needs_nearest = inputs.with_pictures and was_trained_on(run, inputs.loaded.index)
    for directory in (*directories, info.parent):
        sweep(directory, alone=True)
    if earlier and earlier["how"] == how:
        return _Todo(_is_tested(inputs, earlier), needs_nearest and not nearest.is_file())
    for directory in directories:
        remove_made(directory, MADE)
    for table in (run.relevance_table(subset), nearest):
        table.unlink(missing_ok=True)
    # Last: until then, the maps that remain belong to the settings in the file.
    write_json(info, under_way(how))
    return _Todo(False, needs_nearest)


def _is_tested(inputs: _Inputs, info: RelevanceInfo) -> bool:
    """Return whether relevance.json is complete, and the pictures of mean maps if needed."""
    outside = info["outside"]
    if outside is None or info["pixel_flipping"] is None or info["randomisation"] is None:
        return False
    names = outside["classes"] if inputs.with_pictures else {}
    return all(_mean_map(inputs, name).is_file() for name in names)


def _mean_map(inputs: _Inputs, name: str) -> Path:
    """Return the path of the picture of a class's mean map."""
    return inputs.loaded.run.mean_maps(inputs.loaded.subset) / f"{safe_name(name)}.png"


@dataclass(frozen=True)
class _Results:
    """Results of the samples that this rank has explained."""

    rows: list[tuple[int, Rows]]
    """By sample number."""
    looks: list[Look]
    sums: Sums

    def add(self, inputs: _Inputs, explained: list[_Explained]) -> None:
        """Add the samples of a unit whose maps are written."""
        for sample in explained:
            self.rows.append((sample.number, _rows(inputs, sample)))
            if sample.look is not None and sample.relevance is not None:
                self.looks.append(sample.look)
                image = np.asarray(inputs.loaded.images[sample.number])
                self.sums.add(sample.look.target, sample.relevance, image)


def _explain_units(
    inputs: _Inputs, numbers: NDArray[np.int64], batch_size: int, *, look: bool
) -> _Results:
    """Explain this rank's share of the samples, one batch or shard at a time.

    While a unit is computed, threads write the one before it.
    """
    accelerator = inputs.loaded.accelerator
    unit_size = batch_size * (BATCHES_PER_SHARD if inputs.is_compact else 1)
    units = list(rank_batches(numbers, unit_size, accelerator))
    results = _Results([], [], Sums())
    waiting: _Unit | None = None
    total, show = sum(map(len, units)), accelerator.is_main_process
    with (
        progress(total, "explaining", "images", show=show) as bar,
        ThreadPoolExecutor(_num_threads(inputs)) as pool,
    ):
        for i, unit in enumerate(units):
            path = inputs.loaded.run.relevance(inputs.loaded.subset)
            if inputs.is_compact:
                # Its number in the split, for any world size: ranks take units in turn.
                number = i * accelerator.num_processes + accelerator.process_index
                path /= f"{number:06d}.tar"
            finished = _read_finished(inputs, path, unit, look=look)
            if finished is None:
                started = _Unit(path, unit, _start(inputs, unit, batch_size, pool))
                results.add(inputs, waiting.finish(inputs) if waiting else [])
                waiting = started
            else:
                results.add(inputs, finished)
            bar.update(len(unit))
        results.add(inputs, waiting.finish(inputs) if waiting else [])
    return results


@dataclass(frozen=True)
class _Unit:
    """Samples whose files are written together: a batch, or several in one shard."""

    path: Path
    numbers: NDArray[np.int64]
    encoded: list[Future[tuple[bytes, _Explained]]]

    def finish(self, inputs: _Inputs) -> list[_Explained]:
        """Write the maps once all are encoded."""
        encoded = [future.result() for future in self.encoded]
        keys = _keys(inputs, self.numbers)
        write_maps(self.path, list(zip(keys, (data for data, _ in encoded), strict=True)))
        return [explained for _, explained in encoded]


def _start(
    inputs: _Inputs, unit: NDArray[np.int64], batch_size: int, pool: ThreadPoolExecutor
) -> list[Future[tuple[bytes, _Explained]]]:
    """Explain the batches of a unit, and let the pool draw and encode them."""
    encoded = []
    for begin in range(0, len(unit), batch_size):
        batch = unit[begin : begin + batch_size]
        images = read_rows(inputs.loaded.images, batch, inputs.loaded.accelerator.device)
        result = inputs.targets.attribute(inputs.explainer, images)
        maps = to_maps(result, _keys(inputs, batch), inputs.targets.names)
        for number, sample_map in zip(batch.tolist(), maps, strict=True):
            encoded.append(pool.submit(_encode, inputs, number, sample_map))
    return encoded


def _encode(inputs: _Inputs, number: int, sample_map: Map) -> tuple[bytes, _Explained]:
    """Write the pictures of a sample before its map, and return the bytes of the map."""
    targets, (key, _, relevance, ledger) = inputs.targets, sample_map
    if inputs.with_pictures:
        heatmaps = inputs.loaded.run.heatmaps(inputs.loaded.subset)
        drawn, names = targets.with_leading(relevance, ledger), targets.names_of(ledger)
        write_pictures(heatmaps, key, inputs.loaded.images[number], drawn, names)
    data = encode(sample_map, half=inputs.is_compact)
    # Measure the rounded values of the file, so that a resumed command gets the same results.
    return data, _look(inputs, number, decode(key, data) if inputs.is_compact else sample_map)


def _look(inputs: _Inputs, number: int, sample_map: Map) -> _Explained:
    """Measure where the relevance of a sample lies, for its likeliest class."""
    target = inputs.targets.likeliest(sample_map.ledger)
    relevance = sample_map.relevance[target].copy()  # a view would keep all maps in memory
    look = outside.look(number, target, relevance, inputs.lungs_of(number))
    return _Explained(number, sample_map.ledger, look, relevance)


def _read_finished(
    inputs: _Inputs, path: Path, unit: NDArray[np.int64], *, look: bool
) -> list[_Explained] | None:
    """Read the results of a unit if all of its files already exist, else return None.

    Without `look` the maps are not measured, and only the ledgers are read, which is fast.
    """
    keys, names = _keys(inputs, unit), inputs.targets.names
    number_of = dict(zip(keys, unit.tolist(), strict=True))

    def read(key: str, npz: IO[bytes]) -> _Explained:
        sample_map = read_map(npz, key, names, inputs.loaded.index.image_size_px)
        return _look(inputs, number_of[key], sample_map)

    explained: list[_Explained] | None = None
    if look:
        explained = read_unit(path, keys, read)
    elif ledgers := read_ledgers(path, keys, len(names)):
        pairs = zip(unit.tolist(), ledgers, strict=True)
        explained = [_Explained(number, ledger, None, None) for number, ledger in pairs]
    return explained if explained and _are_drawn(inputs, explained) else None


def _are_drawn(inputs: _Inputs, explained: list[_Explained]) -> bool:
    """Return whether all pictures of the samples already exist."""
    if not inputs.with_pictures:
        return True
    heatmaps = inputs.loaded.run.heatmaps(inputs.loaded.subset)
    return all(
        (heatmaps / name).is_file()
        for sample in explained
        for name in picture_names(
            inputs.loaded.index.samples[sample.number].key, inputs.targets.names_of(sample.ledger)
        )
    )


def _keys(inputs: _Inputs, numbers: NDArray[np.int64]) -> list[str]:
    return [inputs.loaded.index.samples[number].key for number in numbers.tolist()]


def _num_threads(inputs: _Inputs) -> int:
    """Return the number of threads per rank that draw and encode."""
    _, num_ranks = local_ranks(inputs.loaded.accelerator)
    return max(1, min(8, len(os.sched_getaffinity(0)) // num_ranks))


def _rows(inputs: _Inputs, sample: _Explained) -> Rows:
    (key,) = _keys(inputs, np.array([sample.number]))
    names = inputs.targets.names_of(sample.ledger)
    ledger = inputs.targets.with_leading(sample.ledger, sample.ledger)
    return ledger_rows(key, names, ledger, with_pictures=inputs.with_pictures)


def ledger_rows(
    key: str, names: list[str], ledger: NDArray[np.float64], *, with_pictures: bool
) -> Rows:
    """Return a sample's rows of relevance.csv, one per map; unknown values stay empty.

    `ledger` is float64 [K, 4], as in `Map`; `with_pictures`, whether heat maps are drawn.
    """
    pictures = picture_names(key, names)[1:] if with_pictures else [""] * len(names)
    digits = [["" if np.isnan(value) else f"{value:.9g}" for value in row] for row in ledger]
    columns = zip(names, digits, pictures, strict=True)
    return [[key, name, *values, picture] for name, values, picture in columns]


def _test(inputs: _Inputs, config: ExplainConfig) -> list[Tested]:
    """Run pixel flipping and model randomisation on this rank's share of a few samples."""
    loaded, accelerator, classes = inputs.loaded, inputs.loaded.accelerator, inputs.targets.classes
    most = min(config.limit or TESTED_IMAGES, TESTED_IMAGES)
    numbers = choose_samples(loaded.index, loaded.split, most)
    batches = list(rank_batches(numbers, 1, accelerator))
    if not batches:
        return []
    # All ranks use all images for the running statistics, so that their networks are the same.
    images = read_rows(loaded.images, numbers, accelerator.device)
    drawn = randomisation.randomise(inputs.model, images, lambda other: _explainer(config, other))
    tested = []
    with progress(len(batches), "testing", "images", show=accelerator.is_main_process) as bar:
        for batch in batches:
            (number,) = batch.tolist()
            # The number is the seed of the random order, so that it does not depend on the rank.
            flipped = flip_pixels(
                inputs.model, inputs.explainer, loaded.images[number], classes, number
            )
            image = read_rows(loaded.images, batch, accelerator.device)
            compared = randomisation.compare_maps(inputs.explainer, drawn, image, classes)
            tested.append((number, flipped, compared))
            bar.update()
    return tested


def _finish(
    inputs: _Inputs, rows: Rows, tested: list[Tested], looks: list[Look], sums: Sums
) -> None:
    """Write the results of the tests, and the relevance by region, into relevance.json."""
    loaded = inputs.loaded
    path = loaded.run.relevance_info(loaded.subset)
    info = read_description(path, MEND)
    info["ledger_residual"] = ledger_residual(rows)
    info["pixel_flipping"] = flipping.summarise([flipped for _, flipped, _ in tested])
    blocks = randomisation.levels(inputs.model)
    info["randomisation"] = randomisation.summarise(blocks, [compared for *_, compared in tested])
    patients = {look.number: loaded.index.samples[look.number].patient for look in looks}
    info["outside"] = outside.summarise(looks, sums, inputs.targets.classes, patients)
    write_json(path, info)


def _write_mean_maps(inputs: _Inputs, looks: list[Look], sums: Sums) -> None:
    for name in inputs.model.classes:
        _mean_map(inputs, name).unlink(missing_ok=True)
    if inputs.with_pictures:
        for target in sums.maps:
            num_images = sum(look.target == target for look in looks)
            path = _mean_map(inputs, inputs.targets.classes[target])
            save_picture(path, sums.picture(target, num_images))


def ledger_residual(rows: Rows) -> float | None:
    """Return the largest |logit - sum of its shares| relative to the largest |logit|.

    It is computed from the rows of relevance.csv, and None for rules without a ledger.
    """
    ledgers = [row[2:6] for row in rows]
    if any("" in ledger for ledger in ledgers):
        return None
    values = np.array(ledgers, dtype=np.float64)
    gap, largest = np.abs(values[:, 0] - values[:, 1:].sum(1)).max(), np.abs(values[:, 0]).max()
    return float(gap / largest if largest else gap)  # the logits of a dead network are all 0


def _summary(inputs: _Inputs, num_images: int) -> str:
    """Return the summary that is printed at the end."""
    run, subset = inputs.loaded.run, inputs.loaded.subset
    directory = run.heatmaps(subset) if inputs.with_pictures else run.relevance(subset)
    info = read_description(run.relevance_info(subset), MEND)
    residual, flipped, where = info["ledger_residual"], info["pixel_flipping"], info["outside"]
    if flipped is None or where is None:
        raise RunFailedError(f"{run.relevance_info(subset)}: was replaced by another command")
    ledger = "no ledger" if residual is None else f"ledger closed to {residual:.1e}"
    regions = ", ".join(
        f"{name.replace('_', ' ')} {percentage(region['share'])}% "
        f"(area {percentage(region['area'])}%)"
        for name, region in where["all"]["regions"].items()
    )
    lost, by_chance = 1 - flipped["relevant_first"][-1], 1 - flipped["random_order"][-1]
    names = ", ".join(inputs.targets.names)
    return (
        f"explained {counted(num_images, 'image')} for {names}: {ledger}; "
        f"covering {flipped['covered_share']:.0%} of an image takes {lost:z.2f} of the probability "
        f"on average if the most relevant pixels go first, {by_chance:z.2f} in random order\n"
        f"relevance for the likeliest class: {regions}\n"
        f"{'heat maps' if inputs.with_pictures else 'relevance'}: {directory}"
    )
