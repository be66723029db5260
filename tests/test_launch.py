"""A mistake is told in one line, once, and a refused training leaves nothing behind."""

import errno
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from support import run_script
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cxrdist import launch
from cxrdist.cli import main
from cxrdist.distributed import start
from cxrdist.errors import CxrdistError, RunFailedError, Stopped, failure_of, is_lost_connection
from cxrdist.lifetime import another_rank_failed, report_error
from cxrdist.packaged import HARDWARE, LABEL_MAPS, RECIPES, SHARD_RECIPES, files_in, path_of

TREE = Path(__file__).parents[1]
RECIPE = {
    **{"init": "none", "global_batch_size": 6, "copies": {}},
    **{"network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]}},
    "stages": {"all": {"lr": {"all": 0.001}, "epochs": 1, "patience": 1}},
}
READS_TEXT = (
    "all: {lr: {all: 0.001}, epochs: 1, patience: 1, "
    "background: {weight: 1.0, region: text, method: gradient}}"
)
# Statistics are synchronised already, so this is no way out.
ONE_IMAGE = (
    "BatchNorm with one image of 32 px, which has no variance in stage all; "
    "take a larger number or larger images\n"
)


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe of a small network."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.fixture
def own_signals(monkeypatch) -> Iterator[None]:
    """Give this process its own signal handlers and environment back after a launch."""
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "")
    before = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config_file", "cpu", "trian"], "no command 'trian'; expected one of pack, check"),
        (["--config_file", "cpu", "train", "--config", "finetun"], "--config finetun: no such"),
        (["--config_file", "cpu", "train", "--run", "r"], "train: --shards: missing; see"),
        (["-m", "cxrdist", "train", "--sed", "3"], "--sed"),
        (
            ["-m", "cxrdist", "train", "--run=r", "--shards=s", "--seed=x"],
            '--seed: is "x", expected a whole',
        ),
        (["--config_file", "gpu", "check", "x"], "no such file; expected one, or cpu, multi_node"),
        (["--num_proceses", "2", "check", "x"], "launch: "),
        (["--num_processes", "two", "check", "x"], "num-processes: invalid int value: 'two'"),
        ([], "launch: the following arguments are required: training_script"),
    ],
)
def test_a_wrong_command_is_refused_before_any_rank_starts(
    monkeypatch, capsys, own_signals, arguments, message
):
    """One line names the word or option; accelerate is not asked to launch."""
    monkeypatch.setattr(launch, "_launch", lambda _: pytest.fail("ranks were started"))
    assert launch.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("cxrdist: ")
    assert message in lines[0]


def test_the_help_of_a_launch_names_the_command_and_the_built_in_configs(capsys, own_signals):
    """Accelerate's own help calls the command a training script, and hides --config_file."""
    with pytest.raises(SystemExit) as end:
        launch.main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("usage: cxrdist launch [options of accelerate launch] COMMAND [options")
    assert "describes them: cpu, multi_node, one_node, or a file of your own" in said


def test_both_spellings_of_a_launch_are_the_same(monkeypatch, own_signals):
    """`cxrdist launch COMMAND` and `python -m cxrdist.launch -m cxrdist COMMAND`."""
    launched = []
    monkeypatch.setattr(launch, "_launch", lambda options: launched.append(vars(options)) or 0)
    for module in ([], ["-m", "cxrdist"]):
        assert launch.main(["--config_file", "cpu", *module, "check", "x"]) == 0
    ours, accelerates = ({k: v for k, v in o.items() if k != "nondefault"} for o in launched)
    assert ours == accelerates
    assert Path(ours["config_file"]).samefile(TREE / "launch" / "cpu.yaml")
    assert ours["training_script_args"] == ["check", "x"]


def test_what_accelerate_refuses_is_one_line(monkeypatch, capsys, own_signals):
    """Such as a port in use on the first of several nodes."""

    def launch_command(_options: object) -> None:
        raise ConnectionError("Tried to launch on port `29500`, but another process has it.")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert launch.main(["--config_file", "cpu", "check", "x"]) == 2
    assert capsys.readouterr().err == (
        "cxrdist: launch: Tried to launch on port `29500`, but another process has it; fix the "
        "options before the command\n"
    )


