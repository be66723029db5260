"""Folders for timm, torchxrayvision and the Hub, loaded as their own README says."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from model_run import CLASSES, SMALL, make_model, make_model_run
from safetensors.torch import load_file

from cxrdist.config import ExportConfig, Network
from cxrdist.data.index import read_index
from cxrdist.export.command import export
from cxrdist.files import read_json
from cxrdist.model.densenet import Classifier, load_model


def run_blocks(folder: Path) -> list[dict[str, Any]]:
    """Run each Python block of a README.md; the names that each leaves."""
    readme = (folder / "README.md").read_text()
    found = []
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        names: dict[str, Any] = {}
        exec(block.replace("FOLDER", str(folder)), names)
        found.append(names)
    return found


def as_described(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Images as config.json says that timm takes them."""
    config = read_json(folder / "config.json")["pretrained_cfg"]
    channels = config["input_size"][0]
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return ((images.float() / 255).expand(-1, channels, -1, -1) - mean) / std


def images_and_logits(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Three random images and what the model itself says of them."""
    model = load_model(run)
    size = (3, 1, model.image_size_px, model.image_size_px)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.manual_seed(5))
    with torch.inference_mode():
        return images, model(images)


@pytest.mark.parametrize(
    "model",
    [
        *(Network(4, (2, 2, 2, 2), architecture=f"densenet{n}") for n in (121, 169, 201)),
        *(Network(architecture=name) for name in ("resnet18", "convnext_atto")),
    ],
    ids=lambda network: network.architecture,
)
def test_timm_and_torchxrayvision_load_strictly_as_the_readme_says(
    model: Network, shards: Path, tmp_path: Path
) -> None:
    """Equal logits to 1e-5 on the library's own network; state dict under the library's names."""
    run = make_model_run(tmp_path / "run", make_model(model, 64), shards)
    out = tmp_path / "out"
    export(ExportConfig(run, "timm", out))
    images, expected = images_and_logits(run)
    loaded = run_blocks(out)
    assert len(loaded) == (2 if model.is_densenet else 1)
    for names in loaded:
        with torch.inference_mode():
            logits = names["model"](as_described(out, images))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    shape = {"growth_rate": 4, "block_config": (2, 2, 2, 2)} if model.is_densenet else {}
    own = timm.create_model(model.architecture, num_classes=3, **shape)
    own.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    assert read_json(out / "config.json")["label_names"] == CLASSES
    note = read_json(out / "cxrdist.json")
    assert note["normalisation"]["mean"] == [0.485, 0.456, 0.406]
    assert note["input"].endswith("then (x - mean) / std")  # as in `as_described`
    assert note["output"].startswith("logits: ")
    assert "calibrated_probabilities" not in note["output"]


def test_one_channel_is_torchxrayvisions_own_way(shards: Path, tmp_path: Path) -> None:
    """A network of one channel takes what ``torchxrayvision.datasets.normalize`` gives."""
    xrv = pytest.importorskip("torchxrayvision")
    run = make_model_run(tmp_path / "run", make_model(SMALL, channels=1), shards)
    out = tmp_path / "out"
    export(ExportConfig(run, "timm", out))
    images, expected = images_and_logits(run)
    theirs = torch.from_numpy(xrv.datasets.normalize(images.double().numpy(), 255)).float()
    assert (theirs.min(), theirs.max()) == (-1024, 1024)
    for names in run_blocks(out):
        with torch.inference_mode():
            torch.testing.assert_close(names["model"](theirs), expected, rtol=1e-5, atol=1e-4)


def test_the_hub_folder_is_complete_and_read_back(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Card with a valid head, weights, description; and no folder of this machine in any file."""
    model: Classifier = make_model()
    first = {"source": "https://example.org/a.pt", "trained_on": {"shards": "/home/me/s/cxr14"}}
    model.origin = {"source": "/home/me/runs/first", "started_from": first}
    run = make_model_run(tmp_path / "run", model, shards)
    out = tmp_path / "out"
    export(ExportConfig(run, "huggingface", out, shards))
    assert "\nb c: 4 positives\n" in capsys.readouterr().out  # it has no temperature
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "model.json", "config.json", "cxrdist.json", "README.md")
    }
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("cxrdist", "image-classification")
    assert "Parity: logits by cxrdist" in card.text
    assert "18 X-rays of the test split" in card.text
    assert "Classes without a temperature, which are not calibrated: b c.\n" in card.text
    parity = read_json(out / "cxrdist.json")["parity"]
    assert (parity["images"], parity["index_sha256"]) == (18, read_index(shards).sha256)
    assert read_json(out / "cxrdist.json")["input"].endswith("then (x - mean) / std")
    assert "which overwrites it" not in card.text
    images, expected = images_and_logits(run)
    ours, theirs, _ = (names["model"] for names in run_blocks(out))
    with torch.inference_mode():
        assert torch.equal(ours(images), expected)
        logits = theirs(as_described(out, images))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert ours.calibration == model.calibration
    assert ours.origin["source"] == "first"
    assert ours.origin["started_from"]["trained_on"] == {"shards": "cxr14"}
    assert ours.origin["started_from"]["source"] == "https://example.org/a.pt"
    for file in out.iterdir():
        content = file.read_bytes()
        assert b"/home/me" not in content
        assert str(tmp_path).encode() not in content


def test_the_authors_own_card_is_kept(shards: Path, tmp_path: Path) -> None:
    """Their text stands before the part on the files."""
    run = make_model_run(tmp_path / "run", make_model(), shards)
    (run / "model" / "README.md").write_text("---\nlicense: mit\n---\n\n# Ours\n\nOur words.\n")
    export(ExportConfig(run, "huggingface", tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.text.index("Our words.") < card.text.index("## Use of these files")
