"""Load a model by name: a run, an exported folder, published weights, or a model on the Hub."""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier, read_model
from cxrdist.model.densenet import load_model as load_from_run
from cxrdist.model.layout import InitialWeights, check_fit, shape_of
from cxrdist.model.weights import RUN_LAYOUT, read_weights
from cxrdist.run import RunDirectory

HUB = "hf:"
PUBLISHED_SIZE_PX = 224
"""Side of the squares that the published CheXNet copies and torchxrayvision's DenseNets take; both
crop the centre of an X-ray."""
_HUB_NAME = re.compile(r"hf:([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,100}))?")
_FILES = ("model.json", "model.safetensors")


def load_model(source: str | Path) -> Classifier:
    """Load a model for use, in evaluation mode, on the CPU.

    Args:
        source: a run directory; a folder of ``cxrdist export --to huggingface``;
            ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``, such a folder on the Hugging Face Hub;
            ``chexnet``; or the file or URL of published weights that ``--init`` recognises, if
            they have an output layer with known labels (CheXNet's copies, torchxrayvision).

    Raises:
        CxrdistError: the model does not exist, cannot be read or fetched, is an ensemble (load its
            members), or its outputs have no names.
    """
    name, path = str(source), Path(source)
    if name.startswith(HUB):
        return _load_hub(name)
    folder = model_folder(path)
    if (folder / _FILES[0]).is_file():
        return read_model(path) if folder == path else load_from_run(path, name)
    if path.is_dir() or not (path.is_file() or "://" in name or name in ("chexnet", "imagenet")):
        raise CxrdistError(
            f"{name}: is not a model; expected the run directory of a finished training, a folder "
            "of `cxrdist export --to huggingface`, a file of published weights or its URL, "
            "chexnet, or hf:OWNER/NAME"
        )
    return _with_published_head(read_weights(name, option=""), name)


def model_folder(source: Path) -> Path:
    """Return a folder of ``cxrdist export --to huggingface`` itself, of a run the folder model."""
    own = RunDirectory(source).model
    is_exported = (source / _FILES[0]).is_file() and not (own / _FILES[0]).is_file()
    return source if is_exported else own


def _with_published_head(weights: InitialWeights, name: str) -> Classifier:
    """Build the network of published weights, keeping only the outputs that have a name.

    In torchxrayvision's files, outputs that were not trained have an empty name.
    """
    if weights.record.get("layout") == RUN_LAYOUT:
        raise CxrdistError(
            f"{name}: was converted from a run, without the task and size of its images; give the "
            "run, or a folder of `cxrdist export --to huggingface`"
        )
    labels = weights.labels or []
    named = [i for i, label in enumerate(labels) if label]
    if not named or not weights.head:
        raise CxrdistError(
            f"{name}: has no output layer with class names; train from it with --init, or give "
            "chexnet, a checkpoint of torchxrayvision or a run"
        )
    shape = shape_of(weights.tensors, name)
    check_fit(weights, shape, name)
    size_px, normalisation = PUBLISHED_SIZE_PX, weights.normalisation
    classes = [labels[i] for i in named]
    model = Classifier(shape, classes, size_px, normalisation, fit="crop", task="multilabel")
    head = {key: tensor[torch.tensor(named)] for key, tensor in weights.head.items()}
    # Not strict, for old files without num_batches_tracked. `check_fit` has compared all else.
    model.network.load_state_dict({**weights.tensors, **head}, strict=False)
    model.origin = weights.describe(len(weights.tensors) + len(head))
    return model.eval()


def _load_hub(name: str) -> Classifier:
    """Fetch a model folder from the Hugging Face Hub, and load it."""
    from huggingface_hub import hf_hub_download  # imported late: takes a second
    from huggingface_hub.errors import HfHubHTTPError

    if not (match := _HUB_NAME.fullmatch(name)):
        raise CxrdistError(f"{name:.200}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    # Copied, because the files in the Hub's cache are links, which the readers of a model reject.
    with TemporaryDirectory() as folder:
        try:
            for file in _FILES:
                shutil.copy(hf_hub_download(match[1], file, revision=match[2]), folder)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CxrdistError(
                f"{name}: {file} cannot be fetched ({reason:.160}); give a folder that "
                "`cxrdist export --to huggingface` made, or connect to the network once"
            ) from error
        try:
            return read_model(Path(folder))
        except CxrdistError as error:
            raise CxrdistError(str(error).replace(folder, name)) from error
