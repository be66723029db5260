import json
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import recall_score, roc_auc_score

from cxrdist.bootstrap import draw
from cxrdist.documents import typed
from cxrdist.evaluate.groups import (
    MOST_GROUPS,
    Groups,
    age_band,
    compare_groups,
    split_groups,
)
from cxrdist.evaluate.measure import Settings, replicate
from cxrdist.evaluate.scored import Scored
from cxrdist.intervals import of_auroc


def multilabel(
    targets: np.ndarray,
    logits: np.ndarray,
    patients: Sequence[object],
    groups: Mapping[str, Sequence[str]],
) -> Scored:
    """Scored images of the labels c0, c1 ..."""
    names = [f"c{place}" for place in range(targets.shape[1])]
    keys = [f"k{place}" for place in range(len(targets))]
    owners = [str(patient) for patient in patients]
    return Scored("multilabel", names, keys, owners, targets.astype(np.int8), logits, groups)


def compared(scored: Scored, fewest: int = 10, replicates: int = 500, **options) -> Groups:
    drawn = replicate(scored, Settings(replicates=replicates))
    return compare_groups(scored, drawn, fewest, **options)


def simulated(seed: int, num_patients: int, gap: float = 0.0) -> Scored:
    """Patients of 1 to 4 images that go together, with a sensitivity of 0.8 in all groups.

    Of two labels, in women, three sources and bands of age; the first label's sensitivity is lower
    by ``gap`` in women.
    """
    random = np.random.default_rng(seed)
    own = np.repeat(np.arange(num_patients), random.integers(1, 5, num_patients))
    sex = np.array(["F", "M"])[random.integers(0, 2, num_patients)][own]
    source = np.array(["A", "B", "C"])[random.choice(3, num_patients, p=[0.5, 0.3, 0.2])][own]
    age = random.integers(20, 90, num_patients)[own].astype(str)
    targets = random.random((num_patients, 2))[own] < 0.4
    noise = random.normal(size=(num_patients, 2))[own] + random.normal(size=(len(own), 2))
    centre = np.where(targets, norm.ppf(0.8), norm.ppf(0.2))
    lower = targets[:, 0] & (sex == "F")
    centre[lower, 0] = norm.ppf(0.8 - gap)
    columns = {"sex": sex.tolist(), "source": source.tolist(), "age": age.tolist()}
    return multilabel(targets, centre + noise / np.sqrt(2), own.tolist(), columns)


def test_the_figures_of_a_group_are_scikit_learns_of_its_images():
    """With the numbers of images, patients and positives, as predicted and at the points."""
    scored = simulated(0, 200)
    thresholds = {"c0": 0.4, "c1": -0.3}
    group = compared(scored, thresholds=thresholds)["columns"]["source"]["B"]
    chosen = scored.take(np.array(scored.groups["source"]) == "B")
    assert (group["images"], group["patients"]) == (len(chosen), len({*chosen.patients}))
    for place, name in enumerate(chosen.classes):
        found, truth, logits = group["classes"][name], chosen.targets[:, place], chosen.logits
        assert (found["known"], found["positives"]) == (len(truth), truth.sum())
        assert found["auroc"] == pytest.approx(roc_auc_score(truth, logits[:, place]), abs=1e-6)
        for suffix, threshold in (("", 0.0), ("_at_point", thresholds[name])):
            called = logits[:, place] >= threshold
            for side, measure in ((1, "recall"), (0, "specificity")):
                expected = recall_score(truth, called, pos_label=side)
                assert found[measure + suffix] == pytest.approx(expected, abs=1e-6)
                low, high = found[f"{measure}{suffix}_interval"]
                assert low < expected < high


def test_ties_and_unknown_labels_count_as_in_scikit_learn():
    """Whole numbers as logits, a third of the labels not known."""
    random = np.random.default_rng(1)
    targets = random.choice([1, 0, -1], (300, 1))
    logits = random.integers(-2, 3, (300, 1)) + (targets == 1)
    groups = {"sex": random.choice(["F", "M"], 300).tolist()}
    scored = multilabel(targets, logits.astype(float), range(300), groups)
    found = compared(scored)["columns"]["sex"]["F"]["classes"]["c0"]
    chosen = (np.array(groups["sex"]) == "F") & (targets[:, 0] >= 0)
    assert found["known"] == chosen.sum()
    assert found["auroc"] == pytest.approx(
        roc_auc_score(targets[chosen, 0], logits[chosen, 0]), abs=1e-6
    )


