"""What each chart shows: its lines, intervals and limits, as matplotlib holds them."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxrdist.report import pictures


@pytest.fixture
def draw(monkeypatch):
    """Calls a function of `pictures`, and returns the axes that it drew on."""

    def chart(name, label, draw, size_inches) -> Axes:
        axes = Figure(figsize=size_inches).add_subplot()
        draw(axes)
        return axes

    monkeypatch.setattr(pictures, "_chart", chart)
    return lambda name, *arguments: getattr(pictures, name)(*arguments)


def lines(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of the lines that the legend names."""
    handles = zip(*axes.get_legend_handles_labels(), strict=True)
    return {label: line.get_xydata().tolist() for line, label in handles}


def segments(axes: Axes) -> list[list[list[float]]]:
    """The ends of the intervals, which are collections of lines."""
    collections = [c.get_segments() for c in axes.collections if hasattr(c, "get_segments")]
    return np.concatenate(collections).tolist()


def unnamed(axes: Axes) -> list[list[list[float]]]:
    """The points of the lines that help to read the others."""
    return [
        np.array(line.get_data(), float).T.tolist()
        for line in axes.lines
        if line.get_label().startswith("_")
    ]


@pytest.mark.parametrize(("best", "shown"), [(2, True), (None, False), (7, False)])
def test_losses_stand_over_their_epochs_with_a_ring_at_the_best(draw, best, shown):
    """Also without a best epoch, and with one that a shorter log does not have."""
    epochs, train, validation = [1, 2, 3], [0.9, 0.5, 0.4], [0.8, 0.6, 0.7]
    axes = draw("loss_chart", "x", epochs, train, validation, best)
    expected = {"training": [[1, 0.9], [2, 0.5], [3, 0.4]]}
    expected["validation"] = [[1, 0.8], [2, 0.6], [3, 0.7]]
    if shown:
        expected["best epoch"] = [[2, 0.6]]
    assert lines(axes) == expected
    assert unnamed(axes) == ([[[2, 0], [2, 1]]] if shown else [])
    assert axes.get_xlim() == (0.5, 3.5)
    assert axes.get_ylabel() == "loss"
    assert axes.get_xlabel() == "epoch"
    assert [tick for tick in axes.get_xticks() if 0.5 < tick < 3.5] == epochs


@pytest.mark.parametrize(("epochs", "margin"), [(10, 0.5), (40, 0.6), (100, 0.9)])
def test_the_axis_of_epochs_shows_none_that_there_is_not(draw, epochs, margin):
    """1.5 % of their number on each side, but at least a half and less than one."""
    values = [0.5] * epochs
    axes = draw("score_chart", "x", list(range(1, epochs + 1)), values, 1, "accuracy")
    assert axes.get_xlim() == pytest.approx((1 - margin, epochs + margin))


@pytest.mark.parametrize(("values", "top"), [([0.2, 1.0], 1.02), ([0.2, 0.4], 0.41)])
def test_no_score_is_above_one(draw, values, top):
    """Where a score reaches 1 the axis ends just above; elsewhere matplotlib's margin is 5 %."""
    axes = draw("score_chart", "x", [1, 2], values, 2, "mean AUROC")
    assert lines(axes)["validation"] == [[1, values[0]], [2, values[1]]]
    assert axes.get_ylim()[1] == pytest.approx(top)
    assert axes.get_ylabel() == "mean AUROC"


def test_a_roc_curve_has_the_rates_of_each_threshold_beside_chance(draw):
    """By hand: of 2 positives and 2 negatives one pair is ranked wrongly; the area is filled."""
    axes = draw("roc_chart", "x", np.array([0, 1, 0, 1], bool), np.array([0.1, 0.4, 0.6, 0.8]))
    chance, curve = unnamed(axes)
    assert chance == [[0, 0], [1, 1]]
    assert curve == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]
    (area,) = axes.collections
    (corners,) = (path.vertices for path in area.get_paths())
    x, y = corners.T
    assert abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 == pytest.approx(0.75)  # the AUROC
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (0, 1))
    assert axes.get_aspect() == 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("false positive rate", "true positive rate")


