"""The facts of a run behind the model card and the checklists.

A member is None or empty if the run does not have it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cxrdist.data.audit_file import AuditFile, read_audit
from cxrdist.evaluate.metrics import Metrics
from cxrdist.explain.description import WITH_RULES
from cxrdist.files import read_document
from cxrdist.info import Launch, RunInfo, launches_of, read_info
from cxrdist.model.densenet import is_ensemble
from cxrdist.model.description import Calibration, Cover, EnsembleFile, ModelFile
from cxrdist.report.files import (
    known_splits,
    read_calibration,
    read_metrics,
    read_resolved,
    subsets_with,
)
from cxrdist.run import RunDirectory


@dataclass(frozen=True)
class Evidence:
    """The facts of a run.

    Attributes:
        model: model.json of a single network.
        members: names of the networks of an ensemble.
        cover: how burned-in text was covered for the network, or for the members.
        calibration: temperatures and thresholds of the network or of the ensemble.
        audit: audit of the shards; None if there was none when the training began.
        metrics: metrics.json by subset, in the order test, val, train, external/NAME.
        explained: subsets with heat maps and tests of them.
        probed: subsets with a test of whether the network reads words on the images.
    """

    run: RunDirectory
    info: RunInfo
    model: ModelFile | None
    members: list[str]
    cover: Cover | None
    calibration: Calibration | None
    recipe: Mapping[str, Any]
    audit: AuditFile | None
    metrics: Mapping[str, Metrics]
    explained: list[str]
    probed: list[str]

    @property
    def external(self) -> list[str]:
        """Return the evaluated external sets, external/NAME."""
        return [subset for subset in self.metrics if subset.startswith("external/")]

    @property
    def test(self) -> Metrics | None:
        """Return the metrics of the test split."""
        return self.metrics.get("test")

    @property
    def groups(self) -> list[str]:
        """Return the columns by which the test split has figures for groups, such as sex."""
        groups = self.test.get("groups") if self.test else None
        return [*groups["columns"]] if groups else []

    @property
    def launches(self) -> list[Launch]:
        """Return the hardware that each step was done on."""
        return launches_of(self.info)

    @property
    def is_balanced(self) -> bool:
        """Return whether copies were chosen to make all classes about equally frequent."""
        one_label = self.info["shards"]["task"] == "multiclass"
        return one_label and bool(self.recipe.get("balance") == "classes")

    @property
    def without_maps(self) -> str | None:
        """Return why there can be no heat maps; None if there can be some."""
        if self.members:
            return f"they need one network; explain a member, such as RUN/{self.members[0]}"
        if self.model is None or self.model["architecture"].architecture in WITH_RULES:
            return None
        return f"no relevance rules are proven for {self.model['architecture'].title}"

    def has(self, part: str) -> bool:
        """Return whether the metrics of the test split have a member, such as ``calibration``."""
        return bool(self.test and self.test.get(part))


def gather(run: RunDirectory) -> Evidence:
    """Read the facts of a run.

    Raises:
        CxrdistError: a file of the run is damaged.
    """
    info = read_info(run)
    path, network, members = run.inside("model", "model.json"), None, list[str]()
    if path.is_file() and is_ensemble(run.root):
        members = read_document(path, EnsembleFile)["members"]
        # Members agree on how text was covered (`Ensemble`), so one of them speaks for all.
        path = run.inside(members[0], "model", "model.json")
    if path.is_file():
        network = read_document(path, ModelFile)
    recipe, subsets = read_resolved(run.recipe), known_splits(run.root)
    metrics = {
        subset: read_metrics(run.metrics(subset), info["shards"]["task"]) for subset in subsets
    }
    return Evidence(
        run,
        info,
        None if members else network,
        members,
        network.get("cover") if network else None,
        read_calibration(run),
        recipe.content if recipe else {},
        read_audit(run.audit) if run.audit.is_file() else None,
        {subset: of_subset for subset, of_subset in metrics.items() if of_subset},
        [subset for subset in subsets if run.relevance_info(subset).is_file()],
        subsets_with(run.root, "text.json"),
    )
