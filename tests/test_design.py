"""The house rules of the code, checked on the code itself."""

import ast
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, make_dataclass
from pathlib import Path

import yaml

import cxrdist.config
from cxrdist.cli import COMMANDS
from cxrdist.config import (
    ExplainConfig,
    PackConfig,
    ProbeBackgroundConfig,
    TrainConfig,
    deciding,
)

PACKAGE = Path(__file__).parents[1] / "cxrdist"
# Imports go down only: each layer may import from those before it.
LAYERS = [
    ["errors", "terminal", "documents", "config", "fields", "packaged"],
    [
        *("environment", "precision", "lifetime", "signals", "heartbeat"),
        *("distributed", "files", "run", "info", "bootstrap", "intervals"),
    ],
    ["data"],
    ["model"],
    ["evaluate"],
    ["explain"],
    ["train"],
    ["report"],
    ["predict", "probe_text", "localise", "probe_background", "export", "demo", "bench"],
    ["options", "help", "catalogue", "cli", "launch", "seeds", "schema"],
    ["__init__", "__main__"],
]
CHANGING = {"Sums", "EarlyStopping", "_Content"}
"""Dataclasses that count or collect something."""
GOLDEN = Path(__file__).parent / "golden" / "options.yaml"


def layer(module: str) -> int:
    """The layer of a dotted name such as cxrdist.data.plan."""
    top = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, names in enumerate(LAYERS) if top in names)


def test_imports_go_down_only():
    """No module imports from a layer above its own."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("cxrdist", *file.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cxrdist."):
                assert layer(node.module) <= layer(name), f"{name} imports {node.module}"


def test_dataclasses_do_not_change_after_they_were_checked():
    """Many check their fields when they are made; a changed one is a new one (`replace`)."""
    changing = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        for decorator in map(ast.unparse, node.decorator_list)
        if decorator.startswith("dataclass") and "frozen=True" not in decorator
    }
    assert changing == CHANGING


def test_the_tree_of_the_readme_names_each_module():
    """A module stands in the lines of its folder, which begin with the folder's name."""
    tree = (PACKAGE.parent / "README.md").read_text().split("## The tree")[1].split("## Rec")[0]
    named: dict[str, set[str]] = {}
    folder = ""
    for line in tree.splitlines():
        if re.match(r" {6}\S", line):
            below = re.match(r" +(\w+)/ ", line)
            folder = below[1] if below else "cxrdist"
        named.setdefault(folder, set()).update(re.findall(r"\w+", line))
    for file in sorted(PACKAGE.rglob("[!_]*.py")):
        assert file.stem in named[file.parent.name], f"{file.parent.name}/{file.name}"


def test_the_options_are_those_that_were_agreed_on():
    """A new option is a visible change of tests/golden/options.yaml."""
    options = {
        name: sorted(field.name for field in fields(value))
        for name, value in vars(cxrdist.config).items()
        if is_dataclass(value) and value.__module__ == "cxrdist.config"
    }
    assert options == yaml.safe_load(GOLDEN.read_text())
    assert {command.config_class.__name__ for command in COMMANDS.values()} <= options.keys()


def test_fields_that_do_not_decide_a_result_are_those_that_were_agreed_on():
    """Where they differ a command resumes; any other field, a new one included, forbids it."""
    path = Path("a")
    configs = [
        PackConfig("folder", path, out=path),
        TrainConfig(path, path, {}),
        ExplainConfig(path, path),
        ProbeBackgroundConfig(path, path),
    ]
    free = {type(c).__name__: {f.name for f in fields(c)} - deciding(c).keys() for c in configs}
    assert free == {
        "PackConfig": {
            *("out", "workers", "skip_bad", "task", "num_tasks", "merge", "expect"),
            *("text_boxes", "lungs_only"),
        },
        "TrainConfig": {"shards", "run", "cache", "text_boxes", "save_steps", "track"},
        "ExplainConfig": {"run", "shards", "name", "classes", "contrast", "pictures", "cache"},
        "ProbeBackgroundConfig": {"shards", "out", "cache"},
    }
    newer = make_dataclass("Newer", [("added", int, 3)], bases=(ExplainConfig,), frozen=True)
    assert deciding(newer(path, path)) == {**deciding(configs[2]), "added": 3}


def test_import_and_help_are_instant():
    """`import cxrdist` and `cxrdist --help` load no PyTorch."""
    for code in ("import cxrdist", "from cxrdist.cli import main; main(['--help'])"):
        script = f"{code}; import sys; sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
