"""Export a network as one graph, from grey values to probabilities, for other programs."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cxrdist.errors import CxrdistError
from cxrdist.export.note import ExportNote, Source, describe_export
from cxrdist.files import atomic_file
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import Ensemble

NOTE_NAME = "cxrdist.json"  # the file name of the note in a .pt2 file
# An ONNX file is a protobuf message, which has less than 2 GiB; the graph itself takes some MB.
MOST_ONNX_BYTES = (1 << 31) - (64 << 20)


class Graph(nn.Module):
    """A model that returns logits and calibrated probabilities for uint8 images.

    The probabilities are the columns calibrated_CLASS of `cxrdist predict`, and prob_CLASS for a
    class without a temperature.
    """

    temperatures: Tensor

    def __init__(self, model: Classifier | Ensemble) -> None:
        super().__init__()
        self.model = model
        known = model.calibration.temperatures if model.calibration else {}
        temperatures = torch.tensor([known.get(name, 1.0) for name in model.classes])
        self.register_buffer("temperatures", temperatures)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities, float32 [B, classes], for uint8 images [B, 1, S, S]."""
        logits = self.model(images)
        return logits, torch.sigmoid(logits / self.temperatures)


def write_onnx(source: Source, out: Path) -> ExportNote:
    """Write one ONNX file that contains the weights, with the note as its metadata.

    Each member of the note is a metadata property; values other than text are JSON.

    Raises:
        CxrdistError: the weights are too large for one file.
        RunFailedError: the logits by onnxruntime differ.
    """
    import onnx

    num_bytes = sum(tensor.nbytes for tensor in source.model.state_dict().values())
    if num_bytes > MOST_ONNX_BYTES:
        raise CxrdistError(
            f"--to onnx: the weights have {num_bytes / 2**30:.1f} GiB, expected less than 2 GiB "
            "for an ONNX file; use --to torch-export, or export a member of the ensemble"
        )
    proto = to_onnx(Graph(source.model).eval())
    # Run without the note, which contains the result of this comparison.
    logits_of = _run_onnx(proto.SerializeToString())
    runtime = f"onnxruntime {version('onnxruntime')}"
    note = describe_export(source, logits_of, runtime, in_graph=True)
    for name, value in note.items():
        text = value if isinstance(value, str) else json.dumps(value, default=asdict)
        proto.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(proto, full_check=True)
    with atomic_file(out) as partial:
        partial.write_bytes(proto.SerializeToString())
    return note


def to_onnx(graph: Graph) -> Any:
    """Translate a graph into an ``onnx.ModelProto`` with a free batch size.

    The metadata of nodes are removed: PyTorch writes paths of this machine into them.
    """
    program = torch.onnx.export(
        graph,
        (_example(graph.model),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits", "calibrated_probabilities"],
        dynamic_shapes=({0: "batch"},),
        external_data=False,
        verbose=False,
    )
    proto = program.model_proto  # type: ignore[union-attr]
    for node in proto.graph.node:
        del node.metadata_props[:]
    return proto


def _run_onnx(model: bytes) -> Callable[[Tensor], NDArray[np.float32]]:
    """Open a model in onnxruntime, with as many threads as PyTorch has."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


def write_torch_export(source: Source, out: Path) -> ExportNote:
    """Write a torch.export file, which PyTorch runs without cxrdist and timm.

    The note is an extra file in it, `NOTE_NAME`.

    Raises:
        RunFailedError: the logits of the file differ.
    """
    program = to_program(Graph(source.model).eval())
    # Through bytes and back, as its users get it; the note with the result is added afterwards.
    loaded = torch.export.load(io.BytesIO(_saved(program))).module()
    runtime = f"torch.export {torch.__version__}"
    note = describe_export(source, lambda images: loaded(images)[0].numpy(), runtime, in_graph=True)
    content = json.dumps(note, default=asdict, indent=2)
    with atomic_file(out) as partial:
        partial.write_bytes(_saved(program, {NOTE_NAME: content}))
    return note


def to_program(graph: Graph) -> ExportedProgram:
    """Trace a graph with a free batch size.

    Stack traces are removed from its nodes: they contain paths of this machine.
    """
    shapes = ({0: Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(graph, (_example(graph.model),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _example(model: Classifier | Ensemble) -> Tensor:
    """Return two images; torch.export would take a batch of one for a fixed size."""
    return torch.zeros(2, 1, model.image_size_px, model.image_size_px, dtype=torch.uint8)


def _saved(program: ExportedProgram, extra_files: dict[str, str] | None = None) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=extra_files)
    return content.getvalue()
