"""Anonymise: replace the names of files, folders, patients and sources by pseudonyms.

A pseudonym is an HMAC-SHA256 under a random key per pack: with a plain hash, anybody could guess a
name and compare. While a pack is unfinished, its key is in its work directory, in a file that only
the owner can read; it is deleted when the pack is finished.
"""

import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cxrdist.data.found import LeftOut
from cxrdist.data.records import KNOWN_NAMES, NO_PATIENT, Record, Source, own_patient
from cxrdist.data.shards import sample_key
from cxrdist.errors import CxrdistError
from cxrdist.files import atomic_file, table_lines

KEY_BYTES = 32  # as a SHA-256 has: shorter keys weaken an HMAC (RFC 2104, section 3)
KEY_FILE = ".key"
DIGITS = 20  # of a pseudonym, 80 bits: a collision among 10 million has a probability of 1e-10
SALT = "(salt)"  # in the column of names, which are hexadecimal
OLDEST = 90.0  # ages above 89 identify a person (HIPAA Privacy Rule, 45 CFR 164.514(b)(2)(i)(C))


class Name(NamedTuple):
    """A row of the table of names, which stays with the owner."""

    name: str
    """Replaces the path in the shards and in rejected.csv."""
    key: str
    """Key of the sample; empty for files that were left out."""
    path: str
    patient: str
    """Patient from the table or the file name; empty if unknown."""
    source: str


def keyed(key: bytes, text: str) -> str:
    """Return the HMAC-SHA256 of a text, hexadecimal."""
    return hmac.new(key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def read_key(directory: Path) -> bytes | None:
    """Return the key of an unfinished pack, or None for a pack that has not started."""
    path = directory / KEY_FILE
    key = path.read_bytes() if path.is_file() else b""
    return key if len(key) == KEY_BYTES else None


def shared_key(directory: Path) -> bytes:
    """Return the key of an unfinished pack; the first process that asks for it creates it."""
    path = directory / KEY_FILE
    if not isinstance(path, Path):  # an object store creates an object once; others then read it
        with suppress(FileExistsError):
            path.fs.pipe_file(path.path, secrets.token_bytes(KEY_BYTES), mode="create")
        return path.read_bytes()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        key = file.read()
        if len(key) != KEY_BYTES:  # new, or its creator was killed before anyone could read it
            key = secrets.token_bytes(KEY_BYTES)
            file.seek(0)
            file.truncate()
            file.write(key)
            file.flush()
            # Squares on the disk have PatientIDs hashed under this key: if a power cut lost it, the
            # next key would make two patients of one.
            os.fsync(file.fileno())
    return key


def make_private(directory: Path) -> None:
    """Create a local directory that only its owner can read."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)  # mkdir keeps the mode of a directory that already exists


def anonymise(source: Source, key: bytes) -> tuple[Source, list[Name]]:
    """Rename the paths, patients and sources of all records, and the paths of left-out files.

    The records are sorted by their new names, so that their order reveals nothing. Names of public
    data sets stay as sources, since the audit needs them. The second result is the table of names.
    """
    pairs = sorted(
        ((_anonymous(record, key), record) for record in source.records), key=lambda p: p[0].path
    )
    public = {*KNOWN_NAMES, *source.public}
    own = dict.fromkeys(old.source for _, old in pairs if old.source not in public)
    numbers = {name: f"source-{number}" for number, name in enumerate(own, start=1)}
    records = [replace(new, source=numbers.get(old.source, old.source)) for new, old in pairs]
    left_out = [LeftOut(_name(key, x.path), x.reason) for x in source.left_out]
    names = []
    for new, old in pairs:
        patient = "" if old.patient.startswith(NO_PATIENT) else old.patient
        names.append(Name(new.path, sample_key(new.path), old.path, patient, old.source))
    names += [
        Name(new.path, "", old.path, "", "")
        for new, old in zip(left_out, source.left_out, strict=True)
    ]
    return replace(source, records=records, left_out=tuple(sorted(left_out))), names


def _anonymous(record: Record, key: bytes) -> Record:
    path = _name(key, record.path)
    # The placeholder of an unknown patient contains the path, so it is made from the new one.
    patient = own_patient(path)
    if not record.patient.startswith(NO_PATIENT):
        patient = f"patient-{keyed(key, f'patient {record.patient}')[:DIGITS]}"
    return replace(record, path=path, patient=patient, age=private_age(record.age))


def private_age(age: float | None) -> float | None:
    """Return the age, at most `OLDEST`."""
    return None if age is None else min(age, OLDEST)


def _name(key: bytes, path: str) -> str:
    # The word in front keeps a path apart from a patient of the same text: their digits differ.
    return keyed(key, f"path {path}")[:DIGITS]


def names_file(out: Path) -> Path:
    """Return the path of the table of names of a directory of shards, next to it."""
    return out.with_name(f"{out.name}.names.csv")


def salt_of(key: bytes) -> str:
    """Return the salt of the image list's hash in pack.json; it does not reveal the key."""
    return keyed(key, "salt")


def read_salt(file: Path) -> str | None:
    """Return the salt of the pack that a table of names belongs to; None if there is no table.

    Raises:
        CxrdistError: the file is not a table of names.
    """
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace", newline="") as table:
        # Any file may have this name, also one whose first line fills the memory.
        head = [table.readline(1000), table.readline(1000)]
    header, salt = (line.rstrip("\r\n").split(",") for line in head)
    if header != [*Name._fields] or len(salt) != len(header) or salt[0] != SALT:
        raise CxrdistError(f"{file}: is not a table of names; move it, or choose another --out")
    return salt[2]


def write_names(file: Path, key: bytes, names: Iterable[Name]) -> None:
    """Write the table of names, readable by its owner only."""
    rows = [Name._fields, Name(SALT, "", salt_of(key), "", ""), *sorted(names)]
    with atomic_file(file) as partial:
        # open() would create it with a mode that lets others read it.
        partial.touch(mode=0o600)
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as table:
            table.writelines(table_lines(rows))
