"""What the report shows of the training stages."""

import math

import numpy as np
from markupsafe import Markup

from cxrdist.evaluate.metrics import headline_means
from cxrdist.info import RunInfo
from cxrdist.report import pictures
from cxrdist.report.files import Epoch, Recipe, read_epochs, read_metrics
from cxrdist.report.view import View
from cxrdist.run import STAGE_NAME, RunDirectory


def stage_views(run: RunDirectory, info: RunInfo, recipe: Recipe | None) -> list[View]:
    """Gather the values for each stage, in the order of the recipe."""
    task = info["shards"]["task"]
    epochs = read_epochs(run.log, task)
    # Only the recipe, which may be missing, names stages that did not begin.
    names = dict.fromkeys([*(recipe.stages if recipe else []), *info["stages"], *epochs])
    views: list[View] = []
    for i, name in enumerate(names):
        facts = info["stages"].get(name)
        best = facts["best_epoch"] if facts else None
        rows = epochs.get(name, [])
        views.append(
            {
                "name": name,
                "facts": facts,
                "background": facts.get("background") if facts else None,
                "best_epoch": best,
                "val_score": next((row["val_score"] for row in rows if row["epoch"] == best), None),
                "evaluated": {
                    # The last stage has no directory: its model is that of the run.
                    split: _own_score(run, None if name == [*names][-1] else name, split, task)
                    for split in ("val", "test")
                },
                "rows": rows,
                "score": "accuracy" if task == "multiclass" else "mean AUROC",
                "charts": _charts(f"stage{i}", rows, best, task) if rows else [],
                "images_per_second": (
                    # np.nanmedian warns if all values are NaN.
                    float(np.nanmedian([row["images_per_second"] for row in rows]))
                    if any(not math.isnan(row["images_per_second"]) for row in rows)
                    else None
                ),
            }
        )
    return views


def _own_score(run: RunDirectory, stage: str | None, split: str, task: str) -> float | None:
    """Read the score of a stage's model (None: the last stage); return None if not evaluated.

    In older versions stages could have any name and no model of their own.
    """
    if stage is not None and not STAGE_NAME.fullmatch(stage):
        return None
    metrics = read_metrics((run.stage(stage) if stage else run).metrics(split), task)
    if metrics is None:
        return None
    return metrics["accuracy"] if task == "multiclass" else headline_means(metrics)["auroc"]


def _charts(name: str, rows: list[Epoch], best: int | None, task: str) -> list[Markup]:
    """Draw loss and validation score of one stage."""
    loss, val_loss = [row["loss"] for row in rows], [row["val_loss"] for row in rows]
    scores = [row["val_score"] for row in rows]
    epochs = [int(row["epoch"]) for row in rows]
    score = "accuracy" if task == "multiclass" else "AUROC"
    return [
        pictures.loss_chart(f"{name}-loss", epochs, loss, val_loss, best),
        pictures.score_chart(f"{name}-score", epochs, scores, best, score),
    ]
