"""TRIPOD+AI: reporting of clinical prediction models that use regression or machine learning.

Collins et al., BMJ 385, e078378 (2024), Table 2: 27 items, 52 with their sub-items. The
topics are paraphrased; the paper has the authoritative wording.
"""

from cxrdist.report import answers as a
from cxrdist.report.answers import Checklist, Item, authors

TRIPOD: Checklist = {
    "Title and abstract": (
        Item("1", "Title: development or evaluation, population, outcome", authors()),
        Item("2", "Abstract, by the checklist for abstracts", authors()),
    ),
    "Introduction": (
        Item("3a", "Medical context, reason, existing models", authors()),
        Item("3b", "Target population, purpose, users", authors()),
        Item("3c", "Known inequalities between groups", authors()),
        Item("4", "Objectives: development, evaluation or both", authors()),
    ),
    "Methods: data and participants": (
        Item("5a", "Sources of the data of development and evaluation", a.sources),
        Item("5b", "Dates of collection", authors()),
        Item("6a", "Setting, number and place of the centres", authors()),
        Item("6b", "Who could take part", a.selection),
        Item("6c", "Treatments", authors()),
        Item("7", "Preparation and checks of the data", a.preparation),
    ),
    "Methods: outcome and predictors": (
        Item("8a", "The outcome, how and when it was assessed", a.outcome),
        Item("8b", "Who assessed it, where that takes judgement", authors()),
        Item("8c", "Blinding of that assessment", authors()),
        Item("9a", "Choice of the first predictors", a.predictors),
        Item("9b", "Definition and measurement of the predictors", a.acquisition),
        Item("9c", "Who assessed them, where that takes judgement", a.no_reading),
        Item("10", "Sample size, and whether it is enough", a.sample_size),
        Item("11", "Missing data", a.missing_data),
    ),
    "Methods: analysis": (
        Item("12a", "How the data were used and partitioned", a.partitions),
        Item("12b", "Handling of the predictors", a.preparation),
        Item("12c", "Kind of model, all steps of building it, internal validation", a.training),
        Item("12d", "Differences between clusters, such as hospitals", a.clusters),
        Item("12e", "Measures and plots of performance", a.measures),
        Item("12f", "Updating of the model, such as recalibration", a.updating),
        Item("12g", "How predictions were calculated", a.calculation),
        Item("13", "Handling of class imbalance", a.imbalance),
        Item("14", "Fairness", a.fairness),
        Item("15", "Output of the model, and thresholds", a.output),
        Item("16", "Differences between training and evaluation data", a.comparison),
        Item("17", "Ethical approval and consent", authors()),
    ),
    "Open science and involvement of patients": (
        Item("18a", "Funding, and the role of the funders", authors()),
        Item("18b", "Conflicts of interest", authors()),
        Item("18c", "Protocol", a.details),
        Item("18d", "Registration of the study", authors()),
        Item("18e", "Sharing of the data", authors()),
        Item("18f", "Sharing of the code", a.availability),
        Item("19", "Involvement of patients and the public", authors()),
    ),
    "Results": (
        Item("20a", "Flow of the participants, with and without the outcome", a.flow),
        Item("20b", "Characteristics, overall and by source", a.characteristics),
        Item("20c", "Comparison with the data of the development", a.comparison),
        Item("21", "Participants and events in each analysis", a.numbers),
        Item("22", "The whole model, for others to use and evaluate", a.specification),
        Item("23a", "Performance with intervals, also of groups", a.performance),
        Item("23b", "Differences of performance between clusters", a.clusters),
        Item("24", "Results of updating the model", a.updating),
    ),
    "Discussion": (
        Item("25", "Interpretation, with fairness", authors()),
        Item("26", "Limitations", a.limits),
        Item("27a", "Handling of poor or missing input in use", a.bad_input),
        Item("27b", "What users must do and know", authors()),
        Item("27c", "Next steps for research", authors()),
    ),
}
