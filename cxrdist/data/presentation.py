"""Presentation: stored values of a DICOM -> grey levels, by the arithmetic of the standard.

Modality LUT or rescale (PS3.3, C.11.1), then the first VOI LUT or window that can be used (C.11.2),
then the inversion of MONOCHROME1 (C.7.6.3.1.2) or of the Presentation LUT Shape (C.11.6), then
padding in black (C.7.5.1.1.2).

Without a VOI LUT or window the full range of the stored bits is kept: stretching the range of each
image would make its brightness depend on a collimator or marker. 16 stored of 16 allocated bits say
nothing about the detector; then the depth of the source is used, as for a 16-bit PNG
(`cxrdist.data.depth`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from cxrdist.data.depth import HOT_PIXELS, count_words, used_depth, white_of
from cxrdist.data.elements import RefusedError, items, number, numbers, octets, shorts, text

OVERLAYS = range(0x6000, 0x6020, 2)  # groups of the repeating overlay planes (PS3.3, C.9.2)


@dataclass(frozen=True)
class Cells:
    """Pixel cells: words with one value each (PS3.5, 8.1.1)."""

    words: NDArray[Any]
    """uint8 or uint16 [H, W]."""
    bits: int
    """Bits of a value."""
    shift: int
    """Bits of a word below its value."""
    signed: bool
    """Whether values are two's complement."""

    @property
    def size(self) -> int:
        """Bits of a word."""
        return 8 * self.words.itemsize


