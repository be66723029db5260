"""Create DICOM results: a report of the probabilities of an X-ray, and its heat maps as images.

For each X-ray there is one Enhanced SR of template TID 1500 (DICOM PS3.16) with a measurement group
per class, and one Secondary Capture (PS3.3, A.8.1) per class. They belong to the study and patient
of the X-ray, in two new series, and each says that it is for research only.

Only the tags `COPIED` of an X-ray are copied. Values of tags are never printed.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import numpy as np
import pydicom
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sc import SCImage
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import Code, codes
from pydicom.uid import UID
from pydicom.valuerep import DA, TM

from cxrdist import __version__
from cxrdist.data.elements import RefusedError
from cxrdist.data.inputs import read_original
from cxrdist.data.pictures import read_file
from cxrdist.errors import CxrdistError
from cxrdist.explain.dicom_output import Output
from cxrdist.explain.heatmap import enlarged, overlay
from cxrdist.explain.pictures import Explained, Probability

RESEARCH_ONLY = "RESEARCH ONLY, not for diagnosis"
MOST_SIDE_PX = 1024
"""Longer side of a heat map's image, which takes 3 MB; 14 classes at 2048 px would take 170 MB."""

PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
HIERARCHY = ("StudyInstanceUID", "SeriesInstanceUID")
INSTANCE = ("SOPClassUID", "SOPInstanceUID")
COPIED = (
    *(*PATIENT, "IssuerOfPatientID", "PatientIdentityRemoved", "DeidentificationMethod"),
    *(*STUDY, "StudyDescription", *HIERARCHY, *INSTANCE, "PatientOrientation"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
MOST_CHARACTERS = 1024
"""Limit for a value that is copied; the standard allows 64 characters in most, 194 in names."""

CHECKED = (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM))
SCHEME = "99CXRDIST"
"""Designator of the private coding scheme of the classes (PS3.16, section 8.2)."""

PLAIN_CHEST_XRAY = Code("399208008", "SCT", "Plain chest X-ray")
CALIBRATED = Code("calibrated", SCHEME, "Sigmoid of the logit divided by its temperature")
NOT_CALIBRATED = Code("not-calibrated", SCHEME, "Sigmoid of the logit, not calibrated")
# Numbers of the two series in their study, higher than those that devices use.
HEAT_MAPS, REPORT = 9001, 9002


def make_results(explained: Explained, output: Output) -> tuple[dict[UID, bytes], list[str]]:
    """Make the heat maps of an X-ray and the report of its probabilities.

    Returns:
        Files of PS3.10 by SOPInstanceUID; and the names of UIDs that the X-ray lacks and that were
        created: StudyInstanceUID, SeriesInstanceUID.

    Raises:
        CxrdistError: its file is not a readable X-ray, or its tags cannot be used.
    """
    file, relevance = explained.file, explained.maps.relevance
    data = read_file(file)
    original = read_original(explained.item, output.how, MOST_SIDE_PX)
    pictures = [overlay(original, values, fit=output.how.fit) for values in relevance]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their texts may contain names of patients
            source, new_uids = _read_source(data, output)
            results: list[Dataset] = [
                _heat_map(source, picture, k, probability, output)
                for k, (picture, probability) in enumerate(
                    zip(pictures, explained.probabilities, strict=True)
                )
            ]
            results.append(_report(source, explained.probabilities, output))
            return dict(map(_encode, results)), new_uids
    except RefusedError as refused:
        raise CxrdistError(f"{file}: {refused}") from None
    except Exception as error:
        # pydicom and highdicom raise errors of any kind on damaged tags, with values in them.
        raise CxrdistError(
            f"{file}: its tags cannot be copied ({type(error).__name__}); export it again"
        ) from None


def _encode(result: Dataset) -> tuple[UID, bytes]:
    """Return the SOPInstanceUID of a result, and its content as a PS3.10 file."""
    buffer = io.BytesIO()
    result.save_as(buffer, enforce_file_format=True)
    return result.SOPInstanceUID, buffer.getvalue()


def _read_source(data: bytes, output: Output) -> tuple[Dataset, list[str]]:
    """Return the tags `COPIED` of an X-ray, and the names of UIDs that had to be created.

    Invalid dates and times become empty; everything else is copied unchanged, so that a PACS
    recognises the patient and the study. Elements of type 2 (PS3.5, section 7.4.3) are empty if
    absent.
    """
    # Forced, because exports may lack the preamble.
    dataset = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True)
    source = Dataset()
    for keyword in (*PATIENT, *STUDY):
        setattr(source, keyword, None)
    for element in (dataset[keyword] for keyword in COPIED if keyword in dataset):
        if len(str(element.value)) > MOST_CHARACTERS:
            raise RefusedError(f"its {element.keyword} has more than {MOST_CHARACTERS} characters")
        source.add(element)
    for keyword, kind in CHECKED:
        if not _is_valid(source[keyword].value, kind):
            setattr(source, keyword, None)
    if source.PatientSex not in ("M", "F", "O"):
        source.PatientSex = None
    # Then the method is required (PS3.3, C.7.1.1): the sequence that may replace it is not copied.
    if source.get("PatientIdentityRemoved") == "YES" and not source.get("DeidentificationMethod"):
        source.DeidentificationMethod = "See the source image"
    if not all(source.get(keyword) for keyword in INSTANCE):
        raise RefusedError("it has no SOPClassUID and SOPInstanceUID to refer to; export it again")
    if "Image Storage" not in UID(source.SOPClassUID).name:
        raise RefusedError("its SOPClassUID is not that of a standard image; export it as DX")
    new = [keyword for keyword in HIERARCHY if not source.get(keyword)]
    for keyword in new:
        setattr(source, keyword, output.uid(keyword))
    return source, new


