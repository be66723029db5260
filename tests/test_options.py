"""Every field of every config is a flag, in both spellings."""

import os
import random
import string
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml

import cxrdist.config
from cxrdist.cli import COMMANDS, main, parse, read_arguments
from cxrdist.config import Background
from cxrdist.documents import Between, Inside
from cxrdist.errors import CxrdistError, choices
from cxrdist.fields import leaves

STAGE = "{one: {lr: {head: 0.1}, epochs: 3, patience: 1}}"
NEEDED = {
    "shards": "s",
    "run": "r",
    "stages": STAGE,
    "source": "folder",
    "input": "i",
    "out": "o",
    "images": "a.png",
    "run_a": "a",
    "run_b": "b",
    "file": "f",
    "to": "onnx",
}
PATHS = ["--shards=s", "--run=r"]


def without_bounds(kind: Any) -> Any:
    """A type as `typing` has it, of X | None and of Annotated[X, ...] the X."""
    while get_origin(kind) is Annotated or type(None) in get_args(kind):
        kind = get_args(kind)[0]
    return kind


def sample(kind: Any, default: Any) -> tuple[str, Any]:
    """A text for a field, and what it means; whatever the bounds are, it is within them."""
    kind = without_bounds(kind)
    if get_origin(kind) is Literal:
        return get_args(kind)[-1], get_args(kind)[-1]
    if get_origin(kind) is tuple:
        return "[10, 11, 12, 13]", (10, 11, 12, 13)
    if get_origin(kind) is list:
        return "x_y/z-0", [Path("x_y/z-0")]
    if kind is bool:
        return ("false", False) if default is True else ("true", True)
    plain = {int: ("10", 10), float: ("0.25", 0.25), str: ("1e3", "1e3"), Path: ("p", Path("p"))}
    return plain[kind]


def needed(name: str, flag: str) -> list[str]:
    """Flags for the fields without a default but the one of `flag`."""
    given = [f"--{key.replace('_', '-')}={NEEDED[key]}" for key in required(name) & NEEDED.keys()]
    if ".background." in flag and not flag.endswith(".weight"):
        given.append("--stages.one.background.weight=2")
    return [argument for argument in given if argument.partition("=")[0] != flag]


def required(name: str) -> set[str]:
    config = COMMANDS[name].config_class
    return {f for f in config.__dataclass_fields__ if not hasattr(config, f)} - {"_"}


def value_at(config: Any, flag: str) -> Any:
    """Where a flag in hyphens points to, walked without the package's own code."""
    for word in flag.removeprefix("--").split("."):
        config = config[word] if isinstance(config, dict) else vars(config)[word.replace("-", "_")]
    return config


def named(flag: str) -> str:
    """A flag with names of its own in place of NAME: a stage of the recipe, then any."""
    if flag.startswith("--stages."):
        flag = flag.replace("NAME", "one", 1)
    return flag.replace("NAME", "Viral_Pneumonia-2 (a)")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_a_flag_in_both_spellings(name):
    """Each arrives in the config, after a space and after =; names keep their own letters."""
    for field in leaves(COMMANDS[name].config_class):
        text, value = sample(field.kind, field.default)
        flag = named(field.flag)
        for spelt in (flag, named("--" + field.flag[2:].replace("-", "_"))):
            for words in ([spelt, text], [f"{spelt}={text}"]):
                config = parse(COMMANDS[name], [*needed(name, flag), *words])
                assert value_at(config, flag) == value, words


def test_the_flags_cover_the_fields_that_were_agreed_on():
    """Those of tests/golden/options.yaml, but what is a group of others or not of a command."""
    golden = yaml.safe_load((Path(__file__).parent / "golden" / "options.yaml").read_text())
    flags = [field for command in COMMANDS.values() for field in leaves(command.config_class)]
    covered = {(field.owner.__name__, field.name) for field in flags}
    groups = {("TrainConfig", name) for name in ("stages", "augmentation", "network")}
    groups |= {("Stage", "background")}
    expected = {(owner, field) for owner, names in golden.items() for field in names}
    assert expected - covered == groups | {(o, f) for o, f in expected if o == "SourceConfig"}
    assert all(is_dataclass(getattr(cxrdist.config, owner)) for owner in golden)


def beyond(kind: Any) -> list[float]:
    """Values just outside the bounds of a number."""
    while get_origin(kind) is not Annotated and type(None) in get_args(kind):
        kind = get_args(kind)[0]
    if get_origin(kind) is not Annotated:
        return []
    base, *bounds = get_args(kind)
    ends = [(end, sign, type(b)) for b in bounds for end, sign in ((b.least, -1), (b.most, 1))]
    step = {(Between, int): 1, (Between, float): 0.001, (Inside, int): 0, (Inside, float): 0}
    outside = [end + sign * step[bound, base] for end, sign, bound in ends if abs(end) < 1e9]
    return [base(value) for value in outside] + ([float("nan")] if base is float else [])


