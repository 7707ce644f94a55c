"""From scores to decisions: p-values by held-out normals, a threshold, and what deciding by it does."""

import math

import numpy as np
from scipy.stats import beta, binomtest


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


def highest_rate(fpr, n):
    """The false-positive rate that 19 of 20 sets of n calibration images stay below.

    With k = floor(fpr (n + 1)), the rate of one set is Beta(k, n + 1 - k); Vovk 2012 (arXiv:1209.2673). That
    is for independent images: several of one patient count for less.
    """
    k = round(expected_rate(fpr, n) * (n + 1))
    return float(beta.ppf(0.95, k, n + 1 - k)) if k else 0.0


def decisions(calibration, scores, labels, fpr, left_out=False):
    """What deciding by p <= fpr does on labelled images: rates with exact (Clopper-Pearson) 95% intervals.

    calibration: (n,), scores, labels: (Q,) arrays.  left_out: some calibration scores are leave-one-out.
    None without any calibration image.
    """
    p, n = p_values(calibration, scores), len(calibration)
    if not n:
        return None
    result = {"fpr": fpr, "calibration_normals": n, "threshold": threshold(calibration, fpr),
              "leave_one_out": left_out, "expected_false_positive_rate": expected_rate(fpr, n)}
    for name, label in (("false_positive_rate", 0), ("sensitivity", 1)):
        found, total = int((p[labels == label] <= fpr).sum()), int((labels == label).sum())
        interval = binomtest(found, total).proportion_ci(method="exact")
        result |= {name: found / total, f"{name}_interval_95": [float(v) for v in interval]}
    return result


def rates_of(decision):
    """The two rates of `decisions`, and their intervals, in words."""
    return "  ".join("{} {:.3f} ({:.3f} to {:.3f})".format(
        name.replace("_", " "), decision[name], *decision[f"{name}_interval_95"])
        for name in ("false_positive_rate", "sensitivity"))


def impossible(n, fpr):
    """Why n calibration images can never give a p-value of at most fpr, or None."""
    if n == 0:
        return "no decisions: no normals were held out for calibration in training (--holdout)"
    if expected_rate(fpr, n) == 0:
        digit = 10.0 ** (math.floor(math.log10(1 / (n + 1))) - 2)           # the third; rounded up
        best = math.ceil(1 / (n + 1) / digit - 1e-9) * digit
        return (f"no decisions: with {n} calibration normals the smallest --fpr is {best:.3g}; {fpr:g} needs "
                f"{math.ceil(1 / fpr - 1e-9) - 1}: take more normals, or more of them by --holdout")
    return None


def promise(calibration, fpr, left_out=False):
    """A decision in words: above which score, by how many normals, how often new normals will be above it.

    left_out: some of the calibration scores are leave-one-out.
    """
    n, rate = len(calibration), expected_rate(fpr, len(calibration))
    about, most = ("about ", "") if left_out else (
        "", f" on average, for 19 of 20 such sets of normals at most {highest_rate(fpr, n):.2g}")
    limit = threshold(calibration, fpr)
    return (f"scores above {limit:.6g}, by {n} calibration normals; {about}{rate:.2g} of new normal images "
            f"are above it{most}")


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
