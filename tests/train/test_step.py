from types import SimpleNamespace

import pytest

from cxrdist.train.step import Pass, passes_of


@pytest.mark.parametrize(
    ("rank", "rows"),
    [(0, [slice(0, 1), slice(1, 3), slice(3, 5)]), (1, [slice(0, 1), slice(1, 2), slice(2, 4)])],
)
def test_slices_of_five_and_four_images_take_three_passes_of_at_most_two(rank, rows):
    """Each image is in one pass, and each pass has the same sizes on both ranks."""
    passes = list(passes_of(SimpleNamespace(sizes=(5, 4)), rank, 2))
    assert [one.rows for one in passes] == rows
    assert [one.sizes for one in passes] == [(1, 1), (2, 1), (2, 2)]
    assert {one.weight for one in passes} == {1}


def test_a_rank_without_images_passes_one_of_weight_0():
    """It takes part in as many passes as the others; without a limit there is one."""
    batch = SimpleNamespace(sizes=(2, 0))
    assert list(passes_of(batch, 0, None)) == [Pass(slice(0, 2), 1, (2, 0))]
    assert list(passes_of(batch, 1, None)) == [Pass(slice(0, 1), 0, (2, 0))]
    assert [one.weight for one in passes_of(batch, 1, 1)] == [0, 0]
