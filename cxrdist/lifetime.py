"""The end of a rank: with its launcher, with its own exit code, and with one error message."""

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CONNECT_SECONDS = 10.0
# Variables that `accelerate launch` sets for a single process; it starts several with torchrun.
_OF_SIMPLE_LAUNCH = {
    *("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
    *("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"),
}
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_SHORTER = "start with `cxrdist launch`, not `accelerate launch`, to see this line alone"
_joined = threading.Event()


def end_with_launcher() -> None:
    """Make this process end when its launcher dies; on Linux only.

    The kernel sends SIGKILL to one of several ranks: nothing can be saved without the others, and
    a rank that waits in C++ for the launcher's store would ignore other signals for 30 minutes. A
    single process gets SIGTERM and saves: Ctrl-C, or a TERM to the group, ends `accelerate launch`
    first. Without a launcher this does nothing.

    The kernel watches the thread that started this process; launchers start ranks from their main
    thread. If there is a process in between, such as a shell script, it is watched instead of the
    launcher.
    """
    several = "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not (several or os.environ.keys() >= _OF_SIMPLE_LAUNCH):
        return
    parent = os.getppid()
    number = signal.SIGKILL if several else signal.SIGTERM
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent or not _below_python():  # the launcher died before prctl
        end_process("the launcher of this rank has died; run the same command again")
    # The ranks connect through a store of the first node's launcher if the second variable is set.
    on_other_node = os.environ.get("GROUP_RANK", "0") != "0"
    if on_other_node and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        threading.Thread(target=_watch_first_launcher, daemon=True).start()


def joined() -> None:
    """Stop watching the first node's launcher: all ranks are connected to each other now."""
    _joined.set()


def report_error(error: Exception) -> None:
    """Print the error of a command in one line; on several ranks of a node, only once.

    The launcher of several ranks gives each of them a file for its error (torchelastic's
    TORCHELASTIC_ERROR_FILE), and shows the text at the end of its own report on failed ranks, which
    `cxrdist launch` does not print.
    """
    line = " ".join(str(error).split())
    if file := os.environ.get(_ERROR_FILE):
        message = f"cxrdist: {line} ({_SHORTER})"
        entry = {"message": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # such as a full disk: the line must still be printed
            Path(file).write_text(json.dumps(entry))
    if _is_first(line):
        print(f"cxrdist: {line}", file=sys.stderr, flush=True)


def reports_stop(line: str) -> bool:
    """Return whether this rank prints that it was stopped: the first one of a node does.

    None does after the error of a rank, since the launcher then ends the others.
    """
    return not another_rank_failed() and _is_first(line)


def _is_first(line: str) -> bool:
    """Return whether no other rank of this node has printed a line."""
    if file := os.environ.get(_ERROR_FILE):
        # The launcher calls it ATTEMPT/LOCAL_RANK/error.json, so that the ranks of a node share
        # ATTEMPT. Only one of them can create the file of a line, and that one prints the line.
        name = f"{hashlib.sha256(line.encode()).hexdigest()}.reported"
        try:
            (Path(file).parents[1] / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # such as a full disk: the line must still be printed
            pass
    return True


def another_rank_failed() -> bool:
    """Return whether another rank of this node has reported an error.

    The launcher then ends all ranks, so a signal or a lost connection follows from that error.
    """
    if not (file := os.environ.get(_ERROR_FILE)):
        return False
    own = Path(file)
    return any(other != own for other in own.parents[1].glob(f"*/{own.name}"))


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code.

    A rank that stops early is still connected, and cannot close its connections, since other ranks
    may not answer. The threads of the connections sometimes abort a process while Python shuts down
    (SIGABRT instead of 75 in 2 of 80 ranks with gloo), so such a rank skips the shutdown.
    """
    try:
        code: object = command()
    except SystemExit as end:
        code = end.code
    distributed = sys.modules.get("torch.distributed")
    if isinstance(code, int) and distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)  # type: ignore[arg-type]


def _below_python() -> bool:
    """Return whether an ancestor runs this Python, as a launcher does and init does not."""
    import psutil  # imported late: only a rank needs it

    own = psutil.Process()
    # `as_dict` gives None for a process of another user, such as init.
    return any(parent.as_dict(["exe"])["exe"] == own.exe() for parent in own.parents())


def _watch_first_launcher() -> None:
    """End this rank if the launcher of the first node dies before all ranks have joined.

    The launcher of this node does not notice that, and torch would try to connect for 30 minutes.
    So this holds a connection to the store, which the kernel closes when the launcher dies.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with socket.create_connection(address, timeout=_CONNECT_SECONDS) as store:
            store.settimeout(0.5)  # so that the loop checks `_joined` again
            while not _joined.is_set():
                try:
                    # The store sends nothing unasked, so that recv returns only when it closes.
                    if not store.recv(1):
                        raise ConnectionResetError("it closed the connection")
                except TimeoutError:
                    continue
    except OSError as error:
        if not _joined.is_set():
            where = "{}:{}".format(*address)
            end_process(
                f"rank {os.environ['RANK']}: the launcher of the first node, at {where}, has "
                f"died ({error}); check that node, then run the same command again"
            )


def end_process(reason: str) -> NoReturn:
    """Print the reason and end this process at once, from any thread and whatever others wait for.

    The launcher then ends the other ranks.
    """
    os.write(2, f"cxrdist: {reason}\n".encode())
    os._exit(1)
