"""Fixtures: shards, and real X-rays where they are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from support import make_shards

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"

# Two workers of pytest-xdist take file after file; at the end none is left alone with a long one.
LONGEST_FIRST = (
    *("test_resume.py", "test_every_architecture.py", "test_ranks.py", "test_train_job.py"),
    *("test_lifetime.py", "test_multilabel.py", "test_pipeline.py", "test_report.py"),
    *("test_demo.py", "test_squares.py", "test_gpu_job.py", "test_seeds_job.py"),
    *("test_architectures.py", "test_export.py", "test_probe_text.py", "test_chexnet.py"),
)

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CXRDIST_TEST_GPUS", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files that take longest to the front."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real chest X-rays; they are not part of the project."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real X-rays are not on this machine")
    return REAL_DATA


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Shards of three classes, 20 images of each, two a patient."""
    return make_shards(tmp_path_factory.mktemp("shards"), {"a": 20, "b c": 20, "d": 20})


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """A small run with every document that the real commands write (small_run.py)."""
    from small_run import make_run  # loads PyTorch, which many tests do without

    return make_run(tmp_path_factory.mktemp("small"))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let the next Accelerator of this process read the environment anew, precision and all."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
