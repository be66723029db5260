"""The run directory: the path of each file in it, and the environment it was made in."""

import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cxrdist.errors import CxrdistError

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")
"""Stage names are restricted because each stage has a directory of its name in the run."""


@dataclass(frozen=True)
class _Inside:
    """An attribute of a run directory: the path of one of its files or directories."""

    name: str

    def __get__(self, run: "RunDirectory", _: type["RunDirectory"]) -> Path:
        return run.inside(self.name)


@dataclass(frozen=True)
class _InSubset:
    """An attribute of a run directory: returns the path of a file or directory of a subset."""

    name: str

    def __get__(self, run: "RunDirectory", _: type["RunDirectory"]) -> Callable[[str], Path]:
        return lambda subset: run.inside(subset, self.name)


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
        """Return the path of a file or directory of the run; raise CxrdistError for a link."""
        path = self.root
        for name in "/".join(names).split("/"):
            path /= name
            if path.is_symlink():
                raise CxrdistError(
                    f"{path}: is a link, which may lead out of the run; put there what it points "
                    "to (only the run directory as a whole may be a link)"
                )
        return path

    def stage(self, name: str) -> "RunDirectory":
        """Return the directory of a stage before the last one, with the model of its best epoch."""
        refuse_bad_stage_name(name)
        return RunDirectory(self.inside("stages", name))

    recipe = _Inside("recipe.yaml")
    """The resolved recipe; can be passed back with --config."""
    info = _Inside("run.json")
    """Versions, world size, precision, git revision, index hash and weights."""
    log = _Inside("log.jsonl")
    """One JSON object per line."""
    checkpoints = _Inside("checkpoints")
    """Directory of the resumable states."""
    model = _Inside("model")
    """Directory of the weights for use, with model.json."""
    tracking = _Inside("tracking")
    """Directory of the trackers chosen with --track."""
    audit = _Inside("audit.json")
    """The shards' audit, as of the start of the training."""
    seen = _Inside("seen.npz")
    """Fingerprints of train and val, to recognise their images in an external set."""
    report = _Inside("report.html")
    checklist = _Inside("checklist.html")
    """Reporting checklists, filled in as far as the files of the run allow."""
    card = _Inside("model/README.md")
    """The model card, in Hugging Face's format."""
    members = _Inside("members.json")
    """Figures of an ensemble's members, and their spread."""

    predictions = _InSubset("predictions.csv")
    """One row per sample of the subset."""
    metrics = _InSubset("metrics.json")
    heatmaps = _InSubset("heatmaps")
    """Directory of KEY.png (the X-ray) and KEY.CLASS.png (with its relevance)."""
    mistakes = _InSubset("mistakes")
    """Directory of KEY.png of the most confident wrong predictions."""
    nearest = _InSubset("nearest.csv")
    """The training image most similar to each explained sample, by row."""
    nearest_pictures = _InSubset("nearest")
    """Directory of KEY.png of those training images."""
    relevance = _InSubset("relevance")
    """Directory of signed relevance, one KEY.npz per sample or tars of them."""
    relevance_info = _InSubset("relevance.json")
    """The relevance's settings and the results of its sanity checks."""
    relevance_table = _InSubset("relevance.csv")
    """The ledgers of the logits, one row per sample and class."""
    mean_maps = _InSubset("mean_maps")
    """Directory of the mean map of each class over the subset's explained images."""
    text = _InSubset("text.json")
    """Results of the probe for words on the images."""
    text_pictures = _InSubset("text")
    """Directory of the pictures of that probe."""
    localisation = _InSubset("localisation.json")
    """Agreement of the relevance with boxes or masks."""
    localisation_pictures = _InSubset("localisation")
    """Directory of pictures of the relevance with those boxes or masks."""


def refuse_bad_stage_name(name: str) -> None:
    """Raise CxrdistError for a stage name that is not valid for a directory."""
    if not STAGE_NAME.fullmatch(name):
        raise CxrdistError(
            f"--stages: the name {name!r:.120} is not valid for a directory; expected letters, "
            "digits, dots, -, _ and spaces, at most 100 characters"
        )


def external_subset(name: str) -> str:
    """Return the subset of an external set, external/NAME; reject an invalid directory name."""
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
    """Return the directory of a finished run; raise CxrdistError if it has no trained model."""
    run = RunDirectory(root)
    run.inside("model", "model.safetensors")  # rejects a link
    if not run.inside("model", "model.json").is_file():
        raise CxrdistError(
            f"--run {root}: contains no trained model (model/model.json); "
            "give the directory of a finished `cxrdist train`"
        )
    return run


def environment() -> dict[str, Any]:
    """Return library versions, and the git revision when cxrdist runs from a checkout."""
    names = "cxrdist torch accelerate timm kornia webdataset torchmetrics zennit numpy pillow"
    versions = {name: version(name) for name in names.split()}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": _git_revision(Path(__file__).parent.parent),
    }


def _git_revision(checkout: Path) -> str | None:
    """Return HEAD of the checkout with the package, and + if it has changes; None without one."""
    # git itself would look for .git further up, and find the checkout of another project around an
    # installed package.
    if not (checkout / ".git").exists() or not shutil.which("git"):
        return None
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
