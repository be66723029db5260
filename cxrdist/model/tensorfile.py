"""Read tensors by name from checkpoint files: safetensors, state dicts and pickled networks."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cxrdist.documents import parse_json, typed
from cxrdist.errors import CxrdistError
from cxrdist.files import judging
from cxrdist.model.description import WeightsNote
from cxrdist.model.unpickler import (
    MOST_DIMENSIONS,
    MOST_NAME_CHARACTERS,
    MOST_PICKLE_BYTES,
    Pickles,
    RefusedError,
    StorageRef,
    Stub,
    TensorRef,
    unpickle,
)

# torch/serialization.py: the first value in a file of torch.save before PyTorch 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
METADATA = "cxrdist"  # key of the note of `cxrdist weights convert` in safetensors' header
LABEL_ATTRIBUTES = ("pathologies", "targets", "class_names")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_TENSORS = 10_000  # DenseNet264, the largest published, has 1,591
MOST_ENTRIES = 100_000  # modules, parameters and buffers of a network; DenseNet264 has 3,728
MOST_DIRECTORY_BYTES = 4 << 20  # of a zip file; DenseNet264 with its optimiser has 250 kB
MOST_HEADER_BYTES = 4 << 20  # of safetensors; DenseNet121 has 80 kB


@dataclass(frozen=True)
class TensorFile:
    """The content of a checkpoint file.

    Attributes:
        tensors: by their names in the file.
        is_network: whether they belong to a pickled network, not to a state dict.
        labels: of the outputs, if a pickled network names them.
        note: written by `cxrdist weights convert`; None for other files.
    """

    tensors: dict[str, Tensor]
    is_network: bool = False
    labels: list[str] | None = None
    note: WeightsNote | None = None


def read_tensor_file(file: Path, where: str) -> TensorFile:
    """Read the tensors of a checkpoint without creating any other objects that it contains.

    It is a file of safetensors, or of torch.save of any version since 0.1.11.

    Raises:
        CxrdistError: the file is missing or damaged, contains no tensors by name, or contains more
            than data; its line begins with ``where``.
    """
    try:
        if file.exists() and not file.is_file():
            raise pickle.UnpicklingError("not a regular file")
        container = container_of(file)
        if container is None:
            raise pickle.UnpicklingError(_looks_like(file))
        if container == "safetensors":
            return read_safetensors(file)
        return _read_zip(file) if container == "torch.save" else _read_legacy(file)
    except FileNotFoundError:
        raise CxrdistError(
            f"{where}: no such file; expected chexnet, imagenet, none, a checkpoint file, "
            "its URL, or a run directory"
        ) from None
    except CxrdistError:
        raise
    except RefusedError as error:
        raise CxrdistError(
            f"{where}: contains more than data ({error}); none of it was run. Get the "
            "file from its publisher, or save only the state dict: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except (
        *(OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, MemoryError),
        *(struct.error, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CxrdistError(
            f"{where}: not a readable checkpoint ({reason:.160}); fetch the file again"
        ) from error


def container_of(file: Path) -> str | None:
    """Return the format of a checkpoint file by its first bytes; None if it is not one."""
    with open(file, "rb") as data:
        start = data.read(16)
    if start.startswith(b"PK\x03\x04"):
        return "torch.save"
    # PROTO, then LONG1 with a length of 10 bytes, in the first of the five pickles.
    if start.startswith(b"\x80") and b"\x8a\n" + LEGACY_MAGIC.to_bytes(10, "little") in start:
        return "torch.save before PyTorch 1.6"
    # The length of the header in 8 bytes, then the header, which is JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size:
        return "safetensors"
    return None


def _looks_like(file: Path) -> str:
    """Describe a file that is not a checkpoint."""
    with open(file, "rb") as data:
        start = data.read(512)
    if start.lstrip()[:1] == b"<":
        return "a web page, not the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it, or save it again with PyTorch"
    return "neither safetensors nor a file of torch.save"


def read_safetensors(file: Path) -> TensorFile:
    """Read a file of safetensors.

    Raises:
        OSError, ValueError, SafetensorError: it is missing or damaged, or its tensors are not
            weights.
    """
    if file.exists() and not file.is_file():  # opening a pipe would wait for its other end
        raise ValueError(f"{file.name} is not a regular file")
    with open(file, "rb") as data:
        if int.from_bytes(data.read(8), "little") > MOST_HEADER_BYTES:
            raise ValueError(f"its header has more than {MOST_HEADER_BYTES >> 20} MiB")
    with safe_open(file, framework="pt") as content:
        names = list(content.keys())
        if len(names) > MOST_TENSORS:
            raise ValueError(f"it holds more than {MOST_TENSORS} tensors")
        for name in names:
            if len(content.get_slice(name).get_shape()) > MOST_DIMENSIONS:
                raise ValueError(f"{name:.100} has more than {MOST_DIMENSIONS} dimensions")
        tensors = {name: content.get_tensor(name) for name in names}
        text = (content.metadata() or {}).get(METADATA)
    _refuse_other_numbers(tensors)
    if not text:
        return TensorFile(tensors)
    with judging(f"{file}: {METADATA}", "convert it again"):
        return TensorFile(tensors, note=typed(parse_json(text.encode()), WeightsNote))


def _read_zip(file: Path) -> TensorFile:
    """Read a file of torch.save since 1.6: data.pkl, and the storages in data/KEY."""
    with _Archive(file) as data, zipfile.ZipFile(data) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("a zip archive without data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in archive.namelist():
            raise ValueError("TorchScript, which is a program; save the state dict instead")
        order = f"{folder}byteorder"
        if order in archive.namelist() and _stored(archive, order, 16) != b"little":
            raise ValueError("written on a machine with another byte order")
        content, storages = unpickle(Pickles(_stored(archive, names[0], MOST_PICKLE_BYTES)))

        # Several tensors may share a storage, which is read once.
        @cache
        def read_storage(key: str) -> bytearray:
            numbers = _stored(archive, f"{folder}data/{key}", storages[key].num_bytes)
            return _sized(numbers, storages[key])

        return _collect(content, read_storage, file.stat().st_size)


class _Archive(io.FileIO):
    """A zip file whose directory of members has a bounded size.

    zipfile reads the whole directory at once, and creates an object of half a kilobyte per member.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """Read the given number of bytes, or raise ValueError if it is too large."""
        left = os.fstat(self.fileno()).st_size - self.tell()
        size = left if size is None or size < 0 else min(size, left)
        if size > MOST_DIRECTORY_BYTES:
            raise ValueError(f"its directory has more than {MOST_DIRECTORY_BYTES >> 20} MiB")
        return super().read(size) or b""


