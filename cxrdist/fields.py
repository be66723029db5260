"""Fields of the configs: their flags, and descriptions of the values that they take."""

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from cxrdist.documents import NAMES


class Field(NamedTuple):
    """A field of a config: its flag, type, name, dataclass, and default (MISSING without one).

    In the flag of a field inside a named group, NAME stands for any name.
    """

    flag: str
    kind: Any
    name: str
    owner: Any
    default: Any


def hyphened(name: str) -> str:
    """Return a field's name as its flag spells it."""
    return name.replace("_", "-")


def without_none(kind: Any) -> Any:
    """Return the X of a type ``X | None``; any other type as it is."""
    if get_origin(kind) in (Union, UnionType):
        # No field has a union of more than one type and None.
        return next(one for one in get_args(kind) if one is not NoneType)
    return kind


def plain(kind: Any) -> Any:
    """Return a type without None and without its bounds."""
    kind = without_none(kind)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def described(kind: Any) -> str:
    """Describe the values that a field takes, such as ``a whole number, at least 1``."""
    kind = without_none(kind)
    if get_origin(kind) is Annotated:
        base, *bounds = get_args(kind)
        return ", ".join([described(base), *map(str, bounds)])
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        example = [*range(1, len(get_args(kind)) + 1)]
        return f"a list such as {example}; each {described(get_args(kind)[0])}"
    if get_origin(kind) is list:
        return "paths"
    return NAMES.get(kind, "a path")


def fields_of(config: Any, prefix: str = "--") -> Iterator[Field]:
    """Yield the fields of a dataclass, with groups as single fields."""
    kinds = get_type_hints(config, include_extras=True)
    for field in fields(config):
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        yield Field(prefix + hyphened(field.name), kinds[field.name], field.name, config, default)


def leaves(config: Any, prefix: str = "--") -> Iterator[Field]:
    """Yield the fields with a single value, including those in groups and named groups."""
    for field in fields_of(config, prefix):
        flag, kind = field.flag, field.kind
        while get_origin(plain(kind)) is dict:
            flag, kind = f"{flag}.NAME", get_args(plain(kind))[1]
        if is_dataclass(plain(kind)):
            yield from leaves(plain(kind), f"{flag}.")
        else:
            yield field._replace(flag=flag, kind=kind)
