"""Demo: run all steps, from images to a report, on synthetic X-rays or on a folder of yours."""

import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import (
    DemoConfig,
    EvaluateConfig,
    ExplainConfig,
    PackConfig,
    ProbeTextConfig,
    ReportConfig,
)
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.geometry import scaled
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.phantom import PATIENT_PATTERN, WORD, write_lung_masks, write_phantoms
from cxrdist.errors import CxrdistError, RunFailedError, Stopped
from cxrdist.evaluate.predictions import evaluate
from cxrdist.explain.export import explain
from cxrdist.files import write_json
from cxrdist.info import read_info
from cxrdist.probe_text import probe_text
from cxrdist.report.html import report
from cxrdist.run import RunDirectory
from cxrdist.signals import stop_requested
from cxrdist.terminal import percentage

PATIENTS_PER_CLASS = 90  # recipes/demo.yaml has the time and the figures measured with these
IMAGE_SIZE_PX = 64
ORIGINAL_SIZE_PX = 2 * IMAGE_SIZE_PX
EXPLAINED_IMAGES = 18
LUNGS_PATIENTS_PER_CLASS = 160
SMOKE_TEST = (
    "a smoke test, not a result: it shows that all steps work with your images. The network is "
    f"trained for minutes, from random weights, on squares of {IMAGE_SIZE_PX} px; for meaningful "
    "results use cxrdist pack and cxrdist train"
)
FAINT = 0.55
"""Density of opacities in images with words, relative to the usual one: low enough that a network
prefers to learn the word."""


def demo(config: DemoConfig) -> None:
    """Run pack, train on all GPUs of the machine, evaluate, explain and report."""
    _refuse_bad_options(config)
    try:
        _run_steps(config)
    except Stopped as stop:
        line = f"stopped on {stop_requested()}; a demo does not resume: remove {config.out}"
        raise Stopped(f"{line}, then run the same command again") from stop


def _run_steps(config: DemoConfig) -> None:
    if config.source == "folder":
        print(SMOKE_TEST)
    images, pattern, masks = config.input, config.patient_pattern, None
    if images is None:
        images, pattern = config.out / "images", PATIENT_PATTERN
        masks = _draw_phantoms(config.recipe, images, config.out / "masks")
    shards, run, cache = (config.out / name for name in ("shards", "run", "cache"))
    pack(
        PackConfig(
            "folder",
            images,
            shards,
            size=IMAGE_SIZE_PX,
            split="0.6/0.15/0.25",
            patient_pattern=pattern,
            masks=masks,
        )
    )
    _train_on_all_ranks(config.recipe, shards, run, cache)
    if config.source == "folder":
        trained = RunDirectory(run)
        write_json(trained.info, {**read_info(trained), "smoke_test": True})
    evaluate(EvaluateConfig(run, shards, cache=cache))
    explain(ExplainConfig(run, shards, cache=cache, limit=EXPLAINED_IMAGES))
    if config.source == "phantom":
        _print_relevance_in_opacities(images / "opacities.csv", shards, run)
        boxes = config.out / "boxes.csv"
        write_word_boxes(images / "opacities.csv", boxes, ORIGINAL_SIZE_PX)
        probe_text(ProbeTextConfig(run, shards, boxes=boxes, cache=cache))
    report(ReportConfig(run))
    if config.source == "folder":
        print(SMOKE_TEST)


def _refuse_bad_options(config: DemoConfig) -> None:
    if config.out.exists():
        raise CxrdistError(f"--out {config.out}: already exists; remove it or choose another name")
    if (config.source == "folder") != (config.input is not None):
        raise CxrdistError(
            "demo: --source folder and --input DIR go together; give both, or neither for "
            "synthetic X-rays"
        )
    if config.source == "folder" and config.recipe == "lungs":
        raise CxrdistError(
            "demo: --recipe lungs is for synthetic X-rays; pack yours with --masks and train with "
            "--config lungs"
        )


