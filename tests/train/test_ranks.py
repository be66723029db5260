"""Behaviour of several gloo ranks, run for real."""

from pathlib import Path

import pytest
import torch
import yaml
from ranks import BLOCKS, SMALL
from safetensors.torch import load_file
from support import launch_ranks, make_shards, run_ranks

from cxrdist.files import read_log
from cxrdist.model.networks import block_of

SCRIPT = Path(__file__).parent / "ranks.py"


@pytest.fixture(scope="module")
def balanced(tmp_path_factory) -> Path:
    """Shards whose training split has 28 images, 108 with copies: twelve steps of nine.

    Two of three images have a mask.
    """
    counts, folder = {"a": 28, "b": 24}, tmp_path_factory.mktemp("balanced")
    return make_shards(folder, counts, split="0.5/0.25/0.25", masks=True)


TRAINED = ("trained/9", "trained/16", "trained/2")
BACKGROUND = ("lrp/9", "lrp/2", "lrp_turn/9", "gradient/2", "gradient/9")
JOBS = {
    1: (
        "moving",
        "averaged",
        "frozen/9",
        "frozen/2",
        *TRAINED,
        "bf16/9",
        *BACKGROUND,
        "frozen_lrp/9",
        "frozen_dropout/9",
        "frozen_dropout/2",
        "compiled_dropout/9",
    ),
    2: (
        *("stages", "moving", "averaged", "frozen/9", "frozen/9:2", *TRAINED),
        *("trained/9:1", "trained/9:3", "compiled/9", "bf16/9", "per_rank/9"),
        *("lrp/9", "gradient/9", "frozen_lrp/9:2", "frozen_dropout/9", "frozen_dropout/9:2"),
        "compiled_dropout/9",
    ),
    3: ("stages", "frozen/9", "frozen/2", "frozen_dropout/2", *TRAINED, *BACKGROUND),
    4: TRAINED,
    8: TRAINED,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, balanced) -> dict[int, list[dict]]:
    """What each rank reports of its jobs, by the number of ranks; each number is started once."""
    folder = tmp_path_factory.mktemp("outcomes")
    done = run_ranks(
        1, SCRIPT, balanced, folder, *(f"{world}={','.join(jobs)}" for world, jobs in JOBS.items())
    )
    assert done.returncode == 0, done.stderr
    return {
        world: [
            torch.load(folder / str(world) / f"rank{rank}.pt", weights_only=True)
            for rank in range(world)
        ]
        for world in JOBS
    }


@pytest.mark.parametrize("world", [2, 3])
def test_every_stage_keeps_ranks_equal_and_frozen_blocks_untouched(outcomes, world):
    """After an epoch of twelve steps the trained are equal on all ranks, the frozen as they were.

    Every trained tensor, gradient and BatchNorm statistic is equal on the first and the last rank,
    every trained tensor has moved, and every frozen tensor and statistic is bitwise what it was.
    """
    first, *_, last = (rank["stages"] for rank in outcomes[world])
    for stage, one in first.items():
        two, trained = last[stage], set(one["trained"])
        assert one["steps"] >= 10
        assert {block_of(k, SMALL) for k in one["gradients"]} == trained
        for key, gradient in one["gradients"].items():
            assert torch.equal(gradient, two["gradients"][key]), (stage, key)
            assert not torch.equal(one["after"][key], one["before"][key]), (stage, key)
        for key, before in one["before"].items():
            assert torch.equal(one["after"][key], two["after"][key]), (stage, key)
            if block_of(key, SMALL) not in trained:
                assert torch.equal(one["after"][key], before), (stage, key)
            elif "running_mean" in key:
                assert not torch.equal(one["after"][key], before), (stage, key)


