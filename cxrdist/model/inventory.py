"""`cxrdist weights`: show the content of a checkpoint, and convert it to safetensors."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from cxrdist.config import WeightsConvertConfig, WeightsShowConfig
from cxrdist.documents import parse_json
from cxrdist.errors import CxrdistError
from cxrdist.files import atomic_file, refuse_unwritable
from cxrdist.info import origins
from cxrdist.model.description import WeightsNote
from cxrdist.model.layout import InitialWeights, check_fit, shape_of
from cxrdist.model.tensorfile import METADATA
from cxrdist.model.weights import read_weights


def show_weights(config: WeightsShowConfig) -> None:
    """Print the content of a checkpoint, after checking that it is a whole network."""
    for name, value in _rows(_read(config.file)):
        print(f"{name:<12}{value}")


def convert_weights(config: WeightsConvertConfig) -> None:
    """Write a checkpoint as safetensors under torchvision's names, with its labels and source."""
    if config.out.suffix != ".safetensors":
        raise CxrdistError(
            f"{config.out}: expected a name ending in .safetensors; choose another name"
        )
    refuse_unwritable(config.out)
    weights = _read(config.file)
    note: WeightsNote = {
        "layout": str(weights.record["layout"]),
        "labels": weights.labels,
        "normalisation": weights.normalisation,
        "started_from": weights.describe(len(weights.tensors)),
    }
    metadata = {"format": "pt", METADATA: json.dumps(note, default=asdict)}
    tensors = {k: v.contiguous() for k, v in {**weights.tensors, **weights.head}.items()}
    data = save(tensors, metadata)
    if config.out.exists():
        if not _is_same(config.out, data):
            raise CxrdistError(f"{config.out}: already exists; choose another name")
        print(f"{config.out}: is converted already")
        return
    with atomic_file(config.out) as partial:
        partial.write_bytes(data)
    print(f"{config.out}: {len(tensors)} tensors")


def _is_same(file: Path, data: bytes) -> bool:
    """Return whether a file of safetensors holds the same; the order in its header may differ."""
    try:
        return file.stat().st_size == len(data) and _parts(file.read_bytes()) == _parts(data)
    except ValueError:
        return False


def _parts(data: bytes) -> tuple[object, bytes]:
    """Return the header of safetensors, which follows its length in 8 bytes, and the tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return parse_json(data[8:end]), data[end:]


def _read(file: str) -> InitialWeights:
    if file == "none":
        raise CxrdistError("none: random weights have no file; give a checkpoint")
    weights = read_weights(file, "")
    check_fit(weights, shape_of(weights.tensors, file), file)
    return weights


def _rows(weights: InitialWeights) -> list[list[str]]:
    shape = shape_of(weights.tensors, weights.source)
    parameters = sum(
        tensor.numel()
        for name, tensor in {**weights.tensors, **weights.head}.items()
        if name.endswith((".weight", ".bias"))  # the statistics of BatchNorms are no parameters
    )
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in weights.tensors.values()})
    mean, std = weights.normalisation.mean, weights.normalisation.std
    outputs = len(next(iter(weights.head.values()), ()))
    rows = [
        ["source", weights.source],
        ["sha256", str(weights.record["sha256"])],
        ["layout", str(weights.record["layout"])],
        ["network", shape.title],
        ["tensors", f"{len(weights.tensors)} without the head, none missing or left over"],
        ["parameters", f"{parameters:,} ({', '.join(dtypes)})"],
        ["channels", str(weights.channels)],
        ["mean", ", ".join(f"{value:g}" for value in mean) + " (grey values 0 to 1)"],
        ["std", ", ".join(f"{value:g}" for value in std)],
        ["outputs", str(outputs) if outputs else "none: the file has no head"],
        ["labels", ", ".join(weights.labels) if weights.labels else "not known"],
    ]
    for before in origins(weights.record.get("started_from")):
        digits = before.get("sha256")  # random weights have none
        rows.append(["made from", before["source"] + (f" (sha256 {digits})" if digits else "")])
    return rows
