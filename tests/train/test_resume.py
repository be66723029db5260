"""Whatever is done to a run, the same command ends it as if nothing had happened."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import yaml
from faults import DEADLINE_S, Launched, is_over
from support import LOG_EACH_STEP, RUN_CXRDIST, run_command, run_ranks, run_script, small_disk

from cxrdist.errors import CxrdistError
from cxrdist.files import locked, read_log
from cxrdist.train.checkpoint import CHECKPOINT_FORMAT, load_latest

KILLS = int(os.environ.get("CXRDIST_TEST_KILLS", "4"))
NUM_OPERATIONS = 40  # file operations of two saves
BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]


@pytest.fixture(scope="module")
def command(shards, tmp_path_factory) -> list[object]:
    """Train two stages of a small network with dropout; saved after every second step."""
    folder = tmp_path_factory.mktemp("resume")
    stages = {
        "all": {"lr": dict.fromkeys(BLOCKS, 0.05), "epochs": 2, "patience": 2},
        "late": {"lr": {"denseblock4": 0.01, "head": 0.01}, "epochs": 1, "patience": 1},
    }
    recipe = {
        **{"init": "none", "global_batch_size": 6, "copies": {}, "stages": stages},
        **{"network": {"growth_rate": 4, "block_config": [1, 1, 1, 1]}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    paths = ("--config", folder / "recipe.yaml", "--shards", shards, "--cache", folder / "cache")
    return ["train", *paths, "--save-steps", 2]


def with_recipe(command: list[object], recipe: Path) -> list[object]:
    """The command with another recipe."""
    at = command.index("--config") + 1
    return [*command[:at], recipe, *command[at + 1 :]]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """The run that nobody disturbs, on two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert finish(2, command, run).endswith(f"{run / 'model'}\n")
    return run


def finish(world: int, command: list[object], run: Path) -> str:
    """Begin or resume a run on some ranks until its end, with a log row for each step; the output.

    The ranks are forked, which takes a tenth of the time of `Launched`.
    """
    done = run_ranks(world, "-c", LOG_EACH_STEP + RUN_CXRDIST, *command, "--run", run)
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(run: Path) -> list[dict[str, object]]:
    """All that a run logged, but its speed: losses, validation, and what each step has taken."""
    return [row for row in read_log(run / "log.jsonl") if row["kind"] != "speed"]


def assert_same(run: Path, whole: Path) -> None:
    """The same model, the same log of losses and plan positions."""
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()
    assert said(run) == said(whole)
    assert not [*run.rglob(".*.partial")]


DIE = """
import os, runpy, sys
from pathlib import Path

count, last = 0, int(sys.argv.pop(1))


def hook(owner, name):
    function = getattr(owner, name)

    def hooked(*arguments, **named):
        global count
        count += (Path(sys.argv[-1]) / "checkpoints").is_dir()
        if count == last:
            os._exit(137)
        return function(*arguments, **named)

    setattr(owner, name, hooked)


for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
    hook(os, name)
for name in ("write_bytes", "write_text"):
    hook(Path, name)
runpy.run_module("cxrdist", run_name="__main__")
"""


def test_a_save_may_end_at_any_of_its_file_operations(command, tmp_path):
    """The newest whole checkpoint is read, and what the dead process left is swept."""
    runs = [tmp_path / "whole", tmp_path / "run"]
    assert run_command(*command, "--run", runs[0]).returncode == 0
    every = range(1, NUM_OPERATIONS)
    for number in every if KILLS >= 30 else random.Random(0).sample(every, KILLS):
        died = run_script(DIE, number, *command, "--run", runs[1])
        assert died.returncode == 137, died.stderr
        assert "damaged" not in died.stderr
    done = run_command(*command, "--run", runs[1])
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    assert_steps_were_taken(*runs[::-1])
    assert not [*runs[1].rglob(".*.partial")]


def assert_steps_were_taken(run: Path, whole: Path) -> None:
    """As `assert_same`, for a log whose last rows are written more rarely."""
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (whole / model).read_bytes()
    rows = [[row for row in said(r) if row["kind"] == "epoch"] for r in (run, whole)]
    assert rows[0] == rows[1]


