"""The command export: write a trained model as a file or folder for other programs."""

from cxrdist.config import ExportConfig
from cxrdist.errors import CxrdistError, require_modules
from cxrdist.export.folder import write_huggingface, write_timm
from cxrdist.export.graph import write_onnx, write_torch_export
from cxrdist.export.note import Source
from cxrdist.export.parity import describe_parity, read_squares
from cxrdist.files import refuse_unwritable
from cxrdist.model.ensemble import load_predictor
from cxrdist.precision import use_full_float32
from cxrdist.run import RunDirectory

WRITERS = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "timm": write_timm,
    "huggingface": write_huggingface,
}
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def export(config: ExportConfig) -> None:
    """Write OUT, after checking that its logits are those of PyTorch.

    Raises:
        CxrdistError: run, shards or OUT cannot be used, or the format has no such network.
        RunFailedError: the exported network's logits differ; nothing is written.
    """
    _refuse_bad_out(config)
    if config.to == "onnx":
        require_modules("export", "onnx", "onnxscript", "onnxruntime", option="--to onnx")
    model = load_predictor(config.run)
    use_full_float32()
    source = Source(RunDirectory(config.run), model, read_squares(config.shards, model))
    note = WRITERS[config.to](source, config.out)
    if model.calibration is None:
        print(
            "probabilities are not calibrated and there are no thresholds: run `cxrdist evaluate` "
            "on the shards of the training once, then export again"
        )
    elif model.calibration.reasons:
        print("classes without a temperature or a threshold, which are not calibrated or called:")
        for name, reason in model.calibration.reasons.items():
            print(f"{name}: {reason}")
    print(f"{config.out}: {note['network']}; {describe_parity(note['parity'])}")


def _refuse_bad_out(config: ExportConfig) -> None:
    """Check that OUT can be written, before the model is loaded."""
    out, suffix = config.out, SUFFIXES.get(config.to)
    if out.exists() or out.is_symlink():
        raise CxrdistError(f"{out}: already exists; name another, or move it away")
    if suffix and out.suffix != suffix:
        raise CxrdistError(
            f"{out}: --to {config.to} writes a file; expected a name ending in {suffix}"
        )
    refuse_unwritable(out)