def test_two_launched_ranks_print_one_line_and_leave_nothing(shards, recipe, tmp_path):
    """A missing checkpoint: the line once, no launcher's report below it, exit code 2."""
    places = ["--shards", shards, "--run", tmp_path / "run", "--cache", tmp_path / "cache"]
    ranks = ["--config_file", "cpu", "--main_process_port", "0"]
    command = ["train", "--config", recipe, "--init", tmp_path / "lost.pth", *places]
    done = subprocess.run(
        [sys.executable, "-m", "cxrdist", "launch", *map(str, [*ranks, *command])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"cxrdist: --init {tmp_path}/lost.pth: no such file")
    assert [*tmp_path.iterdir()] == [recipe]


def test_a_rank_that_is_alone_is_named_when_it_is_killed(tmp_path, monkeypatch, capfd, own_signals):
    """With --cpu accelerate starts one rank itself, without torch's launcher; it is rank 0."""
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.chdir(tmp_path)
    ranks = ["--cpu", "--num_processes", "1", "--num_machines", "1"]
    assert launch.main([*ranks, "--module", "killed"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "cxrdist: rank 0 was ended by SIGKILL"


@pytest.mark.parametrize(
    ("received", "codes", "code", "named"),
    [
        ([15], {0: -15, 1: 75}, 75, []),  # rank 0 had no handler yet
        ([], {0: -15, 1: 75}, 75, ["SIGTERM"]),
        ([15], {0: -9, 1: 75}, 75, ["SIGKILL"]),
        ([15], {0: -9}, 1, ["SIGKILL"]),
        ([], {0: -9, 1: 75}, 1, ["SIGKILL"]),
        ([], {0: 1, 1: 2}, 2, []),
        ([15], {0: 3}, 1, []),
    ],
)
def test_the_code_of_a_job_is_that_of_its_ranks(
    monkeypatch, capsys, own_signals, received, codes, code, named
):
    """75 before 2 before 1; a signal that was passed on is a stop, any other death is named."""
    monkeypatch.setattr(launch, "_received", dict.fromkeys(received, 0.0))
    failures = {rank: ProcessFailure(rank, 1, number, "") for rank, number in codes.items()}

    def launch_command(_options: object) -> None:
        raise ChildFailedError("cxrdist", failures)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert launch.main(["--config_file", "cpu", "check", "x"]) == code
    lines = [f"cxrdist: rank 0 was ended by {name}" for name in named]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_signal_long_after_the_first_kills_the_ranks(monkeypatch):
    """Within five seconds signals are one request: Ctrl-C and the TERM that schedulers add to it.

    The launcher passes INT on as TERM, and others as they are.
    """
    sent, clock = [], iter((100.0, 104.9, 105.1))
    rank = SimpleNamespace(send_signal=sent.append)
    monkeypatch.setattr(launch, "_received", {})
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        launch, "psutil", SimpleNamespace(Process=lambda: SimpleNamespace(children=lambda: [rank]))
    )
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
        launch._pass_on(number, None)
    assert sent == [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL]


def test_ranks_of_a_node_report_the_same_error_once(monkeypatch, capsys, tmp_path):
    """The report of torch's launcher has the line too, for each rank that failed."""
    files = [tmp_path / "attempt_0" / str(rank) / "error.json" for rank in range(2)]
    failed = []
    for file in files:
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        failed.append(another_rank_failed())
        report_error(CxrdistError("--shards x: has no\nindex.json"))
    report_error(CxrdistError("something else"))
    assert failed == [False, True]
    assert capsys.readouterr().err.splitlines() == [
        "cxrdist: --shards x: has no index.json",
        "cxrdist: something else",
    ]
    assert ProcessFailure(0, 1, 2, str(files[0])).message == (
        "cxrdist: --shards x: has no index.json (start with `cxrdist launch`, not "
        "`accelerate launch`, to see this line alone)"
    )


def test_ranks_of_a_node_report_a_stop_once_and_none_after_an_error(monkeypatch, capsys, tmp_path):
    """The launcher passes a signal on to all ranks, and ends them after an error."""

    def stop(_arguments: list[str]) -> int:
        raise Stopped("stopped on SIGTERM; run the same command again")

    monkeypatch.setattr("cxrdist.cli._answer", stop)
    for rank in range(3):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        assert main(["check", "x"]) == 75
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "1" / "error.json"))
    (tmp_path / "attempt_1" / "0").mkdir(parents=True)
    (tmp_path / "attempt_1" / "0" / "error.json").touch()
    assert main(["check", "x"]) == 75
    said = capsys.readouterr().err
    assert said == "cxrdist: stopped on SIGTERM; run the same command again\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "lost.pth"], "--init lost.pth: no such file"),
        (["--copies", "{NORMAL: 2}"], "copies: no class 'NORMAL' in the shards"),
        (["--global-batch-size", "1"], f"--global-batch-size: 1 leaves {ONE_IMAGE}"),
        (
            ["--global-batch-size", "3", "--max-images-per-rank", "2"],  # passes of one and of two
            f"--max-images-per-rank: passes of at most 2 leave {ONE_IMAGE}",
        ),
        (
            ["--global-batch-size", "2", "--max-images-per-rank", "1"],  # a pass of both would do
            f"--max-images-per-rank: passes of at most 1 leave {ONE_IMAGE}",
        ),
        (["--uncertain", "positive,e=negative"], "uncertain"),
        (
            ["--stages", READS_TEXT, "--text-boxes", "lost.csv"],
            "lost.csv: cannot be read",
        ),
        (["--run", "recipe.yaml/run"], "recipe.yaml"),
    ],
)
def test_a_refused_training_leaves_nothing(shards, recipe, monkeypatch, capsys, options, message):
    """No run directory, none above it, no lock and no cache, whatever is refused."""
    monkeypatch.chdir(recipe.parent)
    places = ["--shards", str(shards), "--run", "runs/a/run", "--cache", "cache"]
    assert main(["train", "--config", str(recipe), *places, *options]) == 2
    assert message in capsys.readouterr().err
    assert [*recipe.parent.iterdir()] == [recipe]


