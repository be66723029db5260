import csv
import hashlib
import re
import shutil
import stat
from binascii import unhexlify
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from support import contents, make_images, make_masks

from cxrdist.config import PackConfig
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.errors import CxrdistError

IDS = [str(number) for number in range(104_729, 1_000_000, 74_611)][:12]
NAMES = ("Mustermann", "Erika", "Hospital", "Kreuzberg")


def write_dicoms(folder: Path) -> Path:
    """Two images of each of 12 patients, with number and name in tags, files and folders."""
    random = np.random.default_rng(0)
    for i, patient in enumerate(IDS):
        place = folder / ("COVID", "normal")[i % 2] / f"Mustermann-Erika-{patient}"
        place.mkdir(parents=True)
        for number in range(2):
            values = random.integers(0, 256, (40, 40))
            tags = {
                "PatientID": patient,
                "PatientName": "Mustermann^Erika",
                "PatientSex": "FM"[i % 2],
                "PatientAge": ("045Y", "018M", "095Y", "999Y")[i % 4],
                "InstitutionName": "Hospital Kreuzberg",
            }
            write_dicom(place / f"Mustermann_{patient}_{number}.dcm", values, **tags)
    (folder / "COVID" / "Mustermann.txt").write_text("a letter")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> PackConfig:
    source = write_dicoms(tmp_path / "in" / "Hospital-Kreuzberg")
    return PackConfig("folder", source, tmp_path / "out", size=32, split="0.5/0.25/0.25", workers=1)


def left_by(*directories: Path) -> bytes:
    """All bytes and names of the files that a pack left for others."""
    files = [file for directory in directories for file in sorted(directory.rglob("*"))]
    return b"\n".join(
        str(file.relative_to(file.parents[1])).encode()
        + b"\n"
        + (file.read_bytes() if file.is_file() else b"")
        for file in files
    )


def windows(data: bytes) -> np.ndarray:
    """The eight bytes at each place as numbers."""
    view = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    return np.ascontiguousarray(view).view(">u8").ravel()


@cache
def hashed_numbers() -> dict[str, np.ndarray]:
    """The first eight bytes of the hashes of all six-digit numbers, in their order."""
    numbers = [b"%06d" % number for number in range(1_000_000)]
    return {
        name: np.frombuffer(b"".join(make(number).digest()[:8] for number in numbers), ">u8")
        for name, make in (("md5", hashlib.md5), ("sha1", hashlib.sha1), ("sha256", hashlib.sha256))
    }


