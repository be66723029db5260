import pytest

from cxrdist.bench.jobs import bench
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


def test_an_unknown_measurement_is_refused():
    """A misspelt name is not silently left out."""
    with pytest.raises(CxrdistError, match="no measurement 'wrap'"):
        bench(BenchConfig(only="wrap"))
