"""Probe: does a network read the words on the images? The word experiments of the paper.

Bassi & Attux (2020), section 2.2 (words covered in the test images) and section 4.1 (accuracy
without covering, the word of one class pasted on an image of another, and where relevance lies).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cxrdist.bootstrap import draw, rarest_class
from cxrdist.config import ProbeTextConfig
from cxrdist.data.boxes import Box, cover, inside
from cxrdist.data.cache import Images, read_rows
from cxrdist.data.geometry import scaled
from cxrdist.data.index import Index
from cxrdist.data.labels import POSITIVE
from cxrdist.data.phantom import burn_text
from cxrdist.data.square_boxes import SquareBoxes, boxes_in_squares
from cxrdist.data.text import find_boxes, require_extra
from cxrdist.distributed import finish, gather, together
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.loaded_run import LoadedRun, OpenedRun, load_images, open_run_on, writing
from cxrdist.evaluate.measure import Settings, replicate
from cxrdist.evaluate.metrics import Metrics, headline
from cxrdist.evaluate.predictions import in_order, predict_split, rank_batches
from cxrdist.evaluate.scored import score_samples
from cxrdist.evaluate.scores import score
from cxrdist.explain.heatmap import OUTLINE, enlarged, overlay
from cxrdist.explain.outside import share_within
from cxrdist.explain.pictures import replace_pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.explain.text_file import (
    CONDITIONS,
    ClassText,
    Covering,
    PaperResults,
    PastedClass,
    Pasting,
    RelevanceInText,
    TextAmount,
    TextFile,
    TextPicture,
    TextRelevance,
)
from cxrdist.files import write_json
from cxrdist.intervals import describe, of_values
from cxrdist.model.ensemble import one_network
from cxrdist.model.prediction import to_probabilities
from cxrdist.terminal import percentage, progress, rounded, table

PAPER: PaperResults = {
    "covering": "\u201cA DNN with about 94% test accuracy had its accuracy increased in almost 1% "
    "and our best network had its accuracy decreased from 97.8% to 97.3%\u201d when the words were "
    "not covered (section 4.1; they were covered in the test images only, section 2.2).",
    "paste": "\u201cSEDUTO\u201d on one normal image that was classified correctly: Normal "
    "\u201cjust changed from 98.51% to 98.45%, and for COVID-19 increased from 0.4471% to "
    "0.4595%\u201d (section 4.1). Viral pneumonia and other images: no figure.",
    "relevance": "no figure. Of the heat map of one COVID-19 image with \u201cSEDUTO\u201d: "
    "\u201cIt becomes clear, by the dark red color on the map, that the network learned to "
    "associate this word with the COVID-19 class\u201d (section 4.1, figure 2).",
}
"""What Bassi & Attux (2020) found."""
PLACES = {
    "upper-left": (0.03, 0.03, "lt"),
    "upper-right": (0.97, 0.03, "rt"),
    "lower-left": (0.03, 0.97, "lb"),
    "lower-right": (0.97, 0.97, "rb"),
}
"""Position of a word as fractions of the side, and its anchor (Pillow's names)."""
COVERS = ("black", "fill")
DIGITS = 7  # of probabilities and shares in text.json; float32 holds no more
PICTURED = 2  # images with text of each class
Kind = Literal["found", "pasted"]
Edit = Callable[[int, NDArray[np.uint8]], NDArray[np.uint8]]
"""Returns a changed square, given the number of a sample and its square, uint8 [S, S]."""
Shares = tuple[int, float, float]
"""Number of a sample, and the boxes' shares of its |relevance| and of its area."""


@dataclass(frozen=True)
class _Probe:
    """The split that is probed."""

    config: ProbeTextConfig
    loaded: LoadedRun
    explainer: Explainer
    boxes: SquareBoxes
    numbers: NDArray[np.int64]
    """Samples of the split, [N]."""
    positive: NDArray[np.bool_]
    """Their labels, [N, classes]."""
    plain: NDArray[np.float32]
    """Logits of the images as they are, [N, classes]."""


class Edited:
    """Images that are changed as they are read, for `predict_split`."""

    def __init__(self, images: Images, edit: Edit) -> None:
        self._images, self._edit = images, edit

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the changed squares of some samples, uint8 [B, S, S]."""
        return np.stack([self._edit(int(n), np.asarray(self._images[n])) for n in numbers])


def probe_text(config: ProbeTextConfig) -> None:
    """Measure the effect of text on the images; write RUN/SPLIT/text.json, pictures and a summary.

    The result is the same for any number of ranks, since each takes whole batches. Boxes are
    covered in the squares that the network sees; `pack` covers them in the originals.
    """
    _refuse_bad_options(config)
    opened = open_run_on(config.run, config.shards, config.split, config.name)
    with writing(opened, opened.run.text, opened.run.text_pictures) as file:
        _probe_text(config, opened, file)


def _probe_text(config: ProbeTextConfig, opened: OpenedRun, file: Path) -> None:
    accelerator = opened.accelerator
    model = together(accelerator, lambda: one_network(opened.model))
    explainer = together(accelerator, lambda: Explainer(model))
    together(accelerator, lambda: _refuse_covered(opened.index, config.split))
    given = together(accelerator, lambda: _read_boxes(config, opened))
    loaded = load_images(opened, config.cache)
    numbers = np.array(loaded.index.numbers(config.split), dtype=np.int64)
    if given is None:
        boxes = _find_boxes(config, loaded, numbers)
    else:
        boxes = {number: given[number] for number in numbers.tolist() if number in given}

    def predict(edit: Edit | None = None) -> NDArray[np.float32]:
        images = loaded.images if edit is None else cast(Images, Edited(loaded.images, edit))
        rows = predict_split(replace(loaded, images=images), numbers, config.batch_size)
        return in_order(rows, numbers)

    positive = loaded.index.targets()[numbers] == POSITIVE
    probe = _Probe(config, loaded, explainer, boxes, numbers, positive, predict())
    covered = {how: predict(partial(_cover, boxes, how)) for how in COVERS}
    pasted = predict(lambda _, pixels: paste(pixels, config)[0])
    shares = _relevance_in_boxes(probe)
    if accelerator.is_main_process:
        # Only the main rank is here, so nothing that is called below may use a collective.
        content: TextFile = {
            "format": "cxrdist-text-1",
            "split": config.split,
            "task": loaded.index.task,
            "classes": loaded.index.classes,
            "index_sha256": loaded.index.sha256,
            "text": _describe_text(probe),
            "covering": _describe_covering(probe, covered),
            "paste": _describe_paste(probe, pasted),
            "relevance": _describe_relevance(loaded.index, shares),
            "paper": PAPER,
            "pictures": _write_pictures(probe, pasted),
        }
        write_json(file, content)
        print(summary(content))
        print(f"all results: {file}, and in the report")
    finish(accelerator)


def _cover(
    boxes: SquareBoxes, how: str, number: int, pixels: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    return cover(pixels, boxes[number], how) if number in boxes else pixels


def _refuse_bad_options(config: ProbeTextConfig) -> None:
    if not config.word.strip():
        raise CxrdistError("--word: is empty, expected a word such as SEDUTO")
    if config.boxes is None:
        require_extra()


def _refuse_covered(index: Index, split: str) -> None:
    if index.cover and index.cover["split"] in ("all", split):
        raise CxrdistError(
            f"--shards {index.directory}: burned-in text is already covered; give shards "
            "that were packed without --text-boxes"
        )


def _read_boxes(config: ProbeTextConfig, opened: OpenedRun) -> SquareBoxes | None:
    """Read the boxes of each sample of the split from the CSV; return None if none is given."""
    if config.boxes is None:
        return None
    numbers = np.array(opened.index.numbers(config.split), dtype=np.int64)
    return boxes_in_squares(opened.packed, numbers, config.boxes, "--boxes")


def _find_boxes(
    config: ProbeTextConfig, loaded: LoadedRun, numbers: NDArray[np.int64]
) -> SquareBoxes:
    """Find the boxes of each sample in its square."""
    accelerator = loaded.accelerator
    mine: list[tuple[int, list[Box]]] = []
    batches = list(rank_batches(numbers, config.batch_size, accelerator))
    total = sum(map(len, batches))
    with progress(total, "looking for text", "images", show=accelerator.is_main_process) as bar:
        for number in (int(n) for batch in batches for n in batch):
            mine.append((number, find_boxes(np.asarray(loaded.images[number]))))
            bar.update()
    return {number: found for number, found in sorted(gather(accelerator, mine)) if found}


def paste(pixels: NDArray[np.uint8], config: ProbeTextConfig) -> tuple[NDArray[np.uint8], Box]:
    """Write the word into a copy of a square; return the copy and the word's box in its px."""
    x, y, anchor = PLACES[config.place]
    image = Image.fromarray(pixels.copy())  # the pixels may be those of the cache
    word = burn_text(image, config.word, (x, y), config.height, anchor)
    box = Box(word.x, word.y, word.width, word.height, config.word)
    return np.asarray(image), scaled(box, image.width, image.height)


def _relevance_in_boxes(probe: _Probe) -> list[Shares]:
    """Return how much of |relevance| for the likeliest class lies in the boxes of each image."""
    config, loaded, boxes = probe.config, probe.loaded, probe.boxes
    chosen = np.array(sorted(boxes)[: config.limit], dtype=np.int64)
    # The numbers of a split ascend.
    likeliest = probe.plain.argmax(1)[np.searchsorted(probe.numbers, chosen)]
    accelerator = loaded.accelerator
    batches = [
        (target, batch)
        for target in range(len(loaded.index.classes))
        # By class, since `attribute` explains the same classes for all images of a batch.
        for batch in rank_batches(chosen[likeliest == target], config.batch_size, accelerator)
    ]
    rows: list[Shares] = []
    total = sum(len(batch) for _, batch in batches)
    with progress(total, "explaining", "images", show=accelerator.is_main_process) as bar:
        for target, batch in batches:
            images = read_rows(loaded.images, batch, accelerator.device)
            relevance = probe.explainer.attribute(images, [target]).relevance[:, 0]
            for number, values in zip(batch.tolist(), relevance.cpu().numpy(), strict=True):
                rows.append((number, *share_inside(values, boxes[number])))
            bar.update(len(batch))
    return sorted(gather(accelerator, rows))


def share_inside(relevance: NDArray[np.floating], boxes: Sequence[Box]) -> tuple[float, float]:
    """Return which share of |relevance| [H, W] lies in the boxes, and their share of the area."""
    return share_within(relevance, inside(boxes, *relevance.shape))


def _describe_text(probe: _Probe) -> TextAmount:
    """Count how many images of each class have text, and how often its most frequent words."""
    given, boxes, rows = probe.config.boxes, probe.boxes, list[ClassText]()
    for name, is_own in zip(probe.loaded.index.classes, probe.positive.T, strict=True):
        own = probe.numbers[is_own].tolist()
        words = Counter(box.text for n in own for box in boxes.get(n, ()) if box.text)
        often = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:5]
        with_text = sum(n in boxes for n in own)
        rows.append({"class": name, "images": len(own), "with_text": with_text, "words": often})
    return {
        "found_in": "squares" if given is None else given.name,
        "images": len(probe.numbers),
        "with_text": len(boxes),
        "boxes": sum(map(len, boxes.values())),
        "classes": rows,
    }


