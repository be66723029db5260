"""The paper's own program, held against arrays that it made."""

import numpy as np
import pytest
import torch
from test_canonise import relative_error
from timm.models.densenet import DenseNet

from cxrdist.explain.innvestigate import Innvestigate


@pytest.fixture
def golden(real_data):
    """Weights, images and maps of a small Keras DenseNet in the real iNNvestigate."""
    with np.load(real_data / "innvestigate_golden.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def from_keras(weights: dict[str, torch.Tensor], padding: int) -> DenseNet:
    """The golden network: two blocks of two layers, 20 % of the gammas negative."""
    network = DenseNet(growth_rate=4, block_config=(2, 2), bn_size=2, num_classes=3)
    network.features.conv0.padding = (padding, padding)
    names = {"conv0": "conv0", "norm0": "norm0", "norm5": "norm5"}
    names |= {"tnorm": "transition1.norm", "tconv": "transition1.conv"}
    for block in (1, 2):
        for layer in (1, 2):
            for part in ("norm1", "conv1", "norm2", "conv2"):
                inside = f"denseblock{block}.denselayer{layer}.{part}"
                names[f"b{block}l{layer}{part}"] = inside
    with torch.no_grad():
        for keras, name in names.items():
            module = network.features.get_submodule(name)
            if "conv" in keras:
                module.weight.copy_(weights[f"W/{keras}/0"].permute(3, 2, 0, 1))
            else:
                tensors = (module.weight, module.bias, module.running_mean, module.running_var)
                for place, tensor in enumerate(tensors):
                    tensor.copy_(weights[f"W/{keras}/{place}"])
        network.classifier.weight.copy_(weights["W/fc/0"].T)
        network.classifier.bias.copy_(weights["W/fc/1"])
    return network.eval()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
def test_maps_are_those_of_innvestigate(golden, padding, flat):
    """Both presets with and without padding; behind a padding iNNvestigate skips the flat rule."""
    inputs = golden["X"].permute(0, 3, 1, 2)
    network = from_keras(golden, padding)
    found = Innvestigate(network, flat and not padding, 0.1).attribute(inputs, [0])
    place = int(padding > 0)
    expected = golden[f"{'AFlat' if flat else 'A'}_bnZ_{place}"][0].sum(-1)
    assert relative_error(found.logits[:, 0], golden[f"y{place}"][:, 0]) < 1e-5
    assert relative_error(found.relevance[:, 0], expected) < 1e-5
