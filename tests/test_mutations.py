"""Every reader of cxrdist over damaged documents: read or refused in one line, nothing else."""

import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from mutations import mutate
from public_sets import DOCUMENTS, write_public_set

from cxrdist.cli import COMMANDS, parse
from cxrdist.config import PackConfig, ReportConfig, SourceConfig
from cxrdist.data.boxes import read_boxes
from cxrdist.data.index import inspect_index, read_index
from cxrdist.data.masks import read_mask
from cxrdist.data.pack import pack
from cxrdist.data.shards import describe_shard, read_shard
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError, RunFailedError, failure_of
from cxrdist.evaluate.scored import read_predictions
from cxrdist.evaluate.seen import read_seen
from cxrdist.explain.maps import read_ledgers
from cxrdist.explain.nearest import read_nearest
from cxrdist.info import read_info
from cxrdist.model.densenet import load_model
from cxrdist.model.tensorfile import read_tensor_file
from cxrdist.report.audit import audit_view
from cxrdist.report.files import (
    read_epochs,
    read_metrics,
    read_relevance,
    read_resolved,
    read_tests,
)
from cxrdist.report.html import report
from cxrdist.report.localisation import localisation_views
from cxrdist.report.text import text_views
from cxrdist.run import RunDirectory
from cxrdist.train.checkpoint import load_latest

NUM_MUTATIONS = int(os.environ.get("CXRDIST_MUTATIONS", "500"))
REPORTS = float(os.environ.get("CXRDIST_MUTATED_REPORTS", "0.02"))
"""Share of the damaged files of a run that the whole report is made of, a second each."""
LIMIT_S = 10
MOST_BYTES = 1 << 30
RUN_FILES = (
    *("run.json", "recipe.yaml", "log.jsonl", "audit.json", "test/predictions.csv"),
    *("test/metrics.json", "test/relevance.csv", "test/relevance.json", "test/text.json"),
    *("test/nearest.csv", "test/localisation.json"),
)


class Hang(BaseException):
    """A reader took longer than `LIMIT_S`."""


class Case(NamedTuple):
    """A document and who reads it; ``prepare`` makes the damage consistent, as a stranger would."""

    file: Path
    read: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


@pytest.fixture(scope="module")
def folder(small_run) -> Path:
    """What the real commands write, and the tables that they read."""
    folder = small_run
    images = sorted((folder / "images").rglob("*.png"))
    rows = [
        f"{file.relative_to(folder)},{file.parent.name},p{i // 2}" for i, file in enumerate(images)
    ]
    (folder / "table.csv").write_text("\n".join(["path,label,patient", *rows, ""]))
    (folder / "several.yaml").write_text(
        "x: {source: csv, input: table.csv, label_map: labels.yaml}\n"
        "y: {source: folder, input: images}\n"
    )
    (folder / "labels.yaml").write_text("a: ours\nb: null\n")
    torch.save({"state_dict": {"a.weight": torch.rand(3, 3)}}, folder / "w.pth")
    shutil.copy(folder / "run" / "recipe.yaml", folder / "recipe.yaml")
    return folder


def cases_of(folder: Path) -> list[Case]:
    """Each document with its reader."""
    run, shards = RunDirectory(folder / "run"), folder / "shards"
    recipe = run.recipe.read_text()
    readers: dict[str, Callable[[], object]] = {
        "run.json": lambda: read_info(run),
        "recipe.yaml": lambda: read_resolved(run.recipe),
        "log.jsonl": lambda: read_epochs(run.log, "multiclass"),
        "audit.json": lambda: audit_view(run.audit),
        "test/predictions.csv": lambda: read_predictions(run.predictions("test"), "multiclass"),
        "test/metrics.json": lambda: read_metrics(run.metrics("test"), "multiclass"),
        "test/relevance.csv": lambda: read_relevance(run, "test", None),
        "test/relevance.json": lambda: read_tests(run, "test"),
        "test/nearest.csv": lambda: read_nearest(run.nearest("test")),
        "test/text.json": lambda: text_views(run),
        "test/localisation.json": lambda: localisation_views(run),
        "seen.npz": lambda: read_seen(run.seen),
        "model/model.json": lambda: load_model(run.root),
        "model/model.safetensors": lambda: load_model(run.root),
    }
    cases = [Case(run.root / name, read) for name, read in readers.items()]
    cases += _checkpoint_cases(run, recipe) + _shard_cases(shards)
    (npz,) = sorted(run.relevance("test").glob("*.npz"))[:1]
    cases.append(Case(npz, lambda: read_ledgers(npz.parent, [npz.stem], 2)))
    options = ["--config", str(folder / "recipe.yaml"), "--shards", "s", "--run", "r"]
    table = PackConfig("csv", folder / "table.csv", folder / "out")
    several = PackConfig("several", folder / "several.yaml", folder / "out")
    again = PackConfig("folder", folder / "images", shards, size=32, workers=1)
    return [
        *cases,
        Case(folder / "recipe.yaml", lambda: parse(COMMANDS["train"], options)),
        Case(folder / "boxes.csv", lambda: read_boxes(folder / "boxes.csv")),
        Case(folder / "table.csv", lambda: read_source(table)),
        Case(folder / "several.yaml", lambda: read_source(several)),
        Case(folder / "labels.yaml", lambda: read_source(several)),
        *_public_cases(folder),
        Case(folder / "w.pth", lambda: read_tensor_file(folder / "w.pth", "--init")),
        Case(shards / "pack.json", lambda: pack(again)),
    ]