def _describe_covering(probe: _Probe, covered: Mapping[str, NDArray[np.float32]]) -> Covering:
    """Score the split as it is, and with its text covered in each way."""
    likeliest = probe.plain.argmax(1)
    black, fill = (int((likeliest != covered[how].argmax(1)).sum()) for how in COVERS)
    return {
        "as_it_is": _score(probe, probe.plain),
        "black": _score(probe, covered["black"]),
        "fill": _score(probe, covered["fill"]),
        "predicted_otherwise": {"black": black, "fill": fill},
    }


def _score(probe: _Probe, logits: NDArray[np.float32]) -> Metrics:
    """Compute the scores of metrics.json, without the figures that covering does not concern."""
    scored, settings = score_samples(probe.loaded.index, probe.numbers, logits), Settings()
    replicates = replicate(scored, settings)
    metrics = score(scored, replicates, settings.fewest)
    metrics["intervals"] = describe(replicates)
    return metrics


def _describe_paste(probe: _Probe, pasted: NDArray[np.float32]) -> Pasting:
    """Average the probabilities before and after pasting, over the images of each class."""
    config, index = probe.config, probe.loaded.index
    before, after = to_probabilities(probe.plain), to_probabilities(pasted)
    changed = probe.plain.argmax(1) != pasted.argmax(1)
    rows: list[PastedClass] = [
        {
            "class": name,
            "images": int(own.sum()),
            "before": _rounded(before[own].mean(0)) if own.any() else None,
            "after": _rounded(after[own].mean(0)) if own.any() else None,
            "predicted_otherwise": int(changed[own].sum()),
        }
        for name, own in zip(index.classes, probe.positive.T, strict=True)
    ]
    # The word has the same box on all images, as they have one size.
    _, box = paste(np.zeros((index.image_size_px, index.image_size_px), np.uint8), config)
    return {
        "word": config.word,
        "place": config.place,
        "letters_px": round(box.height),
        "image_size_px": index.image_size_px,
        "classes": rows,
    }


