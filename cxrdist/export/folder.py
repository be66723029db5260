"""Folders of weights for other libraries: timm, torchxrayvision and the Hugging Face Hub."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from torch import nn

from cxrdist import __version__
from cxrdist.errors import CxrdistError
from cxrdist.export.note import ExportNote, Source, describe_export
from cxrdist.export.parity import Parity, describe_parity
from cxrdist.files import atomic_directory, write_json, write_text
from cxrdist.info import WeightsInfo
from cxrdist.model.densenet import Classifier, read_model, save_model
from cxrdist.model.ensemble import Ensemble
from cxrdist.model.networks import output_layer
from cxrdist.report.card import OURS, read_card
from cxrdist.report.page import template

# timm's names for the ways to make an image square; it resamples differently from cxrdist.
CROP_MODES = {"crop": "center", "stretch": "squash", "pad": "border"}


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
        note = describe_export(
            source,
            lambda images: network(model.normalise(images)).numpy(),
            f"timm {version('timm')}",
            in_graph=False,
        )
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
    # The line says that cxrdist report overwrites the card, which does not hold for a copy.
    card = read_card(source.run).replace(f"{OURS}\n", "")
    with atomic_directory(out) as folder:
        # `save_model` writes it into model.json, and the source may be a local path.
        origin = model.origin
        model.origin = without_folders(origin)
        save_model(model, folder)
        model.origin = origin
        write_json(folder / "config.json", library_config(model))
        network = read_model(folder)
        note = describe_export(
            source, lambda images: network(images).numpy(), f"cxrdist {__version__}", in_graph=False
        )
        write_json(folder / "cxrdist.json", note)
        text = f"{card.rstrip()}\n\n{_section(model, note['parity'], 'huggingface')}"
        write_text(folder / "README.md", text)
    return note


def _one_network(model: Classifier | Ensemble, target: str) -> Classifier:
    """Return the network of a model; raise CxrdistError for an ensemble."""
    if isinstance(model, Ensemble):
        raise CxrdistError(
            f"--to {target}: expected one network, but --run is an ensemble of {len(model.names)}; "
            f"give a member, such as RUN/{model.names[0]}, or use --to onnx or torch-export"
        )
    return model


def library_config(model: Classifier) -> dict[str, Any]:
    """Describe a network in the form of timm (``timm.models.load_model_config_from_path``)."""
    mean, std = model.normalisation.mean, model.normalisation.std
    modules = model.network.named_modules()
    content: dict[str, Any] = {
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
            # timm finds the layers by these names when it adapts them to other channels or classes.
            "first_conv": next(name for name, m in modules if isinstance(m, nn.Conv2d)),
            "classifier": output_layer(model.shape),
        },
    }
    differences: dict[str, Any] = {"in_chans": len(mean)} if len(mean) != 3 else {}
    if model.shape.is_densenet:
        growth_rate, block_config = model.shape.dense_shape
        differences |= {"growth_rate": growth_rate, "block_config": list(block_config)}
    if differences:  # from the published network
        content["model_args"] = differences
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
    temperatures = model.calibration.temperatures if model.calibration else {}
    content = {
        "model": model,
        "channels": len(model.normalisation.mean),
        "parity": describe_parity(parity),
        "uncalibrated": [name for name in model.classes if name not in temperatures],
        "target": target,
        "in_timm": timm.is_model(model.shape.architecture),
    }
    return template("export.md.jinja").render(content)
