"""The graph of a step: what it computes, what it dispatches, that nothing in it waits."""

import pytest
import torch
import torchvision
from support import Dispatched
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from cxrdist.config import Network, Stage
from cxrdist.model.batchnorm import BatchNorm
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_of
from cxrdist.train import learner
from cxrdist.train.learner import Learner
from cxrdist.train.stages import build_optimizer, freeze, parameter_groups, set_modes
from cxrdist.train.update import Updater

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]
SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2), dropout=0.0)
FAST_TO_COMPILE = Network(growth_rate=4, block_config=(1, 1, 1, 2), dropout=0.0)


def model_of(network: Network, trained: list[str], *, moving: bool = False) -> Classifier:
    """A network as a stage has it, with statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = Classifier(network, ["a", "b", "c"], 64)
    for norm in model.norms:
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    freeze(model, set(trained))
    set_modes(model, set(trained), moving=moving)
    return model


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, warps that leave them as they are, targets of which one is not known."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 1, 64, 64), dtype=torch.uint8, generator=generator)
    targets = torch.eye(3)[torch.arange(count) % 3]
    targets[0, 1] = -1
    return images, torch.eye(2, 3).repeat(count, 1, 1), targets


def updater_of(model: Classifier, trained: list[str], name: str = "sgd") -> Updater:
    groups = parameter_groups(model, Stage(dict.fromkeys(trained, 1e-3), 1, 1))
    return Updater(build_optimizer(name, groups), None, None, None)


def test_a_step_of_densenet121_dispatches_a_third_fewer_operations_than_timms():
    """Concatenations have a slice and a sum per layer, not per pair of layers.

    Of 1,684 operations and 1,278 views of the whole step it leaves no more than 65 %.
    """
    model = model_of(Network(), BLOCKS)
    ours = Learner(model, set(BLOCKS), torch.float32, compiled=False)
    updater = updater_of(model, BLOCKS)
    with Dispatched() as counted:
        updater.backward(ours(*batch(2))[0])
        updater.step()
    assert sum(counted.operations.values()) <= 0.65 * 1684
    assert sum((counted.operations + counted.views).values()) <= 0.65 * (1684 + 1278)
    assert counted.operations["aten.add.Tensor"] <= 60
    assert not [name for name in counted.operations if "local_scalar" in name or "item" in name]


@pytest.mark.parametrize("trained", [["denseblock4", "head"], ["head"]])
def test_moving_batchnorm_of_frozen_blocks_is_pytorchs_default(trained):
    """Losses, gradients and statistics are those of torchvision's network in train().

    Of a wholly frozen trunk nothing is kept for a backward pass.
    """
    model = model_of(SMALL, trained, moving=True)
    kept = {k: v.clone() for k, v in model.network.state_dict().items()}
    plain = torchvision.models.DenseNet(4, (2, 2, 2, 2), 8, num_classes=3)
    plain.load_state_dict(kept)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(block_of(name, SMALL) in trained)
    ours = Learner(model, set(trained), torch.float32, compiled=False, moving=True)
    images, matrices, targets = batch(4)
    for _ in range(2):
        expected = learner.sum_of_losses(plain(model.normalise(images)), targets)
        found = ours(images, matrices, targets)[0]
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.ndim) or x, lambda x: x):
        ours.logits(images.float())
    assert (4 in saved) == (trained != ["head"])  # features of an image have four dimensions
    expected.backward()
    found.backward()
    for name, parameter in plain.named_parameters():
        gradient = model.network.get_parameter(name).grad
        is_frozen = block_of(name, SMALL) not in trained
        assert (gradient is None) == (parameter.grad is None) == is_frozen
        assert gradient is None or torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
    plain(model.normalise(images))  # as often as ours
    for name, buffer in plain.named_buffers():
        assert torch.allclose(model.network.get_buffer(name), buffer, rtol=1e-4, atol=1e-5), name
        assert not torch.equal(buffer, kept[name])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("trained", [BLOCKS, ["head"]])
def test_a_step_reads_nothing(name, trained):
    """It runs on fake tensors, which have shapes and no values: every read would raise."""
    model = model_of(SMALL, trained)
    updater = updater_of(model, trained, name)
    ours = Learner(model, set(trained), torch.bfloat16, compiled=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(4, 1, 64, 64, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(images, torch.empty(4, 2, 3), torch.empty(4, 3))[0]
        updater.backward(loss)
        norm = updater.step()
        with pytest.raises(RuntimeError):  # the control: such a read does raise
            bool(norm > 0)


@pytest.mark.parametrize("trained", [BLOCKS, ["denseblock4", "head"], ["head"]])
def test_the_compiled_step_is_one_graph_with_the_losses_of_the_eager_one(monkeypatch, trained):
    """No graph break, two compilations for the two sizes of a stage's slices, equal gradients."""
    monkeypatch.setattr(learner, "COMPILE_BACKEND", "aot_eager")
    losses, gradients = {}, {}
    for compiled in (False, True):
        model = model_of(FAST_TO_COMPILE, trained)
        updater = updater_of(model, trained)
        ours = Learner(model, set(trained), torch.float32, compiled=compiled)
        counters.clear()
        losses[compiled] = []
        for count in (5, 4, 5, 4, 4, 5):
            loss = ours(*batch(count))[0]
            updater.backward(loss)
            losses[compiled].append(float(loss.detach()))
            gradients[compiled] = [p.grad for p in model.parameters() if p.grad is not None]
            updater.step()
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
    for found, expected in zip(gradients[True], gradients[False], strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert len(gradients[True]) == len(gradients[False]) > 0
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_the_folded_trunk_gives_the_logits_of_the_network():
    """BatchNorms in the convolutions before them: fewer operations, the same features."""
    model = model_of(Network(dropout=0.0), ["head"])
    images = batch(2)[0].float()
    ours = Learner(model, {"head"}, torch.float32, compiled=False)
    with torch.no_grad(), Dispatched() as folded:
        found = ours.logits(images)
    with torch.no_grad(), Dispatched() as whole:
        expected = model.logits(images)
    assert torch.allclose(found, expected, atol=1e-4)
    norms = "aten.native_batch_norm.default"
    assert whole.operations[norms] == len(model.norms) == 121
    assert folded.operations[norms] == 121 - 1 - 58  # norm0, and norm2 of each of 58 layers
    assert all(isinstance(m, BatchNorm) for m in model.norms)  # the network itself is left alone


def test_the_folded_trunk_is_in_the_precision_of_autocast():
    """Its weights are cast once a stage, not once a step; the result is bf16's."""
    model = model_of(SMALL, ["head"])
    ours = Learner(model, {"head"}, torch.bfloat16, compiled=False)
    images = batch(4)[0].float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Dispatched() as counted:
        found = ours.logits(images)
    convolutions = counted.operations["aten.convolution.default"]
    assert counted.operations["aten._to_copy.default"] < convolutions
    assert torch.allclose(found.float(), model.logits(images), atol=0.1)