def _rounded(values: NDArray[np.floating]) -> list[float]:
    return [round(float(value), DIGITS) for value in values]


def _describe_relevance(index: Index, rows: Sequence[Shares]) -> RelevanceInText:
    """Average the shares of |relevance| and of the area in the boxes, over each class and all."""
    numbers = [number for number, *_ in rows]
    positive = index.targets()[numbers] == POSITIVE
    everything = _mean_shares("all", rows)
    if rows:
        images = np.ones(len(rows), bool)
        patients = [index.samples[number].patient for number in numbers]
        replicates = draw(patients, rarest_class(positive, patients))
        shares = np.array([share for _, share, _ in rows])
        everything["patients"] = replicates.patients(images)
        everything["share_interval"] = of_values(replicates, shares, images)
    classes = [
        _mean_shares(name, [row for row, is_own in zip(rows, own, strict=True) if is_own])
        for name, own in zip(index.classes, positive.T, strict=True)
    ]
    return {"all": everything, "classes": classes}


def _mean_shares(name: str, rows: Sequence[Shares]) -> TextRelevance:
    share, area = np.mean([row[1:] for row in rows], axis=0) if rows else (np.nan, np.nan)
    return {
        "class": name,
        "images": len(rows),
        "share": round(float(share), DIGITS) if rows else None,
        "area": round(float(area), DIGITS) if rows else None,
        "times_chance": round(float(share / area), 3) if rows and area else None,
    }


