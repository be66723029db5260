"""The background loss: its penalties, what they do to a training, and what is refused."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import make_shards
from torch._subclasses.fake_tensor import FakeTensorMode

from cxrdist.config import (
    Augmentation,
    Background,
    Network,
    ReportConfig,
    Stage,
    TrainConfig,
)
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.foreground import foreground_of
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError
from cxrdist.explain import gradient
from cxrdist.explain.background import evaluating, share_of_contrast, squared_gradient
from cxrdist.explain.relevance import Explainer
from cxrdist.files import read_log
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_of
from cxrdist.report.html import report
from cxrdist.run import RunDirectory
from cxrdist.train import learner, loop, stage
from cxrdist.train.background import BackgroundLoss
from cxrdist.train.learner import Learner
from cxrdist.train.loop import train
from cxrdist.train.stages import freeze, set_modes
from cxrdist.train.training import fixed_recipe, recipe_yaml

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]
SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2), dropout=0.5)
SIZE_PX = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards of which two of three images have a mask."""
    return make_shards(tmp_path_factory.mktemp("masked"), {"a": 12, "b": 12}, masks=True)


def network(dtype: torch.dtype = torch.float64, of: Network = SMALL) -> Classifier:
    """A network in training mode, gammas of both signs, statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = Classifier(of, ["a", "b", "c"], SIZE_PX)
    for norm in model.norms:
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight)
    return model.to(dtype).train()


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images, and labels of which one is not known."""
    images = torch.rand(4, 1, SIZE_PX, SIZE_PX, dtype=dtype) * 255
    targets = torch.eye(3, dtype=dtype)[torch.tensor([0, 1, 2, 0])]
    targets[3, 2] = -1
    return images, targets


