from contextlib import nullcontext

import pytest
import torch
from test_canonise import SMALL, images, randomised, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from zennit.attribution import Gradient
from zennit.composites import (
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlusFlat,
)
from zennit.core import Composite

from cxrdist.errors import CxrdistError
from cxrdist.explain.canonise import untangle
from cxrdist.explain.relevance import Attribution, Explainer, attribute
from cxrdist.model.densenet import Classifier, Network

EPSILON, STABILISER = 0.1, 1e-6


@pytest.fixture(params=[None, "canonical"], ids=["engine", "zennit"])
def composite(request) -> str | None:
    """The canonical preset by the engine, and by way of zennit's composite."""
    return request.param


def ledger_error(result: Attribution) -> float:
    """Largest difference between the two sides of the ledger, relative to the largest logit."""
    return relative_error(
        result.relevance_sum + result.bias_share + result.epsilon_share, result.logits
    )


class Reference:
    """LRP of one image from the formulas: no autograd, no zennit, no canonical network.

    A copy of a convolution for a consumer with scale s and shift t has the positive weights
    |s| * W+ (s > 0) or |s| * W- (s < 0).
    """

    def __init__(self, model: Classifier, image: Tensor, target: int, flat: bool) -> None:
        self.features = model.network.features
        self.seen: dict[nn.Module, Tensor] = {}
        self.bias = self.epsilon = 0.0
        kinds = nn.Conv2d | nn.Linear | nn.MaxPool2d
        modules = [module for module in model.modules() if isinstance(module, kinds)]
        handles = [module.register_forward_pre_hook(self._record) for module in modules]
        handles.append(self.features.norm5.register_forward_hook(self._record_output))
        with torch.no_grad():
            self.logit = model(image)[0, target].item()
            relevance = self._head(model.network.classifier, target)
            self.relevance = self._trunk(relevance, flat)[0].sum(0)
        for handle in handles:
            handle.remove()

    def _record(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.seen[module] = inputs[0].clone()

    def _record_output(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.seen[module] = output.clone()

    def _head(self, linear: nn.Linear, target: int) -> Tensor:
        """Epsilon rule of the linear layer, then the global average pool."""
        ratio = self.logit / (self.logit + EPSILON * (1 if self.logit >= 0 else -1))
        self.bias += ratio * linear.bias[target].item()
        self.epsilon += self.logit * (1 - ratio)
        pooled = self.seen[linear]
        relevance = ratio * pooled * linear.weight[target]
        last = self.seen[self.features.norm5]
        return self._average(last, pooled[..., None, None], relevance[..., None, None])

    def _average(self, x: Tensor, pooled: Tensor, relevance: Tensor) -> Tensor:
        """Each input of an average pool gets its part of the mean; all windows are full."""
        size = x.shape[-1] // pooled.shape[-1]
        ratio = relevance / (pooled + STABILISER)
        self.epsilon += (ratio * STABILISER).sum().item()
        return x / size**2 * ratio.repeat_interleave(size, 2).repeat_interleave(size, 3)

    def _trunk(self, relevance: Tensor, flat: bool) -> Tensor:
        """From the output of norm5 and its ReLU to the normalised image."""
        features = self.features
        for number in range(len(SMALL.block_config), 0, -1):
            block = features.get_submodule(f"denseblock{number}")
            if number == len(SMALL.block_config):
                exit_norm = features.norm5
            else:
                transition = features.get_submodule(f"transition{number}")
                exit_norm = transition.norm
                x = self.seen[transition.conv]
                relevance = self._average(x, F.avg_pool2d(x, 2), relevance)
            relevance = self._block(number, list(block.children()), exit_norm, relevance)
        x = self.seen[features.pool0]
        _, places = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        routed = torch.zeros_like(x).flatten(2)
        routed = routed.scatter_add(2, places.flatten(2), relevance.flatten(2)).reshape(x.shape)
        return self._first_flat(routed) if flat else self._first_z_plus(routed)

    def _block(
        self, number: int, layers: list[nn.Module], exit_norm: nn.Module, relevance: Tensor
    ) -> Tensor:
        """From the exit's relevance to that of the entry's input."""
        entry, x = self._entry(number)
        size = entry.shape[0]
        growth = SMALL.growth_rate
        pending = [(exit_norm, relevance)]
        for index in range(len(layers) - 1, -1, -1):
            layer = layers[index]
            start = size + index * growth
            inner = self._fan_out(layer.conv2.weight, self.seen[layer.conv2], pending, start)
            outer = [(layer.norm2, inner)]
            relevance = self._fan_out(layer.conv1.weight, self.seen[layer.conv1], outer, 0)
            pending.append((layer.norm1, relevance))
        return self._fan_out(entry, x, pending, 0)

    def _entry(self, number: int) -> tuple[Tensor, Tensor]:
        """The 1x1 weights that make a block's input, and what they read."""
        if number == 1:
            x = F.max_pool2d(self.seen[self.features.pool0], 3, 2, 1)
            return torch.eye(x.shape[1], dtype=x.dtype)[..., None, None], x
        conv = self.features.get_submodule(f"transition{number - 1}").conv
        return conv.weight, F.avg_pool2d(self.seen[conv], 2)

    def _fan_out(
        self, weight: Tensor, x: Tensor, consumers: list[tuple[nn.Module, Tensor]], start: int
    ) -> Tensor:
        """z-plus through the copies of one convolution that all its consumers read."""
        total = torch.zeros_like(x)
        padding = weight.shape[-1] // 2
        channels = slice(start, start + weight.shape[0])
        for norm, relevance in consumers:
            scale, shift = affine(norm)
            s = scale[channels].reshape(-1, 1, 1, 1)
            b = shift[channels].clamp(min=0).reshape(-1, 1, 1)
            positive = s.abs() * torch.where(s > 0, weight.clamp(min=0), (-weight).clamp(min=0))
            z = F.conv2d(x, positive, padding=padding) + b
            ratio = relevance[:, channels] / (z + STABILISER)
            self.bias += (ratio * b).sum().item()
            self.epsilon += (ratio * STABILISER).sum().item()
            total += x * F.conv_transpose2d(ratio, positive, padding=padding)
        return total

    def _first_flat(self, relevance: Tensor) -> Tensor:
        """Each output's relevance is spread evenly over its window, 7x7 pixels with stride 2.

        A window at the border has fewer pixels; the padding is none and gets nothing.
        """
        image = torch.zeros_like(self.seen[self.features.conv0])
        for row in range(relevance.shape[2]):
            for column in range(relevance.shape[3]):
                top, left = max(2 * row - 3, 0), max(2 * column - 3, 0)
                window = image[:, :, top : 2 * row + 4, left : 2 * column + 4]
                amount = relevance[:, :, row, column].sum().item()
                share = amount / (window[0].numel() + STABILISER)
                window += share
                self.epsilon += share * STABILISER
        return image

    def _first_z_plus(self, relevance: Tensor) -> Tensor:
        """z-plus for an input of both signs: positive parts x+ w+ and x- w-."""
        conv = self.features.conv0
        x = self.seen[conv]
        scale, shift = affine(self.features.norm0)
        weight = conv.weight * scale.reshape(-1, 1, 1, 1)
        b = shift.clamp(min=0).reshape(-1, 1, 1)
        parts = [
            (x.clamp(min=0), weight.clamp(min=0)),
            (x.clamp(max=0), weight.clamp(max=0)),
        ]
        z = b + sum(F.conv2d(part, half, stride=2, padding=3) for part, half in parts)
        ratio = relevance / (z + STABILISER)
        self.bias += (ratio * b).sum().item()
        self.epsilon += (ratio * STABILISER).sum().item()
        options = {"stride": 2, "padding": 3, "output_padding": 1}
        return sum(part * F.conv_transpose2d(ratio, half, **options) for part, half in parts)


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


@pytest.mark.parametrize("flat", [True, False])
def test_relevance_follows_the_formulas(flat, composite):
    """Relevance and both shares equal those of a direct computation that shares no code."""
    model = randomised()
    result = attribute(model, images(64), [1], flat=flat, epsilon=EPSILON, composite=composite)
    for number, image in enumerate(images(64)):
        reference = Reference(model, image[None], 1, flat)
        assert relative_error(result.relevance[number, 0], reference.relevance) < 1e-10
        assert result.logits[number, 0].item() == pytest.approx(reference.logit, rel=1e-10)
        assert result.bias_share[number, 0].item() == pytest.approx(reference.bias, rel=1e-10)
        assert result.epsilon_share[number, 0].item() == pytest.approx(reference.epsilon, rel=1e-8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_ledger_balances_on_densenet121(dtype, tolerance, composite):
    """The logit is relevance plus bias share plus epsilon share, and every term matters."""
    model = randomised(Network(), dtype=dtype)
    result = attribute(model, images(64, count=1), ["b", "c"], composite=composite)
    assert result.relevance.shape == (1, 2, 64, 64)
    assert result.relevance.dtype == dtype
    assert ledger_error(result) < tolerance
    assert relative_error(result.relevance.sum((2, 3)), result.relevance_sum) < tolerance
    for term in (result.relevance_sum, result.bias_share, result.epsilon_share):
        assert (term / result.logits).abs().max() > 0.01


@pytest.mark.parametrize("flat", [True, False])
def test_ledger_balances_on_odd_sides(flat, composite):
    """Rows and columns that no pool reads cost nothing."""
    result = attribute(randomised(size_px=75), images(75), flat=flat, composite=composite)
    assert ledger_error(result) < 1e-12


def test_rules_are_those_of_zennit(composite):
    """The map equals that of zennit's own composite on the canonical network."""
    model = randomised()
    canonical = untangle(model.network)
    expected = zennit_map(model, canonical, 2)
    result = attribute(model, images(64), [2], composite=composite)
    assert relative_error(result.relevance[:, 0], expected) < 1e-12


def test_a_composite_of_zennit_is_taken_by_its_name():
    """On the canonical network; black and white, normalised as for ImageNet, bound the box."""
    model = randomised()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
    box = EpsilonGammaBox(-mean / std, (1 - mean) / std, epsilon=EPSILON)
    expected = zennit_map(model, untangle(model.network), 2, composite=box)
    result = attribute(model, images(64), [2], composite="epsilon_gamma_box")
    assert relative_error(result.relevance[:, 0], expected) < 1e-5


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(
    ("name", "composite"),
    [
        ("epsilon_plus_flat", EpsilonPlusFlat),
        ("epsilon_alpha2_beta1", EpsilonAlpha2Beta1),
        ("epsilon_alpha2_beta1_flat", EpsilonAlpha2Beta1Flat),
    ],
)
def test_flat_and_alpha_beta_composites_are_those_of_zennits_attributor(name, composite, biases):
    """On the canonical network, with the biases in the denominators or without."""
    model = randomised()
    inputs = model.normalise(images(64))
    rules = composite(epsilon=EPSILON, zero_params=[] if biases else ["bias"])
    with Gradient(untangle(model.network), rules) as attributor:
        logits, expected = attributor(inputs, lambda out: F.one_hot(torch.tensor([2, 2]), 3) * out)
    result = attribute(model, images(64), [2], composite=name, biases=biases)
    assert torch.allclose(result.logits[:, 0], logits[:, 2])
    assert relative_error(result.relevance[:, 0], expected.sum(1)) < 1e-12


def zennit_map(
    model: Classifier,
    network: nn.Module,
    target: int,
    count: int = 2,
    composite: Composite | None = None,
) -> Tensor:
    """Relevance [count, H, W] by a composite of zennit's on a network as it stands."""
    inputs = model.normalise(images(64, count)).requires_grad_()
    with (composite or EpsilonPlusFlat(epsilon=EPSILON)).context(network):
        logit = network(inputs)[:, target]
        (relevance,) = torch.autograd.grad(logit, inputs, logit.detach())
    return relevance.sum(1)


def flip_signs(network: nn.Module, share: float = 0.3) -> None:
    """Flip channels of every convolution, with gamma and mean of each BatchNorm that reads them."""
    generator = torch.Generator().manual_seed(3)

    def flip_conv(conv: nn.Conv2d) -> Tensor:
        signs = 1.0 - 2.0 * (torch.rand(conv.out_channels, generator=generator) < share)
        conv.weight *= signs.reshape(-1, 1, 1, 1)
        return signs

    def flip_norm(norm: nn.BatchNorm2d, signs: Tensor) -> None:
        norm.weight *= signs
        norm.running_mean *= signs

    features = network.features
    flip_norm(features.norm0, flip_conv(features.conv0))
    signs = torch.ones(features.conv0.out_channels)
    for name, child in features.named_children():
        if name.startswith("denseblock"):
            for layer in child.children():
                flip_norm(layer.norm1, signs)
                flip_norm(layer.norm2, flip_conv(layer.conv1))
                signs = torch.cat([signs, flip_conv(layer.conv2)])
        elif name.startswith("transition"):
            flip_norm(child.norm, signs)
            signs = flip_conv(child.conv)
    flip_norm(features.norm5, signs)


def test_map_does_not_depend_on_how_the_function_is_written(composite):
    """Flipped signs that cancel change neither logits nor map; a bare composite's map changes."""
    model = randomised(Network(), dtype=torch.float32)
    maps, bare_maps, logits = [], [], []
    for _ in range(2):
        found = attribute(model, images(64, count=1), ["b"], composite=composite)
        maps.append(found.relevance[:, 0])
        bare_maps.append(zennit_map(model, model.network, 1, count=1))
        with torch.no_grad():
            logits.append(model(images(64)))
            flip_signs(model.network)
    assert torch.equal(*logits)
    assert relative_error(*maps) < 1e-5
    assert relative_error(*bare_maps) > 0.1


def test_several_classes_equal_one_by_one(composite):
    """All classes at once give what each gives alone, by name or number, in the order asked for."""
    explainer = Explainer(randomised(), composite=composite)
    tolerance = 0 if composite else 1e-12  # one matrix product for all adds up in another order
    together = explainer.attribute(images(64))
    for index, name in enumerate(explainer.classes):
        for target in (index, name):
            alone = explainer.attribute(images(64), [target])
            for field, value in vars(alone).items():
                error = relative_error(value[:, 0], getattr(together, field)[:, index])
                assert error <= tolerance, field
    reverse = explainer.attribute(images(64), ["c", 0])
    assert relative_error(reverse.relevance, together.relevance[:, [2, 0]]) <= tolerance


def test_images_of_a_batch_do_not_mix(composite):
    """An image alone has the map and the ledger that it has in a batch."""
    explainer = Explainer(randomised(), composite=composite)
    batch = explainer.attribute(images(64))
    for number, image in enumerate(images(64)):
        alone = explainer.attribute(image[None])
        for field, value in vars(alone).items():
            assert relative_error(value[0], getattr(batch, field)[number]) < 1e-12, field


def num_hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


@pytest.mark.parametrize(
    "settings", [{}, {"composite": "canonical"}, {"preset": "innvestigate"}], ids=str
)
def test_the_model_is_left_as_it_is(settings):
    """Weights, statistics, mode, gradients and hooks of the model are the same afterwards."""
    model = randomised()
    model.network.classifier.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    attribute(model, images(64), **settings)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert num_hooks(model) == 0


def test_batches_leave_nothing_behind(composite):
    """The same batch gives the same bytes at any time; no hook or gradient stays."""
    explainer = Explainer(randomised(), composite=composite)
    first = explainer.attribute(images(64))
    explainer.attribute(images(64, seed=5))
    again = explainer.attribute(images(64))
    for field, value in vars(first).items():
        assert torch.equal(value, getattr(again, field)), field
        assert not value.requires_grad, field
    if composite:
        assert num_hooks(explainer._method.network) == 0


@pytest.mark.parametrize("surroundings", ["no_grad", "inference_mode", "autocast", "frozen"])
def test_surroundings_do_not_matter(surroundings, composite):
    """No gradients, inference mode, autocast or a frozen model give the same bytes."""
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "frozen": nullcontext(),
    }
    model = randomised(dtype=torch.float32)
    expected = attribute(model, images(64), composite=composite)
    model.requires_grad_(surroundings != "frozen")
    with contexts[surroundings]:
        result = attribute(model, images(64), composite=composite)
    for field, value in vars(expected).items():
        assert torch.equal(value, getattr(result, field)), field


def test_precision_switches_hold_only_inside(monkeypatch, composite):
    """TensorFloat-32 and free choice of kernels are off during the pass and as before after it."""
    cudnn = torch.backends.cudnn
    for name, value in (("allow_tf32", True), ("deterministic", False), ("benchmark", True)):
        monkeypatch.setattr(cudnn, name, value)
    torch.set_float32_matmul_precision("high")

    def switches() -> tuple[object, ...]:
        precision = torch.get_float32_matmul_precision()
        return cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, precision

    inside = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "conv" in str(function) or "mm" in str(function):
                inside.add(switches())
            return function(*args, **(kwargs or {}))

    explainer = Explainer(randomised(), composite=composite)
    with Record():
        explainer.attribute(images(64))
    after = switches()
    torch.set_float32_matmul_precision("highest")
    assert inside == {(False, True, False, "highest")}
    assert after == (True, False, True, "high")


def test_training_mode_is_refused():
    """A model in training mode is refused with one line that names the mend."""
    with pytest.raises(CxrdistError, match=r"training mode.*model\.eval\(\)"):
        attribute(randomised().train(), images(64))


@pytest.mark.parametrize("targets", [["z"], [3], [-1], [], "a", [None]], ids=str)
def test_unknown_targets_are_refused(targets):
    """A target that is no class, no target and a bare name are refused with one line."""
    with pytest.raises(CxrdistError, match=r"class") as raised:
        attribute(randomised(), images(64), targets)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64), (2, 3, 64, 64)], ids=str)
def test_images_of_other_shapes_are_refused(shape):
    """Three channels would pass the normalisation and explain something else."""
    with pytest.raises(CxrdistError, match=r"expected uint8 \[B, 1, 64, 64\]"):
        attribute(randomised(), torch.zeros(shape, dtype=torch.uint8))