def _write_pictures(probe: _Probe, pasted: NDArray[np.float32]) -> list[TextPicture]:
    """Draw images with text, and of each class one that is right with the word pasted on it."""
    loaded, index = probe.loaded, probe.loaded.index
    before, after = to_probabilities(probe.plain), to_probabilities(pasted)
    drawn: list[TextPicture] = []
    pictures: dict[str, Image.Image] = {}
    for kind, row, target in _choose_pictures(probe):
        number = int(probe.numbers[row])
        pixels, shown = np.asarray(loaded.images[number]), probe.boxes.get(number, ())
        if kind == "pasted":
            pixels, box = paste(pixels, probe.config)
            shown = [box]
        images = read_rows(pixels[None], np.array([0]), loaded.accelerator.device)
        maps = probe.explainer.attribute(images, [target]).relevance
        relevance = maps[0, 0].float().cpu().numpy()
        share, area = share_inside(relevance, shown)
        sample = index.samples[number]
        xray, heatmap = (f"{sample.key}.{kind}.{what}.png" for what in ("xray", "map"))
        pictures[xray] = _outlined(Image.fromarray(pixels), shown)
        pictures[heatmap] = _outlined(overlay(pixels, relevance), shown)
        drawn.append(
            {
                "kind": kind,
                "key": sample.key,
                "label": sample.label,
                "explained": index.classes[target],
                "share": round(share, DIGITS),
                "area": round(area, DIGITS),
                # Significant digits, as a sum of relevance can be of any magnitude.
                "relevance_inside": float(f"{relevance[inside(shown, *pixels.shape)].sum():.6g}"),
                "before": _rounded(before[row]),
                "after": _rounded(after[row]),
                "xray": xray,
                "map": heatmap,
            }
        )
    run, subset = loaded.run, loaded.subset
    replace_pictures(run.text(subset), run.text_pictures(subset), pictures)
    return drawn


