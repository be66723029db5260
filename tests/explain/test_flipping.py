"""Maps of a small trained network that can only use markers: what they show is known."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from cxrdist.explain.flipping import STEPS, Flipping, flip_pixels, summarise
from cxrdist.explain.heatmap import smooth
from cxrdist.explain.relevance import Explainer
from cxrdist.model.densenet import Classifier, Network

SIZE, MARKER = 64, 8
CLASSES = ["cross", "ring"]


def marker(kind: int) -> Tensor:
    """A cross or a ring, bool [MARKER, MARKER]."""
    shape = torch.zeros(MARKER, MARKER, dtype=torch.bool)
    if kind == 0:
        shape[3:5], shape[:, 3:5] = True, True
    else:
        shape[:2], shape[-2:], shape[:, :2], shape[:, -2:] = True, True, True, True
    return shape


def draw(count: int, seed: int, num_kinds: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth noise with one marker somewhere, or without any.

    Args:
        count: of images.
        seed: of the images.
        num_kinds: 2 for crosses and rings in turn, 3 for images without a marker as well.

    Returns:
        uint8 [count, 1, SIZE, SIZE]; the kind of each; its top left corner [count, 2].
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 8, 8, generator=generator) * 120 + 40
    images = nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
    kinds = torch.arange(count) % num_kinds
    corners = torch.randint(4, SIZE - MARKER - 4, (count, 2), generator=generator)
    for image, kind, (row, column) in zip(images[:, 0], kinds, corners, strict=True):
        if kind < 2:
            image[row : row + MARKER, column : column + MARKER][marker(int(kind))] = 250
    return images.to(torch.uint8), kinds, corners


def train(num_kinds: int) -> Classifier:
    """A small DenseNet that tells crosses from rings, and both from images without a marker."""
    torch.manual_seed(0)
    model = Classifier(Network(growth_rate=8, block_config=(2, 2, 2)), CLASSES, SIZE)
    count = 256 * num_kinds
    images, kinds, _ = draw(count, seed=1, num_kinds=num_kinds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):
        for batch in torch.randperm(count).split(32):
            targets = nn.functional.one_hot(kinds[batch], 3)[:, :2].float()
            loss = nn.functional.binary_cross_entropy_with_logits(model(images[batch]), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def hits(relevance: Tensor, corners: Tensor) -> float:
    """Share of maps whose largest value lies in the marker, dilated by 2 px."""
    found = 0
    for values, (row, column) in zip(relevance.numpy(), corners.tolist(), strict=True):
        place = np.unravel_index(smooth(values).argmax(), values.shape)
        found += all(-2 <= p - c < MARKER + 2 for p, c in zip(place, (row, column), strict=True))
    return found / len(relevance)


def test_relevance_points_at_what_the_network_uses():
    """The largest relevance for the true class is in the marker, for the wrong class it is not."""
    trained = train(num_kinds=2)
    images, kinds, corners = draw(64, seed=2)
    with torch.no_grad():
        assert (trained(images).argmax(1) == kinds).float().mean() > 0.95
    relevance = Explainer(trained).attribute(images).relevance
    rows = torch.arange(64)
    assert hits(relevance[rows, kinds], corners) >= 0.95
    assert hits(relevance[rows, 1 - kinds], corners) <= 0.05
    mirrored = corners.clone()
    mirrored[:, 1] = SIZE - MARKER - corners[:, 1]
    assert hits(relevance[rows, kinds], mirrored) <= 0.2


def test_covering_what_is_relevant_takes_the_probability_away():
    """The area over the curve is at least 0.3 larger than for patches in random order."""
    trained = train(num_kinds=3)
    images, _, _ = draw(16, seed=3)
    explainer = Explainer(trained)
    flippings = [
        flip_pixels(trained, explainer, image[0].numpy(), CLASSES, seed)
        for seed, image in enumerate(images)
    ]
    found = summarise(flippings)
    assert found["area_over_relevant_first"] >= found["area_over_random_order"] + 0.3
    assert found["images"] == 16


def test_areas_are_those_of_the_curves():
    """Nothing lost is 0, all lost at the first step is 1; the start of a curve does not count."""
    kept, lost = np.ones(STEPS + 1), np.zeros(STEPS + 1)
    lost[0] = 1
    found = summarise([Flipping(lost, kept), Flipping(lost, kept)])
    assert (found["area_over_relevant_first"], found["area_over_random_order"]) == (1, 0)


class Watched:
    """A network and the map of its class; it keeps the images, and looks at their left half."""

    mean, classes = torch.zeros(1), ["a"]

    def __init__(self, relevance: Tensor) -> None:
        self.relevance, self.seen = relevance[None, None], []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images[:, 0].numpy())
        return images[:, 0, :, : images.shape[3] // 2].float().mean((1, 2))[:, None] / 100

    def attribute(self, images: Tensor, classes: list[str]) -> SimpleNamespace:
        return SimpleNamespace(relevance=self.relevance, logits=torch.zeros(1, 1))


def test_both_orders_cover_the_same_share_of_an_image():
    """At 64 px patches have 4 to 9 px: 2 to 20 % of the pixels, but for a part of a patch."""
    image = np.where(np.arange(SIZE * SIZE) % 2, 201, 1).reshape(SIZE, SIZE).astype(np.uint8)
    relevance = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    watched = Watched(relevance)
    flip_pixels(watched, watched, image, ["a"], 0)
    expected = np.linspace(0, 0.2, STEPS + 1) * SIZE * SIZE
    for images in watched.seen:
        changed = (images != image).sum((1, 2))
        assert ((expected <= changed) & (changed < expected + 9)).all()
    by_relevance, values = watched.seen[0], relevance.numpy()
    means = [values[covered != image].mean() for covered in by_relevance[1:]]
    assert means == sorted(means, reverse=True)
    assert means[-1] > values.mean() + 0.1


def test_a_constant_map_is_as_good_as_a_random_order():
    """Its patches are all alike: none of them is covered first because of where it lies."""
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    image[:, : SIZE // 2] //= 2
    watched = Watched(torch.zeros(SIZE, SIZE))
    curves = flip_pixels(watched, watched, image, ["a"], 0)
    np.testing.assert_array_equal(curves.relevance, curves.random)
    assert curves.random[-1] != 1


def test_the_random_curve_depends_little_on_its_seed():
    """One random order would give this image areas from 0 to 1: one place is all that counts."""

    class OnePlace(Watched):
        def __call__(self, images: Tensor) -> Tensor:
            return (images[:, 0, 0:2, 0:2].float().mean((1, 2))[:, None] - 128) / 10

    image = np.full((SIZE, SIZE), 10, np.uint8)
    image[0:2, 0:2] = 250
    watched = OnePlace(torch.zeros(SIZE, SIZE))
    flippings = [flip_pixels(watched, watched, image, ["a"], seed) for seed in range(64)]
    areas = [1 - flipping.random[1:].mean() for flipping in flippings]
    # Its patch is among the covered 20 % with chance, and then at any time: 0.11 (10 + ... + 1 of
    # 100 at each of 2 %), deviation 0.24; of the mean of 8 orders, 0.09.
    assert abs(np.mean(areas) - 0.11) < 0.05
    assert 0.05 < np.std(areas) < 0.13
