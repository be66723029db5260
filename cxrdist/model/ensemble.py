"""Ensembles: several networks that were trained alike, and the mean of what they say."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cxrdist.data.index import Fit, Task
from cxrdist.data.inputs import Preparation
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import MEND, Classifier, is_ensemble, load_model
from cxrdist.model.description import Calibration, Cover, EnsembleFile
from cxrdist.run import RunDirectory, open_run, read_document, write_json

_ALIKE = ("classes", "task", "image_size_px", "fit", "depth", "cover", "lungs_only")


class Ensemble(nn.Module):
    """The members' mean (Lakshminarayanan et al. 2017, section 2.4): of calibrated probabilities.

    It is used as a `Classifier` is; only what looks into a network needs one of the members.

    Attributes:
        members: the networks.
        names: their directories in that of the ensemble.
        calibration: of the ensemble itself; None before its validation split was evaluated.
    """

    temperatures: Tensor

    def __init__(self, members: dict[str, Classifier]) -> None:
        super().__init__()
        self.names = list(members)
        self.members = nn.ModuleList(members.values())
        self.calibration: Calibration | None = None
        rows = [_temperatures(member) for member in members.values()]
        self.register_buffer("temperatures", torch.tensor(rows, dtype=torch.float64))

    @property
    def first(self) -> Classifier:
        """One of the networks, all of which take the same images and know the same classes."""
        return cast(Classifier, self.members[0])

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits."""
        return self.first.classes

    @property
    def task(self) -> Task:
        """Whether an image has one of the classes or any number of them."""
        return self.first.task

    @property
    def image_size_px(self) -> int:
        """Side of the square images."""
        return self.first.image_size_px

    @property
    def fit(self) -> Fit:
        """How those images became square."""
        return self.first.fit

    @property
    def depth(self) -> int | None:
        """Bits that hold the values of those images, where the files do not declare it."""
        return self.first.depth

    @property
    def cover(self) -> Cover | None:
        """How burned-in text was covered in them."""
        return self.first.cover

    @property
    def lungs_only(self) -> bool:
        """Whether all but the lungs was black in them."""
        return self.first.lungs_only

    def preparation(self) -> Preparation:
        """Say how an image file becomes a square of the ensemble, as of each of its members."""
        return self.first.preparation()

    @property
    def has_folds(self) -> bool:
        """Whether each member was trained on other parts of train and val."""
        return any(member.fold for member in self.members)

    @property
    def mean(self) -> Tensor:
        """The mean grey value that the first member subtracts; on the device of the ensemble."""
        return self.first.mean

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of the mean probabilities, for uint8 images [B, 1, H, W].

        log(sum p) - log(sum (1 - p)) is the logit of the mean of p, without rounding p to 1.
        """
        logits = torch.stack([member(images) for member in self.members]).double()
        logits = logits / self.temperatures[:, None]
        odds = logsigmoid(logits).logsumexp(0) - logsigmoid(-logits).logsumexp(0)
        return odds.float()


def _temperatures(member: Classifier) -> list[float]:
    """Temperatures of a member by class; 1 where its validation split was never evaluated."""
    known = member.calibration.temperatures if member.calibration else {}
    return [known.get(name, 1.0) for name in member.classes]


def load_predictor(run: str | Path) -> Classifier | Ensemble:
    """Load the trained model of a run directory, or all of an ensemble, to predict with it.

    Raises:
        CxrdistError: there is no model, or its files do not belong together.
    """
    if not is_ensemble(run):
        return load_model(run)
    root = open_run(Path(run))
    content = read_document(root.model / "model.json", EnsembleFile, MEND)
    ensemble = join(root, content["members"])
    ensemble.calibration = content.get("calibration")
    return ensemble.eval()


def join(run: RunDirectory, names: list[str]) -> Ensemble:
    """Make an ensemble of the members of a directory.

    Raises:
        CxrdistError: a member is not trained, or not like the first one.
    """
    members = {name: load_model(run.inside(name)) for name in names}
    first = members[names[0]]
    for name, member in members.items():
        for what in _ALIKE:
            own, other = getattr(member, what), getattr(first, what)
            if own != other:
                raise CxrdistError(
                    f"{run.root / name}: has {what} {own!s:.100}, {names[0]} has {other!s:.100}; "
                    "an ensemble needs members that were trained on the same shards"
                )
    return Ensemble(members)


def save_ensemble(ensemble: Ensemble, directory: Path) -> None:
    """Write model.json, which names the members; each keeps its own weights."""
    content: EnsembleFile = {
        "format": "cxrdist-ensemble-1",
        "members": ensemble.names,
        "calibration": ensemble.calibration,
    }
    write_json(directory / "model.json", content)


def one_network(model: Classifier | Ensemble) -> Classifier:
    """Return the network of a model, for what looks into it.

    Raises:
        CxrdistError: there are several.
    """
    if isinstance(model, Ensemble):
        raise CxrdistError(
            f"--run: is an ensemble of {len(model.names)} networks, and a heat map is of one; give "
            f"one of its members, such as RUN/{model.names[0]}"
        )
    return model
