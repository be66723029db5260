"""Parse flags and a recipe into the config of a command; all errors are `CxrdistError`.

A flag is the path of a field, such as ``--stages.head.lr.stem``: fields with hyphens (underscores
are accepted, too), names of stages, blocks and classes as they are. Flags override the recipe.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import MISSING, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from cxrdist.config import location
from cxrdist.documents import parse_yaml_value, typed
from cxrdist.errors import CxrdistError, choices
from cxrdist.fields import Field, described, fields_of, hyphened, leaves, plain, without_none
from cxrdist.packaged import RECIPES, SHARD_RECIPES, files_in, path_of

RECIPES_OF = {"train": RECIPES, "pack": SHARD_RECIPES}
"""Commands that take --config, and the folder of their named recipes."""


class Command(NamedTuple):
    """A command: its name, entry function (MODULE:FUNCTION), help, and options without a flag."""

    name: str
    entry: str
    help: str
    positional: str = ""

    @property
    def positionals(self) -> list[str]:
        """Return the fields that may be given without their flags, in this order."""
        return self.positional.split()

    @property
    def config_class(self) -> Any:
        """Return the dataclass of the options, such as FindTextConfig for find-text."""
        words = self.name.title().replace("-", "").replace(" ", "")
        return getattr(import_module("cxrdist.config"), f"{words}Config")


class Option(NamedTuple):
    """A flag, the path of its field in the config, and the type of its value."""

    flag: str
    path: tuple[str, ...]
    kind: Any


def parse(command: Command, arguments: Sequence[str]) -> Any:
    """Read flags and recipe into the command's config."""
    try:
        given = _read_arguments(command, arguments)
        recipe = given.pop(("config",), None)
        content = {} if recipe is None else _read_recipe(recipe, command)
        for path in sorted(given, key=len):  # a whole group before single fields in it
            _refuse_other_stage(path, content.get("stages"))
            _place(content, path, given[path])
        _refuse_missing(command, content)
        config = build(content, command.config_class, "")
        _refuse_urls(command.name, config)
    except CxrdistError as error:
        raise CxrdistError(f"{command.name}: {error}") from error
    return config


def _read_arguments(command: Command, arguments: Sequence[str]) -> dict[tuple[str, ...], Any]:
    """Parse the words of the command line into values by path."""
    words, loose = deque(arguments), list[str]()
    texts: dict[tuple[str, ...], str] = {}
    values: dict[tuple[str, ...], Any] = {}
    while words:
        word = _utf8(words.popleft())
        if word == "--":  # no word after it is a flag, so that a file may be called -x.png
            loose += map(_utf8, words)
            break
        if not word.startswith("-"):
            loose.append(word)
            continue
        flag, equals, text = word.partition("=")
        option = find(flag, command)
        if not equals:
            text = _next_value(option, words)
        if option.path in values:
            raise CxrdistError(
                f"{option.flag}: is given twice, {texts[option.path]!r} and {text!r}; keep one"
            )
        texts[option.path] = text
        values[option.path] = _read_text(text, option)
    for field in command.positionals:
        if loose and (field,) not in values:
            is_list = get_origin(get_type_hints(command.config_class)[field]) is list
            values[(field,)] = loose if is_list else loose[0]
            loose = [] if is_list else loose[1:]
    if loose:
        raise CxrdistError(
            f"{loose[0]!r} is not an option; expected --OPTION VALUE, see cxrdist {command.name} "
            "--help"
        )
    return values


def find(flag: str, command: Command) -> Option:
    """Return the option of a flag, with hyphens or underscores; raise CxrdistError without one."""
    if flag == "--config" and command.name in RECIPES_OF:
        return Option(flag, ("config",), str)
    path: list[str] = []
    canonical: list[str] = []
    kind, left = command.config_class, flag.removeprefix("--") if flag.startswith("--") else ""
    while left or not path:
        kind = plain(kind)
        if is_dataclass(kind):
            hints = get_type_hints(kind, include_extras=True)
            word, _, left = left.partition(".")
            field = word.replace("-", "_")
            # get_type_hints lists `_`, the marker of keyword-only fields, like a field.
            if field not in hints or field == "_":
                raise _unknown_flag(flag, command, canonical, list(hints))
            kind = hints[field]
            canonical.append(hyphened(field))
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
            field, left = _split_name(left, plain(kind))
            canonical.append(field)
        else:
            raise CxrdistError(f"{flag}: --{'.'.join(canonical)} is a single value without fields")
        path.append(field)
    return Option("--" + ".".join(canonical), tuple(path), kind)


