from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cxrdist.config import Augmentation
from cxrdist.data.plan import balanced_copies, copies_of, plan_epoch, refuse_uncrossed
from cxrdist.errors import CxrdistError


def plan(num_samples=20, copies=3, batch=9, key=(0, "head", 1)):
    samples = np.arange(100, 100 + num_samples)
    return plan_epoch(samples, np.full(num_samples, copies), Augmentation(), batch, key)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize(("samples", "copies"), [(20, 3), (7, 1), (9, 8), (1, 1)])
def test_the_slices_of_the_ranks_cover_an_epoch_exactly(world, samples, copies):
    """Each image of the plan is taken by one rank in one step, whatever the number of ranks."""
    epoch = plan(samples, copies)
    rows = [
        np.arange(len(epoch.samples))[epoch.rank_rows(step, rank, world)]
        for step in range(epoch.num_steps)
        for rank in range(world)
    ]
    assert np.array_equal(np.concatenate(rows), np.arange(samples * copies))
    for step in range(epoch.num_steps):
        sizes = [
            len(range(*epoch.rank_rows(step, rank, world).indices(10**6))) for rank in range(world)
        ]
        assert sum(sizes) == epoch.step_size(step) <= 9
        assert max(sizes) - min(sizes) <= 1


def test_the_digest_sums_the_outputs_of_splitmix64():
    """Row i of sample s is output i of the generator with seed s; the values are published ones.

    Steele et al. 2014; https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64 (1234567).
    """
    outputs = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, expected in outputs.items():
        epoch = replace(plan(), samples=np.full(3, seed))
        assert [epoch.digest(slice(row, row + 1)) for row in range(3)] == expected
        assert epoch.digest(slice(0, 3)) == sum(expected) % 2**64


def test_each_sample_is_taken_as_often_as_it_has_copies():
    """8/8/72 copies as in the paper, half of each sample's copies mirrored."""
    copies = np.array([8, 8, 72])
    for number in range(5):
        key = (0, "head", number)
        epoch = plan_epoch(np.array([4, 5, 6]), copies, Augmentation(), 9, key)
        assert Counter(epoch.samples.tolist()) == {4: 8, 5: 8, 6: 72}
        mirrored = Counter(epoch.samples[epoch.draws.flip].tolist())
        assert mirrored == {4: 4, 5: 4, 6: 36}


def test_a_copy_without_a_partner_is_mirrored_by_chance():
    """One copy is mirrored in about half of the epochs, of three one always and one by chance."""
    epoch = plan(1000, 1)
    assert 400 < epoch.draws.flip.sum() < 600
    three = plan(1000, 3)
    mirrored = Counter(three.samples[three.draws.flip].tolist())
    assert Counter(mirrored.values()).keys() == {1, 2}
    still = plan_epoch(np.arange(9), np.ones(9, int), Augmentation(flip=False), 9, (0, "a", 1))
    assert not still.draws.flip.any()


def test_draws_fill_the_papers_ranges():
    """Rotation within 40 degrees, shifts within 40 and 28 of 224 px, and not all alike."""
    draws = plan(2000, 8).draws
    for values, limit in ((draws.degrees, 40), (draws.shift_x, 40 / 224), (draws.shift_y, 1 / 8)):
        assert np.abs(values).max() <= limit * (1 + 1e-6)
        assert np.abs(values).max() > 0.99 * limit
        assert abs(values.mean()) < 0.03 * limit


def test_a_plan_is_a_function_of_seed_stage_and_epoch():
    """The same key gives the same plan; each part of the key changes it."""
    first, again = plan(), plan()
    assert np.array_equal(first.samples, again.samples)
    assert np.array_equal(first.draws.degrees, again.draws.degrees)
    for key in ((1, "head", 1), (0, "all", 1), (0, "head", 2)):
        assert not np.array_equal(first.draws.degrees, plan(key=key).draws.degrees)


def test_copies_of_an_unknown_class_are_refused():
    """A misspelt class would silently not be balanced."""
    targets = np.array([[1, 0], [0, 1], [0, 1]], np.int8)
    assert copies_of(targets, ["a", "b"], {"b": 4}).tolist() == [1, 4, 4]
    with pytest.raises(CxrdistError, match="no class 'c'"):
        copies_of(targets, ["a", "b"], {"c": 4})


def test_of_several_labels_the_one_of_most_copies_counts():
    """An image without a label, or with unknown ones, or one of a single copy, is taken once."""
    targets = np.array([[1, 1, 0], [0, 0, 0], [-1, -2, 1], [1, 0, 1]], np.int8)
    assert copies_of(targets, ["a", "b", "c"], {"a": 2, "b": 5}).tolist() == [5, 1, 1, 2]


