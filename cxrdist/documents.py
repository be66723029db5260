"""Parse untrusted JSON and YAML: bound it while parsing, then check it against its type.

Invalid documents raise a ValueError whose message describes the fault and its position.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import yaml

T = TypeVar("T")

MOST_BYTES = 64 << 20  # an audit with pictures of 1000 pairs has 8 MB
MOST_VALUES = 4_000_000  # each takes up to 100 bytes of memory
MOST_YAML_BYTES = 1 << 16  # a recipe has 2 kB; PyYAML takes a second for this much
MOST_YAML_VALUES = 10_000  # counted with aliases expanded, since nested ones multiply
MOST_DEPTH = 32  # the deepest document of cxrdist has 8 levels
_MOST_WHOLE = 1 << 64  # the digest of a plan is the largest integer that cxrdist writes
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


# Not NamedTuples: Between(0, 1) and Inside(0, 1) would be equal, and `typing` caches annotations by
# equality.
@dataclass(frozen=True)
class Between:
    """Bounds of a number or of the length of a list, as in ``Annotated[int, Between(1, 4096)]``.

    Both bounds are included; ``Between(1)`` has no upper bound.
    """

    least: float = -math.inf
    most: float = math.inf

    def expected(self, value: Any) -> str | None:
        """Describe the expected value if a value is out of bounds; else return None."""
        listed = isinstance(value, (list, tuple))
        within = self.least <= (len(value) if listed else value) <= self.most
        return None if within else f"{self}{' values' if listed else ''}"

    def __str__(self) -> str:
        """Return the bounds in words."""
        if self.most == math.inf:
            return f"at least {self.least}"
        if self.least == -math.inf:
            return f"at most {self.most}"
        return f"{self.least} to {self.most}"

    def keywords(self, schema: Mapping[str, object]) -> dict[str, object]:
        """Write the bounds as keywords of a JSON schema of the number or list."""
        names = ("minItems", "maxItems") if schema["type"] == "array" else ("minimum", "maximum")
        return _finite_bounds(names, (self.least, self.most))


@dataclass(frozen=True)
class Inside:
    """Bounds of a number, which are excluded."""

    least: float = -math.inf
    most: float = math.inf

    def expected(self, value: float) -> str | None:
        """Describe the expected value if a value is out of bounds; else return None."""
        return None if self.least < value < self.most else str(self)

    def __str__(self) -> str:
        """Return the bounds in words."""
        bounds = (("more than", self.least), ("less than", self.most))
        return " and ".join(f"{word} {at}" for word, at in bounds if math.isfinite(at))

    def keywords(self, schema: Mapping[str, object]) -> dict[str, object]:
        """Write the bounds as keywords of a JSON schema of the number."""
        return _finite_bounds(("exclusiveMinimum", "exclusiveMaximum"), (self.least, self.most))


def _finite_bounds(names: tuple[str, str], bounds: tuple[float, float]) -> dict[str, object]:
    """Pair the keywords with those bounds that are finite."""
    pairs = zip(names, bounds, strict=True)
    return {name: bound for name, bound in pairs if math.isfinite(bound)}


class Matching(NamedTuple):
    """A regular expression for a whole text, and its meaning in words."""

    pattern: str
    meaning: str

    def expected(self, value: str) -> str | None:
        """Describe the expected text if a text does not match; else return None."""
        return None if re.fullmatch(self.pattern, value) else self.meaning

    def keywords(self, schema: Mapping[str, object]) -> dict[str, object]:
        """Write the pattern as a keyword of a JSON schema, which searches if it is not anchored."""
        return {"pattern": f"^(?:{self.pattern})$", "description": self.meaning}


class Distinct(NamedTuple):
    """The texts of a list differ from each other."""

    def expected(self, value: list[str]) -> str | None:
        """Describe the expected list if a list contains a text twice; else return None."""
        return None if len({*value}) == len(value) else "values that differ from each other"

    def keywords(self, schema: Mapping[str, object]) -> dict[str, object]:
        """Write it as a keyword of a JSON schema."""
        return {"uniqueItems": True}


FLOAT32 = Between(2.0**104 - 2.0**128, 2.0**128 - 2.0**104)
"""The range of float32, whose largest number is (2 - 2**-23) * 2**127."""
# A number that was computed in float32.
Real = Annotated[float, FLOAT32]
Share = Annotated[float, Between(0, 1)]
Correlation = Annotated[float, Between(-1, 1)]
CONTROL = r"\0-\x1f\x7f-\x9f"  # characters that could move the cursor or colour a terminal
# JSON may contain half of a surrogate pair, which cannot be encoded as UTF-8.
Text = Annotated[
    str, Matching(r"[^\0\ud800-\udfff]{0,65536}", "a UTF-8 text of at most 65536 characters")
]
Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]


def parse_json(data: bytes) -> Any:
    """Parse JSON with finite numbers and bounded size, depth and integers."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"has {len(data)} bytes, expected at most {MOST_BYTES}")
    # Each value but the outermost follows one of these, in its list or object, so that their number
    # bounds the values before any of them takes memory.
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"holds more than {MOST_VALUES} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    _refuse_deep(value)
    return value


