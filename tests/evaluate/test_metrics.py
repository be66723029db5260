import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from cxrdist.evaluate.metrics import (
    SCORES,
    compute_label_metrics,
    compute_metrics,
    mean_auroc,
    metrics_table,
)
from cxrdist.model.prediction import predicted_classes, to_probabilities

PAPER_TABLE_1 = [[59, 1, 0], [1, 58, 1], [1, 0, 59]]
CLASSES = ["Normal", "Viral Pneumonia", "COVID-19"]


def from_confusion(matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels that give a confusion matrix."""
    labels, predicted = [], []
    for truth, row in enumerate(matrix):
        for guess, count in enumerate(row):
            labels += [truth] * count
            predicted += [guess] * count
    logits = torch.full((len(labels), len(matrix)), -2.0)
    logits[torch.arange(len(labels)), torch.tensor(predicted)] = 2.0
    return logits, torch.tensor(labels)


def draw_logits(seed: int, num_images: int, num_classes: int) -> torch.Tensor:
    """Logits from -60 to 60 of which a third are whole numbers, so that many are equal."""
    random = torch.Generator().manual_seed(seed)
    logits = 20 * torch.randn(num_images, num_classes, generator=random)
    rounded = torch.rand(num_images, num_classes, generator=random) < 0.3
    return torch.where(rounded, logits.round(), logits).clamp(-60, 60)


def test_logits_18_and_25_predict_the_second_class():
    """Their float32 sigmoids are both 1, and so are those of -120 and -130 both 0."""
    logits = torch.tensor([[18.0, 25.0], [-120.0, -130.0]])
    metrics = compute_metrics(logits, torch.tensor([1, 0]), ["a", "b"])
    assert metrics["confusion_matrix"] == [[1, 0], [0, 1]]
    assert predicted_classes([18.0, 25.0], ["a", "b"], "multiclass") == ["b"]


def test_equal_logits_predict_the_first_class():
    """The rule of torch's argmax, here and in `predicted_classes`."""
    metrics = compute_metrics(torch.tensor([[0.0, 3.0, 3.0]]), torch.tensor([2]), ["a", "b", "c"])
    assert metrics["confusion_matrix"][2] == [0, 1, 0]
    assert predicted_classes([0.0, 3.0, 3.0], ["a", "b", "c"], "multiclass") == ["b"]


def test_the_threshold_of_one_half_is_the_logit_zero():
    """A label is predicted from probability 0.5 on: at 0, and not just below it."""
    below = -1e-9  # whose float32 sigmoid is 0.5
    targets = torch.tensor([[1], [1], [1]])
    metrics = compute_label_metrics(torch.tensor([[0.0], [below], [-30.0]]), targets, ["a"])
    assert metrics["classes"]["a"]["recall"] == pytest.approx(1 / 3, abs=1e-6)
    assert predicted_classes([0.0, below, 9.0], ["a", "b", "c"], "multilabel") == ["a", "c"]


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_classes_are_scikit_learns(seed):
    """Also where float32 sigmoids would be 0 or 1 for a third of the images."""
    logits = draw_logits(seed, 400, 3)
    labels = torch.randint(0, 3, (400,), generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(400), labels] += 10
    found = compute_metrics(logits, labels, CLASSES)
    truth, predicted = labels.numpy(), logits.numpy().argmax(1)
    assert found["confusion_matrix"] == confusion_matrix(truth, predicted).tolist()
    for i, name in enumerate(CLASSES):
        scores, is_class, guess = found["classes"][name], truth == i, predicted == i
        expected = roc_auc_score(is_class, logits[:, i].numpy())
        assert scores["auroc"] == pytest.approx(expected, abs=1e-6)
        assert scores["recall"] == pytest.approx(recall_score(is_class, guess), abs=1e-6)
        assert scores["precision"] == pytest.approx(precision_score(is_class, guess), abs=1e-6)
        assert scores["f1"] == pytest.approx(f1_score(is_class, guess), abs=1e-6)
        others = recall_score(~is_class, ~guess)
        assert scores["specificity"] == pytest.approx(others, abs=1e-6)
        expected = average_precision_score(is_class, logits[:, i].numpy())
        assert scores["average_precision"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_labels_are_scikit_learns(seed):
    """AUROC and average precision rank by the logit; so does `mean_auroc`, for early stopping."""
    logits = draw_logits(seed, 400, 2)
    targets = (torch.rand(400, 2, generator=torch.Generator().manual_seed(seed)) < 0.2).long()
    logits += 15 * targets
    found = compute_label_metrics(logits, targets, ["a", "b"])
    aurocs = []
    for i, name in enumerate("ab"):
        scores, truth, score = found["classes"][name], targets[:, i].numpy(), logits[:, i].numpy()
        aurocs.append(roc_auc_score(truth, score))
        expected = average_precision_score(truth, score)
        assert scores["auroc"] == pytest.approx(aurocs[-1], abs=1e-6)
        assert scores["average_precision"] == pytest.approx(expected, abs=1e-6)
        assert scores["f1"] == pytest.approx(f1_score(truth, score >= 0), abs=1e-6)
    assert mean_auroc(logits, targets) == pytest.approx(np.mean(aurocs), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_cells_that_are_not_known_are_dropped(seed):
    """Each score is scikit-learn's of the images that are left; -1 and -2 are the same here."""
    logits, random = draw_logits(seed, 300, 3), torch.Generator().manual_seed(seed)
    targets = torch.randint(-2, 2, (300, 3), generator=random).to(torch.int8)
    logits += 15 * (targets == 1)
    found = compute_label_metrics(logits, targets, ["a", "b", "c"])
    aurocs = []
    for i, name in enumerate("abc"):
        known = (targets[:, i] >= 0).numpy()
        scores, truth, score = (
            found["classes"][name],
            targets[known, i].numpy(),
            logits[known, i].numpy(),
        )
        aurocs.append(roc_auc_score(truth, score))
        expected = {
            "auroc": aurocs[-1],
            "average_precision": average_precision_score(truth, score),
            "f1": f1_score(truth, score >= 0),
            "recall": recall_score(truth, score >= 0),
            "precision": precision_score(truth, score >= 0),
            "specificity": recall_score(truth == 0, score < 0),
        }
        assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert (scores["known"], scores["positives"]) == (known.sum(), truth.sum())
        assert scores["reason"] is None
    assert mean_auroc(logits, targets) == pytest.approx(np.mean(aurocs), abs=1e-6)
    assert found["macro"]["auroc"] == pytest.approx(np.mean(aurocs), abs=1e-6)


def test_a_label_of_one_kind_has_no_auroc_and_a_reason():
    """All known images have it, none has, or none is known; it takes no part in the mean."""
    targets = torch.tensor([[1, 0, -1, 1], [1, -2, -2, 0], [-1, 0, -1, 0]])
    logits = torch.tensor([[1.0, 2, 3, 3], [-1, 2, 3, 2], [1, 2, 3, 1]])
    found = compute_label_metrics(logits, targets, ["all", "none", "unknown", "both"])
    classes = found["classes"]
    assert {name: scores["reason"] for name, scores in classes.items()} == {
        "all": "all of the 2 known images have the label",
        "none": "none of the 2 known images have the label",
        "unknown": "the label is known for no image",
        "both": None,
    }
    assert [classes[name]["auroc"] for name in classes] == [None, None, None, 1]
    assert [classes[name]["average_precision"] for name in classes] == [None, None, None, 1]
    assert classes["all"]["recall"] == 0.5
    assert {value for name, value in classes["unknown"].items() if name in found["macro"]} == {None}
    assert found["macro"]["auroc"] == 1
    assert found["macro_labels"]["auroc"] == 1
    assert "unknown: no AUROC, the label" in metrics_table(found)
    assert mean_auroc(logits[:, :3], targets[:, :3]) is None


def test_every_distinct_logit_of_many_keeps_its_rank():
    """With 2 x 100,000 neighbouring float32 values, one tie would change the last digit.

    Negatives and positives alternate, so the k-th positive is above k negatives: the AUROC is
    (n + 1) / 2n.
    """
    n = 100_000
    bits = np.float32(18).view(np.int32) + np.arange(2 * n, dtype=np.int32)
    logits = torch.from_numpy(bits.view(np.float32).copy())[:, None]
    targets = torch.arange(2 * n)[:, None] % 2
    found = compute_label_metrics(logits, targets, ["a"])["classes"]["a"]["auroc"]
    assert found == pytest.approx((n + 1) / (2 * n), abs=1e-6)
    assert found > 0.5


def test_probabilities_are_sigmoids_in_float64():
    """1 / (1 + exp(-18)) is 1 - 1.5229979e-8, which float32 does not hold."""
    found = to_probabilities(np.array([[0, 18, -18]], np.float32))
    assert found[0].tolist() == pytest.approx([0.5, 1 - 1.5229979e-8, 1.5229979e-8], rel=1e-12)


def test_the_papers_table_1_gives_its_table_2():
    """Bassi & Attux 2020, Tables 1 and 2: recall, precision, F1 and accuracy as printed."""
    metrics = compute_metrics(*from_confusion(PAPER_TABLE_1), CLASSES)
    assert metrics["confusion_matrix"] == PAPER_TABLE_1
    scores = [metrics["classes"][name] for name in CLASSES]
    assert [round(s["recall"], 3) for s in scores] == [0.983, 0.967, 0.983]
    assert [round(s["precision"], 3) for s in scores] == [0.967, 0.983, 0.983]
    assert [round(s["f1"], 3) for s in scores] == [0.975, 0.975, 0.983]
    assert round(metrics["accuracy"], 3) == 0.978
    assert [round(metrics["macro"][s], 3) for s in ("recall", "precision", "f1")] == [0.978] * 3
    row = next(row for row in metrics_table(metrics).splitlines() if row.startswith("Viral"))
    # Two logits only: AUROC is the mean of recall and specificity, 58 / 60 and 119 / 120, average
    # precision 58 / 60 at 58 / 59 and the other 2 / 60 at 1 / 3.
    assert row.split()[2:] == ["60", "0.979", "0.961", "0.967", "0.992", "0.983", "0.975"]


def test_auroc_is_the_share_of_ordered_pairs():
    """AUROC of a class is the probability that a positive is above a negative, ties half."""
    random = torch.Generator().manual_seed(0)
    logits = (torch.rand(60, 2, generator=random) * 20).round()
    labels = torch.randint(0, 2, (60,), generator=random)
    metrics = compute_metrics(logits, labels, ["a", "b"])
    for i, name in enumerate("ab"):
        positive, negative = logits[labels == i, i], logits[labels != i, i]
        above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
        assert metrics["classes"][name]["auroc"] == pytest.approx(float(above.mean()), abs=1e-5)


def test_what_is_undefined_is_none_and_not_zero():
    """A class without samples has no recall, one never predicted no precision."""
    logits = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    metrics = compute_metrics(logits, torch.tensor([0, 1]), ["a", "b", "c"])
    expected = {"known": 2, "positives": 0, **dict.fromkeys(SCORES), "specificity": 1}
    assert metrics["classes"]["c"] == expected
    assert metrics["classes"]["b"]["precision"] is None
    assert metrics["classes"]["b"]["recall"] == 0
    assert metrics["macro"]["recall"] is None
    assert metrics["accuracy"] == 0.5
