"""The word experiments, on phantoms of which nothing but a word tells one class."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support import contents, run_ranks

from cxrdist import probe_text as probed
from cxrdist.config import (
    Augmentation,
    EvaluateConfig,
    Network,
    PackConfig,
    ProbeTextConfig,
    ReportConfig,
    Stage,
    TrainConfig,
)
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.index import Index, Sample
from cxrdist.data.pack import pack
from cxrdist.data.phantom import COVID, NORMAL, PATIENT_PATTERN, write_phantoms
from cxrdist.demo import write_word_boxes
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.predictions import evaluate
from cxrdist.model.densenet import load_model, save_model
from cxrdist.probe_text import PAPER, paste, probe_text, share_inside, summary
from cxrdist.report.html import report
from cxrdist.train.loop import train

SIZE_PX = 48
PAPER_TEXT = Path(__file__).parents[2] / "shared" / "paper.txt"
BLOCKS = ("stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo's phantoms without opacities, the word on each COVID-19 image, and a network."""
    folder = tmp_path_factory.mktemp("words")
    write_phantoms(folder / "images", 40, SIZE_PX, opacities=False, word_share=1.0)
    write_word_boxes(folder / "images" / "opacities.csv", folder / "boxes.csv", SIZE_PX)
    pack_images(folder, folder / "shards")
    train(
        TrainConfig(
            folder / "shards",
            folder / "run",
            {"all": Stage(dict.fromkeys(BLOCKS, 3e-3), epochs=30, patience=30, schedule="cosine")},
            init="none",
            global_batch_size=10,
            optimizer="adamw",
            augmentation=Augmentation(degrees=3, shift_x=0.02, shift_y=0.02, flip=False),
            network=Network(8, (2, 2, 2, 2), 0.0),
            cache=folder / "cache",
        )
    )
    return folder


def pack_images(folder, out, **options):
    settings = {"size": SIZE_PX, "split": "0.5/0.2/0.3", "patient_pattern": PATIENT_PATTERN}
    pack(PackConfig("folder", folder / "images", out, workers=1, **settings, **options))


def probe(folder, subset="test", **options):
    settings = {"boxes": folder / "boxes.csv", "height": 0.08, "cache": folder / "cache"}
    settings |= {"shards": folder / "shards", **options}
    probe_text(ProbeTextConfig(folder / "run", **settings))
    return json.loads((folder / "run" / subset / "text.json").read_text())


@pytest.fixture(scope="module")
def found(trained):
    return probe(trained)


def test_a_network_that_reads_the_word_is_found_out(found):
    """The word's class is known by the word alone, filling takes that away, pasting gives it."""
    covering = found["covering"]
    recall = {how: covering[how]["classes"][COVID]["recall"] for how in ("as_it_is", "fill")}
    assert recall["as_it_is"] >= 0.9
    assert recall["fill"] <= 0.1
    assert covering["as_it_is"]["accuracy"] - covering["fill"]["accuracy"] > 0.25
    (normal,) = (row for row in found["paste"]["classes"] if row["class"] == NORMAL)
    covid = found["classes"].index(COVID)
    assert normal["after"][covid] - normal["before"][covid] > 0.5
    assert normal["predicted_otherwise"] > 0.5 * normal["images"]


def test_sure_predictions_are_told_apart(trained, found, tmp_path):
    """With 60 more on each logit all probabilities are 1, and every class and score stays."""
    model = load_model(trained / "run")
    model.network.classifier.bias.data += 60
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_model(model, tmp_path / "run" / "model")
    places = {name: trained / name for name in ("shards", "cache")}
    sure = probe(tmp_path, boxes=trained / "boxes.csv", **places)
    assert sure["covering"] == found["covering"]
    for before, after in zip(found["paste"]["classes"], sure["paste"]["classes"], strict=True):
        assert after["before"] == after["after"] == [1, 1, 1]
        assert after["predicted_otherwise"] == before["predicted_otherwise"]
    explained = [[p["explained"] for p in probed["pictures"]] for probed in (found, sure)]
    assert explained[0] == explained[1]


def test_relevance_says_where_the_network_looked(found):
    """Several times the share that chance gives lies in the word, over all images with one."""
    relevance = found["relevance"]["all"]
    assert relevance["images"] == found["text"]["with_text"] > 10
    assert relevance["times_chance"] > 3
    assert relevance["times_chance"] == pytest.approx(
        relevance["share"] / relevance["area"], abs=1e-3
    )


