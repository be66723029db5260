"""The time limit of an image: processor time, so that a busy machine loses no good file."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from cxrdist.data import workers
from cxrdist.data.workers import image_workers, in_order, schedule
from cxrdist.errors import CxrdistError, Stopped
from cxrdist.signals import stopping_at_once

# The fork server imports the module, and so interrupts all processes at its start.
INTERRUPTED = """
from cxrdist.data.workers import image_workers
from cxrdist.errors import Stopped
from cxrdist.signals import stopping_at_once
if __name__ == "__main__":
    try:
        with stopping_at_once(), image_workers(2, ["interrupts"]):
            print("continues")
    except Stopped as stop:
        print(stop)
"""


class Item(NamedTuple):
    file: Path


def wait(item: Item) -> str:
    """Take longer than the limit by the clock."""
    time.sleep(1.5)
    return item.file.name


def spin(item: Item) -> str:
    """Never come back from C code, for one of the files."""
    if item.file.name == "slow":
        re.fullmatch("(a+)+", "a" * 60 + "b")
    return item.file.name


def refuse(item: Item) -> Item:
    if item.file.name == "bad":
        raise CxrdistError("bad: is refused")
    return item


def test_a_script_is_told_to_guard_its_calls(tmp_path):
    """Its workers import it, and so call `pack` themselves before they can work."""
    from support import make_images  # loads PyTorch, for which the workers below would wait

    source = make_images(tmp_path / "images", {"a": 6, "b": 6})
    paths = f"Path({str(source)!r}), Path({str(tmp_path / 'out')!r})"
    call = f'pack(PackConfig("folder", {paths}, size=32, workers=1, split="0.5/0.2/0.3"))\n'
    imports = (
        "from pathlib import Path\n"
        "from cxrdist.config import PackConfig\n"
        "from cxrdist.data.pack import pack\n"
    )
    script = tmp_path / "mine.py"
    for guard, code in (("", 1), ('if __name__ == "__main__":\n    ', 0)):
        script.write_text(imports + guard + call)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True)
        assert done.returncode == code
        assert ('below a line if __name__ == "__main__":' in done.stderr) == (not guard)
        assert "BrokenProcessPool" not in done.stderr


@pytest.mark.parametrize("make", [wait, spin])
def test_the_limit_of_an_image_is_of_processor_time(make, monkeypatch):
    """A file that waits is read; one that computes on costs itself, and is named."""
    monkeypatch.setattr(workers, "WAITING", 60)  # so that a busy machine passes, too
    names = ["a", "slow"]
    with image_workers(1, [__name__]) as pool:
        made = list(in_order(pool, make, [Item(Path(name)) for name in names], 2, 1))
    if make is spin:
        assert isinstance(made[1], CxrdistError)
        assert str(made[1]) == "slow: was not read within 1 s of processor time"
        made[1] = "slow"
    assert made == names


def test_a_worker_that_waits_for_items_has_no_limit():
    """Or what it does between them, such as importing a decoder, would end it."""

    def seconds_left(item: Item) -> float:
        return signal.getitimer(signal.ITIMER_PROF)[0]

    try:
        (during,) = workers._make_each([seconds_left], [Item(Path("a"))], 60)
        after = signal.getitimer(signal.ITIMER_PROF)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert 0 < during < 61
    assert after == (0, 0)


def test_each_step_takes_what_the_one_before_has_made(monkeypatch):
    """An item that fails in the first step takes no second one; the others take both."""
    monkeypatch.setattr(workers, "WAITING", 60)
    names = ["a", "bad", "slow", "b"]
    with image_workers(1, [__name__]) as pool:
        items = [Item(Path(name)) for name in names]
        made = schedule(pool, [refuse, spin, str.upper], items, 1).results()
    assert [made[0], made[3]] == ["A", "B"]
    assert [str(error) for error in made[1:3]] == [
        "bad: is refused",
        "slow: was not read within 1 s of processor time",
    ]


def test_the_chunks_that_wait_are_two_for_each_worker(monkeypatch):
    """Whatever the cores: three workers would idle with those of one core."""
    monkeypatch.setattr(workers, "num_cores", lambda: 1)
    submitted = []

    def submit(pool, steps, items, seconds):
        submitted.extend(items)
        return SimpleNamespace(results=lambda: items)

    monkeypatch.setattr(workers, "schedule", submit)
    items = [Item(Path(f"{number}")) for number in range(9)]
    with image_workers(3, [__name__]) as pool:
        results = in_order(pool, wait, items, 1, 10)
        next(results)
        assert len(submitted) == 2 * 3 + 1
        assert [items[0], *results] == items


def test_ctrl_c_at_the_start_of_the_fork_server_prints_one_line(tmp_path):
    """A terminal sends it to the processes, too, which have no handler yet."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    (tmp_path / "interrupts.py").write_text("import os, signal\nos.killpg(0, signal.SIGINT)\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    said = "stopped on SIGINT; run the same command again\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_workers_end_before_their_locks_are_removed(monkeypatch):
    """One that is still starting would not find the locks, and print a traceback."""
    join, codes = workers.Workers.join, []

    def join_after_workers(pool):
        for process in pool.first:
            process.join(5)
            codes.append(process.exitcode)
        join(pool)

    monkeypatch.setattr(workers.Workers, "join", join_after_workers)
    with pytest.raises(CxrdistError, match="bad"), image_workers(2, [__name__]):
        raise CxrdistError("bad")
    assert len(codes) == 2
    assert None not in codes


@pytest.mark.parametrize("during", ["schedule", "result"])
def test_a_stop_does_not_interrupt_calls_of_the_pool(during):
    """Such a call holds locks, for which the clean-up would wait for ever."""
    completed = []

    def call(name):
        if name == during:
            os.kill(os.getpid(), signal.SIGTERM)
        completed.append(name)

    class Result(Future):
        def result(self):
            call("result")
            return ["made"]

    def add(*_, **__):
        call("schedule")
        future = Result()
        future.set_result(None)
        return future

    with pytest.raises(Stopped), stopping_at_once():
        schedule(SimpleNamespace(schedule=add), [wait], [Item(Path("a"))]).results()
    assert completed[-1] == during
