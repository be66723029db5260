"""Bench: this machine, side by side in one run, as ratios."""

import contextlib
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation
import numpy as np
import torch
import webdataset
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from zennit.composites import EpsilonPlusFlat

from cxrdist.config import Augmentation, BenchConfig, Network, PackConfig, Stage, TrainConfig
from cxrdist.data.audit import Entry, audit
from cxrdist.data.cache import map_images, read_rows
from cxrdist.data.duplicates import find_duplicates
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.images import encode_png, read_square
from cxrdist.data.pack import pack
from cxrdist.data.phantom import write_phantoms
from cxrdist.data.plan import plan_epoch
from cxrdist.data.sources import read_folder
from cxrdist.distributed import StopVote, start
from cxrdist.errors import CxrdistError
from cxrdist.explain.relevance import Explainer
from cxrdist.model.augment import sampling_matrices, warp
from cxrdist.model.densenet import Classifier, block_names
from cxrdist.run import RunDirectory, write_json
from cxrdist.terminal import progress, table
from cxrdist.train.stage import StageRun
from cxrdist.train.step import Batches, Material
from cxrdist.train.training import Training

CLASSES = ["COVID-19", "Normal", "Viral Pneumonia"]
BATCH = 9  # the paper's
MIN_ORIGINALS = 500


class Contender(NamedTuple):
    """One way to do a job; `work` does it once and says how many images that were."""

    name: str
    work: Callable[[], int]
    num_threads: int


class Measured(NamedTuple):
    """Images a second of each round, and the peak of the process's resident memory, in MiB."""

    rates: list[float]
    peak_mib: float


def bench(config: BenchConfig) -> None:
    """Measure each job, all contenders in turn in each round, as ratios to the first one.

    That is cxrdist's own way, and for LRP one gradient with respect to the input, its usual unit.

    Raises:
        CxrdistError: a measurement is unknown or the folder cannot be used.
    """
    jobs: dict[str, Callable[[BenchConfig, Path], list[Contender]]] = {
        "pack": _pack,
        "pack-workers": _pack_workers,
        "read": _read,
        "warp": _warp,
        "train": _train,
        "frozen": _frozen,
        "lrp": partial(_lrp, 0.0),
        "lrp-signs": partial(_lrp, 0.15),
    }
    chosen = config.only.split(",") if config.only else list(jobs)
    for name in chosen:
        if name not in jobs:
            raise CxrdistError(f"--only: no measurement {name!r}; expected {', '.join(jobs)}")
    if config.repeats < 1:
        raise CxrdistError(f"--repeats {config.repeats}: expected at least 1")
    rows = []
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as scratch:
            contenders = jobs[name](config, Path(scratch))
            rows += _rows(name, contenders, _measure(name, contenders, config.repeats))
    headers = ("job", "way", "images/s", "first / this", "min..max", "peak MiB")
    print(table(rows, headers))


def _measure(name: str, contenders: list[Contender], repeats: int) -> list[Measured]:
    """Warm each contender up once, then let them take turns, so that drift hits all alike."""
    rates: list[list[float]] = [[] for _ in contenders]
    peaks = [0.0] * len(contenders)
    with progress((repeats + 1) * len(contenders), name, "runs") as bar:
        for turn in range(repeats + 1):
            for i, contender in enumerate(contenders):
                torch.set_num_threads(contender.num_threads)
                _reset_peak()
                began = time.perf_counter()
                with _quiet():
                    num_images = contender.work()
                seconds = time.perf_counter() - began
                if turn:
                    rates[i].append(num_images / seconds)
                    peaks[i] = max(peaks[i], _peak_mib())
                bar.update()
    return [Measured(r, p) for r, p in zip(rates, peaks, strict=True)]


