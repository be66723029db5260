"""Trained twice: ImageNet's weights -> several labels -> three classes, by the own recipes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from support import make_shards
from test_multilabel import write_bands
from torch import nn

from cxrdist.cli import main
from cxrdist.files import read_log, sha256_of
from cxrdist.model.densenet import load_model
from cxrdist.model.layout import ONE_CHANNEL
from cxrdist.model.weights import read_weights

SHAPE = ("--network.growth_rate", 4, "--network.block_config", "[2, 2, 2, 2]")
CLASSES = {"COVID-19": 12, "NORMAL": 12, "Viral Pneumonia": 12}


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def imagenet_layout(file: Path) -> dict[str, torch.Tensor]:
    """A file in the layout of torchvision's, small, of 1000 classes; its numbers are random."""
    torch.manual_seed(0)
    network = torchvision.models.DenseNet(4, (2, 2, 2, 2), 8, num_classes=1000)
    torch.save(network.state_dict(), file)
    return network.state_dict()


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Path:
    """The two recipes in turn, each stage one epoch."""
    folder = tmp_path_factory.mktemp("twice")
    imagenet_layout(folder / "imagenet.pth")
    pack = ("pack", "--source", "csv", "--input", write_bands(folder, 40), "--size", 32)
    run(*pack, "--out", folder / "shards-nih14", "--split", "0.5/0.2/0.3")
    make_shards(folder, CLASSES)
    common = (*SHAPE, "--cache", folder / "cache")
    stages = [(f"--stages.{name}_rate.epochs", 1) for name in ("first", "second", "third")]
    run(
        *("train", "--config", "chexnet", *common, *(x for stage in stages for x in stage)),
        *("--shards", folder / "shards-nih14", "--run", folder / "run-chexnet"),
        *("--init", folder / "imagenet.pth"),
    )
    names = ("head", "unfreeze", "no_decay", "all_equal")
    stages = [(f"--stages.{name}.epochs", 1) for name in names]
    run(
        *("train", "--config", "bassi2020", *common, *(x for stage in stages for x in stage)),
        *("--shards", folder / "shards", "--run", folder / "run-bassi"),
        *("--copies", "{COVID-19: 8, NORMAL: 2, Viral Pneumonia: 2}"),
        *("--init", folder / "run-chexnet"),
    )
    return folder


def test_bassi2020_starts_from_the_run_of_chexnet(twice):
    """Its trunk is that run's, tensor by tensor; its head is new."""
    before = load_file(twice / "run-chexnet" / "model" / "model.safetensors")
    weights = read_weights(str(twice / "run-chexnet"))
    assert all(torch.equal(v, before[k]) for k, v in weights.tensors.items())
    assert weights.tensors.keys() | weights.head.keys() == before.keys()
    assert weights.labels == ["Edema", "Hernia", "Mass"]


def test_the_chain_of_weights_is_recorded(twice):
    """run.json and model.json name each link: its hash, its labels, what it was trained on."""
    info = json.loads((twice / "run-bassi" / "run.json").read_text())
    link = info["weights"]
    assert link == json.loads((twice / "run-bassi" / "model" / "model.json").read_text())["weights"]
    assert link["sha256"] == sha256_of(twice / "run-chexnet" / "model" / "model.safetensors")
    assert link["labels"] == ["Edema", "Hernia", "Mass"]
    chexnet = json.loads((twice / "run-chexnet" / "run.json").read_text())
    assert link["trained_on"]["index_sha256"] == chexnet["shards"]["index_sha256"]
    first = link["started_from"]
    assert first == chexnet["weights"]
    assert first["source"] == str(twice / "imagenet.pth")
    assert first["sha256"] == sha256_of(twice / "imagenet.pth")
    assert first["layout"] == "ImageNet, as in torchvision and timm"
    assert "started_from" not in first


@pytest.fixture(scope="module")
def page(twice) -> str:
    """The report of the second run, after an evaluation of its first and its last stage."""
    bassi = twice / "run-bassi"
    for place in (bassi / "stages" / "head", bassi):
        run(
            *("evaluate", "--run", place, "--shards", twice / "shards"),
            *("--cache", twice / "cache"),
        )
    run("report", "--run", bassi)
    return (bassi / "report.html").read_text()


def test_the_report_shows_the_chain(twice, page):
    """From the ImageNet file to this run, in this order, with the hashes."""
    chain = page[page.index('<ol class="chain">') :].split("</ol>")[0]
    places = [
        chain.index(text)
        for text in (
            *("imagenet.pth", sha256_of(twice / "imagenet.pth"), "run-chexnet"),
            sha256_of(twice / "run-chexnet" / "model" / "model.safetensors"),
            *("Edema, Hernia, Mass", "this run: took"),
        )
    ]
    assert places == sorted(places)


