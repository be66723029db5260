"""Augmentation: one affine warp per image, on the device, with parameters from the plan."""

import math

import torch
from kornia.geometry.transform import warp_affine
from torch import Tensor

from cxrdist.data.plan import Draws


def warp(images: Tensor, draws: Draws) -> Tensor:
    """Flip, rotate about the centre and shift, in one bilinear resampling; outside is black.

    Always computed in float32, also under autocast: half precision moves pixels.

    Args:
        images: uint8 or float [B, 1, H, W], grey values 0..255.
        draws: parameters of the B images.

    Returns:
        float32 [B, 1, H, W], grey values 0..255.
    """
    size = (images.shape[2], images.shape[3])
    with torch.autocast(images.device.type, enabled=False):
        matrices = affine_matrices(draws, size).to(images.device, non_blocking=True)
        warped: Tensor = warp_affine(images.float(), matrices, size, align_corners=True)
        return warped


def affine_matrices(draws: Draws, size: tuple[int, int]) -> Tensor:
    """Matrices that take a pixel of the image to its place in the warped one, float32 [B, 2, 3].

    Args:
        draws: parameters of B images.
        size: height and width in pixels.
    """
    height, width = size
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    angle = torch.from_numpy(draws.degrees) * (math.pi / 180)
    mirror = 1 - 2 * torch.from_numpy(draws.flip).float()
    cos, sin = torch.cos(angle), torch.sin(angle)
    x_to_x, y_to_x, x_to_y, y_to_y = cos * mirror, sin, -sin * mirror, cos
    to_x = centre_x - x_to_x * centre_x - y_to_x * centre_y
    to_y = centre_y - x_to_y * centre_x - y_to_y * centre_y
    to_x = to_x + torch.from_numpy(draws.shift_x) * width
    to_y = to_y + torch.from_numpy(draws.shift_y) * height
    rows = torch.stack([x_to_x, y_to_x, to_x, x_to_y, y_to_y, to_y], dim=1)
    return rows.reshape(-1, 2, 3)
