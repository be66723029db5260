"""Read X-rays for a model, from files (prepared as in training) and from arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import Fit
from cxrdist.data.depth import DEPTHS
from cxrdist.data.images import decode
from cxrdist.data.index import MOST_SIDE_PX
from cxrdist.data.inputs import Input, Preparation, prepare, read_original, unlike_source
from cxrdist.data.kinds import FORMATS
from cxrdist.errors import CxrdistError

if TYPE_CHECKING:  # densenet imports this module
    from cxrdist.model.densenet import Classifier

ImageSource = str | Path | NDArray[np.uint8]


def read_image(
    file: str | Path,
    model: "Classifier | None" = None,
    *,
    size_px: int | None = None,
    fit: Fit | None = None,
    depth: int | None = None,
) -> NDArray[np.uint8]:
    """Read an X-ray as grey values: PNG, JPEG, DICOM or any other format of `cxrdist pack`.

    Args:
        file: the image; its format is recognised by its content.
        model: if given, return the square that this model takes, the same bytes as in its shards.
        size_px: without a model, side of the square; None for the whole image, at most
            2048 px wide and high.
        fit: how the image becomes square: ``crop`` the centre, ``pad`` with black or ``stretch``.
            If None, the model's; without a model, ``crop``.
        depth: bits that hold the values of an image of more than 8 bits that does not declare its
            depth, 8 to 16. If None, the model's; without a model, the bits that the image uses.

    Returns:
        uint8 [S, S] or, without model and size, [H, W].

    Raises:
        CxrdistError: the file is not a readable X-ray, the settings exclude each other or are out
            of range, or the model needs lung masks.
    """
    item = _input(file)
    if depth is not None and not DEPTHS[0] <= depth <= DEPTHS[-1]:
        raise CxrdistError(f"depth is {depth}: expected {DEPTHS[0]} to {DEPTHS[-1]} bits")
    if model is not None:
        if size_px is not None:
            raise CxrdistError(
                f"size_px is {size_px}: the model determines the size; give only one of the two"
            )
        how = model.preparation()
        # Copied, because torch.from_numpy warns about the read-only arrays of Pillow.
        return prepare(
            item, replace(how, fit=fit or how.fit, depth=depth or how.depth)
        ).pixels.copy()
    if size_px is None:
        how = Preparation(MOST_SIDE_PX, fit or "crop", depth, cover="black", finds_text=False)
        return read_original(item, how).copy()
    if not 1 <= size_px <= MOST_SIDE_PX:
        raise CxrdistError(f"size_px is {size_px}: expected 1 to {MOST_SIDE_PX}")
    return decode(item.file, size_px, fit or "crop", depth=depth).pixels.copy()


def read_squares(
    images: ImageSource | Sequence[ImageSource], model: "Classifier"
) -> NDArray[np.uint8]:
    """Convert files and arrays to the squares that a model takes.

    Files that do not declare their bit depth share one depth, as in `cxrdist predict`.

    Args:
        images: files, and uint8 [S, S] of the model's size, in any order; or a single one.
        model: takes the squares.

    Returns:
        uint8 [N, S, S].

    Raises:
        CxrdistError: there are no images, a file is not a readable X-ray, or an array has another
            type or shape.
    """
    if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim == 2):
        images = [images]
    sources: list[ImageSource] = [*images]
    if not sources:
        raise CxrdistError("images is empty: expected at least one file or array")
    files = {
        i: _input(source) for i, source in enumerate(sources) if isinstance(source, str | Path)
    }
    squares = _read_files(files, model.preparation()) if files else {}
    for number, source in enumerate(sources):
        if number not in files:
            squares[number] = _checked_square(source, number, model.image_size_px)
    return np.stack([squares[number] for number in range(len(sources))])


def _read_files(files: Mapping[int, Input], how: Preparation) -> dict[int, NDArray[np.uint8]]:
    """Read image files; those that differ from the common bit depth are read twice."""
    read = {number: prepare(item, how) for number, item in files.items()}
    depth, again = unlike_source({number: square.used_depth for number, square in read.items()})
    if how.depth is None:
        # The first reading has found the text: its boxes are used again.
        known = replace(how, depth=depth, finds_text=False)
        for number in again:
            item = replace(files[number], boxes=read[number].boxes)
            read[number] = prepare(item, known)
    return {number: square.pixels for number, square in read.items()}


def _input(file: str | Path) -> Input:
    path = Path(file)
    if not path.is_file():
        raise CxrdistError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; name an image, "
            f"{', '.join(FORMATS)} or DICOM, or list several"
        )
    return Input(path, path.name)


def _checked_square(image: object, number: int, size_px: int) -> NDArray[np.uint8]:
    """Return an array if it is a square of the model; else raise CxrdistError with the fix."""
    expected = f"expected the path of a file or uint8 [{size_px}, {size_px}]"
    if not isinstance(image, np.ndarray):
        raise CxrdistError(
            f"image {number} is a {type(image).__name__}: {expected} as a NumPy array; for a batch "
            "as a tensor use model(batch), which returns the logits"
        )
    if image.dtype != np.uint8 or image.shape != (size_px, size_px):
        raise CxrdistError(
            f"image {number} is {image.dtype} {list(image.shape)}: {expected}, grey values from 0 "
            "to 255, as returned by cxrdist.read_image(file, model)"
        )
    return image
