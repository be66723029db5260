"""Behaviour of several gloo ranks, run for real."""

from pathlib import Path

import pytest
import torch
from support import make_shards, run_ranks

from cxrdist.model.densenet import block_of

SCRIPT = Path(__file__).parent / "ranks.py"


@pytest.fixture(scope="module")
def balanced(tmp_path_factory) -> Path:
    """Shards whose training split has 28 images, 108 with copies: twelve steps of nine."""
    counts = {"a": 28, "b": 24}
    return make_shards(tmp_path_factory.mktemp("balanced"), counts, split="0.5/0.25/0.25")


def outcome(tmp_path: Path, world: int, job: str, shards: Path, *batches: str) -> list[dict]:
    """What each rank reports of a job."""
    out = tmp_path / f"out{world}"
    done = run_ranks(world, SCRIPT, job, shards, tmp_path / f"run{world}", out, *batches)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"rank{r}.pt", weights_only=True) for r in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_every_stage_keeps_ranks_equal_and_frozen_blocks_untouched(tmp_path, balanced, world):
    """After an epoch of twelve steps the trained are equal on all ranks, the frozen as they were.

    Every trained tensor, gradient and BatchNorm statistic is equal on the first and the last rank,
    every trained tensor has moved, and every frozen tensor and statistic is bitwise what it was.
    """
    first, *_, last = outcome(tmp_path, world, "stages", balanced)
    for stage, one in first.items():
        two, trained = last[stage], set(one["trained"])
        assert one["steps"] >= 10
        assert {block_of(k) for k in one["gradients"]} == trained
        for key, gradient in one["gradients"].items():
            assert torch.equal(gradient, two["gradients"][key]), (stage, key)
            assert not torch.equal(one["after"][key], one["before"][key]), (stage, key)
        for key, before in one["before"].items():
            assert torch.equal(one["after"][key], two["after"][key]), (stage, key)
            if block_of(key) not in trained:
                assert torch.equal(one["after"][key], before), (stage, key)
            elif "running_mean" in key:
                assert not torch.equal(one["after"][key], before), (stage, key)


def test_the_gradient_is_that_of_the_whole_batch_for_any_world(tmp_path, balanced):
    """Nine images over one, two and three ranks, in micro-batches or not, have one gradient.

    So has a step of two images on three ranks: the idle rank adds nothing and does not hang.
    """
    (alone,) = outcome(tmp_path, 1, "gradient", balanced, "9", "2")
    assert (alone["9"]["images"], alone["2"]["images"]) == (9, 2)
    for world, batches in ((2, ("9", "9:2")), (3, ("9", "2"))):
        ranks = outcome(tmp_path, world, "gradient", balanced, *batches)
        for batch in batches:
            expected = alone[batch.partition(":")[0]]
            parts = [rank[batch] for rank in ranks]
            assert sum(part["images"] for part in parts) == expected["images"]
            assert float(sum(p["loss"] for p in parts)) == pytest.approx(float(expected["loss"]))
            for key, gradient in expected["gradients"].items():
                for part in parts:
                    difference = float((part["gradients"][key] - gradient).abs().max())
                    assert difference <= 1e-6 * max(1.0, float(gradient.abs().max())), (world, key)
