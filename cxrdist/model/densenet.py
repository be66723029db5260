"""The classifier of grey X-rays: network and normalisation, how it is saved and loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from cxrdist.config import Fit, Network
from cxrdist.data.inputs import Preparation
from cxrdist.errors import CxrdistError
from cxrdist.files import read_document, write_json
from cxrdist.info import Task, WeightsInfo
from cxrdist.model.batch import check_batch
from cxrdist.model.batchnorm import BatchNorm
from cxrdist.model.description import Calibration, Cover, ModelFile, Normalisation
from cxrdist.model.dropout import Dropout
from cxrdist.model.networks import build_network, refuse_small_squares
from cxrdist.model.prediction import Predictions
from cxrdist.model.reading import ImageSource, read_squares
from cxrdist.model.tensorfile import read_safetensors
from cxrdist.precision import full_float32
from cxrdist.run import open_run

MEND = "copy the run directory again or train anew"


class _Described(TypedDict):
    """The member that every model.json has, of a classifier or an ensemble."""

    format: Literal["cxrdist-model-1", "cxrdist-ensemble-1"]


class Classifier(nn.Module):
    """A network that takes uint8 X-rays and gives one logit per class; owns its normalisation.

    Attributes:
        shape: architecture and its shape.
        network: timm's or torchvision's (`networks.build_network`), with the library's own names.
        norms: its BatchNorms; alexnet, squeezenet1_1 and convnext_atto have none.
        dropouts: its dropouts.
        classes: class names in the order of the logits.
        image_size_px: side of the square images that it takes.
        fit: how the training images became square: crop, pad or stretch.
        task: multiclass (an image has one of the classes) or multilabel (any number of them).
        depth: bits that hold the values of images whose files do not declare their depth.
        cover: how burned-in text was covered in the training images; None if it was not.
        origin: the weights that its training started from (`InitialWeights.describe`), if known.
        calibration: temperatures and thresholds from the validation split; None before evaluation.
        fold: the cross-validation fold that was its validation split, such as 2/5; None for the
            packed splits.
        lungs_only: whether everything but the lungs was black in training (pack --lungs-only).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Network,
        classes: list[str],
        image_size_px: int,
        normalisation: Normalisation | None = None,
        fit: Fit = "crop",
        task: Task = "multiclass",
    ) -> None:
        super().__init__()
        self.shape = network
        self.classes = list(classes)
        self.image_size_px = image_size_px
        self.fit = fit
        self.task = task
        self.depth: int | None = None
        self.cover: Cover | None = None
        self.origin: WeightsInfo | None = None
        self.calibration: Calibration | None = None
        self.fold: str | None = None
        self.lungs_only = False
        self.normalisation = normalisation or Normalisation()
        self.network = build_network(network, len(classes), len(self.normalisation.mean))
        self.norms = [m for m in self.network.modules() if isinstance(m, BatchNorm)]
        self.dropouts = [m for m in self.network.modules() if isinstance(m, Dropout)]
        # Buffers, to move with the model. Not in the state dict: model.json has the normalisation.
        self.register_buffer("mean", _per_channel(self.normalisation.mean), persistent=False)
        self.register_buffer("std", _per_channel(self.normalisation.std), persistent=False)

    def preparation(self) -> Preparation:
        """Return how to prepare an image file for the model.

        Raises:
            CxrdistError: the model needs lung masks, which image files do not have.
        """
        if self.lungs_only:
            raise CxrdistError(
                "the model was trained on lungs only, but new images have no masks; pack them with "
                "--masks and --lungs-only, and use cxrdist evaluate"
            )
        return Preparation(
            size_px=self.image_size_px,
            fit=self.fit,
            depth=self.depth,
            cover=self.cover.how if self.cover else "black",
            finds_text=self.cover is not None and self.cover.is_of_training,
        )

    def predict(
        self, images: ImageSource | Sequence[ImageSource], *, batch_size: int = 16
    ) -> Predictions:
        """Predict image files and squares in this process; same results as `cxrdist predict`.

        Args:
            images: files, prepared as in training, and squares uint8 [S, S] from `read_image`.
            batch_size: images per forward pass.

        Raises:
            CxrdistError: an image cannot be used, or the model is in training mode.
        """
        if self.training:
            raise CxrdistError("the model is in training mode; call model.eval() before predict")
        if batch_size < 1:
            raise CxrdistError(f"batch_size is {batch_size}: expected at least 1")
        squares = torch.from_numpy(read_squares(images, self)).unsqueeze(1)
        with torch.inference_mode(), full_float32():
            logits = [self(batch.to(self.mean.device)).cpu() for batch in squares.split(batch_size)]
        values = torch.cat(logits).float().numpy()
        return Predictions(values, self.classes, self.task, self.calibration)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise grey values 0..255, uint8 or float [B, 1, H, W], to float [B, C, H, W]."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std

    def count_pass(self) -> None:
        """Count a pass in all BatchNorms in training mode, in one operation instead of one each."""
        counters = [norm.num_batches_tracked for norm in self.norms if norm.training]
        if counters:
            torch._foreach_add_(counters, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of grey images.

        Args:
            images: uint8 [B, 1, S, S] on the device of the model, with S = `image_size_px`.

        Returns:
            float [B, classes].

        Raises:
            CxrdistError: the images have another type, shape or device; the message says what to
                do.
        """
        check_batch(images, self.image_size_px, self.mean.device)
        return self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, 1, H, W], uint8 or float, without checks.

        Training warps its images, and so passes floats, which `forward` rejects.
        """
        self.count_pass()
        logits: Tensor = self.network(self.normalise(images))
        return logits


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def save_model(model: Classifier, directory: Path) -> None:
    """Write model.safetensors and model.json, which are all that is needed to use the model."""
    state = model.network.state_dict()
    weights = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    # Not save_file, which makes the file readable for its owner only, whatever the umask.
    (directory / "model.safetensors").write_bytes(save(weights))
    content: ModelFile = {
        "format": "cxrdist-model-1",
        "architecture": model.shape,
        "task": model.task,
        "classes": model.classes,
        "normalisation": model.normalisation,
        "image_size_px": model.image_size_px,
        "fit": model.fit,
        "depth": model.depth,
        "cover": model.cover,
        "weights": model.origin,
        "calibration": model.calibration,
        "fold": model.fold,
    }
    if model.lungs_only:
        content["lungs_only"] = True
    write_json(directory / "model.json", content)


def save_calibration(calibration: Calibration, directory: Path) -> None:
    """Write a calibration into model.json, which must exist, and change nothing else."""
    # Not as a ModelFile, whose dataclasses would lose what newer versions write in them.
    content = read_document(directory / "model.json", dict[str, object], MEND)
    write_json(directory / "model.json", {**content, "calibration": calibration})


def load_model(run: str | Path, where: str | None = None) -> Classifier:
    """Load the trained model of a run directory, in evaluation mode, on the CPU.

    The error line for an ensemble begins with `where`, by default with the option --run.

    Raises:
        CxrdistError: there is no model, its description is invalid, or its files do not belong
            together.
    """
    if is_ensemble(run):
        raise CxrdistError(
            f"{where or f'--run {run}'}: is an ensemble of several networks, expected a single "
            f"one; give one of its members, such as {Path(run) / 'member-0'}"
        )
    return read_model(open_run(Path(run)).model)


def read_model(directory: Path) -> Classifier:
    """Read a model from RUN/model or from a folder of ``cxrdist export --to huggingface``.

    It is in evaluation mode, on the CPU.

    Raises:
        CxrdistError: a file is missing or invalid, or they do not belong together.
    """
    content = read_document(directory / "model.json", ModelFile, MEND)
    try:
        weights = read_safetensors(directory / "model.safetensors").tensors
        with torch.device("meta"):  # model.json is untrusted: check shapes before using memory
            _refuse_other_shapes(weights, _build(content))
        model = _build(content)
        model.network.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CxrdistError(
            f"{directory}: model.json and model.safetensors do not make a model ({reason:.200}); "
            f"{MEND}"
        ) from error
    return model.eval()


def is_ensemble(run: str | Path) -> bool:
    """Return whether the model of a run is an ensemble; raise CxrdistError without a model."""
    file = open_run(Path(run)).model / "model.json"
    return read_document(file, _Described, MEND)["format"] == "cxrdist-ensemble-1"


def _build(content: ModelFile) -> Classifier:
    """Build the network that model.json describes, with random weights."""
    refuse_small_squares(content["architecture"], content["image_size_px"], "image_size_px")
    model = Classifier(
        content["architecture"],
        content["classes"],
        content["image_size_px"],
        content["normalisation"],
        content["fit"],
        content["task"],
    )
    model.depth, model.cover = content.get("depth"), content.get("cover")
    model.origin, model.calibration = content.get("weights"), content.get("calibration")
    model.fold, model.lungs_only = content.get("fold"), content.get("lungs_only", False)
    return model


def _refuse_other_shapes(weights: dict[str, Tensor], model: Classifier) -> None:
    """Raise ValueError unless weights have exactly the names and shapes of a model's weights."""
    expected = {name: tensor.shape for name, tensor in model.network.state_dict().items()}
    actual = {name: tensor.shape for name, tensor in weights.items()}
    differing = [n for n in {**expected, **actual} if expected.get(n) != actual.get(n)]
    if differing:
        name = differing[0]
        shapes = [list(shapes[name]) if name in shapes else "none" for shapes in (actual, expected)]
        raise ValueError(
            f"{len(differing)} tensors differ, {name:.100} is {shapes[0]}, expected {shapes[1]}"
        )
