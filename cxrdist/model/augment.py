"""Augmentation: one affine warp per image, on the device, with parameters from the plan."""

import math

import torch
from kornia.geometry.conversions import convert_affinematrix_to_homography, normalize_homography
from kornia.geometry.transform import invert_affine_transform
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from cxrdist.data.masks import HALF
from cxrdist.data.plan import Draws


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Flip, rotate about the centre and shift, in one bilinear resampling; outside is black.

    Computed in float32 even under autocast: half precision would shift pixels.

    Args:
        images: uint8 or float [B, 1, H, W], grey values 0..255.
        matrices: float32 [B, 2, 3], rows of `sampling_matrices`.

    Returns:
        float32 [B, 1, H, W], grey values 0..255.
    """
    with torch.autocast(images.device.type, enabled=False):
        # align_corners means that -1 and 1 are centres of pixels, as in `sampling_matrices`.
        grid = affine_grid(matrices, list(images.shape), align_corners=True)
        return grid_sample(images.float(), grid, align_corners=True)


def warp_masks(masks: Tensor, matrices: Tensor) -> Tensor:
    """Warp masks, uint8 [B, 1, H, W] of 0 and 255, like their images.

    The results are 255 where at least half of a pixel is covered; outside the image nothing is.
    """
    covered = warp(masks, matrices) >= HALF
    return covered.to(torch.uint8) * 255


def sampling_matrices(draws: Draws, size_px: int, device: torch.device) -> Tensor:
    """Return float32 [n, 2, 3], which map positions in n warped images to those in the originals.

    They are computed for a whole epoch at once, so that a step only slices them. Positions range
    from -1 to 1, the centres of the outermost pixels.
    """
    size = (size_px, size_px)
    with torch.autocast(device.type, enabled=False):
        back = invert_affine_transform(_affine_matrices(draws, size_px, device))
        homographies = normalize_homography(convert_affinematrix_to_homography(back), size, size)
    return homographies[:, :2].contiguous()


def _affine_matrices(draws: Draws, size_px: int, device: torch.device) -> Tensor:
    """Return matrices from original to warped pixel positions, float32 [n, 2, 3]."""
    centre = (size_px - 1) / 2
    arrays = (draws.degrees, draws.shift_x, draws.shift_y, draws.flip)
    degrees, shift_x, shift_y, flip = (torch.from_numpy(array).to(device) for array in arrays)
    angle = degrees * (math.pi / 180)
    mirror = 1 - 2 * flip.float()
    cos, sin = torch.cos(angle), torch.sin(angle)
    # Rows point down, hence -sin in the row of y for a counter-clockwise turn. The mirror is in the
    # columns of x only: it comes first, then the turn, then the shift.
    x_to_x, y_to_x, x_to_y, y_to_y = cos * mirror, sin, -sin * mirror, cos
    to_x = centre - x_to_x * centre - y_to_x * centre + shift_x * size_px
    to_y = centre - x_to_y * centre - y_to_y * centre + shift_y * size_px
    rows = torch.stack([x_to_x, y_to_x, to_x, x_to_y, y_to_y, to_y], dim=1)
    return rows.reshape(-1, 2, 3)
