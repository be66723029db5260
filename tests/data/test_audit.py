import csv
import json
import re
from base64 import b64decode
from collections import Counter, defaultdict
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from support import contents, run_command

from cxrdist.data.audit import Entry, _warnings, audit, summary
from cxrdist.data.duplicates import Duplicates, Near
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.index import Sample

BLACK = np.zeros((16, 16), np.uint8)


def entry(number: int, label: str, **known: object) -> Entry:
    """An image whose statistics tell nothing."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
    measured = {"width_px": 100, "height_px": 100, "fingerprint": fingerprint(pixels)}
    measured |= {name: known.pop(name) for name in (*measured, "mask_share") if name in known}
    path = f"{label}/{number}.png"
    sample = Sample(f"k{number}", "train", "train-000000.tar", label, f"p{number}", "s", path, "")
    return Entry(sample._replace(**known), **measured)


def audited(entries: list[Entry], duplicates: Duplicates | None = None, task="multiclass"):
    classes = sorted({name for e in entries for name in e.sample.label.split("|") if name})
    return audit(entries, duplicates or Duplicates([], []), lambda place: BLACK, classes, task)


def test_patients_in_two_classes_and_splits_are_listed():
    """A patient with images in two classes, and one in two splits, stand in the lists."""
    entries = [
        entry(0, "a", patient="x"),
        entry(1, "b", patient="x"),
        entry(2, "b", patient="y"),
        entry(3, "b", patient="y", split="test"),
    ]
    found = audited(entries)
    assert found["patients_in_several_classes"] == [{"patient": "x", "images": {"a": 1, "b": 1}}]
    assert found["patients_in_several_splits"] == [
        {"patient": "y", "images": {"test": 1, "train": 1}}
    ]
    assert "patients with images in several splits: 1" in summary(found)
    assert "patients with images in several classes: 1 (x)" in summary(found)


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0, 0, "constant"), (90, 91, "constant"), (0, 17, "nearly black"), (240, 255, "nearly white")],
)
def test_squares_that_show_nothing_are_named(low, high, kind):
    """One level, 17 of the darkest or of the brightest ones; a dim X-ray of 64 levels is none."""
    ramp = np.linspace(low, high, 256).round().astype(np.uint8).reshape(16, 16)
    dim = np.linspace(0, 64, 256).round().astype(np.uint8).reshape(16, 16)
    found = audited(
        [
            entry(0, "a", fingerprint=fingerprint(ramp)),
            entry(1, "b"),
            entry(2, "b", fingerprint=fingerprint(dim)),
        ]
    )
    about = {"key": "k0", "path": "a/0.png", "split": "train", "label": "a", "patient": "p0"}
    assert found["flat"] == [{"kind": kind, **about}]
    assert f"{kind} images: 1; check window and bit depth (a/0.png)" in summary(found)


def test_several_labels_of_a_patient_are_no_fault():
    """Where an image may have several labels, so may a patient."""
    found = audited([entry(0, "a|b", patient="x"), entry(1, "", patient="x")], task="multilabel")
    assert found["patients_in_several_classes"] == []


def test_pairs_tell_where_they_lie_and_have_thumbnails():
    """Pairs in two splits come first; of an equal pair one thumbnail is enough."""
    entries = [entry(0, "a"), entry(1, "a"), entry(2, "b"), entry(3, "b", split="test")]
    found = audited(entries, Duplicates([(0, 1)], [Near(2, 3, 14, 0.914)]))
    first, second = found["duplicates"].pop("pairs")
    assert found["duplicates"] == {"exact": 1, "near": 1, "in_two_splits": 1, "in_two_classes": 0}
    assert [image["key"] for image in first["images"]] == ["k2", "k3"]
    assert (first["kind"], first["bits"], first["correlation"]) == ("near", 14, 0.914)
    assert first["two_splits"]
    assert second["kind"] == "exact"
    assert set(found["thumbnails"]) == {"k0", "k2", "k3"}
    pictures = [Image.open(BytesIO(b64decode(code))) for code in found["thumbnails"].values()]
    assert {picture.size for picture in pictures} == {(96, 96)}  # px, as the report shows them


def test_a_class_with_sources_of_its_own_is_warned_of():
    """Where source and class are the same thing Cramér's V is 1 and the own part is all."""
    entries = [
        entry(i, "ab"[i % 2], source="hospital" if i % 2 else "atlas", view="PA") for i in range(20)
    ]
    found = audited(entries)
    assert found["sources"]["counts"]["atlas"] == {"a": 10, "b": 0, "all": 10}
    assert found["sources"]["association"]["a"] == 1
    assert found["sources"]["own"] == {"a": 1, "b": 1}
    assert "100% of the images of a have sources that no other image has" in summary(found)
    assert found["views"]["association"] == {"a": None, "b": None}
    mixed = audited([entry(i, "ab"[i % 2], source="st"[i // 2 % 2]) for i in range(20)])
    assert mixed["sources"]["association"]["a"] == 0
    assert mixed["sources"]["own"] == {"a": 0, "b": 0}


@pytest.mark.parametrize(("own", "warned"), [(4, False), (5, True), (6, True)])
def test_half_a_class_with_sources_of_its_own_is_enough_for_the_warning(own, warned):
    """Of ten images of a class, `own` come from a source that no other class has."""
    sources = ["atlas"] * own + ["hospital"] * (10 - own)
    entries = [entry(i, "a", source=source) for i, source in enumerate(sources)]
    entries += [entry(10 + i, "b", source="hospital") for i in range(10)]
    line = f"{own}0% of the images of a have sources that no other image has"
    assert (line in summary(audited(entries))) is warned


def test_a_class_told_by_the_image_size_is_a_shortcut_and_noise_is_none():
    """The cross-validated AUROC is 1 for a class of larger originals and about 0.5 for noise."""
    labels = np.random.default_rng(0).permutation(["a", "b"] * 60)
    told = [entry(i, x, width_px=900 if x == "a" else 800) for i, x in enumerate(labels)]
    assert audited(told)["shortcut"]["auroc"]["a"]["value"] == 1
    noise = audited([entry(i, x) for i, x in enumerate(labels)])["shortcut"]["auroc"]["a"]
    assert noise["low"] < 0.5 < noise["high"] + 0.1


def test_the_warning_begins_with_the_class_that_is_told_best():
    """The largest images are all of c; of a and b only those of c can be told."""
    found = audited([entry(i, "abc"[i % 3], width_px=(800, 800, 900)[i % 3]) for i in range(90)])
    assert re.search(r"\(chance 0\.5\): c 1\.00, [ab] 0\.\d\d", summary(found))


@pytest.mark.parametrize(
    ("distance", "error", "warned"), [(0.1, 0.005, False), (0.25, 0.02, True), (0.25, 0.08, False)]
)
def test_a_shortcut_is_an_effect_that_is_neither_negligible_nor_chance(distance, error, warned):
    """For Cohen (1988) distances below 0.2 standard deviations are negligible in a set of any size.

    Two normal distributions at this distance have an AUROC of Phi(distance / sqrt(2)).
    """
    value = norm.cdf(distance / np.sqrt(2))
    auroc = {"value": value, "low": value - error, "high": value + error}
    content = audited([entry(i, "ab"[i % 2]) for i in range(20)])
    judged = {"accuracy": None, "auroc": {"a": auroc, "b": None}, "mean_auroc": auroc}
    content["shortcut"] |= judged
    content["baseline"] |= {"logistic_regression": judged, "perceptron": judged}
    warnings = _warnings(content)
    assert any(f"(chance 0.5): a {value:.2f}" in line for line in warnings) is warned
    assert any(f"reach a mean AUROC of {value:.3f}" in line for line in warnings) is warned


def test_the_shortcut_is_measured_on_other_patients():
    """Each patient has a size of its own: of other patients it tells nothing."""
    random = np.random.default_rng(0)
    sizes = random.integers(500, 1500, 40)
    labels = random.permutation(["a", "b"] * 20)
    entries = [
        entry(i, labels[i % 40], patient=f"p{i % 40}", width_px=int(sizes[i % 40]))
        for i in range(400)
    ]
    score = audited(entries)["shortcut"]["auroc"]["a"]["value"]
    naive = roc_auc_score([e.sample.label == "a" for e in entries], [e.width_px for e in entries])
    assert abs(score - 0.5) < 0.25
    assert 0.2 < naive < 0.8


def test_chestxray14_images_are_told_by_name_and_source():
    """A CheXNet may have seen them; they are counted by split."""
    entries = [
        entry(0, "a", path="a/00000061_012.jpg", split="test"),
        entry(1, "b", source="RSNA"),
        entry(2, "b"),
    ]
    found = audited(entries)
    assert found["in_pre_training"]["splits"]["test"] == {"all": 1, "a": 1, "b": 0}
    assert found["in_pre_training"]["splits"]["train"]["all"] == 1
    assert "2 images (1 in test) are from ChestX-ray14" in summary(found)


def test_real_covid3_is_packed_with_its_leaks_found(real_data, tmp_path):
    """Patients in two classes are listed, none is in two splits, class and source are one."""
    done = run_command(
        *("pack", "--source", "folder", "--input", real_data / "covid3", "--size", 64),
        *("--split", "0.7/0.1/0.2", "--patient-pattern", r"^(\d{8})_", "--out", tmp_path / "s"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s" / "audit.json").read_text())
    classes, splits = defaultdict(Counter), defaultdict(set)
    with open(tmp_path / "s" / "samples.csv", newline="") as file:
        for row in csv.DictReader(file):
            classes[row["patient"]][row["label"]] += 1
            splits[row["patient"]].add(row["split"])
    expected = {patient: dict(c) for patient, c in classes.items() if len(c) > 1}
    listed = {x["patient"]: x["images"] for x in found["patients_in_several_classes"]}
    assert listed == expected
    assert len(listed) == 20
    assert all(len(names) == 1 for names in splits.values())
    assert found["sources"]["own"]["COVID-19"] == 1
    assert found["sources"]["counts"]["ChestX-ray14"]["COVID-19"] == 0
    assert found["shortcut"]["auroc"]["COVID-19"]["low"] > 0.8
    assert "audit warning: patients with images in several classes: 20 (" in done.stdout


def test_check_makes_the_same_audit_from_the_shards(shards, tmp_path):
    """`check --audit` on shards alone writes what pack wrote."""
    before = contents(shards)
    done = run_command("check", "--audit", shards)
    assert done.returncode == 0, done.stderr
    assert contents(shards) == before


def flat(number: int, label: str, **known: object) -> Entry:
    """An image that is black, as all others are."""
    return entry(number, label, fingerprint=fingerprint(BLACK), **known)


DEGENERATE = {
    "two images": ([entry(0, "a"), entry(1, "b", split="test")], "multiclass"),
    "an image a class": ([entry(i, label) for i, label in enumerate("abcdef")], "multiclass"),
    "one patient": ([entry(i, "ab"[i % 2], patient="p") for i in range(20)], "multiclass"),
    "all images black": ([flat(i, "ab"[i % 2]) for i in range(20)], "multiclass"),
    "one label": ([entry(i, "ab"[i % 2].strip("b")) for i in range(20)], "multilabel"),
    "every image has the label": ([entry(i, "a") for i in range(20)], "multilabel"),
    "no image has a label": ([entry(i, "") for i in range(20)], "multilabel"),
    "classes of 10, 4 and 4": (
        [entry(i, label) for i, label in enumerate("aaaaaaaaaabbbbcccc")],
        "multiclass",
    ),
    "one usable label": (
        [entry(i, "|".join(["a"] * (i % 2) + ["b"] * (i == 1))) for i in range(40)],
        "multilabel",
    ),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_the_audit_of_a_degenerate_source_is_made_of_numbers_and_reasons(case):
    """No NaN, no error of the program; what has too few patients is None."""
    entries, task = DEGENERATE[case]
    found = audited(entries, task=task)
    json.dumps(found, allow_nan=False)
    enough = len({e.sample.patient for e in entries}) >= 5
    assert list(found["not_made"]) == ([] if enough else ["shortcut", "baseline"])
    assert enough or "audit: shortcut not made: there are fewer than 5" in summary(found)
    usable = [
        name
        for name in found["classes"]
        if min(5, *(Counter(name in e.sample.label for e in entries)[side] for side in (0, 1))) == 5
    ]
    scored = (found["shortcut"] or {"auroc": {}})["auroc"].items()
    assert [name for name, score in scored if score] == (usable if enough else [])


def test_a_class_whose_few_patients_share_a_fold_is_not_scored(monkeypatch):
    """Such a training fold has one side only and nothing can be learnt from it."""
    monkeypatch.setattr(
        "sklearn.model_selection.GroupKFold.split",
        lambda self, values, groups: (
            (np.flatnonzero(np.arange(50) // 10 != k), np.flatnonzero(np.arange(50) // 10 == k))
            for k in range(5)
        ),
    )
    found = audited([entry(i, "a" if i < 6 else "b") for i in range(50)])
    assert found["shortcut"]["auroc"] == {"a": None, "b": None}


def test_an_error_of_the_program_costs_its_part_of_the_audit_and_is_told_with_its_kind(monkeypatch):
    """All other parts are made; the summary tells the kind and the place of the error."""

    def broken(pixels: np.ndarray) -> str:
        raise IndexError("index 1 is out of bounds")

    monkeypatch.setattr("cxrdist.data.audit._thumbnail", broken)
    found = audited([entry(i, "ab"[i % 2]) for i in range(20)], Duplicates([(0, 1)], []))
    assert list(found["not_made"]) == ["thumbnails"]
    assert found["thumbnails"] == {}
    assert found["duplicates"]["exact"] == 1
    assert re.search(
        r"thumbnails not made: IndexError in audit.py line \d+: index 1", summary(found)
    )


PARTS = {
    "duplicates": "_pairs",
    "statistics": "_statistics",
    "shortcut": "measure_shortcut",
    "baseline": "measure_baseline",
    "masks": "_masks",
    "flat": "_flat",
    "in_pre_training": "_in_pre_training",
}
"""The functions that make a part of the audit."""


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_not_made_is_not_warned_of(part, monkeypatch):
    """Nothing is known of it; the others are those of an audit with all parts."""
    entries = [entry(i, "ab"[i % 2]) for i in range(20)]
    whole = audited(entries)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(f"cxrdist.data.audit.{PARTS[part]}", broken)
    content = audited(entries)
    assert list(content["not_made"]) == [part]
    assert not content[part]
    assert content | {part: whole[part], "not_made": {}} == whole
    assert whole["warnings"] == content["warnings"] == []
    assert f"{part} not made: ZeroDivisionError in" in summary(content)


def test_images_of_which_a_label_is_not_known_do_not_count_for_it():
    """Tables and the shortcut are those of the images of which it is known."""
    random = np.random.default_rng(0)
    entries = []
    for i in range(80):
        has, source = bool(random.random() < 0.5), "xy"[i % 2]
        known = {"width_px": 100 + 50 * has + int(random.integers(60)), "source": source}
        entries.append(entry(i, "a" * has, **known))
    hidden = entries[:50] + [
        replace(e, width_px=9, sample=e.sample._replace(uncertain="a|b", label="", source="z"))
        for e in entries[50:]
    ]

    def found(entries):
        return audit(entries, Duplicates([], []), lambda place: BLACK, ["a", "b"], "multilabel")

    all_of_them, known = found(hidden), found(entries[:50])
    assert all_of_them["sources"]["association"] == known["sources"]["association"]
    assert all_of_them["sources"]["counts"]["z"] == {"a": 0, "b": 0, "all": 30}
    assert all_of_them["sources"]["own"] == {"a": 0.0, "b": 0.0}
    score = all_of_them["shortcut"]["auroc"]["a"]
    assert 0.6 < score["value"] < 0.99
    widths = [e.width_px for e in entries[:50]]
    assert (
        abs(score["value"] - roc_auc_score([e.sample.label == "a" for e in entries[:50]], widths))
        < 0.1
    )
    assert all_of_them["shortcut"]["auroc"]["b"] is None


def test_a_class_that_goes_with_its_source_is_warned_of():
    """Four of forty in one source and 36 of forty in the other: Cramér's V is 0.8 by hand."""
    entries = [entry(i, "ab"[(i % 10 == 0) ^ (i < 40)], source="xy"[i < 40]) for i in range(80)]
    found = audited(entries)
    assert found["sources"]["association"] == {"a": 0.8, "b": 0.8}
    assert "a is associated with the source: Cramér's V is 0.80 (0 not at all, 1 fully)" in summary(
        found
    )


def test_equal_images_contradict_each_other_only_by_labels_that_are_known_of_both():
    """A label that another source does not have is no difference."""
    entries = [
        entry(0, "a", uncertain="b"),
        entry(1, "a|b", uncertain="c"),
        entry(2, "b|c", uncertain="d"),
        entry(3, "d", uncertain="a|b"),
    ]
    pairs = [(0, 1), (1, 2), (2, 3)]
    found = audited(entries, Duplicates(pairs, []), "multilabel")["duplicates"]
    differ = {
        tuple(image["key"] for image in pair["images"])
        for pair in found["pairs"]
        if pair["two_classes"]
    }
    assert differ == {("k1", "k2"), ("k2", "k3")}


def test_a_class_that_is_known_by_its_view_is_said():
    """Of a: all AP. That nothing tells the view of others is no view, but they are no AP either."""
    told = audited([entry(i, "ab"[i % 2], view=("AP", "PA")[i % 2]) for i in range(20)])
    half = audited([entry(i, "ab"[i % 2], view=("AP", "")[i % 2]) for i in range(20)])
    assert (told["views"]["own"], told["views"]["association"]["a"]) == ({"a": 1.0, "b": 1.0}, 1.0)
    assert half["views"]["own"] == {"a": 1.0, "b": 0.0}
    assert half["views"]["association"] == {"a": None, "b": None}
    for found in (told, half):
        assert "100% of the images of a have views that no other image has" in summary(found)
