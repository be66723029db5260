"""Maps of strangers: what is read of an npz is bounded."""

import struct
import zipfile

import numpy as np
import pytest

from cxrdist.explain.maps import read_ledgers

LEDGER = np.array([[3.0, 2.5, 0.4, 0.1]])


def npy(header_bytes: int) -> bytes:
    """The ledger in NumPy's format 1.0, its header filled up with spaces, as the format allows."""
    fields = "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 4)}"
    text = fields.ljust(header_bytes - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + LEDGER.tobytes()


@pytest.mark.parametrize(
    ("header_bytes", "is_read"), [(128, True), (1000, True), (1001, False), (60_000, False)]
)
def test_a_header_of_more_than_1000_bytes_is_damage(tmp_path, header_bytes, is_read):
    """NumPy's own take 128; a map with a longer one is computed again, as any damaged map is."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("ledger.npy", npy(header_bytes))
    whole = np.load(tmp_path / "a.npz", allow_pickle=True)  # lifts NumPy's own bound of 10 kB
    assert np.array_equal(whole["ledger"], LEDGER)
    ledgers = read_ledgers(tmp_path, ["a"], 1)
    assert np.array_equal(ledgers, [LEDGER]) if is_read else ledgers is None
