"""Write OUT/table.md: the runs of launch/paper.sh beside each other and beside the paper's figures.

All figures of several draws are of their test images together. A patient may be in several of
them, so intervals draw patients with all their images, as in `cxrdist evaluate` and `compare`.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from thumbnails import ThumbnailsInfo

from cxrdist.data.labels import POSITIVE
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.compare import Difference, aligned, compare_scored
from cxrdist.evaluate.measure import Settings, replicate
from cxrdist.evaluate.metrics import Metrics, Scores, compute_metrics, headline
from cxrdist.evaluate.scored import Scored, read_scored
from cxrdist.explain.text_file import read_text_file
from cxrdist.files import read_document, write_text
from cxrdist.info import launches_of, read_info
from cxrdist.intervals import of_share
from cxrdist.model.ensemble import load_predictor
from cxrdist.probe_text import summary
from cxrdist.report.files import read_epochs
from cxrdist.run import RunDirectory

SETS = {
    "paper": "COVID-19, normal and viral pneumonia, 60 of each for test",
    "adults": "COVID-19, normal and pneumonia of adults, 60 of each for test",
    "covid3": "COVID-19, and normal and pneumonia of one hospital, 70/10/20 by patient",
}
NAMES = {
    "logistic_regression": "thumbnails",
    "perceptron": "thumbnails",
    "squeezenet1_1": "squeezenet1_1",
    "resnet18": "resnet18",
    "alexnet": "alexnet",
    "densenet201": "densenet201",
    "densenet121-64px": "densenet121",
    "densenet121": "densenet121",
    "densenet121-findings": "densenet121-findings",
    "bassi2020 head": "bassi2020",
    "bassi2020 unfreeze": "bassi2020",
    "bassi2020 no_decay": "bassi2020",
    "bassi2020": "bassi2020",
}
"""The row of launch/paper.sh that makes a run, by the run's name."""
OF_ALL_SETS = ("thumbnails", "densenet121")
BASELINE = "perceptron"
PAPER = {
    "squeezenet1_1": 98.3,
    "densenet201": 96.7,
    "bassi2020 head": 89.5,
    "bassi2020 unfreeze": 96.1,
    "bassi2020 no_decay": 96.7,
    "bassi2020": 97.8,
}
"""Accuracy in % that the paper gives (sections 3.3 and 4), of one draw; the first two are those of
Chowdhury et al. 2020."""
DRAWN = re.compile(r"(.+)-(\d{1,3})")
MINUTE = 60


@dataclass(frozen=True)
class Row:
    """The runs of one network on the draws of one set."""

    runs: dict[int, RunDirectory]
    """By draw."""

    @cached_property
    def tests(self) -> dict[int, Scored]:
        """The test images of each draw."""
        return {
            d: read_scored(run.predictions("test"), "multiclass") for d, run in self.runs.items()
        }

    def accuracies(self) -> list[float]:
        """The accuracy of each draw, 0 to 1."""
        return [float(is_right(test).mean()) for test in self.tests.values()]

    def parameters(self) -> int:
        """Count weights and biases."""
        run = next(iter(self.runs.values()))
        if thumbnails := _thumbnails(run):
            return thumbnails["parameters"]
        return sum(p.numel() for p in load_predictor(run.root).parameters())

    def minutes(self) -> float:
        """The mean time of training and validation, of epochs as they were done last."""
        return float(np.mean([seconds(run) for run in self.runs.values()])) / MINUTE

    def ranks(self) -> str:
        """How many ranks trained, and on what; empty of thumbnails."""
        infos = [read_info(run) for run in self.runs.values() if not _thumbnails(run)]
        launches = [launch for info in infos for launch in launches_of(info)]
        return ", ".join(sorted({f"{one['world_size']} {one['device']}" for one in launches}))

    def commits(self) -> list[str]:
        """The git revisions that trained the runs."""
        found = (_thumbnails(run) or read_info(run) for run in self.runs.values())
        revisions = {info["git_revision"] or "unknown" for info in found}
        return sorted({name[:9] + "+" * name.endswith("+") for name in revisions})  # +: changed


def _thumbnails(run: RunDirectory) -> ThumbnailsInfo | None:
    file = run.inside("thumbnails.json")
    return read_document(file, ThumbnailsInfo) if file.is_file() else None


