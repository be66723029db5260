import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from cxrdist.bootstrap import draw, interval


def tied_scores(seed, num_images=300, num_patients=80):
    """Scores of which most are equal to others, their truth, and the patients of the images."""
    random = np.random.default_rng(seed)
    truth = random.random(num_images) < 0.3
    scores = (random.standard_normal(num_images) + truth).round(1)
    return scores, truth, [f"p{n}" for n in random.integers(num_patients, size=num_images)]


@pytest.mark.parametrize("seed", range(3))
def test_rankings_of_replicates_are_scikit_learns_with_weights(seed):
    """An image counts as often as its patient was drawn; ties are frequent."""
    scores, truth, patients = tied_scores(seed)
    replicates = draw(patients, [""] * len(patients), replicates=130, seed=seed)
    auroc = replicates.auroc(scores, truth)
    average_precision = replicates.ranking(scores, truth)[1]
    for i in range(0, 130, 3):
        weights = replicates.draws[i, replicates.patient].astype(float)
        expected = roc_auc_score(truth, scores, sample_weight=weights)
        assert auroc[i] == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(truth, scores, sample_weight=weights)
        assert average_precision[i] == pytest.approx(expected, abs=1e-12)


def test_the_auroc_of_a_replicate_is_that_of_its_images_written_out():
    """Second implementation: each image as often as it was drawn, and all pairs compared."""
    scores, truth, patients = tied_scores(7)
    replicates = draw(patients, [str(t) for t in truth], replicates=20)
    found = replicates.auroc(scores, truth)
    for i in range(20):
        images = np.repeat(np.arange(len(truth)), replicates.draws[i, replicates.patient])
        positive, negative = scores[images[truth[images]]], scores[images[~truth[images]]]
        above = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        assert found[i] == pytest.approx(above.mean(), abs=1e-12)


def test_sums_and_shares_are_those_of_the_drawn_images():
    """A patient who was drawn twice counts twice, with all images."""
    random = np.random.default_rng(0)
    _, truth, patients = tied_scores(0)
    replicates = draw(patients, [str(t) for t in truth], replicates=150)
    weights = replicates.draws[:, replicates.patient].astype(float)
    values = random.standard_normal((len(truth), 2))
    assert replicates.sums(values) == pytest.approx(weights @ values)
    part = random.random(len(truth)) < 0.5
    expected = (weights @ (part & truth)) / (weights @ truth)
    assert replicates.share(part, truth) == pytest.approx(expected)
    some = replicates.take(truth)
    assert some.share(part[truth], np.ones(truth.sum(), bool)) == pytest.approx(expected)


def test_each_stratum_keeps_its_number_of_patients():
    """Of 5 patients with the class and 20 without, and 2 who have images of both kinds."""
    patients = [f"p{n}" for n in range(27)] + ["p25", "p26"]
    strata = ["ill"] * 5 + ["well"] * 22 + ["ill"] * 2
    replicates = draw(patients, strata, replicates=500)
    for members, size in ((slice(5), 5), (slice(5, 25), 20), (slice(25, 27), 2)):
        assert (replicates.draws[:, members].sum(axis=1) == size).all()
    spread = replicates.draws[:, 5:25].std(axis=0)
    assert spread.mean() == pytest.approx(np.sqrt(1 - 1 / 20), abs=0.05)  # of a multinomial draw


def test_a_replicate_without_a_side_has_no_ranking_and_no_share():
    """What a replicate lacks is NaN, and does not enter an interval."""
    replicates = draw(["a", "b", "c"], [""] * 3, replicates=200)
    truth, scores = np.array([True, False, False]), np.array([0.5, 0.2, 0.7])
    lacks = (replicates.draws[:, 0] == 0) | (replicates.draws[:, 1:].sum(axis=1) == 0)
    assert 0 < lacks.sum() < 200
    assert np.isnan(replicates.auroc(scores, truth)).tolist() == lacks.tolist()
    assert np.isnan(replicates.ranking(scores, truth)[1]).tolist() == lacks.tolist()
    assert np.isnan(replicates.share(truth, truth)).sum() == (replicates.draws[:, 0] == 0).sum()
    assert interval(np.full(5, np.nan)) is None


def test_replicates_that_are_all_equal_give_no_interval():
    """An interval of width zero would say that the figure is certain."""
    assert interval(np.array([0.3, np.nan, 0.1 + 0.2])) is None
    assert interval(np.array([0.3, 0.3, 0.4])) is not None


def test_the_same_arguments_give_the_same_draws():
    """So two models are compared replicate by replicate; another seed draws other patients."""
    patients, strata = [str(n % 50) for n in range(120)], [str(n % 2) for n in range(120)]
    first, again = draw(patients, strata), draw(patients, strata)
    assert np.array_equal(first.draws, again.draws)
    assert not np.array_equal(first.draws, draw(patients, strata, seed=1).draws)


def test_percentiles_of_a_mean_are_those_of_theory():
    """The mean of 400 independent normal values is within 1.96 / 20 of 0 in 95 of 100 cases."""
    values = np.random.default_rng(0).standard_normal(400)
    replicates = draw([str(n) for n in range(400)], [""] * 400)
    low, high = interval(replicates.sums(values[:, None])[:, 0] / 400)
    half = stats.norm.ppf(0.975) * values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.006)
