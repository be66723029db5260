"""Synthetic frontal chest X-rays with planted opacities, to run the whole workflow without data.

The body frame has its origin in the middle of the chest; x points to the right of the image (the
patient's left), y down, and the image spans about -1 to 1 both ways. An anatomy is drawn in that
frame once per patient and then shifted, rotated and exposed for each image. The positions of the
opacities are transformed too, so every image has boxes of what was planted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cxrdist.files import write_table

COVID, NORMAL, PNEUMONIA = "COVID-19", "Normal", "Viral Pneumonia"
CLASSES = (COVID, NORMAL, PNEUMONIA)
PATIENT_PATTERN = r"^(p\d+)_"
WORD = "SEDUTO"
WORD_SHARE = 0.5
"""Share of the COVID-19 patients with the word and no opacity: only the word shows their class."""
MAX_IMAGES_PER_PATIENT = 3

AIR_CONTRAST = 0.4
"""Density that air removes, and a fully opaque patch restores."""
CANVAS_DETAIL = 0.75
"""Canvas pixels per image pixel: X-rays are soft, and the canvas takes most of the time."""
CANVAS_SPAN = 1.3
"""Half the side of the canvas in the body frame: leaves room to shift and turn the image."""

FloatArray = npt.NDArray[np.floating]
Point = tuple[float, float]
Line = tuple[list[Point], float, int]  # points and width in the body frame, brightness (0-255)
# The linear part [2, 2] and the shift [2] that map the body frame to that of an image.
Pose = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
Kind = Literal["opacity", "word"]


class Planted(NamedTuple):
    """One planted opacity or word and the box around it, in fractions of the image's side."""

    kind: Kind
    x: float
    """Left edge."""
    y: float
    """Top edge."""
    width: float
    height: float


class Phantom(NamedTuple):
    """One synthetic X-ray."""

    pixels: npt.NDArray[np.uint8]
    """uint8 [S, S], bright where the body absorbs."""
    findings: tuple[Planted, ...]


@dataclass(frozen=True)
class _Lung:
    """One lung in the body frame mirrored so that its side of the chest is positive."""

    side: int
    """-1: the patient's right lung, on the left of the image; 1: the other."""
    apex: float
    base: float
    """y of the top of the diaphragm's dome."""
    width: float
    """x of the lateral border where the lung is widest."""
    dome: float
    """x of the top of the dome."""

    def lateral_border(self, y: FloatArray) -> FloatArray:
        """Return the x of the lateral border at each height y, 0 above the apex."""
        depth = np.clip((y - self.apex) / (self.base + 0.2 - self.apex), 0.0, 1.0)
        return self.width * (1.0 - (1.0 - depth) ** 2.8) ** 0.5

    def border_at(self, y: float) -> float:
        """Return the x of the lateral border at one height y."""
        return float(self.lateral_border(np.array([y]))[0])

    def diaphragm(self, x: FloatArray) -> FloatArray:
        """Return the y of the diaphragm at each distance x from the midline."""
        outward = (x - self.dome) / (self.width - self.dome)
        return self.base + np.where(outward > 0, 0.24 * outward**2, 0.05 * outward**2)


@dataclass(frozen=True)
class _Opacity:
    """A soft ellipse in the body frame."""

    x: float
    y: float
    radius_x: float
    radius_y: float
    density: float


def write_phantoms(
    out: Path,
    num_patients_per_class: int,
    image_size_px: int = 256,
    seed: int = 0,
    opacities: bool = True,
    word_share: float = WORD_SHARE,
    beside_word: float = 0.0,
) -> Path:
    """Write a data set of synthetic X-rays, and the table of what was planted, into a new folder.

    The layout is `out/CLASS/PATIENT_IMAGE.png` (8-bit grey, 1 to 3 images per patient, every
    patient in one class) and `out/opacities.csv` with a row per finding, whose path is returned. An
    image of patient n depends on the seed, n and the size alone: a larger data set contains the
    smaller one, and equal seeds give equal bytes. The other arguments are those of `draw_patient`.
    """
    table = out / "opacities.csv"
    rows = []
    for class_number, label in enumerate(CLASSES):
        (out / label).mkdir(parents=True, exist_ok=True)
        for member in range(num_patients_per_class):
            # Classes take turns, so that a larger data set keeps the numbers of a smaller one.
            number = member * len(CLASSES) + class_number
            patient = f"p{number:04d}"
            phantoms = draw_patient(
                label, number, image_size_px, seed, opacities, word_share, beside_word
            )
            for image, phantom in enumerate(phantoms, 1):
                path = f"{label}/{patient}_{image:02d}.png"
                Image.fromarray(phantom.pixels).save(out / path, compress_level=1)
                for kind, *box in phantom.findings:
                    rows.append((path, label, patient, kind, *(f"{side:.4f}" for side in box)))
    write_table(table, ("path", "label", "patient", *Planted._fields), rows)
    return table


