"""DICOM results: read back by pydicom and highdicom, and judged by dciodvfy."""

import shutil
import subprocess
from dataclasses import replace
from uuid import UUID

import numpy as np
import pydicom
import pytest
from dicoms import write_dicom
from highdicom.sr import srread
from PIL import ImageDraw
from pydicom.sr.codedict import codes
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    EnhancedSRStorage,
    SecondaryCaptureImageStorage,
)

from cxrdist.data.boxes import Box
from cxrdist.data.inputs import Input, Preparation, read_original
from cxrdist.errors import CxrdistError
from cxrdist.explain.dicom_output import Output, write_results
from cxrdist.explain.heatmap import overlay
from cxrdist.explain.maps import Map
from cxrdist.explain.pictures import Explained, Probability

STUDY = {
    "StudyInstanceUID": "1.2.3.4.5",
    "SeriesInstanceUID": "1.2.3.4.5.6",
    "StudyDate": "20240229",
    "StudyTime": "101112.5",
    "StudyID": "S-1",
    "StudyDescription": "Thorax p.a.",
    "AccessionNumber": "ACC-17",
    "ReferringPhysicianName": "Haus^Gregor",
    "PatientSex": "F",
    "IssuerOfPatientID": "Klinik",
    "PatientOrientation": ["R", "F"],
}
SHA = "0123456789abcdef" * 4
HOW = Preparation(32, "pad", None, "black", False)


def xray(file, **tags):
    """A radiograph of 400 x 300 px with a study, and further tags."""
    pixels = np.random.default_rng(3).integers(60, 190, (400, 300), np.uint8)
    return write_dicom(file, pixels, **{**STUDY, **tags})


def explained(file, names=("a", "b c")):
    """Relevance of one corner for each class, and probabilities, the first one calibrated."""
    relevance = np.zeros((len(names), 32, 32), np.float32)
    relevance[:, 10:14, 10:14] = 1
    found = Map("key", list(names), relevance, np.zeros((len(names), 4)))
    values = [Probability(name, 0.1234567 / (k + 1), k == 0) for k, name in enumerate(names)]
    return Explained(Input(file, file.name), found, values)


def output(directory):
    directory.mkdir(exist_ok=True)
    return Output(directory, HOW, SHA, UUID(int=7))


def results_of(file, directory, names=("a", "b c")):
    """The heat maps in order, and the report."""
    write_results(explained(file, names), output(directory))
    return read_all(directory)


def read_all(directory):
    found = [pydicom.dcmread(each) for each in directory.iterdir()]
    maps = [each for each in found if each.SOPClassUID == SecondaryCaptureImageStorage]
    (report,) = (each for each in found if each.SOPClassUID == EnhancedSRStorage)
    return sorted(maps, key=lambda each: each.InstanceNumber), report


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 192", "Müller"),
    ],
)
def test_results_are_of_the_patient_and_study_of_the_image(tmp_path, charset, name):
    """Tags of patient and study as in the image, in two new series, in any character set."""
    file = xray(tmp_path / "x.dcm", SpecificCharacterSet=charset, PatientName=name)
    maps, report = results_of(file, tmp_path / "out")
    image = pydicom.dcmread(file)
    copied = {*STUDY, "PatientID", "PatientBirthDate"} - {"SeriesInstanceUID", "PatientOrientation"}
    for result in (*maps, report):
        for keyword in copied:
            assert result[keyword].value == image[keyword].value, keyword
        assert str(result.PatientName) == name
        assert (tmp_path / "out" / f"{result.SOPInstanceUID}.dcm").is_file()
        assert result.file_meta.MediaStorageSOPInstanceUID == result.SOPInstanceUID
        assert result.SeriesDescription.startswith("RESEARCH ONLY, not for diagnosis")
    series = [each.SeriesInstanceUID for each in (image, *maps, report)]
    assert series[1] == series[2]
    assert len(set(series)) == 3
    assert len({each.SOPInstanceUID for each in (image, *maps, report)}) == 4
    assert [each.InstanceNumber for each in maps] == [1, 2]