def test_the_interval_of_a_groups_auroc_is_that_of_sorted_replicates():
    """By placements and by sorting each replicate: within a tenth of the width."""
    scored = simulated(2, 300)
    drawn = replicate(scored, Settings())
    found = compare_groups(scored, drawn, 10)["columns"]["sex"]["M"]["classes"]["c0"]
    mask = np.array(scored.groups["sex"]) == "M"
    truth, logits, own = scored.targets[mask, 0] == 1, scored.logits[mask, 0], drawn.take(mask)
    expected = of_auroc(own, roc_auc_score(truth, logits), own.auroc(logits, truth), truth)
    width = expected[1] - expected[0]
    assert found["auroc_interval"] == pytest.approx(expected, abs=0.1 * width)


def test_the_interval_of_a_perfect_group_is_newcombes():
    """As metrics.json says of an AUROC of 1; Wilson's of the positives would begin at 0.758."""
    targets = np.arange(64)[:, None] < 24
    sex = ["F", "M"] * 32  # 12 with it and 20 without it in each
    scored = multilabel(targets, 1.0 * targets, range(64), {"sex": sex})
    low, high = compared(scored)["columns"]["sex"]["F"]["classes"]["c0"]["auroc_interval"]
    q1, q2 = low / (2 - low), 2 * low**2 / (1 + low)  # Hanley & McNeil 1982, with 16 of each
    variance = (low * (1 - low) + 15 * (q1 - low**2) + 15 * (q2 - low**2)) / (12 * 20)
    assert high == 1
    assert (1 - low) / np.sqrt(variance) == pytest.approx(norm.ppf(0.975), abs=1e-4)


def test_a_gap_of_20_points_in_one_group_is_flagged_first():
    """Sensitivity 0.6 in women and 0.8 in men; the interval is wide, as of many comparisons."""
    found = compared(simulated(3, 1000, gap=0.2))
    first, *others = found["gaps"]
    assert first["flagged"]
    assert (first["column"], first["label"], first["measure"]) == ("sex", "c0", "recall")
    assert (first["higher"], first["lower"], first["groups"]) == ("M", "F", 2)
    low, high = first["interval"]
    assert 0 < low < 0.2 < high
    flagged = [gap for gap in others if gap["flagged"]]
    assert {(gap["column"], gap["label"]) for gap in flagged} <= {("sex", "c0")}
    assert not [gap for gap in others[len(flagged) :] if gap["flagged"]]


def test_without_a_gap_hardly_any_data_set_is_flagged():
    """About 50 comparisons each; of 20 data sets 1 is to be expected, and 5 once in 400 times.

    The full simulation is in the docstring of `cxrdist.evaluate.groups`.
    """
    sets = [compared(simulated(seed, 150), replicates=300) for seed in range(20)]
    assert all(found["comparisons"] > 40 for found in sets)
    assert sum(any(gap["flagged"] for gap in found["gaps"]) for found in sets) < 5


