"""The command line of cxrdist: parse the options, run the command, return the exit code."""

import io
import os
import select
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import zip_longest
from typing import Any, TextIO

from cxrdist import __version__
from cxrdist.errors import (
    CxrdistError,
    RunFailedError,
    Stopped,
    choices,
    failure_of,
    is_lost_connection,
    store_failure,
)
from cxrdist.lifetime import another_rank_failed, end_with_launcher, report_error, reports_stop
from cxrdist.options import Command, parse
from cxrdist.packaged import RECIPES, files_in
from cxrdist.signals import STOP_CODE, ending_at_once, stopping_at_once

_COMMANDS = (
    Command("pack", "data.pack:pack", "raw images -> shards, split by patient"),
    Command("check", "data.check:check", "are the shards still whole?", "shards"),
    Command("train", "train.loop:train", "shards + recipe -> trained model"),
    Command("seeds", "seeds:seeds", "one recipe, several seeds or folds, and their ensemble"),
    Command("evaluate", "evaluate.predictions:evaluate", "predictions and metrics of a split"),
    Command("explain", "explain.export:explain", "LRP relevance and heat maps"),
    Command("predict", "predict:predict", "image files -> CSV", "images"),
    Command("find-text", "data.text:find_text", "burned-in text -> CSV of boxes, to be covered"),
    Command("probe-text", "probe_text:probe_text", "does the network use words on the images?"),
    Command("localise", "localise:localise", "where the network looks, against boxes or masks"),
    Command(
        "probe-background",
        "probe_background:probe_background",
        "can the classes be told without the lungs?",
    ),
    Command("report", "report.html:report", "run directory -> report.html"),
    Command("compare", "report.compare:compare", "two runs on the same images", "run_a run_b"),
    Command("weights show", "model.inventory:show_weights", "what is in a checkpoint?", "file"),
    Command(
        "weights convert",
        "model.inventory:convert_weights",
        "checkpoint -> safetensors",
        "file out",
    ),
    Command("export", "export.command:export", "run -> ONNX, torch.export, timm, the Hub", "out"),
    Command("schema", "schema:print_schema", "JSON schema of each document", "document"),
    Command("demo", "demo:demo", "all steps on synthetic X-rays"),
    Command("recipes", "catalogue:recipes", "recipes for --config, with measured results", "name"),
    Command("bench", "bench.jobs:bench", "time ways to do the same job on this machine"),
)
COMMANDS = {command.name: command for command in _COMMANDS}

USAGE = """usage: cxrdist COMMAND [options]

Chest X-ray classifiers, from folders of images to a report. Not a medical device.

{commands}

`cxrdist COMMAND --help` lists a command's options. On several GPUs or nodes:
`cxrdist launch --config_file FILE COMMAND ...`, with the options of `accelerate launch`.
"""


