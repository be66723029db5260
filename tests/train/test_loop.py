import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import make_shards, run_command, run_ranks

from cxrdist import distributed
from cxrdist.config import Augmentation, Network, Stage, TrainConfig
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.evaluate.seen import read_seen
from cxrdist.files import locked, read_log
from cxrdist.model.densenet import Classifier, Cover, load_model
from cxrdist.train import loop, stage
from cxrdist.train.checkpoint import has_checkpoint
from cxrdist.train.loop import train

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]
SHORT = {"head": Stage({"head": 0.1}, epochs=1, patience=1)}


def recipe(shards: Path, run: Path, **changes: object) -> TrainConfig:
    """Two stages of two epochs of a small network, with dropout."""
    settings = {
        "init": "none",
        "global_batch_size": 6,
        "max_images_per_rank": 4,
        "augmentation": Augmentation(degrees=5),
        "network": Network(growth_rate=4, block_config=(2, 2, 2, 2)),
        "cache": run.parent / "cache",
        **changes,
    }
    stages = {
        "all": Stage(dict.fromkeys(BLOCKS, 0.05), epochs=2, patience=2),
        "late": Stage({"denseblock4": 0.01, "head": 0.01}, epochs=2, patience=2),
    }
    return TrainConfig(shards, run, settings.pop("stages", stages), **settings)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("frozen", ["kept", "moving"])
def test_a_killed_run_goes_on_to_the_same_bytes(shards, tmp_path, monkeypatch, frozen):
    """Killed after each epoch and started again, a run ends in the weights of an unbroken one."""
    train(recipe(shards, tmp_path / "whole", frozen_batch_norm=frozen))
    save = stage.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    monkeypatch.setattr(stage, "save_checkpoint", save_and_die)
    for _ in range(4):
        with pytest.raises(Killed):
            train(recipe(shards, tmp_path / "broken", frozen_batch_norm=frozen))
    monkeypatch.undo()
    train(recipe(shards, tmp_path / "broken", frozen_batch_norm=frozen))
    for model in ("model/model.safetensors", "stages/all/model/model.safetensors"):
        whole, broken = ((tmp_path / name / model).read_bytes() for name in ("whole", "broken"))
        assert whole == broken
    rows = [
        [row for row in read_log(tmp_path / name / "log.jsonl") if row["kind"] != "speed"]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1]


def test_the_loss_of_a_row_is_that_of_the_steps_since_the_last_row(shards, tmp_path, monkeypatch):
    """Rows of two steps have the means of two rows of one; five steps have no third row."""
    losses = {}
    for steps in (1, 2):
        monkeypatch.setattr(loop, "STEPS_PER_LOG_ROW", steps)
        run = tmp_path / str(steps)
        train(recipe(shards, run, stages=SHORT, cache=tmp_path / "cache"))
        rows = [row for row in read_log(run / "log.jsonl") if row["kind"] == "step"]
        losses[steps] = {row["step"]: row["loss"] for row in rows}
    each = [losses[1][step] for step in range(1, 6)]
    assert losses[2] == pytest.approx({2: sum(each[:2]) / 2, 4: sum(each[2:4]) / 2})
    assert len({*each}) == 5


def test_rows_of_an_epoch_that_was_lost_are_not_logged_twice(shards, tmp_path, monkeypatch):
    """A run that dies between the log and the checkpoint takes the epoch again, once."""

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(stage, "save_checkpoint", die)
    with pytest.raises(Killed):
        train(recipe(shards, tmp_path / "run"))
    monkeypatch.undo()
    train(recipe(shards, tmp_path / "run"))
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["kind"] == "epoch"]
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        *(("all", epoch) for epoch in (0, 1, 2)),
        *(("late", epoch) for epoch in (0, 1, 2)),
    ]


def test_the_best_weights_of_a_save_within_the_first_epoch_are_kept(
    shards, tmp_path, monkeypatch, capsys
):
    """Killed before the first epoch's checkpoint, a run resumes from the save before it."""
    losses = iter([1.0, 0.5])
    monkeypatch.setattr(
        stage, "validate", lambda *_: {"val_loss": next(losses), "val_accuracy": 0.5}
    )
    save = stage.save_checkpoint

    def save_within_the_epoch(directory, checkpoint, *rest):
        if not checkpoint.position.step:
            raise Killed
        save(directory, checkpoint, *rest)

    monkeypatch.setattr(stage, "save_checkpoint", save_within_the_epoch)
    config = recipe(shards, tmp_path / "run", save_steps=2)
    with pytest.raises(Killed):
        train(config)
    monkeypatch.undo()
    capsys.readouterr()
    train(config)
    said = capsys.readouterr()
    assert "resuming after all, epoch 0 and step 4 of the next" in said.out
    assert "damaged" not in said.err


