import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from cxrdist.data.images import read_grey
from cxrdist.data.pictures import picture_size
from cxrdist.errors import CxrdistError

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # all values of 12 bits
GREY = np.rint(RAMP / 4095 * 255).astype(np.uint8)


def grey_of(file: Path, depth: int | None = None) -> tuple[np.ndarray, int | None]:
    grey = read_grey(file, 1024, depth)
    assert (grey.width_px, grey.height_px) == grey.image.size
    return np.asarray(grey.image).astype(int), grey.used_depth


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        *(("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits")),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("JPEG2000", {}),
        ("PPM", {}),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_of_8_bits_are_read_as_they_are(tmp_path, kind, options, mode):
    """In grey and in colour, under any suffix."""
    Image.fromarray(GREY).convert(mode).save(tmp_path / "x.dat", kind, **options)
    pixels, used = grey_of(tmp_path / "x.dat")
    assert np.abs(pixels - GREY).max() <= 1
    assert used is None


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "jpe", "png", "dcm"])
def test_a_jpeg_is_one_under_any_suffix(tmp_path, suffix):
    """Also of several pictures (MPO), whose first one counts."""
    Image.fromarray(GREY).save(tmp_path / f"x.{suffix}", "JPEG", quality=95)
    assert np.abs(grey_of(tmp_path / f"x.{suffix}")[0] - GREY).max() <= 12
    more = [Image.fromarray(255 - GREY)]
    Image.fromarray(GREY).save(tmp_path / f"y.{suffix}", "MPO", save_all=True, append_images=more)
    assert np.abs(grey_of(tmp_path / f"y.{suffix}")[0] - GREY).max() <= 40


def write_deep(file: Path, kind: str, values: np.ndarray) -> None:
    """Write values of 16 bits; PGM by hand, since Pillow writes no 16 bits of it."""
    if kind == "PPM":
        head = b"P5\n# a comment of 65535\n%d %d\n65535\n" % values.shape[::-1]
        file.write_bytes(head + values.astype(">u2").tobytes())
    elif kind == "TIFF, big endian":
        import tifffile  # not a dependency of the package

        tifffile.imwrite(file, values, byteorder=">")
    else:
        Image.fromarray(values).save(file, kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, big endian", "PPM", "JPEG2000"])
def test_16_bits_take_the_depth_of_the_source(tmp_path, kind):
    """Without one, the bits that they use but for one pixel in a thousand."""
    if kind == "TIFF, big endian":
        pytest.importorskip("tifffile")
    values = RAMP.copy()
    values[0, :4] = 65535  # 4 of 4096 are hot
    expected = np.where(values == 65535, 255, GREY)
    write_deep(tmp_path / "x", kind, values)
    pixels, used = grey_of(tmp_path / "x")
    assert used == 12
    assert np.abs(pixels - expected).max() <= 1
    pixels, used = grey_of(tmp_path / "x", 14)
    assert np.abs(pixels - np.rint(255 * np.minimum(values / 16383, 1))).max() <= 1
    values[0, :5] = 65535  # 5 are part of the image
    write_deep(tmp_path / "y", kind, values)
    assert grey_of(tmp_path / "y")[1] == 16


@pytest.mark.parametrize("limits", [(0, 255, 8), (0, 256, 10), (900, 1024, 12), (0, 16384, 16)])
def test_the_used_depth_is_the_smallest_that_holds_the_values(tmp_path, limits):
    """8, 10, 12, 14 or 16 bits."""
    low, high, depth = limits
    values = np.linspace(low, high, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert grey_of(tmp_path / "x.png")[1] == depth


def test_a_tiff_whose_white_is_0_is_turned(tmp_path):
    """In 16 bits as in 8."""
    strip = (4095 - RAMP).astype("<u2").tobytes()
    tags = [
        (256, 4, 64),
        (257, 4, 64),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 0),
        (273, 4, 122),
        (277, 3, 1),
        (278, 4, 64),
        (279, 4, len(strip)),
    ]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    entries = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in tags)
    data = head + entries + b"\0\0\0\0"
    (tmp_path / "x.tif").write_bytes(data.ljust(122, b"\0") + strip)
    pixels, used = grey_of(tmp_path / "x.tif")
    assert np.abs(pixels - GREY).max() <= 1
    assert used == 12


