"""Checks of a batch of X-rays before it enters a network."""

import torch
from torch import Tensor

from cxrdist.errors import CxrdistError


def check_batch(images: object, size_px: int, device: torch.device | None = None) -> None:
    """Check that images are uint8 [B, 1, size_px, size_px], as a model expects them.

    Only type, shape and device are checked: reading values would wait for the GPU, and a trace of
    the network would depend on them. The type alone excludes a wrong range, since floats in 0..1,
    normalised floats and wider integers are not uint8. Without `device` the images may be on any.

    Raises:
        CxrdistError: the images are anything else; the message says how to convert them.
    """
    expected = f"expected uint8 [B, 1, {size_px}, {size_px}]"
    if not isinstance(images, Tensor):
        raise CxrdistError(
            f"images are a {type(images).__name__}: {expected} as a torch.Tensor; use "
            "torch.from_numpy(array), or model.predict, which takes arrays and files"
        )
    shape = list(images.shape)
    if images.dtype != torch.uint8:
        raise CxrdistError(
            f"images are {str(images.dtype).removeprefix('torch.')}: {expected}, grey values from "
            f"0 to 255; {_mend_values(images)}"
        )
    if images.ndim != 4 or shape[1] != 1:
        raise CxrdistError(f"images have the shape {shape}: {expected}; {_mend_shape(shape)}")
    if shape[2:] != [size_px, size_px]:
        raise CxrdistError(
            f"images are {shape[3]} x {shape[2]} px: {expected}; make them with "
            "cxrdist.read_image(file, model), which squares an X-ray as in training"
        )
    if shape[0] == 0:
        raise CxrdistError(f"images are an empty batch: {expected} with B at least 1; skip it")
    if device is not None and images.device != device:
        raise CxrdistError(
            f"images are on {images.device} and the model is on {device}; use "
            f"images.to({str(device)!r})"
        )


def _mend_values(images: Tensor) -> str:
    """Describe how to convert values of another type to grey values; reads the values."""
    if images.is_complex():
        return "they are complex, and grey values are real; use cxrdist.read_image"
    # Not every type has an aminmax of its own.
    least, most = (float(v) for v in images.float().aminmax()) if images.numel() else (0.0, 0.0)
    if least < 0 or most > 255:
        return (
            f"they range from {least:g} to {most:g}, so take the images before they were "
            "normalised, as cxrdist.read_image returns them"
        )
    if images.is_floating_point() and most <= 1:
        return "values in 0..1, as ToTensor gives, need (images * 255).round().to(torch.uint8)"
    return f"use images{'.round()' if images.is_floating_point() else ''}.to(torch.uint8)"


def _mend_shape(shape: list[int]) -> str:
    """Describe how to convert images of another shape to [B, 1, H, W]."""
    match shape:
        case [_, _]:
            return "one grey image needs images[None, None]"
        case [1, _, _]:
            return "one grey image needs its batch axis, images[None]"
        case [count, _, _]:
            return (
                f"{count} grey images need images.unsqueeze(1); for one colour image use the grey "
                "square that cxrdist.read_image returns"
            )
        case [_, 3 | 4, _, _]:
            return "the model makes its own channels; cxrdist.read_image reads colour as grey"
        case [_, _, _, 1]:
            return "the channel comes before the rows, images.permute(0, 3, 1, 2)"
    return "give a batch of grey squares, each as returned by cxrdist.read_image"
