"""Print the help of a command from the fields of its config and their docstrings."""

from argparse import ArgumentParser
from dataclasses import MISSING
from functools import cache
from typing import Any, Literal, get_args, get_origin

from docstring_parser import parse_from_object

from cxrdist.fields import Field, described, hyphened, leaves, plain
from cxrdist.options import RECIPES_OF, Command

EPILOG = """NAME stands for the name of a stage, block or class. A group of options can be given
as a whole, in YAML: {example}. null resets an optional option. Underscores may replace hyphens."""

DEFAULT_RECIPE = {
    "train": " If neither a recipe nor --stages is given: finetune, or scratch with --init none. "
    "The defaults below are those of fields that the recipe leaves out."
}


def help_of(command: Command) -> str:
    """Return the help of a command."""
    config, name = command.config_class, command.name
    optional = {field.name for field in leaves(config) if field.default is not MISSING}
    words = [f"[{w.upper()}]" if w in optional else w.upper() for w in command.positionals]
    groups = {field.flag.rpartition(".")[0] for field in leaves(config)} - {""}
    # argparse only lays out the text: `options.parse` reads the command line.
    parser = ArgumentParser(
        prog=f"cxrdist {name}",
        usage=" ".join([f"cxrdist {name}", *words, "[options]"]),
        description=_docs(config)[""],
        epilog=EPILOG.format(example=f"{min(groups)} '{{...}}'") if groups else None,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="Print this help.")
    if name in RECIPES_OF:
        parser.add_argument(
            "--config",
            metavar="RECIPE",
            help="A YAML file of these options, or the name of one that comes with cxrdist "
            "(`cxrdist recipes` lists them). Options override it." + DEFAULT_RECIPE.get(name, ""),
        )
    for field in leaves(config):
        text = _text(field, needs_flag=field.name not in command.positionals)
        # argparse formats each help with %, as for %(default)s.
        parser.add_argument(field.flag, metavar=_metavar(field), help=text.replace("%", "%%"))
    return parser.format_help()


def _metavar(field: Field) -> str:
    kind = plain(field.kind)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return "[true|false]" if kind is bool else hyphened(field.name).upper()


def _text(field: Field, *, needs_flag: bool) -> str:
    """Return the description, the accepted values and the default of a field."""
    facts = [] if get_origin(plain(field.kind)) is Literal else [described(field.kind)]
    if field.default is MISSING:
        facts.append("required")
    elif field.default not in (None, {}):
        facts.append(f"default: {_default(field.default)}")
    if not needs_flag:
        facts.append("may be given without its flag")
    doc = _docs(field.owner)[field.name]
    return f"{doc} ({'; '.join(facts)})" if facts else doc


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@cache
def _docs(config: Any) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields by name; its own has the name ""."""
    docs: dict[str, str] = {}
    # parse_from_object reads no inherited fields. Bases come first, so that the docstring that
    # stays under the name "" is the config's own.
    for owner in reversed(config.__mro__[:-1]):
        doc = parse_from_object(owner)
        docs |= {
            field.arg_name: " ".join((field.description or "").split()) for field in doc.params
        }
        docs[""] = " ".join((doc.description or "").split())
    return docs
