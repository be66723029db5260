"""The report's section on external sets."""

from typing import Any

from cxrdist.report.external import external_view
from cxrdist.report.values import DASH


def split_of(subset: str, **metrics: Any) -> dict[str, Any]:
    """A subset as `split_view` gives it, as far as the section needs it."""
    scores = {"recall": 0.75, "auroc": None, "specificity": 0.5, "specificity_interval": [0.25, 1]}
    found = {
        "task": "multiclass",
        "samples": 6,
        "accuracy": 0.5,
        "accuracy_interval": [0.25, 0.75],
        "confusion_matrix": [[3, 1], [2, 0]],
        "classes": {"a": scores, "b": scores},
        "macro": scores,
        "intervals": {"patients": 4},
        **metrics,
    }
    return {"subset": subset, "name": subset, "element": f"id-{subset}", "metrics": found}


def about(**changes: Any) -> dict[str, Any]:
    info = {
        "name": "other",
        "classes": ["a"],
        "label_map": {"x": "a"},
        "other_classes": {"z": 3},
        "images": 9,
        "seen": "drop",
        "seen_images": 3,
        "reasons": {"equal image": 2, "altered copy": 1},
        "patients_told": 5,
        "not_known": None,
    }
    return {**info, **changes}


def test_the_internal_test_and_the_sets_stand_in_one_table() -> None:
    """Scores with their intervals, images, patients, and how many images were seen."""
    view = external_view([split_of("test"), split_of("external/other", external=about())])
    assert view is not None
    internal, external = view["rows"]
    assert (internal["kind"], external["kind"], external["name"]) == (
        "internal",
        "external",
        "other",
    )
    assert external["seen"] == "3 of 9, left out"
    assert (external["images"], external["patients"]) == ("6", "4")
    assert external["scores"] == [
        ("0.500", "0.250 to 0.750"),
        (DASH, ""),
        ("0.750", "no interval"),
        ("0.500", "0.250 to 1.000"),
    ]


def test_means_leave_out_the_classes_that_the_set_has_too_few_images_of() -> None:
    """They are those of metrics.json over the others, and the table says of how many."""
    classes = {"a": {"too_few": None, "recall": 0.5}, "b": {"too_few": "0 positives"}}
    enough = {"recall": 0.5, "recall_interval": [0.25, 0.75]}
    sets = [split_of("o", external=about(), classes=classes, macro_enough=enough)]
    view = external_view(sets)
    assert view is not None
    assert view["rows"][0]["num_classes"] == 1
    assert view["rows"][0]["scores"][2] == ("0.500", "0.250 to 0.750")
    sets = [split_of("o", external=about(), classes={"b": {"too_few": "0 positives"}})]
    assert (external_view(sets) or {})["rows"][0]["scores"][1:] == [("too few to say", "")] * 3


def test_each_class_that_a_set_has_has_a_row_and_its_number_of_images() -> None:
    """The set lacks `b`, which stands with the internal test alone."""
    view = external_view([split_of("test"), split_of("external/other", external=about())])
    assert view is not None
    rows = [(row["class"], row["name"], row["images"]) for row in view["classes"]]
    assert rows == [("a", "test", "4 of 6"), ("a", "other", "4 of 6"), ("b", "test", "2 of 6")]
    assert view["sets"][0]["lacking"] == ["b"]


def test_what_is_not_known_is_never_none_seen() -> None:
    """Where nothing is kept of the training the table says so."""
    unknown = about(seen_images=0, not_known="the run holds no seen.npz")
    view = external_view([split_of("external/other", external=unknown)])
    assert view is not None
    assert view["rows"][0]["seen"] == "not known"


def test_without_an_external_set_there_is_nothing_to_show() -> None:
    """The section then says how to evaluate one."""
    assert external_view([split_of("test"), split_of("val")]) is None