@pytest.mark.parametrize("name", COMMANDS)
def test_numbers_out_of_their_bounds_are_refused_by_their_flags(name):
    """The line has the command, the flag in hyphens, the value, and what was expected."""
    for field in leaves(COMMANDS[name].config_class):
        for value in beyond(field.kind):
            flag = named(field.flag)
            text = ".nan" if value != value else str(value)
            words = [*needed(name, flag), named("--" + field.flag[2:].replace("-", "_")), text]
            with pytest.raises(CxrdistError) as refused:
                parse(COMMANDS[name], words)
            line = str(refused.value)
            assert line.startswith(f"{name}: {flag}: is ")
            assert ", expected " in line


def test_there_are_bounds():
    """The numbers that the commands had refused by hand before."""
    bounded = {
        (name, field.flag)
        for name, command in COMMANDS.items()
        for field in leaves(command.config_class)
        if beyond(field.kind)
    }
    for name, flag in {
        ("train", "--stages.NAME.lr.NAME"),
        ("train", "--average"),
        ("pack", "--depth"),
        ("pack", "--expect.NAME"),
        ("evaluate", "--prevalence"),
        ("explain", "--limit"),
        ("probe-text", "--height"),
        ("seeds", "--seeds"),
    }:
        assert (name, flag) in bounded


