"""PadChest (Bustos et al. 2020) as published by BIMCV.

Labels are those of an image's report, given by a physician or, for 73 % of the reports, by a
network that read it (MethodLabel). A label that the report does not name is absent. Suspected
findings count as present: no label is ever uncertain. Four labels are remarks on the report rather
than classes; for the first two, the authors' own counts confirm this (github.com/auriml/
Rx-thorax-automatic-captioning, util.py):

- ``normal``: no finding.
- ``exclude``: alone, the report states neither a finding nor that there is none, and the image is
  left out; next to other labels it concerns one sentence and is ignored.
- ``suboptimal study``: about the image's quality; alone it is treated like ``exclude``.
- ``unchanged``: an unknown earlier report still holds. Alone, the image is left out; next to
  findings, all labels that are not named are missing.

Not read: ImageDir (an image's name is unique), the report and its sentences, anatomical locations,
concept identifiers (labelCUIS), the hierarchy of the labels, Pediatric, StudyID and the technical
columns of the DICOM files.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from cxrdist.data.labels import SEPARATOR
from cxrdist.data.listed import Listed
from cxrdist.data.patients import MOST_YEARS, age_of, refuse_rounded, sex_of
from cxrdist.data.records import LabelCells, Record, Source, own_patient
from cxrdist.data.tables import Table, read_table
from cxrdist.data.views import UNKNOWN, view_of
from cxrdist.errors import CxrdistError

NAME = "PadChest"
TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
TABLES = (TABLE, f"{TABLE}.gz")
NEEDED = ("ImageID", "PatientID", "Projection", "Labels")
COLUMNS = (
    *NEEDED,
    *("ViewPosition_DICOM", "PatientSex_DICOM", "PatientBirth", "StudyDate_DICOM", "MethodLabel"),
)
# 0/ to 54/ as the zip files unpack, or all in one folder; resized copies are in images-224/ ...
IMAGE = re.compile(r"(?:[^/]*images?[^/]*/)*(?:\d{1,2}/)?([^/]+)", re.IGNORECASE)

# The 174 findings and 19 differential diagnoses of the released table without `REMARKS`, as listed
# in the authors' notebook (image_prediction/Dataset-maintenance.ipynb).
LABELS = (
    *("COPD signs", "Chilaiditi sign", "NSG tube", "abnormal foreign body", "abscess"),
    *("adenopathy", "air bronchogram", "air fluid level", "air trapping", "alveolar pattern"),
    *("aortic aneurysm", "aortic atheromatosis", "aortic button enlargement", "aortic elongation"),
    *("aortic endoprosthesis", "apical pleural thickening", "artificial aortic heart valve"),
    *("artificial heart valve", "artificial mitral heart valve", "asbestosis signs"),
    *("ascendent aortic elongation", "atelectasis", "atelectasis basal", "atypical pneumonia"),
    *("axial hyperostosis", "azygoesophageal recess shift", "azygos lobe", "blastic bone lesion"),
    *("bone cement", "bone metastasis", "breast mass", "bronchiectasis"),
    *("bronchovascular markings", "bullas", "calcified adenopathy", "calcified densities"),
    *("calcified fibroadenoma", "calcified granuloma", "calcified mediastinal adenopathy"),
    *("calcified pleural plaques", "calcified pleural thickening", "callus rib fracture"),
    *("cardiomegaly", "catheter", "cavitation", "central vascular redistribution"),
    *("central venous catheter", "central venous catheter via jugular vein"),
    *("central venous catheter via subclavian vein", "central venous catheter via umbilical vein"),
    *("cervical rib", "chest drain tube", "chronic changes", "clavicle fracture", "consolidation"),
    *("costochondral junction hypertrophy", "costophrenic angle blunting", "cyst", "dai"),
    *("descendent aortic elongation", "dextrocardia", "diaphragmatic eventration"),
    *("double J stent", "dual chamber device", "electrical device", "emphysema", "empyema"),
    *("end on vessel", "endoprosthesis", "endotracheal tube", "esophagic dilatation"),
    *("external foreign body", "fibrotic band", "fissure thickening", "flattened diaphragm"),
    *("fracture", "gastrostomy tube", "goiter", "granuloma", "ground glass pattern"),
    *("gynecomastia", "heart insufficiency", "heart valve calcified", "hemidiaphragm elevation"),
    *("hiatal hernia", "hilar congestion", "hilar enlargement", "humeral fracture"),
    *("humeral prosthesis", "hydropneumothorax", "hyperinflated lung", "hypoexpansion"),
    *("hypoexpansion basal", "increased density", "infiltrates", "interstitial pattern"),
    *("kerley lines", "kyphosis", "laminar atelectasis", "lepidic adenocarcinoma", "lipomatosis"),
    *("lobar atelectasis", "loculated fissural effusion", "loculated pleural effusion"),
    *("lung metastasis", "lung vascular paucity", "lymphangitis carcinomatosa"),
    *("lytic bone lesion", "major fissure thickening", "mammary prosthesis", "mass", "mastectomy"),
    *("mediastinal enlargement", "mediastinal mass", "mediastinal shift"),
    *("mediastinic lipomatosis", "metal", "miliary opacities", "minor fissure thickening"),
    *("multiple nodules", "nephrostomy tube", "nipple shadow", "nodule"),
    *("non axial articular degenerative changes", "obesity", "osteopenia", "osteoporosis"),
    *("osteosynthesis material", "pacemaker", "pectum carinatum", "pectum excavatum"),
    *("pericardial effusion", "pleural effusion", "pleural mass", "pleural plaques"),
    *("pleural thickening", "pneumomediastinum", "pneumonia", "pneumoperitoneo", "pneumothorax"),
    *("post radiotherapy changes", "prosthesis", "pseudonodule", "pulmonary artery enlargement"),
    *("pulmonary artery hypertension", "pulmonary edema", "pulmonary fibrosis"),
    *("pulmonary hypertension", "pulmonary mass", "pulmonary venous hypertension"),
    *("reservoir central venous catheter", "respiratory distress"),
    *("reticular interstitial pattern", "reticulonodular interstitial pattern", "rib fracture"),
    *("right sided aortic arch", "round atelectasis", "sclerotic bone lesion", "scoliosis"),
    *("segmental atelectasis", "single chamber device", "soft tissue mass"),
    *("sternoclavicular junction hypertrophy", "sternotomy", "subacromial space narrowing"),
    *("subcutaneous emphysema", "superior mediastinal enlargement", "supra aortic elongation"),
    *("surgery", "surgery breast", "surgery heart", "surgery humeral", "surgery lung"),
    *("surgery neck", "suture material", "thoracic cage deformation", "total atelectasis"),
    *("tracheal shift", "tracheostomy tube", "tuberculosis", "tuberculosis sequelae"),
    *("vascular hilar enlargement", "vascular redistribution", "ventriculoperitoneal drain tube"),
    *("vertebral anterior compression", "vertebral compression", "vertebral degenerative changes"),
    *("vertebral fracture", "volume loss"),
)
NORMAL, UNCHANGED = "normal", "unchanged"
REMARKS = {NORMAL, UNCHANGED, "exclude", "suboptimal study"}
SPELLINGS = {name.casefold(): name for name in (*LABELS, *REMARKS)}

NOTHING = {"", "nan", "none"}  # as Python programs write a missing value
ITEM = re.compile(r"""'([^']*)'|"([^"]*)"|\b(?:nan|None)\b""")
YEAR = re.compile(r"(\d{4})(?:\d{4})?(?:\.0)?")  # 1960.0 of a birth, 20150622 of a study
NETWORK = "RNN_model"