def _rows(name: str, contenders: list[Contender], measured: list[Measured]) -> list[list[str]]:
    rows = []
    for contender, found in zip(contenders, measured, strict=True):
        ratios = [a / b for a, b in zip(measured[0].rates, found.rates, strict=True)]
        first = found is measured[0]
        rows.append(
            [
                name if first else "",
                contender.name,
                f"{statistics.median(found.rates):,.1f}",
                "" if first else f"{statistics.median(ratios):.2f}",
                "" if first else f"{min(ratios):.2f}..{max(ratios):.2f}",
                f"{found.peak_mib:,.0f}",
            ]
        )
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """Peak resident memory since `_reset_peak`, from the kernel's VmHWM in kB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _originals(config: BenchConfig, scratch: Path) -> Path:
    """Class folders of at least 500 originals, links to few taken in turn."""
    folder = config.input
    if folder is None:
        folder = scratch / "phantoms"
        write_phantoms(folder, 8, image_size_px=1024)
    records = read_folder(folder).records
    for turn in range(-(-MIN_ORIGINALS // len(records))):
        for record in records:
            link = scratch / "originals" / record.label / f"{turn}-{record.file.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(record.file.resolve())
    return scratch / "originals"


def _packing(config: BenchConfig, folder: Path, out: Path, workers: int) -> Callable[[], int]:
    count = len(read_folder(folder).records)
    options = PackConfig(
        "folder", folder, out, size=config.size, split="0.6/0.2/0.2", workers=workers
    )

    def work() -> int:
        shutil.rmtree(out, ignore_errors=True)
        pack(options)
        return count

    return work


def _pack(config: BenchConfig, scratch: Path) -> list[Contender]:
    """Packing on one core against its unavoidable part, its audit, and a plain script."""
    folder = _originals(config, scratch)
    records = read_folder(folder).records
    squares = [read_square(record.file, config.size, "crop") for record in records]

    def alone() -> int:
        for record in records:
            encode_png(read_square(record.file, config.size, "crop"))
        return len(records)

    def audit_alone() -> int:
        prints = [fingerprint(square) for square in squares]
        duplicates = find_duplicates(prints, squares.__getitem__)
        entries = [
            Entry(str(i), r.path, "train", r.label, r.patient, r.source, r.view, 1, 1, found)
            for i, (r, found) in enumerate(zip(records, prints, strict=True))
        ]
        audit(
            entries,
            duplicates,
            squares.__getitem__,
            sorted({r.label for r in records}),
            "multiclass",
        )
        return len(records)

    def plain() -> int:
        pattern = str(scratch / "plain-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=1000, verbose=0) as writer:
            for i, record in enumerate(records):
                image = Image.open(record.file).convert("L")
                image = image.resize((config.size, config.size), Image.Resampling.BILINEAR)
                writer.write({"__key__": f"{i:06d}", "png": image, "txt": record.label})
        return len(records)

    return [
        Contender("cxrdist pack --workers 1", _packing(config, folder, scratch / "one", 1), 1),
        Contender("decode + resize + encode alone", alone, 1),
        Contender("the same and the audit alone", lambda: min(alone(), audit_alone()), 1),
        Contender("the audit alone", audit_alone, 1),
        Contender("Pillow + webdataset.ShardWriter", plain, 1),
    ]


def _pack_workers(config: BenchConfig, scratch: Path) -> list[Contender]:
    folder = _originals(config, scratch)
    return [
        Contender("cxrdist pack --workers 2", _packing(config, folder, scratch / "two", 2), 1),
        Contender("cxrdist pack --workers 1", _packing(config, folder, scratch / "one", 1), 1),
    ]


def _read(config: BenchConfig, scratch: Path) -> list[Contender]:
    """Shuffled batches of the paper's size from the memory map, against what else reads images."""
    count, size = 227 * BATCH, config.size
    random = np.random.Generator(np.random.Philox(0))
    np.save(scratch / "rows.npy", random.integers(0, 256, (count, size, size), dtype=np.uint8))
    images = map_images(scratch / "rows.npy")
    order = random.permutation(count).reshape(-1, BATCH)
    cpu = torch.device("cpu")
    folder = scratch / "folder"
    for i in range(64):
        file = folder / CLASSES[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(images[i]))
    dataset = ImageFolder(folder)

    def ours() -> int:
        for numbers in order:
            read_rows(images, numbers, cpu)
        return count

    def copy() -> int:
        for first in range(0, count, BATCH):
            images[first : first + BATCH].copy()
        return count

    def image_folder() -> int:
        for i in range(len(dataset)):
            np.asarray(dataset[i][0])
        return len(dataset)

    return [
        Contender("shuffled batches from the cache", ours, 1),
        Contender("plain memory copy", copy, 1),
        Contender("torchvision ImageFolder (Pillow)", image_folder, 1),
    ]


def _warp(config: BenchConfig, scratch: Path) -> list[Contender]:
    """The paper's augmentation of 64 images, on one core."""
    random = np.random.Generator(np.random.Philox(0))
    pixels = random.integers(0, 256, (64, 1, config.size, config.size), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    ones = np.ones(64, dtype=np.int64)
    plan = plan_epoch(np.arange(64), ones, Augmentation(), 64, (0, "bench", 0))
    shift = (40 / 224, 28 / 224)
    three = kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomRotation(40.0, p=1.0),
        kornia.augmentation.RandomTranslate((-shift[0], shift[0]), (-shift[1], shift[1]), p=1.0),
        kornia.augmentation.RandomHorizontalFlip(p=0.5),
        data_keys=["input"],
    )
    affine = kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomAffine(40.0, translate=shift, p=1.0),
        kornia.augmentation.RandomHorizontalFlip(p=0.5),
        data_keys=["input"],
    )

    matrices = sampling_matrices(plan.draws, config.size, images.device)

    def ours() -> int:
        return len(warp(images, matrices))

    return [
        Contender("cxrdist warp", ours, 1),
        Contender("Kornia rotation, shift, flip", lambda: len(three(images.float())), 1),
        Contender("Kornia RandomAffine, flip", lambda: len(affine(images.float())), 1),
    ]