def _stored(archive: zipfile.ZipFile, name: str, most_bytes: int) -> bytearray:
    """Read a member; torch.save does not compress, so a compressed one is malicious or damaged."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    if member.file_size > most_bytes:
        raise ValueError(f"{name} has {member.file_size} bytes, expected at most {most_bytes}")
    data = bytearray()
    with archive.open(member) as content:
        # In blocks, because `_Archive` refuses to read more at once.
        while block := content.read(MOST_DIRECTORY_BYTES):
            data += block
    return data


def _read_legacy(file: Path) -> TensorFile:
    """Read a file of torch.save before 1.6: five pickles, then the storages by key."""
    numbers: dict[str, bytearray] = {}
    with open(file, "rb") as data:
        pickles = Pickles(data.read(5 * MOST_PICKLE_BYTES))
        (magic, _), (version, _), (system, _) = (unpickle(pickles) for _ in range(3))
        if magic != LEGACY_MAGIC or version != 1001:
            raise ValueError("another version of the format, expected 1001")
        if not (isinstance(system, dict) and system.get("little_endian") is True):
            raise ValueError("written on a machine with another byte order")
        content, storages = unpickle(pickles)
        keys, _ = unpickle(pickles)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its list of tensors is damaged")
        if len(keys) != len(storages) or set(keys) != set(storages):
            raise ValueError("its list of tensors does not match their numbers")
        data.seek(pickles.tell())
        for key in keys:
            storage = storages[key]
            (num_elements,) = struct.unpack("<q", data.read(8))
            if num_elements != storage.num_elements:
                raise ValueError(f"{num_elements} numbers, expected {storage.num_elements}")
            num_bytes = min(storage.num_bytes, file.stat().st_size)
            numbers[key] = _sized(bytearray(data.read(num_bytes)), storage)
    return _collect(content, numbers.__getitem__, file.stat().st_size)


def _sized(numbers: bytearray, storage: StorageRef) -> bytearray:
    """Return the bytes of a storage after checking that none are missing."""
    if len(numbers) != storage.num_bytes:
        raise ValueError(
            f"truncated: {len(numbers)} bytes of a tensor, expected {storage.num_bytes}"
        )
    return numbers


def _collect(content: Any, read_storage: Callable[[str], bytearray], file_bytes: int) -> TensorFile:
    """Find the tensors in unpickled content, and read them from their storages by key."""
    is_network, references, labels = _find(content)
    if len(references) > MOST_TENSORS:
        raise RefusedError(f"it holds more than {MOST_TENSORS} tensors")
    stored = {reference.storage.key: reference.storage for reference in references.values()}
    # Members of a zip file can overlap, and tensors share numbers: a small file could fill memory.
    for refs in (stored, references):
        if sum(ref.num_bytes for ref in refs.values()) > 4 * file_bytes:
            raise RefusedError("its tensors are larger than the file")
    tensors = {name: ref.read(read_storage(ref.storage.key)) for name, ref in references.items()}
    _refuse_other_numbers(tensors)
    return TensorFile(tensors, is_network, labels)


def _refuse_other_numbers(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless tensors are finite floats, or integers for BatchNorm's counts."""
    for name, tensor in tensors.items():
        counter = name.endswith("num_batches_tracked") and tensor.dtype == torch.int64
        if tensor.dtype not in FLOATS and not counter:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} contains {kind} numbers, expected floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} contains numbers that are not finite")


