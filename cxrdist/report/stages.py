"""The stages of a training as the report shows them."""

import math
from typing import Any

import numpy as np
from markupsafe import Markup

from cxrdist.info import RunInfo
from cxrdist.report import pictures
from cxrdist.report.files import Recipe, read_epochs
from cxrdist.run import RunDirectory


def stage_views(run: RunDirectory, info: RunInfo, recipe: Recipe | None) -> list[dict[str, Any]]:
    """Gather each stage in the order of the recipe: what it trained and how it went."""
    task = info["shards"]["task"]
    epochs = read_epochs(run.log, task)
    names = dict.fromkeys([*(recipe.stages if recipe else []), *info["stages"], *epochs])
    views = []
    for place, name in enumerate(names):
        facts = info["stages"].get(name)
        best = facts["best_epoch"] if facts else None
        rows = epochs.get(name, [])
        views.append(
            {
                "name": name,
                "facts": facts,
                "background": facts.get("background") if facts else None,
                "frozen": facts["frozen"] if facts else [],
                "best_epoch": best,
                "rows": rows,
                "score": "accuracy" if task == "multiclass" else "mean AUROC",
                "charts": _charts(f"stage{place}", rows, best, task) if rows else [],
                "images_per_second": (
                    float(np.nanmedian([row["images_per_second"] for row in rows]))
                    if any(not math.isnan(row["images_per_second"]) for row in rows)
                    else None
                ),
            }
        )
    return views


def _charts(name: str, rows: list[dict[str, Any]], best: int | None, task: str) -> list[Markup]:
    """Draw loss and validation score of one stage."""
    column = {key: [row[key] for row in rows] for key in ("loss", "val_loss", "val_score")}
    epochs = [int(row["epoch"]) for row in rows]
    score = "accuracy" if task == "multiclass" else "AUROC"
    charts = (
        pictures.loss_chart(f"{name}-loss", epochs, column["loss"], column["val_loss"], best),
        pictures.score_chart(f"{name}-score", epochs, column["val_score"], best, score),
    )
    return [Markup(chart) for chart in charts]