def test_a_run_without_a_checkpoint_may_start_from_other_weights(shards, tmp_path, monkeypatch):
    """Nothing can be mixed up, so a corrected --init is as good as a corrected recipe."""
    network = Classifier(Network(growth_rate=4, block_config=(2, 2, 2, 2)), ["x"], 32).network
    torch.save(network.state_dict(), tmp_path / "w.pt")

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(stage, "save_checkpoint", die)
    with pytest.raises(Killed):
        train(recipe(shards, tmp_path / "run", stages=SHORT, init=str(tmp_path / "w.pt")))
    monkeypatch.undo()
    train(recipe(shards, tmp_path / "run", stages=SHORT))
    assert load_model(tmp_path / "run").origin["source"] == "random"


def test_a_run_without_a_checkpoint_keeps_nothing_of_an_earlier_attempt(
    shards, tmp_path, monkeypatch
):
    """Neither images that other weights have seen, nor an audit, nor a stage of another recipe."""
    stages = {name: {name: Stage({"head": 0.1}, epochs=1, patience=1)} for name in ("one", "two")}
    train(recipe(shards, tmp_path / "other", stages=stages["one"]))

    def die(*arguments):
        raise Killed

    monkeypatch.setattr(stage, "save_checkpoint", die)
    with pytest.raises(Killed):
        train(recipe(shards, tmp_path / "run", stages=stages["one"], init=str(tmp_path / "other")))
    monkeypatch.undo()
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "audit.json").unlink()
    train(recipe(tmp_path / "shards", tmp_path / "run", stages=stages["two"]))
    with open(shards / "samples.csv", newline="") as file:
        learnt = [row["key"] for row in csv.DictReader(file) if row["split"] != "test"]
    assert sorted(read_seen(tmp_path / "run" / "seen.npz").keys) == sorted(learnt)
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["stages"]) == ["two"]
    assert not (tmp_path / "run" / "audit.json").exists()


def test_the_published_model_is_the_last_stages_best(shards, tmp_path, monkeypatch, capsys):
    """A worse last epoch does not become the model, and the next stage starts from the best.

    The earlier stage's best is a run of its own, and the terminal has a table of both.
    The model says how its images were scaled and covered, so that predict does the same.
    """
    losses = iter([1.0, 0.9, 0.5, 0.5, 0.4, 0.7])
    accuracies = iter([0.1, 0.2, 0.75, 0.75, 0.25, 0.9])
    states = []

    def validate(accelerator, model, *_):
        states.append({k: v.clone() for k, v in model.network.state_dict().items()})
        return {"val_loss": next(losses), "val_accuracy": next(accuracies)}

    monkeypatch.setattr(stage, "validate", validate)
    shards = shutil.copytree(shards, tmp_path / "shards")
    index = json.loads((shards / "index.json").read_text())
    index |= {"depth": 12, "cover": {"how": "fill", "split": "train", "images": 0, "boxes": 0}}
    (shards / "index.json").write_text(json.dumps(index))
    train(recipe(shards, tmp_path / "run"))
    published = load_model(tmp_path / "run")
    assert (published.depth, published.cover) == (12, Cover("fill", "train"))
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(model[k], v) for k, v in states[4].items())
    frozen = "features.conv0.weight"
    assert torch.equal(states[4][frozen], states[2][frozen])
    assert not torch.equal(states[2][frozen], states[1][frozen])
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [info["stages"][s]["best_epoch"] for s in ("all", "late")] == [2, 1]
    assert info["finished"]
    first = load_model(tmp_path / "run" / "stages" / "all").network.state_dict()
    assert all(torch.equal(first[k], v) for k, v in states[2].items())
    assert [file.name for file in (tmp_path / "run" / "stages").iterdir()] == ["all"]
    lines = capsys.readouterr().out.splitlines()
    best = [line.split(":")[0] for line in lines if line.endswith(" (best)")]
    assert best == ["all 1/2", "all 2/2", "late 1/2"]
    told = [line.split() for line in lines]
    assert "best weights of each stage, on augmented copies of the val images" in lines
    assert ["all", "2", "of", "2", "0.5000", "0.7500"] in told
    assert ["late", "1", "of", "2", "0.4000", "0.2500"] in told


def test_a_stage_that_only_gets_worse_publishes_what_it_began_with(shards, tmp_path, monkeypatch):
    """The weights of a stage's start compete as its epoch 0, also against a killed run's memory."""
    losses = [0.9, 0.5, 0.6, 0.5, 0.7, 2.1]  # start, two epochs; start, two epochs
    states = []

    def validate(accelerator, model, *_):
        states.append({k: v.clone() for k, v in model.network.state_dict().items()})
        return {"val_loss": losses[len(states) - 1], "val_accuracy": 0.5}

    save = stage.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    monkeypatch.setattr(stage, "validate", validate)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "save_checkpoint", save_and_die)
        for _ in range(4):
            with pytest.raises(Killed):
                train(recipe(shards, tmp_path / "run"))
    train(recipe(shards, tmp_path / "run"))
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert len(states) == len(losses)
    assert all(torch.equal(model[k], v) for k, v in states[1].items())
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    late = info["stages"]["late"]
    assert (late["best_epoch"], late["best_val_loss"], late["epochs"]) == (0, 0.5, 2)


