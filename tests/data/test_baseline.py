import numpy as np
import pytest

from cxrdist.data.audit import best_model
from cxrdist.data.baseline import choose_images, measure_baseline
from cxrdist.data.fingerprint import THUMBNAIL_PX, shrink

CLASSES = ["a", "b"]
MODELS = ("logistic_regression", "perceptron")


def noise(seed: int, num_images: int) -> np.ndarray:
    """Squares that show nothing: uint8 [N, 64, 64]."""
    return np.random.default_rng(seed).integers(0, 256, (num_images, 64, 64), dtype=np.uint8)


def thumbnails_of(squares: np.ndarray):
    return lambda place: shrink(squares[place])


def one_of_two(is_first: np.ndarray) -> np.ndarray:
    """Targets int8 [N, 2]."""
    return np.stack([is_first, ~is_first], 1).astype(np.int8)


def test_what_can_be_seen_in_a_thumbnail_is_found_by_both_models():
    """The upper half is brighter in each image of one class."""
    squares, is_first = noise(0, 120) // 2, np.arange(120) % 2 == 0
    squares[is_first, :32] += 60
    found = measure_baseline(
        thumbnails_of(squares), one_of_two(is_first), range(120), CLASSES, "multiclass"
    )
    assert (found["size_px"], found["folds"], found["largest_class"]) == (THUMBNAIL_PX, 5, 0.5)
    assert (found["images"], found["of_images"], found["patients"]) == (120, 120, 120)
    for name in MODELS:
        assert found[name]["accuracy"]["value"] > 0.95
        assert found[name]["auroc"]["a"]["low"] > 0.95
    assert best_model(found)[1] == "accuracy"


def test_a_model_is_judged_on_patients_that_it_has_not_seen():
    """Five equal images of each patient, whose labels are drawn by lot: by image it would be 1."""
    squares = np.repeat(noise(1, 30), 5, axis=0)
    is_first = np.repeat(np.random.default_rng(1).permutation(30) % 2 == 0, 5)
    patients = np.repeat(np.arange(30), 5).tolist()
    found = measure_baseline(
        thumbnails_of(squares), one_of_two(is_first), patients, CLASSES, "multiclass"
    )
    for name in MODELS:
        score = found[name]["accuracy"]
        assert score["low"] < 0.5 < score["high"] or score["value"] < 0.5
        assert score["high"] - score["low"] > 0.25  # of 30 patients; of 150 images 0.16


def test_labels_that_are_not_known_are_learnt_as_absent_and_never_scored():
    """Of several labels there is a mean AUROC and no accuracy; a label of too few has none."""
    squares, has = noise(2, 80) // 2, np.arange(80) % 2 == 0
    squares[has, :32] += 60
    targets = np.stack([has, np.arange(80) == 3], 1).astype(np.int8)
    targets[70:, 0] = -1
    squares[70:] = squares[70:, ::-1]
    found = measure_baseline(thumbnails_of(squares), targets, range(80), CLASSES, "multilabel")
    for name in MODELS:
        assert found[name]["accuracy"] is None
        assert found[name]["auroc"]["b"] is None
        assert found[name]["auroc"]["a"]["value"] > 0.9
        assert found[name]["mean_auroc"] == found[name]["auroc"]["a"]
    assert best_model(found)[1] == "mean_auroc"


@pytest.mark.parametrize(("most", "expected"), [(1000, 300), (100, 99)])
def test_of_many_images_those_of_some_patients_are_chosen(most, expected):
    """Whole patients, of three images here, at most so many images, the same ones each time."""
    groups = [number % 100 for number in range(300)]
    places = choose_images(groups, most)
    assert len(places) == expected
    assert np.array_equal(places, np.sort(places))
    counts = np.bincount([groups[place] for place in places])
    assert {*counts.tolist()} <= {0, 3}
    assert np.array_equal(places, choose_images(groups, most))
    assert expected == 300 or places.tolist() != list(range(expected))
