"""Do decisions keep their rate on a run's test normals, and are these as the calibration normals?

    python -m study.calibration --out runs/elpv

Needs what evaluate.py wrote there (scores.csv, metrics.json). Prints for several --fpr the share of test
normals called anomalies, beside what theory expects of that many calibration images: floor(fpr (n + 1)) /
(n + 1); the p-value of a Mann-Whitney test of calibration against test normals; and the mean share where both
are mixed and dealt anew 2,000 times, which checks the arithmetic, not whether they are alike, and shows how
far one draw of calibration images may lie off. By the score that ranks, csi.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu

from dia_lib import run
from extras.predict import expected_rate, load_run, p_values


def deal(scores, n, fpr, deals=2000, seed=0):
    """Share of normals called anomalies in each of `deals` deals: n calibrate, the rest are tested.

    scores: (n + tested,), of normals.  Returns (deals,).
    """
    rng, rates = np.random.default_rng(seed), []
    for _ in range(deals):
        shuffled = rng.permutation(scores)
        rates.append((p_values(shuffled[:n], shuffled[n:]) <= fpr).mean())
    return np.array(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/elpv", metavar="RUN",
                        help="a run that is scored already (default: runs/elpv)")
    out = Path(parser.parse_args().out)
    if not (out / "metrics.json").is_file():
        raise SystemExit(f"{out} has no metrics.json: run evaluate.py --out {out} first.")
    passes = json.loads((out / "metrics.json").read_text())["passes"]               # those of scores.csv
    calibration = load_run(out, passes=passes).known["calibration"]["csi"].numpy()
    if not len(calibration):
        raise SystemExit(f"{out}: no normals were held out in training; train with a larger --holdout.")
    with open(out / "scores.csv", newline="") as file:
        normals = np.array([float(row["score"]) for row in csv.DictReader(file) if row["label"] == "0"])
    n, both = len(calibration), np.concatenate([calibration, normals])
    print(f"{out}: {n} calibration and {len(normals)} test normals; do they differ? p = "
          f"{mannwhitneyu(calibration, normals).pvalue:.3f}")
    for fpr in (0.02, 0.05, 0.1, 0.2):
        as_dealt, rates = (p_values(calibration, normals) <= fpr).mean(), deal(both, n, fpr)
        low, high = np.quantile(rates, [0.025, 0.975])
        print(f"fpr {fpr:.2f}: expected {expected_rate(fpr, n):.3f}, as held out in training {as_dealt:.3f}; "
              f"2,000 deals {rates.mean():.4f} (95% of them {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    run(main)
