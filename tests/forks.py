"""Processes that need no start: forked from one that has imported torch and cxrdist once.

A rank needs five seconds to import them, and its launcher two. Apart from that a forked process is
what `python -m`, `python SCRIPT` or `python -c` starts, with its own environment, output and exit
code, and several ranks meet over gloo. A test of the launcher itself uses `support.launch_ranks` or
`faults.Launched`.

usage: forks.py, which reads one request per line, see `run`, and answers with the exit code
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO

PRELOADED = (
    *("cxrdist.config", "cxrdist.seeds", "cxrdist.explain.export"),
    *("scipy.stats", "sklearn.metrics", "torchmetrics"),
)


def run(
    world: int, arguments: list[str], environment: dict[str, str], threads: int
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` (a script, -m MODULE or -c PROGRAM) on some ranks of this machine.

    Args:
        world: number of ranks.
        arguments: of Python.
        environment: of all ranks; where there are several, `torchrun`'s variables are added.
        threads: of each rank.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        request = {"world": world, "arguments": arguments, "environment": environment}
        request |= {"threads": threads, "cwd": os.getcwd(), "files": list(map(str, files))}
        _pipe(server.stdin).write(json.dumps(request) + "\n")
        _pipe(server.stdin).flush()
        code = json.loads(_pipe(server.stdout).readline())
        return subprocess.CompletedProcess(arguments, code, *(f.read_text() for f in files))


@cache
def _server() -> subprocess.Popen[str]:
    """Start the process that is forked; it ends with this one."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    atexit.register(server.communicate)  # closes its input and waits for its end
    return server


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _as_ranks(world: int) -> list[dict[str, str]]:
    """Return the variables that `accelerate launch` sets for each rank."""
    if world == 1:
        return [{}]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": world}
    job |= {"LOCAL_WORLD_SIZE": world, "ACCELERATE_MIXED_PRECISION": "no"}
    ranks = [{**job, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def _serve(requests: IO[str], answers: IO[str]) -> dict | None:
    """Answer all requests; in a forked rank, return its request."""
    for line in requests:
        request = json.loads(line)
        ranks = set()
        for variables in _as_ranks(request["world"]):
            if not (rank := os.fork()):
                return {**request, "environment": request["environment"] | variables}
            ranks.add(rank)
        print(_wait(ranks), file=answers, flush=True)
    return None


def _wait(ranks: set[int]) -> int:
    """Wait for all ranks; return the first exit code that is not 0, and then end the others."""
    code = 0
    while ranks:
        rank, status = os.wait()
        ranks.discard(rank)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return code


def _become(request: dict) -> None:
    """Run a program in this process, as a new Python would."""
    import torch

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, file in enumerate((os.devnull, *request["files"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    torch.set_num_threads(request["threads"])
    program, *rest = request["arguments"]
    if program == "-m":
        sys.argv, sys.path[0] = rest, ""
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif program == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = [program, *rest], str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


def main() -> None:
    for name in PRELOADED:
        __import__(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"forks.py: {threads} threads, of which a forked process would have one")
    gc.freeze()  # a collection in a forked process would copy all of the memory that they share
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    if (request := _serve(sys.stdin, answers)) is not None:
        _become(request)


if __name__ == "__main__":
    main()
