"""What is written and removed: nothing through links, only names of its own."""

import errno
import fcntl
import os
import re
import stat
from pathlib import Path

import pytest
from support import small_disk

from cxrdist.config import Network
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.files import (
    append_log,
    atomic_directory,
    atomic_file,
    cut_log,
    locked,
    read_bytes,
    read_json,
    refuse_unwritable,
    remove_made,
    sweep,
    waiting_lock,
    write_table,
    write_text,
)
from cxrdist.model.densenet import Classifier, save_model

DEAD = "999999999"  # above the largest process id of Linux


def owner_of(name: str) -> str:
    """The name of what a process of this host makes under a name."""
    with atomic_file(Path(name)) as partial:
        partial.touch()
    Path(name).unlink()
    return partial.name


@pytest.mark.parametrize("name", [".lock", "log.jsonl"])
def test_what_a_link_points_to_is_not_written(tmp_path, name):
    """A lock and a log through a link are refused, a file is put in the link's place."""
    victim = tmp_path / "thesis"
    victim.write_text("years")
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / name
    link.symlink_to(victim)
    with pytest.raises(CxrdistError, match="is a link"), locked(tmp_path / "run"):
        append_log(link, {})
    with pytest.raises(CxrdistError, match="is a link"):
        cut_log(link, 0)
    write_text(link, "own")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("years", "own", False)


def test_a_directory_takes_no_place_of_a_link_or_a_file(tmp_path):
    """What the link points to stays as it was, and so does a file of that name."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "page").touch()
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(CxrdistError, match=f"{name}: is a file or a link"):
            atomic_directory(tmp_path / name).__enter__()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "page", "thesis"]


def test_a_directory_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    """As on NFS, where a file that another process has open keeps its directory busy."""

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    def fill() -> None:
        with atomic_directory(tmp_path / "maps"):
            monkeypatch.setattr(os, "rmdir", busy)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill()
    monkeypatch.undo()
    assert not (tmp_path / "maps").exists()


def test_only_names_of_dead_processes_are_swept(tmp_path, monkeypatch):
    """A stranger's .partial stays, a link of our name goes and its target stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    ours = owner_of("x").replace(f".{os.getpid()}.", f".{DEAD}.")
    strangers = (".thesis.partial", "..partial", ".x.partial", ".nfs0001")
    for name in strangers:
        Path(name).touch()
    for name in (ours, ours.replace(".x.", ".y.")):
        Path(name).mkdir()
    Path(ours.replace(".x.", ".z.")).symlink_to(tmp_path / "thesis")
    sweep(tmp_path, alone=True)
    assert sorted(os.listdir()) == sorted((*strangers, "thesis"))


def test_only_files_whose_whole_names_match_are_removed(tmp_path):
    """A link goes and its target stays; folders, kept names and other names stay."""
    made, directory = re.compile(r"\d\.png"), tmp_path / "maps"
    (directory / "3.png").mkdir(parents=True)
    (tmp_path / "thesis.png").touch()
    for name in ("1.png", "2.png", "10.png"):
        (directory / name).touch()
    (directory / "4.png").symlink_to(tmp_path / "thesis.png")
    remove_made(directory, made, {"2.png"})
    assert sorted(os.listdir(directory)) == ["10.png", "2.png", "3.png"]
    assert sorted(os.listdir(tmp_path)) == ["maps", "thesis.png"]


