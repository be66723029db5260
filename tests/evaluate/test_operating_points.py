"""Operating points: thresholds by scikit-learn, rates by hand, predictive values by Bayes' rule."""

import numpy as np
import pytest
from sklearn.metrics import (
    confusion_matrix,
    precision_score,
    recall_score,
    roc_curve,
)

from cxrdist.bootstrap import draw
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.calibration import choose_calibration
from cxrdist.evaluate.operating_points import (
    Rule,
    choose_threshold,
    operating_points,
    operating_table,
    read_rule,
)
from cxrdist.evaluate.scored import Scored
from cxrdist.model.description import Calibration
from cxrdist.model.prediction import Predictions

RULES = ["youden", "sensitivity=0.95", "specificity=0.9"]


def make_scored(num_images, seed, unknown=0.1, classes=("a", "b")):
    """Images of two labels, some unknown; logits in steps, so that many are equal."""
    random = np.random.default_rng(seed)
    logits = np.round(random.normal(0, 1.5, (num_images, len(classes))), 1).astype(np.float32)
    targets = (random.normal(0, 1.5, logits.shape) < logits).astype(np.int8)
    targets[random.random(logits.shape) < unknown] = -1
    keys = [str(i) for i in range(num_images)]
    patients = [f"p{i // 2}" for i in range(num_images)]
    return Scored("multilabel", [*classes], keys, patients, targets, logits.astype(np.float64), {})


def best_by_trial(logits, truth, rule):
    """The threshold of a rule by trying all: a second implementation, in whole numbers."""
    best = None
    for threshold in sorted(set(logits.tolist()), reverse=True):
        called = logits >= threshold
        hits, spared = int((called & truth).sum()), int((~called & ~truth).sum())
        positives, negatives = int(truth.sum()), int((~truth).sum())
        value = {
            "youden": hits * negatives + spared * positives,
            "sensitivity": spared if hits >= (rule.least or 0) * positives else -1,
            "specificity": hits if spared >= (rule.least or 0) * negatives else -1,
        }[rule.measure]
        if best is None or value > best[0]:
            best = value, threshold
    return best[1]


@pytest.mark.parametrize("text", RULES)
def test_thresholds_are_the_best_ones_and_the_largest_of_equals(text):
    """As found by trying every logit, on 40 draws with many equal logits."""
    for seed in range(40):
        scored = make_scored(60, seed, unknown=0)
        logits, truth = scored.logits[:, 0], scored.targets[:, 0] == 1
        rule = read_rule(text)
        assert choose_threshold(logits, truth, rule) == best_by_trial(logits, truth, rule)


def test_a_sensitivity_is_reached_with_the_largest_threshold():
    """19 of 20 positives are 0.95, not less; the next smaller logit would only add false alarms."""
    logits = np.array([*range(20), 0.5, 0.25], float)
    truth = np.array([True] * 20 + [False] * 2)
    assert choose_threshold(logits, truth, Rule("sensitivity", 0.95)) == 1
    assert choose_threshold(logits, truth, Rule("sensitivity", 0.951)) == 0
    assert choose_threshold(logits, truth, Rule("specificity", 1)) == 1


def test_where_no_threshold_is_better_than_never_there_is_none():
    """The largest logit is of a negative, and every call costs more than it brings."""
    logits, truth = np.array([3.0, 2.0, 1.0]), np.array([False, False, True])
    assert np.isinf(choose_threshold(logits, truth, Rule("youden", None)))
    assert np.isinf(choose_threshold(logits, truth, Rule("specificity", 0.9)))


@pytest.mark.parametrize(
    "text",
    [
        *("", "youden=", "youden=1", "sensitivity", "sensitivity=", "sensitivity=0"),
        *("sensitivity=nan", "sensitivity=-0.5", "recall=0.9"),
        *("specificity=1.1", "specificity=1e-2", "specificity=1/2"),
    ],
)
def test_another_rule_is_one_line(text):
    """What is not youden or a share is refused by the option's name."""
    with pytest.raises(CxrdistError, match=r"--operating-point .*expected youden, sensitivity="):
        read_rule(text)


