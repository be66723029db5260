"""What tests share: small X-rays, shards, and processes that are real."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import forks
import numpy as np
import pytest
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cxrdist.config import PackConfig
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.files import write_json

LAUNCH = Path(__file__).parents[1] / "launch"
# ru_maxrss would not do: that of a child starts with the peak of its parent, here pytest's.
PRINT_PEAK = """
import atexit
from pathlib import Path
status = Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().split("VmHWM:")[1].split()[0]))
"""
LOG_EACH_STEP = "from cxrdist.train import loop; loop.STEPS_PER_LOG_ROW = 1\n"
RUN_CXRDIST = "import runpy; runpy.run_module('cxrdist', run_name='__main__')"


class Measured(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str
    mib: float
    """Its peak resident memory."""


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach a device, and apart from them views, which do not."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        (self.views if function.is_view else self.operations)[str(function)] += 1
        return function(*arguments, **(named or {}))


def make_images(folder: Path, counts: dict[str, int], size: int = 48, seed: int = 0) -> Path:
    """Class folders of noise; the brighter half tells the class. Two images a patient."""
    random = np.random.default_rng(seed)
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 128, (size, size + 8), dtype=np.uint8)
            third = size // len(counts)
            pixels[place * third : (place + 1) * third] += 100
            patient = f"{name[:2]}{i // 2:03d}"
            Image.fromarray(pixels).save(folder / name / f"{patient}_{i % 2}.png")
    return folder


def make_masks(images: Path, masks: Path) -> Path:
    """Masks of two of three images of `make_images`, each another rectangle."""
    for number, file in enumerate(sorted(images.glob("*/*.png"))):
        if number % 3:
            with Image.open(file) as image:
                pixels = np.zeros((image.height, image.width), bool)
            pixels[number % 20 : 30, 5 : 20 + number % 17] = True
            mask = masks / file.relative_to(images)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(mask)
    return masks


def make_shards(folder: Path, counts: dict[str, int], **options: object) -> Path:
    """Pack `make_images` at 32 px; with ``masks`` those of `make_masks` too."""
    source = make_images(folder / "images", counts)
    if options.pop("masks", False):
        options["masks"] = make_masks(source, folder / "masks")
    settings = {
        "size": 32,
        "split": "0.5/0.2/0.3",
        "patient_pattern": r"^(\w+)_",
        "workers": 1,
        **options,
    }
    pack(PackConfig("folder", source, folder / "shards", **settings))
    return folder / "shards"


def claim_shards(run: Path, shards: Path) -> Path:
    """Write a run.json that says that a run was trained on some shards."""
    index = read_index(shards)
    of_shards = {"path": str(shards), "index_sha256": index.sha256, "split": "", "task": index.task}
    of_shards |= {"image_size_px": index.image_size_px, "classes": index.classes}
    of_shards |= {"counts": index.counts(), "totals": index.totals()}
    about = {"format": "cxrdist-run-1", "started": "", "finished": None, "shards": of_shards}
    about |= {"weights": {"source": "random"}, "versions": {}, "git_revision": None}
    about |= {"world_size": 1, "device": "cpu", "mixed_precision": "no", "stages": {}}
    write_json(run / "run.json", about)
    return run


def contents(directory: Path) -> dict[str, str]:
    """Hashes of the files of a directory by name, but of the lock, which says who wrote last."""
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.name != ".lock")
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[], None]]:
    """Mount a disk of a size on a new folder; a call of what it gives makes room."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount")
    more = ["mount", "-o", "remount,size=50m", str(folder)]
    try:
        yield lambda: subprocess.run(more, check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run_ranks(world: int, *arguments: object, threads: int = 1) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` (a script or -m MODULE) as a group of forked gloo ranks."""
    return forks.run(world, list(map(str, arguments)), _environment(threads), threads)


def launch_ranks(world: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run what `run_ranks` runs by `accelerate launch`, which takes seconds to start."""
    return _run(_ranks(world, *arguments))


def start_ranks(world: int, *arguments: object) -> subprocess.Popen:
    """Start what `launch_ranks` runs, and do not wait for it."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(_ranks(world, *arguments), env=_environment(1), **quiet)


def _ranks(world: int, *arguments: object) -> list[str]:
    launch = [
        *("-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "cpu.yaml")),
        *("--num_processes", str(world), "--main_process_port", "0"),
    ]
    return [sys.executable, *(launch if world > 1 else []), *map(str, arguments)]


def run_command(*arguments: object, threads: int = 1) -> subprocess.CompletedProcess:
    """Run `cxrdist ARGUMENTS` in a forked process."""
    return run_ranks(1, "-m", "cxrdist", *arguments, threads=threads)


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a Python program in a forked process."""
    return run_ranks(1, "-c", script, *arguments)


def run_measured(script: str, *arguments: object) -> Measured:
    """Run a script, such as `RUN_CXRDIST`, in a new process; one that hangs fails."""
    command = [sys.executable, "-c", PRINT_PEAK + script, *map(str, arguments)]
    done = _run(command, timeout=120)
    *lines, peak = done.stdout.splitlines()
    return Measured(done.returncode, "\n".join(lines), done.stderr, int(peak) / 1024)


def _run(command: list[str], timeout: float | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, env=_environment(1), timeout=timeout
    )


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "yes",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads),
    }
