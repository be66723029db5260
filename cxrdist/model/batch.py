"""A batch of X-rays as it must be before a network takes it."""

import torch
from torch import Tensor

from cxrdist.errors import CxrdistError


def check_batch(images: object, size_px: int, device: torch.device | None = None) -> None:
    """Make sure that images are what a model was trained on: uint8 [B, 1, size_px, size_px].

    Only type, shape and device are looked at: values would have to be fetched from a GPU, and a
    trace of the network would depend on them. The type alone already excludes a wrong range, since
    floats in 0..1, normalised floats and wider integers are all no uint8.

    Args:
        images: what the caller gave.
        size_px: side of the squares.
        device: of the model; None if the images may be on any.

    Raises:
        CxrdistError: they are something else; the line says how to make them right.
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
    """Say how values of another type become grey values; only here they are looked at."""
    least, most = (float(v) for v in images.aminmax()) if images.numel() else (0.0, 0.0)
    if least < 0 or most > 255:
        return (
            f"they range from {least:g} to {most:g}, so take the images before they were "
            "normalised, as cxrdist.read_image gives them"
        )
    if images.is_floating_point() and most <= 1:
        return "values in 0..1, as ToTensor gives, need (images * 255).round().to(torch.uint8)"
    return (
        "use images.round().to(torch.uint8)"
        if images.is_floating_point()
        else ("use images.to(torch.uint8)")
    )


def _mend_shape(shape: list[int]) -> str:
    """Say how images of another shape get their axes."""
    match shape:
        case [_, _]:
            return "one grey image needs images[None, None]"
        case [1, _, _]:
            return "one grey image needs its batch axis, images[None]"
        case [count, _, _]:
            return (
                f"{count} grey images need images.unsqueeze(1); of one colour image take the grey "
                "square that cxrdist.read_image gives"
            )
        case [_, 3 | 4, _, _]:
            return "the model makes its own channels; cxrdist.read_image reads colour as grey"
        case [_, _, _, 1]:
            return "the channel comes before the rows, images.permute(0, 3, 1, 2)"
    return "give a batch of grey squares, as cxrdist.read_image makes each of them"
