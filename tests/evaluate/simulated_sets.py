"""Simulated test sets whose truth is known, and how often their intervals hold it.

``python simulated_sets.py`` runs the full simulation, six minutes on one core: 2,000 test sets of
60 and of 300 patients with 2,000 replicates each.
"""

import numpy as np
from scipy import stats

from cxrdist.bootstrap import draw
from cxrdist.evaluate.intervals import of_auroc, of_share, wilson

AUROC = 0.9
SEPARATION = np.sqrt(2) * stats.norm.ppf(AUROC)  # of two normal distributions of one width
SHARE = stats.norm.cdf(SEPARATION / 2)  # sensitivity and accuracy at the threshold between them
TRUTH = {"AUROC": AUROC, "accuracy": SHARE, "sensitivity": SHARE}


def simulate(random, num_patients, correlation):
    """Draw 1 to 6 images of each patient, two of five with the class: patients, scores, truth."""
    patient = np.repeat(np.arange(num_patients), random.integers(1, 7, num_patients))
    truth = patient < 0.4 * num_patients
    own, noise = random.standard_normal(num_patients)[patient], random.standard_normal(len(patient))
    spread = np.sqrt(correlation) * own + np.sqrt(1 - correlation) * noise
    return patient, SEPARATION * truth + spread, truth


def intervals(patient, scores, truth, num_replicates):
    """The intervals of the package, and Wilson's, by name."""
    replicates = draw(list(map(str, patient)), list(map(str, truth)), num_replicates)
    right, images = (scores > SEPARATION / 2) == truth, np.ones(len(truth), bool)
    auroc = stats.mannwhitneyu(scores[truth], scores[~truth]).statistic
    auroc /= truth.sum() * (~truth).sum()
    return {
        "AUROC": of_auroc(replicates, auroc, replicates.auroc(scores, truth), truth),
        "accuracy": of_share(replicates, right, images),
        "sensitivity": of_share(replicates, right, truth),
        "accuracy, Wilson": wilson(int(right.sum()), len(right)),
        "sensitivity, Wilson": wilson(int(right[truth].sum()), int(truth.sum())),
    }


def coverage(num_sets, num_patients, correlation, num_replicates, seed=0):
    """The share of intervals that hold the truth, by name."""
    random, held = np.random.default_rng(seed), {}
    for _ in range(num_sets):
        drawn = simulate(random, num_patients, correlation)
        for name, (low, high) in intervals(*drawn, num_replicates).items():
            true = TRUTH[name.removesuffix(", Wilson")]
            held[name] = held.get(name, 0) + (low <= true <= high) / num_sets
    return held


if __name__ == "__main__":
    for num_patients in (60, 300):
        for correlation in (0, 0.2, 0.5):
            found = coverage(2000, num_patients, correlation, 2000)
            shown = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
            print(f"{num_patients} patients, correlation {correlation}: {shown}", flush=True)
