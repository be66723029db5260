"""Two models on the same images, against second implementations and known truths."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm, ttest_1samp
from sklearn import metrics as reference

from cxrdist.data.labels import MISSING
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.compare import aligned, compare_scored
from cxrdist.evaluate.delong import compare_aurocs
from cxrdist.evaluate.flips import flips
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.scored import Scored

CLASSES = ["a", "b", "c"]
SETTINGS = Settings(replicates=200)


def make_pair(seed=0, patients=60, images=3, correlation=0.5, shift=0.0, classes=CLASSES):
    """Two models of equal quality on the same images; images of a patient are alike.

    Args:
        seed: of all draws.
        patients: each has `images` images of one class.
        images: of each patient.
        correlation: share of the noise of a logit that all images of a patient have in common,
            half of it in both models.
        shift: what the second model's logits of the true class have more.
        classes: their names.
    """
    random = np.random.default_rng(seed)
    whose = np.repeat(np.arange(patients), images)
    label = random.integers(len(classes), size=patients)[whose]
    targets = (label[:, None] == np.arange(len(classes))).astype(np.int8)

    def noise():
        of_patients = random.normal(size=(patients, len(classes)))[whose]
        own = random.normal(size=(len(whose), len(classes)))
        return np.sqrt(correlation) * of_patients + np.sqrt(1 - correlation) * own

    shared, models = noise(), []
    for more in (0.0, shift):
        mixed = np.sqrt(0.5) * shared + np.sqrt(0.5) * noise()
        logits = (1.2 + more) * targets + mixed
        names = [f"p{number}" for number in whose]
        keys = [f"k{i:04d}" for i in range(len(whose))]
        models.append(Scored("multiclass", list(classes), keys, names, targets, logits, {}))
    return models


def make_labels(pair):
    """The same images as of several labels, of which some are not known."""
    targets = pair[0].targets.copy()
    targets[::7, 1] = MISSING
    return [
        Scored("multilabel", s.classes, s.keys, s.patients, targets, s.logits, {}) for s in pair
    ]


def test_differences_are_those_of_scikit_learn():
    """Each figure of both models, and b - a, of each class and as their mean."""
    pair = make_pair()
    found = compare_scored(*pair, SETTINGS)
    truth = pair[0].targets.argmax(1)
    for which, scored in zip("ab", pair, strict=True):
        guess = scored.logits.argmax(1)
        assert found["accuracy"][which] == pytest.approx((guess == truth).mean(), abs=1e-6)
        for column, name in enumerate(CLASSES):
            own, said, logits = truth == column, guess == column, scored.logits[:, column]
            expected = {
                "auroc": reference.roc_auc_score(own, logits),
                "average_precision": reference.average_precision_score(own, logits),
                "recall": reference.recall_score(own, said),
                "specificity": reference.recall_score(~own, ~said),
                "precision": reference.precision_score(own, said),
                "f1": reference.f1_score(own, said),
            }
            figures = found["classes"][name]["figures"]
            assert {n: figures[n][which] for n in figures} == pytest.approx(expected, abs=1e-6)
    for name, mean in found["macro"].items():
        figures = [found["classes"][c]["figures"][name] for c in CLASSES]
        assert mean["b"] == pytest.approx(np.mean([figure["b"] for figure in figures]), abs=2e-6)
        assert mean["difference"] == pytest.approx(mean["b"] - mean["a"], abs=2e-6)
        assert mean["interval"][0] < mean["difference"] < mean["interval"][1]


def test_labels_count_where_they_are_known():
    """Of several labels an image of an unknown one stays out of its figures and tests."""
    pair = make_labels(make_pair(images=1))
    found = compare_scored(*pair, SETTINGS)
    known = pair[0].targets[:, 1] >= 0
    label = found["classes"]["b"]
    assert (label["known"], label["patients"]) == (known.sum(), known.sum())
    truth, said = pair[1].targets[known, 1] == 1, pair[1].logits[known, 1] >= 0
    assert label["figures"]["f1"]["b"] == pytest.approx(reference.f1_score(truth, said), abs=1e-6)
    assert "accuracy" not in found
    assert found["intervals"]["unit"] == "image"


def test_few_positives_are_too_few_to_say():
    """Nine of a class are, of ten that a figure should rest on; ten are not."""
    for positives, too_few in ((9, "9 positives"), (10, None)):
        pair = make_pair(images=1)
        targets = np.zeros_like(pair[0].targets)
        targets[:positives, 0] = targets[positives:, 1] = 1
        pair = [Scored(*(*vars(s).values(),)[:4], targets, s.logits, {}) for s in pair]
        found = compare_scored(*pair, SETTINGS)
        assert found["classes"]["a"]["too_few"] == too_few
        assert found["classes"]["c"]["figures"]["auroc"]["difference"] is None


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_mean_leaves_out_classes_with_too_few_images(task):
    """Of three classes one has nine images; the means are of the other two, as in evaluate."""
    pair = make_pair(images=1)
    targets = np.zeros_like(pair[0].targets)
    targets[:9, 0] = targets[9:30, 1] = targets[30:, 2] = 1
    pair = [Scored(task, *(*vars(s).values(),)[1:4], targets, s.logits, {}) for s in pair]
    found = compare_scored(*pair, SETTINGS)
    assert found["classes"]["a"]["figures"]["auroc"]["a"] is not None
    for which, scored in zip("ab", pair, strict=True):
        aurocs = [reference.roc_auc_score(targets[:, i], scored.logits[:, i]) for i in (1, 2)]
        assert found["macro"]["auroc"][which] == pytest.approx(np.mean(aurocs), abs=1e-6)
        assert measure(scored, SETTINGS)["macro_enough"]["auroc"] == found["macro"]["auroc"][which]
    assert found["macro_labels"]["auroc"] == 2


def test_labels_that_no_image_has_give_no_warning(recwarn):
    """Figures of images without a finding are undefined, and NumPy prints nothing about it."""
    pair = [
        Scored("multilabel", s.classes, s.keys, s.patients, np.zeros_like(s.targets), s.logits, {})
        for s in make_pair()
    ]
    found = compare_scored(*pair, SETTINGS)
    assert found["macro"]["recall"]["difference"] is None
    assert not recwarn.list


@pytest.mark.parametrize("seed", range(12))
def test_evaluate_and_compare_print_the_same_figures(seed):
    """To the last digit those of scikit-learn in float64, and means of them before rounding."""
    random = np.random.default_rng(seed)
    truth = random.integers(3, size=50)
    logits = random.standard_normal((50, 3)) + 1.5 * np.eye(3)[truth]
    keys = [str(n) for n in range(50)]
    images = Scored("multiclass", [*"abc"], keys, keys, np.eye(3, dtype=np.int8)[truth], logits, {})
    settings = Settings(fewest=1, replicates=2)
    metrics, compared = measure(images, settings), compare_scored(images, images, settings)
    for name, change in compared["macro"].items():
        assert metrics["macro"][name] == change["a"]
        for label, of_class in compared["classes"].items():
            assert metrics["classes"][label][name] == of_class["figures"][name]["a"]
    sides = [(truth == i, logits[:, i]) for i in range(3)]
    for name, function in (
        ("auroc", reference.roc_auc_score),
        ("average_precision", reference.average_precision_score),
    ):
        values = [float(function(*side)) for side in sides]
        written = [metrics["classes"][label][name] for label in "abc"]
        assert written == [round(value, 6) for value in values]
        assert metrics["macro"][name] == round(float(np.mean(values)), 6)


def test_a_model_does_not_differ_from_itself():
    """All differences are 0, all p values 1, and nothing flipped.

    That none of 60 patients told them apart leaves room for a difference: Wilson's limit for 0 of
    60, z^2 / (60 + z^2), and not an interval without a width.
    """
    one, _ = make_pair()
    found = compare_scored(one, one, SETTINGS)
    limit = 1.959964**2 / (60 + 1.959964**2)
    assert found["accuracy"]["interval"] == pytest.approx([-limit, limit], abs=1e-6)
    for part in found["classes"].values():
        assert {figure["difference"] for figure in part["figures"].values()} == {0}
        assert (part["mcnemar"]["p_value"], part["delong"]["p_value"]) == (1, 1)
    assert flips(one, one) == []


def test_mcnemar_counts_the_images_that_one_model_has_right():
    """By hand, with the exact binomial test of the smaller count against a half."""
    pair = make_pair(shift=1.0)
    truth = pair[0].targets.argmax(1)
    right = [scored.logits.argmax(1) == truth for scored in pair]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    found = compare_scored(*pair, SETTINGS)["mcnemar"]
    assert (found["only_a"], found["only_b"]) == only
    assert found["p_value"] == pytest.approx(binomtest(min(only), sum(only)).pvalue)
    assert found["p_value"] < 0.05


def test_the_interval_of_independent_images_is_that_of_a_paired_t_test():
    """One image a patient: the accuracy's interval is SciPy's of the differences of right, 0 or 1.

    The bootstrap is drawn within classes, which takes away what differs between them: up to 5 %.
    """
    pair = make_pair(patients=400, images=1, shift=0.5)
    truth = pair[0].targets.argmax(1)
    right = [(scored.logits.argmax(1) == truth).astype(float) for scored in pair]
    expected = ttest_1samp(right[1] - right[0], 0).confidence_interval()
    low, high = compare_scored(*pair, Settings())["accuracy"]["interval"]
    assert high - low == pytest.approx(expected.high - expected.low, rel=0.05)
    assert low + high == pytest.approx(expected.low + expected.high, abs=1e-5)


def test_the_interval_of_a_mean_counts_what_its_classes_have_in_common():
    """The mean of a class and its exact copy is as uncertain as the class itself, not sqrt(2) less.

    Both have the same targets and logits, so their differences are equal in every replicate.
    """
    pair = [
        Scored(
            "multilabel",
            ["a", "copy"],
            *(s.keys, s.patients, s.targets[:, [0, 0]], s.logits[:, [0, 0]], {}),
        )
        for s in make_pair(shift=0.5)
    ]
    found = compare_scored(*pair, SETTINGS)
    for name, mean in found["macro"].items():
        assert mean == found["classes"]["a"]["figures"][name]
        assert mean["interval"][1] - mean["interval"][0] > 0.01


def slow_covariance(scores, truth):
    """DeLong et al. 1988, equations of section 3, over all pairs of images."""
    positives, negatives = scores[:, truth], scores[:, ~truth]
    wins = (positives[:, :, None] > negatives[:, None, :]) + 0.5 * (
        positives[:, :, None] == negatives[:, None, :]
    )
    aurocs, of_positives, of_negatives = wins.mean((1, 2)), wins.mean(2), wins.mean(1)
    m, n = positives.shape[1], negatives.shape[1]
    first = (of_positives - aurocs[:, None]) @ (of_positives - aurocs[:, None]).T / (m - 1)
    second = (of_negatives - aurocs[:, None]) @ (of_negatives - aurocs[:, None]).T / (n - 1)
    return aurocs, first / m + second / n


@pytest.mark.parametrize("digits", [0, 1, 15])
def test_the_test_of_two_aurocs_is_that_of_all_pairs_of_images(digits):
    """With many, few and no ties: difference, p value and interval equal the slow way.

    Both models share noise, so that it cancels.
    """
    random = np.random.default_rng(5)
    truth, shared = random.random(150) < 0.3, random.normal(size=150)
    scores = np.stack([shared + 0.6 * random.normal(size=150) + more * truth for more in (1, 1.4)])
    scores = np.round(scores, digits)
    aurocs, spread = slow_covariance(scores, truth)
    error = np.sqrt(np.array([-1, 1]) @ spread @ np.array([-1, 1]))
    difference = aurocs[1] - aurocs[0]
    found = compare_aurocs(scores, truth)
    assert found["difference"] == pytest.approx(difference, abs=1e-6)
    assert found["p_value"] == pytest.approx(2 * norm.sf(abs(difference) / error))
    reach = 1.959964 * error
    assert found["interval"] == pytest.approx([difference - reach, difference + reach], abs=1e-6)


def test_delong_needs_two_images_of_each_side():
    """One positive has no variance: no test, instead of a made-up one."""
    assert compare_aurocs(np.random.default_rng(0).random((2, 9)), np.arange(9) == 0) is None


def test_images_and_classes_in_another_order_are_put_in_order():
    """The second run lists them backwards; the comparison is the same."""
    one, other = make_pair()
    backwards = np.arange(len(other))[::-1]
    turned = other.take(backwards)
    turned = Scored(
        other.task,
        CLASSES[::-1],
        turned.keys,
        turned.patients,
        turned.targets[:, ::-1],
        turned.logits[:, ::-1],
        {},
    )
    put = aligned(one, turned, ("A", "B"))
    assert compare_scored(one, put, SETTINGS) == compare_scored(one, other, SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["keys"].__setitem__(4, "new"), "A: was evaluated on 1 images .* k0004"),
        (lambda s: s["targets"].__setitem__(4, [1, 1, 1]), "the label of 1 images .* k0004"),
        (lambda s: s["patients"].__setitem__(4, "x"), "the patient of 1 images .* k0004"),
        (lambda s: s["classes"].__setitem__(2, "z"), "B: has the classes a, b, z"),
    ],
)
def test_other_images_are_refused(change, message):
    """One line says what differs, and of which image."""
    one, other = make_pair()
    parts = {n: v.copy() if hasattr(v, "copy") else v for n, v in vars(other).items()}
    change(parts)
    with pytest.raises(CxrdistError, match=message):
        aligned(one, Scored(**parts), ("A", "B"))


def test_flips_list_what_got_worse_first():
    """By hand: three changes of a class in their order, with the logits of the truth."""
    targets = np.eye(3, dtype=np.int8)[[0, 0, 0, 1]]
    said = np.array([[1, 0, 1, 1], [0, 1, 2, 1]])  # wrong->right, right->wrong, wrong->wrong
    pair = [
        Scored("multiclass", CLASSES, list("wxyz"), list("wxyz"), targets, 2.0 * np.eye(3)[g], {})
        for g in said
    ]
    found = flips(*pair)
    assert [(f.position, f.change) for f in found] == [
        (1, "right->wrong"),
        (0, "wrong->right"),
        (2, "wrong->wrong"),
    ]
    assert (found[0].of, found[0].predicted, found[0].logits) == ("a", ("a", "b"), (2, 0))


def test_flips_of_labels_are_of_known_ones():
    """A label that is decided differently is one flip; of an unknown one nothing is said."""
    pair = make_labels(make_pair())
    differs = ((pair[0].logits >= 0) != (pair[1].logits >= 0)) & (pair[0].targets >= 0)
    found = flips(*pair)
    assert len(found) == differs.sum()
    assert all(differs[flip.position, CLASSES.index(flip.of)] for flip in found)
    worse = [flip for flip in found if flip.change == "right->wrong"]
    right = (pair[0].logits >= 0) == (pair[0].targets == 1)
    assert len(worse) == (differs & right).sum()


def test_equal_models_differ_by_nothing_as_often_as_promised():
    """A/A: of 40 pairs of equal quality the intervals of nearly all cover a difference of 0.

    With 95 % coverage fewer than 34 of 40 would come once in 500 runs; by the same draws for
    models that differ by nothing but noise. `CXRDIST_PAIRS=200` and more is run by hand.
    """
    covered = coverage(40)
    assert {name for name, share in covered.items() if share < 34 / 40} == set()


def coverage(pairs, **options):
    """The share of simulated pairs whose interval of the difference covers 0, by figure."""
    hits = {}
    for seed in range(pairs):
        found = compare_scored(*make_pair(seed=seed, **options), Settings(replicates=200))
        for name, figure in {"accuracy": found["accuracy"], **found["macro"]}.items():
            low, high = figure["interval"]
            hits.setdefault(name, []).append(low <= 0 <= high)
    return {name: float(np.mean(found)) for name, found in hits.items()}