def test_a_directory_of_which_nothing_is_left_is_removed(tmp_path):
    """One that is not there is no error."""
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "1.png").touch()
    for _ in range(2):
        remove_made(tmp_path / "maps", re.compile(r"\d\.png"))
        assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_whoever_writes_a_file_removes_what_killed_processes_left_beside_it(tmp_path, make):
    """Such as a half-written model in RUN/stages/NAME; a file of a running process stays."""
    running = tmp_path / owner_of("x").replace(f".{os.getpid()}.", f".{os.getppid()}.")
    dead = tmp_path / owner_of("y").replace(f".{os.getpid()}.", f".{DEAD}.")
    running.touch()
    dead.mkdir()
    (dead / "model.safetensors").touch()
    with make(tmp_path / "new") as partial:
        partial.touch()
    assert sorted(tmp_path.iterdir()) == sorted([running, tmp_path / "new"])


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    """Tables, directories and the model's weights alike."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "")
        with atomic_directory(tmp_path / "model") as partial:
            save_model(Classifier(Network(4, (1, 1, 1, 1)), ["a", "b"], 32), partial)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_names_that_are_not_utf8_are_written_readable(tmp_path):
    r"""A byte of a file name that is not UTF-8 becomes \udcXX; the file stays valid."""
    name = os.fsdecode(b"caf\xe9.png")
    write_table(tmp_path / "t.csv", ("path",), [(name,)])
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "path\ncaf\\udce9.png\n"


def test_what_is_written_and_where_is_judged_before_the_work(tmp_path):
    """A directory, and a file where a directory would be."""
    (tmp_path / "file").touch()
    with pytest.raises(CxrdistError, match="is a directory"):
        refuse_unwritable(tmp_path)
    with pytest.raises(CxrdistError, match="file is not a directory"):
        refuse_unwritable(tmp_path / "file" / "out.csv")
    refuse_unwritable(tmp_path / "new" / "out.csv")


def test_files_that_are_none_or_too_large_are_refused(tmp_path):
    """A pipe is not waited for, and a sparse file takes no memory."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CxrdistError, match="special file"):
        read_bytes(tmp_path / "pipe", 10)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CxrdistError, match="expected at most 10"):
        read_bytes(tmp_path / "large", 10)


def test_what_may_not_be_read_or_written_is_no_damage(tmp_path):
    """Another user's file and directory: the machine's fault, and not `run cxrdist train again`."""
    write_text(tmp_path / "run.json", "{}")
    (tmp_path / "run.json").chmod(0)
    tmp_path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(RunFailedError, match=r"run\.json: Permission denied; change"):
            read_json(tmp_path / "run.json")
        with pytest.raises(RunFailedError, match=r"log\.jsonl: Permission denied; change"):
            append_log(tmp_path / "log.jsonl", {})
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_a_full_disk_is_named_at_the_first_byte(tmp_path, make):
    """The line has the name that the user knows, and nothing half-written stays."""
    with small_disk(tmp_path / "disk", "64k"):
        (tmp_path / "disk" / "rest").write_bytes(b"x" * 60_000)

        def write() -> None:
            with make(tmp_path / "disk" / "out") as partial:
                file = partial if make is atomic_file else partial / "f"
                file.write_bytes(b"x" * 100_000)

        with pytest.raises(RunFailedError, match=r"disk/out: No space left on device; make room"):
            write()
        assert os.listdir(tmp_path / "disk") == ["rest"]


def test_a_lock_leaves_no_empty_directory(tmp_path):
    """Directories that it made go again where nothing was written; what was there before stays."""
    run = tmp_path / "runs" / "a"
    with locked(run):
        assert [file.name for file in run.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    with locked(run):
        (run / "log.jsonl").touch()
    with locked(run):
        pass
    assert sorted(file.name for file in run.iterdir()) == [".lock", "log.jsonl"]


def test_a_lock_that_others_wait_for_has_one_holder(tmp_path):
    """A run that decodes for its node, or a process that fetches weights; it ends with the lock."""
    lock = tmp_path / "lock"
    with waiting_lock(lock), open(lock) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(lock) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_its_holder_removes_is_not_taken(tmp_path, monkeypatch):
    """A file without a name locks nothing: the next process would make another one."""
    run = tmp_path / "run"
    run.mkdir()
    flock = fcntl.flock
    monkeypatch.setattr(
        "cxrdist.files.fcntl.flock",
        lambda file, how: (flock(file, how), (run / ".lock").unlink()),
    )
    with pytest.raises(CxrdistError, match="another cxrdist process is writing here"), locked(run):
        pass
