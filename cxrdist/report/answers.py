"""Rules that answer the items of reporting checklists from the evidence of a run."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from cxrdist.data.labels import NOT_STATED
from cxrdist.evaluate.metrics import SCORES
from cxrdist.report.evidence import Evidence
from cxrdist.report.values import count

HELD, PARTLY, AUTHORS, NOT_DONE = "in the run", "partly", "the authors must say", "not done"
STATES = (HELD, PARTLY, AUTHORS, NOT_DONE)


class Answer(NamedTuple):
    """The answer to an item.

    Attributes:
        state: one of `STATES`.
        text: what the run documents, what the authors must state, or how to do it.
        links: files of the run, optionally with a section of the report.
    """

    state: str
    text: str
    links: tuple[str, ...] = ()


def held(text: str, links: tuple[str, ...] = ()) -> Answer:
    """Return what the run documents."""
    return Answer(HELD, text, links)


def partly(text: str, links: tuple[str, ...] = ()) -> Answer:
    """Return what the run documents, and what the authors must state."""
    return Answer(PARTLY, text, links)


def authors(text: str = "") -> Answer:
    """Return that only the authors can answer."""
    return Answer(AUTHORS, text)


def not_done(text: str) -> Answer:
    """Return how to do what was not done."""
    return Answer(NOT_DONE, text)


Rule = Callable[[Evidence], Answer]


class Item(NamedTuple):
    """An item of a checklist: its number, its topic in our own words, and its rule."""

    number: str
    topic: str
    rule: Answer | Rule
    """The answer for every run, or how it follows from a run."""

    def answer(self, evidence: Evidence) -> Answer:
        """Return the answer for a run."""
        return self.rule if isinstance(self.rule, Answer) else self.rule(evidence)


Checklist = dict[str, tuple[Item, ...]]
"""The items by section."""

NOT_EVALUATED = not_done("Run cxrdist evaluate --run RUN --shards SHARDS --split test.")

selection = partly(
    "The images that were used are counted by class and split; rejected.csv of the shards lists "
    "what cxrdist pack left out, and why. The authors must say by which criteria patients were "
    "selected before that.",
    ("report.html#data",),
)

flow = partly(
    "Images and patients of each class and split; rejected.csv of the shards lists what cxrdist "
    "pack left out. The authors must say who was excluded before that.",
    ("report.html#data",),
)

numbers = held(
    "Images and patients of each class for training (train), for selection and calibration (val) "
    "and for evaluation (test).",
    ("run.json", "report.html#data"),
)

no_reading = held("The input is pixels; nobody has to assess them first.")

bad_input = partly(
    "cxrdist predict lists files that cannot be read and predicts all others, even poor X-rays and "
    "images that are not X-rays. The authors must say how to detect and handle these."
)


def sources(e: Evidence) -> Answer:
    """Return where the images come from."""
    sizes = [f"{name} {count(n['images'])}" for name, n in e.info["shards"]["totals"].items()]
    counted = "; their sources are counted in the audit" if e.audit else ""
    return partly(
        f"Images by split: {', '.join(sizes)}{counted}. The authors must say who collected them, "
        "where, when and why these were chosen.",
        ("run.json", "report.html#data", *_if(e.audit, "audit.json")),
    )


def preparation(e: Evidence) -> Answer:
    """Return how images are prepared."""
    shards, warp = e.info["shards"], e.recipe.get("augmentation")
    made = f"made square by {shards['fit']} and " if shards.get("fit") else ""
    text = f"Images are {made}scaled to {shards['image_size_px']} px, then normalised."
    if warp:
        shown = ", ".join(f"{name} {_short(value)}" for name, value in warp.items())
        text += f" Augmentation in training only: {shown}."
    return held(text, (*_if(e.model, "model/model.json"), *_if(e.recipe, "recipe.yaml")))


def privacy(e: Evidence) -> Answer:
    """Return how patients were de-identified."""
    text = (
        f"Burned-in text was covered ({e.cover.how}) in {e.cover.split}. "
        if e.cover
        else "Burned-in text was not covered by cxrdist. "
    )
    return partly(
        f"{text}The authors must say how names, dates and identifiers were removed.",
        (*_if(e.model, "model/model.json"),),
    )


def missing_data(e: Evidence) -> Answer:
    """Return how unknown labels were handled."""
    counts = e.info["shards"]["counts"]
    amounts = [amount for labels in counts.values() for amount in labels.values()]
    sums = {what: sum(amount.get(what, 0) for amount in amounts) for what in NOT_STATED}
    if not any(sums.values()):
        return partly(
            "Each image has a known label. The authors must say what else was missing, such as "
            "patients without an image, and what was done about it.",
            ("report.html#data",),
        )
    how = e.recipe.get("uncertain", "ignore")
    shown = ", ".join(f"{what.replace('_', ' ')} {count(n)}" for what, n in sums.items() if n)
    return held(
        f"Labels that are not stated: {shown}. No score counts uncertain and missing ones; in "
        f"training uncertain ones count as {how}, missing ones have no loss.",
        ("report.html#data", *_if(e.recipe, "recipe.yaml")),
    )


def acquisition(e: Evidence) -> Answer:
    """Return how the X-rays were taken."""
    return Answer(
        PARTLY if e.audit else AUTHORS,
        "The authors must say which machines, settings and positions were used."
        + (" The audit counts the views as far as they are known." if e.audit else ""),
        _if(e.audit, "report.html#audit"),
    )


def partitions(e: Evidence) -> Answer:
    """Return how images were assigned to splits."""
    return held(
        f"The rule of cxrdist pack: {e.info['shards']['split']}.", ("run.json", "report.html#data")
    )


def disjointness(e: Evidence) -> Answer:
    """Return whether patients and images are in one split only."""
    if not e.audit:
        return not_done(
            "The shards have no audit: run cxrdist check --audit SHARDS before the training."
        )
    patients = len(e.audit["patients_in_several_splits"])
    duplicates = e.audit["duplicates"]
    text = f"Patients with images in several splits: {count(patients)}."
    if duplicates:
        text += f" Pairs of the same image in two splits: {count(duplicates['in_two_splits'])}."
    return held(text, ("audit.json", "report.html#audit"))


def sample_size(e: Evidence) -> Answer:
    """Return how large the sets are, and why."""
    totals = e.info["shards"]["totals"]
    shown = [f"{n} {count(t['images'])} of {count(t['patients'])}" for n, t in totals.items()]
    return partly(
        f"Images and patients: {', '.join(shown)} patients. The authors must say how this size was "
        "chosen, and whether it is enough; the width of the intervals shows it afterwards.",
        ("report.html#data",),
    )


def model(e: Evidence) -> Answer:
    """Return what the network is."""
    if e.members:
        return held(
            f"An ensemble of {count(len(e.members))} networks, each in a run of its own.",
            ("model/model.json",),
        )
    if not e.model:
        return not_done("The training is not finished: run cxrdist train again.")
    size = e.model["image_size_px"]
    return held(
        f"Network: {e.model['architecture'].title}. Input: one grey image of {size} x {size} px. "
        f"Output: a logit for each of {len(e.model['classes'])} classes.",
        ("model/model.json", "model/model.safetensors"),
    )


def software(e: Evidence) -> Answer:
    """Return the software versions."""
    versions = ", ".join(f"{name} {version}" for name, version in e.info["versions"].items())
    return held(f"Versions: {versions}.", ("run.json", "report.html#run"))


def initial_weights(e: Evidence) -> Answer:
    """Return where the initial weights came from."""
    return held(
        f"The training started from {e.info['weights']['source']}; the weights that it derives "
        "from are in the report, with hashes.",
        ("run.json", "report.html#run"),
    )


def training(e: Evidence) -> Answer:
    """Return how the network was trained."""
    stages = ", ".join(e.info["stages"])
    if e.info["finished"] is None:
        return not_done("The training is not finished: run cxrdist train again.")
    if not e.recipe:
        return not_done("recipe.yaml is missing: copy the run directory again.")
    if e.members:
        return held(
            "The complete recipe, by which each member was trained; the log of each epoch is in "
            "the run of the member.",
            ("recipe.yaml", "report.html#training"),
        )
    return held(
        f"The complete recipe of the run; stages: {stages}. The log has each epoch.",
        ("recipe.yaml", "log.jsonl", "report.html#training"),
    )


def final_model(e: Evidence) -> Answer:
    """Return how the published weights were chosen."""
    if e.members:
        return held(
            "For each stage of each member the epoch with the lowest loss on the validation split "
            "is kept. The test split is not used for it.",
            tuple(f"{name}/run.json" for name in e.members),
        )
    best = [f"{name} epoch {stage['best_epoch']}" for name, stage in e.info["stages"].items()]
    return Answer(
        HELD if best else NOT_DONE,
        "For each stage the epoch with the lowest loss on the validation split is kept"
        f"{': ' if best else ''}{', '.join(best)}. The test split is not used for it.",
        ("run.json", "report.html#training"),
    )


def ensemble(e: Evidence) -> Answer:
    """Return whether the model is an ensemble."""
    if not e.members:
        return held("This is one network; nothing is averaged over several.")
    return held(
        f"The mean of the calibrated probabilities of {count(len(e.members))} networks.",
        ("model/model.json",),
    )


def measures(e: Evidence) -> Answer:
    """Return which figures are given."""
    if not e.test:
        return NOT_EVALUATED
    names = [name for name in SCORES if name in e.test["macro"]]
    parts = [what for what in ("calibration", "decision_curve") if e.has(what)]
    parts += _if(e.groups, "groups")
    return partly(
        f"For each class: {', '.join(name.replace('_', ' ') for name in names)}"
        f"{'; beside them ' if parts else ''}{', '.join(parts).replace('_', ' ')}. The authors "
        "must say why these were chosen, and which was the primary one in advance.",
        ("test/metrics.json", "report.html#headline"),
    )


def uncertainty(e: Evidence) -> Answer:
    """Return how the intervals were computed."""
    how = e.test and e.test.get("intervals")
    if not how:
        return not_done(
            "The figures have no intervals: run this version of cxrdist evaluate again."
        )
    share = f"{how['level']:.0%}".replace("%", " %")
    return held(
        f"{share} intervals ({how['method']}, {count(how['replicates'])} replicates) over "
        f"{count(how['patients'])} patients, by {how['unit']}.",
        ("test/metrics.json", "report.html#headline"),
    )


def robustness(e: Evidence) -> Answer:
    """Return whether the result holds under other conditions."""
    done = [
        *_if(e.probed, "words on the images covered and pasted"),
        *_if(e.groups, "groups of patients"),
        *_if(e.external, "external sets"),
        *_if(e.audit and e.audit["shortcut"], "what size, border and brightness alone give"),
    ]
    if not done:
        return not_done("None was done: see cxrdist probe-text, check --audit, and external sets.")
    links = (*_if(e.probed, "report.html#text"), *_results(e))
    return partly(f"Measured: {', '.join(done)}.", links)


def explanations(e: Evidence) -> Answer:
    """Return whether there are heat maps and tests of them."""
    if e.without_maps:
        return not_done(f"No heat maps: {e.without_maps}.")
    if not e.explained:
        return not_done("No heat maps: run cxrdist explain --run RUN --shards SHARDS.")
    return held(
        "Layer-wise relevance propagation on a canonical network, with a ledger for each logit, "
        "tested by covering pixels in order of relevance and by randomising weights.",
        (f"{e.explained[0]}/relevance.json", "report.html#reading"),
    )


def internal(e: Evidence) -> Answer:
    """Return the result on held-out images of the same sources."""
    if not e.test:
        return NOT_EVALUATED
    return held(
        f"On {count(e.test['samples'])} images of the test split, which was read after the "
        "training.",
        ("test/metrics.json", "report.html#headline"),
    )


def external(e: Evidence) -> Answer:
    """Return the result on images from elsewhere."""
    if not e.external:
        return not_done(
            "No external set: run cxrdist evaluate --run RUN --shards OTHER --name NAME."
        )
    shown = [f"{p.partition('/')[2]} ({count(e.metrics[p]['samples'])} images)" for p in e.external]
    return partly(
        f"External sets: {', '.join(shown)}. Images that the network has seen are named and "
        "counted. The authors must say how these sets differ from the training data.",
        tuple(f"{subset}/metrics.json" for subset in e.external),
    )


def characteristics(e: Evidence) -> Answer:
    """Return the characteristics of the patients."""
    known = "Sex, age, view and source of the test images, as far as they are known. "
    return Answer(
        PARTLY if e.groups or e.audit else AUTHORS,
        (known if e.groups else "")
        + "The authors must describe how else the patients of the splits differ.",
        (*_if(e.groups, "test/metrics.json"), *_if(e.audit, "report.html#audit")),
    )


def comparison(e: Evidence) -> Answer:
    """Return how the evaluated images differ from the training images."""
    return partly(
        "Classes of train, val and test are counted side by side"
        + (", and those of the external sets in their metrics" if e.external else "")
        + ". The authors must compare ages, sexes and settings.",
        ("report.html#data", *(f"{subset}/metrics.json" for subset in e.external)),
    )


def performance(e: Evidence) -> Answer:
    """Return the figures with their intervals."""
    if not e.test:
        return NOT_EVALUATED
    text = "The figures of each class and their means"
    if e.has("intervals"):
        return held(f"{text}, with intervals.", _results(e))
    return partly(f"{text}; they have no intervals.", _results(e))


def diagnostic(e: Evidence) -> Answer:
    """Return sensitivity and specificity at thresholds chosen in advance."""
    if not e.test:
        return NOT_EVALUATED
    points = e.test.get("operating_points")
    if not points or not points["classes"]:
        # The model has thresholds, but metrics.json was written without them.
        is_older = points is None and e.calibration
        why = "run cxrdist evaluate again" if is_older else _why_not_chosen(e)
        return partly(
            f"Sensitivity at a threshold that was not chosen for a purpose: {why}.",
            ("test/metrics.json",),
        )
    return held(
        "Sensitivity, specificity and predictive values at thresholds that were chosen on the "
        "validation split.",
        _results(e),
    )


def failures(e: Evidence) -> Answer:
    """Return the mistakes."""
    if not e.test:
        return NOT_EVALUATED
    if e.explained:
        text = (
            "The mistakes with X-ray and heat map. The authors must say what they have in common."
        )
    elif e.without_maps:
        text = "The mistakes are listed, without heat maps."
    else:
        text = "The mistakes are listed; run cxrdist explain to add heat maps."
    return partly(text, ("test/predictions.csv", "report.html#headline"))


def limits(e: Evidence) -> Answer:
    """Return the limitations of the study."""
    warnings = e.audit["warnings"] if e.audit else []
    text = "The authors must discuss them."
    if not warnings:
        return authors(text)
    shown = "warning" if len(warnings) == 1 else "warnings"
    return partly(
        f"The audit of the data has {count(len(warnings))} {shown}. {text}",
        ("report.html#audit", *_if(e.model, "model/README.md")),
    )


def details(e: Evidence) -> Answer:
    """Return where the protocol is."""
    return partly(
        "The recipe and the run hold all technical details. The authors must say whether there was "
        "a protocol before the study, and where it can be read.",
        ("run.json", *_if(e.recipe, "recipe.yaml")),
    )


def availability(e: Evidence) -> Answer:
    """Return where program, model and data are available."""
    revision = e.info["git_revision"]
    return partly(
        f"Program: cxrdist {e.info['versions'].get('cxrdist', '')}"
        f"{f', revision {revision}' if revision else ''}; the model is ready to be shared with its "
        "card. The authors must say where program, model and data are available, on what terms.",
        ("run.json", *_if(e.model, "model/README.md")),
    )


def outcome(e: Evidence) -> Answer:
    """Return what is predicted."""
    classes = ", ".join(e.info["shards"]["classes"])
    return partly(
        f"Classes: {classes}. The authors must define each, and say when and how it was diagnosed.",
        ("run.json",),
    )


def predictors(e: Evidence) -> Answer:
    """Return the inputs of the model."""
    size = e.info["shards"]["image_size_px"]
    return held(
        f"The only input is the X-ray, {size} x {size} px; sex, age and other patient data are not "
        "given to the network.",
        _if(e.model, "model/model.json"),
    )


def clusters(e: Evidence) -> Answer:
    """Return whether the result differs between hospitals or sources."""
    known = [*_if("source" in e.groups, "source"), *_if(e.external, "external set")]
    if not known:
        return not_done(
            "No figures by source: give a column source when packing, or evaluate external sets."
        )
    return partly(f"Figures for each {' and '.join(known)}.", _results(e))


def updating(e: Evidence) -> Answer:
    """Return whether outputs were recalibrated."""
    if not e.calibration or not e.calibration.temperatures:
        own = "; its members have temperatures of their own" if e.members else ""
        return not_done(f"No class has a temperature: {_why_not_chosen(e)}{own}.")
    return held(
        f"A temperature for {_share_of_classes(e, e.calibration.temperatures)}, fitted on the "
        "validation split; the weights are not changed.",
        ("model/model.json", *_if(e.has("calibration"), "test/metrics.json")),
    )


def calculation(e: Evidence) -> Answer:
    """Return how predictions were calculated."""
    return Answer(
        HELD if e.test else NOT_DONE,
        "By cxrdist evaluate, each image once; logits and their sigmoids are in the table. New "
        "images: cxrdist predict.",
        _if(e.test, "test/predictions.csv"),
    )


def imbalance(e: Evidence) -> Answer:
    """Return how class imbalance was handled."""
    copies = e.recipe.get("copies") or {}
    if not copies and not e.is_balanced:
        return held("Nothing was done about it.", _if(e.recipe, "recipe.yaml"))
    shown = ", ".join(f"{name} {times}" for name, times in copies.items())
    if e.is_balanced:
        shown = "as many as make the classes about equally frequent (balance: classes)"
    return partly(
        f"Augmented copies of each training image: {shown}. Unless recalibrated, probabilities "
        "refer to classes balanced in this way. The authors must say why it was done.",
        ("recipe.yaml",),
    )


def fairness(e: Evidence) -> Answer:
    """Return whether the figures differ between groups of patients."""
    if not e.groups:
        return not_done("No figures by group: give sex and age when packing, and evaluate again.")
    return partly(
        f"Figures by {', '.join(e.groups)}, and the largest gap. The training does not aim at "
        "equal figures; the authors must discuss the gaps.",
        _results(e),
    )


def output(e: Evidence) -> Answer:
    """Return the output of the model, and how thresholds were chosen."""
    thresholds = e.calibration.thresholds if e.calibration else {}
    if not e.calibration or not thresholds:
        return partly(
            f"A probability for each class. No threshold was chosen: {_why_not_chosen(e)}.",
            _if(e.model, "model/model.json"),
        )
    return held(
        f"A probability for each class. Thresholds for {_share_of_classes(e, thresholds)} by the "
        f"rule {e.calibration.rule}, on the validation split.",
        ("model/model.json",),
    )


def specification(e: Evidence) -> Answer:
    """Return whether others can use the model."""
    if not e.model:
        return model(e)
    return partly(
        "Weights, classes, normalisation and image size, enough to predict new images. The authors "
        "must say on what terms they may be used.",
        ("model/model.safetensors", "model/model.json", "model/README.md"),
    )


def _why_not_chosen(e: Evidence) -> str:
    """Return why there are no temperatures or thresholds."""
    if e.calibration:
        return "model/model.json says why"
    if e.members:
        return "an ensemble of folds has no validation split to choose it on"
    return "run cxrdist evaluate again to choose it on the validation split"


def _share_of_classes(e: Evidence, chosen: Collection[str]) -> str:
    """Write for how many of the classes something was chosen."""
    return f"{count(len(chosen))} of {count(len(e.info['shards']['classes']))} classes"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _results(e: Evidence) -> tuple[str, ...]:
    subsets = [*_if(e.test, "test"), *e.external]
    return (
        *(f"{subset}/metrics.json" for subset in subsets),
        *_if(subsets, "report.html#headline"),
    )


def _if(held: Any, text: str) -> tuple[str, ...]:
    return (text,) if held else ()
