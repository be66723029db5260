"""A small run made by the real commands, with every document that they write."""

from pathlib import Path

from support import make_shards

from cxrdist.config import (
    Augmentation,
    Background,
    EvaluateConfig,
    ExplainConfig,
    Network,
    ProbeTextConfig,
    ReportConfig,
    Stage,
    TrainConfig,
)
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.index import read_index
from cxrdist.evaluate.predictions import evaluate
from cxrdist.explain.export import explain
from cxrdist.probe_text import probe_text
from cxrdist.report.html import report
from cxrdist.train.loop import train

BLOCKS = ("stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")


def make_run(folder: Path) -> Path:
    """Pack, train, evaluate, explain and probe: ``images``, ``shards``, ``boxes.csv``, ``run``.

    Returns:
        The folder.
    """
    shards, run, cache = (
        make_shards(folder, {"a": 12, "b": 12}, masks=True),
        folder / "run",
        folder / "cache",
    )
    background = Background(0.1, "masks", "gradient")
    stages = {"all": Stage(dict.fromkeys(BLOCKS, 0.003), 2, 2, background=background)}
    train(
        TrainConfig(
            shards,
            run,
            stages,
            init="none",
            global_batch_size=6,
            augmentation=Augmentation(degrees=5),
            network=Network(growth_rate=4, block_config=(2, 2, 2, 2)),
            optimizer="adamw",
            cache=cache,
        )
    )
    evaluate(EvaluateConfig(run, shards, cache=cache))
    explain(ExplainConfig(run, shards, cache=cache, limit=2))
    paths = [sample.path for sample in read_index(shards).samples if sample.split == "test"]
    box = Box(4, 4, 20, 9, "R", 0.9)
    write_boxes(folder / "boxes.csv", {path: [box] for path in paths[:4]})
    probe_text(ProbeTextConfig(run, shards, boxes=folder / "boxes.csv", cache=cache, limit=2))
    report(ReportConfig(run))
    return folder