def test_pixel_flipping_is_drawn_over_the_percentage_that_is_covered(draw):
    """Two curves from 0 to the covered share, from a probability of 0 on."""
    axes = draw("flipping_chart", "x", 0.2, [1, 0.4, 0.1], [1, 0.9, 0.8])
    assert lines(axes) == {
        "random order": [[0, 1], [10, 0.9], [20, 0.8]],
        "most relevant first": [[0, 1], [10, 0.4], [20, 0.1]],
    }
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize("calibrated", [None, [0.1, 0.4]])
def test_bins_stand_at_their_mean_probability_with_their_interval(draw, calibrated):
    """At the calibrated one where there is one; a bin without an interval has one without width."""
    axes = draw("reliability_chart", "x", [0.1, 0.5], [None, [0.3, 0.7]], [0.2, 0.8], calibrated)
    of_network, own = [[0.2, 0.1], [0.8, 0.5]], [[0.1, 0.1], [0.4, 0.5]]
    expected = {"calibrated": own} if calibrated else {}
    assert lines(axes) == {"network": of_network, **expected}
    first, second = calibrated or [0.2, 0.8]
    assert segments(axes) == [[[first, 0.1], [first, 0.1]], [[second, 0.3], [second, 0.7]]]
    assert unnamed(axes) == [[[0, 0], [1, 1]]]
    assert axes.get_xlim() == axes.get_ylim() == pytest.approx((0, 1.08 * 0.8))
    assert axes.get_aspect() == 1


@pytest.mark.parametrize(("largest", "top"), [(0.02, 0.0216), (0.0, 0.0108), (0.99, 1.0)])
def test_the_bins_of_a_rare_class_fill_the_chart(draw, largest, top):
    """Its axes end 8 % above the largest value, at least at 0.0108 and at most at 1."""
    axes = draw("reliability_chart", "x", [largest], [None], [0.0], None)
    assert axes.get_xlim() == axes.get_ylim() == pytest.approx((0, top))


def test_net_benefit_is_between_calling_none_and_calling_all(draw):
    """The axis ends 10 % above the largest value, and 3 tenths of that below 0."""
    intervals = [[0.1, 0.5], None]
    axes = draw("decision_chart", "x", [0.1, 0.9], [0.3, 0.2], intervals, [0.4, -4])
    assert lines(axes) == {
        "call none": [[0, 0], [1, 0]],
        "call all": [[0.1, 0.4], [0.9, -4]],
        "model": [[0.1, 0.3], [0.9, 0.2]],
    }
    (band,) = axes.collections
    corners = {tuple(corner) for path in band.get_paths() for corner in path.vertices.tolist()}
    assert corners == {(0.1, 0.1), (0.1, 0.5), (0.9, 0.2)}
    assert axes.get_xlim() == (0, 1)
    assert axes.get_ylim() == pytest.approx((-0.3 * 0.55, 0.55))


def test_groups_have_a_row_each_and_their_figures_stand_apart_in_it(draw):
    """From the top; an undefined figure leaves its place empty, and a long name is cut."""
    figures = {
        "AUROC": [(0.8, 0.7, 0.9), None],
        "recall": [(0.5, 0.4, 0.6), (0.3, 0.1, 0.4)],
    }
    axes = draw("forest_chart", "x", ["$a$", "b" * 25], figures)
    assert lines(axes) == {"AUROC": [[0.8, -0.24]], "recall": [[0.5, 0.24], [0.3, 1.24]]}
    assert segments(axes) == [
        [[0.7, -0.24], [0.9, -0.24]],
        [[0.4, 0.24], [0.6, 0.24]],
        [[0.1, 1.24], [0.4, 1.24]],
    ]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1), (1.5, -0.5))
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == ["$a$", "b" * 23 + "\N{HORIZONTAL ELLIPSIS}"]
    assert not axes.get_yticklabels()[0].get_parse_math()


def test_differences_stand_from_the_top_beside_a_line_at_zero(draw):
    """Each with its interval, in the order in which they were given."""
    axes = draw("differences_chart", [("first", 0.1, 0.0, 0.2), ("second", -0.1, -0.4, 0.3)])
    zero, values = unnamed(axes)
    assert zero == [[0, 0], [0, 1]]
    assert values == [[0.1, 1], [-0.1, 0]]
    assert segments(axes) == [[[0.0, 1], [0.2, 1]], [[-0.4, 0], [0.3, 0]]]
    labels = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [(y, text.get_text()) for y, text in labels] == [(1, "first"), (0, "second")]
    assert axes.get_ylim() == pytest.approx((-0.6, 1.6))
