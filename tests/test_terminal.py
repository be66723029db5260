import pytest

from cxrdist.data.audit import _baseline_warning
from cxrdist.evaluate.operating_points import MEASURES, operating_table
from cxrdist.report.values import percent
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


@pytest.mark.parametrize("value", [0.0125, 0.9265, 0.0015, 0.4425])
def test_terminal_warnings_and_page_round_a_share_alike(value):
    """Halves at the last digit, which in percent fall to one side and as a fraction to the other.

    Python writes 0.0125 with three decimals as 0.013, and 100 * 0.0125 with one as 1.2.
    """
    on_page = percent(value).removesuffix("\N{NO-BREAK SPACE}%")
    assert on_page == f"{1000 * float(f'{value:.3f}') / 10:.1f}"
    rates = {key: value for name in MEASURES for key in (name, f"{name}_interval")}
    rates |= {f"{name}_interval": [value, value] for name in MEASURES}
    points = {"prevalence": None, "classes": {"a": {"probability": 0.5, **rates}}}
    assert operating_table(points).count(f"{on_page} ({on_page}-{on_page})") == len(MEASURES)
    score = dict.fromkeys(("value", "low", "high"), value)
    scores = {"accuracy": score, "mean_auroc": None}
    baseline = {"size_px": 16, "largest_class": 0, "logistic_regression": scores}
    (warning,) = _baseline_warning({**baseline, "perceptron": scores})
    assert f"right on {on_page}% ({on_page}% to {on_page}%)" in warning