def left_half(count: int) -> torch.Tensor:
    background = torch.zeros(count, 1, SIZE_PX, SIZE_PX, dtype=torch.bool)
    background[..., : SIZE_PX // 2] = True
    return background


def test_the_shares_are_those_of_the_engines_maps_and_of_the_gradient():
    """Of the contrast, a class less the mean of those that the image is known not to have.

    The first turn pays the share of the maps, the second that of the gradient, here by autograd;
    without turns it is the mean of both.
    """
    model, (images, targets) = network(), batch()
    images = images.round()
    with torch.no_grad():
        inputs = (model, images, targets, left_half(4))
        first, second, mean = (share_of_contrast(*inputs, turn) for turn in (0, 1, None))
    maps = Explainer(model.eval()).attribute(images.to(torch.uint8), [0, 1, 2]).relevance
    weights = torch.tensor([[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1], [1, -1, 0]])
    amounts = (maps * weights.to(maps)[..., None, None]).sum(1).abs()
    shown = images.clone().requires_grad_()
    (model.logits(shown) * weights).sum().backward()
    of_maps, of_gradient = (
        of[..., : SIZE_PX // 2].sum((1, 2)) / of.sum((1, 2))
        for of in (amounts, shown.grad[:, 0].abs())
    )
    assert torch.allclose(first, of_maps, rtol=1e-9)
    assert torch.allclose(second, of_gradient, rtol=1e-9)
    assert torch.allclose(mean, (of_maps + of_gradient) / 2, rtol=1e-9)
    assert 0 < float(mean.min()) < float(mean.max()) < 1


def test_the_squared_gradient_is_that_of_differences():
    """Of the sum of all labels' log-probabilities of both outcomes, one pixel after the other."""
    model, (images, targets) = network(), batch()
    background = torch.zeros(4, 1, SIZE_PX, SIZE_PX, dtype=torch.bool)
    pixels = [(3, 4), (20, 11), (31, 0)]
    for y, x in pixels:
        background[..., y, x] = True
    found = squared_gradient(model, images, targets, background)
    step, expected = 1e-4, torch.zeros(4, dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for y, x in pixels:
            moved = []
            for sign in (1, -1):
                other = images.clone()
                other[..., y, x] += sign * step * 255
                p = torch.sigmoid(model.logits(other))
                moved.append((p.log() + (1 - p).log()).sum(1))
            expected += ((moved[0] - moved[1]) / (2 * step)).square()
    assert torch.allclose(found, expected, rtol=1e-5)
    assert found.requires_grad


@pytest.mark.parametrize("penalty", [partial(share_of_contrast, turn=None), squared_gradient])
def test_a_penalty_leaves_modes_and_statistics_alone(penalty):
    """It is computed in evaluation mode, also by a network in training; twice it is the same."""
    model, (images, targets) = network(), batch()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    found = [penalty(model, images, targets, left_half(4)) for _ in range(2)]
    assert torch.equal(*found)
    assert all(module.training for module in model.modules())
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def loss_of(
    method: str, masks: np.ndarray | None = None, region: tuple[str, ...] = ("masks",)
) -> BackgroundLoss:
    foreground = foreground_of(region, SIZE_PX, masks, {})
    return BackgroundLoss(Background(2.0, ",".join(region), method), foreground, {})


def test_an_image_without_background_has_no_penalty_wherever_it_is_moved():
    """What a shift brings in from outside counts as background for the others only."""
    model, (_, targets) = network(torch.float32), batch(torch.float32)
    mask = np.zeros((SIZE_PX, SIZE_PX), bool)
    mask[:, 8:] = True
    loss = loss_of("lrp", np.stack([np.packbits(mask), np.packbits(mask & False)]))
    foreground = torch.from_numpy(loss.foreground[np.array([0, 1, 0, 1])])[:, None]
    images = torch.randint(0, 256, (4, 1, SIZE_PX, SIZE_PX), dtype=torch.uint8)
    matrices = torch.eye(2, 3).repeat(4, 1, 1)
    matrices[2:, 0, 2] = 2 * 16 / (SIZE_PX - 1)  # what is on the right comes 16 px to the left
    inputs = (model, images, matrices, targets.float(), foreground)
    with torch.no_grad():
        found = loss.penalties(*inputs, turn=None)
    assert found[1] == found[3] == 0
    background = torch.zeros(4, 1, SIZE_PX, SIZE_PX, dtype=torch.bool)
    background[0, ..., :8] = True
    background[2, ..., 16:] = True  # it came in from outside; the left 8 columns have gone
    warped = images.float()
    warped[2:] = 0
    warped[2:, ..., :16] = images[2:, ..., 16:].float()
    with torch.no_grad():
        expected = share_of_contrast(model, warped, targets.float(), background, None)
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], atol=1e-4)
    assert found[0] > 0 < found[2]


@pytest.mark.parametrize(("method", "turn"), [("lrp", 0), ("lrp", 1), ("gradient", 0)])
@pytest.mark.parametrize("trained", [BLOCKS, ["head"]])
def test_a_step_with_a_penalty_reads_nothing_and_trains_what_is_not_frozen(
    monkeypatch, method, turn, trained
):
    """It runs on fake tensors, where every read would raise, under autocast as well.

    The map as on a GPU: on a CPU, where a read costs nothing, it asks for the signs of the gammas.
    """
    fold = gradient.fold
    monkeypatch.setattr(gradient, "fold", lambda *given, **_: fold(*given, check_signs=False))
    model = network(torch.float32, replace(SMALL, block_config=(1, 1, 1, 2)))
    freeze(model, set(trained))
    set_modes(model, set(trained))
    loss = loss_of(method, None, ("thorax",))
    ours = Learner(model, set(trained), torch.bfloat16, loss, compiled=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(4, 1, SIZE_PX, SIZE_PX, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16):
            inputs = (torch.empty(4, 2, 3), torch.empty(4, 3), torch.empty_like(images), turn)
            sums = ours(images, *inputs)
        assert sums.dtype == torch.float32
        sums[1].backward()
    reached = {
        block_of(name, SMALL)
        for name, parameter in model.network.named_parameters()
        if parameter.grad is not None
    }
    assert reached == set(trained)


def recipe(shards: Path, run: Path, **changes: object) -> TrainConfig:
    """Two stages with a background loss of either method, with dropout and micro-batches."""
    settings = {
        "init": "none",
        "global_batch_size": 5,
        "max_images_per_rank": 3,
        "augmentation": Augmentation(degrees=5),
        "network": Network(growth_rate=4, block_config=(1, 1, 1, 1)),
        "save_steps": 1,
        "average": 0.9,
        "cache": run.parent / "cache",
        **changes,
    }
    stages = {
        "all": Stage(
            dict.fromkeys(BLOCKS, 0.02), 2, 2, background=Background(0.5, "masks,border", "lrp")
        ),
        "head": Stage({"head": 0.02}, 1, 1, background=Background(3.0, "masks", "gradient")),
    }
    return TrainConfig(shards, run, settings.pop("stages", stages), **settings)


class Killed(BaseException):
    """Stands for the end of the process."""


def rows_of(run: Path) -> list[dict]:
    return [row for row in read_log(run / "log.jsonl") if row["kind"] != "speed"]


def test_a_killed_training_with_a_background_loss_ends_in_the_same_bytes(
    shards, tmp_path, monkeypatch
):
    """Killed after each save, within epochs and between stages; the log is the same, too.

    The shares take turns from step to step, also over the end of an epoch of three steps.
    """
    monkeypatch.setattr(loop, "STEPS_PER_LOG_ROW", 2)
    turns, penalties = [], BackgroundLoss.penalties

    def keep_turn(*given):
        turns.append(given[-1])
        return penalties(*given)

    with monkeypatch.context() as patched:
        patched.setattr(BackgroundLoss, "penalties", keep_turn)
        train(recipe(shards, tmp_path / "whole"))
    of_steps = [turn for turn in turns if turn is not None][::2]  # a step has two micro-batches
    assert of_steps == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    save, config = stage.save_checkpoint, recipe(shards, tmp_path / "broken")

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    monkeypatch.setattr(stage, "save_checkpoint", save_and_die)
    num_kills = 0
    while not (config.run / "model" / "model.json").is_file() and num_kills < 20:
        try:
            train(config)
        except Killed:
            num_kills += 1
    assert num_kills == 9  # three epochs of three steps
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    model = "model/model.safetensors"
    assert (whole / model).read_bytes() == (broken / model).read_bytes()
    assert rows_of(whole) == rows_of(broken)
    steps = [row for row in rows_of(whole) if row["kind"] == "step"]
    assert len({row["background"] for row in steps}) == len(steps) > 2


def test_selection_and_log_see_the_penalty(shards, tmp_path, monkeypatch):
    """The validation loss is the cross-entropy and the weight times the mean penalty.

    Against a validation of the same networks by what they are made of.
    """
    found, validate = [], stage.validate

    def compare(accelerator, model, batches, at_boundary, background):
        plain = validate(accelerator, model, batches, at_boundary, None)
        scores = validate(accelerator, model, batches, at_boundary, background)
        found.append((plain["val_loss"], background.recipe.weight))
        return scores

    monkeypatch.setattr(stage, "validate", compare)
    train(recipe(shards, tmp_path / "run"))
    rows = [row for row in rows_of(tmp_path / "run") if row["kind"] == "epoch"]
    assert len(rows) == len(found) == 5
    for row, (plain, weight) in zip(rows, found, strict=True):
        assert row["val_background"] > 0
        assert row["val_loss"] == pytest.approx(plain + weight * row["val_background"], rel=1e-12)
        assert ("background" in row) == bool(row["epoch"])
    info = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert info["all"]["best_val_loss"] == min(r["val_loss"] for r in rows if r["stage"] == "all")
    train_split = [s for s in read_index(shards).samples if s.split == "train"]
    masked = sum(bool(s.mask_sha256) for s in train_split)
    assert 0 < masked < len(train_split)
    assert info["head"]["background"] == {
        **{"weight": 3.0, "region": "masks", "method": "gradient"},
        **{"images": masked, "without": len(train_split) - masked},
    }
    page = report(ReportConfig(tmp_path / "run")).read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<[^>]+>", " ", page).replace("\xa0", " ").split())
    assert (
        f"squared input gradient) in the region masks, on {masked} of {len(train_split)}" in words
    )
    assert page.count("Validation penalty") == 2
    assert info["all"]["background"]["images"] == len(train_split)


def test_frozen_blocks_stay_as_they_are_and_the_penalty_moves_the_head(shards, tmp_path):
    """Of a stage of the head alone too; with another weight the head is another one."""
    weights = {}
    for weight in (0.5, 50.0):
        only = Stage({"head": 0.02}, 1, 1, background=Background(weight, "border", "lrp"))
        run = tmp_path / f"run{weight}"
        train(recipe(shards, run, stages={"head": only}, average=None))
        (last,) = run.glob("checkpoints/00001-*/state.safetensors")
        weights[weight] = load_file(last)
    one, other = weights.values()
    for name, value in one.items():
        if name.startswith("network."):
            is_head = name.startswith("network.classifier")
            assert torch.equal(value, other[name]) != is_head, name


def test_the_penalty_is_computed_beside_the_compiled_graph(monkeypatch):
    """With the sums and the gradients of the plain step."""
    monkeypatch.setattr(learner, "COMPILE_BACKEND", "eager")
    images = torch.randint(0, 256, (4, 1, SIZE_PX, SIZE_PX), dtype=torch.uint8)
    targets, matrices = batch(torch.float32)[1], torch.eye(2, 3).repeat(4, 1, 1)
    loss, found = loss_of("gradient", None, ("border",)), []
    foreground = torch.from_numpy(loss.foreground[np.arange(4)])[:, None]
    for compiled in (False, True):
        model = network(torch.float32)
        set_modes(model, {"head"})
        model.network.head_drop.eval()
        ours = Learner(model, {"head"}, torch.float32, loss, compiled=compiled)
        sums = ours(images, matrices, targets, foreground)
        sums.sum().backward()
        found.append(torch.cat([sums.detach(), model.network.classifier.weight.grad.flatten()]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


def with_background(config: TrainConfig, **changes: object) -> TrainConfig:
    """The recipe with one stage, with another background loss."""
    only = replace(config.stages["head"], background=Background(**{"weight": 1.0, **changes}))
    return replace(config, stages={"head": only})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region": "lungs"}, r"stages.head.background.region: is 'lungs', expected some of masks"),
        ({"region": "border,text"}, r"--text-boxes: is missing, and a stage has .* region text"),
    ],
)
def test_a_background_that_cannot_be_meant_is_refused(shards, tmp_path, changes, said):
    """In one line, before anything is written."""
    with pytest.raises(CxrdistError, match=said):
        train(with_background(recipe(shards, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_the_squared_gradient_is_of_any_network():
    """Each weight of a SqueezeNet gets a gradient through it."""
    model = Classifier(Network(architecture="squeezenet1_1"), ["a", "b", "c"], SIZE_PX)
    squared_gradient(model, *batch(torch.float32), left_half(4)).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.ndim > 1)


def test_masks_and_text_that_the_shards_cannot_give_are_refused(shards, tmp_path):
    """No image of train with a mask; text that is covered; boxes that no stage uses, or of none."""
    paths = {sample.path: sample for sample in read_index(shards).samples}
    write_boxes(tmp_path / "boxes.csv", {path: [Box(2, 2, 9, 5)] for path in paths})
    other = {path: [Box(2, 2, 9, 5)] for path, s in paths.items() if s.split == "test"}
    write_boxes(tmp_path / "other.csv", other)
    bare = make_shards(tmp_path / "bare", {"a": 8, "b": 8}, text_boxes=tmp_path / "boxes.csv")
    config = recipe(bare, tmp_path / "run")
    text = with_background(config, region="text")
    for wrong, said in (
        (with_background(config, region="masks"), "no image of train has a mask"),
        (replace(text, text_boxes=tmp_path / "boxes.csv"), "text is covered already"),
        (replace(config, text_boxes=tmp_path / "boxes.csv"), "--text-boxes: no stage"),
        (
            replace(text, shards=shards, text_boxes=tmp_path / "other.csv"),
            r"--text-boxes .*other\.csv: no image of train has text",
        ),
        (replace(text, shards=shards, text_boxes=tmp_path / "none.csv"), r"none\.csv"),
    ):
        with pytest.raises(CxrdistError, match=said):
            train(wrong)
    assert not RunDirectory(tmp_path / "run").recipe.exists()


def test_a_run_goes_on_with_the_boxes_that_it_began_with_only(shards, tmp_path, monkeypatch):
    """Their place may change, their content not."""
    paths = [sample.path for sample in read_index(shards).samples]
    config = with_background(recipe(shards, tmp_path / "run"), region="text")
    config = replace(config, text_boxes=tmp_path / "boxes.csv")
    write_boxes(config.text_boxes, {path: [Box(2, 2, 9, 5)] for path in paths[:8]})
    save = stage.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(stage, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(config)
    moved = tmp_path / "moved.csv"
    moved.write_bytes(config.text_boxes.read_bytes())
    write_boxes(config.text_boxes, {path: [Box(2, 2, 9, 6)] for path in paths[:8]})
    with pytest.raises(CxrdistError, match=r"--text-boxes .*boxes\.csv: has the sha256 .* began"):
        train(config)
    train(replace(config, text_boxes=moved))
    assert (RunDirectory(config.run).model / "model.json").is_file()


def test_recipes_without_a_background_are_those_of_older_versions(shards, tmp_path):
    """Neither the recipe of a run nor what its checkpoints are compared by has the new fields."""
    config = recipe(shards, tmp_path / "run", stages={"head": Stage({"head": 0.1}, 1, 1)})
    for text in (recipe_yaml(config), fixed_recipe(config)):
        assert set(yaml.safe_load(text)["stages"]["head"]) == {
            *("lr", "epochs", "patience", "weight_decay", "schedule", "warmup_epochs")
        }
        assert "text_boxes" not in text
        assert set(yaml.safe_load(text)["augmentation"]) == {
            "degrees",
            "shift_x",
            "shift_y",
            "flip",
        }
    assert "frozen_batch_norm" not in fixed_recipe(config)
    other = with_background(replace(config, stages=recipe(shards, tmp_path).stages), weight=2.0)
    assert yaml.safe_load(fixed_recipe(other))["stages"]["head"]["background"] == {
        **{"weight": 2.0, "region": "thorax", "method": "lrp"}
    }
