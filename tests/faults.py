"""Fault injection: the real command on real ranks, hit at a chosen moment of its own progress."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
from support import LAUNCH

T = TypeVar("T")
DEADLINE_S = 240  # of anything that a test waits for; a hang fails


def is_over(process: psutil.Process) -> bool:
    """Whether a process has ended, also if nobody has asked for its exit code yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def wait_until(what: Callable[[], T]) -> T:
    """Ask again and again until the answer is true and no process or file is missing."""
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE_S:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess, FileNotFoundError):
            if answer := what():
                return answer
        time.sleep(0.002)
    raise TimeoutError


class Launched:
    """`cxrdist ARGUMENTS` on some ranks, in a process group of its own.

    Attributes:
        run: the run directory that is watched.
        process: the launcher.
    """

    def __init__(
        self,
        world: int,
        run: Path,
        *arguments: object,
        launcher: str = "cxrdist.launch",
        launch_options: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        """Start it; the launcher is a module, its options override those given here."""
        self.run, self.world = run, world
        ranks = ("--config_file", str(LAUNCH / "cpu.yaml"), "--num_processes", str(world))
        if world == 1:
            ranks = ("--num_machines", "1", "--num_processes", "1", "--dynamo_backend", "no")
        self._output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", launcher, *ranks, "--main_process_port", "0"),
                *(*launch_options, "-m", "cxrdist", *map(str, arguments)),
            ],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                **{"ACCELERATE_USE_CPU": "yes", "OMP_NUM_THREADS": "1"},
                **{"CUDA_VISIBLE_DEVICES": "", "CXRDIST_STEPS_PER_LOG_ROW": "1"},
                **environment,
            },
        )

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.environ().get("RANK", "0") == str(number):
                    return child
            except psutil.Error:
                continue
        raise ProcessLookupError(f"no rank {number}")

    def ranks(self) -> list[psutil.Process]:
        """The processes of all ranks, as soon as they are there."""
        return wait_until(lambda: [self.rank(number) for number in range(self.world)])

    def wait_for(self, num_changes: int, seconds: float = 0.0) -> bool:
        """Wait until log and checkpoints have changed so often, and for a moment between changes.

        Returns:
            Whether it still runs.
        """
        seen, began = self._state(), time.monotonic()
        while num_changes:
            if self.process.poll() is not None:
                return False
            if time.monotonic() - began > DEADLINE_S:
                raise TimeoutError(self.end())
            time.sleep(0.002)
            state = self._state()
            num_changes -= state != seen
            seen = state
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _state(self) -> tuple[object, ...]:
        log, checkpoints = self.run / "log.jsonl", self.run / "checkpoints"
        names = sorted(os.listdir(checkpoints)) if checkpoints.is_dir() else []
        return (log.stat().st_size if log.is_file() else 0, *names)

    def kill(self, victim: str) -> bool:
        """End the whole job or a rank ("job", "rank 1") with SIGKILL; False if it was over."""
        if victim == "job":
            os.killpg(self.process.pid, signal.SIGKILL)
            return True
        try:
            self.rank(int(victim.removeprefix("rank "))).kill()
        except (ProcessLookupError, psutil.Error):
            return False
        return True

    def end(self) -> str:
        """Wait for the end; what was said."""
        try:
            self.process.wait(DEADLINE_S)
        finally:
            if self.process.poll() is None:
                self.kill("job")
        self._output.seek(0)
        return self._output.read()
