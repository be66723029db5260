"""One bit depth for a source of images that do not declare theirs."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support import contents, make_shards

from cxrdist.config import PackConfig
from cxrdist.data import squares
from cxrdist.data.images import read_square
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack


@pytest.fixture
def config(tmp_path, monkeypatch) -> PackConfig:
    """A pack, in parts of 8, of 24 images of a 12-bit detector, 16 bits each; some are dark."""
    monkeypatch.setattr("cxrdist.data.squares.PART_SIZE", 8)
    random = np.random.default_rng(0)
    for place, name in enumerate(("a", "b")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(12):
            top = {0: 1000, 1: 200}.get(i, 4095)
            values = random.integers(0, top + 1, (32, 32), dtype=np.uint16)
            values[place * 16, i] = 65535  # a hot pixel
            Image.fromarray(values).save(tmp_path / "in" / name / f"{i}.png")
    return PackConfig(
        *("folder", tmp_path / "in", tmp_path / "out"),
        **{"size": 32, "split": "0.5/0.25/0.25", "workers": 1},
    )


def die(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_depth_is_the_sources_for_any_tasks_and_kills(config, tmp_path, monkeypatch, capsys):
    """Dark images are decoded again; a merge that is killed at it goes on to the same bytes."""
    pack(config)
    index = read_index(config.out)
    assert index.depth == 12
    assert "(images by the bits they use: 8 bits: 2, 10 bits: 2, 12 bits: 20)" in (
        capsys.readouterr().out
    )
    parts = replace(config, out=tmp_path / "parts", num_tasks=2)
    for task in (1, 0):
        pack(replace(parts, task=task))
    merge = replace(parts, num_tasks=None, merge=True)
    with monkeypatch.context() as patch:
        patch.setattr(squares, "atomic_file", die)
        with pytest.raises(KeyboardInterrupt):
            pack(merge)
    pack(merge)
    assert contents(tmp_path / "parts") == contents(config.out)
    for sample in index.samples:
        values = np.asarray(Image.open(config.input / sample.path))
        square = read_square(config.input / sample.path, 32, "crop", 12)
        assert np.abs(square - np.rint(np.minimum(values / 4095, 1) * 255)).max() <= 1
        assert hashlib.sha256(square.tobytes()).hexdigest() == sample.sha256


def test_a_given_depth_holds_and_is_kept(config):
    """14 bits of a 12-bit source, which so becomes a quarter as bright, twice the same."""
    pack(replace(config, depth=14))
    index = read_index(config.out)
    assert index.depth == 14
    for sample in index.samples[:3]:
        square = read_square(config.input / sample.path, 32, "crop", 14)
        assert hashlib.sha256(square.tobytes()).hexdigest() == sample.sha256
        assert np.median(square) < 64


def test_a_source_that_declares_its_depth_has_none(tmp_path):
    """Of 8 bits, also with an option that no image needs."""
    assert read_index(make_shards(tmp_path, {"a": 8, "b": 8}, depth=12)).depth is None