def _public_cases(folder: Path) -> list[Case]:
    """Each document of the public data sets, and a table of masks of one."""
    cases = []
    for source in DOCUMENTS:
        home = folder / source
        config = SourceConfig(source, home, views="all")
        for file in write_public_set(home, source):
            if file.name == "runs.csv":
                masked = replace(config, masks=file)
                cases.append(Case(file, lambda masked=masked: _read_masks(masked)))
            else:
                cases.append(Case(file, lambda config=config: read_source(config)))
    return cases


def _read_masks(config: SourceConfig) -> None:
    for record in read_source(config).records:
        if record.mask:
            read_mask(record.mask, 32, 32)


def _checkpoint_cases(run: RunDirectory, recipe: str) -> list[Case]:
    """The latest checkpoint, and again with hashes that a stranger has made anew."""
    latest = sorted(run.checkpoints.glob("[0-9]*"))[-1]
    position, state = latest / "position.json", latest / "state.safetensors"

    def read() -> object:
        return load_latest(run.checkpoints, recipe, lambda _: None)

    def sign() -> None:
        try:
            about = json.loads(position.read_bytes())
            about["state_sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
            del about["sha256"]
            content = json.dumps(about, sort_keys=True).encode()
            about["sha256"] = hashlib.sha256(content).hexdigest()
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        position.write_text(json.dumps(about))

    return [Case(file, read, prepare) for file in (position, state) for prepare in (sign, int)]


def _shard_cases(shards: Path) -> list[Case]:
    """Index and samples, and a shard whose entry in the index was made anew."""
    shard = read_index(shards).packed()[0]
    tar = shard.file

    def read() -> None:
        entry = describe_shard(tar, shard.entry.samples)
        list(read_shard(shard._replace(entry=entry)))

    cases = [
        Case(shards / name, lambda: inspect_index(shards)) for name in ("index.json", "samples.csv")
    ]
    return [*cases, Case(tar, read)]


@contextmanager
def limited() -> Iterator[None]:
    """Raise `Hang` after a time, and let memory end a GiB above what is there."""

    def hang(*_: object) -> None:
        raise Hang

    status = Path("/proc/self/status").read_text()
    data = int(status.split("VmData:")[1].split()[0]) * 1024
    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data + MOST_BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def put_pipe(file: Path) -> None:
    """Make a pipe that nobody writes to."""
    os.mkfifo(file)


def put_endless(file: Path) -> None:
    """Make a link to a file without end."""
    file.symlink_to("/dev/zero")


def outcome_of(read: Callable[[], object]) -> str:
    """``read``, ``refused``, or a traceback."""
    try:
        with limited():
            read()
    except (CxrdistError, RunFailedError) as error:
        return "refused" if str(error).strip() else "an error without a word"
    except OSError as error:  # a name that is too long, say; the command says so in one line
        return "refused" if failure_of(error) else traceback.format_exc(limit=-4)
    except (Exception, Hang):
        return traceback.format_exc(limit=-4)
    return "read"


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_damaged_documents_are_read_or_refused(folder, capsys):
    """No traceback, nothing longer than 10 s or above a GiB, in any reader."""
    random, cases = Random(NUM_MUTATIONS), cases_of(folder)
    known, counts, faults = {}, Counter(), {}
    slowest = 0.0
    for number in range(NUM_MUTATIONS):
        case = cases[number % len(cases)]
        of_run = (
            case.file.is_relative_to(folder / "run")
            and str(case.file.relative_to(folder / "run")) in RUN_FILES
        )
        whole = of_run and random.random() < REPORTS
        read = (lambda: report(ReportConfig(folder / "run"))) if whole else case.read
        files = [file for file in case.file.parent.iterdir() if file.is_file()]
        before = known.setdefault(case.file.parent, {f: f.read_bytes() for f in files})
        case.file.write_bytes(mutate(case.file.name, before[case.file], random))
        case.prepare()
        began = time.monotonic()
        outcome = outcome_of(read)
        slowest = max(slowest, time.monotonic() - began)
        counts[outcome if outcome in ("read", "refused") else "failed"] += 1
        if outcome not in ("read", "refused"):
            counts[case.file.name] += 1
            faults.setdefault(f"{case.file.name}: {outcome}", case.file.read_bytes()[:300])
        for file in case.file.parent.iterdir():
            if file in before:
                file.write_bytes(before[file])
    gc.collect()
    with capsys.disabled():
        print(f"\n{dict(counts)} of {NUM_MUTATIONS}, the slowest took {slowest:.1f} s")
    assert not faults, "\n\n".join(f"{k}\n{v!r}" for k, v in faults.items())
    assert counts["refused"] > counts["read"] > 0


@pytest.mark.parametrize("put", [put_pipe, put_endless, Path.mkdir])
def test_what_is_no_regular_file_is_read_or_refused(folder, put):
    """A pipe is not waited for, a file without end is not read to its end, in any reader."""
    faults = []
    cases = {case.file: case for case in cases_of(folder)}
    shard = read_index(folder / "shards").packed()[0]
    cases[shard.file] = Case(shard.file, lambda: list(read_shard(shard)))
    for case in cases.values():
        aside = case.file.with_name("aside")
        case.file.rename(aside)
        put(case.file)
        outcome = outcome_of(case.read)
        if case.file.is_dir() and not case.file.is_symlink():
            case.file.rmdir()
        aside.rename(case.file)
        if outcome not in ("read", "refused"):
            faults.append(f"{case.file.name}: {outcome}")
    assert not faults, "\n\n".join(faults)