@pytest.mark.parametrize(
    ("counts", "copies"),
    [
        ((131, 1025, 1028), (8, 1, 1)),  # the paper's classes; it took 72 and 8
        ((400, 20), (1, 20)),
        ((100, 60, 90), (1, 2, 1)),
        ((1000, 3), (1, 50)),  # and not 333
        ((7, 0), (1, 1)),
        ((5, 5), (1, 1)),
    ],
)
def test_balance_makes_each_class_about_as_frequent_as_the_most_frequent(counts, copies):
    """The nearest whole number of copies, within bounds; an absent class asks for none."""
    classes = [f"class {i}" for i in range(len(counts))]
    targets = np.repeat(np.eye(len(counts), dtype=np.int8), counts, axis=0)
    assert balanced_copies(targets, classes) == dict(zip(classes, copies, strict=True))


def crossed(copies: list[int], key=(0, "head", 1), **ranges: object):
    """An epoch of samples 0, 1 ... with crossed draws, and the rows of each."""
    augmentation = Augmentation(draws="crossed", **ranges)
    numbers = np.array(copies)
    refuse_uncrossed(numbers, augmentation)
    epoch = plan_epoch(np.arange(len(copies)), numbers, augmentation, 9, key)
    return epoch, [np.flatnonzero(epoch.samples == i) for i in range(len(copies))]


def test_crossed_draws_are_every_rotation_with_every_shift_and_its_mirror_image():
    """Section 2.3: 8 copies are 2 rotations x 2 shifts x mirror, 72 are 6 x 6 x mirror.

    Mirroring comes last, so a mirrored copy has its partner's rotation and shift the other way.
    """
    epoch, rows_of = crossed([8, 72, 2, 8])
    kept = []
    for rows, factor in zip(rows_of, (2, 6, 1, 2), strict=True):
        draws = epoch.draws.rows(rows)
        sign = np.where(draws.flip, -1, 1)
        rotations, shifts_x = draws.degrees * sign, draws.shift_x * sign
        assert len(set(rotations.tolist())) == len(set(shifts_x.tolist())) == factor
        assert len(set(zip(shifts_x.tolist(), draws.shift_y.tolist(), strict=True))) == factor
        of_each = zip(rotations.tolist(), shifts_x.tolist(), draws.flip.tolist(), strict=True)
        assert len(rows) == len(set(of_each)) == 2 * factor**2
        assert draws.flip.sum() == factor**2
        kept += set(rotations.tolist())
    assert len(set(kept)) == 2 + 6 + 1 + 2  # no image has a rotation of another one
    assert not np.array_equal(epoch.samples, np.sort(epoch.samples))


def test_crossed_draws_fill_the_ranges_and_belong_to_seed_stage_and_epoch():
    """As free ones do; the same key gives the same plan, another epoch other draws."""
    epoch, _ = crossed([8] * 2000)
    for values, limit in ((epoch.draws.degrees, 40), (epoch.draws.shift_y, 1 / 8)):
        assert 0.99 * limit < np.abs(values).max() <= limit * (1 + 1e-6)
        assert abs(values.mean()) < 0.03 * limit
    again, _ = crossed([8] * 2000)
    assert np.array_equal(epoch.samples, again.samples)
    assert np.array_equal(epoch.draws.degrees, again.draws.degrees)
    other, _ = crossed([8] * 2000, (0, "head", 2))
    assert not np.array_equal(epoch.draws.degrees, other.draws.degrees)


def test_without_mirror_rotations_and_shifts_are_crossed_alone():
    """9 copies are 3 x 3, and 72 are not a square."""
    epoch, (rows,) = crossed([9], flip=False)
    assert len({*epoch.draws.degrees[rows].tolist()}) == 3
    assert len({*epoch.draws.shift_x[rows].tolist()}) == 3
    assert not epoch.draws.flip.any()
    with pytest.raises(CxrdistError, match=r"takes k x k copies of every image \(1, 4, 9, 16"):
        crossed([72], flip=False)


@pytest.mark.parametrize("number", [1, 7, 9, 16, 71])
def test_copies_that_cannot_be_crossed_are_refused(number):
    """One line says which numbers can; free draws take any."""
    with pytest.raises(
        CxrdistError,
        match=rf"images with {number} cop.* takes 2 x k x k .*\(2, 8, 18, 32, 50, 72, 98 \.\.\.\)",
    ):
        crossed([8, number, 72])
    refuse_uncrossed(np.array([8, number]), Augmentation())
