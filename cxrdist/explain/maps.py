"""Files of relevance: an npz a sample, or WebDataset shards of them in half the space."""

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.shards import add_member
from cxrdist.run import atomic_file

BATCHES_A_SHARD = 16
"""A shard is what a killed run repeats at most, and what a rank takes at once."""

_DEFLATE_LEVEL = 1
"""Relevance is noise to a compressor: level 6 saves 1 % more and takes twice as long."""


class Map(NamedTuple):
    """What is kept of a sample."""

    key: str
    classes: list[str]
    relevance: NDArray[np.float32]
    """[K, H, W]."""
    ledger: NDArray[np.float64]
    """[K, 4]: logit, relevance sum, bias share, epsilon share."""


def encode(found: Map, *, half: bool) -> bytes:
    """Write a map as npz; the same map gives the same bytes.

    Args:
        found: the map.
        half: as float16 of maps divided by their largest absolute values, ``scale`` [K]; each value
            is exact to 2.5e-4 of its map's largest.

    Returns:
        An npz of ``relevance``, ``classes``, ``ledger`` and with ``half`` ``scale``.
    """
    arrays: dict[str, NDArray[Any]] = {"relevance": found.relevance}
    if half:
        largest = np.abs(found.relevance).max((1, 2))
        scale = np.where(largest > 0, largest, 1).astype(np.float32)
        arrays["relevance"] = (found.relevance / scale[:, None, None]).astype(np.float16)
        arrays["scale"] = scale
    arrays |= {"classes": np.array(found.classes), "ledger": found.ledger}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_DEFLATE_LEVEL) as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that bytes do not vary
            file.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, _DEFLATE_LEVEL)
    return buffer.getvalue()


def decode(key: str, data: bytes) -> Map:
    """Read what `encode` wrote."""
    with np.load(io.BytesIO(data)) as arrays:
        relevance = arrays["relevance"]
        if "scale" in arrays:
            relevance = relevance.astype(np.float32) * arrays["scale"][:, None, None]
        return Map(key, arrays["classes"].tolist(), relevance, arrays["ledger"])


def write_maps(place: Path, encoded: Sequence[tuple[str, bytes]]) -> None:
    """Write the maps of a unit: an npz each in a folder, or a shard (``place`` ends in .tar)."""
    if place.suffix != ".tar":
        for key, data in encoded:
            with atomic_file(place / f"{key}.npz") as partial:
                partial.write_bytes(data)
        return
    with (
        atomic_file(place) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, data in encoded:
            add_member(tar, f"{key}.npz", data)


def read_ledgers(place: Path, keys: Sequence[str]) -> list[NDArray[np.float64]] | None:
    """Read the ledgers of a unit back, [K, 4] each; None unless all of its maps are there."""
    if place.suffix == ".tar":
        if not place.is_file():
            return None
        with tarfile.open(place, "r:") as tar:
            files = [tar.extractfile(f"{key}.npz") for key in keys]
            return [_ledger(io.BytesIO(file.read())) for file in files if file is not None]
    paths = [place / f"{key}.npz" for key in keys]
    return [_ledger(path) for path in paths] if all(path.is_file() for path in paths) else None


def _ledger(npz: Path | io.BytesIO) -> NDArray[np.float64]:
    with np.load(npz) as arrays:
        ledger: NDArray[np.float64] = arrays["ledger"]
    return ledger
