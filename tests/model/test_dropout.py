"""Dropout by the images of a step."""

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