def _is_valid(value: object, kind: Callable[[Any], object]) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _equipment(output: Output) -> dict[str, Any]:
    """Return the General Equipment module (PS3.3, C.7.5.1) and the character set of a result."""
    return {
        "manufacturer": "cxrdist",
        "manufacturer_model_name": "cxrdist",
        "software_versions": __version__,
        "device_serial_number": output.model_sha256,
        "specific_character_set": "ISO_IR 192",  # UTF-8
    }


def _heat_map(
    source: Dataset, picture: Image.Image, k: int, probability: Probability, output: Output
) -> SCImage:
    """Make the Secondary Capture of the heat map of class number k."""
    name = probability.name
    pixels = _captioned(picture, probability)
    image = SCImage(
        pixel_array=np.asarray(pixels),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=output.uid("heat maps"),
        series_number=HEAT_MAPS,
        series_description=f"{RESEARCH_ONLY}: cxrdist heat maps",
        sop_instance_uid=output.uid("heat map", name),
        instance_number=k + 1,
        **_equipment(output),
    )
    image.copy_patient_and_study_information(source)
    # highdicom requires an orientation, but it is unknown if the source image does not state it.
    image.PatientOrientation = source.get("PatientOrientation")
    image.BodyPartExamined = "CHEST"
    image.ConversionType = "WSD"  # workstation (PS3.3, C.8.6.1)
    image.BurnedInAnnotation = "YES"
    image.ImageComments = f"{RESEARCH_ONLY}. Relevance for {name} ({probability})"
    image.DerivationDescription = (
        f"Relevance (LRP) of the cxrdist {__version__} model {output.model_sha256} for {name}, "
        "red for the class, blue against it, over the source image"
    )
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    reference.PurposeOfReferenceCodeSequence = [sr.CodedConcept.from_code(purpose)]
    image.SourceImageSequence = [reference]
    for keyword in COPIED:
        if keyword.startswith("LossyImageCompression") and keyword in source:
            image.add(source[keyword])
    return image


def _captioned(picture: Image.Image, probability: Probability) -> Image.Image:
    """Add a caption above a picture, in its pixels so that no viewer can drop it."""
    picture, _ = enlarged(picture)
    lines = (
        RESEARCH_ONLY.upper(),
        f"cxrdist {__version__}: relevance for {probability.name} ({probability})",
        "red for the class, blue against it",
    )
    # Width of the longest line per pixel of the font's size. The 0.96 leaves room for the margin.
    widest = max(ImageFont.load_default(10).getlength(line) for line in lines) / 10
    size = min(picture.width / 32, 0.96 * picture.width / widest)
    margin = round(size / 2)
    height = round(len(lines) * 1.4 * size) + 2 * margin
    whole = Image.new("RGB", (picture.width, picture.height + height))
    whole.paste(picture, (0, height))
    ImageDraw.Draw(whole).multiline_text(
        (margin, margin), "\n".join(lines), font=ImageFont.load_default(size), spacing=0.3 * size
    )
    return whole


def _report(source: Dataset, probabilities: Sequence[Probability], output: Output) -> sr.EnhancedSR:
    """Make the structured report of the probabilities of an X-ray."""
    device = sr.DeviceObserverIdentifyingAttributes(
        # The same weights are the same device.
        uid=UID(f"2.25.{UUID(output.model_sha256[:32]).int}"),
        name="cxrdist",
        manufacturer_name="cxrdist",
        model_name=f"cxrdist {__version__}",
        serial_number=output.model_sha256,
    )
    content = sr.MeasurementReport(
        sr.ObservationContext(observer_device_context=sr.ObserverContext(codes.DCM.Device, device)),
        PLAIN_CHEST_XRAY,
        [_measured(source, probability, output) for probability in probabilities],
    )
    # highdicom's report takes no comment as an argument.
    content[0].ContentSequence.append(
        sr.TextContentItem(codes.DCM.Comment, RESEARCH_ONLY, sr.RelationshipTypeValues.CONTAINS)
    )
    return sr.EnhancedSR(
        evidence=[source],
        content=content,
        series_instance_uid=output.uid("reports"),
        series_number=REPORT,
        series_description=f"{RESEARCH_ONLY}: cxrdist probabilities",
        sop_instance_uid=output.uid("report"),
        instance_number=1,
        is_complete=True,
        coding_schemes=[CodingSchemeIdentificationItem(SCHEME, name="Classes of cxrdist")],
        **_equipment(output),
    )


def _measured(
    source: Dataset, probability: Probability, output: Output
) -> sr.MeasurementsAndQualitativeEvaluations:
    """Make the measurement group (TID 1501) of a class."""
    name = probability.name
    return sr.MeasurementsAndQualitativeEvaluations(
        sr.TrackingIdentifier(output.uid("class", name), name),
        finding_type=_coded(name),
        algorithm_id=sr.AlgorithmIdentification(
            "cxrdist",
            __version__,
            [f"sha256 of the model's weights: {output.model_sha256}", RESEARCH_ONLY],
        ),
        measurements=[
            sr.Measurement(
                codes.DCM.Probability,
                probability.value,
                codes.UCUM.NoUnits,
                method=CALIBRATED if probability.is_calibrated else NOT_CALIBRATED,
            )
        ],
        source_images=[
            sr.SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID)
        ],
    )


def _coded(name: str) -> Code:
    """Return the code of a class: a hash, since a code has at most 16 characters, a meaning 64."""
    meaning = "".join(c if c.isprintable() and c != "\\" else " " for c in name)[:64]
    return Code(hashlib.sha256(name.encode()).hexdigest()[:16], SCHEME, meaning)