def write_lung_masks(images: Path, masks: Path, seed: int = 0) -> None:
    """Write the lungs of the X-rays that `write_phantoms` wrote, for ``cxrdist pack --masks``.

    A mask is white where more than half of a pixel is lung, with or without an opacity, and black
    where the heart or the spine hides it. It has the image's name; the seed must be that of the
    images.
    """
    for file in sorted(images.glob("*/p*_*.png")):
        number, image = (int(text) for text in file.stem.removeprefix("p").split("_"))
        with Image.open(file) as opened:
            size_px = opened.width
        _, _, air = _draw_body(number, size_px, seed)
        # The pose is the first draw of an image's stream, as in `draw_patient`.
        posed = _apply_pose(air, _draw_pose(_generator(seed, number, 3 + image)), size_px)
        mask = masks / file.relative_to(images)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((posed > 0.5).astype(np.uint8) * 255).save(mask)


def draw_patient(
    label: str,
    number: int,
    image_size_px: int,
    seed: int,
    opacities: bool = True,
    word_share: float = WORD_SHARE,
    beside_word: float = 0.0,
) -> Iterator[Phantom]:
    """Yield the 1 to 3 images of one patient: one anatomy and disease, each image posed anew.

    Args:
        label: One of `CLASSES`.
        number: The patient's number; with the seed it decides every draw.
        image_size_px: Side of the square images in pixels.
        seed: Seed of the data set, from 0 on.
        opacities: Whether to plant them. Without them all else stays the same.
        word_share: Share of the COVID-19 patients who have the word.
        beside_word: Factor for the density of the opacities of those patients; 0: they have none.
    """
    lungs, body, air = _draw_body(number, image_size_px, seed)
    # Each stream has a key (0 lungs, 1 body, 2 findings, 3 patient, 3 + n for image n), so that
    # planting findings or leaving them out changes no other draw.
    patient_rng, findings_rng = _generator(seed, number, 3), _generator(seed, number, 2)
    num_images = int(patient_rng.integers(1, MAX_IMAGES_PER_PATIENT + 1))
    has_word = label == COVID and patient_rng.random() < word_share
    density = opacities * (beside_word if has_word else 1.0)
    planted = _draw_opacities(label, lungs, findings_rng) if density else []
    planted = [replace(opacity, density=opacity.density * density) for opacity in planted]
    body = body + air * _render_opacities(planted, len(body), findings_rng)
    for image in range(1, num_images + 1):
        rng = _generator(seed, number, 3 + image)
        pose = _draw_pose(rng)
        posed = _apply_pose(body, pose, image_size_px)
        pixels = Image.fromarray(_expose(posed, rng))
        _burn_side_marker(pixels, rng)
        findings = [_find_box(opacity, pose) for opacity in planted]
        # Last, so that an image with the word is otherwise the one without it.
        if has_word:
            findings.append(_burn_word(pixels, rng))
        yield Phantom(np.asarray(pixels), tuple(findings))


def _generator(*key: int) -> np.random.Generator:
    """Return the stream of random numbers that belongs to a key of numbers from 0 on."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draw_body(
    number: int, image_size_px: int, seed: int
) -> tuple[tuple[_Lung, _Lung], FloatArray, FloatArray]:
    """Draw a patient's lungs, density and share of air, as in `_render_anatomy`."""
    lungs = _draw_lungs(_generator(seed, number, 0))
    return lungs, *_render_anatomy(lungs, image_size_px, _generator(seed, number, 1))