def test_ten_right_answers_are_no_proof_of_a_gap():
    """10 of 10 positives found: where 400 of 500 are found, one in ten such groups has it.

    They have no spread of their own.
    """
    positive = np.ones(1010, bool)
    positive[::2] = False
    positive[:10] = True
    logits = np.where(positive, 1.0, -1.0)
    places = np.flatnonzero(positive)[10:]
    logits[places[: len(places) // 5]] = -1.0
    groups = {"source": ["small"] * 10 + ["large"] * 1000}
    scored = multilabel(positive[:, None], logits[:, None], range(1010), groups)
    found = compared(scored)
    gap = next(gap for gap in found["gaps"] if gap["measure"] == "recall")
    assert (gap["higher"], gap["flagged"]) == ("small", False)
    assert gap["difference"] == pytest.approx(0.2, abs=0.01)


def test_groups_of_too_few_patients_and_unknown_ones_are_shown_and_not_compared():
    """Of nine patients all figures are wrong, and of those without a sex; nobody else differs."""
    random = np.random.default_rng(4)
    targets = random.random((418, 1)) < 0.5
    logits = np.where(targets, 1.0, -1.0) * np.where(random.random((418, 1)) < 0.8, 1, -1)
    sex = ["F", "M"] * 200 + ["O"] * 9 + [""] * 9
    logits[400:] = np.where(targets[400:], -1.0, 1.0)
    found = compared(multilabel(targets, logits, range(418), {"sex": sex}))
    groups = found["columns"]["sex"]
    assert list(groups) == ["F", "M", "O", "unknown"]
    assert groups["O"]["classes"]["c0"]["recall"] == 0
    assert "recall" in groups["O"]["classes"]["c0"]["too_few"]
    assert found["comparisons"] == 3
    assert {(gap["higher"], gap["lower"]) for gap in found["gaps"]} <= {("F", "M"), ("M", "F")}


def test_many_images_of_few_patients_are_too_few():
    """Nine patients of ten images each."""
    targets = np.tile([1, 0], 90)[:, None]
    patients = [place // 10 for place in range(180)]
    groups = {"source": ["a"] * 90 + ["b"] * 90}
    found = compared(multilabel(targets, targets - 0.5, patients, groups))
    assert found["comparisons"] == 0
    assert "recall" in found["columns"]["source"]["a"]["classes"]["c0"]["too_few"]


def test_of_one_class_per_image_groups_have_an_accuracy():
    """Predicted is the largest logit; it is compared as the other figures are."""
    random = np.random.default_rng(5)
    labels, sex = random.integers(0, 3, 600), random.integers(0, 2, 600)
    logits = random.normal(size=(600, 3)) + 3 * (labels[:, None] == np.arange(3))
    logits[sex == 1] = random.normal(size=((sex == 1).sum(), 3))
    scored = Scored(
        "multiclass",
        ["a", "b", "c"],
        [str(place) for place in range(600)],
        [str(place) for place in range(600)],
        (labels[:, None] == np.arange(3)).astype(np.int8),
        logits,
        {"sex": ["FM"[place] for place in sex]},
    )
    found = compared(scored)
    group = found["columns"]["sex"]["F"]
    right = logits[sex == 0].argmax(1) == labels[sex == 0]
    assert group["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    gap = next(gap for gap in found["gaps"] if gap["measure"] == "accuracy")
    assert (gap["label"], gap["higher"], gap["flagged"]) == (None, "F", True)
    assert typed(json.loads(json.dumps(found)), Groups) == found


@pytest.mark.parametrize(
    ("text", "band"),
    [
        *(("0", "0-17"), ("17.9", "0-17"), ("18", "18-39"), ("59.99", "40-59"), ("60", "60-79")),
        *(("80", "80+"), ("120", "80+"), ("121", ""), ("-1", ""), ("nan", ""), ("", ""), ("x", "")),
    ],
)
def test_ages_stand_in_bands(text, band):
    """Years with a fraction too; what is no age is unknown."""
    assert age_band(text) == band


def test_bands_of_age_stand_in_their_order_and_unknown_ages_last():
    """Not the largest first, as groups of other columns."""
    members = split_groups("age", ["70", "", "", "", "20", "71", "5"])
    assert list(members) == ["0-17", "18-39", "60-79", "unknown"]
    assert members["60-79"].tolist() == [True, False, False, False, False, True, False]


def test_of_a_column_with_many_groups_the_smallest_are_joined():
    """The largest have a name each, and all else is one group that is not compared."""
    names = [f"s{place % 20}" if place < 400 else f"s{place % 12}" for place in range(640)]
    targets = np.tile([1, 0], 320)[:, None]
    found = compared(multilabel(targets, targets - 0.5, range(640), {"source": names}))
    groups = found["columns"]["source"]
    assert list(groups)[-1] == "others"
    assert len(groups) == MOST_GROUPS + 1
    assert groups["others"]["images"] == 8 * 20
    json.dumps(found, allow_nan=False)  # all groups are faultless
    assert not any(gap["flagged"] for gap in found["gaps"])
    assert all("others" not in (gap["higher"], gap["lower"]) for gap in found["gaps"])


def test_images_without_columns_have_no_groups():
    """And a column in which all are alike tells nothing."""
    scored = simulated(6, 50)
    alike = multilabel(scored.targets, scored.logits, scored.patients, {"sex": ["F"] * len(scored)})
    drawn = draw(alike.patients, ["s"] * len(alike), 50)
    found = compare_groups(alike, drawn, 10)
    assert (found["columns"], found["gaps"], found["comparisons"]) == ({}, [], 0)