def _split_name(text: str, kind: Any) -> tuple[str, str]:
    """Split NAME.FIELD, where NAME may contain dots; if values have no fields, all is NAME."""
    if not is_dataclass(kind):
        return text, ""
    words = text.split(".")
    known = {field.name for field in fields_of(kind)}
    for i in range(1, len(words)):
        if words[i].replace("-", "_") in known:
            return ".".join(words[:i]), ".".join(words[i:])
    return words[0], ".".join(words[1:])


def _unknown_flag(flag: str, command: Command, above: list[str], names: list[str]) -> CxrdistError:
    """Return the error for an unknown flag, with the known flags and the nearest one."""
    prefix = "--" + "".join(f"{word}." for word in above)
    expected = [prefix + hyphened(field) for field in names if field != "_"]
    expected += ["--config"] if command.name in RECIPES_OF and not above else []
    word = flag.strip("-").rpartition(".")[2].replace("_", "-")
    deeper = [field.flag for field in leaves(command.config_class) if word in field.flag.split(".")]
    known = choices(flag.replace("_", "-"), expected, deeper)
    return CxrdistError(f"{flag}: no such option; {known}; see cxrdist {command.name} --help")


def _next_value(option: Option, words: deque[str]) -> str:
    """Take the value after a flag; a boolean flag without a value is true."""
    if plain(option.kind) is bool and (not words or words[0].lower() not in ("true", "false")):
        return "true"
    # One hyphen may begin a value, such as a negative number. Two begin the next flag.
    if not words or words[0].startswith("--"):
        raise CxrdistError(f"{option.flag}: expected a value after it, {described(option.kind)}")
    return _utf8(words.popleft())


def _utf8(word: str) -> str:
    """Return a word; reject one with bytes that are not UTF-8, which Python keeps as surrogates."""
    shown = word.encode("utf-8", "backslashreplace").decode("utf-8")
    if shown != word:
        raise CxrdistError(f"{shown} is not valid UTF-8; rename it, or give its folder instead")
    return word


def _read_text(text: str, option: Option) -> Any:
    """Parse a flag's text: paths and words as they are, everything else as YAML."""
    kind = plain(option.kind)
    if text == "null" and NoneType in get_args(option.kind):
        return None
    if get_origin(kind) is list:
        return [text]
    if kind in (str, Path) or get_origin(kind) is Literal:
        return text
    try:
        return parse_yaml_value(text.encode())
    except ValueError as error:
        raise CxrdistError(f"{option.flag} {text!r:.80}: {error}") from error


def _read_recipe(name: str, command: Command) -> dict[str, Any]:
    """Read a recipe: a file, or one that comes with cxrdist."""
    from cxrdist.files import read_recipe  # imported late: it would add half to the time of --help

    folder = RECIPES_OF[command.name]
    path = Path(path_of(folder, name))
    if not path.exists():
        raise CxrdistError(
            f"--config {name}: no such file, and no recipe of this name; "
            f"{choices(name, files_in(folder))}"
        )
    # Resolved, since read_recipe rejects links, which are harmless among the user's own files.
    _, content = read_recipe(path.resolve(), "fix it, or give another with --config")
    _refuse_unknown(content, command.config_class, f"--config {name}")
    return content


def _refuse_other_stage(path: tuple[str, ...], stages: Any) -> None:
    """Reject a flag for a stage that the recipe does not have."""
    # A misspelt name would begin another stage. A whole stage (`--stages.NAME {...}`) may be added,
    # and without a recipe all stages come from flags.
    if path[0] == "stages" and len(path) > 2 and isinstance(stages, dict) and stages:
        if path[1] not in stages:
            raise CxrdistError(
                f"--stages.{'.'.join(map(hyphened, path[1:]))}: no such stage in the recipe; "
                f"{choices(path[1], map(str, stages))}"
            )