def recovered(data: bytes) -> set[int]:
    """Six-digit numbers whose text or unkeyed hash is in the data, by trying all of them."""
    runs = [run for run in re.findall(rb"[0-9a-f]+", data.lower()) if len(run) > 16]
    even = [run[i:][: len(run[i:]) // 2 * 2] for run in runs for i in (0, 1)]
    there = np.unique(np.concatenate([windows(x) for x in (data, *map(unhexlify, even))]))
    # Digits within hexadecimal ones are chance.
    texts = {int(run) for run in re.findall(rb"(?<![0-9a-f])\d{6}(?![0-9a-f])", data)}
    found = texts & {*map(int, IDS)}
    for digests in hashed_numbers().values():
        found |= {*np.flatnonzero(np.isin(digests, there)).tolist()}
    return found


def test_no_patient_can_be_guessed_from_what_a_dicom_pack_leaves(config, tmp_path):
    """All six-digit numbers, as text and hashed, and the names: none is in what is left."""
    damaged = sorted(config.input.rglob("*_0.dcm"))[:2]
    whole = [file.read_bytes() for file in damaged]
    for file, data in zip(damaged, whole, strict=True):
        file.write_bytes(data[:-900])
    with pytest.raises(CxrdistError, match="2 such images") as error:
        pack(config)
    assert all(str(file) in str(error.value) for file in damaged)
    work = tmp_path / ".out.partial"
    key = work / ".key"
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    refused = left_by(work)
    damaged[0].write_bytes(whole[0])
    pack(replace(config, skip_bad=True))
    assert not work.exists()
    data = refused + left_by(config.out)
    assert len(read_index(config.out).samples) == 23
    assert not [name for name in NAMES if name.lower().encode() in data.lower()]
    assert recovered(data) == set()
    said = hashlib.sha256(IDS[3].encode()).hexdigest()[:20]
    assert recovered(data + f" {said} {IDS[5]} ".encode()) == {int(IDS[3]), int(IDS[5])}


def test_the_owner_knows_what_each_name_stands_for(config, tmp_path):
    """OUT.names.csv, readable by the owner alone, leads from each sample to its file."""
    pack(config)
    table = tmp_path / "out.names.csv"
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    with open(table, newline="") as file:
        _, *rows = csv.DictReader(file)
    paths = {row["key"]: row["path"] for row in rows if row["key"]}
    index = read_index(config.out)
    for sample in index.samples:
        assert paths[sample.key].startswith(f"{sample.label}/Mustermann-Erika-")
    with open(config.out / "rejected.csv") as file:
        (left_out,) = csv.DictReader(file)
    assert {row["name"]: row["path"] for row in rows}[left_out["path"]] == "COVID/Mustermann.txt"
    home = {}
    for sample in index.samples:
        home.setdefault(sample.patient, set()).add(paths[sample.key].split("/")[1])
    assert all(len(folders) == 1 for folders in home.values())
    assert len(home) == 12


def test_sex_and_age_are_kept_and_the_oldest_are_one(config, capsys):
    """045Y, 018M; 095Y is 90 in an anonymised pack; 999Y is no age, and counted."""
    pack(config)
    samples = read_index(config.out).samples
    found = {(sample.label, sample.sex, sample.age) for sample in samples}
    assert found == {
        ("COVID", "F", "45"),
        ("normal", "M", "1.5"),
        ("COVID", "F", "90"),
        ("normal", "M", ""),
    }
    assert "6 DICOM ages are not 0 to 120 years" in capsys.readouterr().out
    shown = replace(config, out=config.out.with_name("shown"), anonymise=False)
    pack(shown)
    assert {sample.age for sample in read_index(shown.out).samples} == {"45", "1.5", "95", ""}
    assert not config.out.with_name("shown.names.csv").exists()


def test_the_same_command_again_knows_an_anonymised_pack(config, tmp_path, capsys):
    """By the salt in the table of names; another source or table of names is refused."""
    pack(config)
    pack(config)
    assert "is packed already" in capsys.readouterr().out
    file = next(config.input.rglob("*_0.dcm"))
    file.rename(file.with_name("other.dcm"))
    with pytest.raises(CxrdistError, match="--out"):
        pack(config)
    config.out.rename(tmp_path / "moved")
    with pytest.raises(CxrdistError, match=r"out\.names\.csv: belongs to another pack"):
        pack(config)


def test_an_anonymised_pack_of_another_folder_or_of_other_masks_is_another_one(tmp_path):
    """Its pack.json hides the paths, and files of the same names in another folder are others."""
    folder = make_images(tmp_path / "in", {"a": 8, "b": 8})
    config = PackConfig(
        *("folder", folder, tmp_path / "out"),
        **{"size": 32, "split": "0.5/0.25/0.25", "workers": 1, "anonymise": True},
        masks=make_masks(folder, tmp_path / "masks"),
    )
    pack(config)
    copies = {
        name: shutil.copytree(folder.parent / old, tmp_path / name)
        for name, old in (("input", "in"), ("masks-2", "masks"))
    }
    pack(config)
    for other in ({"input": copies["input"]}, {"masks": copies["masks-2"]}):
        with pytest.raises(CxrdistError, match="already exists, with 16 images"):
            pack(replace(config, **other))


def test_tasks_share_one_key(config, tmp_path):
    """The tasks of an array and their merge give the bytes of one pack with the same key."""
    parts = replace(config, num_tasks=2)
    for task in (1, 0):
        pack(replace(parts, task=task))
    whole = replace(config, out=tmp_path / "whole", workers=2)
    (tmp_path / ".whole.partial").mkdir()
    key = (tmp_path / ".out.partial" / ".key").read_bytes()
    (tmp_path / ".whole.partial" / ".key").write_bytes(key)
    pack(replace(config, merge=True))
    pack(whole)
    assert contents(config.out) == contents(whole.out)
    assert (tmp_path / "whole.names.csv").read_bytes() == (tmp_path / "out.names.csv").read_bytes()


def test_a_table_of_pictures_is_anonymised_when_asked(tmp_path):
    """Patients, paths and sources of a table are renamed; classes stay; patients stay together.

    No name of a mask is told either, not even of one that cannot be used.
    """
    folder = make_images(tmp_path / "Mustermann", {"a": 12, "b": 12})
    rows = ["path,label,patient,source"]
    for file in sorted(folder.rglob("*.png")):
        patient = f"Erika-{file.name[:5]}"
        rows.append(f"{file.relative_to(folder)},{file.parent.name},{patient},Kreuzberg")
    (folder / "Hospital.csv").write_text("\n".join(rows))
    masks = make_masks(folder, tmp_path / "Erika")
    Image.new("1", (9, 30)).save(next(masks.glob("a/*.png")))
    pack(
        PackConfig(
            *("csv", folder / "Hospital.csv", tmp_path / "out"),
            **{"size": 32, "split": "0.5/0.25/0.25", "workers": 1, "anonymise": True},
            **{"masks": masks, "skip_bad": True},
        )
    )
    reason = "its mask: has 9 x 30 px, which is not the aspect ratio of the image"
    assert reason in (tmp_path / "out" / "rejected.csv").read_text()
    data = left_by(tmp_path / "out")
    assert not [name for name in NAMES if name.lower().encode() in data.lower()]
    samples = read_index(tmp_path / "out").samples
    assert len({sample.patient for sample in samples}) == 12
    assert {sample.source for sample in samples} == {"source-1"}
    ranks = [s.path for s in sorted(samples, key=lambda s: s.path)]
    with open(tmp_path / "out.names.csv", newline="") as file:
        paths = {row["name"]: row["path"] for row in csv.DictReader(file)}
    assert [paths[name] for name in ranks] != sorted(paths[name] for name in ranks)


def test_a_dicom_that_is_named_as_a_picture_is_not_packed_by_name(tmp_path):
    """Whether to anonymise is asked where a DICOM is found too late."""
    folder = make_images(tmp_path / "in", {"a": 6, "b": 6})
    write_dicom(folder / "a" / "x.png", np.arange(1600).reshape(40, 40) % 256)
    config = PackConfig("folder", folder, tmp_path / "out", size=32, workers=1)
    config = replace(config, split="0.5/0.25/0.25")
    with pytest.raises(CxrdistError, match=r"x\.png: is a DICOM file with a patient"):
        pack(config)
