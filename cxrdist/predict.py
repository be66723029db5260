"""Predict image files with a trained model."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pebble import ProcessPool

from cxrdist.config import PredictConfig
from cxrdist.data.depth import describe_depth, source_depth
from cxrdist.data.found import LeftOut
from cxrdist.data.inputs import Input, Preparation, Prepared, find_inputs, prepare, with_boxes
from cxrdist.data.labels import SEPARATOR
from cxrdist.data.shards import sample_key
from cxrdist.data.text import require_extra
from cxrdist.data.views import LATERAL, NAMES, OTHER
from cxrdist.data.workers import (
    CHUNKS_AHEAD,
    SECONDS_PER_IMAGE,
    Job,
    image_workers,
    in_order,
    num_cores,
    schedule,
)
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.evaluate.calibration import probability_columns
from cxrdist.evaluate.metrics import predicted_classes, to_probabilities
from cxrdist.evaluate.operating_points import called_columns
from cxrdist.explain.export import LEDGER_COLUMNS, ledger_rows
from cxrdist.explain.maps import Map
from cxrdist.explain.pictures import Drawing, draw
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import Ensemble, load_predictor, one_network
from cxrdist.precision import use_full_float32
from cxrdist.run import refuse_unwritable, write_table
from cxrdist.terminal import progress
from cxrdist.train.memory import is_out_of_memory

MOST_NAMED = 3  # files in a line
CHUNK = 4  # images that a worker decodes at once
SECONDS_WITH_TEXT = 60  # to find text in an image, which takes 2, and once to load the finder


@dataclass(frozen=True)
class Predictor:
    """A model at work, and what is known of each input so far, by its number.

    Attributes:
        model: on the device.
        explainer: of it; None without heat maps.
        heatmaps: the folder of the heat maps.
        pool: processes that decode and draw.
        batch_size: images of one forward pass.
        prepared: what was read, without its pixels.
        logits: float32 [classes].
        ledgers: rows of relevance.csv.
        reasons: why an input could not be read or drawn.
    """

    model: Classifier | Ensemble
    explainer: Explainer | None
    heatmaps: Path
    pool: ProcessPool
    batch_size: int
    prepared: dict[int, Prepared] = field(default_factory=dict)
    logits: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    ledgers: dict[int, list[list[str]]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def run(self, inputs: dict[int, Input], how: Preparation) -> None:
        """Predict the inputs of some numbers, batch by batch, while workers decode and draw."""
        chunk, seconds = (1, SECONDS_WITH_TEXT) if how.finds_text else (CHUNK, SECONDS_PER_IMAGE)
        items = list(inputs.values())
        squares = in_order(self.pool, partial(prepare, how=how), items, chunk, seconds)
        drawing: deque[tuple[int, Job[Drawing, None]]] = deque()
        batch: dict[int, Prepared] = {}
        with progress(len(items), "predicting", "images") as bar:
            for number, square in zip(inputs, squares, strict=True):
                if isinstance(square, CxrdistError):
                    self.reasons[number] = str(square)
                else:
                    batch[number] = square
                if len(batch) == self.batch_size:
                    drawing += self._run_batch(batch, inputs, how)
                    batch = {}
                self._finish_drawings(drawing, CHUNKS_AHEAD * num_cores())
                bar.update()
            drawing += self._run_batch(batch, inputs, how) if batch else []
            self._finish_drawings(drawing, 0)

    def _run_batch(
        self, batch: dict[int, Prepared], inputs: dict[int, Input], how: Preparation
    ) -> list[tuple[int, Job[Drawing, None]]]:
        """Compute logits and relevance, and let the workers draw it."""
        device = self.model.mean.device
        pixels = np.stack([square.pixels for square in batch.values()])
        images = torch.from_numpy(pixels).unsqueeze(1).to(device)
        try:
            with torch.inference_mode():
                logits = self.model(images).cpu().numpy()
            maps = self._explain(images, [sample_key(str(inputs[n].file)) for n in batch])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, device):
                raise
            fewer = max(1, len(batch) // 2)
            raise RunFailedError(
                f"out of memory with {len(batch)} images in a pass; try --batch-size {fewer}"
            ) from error
        self.logits.update(zip(batch, logits, strict=True))
        for number, square in batch.items():
            self.prepared[number] = replace(square, pixels=np.empty((0, 0), np.uint8))
        return [
            (number, self._draw(number, replace(inputs[number], boxes=square.boxes), found, how))
            for (number, square), found in zip(batch.items(), maps, strict=False)
        ]

    def _explain(self, images: torch.Tensor, keys: list[str]) -> list[Map]:
        if self.explainer is None:
            return []
        found = self.explainer.attribute(images)
        sums = (found.logits, found.relevance_sum, found.bias_share, found.epsilon_share)
        ledgers = torch.stack(sums, 2).double().cpu().numpy()
        relevance = found.relevance.float().cpu().numpy()
        parts = zip(keys, relevance, ledgers, strict=True)
        return [Map(key, self.model.classes, values, ledger) for key, values, ledger in parts]

    def _draw(self, number: int, item: Input, found: Map, how: Preparation) -> Job[Drawing, None]:
        rows = ledger_rows(found.key, found.classes, found.ledger, with_pictures=True)
        self.ledgers[number] = [[str(item.file), *row] for row in rows]
        make = partial(draw, directory=self.heatmaps, how=how)
        seconds = SECONDS_PER_IMAGE * (1 + len(found.classes))
        return schedule(self.pool, make, [Drawing(item, found)], seconds)

    def _finish_drawings(self, drawing: deque[tuple[int, Job[Drawing, None]]], most: int) -> None:
        """Wait until no more than some drawings are left."""
        while len(drawing) > most:
            number, job = drawing.popleft()
            (fault,) = job.results()
            if fault is not None:
                self.reasons[number] = f"{fault}; has no heat maps"
                del self.ledgers[number]

    def share_depth(self, inputs: dict[int, Input], how: Preparation) -> int | None:
        """Scale images that do not declare their bit depth alike, as a pack does with a source.

        Those that were scaled by fewer bits than the deepest uses are predicted again.

        Returns:
            The depth of all of them; None if there are none.
        """
        used = {number: square.used_depth for number, square in self.prepared.items()}
        depth = source_depth(used.values())
        again = {
            number: replace(inputs[number], boxes=self.prepared[number].boxes)
            for number, bits in used.items()
            if bits not in (None, depth)
        }
        for number in again:
            del self.logits[number], self.prepared[number]
        if again:
            self.run(again, replace(how, depth=depth, finds_text=False))
        return depth


def predict(config: PredictConfig) -> None:
    """Write a CSV of probabilities, and with ``explain`` heat maps into a folder beside it.

    All images are read; what could not be read stands in a second CSV.

    Raises:
        CxrdistError: run, images or options cannot be used, or no image could be read; nothing is
            written then.
        RunFailedError: some images could not be read, and ``skip_bad`` is not set; all the others
            are predicted.
    """
    _refuse_bad_out(config.out)
    model = load_predictor(config.run)
    if model.lungs_only:
        raise CxrdistError(
            f"--run {config.run}: was trained on lungs only, and new images have no masks; pack "
            "them with --masks and --lungs-only, and use cxrdist evaluate"
        )
    heatmaps = _beside(config.out, "heatmaps")
    found, left_out = find_inputs(config.images, heatmaps)
    given = [item.file for item in found] + ([config.text_boxes] if config.text_boxes else [])
    if config.out.exists() and any(file.samefile(config.out) for file in given if file.exists()):
        raise CxrdistError(f"--out {config.out}: is one of the files given; name a CSV to write")
    use_full_float32()
    how = _preparation(config, model)
    inputs = dict(enumerate(with_boxes(found, config.text_boxes) if config.text_boxes else found))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    explainer = Explainer(one_network(model)) if config.explain else None
    num_workers = min(num_cores(), -(-len(inputs) // CHUNK))
    with image_workers(num_workers, ["cxrdist.explain.pictures"]) as pool:
        predictor = Predictor(model, explainer, heatmaps, pool, config.batch_size)
        predictor.run(inputs, how)
        used = [square.used_depth for square in predictor.prepared.values()]
        depth = how.depth or predictor.share_depth(inputs, how)
    if not predictor.logits:
        raise CxrdistError(_unread(list(predictor.reasons.values()), len(inputs)))
    _write(config.out, inputs, left_out, predictor)
    print(f"predicted {len(predictor.logits)} images: {config.out}")
    _tell_calibration(model)
    _tell_depth(how, depth, used)
    _tell_views(inputs, predictor.prepared)
    _tell_cover(config, predictor)
    _tell_rest(config, len(inputs), left_out, predictor)


def _preparation(config: PredictConfig, model: Classifier | Ensemble) -> Preparation:
    """Prepare images as those that the model was trained on.

    Raises:
        CxrdistError: text is to be looked for, and the finder is not installed.
    """
    learned_covered = model.cover is not None and model.cover.is_of_training
    finds_text = learned_covered and config.text_boxes is None
    if finds_text:
        try:
            require_extra()
        except CxrdistError as error:
            raise CxrdistError(
                f"--run {config.run}: was trained on images with their text covered, so text is "
                f"looked for in new ones: {error}, or give the boxes with --text-boxes"
            ) from error
    return Preparation(
        size_px=model.image_size_px,
        fit=config.fit or model.fit,
        depth=config.depth or model.depth,
        cover=model.cover.how if model.cover else "black",
        finds_text=finds_text,
    )


def _refuse_bad_out(out: Path) -> None:
    """Make sure that the files can be written before any work is done for them.

    Raises:
        CxrdistError: they cannot.
        RunFailedError: the folder is read-only.
    """
    if not out.name or (out.exists() and not out.is_file()):
        raise CxrdistError(f"--out {out}: is not a regular file; name a CSV to write")
    if _beside(out, "heatmaps").exists() and not _beside(out, "heatmaps").is_dir():
        raise CxrdistError(f"--out {out}: {_beside(out, 'heatmaps')} is not a folder; move it away")
    refuse_unwritable(out)


def _beside(out: Path, name: str) -> Path:
    """A folder or file that belongs to a CSV, such as NAME-heatmaps."""
    return out.with_name(f"{out.stem}-{name}")


def _write(
    out: Path, inputs: dict[int, Input], left_out: Sequence[LeftOut], predictor: Predictor
) -> None:
    """Write path, prob_CLASS..., predicted; the class is that of the logits, as in `evaluate`.

    A calibrated model has calibrated_CLASS... and softmax_CLASS... before predicted, and after it
    called_CLASS, 1 or 0, of each class that has an operating point.
    """
    model, numbers = predictor.model, sorted(predictor.logits)
    logits, classes = np.stack([predictor.logits[number] for number in numbers]), model.classes
    more = probability_columns(logits, classes, model.task, model.calibration)
    called = called_columns(logits, classes, model.calibration)
    probabilities = np.column_stack([to_probabilities(logits), *more.values()])
    names = [f"prob_{name}" for name in classes]
    columns = ["path", *names, *more, "predicted", *called]
    rows = [
        [
            inputs[number].file,
            *(f"{value:.9g}" for value in probabilities[place]),
            SEPARATOR.join(predicted_classes(logits[place].tolist(), classes, model.task)),
            *(int(values[place]) for values in called.values()),
        ]
        for place, number in enumerate(numbers)
    ]
    if predictor.explainer is not None:
        ledger = [row for number in sorted(predictor.ledgers) for row in predictor.ledgers[number]]
        write_table(predictor.heatmaps / "relevance.csv", ("path", *LEDGER_COLUMNS), ledger)
    unread = sorted(predictor.reasons.items())
    files = [(str(inputs[number].file), reason) for number, reason in unread]
    rejected = [(file, reason.removeprefix(f"{file}: ")) for file, reason in files] + [*left_out]
    if rejected:
        write_table(_beside(out, "rejected.csv"), ("path", "reason"), rejected)
    else:
        _beside(out, "rejected.csv").unlink(missing_ok=True)  # of an earlier call
    write_table(out, columns, rows)


def _tell_calibration(model: Classifier | Ensemble) -> None:
    """Say what the columns calibrated_CLASS and called_CLASS come from, or how to get them."""
    if model.calibration is None:
        print(
            "probabilities are not calibrated and no class is called: run `cxrdist evaluate` on "
            "the shards of the training once"
        )
        return
    chosen = model.calibration
    print(
        f"calibrated and called by {chosen.rule}, as chosen on the {chosen.images} images of "
        f"{chosen.patients} patients of the validation split"
    )
    for name, reason in chosen.reasons.items():
        print(f"{name}: {reason}")


def _tell_depth(how: Preparation, depth: int | None, used: Sequence[int | None]) -> None:
    """Say by which depth images that do not declare theirs were scaled, where that is news."""
    if depth and how.depth is None:
        print(describe_depth(depth, used))
    deeper = sum(bits is not None and depth is not None and bits > depth for bits in used)
    if deeper:
        print(
            f"{deeper} images use more bits than the {depth} by which they are scaled: what is "
            "brighter is white; --depth sets another"
        )


def _tell_views(inputs: dict[int, Input], prepared: dict[int, Prepared]) -> None:
    """Say which images are not frontal, by their tags or names."""
    side = [n for n in sorted(prepared) if prepared[n].view in (LATERAL, OTHER)]
    if side:
        names = ", ".join(str(inputs[number].file) for number in side[:MOST_NAMED])
        kinds = Counter(NAMES[prepared[number].view] for number in side)
        listed = ", ".join(f"{number} {view}" for view, number in kinds.most_common())
        print(
            f"{len(side)} images are no frontal views by their tag or name ({listed}) and are "
            f"predicted all the same: {names}{' ...' if len(side) > MOST_NAMED else ''}"
        )


def _tell_cover(config: PredictConfig, predictor: Predictor) -> None:
    """Say what was done about burned-in text."""
    cover = predictor.model.cover
    if config.text_boxes or (cover and cover.is_of_training):
        counts = [len(s.boxes) for s in predictor.prepared.values() if s.boxes]
        print(
            f"covered {sum(counts)} boxes of text in {len(counts)} of {len(predictor.prepared)} "
            f"images ({cover.how if cover else 'black'})"
        )
    elif cover:
        print(
            f"text is not covered: the model learned with it, and only its {cover.split} images "
            "were covered; to cover it here too, give --text-boxes"
        )


def _tell_rest(
    config: PredictConfig, num_inputs: int, left_out: Sequence[LeftOut], predictor: Predictor
) -> None:
    """Say where the other files are, and what could not be read.

    Raises:
        RunFailedError: something, without ``skip_bad``.
    """
    rejected = _beside(config.out, "rejected.csv")
    if config.explain:
        print(f"heat maps: {predictor.heatmaps}")
    if left_out:
        print(f"not an image, and left out: {len(left_out)} files, listed in {rejected}")
    if predictor.reasons:
        line = _unread(list(predictor.reasons.values()), num_inputs)
        line += f"; all of them: {rejected}"
        if not config.skip_bad:
            raise RunFailedError(f"{line}; mend or remove them, or accept it with --skip-bad")
        print(line)


def _unread(reasons: Sequence[str], num_inputs: int) -> str:
    return f"{len(reasons)} of {num_inputs} images could not be read, the first: {reasons[0]}"
