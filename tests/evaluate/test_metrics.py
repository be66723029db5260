import pytest
import torch

from cxrdist.evaluate.metrics import compute_metrics, metrics_table

PAPER_TABLE_1 = [[59, 1, 0], [1, 58, 1], [1, 0, 59]]
CLASSES = ["Normal", "Viral Pneumonia", "COVID-19"]


def from_confusion(matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and labels that give a confusion matrix."""
    labels, predicted = [], []
    for truth, row in enumerate(matrix):
        for guess, count in enumerate(row):
            labels += [truth] * count
            predicted += [guess] * count
    probabilities = torch.full((len(labels), len(matrix)), 0.1)
    probabilities[torch.arange(len(labels)), torch.tensor(predicted)] = 0.9
    return probabilities, torch.tensor(labels)


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
    table = metrics_table(metrics)
    assert "Viral Pneumonia   0.967     0.983        0.975" in table


def test_auroc_is_the_share_of_ordered_pairs():
    """AUROC of a class is the probability that a positive is above a negative, ties half."""
    random = torch.Generator().manual_seed(0)
    probabilities = (torch.rand(60, 2, generator=random) * 20).round() / 20
    labels = torch.randint(0, 2, (60,), generator=random)
    metrics = compute_metrics(probabilities, labels, ["a", "b"])
    for i, name in enumerate("ab"):
        positive, negative = probabilities[labels == i, i], probabilities[labels != i, i]
        above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
        assert metrics["classes"][name]["auroc"] == pytest.approx(float(above.mean()), abs=1e-5)


def test_what_is_undefined_is_none_and_not_zero():
    """A class without samples has no recall, one never predicted no precision."""
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    metrics = compute_metrics(probabilities, torch.tensor([0, 1]), ["a", "b", "c"])
    assert metrics["classes"]["c"] == {"recall": None, "precision": None, "f1": None, "auroc": None}
    assert metrics["classes"]["b"]["precision"] is None
    assert metrics["classes"]["b"]["recall"] == 0
    assert metrics["macro"]["recall"] is None
    assert metrics["accuracy"] == 0.5
