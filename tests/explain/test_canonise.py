from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cxrdist.errors import CxrdistError
from cxrdist.explain.canonise import untangle
from cxrdist.model.densenet import Classifier, Network, Normalisation

LAYERS_LEFT = {
    nn.Conv2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Linear,
}
SMALL = Network(growth_rate=4, block_config=(2, 3, 1))


def images(size_px: int, count: int = 2, seed: int = 1) -> Tensor:
    """Smooth grey images, uint8 [count, 1, size_px, size_px]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 8, 8, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=size_px, mode="bilinear").to(torch.uint8)


def randomised(
    network: Network = SMALL,
    size_px: int = 64,
    dtype: torch.dtype = torch.float64,
    normalisation: Normalisation | None = None,
) -> Classifier:
    """A classifier with gammas of both signs and zero, and statistics that fit its activations."""
    torch.manual_seed(0)
    model = Classifier(network, ["a", "b", "c"], size_px, normalisation).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.network.classifier.bias.uniform_(-1, 1)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(norm.weight).sign())
                norm.weight[::17] = 0
                norm.bias.normal_(std=0.3)
                norm.momentum = None
        model.train()(images(size_px, count=4, seed=0))
    return model.eval()


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_densenet121_gives_the_same_logits(dtype, tolerance):
    """DenseNet121 gives the same logits before and after, with gammas of both signs and zero."""
    model = randomised(Network(), 96, dtype)
    with torch.no_grad():
        logits = model(images(96))
        canonical = untangle(model.network)(model.normalise(images(96)))
    assert canonical.dtype == dtype
    assert relative_error(canonical, logits) < tolerance


@pytest.mark.parametrize("block_config", [(1,), (3,), (1, 1), (2, 3, 1), (1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size_px", [64, 75])
def test_other_shapes_give_the_same_logits(block_config, channels, size_px):
    """Any number of blocks and layers, grey or colour, even or odd image sides."""
    normalisation = Normalisation((0.5,) * channels, (0.25,) * channels)
    model = randomised(
        Network(growth_rate=6, block_config=block_config), size_px, normalisation=normalisation
    )
    with torch.no_grad():
        logits = model(images(size_px))
        canonical = untangle(model.network)(model.normalise(images(size_px)))
    assert relative_error(canonical, logits) < 1e-12


def test_only_simple_layers_are_left():
    """No BatchNorm survives: every leaf is one that LRP has a rule for, and pools come first."""
    canonical = untangle(randomised().network)
    leaves = [module for module in canonical.modules() if not any(module.children())]
    assert {type(leaf) for leaf in leaves} == LAYERS_LEFT
    assert [type(layer) for layer in canonical].index(nn.AvgPool2d) == 4
    assert not canonical.training
    assert not any(parameter.requires_grad for parameter in canonical.parameters())


def test_inputs_of_convolutions_are_never_negative():
    """Every convolution but the first reads the output of a ReLU, a pool or a list of them."""
    model = randomised()
    canonical = untangle(model.network)
    lowest = {}

    def record(name: str) -> Callable:
        return lambda module, inputs: lowest.update({name: inputs[0].min().item()})

    for name, module in canonical.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(record(name))
    canonical(model.normalise(images(64)))
    first, *others = lowest.values()
    assert first < 0
    assert len(others) == 3 + 2 * 6
    assert min(others) >= 0


def test_the_original_is_left_as_it_is():
    """No weight is changed, and none is shared: scaling the copy does not reach the original."""
    model = randomised()
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    canonical = untangle(model.network)
    for parameter in canonical.parameters():
        parameter.mul_(2)
    after = model.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_training_mode_is_refused():
    """A network in training mode is refused, even if only one BatchNorm is."""
    model = randomised()
    with pytest.raises(CxrdistError, match=r"training mode.*model\.eval\(\)"):
        untangle(model.train().network)
    model.eval().network.features.denseblock2.denselayer1.norm1.train()
    with pytest.raises(CxrdistError, match="training mode"):
        untangle(model.network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("leaky", r"transition1\.norm\.act \(LeakyReLU\)"),
        ("max", r"global_pool\.pool \(AdaptiveMaxPool2d\)"),
        ("statistics", "no running statistics"),
        ("deep", "deep stem"),
        ("classifier", "a Classifier: expected timm's DenseNet"),
    ],
)
def test_other_networks_are_refused(change, message):
    """What would be folded wrongly is refused with one line, not explained."""
    model = randomised()
    network = model.network
    if change == "leaky":
        network.features.transition1.norm.act = nn.LeakyReLU()
    elif change == "max":
        network.global_pool.pool = nn.AdaptiveMaxPool2d(1)
    elif change == "statistics":
        network.features.norm0.running_mean = None
    elif change == "deep":
        network.features.add_module("conv1", nn.Identity())
    model.eval()
    with pytest.raises(CxrdistError, match=rf"cannot explain.*{message}") as raised:
        untangle(model if change == "classifier" else network)
    assert "\n" not in str(raised.value)