class Lut(NamedTuple):
    """A look-up table."""

    first: int
    """Input of the first entry."""
    entries: NDArray[np.int64]

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Look up values; those below the first input get the first entry, those above the last."""
        position = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[position.astype(np.int64)].astype(np.float64)


def present(
    dataset: Dataset, cells: Cells, depth: int | None
) -> tuple[NDArray[np.uint8], int | None]:
    """Convert pixel cells to grey levels for display, as the tags of the data set say.

    ``depth`` is the bit depth of the source, for an image that does not declare one; None stands
    for the bits that the image uses.

    Returns:
        Grey levels, uint8 [H, W], and the bits that the image uses if it does not declare a depth.

    Raises:
        RefusedError: a required tag cannot be used.
    """
    # The arithmetic is done once per possible word, at most 65536, and looked up for each pixel.
    words = np.arange(1 << cells.size)
    if _has_overlay(dataset):
        words &= white_of(cells.bits) << cells.shift
    if cells.signed:
        words = _twos_complement(words, cells.size)  # so that the shift repeats the sign
    values = _interpret(words >> cells.shift & white_of(cells.size), cells)
    is_padding = _is_padding(dataset, values, cells)
    low = -(1 << cells.bits >> 1) if cells.signed else 0
    # Values above the stored bits stay bright; without their upper bits they would be dark.
    stored = values.clip(low, low + white_of(cells.bits))
    levels, used = _as_seen(dataset, stored, cells, is_padding, depth)
    if not np.isfinite(levels).all():
        raise RefusedError("its rescale or window is not a number")
    inverse = text(dataset, "PresentationLUTShape") == "INVERSE"
    # One inversion for both: a DX image of MONOCHROME1 has the shape INVERSE (C.8.11.3).
    if inverse or text(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        levels = 1 - levels.clip(0, 1)
    levels[is_padding] = 0
    table = np.rint(255 * levels.clip(0, 1)).astype(np.uint8)
    return table[cells.words], used


def _interpret(words: NDArray[np.int64], cells: Cells) -> NDArray[np.int64]:
    """Return the values of words, negative if values are signed and their highest bit is set.

    The bits above a value must repeat its sign or be empty; otherwise the whole word is the value.
    """
    if not cells.signed:
        return words
    above = words >> cells.bits
    full = white_of(max(0, cells.size - cells.bits))
    return np.where(
        (above == 0) | (above == full),
        _twos_complement(words & white_of(cells.bits), cells.bits),
        _twos_complement(words, cells.size),
    )


def _twos_complement(words: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    return words - (words >> (bits - 1) << bits)


def _has_overlay(dataset: Dataset) -> bool:
    """Return whether an overlay plane is stored in the bits around the values (PS3.5, 8.1.2)."""
    return any(any(shorts(dataset, group << 16 | 0x0102)) for group in OVERLAYS)


def _is_padding(dataset: Dataset, values: NDArray[np.int64], cells: Cells) -> NDArray[np.bool_]:
    """Return which values are padding: PixelPaddingValue, or up to PixelPaddingRangeLimit.

    Pixel Representation decides whether the two are signed: their own VR is often wrong.
    """
    found = [shorts(dataset, name)[:1] for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = _interpret(np.concatenate(found) & white_of(cells.size), cells)
    if not len(found[0]):
        return np.zeros(len(values), np.bool_)
    # For MONOCHROME1 the limit is below the value, otherwise above it (C.7.5.1.1.2).
    is_padding: NDArray[np.bool_] = (values >= ends.min()) & (values <= ends.max())
    return is_padding


def _as_seen(
    dataset: Dataset,
    stored: NDArray[np.int64],
    cells: Cells,
    is_padding: NDArray[np.bool_],
    depth: int | None,
) -> tuple[NDArray[np.float64], int | None]:
    """Return the brightness of each word, 0..1 within the window, and the used depth, if any."""
    modality = _first_lut(dataset, "ModalityLUTSequence", cells.signed)
    slope = number(dataset, "RescaleSlope", 1)
    if modality is None and slope == 0:
        raise RefusedError("its RescaleSlope is 0")
    values = stored.astype(np.float64)
    intercept = number(dataset, "RescaleIntercept", 0)
    values = modality(values) if modality is not None else values * slope + intercept
    # Its input is signed also where only the rescale makes values negative.
    voi = _first_lut(dataset, "VOILUTSequence", bool(values.min() < 0))
    if voi is not None:
        # The largest entry is white: many tables declare 16 bits and use 12.
        return voi(values) / max(1, voi.entries.max()), None
    windowed = _windowed(dataset, values)
    if windowed is not None:
        return windowed, None
    if modality is not None:
        return values / max(1, modality.entries.max()), None
    low, bits, used = int(stored.min()), cells.bits, None
    if bits == 16:
        low, used = _used_range(stored, np.where(is_padding, 0, count_words(cells.words)))
        bits = depth or used
        low = -(1 << bits >> 1) if low < 0 else 0
    levels = ((stored - low) / white_of(bits)).clip(0, 1)
    return (levels if slope > 0 else 1 - levels), used


def _used_range(values: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[int, int]:
    """Return -1 if more than the hot pixels are negative, else 0; and the bits of the values."""
    if counts[values < 0].sum() > HOT_PIXELS * counts.sum():
        # A signed number needs as many bits as an unsigned one of twice its size.
        return -1, used_depth(2 * np.where(values < 0, -values - 1, values) + 1, counts)
    return 0, used_depth(values, counts)


def _first_lut(dataset: Dataset, keyword: str, signed: bool) -> Lut | None:
    """Return the first LUT of a sequence that is not empty (PS3.3, C.11.1.1 and C.11.2.1.1)."""
    for item in items(dataset, keyword):
        descriptor = numbers(item, "LUTDescriptor")
        if len(descriptor) == 3 and octets(item, "LUTData")[0]:
            return _lut(item, [int(value) for value in descriptor], signed)
    return None


def _lut(item: Dataset, descriptor: list[int], signed: bool) -> Lut:
    """Read a LUT; its first input is signed if the values are. An 8-bit entry may take a word."""
    # 0 stands for 65536 entries (C.11.1.1.1), and more than 32767 are negative where the VR is SS.
    count, first = descriptor[0] & 0xFFFF or 1 << 16, descriptor[1]
    if signed and first >= 1 << 15:
        first -= 1 << 16
    data, order = octets(item, "LUTData")
    if len(data) >= 2 * count:
        entries = np.frombuffer(data, f"{order}u2", count)
    elif len(data) >= count:
        entries = np.frombuffer(data, np.uint8, count)
    else:
        raise RefusedError("its look-up table has fewer entries than it declares")
    return Lut(first, entries.astype(np.int64))


def _windowed(dataset: Dataset, values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the first window that can be used; None without any."""
    centers, widths = numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth")
    function = text(dataset, "VOILUTFunction").upper() or "LINEAR"
    if not centers or not widths:
        return None
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise RefusedError("its window has an unknown function")
    for center, width in zip(centers, widths, strict=False):
        # C.11.2.1.2 and C.11.2.1.3: at least 1 for LINEAR, more than 0 for the others.
        is_wide = width >= 1 if function == "LINEAR" else width > 0
        if is_wide and np.isfinite([center, width]).all():
            return _window(values, center, width, function)
    raise RefusedError("its window has no width, or is not a number")


def _window(
    values: NDArray[np.float64], center: float, width: float, function: str
) -> NDArray[np.float64]:
    """Apply a window (PS3.3, sections C.11.2.1.2 and C.11.2.1.3) with outputs 0..1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return (values - center) / width + 0.5
    if width == 1:  # a step; the formula would divide 0 by 0
        return (values > center - 0.5).astype(np.float64)
    return (values - (center - 0.5)) / (width - 1) + 0.5