def test_what_declares_its_depth_keeps_it(tmp_path):
    """A PGM tells its largest value, a JPEG 2000 stream its bits."""
    values = RAMP // 4
    head = b"P5\n64 64\n4095\n"
    (tmp_path / "x.pgm").write_bytes(head + values.astype(">u2").tobytes())
    stream = imagecodecs.jpeg2k_encode(values, codecformat="j2k", reversible=True, bitspersample=12)
    (tmp_path / "x.j2k").write_bytes(stream)
    for name in ("x.pgm", "x.j2k"):
        for depth in (None, 16):
            pixels, used = grey_of(tmp_path / name, depth)
            assert used is None
            assert np.abs(pixels - np.rint(values / 4095 * 255)).max() <= 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_an_orientation_is_applied_once(tmp_path, kind, orientation):
    """Also in a TIFF, which Pillow turns itself; the size is that of the image as it is shown."""
    image = Image.fromarray(GREY[:40])
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x", kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    expected = np.rot90(GREY[:40], upright)
    assert np.abs(grey_of(tmp_path / "x")[0] - expected).max() <= 1
    assert picture_size(tmp_path / "x") == expected.shape[::-1]


def exif_of(kind: int, count: int, value: bytes, further: bytes = b"") -> bytes:
    """EXIF data whose orientation has a type and value of TIFF 6.0, section 2, and one more tag."""
    tags = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0") + further
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags) // 12) + tags + bytes(4)


