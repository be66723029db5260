"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd.

All its files are in one new directory, its ports are free ones, and each of its processes, those
of its jobs included, has SLURM_CONF of that directory in its environment; so it goes away whole.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[2]
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# cred_expire is also how long a requeued job waits before it starts again; 120 s if not given.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={state}/state
SlurmdSpoolDir={state}/spool.%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd.%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
FirstJobId={first_job}
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Job(NamedTuple):
    """What Slurm knows of a job."""

    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT ..."""
    restarts: int
    exit_code: int


def missing() -> str | None:
    """Why there can be no cluster on this machine, or None."""
    names = [name for name in PROGRAMS if _program(name) is None]
    if names:
        return f"no {', '.join(names)} on this machine: apt-get install slurm-wlm munge"
    return None


class Cluster:
    """Two nodes, n1 and n2, of two CPUs each."""

    def __init__(self, state: Path) -> None:
        """Start the daemons and wait until both nodes are idle.

        Args:
            state: a new directory for their files.
        """
        self.state = state
        self.environment = {**os.environ, "SLURM_CONF": str(state / "slurm.conf")}
        self._stack = ExitStack()
        self._configure()
        try:
            self._stack.callback(self._sweep)
            munge = {name: f"--{name}={state}/munge.{name}" for name in ("key-file", "socket")}
            files = [f"--{name}-file={state}/munged.{name}" for name in ("pid", "log", "seed")]
            self._daemon("munged", "--foreground", "--force", *munge.values(), *files)
            self.wait(lambda: (state / "munge.socket").exists(), "munged's socket")
            self._daemon("slurmctld", "-D")
            self._nodes = {name: self._daemon("slurmd", "-D", "-N", name) for name in NODES}
            self.wait(lambda: self.node_states() == ["idle", "idle"], "two idle nodes")
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        for name in ("cg", "state", *(f"spool.{node}" for node in NODES)):
            (self.state / name).mkdir(parents=True)
        (self.state / "munge.key-file").write_bytes(os.urandom(1024))
        (self.state / "munge.key-file").chmod(0o600)
        (self.state / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.state}/cg\n"
        )
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            state=self.state,
            ports=_free_ports(3),
            # Ranks meet at a port that is chosen by the job's number: two clusters have others.
            first_job=1 + os.getpid() % 700 * 20,
        )
        (self.state / "slurm.conf").write_text(text)

    def _daemon(self, name: str, *options: str) -> subprocess.Popen:
        """Start a daemon in the foreground; it is ended, the last one first, when all is closed."""
        program = _program(name)
        assert program
        with open(self.state / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                [program, *options], env=self.environment, stdout=out, stderr=out, cwd=self.state
            )
        self._stack.callback(_end, process)
        return process

    def close(self) -> None:
        """End the jobs and the daemons, and whatever process is left of them."""
        self._stack.close()

    def _sweep(self) -> None:
        """Kill what still runs in this cluster; a step that lost its slurmd is no one's child."""
        for process in self._processes():
            _kill(process)

    def _processes(self, node: str | None = None) -> Iterator[int]:
        """The processes of this cluster's jobs, on a node or on all, each slurmstepd as well."""
        mark = f"SLURM_CONF={self.state}/slurm.conf".encode()
        where = f"SLURMD_NODENAME={node}".encode()
        for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
            variables = _read(process, "environ").split(b"\0")
            if process == os.getpid() or mark not in variables:
                continue
            if node is None or where in variables:
                parent = int(_read(process, "stat").rpartition(b")")[2].split()[1] or 0)
                if _read(parent, "comm").startswith(b"slurmstepd"):
                    yield parent
                yield process

    def run(self, *command: object) -> str:
        """Run one of Slurm's commands; what it prints."""
        words = [str(word) for word in command]
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, cwd=CHECKOUT
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: object) -> int:
        """`sbatch COMMAND`; the job's number."""
        return int(self.run("sbatch", "--parsable", *command))

    def job(self, number: int) -> Job:
        """What Slurm says of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
        values = dict(word.partition("=")[::2] for word in text.split())
        return Job(
            values["JobState"], int(values["Restarts"]), int(values["ExitCode"].partition(":")[0])
        )

    def log(self, number: int) -> str:
        """What a job, or all tasks of an array, have printed."""
        files = sorted(self.state.glob(f"*-{number}*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def node_states(self) -> list[str]:
        """The states of n1 and n2, such as idle, alloc, mix, down."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def wait(self, ready: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Look until something is so.

        Raises:
            AssertionError: it was not so in time; with what the cluster wrote.
        """
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = "".join(f"\n{f}:\n{_tail(f)}" for f in sorted(self.state.glob("*.log")))
                queue = self.run("scontrol", "show", "job")
                raise AssertionError(f"no {what} in {seconds} s\n{queue}\n{logs}")
            time.sleep(0.1)

    def wait_for_end(self, number: int, seconds: float = 240) -> Job:
        """Wait until a job has ended for good."""
        under_way = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
        self.wait(lambda: self.job(number).state not in under_way, f"end of job {number}", seconds)
        return self.job(number)

    def lose_node(self, name: str) -> None:
        """Let a node die: its slurmd, its slurmstepds and their tasks at once; Slurm says down."""
        self._nodes[name].kill()
        self._nodes[name].wait()
        for process in list(self._processes(name)):
            _kill(process)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died")

    def restore_node(self, name: str) -> None:
        """Start a lost node anew."""
        self._nodes[name] = self._daemon("slurmd", "-D", "-N", name)
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")


def _program(name: str) -> str | None:
    """A daemon's file; Debian has them where the PATH of a user may not lead."""
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself


def _read(process: int, name: str) -> bytes:
    """A file of /proc; empty for a process that has ended."""
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _tail(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-15:])
