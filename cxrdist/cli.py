"""The command `cxrdist`: options in, exit code out."""

import io
import os
import re
import select
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from cxrdist import __version__
from cxrdist.config import location
from cxrdist.errors import CxrdistError, RunFailedError, Stopped, failure_of
from cxrdist.lifetime import end_with_launcher
from cxrdist.signals import STOP_CODE, ending_at_once, stopping_at_once


class Command(NamedTuple):
    """Where a command's entry function and options are, and which options stand without a name."""

    entry: str
    config: str
    help: str
    positional: str | None = None


COMMANDS = {
    "pack": Command("data.pack:pack", "PackConfig", "raw images -> shards, split by patient"),
    "check": Command("data.check:check", "CheckConfig", "are the shards still whole?", "shards"),
    "train": Command("train.loop:train", "TrainConfig", "shards + recipe -> trained model"),
    "seeds": Command(
        "seeds:seeds", "SeedsConfig", "one recipe, several seeds or folds, and their ensemble"
    ),
    "evaluate": Command(
        "evaluate.predictions:evaluate", "EvaluateConfig", "predictions and metrics of a split"
    ),
    "explain": Command("explain.export:explain", "ExplainConfig", "LRP relevance and heat maps"),
    "predict": Command("predict:predict", "PredictConfig", "image files -> CSV", "images"),
    "find-text": Command(
        "data.text:find_text", "FindTextConfig", "burned-in text -> CSV of boxes, to be covered"
    ),
    "probe-text": Command(
        "probe_text:probe_text", "ProbeTextConfig", "does the network read words on the images?"
    ),
    "localise": Command(
        "localise:localise", "LocaliseConfig", "where the network looks, against boxes or masks"
    ),
    "probe-background": Command(
        "probe_background:probe_background",
        "ProbeBackgroundConfig",
        "what do the images tell without their lungs?",
    ),
    "report": Command("report.html:report", "ReportConfig", "run directory -> report.html"),
    "compare": Command(
        "report.compare:compare", "CompareConfig", "two runs on the same images", "run_a run_b"
    ),
    "weights show": Command(
        "model.inventory:show_weights", "WeightsShowConfig", "what is in a checkpoint?", "file"
    ),
    "weights convert": Command(
        "model.inventory:convert_weights",
        "WeightsConvertConfig",
        "checkpoint -> safetensors",
        "file out",
    ),
    "schema": Command(
        "schema:print_schema", "SchemaConfig", "JSON schema of each document", "document"
    ),
    "demo": Command("demo:demo", "DemoConfig", "the whole way on synthetic X-rays"),
    "bench": Command("bench.jobs:bench", "BenchConfig", "measure this machine side by side"),
}

POSITIONALS = {
    "run_a": "Run directory.",
    "run_b": "Run directory to compare it with.",
    "shards": "Directory of shards, a path or an fsspec URL.",
    "document": "run, model, metrics, audit ...; all of them if not given.",
    "file": "A checkpoint file, or whatever else --init takes.",
    "out": "File to write, NAME.safetensors; it must not exist yet.",
}

# Names of classes, as in --copies.COVID-19, and of stages keep their dashes.
OPTION = re.compile(r"--(network\.|augmentation\.|stages\.[^=]+\.)?([a-z][a-z-]*)(=.*)?", re.DOTALL)