@pytest.mark.parametrize(
    ("number", "kind", "line"),
    [
        (errno.ENOENT, CxrdistError, "x.csv: No such file or directory; name another file"),
        (errno.EACCES, RunFailedError, "x.csv: Permission denied; change its permissions"),
        (errno.EROFS, RunFailedError, "x.csv: Read-only file system; change its permissions"),
        (errno.ENOSPC, RunFailedError, "x.csv: No space left on device; make room"),
        (errno.EIO, RunFailedError, "x.csv: Input/output error; fix this on the machine"),
    ],
)
def test_an_error_of_the_system_is_told_as_what_it_is(number, kind, line):
    """Only a full disk asks for room."""
    failure = failure_of(OSError(number, os.strerror(number), "x.csv"))
    assert type(failure) is kind
    assert str(failure).startswith(line)
    assert ("room" in str(failure)) == (number == errno.ENOSPC)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3", True),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv", True),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error\n"
         "ncclRemoteError: A call failed possibly due to a network error", True),
        ("ProcessGroupNCCL is only supported with GPUs, no GPUs found!", False),
        ("[gloo/transport/tcp/device.cc:84] Unable to find address for: ib0", False),
        ("NCCL error in: x.cpp:1, invalid usage\nncclInvalidUsage", False),
    ],
)  # fmt: skip
def test_only_a_lost_connection_is_called_one(message, lost):
    """A missing GPU or network interface is a fault of this machine, and keeps its traceback."""
    assert is_lost_connection(RuntimeError(message)) == lost
    assert not is_lost_connection(RunFailedError(message))


def test_a_number_of_ranks_that_nobody_started_is_refused_with_the_launcher(monkeypatch):
    """WORLD_SIZE alone, as some jobs export it, has nothing to do with trackers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    # In a process of its own: accelerate writes to the environment before it fails.
    refused = run_script("from cxrdist.distributed import start; start()")
    assert "MASTER_ADDR" in refused.stderr
    assert refused.stderr.endswith("; start several ranks with cxrdist launch\n")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    """CUDA itself would say `invalid device ordinal` on one of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(CxrdistError, match="2 ranks on this machine, which has 1 GPU; launch"):
        start()


def test_files_that_come_with_cxrdist_go_by_name(tmp_path, monkeypatch):
    """Recipes, label maps and hardware; a file of this name in the directory goes first."""
    monkeypatch.chdir(tmp_path)
    assert list(files_in(HARDWARE)) == ["cpu", "multi_node", "one_node"]
    assert Path(path_of(HARDWARE, "one_node")).samefile(TREE / "accelerate_config.yaml")
    assert Path(path_of(SHARD_RECIPES, "chexpert")).samefile(TREE / "shards" / "chexpert.yaml")
    assert path_of(LABEL_MAPS, Path("chexpert-to-chestxray14")).is_file()
    assert path_of(RECIPES, "lost") == "lost"
    (tmp_path / "scratch").write_text("")
    assert path_of(RECIPES, "scratch") == "scratch"


def test_each_file_that_goes_by_name_is_in_a_wheel():
    """The globs of pyproject.toml reach what the links point to."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())
    data = project["tool"]["setuptools"]["package-data"]["cxrdist"]
    for folder in (RECIPES, SHARD_RECIPES, LABEL_MAPS, HARDWARE):
        assert f"{folder}/*.yaml" in data
        assert files_in(folder)