def test_a_picture_with_a_pasted_word_has_the_area_of_that_word(trained, found):
    """Of every class that has one, whether or not the image has a word of its own."""
    config = ProbeTextConfig(trained / "run", trained / "shards", height=0.08)
    blank = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    _, word = paste(blank, config)
    _, area = share_inside(np.ones_like(blank), [word])
    pasted = {p["label"]: p["area"] for p in found["pictures"] if p["kind"] == "pasted"}
    assert {NORMAL, COVID} <= pasted.keys()
    assert area > 0
    assert [*pasted.values()] == pytest.approx([area] * len(pasted), abs=1e-4)


def test_covered_squares_are_those_of_covered_shards(trained, found, tmp_path):
    """Shards that were packed with the text covered, an external set, give the probe's numbers."""
    covered = tmp_path / "covered"
    boxes = trained / "boxes.csv"
    pack_images(trained, covered, text_boxes=boxes, cover="fill", cover_split="test")
    evaluate(EvaluateConfig(trained / "run", covered, cache=tmp_path))
    place = trained / "run" / "external" / "covered"
    metrics = json.loads((place / "metrics.json").read_text())
    assert metrics["confusion_matrix"] == found["covering"]["fill"]["confusion_matrix"]
    assert metrics["index_sha256"] != found["index_sha256"]
    with pytest.raises(CxrdistError, match="already covered"):
        probe(trained, shards=covered)


def test_ranks_do_not_change_the_result(trained, found):
    """Two ranks write the same bytes as one process with as many threads."""
    alone = contents(trained / "run" / "test" / "text")
    result = (trained / "run" / "test" / "text.json").read_bytes()
    done = run_ranks(
        2,
        *("-m", "cxrdist", "probe-text", "--run", trained / "run", "--height", 0.08),
        *("--shards", trained / "shards", "--boxes", trained / "boxes.csv"),
        *("--cache", trained / "cache"),
        threads=torch.get_num_threads(),
    )
    assert done.returncode == 0, done.stderr
    assert (trained / "run" / "test" / "text.json").read_bytes() == result
    assert contents(trained / "run" / "test" / "text") == alone


def test_the_terminal_shows_the_document():
    """A score that no image gives is a dash, as are the probabilities of a class without images."""

    def scores(first, second, hits):
        matrix, classes = [[hits, 3 - hits], [0, 0]], {"a": {"recall": first}}
        metrics = {"task": "multiclass", "samples": 3, "confusion_matrix": matrix}
        return metrics | {"accuracy": hits / 3, "classes": classes | {"b": {"recall": second}}}

    rows = [{"class": "a", "images": 3, "with_text": 2}, {"class": "b", "images": 0}]
    rows[1]["with_text"] = 0
    pasted = {"class": "a", "before": [0.25, 0.75], "after": [0.125, 0.5]}
    empty = {"class": "b", "before": None, "after": None, "predicted_otherwise": 0}
    where = {"images": 2, "share": 0.214, "area": 0.021, "times_chance": 10.19}
    content = {
        "task": "multiclass",
        "classes": ["a", "b"],
        "text": {"classes": rows},
        "covering": {
            "as_it_is": scores(2 / 3, None, 2),
            "black": scores(1 / 3, None, 1),
            "fill": scores(0.0, None, 0),
        },
        "paste": {
            **{"word": "SEDUTO", "place": "upper-left"},
            "classes": [pasted | {"predicted_otherwise": 1}, empty],
        },
        "relevance": {"all": where},
    }
    said = [" ".join(line.split()) for line in summary(content).splitlines()]
    assert {"a 3 2 0.667 0.333 0.000", "b 0 0 - - -"} <= {*said}
    assert {"a 0.2500 -> 0.1250 0.7500 -> 0.5000 1", "b - - 0"} <= {*said}
    assert "as it is: accuracy 0.667 (2 of 3)" in said
    assert "text covered with black: accuracy 0.333 (1 of 3)" in said
    assert "text filled from its surroundings: accuracy 0.000 (0 of 3)" in said
    inside = (
        "|relevance| in the boxes: 21.4%, their area 2.1%: 10.19 times chance, mean of 2 images"
    )
    assert inside in said
    where["images"] = 0
    assert "|relevance| in the boxes: no image has any" in summary(content)


def test_the_report_shows_it_beside_the_paper(trained, found):
    """Scores, probabilities and shares of text.json stand in the page, and the paper's words."""
    page = report(ReportConfig(trained / "run")).read_text(encoding="utf-8")
    section = re.search(r'<section aria-labelledby="text">.*?</section>', page, re.DOTALL)[0]
    shown = " ".join(re.sub(r"<[^>]+>", " ", section).replace("\xa0", " ").split())
    for how in ("as_it_is", "black", "fill"):
        assert f"{found['covering'][how]['accuracy']:.1%}".replace("%", " %") in shown
    assert f"{found['relevance']['all']['share']:.1%}".replace("%", " %") in shown
    for words in PAPER.values():
        assert words in shown
    assert section.count("data:image/jpeg") == 2 * len(found["pictures"])