USAGE = """usage: cxrdist COMMAND [options]

Chest X-ray classifiers, from folders of images to a report. Not a medical device.

{commands}

`cxrdist COMMAND --help` lists a command's options. On several GPUs or nodes:
`accelerate launch --config_file FILE -m cxrdist COMMAND ...`
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done; 1 the run failed; 2 wrong usage or bad input; 75 stopped on request.
    """
    end_with_launcher()
    _print_what_cannot_be_encoded()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            code = _answer(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if _is_flushed(sys.stdout):
            raise
        code = 1  # who reads has seen enough, such as `| head`
    except (CxrdistError, RunFailedError, RuntimeError, OSError) as error:
        _is_flushed(sys.stdout)
        code = _report_failure(error)
    except Stopped as stop:
        if str(stop):
            print(f"cxrdist: {stop}", file=sys.stderr)
        code = STOP_CODE
    return code


def _answer(arguments: list[str]) -> int:
    """Print the help or the version, or run the command."""
    lines = [f"  {name:<17}{command.help}" for name, command in COMMANDS.items()]
    usage = USAGE.format(commands="\n".join(lines))
    first = arguments[1:2] if arguments and _is_group(arguments[0]) else arguments[:1]
    if not arguments or first in (["-h"], ["--help"]):
        print(usage, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"cxrdist {__version__}")
        return 0
    name, rest = _command(arguments)
    command = COMMANDS[name]
    recipe, why = _default_recipe(rest) if name == "train" else (None, "")
    with stopping_at_once():
        with ending_at_once():
            rest = ["--config", recipe, *rest] if recipe else rest
            config, entry = parse(command, name, rest), _entry(command)
        if recipe and os.environ.get("RANK", "0") == "0":
            print(f"recipe: {recipe}, {why}; --config takes another: {', '.join(recipe_names())}")
        entry(config)
    return 0


def _default_recipe(arguments: list[str]) -> tuple[str | None, str]:
    """The recipe of a training whose options name none, and why it is this one.

    None where there is one, where the options give the stages themselves, or ask for help.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    if given & {"--config", "--stages", "--help", "-h"}:
        return None, ""
    pairs = zip_longest(arguments, arguments[1:], fillvalue="")
    if "--init=none" in arguments or ("--init", "none") in pairs:
        return "scratch", "as --init none gives random weights and no --config is given"
    return "finetune", "which suits any classes, as no --config is given"


def _report_failure(error: Exception) -> int:
    """Print one line on an error for users; the exit code.

    Raises:
        Exception: the error itself, if it is a fault of the program.
    """
    line: object = error
    if isinstance(error, OSError):
        line = failure_of(error)
    elif isinstance(error, RuntimeError) and _is_lost_connection(error):
        line = RunFailedError(
            f"rank {os.environ['RANK']}: the connection to another rank was lost; that one's own "
            "message, or its launcher's, says why"
        )
    if not isinstance(line, (CxrdistError, RunFailedError)):
        raise error
    print(f"cxrdist: {_one_line(line)}", file=sys.stderr)
    return 2 if isinstance(line, CxrdistError) else 1


def _is_flushed(stream: TextIO) -> bool:
    """Whether a stream takes what is printed; if not, let that go nowhere from now on."""
    try:
        stream.flush()
        # Without a buffer (PYTHONUNBUFFERED) nothing is left to be flushed: ask for the reader.
        pipe = select.poll()
        pipe.register(stream.fileno(), select.POLLOUT)
        if not any(event & select.POLLERR for _, event in pipe.poll(0)):
            return True
    except io.UnsupportedOperation:  # no file of the system
        return True
    except OSError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False


def _print_what_cannot_be_encoded() -> None:
    r"""Let a terminal without the letters of a name, such as an ASCII one, show them as \uXXXX."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended; gloo and NCCL say so."""
    text = str(error)
    return "RANK" in os.environ and ("gloo/transport" in text or "NCCL" in text)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and what stands behind it.

    Raises:
        CxrdistError: there is no such command.
    """
    for words in (1, 2):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    given, expected = arguments[0], list(COMMANDS)
    if _is_group(given):
        given = " ".join(arguments[:2])
        expected = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    raise CxrdistError(f"no command {given!r}; expected one of {', '.join(expected)}")


def _is_group(word: str) -> bool:
    """Whether a word is the first of commands of two words."""
    return any(name.startswith(f"{word} ") for name in COMMANDS)


def parse(command: Command, name: str, arguments: list[str]) -> Any:
    """Read options and recipe into the command's config.

    Raises:
        CxrdistError: an option or a recipe field is unknown, missing, or of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
    from jsonargparse.typing import register_type

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    register_type(Path, str, location, type_check=lambda value, _: hasattr(value, "joinpath"))
    config = getattr(import_module("cxrdist.config"), command.config)
    parser = ArgumentParser(prog=f"cxrdist {name}", exit_on_error=False)
    if name in ("pack", "train"):
        parser.add_argument(
            "--config",
            action="config",
            help="Recipe: a YAML file, or the name of one that comes with cxrdist.",
        )
    positionals = (command.positional or "").split()
    if positionals == ["images"]:
        parser.add_argument("images", nargs="+", type=Path, help="Image files, or folders.")
    else:
        for positional in positionals:
            kind = str if positional in ("file", "document") else Path
            nargs = "?" if positional == "document" else None
            parser.add_argument(positional, type=kind, nargs=nargs, help=POSITIONALS[positional])
    parser.add_class_arguments(config, None, skip=set(positionals))
    flags = {f.name for f in fields(config) if f.type in (bool, bool | None)}
    arguments = _recipes_first(_normalise(arguments, flags))
    _refuse_bad_recipes(name, arguments)
    if strange := [argument for argument in arguments if _shown(argument) != argument]:
        raise CxrdistError(
            f"{name}: {_shown(strange[0])} is not valid UTF-8; rename it, or give the folder that "
            "it is in"
        )
    try:
        parsed = parser.parse_args(arguments)
        _refuse_plain_groups(name, config, parsed)
        parsed = parser.instantiate(parsed)
    except ArgumentError as error:
        raise CxrdistError(f"{name}: {_readable(str(error))}; see cxrdist {name} --help") from error
    values = {f.name: parsed[f.name] for f in fields(config)}
    _refuse_urls(name, values)
    return config(**values)


def _refuse_urls(command: str, values: dict[str, Any]) -> None:
    """Make sure that an option which needs a path on this machine has none elsewhere."""
    allowed = {"pack": {"input", "masks", "out"}, "find-text": {"input"}}.get(command, {"shards"})
    for name, value in values.items():
        if name not in allowed and hasattr(value, "protocol"):
            raise CxrdistError(f"--{name} {value}: expected a path on this machine, no URL")


def recipe_path(name: str) -> str:
    """The file of a recipe that comes with the package; any other name is a path already."""
    packaged = files("cxrdist") / "recipes" / f"{name}.yaml"
    return str(packaged) if not Path(name).is_file() and packaged.is_file() else name


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(Path(file.name).stem for file in (files("cxrdist") / "recipes").iterdir())


def _normalise(arguments: list[str], flags: set[str]) -> list[str]:
    """Accept --skip-bad for skip_bad, a bare flag for true, and a recipe's name for its file."""
    result = []
    for i, argument in enumerate(arguments):
        after = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if match := OPTION.fullmatch(argument):
            group, option, value = (part or "" for part in match.groups())
            option = group + option.replace("-", "_")
            if option in flags and not value and after not in ("true", "false"):
                value = "=true"
            elif option == "config" and value:
                value = f"={recipe_path(value[1:])}"
            argument = f"--{option}{value}"
        elif i and arguments[i - 1] == "--config":
            argument = recipe_path(argument)
        result.append(argument)
    return result


def _recipes_first(arguments: list[str]) -> list[str]:
    """Put --config before the options that override a recipe; behind them it would undo them."""
    recipes: list[str] = []
    others: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_recipe = "--config" in (argument, before) or argument.startswith("--config=")
        (recipes if is_recipe else others).append(argument)
    return recipes + others


def _refuse_bad_recipes(command: str, arguments: list[str]) -> None:
    """Make sure that jsonargparse can parse a recipe in little time and memory.

    Raises:
        CxrdistError: there is none of this name, it is no regular file, or no YAML object with the
            bounds of `parse_yaml`.
    """
    from cxrdist.run import read_recipe  # with YAML a third of the time of --help

    for option, value in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, _, own = option.partition("=")
        path = Path(own or value)
        if name != "--config":
            continue
        if not path.exists():
            mend = f"; the recipes are {', '.join(recipe_names())}" if command == "train" else ""
            raise CxrdistError(f"--config {path}: no such file, and no recipe of this name{mend}")
        _, recipe = read_recipe(path.resolve(), "mend it, or give another with --config")
        _refuse_other_stages(arguments, recipe.get("stages"))


def _refuse_other_stages(arguments: list[str], stages: object) -> None:
    """Make sure that options such as --stages.head.epochs are of stages that the recipe has.

    Raises:
        CxrdistError: one is not.
    """
    names = [str(name) for name in stages] if isinstance(stages, dict) else []
    for argument in arguments:
        option = argument.partition("=")[0]
        is_known = any(option.startswith(f"--stages.{name}.") for name in names)
        if names and re.match(r"--stages\..+\.", option) and not is_known:
            raise CxrdistError(f"{option}: no such stage in the recipe; it has {', '.join(names)}")


def _refuse_plain_groups(command: str, config: type, parsed: Any) -> None:
    """Make sure that a group of fields, such as `network`, has fields; jsonargparse does not.

    Raises:
        CxrdistError: one is a plain value.
    """
    for group in (f.name for f in fields(config) if is_dataclass(f.type)):
        if not hasattr(parsed[group], "items"):
            raise CxrdistError(
                f"{command}: {group} is {parsed[group]!r:.40}, expected its fields; see cxrdist "
                f"{command} --help"
            )


def _readable(message: str) -> str:
    message = re.sub(r"Problem with given class_path '[\w.]+\.(\w+)':", r"in \1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return message.replace("Parser key", "option")


def _shown(argument: str) -> str:
    """An argument with codes for the bytes that are no UTF-8, which Python keeps as surrogates."""
    return argument.encode("utf-8", "backslashreplace").decode("utf-8")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _entry(command: Command) -> Callable[[Any], Any]:
    module, function = command.entry.split(":")
    entry: Callable[[Any], Any] = getattr(import_module(f"cxrdist.{module}"), function)
    return entry
