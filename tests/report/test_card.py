"""The model card holds what the run holds, in valid YAML and Markdown."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_run import make_run

from cxrdist.config import ReportConfig
from cxrdist.report import answers
from cxrdist.report.answers import STATES
from cxrdist.report.card import OURS, write_card
from cxrdist.report.checklist import CHECKLISTS
from cxrdist.report.evidence import gather
from cxrdist.report.html import report
from cxrdist.run import RunDirectory


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("card")) / "run"


@pytest.fixture
def small(made_once: Path, tmp_path: Path) -> Path:
    """A run made by the real commands, its report too; a test may change it."""
    return Path(shutil.copytree(made_once, tmp_path / "small" / "run"))


def card_of(run: Path) -> str:
    """Write the card of a run and read it."""
    write_card(gather(RunDirectory(run)))
    return (run / "model" / "README.md").read_text()


def head_of(card: str) -> dict:
    """The YAML between the first two lines of dashes."""
    return yaml.safe_load(card.split("---\n")[1])


def give_model(run: Path, small: Path) -> None:
    """Put the description of a model with the classes of a made-up run into it."""
    description = json.loads((small / "model" / "model.json").read_text())
    description["classes"] = json.loads((run / "run.json").read_text())["shards"]["classes"]
    (run / "model").mkdir()
    (run / "model" / "model.json").write_text(json.dumps(description))


def test_the_head_is_what_hugging_face_reads(small: Path) -> None:
    """The YAML is read by huggingface_hub, where it is installed, and figures are the run's."""
    hub = pytest.importorskip("huggingface_hub")
    metrics = json.loads((small / "test" / "metrics.json").read_text())
    metrics["macro"] |= {"auroc": 0.75, "auroc_interval": [0.5, 0.875]}
    for scores in metrics["classes"].values():
        scores["too_few"] = None
    del metrics["macro_enough"]  # which is there only if a class has too few images
    (small / "test" / "metrics.json").write_text(json.dumps(metrics))
    card = hub.ModelCard(card_of(small))
    assert card.data.pipeline_tag == "image-classification"
    assert (card.data.library_name, card.data.license) == ("cxrdist", "other")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["roc_auc"].metric_value == 0.75
    assert results["roc_auc"].metric_name == "AUROC, mean of the classes (0.500 to 0.875)"
    assert results["accuracy"].metric_value == metrics["accuracy"]
    assert results["accuracy"].dataset_name == "test split"


def test_the_card_says_what_the_run_holds(small: Path) -> None:
    """Counts, stages, figures with intervals, and what was not done."""
    text = (small / "model" / "README.md").read_text()
    assert "| a | 6 (3) | 2 (1) | 4 (2) |" in text
    assert "Stage all: 2 epochs" in text
    assert "It was not tested on images from elsewhere." in text
    assert "Whether the network reads words on the images was not tested." not in text
    assert re.search(r"\| a \(too few to say.*\| 4 \| \d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", text)
    assert "(no interval)" not in text
    assert "/tmp" not in text


def test_figures_of_too_few_images_are_not_listed(small: Path) -> None:
    """Hugging Face ranks models by the head: figures of 4 positives are not in it."""
    metrics = json.loads((small / "test" / "metrics.json").read_text())
    for scores in metrics["classes"].values():
        scores["too_few"] = "4 positives"
    (small / "test" / "metrics.json").write_text(json.dumps(metrics))
    assert "model-index" not in head_of(card_of(small))


def test_odd_names_stay_in_their_cells(run: Path, small: Path) -> None:
    """Classes named like HTML and external sets; figures without intervals are said to be such."""
    give_model(run, small)
    external = run / "external" / "hospital_2"
    external.mkdir(parents=True)
    (external / "metrics.json").write_text((run / "test" / "metrics.json").read_text())
    text = card_of(run)
    assert r"| \<b\>\&" in text
    assert "<b>" not in text
    assert r"### On the external set hospital\_2" in text
    assert "**These figures have no intervals**" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for header in (row for row in rows if row.startswith("| Class")):
        body = rows[rows.index(header) + 1]
        assert len(re.findall(r"(?<!\\)\|", body)) == len(re.findall(r"(?<!\\)\|", header))
    assert head_of(text)["license"] == "other"


def test_the_authors_card_is_left_alone(small: Path) -> None:
    """A card is overwritten as long as it has the line that says so, and not afterwards."""
    first = card_of(small)
    card = small / "model" / "README.md"
    card.write_text(first + "more")
    assert card_of(small) == first
    card.write_text(first.replace(OURS, "") + "ours")
    write_card(gather(RunDirectory(small)))
    assert card.read_text().endswith("ours")