def test_a_rule_is_written_as_it_is_read():
    """model.json keeps its text, also of numbers with many digits."""
    texts = [*RULES, "sensitivity=1", "sensitivity=0.00001", "specificity=0.9999999"]
    assert [str(read_rule(text)) for text in texts] == texts


def test_points_of_val_on_test_are_those_of_scikit_learn():
    """Thresholds of its roc_curve on val; on test its recall, precision and confusion matrix."""
    val, test = make_scored(300, 0), make_scored(200, 1)
    calibration = choose_calibration(val, read_rule("youden"), 10, "0" * 64)
    replicates = draw(test.patients, [""] * len(test), 200)
    found = operating_points(test, replicates, calibration, 0.02)
    assert found["rule"] == "youden"
    assert found["chosen_on"] == {
        "index_sha256": "0" * 64,
        "images": 300,
        "patients": 150,
        "fewest": 10,
    }
    for column, name in enumerate(test.classes):
        known = val.targets[:, column] >= 0
        false_rate, true_rate, thresholds = roc_curve(
            val.targets[known, column], val.logits[known, column]
        )
        threshold = thresholds[np.argmax(true_rate - false_rate)]
        point = found["classes"][name]
        assert point["threshold"] == threshold
        assert point["probability"] == pytest.approx(1 / (1 + np.exp(-threshold)), abs=1e-6)
        known = test.targets[:, column] >= 0
        truth, called = test.targets[known, column], test.logits[known, column] >= threshold
        spared, alarms, missed, hits = confusion_matrix(truth, called).ravel()
        names = ("true_negatives", "false_positives", "false_negatives", "true_positives")
        assert [point[n] for n in names] == [spared, alarms, missed, hits]
        sensitivity = recall_score(truth, called)
        specificity = recall_score(truth, called, pos_label=0)
        expected = {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": precision_score(truth, called),
            "npv": precision_score(truth, called, pos_label=0),
        }
        for measure, value in expected.items():
            assert point[measure] == pytest.approx(value, abs=1e-6)
            low, high = point[f"{measure}_interval"]
            assert low < value < high
        # Of 100,000 patients 2,000 have it.
        hits, alarms = sensitivity * 2000, (1 - specificity) * 98000
        missed, spared = (1 - sensitivity) * 2000, specificity * 98000
        elsewhere = point["at_prevalence"]
        assert elsewhere["ppv"] == pytest.approx(hits / (hits + alarms), abs=1e-6)
        assert elsewhere["npv"] == pytest.approx(spared / (spared + missed), abs=1e-6)
        low, high = elsewhere["ppv_interval"]
        assert low < elsewhere["ppv"] < high < point["ppv"]


@pytest.mark.parametrize(("hits", "spared"), [(9, 5), (0, 17), (0, 20)])
def test_values_at_a_prevalence_have_the_limits_of_sensitivity_and_specificity(hits, spared):
    """Of 12 and 20 patients: their distances are added as squares, on the scale of log odds.

    At a prevalence of 0.1 the odds of the NPV are 9 x specificity / (1 - sensitivity), those of the
    PPV sensitivity / (1 - specificity) / 9. No replicate of a rate of 0 or 1 differs from another,
    and few of those of a small specificity would set the standard error of the NPV.
    """
    called = [True] * hits + [False] * (12 - hits + spared) + [True] * (20 - spared)
    patients, has = [str(i) for i in range(32)], [True] * 12 + [False] * 20
    logits, truth = np.where(called, 1.0, -1.0)[:, None], np.array(has, np.int8)[:, None]
    scored = Scored("multilabel", ["a"], patients, patients, truth, logits, {})
    calibration = Calibration({}, "youden", {"a": 0.0}, {}, 10, "0" * 64, 32, 32)
    replicates = draw(patients, [str(own) for own in has])
    point = operating_points(scored, replicates, calibration, 0.1)["classes"]["a"]
    elsewhere = point["at_prevalence"]
    rates = {"ppv": ("sensitivity", "specificity", 1 / 9), "npv": ("specificity", "sensitivity", 9)}
    for name, (first, second, times) in rates.items():
        for end, limit in enumerate(elsewhere[f"{name}_interval"] or ()):
            if elsewhere[name] == 0:
                continue
            ends = point[f"{first}_interval"][end], point[f"{second}_interval"][end]
            odds = times * point[first] / (1 - point[second])
            ratios = ends[0] / point[first], (1 - point[second]) / (1 - ends[1])
            reach = np.sqrt(sum(np.log(ratio) ** 2 for ratio in ratios))
            expected = odds * np.exp(reach if end else -reach)
            assert limit == pytest.approx(expected / (1 + expected), abs=2e-5)
    assert elsewhere["npv_interval"] is not None


