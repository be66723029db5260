"""CLAIM 2024: the Checklist for Artificial Intelligence in Medical Imaging.

Tejani et al., Radiology: Artificial Intelligence 6(4), e240300 (2024), 44 items. The topics
are paraphrased; the paper has the authoritative wording.
"""

from cxrdist.report import answers as a
from cxrdist.report.answers import Checklist, Item, authors

REFERENCE = "The labels came with the images; cxrdist did not make them."

CLAIM: Checklist = {
    "Title and abstract": (
        Item(
            "1",
            "The title or abstract names the kind of AI",
            authors("The run: a deep convolutional network."),
        ),
        Item("2", "Abstract: design, methods, results, conclusions", authors()),
    ),
    "Introduction": (
        Item("3", "Background, intended use and role of the AI", authors()),
        Item("4", "Aims and hypotheses", authors()),
    ),
    "Methods: study design": (
        Item("5", "Prospective or retrospective", authors()),
        Item("6", "Goal of the study", authors()),
    ),
    "Methods: data": (
        Item("7", "Sources of the data", a.sources),
        Item("8", "Who and what was included and excluded", a.selection),
        Item("9", "Preparation of the images", a.preparation),
        Item("10", "Choice of subsets of the data", a.selection),
        Item("11", "De-identification", a.privacy),
        Item("12", "Handling of missing data", a.missing_data),
        Item("13", "How the images were acquired", a.acquisition),
    ),
    "Methods: reference standard": (
        Item("14", "How the truth was established", authors(REFERENCE)),
        Item("15", "Reasons for this choice", authors(REFERENCE)),
        Item("16", "Who annotated, with what training", authors(REFERENCE)),
        Item("17", "How the test set was annotated", authors(REFERENCE)),
        Item("18", "Agreement between and within annotators", authors(REFERENCE)),
    ),
    "Methods: partitions and test data": (
        Item("19", "How data were assigned to partitions", a.partitions),
        Item("20", "Level at which partitions are disjoint", a.disjointness),
        Item("21", "Intended sample size", a.sample_size),
    ),
    "Methods: model": (
        Item("22", "Description of the model", a.model),
        Item("23", "Software, with versions", a.software),
        Item("24", "Initial parameters", a.initial_weights),
    ),
    "Methods: training": (
        Item("25", "How it was trained", a.training),
        Item("26", "How the final model was selected", a.final_model),
        Item("27", "Ensembles", a.ensemble),
    ),
    "Methods: evaluation": (
        Item("28", "Measures of performance", a.measures),
        Item("29", "Measures of significance and uncertainty", a.uncertainty),
        Item("30", "Robustness or sensitivity analysis", a.robustness),
        Item("31", "Explanation or interpretation", a.explanations),
        Item("32", "Evaluation on internal data", a.internal),
        Item("33", "Testing on external data", a.external),
        Item("34", "Registration as a clinical trial", authors()),
    ),
    "Results": (
        Item("35", "How many were included and excluded", a.flow),
        Item("36", "Patients of each partition", a.characteristics),
        Item("37", "Performance, with its uncertainty", a.performance),
        Item("38", "Diagnostic performance, with its precision", a.diagnostic),
        Item("39", "Analysis of the errors", a.failures),
    ),
    "Discussion and further information": (
        Item("40", "Limitations", a.limits),
        Item("41", "What it means for practice", authors()),
        Item("42", "Protocol, or further technical details", a.details),
        Item("43", "Availability of software, model and data", a.availability),
        Item("44", "Funding, and the role of the funders", authors()),
    ),
}
