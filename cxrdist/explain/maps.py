"""Files of relevance: an npz a sample, or WebDataset shards of them in half the space."""

import io
import math
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.shards import add_member
from cxrdist.errors import CxrdistError
from cxrdist.run import atomic_file, open_regular

T = TypeVar("T")

BATCHES_PER_SHARD = 16
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

    def read(_: str, npz: IO[bytes]) -> NDArray[np.float64]:
        with zipfile.ZipFile(npz) as file:
            return _array(file, "ledger", (num_maps, 4), np.float64)

    return read_unit(place, keys, read)


def read_map(npz: IO[bytes], key: str, names: list[str], size_px: int) -> Map:
    """Read a map back, if it has the shape that it must have.

    Args:
        npz: what `encode` wrote.
        key: of its sample.
        names: of its K classes.
        size_px: side of its image.

    Raises:
        ValueError, and what `zipfile` raises: it has not, or is not finite.
    """
    shape = len(names), size_px, size_px
    with zipfile.ZipFile(npz) as file:
        ledger = _array(file, "ledger", (len(names), 4), np.float64)
        if "scale.npy" in file.namelist():
            scale = _array(file, "scale", shape[:1], np.float32)
            half = _array(file, "relevance", shape, np.float16)
            relevance = half.astype(np.float32) * scale[:, None, None]
        else:
            relevance = _array(file, "relevance", shape, np.float32)
    if not np.isfinite(relevance).all():
        raise ValueError("relevance is not finite")
    return Map(key, names, relevance, ledger)


def read_unit(
    place: Path, keys: Sequence[str], read: Callable[[str, IO[bytes]], T]
) -> list[T] | None:
    """Read something of each map of a unit; None unless all of its maps are whole.

    Args:
        place: of the unit, as in `write_maps`.
        keys: of its samples.
        read: takes a key and the npz.

    Raises:
        CxrdistError: a link or another special file has the name of a map.
    """
    try:
        if place.suffix != ".tar":
            return [_read_file(place / f"{key}.npz", key, read) for key in keys]
        with (
            open_regular(place, os.O_RDONLY) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            members = [(key, tar.extractfile(f"{key}.npz")) for key in keys]
            whole = [read(key, member) for key, member in members if member]
            return whole if len(whole) == len(keys) else None
    except CxrdistError:
        raise
    except (*_DAMAGE, OSError):
        return None  # missing or damaged: the unit is made anew


def _read_file(path: Path, key: str, read: Callable[[str, IO[bytes]], T]) -> T:
    with open_regular(path, os.O_RDONLY) as file:
        return read(key, file)


def _array(
    file: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: type[np.generic]
) -> NDArray[Any]:
    """Read an array of an npz, if it has the size that it must have.

    Raises:
        ValueError, and what `zipfile` raises: it has not.
    """
    num_bytes = math.prod(shape) * np.dtype(kind).itemsize
    if file.getinfo(f"{name}.npy").file_size > _MOST_HEADER_BYTES + num_bytes:
        raise ValueError(f"{name} is too large")
    array = io.BytesIO(file.read(f"{name}.npy"))
    if np.lib.format.read_magic(array) != (1, 0):
        raise ValueError(f"{name} is of another version")
    found, is_fortran, dtype = np.lib.format.read_array_header_1_0(array, _MOST_HEADER_BYTES)
    values = array.read()
    if (found, is_fortran, dtype, len(values)) != (shape, False, kind, num_bytes):
        raise ValueError(f"{name} has another shape")
    return np.frombuffer(values, kind).reshape(shape)
