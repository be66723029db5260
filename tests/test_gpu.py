"""The same results on a GPU. Run with CXRDIST_TEST_GPUS=0 (the visible devices).

Without a GPU all but one run on the CPU: that proves nothing of a GPU, but keeps the tests alive.
"""

import json

import numpy as np
import pytest
import torch

from cxrdist.bench.gpu import WAYS
from cxrdist.cli import main
from cxrdist.config import Augmentation, Network
from cxrdist.data.cache import read_rows
from cxrdist.data.plan import plan_epoch
from cxrdist.explain.relevance import attribute
from cxrdist.model.augment import sampling_matrices, warp
from cxrdist.model.densenet import Classifier

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU, DenseNet121 would take a minute.
NETWORK = {} if DEVICE == "cuda" else {"growth_rate": 4, "block_config": [1, 1, 1, 1]}


def test_rows_and_warp_are_those_of_the_cpu():
    """Pinned copies bring the same bytes, and the warp differs by rounding only."""
    images = np.random.default_rng(0).integers(0, 256, (16, 64, 64), dtype=np.uint8)
    numbers = np.arange(16)[::-1].copy()
    plan = plan_epoch(numbers, np.ones(16, np.int64), Augmentation(), 16, (0, "gpu", 0))
    rows, warped = [], []
    for name in ("cpu", DEVICE):
        device = torch.device(name)
        there = read_rows(images, numbers, device)
        rows.append(there.cpu())
        warped.append(warp(there, sampling_matrices(plan.draws, 64, device)).cpu())
    assert torch.equal(*rows)
    assert torch.allclose(*warped, atol=0.05)


def test_relevance_is_that_of_the_cpu():
    """Maps of the two devices agree to 1e-3 of the maximum."""
    torch.manual_seed(0)
    model = Classifier(Network(), ["a", "b", "c"], 64)
    model(torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8))
    model.eval()
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    here = attribute(model, images).relevance
    there = attribute(model.to(DEVICE), images.to(DEVICE)).relevance.cpu()
    assert float((here - there).abs().max()) <= 1e-3 * float(here.abs().max())


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=needs_gpu)])
def test_training_runs_in_mixed_precision(shards, tmp_path, monkeypatch, precision):
    """A head stage and a full stage train on the GPU and publish a model."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    block = {"denseblock4": 1e-3, "head": 1e-3}
    stages = {
        "head": {"lr": {"head": 1e-3}, "epochs": 1, "patience": 1},
        "late": {"lr": block, "epochs": 1, "patience": 1},
    }
    recipe = {"stages": stages, "init": "none", "network": NETWORK}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ("train", "--config", tmp_path / "recipe.yaml", "--shards", shards)
    where = ("--run", tmp_path / "run", "--cache", tmp_path / "cache")
    assert main([str(argument) for argument in (*arguments, *where)]) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["device"].startswith(DEVICE)
    assert info["mixed_precision"] == precision
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@needs_gpu
def test_the_training_step_is_timed_in_all_ways(capsys, monkeypatch):
    """DenseNet121 eager, compiled, captured and both, with a batch that is captured by itself."""
    monkeypatch.setattr("cxrdist.bench.gpu.BATCHES", (9, 128))
    assert main(["bench", "--only", "gpu", "--size", "64", "--repeats", "2"]) == 0
    text = capsys.readouterr().out
    assert torch.cuda.get_device_name() in text
    for way in WAYS:
        assert sum(line.startswith(f"{way.name} ") for line in text.splitlines()) == 2
    assert "out of memory" not in text
