"""The checklist page: reporting checklists, filled in as far as a run can."""

from collections import Counter

from cxrdist.files import write_text
from cxrdist.report.answers import STATES, Answer, Checklist, Item
from cxrdist.report.claim import CLAIM
from cxrdist.report.evidence import Evidence
from cxrdist.report.page import template
from cxrdist.report.tripod import TRIPOD

Answered = dict[str, list[tuple[Item, Answer]]]  # by section
CHECKLISTS = (
    (
        "claim",
        "CLAIM 2024",
        "Checklist for Artificial Intelligence in Medical Imaging, 2024 update. Tejani et al., "
        "Radiology: Artificial Intelligence 2024, 6(4), e240300",
        "https://doi.org/10.1148/ryai.240300",
        CLAIM,
    ),
    (
        "tripod",
        "TRIPOD+AI",
        "Updated guidance for reporting clinical prediction models that use regression or machine "
        "learning methods. Collins et al., BMJ 2024, 385, e078378",
        "https://doi.org/10.1136/bmj-2023-078378",
        TRIPOD,
    ),
)


def write_checklist(evidence: Evidence) -> None:
    """Write ``RUN/checklist.html``: one file, the same bytes for the same run directory."""
    lists = [(*reference, *_answer(checklist, evidence)) for *reference, checklist in CHECKLISTS]
    name = evidence.run.root.resolve().name
    page = template("checklist.html.jinja").render(run=name, lists=lists)
    write_text(evidence.run.checklist, page)


def _answer(checklist: Checklist, evidence: Evidence) -> tuple[Answered, list[tuple[str, int]]]:
    """Answer each item, and count the answers by state."""
    answered = {
        section: [(item, item.answer(evidence)) for item in items]
        for section, items in checklist.items()
    }
    states = Counter(answer.state for items in answered.values() for _, answer in items)
    return answered, [(state, states[state]) for state in STATES]
