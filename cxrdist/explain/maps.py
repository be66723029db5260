"""Files of relevance: an npz a sample, or WebDataset shards of them in half the space."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.shards import add_member
from cxrdist.errors import CxrdistError
from cxrdist.run import atomic_file, open_regular

BATCHES_A_SHARD = 16
"""A shard is what a killed run repeats at most, and what a rank takes at once."""

_DEFLATE_LEVEL = 1
"""Relevance is noise to a compressor: level 6 saves 1 % more and takes twice as long."""


_MOST_HEADER_BYTES = 1000
# What zipfile, tarfile, zlib and numpy raise on damaged content.
_DAMAGE = (
    *(ValueError, LookupError, EOFError, NotImplementedError, RuntimeError, SyntaxError, TypeError),
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error),
)


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


def read_ledgers(
    place: Path, keys: Sequence[str], num_maps: int
) -> list[NDArray[np.float64]] | None:
    """Read the ledgers of a unit back, [K, 4] each; None unless all of its maps are whole.

    Args:
        place: of the unit, as in `write_maps`.
        keys: of its samples.
        num_maps: K.

    Raises:
        CxrdistError: a link or another special file has the name of a map.
    """
    try:
        if place.suffix != ".tar":
            return [_ledger_of(place / f"{key}.npz", num_maps) for key in keys]
        with (
            open_regular(place, os.O_RDONLY) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            members = [tar.extractfile(f"{key}.npz") for key in keys]
            whole = [_ledger(member, num_maps) for member in members if member]
            return whole if len(whole) == len(keys) else None
    except CxrdistError:
        raise
    except (*_DAMAGE, OSError):
        return None  # missing or damaged: the unit is made anew


def _ledger_of(path: Path, num_maps: int) -> NDArray[np.float64]:
    with open_regular(path, os.O_RDONLY) as file:
        return _ledger(file, num_maps)


def _ledger(npz: IO[bytes], num_maps: int) -> NDArray[np.float64]:
    """Read the ledger of a map, if it has the size that it must have.

    Raises:
        ValueError, and what `zipfile` raises: it has not.
    """
    with zipfile.ZipFile(npz) as file:
        if file.getinfo("ledger.npy").file_size > _MOST_HEADER_BYTES + num_maps * 4 * 8:
            raise ValueError("the ledger is too large")
        array = io.BytesIO(file.read("ledger.npy"))
    if np.lib.format.read_magic(array) != (1, 0):
        raise ValueError("the ledger is of another version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(array, _MOST_HEADER_BYTES)
    values = array.read()
    found = shape, is_fortran, dtype, len(values)
    if found != ((num_maps, 4), False, np.float64, num_maps * 4 * 8):
        raise ValueError("the ledger has another shape")
    return np.frombuffer(values, np.float64).reshape(shape)