def _stage_run(
    config: BenchConfig, scratch: Path, blocks: list[str], accelerator: Accelerator
) -> StageRun:
    """A stage of the real loop on random images; its epochs have four steps of nine images."""
    random = np.random.Generator(np.random.Philox(0))
    count = 4 * BATCH
    images: NDArray[np.uint8] = random.integers(
        0, 256, (count, config.size, config.size), dtype=np.uint8
    )
    stage = Stage(lr=dict.fromkeys(blocks, 1e-5), epochs=1, patience=1)
    recipe = TrainConfig(scratch, scratch / "run", {"bench": stage}, init="none")
    model = Classifier(Network(), CLASSES, config.size).to(accelerator.device)
    everyone, ones = np.arange(count), np.ones(count, dtype=np.int64)
    run = RunDirectory(scratch / "run")
    write_json(run.info, {"stages": {}})
    run.log.touch()
    material = Material(images, np.eye(3, dtype=np.uint8)[everyone % 3], "multiclass")
    val_plan = plan_epoch(everyone[:1], ones[:1], recipe.augmentation, 1, (0, "val", 0))
    training = Training(
        accelerator=accelerator,
        run=run,
        recipe=recipe,
        model=model,
        material=material,
        samples=everyone,
        copies=ones,
        validation=Batches(material, val_plan, accelerator.device),
        vote=StopVote(accelerator),
    )
    with _quiet():
        return StageRun(training, "bench", None)


def _loop(stage: StageRun) -> Callable[[], int]:
    def work() -> int:
        stage.epoch = None
        with progress(0, "", "images", show=False) as bar:
            stage.train_epoch(bar)
        return stage.training.num_images

    return work


def _train(config: BenchConfig, scratch: Path) -> list[Contender]:
    """A training step of the real loop against a bare PyTorch step on ready tensors.

    The loop checks each step for what is not finite and asks whether it was told to stop. By
    default it saves after a thousand steps: the ratio of a save, in steps, over a thousand is its
    cost.
    """
    accelerator = start()
    threads = torch.get_num_threads()
    model = Classifier(Network(), CLASSES, config.size)
    stage = _stage_run(config, scratch, block_names(model.network), accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    inputs = torch.randn(BATCH, 3, config.size, config.size)
    targets = torch.zeros(BATCH, 3)

    def bare() -> int:
        model.train()
        for _ in range(4):
            loss = nn.functional.binary_cross_entropy_with_logits(model.network(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return 4 * BATCH

    def save() -> int:
        stage.save(None)
        return BATCH

    return [
        Contender("cxrdist train, whole loop", _loop(stage), threads),
        Contender("bare PyTorch step", bare, threads),
        Contender("a save, as if it were a step", save, threads),
    ]


def _frozen(config: BenchConfig, scratch: Path) -> list[Contender]:
    """The head's stage, its trunk frozen, against a forward pass alone."""
    accelerator = start()
    threads = torch.get_num_threads()
    stage = _stage_run(config, scratch, ["head"], accelerator)
    model = Classifier(Network(), CLASSES, config.size).eval()
    inputs = torch.randn(BATCH, 3, config.size, config.size)

    @torch.no_grad()
    def bare() -> int:
        for _ in range(4):
            model.network(inputs)
        return 4 * BATCH

    return [
        Contender("cxrdist train, frozen trunk", _loop(stage), threads),
        Contender("bare forward", bare, threads),
    ]


def _lrp(negative: float, config: BenchConfig, scratch: Path) -> list[Contender]:
    """Relevance maps in gradients with respect to the input, by the engine and by zennit.

    A share of the BatchNorms' scales is negative, which costs the engine a second convolution.
    """
    threads = torch.get_num_threads()
    model = Classifier(Network(), CLASSES, config.size)
    images = torch.randint(0, 256, (2, 1, config.size, config.size), dtype=torch.uint8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[torch.rand_like(module.weight) < negative] *= -1
                module.momentum = None
        model(images)
    model.eval()
    engine, canonical = Explainer(model), Explainer(model, composite="canonical")

    def gradient() -> int:
        inputs = model.normalise(images).requires_grad_()
        torch.autograd.grad(model.network(inputs)[:, 0].sum(), inputs)
        return len(images)

    def bare() -> int:
        inputs = model.normalise(images).requires_grad_()
        with EpsilonPlusFlat(epsilon=0.1).context(model.network):
            torch.autograd.grad(model.network(inputs)[:, 0].sum(), inputs)
        return len(images)

    return [
        Contender("one input gradient", gradient, threads),
        Contender("LRP, one class", lambda: len(engine.attribute(images, [0]).logits), threads),
        Contender("LRP, three classes", lambda: len(engine.attribute(images).logits), threads),
        Contender(
            "zennit, untangled, one class",
            lambda: len(canonical.attribute(images, [0]).logits),
            threads,
        ),
        Contender("zennit, bare composite (a wrong map)", bare, threads),
    ]
