"""Initial weights of a training: published checkpoints and finished runs, read strictly."""

from pathlib import Path

from cxrdist.config import Architecture
from cxrdist.errors import CxrdistError
from cxrdist.files import sha256_of
from cxrdist.info import WeightsInfo, read_info
from cxrdist.model.densenet import Classifier, load_model
from cxrdist.model.description import Normalisation
from cxrdist.model.download import download
from cxrdist.model.layout import InitialWeights, check_fit, head_names, recognise
from cxrdist.model.networks import IMAGENET_URLS
from cxrdist.model.tensorfile import read_tensor_file
from cxrdist.run import RunDirectory

# The paper's CheXNet (section 3.2: Zech 2018). The URL names a git revision of 2018, because the
# file was replaced in 2022 by a network that was trained again.
CHEXNET_URL = (
    "https://github.com/jrzech/reproduce-chexnet/raw/"
    "7b9d3559c5464fb723cdeb7ace558e910934269b/pretrained/checkpoint"
)
RUN_LAYOUT = "run of cxrdist"


def read_weights(
    init: str, option: str = "--init ", architecture: Architecture = "densenet121"
) -> InitialWeights:
    """Read the weights that `--init` takes; ``architecture`` selects those of ``imagenet``.

    Raises:
        CxrdistError: the weights are missing, unreadable or of an unknown layout, or the download
            failed; its line begins with ``option`` and ``init``.
    """
    where = f"{option}{init}"
    if init == "none":
        return InitialWeights({}, {}, Normalisation(), None, {"source": "random", "sha256": None})
    if init == "chexnet" and architecture != "densenet121":
        raise CxrdistError(
            f"{where}: is a DenseNet121, but network.architecture is {architecture}; choose "
            "--init imagenet or --network.architecture densenet121"
        )
    published = {"chexnet": CHEXNET_URL, "imagenet": IMAGENET_URLS[architecture]}
    if init in published or "://" in init:
        url = published.get(init, init)
        return _read_file(download(url, where), where, url)
    if Path(init).is_dir():
        return _read_run(Path(init), where)
    return _read_file(Path(init), where, init)


def _read_file(file: Path, where: str, source: str) -> InitialWeights:
    content = read_tensor_file(file, where)
    return recognise(content, where, {"source": source, "sha256": sha256_of(file)})


def _read_run(directory: Path, where: str) -> InitialWeights:
    """Read the model of a finished run, with the chain of its initial weights."""
    run = RunDirectory(directory)
    if not (run.model / "model.json").is_file():
        raise CxrdistError(
            f"{where}: a directory without a trained model (model/model.json); "
            "give the run directory of a finished `cxrdist train`"
        )
    model = load_model(directory, where)
    state = model.network.state_dict()
    head = {name: state.pop(name) for name in head_names(model.shape)}
    record: WeightsInfo = {
        "source": str(directory),
        "sha256": sha256_of(run.model / "model.safetensors"),
        "layout": RUN_LAYOUT,
        "started_from": model.origin,
    }
    if run.info.is_file():
        info = read_info(run)
        record["trained_on"] = {
            "shards": info["shards"]["path"],
            "index_sha256": info["shards"]["index_sha256"],
            "finished": info["finished"],
        }
    return InitialWeights(state, head, model.normalisation, model.classes, record)


def apply_weights(weights: InitialWeights, model: Classifier) -> int:
    """Copy weights into the network except for its head; return how many tensors these are.

    Random weights are 0 tensors; those that do not fit the network raise CxrdistError.
    """
    if weights.tensors:
        check_fit(weights, model.shape, f"--init {weights.source}")
        # Not strict: the head is missing, and old files lack num_batches_tracked. `check_fit` has
        # compared all else.
        model.network.load_state_dict(weights.tensors, strict=False)
    model.origin = weights.describe(len(weights.tensors))
    return len(weights.tensors)