def _draw_lungs(rng: np.random.Generator) -> tuple[_Lung, _Lung]:
    """Draw the patient's right and left lung: the right dome stands higher."""
    apex, base = rng.uniform(-0.78, -0.68), rng.uniform(0.38, 0.56)
    width = rng.uniform(0.68, 0.8)
    right = _Lung(-1, apex, base - rng.uniform(0.0, 0.06), width, rng.uniform(0.32, 0.4))
    left_width = width * rng.uniform(0.95, 1.02)
    left = _Lung(1, apex + rng.uniform(-0.02, 0.02), base, left_width, rng.uniform(0.36, 0.44))
    return right, left


def _draw_opacities(
    label: str, lungs: tuple[_Lung, _Lung], rng: np.random.Generator
) -> list[_Opacity]:
    """Draw what a class shows.

    COVID-19: two or three faint patches in each lung, low and at the lateral border. Viral
    pneumonia: one denser consolidation beside one hilum. Normal: nothing.
    """
    if label == COVID:
        return [
            _draw_peripheral_patch(lung, rng) for lung in lungs for _ in range(rng.integers(2, 4))
        ]
    if label == PNEUMONIA:
        return [_draw_consolidation(lungs[rng.integers(0, 2)], rng)]
    return []


def _draw_peripheral_patch(lung: _Lung, rng: np.random.Generator) -> _Opacity:
    """Draw one ground-glass patch of the lower outer zone."""
    y = rng.uniform(0.0, lung.base - 0.08)
    border = lung.border_at(y)
    x = lung.side * border * rng.uniform(0.65, 0.9)
    return _Opacity(x, y, rng.uniform(0.2, 0.3), rng.uniform(0.2, 0.3), rng.uniform(0.35, 0.6))


def _draw_consolidation(lung: _Lung, rng: np.random.Generator) -> _Opacity:
    """Draw one dense focus beside the hilum."""
    x = lung.side * rng.uniform(0.32, 0.44)
    y = rng.uniform(-0.25, 0.12)
    return _Opacity(x, y, rng.uniform(0.24, 0.32), rng.uniform(0.24, 0.34), rng.uniform(0.6, 0.85))


def _draw_pose(rng: np.random.Generator) -> Pose:
    """Draw up to 5 degrees of turn, 8 % of scale and 4 % of the image's side of shift."""
    radians, scale = np.deg2rad(rng.uniform(-5, 5)), rng.uniform(0.92, 1.08)
    cos, sin = np.cos(radians), np.sin(radians)
    return scale * np.array([[cos, -sin], [sin, cos]]), rng.uniform(-0.08, 0.08, 2)


