"""Duplicates: images that are in a data set more than once, identical or altered.

Altered copies are found in two steps. A perceptual hash selects candidate pairs; then their fine
structure is correlated. Two similar X-rays of one patient have similar hashes, but their fine
structure does not match; that of a copy does, even after re-encoding, scaling, brightening and
cropping.

Measured on the 917 and 1,293 X-rays of covid3 and nih14 at 224 px: copies with 3 % cut from each
side, scaled by 0.7, brightened by 10 % and stored as JPEG 60 have a hash that differs from that of
the original's inside in at most 16 of 256 bits, and correlate at least 0.95; different X-rays, also
those of one patient, correlate at most 0.63.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cxrdist.data.fingerprint import HASH_SIDE, INNER, Fingerprint
from cxrdist.terminal import progress

MOST_BITS = 56  # differing bits of 256; 5 of 2.4 million pairs of different X-rays are that close
SAME = 0.85  # correlation: copies have at least 0.95, different X-rays at most 0.63, phantoms 0.81
SIDE_PX = 128  # side of the images that are correlated
SHIFT_PX = 8  # largest shift at SIDE_PX: a sixteenth of the side
BLUR_PX = 2.0  # removes brightness and the outline of the chest, which are alike in all X-rays
ZOOMS = np.linspace(1, INNER, 5)[1:].round(3)  # shares of an image that a cropped copy may show
KEPT_IMAGES = 128  # images with cached views, 0.7 MB each; making them costs ten comparisons
FLAT = 1.0  # standard deviation in grey levels; hashes of flatter squares are noise
QUERIES = 512  # per search, which bounds the size of its result
Pixels = Callable[[int], NDArray[np.uint8]]


class Near(NamedTuple):
    """Two images, by number and ascending, of which one is an altered copy of the other."""

    first: int
    second: int
    bits: int
    """Bits in which their hashes differ, of 256."""
    correlation: float
    """Correlation of their fine structure, -1..1."""


class View(NamedTuple):
    """Fine structure of an X-ray, or of the centre of one, prepared for `compare`."""

    spectrum: NDArray[np.complex64]
    """Spectrum of the whole, complex64 [SIDE_PX, SIDE_PX // 2 + 1]."""
    energies: NDArray[np.float64]
    """Energy under the inside at each shift, float64 [2 SHIFT_PX + 1, 2 SHIFT_PX + 1]."""
    inside_spectrum: NDArray[np.complex64]
    """Spectrum of the inside (without a margin of SHIFT_PX), conjugated."""
    inside_energy: np.float32


@dataclass(frozen=True)
class Duplicates:
    """All duplicates of a data set, by the numbers of the images."""

    exact: list[tuple[int, int]]
    """Pairs with the same pixels; each of several equal images is paired with the first."""
    near: list[Near]
    """Altered copies, ascending; only the first of equal images is compared."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs, exact and near."""
        return [*self.exact, *(pair[:2] for pair in self.near)]


def find_duplicates(fingerprints: Sequence[Fingerprint], pixels: Pixels) -> Duplicates:
    """Find equal images and altered copies; of flat squares only equal ones.

    ``pixels`` returns the square of an image by its number, uint8 [S, S]; it is called for
    candidates only.
    """
    first: dict[str, int] = {}
    numbers = [first.setdefault(f.sha256, i) for i, f in enumerate(fingerprints)]
    exact = [(same, i) for i, same in enumerate(numbers) if same != i]
    distinct = np.array(
        [i for i in first.values() if fingerprints[i].statistics["spread"] >= FLAT], np.int64
    )
    hashes, inner = (_stack(fingerprints, distinct, name) for name in ("phash", "inner_phash"))
    candidates = find_candidates(hashes, inner)
    views_of = lru_cache(KEPT_IMAGES)(lambda number: views(pixels(number)))
    near = []
    with progress(len(candidates), "comparing", "pairs", show=len(candidates) > 1000) as bar:
        for one, other in _in_tiles(candidates, len(distinct)):
            pair = int(distinct[one]), int(distinct[other])
            correlation = compare(views_of(pair[0]), views_of(pair[1]))
            if correlation >= SAME:
                near.append(Near(*pair, candidates[one, other], round(correlation, 3)))
            bar.update()
    return Duplicates(exact, sorted(near))


def _in_tiles(pairs: Collection[tuple[int, int]], num_images: int) -> list[tuple[int, int]]:
    """Order pairs of images so that few views are made again because others replaced them.

    In a data set that was augmented before it came here, hundreds of images may be copies of one.
    Its pairs are ordered like a matrix that is divided into tiles.
    """
    groups = np.array(join_groups(range(num_images), list(pairs)))
    position = np.argsort(np.argsort(groups, kind="stable"))
    # The images of a row of tiles stay cached while those of the tile before and of this one pass.
    tile = position // (KEPT_IMAGES // 3)
    return sorted(pairs, key=lambda pair: (tile[pair[0]], tile[pair[1]], pair))


def _stack(
    fingerprints: Sequence[Fingerprint], numbers: NDArray[np.int64], name: str
) -> NDArray[np.uint8]:
    data = b"".join(getattr(fingerprints[number], name) for number in numbers)
    return np.frombuffer(data, np.uint8).reshape(-1, HASH_SIDE**2 // 8)


def find_candidates(
    hashes: NDArray[np.uint8], inner: NDArray[np.uint8]
) -> dict[tuple[int, int], int]:
    """Find pairs that may be copies: similar images, or one similar to the inside of the other.

    ``hashes`` are those of whole images and ``inner`` those of their insides, uint8 [N, 32] each.
    The result is the number of differing bits of each pair (i, j), i < j.
    """
    index = faiss.IndexBinaryFlat(8 * hashes.shape[1])
    candidates: dict[tuple[int, int], int] = {}

    def keep(queries: NDArray[np.uint8], start: int = 0) -> None:
        for query, other, bits in _within(index, queries):
            if start + query != other:
                pair = min(start + query, other), max(start + query, other)
                candidates[pair] = min(bits, candidates.get(pair, bits))

    for start in range(0, len(hashes), QUERIES):
        block = hashes[start : start + QUERIES]
        index.add(block)  # later blocks search this one: half the comparisons of a full index
        keep(block, start)
    keep(inner)
    return candidates


def find_candidates_between(
    one: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    other: tuple[NDArray[np.uint8], NDArray[np.uint8]],
) -> dict[tuple[int, int], int]:
    """Find pairs across two sets that may be copies, as `find_candidates` does in one set.

    Each set has hashes of whole images and of their insides, uint8 [N, 32] and [M, 32]. The hashes
    of a pair differ in at most `MOST_BITS`.
    """
    candidates: dict[tuple[int, int], int] = {}
    for queries, indexed in ((one[0], other[0]), (one[1], other[0]), (one[0], other[1])):
        index = faiss.IndexBinaryFlat(8 * indexed.shape[1])
        index.add(indexed)
        for query, number, bits in _within(index, queries):
            candidates[query, number] = min(bits, candidates.get((query, number), bits))
    return candidates


def _within(
    index: faiss.IndexBinaryFlat, queries: NDArray[np.uint8]
) -> Iterator[tuple[int, int, int]]:
    """Yield for each match the number of the query, that of the image, and the differing bits."""
    for start in range(0, len(queries), QUERIES):
        # faiss takes the radius as exclusive.
        limits, bits, others = index.range_search(queries[start : start + QUERIES], MOST_BITS + 1)
        counts = np.asarray(limits[1:] - limits[:-1], np.int64)
        numbers = np.repeat(np.arange(start, start + len(counts)), counts)
        yield from zip(numbers.tolist(), others.tolist(), bits.astype(int).tolist(), strict=True)


def compare(one: Sequence[View], other: Sequence[View]) -> float:
    """Return the correlation of two X-rays' fine structure at the best alignment, -1..1.

    It is the best over shifts up to a sixteenth of the side and zooms of either image by up to 6 %;
    0 where an image has no structure.
    """
    best = _correlate(one[0], other[0])
    for i in range(1, len(one)):
        best = max(best, _correlate(one[i], other[0]), _correlate(other[i], one[0]))
    return best


def views(pixels: NDArray[np.uint8], blur_px: float = BLUR_PX) -> list[View]:
    """Return the fine structure of a square, uint8 [S, S], and of its centres, one per zoom.

    Variations slower than ``blur_px``, at `SIDE_PX`, are removed.
    """
    return [_view(_detail(pixels, zoom, blur_px)) for zoom in (1.0, *ZOOMS)]


def _detail(pixels: NDArray[np.uint8], zoom: float, blur_px: float) -> NDArray[np.float32]:
    """Return the fine structure of a square's centre at `SIDE_PX`, float32 [SIDE_PX, SIDE_PX]."""
    side = len(pixels)
    cut = (1 - zoom) / 2 * side
    image = Image.fromarray(pixels).resize(
        (SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, (cut, cut, side - cut, side - cut)
    )
    values = np.asarray(image, np.float32)
    return values - gaussian_filter(values, blur_px)


def _view(detail: NDArray[np.float32]) -> View:
    inside = detail[SHIFT_PX:-SHIFT_PX, SHIFT_PX:-SHIFT_PX]
    inside = inside - inside.mean()
    sums, squares = (_window_sums(values, len(inside)) for values in (detail, detail**2))
    return View(
        fft.rfft2(detail),
        squares - sums**2 / inside.size,
        np.conj(fft.rfft2(inside, detail.shape)),
        (inside**2).sum(),
    )


def _correlate(image: View, other: View) -> float:
    """Return the best normalised cross-correlation of the inside of `other` with `image`.

    It equals `skimage.feature.match_template` (Lewis 1995, Fast Normalized Cross-Correlation) but
    computes only shifts of up to `SHIFT_PX`.
    """
    num_shifts = 2 * SHIFT_PX + 1
    # At these shifts the inside does not leave the image, so nothing wraps around its edges.
    products = fft.irfft2(image.spectrum * other.inside_spectrum, (SIDE_PX, SIDE_PX))
    energy = image.energies * other.inside_energy  # 0 where there is no structure
    return float((products[:num_shifts, :num_shifts] / np.sqrt(np.maximum(energy, 1e-6))).max())


def _window_sums(values: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """Return the sums of all windows of that side, from a summed-area table."""
    table = np.pad(values.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))
    return table[side:, side:] - table[:-side, side:] - table[side:, :-side] + table[:-side, :-side]


def join_groups(groups: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Merge groups that share an image.

    ``groups`` has a number per image, such as that of its patient; ``pairs`` are of images that are
    the same. The result has a number per image, equal within a merged group.
    """
    first: dict[int, int] = {}
    edges = [(first.setdefault(group, i), i) for i, group in enumerate(groups)]
    rows, columns = np.array([*edges, *pairs], dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(edges), len(edges)))
    joined: list[int] = connected_components(graph, directed=False)[1].tolist()
    return joined
