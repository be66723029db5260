"""launch/paper.sh with stand-ins for the commands python and cxrdist.

They write down what they are asked for, and make the files that tell what is done.
"""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support import LAUNCH

STAND_IN = """#!/bin/bash
words=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --run) run=$2 ;;
        --out) out=$2 ;;
        --seed) seed=$2 ;;
        --init) from=" from ${2##*/}" ;;
        --name) place=external/$2 ;;
        pack | find-text | evaluate | probe-text | train) name=$1 ;;
        */sources.py | */table.py | */thumbnails.py) name=${1##*/} ;;
    esac
    shift
done
echo "$name ${run:-${out:-${words[2]:-${words[1]}}}}${from:-}" >> "$LOG"
if [ "$name ${run##*/}" = "train ${BLOCKED:-}" ]; then
    trap 'echo saved >> "$LOG"; exit 75' TERM
    echo started > "$FIFO"
    read -r <> "$FIFO.never" # until a signal comes
fi
case $name in
    pack) mkdir -p "$out" && touch "$out/index.json" ;;
    find-text) mkdir -p "${out%/*}" && touch "$out" ;;
    train)
        [ "${run##*/}" != "${BROKEN:-}" ] || exit 1
        mkdir -p "$run/model" && touch "$run/model/model.json"
        ;;
    evaluate) mkdir -p "$run/${place:-test}" && touch "$run/${place:-test}/metrics.json" ;;
    probe-text) touch "$run/test/text.json" ;;
    thumbnails.py)
        out=${words[2]}/perceptron-$seed
        mkdir -p "$out" && touch "$out/thumbnails.json"
        ;;
esac
"""


class Paper:
    """A folder of data without images, and the script with stand-ins."""

    def __init__(self, folder: Path, data: tuple[str, ...] = ()) -> None:
        """Make the folders of `data` beside paper_like."""
        self.out, self.data, self.log = folder / "out", folder / "data", folder / "log"
        for name in ("paper_like", *data):
            (self.data / name).mkdir(parents=True)
        (self.data / "paper_like" / "table.csv").touch()
        commands = folder / "commands"
        commands.mkdir()
        for name in ("python", "cxrdist"):
            (commands / name).write_text(STAND_IN)
            (commands / name).chmod(0o755)
        for name in ("bash", "dirname", "mkdir", "nproc", "touch", "grep"):
            (commands / name).symlink_to(str(shutil.which(name)))
        self.environment = {"PATH": str(commands), "LOG": str(self.log), "DRAWS": "0 1"}

    def start(self, *rows: str, **environment: str) -> subprocess.Popen:
        """Start the script on some rows."""
        return subprocess.Popen(
            [str(shutil.which("bash")), LAUNCH / "paper.sh", self.data, self.out, *rows],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *rows: str, code: int = 0, **environment: str) -> list[str]:
        """Run the script; the commands that it gave, each with the name of its run or folder."""
        self.log.write_text("")
        started = self.start(*rows, **environment)
        self.stdout, self.stderr = started.communicate()
        assert started.returncode == code, self.stderr
        return [line.replace(f"{self.out}/", "") for line in self.log.read_text().splitlines()]


def test_each_draw_is_packed_trained_and_evaluated_once(tmp_path):
    """The same line again only writes the table."""
    paper = Paper(tmp_path)
    rows = ("paper/thumbnails", "paper/resnet18")
    assert paper.run(*rows) == [
        *(
            "pack paper/shards-0",
            "thumbnails.py paper",
            "pack paper/shards-1",
            "thumbnails.py paper",
        ),
        f"table.py {paper.out}",
        *("train paper/resnet18-0", "evaluate paper/resnet18-0"),
        *("train paper/resnet18-1", "evaluate paper/resnet18-1"),
        f"table.py {paper.out}",
    ]
    assert paper.run(*rows) == [f"table.py {paper.out}"] * 2