def _place(content: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value at its path in nested objects; reject a path through another kind of value."""
    for depth, name in enumerate(path[:-1], 1):
        # A recipe may leave a group out or set it to null, such as a stage's `background`.
        if content.get(name) is None:
            content[name] = {}
        content = content[name]
        if not isinstance(content, dict):
            raise CxrdistError(f"--{'.'.join(path[:depth])}: is {content!r:.40}, expected fields")
    content[path[-1]] = value


def _refuse_missing(command: Command, content: dict[str, Any]) -> None:
    """Check that all options without a default are given."""
    if missing := [
        field.name.upper() if field.name in command.positionals else field.flag
        for field in _missing(content, command.config_class)
    ]:
        raise CxrdistError(f"{', '.join(missing)}: missing; see cxrdist {command.name} --help")


def build(value: Any, kind: Any, flag: str) -> Any:
    """Check a value against its field's type, and build dataclasses; raise CxrdistError if wrong.

    Args:
        value: from a recipe or flags.
        kind: type of the field, with the bounds of numbers.
        flag: of the field, for errors; empty for the whole config.
    """
    if value is None and NoneType in get_args(kind):
        return None
    kind = without_none(kind)
    if kind is Path and value == "":  # Path("") is the current directory
        raise CxrdistError(f"{flag}: is empty, expected a path")
    if is_dataclass(kind):
        return _build_fields(value, kind, flag)
    if get_origin(kind) is dict:
        _refuse_plain(value, flag, "names with a value each")
        return {n: build(v, get_args(kind)[1], f"{flag}.{n}") for n, v in value.items()}
    if get_origin(kind) is list and isinstance(value, list):
        return [build(item, get_args(kind)[0], flag) for item in value]
    if get_origin(kind) is Literal and isinstance(value, str) and value not in get_args(kind):
        raise CxrdistError(f"{flag}: is {value!r:.80}, {choices(value, get_args(kind))}")
    try:
        return location(typed(value, str, flag)) if kind is Path else typed(value, kind, flag)
    except CxrdistError:
        raise
    except ValueError as error:
        raise CxrdistError(str(error)) from error


def _missing(content: dict[str, Any], kind: Any) -> list[Field]:
    """List the fields without a default that an object does not give."""
    return [f for f in fields_of(kind) if f.default is MISSING and f.name not in content]


def _build_fields(value: Any, kind: Any, flag: str) -> Any:
    _refuse_plain(value, flag, "its fields")
    _refuse_unknown(value, kind, flag)
    prefix = f"{flag}." if flag else "--"
    if missing := _missing(value, kind):
        raise CxrdistError(f"{prefix}{hyphened(missing[0].name)}: is missing")
    hints = get_type_hints(kind, include_extras=True)
    built = {name: build(v, hints[name], prefix + hyphened(name)) for name, v in value.items()}
    try:
        return kind(**built)
    except CxrdistError as error:  # from __post_init__, whose messages begin with a field
        field, colon, reason = str(error).partition(":")
        raise CxrdistError(f"{prefix}{hyphened(field)}{colon}{reason}") from error


def _refuse_plain(value: Any, flag: str, expected: str) -> None:
    """Check that a group is an object whose names are text."""
    if not isinstance(value, dict):
        raise CxrdistError(f"{flag}: is {value!r:.40}, expected {expected}")
    for name in value:
        if not isinstance(name, str):
            raise CxrdistError(f"{flag}: the name {name!r:.40} is not text; put quotes around it")


def _refuse_unknown(value: dict[str, Any], kind: Any, where: str) -> None:
    """Reject an object with a field that its dataclass does not have."""
    known = [field.name for field in fields_of(kind)]
    for name in value:
        if name not in known:
            raise CxrdistError(f"{where}: no field {name!r:.80}; {choices(str(name), known)}")


def _refuse_urls(command: str, config: Any) -> None:
    """Reject URLs for options that need a local path."""
    allowed = {"pack": {"input", "masks", "out"}, "find-text": {"input"}}.get(command, {"shards"})
    for name, value in vars(config).items():
        for path in value if isinstance(value, list) else [value]:
            # `location` makes a UPath of a URL; a Path has no `protocol`.
            if name not in allowed and hasattr(path, "protocol"):
                raise CxrdistError(
                    f"--{hyphened(name)} {path}: expected a path on this machine, not a URL"
                )
