from types import SimpleNamespace

import pytest

from cxrdist.model.batchnorm import BatchNorm
from cxrdist.train.statistics import Statistics


@pytest.mark.parametrize(("rank", "has_images"), [(0, 1), (1, 1), (2, 0)])
def test_a_pass_tells_each_rank_the_shares_of_all(rank, has_images):
    """Of 3, 1 and 0 images: three shares, the number of images, and whether this rank has any."""
    norm = BatchNorm(2)
    ranks = SimpleNamespace(num_processes=3, process_index=rank)
    statistics = Statistics(ranks, [norm], synchronised=True)
    statistics.before_pass((3, 1, 0))
    assert norm.shares.tolist() == [0.75, 0.25, 0, 4, has_images]
    statistics.close()
    assert norm.shares is None
