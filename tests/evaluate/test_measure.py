import json

import numpy as np
import pytest
from scipy import stats

from cxrdist.documents import typed
from cxrdist.evaluate.measure import Settings, measure, strata
from cxrdist.evaluate.metrics import SCORES, Metrics, headline, metrics_table
from cxrdist.evaluate.scored import Scored

CLASSES = ["Normal", "Viral Pneumonia", "COVID-19"]
LABELS = ["Effusion", "Pleural_Thickening", "Hernia"]
SMALL = Settings(replicates=200)


def scored(task, classes, targets, logits, patients=None):
    """Images whose patients are given, or one each."""
    keys = [f"k{n}" for n in range(len(targets))]
    targets, logits = np.array(targets, np.int8), np.array(logits, float)
    return Scored(task, classes, keys, patients or keys, targets, logits, {})


def table_1():
    """The 180 test images of Bassi & Attux 2020, Table 1."""
    matrix = [[59, 1, 0], [1, 58, 1], [1, 0, 59]]
    cells = [(t, p) for t in range(3) for p in range(3) for _ in range(matrix[t][p])]
    truth, predicted = np.array(cells).T
    return scored("multiclass", CLASSES, np.eye(3)[truth], 4 * np.eye(3)[predicted] - 2)


def labelled(positives=(40, 25, 7), num_images=200, seed=0):
    """Images of 60 patients with three labels, a tenth of the cells unknown."""
    random = np.random.default_rng(seed)
    targets = np.stack([random.permutation(num_images) < n for n in positives], 1).astype(np.int8)
    logits = random.standard_normal((num_images, len(positives))) + 2 * targets - 1
    unknown = (random.random(targets.shape) < 0.1) & (targets == 0)
    patients = [f"p{n}" for n in random.integers(60, size=num_images)]
    return scored("multilabel", LABELS, np.where(unknown, -1, targets), logits, patients)


@pytest.mark.parametrize("images", [table_1(), labelled()], ids=["multiclass", "multilabel"])
def test_every_score_stands_within_its_interval(images):
    """Of each class and the means; the document is read back with its types."""
    metrics = measure(images, SMALL)
    assert typed(json.loads(json.dumps(metrics)), Metrics) == metrics
    assert metrics["format"] == "cxrdist-metrics-1"
    with pytest.raises(ValueError, match='format: is "cxrdist-metrics-2", expected'):
        typed({**metrics, "format": "cxrdist-metrics-2"}, Metrics)
    for scores in (*metrics["classes"].values(), metrics["macro"]):
        for name in SCORES:
            low, high = scores[f"{name}_interval"]
            assert 0 <= low <= scores[name] <= high <= 1
            assert low < high


def test_intervals_are_of_the_known_cells_only():
    """Cells that are not known change nothing: as if the image were not there for this label."""
    images = labelled()
    known = images.targets[:, 0] >= 0
    other = Scored(**{**vars(images), "logits": np.where(known[:, None], images.logits, 99.0)})
    found, expected = (measure(s, SMALL)["classes"]["Effusion"] for s in (other, images))
    assert found == expected


def test_the_interval_of_independent_images_is_nearly_wilsons():
    """180 patients of one image, 176 right: within a point of Wilson's limits; the unit is said."""
    metrics = measure(table_1(), Settings())
    low, high = stats.binomtest(176, 180).proportion_ci(method="wilson")
    assert metrics["accuracy_wilson"] == pytest.approx([low, high], abs=1e-6)
    assert metrics["accuracy_interval"] == pytest.approx([low, high], abs=0.01)
    made = metrics["intervals"]
    assert (made["unit"], made["patients"], made["replicates"]) == ("image", 180, 2000)
    assert headline(metrics) == (
        "accuracy 0.978 (176 of 180; 95 % interval {:.3f} to {:.3f}, 180 patients)".format(
            *metrics["accuracy_interval"]
        )
    )


