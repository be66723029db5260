"""The optimiser step, with what only a GPU uses forced on the CPU."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cxrdist.config import Stage
from cxrdist.train.stages import MOMENTUM, build_optimizer, rate_factor
from cxrdist.train.update import Average, Updater

RATE, DECAY = 0.1, 0.01


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def updater(module: nn.Module, name: str = "sgd", **changes: object) -> Updater:
    group = {"name": "head", "params": list(module.parameters()), "lr": RATE, "weight_decay": DECAY}
    settings = {"scaler": None, "max_norm": None, "average": None, **changes}
    return Updater(build_optimizer(name, [group]), **settings)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def inputs(step: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def test_sgd_is_the_papers():
    """Momentum 0.9 (section 3.3) and L2 decay: v = 0.9 v + g + decay w; w -= rate v."""
    module = linear()
    ours = updater(module)
    by_hand = module.weight.detach().double().clone()
    velocity = torch.zeros_like(by_hand)
    for step in range(3):
        x = inputs(step)
        ours.backward(module(x).sum())
        gradient = x.double().sum(0).expand(2, 3)
        velocity = 0.9 * velocity + gradient + DECAY * by_hand
        by_hand = by_hand - RATE * velocity
        norm = ours.step()
        expected = (gradient.square().sum() + 2 * 4**2).sqrt()  # the bias has 4 for each output
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert MOMENTUM == 0.9
    assert torch.allclose(module.weight.double(), by_hand, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(name, bad, at):
    """Neither weights nor the optimiser's state, also where it is the first; the next ones count.

    The other run never meets it.
    """
    modules = [linear(), linear()]
    updaters = [updater(module, name) for module in modules]
    for step in range(5):
        if step == at:
            before = weights(modules[0])
            updaters[0].backward(modules[0](inputs(step)).sum() * bad)
            assert not torch.isfinite(updaters[0].step())
            assert all(map(torch.equal, weights(modules[0]), before))
        for module, one in zip(modules, updaters, strict=True):
            one.backward(module(inputs(step)).square().sum())
            one.step()
    assert all(map(torch.equal, *map(weights, modules)))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_scaler_whose_first_steps_overflow_leaves_the_weights_of_float32(name):
    """It halves its scale until gradients fit; what it skips is as if it had not been there."""
    modules = [linear(), linear()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaled, plain = updater(modules[0], name, scaler=scaler), updater(modules[1], name)
    num_skipped = 0
    for step in range(20):
        x = inputs(step)
        scaled.backward(4 * modules[0](x).square().mean())
        overflowed = not torch.isfinite(scaled.step())
        num_skipped += overflowed
        if not overflowed:
            plain.backward(4 * modules[1](x).square().mean())
            plain.step()
    assert 1 <= num_skipped <= 5
    assert scaled.scale == 2.0 ** (127 - num_skipped)
    for found, expected in zip(*map(weights, modules), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_long_gradients_are_shortened_and_short_ones_are_not():
    """To a norm over all parameters; the norm that is returned is that before."""
    module = linear()
    before = weights(module)
    ours = updater(module, max_norm=0.5)
    ours.optimizer.param_groups[0]["weight_decay"] = 0.0
    x = inputs(0)
    ours.backward(module(x).sum())
    norm = float(ours.step())
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, weights(module), strict=True)])
    assert norm > 0.5
    assert float(moved.norm()) == pytest.approx(RATE * 0.5, rel=1e-4)
    short = linear()
    ours = updater(short, max_norm=2 * norm)
    ours.optimizer.param_groups[0]["weight_decay"] = 0.0
    ours.backward(short(x).sum())
    ours.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, weights(short), strict=True)])
    assert float(moved.norm()) == pytest.approx(RATE * norm, rel=1e-4)


def test_the_average_is_the_exponential_one_and_can_stand_in():
    """After each step a = d a + (1 - d) w; in the network for a while, then the weights again."""
    module = linear()
    average = Average(module, 0.75)
    ours = updater(module, average=average)
    by_hand = module.weight.detach().clone()
    for step in range(3):
        ours.backward(module(inputs(step)).sum())
        ours.step()
        ours.move_average()
        by_hand = 0.75 * by_hand + 0.25 * module.weight.detach()
    trained = weights(module)
    with average.in_network():
        assert torch.allclose(module.weight, by_hand, atol=1e-6)
    assert all(map(torch.equal, weights(module), trained))
    again = Average(linear(), 0.75)
    again.load(average.state)
    assert torch.equal(again.state["weight"], average.state["weight"])


def test_the_average_of_few_steps_forgets_what_it_began_with():
    """Weights 1 from 0 on: with 0.99 alone, 20 steps leave 0.82 of the beginning, here 1e-7.

    The average keeps min(0.99, (1 + t) / (10 + t)) in step t, so the product of these is left.
    """
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    average = Average(module, 0.99)
    ours = updater(module, average=average)
    nn.init.ones_(module.weight)
    for step in range(1000):
        ours.set_rates(0.0, step)
        average.update()
        if step in (0, 19):
            left = math.prod([(1 + t) / (10 + t) for t in range(step + 1)])
            assert 1 - average.state["weight"].item() == pytest.approx(left, abs=1e-6)
    nn.init.zeros_(module.weight)
    average.update()
    assert average.state["weight"].item() == pytest.approx(0.99, abs=1e-4)


def test_the_schedule_warms_up_and_falls_along_a_cosine():
    """Two of ten epochs of warm-up, then half a cosine: 1 at its start, 1/2 in its middle."""
    stage = Stage({"head": 1.0}, epochs=10, patience=1, schedule="cosine", warmup_epochs=2)
    factors = [rate_factor(stage, epoch, step, 4) for epoch in range(10) for step in range(4)]
    assert factors[:8] == pytest.approx([i / 8 for i in range(1, 9)])
    assert factors[8] == 1.0
    assert factors[8 + 16] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(factors[8:]))
    assert 0 < factors[-1] < 0.01
    constant = Stage({"head": 1.0}, epochs=10, patience=1)
    assert {rate_factor(constant, epoch, 0, 4) for epoch in range(10)} == {1.0}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_torch_lets_a_prepared_optimiser_be_recorded(name, monkeypatch):
    """Its check is told that a GPU's stream records; the step is that of a plain one."""
    prepared, plain = linear(), linear()
    ours, theirs = updater(prepared, name), updater(plain, name)
    ours.prepare_capture(torch.device("cpu"))
    gpu, stream = torch.device("cuda"), SimpleNamespace(is_capturing=lambda: True)
    for step in range(2):
        for module, one in ((prepared, ours), (plain, theirs)):
            one.backward(module(inputs(step)).sum())
        theirs.step()
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda **_: gpu)
            patch.setattr(torch.accelerator, "current_stream", lambda: stream)
            ours.step()
    for found, expected in zip(weights(prepared), weights(plain), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6)