def test_a_loss_that_is_not_finite_stops_before_the_update(shards, tmp_path, monkeypatch):
    """A NaN names stage, epoch and step, changes no weight and publishes nothing."""
    stage = {"all": Stage(dict.fromkeys(BLOCKS, 1e30), epochs=1, patience=1)}
    config = recipe(shards, tmp_path / "run", stages=stage)
    with pytest.raises(RunFailedError, match=r"stage all, epoch 1, step \d+: .* not finite"):
        train(config)
    assert not (tmp_path / "run" / "model").exists()
    assert not has_checkpoint(tmp_path / "run" / "checkpoints")


def test_a_validation_loss_that_is_not_finite_stops_the_run(shards, tmp_path, monkeypatch):
    """An epoch that cannot be judged is neither saved nor published."""
    losses = iter([0.7, float("nan")])
    monkeypatch.setattr(
        stage, "validate", lambda *_: {"val_loss": next(losses), "val_accuracy": 0.5}
    )
    with pytest.raises(RunFailedError, match=r"stage all, epoch 1: the validation loss"):
        train(recipe(shards, tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()
    assert not has_checkpoint(tmp_path / "run" / "checkpoints")


def test_the_saved_recipe_can_be_passed_back(shards, tmp_path):
    """RUN/recipe.yaml with --config goes on in the same run; a changed one is refused."""
    train(recipe(shards, tmp_path / "run", stages=SHORT))
    saved = tmp_path / "run" / "recipe.yaml"
    again = ("train", "--config", saved, "--shards", shards, "--run", tmp_path / "run")
    done = run_command(*again, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "is already trained" in done.stdout
    changed = run_command(*again, "--global-batch-size", 5)
    assert changed.returncode == 2
    assert "global_batch_size was 6, is 5" in changed.stderr
    assert "Traceback" not in changed.stderr
    assert len(changed.stderr.strip().splitlines()) == 1


def test_a_run_directory_of_other_shards_is_refused(shards, tmp_path):
    """Going on with other images would mix two trainings."""
    train(recipe(shards, tmp_path / "run", stages=SHORT))
    other = shutil.copytree(shards, tmp_path / "other")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "seed": 99}))
    with pytest.raises(CxrdistError, match="begun with other shards"):
        train(recipe(other, tmp_path / "run", stages=SHORT))


def test_a_run_directory_has_one_writer(shards, tmp_path):
    """A second process in the same run directory is refused while the first one lives."""
    with (
        locked(tmp_path / "run"),
        pytest.raises(CxrdistError, match="another cxrdist process"),
    ):
        train(recipe(shards, tmp_path / "run"))


@pytest.mark.parametrize(("split", "empty"), [("0/0/1", "train"), ("0.6/0/0.4", "val")])
def test_shards_without_train_or_val_are_refused_before_any_work(tmp_path, split, empty):
    """One line says what training needs; no run directory and no cache are made."""
    shards = make_shards(tmp_path, {"a": 4, "b": 4}, split=split)
    with pytest.raises(CxrdistError, match=f"have no images in {empty}; training needs train"):
        train(recipe(shards, tmp_path / "run"))
    assert {file.name for file in tmp_path.iterdir()} == {"images", "shards"}


def test_a_world_larger_than_the_batch_is_refused(shards, tmp_path):
    """Three ranks cannot share a step of two images; the message is one line."""
    stage = {"head": {"lr": {"head": 0.1}, "epochs": 1, "patience": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": stage, "init": "none"}))
    done = run_ranks(
        *(3, "-m", "cxrdist", "train", "--config", tmp_path / "recipe.yaml"),
        *("--shards", shards, "--run", tmp_path / "run", "--global-batch-size", "2"),
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("cxrdist:")] == [
        "cxrdist: --global-batch-size: 2 images for 3 ranks; "
        "launch at most as many ranks as images in a step"
    ]


def test_trackers_are_accelerates(shards, tmp_path, monkeypatch):
    """Event files go to RUN/tracking; a name that is unknown or not installed is refused first."""
    pytest.importorskip("tensorboard")
    train(recipe(shards, tmp_path / "run", stages=SHORT, track="tensorboard"))
    assert list((tmp_path / "run" / "tracking").rglob("events*"))
    with pytest.raises(CxrdistError, match=r"no tracker 'tensorbord'; .*nearest is tensorboard"):
        train(recipe(shards, tmp_path / "other", track="tensorbord"))
    monkeypatch.setattr(distributed, "get_available_trackers", list)
    with pytest.raises(CxrdistError, match="--track wandb: is not installed; run `pip install wan"):
        train(recipe(shards, tmp_path / "other", track="wandb"))
    assert not (tmp_path / "other").exists()