def _draw_phantoms(recipe: str, images: Path, masks: Path) -> Path | None:
    """Draw the recipe's synthetic X-rays; return the folder of their masks if it needs any."""
    count = PATIENTS_PER_CLASS if recipe == "demo" else LUNGS_PATIENTS_PER_CLASS
    print(f"making synthetic X-rays of {3 * count} patients")
    if recipe == "demo":
        write_phantoms(images, count, ORIGINAL_SIZE_PX)
        return None
    write_phantoms(images, count, ORIGINAL_SIZE_PX, word_share=1.0, beside_word=FAINT)
    write_lung_masks(images, masks)
    return masks


def _train_on_all_ranks(recipe: str, shards: Path, run: Path, cache: Path) -> None:
    """Launch the training as a user would: a rank per GPU, or two CPU ranks."""
    num_gpus = torch.cuda.device_count()
    ranks = num_gpus or 2
    environment = dict(os.environ)
    if not num_gpus:
        environment["ACCELERATE_USE_CPU"] = "yes"
        # accelerate launch would give each rank one thread.
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # accelerate launch warns of each of the first four options that it has to assume. Port 0 is
    # any free one. `--multi_gpu` starts CPU ranks, too (launch/cpu.yaml).
    command = [
        *(sys.executable, "-m", "cxrdist.launch"),
        *("--num_machines", "1", "--num_processes", str(ranks), "--dynamo_backend", "no"),
        *("--mixed_precision", "bf16" if num_gpus else "no", "--main_process_port", "0"),
        *(["--multi_gpu"] if ranks > 1 else []),
        *("-m", "cxrdist", "train", "--config", recipe),
        *("--shards", str(shards), "--run", str(run), "--cache", str(cache)),
    ]
    print(f"training on {ranks} {'GPU' if num_gpus else 'CPU'} ranks", flush=True)
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise RunFailedError(f"the training ended with exit code {code}; see its message above")


def _print_relevance_in_opacities(table: Path, shards: Path, run: Path) -> None:
    """Print the share of the positive relevance for the true class that lies in the opacities."""
    boxes = _planted_boxes(table, "opacity")
    shares, areas = [], []
    for sample in read_index(shards).samples:
        file = run / "test" / "relevance" / f"{sample.key}.npz"
        if sample.path not in boxes or not file.is_file():
            continue
        with np.load(file) as data:
            relevance = data["relevance"][data["classes"].tolist().index(sample.label)]
        positive = np.clip(relevance, 0, None)
        if positive.any():
            inside = _inside(boxes[sample.path], len(relevance))
            shares.append(positive[inside].sum() / positive.sum())
            areas.append(inside.mean())
    if not shares:
        print("no explained image with opacities has positive relevance for its class")
        return
    share, area = np.mean(shares), np.mean(areas)
    print(
        f"positive relevance in the planted opacities: {percentage(share)}%, by chance "
        f"{percentage(area)}% (their area): {share / area:.2f} times chance, mean of {len(shares)} "
        "test images"
    )


def write_word_boxes(table: Path, out: Path, image_size_px: int) -> None:
    """Write the boxes of words in a table of `write_phantoms`, as `cxrdist find-text` does."""
    boxes = {
        path: [scaled(Box(x, y, w, h, WORD), image_size_px, image_size_px) for x, y, w, h in words]
        for path, words in _planted_boxes(table, "word").items()
    }
    write_boxes(out, boxes)


def _planted_boxes(table: Path, kind: str) -> dict[str, list[NDArray[np.float64]]]:
    """Return x, y, width, height of each image's opacities or words, as fractions of its side."""
    boxes = defaultdict(list)
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["kind"] == kind:
                box = [float(row[name]) for name in ("x", "y", "width", "height")]
                boxes[row["path"]].append(np.array(box))
    return boxes


def _inside(boxes: list[NDArray[np.float64]], size_px: int) -> NDArray[np.bool_]:
    """Return the pixels in any of the boxes, bool [size_px, size_px]."""
    centres = (np.arange(size_px) + 0.5) / size_px
    inside = np.zeros((size_px, size_px), dtype=bool)
    for x, y, width, height in boxes:
        columns = (centres >= x) & (centres <= x + width)
        rows = (centres >= y) & (centres <= y + height)
        inside |= rows[:, None] & columns[None, :]
    return inside
