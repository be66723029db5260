"""The printed schemas, by a validator that knows nothing of cxrdist."""

import json
import os
import tarfile
from pathlib import Path
from random import Random

import pytest
from jsonschema import Draft202012Validator
from mutations import mutate

from cxrdist.cli import main
from cxrdist.documents import parse_json, typed
from cxrdist.schema import DOCUMENTS, schema_of

NUM_MUTATIONS = int(os.environ.get("CXRDIST_SCHEMA_MUTATIONS", "600"))


@pytest.fixture(scope="module")
def documents(small_run: Path) -> dict[str, bytes]:
    """The documents of a small run and its shards by their names of `DOCUMENTS`."""
    run, shards = small_run / "run", small_run / "shards"
    with tarfile.open(next(shards.glob("test-*.tar"))) as tar:
        sample = next(member for member in tar if member.name.endswith(".json"))
        sample_file = tar.extractfile(sample).read()
    files = {
        **{name: run / f"{name}.json" for name in ("run", "audit")},
        "model": run / "model" / "model.json",
        "index": shards / "index.json",
        **{
            name: run / "test" / f"{name}.json"
            for name in ("metrics", "relevance", "text", "localisation")
        },
    }
    return {name: file.read_bytes() for name, file in files.items()} | {"sample": sample_file}


def test_real_documents_are_valid_and_lack_nothing_that_is_required(documents):
    """What the commands wrote is valid; without any of its required members it is not."""
    for name, content in documents.items():
        schema = schema_of(name)
        Draft202012Validator.check_schema(schema)
        validator, document = Draft202012Validator(schema), json.loads(content)
        assert [error.message for error in validator.iter_errors(document)] == [], name
        root = schema["$defs"][schema.get("$ref", "#/$defs/model.description.ModelFile")[8:]]
        for member in root["required"]:
            lacking = {key: value for key, value in document.items() if key != member}
            assert not validator.is_valid(lacking), f"{name} without {member}"


def test_schemas_refuse_what_the_readers_refuse(documents):
    """Of damaged documents, what the reader takes is valid, and most of what it refuses is not."""
    random, names = Random(NUM_MUTATIONS), sorted(documents)
    validators = {name: Draft202012Validator(schema_of(name)) for name in names}
    both, readers_only, taken = 0, [], 0
    for number in range(NUM_MUTATIONS):
        name = names[number % len(names)]
        try:
            document = parse_json(mutate(f"{name}.json", documents[name], random))
        except ValueError:
            continue
        valid = validators[name].is_valid(document)
        try:
            typed(document, DOCUMENTS[name][1])
        except ValueError as error:
            both += not valid
            readers_only += [f"{name}: {error}"] if valid else []
        else:
            taken += 1
            assert valid, f"{name}: {next(validators[name].iter_errors(document)).message}"
    assert taken > 0
    assert both > 10 * len(readers_only), readers_only


def test_the_command_prints_one_schema_or_all(capsys):
    """`cxrdist schema NAME` gives a schema with bounds and descriptions, without NAME all."""
    assert main(["schema", "metrics"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    metrics = schema["$defs"]["evaluate.metrics.Metrics"]
    assert metrics["properties"]["samples"] == {"type": "integer", "minimum": 0, "maximum": 10**12}
    assert metrics["properties"]["confusion_matrix"]["description"].startswith("Rows: truth")
    assert main(["schema"]) == 0
    schemas = json.loads(capsys.readouterr().out)
    assert schemas["metrics"] == schema
    for each in schemas.values():
        Draft202012Validator.check_schema(each)
    assert main(["schema", "metric"]) == 2
    line = "cxrdist: schema: no document 'metric'; expected one of run, model, members, metrics"
    assert capsys.readouterr().err.startswith(line)