def test_a_run_without_a_model_has_no_card(run: Path) -> None:
    """The checklist is there all the same, and says what is missing."""
    report(ReportConfig(run=run))
    assert not (run / "model").exists()
    assert "The training is not finished" in (run / "checklist.html").read_text()


def test_a_finished_run_without_its_recipe_is_not_called_unfinished(small: Path) -> None:
    (small / "recipe.yaml").unlink()
    report(ReportConfig(run=small))
    text = (small / "checklist.html").read_text()
    assert "recipe.yaml is missing" in text
    assert "The training is not finished" not in text


def test_checklists_have_the_items_of_the_papers() -> None:
    """CLAIM 2024: 1 to 44. TRIPOD+AI, Table 2: 27 items, 52 with their parts."""
    claim, tripod = (
        [item.number for items in checklist.values() for item in items]
        for *_, checklist in CHECKLISTS
    )
    assert claim == [str(number) for number in range(1, 45)]
    parts = {3: "abc", 5: "ab", 6: "abc", 8: "abc", 9: "abc", 12: "abcdefg", 18: "abcdef"}
    parts |= {20: "abc", 23: "ab", 27: "abc"}
    expected = [f"{n}{part}" for n in range(1, 28) for part in parts.get(n, [""])]
    assert tripod == expected
    assert len(tripod) == 52


def test_pointers_of_the_checklists_lead_somewhere(small: Path) -> None:
    """Each file is in the run, and each section in the report."""
    page = (small / "report.html").read_text()
    links = re.findall(r'<a href="([^"]*)"', (small / "checklist.html").read_text())
    files = [link for link in links if not link.startswith(("#", "https:"))]
    assert len(files) > 60
    for link in files:
        file, _, section = link.partition("#")
        assert (small / file).is_file(), link
        assert not section or f'id="{section}"' in page, link


def test_only_scores_count_as_measures(small: Path) -> None:
    """Item 28 of CLAIM names the figures of metrics.json, and none of its counts."""
    answer = answers.measures(gather(RunDirectory(small)))
    scores = "recall, specificity, precision, f1, auroc, average precision"
    assert answer.text.startswith(f"For each class: {scores}; beside them calibration, ")


def test_the_split_of_an_external_set_is_its_own(small: Path) -> None:
    """Hugging Face is told the split that was scored, which may be val."""
    metrics = json.loads((small / "test" / "metrics.json").read_text())
    metrics["macro"]["auroc_interval"] = [0.5, 0.875]
    for scores in metrics["classes"].values():
        scores["too_few"] = None
    for split in ("val", "test"):
        folder = small / "external" / f"other-{split}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({**metrics, "split": split}))
    results = head_of(card_of(small))["model-index"][0]["results"]
    splits = {result["dataset"]["name"]: result["dataset"]["split"] for result in results}
    assert splits["external set other-val"] == "val"
    assert splits["external set other-test"] == "test"


def test_answers_follow_the_run(small: Path, run: Path) -> None:
    """What a run lacks is not done, and done once it is there."""
    bare = gather(RunDirectory(run))
    full = gather(RunDirectory(small))

    def states(evidence: object) -> dict[str, str]:
        return {
            f"{name} {item.number}": item.answer(evidence).state
            for _, name, *_, checklist in CHECKLISTS
            for items in checklist.values()
            for item in items
        }

    found = states(full)
    assert {*found.values()} == {*STATES}
    assert found["CLAIM 2024 33"] == "not done"
    assert found["CLAIM 2024 44"] == found["TRIPOD+AI 17"] == "the authors must say"
    assert found["CLAIM 2024 29"] == found["CLAIM 2024 22"] == "in the run"
    assert states(bare)["CLAIM 2024 29"] == states(bare)["CLAIM 2024 22"] == "not done"
    (run / "external" / "other").mkdir(parents=True)
    (run / "external" / "other" / "metrics.json").write_text(
        (run / "test" / "metrics.json").read_text()
    )
    assert states(gather(RunDirectory(run)))["CLAIM 2024 33"] == "partly"


def test_balanced_classes_are_told(small: Path) -> None:
    """The recipes finetune and scratch balance the classes, in place of copies by name."""
    recipe = small / "recipe.yaml"
    plain = recipe.read_text()
    assert "balance: none" in plain
    assert answers.imbalance(gather(RunDirectory(small))).text == "Nothing was done about it."
    recipe.write_text(plain.replace("balance: none", "balance: classes"))
    text = answers.imbalance(gather(RunDirectory(small))).text
    assert text.startswith("Augmented copies of each training image: as many as make the classes ")
    assert "each image: as many as make the classes about equally frequent" in card_of(small)


