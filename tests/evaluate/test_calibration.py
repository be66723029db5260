"""Temperatures, calibration errors and the columns that come of them, on data of known truth."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from support import claim_shards, make_shards

from cxrdist.bootstrap import draw
from cxrdist.cli import main
from cxrdist.config import EvaluateConfig, Network
from cxrdist.data.index import read_index
from cxrdist.documents import parse_json, typed
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.calibration import (
    BINS,
    calibration_figures,
    choose_calibration,
    describe_calibration,
    fit_temperature,
    rule_to_apply,
)
from cxrdist.evaluate.metrics import Metrics
from cxrdist.evaluate.operating_points import Rule, operating_points, read_rule
from cxrdist.evaluate.predictions import evaluate
from cxrdist.evaluate.scored import Scored
from cxrdist.model.densenet import Classifier, load_model, save_model
from cxrdist.model.prediction import Predictions, probability_columns

SHA = "0" * 64
YOUDEN = Rule("youden", None)


def simulate(num_images, seed, temperature=2.0, classes=("a",)):
    """Labels drawn from the sigmoid of a logit; the network gives it times a temperature."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1, 2, (num_images, len(classes)))
    targets = (random.random(logits.shape) < expit(logits)).astype(np.int8)
    keys, patients = ([f"{n}{i // k}" for i in range(num_images)] for n, k in (("k", 1), ("p", 2)))
    return Scored("multilabel", [*classes], keys, patients, targets, logits * temperature, {})


def figures_of(scored, calibration, replicates=200):
    return calibration_figures(
        scored, draw(scored.patients, [""] * len(scored), replicates), calibration
    )


@pytest.mark.parametrize("planted", [0.5, 2.0])
def test_a_planted_temperature_is_found_and_halves_the_error(planted):
    """To 5 % from 20,000 images; on others the calibration error falls to less than half."""
    calibration = choose_calibration(simulate(20_000, 1, planted), YOUDEN, 10, SHA)
    assert calibration.temperatures["a"] == pytest.approx(planted, rel=0.05)
    found = figures_of(simulate(5000, 2, planted), calibration)["classes"]["a"]
    before, after = found["before"], found["after"]
    assert after["calibration_error"] < before["calibration_error"] / 2
    assert after["calibration_error_interval"][1] < before["calibration_error_interval"][0]
    assert after["brier"] < before["brier"]


def test_the_temperature_is_the_slope_of_a_logistic_regression():
    """Without an intercept and a penalty, its slope is 1 / temperature: the same likelihood."""
    scored = simulate(3000, 3, 1.7)
    logits, truth = scored.logits[:, 0], scored.targets[:, 0] == 1
    model = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8)
    slope = model.fit(logits[:, None], truth).coef_[0, 0]
    # Platt's targets pull a little towards one half.
    assert fit_temperature(logits, truth) == pytest.approx(1 / slope, rel=5e-3)


def test_a_class_that_is_told_without_an_error_has_a_finite_temperature():
    """Its likelihood has no maximum; with Platt's targets, 21 / 22 here, the answer is known."""
    logits, truth = np.array([3.0] * 20 + [-3.0] * 20), np.array([True] * 20 + [False] * 20)
    assert fit_temperature(logits, truth) == pytest.approx(3 / np.log(21), rel=1e-4)


def test_a_logit_that_speaks_against_its_class_has_no_temperature():
    """Its best temperature is without end; the class keeps a reason instead."""
    scored = simulate(500, 4)
    against = replace(scored, logits=-scored.logits)
    calibration = choose_calibration(against, YOUDEN, 10, SHA)
    assert calibration.temperatures == {}
    assert "no temperature from 0.01 to 100" in calibration.reasons["a"]
    found = figures_of(against, calibration)
    assert found["classes"]["a"]["after"] is None
    assert found["reasons"] == calibration.reasons


def test_too_few_positives_or_negatives_give_neither_temperature_nor_threshold():
    """Nine of them, where ten are asked for; unknown labels count as neither."""
    scored = simulate(400, 5, classes=("a", "b", "c"))
    positives = np.flatnonzero(scored.targets[:, 0] == 1)
    scored.targets[positives[9:], 0] = -1
    negatives = np.flatnonzero(scored.targets[:, 1] == 0)
    scored.targets[negatives[9:], 1] = -2
    calibration = choose_calibration(scored, YOUDEN, 10, SHA)
    assert [*calibration.temperatures] == [*calibration.thresholds] == ["c"]
    assert "val has 9 images with it" in calibration.reasons["a"]
    assert "and 9 without, expected at least 10" in calibration.reasons["b"]
    assert choose_calibration(scored, YOUDEN, 9, SHA).reasons == {}


