import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from dicoms import SYNTAXES, write_dicom
from PIL import Image

from cxrdist.data.kinds import FORMATS
from cxrdist.data.phantom import write_phantoms

NUM_FILES = int(os.environ.get("CXRDIST_FUZZ_FILES", "200"))
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
SQUARES = """
import json, resource, sys
from pathlib import Path
from cxrdist.data.records import Record
from cxrdist.data.squares import make_squares, plan_parts, read_part

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))  # of each worker
    folder, out = map(Path, sys.argv[1:])
    files = sorted(folder.iterdir())
    records = [Record(file, file.name, "a", file.name, "s") for file in files]
    parts = plan_parts(records)
    sum(make_squares(parts, out, 64, "crop", 2))
    squares = [square for part in parts for square in read_part(out, part, redo_bad=False)]
    print(json.dumps({square.record.path: square.reason for square in squares}))
"""


def mutate(data: bytes, random: Random) -> bytes:
    """Damage a file at one to three places, half of them in its headers."""
    content = bytearray(data)
    for _ in range(random.randint(1, 3)):
        reach = len(content) if random.random() < 0.5 else min(len(content), 2000)
        place = random.randrange(reach + 1)
        length = random.randint(1, 200)
        kind = random.choices(("byte", "number", "remove", "repeat", "cut"), (5, 5, 2, 2, 1))[0]
        if kind == "byte":
            content[place : place + 1] = random.randbytes(1)
        elif kind == "number":
            width = random.choice((1, 2, 4))
            number = random.choice(EXTREMES) % 256**width
            content[place : place + width] = number.to_bytes(
                width, random.choice(("little", "big"))
            )
        elif kind == "remove":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length]
        else:
            del content[max(place, len(content) // 3) :]
    return bytes(content)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> list[Path]:
    """Whole files of each kind, real X-rays where they are."""
    folder = tmp_path_factory.mktemp("seeds")
    write_phantoms(folder / "phantoms", 1, image_size_px=128)
    files = sorted((folder / "phantoms").glob("*/*.png"))[:2]
    real = Path(__file__).parents[3] / "shared" / "data" / "originals"
    files += [file for file in sorted(real.glob("*/*")) if file.stat().st_size < 300_000][:4]
    grey = np.asarray(Image.open(files[0]).convert("L"))
    Image.fromarray(grey).save(folder / "grey.jpg")
    Image.fromarray(np.stack([grey] * 3, 2)).save(folder / "rgb.jpg", progressive=True)
    Image.fromarray(np.stack([grey] * 4, 2)).save(folder / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey).convert("P").save(folder / "palette.png")
    small = Image.fromarray(grey)
    for kind in FORMATS[2:]:
        small.save(folder / f"{kind}.img", kind)
    Image.fromarray(grey.astype(np.uint16) * 16).save(folder / "deep.tif", compression="tiff_lzw")
    for syntax in SYNTAXES:
        bits = 8 if syntax == "jpeg" else 12
        values = grey.astype(np.uint16) << (bits - 8)
        write_dicom(folder / f"{syntax}.dcm", values, bits, syntax, RescaleSlope=1)
    return [*files, *sorted(file for file in folder.iterdir() if file.is_file())]


def test_mutated_files_are_read_or_rejected_by_name(seeds, tmp_path):
    """No crash, nothing longer than 10 s, no worker over 1 GiB, in the processes that pack uses."""
    random = Random(NUM_FILES)
    (tmp_path / "in").mkdir()
    for i in range(NUM_FILES):
        seed = seeds[i % len(seeds)]
        file = tmp_path / "in" / f"{i:05d}{seed.suffix}"
        file.write_bytes(mutate(seed.read_bytes(), random))
    (tmp_path / "squares.py").write_text(SQUARES)
    done = subprocess.run(
        [sys.executable, tmp_path / "squares.py", tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reasons = json.loads(done.stdout)
    rejected = {name: reason for name, reason in reasons.items() if reason}
    print(f"{NUM_FILES - len(rejected)} read, {len(rejected)} rejected")
    assert len(reasons) == NUM_FILES
    for name, reason in rejected.items():
        assert reason.startswith(("is not a readable ", "the DICOM cannot be used ")), name
        assert "MemoryError" not in reason
        assert " at 0x" not in reason
    assert 0 < len(rejected) < NUM_FILES
    assert "Muster" not in done.stdout + done.stderr
