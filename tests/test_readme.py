"""The public names: README's script word for word, its types, and what a name may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dicoms import write_dicom
from PIL import Image
from support import make_shards

import cxrdist
from cxrdist.config import Network
from cxrdist.model.densenet import Classifier, save_model
from cxrdist.model.description import Calibration

ROOT = Path(__file__).parents[1]
SCRIPT = re.search(r"From Python:\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[
    1
]
MYPY = """
[mypy]
strict = True
follow_imports = silent
cache_dir = /dev/null
[mypy-torch.*,scipy.*,PIL.*,pydicom.*,safetensors.*,timm.*]
follow_imports = skip
ignore_missing_imports = True
"""
WRONG = """
import cxrdist
from pathlib import Path
model = cxrdist.load_model(Path("RUN"))
model.predict(["a.png"], batchsize=3)
cxrdist.attribute(model, model.mean, flta=True)
cxrdist.Explainer(model, preset="cannonical")
cxrdist.read_image("a.png", model, size=3)
cxrdist.open_shards("SHARDS")
cxrdist.loadmodel("RUN")
"""


def test_the_script_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """From a run, files and shards to probabilities, a picture of the original and batches."""
    classes = ["COVID-19", "NORMAL"]
    model = Classifier(Network(growth_rate=4, block_config=(2, 2, 2, 2)), classes, 32, fit="pad")
    model.calibration = Calibration(
        dict.fromkeys(classes, 2.0), "youden", {"COVID-19": -9.0}, {}, 10, "0" * 64, 9, 9
    )
    model.network.classifier.bias.data = torch.tensor([2.0, -2.0])
    (tmp_path / "RUN" / "model").mkdir(parents=True)
    save_model(model, tmp_path / "RUN" / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "patient.png")
    write_dicom(tmp_path / "study.dcm", pixels)
    make_shards(tmp_path, dict.fromkeys(classes, 6)).rename(tmp_path / "SHARDS")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    capsys.readouterr()
    exec(compile(SCRIPT, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert "[['COVID-19'], ['COVID-19']] {'COVID-19': array([0." in said
    assert "array([ True,  True])" in said
    assert names["result"].calibrated.keys() == {*classes}
    assert len(names["result"]) == 2
    assert names["logits"].shape[1] == 2
    with Image.open("heatmap.png") as picture:
        assert (picture.size, picture.mode) == ((60, 40), "RGB")


def test_types_are_checked_in_the_users_script(tmp_path):
    """Mypy in its strict mode takes README's script, and finds each wrong keyword and name."""
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[0] for line in lines] == ["wrong.py"] * len(lines), done.stdout
    assert {int(line.split(":")[1]) for line in lines} == {5, 6, 7, 8, 9, 10}, done.stdout


def test_the_public_names_are_listed_and_typed():
    """Those of dir, of __all__, of the lazy table and of the type checker are the same."""
    tree = ast.parse(Path(cxrdist.__file__).read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == cxrdist._PUBLIC
    assert {*cxrdist.__all__} == {*dir(cxrdist)} == {*typed, "__version__"}
    assert all(getattr(cxrdist, name).__module__ == module for name, module in typed.items())
    assert (Path(cxrdist.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match=r"no attribute 'atribute'; it has .*attribute"):
        _ = cxrdist.atribute