def test_the_paper_is_quoted_word_for_word():
    """What stands in quotation marks stands in the paper."""
    if not PAPER_TEXT.is_file():
        pytest.skip("the paper is not on this machine")
    paper = " ".join(PAPER_TEXT.read_text(encoding="utf-8").split())
    quotes = [quote for words in PAPER.values() for quote in re.findall("“(.*?)”", words)]
    assert len(quotes) >= 5
    assert [quote for quote in quotes if quote not in paper] == []


def test_without_a_table_the_squares_are_searched(trained, tmp_path):
    """The finder runs on the packed squares themselves, and the result says so."""
    write_phantoms(tmp_path / "images", 5, SIZE_PX, word_share=1.0, seed=1)
    pack_images(tmp_path, tmp_path / "others")
    found = probe(trained, "external/others", shards=tmp_path / "others", boxes=None)
    assert found["text"]["found_in"] == "squares"
    assert found["relevance"]["all"]["images"] == found["text"]["with_text"]


def test_a_word_is_pasted_into_each_corner():
    """The word stands inside its box, in the corner that was named, and nothing else is changed."""
    pixels = np.zeros((96, 96), np.uint8)
    for place, corner in {
        "upper-left": (0, 0),
        "upper-right": (0, 1),
        "lower-left": (1, 0),
        "lower-right": (1, 1),
    }.items():
        config = ProbeTextConfig(Path("run"), Path("shards"), place=place, word="AP", height=0.1)
        pasted, box = paste(pixels, config)
        y, x = np.nonzero(pasted)
        assert box.x - 1 <= x.min() <= x.max() <= box.x + box.width + 1
        assert box.y - 1 <= y.min() <= y.max() <= box.y + box.height + 1
        assert (y.mean() > 48, x.mean() > 48) == tuple(map(bool, corner))
        assert pixels.max() == 0


def test_the_share_counts_overlapping_boxes_once():
    """Relevance that is spread evenly, of either sign, has the share of the area; zeros have 0."""
    boxes = [Box(0, 0, 4, 4), Box(2, 0, 4, 4)]
    relevance = np.where(np.indices((8, 8)).sum(0) % 2, 1.0, -1.0)
    assert share_inside(relevance, boxes) == (24 / 64, 24 / 64)
    assert share_inside(np.zeros((8, 8)), boxes) == (0.0, 24 / 64)


def test_a_share_is_at_most_1_whatever_is_rounded():
    """All relevance is in the box; more than 1 would have no interval, and end in a traceback."""
    relevance = np.zeros((8, 8))
    relevance[2:5, 1:7] = np.random.default_rng(4).random((3, 6))
    assert relevance[2:5, 1:7].ravel().sum() / relevance.sum() > 1
    assert share_inside(relevance, [Box(1, 2, 6, 3)]) == (1.0, 18 / 64)


def test_the_interval_of_the_share_is_by_patient_whatever_the_labels():
    """Sixty patients of one image each, no two with the same labels: Student's, by SciPy."""
    classes = [*"abcdef"]
    labels = ["|".join(c for i, c in enumerate(classes) if n >> i & 1) for n in range(1, 61)]
    samples = [
        Sample(f"k{i}", "test", "s", label, f"p{i}", "", "", "") for i, label in enumerate(labels)
    ]
    index = Index(Path(), "", "multilabel", classes, 8, "crop", "", None, None, [], samples)
    shares = np.random.default_rng(0).uniform(0.4, 0.6, 60)
    rows = [(i, float(share), 0.1) for i, share in enumerate(shares)]
    low, high = probed._describe_relevance(index, rows)["all"]["share_interval"]
    least, most = stats.t.interval(0.95, 59, shares.mean(), stats.sem(shares))
    assert high - low == pytest.approx(most - least, rel=0.1)


def test_a_word_without_letters_is_refused(trained):
    """Before anything is read."""
    with pytest.raises(CxrdistError, match="--word: is empty"):
        probe(trained, word=" ")


def test_a_table_of_other_images_is_refused(trained, tmp_path):
    """A table that names no image of the shards is a mistake, not an absence of text."""
    write_boxes(tmp_path / "boxes.csv", {"other.png": [Box(1, 1, 2, 2)]})
    with pytest.raises(CxrdistError, match="has no image of the shards"):
        probe(trained, boxes=tmp_path / "boxes.csv", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # before an image is decoded
