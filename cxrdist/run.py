"""The run directory: the path of each file in it, and the environment it was made in."""

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cxrdist.errors import CxrdistError

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
"""Stage names are restricted because each stage has a directory of its name in the run."""


@dataclass(frozen=True)
class RunDirectory:
    """Names of the files of one run (.github/DESIGN.md, Files).

    The results of each subset of images are in a directory of its name: ``train``, ``val`` or
    ``test``, or ``external/NAME`` for shards that the run was not trained on.

    ``root`` may be a link, such as one to a scratch disk. Links below it are rejected, so that
    nothing outside the run is read, written or removed.
    """

    root: Path

    def inside(self, *names: str) -> Path:
        """Return the path of a file or directory of the run.

        Args:
            names: components of the path; each may contain several, separated by /.

        Raises:
            CxrdistError: the path, or a directory above it in the run, is a link.
        """
        path = self.root
        for name in "/".join(names).split("/"):
            path /= name
            if path.is_symlink():
                raise CxrdistError(
                    f"{path}: is a link, which may lead out of the run; put there what it points "
                    "to (only the run directory as a whole may be a link)"
                )
        return path

    @property
    def recipe(self) -> Path:
        """Return the path of the resolved recipe, YAML; can be passed back with --config."""
        return self.inside("recipe.yaml")

    @property
    def info(self) -> Path:
        """Return the path of the facts of the run.

        They are versions, world size, precision, git revision, index hash and weights.
        """
        return self.inside("run.json")

    @property
    def log(self) -> Path:
        """Return the path of the log, one JSON object per line."""
        return self.inside("log.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Return the directory of the resumable states."""
        return self.inside("checkpoints")

    @property
    def model(self) -> Path:
        """Return the directory of the weights for use, with model.json."""
        return self.inside("model")

    def stage(self, name: str) -> "RunDirectory":
        """Return the directory of a stage before the last one, with the model of its best epoch.

        Raises:
            CxrdistError: the name is not valid for a directory, or the directory is a link.
        """
        refuse_bad_stage_name(name)
        return RunDirectory(self.inside("stages", name))

    @property
    def tracking(self) -> Path:
        """Return the directory of the trackers chosen with --track."""
        return self.inside("tracking")

    @property
    def audit(self) -> Path:
        """Return the path of the shards' audit, as of the start of the training."""
        return self.inside("audit.json")

    @property
    def seen(self) -> Path:
        """Return the path of the prints of train and val, to recognise them in an external set."""
        return self.inside("seen.npz")

    @property
    def report(self) -> Path:
        """Return the path of the self-contained report."""
        return self.inside("report.html")

    @property
    def checklist(self) -> Path:
        """Return the path of the reporting checklists, filled in as far as the run knows."""
        return self.inside("checklist.html")

    @property
    def card(self) -> Path:
        """Return the path of the model card, in Hugging Face's format."""
        return self.inside("model", "README.md")

    @property
    def members(self) -> Path:
        """Return the path of the figures of an ensemble's members, and their spread."""
        return self.inside("members.json")

    def predictions(self, subset: str) -> Path:
        """Return the path of the predictions, one row per sample of the subset."""
        return self.inside(subset, "predictions.csv")

    def metrics(self, subset: str) -> Path:
        """Return the path of the subset's metrics."""
        return self.inside(subset, "metrics.json")

    def heatmaps(self, subset: str) -> Path:
        """Return the directory of KEY.png (the X-ray) and KEY.CLASS.png (with its relevance)."""
        return self.inside(subset, "heatmaps")

    def mistakes(self, subset: str) -> Path:
        """Return the directory of KEY.png of the most confident wrong predictions."""
        return self.inside(subset, "mistakes")

    def nearest(self, subset: str) -> Path:
        """Return the path of the training image most similar to each explained sample, by row."""
        return self.inside(subset, "nearest.csv")

    def nearest_pictures(self, subset: str) -> Path:
        """Return the directory of KEY.png of those training images."""
        return self.inside(subset, "nearest")

    def relevance(self, subset: str) -> Path:
        """Return the directory of signed relevance, one KEY.npz per sample or tars of them."""
        return self.inside(subset, "relevance")

    def text(self, subset: str) -> Path:
        """Return the path of the results of the probe for words on the images."""
        return self.inside(subset, "text.json")

    def text_pictures(self, subset: str) -> Path:
        """Return the directory of the pictures of that probe."""
        return self.inside(subset, "text")

    def localisation(self, subset: str) -> Path:
        """Return the path of the agreement of the relevance with boxes or masks."""
        return self.inside(subset, "localisation.json")

    def localisation_pictures(self, subset: str) -> Path:
        """Return the directory of pictures of the relevance with those boxes or masks."""
        return self.inside(subset, "localisation")

    def mean_maps(self, subset: str) -> Path:
        """Return the directory of the mean map of each class over the subset's explained images."""
        return self.inside(subset, "mean_maps")

    def relevance_info(self, subset: str) -> Path:
        """Return the path of the relevance's settings and the results of its sanity checks."""
        return self.inside(subset, "relevance.json")

    def relevance_table(self, subset: str) -> Path:
        """Return the path of the ledgers of the logits, one row per sample and class."""
        return self.inside(subset, "relevance.csv")


def refuse_bad_stage_name(name: str) -> None:
    """Reject a stage name that is not valid for a directory.

    Raises:
        CxrdistError: the name is not valid.
    """
    if not STAGE_NAME.fullmatch(name):
        raise CxrdistError(
            f"--stages: the name {name!r:.120} is not valid for a directory; expected letters, "
            "digits, dots, -, _ and spaces, at most 100 characters"
        )


def external_subset(name: str) -> str:
    """Return the subset of a run that holds an external set, external/NAME.

    Raises:
        CxrdistError: the name is not valid for a directory.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise CxrdistError(
            f"--name {name!r:.120}: expected letters, digits, dots, - and _, at most 100 "
            "characters; give such a name with --name"
        )
    return f"external/{name}"


def options_of(subset: str) -> str:
    """Return the option of evaluate and explain that selects a subset, for messages."""
    name = subset.removeprefix("external/")
    return f"--split {subset}" if name == subset else f"--name {name}"


def open_run(root: Path) -> RunDirectory:
    """Return the directory of a finished run.

    Raises:
        CxrdistError: ``root`` contains no trained model.
    """
    run = RunDirectory(root)
    files = [run.inside("model", name) for name in ("model.json", "model.safetensors")]
    if not files[0].is_file():
        raise CxrdistError(
            f"--run {root}: contains no trained model (model/model.json); "
            "give the directory of a finished `cxrdist train`"
        )
    return run


def environment() -> dict[str, Any]:
    """Return library versions, and the git revision when cxrdist runs from a checkout."""
    names = ("cxrdist", "torch", "accelerate", "timm", "kornia", "webdataset", "torchmetrics")
    versions = {name: version(name) for name in (*names, "zennit", "numpy", "pillow")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": _git_revision(Path(__file__).parent.parent),
    }


def _git_revision(checkout: Path) -> str | None:
    """Return HEAD of the checkout with the package, and + if it has changes; None without one."""
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
