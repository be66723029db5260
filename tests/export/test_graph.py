"""Graphs of other programs, from uint8 images to probabilities, run by those programs."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from model_run import CALIBRATION, CLASSES, make_ensemble_run, make_model, make_model_run

import cxrdist
from cxrdist.config import Architecture, ExportConfig, Network
from cxrdist.documents import parse_json, typed
from cxrdist.errors import CxrdistError
from cxrdist.export.command import export
from cxrdist.export.note import ExportNote
from cxrdist.model.ensemble import load_predictor

TINY = Network(growth_rate=4, block_config=(1, 1, 1, 1))
PACKAGE = str(Path(cxrdist.__file__).parent)


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
    given = [output.name for output in session.get_outputs()]
    assert given == ["logits", "calibrated_probabilities"]
    logits, probabilities = session.run(None, {"images": images.numpy()})
    return logits, probabilities, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("network", [TINY, Network(architecture="convnext_atto")])
def test_onnxruntime_computes_the_logits_and_calibrated_probabilities(
    network: Network, shards: Path, tmp_path: Path
) -> None:
    """Of any number of uint8 images; what is needed to use the file is its metadata."""
    run = make_model_run(tmp_path / "run", make_model(network, 64), shards)
    out = tmp_path / "model.onnx"
    export(ExportConfig(run, "onnx", out))
    for count in (1, 3):
        images = random_images(count, 64)
        logits, probabilities, metadata = run_onnx(out, images)
        expected_logits, expected_probabilities = expected_outputs(run, images)
        np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(probabilities, expected_probabilities, rtol=0, atol=1e-4)
    assert json.loads(metadata["classes"]) == CLASSES
    assert metadata["input"].startswith("images: uint8 [batch, 1, size, size]")
    assert "without a temperature are sigmoid(logit), not calibrated" in metadata["output"]
    assert json.loads(metadata["thresholds"]) == CALIBRATION.thresholds
    weights = (run / "model" / "model.safetensors").read_bytes()
    sha256 = hashlib.sha256(weights).hexdigest()
    assert json.loads(metadata["source_sha256"]) == {"model/model.safetensors": sha256}
    parity = json.loads(metadata["parity"])
    assert (parity["images"], parity["index_sha256"]) == (17, None)
    assert "not X-rays" in parity["source"]
    assert parity["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert PACKAGE.encode() not in out.read_bytes()


@pytest.mark.parametrize("architecture", ["resnet18", "alexnet", "squeezenet1_1"])
def test_torch_export_gives_the_same(
    architecture: Architecture, shards: Path, tmp_path: Path
) -> None:
    """Also of any number of images; the note in the file is what its type says."""
    model = make_model(Network(architecture=architecture), 64)
    run = make_model_run(tmp_path / "run", model, shards)
    out = tmp_path / "model.pt2"
    export(ExportConfig(run, "torch-export", out))
    inside = {"cxrdist.json": ""}
    program = torch.export.load(out, extra_files=inside).module()
    for count in (1, 3):
        images = random_images(count, 64)
        for found, expected in zip(program(images), expected_outputs(run, images), strict=True):
            np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-5)
    note = typed(parse_json(inside["cxrdist.json"].encode()), ExportNote)
    assert note["operating_points"] == "youden"
    assert note["input"].startswith("images: uint8 [batch, 1, size, size]")
    assert "calibrated_probabilities: float32" in note["output"]
    assert note["normalisation"] == model.normalisation
    with zipfile.ZipFile(out) as archive:
        small = [entry for entry in archive.infolist() if entry.file_size < 1 << 20]
        assert PACKAGE.encode() not in b"".join(map(archive.read, small))


def test_an_ensemble_is_one_graph(shards: Path, tmp_path: Path) -> None:
    """The logits are those of the mean of the members' calibrated probabilities."""
    models = [make_model(TINY, seed=seed) for seed in range(2)]
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
    run = make_model_run(tmp_path / "run", make_model(TINY), shards)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CxrdistError, match=r'onnxscript.*pip install "cxrdist\[export\]"'):
        export(ExportConfig(run, "onnx", tmp_path / "model.onnx"))
    assert not (tmp_path / "model.onnx").exists()