def seconds(run: RunDirectory) -> float:
    """The time of a training, without starts and pauses; of RUN/stages/NAME that of the stage."""
    if thumbnails := _thumbnails(run):
        return thumbnails["seconds"]
    is_stage = run.root.parent.name == "stages"
    log = RunDirectory(run.root.parents[1] if is_stage else run.root).log
    epochs = read_epochs(log, read_info(run)["shards"]["task"])
    stages = [run.root.name] if is_stage else list(epochs)
    # NaN is that of epoch 0, the validation before a stage, which has no row of speed.
    return float(np.nansum([epoch["seconds"] for stage in stages for epoch in epochs[stage]]))


def is_right(scored: Scored) -> np.ndarray:
    """Whether the predicted class of each image is its own: bool [N]."""
    return (scored.predicted & (scored.targets == POSITIVE)).any(axis=1)


def pool(tests: dict[int, Scored]) -> Scored:
    """Put the test images of draws into one; an image of two draws is there twice."""
    first = next(iter(tests.values()))
    return Scored(
        first.task,
        first.classes,
        [f"{draw}:{key}" for draw, test in tests.items() for key in test.keys],
        [patient for test in tests.values() for patient in test.patients],
        np.concatenate([test.targets for test in tests.values()]),
        np.concatenate([test.logits for test in tests.values()]),
        {},
    )


def interval(scored: Scored) -> list[float]:
    """The interval of the accuracy by patient, as `cxrdist evaluate` computes it."""
    right = is_right(scored)
    found = of_share(replicate(scored, Settings()), right, np.ones_like(right))
    return found or [0.0, 1.0]


def differ(a: dict[int, Scored], b: dict[int, Scored]) -> Difference:
    """The accuracy of b minus that of a on the draws that both have, paired by image."""
    draws = [draw for draw in a if draw in b]
    first, second = (pool({draw: tests[draw] for draw in draws}) for tests in (a, b))
    second = aligned(first, second, ("the first row", "the second row"))
    return compare_scored(first, second, Settings())["accuracy"]


def find_rows(folder: Path) -> dict[str, Row]:
    """Find the evaluated runs of a set by their names; NAME STAGE is NAME-K/stages/STAGE."""
    found: dict[str, dict[int, RunDirectory]] = {}
    for pattern in ("*/test/metrics.json", "*/stages/*/test/metrics.json"):
        for metrics in sorted(folder.glob(pattern)):
            # NAME-K, or NAME-K, stages and the name of the stage.
            first, *stage = metrics.parents[1].relative_to(folder).parts
            if match := DRAWN.fullmatch(first):
                name = " ".join([match[1], *stage[1:]])
                found.setdefault(name, {})[int(match[2])] = RunDirectory(metrics.parents[1])
    names = [*NAMES, *(name for name in found if name not in NAMES)]
    return {name: Row(dict(sorted(found[name].items()))) for name in names if name in found}


def write_table(out: Path) -> Path:
    """Write OUT/table.md from the runs that are there; a row without a run says "not run".

    Raises:
        CxrdistError: a run is damaged, or rows of a set were evaluated on other images.
    """
    found = {name: find_rows(out / name) for name in SETS}
    parts = [INTRODUCTION.format(out=out)]
    for name, title in SETS.items():
        parts += [f"## {name}: {title}", overview(name, found[name])]
        parts += [f"### {name}/{row}\n\n{table2(found[name][row])}" for row in found[name]]
    parts += [text for text in (findings(out), *words(out, found["paper"])) if text]
    write_text(out / "table.md", "\n\n".join(parts) + "\n")
    return out / "table.md"


INTRODUCTION = """\
# The paper's comparison

A row is made by `DRAWS="K ..." bash launch/paper.sh DATA OUT ROW`; the draw K is the seed of the
splits and of the network. Accuracy is in %, of the test images; its interval (95 %) and that of the
difference to the perceptron (points, paired by image, on the same draws) are by patient, over the
draws together: they tell how much patients matter, and not how much another training would. The
spread is the standard deviation over draws. Minutes are those of a draw's training and validation;
densenet121 starts from densenet121-64px, whose minutes are to be added. The paper's figures are of
one draw, on its own data."""
HEADERS = (
    *("Row", "Run", "Parameters", "Accuracy of each draw", "Mean", "Spread", "Interval"),
    *("Minus perceptron", "Paper", "Minutes", "Ranks", "Commit"),
)


