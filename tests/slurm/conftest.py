"""Fixtures: a Slurm cluster of two nodes on this machine, and its environment file."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, missing

# As launch/environment.sh on a cluster. The names of the nodes lead nowhere: an address is given.
ENVIRONMENT = """\
gpu_options=(--nodes=2 --cpus-per-task=1)
cpu_options=(--cpus-per-task=1 --mem=0)
container=(nice)
export PATH={path} OMP_NUM_THREADS=1 RANKS=1 CUDA_VISIBLE_DEVICES=
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A real Slurm of two nodes; skipped where it is not installed, unless the CI requires it."""
    reason = missing()
    if reason and os.environ.get("CXRDIST_REQUIRE_SLURM"):
        pytest.fail(f"CXRDIST_REQUIRE_SLURM is set: {reason}")
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (cluster.state / "environment.sh").write_text(ENVIRONMENT.format(path=path))
    cluster.environment["CXRDIST_ENV"] = f"{cluster.state}/environment.sh"
    cluster.environment["SBATCH_OUTPUT"] = f"{cluster.state}/%x-%j.log"
    yield cluster
    cluster.close()
