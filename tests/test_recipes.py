"""`cxrdist train --shards S --run R` alone, as a new user types it, on small sets of every kind."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import make_shards

from cxrdist.cli import _default_recipe, main
from cxrdist.config import PackConfig
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.files import read_log
from cxrdist.model import download
from cxrdist.packaged import files_in
from cxrdist.train.advice import _advice_on_cpu

# A network that trains in no time; all else is the recipe's own.
SMALL = ("--network.growth-rate", 4, "--network.block-config", "[1,1,1,1]")
SHORT = ("--stages.all.epochs", 2)


def train(shards: Path, run: Path, *options: object) -> int:
    """Run the command with what makes it short."""
    places = ("--shards", shards, "--run", run, "--cache", run.parent / "cache")
    return main(["train", *map(str, (*places, *SMALL, *SHORT, *options))])


def epochs_of(run: Path) -> dict[str, list[dict]]:
    """Rows of the log by stage, one per epoch, without what the stage began with."""
    stages: dict[str, list[dict]] = {}
    for row in read_log(run / "log.jsonl"):
        if row["kind"] == "epoch" and row["epoch"]:
            stages.setdefault(row["stage"], []).append(row)
    return stages


def write_table(folder: Path, num_images: int = 24) -> Path:
    """A table of noise whose images have two labels, one of them, or none."""
    random = np.random.default_rng(0)
    rows = ["path,labels,patient"]
    for i in range(num_images):
        Image.fromarray(random.integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{('Edema|Mass', 'Mass', 'Mass', '')[i % 4]},p{i}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder / "table.csv"


def test_three_classes_from_random_weights_and_then_from_that_run(shards, tmp_path, capsys):
    """`--init none` takes scratch, weights take finetune; 30 images are less than a batch of 32."""
    assert train(shards, tmp_path / "one", "--init", "none") == 0
    said = capsys.readouterr().out
    assert said.startswith("recipe: scratch, as --init none gives random weights and no --config")
    assert "balance: copies of each image in an epoch, from the counts of train: a 1, b c 1" in said
    assert "2 optimiser steps in all, 1 per epoch, are few; give more, such as" in said
    assert list(epochs_of(tmp_path / "one")) == ["all"]
    assert train(shards, tmp_path / "two", "--init", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert said.startswith("recipe: finetune, which suits any classes, as no --config is given")
    stages = epochs_of(tmp_path / "two")
    assert {name: len(rows) for name, rows in stages.items()} == {"head": 3, "all": 2}
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def test_two_classes_of_20_to_1_have_as_many_images_in_an_epoch(tmp_path, capsys):
    """Of 60 and 3 images the 3 are taken 20 times each: four steps of 30 images."""
    shards = make_shards(tmp_path, {"common": 120, "rare": 6}, split="0.5/0.2/0.3")
    assert train(shards, tmp_path / "run", "--init=none") == 0
    said = capsys.readouterr().out
    counts = read_index(shards).counts()["train"]
    common, rare = (counts[name]["images"] for name in ("common", "rare"))
    copies = round(common / rare)
    assert f"from the counts of train: common 1, rare {copies}\n" in said
    first = epochs_of(tmp_path / "run")["all"][0]
    assert first["step"] == -(-(common + copies * rare) // 32)


def test_a_table_of_several_labels_is_taken_as_it_is(tmp_path, capsys):
    """No copies: those for a rare label would be copies of the others too."""
    table = write_table(tmp_path)
    pack(PackConfig("csv", table, tmp_path / "shards", size=32, split="0.5/0.25/0.25", workers=1))
    assert train(tmp_path / "shards", tmp_path / "run", "--init", "none") == 0
    assert (
        "balance: each image once per epoch, as images may have several" in capsys.readouterr().out
    )
    first = epochs_of(tmp_path / "run")["all"][0]
    assert first["step"] == 1  # 12 images, a batch has 16


def test_without_a_network_the_way_from_random_weights_is_named(
    shards, tmp_path, capsys, monkeypatch
):
    """ImageNet's weights, which finetune starts from, cannot be fetched: nothing is begun."""
    refuse = OSError("no network")
    monkeypatch.setattr(download, "_fetch", lambda *_, **__: (_ for _ in ()).throw(refuse))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert train(shards, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "could not be fetched (no network); run the same command again" in said
    assert said.endswith(". --init none starts from random weights\n")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_papers_recipe_names_one_for_other_classes(shards, tmp_path, capsys):
    """Its copies are of its own classes; nothing is begun."""
    places = ("--shards", shards, "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    options = map(str, (*places, *SMALL, "--init", "none"))
    assert main(["train", "--config", "bassi2020", *options]) == 2
    said = capsys.readouterr().err
    assert "copies: no class 'COVID-19' in the shards; expected one of a, b c, d. For" in said
    assert "use the recipe finetune, or scratch with --init none" in said
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_recipe_lungs_is_taken_without_masks_as_its_head_says(shards, tmp_path):
    """Both of its stages have a background loss, so both need another region than the masks."""
    head = files_in("recipes")["lungs"].read_text().replace("\n#", "")
    options = re.findall(r"--stages\S+|thorax", head.split("without any take ")[1].split(",")[0])
    assert train(shards, tmp_path / "run", "--config", "lungs", *options) == 0


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ([], "finetune"),
        (["--init", "chexnet"], "finetune"),
        (["--init=none"], "scratch"),
        (["--config", "demo"], None),
        (["--config=demo", "--init", "none"], None),
        (["--stages={one: {lr: {head: 0.1}, epochs: 1, patience: 1}}"], None),
    ],
)
def test_a_recipe_is_taken_only_where_none_is_given(options, recipe):
    """Stages that are given whole are a recipe of their own."""
    assert _default_recipe(["--shards", "s", *options])[0] == recipe


def test_copies_and_balance_together_are_refused(shards, tmp_path, capsys):
    """Either the recipe says the copies, or the counts do."""
    assert train(shards, tmp_path / "run", "--init", "none", "--copies.d", 3) == 2
    assert "--balance classes: chooses the copies from the counts" in capsys.readouterr().err


def test_more_cpu_ranks_than_cores_are_advised_against():
    """As with a config for eight GPUs on a laptop, in bf16; a rank per core gets no line."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    cores = len(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        accelerator.local_process_index = 0
        patch.setenv("LOCAL_WORLD_SIZE", str(cores))
        assert [*_advice_on_cpu(accelerator)] == []
        patch.setenv("LOCAL_WORLD_SIZE", str(cores + 1))
        (line,) = _advice_on_cpu(accelerator)
        assert line.endswith(f"launch with --num_processes {cores}")
        accelerator.mixed_precision = "bf16"
        first, _ = _advice_on_cpu(accelerator)
        assert first.endswith("launch with --mixed_precision no")