def test_a_heat_map_shows_the_image_below_words(tmp_path):
    """The overlay pixel by pixel, below a caption; its tags tell what it is and of what."""
    lossy = {"LossyImageCompression": "01", "LossyImageCompressionRatio": 8}
    dx = DigitalXRayImageStorageForPresentation
    file = xray(tmp_path / "x.dcm", SOPClassUID=dx, **lossy)
    maps, _ = results_of(file, tmp_path / "out")
    original = read_original(Input(file, file.name), HOW)
    given = explained(file).maps.relevance
    for result, relevance, name in zip(maps, given, ("a", "b c"), strict=True):
        pixels = result.pixel_array
        caption, shown = pixels[:-400], pixels[-400:]
        np.testing.assert_array_equal(shown, overlay(original, relevance, fit="pad"))
        red = shown[..., 0].astype(int) - shown[..., 2]
        # Padded to 400 px, 10 to 14 of 32 are 125 to 175; 50 px of the bar are cut off.
        assert red[150, 100] > 50
        assert not red[300:].any()
        assert caption.max() > 200
        assert (caption[0] == 0).all()
        assert 20 < len(caption) < 100
        assert result.BurnedInAnnotation == "YES"
        assert result.ImageComments.startswith("RESEARCH ONLY, not for diagnosis")
        assert list(result.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert f"{SHA} for {name}," in result.DerivationDescription
        (source,) = result.SourceImageSequence
        image = pydicom.dcmread(file)
        assert source.ReferencedSOPInstanceUID == image.SOPInstanceUID
        assert source.ReferencedSOPClassUID == image.SOPClassUID
        assert (result.LossyImageCompression, result.LossyImageCompressionRatio) == ("01", 8)
        assert list(result.PatientOrientation) == ["R", "F"]


def test_the_words_are_burned_in(tmp_path, monkeypatch):
    """Research only, the class and its probability are drawn, and fit the width."""
    drawn, boxes = [], []

    def record(self, place, text, **settings):
        drawn.append(text)
        boxes.append(self.multiline_textbbox(place, text, **settings))

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", record)
    maps, _ = results_of(xray(tmp_path / "x.dcm"), tmp_path / "out", ("a", "b" * 90))
    for text, (left, top, right, bottom), result in zip(drawn, boxes, maps, strict=True):
        assert text.startswith("RESEARCH ONLY, NOT FOR DIAGNOSIS\n")
        assert min(left, top) >= 0
        assert right <= result.Columns
        assert bottom <= result.Rows - 400
    assert "relevance for a (probability 0.123, calibrated)" in drawn[0]
    assert "(probability 0.062, not calibrated)" in drawn[1]


def test_a_large_image_is_shown_smaller(tmp_path):
    """1100 x 2200 px become 512 x 1024, and a caption; a heat map of 2048 px would take 12 MB."""
    file = write_dicom(tmp_path / "x.dcm", np.zeros((2200, 1100), np.uint8), **STUDY)
    (first, _), _ = results_of(file, tmp_path / "out")
    assert first.Columns == 512
    assert 1024 < first.Rows < 1124


def test_the_report_has_the_probability_of_each_class(tmp_path):
    """By highdicom's reader: TID 1500, a group per class with value, method and algorithm."""
    file = xray(tmp_path / "x.dcm")
    _, report = results_of(file, tmp_path / "out")
    document = srread(tmp_path / "out" / f"{report.SOPInstanceUID}.dcm")
    assert (document.PreliminaryFlag, document.VerificationFlag) == ("PRELIMINARY", "UNVERIFIED")
    groups = document.content.get_image_measurement_groups()
    methods = []
    for group, name, expected in zip(groups, ("a", "b c"), (0.1234567, 0.06172835), strict=True):
        assert (group.tracking_identifier, group.finding_type.meaning) == (name, name)
        (measured,) = group.get_measurements(name=codes.DCM.Probability)
        assert measured.value == pytest.approx(expected, rel=1e-12)
        assert (measured.unit.value, measured.unit.scheme_designator) == ("1", "UCUM")
        methods.append(measured.method.value)
        (source,) = group.source_images
        uid = pydicom.dcmread(file).SOPInstanceUID
        assert source.referenced_sop_instance_uid == uid
        texts = texts_of(group[0].ContentSequence)
        assert texts["Algorithm Name"] == ["cxrdist"]
        assert any(SHA in text for text in texts["Algorithm Parameters"])
    assert methods == ["calibrated", "not-calibrated"]
    assert texts_of(report.ContentSequence)["Comment"] == ["RESEARCH ONLY, not for diagnosis"]
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == STUDY["StudyInstanceUID"]
    assert evidence.ReferencedSeriesSequence[0].SeriesInstanceUID == STUDY["SeriesInstanceUID"]


def texts_of(items):
    """Texts of content items, by the meaning of their names."""
    found = {}
    for item in items:
        if item.ValueType == "TEXT":
            found.setdefault(item.ConceptNameCodeSequence[0].CodeMeaning, []).append(item.TextValue)
    return found


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy (Debian's dicom3tools)")
@pytest.mark.parametrize("make", ["xray", "bare", "pseudonymous"])
def test_dciodvfy_finds_no_error(tmp_path, make):
    """Neither in results of a complete image, nor if it lacks its study, or a method it needs."""
    makers = {"xray": xray, "bare": bare, "pseudonymous": pseudonymous}
    results_of(makers[make](tmp_path / "x.dcm"), tmp_path / "out")
    for result in sorted((tmp_path / "out").iterdir()):
        done = subprocess.run(["dciodvfy", result], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        assert {"SCImage", "EnhancedSR"} & set(lines), lines
        assert not [line for line in lines if line.startswith("Error")], lines


def bare(file):
    """A radiograph without any of the tags of `STUDY`, and with none of its patient."""
    pixels = np.full((400, 300), 90, np.uint8)
    return write_dicom(file, pixels, PatientName=None, PatientID=None, PatientBirthDate=None)


def pseudonymous(file):
    """A radiograph that says that its patient's identity was removed, and not how."""
    return xray(file, PatientIdentityRemoved="YES")


def test_what_the_image_lacks_is_empty_or_new_and_named(tmp_path):
    """Elements of type 2 are there without a value; UIDs that must have one are new."""
    file = bare(tmp_path / "x.dcm")
    new = write_results(explained(file), output(tmp_path / "out"))
    assert new == ["StudyInstanceUID", "SeriesInstanceUID"]
    maps, report = read_all(tmp_path / "out")
    assert len({each.StudyInstanceUID for each in (*maps, report)}) == 1
    assert not any(each.PatientOrientation for each in maps)
    for keyword in ("PatientName", "PatientID", "PatientSex", "StudyDate", "AccessionNumber"):
        assert all(not each[keyword].value for each in (*maps, report)), keyword
    assert write_results(explained(xray(tmp_path / "y.dcm")), output(tmp_path / "other")) == []


def test_each_image_has_results_of_its_own(tmp_path):
    """Nothing of one patient is in another's files, even if two images share a SOPInstanceUID.

    An image that is predicted again in the same call replaces its results.
    """
    for number in (1, 2):
        tags = {"PatientName": f"Name{number}^X", "StudyInstanceUID": f"1.2.{number}"}
        xray(tmp_path / f"{number}.dcm", PatientID=f"ID-{number}", SOPInstanceUID="1.2.3", **tags)
    for number in (1, 2, 2):
        write_results(explained(tmp_path / f"{number}.dcm"), output(tmp_path / "out"))
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 6
    for file in files:
        data = file.read_bytes()
        owner = pydicom.dcmread(file).PatientID
        assert owner in ("ID-1", "ID-2")
        assert (b"Name1" in data, b"Name2" in data) == (owner == "ID-1", owner == "ID-2")
        assert (b"ID-1" in data, b"ID-2" in data) == (owner == "ID-1", owner == "ID-2")


def test_only_the_named_tags_are_copied(tmp_path):
    """Neither a comment, an operator nor a private element of the image is in its results."""
    file = xray(tmp_path / "x.dcm", PatientComments="SECRET-1", OperatorsName="SECRET-2")
    dataset = pydicom.dcmread(file)
    dataset.private_block(0x0011, "MAKER", create=True).add_new(1, "LO", "SECRET-3")
    dataset.save_as(file)
    results_of(file, tmp_path / "out")
    assert not any(b"SECRET" in each.read_bytes() for each in (tmp_path / "out").iterdir())


@pytest.mark.filterwarnings("error")
def test_an_invalid_date_is_left_empty(tmp_path, caplog):
    """So are times and sexes; nobody warns of the name, which would print it."""
    damaged = {"PatientBirthDate": "1964-8", "StudyDate": "yesterday", "StudyTime": "9:99"}
    file = xray(tmp_path / "x.dcm", PatientName="Onlyone", PatientSex="W", **damaged)
    maps, report = results_of(file, tmp_path / "out")
    for result in (*maps, report):
        assert str(result.PatientName) == "Onlyone"
        assert not any(result[keyword].value for keyword in (*damaged, "PatientSex"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"SOPInstanceUID": ""}, "x.dcm: it has no SOPClassUID and SOPInstanceUID to refer to"),
        ({"PatientID": "Secret" * 500}, "x.dcm: its PatientID has more than 1024 characters"),
        ({"SOPClassUID": "1.2.3.99"}, "x.dcm: its SOPClassUID is not that of a standard image"),
    ],
)
def test_tags_that_cannot_be_used_are_refused(tmp_path, tags, message):
    """In one line without a value of a tag, and nothing is written."""
    with pytest.raises(CxrdistError, match=message) as refused:
        results_of(xray(tmp_path / "x.dcm", **tags), tmp_path / "out")
    assert "Secret" not in str(refused.value)
    assert not any((tmp_path / "out").iterdir())


def test_any_class_name_fits(tmp_path):
    """A code has 16 characters and a meaning 64; the whole name is the tracking identifier."""
    names = ("a\\b\nc", "肺炎" * 60, "x" * 100 + "1", "x" * 100 + "2")
    _, report = results_of(xray(tmp_path / "x.dcm"), tmp_path / "out", names)
    document = srread(tmp_path / "out" / f"{report.SOPInstanceUID}.dcm")
    groups = document.content.get_image_measurement_groups()
    assert [group.tracking_identifier for group in groups] == [*names]
    assert groups[0].finding_type.meaning == "a b c"
    coded = [group.finding_type for group in groups]
    assert all(len(code.value) == 16 and len(code.meaning) <= 64 for code in coded)
    assert len({code.value for code in coded}) == 4


def test_boxes_of_text_are_covered_in_the_picture(tmp_path):
    """As in the heat maps of --explain."""
    file = xray(tmp_path / "x.dcm")
    given = explained(file)
    item = replace(given.item, boxes=(Box(0, 300, 100, 50, "R"),))
    write_results(replace(given, item=item), output(tmp_path / "out"))
    maps, _ = read_all(tmp_path / "out")
    assert not maps[0].pixel_array[-400:][310:340, 10:90].any()