def test_errors_are_those_of_a_second_implementation():
    """Equal-mass bins by a loop, the Brier score by scikit-learn; unknown images are left out."""
    scored = simulate(1500, 6)
    scored.targets[::7] = -1
    known = scored.targets[:, 0] >= 0
    logits, truth = scored.logits[known, 0], scored.targets[known, 0]
    found = figures_of(scored, None)
    of_class = found["classes"]["a"]
    assert (of_class["known"], of_class["positives"]) == (known.sum(), truth.sum())
    expected = 0.0
    parts = np.array_split(np.argsort(logits), BINS)
    for part in parts:
        expected += len(part) * abs(truth[part].mean() - expit(logits[part]).mean())
    before = of_class["before"]
    assert before["calibration_error"] == pytest.approx(expected / len(truth), rel=0.02)
    assert before["brier"] == pytest.approx(brier_score_loss(truth, expit(logits)), abs=1e-6)
    low, high = before["brier_interval"]
    assert low < before["brier"] < high
    bins = of_class["bins"]
    assert len(bins["images"]) == BINS
    assert sum(bins["images"]) == len(truth)
    assert max(bins["images"]) - min(bins["images"]) <= 1
    assert np.dot(bins["images"], bins["positives"]) == pytest.approx(truth.sum(), abs=0.01)
    assert found["chosen_on"] is found["mean_after"] is None


def test_equal_logits_share_a_bin():
    """Of a model with three answers there are three bins, in any order of the images."""
    scored = simulate(300, 7)
    steps = replace(scored, logits=np.sign(np.round(scored.logits / 2)))
    bins = figures_of(steps, None)["classes"]["a"]["bins"]
    values, counts = np.unique(steps.logits, return_counts=True)
    assert bins["images"] == counts.tolist()
    assert bins["probability"] == pytest.approx(expit(values), abs=1e-6)


def test_perfect_probabilities_have_the_error_of_chance_and_an_interval_from_0():
    """Of 20 sets at most 3 have an interval that leaves 0 out, and chance explains the error."""
    errors, chances, without = [], [], 0
    for seed in range(20):
        found = figures_of(simulate(600, 100 + seed, 1.0), None)["classes"]["a"]["before"]
        errors.append(found["calibration_error"])
        chances.append(found["chance_error"])
        without += found["calibration_error_interval"][0] > 0
    assert np.mean(chances) == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(errors) > 0.02
    assert without <= 3


def test_intervals_of_small_errors_hold_the_truth():
    """To the mean error of three classes chance adds half: at least 90 of 100 intervals hold it.

    The true error is that of 100,000 images, to which chance adds nearly nothing.
    """
    classes = ("a", "b", "c")
    exact = figures_of(simulate(100_000, 0, 1.4, classes), None, 2)["mean_before"]
    measured = [
        figures_of(simulate(200, 300 + seed, 1.4, classes), None)["mean_before"]
        for seed in range(60)
    ]
    truth = exact["calibration_error"]
    assert np.mean([errors["calibration_error"] for errors in measured]) > 1.4 * truth
    limits = np.array([errors["calibration_error_interval"] for errors in measured])
    assert ((limits[:, 0] <= truth) & (truth <= limits[:, 1])).mean() >= 0.9


def test_an_error_that_no_draw_can_change_has_no_interval():
    """Four patients, each alone in its stratum: all replicates are the four images."""
    scored = simulate(4, 9)
    replicates = draw(list("pqrs"), list("abcd"), 50)
    found = calibration_figures(scored, replicates, None)
    errors = found["classes"]["a"]["before"]
    truth, guess = scored.targets[:, 0], expit(scored.logits[:, 0])
    assert errors["calibration_error"] == pytest.approx(np.abs(truth - guess).mean(), abs=1e-6)
    assert errors["calibration_error_interval"] is None