@pytest.fixture
def without_nohup():
    """A run hears HUP, also where nohup has started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize(
    ("number", "to"),
    [
        *((signal.SIGTERM, "rank 0"), (signal.SIGINT, "rank 1")),
        *((signal.SIGUSR1, "launcher"), (signal.SIGHUP, "launcher")),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_ends_with_75(command, whole, tmp_path, number, to):
    """Whoever gets the signal, all ranks stop at one step, and the run goes on from it."""
    run = tmp_path / "run"
    job = Launched(2, run, *command, "--run", run)
    assert job.wait_for(3)
    (job.process if to == "launcher" else job.rank(int(to[-1]))).send_signal(number)
    output = job.end()
    assert job.process.returncode == 75, output
    assert "stopped and saved at stage all" in output
    assert "Traceback" not in output
    assert "resuming after all" in finish(2, command, run)
    assert_same(run, whole)


def test_a_closed_terminal_ends_nothing_that_nohup_has_started(command, tmp_path):
    """It signals the launcher and the ranks, which ignore that from their start on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        job = Launched(2, tmp_path / "run", *command, "--run", tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert job.wait_for(3)
    for process in (psutil.Process(job.process.pid), *job.ranks()):
        process.send_signal(signal.SIGHUP)
    output = job.end()
    assert job.process.returncode == 0, output


def test_a_ctrl_c_while_the_ranks_start_is_a_stop(command, tmp_path):
    """Python alone would end them with a traceback and 1, before cxrdist can hear a signal."""
    job = Launched(2, tmp_path / "run", *command, "--run", tmp_path / "run")
    job.ranks()
    job.process.send_signal(signal.SIGINT)
    output = job.end()
    assert "Traceback" not in output
    assert job.process.returncode == 75, output


AS_TWO_NODES = "import os; os.environ |= {'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1'}\n"


def test_several_nodes_print_a_line_once(command, whole, tmp_path):
    """Not once for each node: the log of a job on 16 nodes has all of them."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "model")
    for line in ("resuming after late, epoch 1\n", "is already trained"):
        done = run_ranks(2, "-c", AS_TWO_NODES + RUN_CXRDIST, *command, "--run", run)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(line) == 1
    assert_same(run, whole)


def test_one_process_stops_and_goes_on_too(command, tmp_path):
    """`cxrdist train` alone, and through the launcher."""
    runs = [tmp_path / "whole", tmp_path / "run"]
    assert run_command(*command, "--run", runs[0]).returncode == 0
    job = Launched(1, runs[1], *command, "--run", runs[1])
    assert job.wait_for(4)
    job.process.send_signal(signal.SIGTERM)
    assert "stopped and saved" in job.end()
    assert job.process.returncode == 75
    assert run_command(*command, "--run", runs[1]).returncode == 0
    assert_steps_were_taken(*runs[::-1])


def write_signed(file: Path, document: dict[str, object]) -> None:
    """Write a changed position.json with its sha256: of all else, with sorted keys."""
    del document["sha256"]
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(document | {"sha256": digest}))


STOP_IN_VALIDATION = """
import os, signal
from cxrdist.train import stage

validate, times = stage.validate, 0


def validate_and_stop(*arguments):
    global times
    times += 1
    if times == 2:  # the first one is of the weights at the start
        os.kill(os.getpid(), signal.SIGTERM)
    return validate(*arguments)


stage.validate = validate_and_stop
"""


def test_an_epoch_without_steps_in_this_launch_has_its_time_and_no_speed(command, tmp_path):
    """Stopped after its last step, in its validation: 0 images per second would be wrong.

    Its seconds are those of both launches; the first one is made to have taken an hour.
    """
    options = (*command, "--run", tmp_path / "run")
    stopped = run_script(STOP_IN_VALIDATION + RUN_CXRDIST, *options)
    assert "stopped and saved at stage all, epoch 1, step 5" in stopped.stderr
    file = tmp_path / "run" / "checkpoints" / "00000-0000005" / "position.json"
    document = json.loads(file.read_text())
    assert 0 < document["position"]["seconds"] < 600
    document["position"]["seconds"] = 3600.0
    write_signed(file, document)
    done = run_command(*options)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["kind"] == "speed"]
    epochs = [(row["stage"], row["epoch"], row["images_per_second"] is None) for row in rows]
    assert epochs == [("all", 1, True), ("all", 2, False), ("late", 1, False)]
    assert 3600 < rows[0]["seconds"] < 4200
    assert all(row["seconds"] < 600 for row in rows[1:])
    lines = [line for line in done.stdout.splitlines() if line.startswith(("all ", "late "))]
    assert ["images/s" in line for line in lines if "/" in line] == [False, True, True]


def test_another_number_of_ranks_takes_the_same_batches_to_the_same_losses(command, tmp_path):
    """World sizes 2, 1, 3, 2 in turn: the digests of what was taken are those of two ranks.

    With dropout, too, only the order of the sums differs, in a stage that trains all BatchNorms as
    well. The rates are low: high ones make more of the last bits in each step.
    """
    recipe = tmp_path / "recipe.yaml"
    old = yaml.safe_load(command[command.index("--config") + 1].read_text())
    for stage in old["stages"].values():
        stage["lr"] = dict.fromkeys(stage["lr"], 0.005)
    recipe.write_text(yaml.safe_dump(old, sort_keys=False))
    command = with_recipe(command, recipe)
    finish(2, command, tmp_path / "whole")
    expected = taken_and_losses(tmp_path / "whole")
    found = taken_and_losses(run_on_changing_worlds(command, tmp_path / "run"))
    assert found == pytest.approx(expected, rel=0, abs=1e-4)
    assert len({round(loss, 3) for loss in expected.values()}) > 3  # they are not all the same
    launches = json.loads((tmp_path / "run" / "run.json").read_text())["launches"]
    assert [launch["world_size"] for launch in launches] == [2, 1, 3, 2]
    starts = [launch["from_step"] for launch in launches]
    assert starts[0] == 0
    # A run that is asked to stop in its third step stops after that or the next.
    assert all(later - earlier in (3, 4) for earlier, later in pairwise(starts))


STOP_AFTER_STEPS = """
import os, signal
from cxrdist.train import loop

backward, steps = loop.backward, 0


def backward_and_stop(*arguments):
    global steps
    steps += 1
    if steps == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    return backward(*arguments)


loop.backward = backward_and_stop
"""


def run_on_changing_worlds(command: list[object], run: Path) -> Path:
    """Stop a run after some steps and resume it on other numbers of ranks."""
    script = STOP_AFTER_STEPS + LOG_EACH_STEP + RUN_CXRDIST
    for world in (2, 1, 3):
        done = run_ranks(world, "-c", script, *command, "--run", run)
        assert done.returncode == 75, done.stderr
        assert "stopped and saved at stage" in done.stderr
    finish(2, command, run)
    return run


def taken_and_losses(run: Path) -> dict[tuple[object, ...], float]:
    """Losses by stage, step and digest of the images that were taken."""
    rows = [row for row in said(run) if "taken" in row]  # a stage begins with having taken none
    return {(r["kind"], r["stage"], r["step"], r["taken"]): r["loss"] for r in rows}


def test_a_rank_that_hangs_ends_the_job_and_is_named(command, tmp_path):
    """SIGSTOP to one rank: the others end within the limit and say who."""
    run = tmp_path / "run"
    job = Launched(2, run, *command, "--run", run, CXRDIST_HANG_SECONDS="4")
    assert job.wait_for(2)
    hung = job.rank(1)
    hung.suspend()
    output = job.end()
    assert job.process.returncode == 1
    assert "rank 1 (" in output
    assert f"pid {hung.pid}) has not answered" in output
    assert "Traceback" not in output
    assert not psutil.pid_exists(hung.pid)


def test_a_launcher_that_hangs_ends_the_ranks(command, tmp_path):
    """SIGSTOP to the launcher, as on a frozen first node: the ranks hold no GPU for ever."""
    run = tmp_path / "run"
    job = Launched(2, run, *command, "--run", run, CXRDIST_HANG_SECONDS="4")
    assert job.wait_for(2)
    ranks, launcher = [job.rank(0), job.rank(1)], psutil.Process(job.process.pid)
    launcher.suspend()
    began = time.monotonic()
    while not all(map(is_over, ranks)):
        assert time.monotonic() - began < DEADLINE_S
        time.sleep(0.05)
    launcher.resume()
    assert "the launcher of the first node has not answered" in job.end()
    assert job.process.returncode == 1


def test_a_second_signal_ends_what_waits_for_a_rank_that_hangs(command, tmp_path):
    """The first one waits for the end of the step, which would never come."""
    job = Launched(2, tmp_path / "run", *command, "--run", tmp_path / "run")
    assert job.wait_for(2)
    waiting, hung = job.rank(0), job.rank(1)
    hung.suspend()
    began = time.monotonic()
    while not is_over(waiting):
        assert time.monotonic() - began < DEADLINE_S
        job.process.terminate()
        time.sleep(0.05)
    assert "Traceback" not in job.end()
    assert job.process.returncode == 1


def damage_cut(state: Path) -> None:
    state.write_bytes(state.read_bytes()[:-100])


def damage_empty(state: Path) -> None:
    state.write_bytes(b"")


def damage_bit(state: Path) -> None:
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 4
    state.write_bytes(content)


def damage_bomb(state: Path) -> None:
    """A pickle that would make a file."""
    state.write_bytes(b"cos\nsystem\n(S'touch " + str(state.parent / "ran").encode() + b"'\ntR.")


def damage_missing(state: Path) -> None:
    state.unlink()


def damage_position(state: Path) -> None:
    about = state.with_name("position.json")
    about.write_text(about.read_text().replace('"step": ', '"step": 1', 1))


def damage_no_position(state: Path) -> None:
    state.with_name("position.json").write_text("{")


def damage_format(state: Path) -> None:
    """A flipped bit in the name of the format: no other version of cxrdist."""
    about = state.with_name("position.json")
    about.write_text(about.read_text().replace(CHECKPOINT_FORMAT, CHECKPOINT_FORMAT[:-1] + "7"))


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory) -> Path:
    """A run of one process that was stopped within an epoch, with checkpoints of two steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    done = run_script(STOP_AFTER_STEPS + LOG_EACH_STEP + RUN_CXRDIST, *command, "--run", run)
    assert done.returncode == 75, done.stderr
    assert len([*(run / "checkpoints").glob("[!.]*[0-9]")]) >= 2
    return run


def recipe_of(run: Path) -> str:
    """The recipe as its checkpoints know it: without the fields that older versions lack."""
    text = (run / "recipe.yaml").read_text()
    newer = ("uncertain: ignore", "fold: null", "balance: none", "frozen_batch_norm: kept")
    for line in (*newer, "  architecture: densenet121"):
        text = text.replace(f"{line}\n", "")
    return text


def test_a_run_of_a_version_that_knew_no_uncertain_labels_is_resumed(command, stopped, tmp_path):
    """Only with the default, which is what that version did."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run / "recipe.yaml").write_text(recipe_of(run))
    refused = run_command(*command, "--run", run, "--uncertain", "positive")
    assert "uncertain was ignore, is positive" in refused.stderr
    before = said(run)
    assert run_command(*command, "--run", run).returncode == 0
    assert said(run)[: len(before)] == before
    assert (run / "model" / "model.json").is_file()


def test_a_run_is_not_resumed_in_another_precision(command, stopped, tmp_path, monkeypatch):
    """run.json and the report name one precision, which then is that of all steps."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    refused = run_command(*command, "--run", run)
    assert refused.returncode == 2
    assert "was begun with --mixed_precision no, is launched with bf16" in refused.stderr
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert run_command(*command, "--run", run).returncode == 0


def test_a_training_does_not_send_its_user_to_itself(command, stopped, tmp_path):
    """A damaged run.json stays damaged however often the training is run."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    os.truncate(run / "run.json", 50)
    refused = run_command(*command, "--run", run)
    assert refused.returncode == 2
    assert refused.stderr.endswith("; copy the run directory again, or train in a new one\n")


@pytest.mark.parametrize(
    "damage",
    [
        *(damage_cut, damage_empty, damage_bit, damage_bomb),
        *(damage_missing, damage_position, damage_no_position, damage_format),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(stopped, tmp_path, damage):
    """The one before it is taken; nothing in the damaged one is run."""
    checkpoints = Path(shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints"))
    states = sorted(checkpoints.glob("[!.]*/state.safetensors"))
    recipe, warnings = recipe_of(stopped), []
    before = load_latest(checkpoints, recipe, warnings.append)
    assert not warnings
    damage(states[-1])
    found = load_latest(checkpoints, recipe, warnings.append)
    assert states[-1].parent.name in warnings[0]
    assert found is not None
    assert found.position.name < before.position.name
    assert not (states[-1].parent / "ran").exists()


def test_a_run_whose_checkpoints_are_all_damaged_says_that_it_starts_again(stopped, tmp_path):
    """There is no older one to resume from."""
    checkpoints = Path(shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints"))
    states, warnings = sorted(checkpoints.glob("[!.]*/state.safetensors")), []
    for state in states:
        damage_bit(state)
    assert load_latest(checkpoints, recipe_of(stopped), warnings.append) is None
    assert len(warnings) == len(states) + 1
    assert not any("resum" in line for line in warnings)
    assert warnings[-1].endswith(
        "no whole checkpoint is left; the training starts from the beginning"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "cxrdist-checkpoint-9", "has format 'cxrdist-checkpoint-9'"),
        ("recipe", "seed: 5\n", "is a checkpoint of another recipe"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(stopped, tmp_path, field, value, message):
    """A newer format or another recipe is no damage: going on from an older one would be wrong."""
    checkpoints = Path(shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints"))
    latest = max(checkpoints.glob("[!.]*/position.json"))
    recipe = recipe_of(stopped)
    if field == "format":
        write_signed(latest, json.loads(latest.read_text()) | {"format": value})
    with pytest.raises(CxrdistError, match=message):
        load_latest(checkpoints, value if field == "recipe" else recipe, print)


def test_a_checkpoint_beyond_the_end_of_its_stage_is_refused(command, stopped, tmp_path):
    """As of a hand that has changed it: its sha256 is right, and the stage has fewer epochs."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    latest = max((run / "checkpoints").glob("[!.]*/position.json"))
    document = json.loads(latest.read_text())
    document["position"]["stopping"]["epoch"] = 99
    write_signed(latest, document)
    done = run_command(*command, "--run", run)
    assert done.returncode == 2
    assert f"checkpoints/{latest.parent.name}: does not fit the recipe" in done.stderr
    assert "(epoch 99 of 2); remove it to resume from the one before it" in done.stderr


def test_the_holder_of_a_run_directory_is_named(command, tmp_path):
    """A second job stops at once and says who is writing: host, process, since when."""
    with locked(tmp_path / "run"):
        done = run_command(*command, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert f"pid {os.getpid()}, since " in done.stderr


def test_a_full_disk_leaves_the_last_save_and_the_run_goes_on(command, tmp_path):
    """One line that says so; with room the same command ends as an undisturbed run."""
    run, whole = tmp_path / "disk" / "run", tmp_path / "whole"
    with small_disk(tmp_path / "disk", "200k") as make_room:
        done = run_command(*command, "--run", run)
        assert done.returncode == 1, done.stderr
        assert "No space left on device; make room" in done.stderr
        assert "Traceback" not in done.stderr
        make_room()
        assert run_command(*command, "--run", run).returncode == 0
        assert run_command(*command, "--run", whole).returncode == 0
        assert_steps_were_taken(run, whole)


LITTLE_MEMORY = """
import resource
from pathlib import Path
import cxrdist.train.loop
data = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + (400 << 20),) * 2)
"""


def test_a_step_that_does_not_fit_into_memory_says_what_to_do(command, shards, tmp_path):
    """The line names the batch and a smaller pass, with which the run goes on after its save."""
    stages = {
        name: {"lr": dict.fromkeys(blocks, 0.01), "epochs": 1, "patience": 1}
        for name, blocks in (("head", ["head"]), ("all", BLOCKS))
    }
    recipe = {
        **{"init": "none", "global_batch_size": 600, "stages": stages},
        **{"copies": dict.fromkeys(("a", "b c", "d"), 20)},
        # Whole steps take 300 MiB in the first stage, which keeps no activations, then 650 MiB.
        **{"network": {"growth_rate": 16, "block_config": [6, 6, 6, 6]}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [*with_recipe(command, tmp_path / "recipe.yaml"), "--run", tmp_path / "run"]
    failed = run_script(LITTLE_MEMORY + RUN_CXRDIST, *command)
    assert failed.returncode == 1, failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert "stage all, epoch 1, step 1: out of memory with 600 images in a pass" in last
    assert "try --max-images-per-rank 300" in last
    done = run_script(LITTLE_MEMORY + RUN_CXRDIST, *command, "--max-images-per-rank", 20)
    assert done.returncode == 0, done.stderr
    assert "resuming after head" in done.stdout
