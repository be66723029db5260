"""Read and write relevance: an npz per sample, or WebDataset shards in half the space."""

import io
import math
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.data.shards import add_member
from cxrdist.errors import CxrdistError
from cxrdist.explain.attribution import Attribution
from cxrdist.files import DAMAGE, MOST_HEADER_BYTES, atomic_file, open_regular, read_npy

T = TypeVar("T")

BATCHES_PER_SHARD = 16
"""Batches per shard; a killed run repeats at most one shard, and a rank processes whole shards."""

_DEFLATE_LEVEL = 1
"""Relevance hardly compresses: level 6 saves 1 % more and takes twice as long."""


class Map(NamedTuple):
    """The relevance and the ledger of a sample."""

    key: str
    classes: list[str]
    relevance: NDArray[np.float32]
    """[K, H, W]."""
    ledger: NDArray[np.float64]
    """[K, 4]: logit, relevance sum, bias share, epsilon share."""


def to_maps(result: Attribution, keys: Sequence[str], classes: list[str]) -> list[Map]:
    """Return the maps of a batch of samples, which were explained for these classes."""
    relevance = result.relevance.float().cpu().numpy()
    sums = (result.logits, result.relevance_sum, result.bias_share, result.epsilon_share)
    ledgers = torch.stack(sums, 2).double().cpu().numpy()
    rows = zip(keys, relevance, ledgers, strict=True)
    return [Map(key, classes, values, ledger) for key, values, ledger in rows]


def encode(sample_map: Map, *, half: bool) -> bytes:
    """Encode a map as npz; the same map always gives the same bytes.

    Returns:
        An npz of ``relevance``, ``classes`` and ``ledger``. With ``half``, relevance is float16,
        divided by the largest absolute values of its maps, ``scale`` [K]; then each value is exact
        to 2.5e-4 of the largest of its map.
    """
    arrays: dict[str, NDArray[Any]] = {"relevance": sample_map.relevance}
    if half:
        largest = np.abs(sample_map.relevance).max((1, 2))
        scale = np.where(largest > 0, largest, 1).astype(np.float32)
        arrays["relevance"] = (sample_map.relevance / scale[:, None, None]).astype(np.float16)
        arrays["scale"] = scale
    arrays |= {"classes": np.array(sample_map.classes), "ledger": sample_map.ledger}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that bytes do not vary
            file.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, _DEFLATE_LEVEL)
    return buffer.getvalue()


def decode(key: str, data: bytes) -> Map:
    """Decode the bytes of `encode`."""
    with np.load(io.BytesIO(data)) as arrays:
        relevance = arrays["relevance"]
        if "scale" in arrays:
            relevance = relevance.astype(np.float32) * arrays["scale"][:, None, None]
        return Map(key, arrays["classes"].tolist(), relevance, arrays["ledger"])


def write_maps(path: Path, encoded: Sequence[tuple[str, bytes]]) -> None:
    """Write the maps of a unit: one npz each into a folder, or a shard (``path`` ends in .tar)."""
    if path.suffix != ".tar":
        for key, data in encoded:
            with atomic_file(path / f"{key}.npz") as partial:
                partial.write_bytes(data)
        return
    with (
        atomic_file(path) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for key, data in encoded:
            add_member(tar, f"{key}.npz", data)


def read_ledgers(
    path: Path, keys: Sequence[str], num_maps: int
) -> list[NDArray[np.float64]] | None:
    """Read the ledgers of a unit, [K, 4] each; None if any of its maps is missing or damaged.

    Raises:
        CxrdistError: the name of a map is that of a link or another special file.
    """

    def read(_: str, npz: IO[bytes]) -> NDArray[np.float64]:
        with zipfile.ZipFile(npz) as file:
            return _array(file, "ledger", (num_maps, 4), np.float64)

    return read_unit(path, keys, read)


def read_map(npz: IO[bytes], key: str, names: list[str], size_px: int) -> Map:
    """Read a map [K, size_px, size_px] of K classes, and check its shape.

    Raises:
        ValueError, and errors of `zipfile`: the shape differs, or values are not finite.
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
    path: Path, keys: Sequence[str], read: Callable[[str, IO[bytes]], T]
) -> list[T] | None:
    """Read each map of a unit (`write_maps`) with a function that takes its key and its npz.

    Returns:
        One result per sample; None if any map is missing or damaged.

    Raises:
        CxrdistError: the name of a map is that of a link or another special file.
    """
    try:
        if path.suffix != ".tar":
            return [_read_file(path / f"{key}.npz", key, read) for key in keys]
        with (
            open_regular(path, os.O_RDONLY) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,  # uncompressed only
        ):
            members = [(key, tar.extractfile(f"{key}.npz")) for key in keys]
            whole = [read(key, member) for key, member in members if member]
            return whole if len(whole) == len(keys) else None
    # Also a ValueError, but about a link, which computing again does not mend.
    except CxrdistError:
        raise
    except (*DAMAGE, OSError):
        return None  # the caller computes a missing or damaged unit again


def _read_file(path: Path, key: str, read: Callable[[str, IO[bytes]], T]) -> T:
    with open_regular(path, os.O_RDONLY) as file:
        return read(key, file)


def _array(
    file: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: type[np.generic]
) -> NDArray[Any]:
    """Read an array of an npz, and check its shape and type."""
    num_bytes = math.prod(shape) * np.dtype(kind).itemsize
    if file.getinfo(f"{name}.npy").file_size > MOST_HEADER_BYTES + num_bytes:
        raise ValueError(f"{name} is too large")
    array = read_npy(io.BytesIO(file.read(f"{name}.npy")))
    if (array.shape, array.dtype) != (shape, kind):
        raise ValueError(f"{name} has another shape")
    return array
