"""Bench: measure ways to do the same job side by side on this machine, as ratios."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import kornia.augmentation
import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from zennit.composites import EpsilonPlusFlat

from cxrdist.bench.gpu import bench_gpu
from cxrdist.bench.measure import CPU, Contender, measure, quiet, rows_of, wait_for
from cxrdist.bench.stage import BATCH, CLASSES, stage_run, take_steps
from cxrdist.config import Augmentation, BenchConfig, Network, PackConfig
from cxrdist.data.audit import Entry, audit
from cxrdist.data.cache import read_rows
from cxrdist.data.class_folders import read_class_folders
from cxrdist.data.duplicates import find_duplicates
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.images import encode_png, read_square
from cxrdist.data.index import Sample
from cxrdist.data.pack import pack
from cxrdist.data.phantom import write_phantoms
from cxrdist.data.plan import plan_epoch
from cxrdist.data.regions import border
from cxrdist.distributed import start
from cxrdist.errors import CxrdistError, choices
from cxrdist.explain.background import share_of_contrast
from cxrdist.explain.relevance import Explainer
from cxrdist.model.augment import sampling_matrices, warp
from cxrdist.model.densenet import Classifier
from cxrdist.terminal import progress, table

GPU = "gpu"
MIN_ORIGINALS = 500
NUM_STEPS = 4
LUNGS_NETWORK, LUNGS_BATCH = Network(growth_rate=8, block_config=(2, 2, 2, 2)), 16
"""Of recipes/lungs.yaml, which takes images of 64 px."""


def bench(config: BenchConfig) -> None:
    """Measure each job: all ways to do it take turns, and are compared with the first one.

    The first is cxrdist's own way, except for LRP: its usual unit is one gradient with respect to
    the input. The job of the GPU has a table of its own, see `bench_gpu`.

    Raises:
        CxrdistError: a measurement is unknown, needs a GPU where there is none, or the folder
            cannot be used.
    """
    chosen = _chosen(config.only)
    rows = []
    for name in (name for name in chosen if name != GPU):
        with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as scratch:
            contenders = JOBS[name](config, Path(scratch))
            rows += rows_of(name, contenders, measure(name, contenders, config.repeats))
    if rows:
        print(table(rows, ("job", "way", "images/s", "first / this", "min..max", "peak MiB")))
    if GPU in chosen:
        bench_gpu(config)


def _chosen(only: str | None) -> list[str]:
    """List the measurements to run: those named, or all that this machine can run."""
    without_gpu = not torch.cuda.is_available()
    if not only:
        if without_gpu:
            print("gpu: left out, since PyTorch sees no CUDA device")
        return [*JOBS, *([] if without_gpu else [GPU])]
    chosen = only.split(",")
    for name in chosen:
        if name not in (*JOBS, GPU):
            raise CxrdistError(f"--only: no measurement {name!r}; {choices(name, (*JOBS, GPU))}")
    if GPU in chosen and without_gpu:
        raise CxrdistError(
            "--only gpu: PyTorch sees no CUDA device; run it on a machine with a GPU and a build "
            "of PyTorch for CUDA"
        )
    return chosen


def _originals(config: BenchConfig, scratch: Path) -> Path:
    """Make class folders with links to at least 500 originals; fewer are linked several times."""
    folder = config.input
    if folder is None:
        folder = scratch / "phantoms"
        write_phantoms(folder, 8, image_size_px=1024)
    records = read_class_folders(folder).records
    for turn in range(-(-MIN_ORIGINALS // len(records))):
        for number, record in enumerate(records):  # folders of splits may share file names
            link = scratch / "originals" / record.label / f"{turn}-{number}-{record.file.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(record.file.resolve())
    return scratch / "originals"


def _packing(config: BenchConfig, folder: Path, out: Path, workers: int) -> Contender:
    count = len(read_class_folders(folder).records)
    options = PackConfig(
        "folder", folder, out, size=config.size, split="0.6/0.2/0.2", workers=workers
    )

    def work() -> int:
        # pack has nothing to do if OUT is already packed with the same options.
        shutil.rmtree(out, ignore_errors=True)
        pack(options)
        return count

    return Contender(f"cxrdist pack --workers {workers}", work, 1)


def _pack(config: BenchConfig, scratch: Path) -> list[Contender]:
    """Return the ways to pack on one core: cxrdist, parts of it alone, and a plain script."""
    folder = _originals(config, scratch)
    records = read_class_folders(folder).records
    squares = [read_square(record.file, config.size, "crop") for record in records]

    def alone() -> int:
        for record in records:
            encode_png(read_square(record.file, config.size, "crop"))
        return len(records)

    def audit_alone() -> int:
        prints = [fingerprint(square) for square in squares]
        duplicates = find_duplicates(prints, squares.__getitem__)
        samples = [
            Sample(str(i), "train", "", r.label, r.patient, r.source, r.path, "", view=r.view)
            for i, r in enumerate(records)
        ]
        entries = [Entry(s, 1, 1, found) for s, found in zip(samples, prints, strict=True)]
        classes = sorted({r.label for r in records})
        audit(entries, duplicates, squares.__getitem__, classes, "multiclass")
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
        _packing(config, folder, scratch / "out", 1),
        Contender("decode + resize + encode alone", alone, 1),
        # Both return the number of images, so that min only joins the calls.
        Contender("the same and the audit alone", lambda: min(alone(), audit_alone()), 1),
        Contender("the audit alone", audit_alone, 1),
        Contender("Pillow + webdataset.ShardWriter", plain, 1),
    ]


def _pack_workers(config: BenchConfig, scratch: Path) -> list[Contender]:
    folder = _originals(config, scratch)
    return [_packing(config, folder, scratch / "out", workers) for workers in (2, 1)]


def _read(config: BenchConfig, scratch: Path) -> list[Contender]:
    """Return the ways to read batches of the paper's size: cxrdist's cache, a copy, image files."""
    count, size = 227 * BATCH, config.size
    random = np.random.Generator(np.random.Philox(0))
    np.save(scratch / "rows.npy", random.integers(0, 256, (count, size, size), dtype=np.uint8))
    images = np.asarray(np.load(scratch / "rows.npy", mmap_mode="r"))  # plain, like the cache's
    order = random.permutation(count).reshape(-1, BATCH)
    folder = scratch / "folder"
    for i in range(64):
        file = folder / CLASSES[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(images[i]))
    dataset = ImageFolder(folder)

    def ours() -> int:
        for numbers in order:
            read_rows(images, numbers, CPU)
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
    """Return the ways to augment 64 images as in the paper, on one core: cxrdist and Kornia."""
    random = np.random.Generator(np.random.Philox(0))
    pixels = random.integers(0, 256, (64, 1, config.size, config.size), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    ones = np.ones(64, dtype=np.int64)
    plan = plan_epoch(np.arange(64), ones, Augmentation(), 64, (0, "bench", 0))
    # The paper's, in px of 224: left or right, up or down.
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


def _train(config: BenchConfig, scratch: Path) -> list[Contender]:
    """Return the ways to train: the real loop, and a bare PyTorch step on ready tensors.

    The real loop also checks that each step is finite, and whether it was asked to stop. A save is
    measured as if it were a step. By default there is one every 1000 steps, so its share of the
    time is the ratio over 1000.
    """
    threads, stage = torch.get_num_threads(), stage_run(start(), scratch, config.size)
    with quiet(), progress(0, "", "images", show=False) as bar:
        stage.begin(bar)  # a save holds the best validation loss so far

    def save() -> int:
        stage.save(None)
        return BATCH

    return [
        Contender("cxrdist train, whole loop", lambda: take_steps(stage, NUM_STEPS), threads),
        Contender("bare PyTorch step", _bare_steps(config.size, trained=True), threads),
        Contender("a save, as if it were a step", save, threads),
    ]


def _frozen(config: BenchConfig, scratch: Path) -> list[Contender]:
    """Return the ways to train the head alone: the real loop, and a bare forward pass."""
    threads, stage = torch.get_num_threads(), stage_run(start(), scratch, config.size, ["head"])
    return [
        Contender("cxrdist train, frozen trunk", lambda: take_steps(stage, NUM_STEPS), threads),
        Contender("bare forward", _bare_steps(config.size, trained=False), threads),
    ]


def _bare_steps(size_px: int, *, trained: bool) -> Callable[[], int]:
    """Return a function that runs plain PyTorch steps, or forward passes alone."""
    accelerator = start()
    device = accelerator.device
    model = Classifier(Network(), CLASSES, size_px).train(trained).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    inputs = torch.randn(BATCH, 3, size_px, size_px, device=device)
    targets = torch.zeros(BATCH, 3, device=device)

    def run() -> int:
        for _ in range(NUM_STEPS):
            with accelerator.autocast(), torch.set_grad_enabled(trained):
                logits = model.network(inputs)
            if trained:
                loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        wait_for(device)
        return NUM_STEPS * BATCH

    return run


def _background(
    shape: Network, num_images: int, config: BenchConfig, scratch: Path
) -> list[Contender]:
    """Return the ways to train with a penalty for using the outer tenth, and without one.

    Training penalises relevance and gradient in alternate steps, so a round is two steps.
    """
    threads = torch.get_num_threads()
    model = Classifier(shape, CLASSES, config.size).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    images = torch.rand(num_images, 1, config.size, config.size) * 255
    targets = torch.eye(len(CLASSES)).repeat(num_images, 1)[:num_images]
    region = torch.from_numpy(border(config.size)).expand(num_images, 1, -1, -1)

    relevance, gradient, both = (
        partial(share_of_contrast, model, images, targets, region, turn) for turn in (0, 1, None)
    )

    def steps(*penalties: Callable[[], Tensor]) -> int:
        for penalty in penalties:
            loss = nn.functional.binary_cross_entropy_with_logits(model.logits(images), targets)
            (loss + penalty().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return num_images * len(penalties)

    return [
        Contender("plain step", lambda: steps(*[lambda: torch.zeros(1)] * 2), threads),
        Contender("with the background loss (lrp)", lambda: steps(relevance, gradient), threads),
        Contender("with the share of relevance", lambda: steps(relevance), threads),
        Contender("with the share of the gradient", lambda: steps(gradient), threads),
        Contender("with both in each step", lambda: steps(both), threads),
    ]


def _lrp(negative: float, config: BenchConfig, scratch: Path) -> list[Contender]:
    """Return the ways to explain: gradients of the input, relevance by the engine and by zennit.

    A fraction ``negative`` of the BatchNorms' scales is negative, which costs the engine a second
    convolution.
    """
    threads = torch.get_num_threads()
    model = Classifier(Network(), CLASSES, config.size)
    images = torch.randint(0, 256, (2, 1, config.size, config.size), dtype=torch.uint8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[torch.rand_like(module.weight) < negative] *= -1
                # None: the statistics become those of the one batch that follows.
                module.momentum = None
        model(images)
    model.eval()
    engine, canonical = Explainer(model), Explainer(model, composite="canonical")

    def gradient() -> int:
        inputs = model.normalise(images).requires_grad_()
        torch.autograd.grad(model.network(inputs)[:, 0].sum(), inputs)
        return len(images)

    def bare() -> int:
        with EpsilonPlusFlat(epsilon=0.1).context(model.network):
            return gradient()

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


JOBS: dict[str, Callable[[BenchConfig, Path], list[Contender]]] = {
    "pack": _pack,
    "pack-workers": _pack_workers,
    "read": _read,
    "warp": _warp,
    "train": _train,
    "frozen": _frozen,
    "background": partial(_background, Network(), BATCH),
    "background-small": partial(_background, LUNGS_NETWORK, LUNGS_BATCH),
    "lrp": partial(_lrp, 0.0),
    "lrp-signs": partial(_lrp, 0.15),
}
