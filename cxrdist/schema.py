"""JSON schemas of the documents that cxrdist writes, generated from the classes that read them.

They are not made by pydantic: on Python 3.11 it rejects `typing.TypedDict`, and it differs from
`cxrdist.documents.typed` in the members that it requires (defaults, NamedTuples, ``newer`` fields).
"""

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from docstring_parser import parse_from_object

from cxrdist.config import SchemaConfig
from cxrdist.data.audit_file import AuditFile
from cxrdist.data.index import IndexFile
from cxrdist.data.shards import SampleFile
from cxrdist.documents import is_record, members
from cxrdist.errors import CxrdistError, choices
from cxrdist.evaluate.members import MembersFile
from cxrdist.evaluate.metrics import Metrics
from cxrdist.explain.description import RelevanceInfo
from cxrdist.explain.localisation import Localisation
from cxrdist.explain.text_file import TextFile
from cxrdist.info import RunInfo
from cxrdist.model.description import EnsembleFile, ModelFile
from cxrdist.probe_background import BackgroundFile
from cxrdist.report.compare import Comparison

DOCUMENTS: dict[str, tuple[str, Any]] = {
    "run": ("RUN/run.json", RunInfo),
    "model": ("RUN/model/model.json", ModelFile | EnsembleFile),
    "members": ("RUN/members.json", MembersFile),
    "metrics": ("RUN/SPLIT/metrics.json", Metrics),
    "relevance": ("RUN/SPLIT/relevance.json", RelevanceInfo),
    "text": ("RUN/SPLIT/text.json", TextFile),
    "localisation": ("RUN/SPLIT/localisation.json", Localisation),
    "comparison": ("OUT/comparison.json", Comparison),
    "background": ("OUT/background.json", BackgroundFile),
    "index": ("SHARDS/index.json", IndexFile),
    "audit": ("SHARDS/audit.json", AuditFile),
    "sample": ("KEY.json in a shard", SampleFile),
}
"""The file and the class of each document."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
Schema = dict[str, Any]  # a JSON Schema, or a part of one


def print_schema(config: SchemaConfig) -> None:
    """Print the schema of a document, or an object of all of them by name."""
    name = config.document
    if name is not None and name not in DOCUMENTS:
        raise CxrdistError(f"schema: no document {name!r:.60}; {choices(name, DOCUMENTS)}")
    schema = schema_of(name) if name else {each: schema_of(each) for each in DOCUMENTS}
    print(json.dumps(schema, indent=2))


def schema_of(name: str) -> Schema:
    """Make the schema (2020-12) of a document of `DOCUMENTS`."""
    title, kind = DOCUMENTS[name]
    definitions: dict[str, Schema] = {}
    schema = _schema(kind, definitions)
    return {"$schema": DIALECT, "title": title, **schema, "$defs": definitions}


def _schema(kind: Any, definitions: dict[str, Schema]) -> Schema:
    """Make the schema of a type as `documents.typed` reads it; add its classes to definitions."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (NotRequired, Required):
        return _schema(arguments[0], definitions)
    if origin is Annotated:
        schema = _schema(arguments[0], definitions)
        for rule in arguments[1:]:
            schema |= rule.keywords(schema)
        return schema
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin in (list, tuple):
        return _sequence(origin, arguments, definitions)
    return _record(kind, definitions) if is_record(kind) else {"type": _TYPES[kind]}


def _sequence(origin: Any, kinds: tuple[Any, ...], definitions: dict[str, Schema]) -> Schema:
    if origin is list or kinds[1:] == (Ellipsis,):
        return {"type": "array", "items": _schema(kinds[0], definitions)}
    items = [_schema(kind, definitions) for kind in kinds]
    return {"type": "array", "prefixItems": items, "minItems": len(kinds), "maxItems": len(kinds)}


def _record(kind: Any, definitions: dict[str, Schema]) -> Schema:
    """Define a class once, with the text of its docstrings, and return a reference to it."""
    name = f"{kind.__module__.removeprefix('cxrdist.')}.{kind.__name__}"
    if name not in definitions:
        definitions[name] = {}  # a class may refer to itself
        kinds, required = members(kind)
        text = parse_from_object(kind)
        notes = {note.arg_name: " ".join((note.description or "").split()) for note in text.params}
        definitions[name] |= {
            "description": text.short_description or "",
            "type": "object",
            "properties": {
                # A description may stand beside a $ref since draft 2019-09.
                member: _schema(kinds[member], definitions)
                | ({"description": notes[member]} if notes.get(member) else {})
                for member in kinds
            },
            "required": sorted(required),
        }
    return {"$ref": f"#/$defs/{name}"}