def overview(name: str, rows: dict[str, Row]) -> str:
    """The rows of a set as a table."""
    baseline = rows.get(BASELINE)
    cells = [_cells(name, run, rows[run], baseline) for run in rows]
    expected = NAMES if name == "paper" else [run for run in NAMES if NAMES[run] in OF_ALL_SETS]
    missing = [run for run in expected if run not in rows]
    cells += [[f"`{name}/{NAMES[run]}`", run, "not run"] for run in missing]
    return markdown(cells, HEADERS)


def _cells(name: str, run: str, row: Row, baseline: Row | None) -> list[str]:
    accuracies = np.array(row.accuracies()) * 100
    low, high = (100 * limit for limit in interval(pool(row.tests)))
    gap = ""
    if baseline and baseline is not row and baseline.tests.keys() & row.tests.keys():
        gap = _signed(differ(baseline.tests, row.tests))
    drawn = " ".join(f"{d}: {a:.1f}" for d, a in zip(row.runs, accuracies, strict=True))
    spread = f"{accuracies.std(ddof=1):.1f}" if len(accuracies) > 1 else ""
    return [
        f"`{name}/{NAMES.get(run, run)}`",
        run,
        f"{row.parameters():,}",
        drawn,
        f"{accuracies.mean():.1f}",
        spread,
        f"{low:.1f} to {high:.1f}",
        gap,
        f"{PAPER[run]:.1f}" if name == "paper" and run in PAPER else "",
        f"{row.minutes():.1f}",
        row.ranks(),
        ", ".join(row.commits()),
    ]


def _signed(found: Difference) -> str:
    if found["difference"] is None or found["interval"] is None:
        return ""
    value, low, high = (100 * number for number in (found["difference"], *found["interval"]))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def table2(row: Row) -> str:
    """The confusion matrix over all draws and the paper's Table 2 of it."""
    pooled = pool(row.tests)
    labels = (pooled.targets == POSITIVE).argmax(axis=1)
    metrics = compute_metrics(
        torch.from_numpy(pooled.logits), torch.from_numpy(labels), pooled.classes
    )
    rows = [
        [name, *map(str, counts), *_three(metrics["classes"][name])]
        for name, counts in zip(pooled.classes, metrics["confusion_matrix"], strict=True)
    ]
    rows.append(["Mean of all classes", *[""] * len(pooled.classes), *_three(metrics["macro"])])
    predicted = [f"Predicted {name}" for name in pooled.classes]
    return markdown(rows, ["Truth", *predicted, "Recall", "Precision", "F1 score"])


def _three(scores: Scores) -> list[str]:
    """The scores of the paper's Table 2; a dash where one is not defined."""
    values = scores["recall"], scores["precision"], scores["f1"]
    return ["-" if value is None else f"{value:.3f}" for value in values]


def findings(out: Path) -> str:
    """The run on 14 labels that the chain of transfer begins with; empty if it was not made."""
    run = RunDirectory(out / "findings" / "densenet121-0")
    if not run.metrics("test").is_file():
        return ""
    metrics = read_document(run.metrics("test"), Metrics)
    took = f"{seconds(run) / MINUTE:.1f} minutes"
    return f"## 14 labels of nih14 and adult_normal\n\n{headline(metrics)}; {took}"


def words(out: Path, rows: dict[str, Row]) -> Iterator[str]:
    """The word experiments on each draw of densenet121 that has them (sections 2.2 and 4.1)."""
    for draw, run in rows["densenet121"].runs.items() if "densenet121" in rows else ():
        if not (run.text("test").is_file() and run.metrics("external/edited").is_file()):
            continue
        edited = read_scored(run.predictions("external/edited"), "multiclass")
        both = differ({draw: rows["densenet121"].tests[draw]}, {draw: edited})
        yield (
            f"## Words: densenet121, draw {draw}\n\nTest images as they are: accuracy "
            f"{both['a']:.3f}; with text covered: {both['b']:.3f}, {_signed(both)} points. The "
            "paper: 97.3 % and 97.8 %.\n\n```\n"
            f"{summary(read_text_file(run.text('test')))}\n```"
        )


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Format rows as a table of Markdown."""
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Read the command line; 2 for bad input, with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="OUT of launch/paper.sh")
    try:
        print(f"the table: {write_table(parser.parse_args().out)}")
    except CxrdistError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