def test_the_chain_begins_with_one_training_on_14_labels(tmp_path):
    """All draws and rows share it; of the paper's stages each is evaluated."""
    paper = Paper(tmp_path, ("nih14", "adult_normal"))
    done = paper.run("paper/densenet121-findings", "paper/bassi2020")
    trained = [line.removeprefix("train ") for line in done if line.startswith("train")]
    names = [f"{name}-{draw}" for name in ("densenet121-findings", "bassi2020") for draw in (0, 1)]
    assert trained == [
        "findings/densenet121-0",
        *(f"paper/{name} from densenet121-0" for name in names),
    ]
    stages = [f"/stages/{name}" for name in ("head", "unfreeze", "no_decay")]
    evaluated = [line for line in done if line.startswith("evaluate paper/bassi2020-1")]
    assert evaluated == [f"evaluate paper/bassi2020-1{stage}" for stage in ("", *stages)]


def test_densenet121_goes_on_from_its_run_at_half_the_size(tmp_path):
    """Both are of the same draw, each on the shards of its size."""
    paper = Paper(tmp_path)
    assert [
        line for line in paper.run("paper/densenet121", DRAWS="3") if "table.py" not in line
    ] == [
        *("pack paper/shards-3", "pack paper/shards-64px-3"),
        *("train paper/densenet121-64px-3", "evaluate paper/densenet121-64px-3"),
        "train paper/densenet121-3 from densenet121-64px-3",
        "evaluate paper/densenet121-3",
    ]


def test_a_failed_training_ends_the_script_and_is_the_first_of_the_next_call(tmp_path):
    """What was done before it is not done again."""
    paper = Paper(tmp_path)
    done = paper.run("paper/alexnet", code=1, BROKEN="alexnet-1")
    assert done[-1] == "train paper/alexnet-1"
    assert paper.run("paper/alexnet")[0] == "train paper/alexnet-1"


def test_a_signal_lets_the_training_save_and_ends_with_its_code(tmp_path):
    """The training hears it, not only the shell; nothing is started behind it."""
    paper = Paper(tmp_path)
    fifo = tmp_path / "fifo"
    for name in (fifo, Path(f"{fifo}.never")):
        subprocess.run(["mkfifo", name], check=True)
    started = paper.start("paper/alexnet", BLOCKED="alexnet-0", FIFO=str(fifo))
    assert fifo.read_text() == "started\n"
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    assert started.returncode == 75
    assert paper.log.read_text().splitlines()[-1] == "saved"


def test_words_are_looked_for_in_the_test_images_and_covered_there(tmp_path):
    """After the training of the network that is asked what it reads, and once."""
    paper = Paper(tmp_path)
    paper.run("paper/words", code=2)
    assert "needs the row paper/densenet121 first" in paper.stderr
    paper.run("paper/densenet121")
    done = paper.run("paper/words", DRAWS="0")
    assert [line.split()[0] for line in done] == [
        *("sources.py", "find-text", "pack", "evaluate", "probe-text", "table.py"),
    ]
    assert len(paper.run("paper/words", DRAWS="0")) == 1


@pytest.mark.parametrize("rows", [("paper/thumbnails", "covid3/thumbnails"), ()])
def test_a_row_whose_data_are_not_there_is_not_run_and_named(tmp_path, rows):
    """The others are."""
    paper = Paper(tmp_path)
    done = paper.run(*rows, DRAWS="0")
    assert not any("covid3" in line for line in done)
    assert f"covid3/thumbnails: not run, {paper.data} has no covid3" in paper.stdout
    assert "thumbnails.py paper" in done


@pytest.mark.parametrize("row", ["thumbnails", "other/alexnet"])
def test_an_unknown_row_is_refused(tmp_path, row):
    """Before anything is started."""
    paper = Paper(tmp_path)
    assert paper.run(row, code=2) == []
    assert f"{row}: no such row" in paper.stderr
