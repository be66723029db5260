"""Each supported network goes the whole way by the real commands, on two ranks, with a stop."""

import csv
import json
from pathlib import Path
from typing import get_args

import onnxruntime
import pytest
import torch
from support import make_shards, run_command, run_ranks
from torch.testing import assert_close

import cxrdist
from cxrdist.config import Architecture

# A stop request comes to all ranks at the fourth boundary, which is in the second epoch.
STOPPED = """
import itertools, sys
from cxrdist.cli import main
from cxrdist.distributed import StopVote
boundaries = itertools.count(1)
StopVote.passed = lambda self: next(boundaries) == 4
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """36 images of three classes; AlexNet takes none below 63 px."""
    return make_shards(tmp_path_factory.mktemp("packed"), dict.fromkeys("abc", 12), size=64)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_it_goes_the_whole_way(shards, tmp_path, architecture):
    """Trained on two ranks, stopped, resumed to the same bytes, evaluated, explained, exported."""
    run, whole, cache = (tmp_path / name for name in ("run", "whole", "cache"))
    train = ["train", "--config", "compare", "--network.architecture", architecture]
    train += ["--shards", shards, "--cache", cache, "--stages.all.epochs", "2"]
    train += ["--global-batch-size", "6"]
    # AdamW keeps two tensors per weight, for AlexNet half a gigabyte in each checkpoint.
    train += ["--optimizer", "sgd"] if architecture == "alexnet" else []
    train += ["--network.growth-rate", "8"] if architecture.startswith("densenet") else []
    done = run_ranks(2, "-c", STOPPED, *train, "--run", run)
    assert done.returncode == 75, done.stderr
    assert not (run / "model").exists()
    for folder in (run, whole):
        done = run_ranks(2, "-m", "cxrdist", *train, "--run", folder)
        assert done.returncode == 0, done.stderr
    weights, unbroken = ((f / "model" / "model.safetensors").read_bytes() for f in (run, whole))
    assert weights == unbroken

    where = ("--run", run, "--shards", shards, "--cache", cache)
    done = run_ranks(2, "-m", "cxrdist", "evaluate", *where)
    assert done.returncode == 0, done.stderr
    index = json.loads((shards / "index.json").read_text())
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    assert metrics["samples"] == index["splits"]["test"]["samples"]
    done = run_command("explain", *where, "--limit", "2")
    if architecture == "convnext_atto":  # it has no proven rules of relevance
        assert done.returncode == 2
        assert "cannot explain a ConvNeXt" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        with open(run / "test" / "relevance.csv", newline="") as file:
            pictures = {row["picture"] for row in csv.DictReader(file)}
        assert pictures <= {path.name for path in (run / "test" / "heatmaps").iterdir()}
        assert len(pictures) >= 2

    onnx = tmp_path / "model.onnx"
    done = run_command("export", "--run", run, "--shards", shards, "--to", "onnx", onnx)
    assert done.returncode == 0, done.stderr
    logits_are_those_of_pytorch(run, onnx)


def logits_are_those_of_pytorch(run: Path, onnx: Path) -> None:
    """Onnxruntime gives them for uint8 images, to 1e-4."""
    images = torch.randint(256, (3, 1, 64, 64), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    session = onnxruntime.InferenceSession(onnx)
    (first, *_) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        expected = cxrdist.load_model(run)(images)
    assert_close(torch.from_numpy(first), expected, atol=1e-4, rtol=0)
