"""The precision and the end of streams, built by the tables of the standards."""

import struct

import pytest

from cxrdist.data.codestream import is_cut_off, precision

# ITU-T T.81, table B.1: start of frame 0 to 15, of which 4, 8 and 12 are other markers.
FRAMES = {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}
JPEG_LS = 0xF7  # ITU-T T.87, C.1.1


def jpeg2000(ssiz: int) -> bytes:
    """The head of a stream of one component, up to its Ssiz (ISO 15444-1, A.5.1)."""
    sizes = struct.pack(">HH8IH", 41, 0, 64, 64, 0, 0, 64, 64, 0, 0, 1)
    return b"\xff\x4f\xff\x51" + sizes + bytes([ssiz])


def jpeg(marker: int, bits: int) -> bytes:
    """A JPEG that begins with a marker segment of 8 bytes, as a frame header with no components."""
    return struct.pack(">4BHB2HB", 0xFF, 0xD8, 0xFF, marker, 8, bits, 64, 64, 0)


@pytest.mark.parametrize("box", [b"", b"\0\0\0\0jp2c"])
@pytest.mark.parametrize(
    ("ssiz", "declared"), [(0x07, (8, False)), (0x0B, (12, False)), (0x8F, (16, True))]
)
def test_a_jpeg_2000_declares_bits_less_one_and_the_sign(box, ssiz, declared):
    """Bare or in a box; a stream that ends before Ssiz declares nothing."""
    assert precision(box + jpeg2000(ssiz)) == declared
    assert precision(box + jpeg2000(ssiz)[:-1]) is None


def test_a_jpeg_declares_its_bits_in_each_kind_of_frame():
    """The bytes of no other marker segment are taken for them."""
    declaring = {m for m in range(0x01, 0x100) if precision(jpeg(m, 12)) == (12, False)}
    assert declaring == FRAMES | {JPEG_LS}


def test_what_comes_before_the_frame_is_skipped():
    """A marker without a length, a segment that looks like a frame, and bytes that fill."""
    segment = b"\xff\xe0" + struct.pack(">H", 8) + b"\xff\xc0\0\x08\x10\0"
    assert precision(b"\xff\xd8" + b"\xff\x01" + segment + b"\xff\xff" + jpeg(0xC0, 8)[2:]) == (
        8,
        False,
    )


def test_a_jpeg_is_cut_off_without_an_end_behind_its_last_scan():
    """The end of a small picture in a segment before it does not count; more bytes may follow."""
    small, scan, end = jpeg(0xC0, 8) + b"\xff\xd9", b"\xff\xda\0\x08data", b"\xff\xd9"
    head = b"\xff\xd8\xff\xe1" + struct.pack(">H", 2 + len(small)) + small + jpeg(0xC0, 8)[2:]
    assert is_cut_off(head + scan)
    assert is_cut_off(head + scan + end + scan)
    assert not is_cut_off(head + scan + end)
    assert not is_cut_off(head + scan + end + b"\0\0\0")
    assert not is_cut_off(jpeg2000(0x07))
