"""No rank outlives its job, whatever is killed and whenever; and the run is none the worse."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from faults import Launched, is_over, wait_until
from support import LOG_EACH_STEP, RUN_CXRDIST, run_ranks, run_script

KILLS = int(os.environ.get("CXRDIST_TEST_KILLS", "6"))
OUTLIVED_S = 10
STEPS_PER_EPOCH = 5
VICTIMS = ("launcher", "rank 1", "group", "rank 0")
BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]


@pytest.fixture(scope="module")
def command(shards, tmp_path_factory) -> list[object]:
    """Train two stages of a small network with dropout, saved after every second step."""
    stages = {
        "all": {"lr": dict.fromkeys(BLOCKS, 0.05), "epochs": 2, "patience": 2},
        "late": {"lr": {"denseblock4": 0.01, "head": 0.01}, "epochs": 1, "patience": 1},
    }
    recipe = {
        **{"init": "none", "global_batch_size": 6, "copies": {}, "stages": stages},
        **{"network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]}},
    }
    file = tmp_path_factory.mktemp("lifetime") / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["train", "--config", file, "--shards", shards, "--save-steps", 2]


def seconds_outlived(ranks: list[psutil.Process]) -> float:
    """How long some of the ranks are still there."""
    began = time.monotonic()
    wait_until(lambda: all(map(is_over, ranks)))
    return time.monotonic() - began


class Watched:
    """A job on two ranks and what can be seen of it from outside: processes and files."""

    def __init__(self, command: list[object], run: Path, cache: Path) -> None:
        self.run, self.cache = run, cache
        self.job = Launched(2, run, *command, "--run", run, "--cache", cache)
        self.ranks = self.job.ranks()

    def comes_to(self, what: Callable[[], bool]) -> bool:
        """Wait for something; False if the job ends without it."""
        return bool(wait_until(lambda: what() or self.over())) and not self.over()

    def over(self) -> bool:
        return self.job.process.poll() is not None

    def joins(self, until: float) -> bool:
        """Some time after the ranks have appeared, before they have joined."""
        lock, holder = self.run / ".lock", f"pid {self.ranks[0].pid},"

        def joined() -> bool:
            return lock.is_file() and holder in lock.read_text()

        return self.comes_to(lambda: time.monotonic() > until or joined())

    def decodes(self) -> bool:
        return self.comes_to(lambda: any(self.cache.glob("*.partial")))

    def validates(self) -> bool:
        """The last step of an epoch is logged, the epoch is not."""
        return self.job.wait_for(1) and self.comes_to(lambda: self.last_row() == ("step", 0))

    def last_row(self) -> tuple[str, int]:
        """Kind of the log's last row, and its step in the epoch."""
        lines = (self.run / "log.jsonl").read_text().splitlines(keepends=True)
        if not lines or not lines[-1].endswith("\n"):
            return "", 0
        row = json.loads(lines[-1])
        return row["kind"], row["step"] % STEPS_PER_EPOCH

    def saves(self) -> bool:
        return self.comes_to(lambda: any((self.run / "checkpoints").glob(".*.partial")))

    def ends(self) -> bool:
        """The model is published, or about to be."""
        return self.comes_to(lambda: any(self.run.glob("*model*")))

    def kill(self, victim: str) -> None:
        """End the launcher, its process group or a rank with SIGKILL."""
        if victim == "launcher":
            self.job.process.kill()
        elif victim == "group":
            os.killpg(self.job.process.pid, signal.SIGKILL)
        else:
            self.ranks[int(victim[-1])].kill()


def finish(command: list[object], run: Path, cache: Path) -> None:
    """Begin or resume a run on two forked ranks until its end, with a log row for each step."""
    program = LOG_EACH_STEP + RUN_CXRDIST
    done = run_ranks(2, "-c", program, *command, "--run", run, "--cache", cache)
    assert done.returncode == 0, done.stderr


