"""Dropout by the images of a step."""

import pytest
import torch
from torch.nn.functional import dropout

from cxrdist.model.dropout import Dropout


def test_an_image_is_dropped_alike_in_every_slice_of_its_step():
    """The factors of rows 2 and 3 of six are those that PyTorch draws for all six, 0 or 4/3."""
    features = torch.rand(6, 1000) + 1
    layer = Dropout(0.25)
    torch.manual_seed(1)
    expected = dropout(features, 0.25)
    torch.manual_seed(1)
    assert torch.equal(layer(features), expected)
    layer.rows, layer.num_images = torch.tensor([2, 3]), 6
    torch.manual_seed(1)
    dropped = layer(features[2:4])
    assert torch.equal(dropped, expected[2:4])
    factors = dropped / features[2:4]
    assert torch.allclose(factors, torch.where(factors > 0, 4 / 3, 0.0))
    assert abs(float((factors == 0).float().mean()) - 0.25) < 0.04  # four standard deviations
    assert torch.equal(layer.eval()(features[2:4]), features[2:4])


@pytest.mark.parametrize("rate", [0.1, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_half_precision_are_scaled_up_exactly(rate, dtype):
    """Those kept by 1 / (1 - rate) on average, which is up to 0.2 % off if bfloat16 holds it."""
    features = (torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    torch.manual_seed(0)
    dropped = Dropout(rate)(features)
    assert dropped.dtype == dtype
    kept = dropped != 0
    factor = (dropped[kept].double() / features[kept].double()).mean()
    assert float(factor) * (1 - rate) == pytest.approx(1, abs=1e-4)
    assert abs(float(kept.double().mean()) - (1 - rate)) < 0.002  # four standard deviations
