"""What a run directory names: nothing through links."""

import pytest

from cxrdist.errors import CxrdistError
from cxrdist.run import RunDirectory


@pytest.mark.parametrize("name", ["checkpoints", "model", "log.jsonl", "run.json", "tracking"])
def test_a_link_in_a_run_is_refused_by_name(tmp_path, name):
    """Nothing of a run is read or written elsewhere; the run as a whole may be a link."""
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "run")
    run = RunDirectory(tmp_path / "run")
    assert run.inside(name) == tmp_path / "run" / name
    (tmp_path / "run" / name).symlink_to(tmp_path)
    with pytest.raises(CxrdistError, match=f"run/{name}: is a link"):
        run.inside(name)
    (tmp_path / "run" / "test").symlink_to(tmp_path)
    with pytest.raises(CxrdistError, match="run/test: is a link"):
        run.predictions("test")
