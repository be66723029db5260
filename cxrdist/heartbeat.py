"""The heartbeat of the ranks: one that is stopped or cut off ends the job, and is named."""

import atexit
import os
import platform
import sys
import threading
import time

import torch.distributed

HANG_SECONDS = 120.0
_DONE = "done"


def start_heartbeat(rank: int, world_size: int) -> None:
    """Beat from a thread and watch the others, until the process ends.

    The thread beats through long work of the main thread (decoding, downloads, writing), but not
    in a process that is stopped, swapped out or cut off from the network. The main rank watches
    all others, and they watch the main rank. CXRDIST_HANG_SECONDS changes the limit of 120 s.
    """
    limit = float(os.environ.get("CXRDIST_HANG_SECONDS", HANG_SECONDS))
    store = torch.distributed.distributed_c10d._get_default_store().clone()
    others = list(range(1, world_size)) if rank == 0 else [0]
    ending = threading.Event()
    heart = threading.Thread(
        target=_beat, args=(store, rank, others, limit, ending), name="heartbeat", daemon=True
    )
    heart.start()

    def end() -> None:
        ending.set()
        heart.join()

    atexit.register(end)


def _beat(
    store: torch.distributed.Store,
    rank: int,
    others: list[int],
    limit: float,
    ending: threading.Event,
) -> None:
    """Beat and watch, ten times in the limit."""
    period = limit / 10
    about = f"{platform.node()}, pid {os.getpid()}"
    seen = {other: (b"", time.monotonic()) for other in others}
    count, before = 0, time.monotonic()
    try:
        store.set(f"about/{rank}", about)
        while not ending.wait(period):
            count += 1
            store.set(f"beat/{rank}", str(count))
            now = time.monotonic()
            if now - before > 3 * period:  # this process was stopped itself, perhaps all were
                seen = {other: (beat, now) for other, (beat, _) in seen.items()}
            before = now
            for other in others:
                beat = store.get(f"beat/{other}") if store.check([f"beat/{other}"]) else b""
                if beat != seen[other][0] or beat == _DONE.encode():
                    seen[other] = (beat, now)
                elif now - seen[other][1] > limit:
                    _end_job(store, other, now - seen[other][1])
        store.set(f"beat/{rank}", _DONE)
    except RuntimeError:
        # The store's process has ended; its launcher or the next collective says so.
        return


def _end_job(store: torch.distributed.Store, rank: int, seconds: float) -> None:
    known = store.check([f"about/{rank}"])
    about = store.get(f"about/{rank}").decode() if known else "it never began"
    print(
        f"cxrdist: rank {rank} ({about}) has not answered for {seconds:.0f} s; the job ends. "
        "See to that machine, then run the same command again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