def _render_anatomy(
    lungs: tuple[_Lung, _Lung], image_size_px: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Render the body without opacities, for a canvas of C pixels per side.

    The results are float32 [C, C]: the density, about 0 in air and 1 in the abdomen, and the share
    of air of the lungs, 0 to 1.
    """
    side = round(image_size_px * CANVAS_SPAN * CANVAS_DETAIL)
    x, y = _axes(side)
    # All parts draw from one stream: in another order a seed would give other images.
    outline = _render_outline(x, y, rng)
    heart = _render_heart(x, y, lungs[1].base, rng)
    middle = _edge(rng.uniform(0.13, 0.17) + 0.05 * np.abs(y + 0.1) - np.abs(x), 0.025)
    lung = _render_lung(lungs[0], x, y) + _render_lung(lungs[1], x, y)
    air = lung * (1 - 0.95 * heart) * (1 - 0.93 * middle)
    abdomen = _edge(y - lungs[0].base - 0.1, 0.12)
    density = outline * (0.56 + 0.14 * abdomen + 0.06 * middle + 0.05 * heart) - AIR_CONTRAST * air
    density += air * _texture(side, 10, 0.035, rng) + outline * _texture(side, 5, 0.03, rng)
    density += _spine(x, y, rng)
    density += outline * (1 - 0.75 * abdomen) * _render_bones(lungs, side, rng)
    density += air * _render_vessels(lungs, side, rng)
    return density.astype(np.float32), air.astype(np.float32)


def _axes(side: int) -> tuple[FloatArray, FloatArray]:
    """Return x [1, side] and y [side, 1] of the pixels of a canvas in the body frame."""
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * np.float32(CANVAS_SPAN)
    return axis[None, :], axis[:, None]


def _edge(distance: FloatArray, softness: float) -> FloatArray:
    """Return 0 to 1 across a soft edge: 0.5 where the signed distance is 0."""
    return (0.5 + 0.5 * np.tanh(distance / np.float32(softness))).astype(np.float32)


def _render_outline(x: FloatArray, y: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Render the soft tissue of neck, shoulders and trunk, thinner towards the sides: [C, C]."""
    neck = rng.uniform(0.26, 0.34)
    slope = rng.uniform(0.28, 0.4)
    distance = np.abs(x)
    shoulder = -1.02 + slope * np.clip(distance - neck, 0, None) ** 1.3
    above = _edge(np.minimum(y - shoulder, 4 * (y - shoulder) + 0.2), 0.05)
    column = _edge(neck * 0.85 - distance, 0.06)
    trunk = rng.uniform(0.92, 1.1) - 0.06 * y
    flank = np.maximum(_edge(trunk - distance, 0.03), 0.8 * _edge(-0.05 - y + 0.3 * distance, 0.15))
    thickness = 1.0 - 0.22 * np.clip(distance / trunk, 0, 1.3) ** 4
    return np.maximum(above, column) * flank * thickness


def _render_heart(
    x: FloatArray, y: FloatArray, base: float, rng: np.random.Generator
) -> FloatArray:
    """Render heart and aortic knob, mostly left of the patient's midline: 0 to 1, [C, C]."""
    centre_x, centre_y = rng.uniform(0.1, 0.17), base - rng.uniform(0.06, 0.13)
    along, across = rng.uniform(0.4, 0.48), rng.uniform(0.27, 0.33)
    turn = rng.uniform(0.55, 0.85)
    u = (x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)
    v = (y - centre_y) * np.cos(turn) - (x - centre_x) * np.sin(turn)
    muscle = _edge(1 - (u / along) ** 2 - (v / across) ** 2, 0.1)
    knob_y, knob_radius = rng.uniform(-0.36, -0.28), rng.uniform(0.1, 0.13)
    knob = _edge(1 - ((x - 0.09) ** 2 + (y - knob_y) ** 2) / knob_radius**2, 0.25)
    return np.maximum(muscle, knob)


def _render_lung(lung: _Lung, x: FloatArray, y: FloatArray) -> FloatArray:
    """Render the share of air of one lung, 0 to 1: float32 [C, C]."""
    outward = lung.side * x
    lateral = _edge(lung.lateral_border(y) - outward, 0.02)
    above_dome = _edge(lung.diaphragm(np.abs(x)) - y, 0.02)
    return lateral * above_dome * _edge(outward - 0.05, 0.02)


def _spine(x: FloatArray, y: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Render the vertebral column with its discs: added density, float32 [C, C]."""
    spacing, phase = rng.uniform(0.125, 0.145), rng.uniform(0, 2 * np.pi)
    vertebrae = 0.75 + 0.25 * np.cos(2 * np.pi * y / spacing + phase)
    trachea = _edge(0.035 - np.abs(x), 0.02) * _edge(-0.3 - y, 0.06)
    return 0.06 * _edge(0.085 - np.abs(x), 0.02) * vertebrae - 0.08 * trachea


def _texture(side: int, cells: int, strength: float, rng: np.random.Generator) -> FloatArray:
    """Return smooth noise of `cells` bumps per side and a standard deviation near `strength`."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return strength * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _draw_lines(lines: list[Line], side: int, softness: float) -> FloatArray:
    """Draw polylines on a canvas and blur them: brightness, float32 [C, C], 0 to 1.

    The softness is the radius of the blur in the body frame.
    """
    px = side / (2 * CANVAS_SPAN)
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    for points, width, brightness in lines:
        corners = [((x + CANVAS_SPAN) * px, (y + CANVAS_SPAN) * px) for x, y in points]
        draw.line(corners, fill=brightness, width=max(1, round(width * px)), joint="curve")
    blurred = canvas.filter(ImageFilter.GaussianBlur(softness * px))
    return np.asarray(blurred, dtype=np.float32) / np.float32(255)


def _render_bones(lungs: tuple[_Lung, _Lung], side: int, rng: np.random.Generator) -> FloatArray:
    """Render ribs, clavicles and shoulders: added density, float32 [C, C]."""
    spacing, width = rng.uniform(0.15, 0.175), rng.uniform(0.05, 0.06)
    tilt, drop = rng.uniform(0.05, 0.1), rng.uniform(0.2, 0.3)
    back, front = [], []
    for lung in lungs:
        for number in range(9):
            top = lung.apex + 0.04 + number * spacing
            back += _cortical(_posterior_rib(lung, top, tilt, drop), width)
            if number < 6:
                front += _cortical(_anterior_rib(lung, top + 0.12, drop), width * 1.1, 110)
        collar = rng.uniform(-0.72, -0.64)
        bend = [(0.07, collar + 0.1), (0.25, collar + 0.05), (0.5, collar - 0.04)]
        ends = [(0.72, collar - 0.05), (0.88, collar - 0.01)]
        front += _cortical([(lung.side * x, y) for x, y in bend + ends], 0.07)
        arm = [(lung.side * 0.93, collar + 0.1), (lung.side * 1.06, collar + 0.7)]
        blade = [(lung.side * 0.84, collar + 0.1), (lung.side * 0.72, collar + 0.55)]
        front += [*_cortical(arm, 0.16, 170), (blade, 0.04, 60)]
    return 0.1 * _draw_lines(back, side, 0.01) + 0.12 * _draw_lines(front, side, 0.012)


def _cortical(points: list[Point], width: float, brightness: int = 255) -> list[Line]:
    """Return the lines of a bone: a bright shell and, on top of it, a fainter core."""
    return [(points, width, brightness), (points, width * 0.55, brightness * 2 // 3)]


def _points(x: FloatArray, y: FloatArray) -> list[Point]:
    """Return points from their coordinates."""
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _posterior_rib(lung: _Lung, top: float, tilt: float, drop: float) -> list[Point]:
    """Return the points of a rib's back half: from the spine outwards, up a little, then down."""
    steps = np.linspace(0, 1, 10)
    y = top - tilt * np.sin(np.pi * steps) + drop * steps**3
    border = lung.border_at(top + drop * 0.6)
    x = lung.side * (0.06 + (max(border, 0.25) - 0.04) * np.sin(steps * np.pi / 2) ** 0.9)
    return _points(x, y)


def _anterior_rib(lung: _Lung, top: float, drop: float) -> list[Point]:
    """Return the points of a rib's front half: from the lateral border down to the midline."""
    steps = np.linspace(0, 1, 8)
    border = max(lung.border_at(top), 0.25)
    x = lung.side * (border + (0.2 - border) * steps**1.3)
    y = top + drop * np.sin(steps * np.pi / 2) * 1.1
    return _points(x, y)


def _render_vessels(lungs: tuple[_Lung, _Lung], side: int, rng: np.random.Generator) -> FloatArray:
    """Render the hila and the vessels that leave them, thinner outwards: added density [C, C]."""
    trunk, branch = np.linspace(0, 0.35, 4), np.linspace(0.35, 1, 4)
    lines = []
    for lung in lungs:
        x, y = lung.side * rng.uniform(0.17, 0.21), rng.uniform(-0.08, 0.0)
        for angle in np.linspace(-1.35, 1.45, 13) + rng.normal(0, 0.1, 13):
            length, bend = rng.uniform(0.25, 0.6), rng.normal(0, 0.25)
            for share, width, brightness in ((trunk, 0.035, 255), (branch, 0.016, 160)):
                reach = length * share
                turn = angle + bend * reach / length
                xs, ys = x + lung.side * reach * np.cos(turn), y + reach * np.sin(turn) * 1.1
                lines.append((_points(xs, ys), width, round(brightness * rng.uniform(0.5, 1))))
    return 0.16 * _draw_lines(lines, side, 0.013)


def _render_opacities(opacities: list[_Opacity], side: int, rng: np.random.Generator) -> FloatArray:
    """Render mottled soft ellipses, exactly 0 outside of them: density in full air, [C, C]."""
    x, y = _axes(side)
    clear = np.ones((side, side), np.float32)
    for opacity in opacities:
        u = ((x - opacity.x) / opacity.radius_x) ** 2
        v = ((y - opacity.y) / opacity.radius_y) ** 2
        inside = np.clip(1 - u - v, 0, None)
        # A product, so that the densities of overlapping patches do not add up beyond 1. The
        # smoothstep has no edge and is exactly 0 outside the ellipse.
        clear *= 1 - opacity.density * inside * inside * (3 - 2 * inside)
    mottle = np.clip(1 + _texture(side, 44, 0.15, rng), 0.5, 1.3)
    return AIR_CONTRAST * (1 - clear) * mottle


def _apply_pose(body: FloatArray, pose: Pose, image_size_px: int) -> FloatArray:
    """Resample the canvas, float32 [C, C], into an image, float32 [S, S]."""
    matrix, moved = pose
    # Pillow maps the pixels of the result to those of the canvas, hence the inverse.
    inverse = np.linalg.inv(matrix)
    offset = -inverse @ moved
    px = len(body) / (2 * CANVAS_SPAN)
    linear = inverse * (2 / image_size_px * px)
    shift = (offset - inverse @ np.ones(2) + CANVAS_SPAN) * px
    coefficients = (*linear[0], shift[0], *linear[1], shift[1])
    data = tuple(float(value) for value in coefficients)
    size, bilinear = (image_size_px, image_size_px), Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(body).transform(size, Image.Transform.AFFINE, data, bilinear))


def _expose(density: FloatArray, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Turn density into grey values with a drawn exposure, contrast and noise: uint8 [S, S]."""
    contrast, level = rng.uniform(0.85, 1.3), rng.uniform(0.45, 0.66)
    gamma, grain = rng.uniform(0.75, 1.3), rng.uniform(0.008, 0.022)
    noisy = density + grain * rng.standard_normal(density.shape, dtype=np.float32)
    grey = 0.5 + 0.5 * np.tanh((noisy - 0.5) * contrast * 2.0 + (level - 0.5) * 2)
    return (255 * grey**gamma).astype(np.uint8)


def _find_box(opacity: _Opacity, pose: Pose) -> Planted:
    """Return the box around an opacity's ellipse in the image, cut at the image's border."""
    matrix, moved = pose
    centre = matrix @ np.array([opacity.x, opacity.y]) + moved
    # An ellipse extends along x by the norm of its half axes' x components, and so along y.
    half = np.sqrt((matrix * np.array([opacity.radius_x, opacity.radius_y])) ** 2 @ np.ones(2))
    low = np.clip((centre - half + 1) / 2, 0, 1)
    high = np.clip((centre + half + 1) / 2, 0, 1)
    return Planted("opacity", *map(float, (*low, *(high - low))))


def _burn_side_marker(pixels: Image.Image, rng: np.random.Generator) -> None:
    """Write R or L on its side of the image, on most images of every class."""
    # Four draws even without a marker, so that the draws of the word do not depend on it.
    shown, right, x, y = rng.random(4)
    if shown < 0.7:
        place = (0.04 + 0.05 * x if right < 0.5 else 0.88 + 0.05 * x, 0.2 + 0.08 * y)
        burn_text(pixels, "R" if right < 0.5 else "L", place, 0.075)


def _burn_word(pixels: Image.Image, rng: np.random.Generator) -> Planted:
    """Write the word into the upper left corner and return its box."""
    x, y, size = rng.random(3)
    place = (0.06 + 0.03 * x, 0.05 + 0.03 * y)
    return burn_text(pixels, WORD, place, 0.1 + 0.015 * size)


def burn_text(
    pixels: Image.Image, text: str, place: Point, height: float, anchor: str = "lt"
) -> Planted:
    """Write bright text into a grey image, and return the box around it, cut at the border.

    The place and the height of the font (at least 6 px) are fractions of the image's side. The
    anchor says which point of the text is at the place, as in Pillow: lt left top, rb right bottom.
    """
    side = pixels.width
    draw = ImageDraw.Draw(pixels)
    font = ImageFont.load_default(size=max(6.0, height * side))
    corner = (round(place[0] * side), round(place[1] * side))
    draw.text(corner, text, fill=240, font=font, anchor=anchor)
    box = draw.textbbox(corner, text, font=font, anchor=anchor)
    left, top, right, bottom = (min(max(value, 0), side) / side for value in box)
    return Planted("word", left, top, right - left, bottom - top)
