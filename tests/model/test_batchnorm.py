"""BatchNorm over the images of all ranks, against PyTorch's on one process that has them all."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn

from cxrdist.model.batchnorm import BatchNorm


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A group of ranks with this process as its only one."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def both(momentum: float, shares: list[float]) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and PyTorch's, in float64 and with the same weights and statistics, none of them 0."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for value in (theirs.weight.data, theirs.bias.data, theirs.running_mean, theirs.running_var):
        value.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.double().train(), theirs.double().train()
    ours.shares = torch.tensor(shares, dtype=torch.float64)
    return ours, theirs


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 4, 4), (5, 3, 3, 2)])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_a_pass_of_one_rank_is_pytorchs(shape, momentum):
    """Output, all gradients and running statistics, also of two values, the fewest with one."""
    ours, theirs = both(momentum, [1.0, shape[0], 1.0])
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    towards, found = torch.randn(shape, dtype=torch.float64), []
    for norm, act in ((ours, nn.Identity()), (theirs, nn.ReLU())):
        inputs = x.clone().requires_grad_()
        outputs = act(norm(inputs))
        (outputs * towards).sum().backward()
        statistics = norm.running_mean, norm.running_var
        found.append([outputs, inputs.grad, norm.weight.grad, norm.bias.grad, *statistics])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_the_statistics_of_a_single_value_are_finite():
    """It has no variance, and PyTorch refuses it; a step of one small image may have one."""
    ours, _ = both(0.5, [1.0, 1.0, 1.0])
    before = ours.running_var.clone()
    x = torch.tensor([4.0, 5, 6], dtype=torch.float64).reshape(1, 3, 1, 1)
    mean = ours.running_mean.lerp(x.flatten(), 0.5)
    torch.testing.assert_close(ours(x).flatten(), ours.bias)
    torch.testing.assert_close(ours.running_mean, mean)
    torch.testing.assert_close(ours.running_var, before / 2)
