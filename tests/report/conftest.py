"""A run directory as the other commands write it, made up: real pictures, odd names."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
import yaml
from PIL import Image
from support import make_images

from cxrdist.config import PackConfig
from cxrdist.data.pack import pack

ODD_CLASS = '<b>&"'
CLASSES = ["NORMAL", "COVID-19", ODD_CLASS]
SPLIT = "test"
PARTS = ("images", "patients")
EXPLAINED = 30
BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, evaluated and explained; read it only."""
    run = tmp_path_factory.mktemp("runs") / "bassi run #1"
    run.mkdir()
    write_training(run)
    shutil.copy(make_audit(tmp_path_factory.mktemp("audit")), run / "audit.json")
    rows = make_predictions()
    write_evaluation(run / SPLIT, rows)
    write_explanation(run / SPLIT, rows)
    write_pictures(run / SPLIT, rows)
    write_text_probe(run / SPLIT, rows)
    return run


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """What the run is made of; a test cannot import this file, others have the same name."""
    return SimpleNamespace(
        CLASSES=CLASSES,
        ODD_CLASS=ODD_CLASS,
        make_predictions=make_predictions,
        with_logits=with_logits,
        write_evaluation=write_evaluation,
    )


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole run that a test may change."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def make_audit(folder: Path) -> Path:
    """Pack shards in which an image stands in two classes and one has an altered copy."""
    images = make_images(folder / "images", dict.fromkeys(CLASSES, 20), 64)
    shutil.copy(images / "NORMAL" / "NO000_0.png", images / "COVID-19" / "NO000_1.png")
    with Image.open(images / "COVID-19" / "CO001_0.png") as image:
        image.save(images / "COVID-19" / "CO001_7.jpg", quality=80)
    settings = {"size": 64, "split": "0.5/0.2/0.3", "patient_pattern": r"^(\w+)_", "workers": 1}
    pack(PackConfig("folder", images, folder / "shards", **settings))
    return folder / "shards" / "audit.json"


def write_training(run: Path) -> None:
    """Write recipe.yaml, run.json and log.jsonl of two stages."""
    stages = {
        "head": {"lr": {"head": 1e-3}, "epochs": 10, "patience": 5, "weight_decay": 0.01},
        "unfreeze": {
            "lr": {block: 1e-5 / 3**place for place, block in enumerate(reversed(BLOCKS))},
            "epochs": 96,
            "patience": 20,
            "weight_decay": 0.01,
        },
    }
    recipe = {"init": "imagenet", "copies": {ODD_CLASS: 72}, "global_batch_size": 9}
    recipe |= {"optimizer": "sgd", "seed": 0, "stages": stages}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    random = np.random.default_rng(1)
    lines, done = [], {}
    for (name, stage), epochs in zip(stages.items(), (10, 34), strict=True):
        rows = epoch_rows(name, epochs, random)
        best = min(rows, key=lambda row: row["val_loss"])
        lines += [{**rows[1], "kind": "step"}, *rows]
        done[name] = {
            "parameter_groups": [
                {
                    "block": block,
                    "lr": stage["lr"][block],
                    "weight_decay": stage["weight_decay"],
                    "tensors": 2,
                    "parameters": 3075 * 1000,
                }
                for block in BLOCKS
                if block in stage["lr"]
            ],
            "frozen": [block for block in BLOCKS if block not in stage["lr"]],
            "best_epoch": best["epoch"],
            "best_val_loss": best["val_loss"],
            "epochs": epochs,
            "steps": epochs * 2823,
        }
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run.json").write_text(json.dumps(run_info(done)))


def epoch_rows(stage: str, epochs: int, random: np.random.Generator) -> list[dict]:
    """Make up the epochs of a stage: training goes down, validation turns up in the end."""
    start = {"kind": "epoch", "stage": stage, "epoch": 0, "step": 0}
    rows = [{**start, "val_loss": 0.56, "val_accuracy": 0.4}]
    for epoch in range(1, epochs + 1):
        fall = np.exp(-5 * epoch / epochs)
        rows.append(
            {
                "kind": "epoch",
                "stage": stage,
                "epoch": epoch,
                "step": epoch * 2823,
                "loss": 0.08 + 0.5 * fall + random.normal(0, 0.008),
                "images_per_second": 812.5 + epoch,
                "val_loss": 0.16 + 0.4 * fall + 0.1 * (epoch / epochs) ** 3,
                "val_accuracy": 0.96 - 0.4 * fall + random.normal(0, 0.006),
                "seconds": 31.25,
            }
        )
    return rows


