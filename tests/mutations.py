"""Damage to documents, of bytes and of structure, as disks, spreadsheets and strangers do it."""

import csv
import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
TEXTS = (
    *("", "nan", "-inf", "1e309", "0.0", "-1", "9" * 400, "../../x", "/etc/hostname", "a|b", "\0"),
    *("\x85", "\u2028", "\ud800", "肺炎", '"', "x" * 140_000, "pipe:id", "<script>", "{{ 7 }}"),
)
ENCODINGS = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1")


def strange(random: Random) -> Any:
    """A value that no document has where it stands."""
    deep: Any = 0
    for _ in range(random.choice((5, 40, 200))):
        deep = [deep] if random.random() < 0.5 else {"a": deep}
    values = (
        *(None, True, False, -1, 0, 1, 2**31, 10**8, 2**63, 2**64 - 1, 10**30, 1.5, -0.0, 1e308),
        *(float("nan"), float("inf"), [], {}, [[]], [1, "a", None], {"a": 1}, deep),
        random.choice(TEXTS),
    )
    return random.choice(values)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Damage a file at one to three places, half of them in its first bytes."""
    content = bytearray(data)
    for _ in range(random.randint(1, 3)):
        reach = len(content) if random.random() < 0.5 else min(len(content), 400)
        place, length = random.randrange(reach + 1), random.randint(1, 200)
        kind = random.choice(("bit", "byte", "number", "remove", "repeat", "cut", "splice", "deep"))
        if kind == "bit" and place < len(content):
            content[place] ^= 1 << random.randrange(8)
        elif kind == "byte":
            content[place : place + 1] = random.randbytes(1)
        elif kind == "number":
            width = random.choice((1, 2, 4))
            number = random.choice(EXTREMES) % 256**width
            content[place : place + width] = number.to_bytes(width, "little")
        elif kind == "remove":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length] * random.choice((1, 2, 50))
        elif kind == "splice":
            start = random.randrange(len(data))
            content[place : place + length] = data[start : start + length]
        elif kind == "deep":
            content[place:place] = random.choice((b"[", b'{"a":', b"- ")) * random.choice(
                (99, 10**5)
            )
        else:
            del content[place:]
    return bytes(content)


def mutate_value(value: Any, random: Random) -> Any:
    """Replace, drop, repeat or rename one thing somewhere in parsed JSON or YAML."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        kind = random.random()
        if kind < 0.12:
            return {k: v for k, v in value.items() if k != name}
        if kind < 0.2:
            return {random.choice(TEXTS) if k == name else k: v for k, v in value.items()}
        if kind < 0.26:
            return {**value, random.choice(("more", "items", "__class__")): strange(random)}
        return {**value, name: mutate_value(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        place, kind = random.randrange(len(value)), random.random()
        if kind < 0.12:
            return value[:place] + value[place + 1 :]
        if kind < 0.24:
            return value[:place] + value[place : place + 1] * random.choice((2, 1000)) + value
        return [*value[:place], mutate_value(value[place], random), *value[place + 1 :]]
    return strange(random)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Change the structure of a JSON document."""
    return _dumped(mutate_value(json.loads(data), random))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def mutate_lines(data: bytes, random: Random) -> bytes:
    """Change one line of JSON lines, or their order."""
    lines = data.splitlines(keepends=True)
    place = random.randrange(len(lines))
    if random.random() < 0.2:
        random.shuffle(lines)
        return b"".join(lines)
    lines[place] = mutate_json(lines[place], random) + random.choice((b"\n", b"\n\n", b"\r", b""))
    return b"".join(lines)


def mutate_yaml(data: bytes, random: Random) -> bytes:
    """Change the structure of a YAML document, or put in what only YAML has."""
    if random.random() < 0.3:
        lines = data.decode().splitlines()
        laughs = "x: &a [1, 1]\ny: &b [*a, *a]\nz: &c [*b, *b, *b, *c]"
        odd = ("a: &a [*a]", "? [1, 2]\n: 3", "!!python/name:os.system x", "- 1", "\tx: 1", laughs)
        lines.insert(
            random.randrange(len(lines) + 1), random.choice((*odd, "d: 2001-99-99", "<<:"))
        )
        return "\n".join(lines).encode()
    return yaml.safe_dump(mutate_value(yaml.safe_load(data), random)).encode("utf-8", "replace")


def mutate_table(data: bytes, random: Random) -> bytes:
    """Change a cell, a row, a column, the delimiter, the line ends or the encoding of a CSV."""
    rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    place = random.randrange(len(rows))
    column = random.randrange(len(rows[place])) if rows[place] else 0
    kind = random.choice(("cell", "cell", "cell", "row", "column", "header", "cells", "write"))
    if kind == "cell" and rows[place]:
        rows[place][column] = str(strange(random))
    elif kind == "row":
        rows[place : place + 1] = random.choice(([], [rows[place]] * 3, [[]]))
    elif kind == "column":
        rows = [row[:column] + row[column + 1 :] for row in rows]
    elif kind == "header":
        rows[0] = random.choice(
            (rows[0][::-1], [x.upper() for x in rows[0]], [""] * 3, rows[0] * 2)
        )
    elif kind == "cells":
        rows[place] = random.choice((rows[place] * 2, rows[place][:-1], ["a"] * 20_000))
    out = io.StringIO(newline="")
    delimiter = random.choice(",,,;\t|") if kind == "write" else ","
    ends = random.choice(("\n", "\r\n", "\r", "\n\n")) if kind == "write" else "\n"
    csv.writer(out, delimiter=delimiter, lineterminator=ends).writerows(rows)
    encoding = random.choice(ENCODINGS) if kind == "write" else "utf-8"
    return out.getvalue().encode(encoding, "surrogatepass" if "utf" in encoding else "replace")


STRUCTURES: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".csv": mutate_table,
    ".yaml": mutate_yaml,
}


def mutate(name: str, data: bytes, random: Random) -> bytes:
    """Damage a document: its structure in two of three times where it has one, else its bytes."""
    structure = next((f for suffix, f in STRUCTURES.items() if name.endswith(suffix)), None)
    if structure is None or random.random() < 0.33:
        return mutate_bytes(data, random)
    return structure(data, random)
