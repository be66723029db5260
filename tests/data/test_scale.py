"""Large data sets but for their pixels: all of ChestX-ray14, and a part of MIMIC-CXR's size."""

import gzip
import json
from pathlib import Path

from support import run_measured

from cxrdist.data.mimic_cxr import LABELS

MIMIC_IMAGES = 377_110

WHOLE = """
import json, sys, time
from pathlib import Path
import numpy as np
from cxrdist.config import Augmentation, PackConfig
from cxrdist.data.assemble import Assembled, Layout, plan_shards, write_samples
from cxrdist.data.audit import shared_patients
from cxrdist.data.chestxray14 import LABELS
from cxrdist.data.duplicates import Duplicates
from cxrdist.data.fingerprint import Fingerprint
from cxrdist.data.index import ShardEntry, read_index
from cxrdist.data.plan import copies_of, plan_epoch
from cxrdist.data.records import Record, Source
from cxrdist.data.splits import assign_splits
from cxrdist.data.squares import Square
from cxrdist.data.summary import index_file
from cxrdist.files import write_json

random, out = np.random.default_rng(0), Path(sys.argv[1])
patients = random.integers(0, 30_805, 112_120)
has = random.random((112_120, len(LABELS))) < 0.05
records = [
    Record(
        file=out / f"{i}.png", path=f"images/{i}.png", patient=f"{patient:08d}", source="synthetic",
        label="|".join(name for name, value in zip(LABELS, row, strict=True) if value),
    )
    for i, (patient, row) in enumerate(zip(patients, has, strict=True))
]
source = Source(records, "multilabel", list(LABELS), "synthetic")
prints = Fingerprint("0" * 64, bytes(32), bytes(32), {})
squares = [Square(record, (0, 0), fingerprint=prints) for record in records]
config = PackConfig("csv", out / "in.csv", out / "shards")

start = time.perf_counter()
splits = assign_splits(source, config.split, config.seed)
plan = plan_shards(splits, config.seed, config.shard_size)
samples = write_samples(squares, plan, out)
layout = Layout(
    config.size, config.fit, None, config.seed, config.shard_size, config.duplicates, None, "all"
)
entries = [ShardEntry(name, len(members), 1, "0" * 64) for name, members in plan.items()]
shards = Assembled(source, squares, samples, entries, [], 0, Duplicates([], []), [])
write_json(out / "index.json", index_file(shards, out / "samples.csv", layout))
shared = shared_patients(samples, lambda sample: [sample.split])
index = read_index(out)
train, targets = np.array(index.numbers("train")), index.targets()
copies = copies_of(targets, index.classes, {"Hernia": 8})
epoch = plan_epoch(train, copies[train], Augmentation(), 64, (0, "head", 0))
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "samples": len(index.samples),
    "shared": len(shared),
    "planned": np.array_equal(np.bincount(epoch.samples, minlength=112_120)[train], copies[train]),
    "fractions": [len(index.numbers(split)) / 112_120 for split in ("train", "val", "test")],
}))
"""


def test_the_whole_of_chestxray14_is_split_audited_loaded_and_planned(tmp_path):
    """In seconds and less than 1 GiB; no patient in two splits, each copy planned once."""
    done = run_measured(WHOLE, tmp_path)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["samples"] == 112_120
    assert result["shared"] == 0
    assert result["planned"]
    for found, expected in zip(result["fractions"], (0.7, 0.1, 0.2), strict=True):
        assert abs(found - expected) < 0.01
    assert done.mib < 1024
    assert result["seconds"] < 60  # 3.4 on the machine it was written on; a double loop takes hours


READ = """
import json, sys, time
from pathlib import Path
from cxrdist.config import PackConfig
from cxrdist.data.sources import read_source
from cxrdist.data.splits import assign_splits

def peak_kib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before, start = peak_kib(), time.process_time()
source = read_source(PackConfig("mimic-cxr", Path(sys.argv[1]), Path("out")))
splits = assign_splits(source, None, seed=0)
seconds = time.process_time() - start
print(json.dumps({"kib": peak_kib() - before, "seconds": seconds, "splits": len(splits)}))
"""


def write_mimic_cxr(folder: Path, num_images: int) -> None:
    """Three images in two studies of each patient, in tables as the data set has them."""
    metadata = ["dicom_id,subject_id,study_id,ViewPosition,StudyDate"]
    splits = ["dicom_id,study_id,subject_id,split"]
    labels = {}
    for i in range(num_images):
        subject, study = 10_000_000 + i // 3, 50_000_000 + i // 3 * 2 + i % 2
        dicom = "-".join(f"{i * 2654435761 % 2**32:08x}" for _ in range(5))
        home = folder / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{dicom}.jpg").touch()
        metadata.append(f"{dicom},{subject},{study},{('PA', 'AP')[i % 2]},21800506")
        splits.append(f"{dicom},{study},{subject},{('train', 'validate', 'test')[i // 3 % 3]}")
        cells = (("", "1.0", "0.0", "-1.0")[i * 7919 >> bit & 3] for bit in range(len(LABELS)))
        labels[study] = f"{subject},{study},{','.join(cells)}"
    labels = [f"subject_id,study_id,{','.join(LABELS)}", *labels.values()]
    for name, rows in (("metadata", metadata), ("split", splits), ("chexpert", labels)):
        data = gzip.compress("\n".join(rows).encode(), compresslevel=1)
        (folder / f"mimic-cxr-2.0.0-{name}.csv.gz").write_bytes(data)


def test_a_set_of_mimic_cxrs_size_would_be_read_in_less_than_2_gib(tmp_path):
    """By what each of 6,000 images takes; all 377,110 took 0.7 GiB and 25 s of a processor."""
    write_mimic_cxr(tmp_path, 6000)
    done = run_measured(READ, tmp_path)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["splits"] == 6000
    assert result["kib"] / 6000 * MIMIC_IMAGES < 2 << 20
    assert result["seconds"] / 6000 < 0.5e-3  # a double loop takes hours for the whole
