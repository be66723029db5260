"""Publish: the model of a stage, and of the whole run, as runs that `evaluate` takes."""

from cxrdist.distributed import on_main, say
from cxrdist.files import atomic_directory, now, read_log, room_for, write_json, write_text
from cxrdist.info import read_info
from cxrdist.model.densenet import save_model
from cxrdist.run import RunDirectory
from cxrdist.terminal import rounded, table
from cxrdist.train.training import Training, recipe_yaml


def publish(training: Training) -> None:
    """Write the model of the run, as its last act, and print what its stages reach."""

    def write() -> None:
        _write_model(training, training.run)
        print(_stage_table(training.run))

    on_main(training.accelerator, write)
    say(training.accelerator, f"trained; the model is in {training.run.model}")


def publish_stage(training: Training, name: str) -> None:
    """Write the model that a stage ends in as a run of its own, RUN/stages/NAME, for `evaluate`.

    The model of the last stage is that of the whole run, and is not written twice.
    """

    def write() -> None:
        stage = training.run.stage(name)
        with room_for(stage.root):
            stage.root.mkdir(parents=True, exist_ok=True)
        write_text(stage.recipe, recipe_yaml(training.recipe))
        _write_model(training, stage)

    if name != list(training.recipe.stages)[-1]:
        on_main(training.accelerator, write)


def _write_model(training: Training, run: RunDirectory) -> None:
    """Write run.json with the time, and then the model, which says that the run is finished."""
    write_json(run.info, {**read_info(training.run), "finished": now()})
    with atomic_directory(run.model) as directory:
        save_model(training.model, directory)


def _stage_table(run: RunDirectory) -> str:
    """Format what the best weights of each stage reach on augmented copies of the validation split.

    `cxrdist evaluate --split val` takes its unchanged images, and may give another score.
    """
    stages = read_info(run)["stages"]
    scores: dict[tuple[str, int], float | None] = {}
    name = "val_accuracy"
    for row in read_log(run.log):
        if row["kind"] == "epoch":
            name = "val_auroc" if "val_auroc" in row else name
            scores[row["stage"], row["epoch"]] = row[name]
    rows = []
    for stage, info in stages.items():
        score = scores.get((stage, info["best_epoch"]))
        of = f"{info['best_epoch']} of {info['epochs']}"
        rows.append([stage, of, f"{info['best_val_loss']:.4f}", rounded(score, 4)])
    scored = table(rows, ["stage", "best epoch", "val loss", name.replace("_", " ")])
    return f"best weights of each stage, on augmented copies of the val images\n{scored}"
