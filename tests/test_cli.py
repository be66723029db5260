import pytest
import yaml
from support import make_images

from cxrdist.cli import COMMANDS, main, parse

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
    assert f"usage: cxrdist {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'; expected one of pack, check, train"),
        (["pack", "--source", "folder"], "required: input"),
        (["pack", "--source", "dicom", "--input", "x", "--out", "y"], "source"),
        (["pack", "--source", "folder", "--input", "/lost", "--out", "y"], "/lost: no such folder"),
        (["check", "/lost"], "/lost: has no index.json"),
        (["report", "--run", "/lost"], "/lost"),
        (["evaluate", "--run", "/lost", "--shards", "/lost"], "/lost: holds no trained model"),
        (["predict", "--run", "/lost", "x.png", "--out", "y.csv"], "/lost: holds no trained"),
        (["weights"], "no command 'weights'; expected one of weights show, weights convert"),
        (["weights", "shwo", "x"], "no command 'weights shwo'; expected one of weights show"),
        (["weights", "show", "/lost"], "cxrdist: /lost: no such file"),
        (["weights", "convert", "/lost", "y"], "y: expected a name in .safetensors"),
        (["train", "--config", "/lost.yaml", "--shards", "s", "--run", "r"], "/lost.yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    """Each names the option or file."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


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
    assert "a/z.png: no readable image" in refused(capsys, *pack, "--input", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_sise": 3}, "global_batch_sise"),
        ({"stages": {"one": {**STAGES["one"], "epoks": 3}}}, "epoks"),
        ({"stages": {"one": {**STAGES["one"], "lr": {"haed": 0.1}}}}, "no block 'haed'"),
        ({"stages": {"one": {**STAGES["one"], "lr": {}}}}, "stages.one: trains nothing"),
        ({"stages": {}}, "stages: the recipe has none"),
        ({"copies": {"covid": 3}}, "no class 'covid' in the shards; they have a, b c, d"),
        ({"global_batch_size": 0}, "global_batch_size: is 0, expected at least 1"),
        ({"global_batch_size": "many"}, "global_batch_size"),
        ({"init": "/lost.pth"}, "--init /lost.pth: no such file"),
        ({"optimizer": "adam"}, "optimizer"),
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
    assert "stages" in said


def test_flags_take_dashes_and_need_no_value():
    """--skip-bad is --skip_bad true, and a pattern may start with anything."""
    config = parse(
        COMMANDS["pack"],
        "pack",
        ["--source=folder", "--input=i", "--out=o", "--skip-bad", "--patient-pattern", r"^(\d+)_"],
    )
    assert config.skip_bad
    assert config.patient_pattern == r"^(\d+)_"


def test_a_recipes_name_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    """`--config demo` is the packaged recipe, also where a folder ./demo stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    paths = ["--shards", "s", "--run", "r"]
    config = parse(COMMANDS["train"], "train", ["--config", "demo", *paths])
    assert list(config.stages) == ["all", "fine"]
    tracked = parse(
        COMMANDS["train"], "train", ["--config", "demo", *paths, "--track", "tensorboard"]
    )
    assert tracked.track == "tensorboard"
