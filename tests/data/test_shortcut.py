import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxrdist.data.shortcut import judge


def scored(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [N, 2] that tell two classes with an AUROC of about 0.76, and targets."""
    random = np.random.default_rng(0)
    is_first = random.random(num_images) < 0.4
    score = random.normal(is_first, 1.0)
    return np.stack([score, -score], 1), np.stack([is_first, ~is_first], 1).astype(np.int8)


def delong_error(scores: np.ndarray, truth: np.ndarray) -> float:
    """The standard error of an AUROC by its definition (DeLong et al. 1988), in a double loop."""
    wins = (scores[truth][:, None] > scores[~truth]).astype(float)
    above, below = wins.mean(1), wins.mean(0)
    return float(np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)))


def test_the_interval_of_an_auroc_is_1_96_of_delongs_errors_to_each_side():
    """Of 500 patients with one image each, to 10 % of its width."""
    scores, targets = scored(500)
    found = judge(scores, targets, range(500), ["a", "b"], "multiclass")["auroc"]["a"]
    truth = targets[:, 0] == 1
    value, error = roc_auc_score(truth, scores[:, 0]), delong_error(scores[:, 0], truth)
    assert found["value"] == round(value, 4)
    assert found["low"] == pytest.approx(value - 1.96 * error, abs=0.4 * error)
    assert found["high"] == pytest.approx(value + 1.96 * error, abs=0.4 * error)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_four_equal_images_of_each_patient_make_no_interval_narrower():
    """They tell no more than one; as independent images they would halve it."""
    scores, targets = scored(300)
    once = judge(scores, targets, range(300), ["a", "b"], "multiclass")
    patients = [number for number in range(300) for _ in range(4)]
    four = judge(
        np.repeat(scores, 4, 0), np.repeat(targets, 4, 0), patients, ["a", "b"], "multiclass"
    )
    for one, other in (
        (once["accuracy"], four["accuracy"]),
        (once["mean_auroc"], four["mean_auroc"]),
        (once["auroc"]["a"], four["auroc"]["a"]),
    ):
        assert other["value"] == one["value"]
        assert other["high"] - other["low"] == pytest.approx(one["high"] - one["low"], rel=0.05)


def test_the_accuracy_is_that_of_the_highest_score_with_the_binomial_interval():
    """Of patients with one image each: p and 1.96 times the square root of p (1 - p) / n."""
    scores, targets = scored(400)
    found = judge(scores, targets, range(400), ["a", "b"], "multiclass")["accuracy"]
    p = float(((scores[:, 0] > 0) == (targets[:, 0] == 1)).mean())
    assert found["value"] == pytest.approx(p, abs=1e-4)
    half = 1.96 * np.sqrt(p * (1 - p) / 400)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_images_of_which_a_label_is_not_known_have_no_part_in_its_figure():
    """Their scores may be anything; there is no accuracy of several labels."""
    scores, targets = scored(200)
    known = judge(scores[:100], targets[:100], range(100), ["a", "b"], "multilabel")
    targets[100:] = -1
    found = judge(scores, targets, range(200), ["a", "b"], "multilabel")
    assert found["accuracy"] is None
    assert found["auroc"]["a"]["value"] == known["auroc"]["a"]["value"]
    assert found["auroc"]["a"]["high"] - found["auroc"]["a"]["low"] == pytest.approx(
        known["auroc"]["a"]["high"] - known["auroc"]["a"]["low"], rel=0.1
    )
