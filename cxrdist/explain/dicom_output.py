"""DICOM output: a new folder of results that appears when all of them are complete."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID, uuid4, uuid5

from pydicom.uid import UID

from cxrdist.data.images import is_dicom
from cxrdist.data.inputs import Preparation
from cxrdist.errors import CxrdistError, require_modules
from cxrdist.explain.pictures import Explained, Probability
from cxrdist.files import (
    atomic_directory,
    atomic_file,
    is_free,
    refuse_unwritable,
    room_for,
    sha256_of,
)
from cxrdist.model.prediction import Predictions
from cxrdist.terminal import few

MOST_NAMED = 3  # files in a line


@dataclass(frozen=True)
class Output:
    """Settings shared by the results of all X-rays in a call.

    Attributes:
        how: the preparation of the X-rays.
        model_sha256: of the model's weights.
        call: a random number; the UIDs are derived from it.
    """

    directory: Path
    how: Preparation
    model_sha256: str
    call: UUID

    def uid(self, *names: object) -> UID:
        """Derive a UID from names (PS3.5, B.2).

        An X-ray that is predicted twice in a call, with another depth, gets the same UIDs.
        """
        # repr keeps names apart that would be equal when joined.
        return UID(f"2.25.{uuid5(self.call, repr(names)).int}")


def refuse_bad_folder(folder: Path, *others: Path) -> None:
    """Check before the work starts that DICOM results can be written to a new or empty folder.

    Raises:
        CxrdistError: highdicom is not installed, the folder is not empty, or another output is
            written to it.
        RunFailedError: the folder above it is read-only.
    """
    require_modules("dicom", "highdicom", option="--dicom")
    if not is_free(folder):
        raise CxrdistError(f"--dicom {folder}: already exists; name a new or empty folder")
    if any(other.resolve().is_relative_to(folder.resolve()) for other in others):
        raise CxrdistError(f"--dicom {folder}: --out writes there, too; name a separate folder")
    refuse_unwritable(folder / "UID.dcm")


def refuse_other_images(files: Sequence[Path]) -> None:
    """Raise CxrdistError unless all images are DICOM."""
    others = [file for file in files if not is_dicom(file)]
    if others:
        raise CxrdistError(
            f"--dicom: {len(others)} of {len(files)} images are not DICOM and have no study to "
            f"add results to, the first: {others[0]}; give DICOM images only"
        )


@contextmanager
def open_output(folder: Path | None, model: Path, how: Preparation) -> Iterator[Output | None]:
    """Yield the output of the DICOM results of a call; None without a folder.

    ``model`` is the folder of the model's files.

    Raises:
        CxrdistError: the folder cannot be used.
        RunFailedError: the disk is full or read-only.
    """
    if folder is None:
        yield None
        return
    folder = folder.absolute()
    with room_for(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder) as directory:
        yield Output(directory, how, sha256_of(model / "model.safetensors"), uuid4())


def class_probabilities(predictions: Predictions) -> list[Probability]:
    """Return the probabilities of one image, calibrated if the model has a temperature."""
    calibrated = predictions.calibrated
    return [
        Probability(name, float(calibrated.get(name, raw)[0]), name in calibrated)
        for name, raw in predictions.probabilities.items()
    ]


def write_results(explained: Explained, output: Output) -> list[str]:
    """Write UID.dcm for the report of an X-ray, and for its heat map of each class.

    Returns:
        Names of UIDs that the X-ray lacks and that were created: StudyInstanceUID,
        SeriesInstanceUID.

    Raises:
        CxrdistError: its file is not a readable X-ray, or its tags cannot be used.
    """
    from cxrdist.explain.dicom_results import make_results  # highdicom is an extra

    own = replace(output, call=uuid5(output.call, str(explained.file)))  # has its own UIDs
    results, new_uids = make_results(explained, own)
    for uid, content in results.items():
        with atomic_file(output.directory / f"{uid}.dcm") as partial:
            partial.write_bytes(content)
    return new_uids


def tell_results(folder: Path, new_uids: Mapping[Path, Sequence[str]]) -> None:
    """Print where the results are, and which of them are not in the study of their image."""
    print(f"DICOM results, for research only: {folder}")
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        files = [str(file) for file, keywords in new_uids.items() if keyword in keywords]
        if files:
            listed = few(files, MOST_NAMED)
            print(f"{len(files)} images have no {keyword}; their results have a new one: {listed}")