def run_info(stages: dict) -> dict:
    """Make up run.json."""
    counts = {
        "train": [(1025, 1004), (127, 120), (1028, 990)],
        "val": [(256, 250), (32, 30), (257, 249)],
        SPLIT: [(60, 60), (60, 55), (60, 58)],
    }
    return {
        "format": "cxrdist-run-1",
        "started": "2026-03-01T09:00:00+00:00",
        "finished": "2026-03-01T10:12:30+00:00",
        "versions": {"cxrdist": "0.1.0", "python": "3.11.7", "torch": "2.10.0"},
        "world_size": 2,
        "device": "cuda: NVIDIA <H100>",
        "mixed_precision": "bf16",
        "tf32": False,
        "git_revision": "3f2a9c1d5e7b8a6f4c2d1e0b9a8f7c6d5e4b3a21",
        "shards": {
            "index_sha256": "9b74c9897bac770ffc029102a200c5de11aa46ea2f1d4f1cf1ed86b8f8e2a5c7",
            "image_size_px": 224,
            "path": "shards & more",
            "task": "multiclass",
            "classes": CLASSES,
            "totals": {
                split: {name: sum(pair[i] for pair in numbers) for i, name in enumerate(PARTS)}
                for split, numbers in counts.items()
            },
            "counts": {
                split: {
                    name: {"images": images, "patients": patients}
                    for name, (images, patients) in zip(CLASSES, numbers, strict=True)
                }
                for split, numbers in counts.items()
            },
            "split": "paper",
        },
        "weights": {"source": "timm densenet121.tv_in1k", "sha256": "ab" * 32},
        "stages": stages,
    }


def make_predictions() -> list[dict]:
    """Make up 60 predictions of each class, some of them wrong, with odd keys."""
    random = np.random.default_rng(2)
    rows = []
    for place, label in enumerate(CLASSES):
        for number in range(60):
            logits = random.normal(-2, 1.3, len(CLASSES))
            logits[place] += 3.2
            key = f"{number:03d} 50% #{place}?é'" if number % 5 == 0 else f"{place}-{number:03d}"
            row = {"key": key, "patient": f"p{number}", "label": label}
            row |= {"source": ("<i>A", "B")[number % 2], "view": ("PA", "AP", "")[number % 3]}
            row |= {"sex": ("F", "M")[number % 2], "age": str(20 + number)}
            rows.append(row | with_logits(logits))
    return sorted(rows, key=lambda row: row["key"])


def with_logits(logits: Sequence[float]) -> dict[str, list[float]]:
    """Give logits with their probabilities, in float32, where 18 and 25 are both 1."""
    probabilities = 1 / (1 + np.exp(-np.array(logits, np.float32)))
    return {"logits": [float(v) for v in logits], "p": [float(v) for v in probabilities]}


