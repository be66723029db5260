import kornia.augmentation
import numpy as np
import pytest
import torch

from cxrdist.config import Augmentation
from cxrdist.data.plan import Draws, plan_epoch
from cxrdist.model.augment import sampling_matrices, warp, warp_masks


def warped(images: torch.Tensor, by: Draws) -> torch.Tensor:
    """Images after the warps of some draws."""
    return warp(images, sampling_matrices(by, images.shape[2], images.device))


def draws(degrees=0.0, shift_x=0.0, shift_y=0.0, flip=False, count=1) -> Draws:
    numbers = [np.full(count, value, np.float32) for value in (degrees, shift_x, shift_y)]
    return Draws(*numbers, np.full(count, flip))


def picture(size=33) -> torch.Tensor:
    """Random blobs, uint8 [1, 1, size, size]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 1, size, size, generator=generator) * 255
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1).to(torch.uint8)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, lambda x: x),
        ({"flip": True}, lambda x: x.flip(3)),
        ({"degrees": 90.0}, lambda x: x.rot90(1, (2, 3))),
        ({"degrees": -90.0}, lambda x: x.rot90(-1, (2, 3))),
        ({"degrees": 90.0, "flip": True}, lambda x: x.flip(3).rot90(1, (2, 3))),
        ({"shift_x": 3 / 33}, lambda x: torch.nn.functional.pad(x, (3, 0))[..., :33]),
        ({"shift_y": 4 / 33}, lambda x: torch.nn.functional.pad(x, (0, 0, 4, 0))[..., :33, :]),
    ],
)
def test_warps_that_hit_the_grid_are_exact(how, expected):
    """A mirror, a quarter turn counter-clockwise and a whole-pixel shift move pixels, no more."""
    image = picture()
    assert torch.allclose(warped(image, draws(**how)), expected(image).float(), atol=0.02)


def test_rotation_agrees_with_kornias_own():
    """A turn by 25 degrees is the one of Kornia's RandomRotation, away from the border."""
    image = picture(65)
    theirs = kornia.augmentation.RandomRotation((25.0, 25.0), p=1.0, align_corners=True)
    ours = warped(image, draws(degrees=25.0))
    assert torch.allclose(ours, theirs(image.float()), atol=0.05)


@pytest.mark.parametrize("how", [{}, {"degrees": 17.0}, {"degrees": -40.0, "flip": True}])
@pytest.mark.parametrize("shift", [0.0, 0.17])
def test_a_mask_is_warped_as_its_image(how, shift):
    """A cross in both covers the same pixels; none is more than one pixel off."""
    image = torch.zeros((1, 1, 96, 96), dtype=torch.uint8)
    image[..., 40:48, 16:80] = 255
    image[..., 10:70, 30:38] = 255
    matrices = sampling_matrices(draws(**how, shift_x=shift, shift_y=-shift), 96, image.device)
    mask, seen = warp_masks(image, matrices), warp(image, matrices)
    assert mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) == {0, 255}
    surely, perhaps = seen > 191, torch.nn.functional.max_pool2d(seen, 3, 1, 1) > 64
    assert (mask[surely] == 255).all()
    assert (mask[~perhaps] == 0).all()
    if not how and not shift:
        assert torch.equal(mask, image)


def test_outside_is_black_and_each_image_has_its_own_draw():
    """What comes in from outside is 0; images of a batch do not share their parameters."""
    images = torch.full((2, 1, 20, 20), 200, dtype=torch.uint8)
    each = Draws(
        np.array([0, 45], np.float32),
        np.array([0.5, 0], np.float32),
        np.zeros(2, np.float32),
        np.array([False, False]),
    )
    shifted, turned = warped(images, each)
    assert (shifted[0, :, :10] == 0).all()
    assert (shifted[0, :, 11:] == 200).all()
    assert turned[0, 0, 0] == 0
    assert turned[0, 10, 10] == pytest.approx(200)


def test_the_warp_is_float32_under_autocast():
    """Half precision would move pixels at 224 px by whole steps."""
    image = picture()
    plain = warped(image, draws(degrees=10.0, shift_x=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = warped(image, draws(degrees=10.0, shift_x=0.1))
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_a_crossed_copy_and_its_mirrored_one_are_mirror_images():
    """The paper rotates, shifts and then mirrors (section 2.3)."""
    epoch = plan_epoch(np.array([0]), np.array([8]), Augmentation(draws="crossed"), 8, (0, "a", 1))
    copies = warped(picture().repeat(8, 1, 1, 1), epoch.draws)
    plain, mirrored = copies[~epoch.draws.flip], copies[epoch.draws.flip].flip(3)
    nearest = (plain[:, None] - mirrored[None]).abs().amax((2, 3, 4))
    assert (nearest < 0.1).sum(1).tolist() == (nearest < 0.1).sum(0).tolist() == [1] * 4