def contents(run: Path) -> tuple[bytes, list[dict[str, object]]]:
    """The model and the log of a run, but its speed."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    model = (run / "model" / "model.safetensors").read_bytes()
    return model, [row for row in rows if row["kind"] != "speed"]


def test_no_rank_outlives_its_job_and_the_run_ends_in_the_same_bytes(command, tmp_path):
    """SIGKILL to the launcher, its group or a rank, from joining to the end."""
    whole, run, chance = tmp_path / "whole", tmp_path / "run", random.Random(KILLS)
    finish(command, whole, tmp_path / "cache")
    moments: dict[str, Callable[[Watched], bool]] = {
        "joining": lambda job: job.joins(until=time.monotonic() + chance.uniform(0, 5)),
        "training": lambda job: job.job.wait_for(chance.randint(1, 4), chance.uniform(0, 0.05)),
        "decoding": Watched.decodes,
        "validating": Watched.validates,
        "saving": Watched.saves,
        "ending": Watched.ends,
    }
    # Each victim at each moment in 24 kills; the first six are each moment once.
    turns = [(m, VICTIMS[(i + lap) % 4]) for lap in range(4) for i, m in enumerate(moments)]
    outlived, launches, turn = [], 0, 0
    while turn < KILLS:
        moment, victim = turns[turn % len(turns)]
        job = Watched(command, run, tmp_path / f"cache{launches}")
        launches += 1
        if not moments[moment](job):  # the run is done: another one takes the other kills
            job.job.end()
            assert contents(run) == contents(whole)
            shutil.rmtree(run)
            continue
        job.kill(victim)
        outlived.append((seconds_outlived(job.ranks), victim, moment))
        turn += 1
        output = job.job.end()
        assert "Traceback" not in output
        if victim.startswith("rank") and moment != "ending":
            assert f"{victim} was ended by SIGKILL" in output
            assert job.job.process.returncode == 1
    print(f"the longest that a rank outlived its job, of {KILLS} kills: {sorted(outlived)[-3:]}")
    assert max(outlived)[0] < OUTLIVED_S
    finish(command, run, tmp_path / "cache")
    assert contents(run) == contents(whole)
    assert not [*run.rglob(".*.partial")]


def test_ranks_that_accelerate_itself_launches_end_with_it(command, tmp_path):
    """Also before they have joined: they would look for its store for 30 minutes."""
    run, launcher = tmp_path / "run", "accelerate.commands.launch"
    job = Launched(2, run, *command, "--run", run, launcher=launcher)
    ranks = job.ranks()
    for rank in ranks:
        wait_until(lambda rank=rank: any("libtorch" in m.path for m in rank.memory_maps()))
    job.process.kill()
    assert seconds_outlived(ranks) < OUTLIVED_S


def test_a_single_process_saves_when_its_launcher_dies(command, tmp_path):
    """A Ctrl-C ends `accelerate launch` before the process that it also reaches has saved."""
    run = tmp_path / "run"
    options = (*command, "--run", run, "--cache", tmp_path / "cache")
    job = Launched(1, run, *options, launcher="accelerate.commands.launch")
    assert job.wait_for(3)
    ranks = job.ranks()
    job.process.kill()
    assert seconds_outlived(ranks) < OUTLIVED_S
    assert "stopped and saved at stage all" in job.end()


def test_a_rank_does_not_wait_for_one_that_died_before_it_joined(command, tmp_path):
    """The first rank waits in C++, where it hears no signal of the launcher's."""
    run = tmp_path / "run"
    job = Launched(2, run, *command, "--run", run)
    waiting, late = job.ranks()
    late.suspend()
    port = int(waiting.environ()["MASTER_PORT"])
    wait_until(lambda: port in [c.raddr.port for c in waiting.net_connections() if c.raddr])
    late.kill()
    assert seconds_outlived([waiting]) < OUTLIVED_S
    assert "rank 1 was ended by SIGKILL" in job.end()
    assert job.process.returncode == 1


def test_a_rank_of_another_node_ends_when_the_first_launcher_dies(command, tmp_path):
    """Its own launcher knows nothing of that, and torch would try to connect for 30 minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        Launched(
            *(2, tmp_path / "run", *command, "--run", tmp_path / "run"),
            launch_options=(
                *("--num_machines", "2", "--machine_rank", str(node), "--rdzv_backend", "static"),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            ),
        )
        for node in (0, 1)
    ]
    ranks = [wait_until(lambda node=node: nodes[node].rank(node)) for node in (0, 1)]
    nodes[0].process.kill()
    assert seconds_outlived(ranks) < OUTLIVED_S
    assert "rank 1: the launcher of the first node" in nodes[1].end()
    assert nodes[1].process.returncode == 1


def test_a_rank_whose_launcher_died_before_it_began_ends_at_once(command, tmp_path):
    """Then there is no launcher left that the kernel could watch."""
    if "python" in " ".join(psutil.Process(1).cmdline()):
        pytest.skip("an orphan here comes under a Python process, as if that had launched it")
    errors, options = tmp_path / "errors", ("--run", tmp_path / "run")
    rank = [sys.executable, "-m", "cxrdist", *map(str, command), *map(str, options)]
    started = subprocess.run(
        ["sh", "-c", '"$@" 2>"$0" >/dev/null & echo $!', errors, *rank],
        env={
            **os.environ,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "yes"},
        },
        capture_output=True,
        check=True,
    )
    orphan = [psutil.Process(int(started.stdout))]
    assert seconds_outlived(orphan) < OUTLIVED_S
    assert "the launcher of this rank has died" in errors.read_text()


@pytest.mark.parametrize(
    ("ending", "code"), [("return 75", 75), ("raise SystemExit(2)", 2), ("return 0", 0)]
)
def test_a_connected_rank_ends_with_its_code_whatever_its_threads_would_do(ending, code):
    """A process that is taken apart with gloo's threads in it is aborted now and then."""
    script = f"""
import atexit, os
import torch.distributed
from cxrdist.lifetime import exit_with

atexit.register(os.abort)  # runs where Python takes the process apart
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

def command():
    print("a line in a buffer")
    {ending}

exit_with(command)
"""
    ended = run_script(script)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == "a line in a buffer\n"
