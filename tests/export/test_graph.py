"""Graphs of other programs, from uint8 images to probabilities, run by those programs."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import pytest
import torch
from model_run import CALIBRATION, CLASSES, SMALL, make_ensemble_run, make_model, make_model_run

import cxrdist
from cxrdist.config import DENSENETS, Architecture, ExportConfig, Network
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError
from cxrdist.export.command import export
from cxrdist.model.ensemble import load_predictor

PACKAGE = str(Path(cxrdist.__file__).parent)


def small(architecture: str) -> Network:
    """The network; of a DenseNet a small one."""
    shape = (4, (2, 2, 2, 2)) if architecture in DENSENETS else (None, None)
    return Network(*shape, architecture=architecture)


def random_images(count: int, size_px: int) -> torch.Tensor:
    """Squares that the export itself has not seen."""
    generator = torch.Generator().manual_seed(7)
    shape = (count, 1, size_px, size_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def expected_outputs(run: Path, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits of PyTorch, and the probabilities of the formula: 1 / (1 + exp(-logit / T))."""
    with torch.inference_mode():
        logits = load_predictor(run)(images).double().numpy()
    temperatures = [CALIBRATION.temperatures.get(name, 1.0) for name in CLASSES]
    return logits, 1 / (1 + np.exp(-logits / temperatures))


def run_onnx(file: Path, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray, dict]:
    """Logits, probabilities and metadata, by onnxruntime alone."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    size_px = images.shape[2]
    assert (taken.name, taken.type) == ("images", "tensor(uint8)")
    assert taken.shape == ["batch", 1, size_px, size_px]
    logits, probabilities = session.run(["logits", "probabilities"], {"images": images.numpy()})
    return logits, probabilities, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_onnxruntime_computes_the_logits_and_calibrated_probabilities(
    architecture: str, shards: Path, tmp_path: Path
) -> None:
    """Of each architecture, of any number of uint8 images; what is needed to use it is inside."""
    run = make_model_run(tmp_path / "run", make_model(small(architecture), 64), shards)
    out = tmp_path / "model.onnx"
    export(ExportConfig(run, "onnx", out))
    for count in (1, 3):
        images = random_images(count, 64)
        logits, probabilities, metadata = run_onnx(out, images)
        expected_logits, expected_probabilities = expected_outputs(run, images)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(probabilities, expected_probabilities, rtol=0, atol=1e-4)
    assert json.loads(metadata["classes"]) == CLASSES
    assert json.loads(metadata["thresholds"]) == CALIBRATION.thresholds
    weights = (run / "model" / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    assert json.loads(metadata["source_sha256"]) == {"model/model.safetensors": sha256}
    parity = json.loads(metadata["parity"])
    assert (parity["images"], parity["index_sha256"]) == (17, None)
    assert "not X-rays" in parity["source"]
    assert parity["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert PACKAGE.encode() not in out.read_bytes()


def test_torch_export_gives_the_same_compared_on_the_test_split(
    shards: Path, tmp_path: Path
) -> None:
    """The file of torch.export holds the note; it says on how many images of which shards."""
    run = make_model_run(tmp_path / "run", make_model(), shards)
    out = tmp_path / "model.pt2"
    export(ExportConfig(run, "torch-export", out, shards))
    inside = {"cxrdist.json": ""}
    program = torch.export.load(out, extra_files=inside).module()
    for count in (1, 3):
        images = random_images(count, 32)
        for found, expected in zip(program(images), expected_outputs(run, images), strict=True):
            np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-6)
    parity = json.loads(inside["cxrdist.json"])["parity"]
    index = read_index(shards)
    assert parity["images"] == sum(sample.split == "test" for sample in index.samples) > 8
    assert parity["index_sha256"] == index.sha256
    with zipfile.ZipFile(out) as archive:
        content = b"".join(map(archive.read, archive.namelist()))
    assert PACKAGE.encode() not in content


def test_an_ensemble_is_one_graph(shards: Path, tmp_path: Path) -> None:
    """The logits are those of the mean of the members' calibrated probabilities."""
    models = [make_model(seed=seed) for seed in range(2)]
    run, out = make_ensemble_run(tmp_path / "run", models, shards), tmp_path / "mean.onnx"
    export(ExportConfig(run, "onnx", out))
    images = random_images(2, 32)
    logits, probabilities, metadata = run_onnx(out, images)
    with torch.inference_mode():
        members = [torch.stack([m(images)[:, i] for m in models]).double() for i in range(3)]
    temperatures = [CALIBRATION.temperatures.get(name, 1.0) for name in CLASSES]
    means = [torch.sigmoid(m / t).mean(0) for m, t in zip(members, temperatures, strict=True)]
    expected = torch.logit(torch.stack(means, 1)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    calibrated = 1 / (1 + np.exp(-expected / temperatures))
    np.testing.assert_allclose(probabilities, calibrated, rtol=0, atol=1e-5)
    assert len(json.loads(metadata["source_sha256"])) == 2


def test_a_missing_package_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work is done, with the extra to install."""
    run = make_model_run(tmp_path / "run", make_model(SMALL), shards)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CxrdistError, match=r'onnxscript.*pip install "cxrdist\[export\]"'):
        export(ExportConfig(run, "onnx", tmp_path / "model.onnx"))
    assert not (tmp_path / "model.onnx").exists()
