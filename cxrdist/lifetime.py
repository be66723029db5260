"""The lifetime of a rank: it ends with its launcher, with its own exit code, and says why once.

It joins no job whose first launcher died.
"""

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
# What `accelerate launch` gives to a single process; several are started by torchrun's agent.
_OF_SIMPLE_LAUNCH = {
    *("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
    *("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"),
}
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_joined = threading.Event()


def end_with_launcher() -> None:
    """Let this process end when its launcher dies, whatever either is doing; on Linux.

    The kernel sends one of several ranks SIGKILL: nothing can be saved without the others, and a
    rank that waits in C++ for the launcher's store would hear nothing else for 30 minutes. A single
    process gets SIGTERM and saves: Ctrl-C, or a TERM to the group, ends `accelerate launch` first.
    Without a launcher nothing is changed.

    The kernel watches the thread that started this process; launchers start ranks from their main
    thread. A process in between, such as a shell script, is watched in the launcher's place.
    """
    several = "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not (several or os.environ.keys() >= _OF_SIMPLE_LAUNCH):
        return
    parent = os.getppid()
    number = signal.SIGKILL if several else signal.SIGTERM
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent or not _below_python():  # it died before the kernel was asked
        _end("the launcher of this rank has died; run the same command again")
    if os.environ.get("GROUP_RANK", "0") != "0" and _launcher_keeps_store():
        threading.Thread(target=_watch_first_launcher, daemon=True).start()


def joined() -> None:
    """End the watch over the first node's launcher: from now on a lost connection is an error."""
    _joined.set()


def report_error(error: Exception) -> None:
    """Print in one line why a command failed, once for all ranks of a node that have this line.

    The launcher of several ranks names a file to each of them for its error (torchelastic's
    TORCHELASTIC_ERROR_FILE), and shows the text in its own report on the ranks that failed.
    """
    line = " ".join(str(error).split())
    if file := os.environ.get(_ERROR_FILE):
        entry = {"message": f"cxrdist: {line}", "timestamp": str(int(time.time()))}
        reported = Path(file).parents[1] / f"{hashlib.sha256(line.encode()).hexdigest()}.reported"
        with suppress(OSError):  # such as a full disk of temporary files: the line is still due
            Path(file).write_text(json.dumps(entry))
            try:
                reported.touch(exist_ok=False)
            except FileExistsError:
                return
    print(f"cxrdist: {line}", file=sys.stderr, flush=True)


def another_rank_failed() -> bool:
    """Whether another rank of this node has reported an error, after which the launcher ends all.

    What the other ranks then meet, a signal or a lost connection, follows from that error.
    """
    if not (file := os.environ.get(_ERROR_FILE)):
        return False
    own = Path(file)
    return any(other != own for other in own.parents[1].glob(f"*/{own.name}"))


def exit_with(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with its exit code.

    A rank that stops early is still connected, and cannot close its connections: other ranks may
    not answer. Their threads now and then abort a process that Python takes apart (SIGABRT in place
    of 75 in 2 of 80 ranks of gloo), so such a rank ends without that.
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
    """Whether an ancestor runs the Python of this process, as a launcher does and init does not."""
    python, pid = os.readlink("/proc/self/exe"), os.getppid()
    while pid:
        try:
            if os.readlink(f"/proc/{pid}/exe") == python:
                return True
        except OSError:  # of another user, such as init
            pass
        # pid (name) state parent ...; a name may hold spaces and brackets
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def _launcher_keeps_store() -> bool:
    """Return whether the ranks meet at a store that was there before any of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _watch_first_launcher() -> None:
    """End a rank of another node when the launcher of the first one dies before all have joined.

    Its own launcher learns nothing of that, and torch tries to connect for 30 minutes. So this
    holds a connection to the store, which the kernel closes with the process that keeps it.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with socket.create_connection(address, timeout=_CONNECT_SECONDS) as store:
            store.settimeout(0.5)
            while not _joined.is_set():
                try:
                    if not store.recv(1):
                        raise ConnectionResetError("it closed the connection")
                except TimeoutError:
                    continue
    except OSError as error:
        if not _joined.is_set():
            where = "{}:{}".format(*address)
            _end(
                f"rank {os.environ['RANK']}: the launcher of the first node, at {where}, has "
                f"died ({error}); see to that node, then run the same command again"
            )


def _end(reason: str) -> NoReturn:
    os.write(2, f"cxrdist: {reason}\n".encode())
    os._exit(1)