def _whole(text: str) -> int:
    # 2 ** 64 has 20 digits. The length comes first, since int() refuses more than 4300 digits.
    if len(text) > 20 or abs(int(text)) > _MOST_WHOLE:
        raise ValueError(f"holds the number {text:.20}..., which is too large")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {text:.20}, which is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; reject duplicate names, which parsers treat differently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("holds an object with the same name twice")
    return value


def _refuse_deep(value: Any) -> None:
    """Reject deep nesting; checks level by level, since recursion could overflow the stack."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError(f"is nested deeper than {MOST_DEPTH} levels")


class _Loader(yaml.SafeLoader):
    """PyYAML's loader that also parses numbers of YAML 1.2 such as 1e-4, which it reads as text."""


# PyYAML copies its table of resolvers for this class, so that SafeLoader stays as it is.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def _bounded(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Build an integer; reject a huge one, which could neither become a float nor be shown."""
    value = loader.construct_yaml_int(node)
    if abs(value) > _MOST_WHOLE:
        raise ValueError(f"holds the number {node.value:.20}..., which is too large")
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _bounded)


def parse_yaml(data: bytes) -> dict[str, Any]:
    """Parse a recipe: a YAML object of plain values, bounded, without duplicate names."""
    return _object(parse_yaml_value(data), "")


def parse_yaml_value(data: bytes) -> Any:
    """Parse YAML of any value (an object, a list, a number ...) with the checks of `parse_yaml`."""
    if len(data) > MOST_YAML_BYTES:
        raise ValueError(f"has {len(data)} bytes, expected at most {MOST_YAML_BYTES}")
    try:
        # -sig: some editors begin a file with a byte order mark.
        loader = _Loader(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        _refuse_twice(node)
        value = None if node is None else loader.construct_document(node)
        size = _expanded(value, {}, 0)
    except yaml.YAMLError as error:
        raise ValueError(_syntax_error(error)) from error
    except (AttributeError, LookupError, TypeError) as error:
        # PyYAML's constructors of tagged values, such as !!bool x, do not check them.
        raise ValueError("holds a value that does not fit its tag (!!)") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if size > MOST_YAML_VALUES:
        raise ValueError(f"holds more than {MOST_YAML_VALUES} values")
    return value


def _syntax_error(error: yaml.YAMLError) -> str:
    """Describe a syntax error by its position and, for frequent mistakes, the likely fix."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    unclosed = "close all brackets and quotes; in a shell, put quotes around the whole value"
    fixes = {
        r"'\t'": "indent with blanks, not with tabs",
        "cannot start any token": "put quotes around the text",
        "<stream end>": unclosed,
        "end of stream": unclosed,
        "<block": "check the indentation of this line and of those above it",
        "mapping values": "check the indentation, and put quotes around a text with a colon",
    }
    fix = next((f"; {fixes[part]}" for part in fixes if part in problem), "")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{fix}"


def _refuse_twice(root: yaml.Node | None) -> None:
    """Reject duplicate names in an object, of which PyYAML would silently take the last."""
    # Aliases share a node, and a node that contains itself would be followed without end.
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        twice = next((name for name, times in names.items() if times > 1), None)
        if twice is not None:
            raise ValueError(f"has the name {twice!r:.80} twice; keep one of them")
        waiting += [child for pair in node.value for child in pair]


def _expanded(value: Any, known: dict[int, float], depth: int) -> float:
    """Count the values with all aliases expanded; infinite if an alias contains itself."""
    if depth > MOST_DEPTH:
        raise ValueError(f"is nested deeper than {MOST_DEPTH} levels")
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        children = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(child, known, depth + 1) for child in children)
    return known[id(value)]


def typed(value: Any, kind: type[T], where: str = "") -> T:
    """Check parsed JSON against a type, and build instances of it.

    Dataclasses and NamedTuples become instances and run their own checks; a TypedDict stays a dict.
    Fields with defaults must be present as well, except those with the metadata ``newer``, which
    older documents lack. Undeclared names are ignored: a newer version may write more. Changes of
    meaning change `format`, which is declared first because members are checked in order.

    Args:
        value: from `parse_json`.
        kind: a type made of such classes, list, tuple, dict[str, ...], Literal, unions, str, int,
            float, bool, None and Any.
        where: name of the value in errors; empty for a whole document.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return cast(T, value)
    if origin in (NotRequired, Required):
        return typed(value, arguments[0], where)
    if origin is Annotated:
        value = typed(value, arguments[0], where)
        # The rules rely on the type that was checked above.
        for expected in filter(None, (rule.expected(value) for rule in arguments[1:])):
            raise _wrong(value, expected, where)
        return value
    if origin is Literal:
        if not isinstance(value, (str, int, NoneType)) or value not in arguments:
            raise _wrong(value, " or ".join(map(repr, arguments)), where)
        return cast(T, value)
    if origin in (Union, UnionType):
        return _one_of(value, arguments, where)
    if origin in (list, tuple):
        return _sequence(value, origin, arguments, where)
    if origin is dict:
        items = _object(value, where).items()
        return cast(T, {n: typed(item, arguments[1], _below(where, n)) for n, item in items})
    if is_record(kind):
        return _record(_object(value, where), kind, where)
    return _plain(value, kind, where)


def is_record(kind: Any) -> bool:
    """Return whether a type is a class with named members: a dataclass, TypedDict or NamedTuple."""
    return is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "_fields")