def test_means_are_over_the_classes_with_a_temperature():
    """So that before and after are of the same classes."""
    scored = simulate(600, 8, classes=("a", "b", "c"))
    calibration = choose_calibration(scored, YOUDEN, 10, SHA)
    del calibration.temperatures["b"]
    found = figures_of(scored, calibration)
    assert found["mean_of"] == ["a", "c"]
    for mean, name in (("mean_before", "before"), ("mean_after", "after")):
        for error in ("calibration_error", "brier"):
            values = [found["classes"][of][name][error] for of in ("a", "c")]
            assert found[mean][error] == pytest.approx(np.mean(values), abs=1e-6)


def make_calibration(**temperatures):
    return replace(
        choose_calibration(simulate(400, 9), YOUDEN, 10, SHA),
        temperatures=temperatures,
    )


def test_columns_are_sigmoid_and_softmax_of_the_divided_logits():
    """By torch; softmax only of all classes of the model, of images that have one of them."""

    def columns(*of_model):
        return probability_columns(Predictions(*of_model))

    logits = np.array([[1.0, -2.0, 0.5], [30.0, 18.0, 25.0]], np.float32)
    classes = ["a", "b", "c"]
    calibration = make_calibration(a=2.0, b=0.5, c=1.0)
    divided = torch.tensor(logits).double() / torch.tensor([2.0, 0.5, 1.0])
    found = columns(logits, classes, "multiclass", calibration)
    names = [f"{what}_{name}" for what in ("calibrated", "softmax") for name in classes]
    assert [*found] == names
    expected = torch.cat([torch.sigmoid(divided), torch.softmax(divided, 1)], 1)
    assert np.column_stack([*found.values()]) == pytest.approx(expected.numpy(), abs=1e-12)
    assert [*columns(logits, classes, "multilabel", calibration)] == names[:3]
    assert [*columns(logits[:, :2], ["a", "b"], "multiclass", calibration)] == names[:2]
    assert columns(logits, classes, "multiclass", None) == {}
    some = replace(make_calibration(a=2.0, c=1.0), reasons={"b": "too few"})
    found = columns(logits, classes, "multiclass", some)
    assert [*found] == ["calibrated_a", "calibrated_c"]
    found = columns(logits[:, [0, 2]], ["a", "c"], "multiclass", some)
    assert [*found] == ["calibrated_a", "calibrated_c"]


def test_a_model_is_calibrated_on_its_own_shards_when_something_differs():
    """At first, and again for another rule, other shards or another least number."""
    stored = choose_calibration(simulate(400, 9), read_rule("sensitivity=0.9"), 10, SHA)
    rule, other = Rule("sensitivity", 0.9), Rule("specificity", 0.8)
    assert rule_to_apply(None, None, 10, SHA) == YOUDEN
    assert rule_to_apply(stored, None, 10, SHA) is None
    assert rule_to_apply(stored, rule, 10, SHA) is None
    assert rule_to_apply(stored, None, 20, SHA) == rule
    assert rule_to_apply(stored, other, 10, SHA) == other
    assert rule_to_apply(stored, None, 10, "1" * 64) == rule


def test_on_other_shards_a_model_keeps_its_calibration():
    """Another rule is refused there, since thresholds come from its own validation split."""
    stored = choose_calibration(simulate(400, 9), YOUDEN, 10, SHA)
    assert rule_to_apply(stored, None, 20, None) is None
    assert rule_to_apply(None, None, 10, None) is None
    with pytest.raises(CxrdistError, match=r"specificity=0\.8: the model has thresholds by youden"):
        rule_to_apply(stored, Rule("specificity", 0.8), 10, None)


def test_figures_are_the_document_that_is_declared():
    """As JSON they are read back as `Metrics`, and the terminal says on which images they rest."""
    scored = simulate(400, 10, classes=("a", "b"))
    scored.targets[:380, 1] = -1
    calibration = choose_calibration(scored, YOUDEN, 10, SHA)
    replicates = draw(scored.patients, [""] * len(scored), 100)
    parts = {
        "operating_points": operating_points(scored, replicates, calibration, 0.1),
        "calibration": calibration_figures(scored, replicates, calibration),
    }
    document = {"samples": 400, "task": "multilabel", "classes": {}, "macro": {}} | parts
    document["macro"] = dict.fromkeys(("recall", "precision", "f1", "auroc"))
    text = json.dumps(document, default=asdict, allow_nan=False)
    assert typed(parse_json(text.encode()), Metrics) == document
    said = describe_calibration(document)
    assert "(400 images of 200 patients)" in said
    assert "b: val has 8 images with it and 12 without" in said
    assert max(map(len, said.splitlines())) <= 100