def _find(content: Any) -> tuple[bool, dict[str, TensorRef], list[str] | None]:
    """Find a state dict or a network, at the top level or under one of its usual names.

    Returns:
        Whether it is a network; its tensors; and the labels of its outputs, if it names them.
    """
    # arnoweng's CheXNet is under state_dict, jrzech's under model.
    named = [content.get("state_dict"), content.get("model")] if isinstance(content, dict) else []
    for value in (*named, content):
        if isinstance(value, Stub) and "_modules" in value.attributes:
            return True, dict(_network_tensors(value)), _labels(value)
        if isinstance(value, dict) and value:
            items = value.items()
            if all(isinstance(k, str) and isinstance(v, TensorRef) for k, v in items):
                return False, value, None
    raise ValueError(
        "no state dict or network, at the top level or under the names state_dict or model; "
        "save one with torch.save(model.state_dict(), FILE)"
    )


def _network_tensors(network: Stub) -> Iterator[tuple[str, TensorRef]]:
    """Yield the items of `state_dict()` of a pickled network, in its order."""
    seen: set[int] = set()
    waiting, entries_left = [("", network)], MOST_ENTRIES
    while waiting:
        prefix, module = waiting.pop()
        own = module.attributes
        kinds = {kind: _entries(own, kind) for kind in ("_parameters", "_buffers", "_modules")}
        entries_left -= sum(map(len, kinds.values())) + 1
        if id(module) in seen or entries_left < 0 or len(prefix) > MOST_NAME_CHARACTERS:
            raise RefusedError("its modules contain one another")
        seen.add(id(module))
        # `state_dict()` leaves these buffers out.
        unsaved = own.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, list | tuple) and len(unsaved) < 100 else ()
        for kind in ("_parameters", "_buffers"):
            for name, value in kinds[kind].items():
                if isinstance(value, TensorRef) and not (kind == "_buffers" and name in unsaved):
                    yield prefix + name, value
        children = [(f"{prefix}{name}.", child) for name, child in kinds["_modules"].items()]
        waiting += [(name, child) for name, child in reversed(children) if isinstance(child, Stub)]


def _entries(attributes: dict[str, Any], kind: str) -> dict[str, Any]:
    entries = attributes.get(kind)
    if isinstance(entries, dict) and len(entries) <= MOST_ENTRIES:
        if all(isinstance(name, str) for name in entries):
            return entries
    raise ValueError(f"a network whose {kind} are damaged")


def _labels(network: Stub) -> list[str] | None:
    """Return the labels of the outputs, which torchxrayvision keeps in its networks."""
    for name in LABEL_ATTRIBUTES:
        labels = network.attributes.get(name)
        if isinstance(labels, list) and labels and all(isinstance(x, str) for x in labels):
            return labels if all(len(x) <= 255 and x.isprintable() for x in labels) else None
    return None