def open_closed_streams() -> None:
    """Open the null device in place of a closed stdin, stdout or stderr, as some daemons have them.

    Python sets such a stream to None. Its number would go to the first file that is opened, and
    what a library prints would be written into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # takes the lowest number that is free: this stream's
            os.set_inheritable(stream.fileno(), True)  # the ranks and workers need it, too
            setattr(sys, name, stream)


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
            # Here, where errors are handled: at exit Python would print them itself and return 120.
            sys.stdout.flush()
    except BrokenPipeError:
        # If stdout is sound, the error is of another pipe or of a socket.
        if _is_flushed(sys.stdout):
            raise
        code = 1  # the reader of the pipe has seen enough, such as `| head`
    except Exception as error:
        # A stdout that cannot be written is redirected, or flushing it at exit would fail again.
        _is_flushed(sys.stdout)
        code = _report_failure(error)
    except Stopped as stop:
        if str(stop) and reports_stop(str(stop)):
            print(f"cxrdist: {stop}", file=sys.stderr)
        code = STOP_CODE
    return code


def _answer(arguments: list[str]) -> int:
    """Print the help or the version, or run the command."""
    # `cxrdist weights --help` prints this list, too: a group of commands has no help.
    first = arguments[1:2] if arguments and _is_group(arguments[0]) else arguments[:1]
    if not arguments or first in (["-h"], ["--help"]):
        lines = [f"  {name:<17}{command.help}" for name, command in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"cxrdist {__version__}")
        return 0
    with stopping_at_once():
        with ending_at_once():
            command, config, note = read_arguments(arguments)
            entry = _entry(command)
        if note and os.environ.get("RANK", "0") == "0":
            print(note)
        entry(config)
    return 0


def read_arguments(arguments: list[str]) -> tuple[Command, Any, str]:
    """Read a command and its options.

    Returns:
        The command, its config, and a line for the user if a default recipe is used.

    Raises:
        CxrdistError: there is no such command, its options are wrong, or Python would misread the
            names of files, as in a Latin-1 locale.
        SystemExit: help was requested, and is printed.
    """
    command, options = _command(arguments)
    flags = options[: options.index("--")] if "--" in options else options
    if {"-h", "--help"} & {*flags}:
        from cxrdist.help import help_of  # imported late: only a help needs its parser

        print(help_of(command), end="")
        raise SystemExit(0)
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise CxrdistError(f"Python reads file names as {encoding} here; set PYTHONUTF8=1")
    recipe, why = _default_recipe(flags) if command.name == "train" else (None, "")
    if recipe is None:
        return command, parse(command, options), ""
    config = parse(command, ["--config", recipe, *options])
    others = ", ".join(files_in(RECIPES))
    return command, config, f"recipe: {recipe}, {why}; --config takes another: {others}"


def _default_recipe(arguments: list[str]) -> tuple[str | None, str]:
    """Return the default recipe of a training, and the reason for it.

    The recipe is None if the options name a recipe or give the stages themselves.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    if given & {"--config", "--stages"}:
        return None, ""
    pairs = zip_longest(arguments, arguments[1:], fillvalue="")
    if "--init=none" in arguments or ("--init", "none") in pairs:
        return "scratch", "as --init none gives random weights and no --config is given"
    return "finetune", "which suits any classes, as no --config is given"


def _report_failure(error: Exception) -> int:
    """Print an error for users in one line, and return the exit code; raise any other error."""
    line: object = store_failure(error) or error
    if isinstance(line, OSError):
        line = failure_of(line)
    elif isinstance(error, RuntimeError) and "RANK" in os.environ and is_lost_connection(error):
        if another_rank_failed():
            return 1
        line = RunFailedError(
            f"rank {os.environ['RANK']}: the connection to another rank was lost; see the message "
            "of that rank or its launcher"
        )
    if not isinstance(line, (CxrdistError, RunFailedError)):
        raise error
    report_error(line)
    return 2 if isinstance(line, CxrdistError) else 1


def _is_flushed(stream: TextIO) -> bool:
    """Return whether a stream accepts output; if not, redirect it to /dev/null."""
    try:
        stream.flush()
        # Flushing an unbuffered stream (PYTHONUNBUFFERED) never fails, so check for a reader.
        pipe = select.poll()
        pipe.register(stream.fileno(), select.POLLOUT)
        if not any(event & select.POLLERR for _, event in pipe.poll(0)):
            return True
    except io.UnsupportedOperation:  # a stream without a file descriptor
        return True
    except OSError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False


def _print_what_cannot_be_encoded() -> None:
    r"""Make terminals show characters outside their encoding as \uXXXX instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _command(arguments: list[str]) -> tuple[Command, list[str]]:
    """Return the command, of one or two words, and the arguments after it."""
    for words in (1, 2):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return COMMANDS[name], arguments[words:]
    given, expected = "".join(arguments[:1]), list(COMMANDS)
    if _is_group(given):
        given = " ".join(arguments[:2])
        expected = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    raise CxrdistError(f"no command {given!r}; {choices(given, expected)}")


def _is_group(word: str) -> bool:
    """Return whether a word is the first of a command of two words."""
    return any(name.startswith(f"{word} ") for name in COMMANDS)


def _entry(command: Command) -> Callable[[Any], Any]:
    module, function = command.entry.split(":")
    return getattr(import_module(f"cxrdist.{module}"), function)
