"""Canonical networks of the architectures beside the DenseNet, and the rules on them."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from test_canonise import images, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from zennit.composites import EpsilonPlusFlat

from cxrdist.config import Network
from cxrdist.errors import CxrdistError
from cxrdist.explain.canonical import canonical_network
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier, Normalisation

ARCHITECTURES = ("resnet18", "squeezenet1_1", "alexnet")
SIMPLE = {
    nn.Conv2d,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Linear,
    nn.Identity,
}
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
SIZE_PX, EPSILON, STABILISER = 64, 0.1, 1e-6
IMAGE = images(SIZE_PX, count=1)


def built(architecture: str, normalisation: Normalisation | None = None) -> Classifier:
    """A classifier with random weights; AlexNet's hidden linear layers are narrow, to save time."""
    torch.manual_seed(0)
    model = Classifier(Network(architecture=architecture), ["a", "b", "c"], SIZE_PX, normalisation)
    if architecture == "alexnet":
        for place, sizes in ((1, (9216, 32)), (4, (32, 32)), (6, (32, 3))):
            model.network.classifier[place] = nn.Linear(*sizes)
    return model


@cache
def randomised(architecture: str, dtype: torch.dtype = torch.float64) -> Classifier:
    """A classifier with gammas of both signs, biases, and statistics that fit its activations."""
    model = built(architecture).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(module.weight).sign())
                module.momentum = None
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.2)
        model.train()(images(SIZE_PX, count=4, seed=0))
    return model.eval()


@PRECISIONS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logits_are_the_same(architecture, dtype, tolerance):
    """The canonical network of simple layers gives the logits of the network."""
    model = randomised(architecture, dtype)
    canonical = canonical_network(model.network)
    with torch.no_grad():
        logits = canonical(model.normalise(images(SIZE_PX)))
        assert logits.dtype == dtype
        assert relative_error(logits, model(images(SIZE_PX))) < tolerance
    leaves = {type(module) for module in canonical.modules() if not any(module.children())}
    assert leaves <= SIMPLE
    assert [type(layer) for layer in canonical if type(layer) in (nn.Linear, nn.Flatten)] == [
        nn.Flatten,
        *[nn.Linear] * (3 if architecture == "alexnet" else 1),
    ]
    assert not canonical.training
    assert not any(parameter.requires_grad for parameter in canonical.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_of_layers_are_never_negative(architecture):
    """Every layer but the first reads what is never negative, as its rule demands."""
    model = randomised(architecture)
    canonical = canonical_network(model.network)
    lowest = {}

    def record(name: str) -> Callable:
        return lambda module, inputs: lowest.update({name: inputs[0].min().item()})

    for name, module in canonical.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(record(name))
    canonical(model.normalise(images(SIZE_PX)))
    first, *others = lowest.values()
    assert first < 0
    assert min(others) >= 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_network_is_left_as_it_is(architecture):
    """No weight is shared: what happens to the canonical network does not reach the original."""
    model = randomised(architecture)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    for parameter in canonical_network(model.network).parameters():
        parameter.mul_(2)
    after = model.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.network.parameters())


@PRECISIONS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ledger_balances(architecture, dtype, tolerance):
    """The logit is relevance plus bias share plus epsilon share, and biases matter."""
    result = Explainer(randomised(architecture, dtype)).attribute(IMAGE, ["b", "c"])
    parts = result.relevance_sum + result.bias_share + result.epsilon_share
    assert result.relevance.shape == (1, 2, SIZE_PX, SIZE_PX)
    assert relative_error(parts, result.logits) < tolerance
    assert relative_error(result.relevance.sum((2, 3)), result.relevance_sum) < tolerance
    assert (result.bias_share / result.logits).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_relevance_is_input_times_gradient_where_no_rule_differs(architecture):
    """Without biases and negative weights all rules agree: R = x times the gradient by x.

    That gradient is of the network itself, which knows of no canonical network and no rule.
    """
    grey = Normalisation((0.0,) * 3, (1.0,) * 3)  # images are never negative
    model = built(architecture, grey).double()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "weight"):
                module.weight.abs_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    model.eval()
    inputs = model.normalise(IMAGE).requires_grad_()
    (gradient,) = torch.autograd.grad(model.network(inputs)[:, 1].sum(), inputs)
    explainer = Explainer(model, flat=False, epsilon=1e-12)
    result = explainer.attribute(IMAGE, ["b"])
    expected = (inputs * gradient).sum(1).detach()
    assert relative_error(result.relevance[:, 0], expected) < 1e-4  # the stabilisers take some
    assert not result.bias_share.any()


@pytest.mark.parametrize("architecture", ["squeezenet1_1", "alexnet"])
def test_maps_are_those_of_zennit_where_nothing_is_to_be_folded(architecture):
    """Without BatchNorm and sums, zennit's own composite is right on the network as it stands."""
    model = randomised(architecture)
    network = deepcopy(model.network)
    if architecture == "squeezenet1_1":
        conv = network.classifier[1]
        linear = nn.Linear(512, 3).double()
        linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
        network.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    inputs = model.normalise(IMAGE).requires_grad_()
    with EpsilonPlusFlat(epsilon=EPSILON).context(network):
        logit = network(inputs)[:, 2]
        (expected,) = torch.autograd.grad(logit, inputs, logit.detach())
    result = Explainer(model).attribute(IMAGE, ["c"])
    assert relative_error(result.relevance[:, 0], expected.sum(1)) < 1e-10


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale.reshape(-1, 1, 1), (norm.bias - norm.running_mean * scale).reshape(-1, 1, 1)


