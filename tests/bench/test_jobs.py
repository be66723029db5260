import pytest
from PIL import Image

from cxrdist.bench.jobs import MIN_ORIGINALS, _originals, bench
from cxrdist.config import BenchConfig
from cxrdist.errors import CxrdistError


def test_bench_prints_ratios_and_peak_memory(capsys):
    """Each job shows all its ways, with the ratio of the first to each."""
    bench(BenchConfig(only="warp,read", size=32, repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert "first / this" in lines[0]
    assert "peak MiB" in lines[0]
    assert [line.split()[0] for line in lines[2:] if not line.startswith(" ")] == ["warp", "read"]
    assert len(lines) == 2 + 3 + 3


def test_bench_measures_a_save_of_the_real_loop(capsys):
    bench(BenchConfig(only="train", size=32, repeats=1))
    assert "a save, as if it were a step" in capsys.readouterr().out


def test_an_unknown_measurement_is_refused():
    """A misspelt name is not silently left out."""
    with pytest.raises(CxrdistError, match="no measurement 'wrap'"):
        bench(BenchConfig(only="wrap"))


def test_originals_of_two_splits_may_share_their_names(tmp_path):
    """train/a/1.png and test/a/1.png are two images, and both are packed."""
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name / "1.png")
    links = _originals(BenchConfig(input=tmp_path / "images"), tmp_path)
    files = [link.resolve().relative_to(tmp_path).as_posix() for link in links.glob("*/*.png")]
    assert {file: files.count(file) for file in set(files)} == {
        f"images/{name}/1.png": MIN_ORIGINALS // 4
        for name in ("train/a", "train/b", "test/a", "test/b")
    }