def _plain(value: Any, kind: Any, where: str) -> Any:
    """Check text, a number, true or false, or null; integers are accepted as floats."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and type(value) is float and not math.isfinite(value):  # YAML has .inf
        raise _wrong(value, "a finite number", where)
    # Not isinstance, by which true and false would be integers.
    if type(value) is not kind and not (value is None and kind in (None, NoneType)):
        raise _wrong(value, NAMES.get(kind, "null"), where)
    return value


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """Build the first type of a union that fits; if none does, raise the error of the last one."""
    if value is None and NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not NoneType)
    for kind in others:
        try:
            return typed(value, kind, where)
        except ValueError:
            continue
    return typed(value, last, where)


def _sequence(value: Any, origin: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, list):
        raise _wrong(value, "a list", where)
    if origin is list or kinds[1:] == (Ellipsis,):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(
            f"{where or 'the document'}: has {len(value)} values, expected {len(kinds)}"
        )
    items = enumerate(zip(value, kinds, strict=True))
    return origin(typed(item, kind, f"{where}[{i}]") for i, (item, kind) in items)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", where)
    return value


def _record(content: dict[str, Any], kind: Any, where: str) -> Any:
    """Build a dataclass or NamedTuple, or check a TypedDict, from an object."""
    kinds, needed = members(kind)
    known = {}
    for name in kinds:
        if name in content:
            known[name] = typed(content[name], kinds[name], _below(where, name))
        elif name in needed:
            raise ValueError(f"{_below(where, name)}: is missing")
    if is_typeddict(kind):
        return {**content, **known}
    try:
        return kind(**known)
    except ValueError as error:  # of the class's own checks
        raise ValueError(f"{where or 'the document'}: {error}") from error


@cache
def members(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the types of the members of a class, and the names of required members."""
    kinds = get_type_hints(kind, include_extras=True)
    if is_dataclass(kind):
        return kinds, {field.name for field in fields(kind) if not field.metadata.get("newer")}
    return kinds, set(kind.__required_keys__ if is_typeddict(kind) else kinds)


def _below(where: str, name: str) -> str:
    return f"{where}.{name:.80}" if where else f"{name:.80}"


def _wrong(value: Any, expected: str, where: str) -> ValueError:
    containers: dict[type, str] = {list: "a list", tuple: "a list", dict: "an object"}
    shown = containers.get(type(value)) or json.dumps(value, default=str)[:40]
    return ValueError(f"{where or 'the document'}: is {shown}, expected {expected}")
