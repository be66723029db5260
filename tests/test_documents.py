import re
from dataclasses import dataclass
from typing import Annotated, NamedTuple, NotRequired, TypedDict

import pytest

from cxrdist.documents import Between, parse_json, typed


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
    pair: tuple[str, float] = ("", 0.0)


GOOD = b'{"size": 3, "parts": [{"name": "a", "share": 1, "more": 2}], "points": {"p": {"x": 1}}'


def test_a_document_becomes_the_type_it_is_declared_with():
    """Dataclasses and NamedTuples are built, a TypedDict keeps what it does not declare."""
    whole = typed(parse_json(GOOD + b', "pair": ["z", 2]}'), Whole)
    parts = [{"name": "a", "share": 1.0, "more": 2}]
    assert whole == Whole(3, parts, {"p": Point(1)}, ("z", 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"3", b"true"), "size: is true, expected a whole number"),
        ((b"3", b"3.0"), "size: is 3.0, expected a whole number"),
        ((b"3", b"5000"), "size: is 5000, expected 1 to 4096"),
        ((b'"name": "a", ', b""), "misses parts[0].name"),
        ((b'"share": 1', b'"share": "1"'), 'share: is "1", expected a number'),
        ((b'{"x": 1}', b"[1, 2]"), "points.p: is a list, expected an object"),
        ((b'"x": 1', b'"x": 1, "z": 1'), "holds points.p.z, which is not known"),
        ((b'"x": 1', b'"x": 1, "x": 2'), "same name twice"),
    ],
)
def test_another_type_is_refused_by_its_place(change, message):
    """A wrong, missing, unknown or repeated member and a number out of bounds."""
    with pytest.raises(ValueError, match=re.escape(message)):
        typed(parse_json(GOOD.replace(*change) + b"}"), Whole)


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