def read_padchest(folder: Path, besides: Sequence[Path] = ()) -> Source:
    """Read the table and the images that exist.

    The folder has the table, which may stay compressed, and the images, in ``0/`` to ``54/`` or in
    one folder; a copy may have smaller images with the same names. Folders in ``besides`` are
    skipped. PadChest has no official splits. Classes are `LABELS`, even if only some of the images
    exist, and further labels of the table. Images without a row, rows without an image, and images
    without a known label are left out.

    Raises:
        CxrdistError: there is no table, or a row is malformed.
    """
    file = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if file is None:
        raise CxrdistError(f"--input {folder}: has neither {' nor '.join(TABLES)}")
    table = read_table(file, COLUMNS)
    # In a pass of its own: all classes must be known before a record lists its missing ones.
    stated = (_read_labels(where, cells["Labels"]) for where, cells in _rows(table))
    further = {label for labels in stated for label in labels}.difference(LABELS, REMARKS)
    classes = sorted({*LABELS, *further})
    listed = Listed(folder, IMAGE, besides)
    records, methods = _read_records(table, listed, classes)
    notes = (*table.notes, *listed.notes(file), *_notes(records, methods, further))
    return Source(records, "multilabel", classes, NAME, notes, *listed.account())


def _read_records(
    table: Table, listed: Listed, classes: Sequence[str]
) -> tuple[list[Record], Counter[str]]:
    """Return the records of images that exist and have known labels, and count MethodLabels."""
    records, methods, seen = [], Counter[str](), dict[str, str]()
    for where, cells in _rows(table):
        name = Path(cells["ImageID"]).stem
        if not name:
            raise CxrdistError(f"{where}: ImageID is empty; fetch the table again")
        if (first := seen.setdefault(name, where)) != where:
            raise CxrdistError(f"{where}: {name} is also in {first}; remove one of the rows")
        taken = listed.take(name)
        if taken is None:
            continue
        labels = _read_labels(where, cells["Labels"])
        if reason := _why_unknown(labels):
            listed.leave(taken[1], reason)
            continue
        methods[cells["MethodLabel"]] += 1
        # An unknown word (None) in the first gives way to the tag, as an empty cell does.
        views = (view_of(cells[name]) for name in ("Projection", "ViewPosition_DICOM"))
        record = Record(
            *taken,
            patient=_patient(where, cells["PatientID"]) or own_patient(taken[1]),
            source=NAME,
            view=next(filter(None, views), UNKNOWN),
            sex=sex_of(cells["PatientSex_DICOM"]),
            age=_age(cells["StudyDate_DICOM"], cells["PatientBirth"]),
            **_known(labels, classes),
        )
        records.append(record)
    return records, methods