def test_moving_batchnorm_of_frozen_blocks_is_that_of_one_rank(outcomes):
    """Its parameters are bitwise kept, its statistics move, equal on both ranks and as on one."""
    (alone,), (first, second) = outcomes[1], outcomes[2]
    for stage, one in first["moving"].items():
        for key, before in one["before"].items():
            after = one["after"][key]
            assert torch.equal(after, second["moving"][stage]["after"][key]), (stage, key)
            if "running" in key:
                assert not torch.equal(after, before), (stage, key)
                expected = alone["moving"][stage]["after"][key]
                assert torch.allclose(after, expected, rtol=1e-3, atol=1e-5), (stage, key)
            elif block_of(key, SMALL) not in one["trained"] and "tracked" not in key:
                assert torch.equal(after, before), (stage, key)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_published_is_the_average_of_the_steps(outcomes, world):
    """On each rank, by the formula, in float64; it is neither the first nor the last state."""
    for rank in outcomes[world]:
        for stage, one in rank["averaged"].items():
            for key, expected in one["average"].items():
                assert torch.allclose(one["best"][key].double(), expected, 1e-5, 1e-6), (stage, key)
                if block_of(key, SMALL) in one["trained"]:
                    for other in ("before", "after"):
                        assert not torch.equal(one["best"][key], one[other][key]), (stage, key)


