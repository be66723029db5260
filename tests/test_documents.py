"""JSON of anybody is built as the class that it is declared with, or refused with its place."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, NotRequired, TypedDict

import pytest

from cxrdist.documents import (
    Between,
    Distinct,
    Inside,
    Matching,
    Text,
    parse_json,
    parse_yaml,
    parse_yaml_value,
    typed,
)
from cxrdist.errors import CxrdistError
from cxrdist.files import judging


class Part(TypedDict):
    name: str
    share: NotRequired[float | None]


class Point(NamedTuple):
    x: int
    y: int = 0


@dataclass(frozen=True)
class Whole:
    size: Annotated[int, Between(1, 4096)]
    parts: list[Part]
    points: dict[str, Point]
    names: Annotated[list[Annotated[str, Matching("[a-z]+", "letters")]], Between(1, 2), Distinct()]
    pair: tuple[str, float] = ("", 0.0)
    kind: Literal["new", 1, None] = None

    def __post_init__(self) -> None:
        if self.size == 13:
            raise CxrdistError("has an unlucky size")


GOOD = b"""{"size": 3, "parts": [{"name": "a", "share": 1, "more": 2}],
"points": {"p": {"x": 1, "y": 0}}, "names": ["b", "c"], "pair": ["z", 2],
"kind": "new", "newer": [1]}"""


@pytest.mark.parametrize(
    ("written", "shown"), [("2020-01-31", '"2020-01-31"'), ("!!binary aGk=", "\"b'hi'\"")]
)
def test_a_value_that_json_has_not_is_shown_as_text(written, shown):
    """Dates and bytes of YAML."""
    with pytest.raises(ValueError, match=f"^x: is {shown}, expected a whole number$"):
        typed(parse_yaml(f"x: {written}".encode()), Point)


def test_a_document_becomes_the_type_it_is_declared_with():
    """Classes are built without what they do not declare, a TypedDict keeps it."""
    parts = [{"name": "a", "share": 1.0, "more": 2}]
    expected = Whole(3, parts, {"p": Point(1)}, ["b", "c"], ("z", 2.0), "new")
    assert typed(parse_json(GOOD), Whole) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"3", b"true"), "size: is true, expected a whole number"),
        ((b"3", b"3.0"), "size: is 3.0, expected a whole number"),
        ((b"3", b"5000"), "size: is 5000, expected 1 to 4096"),
        ((b"3", b"13"), "the document: has an unlucky size"),
        ((b'"name": "a", ', b""), "parts[0].name: is missing"),
        ((b', "y": 0', b""), "points.p.y: is missing"),
        ((b'"share": 1', b'"share": "1"'), 'share: is "1", expected a number'),
        ((b'{"x": 1, "y": 0}', b"[1, 2]"), "points.p: is a list, expected an object"),
        ((b'"x": 1', b'"x": 1, "x": 2'), "same name twice"),
        ((b'"b", "c"', b""), "names: is a list, expected 1 to 2 values"),
        ((b'"b", "c"', b'"b", "b"'), "names: is a list, expected values that differ"),
        ((b'"b", "c"', b'"b", "c\\n"'), r'names[1]: is "c\n", expected letters'),
        ((b'"z", 2', b'"z"'), "pair: has 1 values, expected 2"),
        ((b'"new"', b'"old"'), "kind: is \"old\", expected 'new' or 1 or None"),
        ((b'"new"', b"2"), "kind: is 2, expected 'new' or 1 or None"),
        ((b'"new"', b'["new"]'), "kind: is a list, expected 'new' or 1 or None"),
    ],
)
def test_another_type_is_refused_by_its_place(change, message):
    """A wrong, missing or repeated member; what is out of bounds; what the class itself refuses."""
    with pytest.raises(ValueError, match=re.escape(message)):
        typed(parse_json(GOOD.replace(*change)), Whole)


def test_members_are_judged_in_the_order_of_their_class():
    """So that a format, declared first, is named before what a newer version lacks."""
    with pytest.raises(ValueError, match="size: is 0"):
        typed({"size": 0}, Whole)


@pytest.mark.parametrize("value", ["\ud800", "a\0", "x" * 65537, 1])
def test_a_text_can_be_written_again(value):
    """Half of a surrogate pair, which JSON may hold, cannot; the line shows only its beginning."""
    with pytest.raises(ValueError, match=r"^the document: is .{1,40}, expected .*text"):
        typed(value, Text)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"null", b"[]"])
def test_what_is_wrong_is_one_line_with_file_and_mend(data):
    """Cut, of another encoding, no object."""
    with (
        pytest.raises(CxrdistError, match=r"^file\.json: .*; copy it again$"),
        judging("file.json", "copy it again"),
    ):
        typed(parse_json(data), Whole)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10**6,
        b"[" * 500 + b"]" * 500,
        b"[NaN]",
        b"[1e999]",
        b"9" * 5000,
        b"[%d]" % 2**65,
        b'"\xff"',
        b"[" + b"{}," * 4_100_000 + b"{}]",
        b" " * (64 << 20) + b"1",
    ],
)
def test_documents_without_bounds_are_refused(data):
    """Deep, huge, not finite, not UTF-8, too many values or bytes: a ValueError before memory."""
    with pytest.raises(ValueError, match=r"nested|finite|too large|decode|more than|at most"):
        parse_json(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n d: 2", "line 4, column 2: .*; check the indentation of this line and"),
        ("a:\n\tb: 1", "line 2, column 1: .*; indent with blanks, not with tabs"),
        ("a: b: c", "line 1, column 5: .*; check the indentation, and put quotes around a text"),
        ("a: @b", "line 1, column 4: .*; put quotes around the text"),
        ("[2,", "line 1, column 4: .*; close all brackets .* quotes around the whole value"),
        ("a: 'b", "line 1, column 6: .*; close all brackets .* quotes around the whole value"),
    ],
)
def test_a_syntax_error_of_yaml_has_its_line_and_a_mend(text, message):
    """The line and the column are those of an editor, which counts from 1."""
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_yaml_value(text.encode())


def aliases(number: int) -> bytes:
    """YAML of some aliases of a list of 98 numbers, which counts as 99 values each time."""
    numbers = ", ".join("1" * 98)
    return f"[&a [{numbers}]{', *a' * (number - 1)}]".encode()


def commas(number: int) -> bytes:
    """JSON of a text of commas: each counts as a value, and takes no time to read."""
    return b'"' + b"," * number + b'"'


@pytest.mark.parametrize(
    ("parse", "largest", "larger"),
    [
        (parse_json, b"[" * 32 + b"]" * 32, b"[" * 33 + b"]" * 33),
        (parse_json, b"[%d]" % 2**64, b"[%d]" % (2**64 + 1)),
        (parse_json, commas(4_000_000), commas(4_000_001)),
        (parse_yaml_value, b"1 #".ljust(1 << 16), b"1 #".ljust((1 << 16) + 1)),
        (parse_yaml_value, aliases(101), aliases(102)),
    ],
    ids=["levels", "integers", "values", "bytes of YAML", "values of YAML"],
)
def test_the_largest_document_is_read_and_a_larger_one_is_not(parse, largest, larger):
    """The most are 32 levels, the integer 2 ** 64 and 4,000,000 values in JSON.

    In YAML, 64 KiB, and 10,000 = 101 * 99 + 1 values.
    """
    parse(largest)
    with pytest.raises(ValueError, match=r"than 32 levels|too large|at most 65536|more than \d+ v"):
        parse(larger)


def test_bounds_of_the_same_numbers_are_told_apart():
    """`typing` returns the same type for annotations that are equal; 1 is in the one only."""
    closed, opened = (
        Annotated[float, Between(0, 1)] | None,
        Annotated[float, Inside(0, 1)] | None,
    )
    assert typed(1.0, closed) == 1.0
    with pytest.raises(ValueError, match=r"x: is 1\.0, expected more than 0 and less"):
        typed(1.0, opened, "x")
