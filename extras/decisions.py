"""From scores to decisions: p-values by held-out normals, a threshold, and what deciding by it does."""

import math

import numpy as np
from scipy.stats import binomtest


def p_values(calibration, scores):
    """Conformal p-values (n,): the share of normals at least as anomalous, the image itself counted as one.

    (1 + #{calibration >= score}) / (len(calibration) + 1); Vovk et al. 2005, Bates et al. 2023
    (arXiv:2104.08279), Eq. 2. If the image is normal and as the calibration images are (exchangeable),
    P(p <= a) <= a for every a. nan without any calibration image.
    """
    if not len(calibration):
        return np.full(len(scores), np.nan)
    below = np.searchsorted(np.sort(calibration), scores, side="left")      # those strictly below
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def expected_rate(fpr, n):
    """Mean false-positive rate of deciding by p <= fpr with n calibration images."""
    return math.floor(fpr * (n + 1) + 1e-9) / (n + 1)                       # 0.29 * 100 is 29, not 28.99


def decisions(p, labels, fpr, n):
    """What deciding by p <= fpr does on labelled images: rates with exact (Clopper-Pearson) 95% intervals.

    p, labels: (Q,) arrays; n: the number of calibration images; None without any.
    """
    if not n:
        return None
    result = {"fpr": fpr, "calibration_normals": n, "expected_false_positive_rate": expected_rate(fpr, n)}
    for name, label in (("false_positive_rate", 0), ("sensitivity", 1)):
        found, total = int((p[labels == label] <= fpr).sum()), int((labels == label).sum())
        interval = binomtest(found, total).proportion_ci(method="exact")
        result |= {name: found / total, f"{name}_interval_95": [float(v) for v in interval]}
    return result


def impossible(n, fpr):
    """Why n calibration images can never give a p-value of at most fpr, or None."""
    if n == 0:
        return "no decisions: no normals were held out for calibration in training (--holdout)"
    if expected_rate(fpr, n) == 0:
        return (f"no decisions: with {n} calibration normals no p-value is below {1 / (n + 1):.3f}; --fpr "
                f"{fpr:g} needs {math.ceil(1 / fpr - 1e-9) - 1}: train with more --holdout, or raise --fpr")
    return None


def threshold(calibration, fpr):
    """The score above which p <= fpr: the k-th highest calibration score, k = floor(fpr (n + 1)); or None."""
    n = len(calibration)
    if impossible(n, fpr):
        return None
    return float(np.sort(calibration)[n - round(expected_rate(fpr, n) * (n + 1))])


def columns_of(p, fpr, n):
    """The columns p_value and anomaly (0 or 1) of p-values (Q,); empty where nothing can be decided."""
    undecided = impossible(n, fpr)
    return [["" if math.isnan(v) else f"{v:.6g}" for v in p], ["" if undecided else int(v <= fpr) for v in p]]
