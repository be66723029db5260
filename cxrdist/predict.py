"""Predict image files with a trained model."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import PredictConfig
from cxrdist.data import text
from cxrdist.data.depth import describe_depth
from cxrdist.data.found import LeftOut
from cxrdist.data.inputs import (
    Input,
    Preparation,
    Prepared,
    find_inputs,
    prepare,
    unlike_source,
    with_boxes,
)
from cxrdist.data.labels import SEPARATOR
from cxrdist.data.shards import sample_key
from cxrdist.data.views import LATERAL, NAMES, OTHER
from cxrdist.data.workers import (
    SECONDS_PER_IMAGE,
    Job,
    Workers,
    image_workers,
    in_order,
    num_cores,
    schedule,
)
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.explain.dicom_output import (
    MOST_NAMED,
    Output,
    class_probabilities,
    open_output,
    refuse_bad_folder,
    refuse_other_images,
    tell_results,
    write_results,
)
from cxrdist.explain.export import LEDGER_COLUMNS, MADE, ledger_rows
from cxrdist.explain.maps import Map, to_maps
from cxrdist.explain.pictures import Explained, draw
from cxrdist.explain.relevance import Explainer
from cxrdist.files import refuse_unwritable, remove_made, sweep, write_table
from cxrdist.model.densenet import Classifier, read_model
from cxrdist.model.ensemble import Ensemble, load_predictor, one_network
from cxrdist.model.prediction import Predictions, probability_columns
from cxrdist.model.published import model_folder
from cxrdist.precision import use_full_float32
from cxrdist.terminal import counted, few, progress
from cxrdist.train.memory import is_out_of_memory

CHUNK = 4  # images that a worker decodes at once


class Made(NamedTuple):
    """A job of a worker that writes files of an image."""

    number: int
    what: str
    job: Job[Any, Any]


@dataclass(frozen=True)
class Predictor:
    """A model with its workers, and the results of each input so far, by its number."""

    model: Classifier | Ensemble
    explainer: Explainer | None
    """None without heat maps."""
    heatmaps: Path | None
    """Folder of the heat maps; None without ``explain``."""
    output: Output | None
    """None without ``dicom``."""
    pool: Workers
    batch_size: int
    prepared: dict[int, Prepared] = field(default_factory=dict)
    """Prepared inputs without their pixels."""
    logits: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """[classes] each."""
    ledgers: dict[int, list[list[str]]] = field(default_factory=dict)
    """Rows of relevance.csv."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why an input could not be read or drawn."""
    new_uids: dict[int, list[str]] = field(default_factory=dict)
    """Names of UIDs that an input lacks, and that were created for its DICOM results."""

    def run(self, inputs: dict[int, Input], how: Preparation) -> None:
        """Predict inputs by number, batch by batch, while workers decode and draw."""
        chunk, seconds = (
            (1, text.SECONDS_PER_IMAGE) if how.finds_text else (CHUNK, SECONDS_PER_IMAGE)
        )
        items = list(inputs.values())
        squares = in_order(self.pool, partial(prepare, how=how), items, chunk, seconds)
        drawing: deque[Made] = deque()
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
                # Maps that wait to be drawn are in memory, so their number is limited.
                self._finish_drawings(drawing, self.pool.ahead)
                bar.update()
            drawing += self._run_batch(batch, inputs, how) if batch else []
            self._finish_drawings(drawing, 0)

    def _run_batch(
        self, batch: dict[int, Prepared], inputs: dict[int, Input], how: Preparation
    ) -> list[Made]:
        """Compute logits and relevance, and start drawing it in the workers."""
        device = self.model.mean.device
        pixels = np.stack([square.pixels for square in batch.values()])
        images = torch.from_numpy(pixels).unsqueeze(1).to(device)
        try:
            with torch.inference_mode():
                logits = self.model(images).cpu().numpy()
            maps: list[Map] = []
            if self.explainer is not None:
                keys = [sample_key(str(inputs[number].file)) for number in batch]
                maps = to_maps(self.explainer.attribute(images), keys, self.model.classes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, device):
                raise
            fewer = max(1, len(batch) // 2)
            raise RunFailedError(
                f"out of memory with {len(batch)} images in a pass; try --batch-size {fewer}"
            ) from error
        self.logits.update(zip(batch, logits, strict=True))
        for number, square in batch.items():  # their pixels are no longer needed in memory
            self.prepared[number] = replace(square, pixels=np.empty((0, 0), np.uint8))
        return [
            made
            # Not strict: without an explainer there are no maps, and nothing is drawn.
            for (number, square), own in zip(batch.items(), maps, strict=False)
            for made in self._draw(number, replace(inputs[number], boxes=square.boxes), own, how)
        ]

    def _draw(self, number: int, item: Input, own: Map, how: Preparation) -> list[Made]:
        """Start jobs that write the heat maps and DICOM results of an image from its map."""
        made: list[Made] = []
        seconds = SECONDS_PER_IMAGE * (1 + len(own.classes))
        if self.heatmaps is not None:
            if not self.ledgers:  # the maps of an earlier call may be of another model
                (self.heatmaps / "relevance.csv").unlink(missing_ok=True)
                sweep(self.heatmaps)
                remove_made(self.heatmaps, MADE)
            rows = ledger_rows(own.key, own.classes, own.ledger, with_pictures=True)
            self.ledgers[number] = [[str(item.file), *row] for row in rows]
            make = partial(draw, directory=self.heatmaps, how=how)
            drawn = schedule(self.pool, [make], [Explained(item, own)], seconds)
            made.append(Made(number, "heat maps", drawn))
        if self.output is not None:
            values = class_probabilities(_predictions(self.model, [self.logits[number]]))
            write = partial(write_results, output=replace(self.output, how=how))
            written = schedule(self.pool, [write], [Explained(item, own, values)], seconds)
            made.append(Made(number, "DICOM results", written))
        return made

    def _finish_drawings(self, drawing: deque[Made], most: int) -> None:
        """Wait until at most the given number of drawings are left."""
        while len(drawing) > most:
            number, what, job = drawing.popleft()
            (result,) = job.results()
            if isinstance(result, CxrdistError):
                earlier = self.reasons.get(number)  # of the other drawing of this image
                lacks = f"{earlier} and" if earlier else f"{result}; has"
                self.reasons[number] = f"{lacks} no {what}"
                if what == "heat maps":
                    del self.ledgers[number]
            elif result:
                self.new_uids[number] = result

    def share_depth(self, inputs: dict[int, Input], how: Preparation) -> int | None:
        """Use one bit depth, which is returned, for all images that do not declare theirs.

        Images that were scaled by fewer bits than the deepest one uses are predicted again.
        """
        used = {number: square.used_depth for number, square in self.prepared.items()}
        depth, numbers = unlike_source(used)
        again = {n: replace(inputs[n], boxes=self.prepared[n].boxes) for n in numbers}
        for number in again:
            del self.prepared[number], self.logits[number]
            self.ledgers.pop(number, None)
            self.reasons.pop(number, None)  # such as heat maps that were not drawn in time
            self.new_uids.pop(number, None)
        if again:
            # Their text was found in the first pass, and its boxes are given.
            self.run(again, replace(how, depth=depth, finds_text=False))
        return depth


def _predictions(model: Classifier | Ensemble, logits: list[NDArray[np.float32]]) -> Predictions:
    return Predictions(np.stack(logits), model.classes, model.task, model.calibration)


def predict(config: PredictConfig) -> None:
    """Write a CSV of probabilities, with ``explain`` heat maps, and with ``dicom`` DICOM results.

    Unreadable images are listed in a second CSV. The folder of DICOM results appears once all are
    complete.

    Raises:
        CxrdistError: run, images or options cannot be used, or no image could be read; nothing is
            written then.
        RunFailedError: some images could not be read, and ``skip_bad`` is not set; all the others
            are predicted.
    """
    _refuse_bad_out(config.out)
    if config.dicom is not None:
        refuse_bad_folder(config.dicom, config.out, _beside(config.out, "heatmaps"))
    files = model_folder(config.run)
    model = read_model(files) if files == config.run else load_predictor(config.run)
    if model.lungs_only:
        raise CxrdistError(
            f"--run {config.run}: was trained on lungs only, but new images have no masks; pack "
            "them with --masks and --lungs-only, and use cxrdist evaluate"
        )
    heatmaps = _beside(config.out, "heatmaps")
    items, left_out = find_inputs(config.images, heatmaps)
    given = [item.file for item in items] + ([config.text_boxes] if config.text_boxes else [])
    if config.out.exists() and any(file.samefile(config.out) for file in given if file.exists()):
        raise CxrdistError(f"--out {config.out}: is one of the files given; name a CSV to write")
    if config.explain and any(heatmaps.resolve() in file.resolve().parents for file in given):
        raise CxrdistError(
            f"--out {config.out}: images lie in {heatmaps}, where earlier heat maps are removed; "
            "choose another name"
        )
    if config.dicom is not None:
        refuse_other_images([item.file for item in items])
    use_full_float32()
    how = _preparation(config, model)
    inputs = dict(enumerate(with_boxes(items, config.text_boxes) if config.text_boxes else items))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    explains = config.explain or config.dicom is not None
    explainer = Explainer(one_network(model)) if explains else None
    num_workers = min(num_cores(), -(-len(inputs) // CHUNK))
    preload = ["cxrdist.explain.dicom_results" if config.dicom else "cxrdist.explain.pictures"]
    # They end in reverse order: no worker writes any more when the folder of DICOM results appears.
    with (
        open_output(config.dicom, files, how) as output,
        image_workers(num_workers, preload) as pool,
    ):
        folder = heatmaps if config.explain else None
        predictor = Predictor(model, explainer, folder, output, pool, config.batch_size)
        predictor.run(inputs, how)
        used = [square.used_depth for square in predictor.prepared.values()]
        depth = how.depth or predictor.share_depth(inputs, how)
        if not predictor.logits:
            raise CxrdistError(_failures(predictor, len(inputs)))
        _write(config.out, inputs, left_out, predictor)
    print(f"predicted {counted(len(predictor.logits), 'image')}: {config.out}")
    _tell_calibration(model)
    _tell_depth(how, depth, used)
    _tell_views(inputs, predictor.prepared)
    _tell_cover(config, predictor)
    _tell_rest(config, inputs, left_out, predictor)


def _preparation(config: PredictConfig, model: Classifier | Ensemble) -> Preparation:
    """Return how to prepare images: as in training, or as the options say."""
    how = model.preparation()
    finds_text = how.finds_text and config.text_boxes is None
    if finds_text:
        try:
            text.require_extra()
        except CxrdistError as error:
            raise CxrdistError(
                f"--run {config.run}: was trained on images with covered text, so text must be "
                f"found in new images: {error}, or give the boxes with --text-boxes"
            ) from error
    fit, depth = config.fit or how.fit, config.depth or how.depth
    return replace(how, fit=fit, depth=depth, finds_text=finds_text)


def _refuse_bad_out(out: Path) -> None:
    """Check that the output files can be written, before any work starts."""
    if not out.name or (out.exists() and not out.is_file()):
        raise CxrdistError(f"--out {out}: is not a regular file; name a CSV to write")
    heatmaps = _beside(out, "heatmaps")
    if heatmaps.exists() and not heatmaps.is_dir():
        raise CxrdistError(f"--out {out}: {heatmaps} is not a folder; move it away")
    refuse_unwritable(out)


def _beside(out: Path, name: str) -> Path:
    """Return the path of a folder or file beside a CSV, such as NAME-heatmaps."""
    return out.with_name(f"{out.stem}-{name}")


def _write(
    out: Path, inputs: dict[int, Input], left_out: Sequence[LeftOut], predictor: Predictor
) -> None:
    """Write the CSVs: path, prob_CLASS..., predicted (by the logits, as in `evaluate`).

    For a calibrated model there are also calibrated_CLASS... and softmax_CLASS... before predicted,
    and after it called_CLASS, 1 or 0, for each class with a threshold.
    """
    numbers = sorted(predictor.logits)
    predictions = _predictions(predictor.model, [predictor.logits[number] for number in numbers])
    values = {f"prob_{name}": column for name, column in predictions.probabilities.items()}
    values |= probability_columns(predictions)
    called = {f"called_{name}": column for name, column in predictions.called.items()}
    columns = ["path", *values, "predicted", *called]
    rows = [
        [
            inputs[number].file,
            *(f"{column[row]:.9g}" for column in values.values()),
            SEPARATOR.join(predicted),
            *(int(column[row]) for column in called.values()),
        ]
        for row, (number, predicted) in enumerate(zip(numbers, predictions.predicted, strict=True))
    ]
    if predictor.heatmaps is not None:
        ledger = [row for number in sorted(predictor.ledgers) for row in predictor.ledgers[number]]
        write_table(predictor.heatmaps / "relevance.csv", ("path", *LEDGER_COLUMNS), ledger)
    unread = sorted(predictor.reasons.items())
    files = [(str(inputs[number].file), reason) for number, reason in unread]
    rejected = [(file, reason.removeprefix(f"{file}: ")) for file, reason in files] + [*left_out]
    file = _beside(out, "rejected.csv")
    if rejected:
        write_table(file, ("path", "reason"), rejected)
    else:
        file.unlink(missing_ok=True)  # of an earlier call
    write_table(out, columns, rows)


def _tell_calibration(model: Classifier | Ensemble) -> None:
    """Print the source of the columns calibrated_CLASS and called_CLASS, or how to get them."""
    if model.calibration is None:
        print(
            "probabilities are not calibrated and no class is called: run `cxrdist evaluate` on "
            "the shards of the training once"
        )
        return
    chosen = model.calibration
    val = f"the {chosen.images} images of {chosen.patients} patients of the validation split"
    if chosen.temperatures or chosen.thresholds:
        print(f"calibrated and called by {chosen.rule}, as chosen on {val}")
    else:
        print(f"probabilities are not calibrated and no class is called, as {val} do not allow it")
    for name, reason in chosen.reasons.items():
        print(f"{name}: {reason}")


def _tell_depth(how: Preparation, depth: int | None, used: Sequence[int | None]) -> None:
    """Print the bit depth of images that do not declare theirs, unless it was given."""
    if depth and how.depth is None:
        print(describe_depth(depth, used))
    deeper = sum(bits is not None and depth is not None and bits > depth for bits in used)
    if deeper:
        print(
            f"{deeper} images use more than the {depth} bits by which they are scaled: brighter "
            "values become white; set another depth with --depth"
        )


def _tell_views(inputs: dict[int, Input], prepared: dict[int, Prepared]) -> None:
    """Print which images are not frontal, by their tags or names."""
    side = [n for n in sorted(prepared) if prepared[n].view in (LATERAL, OTHER)]
    if side:
        names = few([str(inputs[number].file) for number in side], MOST_NAMED)
        kinds = Counter(NAMES[prepared[number].view] for number in side)
        listed = ", ".join(f"{number} {view}" for view, number in kinds.most_common())
        print(
            "not frontal views by their tag or name, but predicted, too: "
            f"{counted(len(side), 'image')} ({listed}): {names}"
        )


def _tell_cover(config: PredictConfig, predictor: Predictor) -> None:
    """Print how burned-in text was handled."""
    cover = predictor.model.cover
    if config.text_boxes or (cover and cover.is_of_training):
        counts = [len(s.boxes) for s in predictor.prepared.values() if s.boxes]
        print(
            f"covered {sum(counts)} boxes of text in {len(counts)} of {len(predictor.prepared)} "
            f"images ({cover.how if cover else 'black'})"
        )
    elif cover:
        print(
            f"text is not covered, as in training: only {cover.split} images were covered; to "
            "cover it here, too, give --text-boxes"
        )


def _tell_rest(
    config: PredictConfig,
    inputs: dict[int, Input],
    left_out: Sequence[LeftOut],
    predictor: Predictor,
) -> None:
    """Print the paths of the other files; report unreadable images, as an error by default."""
    rejected = _beside(config.out, "rejected.csv")
    if config.explain:
        print(f"heat maps: {predictor.heatmaps}")
    if config.dicom is not None:
        tell_results(config.dicom, {inputs[n].file: u for n, u in predictor.new_uids.items()})
    if left_out:
        print(f"not an image, and left out: {counted(len(left_out), 'file')}, listed in {rejected}")
    if predictor.reasons:
        line = f"{_failures(predictor, len(inputs))}; all of them: {rejected}"
        if not config.skip_bad:
            raise RunFailedError(f"{line}; fix or remove them, or accept this with --skip-bad")
        print(line)


def _failures(predictor: Predictor, num_inputs: int) -> str:
    """Count the images that could not be read, and those that were predicted but not drawn."""
    unread = [reason for n, reason in predictor.reasons.items() if n not in predictor.logits]
    undrawn = [reason for n, reason in predictor.reasons.items() if n in predictor.logits]
    lines = []
    if unread:
        lines.append(
            f"{len(unread)} of {num_inputs} images could not be read, the first: {unread[0]}"
        )
    if undrawn:
        count = f"{len(undrawn)} of {num_inputs} images were predicted"
        lines.append(f"{count} but lack heat maps or DICOM results, the first: {undrawn[0]}")
    return "; ".join(lines)
