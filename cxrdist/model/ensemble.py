"""Ensembles: networks trained with the same recipe, which predict the mean probability."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cxrdist.data.inputs import Preparation
from cxrdist.errors import CxrdistError
from cxrdist.files import read_document, write_json
from cxrdist.model.densenet import MEND, Classifier, is_ensemble, load_model
from cxrdist.model.description import Calibration, EnsembleFile
from cxrdist.run import RunDirectory, open_run

_MUST_AGREE = ("classes", "task", "image_size_px", "fit", "depth", "cover", "lungs_only")


class Ensemble(nn.Module):
    """Several networks whose calibrated probabilities are averaged.

    Source: Lakshminarayanan et al. 2017, section 2.4. It can be used like a `Classifier`, except to
    explain predictions, which needs one member.

    Attributes:
        members: the networks. Those attributes of a `Classifier` that describe images and classes
            are the same for all of them.
        names: the members' directories in the directory of the ensemble.
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
        first = self.first
        self.classes, self.task = first.classes, first.task
        self.image_size_px, self.fit, self.depth = first.image_size_px, first.fit, first.depth
        self.cover, self.lungs_only = first.cover, first.lungs_only

    @property
    def first(self) -> Classifier:
        """Return the first network; all take the same images and have the same classes."""
        return cast(Classifier, self.members[0])

    def preparation(self) -> Preparation:
        """Return how to prepare an image file, which is the same for all members."""
        return self.first.preparation()

    @property
    def has_folds(self) -> bool:
        """Return whether the members are the folds of a cross-validation."""
        return any(member.fold for member in self.members)

    @property
    def mean(self) -> Tensor:
        """Return the mean grey value that the first member subtracts, on the ensemble's device."""
        # `cxrdist predict` takes the device of any model from its mean.
        return self.first.mean

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of the mean probabilities, for uint8 images [B, 1, H, W].

        The logit of the mean of p is log(sum p) - log(sum (1 - p)), which does not round p to 1.
        """
        logits = torch.stack([member(images) for member in self.members]).double()
        logits = logits / self.temperatures[:, None]
        odds = logsigmoid(logits).logsumexp(0) - logsigmoid(-logits).logsumexp(0)
        return odds.float()


def _temperatures(member: Classifier) -> list[float]:
    """Return the temperatures of a member by class; 1 for a class without a temperature."""
    known = member.calibration.temperatures if member.calibration else {}
    return [known.get(name, 1.0) for name in member.classes]


def load_predictor(run: str | Path) -> Classifier | Ensemble:
    """Load the model or the ensemble of a run directory; errors are those of `load_model`."""
    if not is_ensemble(run):
        return load_model(run)
    root = open_run(Path(run))
    content = read_document(root.model / "model.json", EnsembleFile, MEND)
    ensemble = join(root, content["members"])
    ensemble.calibration = content.get("calibration")
    return ensemble.eval()


def join(run: RunDirectory, names: list[str]) -> Ensemble:
    """Return the ensemble of members of a run; raise CxrdistError if one differs from the first."""
    members = {name: load_model(run.inside(name)) for name in names}
    first = members[names[0]]
    for name, member in members.items():
        for setting in _MUST_AGREE:
            own, other = getattr(member, setting), getattr(first, setting)
            if own != other:
                raise CxrdistError(
                    f"{run.root / name}: has {setting} {own!s:.100}, {names[0]} has "
                    f"{other!s:.100}; an ensemble needs members trained on the same shards"
                )
    return Ensemble(members)


def save_ensemble(ensemble: Ensemble, directory: Path) -> None:
    """Write model.json, which lists the members; the weights stay in the members' directories."""
    content: EnsembleFile = {
        "format": "cxrdist-ensemble-1",
        "members": ensemble.names,
        "calibration": ensemble.calibration,
    }
    write_json(directory / "model.json", content)


def one_network(model: Classifier | Ensemble) -> Classifier:
    """Return the single network to explain, or raise CxrdistError for an ensemble."""
    if isinstance(model, Ensemble):
        raise CxrdistError(
            f"--run: is an ensemble of {len(model.names)} networks, and heat maps need a single "
            f"one; give one of its members, such as RUN/{model.names[0]}"
        )
    return model