def test_nothing_is_claimed_that_val_had_too_few_images_for(small: Path) -> None:
    """Without temperatures and thresholds no item says that there are some."""
    model, metrics = small / "model" / "model.json", small / "test" / "metrics.json"
    content = json.loads(model.read_text())
    chosen = {"temperatures": {"a": 1.5}, "thresholds": {"a": 0.0}}
    for calibration in (chosen, {"temperatures": {}, "thresholds": {}}):
        content["calibration"] |= calibration
        model.write_text(json.dumps(content))
        evidence = gather(RunDirectory(small))
        updating, output = answers.updating(evidence), answers.output(evidence)
        if calibration is chosen:
            assert updating.text.startswith("A temperature for 1 of 2 classes, ")
            assert "Thresholds for 1 of 2 classes by the rule youden" in output.text
    assert (updating.state, output.state) == ("not done", "partly")
    assert "No class has a temperature: model/model.json says why" in updating.text
    assert "No threshold was chosen: model/model.json says why" in output.text
    scored = json.loads(metrics.read_text())
    scored["operating_points"]["classes"] = {}
    metrics.write_text(json.dumps(scored))
    assert answers.diagnostic(gather(RunDirectory(small))).state == "partly"
    folds = replace(evidence, calibration=None, members=["member-0", "member-1"])
    assert "an ensemble of folds has no validation split" in answers.updating(folds).text
    assert "an ensemble of folds has no validation split" in answers.output(folds).text


def test_groups_are_those_of_the_test_images(small: Path) -> None:
    """Figures by sex are none by source, and without an audit nothing has counted the sources."""
    metrics = small / "test" / "metrics.json"
    scored = json.loads(metrics.read_text())
    scored["groups"]["columns"] = {"sex": {}}
    metrics.write_text(json.dumps(scored))
    assert "counted in the audit" in answers.sources(gather(RunDirectory(small))).text
    (small / "audit.json").unlink()
    evidence = gather(RunDirectory(small))
    assert answers.clusters(evidence).state == "not done"
    assert answers.fairness(evidence).text.startswith("Figures by sex, and the largest gap.")
    assert "audit" not in answers.sources(evidence).text


def test_listed_means_are_those_of_the_headline(small: Path) -> None:
    """A class with too few images is in the table of the card, but not in what the Hub lists."""
    metrics = json.loads((small / "test" / "metrics.json").read_text())
    metrics["macro"] |= {"auroc": 0.75, "auroc_interval": [0.5, 0.875]}
    metrics["macro_enough"] = {**metrics["macro"], "auroc": 0.25, "auroc_interval": [0.125, 0.5]}
    for name, too_few in (("a", None), ("b", "4 positives")):
        metrics["classes"][name]["too_few"] = too_few
    (small / "test" / "metrics.json").write_text(json.dumps(metrics))
    card = card_of(small)
    (listed,) = head_of(card)["model-index"][0]["results"]
    (auroc,) = (figure for figure in listed["metrics"] if figure["type"] == "roc_auc")
    assert (auroc["value"], auroc["name"]) == (
        0.25,
        "AUROC, mean of 1 of 2 classes (0.125 to 0.500)",
    )
    assert "| Mean of the classes | | 0.750 (0.500 to 0.875) |" in card


@pytest.mark.parametrize(
    ("classes", "text"), [(["a"], "of one class"), (["a", "b"], "mean of 2 classes")]
)
def test_a_calibration_says_how_many_classes_it_is_of(
    small: Path, classes: list[str], text: str
) -> None:
    """One class is no mean."""
    metrics = json.loads((small / "test" / "metrics.json").read_text())
    metrics["calibration"]["mean_of"] = classes
    figures = {"calibration_error": 0.25, "brier": 0.125}
    metrics["calibration"]["mean_before"] = {
        **figures,
        **{f"{name}_interval": [0.0, 0.5] for name in figures},
        "chance_error": 0.0,
    }
    (small / "test" / "metrics.json").write_text(json.dumps(metrics))
    assert f"Calibration, {text}: expected calibration error 0.250" in card_of(small)


def test_seen_images_are_not_scored_without_a_word(small: Path) -> None:
    """Of an external set with --seen report, beside its figures and in the list for the Hub."""
    metrics = json.loads((small / "test" / "metrics.json").read_text())
    for scores in metrics["classes"].values():
        scores["too_few"] = None
    info = {"name": "other", "shards": "other", "label_map": {}, "classes": ["a", "b"]}
    info |= {"other_classes": {}, "images": 9, "seen": "report", "seen_images": 3, "reasons": {}}
    (small / "external" / "other").mkdir(parents=True)
    path = small / "external" / "other" / "metrics.json"
    path.write_text(json.dumps({**metrics, "external": {**info, "patients_told": 9}}))
    card = card_of(small)
    assert f"{metrics['samples']} images (the network has seen 3 of them)" in card
    results = head_of(card)["model-index"][0]["results"]
    names = [result["dataset"]["name"] for result in results]
    assert "external set other (the network has seen 3 of them)" in names
