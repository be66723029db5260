"""Launch: the ranks of a command, by `accelerate launch`, which fails less well by itself.

usage: cxrdist launch [OPTIONS OF accelerate launch] COMMAND [OPTIONS]
       python -m cxrdist.launch [OPTIONS OF accelerate launch] -m cxrdist COMMAND [OPTIONS]

`accelerate launch` exits with 1 whatever its ranks did, prints a traceback of its own below their
message, passes no signal on to a single process, and knows no USR1. Here the command is read once
before any rank starts, a failed rank has the last word, and its exit code is kept.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any, NoReturn

import psutil

from cxrdist.cli import read_arguments
from cxrdist.errors import CxrdistError
from cxrdist.lifetime import report_error
from cxrdist.packaged import HARDWARE, names_in, path_of
from cxrdist.signals import SAME_REQUEST_SECONDS, STOP_CODE, STOP_SIGNALS

_received: dict[int, float] = {}
"""When each signal first came."""


def main(arguments: list[str] | None = None) -> int:
    """Launch the ranks and wait for them.

    Args:
        arguments: those of the command line if None.

    Returns:
        The ranks' exit code; of different ones 75 before 2 before 1. It is 1 where a rank was
        killed or crashed and nobody asked the launcher to stop: the others then were. It is 2
        where the command or the launch is refused; no rank is started then.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
    # torchrun would kill the ranks after a while, and end with another code than theirs.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    try:
        options = _read(sys.argv[1:] if arguments is None else arguments)
        return _launch(options)
    except CxrdistError as error:
        report_error(error)
        return 2


def _read(arguments: list[str]) -> Any:
    """Read the options of `accelerate launch`, and the command of cxrdist behind them.

    Raises:
        CxrdistError: an option, the hardware or the command is wrong.
    """
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _refuse  # argparse would print 40 lines of usage
    options = parser.parse_args(arguments)
    if not options.module:  # a command stands where accelerate has a script
        command = [options.training_script, *options.training_script_args]
        options.module, options.training_script = True, "cxrdist"
        options.training_script_args = command
    if options.config_file is not None:
        options.config_file = path_of(HARDWARE, options.config_file)
        if not os.path.isfile(options.config_file):
            raise CxrdistError(
                f"--config_file {options.config_file}: no such file; expected one, or "
                f"{', '.join(names_in(HARDWARE))}"
            )
    if options.training_script == "cxrdist":
        read_arguments(options.training_script_args)
    return options


def _refuse(message: str) -> NoReturn:
    raise CxrdistError(f"launch: {message}; see accelerate launch --help")


def _launch(options: Any) -> int:
    """Start the ranks, wait for them, and return their exit code.

    Raises:
        CxrdistError: accelerate or torch cannot start ranks in this way.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It would report the exit code of each rank below the rank's own message.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        return _code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        return _code_of({0: error.returncode})
    except (ValueError, ConnectionError, DistNetworkError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CxrdistError(f"launch: {reason}; mend the options before the command") from error
    return 0


def _code_of(codes: dict[int, int]) -> int:
    """Return the exit code of a job by those of its failed ranks, and name ranks that were killed.

    Args:
        codes: by rank; the negative number of a signal where one has ended it.
    """
    for rank, code in sorted(codes.items()):
        if code < 0 and -code not in _received:
            name = signal.Signals(-code).name
            print(f"cxrdist: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
    crashed = {code for code in codes.values() if code < 0 and -code not in STOP_SIGNALS}
    if crashed and not _received:
        return 1
    # A rank that had not yet begun to listen ends by the signal itself; nothing is lost then.
    endings = {STOP_CODE if -code in _received else code for code in codes.values()}
    return next(code for code in (STOP_CODE, 2, 1) if code in endings or code == 1)


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