@pytest.mark.parametrize(
    ("exif", "is_turned"),
    [
        (exif_of(2, 2, b"6"), False),
        (exif_of(7, 4, b"6666"), False),
        (exif_of(3, 1, b"\x09"), False),
        (exif_of(3, 1, b"\xff\xff"), False),
        (exif_of(3, 1, b"\6", struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")), True),
        (exif_of(3, 1, b"\6", struct.pack("<HHI4s", 0x0132, 11, 1, b"abc")), True),
    ],
    ids=["text", "bytes", "9", "65535", "text as resolution", "float as date"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientations_that_are_none_and_damaged_tags_are_ignored(tmp_path, kind, exif, is_turned):
    """The image is shown as it is stored, or turned as the orientation says."""
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    Image.fromarray(GREY[:40]).save(tmp_path / "x", kind, exif=exif, **options)
    expected = np.rot90(GREY[:40], -1) if is_turned else GREY[:40]
    assert np.abs(grey_of(tmp_path / "x")[0] - expected).max() <= 2
    assert picture_size(tmp_path / "x") == expected.shape[::-1]


def test_the_size_of_what_cannot_be_read_is_not_told(tmp_path):
    """A text, a header that is cut, and no file; the decoder says what is wrong with them."""
    Image.fromarray(GREY).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    for name, content in (("cut.png", whole[:20]), ("text.png", b"no image")):
        (tmp_path / name).write_bytes(content)
        assert picture_size(tmp_path / name) is None
    assert picture_size(tmp_path / "none.png") is None


def test_several_pages_or_frames_are_refused(tmp_path):
    """Of TIFF, GIF, WebP and PNG: which of them were meant is not known."""
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        more = [Image.fromarray(255 - GREY)]
        Image.fromarray(GREY).save(tmp_path / "x", kind, save_all=True, append_images=more)
        with pytest.raises(CxrdistError, match=f"is not a readable {kind} .it has several pages"):
            grey_of(tmp_path / "x")


@pytest.mark.parametrize("white", [None, 255, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_several_pictures_in_a_pgm_or_ppm_are_refused(tmp_path, white, channels):
    """As ImageMagick stores the pages of a TIFF; one with a line end behind its values is read."""
    kind = 4 if white is None else 5 if channels == 1 else 6
    size = 64 * 8 if white is None else 64 * 64 * channels * (1 if white == 255 else 2)
    one = b"P%d\n64 64\n" % kind + (b"" if white is None else b"%d\n" % white) + b"\x50" * size
    (tmp_path / "one").write_bytes(one + b"\n")
    assert grey_of(tmp_path / "one")[0].shape == (64, 64)
    (tmp_path / "two").write_bytes(one + one)
    with pytest.raises(CxrdistError, match="it has several pages or frames"):
        grey_of(tmp_path / "two")


@pytest.mark.parametrize("dtype", ["f4", "i4"])
def test_float_and_32_bit_values_are_refused(tmp_path, dtype):
    """What their white is cannot be known; small integers of 32 bits can."""
    Image.fromarray((RAMP * 1.0 + 70000).astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(CxrdistError, match="signed, float or of 32 bits; expected 0 to 65535"):
        grey_of(tmp_path / "x.tif")


def test_12_bit_jpegs_and_16_bit_colours_of_few_bits_are_refused(tmp_path):
    """Pillow cannot read the one, and reads the upper 8 bits of the other."""
    data = imagecodecs.jpeg_encode(RAMP, 98, bitspersample=12)
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(CxrdistError, match=r"is not a readable JPEG \(it has 12 bits, expected 8"):
        grey_of(tmp_path / "x.jpg")
    colours = np.stack([RAMP] * 3, 2)
    colours[0, :4] = 65535  # hot pixels
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(colours))
    (tmp_path / "x.ppm").write_bytes(b"P6\n64 64\n65535\n" + colours.astype(">u2").tobytes())
    for name in ("x.png", "x.ppm"):
        with pytest.raises(CxrdistError, match="its 16-bit colours use few bits"):
            grey_of(tmp_path / name)
    (tmp_path / "y.png").write_bytes(imagecodecs.png_encode(np.stack([RAMP * 16] * 3, 2)))
    assert np.abs(grey_of(tmp_path / "y.png")[0] - GREY).max() <= 1


def write_transparent(file: Path, bits: int, colour: int, level: bytes, row: np.ndarray) -> None:
    """Write a PNG of 64 equal rows of 64 pixels of a colour type, one level of it transparent."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", 64, 64, bits, colour, 0, 0, 0),
        b"tRNS": level,
        b"IDAT": zlib.compress((b"\0" + row.tobytes()) * 64),
        b"IEND": b"",
    }
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_level_of_a_png_is_black(tmp_path, bits):
    """White, as tRNS says in the bits of the image (PNG, 11.3.2.1); the others stay."""
    white = (1 << bits) - 1
    values = np.linspace(0, white, 64).round().astype(np.uint16)
    row = np.unpackbits(values.astype(">u2").view(np.uint8)).reshape(64, 16)[:, 16 - bits :]
    write_transparent(tmp_path / "x.png", bits, 0, struct.pack(">H", white), np.packbits(row))
    expected = np.where(values == white, 0, np.rint(values / white * 255))
    assert np.array_equal(grey_of(tmp_path / "x.png")[0], np.tile(expected, (64, 1)))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_of_16_bits_is_refused(tmp_path, bits):
    """Pillow would make colours of 0x0700 to 0x07ff black, not the 7 of 16 bits that was meant."""
    values = np.repeat(np.arange(64) * (1 if bits == 8 else 256), 3)
    write_transparent(
        *(tmp_path / "x.png", bits, 2, struct.pack(">3H", 7, 7, 7)),
        values.astype(np.uint8 if bits == 8 else ">u2"),
    )
    if bits == 16:
        with pytest.raises(CxrdistError, match="one of its 16-bit colours is transparent; store"):
            grey_of(tmp_path / "x.png")
        return
    expected = np.where(np.arange(64) == 7, 0, np.arange(64))
    assert np.array_equal(grey_of(tmp_path / "x.png")[0], np.tile(expected, (64, 1)))


@pytest.mark.parametrize(("bits", "shape"), [(4, "grey"), (12, "colours"), (16, "colours")])
def test_jpeg_2000_that_pillow_reads_wrongly_is_refused(tmp_path, bits, shape):
    """It shows white of 4 bits as 240, and white of deep colours as black."""
    values = RAMP >> (12 - bits) if bits < 12 else RAMP << (bits - 12)
    values = values.astype(np.uint8) if bits <= 8 else values
    values = np.stack([values] * 3, 2) if shape == "colours" else values
    data = imagecodecs.jpeg2k_encode(values, reversible=True, bitspersample=bits)
    (tmp_path / "x.jp2").write_bytes(data)
    with pytest.raises(CxrdistError, match=f"it has {bits} bits, expected 8, or more in grey"):
        grey_of(tmp_path / "x.jp2")


def test_signed_bytes_are_refused(tmp_path):
    """Read as unsigned they would be folded: -1 white and 0 black."""
    Image.fromarray(GREY).save(tmp_path / "x.tif", tiffinfo={339: 2})
    with pytest.raises(CxrdistError, match="its values are signed; expected 0 and more"):
        grey_of(tmp_path / "x.tif")


@pytest.mark.parametrize("dtype", ["i1", "i2"])
def test_signed_jpeg_2000_is_refused(tmp_path, dtype):
    """Read as unsigned, 12 of its 16 bits would be 16 levels of grey in the middle."""
    values = (GREY - 128.0).astype(dtype)
    (tmp_path / "x.jp2").write_bytes(imagecodecs.jpeg2k_encode(values, reversible=True))
    with pytest.raises(CxrdistError, match="its values are signed; expected 0 and more"):
        grey_of(tmp_path / "x.jp2")


def test_jpeg_2000_with_its_colours_in_another_order_is_refused(tmp_path):
    """If red is the third component (cdef), grey is 121; Pillow takes the first for red: 87."""
    colours = np.empty((64, 64, 3), np.uint8)
    colours[:] = (20, 100, 200)
    Image.fromarray(colours).save(tmp_path / "x.jp2")
    data = (tmp_path / "x.jp2").read_bytes()
    start = data.index(b"jp2h") - 4
    end = start + int.from_bytes(data[start : start + 4], "big")
    files = []
    for order in ((1, 2, 3), (3, 2, 1)):
        cells = [number for channel in range(3) for number in (channel, 0, order[channel])]
        box = struct.pack(">I4sH9H", 28, b"cdef", 3, *cells)
        head = struct.pack(">I", end - start + len(box)) + data[start + 4 : end] + box
        files.append(data[:start] + head + data[end:])
        (tmp_path / f"{order[0]}.jp2").write_bytes(files[-1])
    assert [imagecodecs.jpeg2k_decode(file)[0, 0, 0] for file in files] == [20, 200]
    assert np.array_equal(grey_of(tmp_path / "1.jp2")[0], np.full((64, 64), 87))
    with pytest.raises(CxrdistError, match="its colours are in another order; store it as PNG"):
        grey_of(tmp_path / "3.jp2")
    # It claims more components than the file can hold.
    files[0] = files[0].replace(b"cdef\0\3", b"cdef\xff\xff")
    for size in range(len(files[0]) - 6, len(files[0])):
        (tmp_path / "x.jp2").write_bytes(files[0][:size])
        with pytest.raises(CxrdistError, match=r"x.jp2: is not a readable .*(header|pixels|order)"):
            grey_of(tmp_path / "x.jp2")


@pytest.mark.parametrize(
    ("values", "tags"),
    [(RAMP, {}), (GREY, {262: 0}), (GREY, {266: 2})],
    ids=["of 16 bits", "with 0 for white", "with reversed bits"],
)
def test_separate_planes_that_pillow_reads_wrongly_are_refused(tmp_path, values, tags):
    """Without compression: as bytes, as negatives, and with their bits in the wrong order."""
    image = Image.fromarray(values)
    image.save(tmp_path / "x.tif", tiffinfo={284: 2, **tags})
    with pytest.raises(CxrdistError, match=r"planes .* not supported without compression;"):
        grey_of(tmp_path / "x.tif")
    image.save(tmp_path / "y.tif", tiffinfo={284: 2}, compression="tiff_lzw")
    assert np.abs(grey_of(tmp_path / "y.tif")[0] - GREY).max() <= 1
    Image.fromarray(GREY).save(tmp_path / "z.tif", tiffinfo={284: 2})
    assert np.array_equal(grey_of(tmp_path / "z.tif")[0], GREY)


def test_a_tiff_that_is_cut_off_is_refused_without_warnings(tmp_path, recwarn):
    """One line, with words in place of the number of an error; those of Pillow name no file."""
    for name, options, reason in (
        ("raw", {}, "image file is truncated"),
        ("lzw", {"compression": "tiff_lzw"}, "its pixels are damaged, cut off or"),
    ):
        file = tmp_path / f"{name}.tif"
        Image.fromarray(GREY).save(file, "TIFF", **options)
        file.write_bytes(file.read_bytes()[:-64])
        with pytest.raises(CxrdistError, match=f"{name}.tif: is not a readable TIFF .{reason}"):
            grey_of(file)
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(CxrdistError, match=f"{name}.tif: is not a readable TIFF"):
            grey_of(file)
        assert picture_size(file) is None
    assert not recwarn.list


@pytest.mark.parametrize(
    ("old", "new"),
    [((273, 4), (273, 16)), ((65000, 3), (700, 3))],
    ids=["a place of 64 bits", "a number as XMP"],
)
def test_tags_of_a_wrong_type_are_one_line(tmp_path, old, new):
    """Those of a TIFF that a few bits were changed in (TIFF 6.0, section 2)."""
    Image.fromarray(GREY).save(tmp_path / "x.tif", tiffinfo={65000: 1})
    data = (tmp_path / "x.tif").read_bytes() + b"\xff" * 8
    place = data.index(struct.pack("<HHI", *old, 1))
    tag = struct.pack("<HHII", *new, 1, len(data) - 8)
    (tmp_path / "x.tif").write_bytes(data[:place] + tag + data[place + 12 :])
    with pytest.raises(CxrdistError, match=r"x\.tif: is not a readable TIFF .its header is dam"):
        grey_of(tmp_path / "x.tif")


def huge(kind: str) -> bytes:
    """A small file that says 16,000 x 16,000 pixels."""
    side = 16_000
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    data = bytearray(buffer.getvalue())
    if kind == "WEBP":
        data[21:25] = struct.pack("<L", (side - 1) | (side - 1) << 14)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ll", side, side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "PPM":
        return b"P5\n%d %d\n255\n" % (side, side) + bytes(100)
    return bytes(data)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "PPM"])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, kind):
    """By their size, with one line."""
    (tmp_path / "x").write_bytes(huge(kind))
    with pytest.raises(CxrdistError, match=rf"is not a readable {kind} .*(pixels|bomb)"):
        grey_of(tmp_path / "x")


@pytest.mark.parametrize(
    ("chunk", "options"),
    [
        (b"VP8L", {"lossless": True}),
        (b"VP8 ", {"quality": 50}),
        (b"VP8X", {"lossless": True, "xmp": b"x"}),
    ],
)
def test_a_webp_has_its_size_before_pillow_allocates_its_pixels(
    tmp_path, monkeypatch, chunk, options
):
    """The three kinds of RFC 9649; sides of 13 bits, with different low and high bytes."""
    file = tmp_path / "x.webp"
    Image.new("L", (1027, 5003)).save(file, **options)
    assert file.read_bytes()[12:16] == chunk
    assert picture_size(file) == (1027, 5003)
    monkeypatch.setattr("cxrdist.data.pictures.MOST_PIXELS", 1027 * 5003 - 1)
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(CxrdistError, match=r"is not a readable WEBP .1027 x 5003 pixels, expected"):
        grey_of(file)
    assert picture_size(file) is None


def test_programs_are_not_run_and_other_formats_are_named(tmp_path):
    """EPS, which Pillow gives to Ghostscript, and ICO are not among the formats."""
    for head in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0\0\1\0\1\0"):
        (tmp_path / "x.png").write_bytes(head)
        with pytest.raises(CxrdistError, match=r"unknown format\); expected PNG, JPEG, TIFF"):
            grey_of(tmp_path / "x.png")