def test_without_positives_a_rate_is_undefined():
    """Of a set of healthy patients there is a specificity and no sensitivity."""
    calibration = choose_calibration(make_scored(300, 0), read_rule("youden"), 10, "0" * 64)
    healthy = make_scored(50, 2)
    healthy.targets[:] = 0
    replicates = draw(healthy.patients, [""] * len(healthy), 50)
    point = operating_points(healthy, replicates, calibration, None)["classes"]["a"]
    assert point["sensitivity"] is None
    assert point["sensitivity_interval"] is None
    assert 0 < point["specificity"] < 1
    assert "at_prevalence" not in point


def test_a_rate_of_one_has_no_interval_of_one():
    """Of 20 patients, all told right: Wilson's 0.839 to 1, and by Bayes' rule what that gives."""
    logits = np.repeat([3.0, -3.0], 20)[:, None]
    keys = [str(i) for i in range(40)]
    scored = Scored("multilabel", ["a"], keys, keys, (logits > 0).astype(np.int8), logits, {})
    calibration = choose_calibration(scored, read_rule("youden"), 10, "0" * 64)
    replicates = draw(keys, [""] * 40, 50)
    point = operating_points(scored, replicates, calibration, 0.1)["classes"]["a"]
    low = 1 / (1 + 1.959964**2 / 20)
    for rate in ("sensitivity", "specificity", "ppv", "npv"):
        assert point[rate] == 1
        assert point[f"{rate}_interval"] == pytest.approx([low, 1], abs=1e-6)
    elsewhere = point["at_prevalence"]
    assert (elsewhere["ppv"], elsewhere["npv"]) == (1, 1)
    hits, alarms = low * 0.1, (1 - low) * 0.9
    assert elsewhere["ppv_interval"] == pytest.approx([hits / (hits + alarms), 1], abs=1e-5)


def test_a_logit_read_from_nine_digits_is_called_as_the_networks_own():
    """The float32 0.1 and its nine digits are other doubles; the threshold is one of the two."""
    scored = make_scored(300, 0)
    calibration = choose_calibration(scored, read_rule("youden"), 10, "0" * 64)
    exact = np.float32(0.1)
    calibration.thresholds["a"] = float(exact)
    logits = np.array([[exact, 0], [float(f"{exact:.9g}"), 0], [0.0999, 0]])
    assert logits[1, 0] < logits[0, 0]
    found = Predictions(logits, ["a", "b"], "multiclass", calibration).called
    assert [*found] == ["a", "b"]
    assert found["a"].tolist() == [True, True, False]


def test_the_table_is_in_percent_and_what_is_undefined_is_a_dash():
    """A row for each class, and below it one with its predictive values at the prevalence."""
    rates = {"sensitivity": 0.8125, "specificity": 1.0, "ppv": 0.5, "npv": None}
    limits = {"sensitivity": [0.7, 0.9], "specificity": None, "ppv": [0.25, 0.75], "npv": None}
    point = {"probability": 0.0625, **rates}
    point |= {f"{name}_interval": within for name, within in limits.items()}
    bayes = {"ppv": 0.05, "ppv_interval": [0.01, 0.1], "npv": 0.999, "npv_interval": None}
    classes = {"a": point, "b": {**point, "at_prevalence": bayes}}
    said = operating_table({"classes": classes, "prevalence": 0.02})
    row = "0.062 81.2 (70.0-90.0) 100.0 50.0 (25.0-75.0) -"
    assert [" ".join(line.split()) for line in said.splitlines()[2:]] == [
        f"a {row}",
        f"b {row}",
        "at 0.02 5.0 (1.0-10.0) 99.9",
    ]
