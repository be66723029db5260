"""Launch: `accelerate launch`, with signals passed on to the ranks and their exit code kept.

usage: python -m cxrdist.launch ARGUMENTS OF accelerate launch

`accelerate launch` itself exits with 1 whatever its ranks did, passes no signal on to a single
process, and knows no USR1.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

from cxrdist.signals import SAME_REQUEST_SECONDS, STOP_CODE, STOP_SIGNALS

_received: dict[int, float] = {}
"""When each signal first came."""


def main() -> int:
    """Launch the ranks and wait for them.

    Returns:
        The ranks' exit code; of different ones 75 before 2 before 1. It is 1 where a rank was
        killed or crashed and nobody asked the launcher to stop: the others then were.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
    # torchrun would kill the ranks after a while, and end with another code than theirs.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch.main()
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:
        codes = {0: error.returncode}
    else:
        return 0
    for rank, code in sorted(codes.items()):
        if code < 0 and -code not in _received:
            name = signal.Signals(-code).name
            print(f"cxrdist: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
    crashed = {code for code in codes.values() if code < 0 and -code not in STOP_SIGNALS}
    if crashed and not _received:
        return 1
    # A rank that had not yet begun to listen ends by the signal itself; nothing is lost then.
    found = {STOP_CODE if -code in _received else code for code in codes.values()}
    return next(code for code in (STOP_CODE, 2, 1) if code in found or code == 1)


def _pass_on(number: int, _: FrameType | None) -> None:
    """Pass a signal on; a second request kills, since a rank that hangs listens to nothing else."""
    now = time.monotonic()
    second = any(now - came > SAME_REQUEST_SECONDS for came in _received.values())
    _received.setdefault(number, now)
    children = psutil.Process().children()
    if not children:
        raise SystemExit(STOP_CODE)
    for child in children:
        child.send_signal(signal.SIGKILL if second else number)


if __name__ == "__main__":
    sys.exit(main())
