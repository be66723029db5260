"""Seeds and folds: train one recipe several times, measure the spread, and make the ensemble.

Each member is a run of `cxrdist train`; their parent directory is also a run, whose model is the
ensemble.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cxrdist.cli import COMMANDS, parse
from cxrdist.config import EvaluateConfig, SeedsConfig, TrainConfig
from cxrdist.data.folds import MOST_FOLDS
from cxrdist.data.index import read_index
from cxrdist.distributed import entering, gather, on_main, say, start, staying_connected
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.members import MembersFile, spread_table, spreads
from cxrdist.evaluate.predictions import evaluate
from cxrdist.files import (
    atomic_directory,
    atomic_file,
    locked,
    read_document,
    write_json,
    write_text,
)
from cxrdist.info import read_info
from cxrdist.model.densenet import is_ensemble
from cxrdist.model.description import MOST_MEMBERS, EnsembleFile
from cxrdist.model.ensemble import join, save_ensemble
from cxrdist.report.files import subsets_with
from cxrdist.run import RunDirectory
from cxrdist.train.loop import train
from cxrdist.train.training import describe_shards, recipe_yaml

COPIED = ("audit.json", "seen.npz")  # files that are the same for all members


def seeds(config: SeedsConfig) -> None:
    """Train the members in turn; once all are trained, evaluate them and their ensemble.

    The same command resumes: trained members are not trained again. With ``member`` only that one
    is trained; a last call without it joins them.
    """
    _refuse_bad_options(config)
    _refuse_other_run(config.run)
    recipes = [_recipe(config, number) for number in range(config.seeds)]
    chosen = range(config.seeds) if config.member is None else [config.member]
    with staying_connected():
        accelerator = start()
        for number in chosen:
            recipe = recipes[number]
            what = f"fold {recipe.fold}" if config.folds else f"seed {recipe.seed}"
            say(accelerator, f"{_name(number)} of {config.seeds}: {what}")
            train(recipe)
        if config.member is None:
            _join_members(config, recipes, accelerator)
        else:
            say(
                accelerator,
                f"{_name(config.member)} is done; once all {config.seeds} are, the same command "
                "without --member evaluates them and makes the ensemble",
            )


def _refuse_bad_options(config: SeedsConfig) -> None:
    most = MOST_FOLDS if config.folds else MOST_MEMBERS
    if not 2 <= config.seeds <= most:
        raise CxrdistError(f"--seeds {config.seeds}: expected 2 to {most} members")
    if config.member is not None and config.member >= config.seeds:
        raise CxrdistError(
            f"--member {config.member}: expected 0 to {config.seeds - 1}, as there are "
            f"{config.seeds} members (--seeds)"
        )


def _refuse_other_run(root: Path) -> None:
    """Refuse a directory with files that those of the ensemble would replace."""
    if any(
        (root / name).exists() for name in ("index.json", "checkpoints", "model/model.safetensors")
    ):
        raise CxrdistError(f"--run {root}: holds shards or a run of one network; name a new one")


def _recipe(config: SeedsConfig, number: int) -> TrainConfig:
    """Return the training options of one member; refuse a recipe for one fold of the data."""
    run = config.run / _name(number)
    paths = ["--shards", str(config.shards), "--run", str(run)]
    paths += ["--cache", str(config.cache)] if config.cache else []
    recipe: TrainConfig = parse(COMMANDS["train"], ["--config", config.recipe, *paths])
    if config.folds:
        return replace(recipe, fold=f"{number + 1}/{config.seeds}")
    if recipe.fold is not None:
        raise CxrdistError(
            f"--recipe {config.recipe}: has fold {recipe.fold}, on which every member would be "
            "trained; remove it from the recipe, or give --folds for a fold per member"
        )
    return replace(recipe, seed=number)


def _name(number: int) -> str:
    return f"member-{number}"


def _join_members(
    config: SeedsConfig, recipes: list[TrainConfig], accelerator: Accelerator
) -> None:
    """Evaluate the members, make the ensemble, evaluate it, and write members.json."""
    run, names = RunDirectory(config.run), [_name(number) for number in range(config.seeds)]
    splits = _splits(config)
    for name in names:
        for split in splits:
            _evaluate_once(config, run.inside(name), split, accelerator)
    with entering(accelerator, locked(run.root), here=accelerator.is_main_process):
        on_main(accelerator, lambda: _publish(run, names, recipes[0]))
    for split in splits:
        if not (config.folds and split == "val"):  # val differs between folds
            _evaluate_once(config, run.root, split, accelerator)
    on_main(accelerator, lambda: _write_spread(config, names, splits))


def _splits(config: SeedsConfig) -> list[str]:
    """Return the splits to evaluate: test if there is one; for folds, or without test, val."""
    has_test = bool(read_index(config.shards).numbers("test"))
    return ["test"] * has_test + ["val"] * (config.folds or not has_test)


def _evaluate_once(config: SeedsConfig, run: Path, split: Any, accelerator: Accelerator) -> None:
    """Evaluate a run unless an earlier command has done it."""
    # All ranks must evaluate or none, and a shared disk may show a new file to some of them only.
    is_done = gather(accelerator, [RunDirectory(run).metrics(split).is_file()])[0]
    if not is_done:
        say(accelerator, f"{run.name}:")
        evaluate(EvaluateConfig(run, config.shards, split, cache=config.cache))


def _publish(run: RunDirectory, names: list[str], recipe: TrainConfig) -> None:
    """Write the files that make the directory a run: recipe, run.json and, last, the model.

    Nothing is written if the ensemble of these members is already there.
    """
    members = [RunDirectory(run.inside(name)) for name in names]
    ensemble = join(run, names)
    infos = [read_info(member) for member in members]
    finished = max(info["finished"] or "" for info in infos)
    file = run.model / "model.json"
    if file.is_file() and is_ensemble(run.root) and run.info.is_file():
        same_members = read_document(file, EnsembleFile)["members"] == names
        # A member that was removed and trained again has another `finished`.
        if same_members and read_info(run)["finished"] == finished:
            return
    # First, so that a kill leaves no figures of earlier members beside the new model.
    _remove_metrics(run)
    for name in COPIED:
        if (file := members[0].inside(name)).is_file():
            with atomic_file(run.inside(name)) as partial:
                shutil.copyfile(file, partial)
    write_text(run.recipe, recipe_yaml(replace(recipe, fold=None)))
    own = {
        "started": min(info["started"] for info in infos),
        "finished": finished,
        "shards": describe_shards(read_index(recipe.shards)),  # members count those of their fold
        "stages": {},
    }
    # The rest, such as versions and hardware, is that of the first member.
    write_json(run.info, {**infos[0], **own})
    with atomic_directory(run.model) as directory:
        save_ensemble(ensemble, directory)


def _remove_metrics(run: RunDirectory) -> None:
    """Remove the metrics of an earlier ensemble: of every split and external set."""
    for subset in subsets_with(run.root, "metrics.json"):
        run.metrics(subset).unlink()


def _write_spread(config: SeedsConfig, names: list[str], splits: list[str]) -> None:
    """Write members.json, and print a table of the means over the classes."""
    run = RunDirectory(config.run)
    content: MembersFile = {
        "format": "cxrdist-members-1",
        "kind": "folds" if config.folds else "seeds",
        "members": names,
        "splits": {split: spreads(run, names, split) for split in splits},
    }
    write_json(run.members, content)
    for split, figures in content["splits"].items():
        print(f"\n{split}, {len(names)} members:")
        print(spread_table([spread for spread in figures if spread["of"] is None]))
    print(f"the ensemble is a run: {run.root}; all figures: {run.members}")