class ResidualReference:
    """LRP of a ResNet18 from the formulas: no autograd, no zennit, no canonical network.

    A block's sum z = W2 h + Ws x + b has the positive part W2+ h + Ws+ x + b+, where Ws is the
    shortcut's convolution, or 1: both terms get relevance by their part of it.
    """

    def __init__(self, model: Classifier, image: Tensor, target: int) -> None:
        self.bias = self.epsilon = 0.0
        network = model.network
        image = model.normalise(image)
        scale, shift = affine(network.bn1)
        self.first = F.relu(F.conv2d(image, network.conv1.weight, None, 2, 3) * scale + shift)
        x, places = F.max_pool2d(self.first, 3, 2, 1, return_indices=True)
        blocks = [b for i in range(1, 5) for b in network.get_submodule(f"layer{i}")]
        inputs = []
        for block in blocks:
            inputs.append(x)
            x = block(x)
        pooled = x.mean((2, 3))
        self.logit = network.fc(pooled)[0, target].item()
        ratio = self.logit / (self.logit + EPSILON * (1 if self.logit >= 0 else -1))
        self.bias += ratio * network.fc.bias[target].item()
        self.epsilon += self.logit * (1 - ratio)
        share = pooled * network.fc.weight[target] * ratio / (pooled + STABILISER)
        self.epsilon += share.sum().item() * STABILISER
        relevance = x * share[..., None, None] / x[0, 0].numel()
        for block, x in zip(blocks[::-1], inputs[::-1], strict=True):
            relevance = self._block(block, x, relevance)
        routed = torch.zeros_like(self.first).flatten(2)
        routed = routed.scatter_add(2, places.flatten(2), relevance.flatten(2))
        routed = routed.reshape(self.first.shape).sum(1, keepdim=True)
        ones = torch.ones(1, 3, 7, 7, dtype=image.dtype)
        size = F.conv2d(torch.ones_like(image), ones, None, 2, 3)
        self.epsilon += (routed / (size + STABILISER)).sum().item() * STABILISER
        spread = F.conv_transpose2d(routed / (size + STABILISER), ones, None, 2, 3, 1)
        self.relevance = spread[0].sum(0)

    def _block(self, block: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
        """From the relevance behind a block to that before it."""
        stride = block.conv1.stride[0]
        scale1, shift1 = affine(block.bn1)
        scale2, shift2 = affine(block.bn2)
        inner = block.conv1.weight * scale1[..., None]
        outer = (block.conv2.weight * scale2[..., None]).clamp(min=0)
        direct = torch.eye(len(outer), dtype=x.dtype)[..., None, None]
        if block.downsample is not None:
            scale, shift = affine(block.downsample[1])
            direct, shift2 = block.downsample[0].weight * scale[..., None], shift2 + shift
        direct = direct.clamp(min=0)
        h = F.relu(F.conv2d(x, inner, None, stride, 1) + shift1)
        z = F.conv2d(h, outer, None, 1, 1) + F.conv2d(x, direct, None, stride)
        ratio = self._divide(relevance, z, shift2)
        of_h = h * F.conv_transpose2d(ratio, outer, None, 1, 1)
        rest = stride - 1  # what an even side leaves over
        of_x = F.conv_transpose2d(ratio, direct, None, stride, 0, rest)
        inner = inner.clamp(min=0)
        ratio = self._divide(of_h, F.conv2d(x, inner, None, stride, 1), shift1)
        return x * (of_x + F.conv_transpose2d(ratio, inner, None, stride, 1, rest))

    def _divide(self, relevance: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        bias = bias.clamp(min=0)
        ratio = relevance / (z + bias + STABILISER)
        self.bias += (ratio * bias).sum().item()
        self.epsilon += ratio.sum().item() * STABILISER
        return ratio


def test_relevance_of_a_resnet_follows_the_formulas():
    """Map and shares equal those of a direct computation that shares no code."""
    model = randomised("resnet18")
    result = Explainer(model).attribute(IMAGE, ["b"])
    with torch.no_grad():
        expected = ResidualReference(model, IMAGE, 1)
    assert relative_error(result.relevance[0, 0], expected.relevance) < 1e-10
    assert result.logits.item() == pytest.approx(expected.logit, rel=1e-10)
    assert result.bias_share.item() == pytest.approx(expected.bias, rel=1e-10)
    assert result.epsilon_share.item() == pytest.approx(expected.epsilon, rel=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("convnext", "a ConvNeXt: it has no proven rules of relevance; train one of densenet"),
        ("bottleneck", "a ResNet of Bottleneck"),
        ("relu", "a ReLU after its logits"),
        ("leaky", r"layer features\.1 \(LeakyReLU\)"),
        ("training", r"training mode.*model\.eval\(\)"),
    ],
)
def test_networks_without_proven_rules_are_refused(change, message):
    """What would be shown wrongly is refused in one line, before anything is computed."""
    model = built("convnext_atto" if change == "convnext" else "squeezenet1_1").eval()
    if change == "bottleneck":
        model.network = resnet50(num_classes=3).eval()
    elif change == "relu":
        model.network.classifier[2] = nn.ReLU().eval()
    elif change == "leaky":
        model.network.features[1] = nn.LeakyReLU().eval()
    elif change == "training":
        model.train()
    with pytest.raises(CxrdistError, match=f"cannot explain.*{message}") as raised:
        Explainer(model)
    assert "\n" not in str(raised.value)


def test_the_papers_program_is_for_densenets():
    """Its rules are those of a DenseNet as it stands; the line names the option."""
    with pytest.raises(
        CxrdistError, match=r"--preset innvestigate: is for DenseNets, but .* Squeeze"
    ):
        Explainer(built("squeezenet1_1").eval(), preset="innvestigate")