def test_without_any_threshold_no_empty_table_is_printed():
    """12 images cannot give 10 positives and 10 negatives of a class."""
    scored = simulate(12, 10, classes=("a", "b"))
    calibration = choose_calibration(scored, YOUDEN, 10, SHA)
    replicates = draw(scored.patients, [""] * len(scored), 100)
    said = describe_calibration(
        {
            "operating_points": operating_points(scored, replicates, calibration, None),
            "calibration": calibration_figures(scored, replicates, calibration),
        }
    )
    assert "chosen on val (12 images of 6 patients); from: probability\nno class has a" in said
    assert "Sensitivity" not in said


def make_run(path, shards):
    """A run of some shards, as far as it is evaluated, with a random network."""
    (path / "model").mkdir(parents=True)
    index = read_index(shards)
    torch.manual_seed(1)
    network = Network(growth_rate=4, block_config=(2, 2, 2, 2))
    save_model(Classifier(network, index.classes, index.image_size_px), path / "model")
    return claim_shards(path, shards)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_first_evaluation_calibrates_the_model_on_val(shards, tmp_path, capsys):
    """Temperatures of val's logits, in model.json; the weights stay; the same on later splits."""
    run, cache = make_run(tmp_path / "run", shards), tmp_path / "cache"
    weights = (run / "model" / "model.safetensors").read_bytes()
    evaluate(EvaluateConfig(run, shards, cache=cache, fewest=1))
    calibration = load_model(run).calibration
    assert (calibration.images, calibration.patients, calibration.fewest) == (12, 8, 1)
    written = (run / "model" / "model.json").read_bytes()
    assert "chosen on val (12 images of 8 patients)" in capsys.readouterr().out
    evaluate(EvaluateConfig(run, shards, split="val", cache=cache, fewest=1))
    assert (run / "model" / "model.json").read_bytes() == written
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    rows = read_csv(run / "val" / "predictions.csv")
    for name in calibration.temperatures:
        logits = np.array([float(row[f"logit_{name}"]) for row in rows])
        truth = np.array([row["label"] == name for row in rows])
        temperature = fit_temperature(logits, truth)
        assert calibration.temperatures[name] == pytest.approx(temperature, rel=1e-5)
        found = [float(row[f"calibrated_{name}"]) for row in rows]
        assert found == pytest.approx(expit(logits / temperature), rel=1e-4)
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    assert metrics["operating_points"]["chosen_on"]["index_sha256"] == read_index(shards).sha256
    evaluate(EvaluateConfig(run, shards, operating_point="specificity=0.9", cache=cache, fewest=1))
    assert load_model(run).calibration.rule == "specificity=0.9"
    evaluate(EvaluateConfig(run, shards, cache=cache, fewest=1))
    assert load_model(run).calibration.rule == "specificity=0.9", "it keeps the rule it has"


def test_with_too_few_on_val_nothing_is_chosen_and_it_says_so(shards, tmp_path, capsys):
    """Of four images of a class the default of ten asks for more."""
    run = make_run(tmp_path / "run", shards)
    evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
    calibration = load_model(run).calibration
    assert calibration.temperatures == calibration.thresholds == {}
    assert "a: val has 4 images with it and 8 without, expected at" in capsys.readouterr().out
    row = read_csv(run / "test" / "predictions.csv")[0]
    assert not [name for name in row if name.startswith(("calibrated_", "softmax_"))]


def test_bad_options_are_refused_before_any_work(shards, tmp_path, capsys):
    """An unknown rule, and numbers out of their range; no cache is made for them."""
    run = make_run(tmp_path / "run", shards)
    where = ("--run", run, "--shards", shards, "--cache", tmp_path / "cache")
    for option in (("--operating-point", "best"), ("--prevalence", 2.0), ("--fewest", 0)):
        assert main(["evaluate", *map(str, (*where, *option))]) == 2
        assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_other_shards_do_not_calibrate_a_model(shards, tmp_path, capsys):
    """Not by their val split either; one line says where temperatures come from."""
    run = make_run(tmp_path / "run", shards)
    other = make_shards(tmp_path, {"a": 8, "b c": 8, "d": 8})
    before = (run / "model" / "model.json").read_bytes()
    evaluate(EvaluateConfig(run, other, cache=tmp_path / "cache"))
    assert (run / "model" / "model.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert "no temperatures and no operating points" in printed
    assert "an ensemble of folds has no such split" in printed  # it may be asked in vain for one
