"""Do decisions keep their rate? Calibration and test normals of one run, dealt anew many times.

    python -m study.calibration --out runs/elpv

Needs what evaluate.py wrote there (stats.pt, scores.csv). Prints for several --fpr the mean share of normals called anomalies
over the deals, beside what theory expects of that many calibration images: floor(fpr (n + 1)) / (n + 1).
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np

from dia_lib import load_checkpoint, run
from evaluate import p_values


def deal(scores, n, fpr, deals=20, seed=0):
    """Share of normals called anomalies in each of `deals` deals: n of the scores calibrate, the rest are tested. (deals,)"""
    rng, rates = np.random.default_rng(seed), []
    for _ in range(deals):
        shuffled = rng.permutation(scores)
        rates.append((p_values(shuffled[:n], shuffled[n:]) <= fpr).mean())
    return np.array(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/elpv", metavar="RUN", help="a run that is scored already (default: runs/elpv)")
    parser.add_argument("--score", default="local", help="that evaluate.py ranked by (default: local)")
    args = parser.parse_args()
    out = Path(args.out)
    calibration = load_checkpoint(out / "stats.pt", "stats", "cpu")["calibration"][args.score].numpy()
    with open(out / "scores.csv", newline="") as file:
        normals = np.array([float(row["score"]) for row in csv.DictReader(file) if row["label"] == "0"])
    n = len(calibration)
    print(f"{out}, {args.score}: {n} calibration and {len(normals)} test normals, 20 deals")
    for fpr in (0.02, 0.05, 0.1, 0.2):
        as_dealt, rates = (p_values(calibration, normals) <= fpr).mean(), deal(np.concatenate([calibration, normals]), n, fpr)
        print(f"fpr {fpr:.2f}: expected {math.floor(fpr * (n + 1) + 1e-9) / (n + 1):.3f}, mean {rates.mean():.3f} "
              f"({rates.min():.3f} to {rates.max():.3f}); as held out in training {as_dealt:.3f}")


if __name__ == "__main__":
    run(main)
