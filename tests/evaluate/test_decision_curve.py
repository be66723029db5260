"""Net benefit against its definition and against simple arithmetic."""

import numpy as np
import pytest
from scipy.special import expit, logit

from cxrdist.bootstrap import draw
from cxrdist.evaluate.calibration import choose_calibration
from cxrdist.evaluate.decision_curve import THRESHOLDS, decision_curve
from cxrdist.evaluate.operating_points import Rule
from cxrdist.evaluate.scored import Scored


def make_scored(probabilities, truth, patients=None):
    keys = [str(i) for i in range(len(truth))]
    targets = np.array(truth, np.int8)[:, None]
    logits = logit(np.array(probabilities, float))[:, None]
    return Scored("multilabel", ["a"], keys, patients or keys, targets, logits, {})


def curve_of(scored, calibration=None):
    replicates = draw(scored.patients, [""] * len(scored), 200)
    return decision_curve(scored, replicates, calibration)["classes"]["a"]


def test_net_benefit_by_hand():
    """From 0.2 on 3 of 4 cases and 2 of 6 others are called: 3/10 - 2/10 * 0.2/0.8 = 0.25."""
    probabilities = [0.9, 0.7, 0.3, 0.1, 0.6, 0.25, 0.15, 0.05, 0.03, 0.02, 0.5]
    scored = make_scored(probabilities, [1] * 4 + [0] * 6 + [-1])
    found = curve_of(scored)
    at = THRESHOLDS.index(0.2)
    assert (found["known"], found["positives"], found["probabilities"]) == (10, 4, "network")
    assert found["net_benefit"][at] == 0.25
    assert found["treat_all"][at] == pytest.approx(0.4 - 0.6 * 0.25, abs=1e-6)
    low, high = found["net_benefit_interval"][at]
    assert low < 0.25 < high


def test_a_probability_equal_to_a_threshold_is_called():
    """A table of rounded probabilities has many such: at each threshold t all are called from t."""
    for threshold in THRESHOLDS:
        curve = curve_of(make_scored([threshold] * 4, [1, 0, 0, 0]))
        called = [t <= threshold for t in THRESHOLDS]
        expected = np.where(called, curve["treat_all"], 0)
        assert curve["net_benefit"] == expected.tolist(), threshold


def test_intervals_of_few_patients_hold_the_truth():
    """6 of 24 patients are called from 0.5 on with a probability of 0.75, the others of 0.2.

    The net benefit is 0.25 * 0.75 - 0.75 * 0.2 = 0.0375; percentiles hold it in 90 of 100 sets.
    """
    random, truth, held = np.random.default_rng(0), np.arange(24) < 6, []
    for _ in range(500):
        called = random.random(24) < np.where(truth, 0.75, 0.2)
        scored = make_scored(np.where(called, 0.6, 0.4), truth)
        replicates = draw(scored.patients, [str(value) for value in truth], 100)
        curve = decision_curve(scored, replicates, None)["classes"]["a"]
        within = curve["net_benefit_interval"][THRESHOLDS.index(0.5)]
        held.append(within is not None and within[0] <= 0.0375 <= within[1])
    assert np.mean(held) >= 0.95


def test_perfect_and_useless_models():
    """Who is always right has the prevalence; who calls all has the curve of treating all."""
    truth = [1] * 30 + [0] * 70
    perfect = curve_of(make_scored([0.999] * 30 + [0.001] * 70, truth))
    assert perfect["net_benefit"] == pytest.approx([0.3] * len(THRESHOLDS), abs=1e-6)
    everybody = curve_of(make_scored([0.99] * 100, truth))
    assert everybody["net_benefit"] == everybody["treat_all"]
    assert everybody["net_benefit_interval"] == everybody["treat_all_interval"]
    nobody = curve_of(make_scored([0.001] * 100, truth))
    assert nobody["net_benefit"] == [0] * len(THRESHOLDS)


def test_a_calibrated_model_is_never_worse_than_both_defaults():
    """Probabilities of an overconfident network cost, at high thresholds; its temperature helps."""
    random = np.random.default_rng(0)
    true = random.normal(-1, 1.5, 20_000)
    truth = random.random(20_000) < expit(true)
    scored = make_scored(expit(true * 3), truth)
    before = np.array(curve_of(scored)["net_benefit"])
    found = curve_of(scored, choose_calibration(scored, Rule("youden", None), 10, "0" * 64))
    after = np.array(found["net_benefit"])
    assert found["probabilities"] == "calibrated"
    assert (after >= np.maximum(found["treat_all"], 0) - 2e-3).all()
    assert before[-1] < -0.02
    assert (after >= before - 1e-3).all()
