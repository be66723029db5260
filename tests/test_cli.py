import io
import os
import subprocess
import sys
import tempfile

import pytest
import yaml
from support import make_images, small_disk

from cxrdist.cli import COMMANDS, main, parse
from cxrdist.fields import leaves
from cxrdist.run import RunDirectory

STAGES = {"one": {"lr": {"head": 0.1}, "epochs": 1, "patience": 1}}


def refused(capsys, *arguments: object) -> str:
    """Run a command that must be refused with exit code 2 and one line; give the line."""
    assert main([str(a) for a in arguments]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("cxrdist: ")]
    assert len(lines) == 1
    return lines[0]


def write_recipe(tmp_path, **changes) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": STAGES, "init": "none", **changes}))
    return str(path)


def test_help_lists_every_command(capsys):
    """`cxrdist --help` names all commands, and each has a help of its own."""
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in said


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_its_options(capsys, name):
    """`cxrdist COMMAND --help` ends well and documents every option."""
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: cxrdist {name}" in said
    for field in leaves(COMMANDS[name].config_class):
        assert f"  {field.flag} " in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipes", "usage: cxrdist recipes [NAME] [options]"),
        ("compare", "usage: cxrdist compare RUN_A RUN_B [options]"),
        ("train", "If neither a recipe nor --stages is given: finetune, or scratch"),
        ("train", "(a list such as [1, 2, 3, 4]; each a whole number, 1 to 128)"),
        ("train", "(a number, more than 0, at most 1; default: 1)"),
        ("probe-text", "(a number, more than 0, at most 0.5; default: 0.06)"),
    ],
)
def test_help_says_what_may_be_left_out_and_what_a_value_looks_like(capsys, name, text):
    """Optional words in brackets; the recipe of a training without --config; bounds once."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert text in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'; expected one of pack, check, train"),
        (["pack", "--source", "folder"], "pack: --input, --out: missing; see"),
        (["pack", "--source", "dicom", "--input", "x", "--out", "y"], "source"),
        (["pack", "--source", "folder", "--input", "/lost", "--out", "y"], "/lost: no such folder"),
        (["check", "/lost"], "/lost: has no index.json"),
        (["report", "--run", "/lost"], "/lost"),
        (["evaluate", "--run", "/lost", "--shards", "/lost"], "/lost: contains no trained model"),
        (["predict", "--run", "/lost", "x.png", "--out", "y.csv"], "/lost: contains no trained"),
        (["weights"], "no command 'weights'; expected one of weights show, weights convert"),
        (["weights", "shwo", "x"], "no command 'weights shwo'; expected one of weights show"),
        (["weights", "show", "/lost"], "cxrdist: /lost: no such file"),
        (["weights", "convert", "/lost", "y"], "y: expected a name ending in .safetensors"),
        (["train", "--config", "/lost.yaml", "--shards", "s", "--run", "r"], "/lost.yaml"),
        (
            ["train", "--config", "covid"],
            "covid: no such file, and no recipe of this name",
        ),
        (["train", "--config=covid"], "expected one of bassi2020, chexnet, chexnet-fast, comp"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    """Each names the option or file."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_locale_that_cannot_name_files_is_refused():
    """Names with other letters would be misread, and called invalid."""
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "cxrdist", "check", "Züge"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    line = "cxrdist: Python reads file names as ascii here; set PYTHONUTF8=1\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_bad_folders_are_refused(capsys, tmp_path):
    """An empty class, one class only, a truncated PNG, a text named .png."""
    empty = make_images(tmp_path / "empty", {"a": 4, "b": 4})
    (empty / "c").mkdir()
    one = make_images(tmp_path / "one", {"a": 4})
    text = make_images(tmp_path / "text", {"a": 10, "b": 10})
    (text / "a" / "z.png").write_text("text")
    pack = ("pack", "--source", "folder", "--split", "0.5/0.25/0.25", "--out", tmp_path / "out")
    assert "empty/c: the class has no image" in refused(capsys, *pack, "--input", empty)
    assert "found 1 class (a), expected at least 2" in refused(capsys, *pack, "--input", one)
    assert "a/z.png: is not a readable image" in refused(capsys, *pack, "--input", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_sise": 3}, "global_batch_sise"),
        ({"stages": {"one": {**STAGES["one"], "epoks": 3}}}, "epoks"),
        (
            {"stages": {"one": {**STAGES["one"], "lr": {"haed": 0.1}}}},
            "--stages.one.lr: no block 'haed'",
        ),
        ({"stages": {"one": {**STAGES["one"], "lr": {}}}}, "--stages.one: trains nothing"),
        ({"stages": {}}, "stages: the recipe has none"),
        (
            {"copies": {"covid": 3}},
            "--copies: no class 'covid' in the shards; expected one of a, b",
        ),
        ({"global_batch_size": 0}, "--global-batch-size: is 0, expected at least 1"),
        ({"global_batch_size": "many"}, '--global-batch-size: is "many", expected a'),
        ({"init": "/lost.pth"}, "--init /lost.pth: no such file"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"network": 3}, "--network: is 3, expected its fields"),
    ],
)
def test_bad_recipes_are_refused(capsys, tmp_path, shards, changes, message):
    """A misspelt field, block or class, and numbers that cannot be meant; no run is begun."""
    recipe = write_recipe(tmp_path, **changes)
    paths = ("--shards", shards, "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    assert message in refused(capsys, "train", "--config", recipe, *paths)
    assert not [f for f in (tmp_path / "run").glob("*") if f.name != ".lock"]


def test_an_override_of_an_unknown_stage_is_refused(capsys, tmp_path, shards):
    """--stages.NAME.epochs of a stage that the recipe does not have is no new stage."""
    recipe = write_recipe(tmp_path)
    paths = ("--shards", shards, "--run", tmp_path / "run")
    said = refused(capsys, "train", "--config", recipe, *paths, "--stages.tow.epochs", "3")
    assert "--stages.tow.epochs: no such stage in the recipe; expected one" in said


def test_flags_take_dashes_and_need_no_value():
    """--skip-bad is --skip_bad true, and a pattern may start with anything."""
    config = parse(
        COMMANDS["pack"],
        ["--source=folder", "--input=i", "--out=o", "--skip-bad", "--patient-pattern", r"^(\d+)_"],
    )
    assert config.skip_bad
    assert config.patient_pattern == r"^(\d+)_"


@pytest.mark.parametrize("recipe", [["--config", "demo"], ["--config=demo"]])
def test_options_override_a_recipe_wherever_they_stand(recipe):
    """Before --config as well, where they are not undone by the recipe."""
    options = ["--shards=s", "--run=r", "--global-batch-size", "5", "--stages.fine.epochs", "7"]
    for arguments in ([*recipe, *options], [*options, *recipe]):
        config = parse(COMMANDS["train"], arguments)
        assert (config.global_batch_size, config.stages["fine"].epochs) == (5, 7)
        assert config.stages["all"].epochs == 12


def test_a_recipes_name_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    """`--config demo` is the packaged recipe, also where a folder ./demo stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    paths = ["--shards", "s", "--run", "r"]
    config = parse(COMMANDS["train"], ["--config", "demo", *paths])
    assert list(config.stages) == ["all", "fine"]
    tracked = parse(COMMANDS["train"], ["--config", "demo", *paths, "--track", "tensorboard"])
    assert tracked.track == "tensorboard"


def test_a_terminal_without_the_letters_shows_their_codes(monkeypatch):
    """Output in ASCII and a folder named in Chinese: no traceback on either stream."""
    said = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(said, encoding="ascii", errors="strict"))
    assert main(["check", "/\u80ba"]) == 2
    print("\u708e")
    sys.stdout.flush(), sys.stderr.flush()
    assert b"cxrdist: --shards /\\u80ba: has no index.json" in said.getvalue()
    assert b"\\u708e\n" in said.getvalue()


def test_an_argument_that_is_not_utf8_is_one_line(capsys):
    """A name in Latin-1 on the command line is shown with its bytes."""
    line = refused(capsys, "check", os.fsdecode(b"caf\xe9"))
    assert line.startswith("cxrdist: check: caf\\udce9 is not valid UTF-8; rename it")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_seen_enough_is_no_error(capsys, monkeypatch, buffered):
    """As in `cxrdist --help | head -1`, also with PYTHONUNBUFFERED: nothing is said; code 1."""
    reading, writing = os.pipe()
    os.close(reading)
    raw = open(writing, "wb", buffering=-1 if buffered else 0)
    with io.TextIOWrapper(raw, write_through=not buffered) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["--help"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_an_output_that_is_full_is_one_line(capsys, monkeypatch):
    """As in `cxrdist --help > FILE` on a full disk."""
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["--help"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err.startswith("cxrdist: the output: No space left on device; make")


def test_a_command_may_have_no_options():
    """`cxrdist demo` alone is the README's first command."""
    assert parse(COMMANDS["demo"], []).source == "phantom"


def test_a_home_is_written_out(capsys, tmp_path, monkeypatch):
    """The shell leaves the ~ of --out=~/shards; it is no folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--source=folder", "--input=i"]
    config = parse(COMMANDS["pack"], [*options, "--out=~/shards"])
    assert config.out == tmp_path / "shards"
    assert "write the directory out" in refused(capsys, "check", "~nobody-has-this-name/x")


@pytest.mark.parametrize("protocol", ["zip", "tar"])
def test_a_url_into_no_archive_is_one_line(capsys, tmp_path, protocol):
    """A file of another kind and a missing file are both refused by the URL as it was given."""
    (tmp_path / "notes.txt").write_text("not an archive")
    for name in ("notes.txt", "missing"):
        url = f"{protocol}://shards::{tmp_path}/{name}"
        line = refused(capsys, "check", url)
        assert line.startswith(f"cxrdist: check: {url}: ")
        assert line.endswith("; expected a path or an fsspec URL")


@pytest.mark.parametrize(
    "url", ["http://[::1", "s3://[shards", "unknown://shards", "github://shards"]
)
def test_a_url_that_is_none_is_one_line(capsys, url):
    """As of an address without its last bracket."""
    line = refused(capsys, "check", url)
    assert line.startswith(f"cxrdist: check: {url}: ")
    assert line.endswith("; expected a path or an fsspec URL")


def test_a_server_that_does_not_answer_is_one_line(capsys):
    """Nothing listens at port 1 of this machine; this is no wrong usage, so the code is 1."""
    url = "http://127.0.0.1:1/shards"
    assert main(["pack", "--source=csv", f"--input={url}", "--out=never-made"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cxrdist: the object store cannot be used: ")
    assert "127.0.0.1" in error
    assert error.count("\n") == 1


def test_a_disk_that_is_read_only_is_one_line(capsys, tmp_path):
    """The run on it is named, the exit code is that of a fault of the machine."""
    with small_disk(tmp_path / "disk", "1m"):
        run = RunDirectory(tmp_path / "disk")
        os.mkdir(run.model)
        (run.model / "model.json").touch()
        subprocess.run(["mount", "-o", "remount,ro", run.root], check=True)
        out = str(run.root / "a.csv")
        assert main(["predict", "--run", str(run.root), "x.png", "--out", out]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].endswith(f"{tmp_path / 'disk'} is read-only; name another place")


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["check", "no-such-shards"], 2)]
)
def test_closed_streams_change_no_exit_code(arguments, code):
    """Some daemons start programs so; the answer goes nowhere, and nothing else is different."""
    command = [sys.executable, "-m", "cxrdist", *arguments]
    script = 'exec "$@" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, "sh", *command]).returncode == code


def test_no_file_gets_the_number_of_a_closed_stream():
    """What C libraries write to 1 and 2 would else be written into the files of a run."""
    code = (
        "import os; from cxrdist.cli import open_closed_streams as o; o();"
        "o(); assert os.open('/dev/zero', os.O_RDONLY) > 2;"
        "os.write(1, b'x'), os.write(2, b'x'), print('x', flush=True);"
        "assert all(map(os.get_inheritable, range(3)))"
    )
    script = 'exec "$@" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, "sh", sys.executable, "-c", code]).returncode == 0


def test_a_small_directory_for_temporary_files_is_named(capsys, shards, tmp_path, monkeypatch):
    """The audit's pixels do not fit: one line before the work, and no bus error in a worker."""
    with small_disk(tmp_path / "disk", "32k"):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
        assert main(["check", str(shards), "--audit"]) == 1
    assert "No space left on device; set TMPDIR to a directory" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    assert main(["check", str(shards)]) == 1
    assert "No usable temporary directory" in capsys.readouterr().err


def test_names_that_are_too_long_are_one_line(capsys):
    """A path that no file system takes."""
    assert "File name too long; name another" in refused(capsys, "check", "x" * 300)