def test_images_of_few_patients_have_a_wider_interval():
    """The same images, ten of each patient, who are right or wrong as a whole."""
    truth = np.arange(200) % 2
    right = (np.arange(200) // 10) % 4 > 0
    logits = np.eye(2)[np.where(right, truth, 1 - truth)]
    patients = [f"p{n // 10}" for n in range(200)]
    alone, together = (
        measure(scored("multiclass", ["a", "b"], np.eye(2)[truth], logits, names), SMALL)
        for names in (None, patients)
    )
    width = np.diff(alone["accuracy_interval"])
    assert np.diff(together["accuracy_interval"]) > 2.5 * width  # of 20 draws instead of 200
    assert together["accuracy_wilson"] == alone["accuracy_wilson"]
    assert together["intervals"]["unit"] == "patient"


def test_one_positive_is_never_the_headline():
    """Hernia of one image has AUROC 1: in the table, and not in the mean of the headline."""
    images = labelled((40, 25, 1))
    images.logits[images.targets[:, 2] == 1, 2] = 9
    metrics = measure(images, SMALL)
    hernia, others = metrics["classes"]["Hernia"], metrics["macro_enough"]
    assert (hernia["auroc"], hernia["too_few"]) == (1, "1 positive")
    assert hernia["auroc_interval"][0] < 0.5
    first, second = (metrics["classes"][name]["auroc"] for name in LABELS[:2])
    assert others["auroc"] == pytest.approx((first + second) / 2, abs=1e-6)
    assert others["auroc"] != metrics["macro"]["auroc"]
    line = headline(metrics)
    assert line.startswith(f"mean AUROC {others['auroc']:.3f} over 2 of 3 labels (200 images")
    assert line.endswith("60 patients); too few to say for Hernia (1 positive)")
    assert "Hernia              1         1.000" in metrics_table(metrics)


def test_one_unknown_label_is_not_rounded_away():
    """Of 600 labels 599 are known, which is not 100 %."""
    images = labelled((40, 25, 20))
    images.targets[images.targets < 0] = 0
    assert "known" not in headline(measure(images, SMALL))
    images.targets[0, 0] = -1
    assert "(200 images, over 99% of their labels are known; " in headline(measure(images, SMALL))


def test_too_few_to_say_is_said_of_everything():
    """No label has ten positives, and of several classes there are four images."""
    few = measure(labelled((3, 2, 1)), SMALL)
    assert headline(few).startswith("mean AUROC: too few to say (200 images")
    assert few["macro_enough"]["auroc"] is None
    four = scored("multiclass", ["a", "b"], np.eye(2)[[0, 1, 0, 1]], np.eye(2)[[0, 1, 1, 1]])
    assert headline(measure(four, SMALL)) == "accuracy: too few to say (4 images)"
    one = four.take(np.array([0]))
    assert headline(measure(one, SMALL)) == "accuracy: too few to say (1 image)"
    assert headline(measure(one, Settings(fewest=1, replicates=50))).endswith(", 1 patient)")
    assert measure(four, Settings(fewest=2, replicates=50))["classes"]["a"]["too_few"] is None


def test_the_negatives_may_be_too_few():
    """Of 200 images all but two have the label."""
    metrics = measure(labelled((198, 25, 40)), Settings(fewest=5, replicates=50))
    assert metrics["classes"]["Effusion"]["too_few"] in ("1 negative", "2 negatives")


def test_tables_with_intervals_fit_100_columns():
    """Fourteen labels of ChestX-ray14's size in four lines of header; long names are broken."""
    images = labelled((900, 800, 300), 112_120 // 40)
    images.classes[1] = "Enlarged Cardiomediastinum"
    for metrics in (measure(images, SMALL), measure(table_1(), SMALL)):
        for scores in metrics["classes"].values():
            scores["known"] = 112_120
        lines = metrics_table(metrics).splitlines()
        assert max(map(len, lines)) <= 100
        low, high = metrics["macro"]["auroc_interval"]
        assert f"{low:.3f}-{high:.3f}".replace("0.", ".") in "\n".join(lines)


def test_patients_are_drawn_within_their_rarest_class():
    """One of two labels is with the rarer one, and so are all images of the patient."""
    targets = [[1, 0], [1, 1], [1, 0], [0, 0], [0, -1], [1, 0]]
    images = scored("multilabel", ["often", "rare"], targets, np.zeros((6, 2)), list("aabbcd"))
    found = strata(images)
    assert [found.index(stratum) for stratum in found] == [0, 0, 2, 2, 4, 2]
