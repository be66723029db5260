"""Public data sets of two or three images each, with all tables that their readers take."""

import json
from pathlib import Path

from PIL import Image

from cxrdist.data import chexpert, mimic_cxr, padchest, rsna_pneumonia, vindr_cxr

UUIDS = [f"{i:08x}-5c4a-4a3b-9f0e-{i:012x}" for i in range(3)]
DICOM_IDS = [f"{i:08x}-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd" for i in range(2)]


def _table(header: str, *rows: str) -> str:
    return "\n".join([header, *rows, ""])


_CHEXPERT = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{','.join(chexpert.LABELS)}"
_VINDR = ",".join(vindr_cxr.LABELS)
DOCUMENTS = {
    "chestxray14": {
        "Data_Entry_2017_v2020.csv": _table(
            "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position",
            "00000001_000.png,Cardiomegaly|Effusion,1,58,M,PA",
            "00000002_000.png,No Finding,2,81,F,AP",
        ),
        "train_val_list.txt": "00000001_000.png\n",
        "test_list.txt": "00000002_000.png\n",
        "BBox_List_2017.csv": _table(
            "Image Index,Finding Label,Bbox [x,y,w,h],,,",
            "00000001_000.png,Effusion,225.1,547.0,86.8,79.2",
        ),
        "runs.csv": _table(
            "Image Index,Left Lung,Right Lung,Height,Width,Dice RCA (Mean)",
            "00000001_000.png,1 40 100 20,300 9,32,32,0.9",
            "00000002_000.png,1 40,,32,32,0.8",
        ),
    },
    "chexpert": {
        "train.csv": _table(
            _CHEXPERT,
            f"x/train/patient00001/study1/view1_frontal.jpg,Male,68,Frontal,AP{',1.0' * 14}",
            f"x/train/patient00002/study1/view2_lateral.jpg,Female,7,Lateral,{',-1.0,' * 7}",
        ),
        "valid.csv": _table(
            _CHEXPERT, f"x/valid/patient3/study1/view1_frontal.jpg,Male,9,Frontal,PA{',0.0' * 14}"
        ),
    },
    "covidx": {
        "train.txt": "1 1.png positive cohen\nCOVID 2 2.png negative rsna\n",
        "test.txt": "3 3.png negative fig1\n",
    },
    "mimic-cxr": {
        mimic_cxr.METADATA: _table(
            "dicom_id,subject_id,study_id,ViewPosition,StudyDate,ViewCodeSequence_CodeMeaning",
            f"{DICOM_IDS[0]},10000032,50414267,PA,21800506,postero-anterior",
            f"{DICOM_IDS[1]},10000033,50414268,,21810506,lateral",
        ),
        mimic_cxr.CHEXPERT: _table(
            f"subject_id,study_id,{','.join(mimic_cxr.LABELS)}",
            f"10000032,50414267{',1.0,-1.0' * 7}",
            f"10000033,50414268{',,0.0' * 7}",
        ),
        mimic_cxr.SPLIT: _table(
            "dicom_id,study_id,subject_id,split",
            f"{DICOM_IDS[0]},50414267,10000032,train",
            f"{DICOM_IDS[1]},50414268,10000033,test",
        ),
        mimic_cxr.PATIENTS: _table(
            "subject_id,gender,anchor_age,anchor_year", "10000032,F,52,2180", "10000033,M,91,2181"
        ),
    },
    "padchest": {
        padchest.TABLE: _table(
            ",".join(padchest.COLUMNS),
            "1.png,83986,PA,\"['mass', 'nodule']\",PA,M,1960.0,20150622,Physician",
            "2.png,83987,L,\"['unchanged', 'mass', nan]\",LATERAL,F,1961,20150622,RNN_model",
        ),
    },
    "rsna-pneumonia": {
        rsna_pneumonia.BOXES: _table(
            "patientId,x,y,width,height,Target",
            f"{UUIDS[0]},264.0,152.0,213.0,379.0,1",
            f"{UUIDS[1]},,,,,0",
            f"{UUIDS[2]},,,,,0",
        ),
        rsna_pneumonia.READINGS: _table(
            "patientId,class",
            *(f"{x},{name}" for x, name in zip(UUIDS, rsna_pneumonia.CLASSES, strict=True)),
        ),
        rsna_pneumonia.MAPPING: json.dumps(
            [{"subset_img_id": x, "img_id": f"0000006{i}_00{i}.png"} for i, x in enumerate(UUIDS)]
        ),
    },
    "vindr-cxr": {
        "annotations/image_labels_train.csv": _table(
            f"image_id,rad_id,{_VINDR}", *(f"a,R{i}{',1,0' * 14}" for i in range(3))
        ),
        "annotations/annotations_train.csv": _table(
            "image_id,rad_id,class_name,x_min,y_min,x_max,y_max", "a,R1,ILD,1.5,2,20,30"
        ),
        "annotations/image_labels_test.csv": _table(f"image_id,{_VINDR}", f"b{',0,1' * 14}"),
    },
}
IMAGES = {
    "chestxray14": ("images/00000001_000.png", "images/00000002_000.png"),
    "chexpert": (
        *("train/patient00001/study1/view1_frontal.jpg", "valid/patient3/study1/view1_frontal.jpg"),
        "train/patient00002/study1/view2_lateral.jpg",
    ),
    "covidx": ("train/1.png", "train/2.png", "test/3.png"),
    "mimic-cxr": tuple(
        f"files/p10/p1000003{2 + i}/s5041426{7 + i}/{name}.jpg" for i, name in enumerate(DICOM_IDS)
    ),
    "padchest": ("0/1.png", "54/2.png"),
    "rsna-pneumonia": tuple(f"stage_2_train_images/{name}.png" for name in UUIDS),
    "vindr-cxr": ("train/a.png", "test/b.png"),
}


def write_public_set(folder: Path, source: str) -> list[Path]:
    """Write a data set.

    Returns:
        Its documents.
    """
    for name in IMAGES[source]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32)).save(folder / name)
    files = {folder / name: text for name, text in DOCUMENTS[source].items()}
    for file, text in files.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return list(files)
