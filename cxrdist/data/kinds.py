"""Kinds of image files, recognised by their first bytes and never by their names."""

import re

HEAD_BYTES = 144  # enough for `kind_of`: the mark of a DICOM ends at byte 132
DICOM_PREAMBLE = 128  # bytes before DICM (DICOM PS3.10, section 7.1)
# Names are Pillow's, for the argument `formats` of Image.open.
SIGNATURES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    # Includes the size of the header, since a text may begin with BM.
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    # A file with boxes (JP2), or the bare codestream.
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "PPM": rb"P[1-6]\s+(#|\d)",
}
FORMATS = tuple(SIGNATURES)
_VR = rb"(AE|AS|CS|DA|DT|LO|OB|PN|SH|SQ|ST|TM|UI|UL|US|UT)"
# A data set without a preamble begins with an element of group 0002 or 0008. Its tag is followed by
# a VR, or by a length: 4 for a group length, else even and short.
BARE_DICOM = re.compile(
    rb"[\x02\x08]\0(\0\0\x04\0\0\0|..%b|[^\0][\0-\x1f][^\0]\0\0\0)|\0[\x02\x08]..%b" % (_VR, _VR),
    re.DOTALL,
)


def kind_of(head: bytes) -> str | None:
    """Return ``DICOM``, one of `FORMATS`, or None, by the first `HEAD_BYTES` bytes of a file."""
    # First, since a preamble may hold the header of another format, such as TIFF (PS3.10, 7.1).
    if head[DICOM_PREAMBLE : DICOM_PREAMBLE + 4] == b"DICM":
        return "DICOM"
    for kind, signature in SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            return kind
    return "DICOM" if BARE_DICOM.match(head) else None
