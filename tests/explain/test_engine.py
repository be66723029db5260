"""The engine, held against zennit's rules on the canonical network."""

import pytest
import torch
from test_canonise import SMALL, images, randomised, relative_error

from cxrdist.explain import engine
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier, Network, Normalisation


def with_positive_scales(model: Classifier) -> Classifier:
    """The model with the absolute values of its gammas."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.abs_()
    return model


def largest_error(model: Classifier, size_px: int, **settings: object) -> float:
    """Of maps, logits and ledger, each relative to the largest entry of its kind."""
    pixels = images(size_px)
    found = Explainer(model, **settings).attribute(pixels)
    expected = Explainer(model, composite="canonical", **settings).attribute(pixels)
    scale = expected.logits.abs().max().item()
    sums = ("logits", "relevance_sum", "bias_share", "epsilon_share")
    errors = [(getattr(found, n) - getattr(expected, n)).abs().max().item() / scale for n in sums]
    return max(relative_error(found.relevance, expected.relevance), *errors)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=str
)
@pytest.mark.parametrize("epsilon", [0.1, 1e-6])
@pytest.mark.parametrize("signs", ["both", "positive"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_engine_equals_zennit(dtype, tolerance, epsilon, signs, biases, flat):
    """Maps and ledger equal those of zennit's composite, in either precision, with any setting."""
    model = randomised(dtype=dtype)
    if signs == "positive":
        with_positive_scales(model)
    settings = {"epsilon": epsilon, "biases": biases, "flat": flat}
    assert largest_error(model, 64, **settings) < tolerance


@pytest.mark.parametrize("block_config", [(1,), (3,), (1, 1), (1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize(("channels", "size_px"), [(1, 64), (3, 75)])
def test_engine_equals_zennit_on_other_shapes(block_config, channels, size_px):
    """Any number of blocks, grey or colour, even sides or odd ones, at which pools leave a rest."""
    normalisation = Normalisation((0.5,) * channels, (0.25,) * channels)
    network = Network(growth_rate=6, block_config=block_config)
    model = randomised(network, size_px, normalisation=normalisation)
    for settings in ({}, {"flat": False, "biases": False}):
        assert largest_error(model, size_px, **settings) < 1e-10


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)], ids=str
)
def test_engine_equals_zennit_on_densenet121(dtype, tolerance):
    """DenseNet121 with gammas of both signs and zero."""
    assert largest_error(randomised(Network(), dtype=dtype), 64) < tolerance


def test_engine_equals_zennit_on_densenet201():
    """The blocks of DenseNet201, narrow."""
    model = randomised(Network(architecture="densenet201", growth_rate=2), 32)
    assert largest_error(model, 32) < 1e-10


def test_ledger_balances_on_densenet169():
    """The blocks of DenseNet169, narrow: its logits, and all of them in the ledger."""
    model = randomised(Network(architecture="densenet169", growth_rate=8), 32)
    result = Explainer(model).attribute(images(32))
    parts = result.relevance_sum + result.bias_share + result.epsilon_share
    with torch.no_grad():
        assert relative_error(result.logits, model(images(32))) < 1e-12
    assert relative_error(parts, result.logits) < 1e-12


def test_many_targets_take_several_passes(monkeypatch):
    """Targets beyond the bound of memory give the same, in their order."""
    explainer = Explainer(randomised())
    expected = explainer.attribute(images(64), [2, 0, 1])
    monkeypatch.setattr(engine, "MAPS_AT_ONCE", 2)
    result = explainer.attribute(images(64), [2, 0, 1])
    for field, value in vars(expected).items():
        assert relative_error(getattr(result, field), value) < 1e-12, field


def test_zeroed_biases_absorb_nothing():
    """Without biases in the denominators the logit is relevance and epsilon share alone."""
    model = randomised(SMALL)
    result = Explainer(model, biases=False, epsilon=1e-6).attribute(images(64))
    assert not result.bias_share.any()
    assert relative_error(result.relevance_sum + result.epsilon_share, result.logits) < 1e-12
    assert Explainer(model).attribute(images(64)).bias_share.all()