def _choose_pictures(probe: _Probe) -> list[tuple[Kind, int, int]]:
    """Choose distinct pictures: their kind, row among the N samples, and class to explain."""
    likeliest = probe.plain.argmax(1)
    with_text = np.array([number in probe.boxes for number in probe.numbers.tolist()])
    chosen: dict[tuple[Kind, int], int] = {}
    for target, own in enumerate(probe.positive.T):
        for row in np.flatnonzero(own & with_text)[:PICTURED].tolist():
            chosen["found", row] = int(likeliest[row])
        for row in np.flatnonzero(own & (likeliest == target))[:1].tolist():
            chosen["pasted", row] = target
    return [(kind, row, target) for (kind, row), target in chosen.items()]


def _outlined(picture: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return the picture at least 300 px wide, with a thin line around each box."""
    large, times = enlarged(picture)
    draw = ImageDraw.Draw(large)
    for box in boxes:
        x, y, width, height = (value * times for value in box[:4])
        # Around the box, so that the line hides nothing of the word.
        draw.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), outline=OUTLINE)
    return large


def summary(content: TextFile) -> str:
    """Return the results as text for the terminal."""
    text, covering, word = content["text"], content["covering"], content["paste"]
    score: Literal["recall", "auroc"] = "recall" if content["task"] == "multiclass" else "auroc"
    rows = [
        [
            row["class"],
            str(row["images"]),
            str(row["with_text"]),
            *(rounded(covering[c]["classes"][row["class"]][score]) for c in CONDITIONS),
        ]
        for row in text["classes"]
    ]
    headers = ["Class", "Images", "With text", f"{score} as it is", "black", "filled"]
    relevance = content["relevance"]["all"]
    share, area = relevance["share"], relevance["area"]
    where = "|relevance| in the boxes: no image has any"
    if relevance["images"] and share is not None and area is not None:
        where = (
            f"|relevance| in the boxes: {percentage(share)}%, their area {percentage(area)}%: "
            f"{relevance['times_chance']:.2f} times chance, mean of {relevance['images']} images"
        )
    changes = []
    for row in word["classes"]:
        cells = ["-"] * len(content["classes"])
        if row["before"] and row["after"]:
            pairs = zip(row["before"], row["after"], strict=True)
            cells = [f"{before:.4f} -> {after:.4f}" for before, after in pairs]
        changes.append([row["class"], *cells, str(row["predicted_otherwise"])])
    titles = ["Truth", *content["classes"], "Likeliest class changes"]
    return "\n".join(
        [
            table(rows, headers),
            f"as it is: {headline(covering['as_it_is'])}",
            f"text covered with black: {headline(covering['black'])}",
            f"text filled from its surroundings: {headline(covering['fill'])}",
            where,
            f"{word['word']!r} pasted ({word['place']}): mean probability of each class",
            table(changes, titles),
        ]
    )
