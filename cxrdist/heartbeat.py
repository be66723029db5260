"""The heartbeat of the ranks: if one is stopped or cut off, end the job and name the rank."""

import atexit
import contextlib
import math
import os
import platform
import threading
import time

import psutil
import torch.distributed

from cxrdist.errors import CxrdistError
from cxrdist.lifetime import end_process

HANG_SECONDS = 120.0
MEND = "the job ends. Check that machine, then run the same command again"
_DONE = "done"


def start_heartbeat(rank: int, world_size: int) -> None:
    """Start a thread that sends beats and watches other ranks until the process ends.

    The thread beats during long work of the main thread (decoding, downloads, writing), but not in
    a process that is stopped, swapped out or cut off from the network. The main rank watches all
    others, and they watch the main rank. Beats go through the store of the first node's launcher;
    if the store does not answer, a second thread ends this process. CXRDIST_HANG_SECONDS changes
    the limit of 120 s.
    """
    given = os.environ.get("CXRDIST_HANG_SECONDS", str(HANG_SECONDS))
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < math.inf:
        raise CxrdistError(f"CXRDIST_HANG_SECONDS: is {given!r:.40}, expected seconds, such as 120")
    heart = _Heart(rank, list(range(1, world_size)) if rank == 0 else [0], limit)
    heart.start()
    # A rank that is done must not be taken for a hung one while others still work.
    atexit.register(heart.end)


class _Heart:
    """Sends beats and watches other ranks, ten times per limit."""

    def __init__(self, rank: int, others: list[int], limit: float) -> None:
        self.rank, self.others, self.limit = rank, others, limit
        # A clone: torch allows only one thread per store.
        self.store = torch.distributed.distributed_c10d._get_default_store().clone()
        self.beaten = time.monotonic()  # time at which the store last accepted a beat
        self.ending = threading.Event()
        self.beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.beating.start()
        threading.Thread(target=self._watch_the_store, name="heartbeat watch", daemon=True).start()

    def end(self) -> None:
        """Report that this rank is done; wait for the store, at most for the limit."""
        self.ending.set()
        self.beating.join()

    def _beat(self) -> None:
        store, period = self.store, self.limit / 10
        seen = {other: (b"", time.monotonic()) for other in self.others}
        try:
            store.set(f"about/{self.rank}", f"{platform.node()}, pid {os.getpid()}")
            count = 0
            while not self.ending.wait(period):
                count += 1
                store.set(f"beat/{self.rank}", str(count))
                now, before = time.monotonic(), self.beaten
                # This process was stopped itself, perhaps like all others: give them a new limit.
                if now - before > 3 * period:
                    seen = {other: (beat, now) for other, (beat, _) in seen.items()}
                self.beaten = now
                for other in self.others:
                    # `get` alone would wait for a rank that has not beaten yet.
                    beat = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else b""
                    if beat != seen[other][0] or beat == _DONE.encode():
                        seen[other] = (beat, now)
                    elif now - seen[other][1] > self.limit:
                        self._end_job(other, now - seen[other][1])
            store.set(f"beat/{self.rank}", _DONE)
        except RuntimeError:
            # The store's process has ended; its launcher or the next collective reports that.
            return

    def _watch_the_store(self) -> None:
        period = self.limit / 10
        before = time.monotonic()
        while self.beating.is_alive():
            time.sleep(period)
            now = time.monotonic()
            if now - before > 3 * period:  # this process was stopped itself: start a new limit
                self.beaten = now
            before = now
            if now - self.beaten > self.limit:
                end_process(
                    f"rank {self.rank}: the launcher of the first node has not answered for "
                    f"{now - self.beaten:.0f} s; {MEND}"
                )

    def _end_job(self, rank: int, seconds: float) -> None:
        known = self.store.check([f"about/{rank}"])
        location = self.store.get(f"about/{rank}").decode() if known else "it never started"
        _kill_neighbour(rank, location)
        end_process(f"rank {rank} ({location}) has not answered for {seconds:.0f} s; {MEND}")


def _kill_neighbour(rank: int, location: str) -> None:
    """Kill a hanging rank if it is on this node; its launcher would first wait 30 s for it."""
    host, _, pid = location.partition(", pid ")
    if host == platform.node():
        with contextlib.suppress(psutil.Error, ValueError):
            neighbour = psutil.Process(int(pid))
            # The rank may have ended, and its PID may be that of another process.
            if neighbour.environ().get("RANK") == str(rank):
                neighbour.kill()
