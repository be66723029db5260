import pytest

from cxrdist.terminal import counted, progress


@pytest.mark.parametrize(
    ("unit", "shown"),
    [("B", "0.00/3.00M [00:00<?, ?B/s]"), ("images", "0/3000000 [00:00<?, ? images/s]")],
)
def test_bytes_are_shown_in_mega_and_images_one_by_one(unit, shown):
    """As tqdm writes them: SI prefixes for a download, whole numbers for anything counted."""
    with progress(3_000_000, "weights", unit) as bar:
        assert shown in str(bar)


def test_one_is_not_several():
    """A number and its noun agree."""
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "box", "es") for number in (1, 12)] == ["1 box", "12 boxes"]