def relative_difference(found: dict, expected: dict) -> float:
    """Length of the difference of two named sets of tensors over the length of the expected one."""
    difference = sum(float((found[k] - v).double().square().sum()) for k, v in expected.items())
    return (difference / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5


@pytest.mark.parametrize(
    ("world", "job"),
    [(2, "frozen/9"), (2, "frozen/9:2"), (3, "frozen/9"), (3, "frozen/2"), (2, "compiled/9")]
    + [(world, job) for world in (2, 3, 4, 8) for job in TRAINED]
    + [(2, "lrp/9"), (2, "gradient/9"), (2, "frozen_lrp/9:2"), *((3, job) for job in BACKGROUND)]
    + [(2, "frozen_dropout/9"), (2, "frozen_dropout/9:2"), (3, "frozen_dropout/2")]
    + [(2, "compiled_dropout/9")],
)
def test_the_gradient_is_that_of_the_whole_batch_for_any_world(outcomes, world, job):
    """Slices of unequal size, of one image and of none change neither gradient nor statistics.

    Nor do micro-batches where BatchNorm is frozen, nor does compiling, with a background loss,
    dropout, or neither. At 32 px the last features have one pixel: one image alone would have no
    variance.
    """
    mode, batch = job.split("/")
    # A compiler draws dropout in its own way.
    mode = "trained" if mode == "compiled" else mode
    alone = f"{mode}/{batch.partition(':')[0]}"
    (expected,) = (rank[alone] for rank in outcomes[1])
    parts = [rank[job] for rank in outcomes[world]]
    assert sum(part["images"] for part in parts) == expected["images"]
    loss = sum(part["loss"] for part in parts)  # and the mean penalty
    assert loss.tolist() == pytest.approx(expected["loss"].tolist())
    for part in parts:
        for what in ("gradients", "statistics"):
            assert relative_difference(part[what], expected[what]) < 1e-10, what


def test_dropout_has_a_part_in_the_gradient(outcomes):
    """As a control of the comparison above, which would pass without dropout."""
    (alone,) = outcomes[1]
    with_it, without = alone["frozen_dropout/9"], alone["frozen/9"]
    assert relative_difference(with_it["gradients"], without["gradients"]) > 0.1


def test_the_background_loss_has_a_part_in_the_gradient(outcomes):
    """As a control of the comparison above: the loss, and another gradient than without."""
    (alone,) = outcomes[1]
    for method in ("lrp", "lrp_turn", "gradient"):
        with_it, without = alone[f"{method}/9"], alone["trained/9"]
        assert float(with_it["loss"][1]) > 0 == float(without["loss"][1])
        added = with_it["loss"] - without["loss"]
        assert float(added[0]) == pytest.approx(30 * float(with_it["loss"][1]), rel=1e-4)
        assert relative_difference(with_it["gradients"], without["gradients"]) > 0.1


def test_synchronised_batchnorm_works_under_autocast(outcomes):
    """Statistics of bf16 features are float32, and the gradient is as exact as that of one rank.

    Of nine images bf16 leaves about a third of the gradient uncertain; with statistics of each
    slice alone it would be another one altogether.
    """
    (alone,), ranks = outcomes[1], outcomes[2]
    exact, one = alone["trained/9"], alone["bf16/9"]
    for rank in ranks:
        both = rank["bf16/9"]
        for what, limit in (("gradients", 0.5), ("statistics", 0.01)):
            assert relative_difference(one[what], exact[what]) < limit, what
            assert relative_difference(both[what], exact[what]) < limit, what
    statistics = ranks[0]["bf16/9"]["statistics"]
    assert statistics["features.norm5.running_var"].dtype == torch.float32
    assert relative_difference(statistics, ranks[1]["bf16/9"]["statistics"]) == 0


def test_micro_batches_with_trained_batchnorm_pass_as_often_on_each_rank(outcomes):
    """Nine images on two ranks in passes of one: five each, the last of one rank without image.

    BatchNorm sees a pass at a time, so the gradient is another one; all ranks end, and agree.
    """
    first, second = outcomes[2]
    for job in ("trained/9:1", "trained/9:3"):
        for what in ("gradients", "statistics"):
            assert relative_difference(first[job][what], second[job][what]) == 0
        whole = first["trained/9"]["gradients"]
        assert 0.01 < relative_difference(first[job]["gradients"], whole) < 10


def three_stages(shards: Path, folder: Path, world: int, **changes: object) -> Path:
    """Train three stages on some ranks, with dropout; the run directory.

    Two ranks are started by `accelerate launch`.
    """
    stages = {
        name: {"lr": dict.fromkeys(blocks, 0.01), "epochs": 1, "patience": 1}
        for name, blocks in (("head", ["head"]), ("all", BLOCKS), ("late", BLOCKS[4:]))
    }
    recipe = {
        **{"init": "none", "global_batch_size": 9, "stages": stages},
        **{"network": {"growth_rate": 4, "block_config": [2, 2, 2, 2], "dropout": 0.5}},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = folder / f"run{world}"
    start = launch_ranks if world == 2 else run_ranks
    done = start(
        *(world, "-m", "cxrdist", "train", "--config", folder / "recipe.yaml"),
        *("--shards", shards, "--run", run, "--cache", folder / "cache"),
    )
    assert done.returncode == 0, done.stderr
    (folder / f"said{world}").write_text(done.stdout)
    return run


def epoch_losses(run: Path) -> list[float]:
    rows = [row for row in read_log(run / "log.jsonl") if row["kind"] == "epoch"]
    return [row[name] for row in rows for name in ("loss", "val_loss") if name in row]


def test_three_stages_train_the_same_network_on_1_2_and_4_ranks(tmp_path, shards):
    """Losses of every epoch and the published weights differ by the order of sums only."""
    runs = [three_stages(shards, tmp_path, world) for world in (1, 2, 4)]
    expected = epoch_losses(runs[0])
    weights = [load_file(run / "model" / "model.safetensors") for run in runs]
    for run, found in zip(runs[1:], weights[1:], strict=True):
        assert epoch_losses(run) == pytest.approx(expected, rel=0, abs=1e-4)
        assert relative_difference(found, weights[0]) < 1e-3
    assert len({round(loss, 2) for loss in expected}) > 3  # they are not all the same
    said = (tmp_path / "said4").read_text()
    assert "9 images per step on 4 ranks" in said
    assert "suits 2 ranks" in said
    assert "suits" not in (tmp_path / "said1").read_text()


def test_batch_norm_per_rank_keeps_the_running_statistics_of_the_ranks_equal(outcomes):
    """The mean of the slices' means is that of all images; variances lack what is between slices.

    The gradient is another one than the whole batch's: that is what per_rank gives up.
    """
    (alone,), ranks = outcomes[1], outcomes[2]
    first, second = (rank["per_rank/9"]["statistics"] for rank in ranks)
    assert relative_difference(first, second) == 0
    whole = alone["trained/9"]["statistics"]
    means = "features.norm0.running_mean"
    assert torch.allclose(first[means], whole[means], rtol=1e-10, atol=1e-12)
    for rank in ranks:
        found = rank["per_rank/9"]["gradients"]
        assert 0.01 < relative_difference(found, alone["trained/9"]["gradients"]) < 10
