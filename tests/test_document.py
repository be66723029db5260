"""JSON of anybody is read field by field, with types and bounds."""

import pytest

from cxrdist.document import Document, parse_document, read_bounded
from cxrdist.errors import CxrdistError


def document(**values) -> Document:
    return Document(values, "file.json", "copy it again", "a.")


@pytest.mark.parametrize("value", [True, 0, 11, -1, 1.0, "1", None, [1], 10**400, float("nan")])
def test_a_whole_number_has_its_type_and_bounds(value):
    """The line names file, field, value, bounds and mend; long values are cut."""
    with pytest.raises(CxrdistError) as error:
        document(n=value).whole("n", 1, 10)
    assert str(error.value).startswith("file.json: a.n is ")
    assert str(error.value).endswith("expected a whole number from 1 to 10; copy it again")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [[], [1, 2, 3, 4], [float("inf")], [float("nan")], [True], "1"])
def test_numbers_of_channels_are_finite(value):
    """One to three; a NaN is a number of no channel."""
    with pytest.raises(CxrdistError, match=r"a\.mean is "):
        document(mean=value).reals("mean")


@pytest.mark.parametrize("value", [[], ["a", "a"], ["a", ""], ["a|b"], ["a", 1], "ab", {"a": 1}])
def test_names_are_distinct_texts_without_the_separator(value):
    """Equal names, a text, an object: none of them is a list of classes."""
    with pytest.raises(CxrdistError, match=r"a\.classes is "):
        document(classes=value).names("classes", 10)


@pytest.mark.parametrize("value", ["\ud800", "a\0", "x" * 11, 1, None])
def test_a_text_can_be_written_again(value):
    """Half of a surrogate, which JSON may hold, cannot."""
    with pytest.raises(CxrdistError, match=r"a\.t is "):
        document(t=value).text("t", 10)


def test_what_is_missing_is_named_with_its_place():
    """As a path through the document."""
    inner = document(splits={"train": {"shards": [{}]}})
    shard = inner.object("splits").object("train").objects("shards", 5)[0]
    with pytest.raises(CxrdistError, match=r"a\.splits\.train\.shards\[0\]\.name is missing"):
        shard.text("name")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 10**5, b'{"a":' * 10**5, b"[]", b"1" * 5000, b"\xff\xfe", b"null"]
)
def test_what_is_no_object_is_one_line(data):
    """Cut, nested too deep, of another encoding, no object."""
    with pytest.raises(CxrdistError, match=r"^file\.json: .*; copy it again$"):
        parse_document(data, "file.json", "copy it again")


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path):
    """No more than its bound is read."""
    (tmp_path / "x").write_bytes(bytes(100))
    assert len(read_bounded(tmp_path / "x", 100, "mend")) == 100
    with pytest.raises(CxrdistError, match="larger than"):
        read_bounded(tmp_path / "x", 99, "mend")
