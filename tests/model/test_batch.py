"""The public face of a model: what is not a batch of its X-rays is refused with the mend."""

import pytest
import torch
from support import Dispatched

from cxrdist.config import Network
from cxrdist.errors import CxrdistError
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier

SIZE_PX = 32
GREY = torch.arange(2 * SIZE_PX**2).remainder(256).to(torch.uint8).reshape(2, 1, SIZE_PX, SIZE_PX)
WRONG = {
    "three X-rays without channel": (
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        r"shape \[3, 32, 32\].*images\.unsqueeze\(1\).*colour",
    ),
    "one without batch": (GREY[0], r"shape \[1, 32, 32\].*images\[None\]$"),
    "one square": (GREY[0, 0], r"shape \[32, 32\].*images\[None, None\]$"),
    "colour": (GREY.expand(2, 3, 32, 32), r"shape \[2, 3, 32, 32\].*colour as grey"),
    "channel last": (GREY.permute(0, 2, 3, 1), r"images\.permute\(0, 3, 1, 2\)"),
    "five axes": (GREY[None], r"shape \[1, 2, 1, 32, 32\].*batch of grey squares"),
    "ToTensor": (
        GREY / 255,
        r"float32.*ToTensor.*\(images \* 255\)\.round",
    ),
    "floats": (GREY.float(), r"float32.*use images\.round\(\)\.to\(torch\.uint8\)"),
    "normalised": (GREY / 128.0 - 1, r"range from -1 to .*before they were normalised"),
    "16 bits": (GREY.long() * 257, r"int64.*range from 0 to 65535"),
    "16 bits of torchvision": (
        (GREY.int() * 257).to(torch.uint16),
        r"uint16.*range from 0 to 65535",
    ),
    "8-bit floats": (GREY.float().to(torch.float8_e5m2), r"float8_e5m2: expected uint8"),
    "complex": (GREY.to(torch.complex64), r"complex64.*grey values are real"),
    "int64": (GREY.long(), r"int64.*use images\.to\(torch\.uint8\)"),
    "bool": (GREY > 5, r"images are bool: expected uint8"),
    "other size": (GREY[..., :20], r"20 x 32 px.*read_image\(file, model\)"),
    "empty batch": (GREY[:0], r"empty batch.*at least 1"),
    "NumPy": (GREY.numpy(), r"ndarray.*torch\.from_numpy\(array\).*model\.predict"),
    "a list": ([GREY[0]], r"images are a list"),
}


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Network(growth_rate=4, block_config=(1, 1)), ["a", "b"], SIZE_PX).eval()


@pytest.mark.parametrize(("images", "mend"), WRONG.values(), ids=WRONG)
def test_wrong_images_are_refused_in_one_line(model, images, mend):
    """By the model and by its explainer alike; the line says what to do."""
    for use in (model, Explainer(model).attribute):
        with pytest.raises(CxrdistError, match=mend) as raised:
            use(images)
        assert "expected uint8 [B, 1, 32, 32]" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_the_mends_give_the_right_batch(model):
    """Each mend that is an expression makes the same logits as the batch that it came from."""
    expected = model(GREY)
    assert torch.equal(model((GREY / 255 * 255).round().to(torch.uint8)), expected)
    assert torch.equal(model(GREY.squeeze(1).unsqueeze(1)), expected)
    assert torch.equal(model(GREY.permute(0, 2, 3, 1).permute(0, 3, 1, 2)), expected)
    assert torch.equal(model(GREY[0][None]), model(GREY[:1]))
    assert torch.equal(model(torch.from_numpy(GREY.numpy())), expected)


def test_images_on_another_device_are_refused(model):
    """The line names both devices; an explainer moves images itself."""
    with pytest.raises(CxrdistError, match=r"on meta and the model is on cpu; use .*\('cpu'\)"):
        model(GREY.to("meta"))


def test_the_check_is_free(model):
    """No operation reaches the device beside those of the inner path."""
    with torch.no_grad(), Dispatched() as outer:
        model(GREY)
    with torch.no_grad(), Dispatched() as inner:
        model.logits(GREY)
    assert outer.operations == inner.operations
