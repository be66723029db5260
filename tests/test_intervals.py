import numpy as np
import pytest
from scipy import stats
from simulated_sets import coverage

from cxrdist.bootstrap import draw
from cxrdist.intervals import bounded, newcombe, of_auroc, of_mean, of_share, wilson


@pytest.mark.parametrize("correlation", [0, 0.5])
def test_intervals_by_patient_hold_the_truth_and_wilsons_do_not(correlation):
    """In 93 to 97 of 100 test sets of 60 patients; Wilson's only where images are independent.

    500 sets leave a standard error of 1 %. The full simulation is `simulated_sets.py`.
    """
    held = coverage(500, 60, correlation, 300)
    for name in ("AUROC", "accuracy", "sensitivity"):
        assert 0.93 <= held[name] <= 0.97, held
    for name in ("accuracy, Wilson", "sensitivity, Wilson"):
        assert (held[name] > 0.93) == (correlation == 0), held
        assert correlation == 0 or held[name] < 0.87, held


def test_a_share_of_all_or_none_is_of_its_patients():
    """60 of 60 images of 20 patients are right: Wilson's limits of 20 of 20, not [1, 1]."""
    patients = [str(n % 20) for n in range(60)]
    replicates, images = draw(patients, [""] * 60), np.ones(60, bool)
    expected = 20 / (20 + stats.norm.ppf(0.975) ** 2)  # Wilson's limit in closed form
    assert of_share(replicates, images, images) == pytest.approx([expected, 1], abs=1e-6)
    assert of_share(replicates, ~images, images) == pytest.approx([0, 1 - expected], abs=1e-6)
    assert of_share(replicates, images, ~images) is None


def test_a_share_whose_replicates_are_alike_is_of_its_patients():
    """Of each of 16 patients one image of two is right: as 8 of 16, and one patient as 1 draw."""
    patients = [str(n // 2) for n in range(32)]
    right, images = np.arange(32) % 2 == 0, np.ones(32, bool)
    low, high = of_share(draw(patients, [""] * 32), right, images)
    half = stats.norm.ppf(0.975) * np.sqrt(1 / (0.25 * 16))  # of a logit
    assert [low, high] == pytest.approx([1 / (1 + np.exp(half)), 1 / (1 + np.exp(-half))], abs=1e-6)
    low, high = of_share(draw(["a"] * 2, [""] * 2), right[:2], images[:2])
    assert low < 0.05
    assert high > 0.95


def test_the_interval_of_a_perfect_auroc_is_newcombes():
    """Its limit is 1.96 of its own standard errors (Hanley & McNeil 1982) away from 1."""
    low, high = newcombe(1.0, 12, 12)
    assert high == 1
    q1, q2 = low / (2 - low), 2 * low**2 / (1 + low)
    variance = (low * (1 - low) + 11 * (q1 - low**2) + 11 * (q2 - low**2)) / 144
    assert (1 - low) / np.sqrt(variance) == pytest.approx(stats.norm.ppf(0.975), abs=1e-4)
    assert newcombe(0.0, 12, 12) == pytest.approx([0, 1 - low])
    assert newcombe(1.0, 1, 1)[0] < 0.25
    assert newcombe(1.0, 500, 500)[0] > 0.99


@pytest.mark.parametrize("auroc", [1 - 2**-53, 2.0**-60])
def test_rounding_errors_do_not_widen_the_interval_of_a_perfect_figure(auroc):
    """A sum of floats that should be 1, or 0, gets Newcombe's limits (AUROC) or Wilson's."""
    truth, perfect = np.arange(52) < 24, round(auroc)
    replicates = draw([str(n // 2) for n in range(52)], list(map(str, truth)), 50)
    values = np.full(50, auroc)
    assert of_auroc(replicates, auroc, values, truth) == newcombe(perfect, 12, 14)
    z = stats.norm.ppf(0.975)
    limit = z**2 / (12 + z**2)  # Wilson's limit in closed form
    expected = [1 - limit, 1] if perfect else [0, limit]
    assert bounded(auroc, values, 12) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("truth", [0.97, 0.995])
def test_intervals_of_aurocs_near_one_hold_the_truth(truth):
    """Of 25 positives and 75 negatives a fifth of the AUROCs are 1; at least 93 of 100 hold."""
    random, held = np.random.default_rng(0), []
    is_ill = np.arange(100) < 25
    for _ in range(300):
        scores = random.standard_normal(100) + np.sqrt(2) * stats.norm.ppf(truth) * is_ill
        auroc = (scores[is_ill][:, None] > scores[~is_ill]).mean()
        replicates = draw([str(n) for n in range(100)], list(map(str, is_ill)), 200)
        values = replicates.auroc(scores, is_ill)
        low, high = bounded(float(auroc), values, 25, lambda auroc=auroc: newcombe(auroc, 25, 75))
        held.append(low <= truth <= high)
    assert np.mean(held) >= 0.93


def test_the_interval_of_a_mean_adds_up_as_standard_errors_do():
    """Three shares of separate patients: the mean's half width is sqrt(3) / 3 of theirs.

    Where all three are of the same patients and images, it is as wide as they are.
    """
    random = np.random.default_rng(0)
    right = random.random(900) < 0.5
    replicates = draw([str(n) for n in range(900)], [str(n // 300) for n in range(900)])
    separate = [np.arange(900) // 300 == n for n in range(3)]
    for wholes, factor in ((separate, 1 / np.sqrt(3)), (separate[:1] * 3, 1)):
        values = np.stack([replicates.share(right, whole) for whole in wholes])
        limits = [of_share(replicates, right, whole) for whole in wholes]
        low, high = of_mean([right[whole].mean() for whole in wholes], limits, values)
        width = np.mean([pair[1] - pair[0] for pair in limits])
        assert (high - low) / width == pytest.approx(factor, rel=0.08)


def test_the_mean_of_perfect_classes_is_not_certain():
    """Recalls of 1 in two classes of 20 patients: their two gaps add up as independent ones."""
    limits = [wilson(20, 20), wilson(20, 20)]
    low, high = of_mean([1.0, 1.0], limits, np.ones((2, 100)))
    assert high == 1
    assert 1 - low == pytest.approx((1 - limits[0][0]) / np.sqrt(2), abs=1e-6)
