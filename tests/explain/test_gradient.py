"""The differentiable map, held against the engine and against finite differences."""

import pytest
import torch
from test_canonise import SMALL, images, randomised, relative_error

from cxrdist.explain import engine, fold, gradient
from cxrdist.explain.attribution import STABILISER
from cxrdist.explain.gradient import relevance
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier, Network
from cxrdist.model.networks import block_names, block_of


def starts(dtype: torch.dtype) -> torch.Tensor:
    """A class in the first image, a contrast in the second."""
    return torch.tensor([[1, 0, 0], [0, 0.5, -1]], dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
def test_map_equals_the_engine(dtype, tolerance):
    """A one is the class's map, several weights the weighted sum of maps; gammas of both signs."""
    model = randomised(SMALL, dtype=dtype)
    pixels = images(64)
    maps = Explainer(model).attribute(pixels).relevance
    expected = torch.einsum("bk,bkhw->bhw", starts(dtype), maps)
    found = relevance(model.train(), pixels.to(dtype), starts(dtype))
    assert relative_error(found, expected) < tolerance


def share_outside(model: Classifier, pixels: torch.Tensor) -> torch.Tensor:
    """Share of |relevance| in the upper half, summed over the images."""
    size = relevance(model, pixels, starts(pixels.dtype)).abs().flatten(1)
    half = size.shape[1] // 2
    return (size[:, :half].sum(1) / size.sum(1)).sum()


def slope(model: Classifier, pixels: torch.Tensor, name: str, step: float) -> tuple[float, float]:
    """Slope along a random direction of a parameter: by the gradient, and by differences."""
    parameter = model.get_parameter(name)
    way = torch.randn_like(parameter)
    (of_parameter,) = torch.autograd.grad(share_outside(model, pixels), parameter)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * way
            values.append(share_outside(model, pixels).item())
            parameter -= sign * step * way
    return (of_parameter * way).sum().item(), (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("stabiliser", [STABILISER, 0.01])
def test_gradient_equals_finite_differences(monkeypatch, stabiliser):
    """Of every parameter, gammas of both signs; of a scalar of the map, in float64.

    A large stabiliser shows that its own part in the slopes is right, which is otherwise too small.
    """
    for module in (engine, fold, gradient):
        monkeypatch.setattr(module, "STABILISER", stabiliser)
    model = randomised(SMALL).train()
    pixels = images(64).double()
    torch.manual_seed(4)
    with torch.no_grad():  # a gamma of 0 stands on a kink: the sign of what it reads changes there
        for norm in model.norms:
            norm.weight[norm.weight == 0] = 0.7
    slopes = {n: slope(model, pixels, n, 1e-7) for n, _ in model.named_parameters()}
    for name, (found, expected) in slopes.items():
        assert abs(found - expected) < 1e-6 * abs(expected), name


@pytest.mark.parametrize("frozen", ["stem", "denseblock1", "denseblock2", "denseblock3"])
def test_frozen_parameters_get_no_gradient(frozen):
    """What is frozen, with all below it, gets no gradient, and the others the same as without."""
    model = randomised(SMALL)
    pixels = images(64).double()
    share_outside(model, pixels).backward()
    expected = {name: p.grad.clone() for name, p in model.network.named_parameters()}
    model.zero_grad()
    blocks = block_names(model.shape)
    below = blocks[: blocks.index(frozen) + 1]
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(block_of(name, model.shape) not in below)
    share_outside(model, pixels).backward()
    for name, parameter in model.network.named_parameters():
        if block_of(name, model.shape) in below:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name]), name


def test_running_statistics_and_modes_are_left_alone():
    """A model in training mode stays in it, and its running statistics keep their bits."""
    model = randomised(SMALL).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    share_outside(model, images(64).double()).backward()
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_dropout_has_no_part_in_it():
    """The map of a network with dropout in training mode is the one of its use."""
    model = randomised(Network(growth_rate=4, block_config=(2, 1), dropout=0.5))
    pixels = images(64).double()
    expected = share_outside(model, pixels)
    assert share_outside(model.train(), pixels) == expected


def test_gradient_has_the_same_bytes_twice_and_under_autocast():
    """Neither a repetition nor autocast changes a bit of the map or its gradient."""
    model = randomised(SMALL, dtype=torch.float32)
    pixels = images(64).float()
    gradients = []
    for enabled in (False, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            share = share_outside(model, pixels)
        model.zero_grad()
        share.backward()
        gradients.append([share.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_gradient_is_the_same_where_signs_are_not_looked_at(monkeypatch):
    """A device is not asked which scales are negative; all may be, with the same result."""
    model = randomised(SMALL)
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.abs_()
    pixels = images(64).double()
    share_outside(model, pixels).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(gradient, "fold", lambda *args, **_: fold.fold(*args, check_signs=False))
    share_outside(model, pixels).backward()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - value).abs().max() <= 1e-11 * value.abs().max()
