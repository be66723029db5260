"""Folders of weights for other libraries: timm, torchxrayvision and the Hugging Face Hub."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np
import timm
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from cxrdist import __version__
from cxrdist.data.index import Fit
from cxrdist.errors import CxrdistError
from cxrdist.export.note import ExportNote, Source, write_note
from cxrdist.export.parity import Parity, describe_parity, measure_parity
from cxrdist.files import atomic_directory, write_json, write_text
from cxrdist.info import WeightsInfo
from cxrdist.model.densenet import Classifier, read_model, save_model
from cxrdist.model.ensemble import Ensemble
from cxrdist.model.networks import output_layer
from cxrdist.report.card import OURS, read_card
from cxrdist.report.page import template

# timm's names for the ways to make an image square; it resamples differently from cxrdist.
CROP_MODES: dict[Fit, Literal["center", "squash", "border"]] = {
    "crop": "center",
    "stretch": "squash",
    "pad": "border",
}


class PretrainedConfig(TypedDict):
    """The settings of weights that timm needs."""

    input_size: list[int]
    mean: list[float]
    std: list[float]
    interpolation: Literal["bilinear"]
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    num_classes: int
    first_conv: str
    classifier: str


class LibraryConfig(TypedDict):
    """The content of config.json, in timm's form (``timm.models.load_model_config_from_path``)."""

    architecture: str
    num_classes: int
    label_names: list[str]
    model_args: NotRequired[dict[str, Any]]
    """Differences from the published network: its shape, or one input channel."""
    pretrained_cfg: PretrainedConfig


def write_timm(source: Source, out: Path) -> ExportNote:
    """Write a folder that ``timm.create_model("local-dir:OUT", pretrained=True)`` loads strictly.

    It contains model.safetensors under timm's names, config.json for timm, cxrdist.json with the
    note, and README.md. torchxrayvision uses the same names for the weights of its DenseNet.

    Raises:
        CxrdistError: the model is an ensemble, or timm does not have the network.
        RunFailedError: the logits of timm's network differ.
    """
    model = _one_network(source.model, "timm")
    if not timm.is_model(model.shape.architecture):
        raise CxrdistError(
            f"--to timm: timm has no {model.shape.title}, only torchvision has; use --to onnx, "
            "torch-export or huggingface"
        )
    with atomic_directory(out) as folder:
        (folder / "model.safetensors").write_bytes(save(model.network.state_dict()))
        write_json(folder / "config.json", library_config(model))
        network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        logits_of = _logits_of(network, model.normalise)
        note = _compare(source, model, logits_of, f"timm {version('timm')}")
        write_json(folder / "cxrdist.json", note)
        section = _section(model, note["parity"], "timm")
        card = f"# Weights of {model.shape.title} for timm\n\n{section}"
        write_text(folder / "README.md", card)
    return note


def write_huggingface(source: Source, out: Path) -> ExportNote:
    """Write a folder that ``huggingface_hub.upload_folder`` can publish unchanged.

    It contains model.safetensors and model.json, which `load_model` reads; config.json, by which
    the Hub counts downloads and timm loads networks that it has; cxrdist.json with the note; and
    README.md, the model card of the run. None of them names a folder of this machine.

    Raises:
        CxrdistError: the model is an ensemble, or the run has no run.json.
        RunFailedError: the logits of the weights that were read back differ.
    """
    model = _one_network(source.model, "huggingface")
    card = read_card(source.run).replace(f"{OURS}\n", "")
    with atomic_directory(out) as folder:
        origin = model.origin
        model.origin = without_folders(origin)
        save_model(model, folder)
        model.origin = origin
        write_json(folder / "config.json", library_config(model))
        logits_of = _logits_of(read_model(folder), lambda images: images)
        note = _compare(source, model, logits_of, f"cxrdist {__version__}")
        write_json(folder / "cxrdist.json", note)
        text = f"{card.rstrip()}\n\n{_section(model, note['parity'], 'huggingface')}"
        write_text(folder / "README.md", text)
    return note


def _compare(
    source: Source,
    model: Classifier,
    logits_of: Callable[[Tensor], NDArray[np.float32]],
    runtime: str,
) -> ExportNote:
    """Compare the logits of a folder's network with PyTorch's, and describe it.

    Raises:
        RunFailedError: they differ.
    """
    parity = measure_parity(model, logits_of, source.squares, runtime)
    return write_note(source, parity, in_graph=False)


def _one_network(model: Classifier | Ensemble, target: str) -> Classifier:
    """Return the network of a model.

    Raises:
        CxrdistError: the model is an ensemble.
    """
    if isinstance(model, Ensemble):
        raise CxrdistError(
            f"--to {target}: expected one network, but --run is an ensemble of {len(model.names)}; "
            f"give a member, such as RUN/{model.names[0]}, or use --to onnx or torch-export"
        )
    return model


def _logits_of(
    network: nn.Module, prepare: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], NDArray[np.float32]]:
    return lambda images: cast(NDArray[np.float32], network(prepare(images)).numpy())


def library_config(model: Classifier) -> LibraryConfig:
    """Describe a network in the form of timm."""
    mean, std = model.normalisation.mean, model.normalisation.std
    modules = model.network.named_modules()
    content: LibraryConfig = {
        "architecture": model.shape.architecture,
        "num_classes": len(model.classes),
        "label_names": model.classes,
        "pretrained_cfg": {
            "input_size": [len(mean), model.image_size_px, model.image_size_px],
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[model.fit],
            "num_classes": len(model.classes),
            "first_conv": next(name for name, m in modules if isinstance(m, nn.Conv2d)),
            "classifier": output_layer(model.shape),
        },
    }
    arguments: dict[str, Any] = {"in_chans": len(mean)} if len(mean) != 3 else {}
    if model.shape.is_densenet:
        growth_rate, block_config = model.shape.dense_shape
        arguments |= {"growth_rate": growth_rate, "block_config": list(block_config)}
    if arguments:
        content["model_args"] = arguments
    return content


def without_folders(origin: WeightsInfo | None) -> WeightsInfo | None:
    """Remove the names of this machine's folders from the origin of weights."""
    if origin is None:
        return None
    source = origin["source"]
    copy: WeightsInfo = {**origin, "source": source if "://" in source else Path(source).name}
    if trained_on := origin.get("trained_on"):
        shards = trained_on.get("shards")
        copy["trained_on"] = {**trained_on, "shards": shards and Path(shards).name}
    copy["started_from"] = without_folders(origin.get("started_from"))
    return copy


def _section(model: Classifier, parity: Parity, target: str) -> str:
    """Render the README's section on how to load the weights, and their parity with PyTorch."""
    content = {
        "model": model,
        "channels": len(model.normalisation.mean),
        "parity": describe_parity(parity),
        "target": target,
        "in_timm": timm.is_model(model.shape.architecture),
    }
    return template("export.md.jinja").render(content)
