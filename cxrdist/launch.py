"""Launch the ranks of a command with `accelerate launch`, with better errors and exit codes.

usage: cxrdist launch [OPTIONS OF accelerate launch] COMMAND [OPTIONS]
       python -m cxrdist.launch [OPTIONS OF accelerate launch] -m cxrdist COMMAND [OPTIONS]

`accelerate launch` by itself exits with 1 whatever its ranks return, prints its own traceback after
their message, does not pass signals on to a single process, and does not handle USR1. Here the
command is parsed once before any rank starts, the message of a failed rank is printed last, and its
exit code is returned.
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
from cxrdist.packaged import HARDWARE, files_in, path_of
from cxrdist.signals import SAME_REQUEST_SECONDS, STOP_CODE, STOP_SIGNALS, handle_stops

_received: dict[int, float] = {}
"""Time at which each signal first arrived."""


def main(arguments: list[str] | None = None) -> int:
    """Launch the ranks and wait for them.

    Returns:
        The ranks' exit code; if they differ, 75 before 2 before 1. It is 1 if a rank was killed or
        crashed without a stop request, because the launcher then stops the others. It is 2 if the
        command or the launch is rejected; then no rank is started.
    """
    handle_stops(_pass_on)
    # torchrun would handle these signals itself: kill the ranks, and exit with its own code.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    try:
        return _launch(_read(sys.argv[1:] if arguments is None else arguments))
    except CxrdistError as error:
        report_error(error)
        return 2


def _read(arguments: list[str]) -> Any:
    """Parse the options of `accelerate launch`, and the cxrdist command after them."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _refuse  # argparse would print 40 lines of usage
    parser.usage = "cxrdist launch [options of accelerate launch] COMMAND [options of COMMAND]"
    parser.description = (
        "Start a command of cxrdist on several ranks. --config_file FILE describes them: "
        f"{', '.join(files_in(HARDWARE))}, or a file of your own."
    )
    options = parser.parse_args(arguments)
    if not options.module:  # the command is in the position of accelerate's script
        command = [options.training_script, *options.training_script_args]
        options.module, options.training_script = True, "cxrdist"
        options.training_script_args = command
    if options.config_file is not None:
        options.config_file = path_of(HARDWARE, options.config_file)
        if not os.path.isfile(options.config_file):
            raise CxrdistError(
                f"--config_file {options.config_file}: no such file; expected one, or "
                f"{', '.join(files_in(HARDWARE))}"
            )
    # A wrong command is refused once, before any rank starts. `-m` may name another program.
    if options.training_script == "cxrdist":
        read_arguments(options.training_script_args)
    return options


def _refuse(message: str) -> NoReturn:
    raise CxrdistError(f"launch: {message}; see accelerate launch --help")


def _launch(options: Any) -> int:
    """Start the ranks, wait for them, and return their exit code."""
    from accelerate.commands.launch import launch_command
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # This logger would report the exit code of each rank after the rank's own message.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        return _code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except subprocess.CalledProcessError as error:
        return _code_of({0: error.returncode})
    except (ValueError, ConnectionError, DistNetworkError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CxrdistError(f"launch: {reason}; fix the options before the command") from error
    return 0


def _code_of(codes: dict[int, int]) -> int:
    """Return a job's exit code from those of its failed ranks, and print which were killed."""
    stopped = {-number for number in STOP_SIGNALS} if _received else set()
    for rank, code in sorted(codes.items()):
        if code < 0 and code not in stopped:
            name = signal.Signals(-code).name
            print(f"cxrdist: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
    crashed = {code for code in codes.values() if code < 0 and -code not in STOP_SIGNALS}
    if crashed and not _received:
        return 1
    # A rank without a handler yet is ended by the signal itself; nothing is lost then.
    endings = {STOP_CODE if code in stopped else code for code in codes.values()}
    # 1 also stands for any other code, such as that of a crash after a stop request.
    return next(code for code in (STOP_CODE, 2, 1) if code in endings or code == 1)


def _pass_on(number: int, _: FrameType | None) -> None:
    """Pass a signal on to the ranks; kill them on a second request, since they may hang.

    INT becomes TERM: a Python that is still starting ends on INT with a traceback and exit code 1.
    """
    now = time.monotonic()
    second = any(now - came > SAME_REQUEST_SECONDS for came in _received.values())
    _received.setdefault(number, now)
    children = psutil.Process().children()
    # Without a running rank there is nothing to save.
    if not children:
        raise SystemExit(STOP_CODE)
    passed = signal.SIGTERM if number == signal.SIGINT else number
    for child in children:
        child.send_signal(signal.SIGKILL if second else passed)


if __name__ == "__main__":
    sys.exit(main())
