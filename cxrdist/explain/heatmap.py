"""Draw relevance over the X-ray: red for the class, blue against it."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate1d
from torch import Tensor

from cxrdist.data.boxes import Box
from cxrdist.data.geometry import in_square
from cxrdist.errors import CxrdistError

RED = (225.0, 15.0, 25.0)
BLUE = (20.0, 70.0, 255.0)
"""Colours (R, G, B) in 0..255, chosen to be visible on both black and white."""

MAX_OPACITY = 0.85
"""Opacity of the colour at the limit of the scale; the X-ray always shows through."""

OUTLINE = (255, 210, 0)
"""Colour of outlines, boxes and masks, over all kinds of pictures."""

LEAST_PX = 300
"""Smallest width of a picture with outlines, so that their lines look thin."""

LIMIT_PERCENTILE = 99.0
"""Percentage of the pixels that the default colour scale does not clip."""


def overlay(
    image: NDArray[np.uint8],
    relevance: NDArray[np.floating] | Tensor,
    limit: float | None = None,
    *,
    fit: str | None = None,
) -> Image.Image:
    """Draw relevance over an X-ray on a colour scale symmetric around zero.

    The X-ray is grey; the opacity of the colour is proportional to the relevance, after smoothing.
    A map of zeros gives the plain X-ray.

    Args:
        image: uint8 [H, W], the square given to the network, or with ``fit`` its original.
        relevance: signed floats [H, W] of the square, such as ``attribution.relevance[0, 0]``.
        limit: relevance per pixel of the strongest colour, in units of the logit. Pictures with
            the same limit can be compared; if None, ``colour_limit(relevance)``.
        fit: how the square was made from the original: the model's ``fit``. With ``crop`` the
            original has no colours outside the centre, and with ``pad`` the map of the black bars
            is not shown; the colour scale is that of the whole square.

    Returns:
        An RGB picture of the image's size.

    Raises:
        CxrdistError: shapes differ, relevance is not finite, or the limit is not positive.
    """
    if isinstance(relevance, Tensor):
        relevance = relevance.detach().cpu().numpy()
    if image.ndim != 2 or relevance.ndim != 2 or (fit is None and image.shape != relevance.shape):
        raise CxrdistError(
            f"cannot draw relevance of shape {relevance.shape} over an image of shape "
            f"{image.shape}: expected the same [H, W] for both; for an original give fit=model.fit"
        )
    strength = _strength(relevance, limit)
    return _tint(image, strength if fit is None else _place(strength, image.shape, fit))


def enlarged(picture: Image.Image) -> tuple[Image.Image, int]:
    """Return a colour picture at least `LEAST_PX` wide, and the factor of its enlargement."""
    times = max(1, -(-LEAST_PX // picture.width))
    size = (picture.width * times, picture.height * times)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), times


def _strength(relevance: NDArray[np.floating], limit: float | None) -> NDArray[np.float64]:
    """Return smoothed relevance on the colour scale, -1 to 1, [H, W]."""
    if limit is None:
        limit = colour_limit(relevance)
    # Negated, so that NaN is refused, too.
    if not 0 < limit < np.inf:
        raise CxrdistError(f"limit: is {limit}, expected a positive number; leave it out")
    return np.clip(smooth(relevance) / limit, -1, 1)


def _place(strength: NDArray[np.float64], shape: tuple[int, ...], fit: str) -> NDArray[np.float32]:
    """Resample the strengths of a square to the shape [H, W] of its original; 0 outside."""
    height, width = shape
    frame = in_square(Box(0, 0, width, height), width, height, len(strength), fit)
    across, down = frame.width / width, frame.height / height
    # Pillow wants the map from the picture to the square, not the one that moves pixels.
    placed = Image.fromarray(strength.astype(np.float32)).transform(
        (width, height),
        Image.Transform.AFFINE,
        (across, 0, frame.x, 0, down, frame.y),
        Image.Resampling.BILINEAR,
        fillcolor=0,
    )
    return np.asarray(placed)


def _tint(image: NDArray[np.uint8], strength: NDArray[np.floating]) -> Image.Image:
    """Colour a grey image, uint8 [H, W], by strengths of -1 to 1, [H, W]."""
    picture = np.empty((*image.shape, 3), np.uint8)
    grey, opacity = image.astype(np.float64), MAX_OPACITY * np.abs(strength)
    for channel, (red, blue) in enumerate(zip(RED, BLUE, strict=True)):
        colour = np.where(strength > 0, red, blue)
        picture[..., channel] = np.rint(grey + opacity * (colour - grey))
    return Image.fromarray(picture)


def colour_limit(relevance: NDArray[np.floating]) -> float:
    """Return a limit of the colour scale that keeps a few extreme pixels from dimming the rest.

    Returns:
        The LIMIT_PERCENTILE of the smoothed map's absolute values; their maximum if the percentile
        is zero, and 1 if the map is zero everywhere.

    Raises:
        CxrdistError: relevance is not finite.
    """
    size = np.abs(smooth(relevance))
    return float(np.percentile(size, LIMIT_PERCENTILE)) or float(size.max()) or 1.0


def smooth(relevance: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return relevance [H, W] without the grid of the first layers' strides; for display only.

    The flat rule of a 7x7 convolution with stride 2 gives even and odd pixels different shares,
    and the max pool after it adds a grid of 4 px. The weights 1 2 2 2 1 along both axes (a mean
    of 2 and one of 4) remove both without a shift. ResNet18 and SqueezeNet have the same strides.
    The first convolution of AlexNet has stride 4: the 8 px grid of its max pool remains.

    The image is padded by repeating its border.

    Raises:
        CxrdistError: relevance is not finite.
    """
    if not np.isfinite(relevance).all():
        raise CxrdistError("cannot draw relevance that is not finite; check the model's weights")
    weights = np.array([1, 2, 2, 2, 1]) / 8
    smoothed: NDArray[np.float64] = relevance.astype(np.float64)
    for axis in (0, 1):
        smoothed = correlate1d(smoothed, weights, axis, mode="nearest")
    return smoothed