def test_the_report_shows_the_score_of_each_stage_that_was_evaluated(twice, page):
    """As the paper gives test accuracy after each stage; the last stage is the run itself."""
    bassi = twice / "run-bassi"
    table = page.split("The best weights of each stage")[2]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("<tr>")[2:6]]
    scores = [
        f"{json.loads((place / 'test' / 'metrics.json').read_text())['accuracy']:.3f}"
        for place in (bassi / "stages" / "head", bassi)
    ]
    assert [row[0] for row in rows] == ["head", "unfreeze", "no_decay", "all_equal"]
    assert [row[6] for row in rows] == [scores[0], "\N{EM DASH}", "\N{EM DASH}", scores[1]]
    assert len(list((bassi / "stages").iterdir())) == 3
    log = [row for row in read_log(bassi / "log.jsonl") if row["kind"] == "epoch"]
    reached = [f"{row['val_accuracy']:.3f}" for row in log if row["stage"] == "head"]
    assert rows[0][4] == reached[int(rows[0][2])]


def test_convert_keeps_the_chain_of_a_run(twice, tmp_path, capsys):
    """A run as one file of safetensors still says where it is from."""
    run("weights", "convert", twice / "run-chexnet", tmp_path / "chexnet.safetensors")
    run("weights", "show", tmp_path / "chexnet.safetensors")
    said = capsys.readouterr().out
    assert said.index("run-chexnet") < said.index(sha256_of(twice / "imagenet.pth"))
    assert "Edema, Hernia, Mass" in said


def test_a_run_does_not_go_on_from_other_weights(shards, tmp_path, capsys):
    """The same name with other bytes is refused when a run is taken up again."""
    imagenet_layout(tmp_path / "w.pth")
    stage = "{one: {lr: {head: 0.1}, epochs: 1, patience: 1}}"
    train = (
        *("train", "--shards", shards, "--run", tmp_path / "run", "--init", tmp_path / "w.pth"),
        *("--stages", stage, "--cache", tmp_path / "cache", *SHAPE),
    )
    run(*train)
    (tmp_path / "run" / "model" / "model.json").unlink()
    torch.save({k: v + 1 for k, v in torch.load(tmp_path / "w.pth").items()}, tmp_path / "w.pth")
    assert "but the run began with" in refused(capsys, *train)


@pytest.mark.parametrize("init", ["empty", "other shape"])
def test_runs_that_are_no_start_are_refused(twice, shards, tmp_path, capsys, init):
    """A directory without a model, and a run of a network of another shape; nothing is begun."""
    (tmp_path / "empty").mkdir()
    start = tmp_path / "empty" if init == "empty" else twice / "run-chexnet"
    said = refused(
        capsys,
        *("train", "--shards", shards, "--run", tmp_path / "run", "--init", start),
        *("--stages", "{one: {lr: {head: 0.1}, epochs: 1, patience: 1}}"),
        *("--cache", tmp_path / "cache", "--network.growth_rate", 8),
    )
    assert f"--init {start}: " in said
    assert ("without a trained model" if init == "empty" else "the file lacks") in said
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_one_channel_goes_the_whole_way(shards, tmp_path):
    """A network of torchxrayvision trains, evaluates, explains and reports on its own scale."""
    models = pytest.importorskip("torchxrayvision.models")
    torch.manual_seed(0)
    network = models.DenseNet(growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1, 2)
    torch.save(network, tmp_path / "nih.pt")
    where = ("--shards", shards, "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    stage = "{one: {lr: {denseblock4: 0.01, head: 0.01}, epochs: 1, patience: 1}}"
    run("train", *where, "--init", tmp_path / "nih.pt", "--stages", stage, *SHAPE)
    run("evaluate", *where)
    run("explain", *where, "--limit", 3)
    run("report", "--run", tmp_path / "run")
    model = load_model(tmp_path / "run")
    assert model.normalisation == ONE_CHANNEL
    assert model.network.features.conv0.in_channels == 1
    frozen = load_model(tmp_path / "run").network.features.denseblock1.state_dict()
    assert all(
        torch.equal(v, network.features.denseblock1.state_dict()[k]) for k, v in frozen.items()
    )
    maps = sorted((tmp_path / "run" / "test" / "relevance").glob("*.npz"))
    assert len(maps) == 3
    for file in maps:
        with np.load(file) as data:
            assert data["relevance"].shape == (3, 32, 32)
            assert np.abs(data["relevance"]).max() > 0