def write_evaluation(directory: Path, rows: list[dict]) -> None:
    """Write predictions.csv and metrics.json, the metrics by torchmetrics."""
    directory.mkdir(exist_ok=True)
    with open(directory / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [f"{what}_{name}" for what in ("prob", "logit") for name in CLASSES]
        about = ["key", "patient", "label", "source", "view", "sex", "age"]
        writer.writerow([*about, *names])
        for row in rows:
            numbers = map(repr, row["p"] + row["logits"])
            writer.writerow([*(row[name] for name in about), *numbers])
    scores = torch.tensor([row["logits"] for row in rows], dtype=torch.float64)
    truth = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    metrics = evaluate(scores, truth)
    (directory / "metrics.json").write_text(json.dumps(metrics))


def evaluate(scores: torch.Tensor, truth: torch.Tensor) -> dict:
    """Compute what metrics.json holds."""
    classification = torchmetrics.functional.classification
    kind = {"num_classes": len(CLASSES), "average": "none"}
    table = {
        "recall": classification.multiclass_recall(scores, truth, **kind),
        "precision": classification.multiclass_precision(scores, truth, **kind),
        "f1": classification.multiclass_f1_score(scores, truth, **kind),
        "auroc": torch.stack(
            [
                classification.binary_auroc(scores[:, place], (truth == place).long())
                for place in range(len(CLASSES))
            ]
        ),
    }
    confusion = classification.multiclass_confusion_matrix(scores, truth, len(CLASSES))
    return {
        "split": SPLIT,
        "task": "multiclass",
        "samples": len(truth),
        "accuracy": float((scores.argmax(1) == truth).double().mean()),
        "confusion_matrix": confusion.tolist(),
        "classes": {
            name: {measure: float(values[place]) for measure, values in table.items()}
            for place, name in enumerate(CLASSES)
        },
        "macro": {measure: float(values.mean()) for measure, values in table.items()},
    }


def write_explanation(directory: Path, rows: list[dict]) -> None:
    """Write relevance.csv and the pictures of some samples, the classes in turn."""
    heatmaps = directory / "heatmaps"
    heatmaps.mkdir(exist_ok=True)
    random = np.random.default_rng(3)
    with open(directory / "relevance.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        parts = ["relevance_sum", "bias_share", "epsilon_share"]
        writer.writerow(["key", "class", "logit", *parts, "picture"])
        places = [CLASSES.index(row["label"]) for row in rows]
        right = [CLASSES[int(np.argmax(row["logits"]))] == row["label"] for row in rows]
        in_turn = sorted(
            range(len(rows)), key=lambda i: (right[i], places[:i].count(places[i]), places[i])
        )
        for row in (rows[i] for i in in_turn[:EXPLAINED]):
            xray = draw_xray(random)
            Image.fromarray(xray).save(heatmaps / f"{row['key']}.png")
            for place, name in enumerate(CLASSES):
                logit = row["logits"][place]
                ledger = [logit, 0.4 * logit, 0.59 * logit, 0.01 * logit]
                picture = f"{row['key']}.class-{place}.png"
                Image.fromarray(draw_map(xray, logit, random)).save(heatmaps / picture)
                writer.writerow([row["key"], name, *ledger, picture])
    flipping = {
        "images": 8,
        "covered_share": 0.2,
        "relevant_first": [1, 0.5, 0.25],
        "random_order": [1, 0.95, 0.9],
        "area_over_relevant_first": 0.625,
        "area_over_random_order": 0.075,
    }
    how = {"preset": "canonical", "composite": None, "flat": True, "biases": True}
    found = {"format": "cxrdist-relevance-1", "how": how, "ledger_residual": 2.5e-7}
    found |= {"pixel_flipping": flipping, "randomisation": None, "outside": None}
    (directory / "relevance.json").write_text(json.dumps(found))


def write_pictures(directory: Path, rows: list[dict]) -> None:
    """Write the X-rays of the mistakes, and nearest.csv with the pictures of two of them."""
    random = np.random.default_rng(5)
    wrong = [row for row in rows if CLASSES[int(np.argmax(row["logits"]))] != row["label"]]
    explained = {path.stem for path in (directory / "heatmaps").glob("*.png")}
    for folder in ("mistakes", "nearest"):
        (directory / folder).mkdir(exist_ok=True)
    for row in wrong:
        Image.fromarray(draw_xray(random)).save(directory / "mistakes" / f"{row['key']}.png")
    lines = ["key,nearest,similarity,label,patient\n"]
    for row in rows:
        if row["key"] in explained:
            path = directory / "nearest" / f"train {row['key']}.png"
            Image.fromarray(draw_xray(random)).save(path)
            lines.append(f"{row['key']},{path.stem},0.987654,NORMAL,{row['patient']}\n")
    (directory / "nearest.csv").write_text("".join(lines))


def write_text_probe(directory: Path, rows: list[dict]) -> None:
    """Write text.json and the pictures of the probe for words on the images."""
    metrics = json.loads((directory / "metrics.json").read_text())
    random = np.random.default_rng(4)
    pictures = []
    (directory / "text").mkdir(exist_ok=True)
    for kind, row in zip(("found", "pasted"), rows, strict=False):
        names = {what: f"{row['key']}.{kind}.{what}.png" for what in ("xray", "map")}
        for name in names.values():
            Image.fromarray(draw_xray(random)).save(directory / "text" / name)
        about = {"kind": kind, "key": row["key"], "label": row["label"], "explained": ODD_CLASS}
        about |= {"share": 0.214, "area": 0.021, "relevance_inside": -0.33, **names}
        pictures.append({**about, "before": row["p"], "after": row["p"][::-1]})
    empty = {"images": 0, "share": None, "area": None, "times_chance": None}
    full = {"images": 7, "share": 0.214, "area": 0.021, "times_chance": 10.19}
    found = {
        "format": "cxrdist-text-1",
        "split": SPLIT,
        "task": "multiclass",
        "classes": CLASSES,
        "index_sha256": "9b74c9897bac770ffc029102a200c5de11aa46ea2f1d4f1cf1ed86b8f8e2a5c7",
        "text": {
            "found_in": "<i>boxes & more.csv",
            "images": 180,
            "with_text": 7,
            "boxes": 9,
            "classes": [
                {"class": name, "images": 60, "with_text": 7 * (name == ODD_CLASS), "words": words}
                for name, words in zip(CLASSES, ([], [], [["<b>R", 4], ["AP", 1]]), strict=True)
            ],
        },
        "covering": {
            **dict.fromkeys(("as_it_is", "black", "fill"), metrics),
            "predicted_otherwise": {"black": 3, "fill": 5},
        },
        "paste": {
            "word": "<SEDUTO>",
            "place": "upper-left",
            "letters_px": 10,
            "image_size_px": 224,
            "classes": [
                {"class": name, "images": 60, "predicted_otherwise": 2}
                | {"before": [0.9851, 0.1, 0.004471], "after": [0.9845, 0.1, 0.004595]}
                for name in CLASSES[:2]
            ]
            + [
                {"class": ODD_CLASS, "images": 0, "predicted_otherwise": 0}
                | {"before": None, "after": None}
            ],
        },
        "relevance": {
            "all": {"class": "all", **full},
            "classes": [{"class": n, **(full if n == ODD_CLASS else empty)} for n in CLASSES],
        },
        "paper": dict.fromkeys(("covering", "paste", "relevance"), "said <nothing>"),
        "pictures": pictures,
    }
    (directory / "text.json").write_text(json.dumps(found))


def draw_xray(random: np.random.Generator, size: int = 224) -> np.ndarray:
    """Draw something like a chest: uint8 [size, size]."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body = 190 * np.exp(-((x / 0.85) ** 6) - (y / 1.3) ** 6)
    for side in (-0.4, 0.4):
        body -= 120 * np.exp(-(((x - side) / 0.26) ** 4) - ((y + 0.05) / 0.6) ** 4)
    body += 14 * np.sin(26 * (y + 0.3 * x**2)) + random.normal(0, 6, body.shape)
    return np.clip(body, 0, 255).astype(np.uint8)


def draw_map(xray: np.ndarray, logit: float, random: np.random.Generator) -> np.ndarray:
    """Lay red and blue spots over an X-ray: uint8 [size, size, 3]."""
    y, x = np.mgrid[-1 : 1 : len(xray) * 1j, -1 : 1 : len(xray) * 1j]
    strength = np.zeros(xray.shape)
    for _ in range(6):
        u, v = random.uniform(-0.6, 0.6, 2)
        sign = np.sign(logit) * random.choice([1, 1, -0.5])
        strength += sign * np.exp(-((x - u) ** 2 + (y - v) ** 2) / 0.02)
    strength = np.clip(strength, -1, 1)[..., None]
    colour = np.where(strength > 0, [178, 24, 43], [33, 102, 172])
    grey = np.repeat(xray[..., None], 3, axis=2)
    return (grey * (1 - np.abs(strength)) + colour * np.abs(strength)).astype(np.uint8)
