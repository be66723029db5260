import shutil
from pathlib import Path

import pytest


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    """A copy of a module's `whole` shards, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "shards"))