REFUSED = [
    (["train", "--config", "demo", *PATHS, "--lr", "1"], "--lr: no such option; expected one of"),
    (["train", "--config", "demo", *PATHS, "--lr", "1"], "nearest is --stages.NAME.lr.NAME; see"),
    (
        ["explain", "--run=r", "--shards=s", "--limt", "3"],
        "nearest is --limit; see cxrdist explain",
    ),
    (["explain", "--run=r", "--shards=s", "--limit", "ab"], '--limit: is "ab", expected a whole'),
    (["explain", "--run=r", "--shards=s", "--limit", "0"], "--limit: is 0, expected at least 1"),
    (["train", "--config", "lung", *PATHS], "expected one of bassi2020, chexnet, chexnet-fast"),
    (["train", "--config", "lung", *PATHS], "nearest is lungs"),
    (["pack", "--config", "chexprt", "--input=i", "--out=o"], "nearest is chexpert"),
    (
        ["train", "--config", "demo", *PATHS, "--stages.al.epochs=3"],
        "--stages.al.epochs: no such stage",
    ),
    (
        ["train", "--config", "demo", *PATHS, "--stages.all.epoks=3"],
        "nearest is --stages.all.epochs",
    ),
    (["train", *PATHS, "--network.architecture", "densnet121"], "nearest is densenet121"),
    (["train", *PATHS, "--optimizer", "adam"], "expected one of sgd, adamw; nearest is adamw"),
    (["train", *PATHS, "--seed=1", "--seed", "2"], "--seed: is given twice, '1' and '2'; keep one"),
    (["train", "--run=", "--shards=s"], "--run: is empty, expected a path"),
    (["train", *PATHS, "--save-steps=1", "--save_steps=1"], "--save-steps: is given twice"),
    (["evaluate", "--run=r", "--shards=s", "--split", "tset"], "nearest is test"),
    (["pack", "--source", "chexprt", "--input=i", "--out=o"], "nearest is chexpert"),
    (["pack", "--source", "csv", "--input"], "--input: expected a value after it, a path"),
    (["check", "a", "b"], "'b' is not an option"),
    (["train", *PATHS, "--seed.x", "3"], "--seed.x: --seed is a single value without fields"),
    (["train", *PATHS, "--network", "3"], "--network: is 3, expected its fields"),
    (["train", *PATHS, "--copies.a", "{"], "--copies.a '{': "),
    (["train", *PATHS, "--average", "1" + "0" * 400], "number 10000000000000000000..., which is"),
    (["train", *PATHS, "--seed", "0x" + "f" * 5000], "number 0xffffffffffffffffff..., which is"),
    (["predict"], "--run, IMAGES, --out: missing; see cxrdist"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_mistakes_name_what_there_is(capsys, tmp_path, monkeypatch, arguments, message):
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cxrdist: {arguments[0]}: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", [True, False])
def test_a_flag_overrides_within_stages_given_as_a_whole(last):
    """As it does within the recipe's, wherever it stands; what is given as a whole replaces."""
    whole, within = ["--stages", STAGE], ["--stages.one.lr.stem", "5e-4"]
    words = [*whole, *within] if last else [*within, *whole]
    config = parse(COMMANDS["train"], ["--config=demo", *PATHS, *words])
    assert list(config.stages) == ["one"]
    assert config.stages["one"].lr == {"head": 0.1, "stem": 5e-4}
    assert config.stages["one"].epochs == 3


@pytest.mark.parametrize("word", ["false", "False"])
def test_a_truth_value_may_have_a_capital(word):
    """As Python writes it, and as it may be given behind an equals sign."""
    given = ["--config", "scratch", "--shards", "s", "--run", "r", "--augmentation.flip", word]
    assert parse(COMMANDS["train"], given).augmentation.flip is False


def test_a_recipe_may_write_small_numbers_without_a_dot(tmp_path):
    """1e-4 is a number as of YAML 1.2; PyYAML alone takes it for text."""
    (tmp_path / "r.yaml").write_text(f"stages: {STAGE.replace('0.1', '1e-4')}\ninit: none\n")
    config = parse(COMMANDS["train"], ["--config", str(tmp_path / "r.yaml"), *PATHS])
    assert config.stages["one"].lr == {"head": 1e-4}


def test_files_after_two_hyphens_may_begin_with_one():
    """As with other commands of Unix, not even --help is a flag there."""
    words = ["predict", "a.png", "--run=r", "--out=o.csv", "--", "-x.png", "--help"]
    _, config, _ = read_arguments(words)
    assert config.images == [Path("a.png"), Path("-x.png"), Path("--help")]
    with pytest.raises(CxrdistError, match="'-y' is not an option"):
        read_arguments(["check", "--", "-x", "-y"])


def test_a_group_begins_with_its_first_flag():
    """A stage without a background gets one; null takes it away."""
    flags = ["--stages", STAGE, "--stages.one.background.weight", "0.7"]
    config = parse(COMMANDS["train"], [*PATHS, *flags])
    assert config.stages["one"].background == Background(0.7)
    lungs = parse(
        COMMANDS["train"],
        ["--config=lungs", *PATHS, "--stages.all.background", "null"],
    )
    assert lungs.stages["all"].background is None


def test_stages_may_have_dots_in_their_names():
    """As directories of runs may."""
    flags = ["--stages", STAGE.replace("one", "v1.2"), "--stages.v1.2.warmup-epochs", "2"]
    assert parse(COMMANDS["train"], [*PATHS, *flags]).stages["v1.2"].warmup_epochs == 2


@pytest.mark.parametrize(
    "recipe",
    [
        "stages: {one: {lr: {head: 0.1}, epochs: 1, patience: 1}}\nnetwork: {growth_rate: 8, "
        "block_config: [2, 2, 2, 2], dropout: 0.5}\ncopies: {'1': 3}\noptimizer: sgd\n",
        "stages: {one: {lr: {all: 1.0e-05}, epochs: 1, patience: 1, weight_decay: 0}}\n"
        "max_gradient_norm: null\naverage: null\nfold: null\nseed: 0\n",
    ],
)
def test_recipes_of_older_runs_are_read(tmp_path, recipe):
    """Fields that came later have their defaults; written and read again they are the same."""
    from cxrdist.train.training import recipe_yaml

    (tmp_path / "old.yaml").write_text(recipe)
    config = parse(COMMANDS["train"], ["--config", str(tmp_path / "old.yaml"), *PATHS])
    (tmp_path / "new.yaml").write_text(recipe_yaml(config))
    again = parse(COMMANDS["train"], ["--config", str(tmp_path / "new.yaml"), *PATHS])
    assert again == config


def test_the_nearest_name_does_not_depend_on_capitals():
    """NORMAL is near normal; what is like none of the names is near none."""
    assert choices("normal", ["COVID-19", "NORMAL"]).endswith("; nearest is NORMAL")
    assert choices("xyz", ["COVID-19", "NORMAL"]) == "expected one of COVID-19, NORMAL"


def test_names_that_differ_in_capitals_are_all_listed():
    """Folders normal and Normal are two classes."""
    assert choices("xyz", ["normal", "Normal"]) == "expected one of normal, Normal"


def test_random_words_are_one_line():
    """No command line of words from options and letters ends in a traceback."""
    draw = random.Random(0)
    names, lines = list(COMMANDS), []
    for _ in range(300):
        name = draw.choice(names)
        flags = [field.flag for field in leaves(COMMANDS[name].config_class)]
        words = [
            draw.choice([draw.choice(flags), "".join(draw.choices(string.printable, k=6)), "[1"])
            for _ in range(draw.randrange(6))
        ]
        try:
            parse(COMMANDS[name], words)
        except CxrdistError as error:
            lines.append((name, str(error)))
    assert len(lines) > 200
    assert all(line.startswith(f"{name}: ") for name, line in lines)
    with pytest.raises(CxrdistError, match="not valid UTF-8"):
        parse(COMMANDS["check"], ["--shards", os.fsdecode(b"\xe9")])


def test_ends_of_a_range_are_in_it_or_not():
    """A shift by the whole width is one; an average that keeps all of the old weights is none."""
    words = ["--config=demo", *PATHS]
    config = parse(COMMANDS["train"], [*words, "--augmentation.shift-x", "1"])
    assert config.augmentation.shift_x == 1.0
    with pytest.raises(CxrdistError, match=r"--average: is 1\.0, expected more than 0 and less"):
        parse(COMMANDS["train"], [*words, "--average", "1"])


@pytest.mark.parametrize(
    ("name", "words", "flag"),
    [
        ("train", ["--config=demo", "--shards=memory://s", "--run=memory://r"], "--run"),
        ("predict", ["a.png", "memory://a/b.png", "--run=r", "--out=o.csv"], "--images"),
    ],
)
def test_a_url_is_refused_where_a_local_path_is_needed(name, words, flag):
    """Also in a list of paths; shards may be elsewhere."""
    with pytest.raises(CxrdistError, match=rf"{flag} memory://.*: expected a path on this machine"):
        parse(COMMANDS[name], words)
