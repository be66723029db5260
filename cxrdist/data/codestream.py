"""Codestreams: the sample precision that a JPEG, JPEG-LS or JPEG 2000 declares, and its end."""

import struct

JPEG2000_SIZE = b"\xff\x4f\xff\x51"  # SOC and SIZ (ISO 15444-1, A.5.1), in a JP2 box or bare
# Start of frame (ITU-T T.81, table B.1; of JPEG-LS ITU-T T.87, C.1.1): not DHT, JPG and DAC.
FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # TEM, RST and SOI (ITU-T T.81, table B.1)


def precision(stream: bytes) -> tuple[int, bool] | None:
    """Return the bits per sample of the first component, and whether samples are signed.

    None is returned if no header declares them.
    """
    if stream[:2] == b"\xff\xd8":
        return _jpeg_precision(stream)
    start = stream.find(JPEG2000_SIZE, 0, 1 << 16)
    if start < 0 or len(stream) < start + 43:
        return None
    depth = stream[start + 42]  # Ssiz of the first component, behind 38 bytes of SIZ and 4 of marks
    return (depth & 0x7F) + 1, depth >= 0x80


def is_reordered(stream: bytes) -> bool:
    """Return whether a JP2 has its colours in another order (cdef, ISO 15444-1, I.5.3.6)."""
    start = stream.find(b"cdef", 0, max(0, stream.find(JPEG2000_SIZE))) + 4
    if start < 4:
        return False
    entries = stream[start + 2 : start + 2 + 6 * int.from_bytes(stream[start : start + 2], "big")]
    # Channels count from 0, the colours that they hold from 1; a channel of type 0 holds a colour.
    return any(
        kind == 0 and 0 < colour < 0xFFFF and colour != channel + 1
        for channel, kind, colour in struct.iter_unpack(">3H", entries)
    )


def is_cut_off(stream: bytes) -> bool:
    """Return whether the last scan of a JPEG or JPEG-LS has no end (ITU-T T.81, B.1.1.2).

    Neither marker occurs within the data of a scan. libjpeg fills what is missing with grey, and
    CharLS takes long to refuse it: 3 seconds for a picture of 128 x 160 pixels.
    """
    is_jpeg, scan, end = stream[:2] == b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
    return is_jpeg and stream.rfind(end) < stream.rfind(scan)


def _jpeg_precision(stream: bytes) -> tuple[int, bool] | None:
    """Read the precision from the frame header, skipping the marker segments before it."""
    start = 2
    while start + 5 <= len(stream) and stream[start] == 0xFF:
        marker = stream[start + 1]
        if marker in FRAMES:
            return stream[start + 4], False  # behind marker and length (ITU-T T.81, B.2.2)
        if marker == 0xFF:  # a fill byte
            start += 1
        elif marker in WITHOUT_LENGTH:
            start += 2
        else:
            start += 2 + int.from_bytes(stream[start + 2 : start + 4], "big")
    return None
