"""The report of any program's predictions: the sections of one split, without a run."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.labels import SEPARATOR
from cxrdist.data.records import NO_PATIENT
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.calibration import choose_calibration, describe_calibration
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.metrics import headline, metrics_table
from cxrdist.evaluate.operating_points import YOUDEN, read_rule
from cxrdist.evaluate.prediction_table import PredictionTable, read_prediction_table
from cxrdist.evaluate.scored import STATED, Scored
from cxrdist.files import atomic_directory, is_free, sha256_of, write_json, write_table, write_text
from cxrdist.model.description import Calibration
from cxrdist.report.page import template
from cxrdist.report.splits import split_view
from cxrdist.report.verdict import gap_lines, verdict_view
from cxrdist.report.view import View
from cxrdist.run import RunDirectory

HERE = ""  # the results are in the directory itself: a table has no subsets
NO_POINTS = "no temperatures and no operating points: they need rows with val in a column split"
FEWEST = Settings().fewest
SUMS_TO_ONE = 0.01  # tolerance; programs write at least two digits


def report_predictions(file: Path, out: Path) -> Path:
    """Write ``OUT/report.html``, metrics.json and the predictions as read into a new directory.

    Of a table with splits only the test images are scored.

    Returns:
        The page.

    Raises:
        CxrdistError: the table is malformed, or the directory is not empty.
    """
    if not is_free(out):
        raise CxrdistError(f"--out {out}: already exists; name a new or empty directory")
    table = read_prediction_table(file)
    is_test = np.array([split == "test" for split in table.splits] or [True] * len(table.scored))
    scored, probabilities = table.scored.take(is_test), table.probabilities[is_test]
    sha256 = sha256_of(file)
    metrics = measure(scored, Settings(calibration=_calibrate(table, sha256)))
    values = _values(file, sha256, table, scored, probabilities)
    with atomic_directory(out) as folder:
        run = RunDirectory(folder)
        _write_predictions(run, scored, probabilities)
        write_json(run.metrics(HERE), metrics)
        # From the files just written, by the code that reads those of a run.
        view = split_view(run, HERE, "results", scored.task)
        view["name"] = file.name
        page = template("foreign.html.jinja").render(
            values,
            headline=view,
            splits=[view],
            verdict=verdict_view(view),
            remarks=gap_lines(metrics),
        )
        write_text(run.report, page)
    for note in table.notes:
        print(f"{file}: {note}")
    print(metrics_table(metrics))
    print(describe_calibration(metrics) if "operating_points" in metrics else NO_POINTS)
    print(f"{file.name}: {headline(metrics)}")
    print(f"the report: {out / 'report.html'}")
    return out / "report.html"


def _write_predictions(
    run: RunDirectory, scored: Scored, probabilities: NDArray[np.float64]
) -> None:
    """Write predictions.csv as `cxrdist evaluate` does, with all digits."""
    names = [f"{what}_{name}" for what in ("prob", "logit") for name in scored.classes]
    known = {
        "key": scored.keys,
        "patient": scored.patients,
        **_label_texts(scored),
        **scored.groups,
    }
    numbers = np.hstack([probabilities, scored.logits])
    rows = (
        [*cells, *(f"{value:.17g}" for value in digits)]
        for *cells, digits in zip(*known.values(), numbers, strict=True)
    )
    write_table(run.predictions(HERE), [*known, *names], rows)


def _label_texts(scored: Scored) -> dict[str, list[str]]:
    """Return the columns label and, if not empty, uncertain and missing; ``|`` between labels."""
    names = np.array(scored.classes, dtype=object)
    return {
        column: [SEPARATOR.join(names[row == code]) for row in scored.targets]
        for column, code in STATED.items()
        if column == "label" or (scored.targets == code).any()
    }


def _calibrate(table: PredictionTable, sha256: str) -> Calibration | None:
    """Choose temperatures and thresholds on the val images; None if there are none."""
    is_val = np.array([split == "val" for split in table.splits], dtype=bool)
    if not is_val.any():
        return None
    return choose_calibration(table.scored.take(is_val), read_rule(YOUDEN), FEWEST, sha256)


def _values(
    file: Path,
    sha256: str,
    table: PredictionTable,
    scored: Scored,
    probabilities: NDArray[np.float64],
) -> View:
    """Gather the values for the file and the scored images."""
    sums = probabilities.sum(axis=1)
    patients = {*scored.patients}
    return {
        "name": file.name,
        "sha256": sha256,
        # In place of run.json, for the templates shared with the report of a run.
        "info": {"shards": {"task": scored.task, "index_sha256": None}},
        "num_images": len(scored),
        "num_patients": len(patients),
        "num_own": sum(name.startswith(NO_PATIENT) for name in patients),
        "num_aside": len(table.scored) - len(scored),
        "num_val": table.splits.count("val"),
        "has_splits": bool(table.splits),
        "adds_up": len(scored.classes) > 1 and bool((np.abs(sums - 1) <= SUMS_TO_ONE).all()),
        "notes": table.notes,
        "audit": None,
        "baselines": [],
    }
