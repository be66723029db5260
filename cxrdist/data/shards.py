"""Shards: tars of samples that any WebDataset client reads."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.images import decode_png
from cxrdist.data.index import Sample, ShardEntry
from cxrdist.errors import CxrdistError
from cxrdist.run import atomic_file

MEND = "copy it again or pack the shards again"


def sample_key(path: str) -> str:
    """Stable key of a sample from its path in the source.

    WebDataset cuts a name at its first dot, so a key has none; the hash keeps keys apart that look
    alike once cleaned. A DICOM UID, which is all digits and dots, leaves nothing of itself.
    """
    name = Path(path).name
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", re.sub(r"\.[A-Za-z]\w*$", "", name))[:40].strip("-")
    if re.fullmatch(r"\d+(\.\d+)+(\.[A-Za-z]\w*)?", name) or not stem:
        stem = "image"
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:10]}"


def write_shard(path: Path, samples: Iterable[tuple[dict[str, Any], bytes]]) -> None:
    """Write a shard atomically; the same samples give the same bytes.

    Args:
        path: of the shard.
        samples: for each what KEY.json says of it (with its ``key``), and the bytes of its PNG.
    """
    with (
        atomic_file(path) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for about, png in samples:
            add_member(tar, f"{about['key']}.json", json.dumps(about, sort_keys=True).encode())
            add_member(tar, f"{about['key']}.png", png)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar; the same content gives the same bytes."""
    member = tarfile.TarInfo(name)  # time, owner and group 0: the same bytes every time
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def describe_shard(path: Path, num_samples: int) -> ShardEntry:
    """The index's entry of a shard that was written."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(path.name, num_samples, path.stat().st_size, digest)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a file of this machine with the content of a local or remote one."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="cxrdist-", suffix=".tar") as copy:
        with path.open("rb") as content:
            shutil.copyfileobj(content, copy, 1 << 22)
        copy.flush()
        yield Path(copy.name)


def verify_shard(path: Path, shard: ShardEntry, name: Path) -> None:
    """Compare a shard with the index, and make sure that it is safe to read.

    Args:
        path: the shard on this machine.
        shard: its entry in the index.
        name: the shard's own path, for messages.

    Raises:
        CxrdistError: it is missing, differs, or has members that are no plain files.
    """
    if not path.is_file():
        raise CxrdistError(f"{name}: the shard is missing; {MEND}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CxrdistError(
            f"{name}: the shard has {size} bytes, the index says {shard.bytes}; {MEND}"
        )
    if describe_shard(path, shard.samples).sha256 != shard.sha256:
        raise CxrdistError(f"{name}: the shard's content differs from the index (sha256); {MEND}")
    _refuse_bad_members(path, size, name)


def _refuse_bad_members(path: Path, size: int, name: Path) -> None:
    """Only plain files within the tar: a hash in a bad index proves nothing about its members."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    raise CxrdistError(f"{name}: {member.name!r} is no plain file; {MEND}")
                if member.offset_data + member.size > size:
                    raise CxrdistError(f"{name}: {member.name!r} is longer than the shard; {MEND}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise CxrdistError(f"{name}: no readable tar ({error}); {MEND}") from error


def read_shard(
    path: Path, expected: Sequence[Sample], name: Path
) -> Iterator[tuple[NDArray[np.uint8], dict[str, Any]]]:
    """Decode a verified shard with the webdataset library, comparing each sample with the index.

    Args:
        path: the shard on this machine.
        expected: its samples in samples.csv, in order.
        name: the shard's own path, for messages.

    Yields:
        uint8 [size, size] and what KEY.json says, in the order of ``expected``.

    Raises:
        CxrdistError: the shard holds other samples than expected.
    """
    found = members(path)
    for sample in expected:
        yield decode_sample(next(found, {}), sample, name)
    if extra := next(found, None):
        raise CxrdistError(f"{name}: holds {extra['__key__']}, which samples.csv does not list")


def members(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a verified shard as the webdataset library gives them."""
    import webdataset

    return iter(
        webdataset.DataPipeline(
            webdataset.SimpleShardList([str(path)]), webdataset.tarfile_to_samples()
        )
    )


def decode_sample(
    member: dict[str, Any], sample: Sample, name: Path
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The pixels of a sample and what its KEY.json says, compared with samples.csv.

    Raises:
        CxrdistError: they differ.
    """
    mend = "pack the shards again"
    if member.get("__key__") != sample.key:
        raise CxrdistError(
            f"{name}: expected the sample {sample.key} of samples.csv, found "
            f"{member.get('__key__', 'the end')}; {mend}"
        )
    try:
        pixels, about = decode_png(member["png"]), dict(json.loads(member["json"]))
    except (KeyError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise CxrdistError(
            f"{name}: {sample.key} has no readable PNG and JSON ({error!r:.100}); {mend}"
        ) from error
    if hashlib.sha256(pixels.tobytes()).hexdigest() != sample.sha256:
        raise CxrdistError(f"{name}: the pixels of {sample.key} differ from samples.csv; {mend}")
    for column in ("label", "patient", "source", "path"):
        if about.get(column) != getattr(sample, column):
            raise CxrdistError(
                f"{name}: the {column} of {sample.key} differs from samples.csv; {mend}"
            )
    return pixels, about
