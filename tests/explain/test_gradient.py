"""The differentiable map, held against the engine and against finite differences."""

import pytest
import torch
from test_canonise import SMALL, images, randomised, relative_error

from cxrdist.explain.gradient import relevance
from cxrdist.explain.relevance import Explainer


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