def _rows(table: Table) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield file and number of each row, and its cells by `COLUMNS`, empty for missing columns."""
    for where, cells in table.cells(COLUMNS, NEEDED):
        yield where, dict.fromkeys(COLUMNS, "") | cells


def _is_nothing(text: str) -> bool:
    return text.casefold() in NOTHING


def _read_labels(where: str, text: str) -> list[str]:
    """Read a Python list of texts, such as ``['cardiomegaly', ' pleural effusion', '', nan]``.

    Each label is returned once, spelt as in `LABELS` or `REMARKS`; none for an empty text.
    """
    if _is_nothing(text):
        return []
    inside = text[1:-1] if text[0] == "[" and text[-1] == "]" else text
    # Refused: no brackets around it, or anything but commas and blanks between the items.
    if inside is text or ITEM.sub("", inside).replace(",", "").strip():
        raise CxrdistError(
            f"{where}: Labels is {text!r:.80}, expected a list such as ['cardiomegaly', 'nodule']; "
            "fetch the table again"
        )
    names = (" ".join((item[1] or item[2] or "").split()) for item in ITEM.finditer(inside))
    spelt = (SPELLINGS.get(name.casefold(), name) for name in names if not _is_nothing(name))
    return list(dict.fromkeys(spelt))


def _why_unknown(labels: Sequence[str]) -> str:
    """Return why labels tell nothing about an image; empty if they do."""
    if not labels:
        return "has no labels in the table"
    if NORMAL in labels or {*labels} - REMARKS:
        return ""
    if UNCHANGED in labels:
        return "its report tells no finding but that nothing has changed (unchanged)"
    return "its report tells no finding (exclude, suboptimal study)"


def _known(labels: Sequence[str], classes: Sequence[str]) -> LabelCells:
    """Return the labels of a record, and those that are missing."""
    findings = {*labels} - REMARKS
    missing = {*classes} - findings if UNCHANGED in labels and NORMAL not in labels else ()
    return {"label": SEPARATOR.join(sorted(findings)), "missing": SEPARATOR.join(sorted(missing))}


def _patient(where: str, text: str) -> str:
    refuse_rounded(where, text)
    return "" if _is_nothing(text) else text


def _age(study: str, birth: str) -> float | None:
    """Return the years from birth to study; the table hides the day of the birth."""
    years = YEAR.fullmatch(study), YEAR.fullmatch(birth)
    # `age_of` takes digits only, so a birth after the study gives None.
    return age_of(str(int(years[0][1]) - int(years[1][1]))) if years[0] and years[1] else None


def _notes(
    records: Sequence[Record], methods: Counter[str], further: Collection[str]
) -> Iterator[str]:
    yield "has no official splits: they are drawn here, by patient"
    if further:
        yield (
            f"{len(further)} labels of the table are not among the {len(LABELS)} known ones, and "
            f"become classes too, such as {min(further)!r:.40}"
        )
    if methods[NETWORK]:
        yield (
            f"{methods[NETWORK]} of {len(records)} images have labels that a network read from the "
            f"report (MethodLabel {NETWORK}); the others have labels of a physician"
        )
    for number, what in (
        (
            sum(bool(record.missing) for record in records),
            "a report that says unchanged: labels that it does not name are missing",
        ),
        (sum(not record.view for record in records), "a projection that is not known"),
        (sum(record.age is None for record in records), f"no age from 0 to {MOST_YEARS:g} years"),
    ):
        if number:
            yield f"{number} images have {what}"
