"""The GPU's job, each line of it forced on the CPU."""

import re
from pathlib import Path

import pytest
import torch
from recorder import Again, record_again
from support import run_ranks
from torch._dynamo import lookup_backend

from cxrdist.bench import gpu, jobs
from cxrdist.bench.measure import Measured
from cxrdist.bench.traffic import Traffic
from cxrdist.cli import main
from cxrdist.config import BenchConfig, Network
from cxrdist.train import learner, loop
from cxrdist.train.capture import Step, Tensors

SMALL = Network(growth_rate=4, block_config=(1, 1, 1, 1), dropout=0.0)
SCRIPT = Path(__file__).parent / "gpu_ranks.py"
graphs: list[Again] = []
compiled: list[torch.fx.GraphModule] = []


def record(step: Step, static: Tensors) -> tuple[Again, Tensors]:
    graph, outputs = record_again(step, static)
    graphs.append(graph)
    return graph, outputs


def compile_and_count(graph, inputs):
    """Compile without code generation."""
    compiled.append(graph)
    return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def small(monkeypatch):
    """A small network, short rounds, and stand-ins for what needs a GPU."""
    monkeypatch.setattr(learner, "COMPILE_BACKEND", compile_and_count)
    compiled.clear()
    monkeypatch.setattr(gpu, "NETWORK", SMALL)
    monkeypatch.setattr(gpu, "BATCHES", (4, 8))
    monkeypatch.setattr(gpu, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "can_capture", lambda *_: True)
    monkeypatch.setattr(gpu, "record_cuda_graph", record)
    graphs.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(text: str) -> list[list[str]]:
    """The rows of the table, cut into columns."""
    ways = tuple(way.name for way in gpu.WAYS)
    return [re.split(r"  +", line) for line in text.splitlines() if line.startswith(ways)]


def test_each_batch_is_timed_in_each_way(small, capsys):
    """Eager, compiled, captured and both; the rows are consistent, and the table is narrow."""
    gpu.bench_gpu(BenchConfig(size=32, repeats=1))
    text = capsys.readouterr().out
    found = rows(text)
    assert [row[:2] for row in found] == [[way.name, b] for b in "48" for way in gpu.WAYS]
    for row in found:
        batch, rate, millis = int(row[1]), *(float(n.replace(",", "")) for n in row[2:4])
        assert millis == pytest.approx(1000 * batch / rate, rel=0.1)
        assert float(row[8].replace(",", "")) > 10  # MiB
    assert [row[9] for row in found if row[0] == "eager"] == ["1.00", "1.00"]
    assert "mixed precision no" in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(compiled) >= 2 * 2  # two batches, compiled and both
    # In two batches, captured and both; three steps warm up, the fourth is recorded and replayed.
    assert [graph.replays for graph in graphs] == [2 * gpu.FIRST_STEPS + 1 - 3] * 4


def test_the_figures_of_a_row_follow_from_the_rates_of_its_rounds():
    """The median rate of 8 images, its time, the fastest and slowest step, traffic, and speed."""
    measured, first = Measured([40.0, 10.0, 20.0], 1234.4), Measured([5.0], 1.0)
    row = gpu._figures(8, measured, first, Traffic(eager=4e9, fused=2e9), bandwidth=100e9)
    # 8 images at 20, 40 and 10 images/s take 400, 200 and 800 ms; 4 GB in 0.4 s are 10 GB/s.
    assert row == ["20.0", "400.0", "200.0..800.0", "10", "10%", "5%", "1,234", "0.25"]


def test_what_does_not_fit_into_memory_is_a_row(small, capsys, monkeypatch):
    """Other batches are measured all the same."""
    backward = loop.backward

    def full(stage, batch):
        if len(batch.images) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return backward(stage, batch)

    monkeypatch.setattr(loop, "backward", full)
    monkeypatch.setattr(gpu, "WAYS", gpu.WAYS[:1])
    gpu.bench_gpu(BenchConfig(size=32, repeats=1))
    four, eight = rows(capsys.readouterr().out)
    assert four[4] != "out of memory"
    assert eight[4] == "out of memory"


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(small, monkeypatch):
    """It ends the command."""

    def broken(stage, batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loop, "backward", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        gpu.bench_gpu(BenchConfig(size=32, repeats=1))


def test_two_ranks_share_each_batch_and_one_table():
    """The main rank prints; where one rank has no memory, all of them leave the batch out.

    Batches are those of one rank, and twice as many images.
    """
    done = run_ranks(2, SCRIPT)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("2 x cpu") == 1
    found = rows(done.stdout)
    assert [row[:2] for row in found] == [[w, b] for b in "48" for w in ("eager", "compiled")]
    assert [row[1] for row in found if row[4] == "out of memory"] == ["8", "8"]
    peaks = {row[8] for row in found if row[4] != "out of memory"}
    assert peaks == {"1,001"}  # the larger one of both ranks


def test_without_a_gpu_the_job_is_refused_or_left_out(capsys, monkeypatch):
    """Asked for, it is an error of one line; as one of all jobs it is left out with a line."""
    assert main(["bench", "--only", "gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line
    monkeypatch.setattr(jobs, "JOBS", {"warp": jobs.JOBS["warp"]})
    assert main(["bench", "--size", "32", "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    assert "gpu: left out" in text
    assert "cxrdist warp" in text
