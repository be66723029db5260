"""launch/local.sh with stand-ins for the commands nvidia-smi and python: the ranks it starts."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support import LAUNCH

GPUS = "\n".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i}a2b3c4d)" for i in range(12))
MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-0a2b3c4d)
  MIG 3g.20gb     Device  0: (UUID: MIG-5f6a)
  MIG 3g.20gb     Device  1: (UUID: MIG-7b8c)"""


def started(folder: Path, listed: str | None, **environment: str) -> tuple[int, str]:
    """The ranks that local.sh asks for, and their kind: gpu or cpu.

    Args:
        folder: for the two commands.
        listed: what nvidia-smi prints; None if there is no such command.
        environment: all variables of the script but PATH.
    """
    scripts = {"python": 'echo "${ACCELERATE_USE_CPU:-no}" "$@"'}
    if listed is not None:
        scripts["nvidia-smi"] = f"cat <<'END'\n{listed}\nEND"
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("bash", "cat", "dirname", "grep", "nproc"):  # the whole PATH may have a driver's
        (folder / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [folder / "bash", LAUNCH / "local.sh", "train"],
        env={"PATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cpu, *words = done.stdout.split()
    assert words[-3:] == ["-m", "cxrdist", "train"]
    return int(words[words.index("--num_processes") + 1]), "cpu" if cpu == "yes" else "gpu"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1", (2, "gpu")),
        ("3", (1, "gpu")),
        ("10,11", (2, "gpu")),
        ("0, 1, 2", (3, "gpu")),
        ("GPU-0a2b3c4d,GPU-7a2b", (2, "gpu")),
        ("", (2, "cpu")),
        ("-1", (2, "cpu")),
        ("NoDevFiles", (2, "cpu")),
        ("0,1,2,-1,3", (3, "gpu")),
        ("0,12,1", (1, "gpu")),
        ("0,GPU-ffff,1", (1, "gpu")),
    ],
)
def test_a_rank_is_started_for_each_gpu_that_cuda_shows(tmp_path, visible, expected):
    """CUDA_VISIBLE_DEVICES counts up to its first invalid entry; none left means CPU ranks."""
    assert started(tmp_path, GPUS, CUDA_VISIBLE_DEVICES=visible) == expected


def test_mig_devices_count_like_gpus(tmp_path):
    """Their names are looked up in what the driver lists."""
    assert started(tmp_path, MIG, CUDA_VISIBLE_DEVICES="MIG-5f6a,MIG-7b8c") == (2, "gpu")


@pytest.mark.parametrize(("listed", "expected"), [(GPUS, (12, "gpu")), (None, (2, "cpu"))])
def test_all_gpus_are_taken_where_no_variable_limits_them(tmp_path, listed, expected):
    """One rank for each GPU of the driver; two CPU ranks where there is no driver."""
    assert started(tmp_path, listed) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (4, "gpu")),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, (2, "gpu")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-0a2b3c4d,4,-1"}, (2, "gpu")),
        ({"CUDA_VISIBLE_DEVICES": ""}, (2, "cpu")),
    ],
)
def test_without_nvidia_smi_slurm_tells_the_gpus(tmp_path, environment, expected):
    """Its number counts, or what it wrote into CUDA_VISIBLE_DEVICES."""
    assert started(tmp_path, None, SLURM_GPUS_ON_NODE="4", **environment) == expected


def test_the_number_of_ranks_can_be_given(tmp_path):
    """RANKS comes before the number of GPUs."""
    assert started(tmp_path, GPUS, CUDA_VISIBLE_DEVICES="0,1", RANKS="3") == (3, "gpu")
