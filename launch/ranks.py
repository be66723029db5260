"""`accelerate launch` that ends with the exit code of its ranks, and leaves signals to them.

The plain launcher ends with 1 whatever its ranks end with, and answers a signal by stopping them.
Here they decide: after TERM, INT or USR1 they save together and end with 75.

usage: python launch/ranks.py OPTIONS_OF_ACCELERATE_LAUNCH
"""

import os
import signal
import sys
from types import FrameType

import psutil
from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def forward(number: int, _: FrameType | None) -> None:
    """Pass a signal on to the ranks; SLURM's has reached them already."""
    if "SLURM_STEP_ID" not in os.environ:
        for rank in psutil.Process().children():
            rank.send_signal(number)


if __name__ == "__main__":
    for number in FORWARDED:
        signal.signal(number, forward)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun would take the others over
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)  # a signal, as a shell has it
