"""Pictures of a run that evaluate.py has scored: ROC, scores, p-values, training. Needs matplotlib.

    python report.py --out runs/elpv                # or: python evaluate.py --report

Reads scores.csv, metrics.json and log.jsonl of the run, and writes roc.png, scores.png, p_values.png and training.png there.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from dia_lib import run, whole

try:
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("pictures need matplotlib: pip install matplotlib") from None


def roc(figure, labels, scores, metrics):
    """ROC, and the middle 95% of the curves of 500 bootstrap samples of normals and of anomalies."""
    axes, x, rng = figure.subplots(), np.linspace(0, 1, 201), np.random.default_rng(0)
    normals, anomalies = scores[labels == 0], scores[labels == 1]
    curves = []
    for _ in range(500):
        a, b = rng.choice(normals, len(normals)), rng.choice(anomalies, len(anomalies))
        curves.append(np.interp(x, *roc_curve([0] * len(a) + [1] * len(b), np.concatenate([a, b]))[:2]))
    axes.fill_between(x, *np.quantile(curves, [0.025, 0.975], axis=0), alpha=0.25, label="95% interval")
    axes.plot(*roc_curve(labels, scores)[:2], label=f"AUROC {metrics['auroc']:.3f}")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.set(xlabel="share of normals called anomalies", ylabel="share of anomalies found", aspect="equal",
             title=f"{metrics['settings']['data']}, {metrics['score']}")
    axes.legend(loc="lower right")


def score_histograms(figure, labels, scores, groups):
    """Scores of normals and anomalies, a panel a group that has both, and one of all."""
    both = [g for g in sorted(set(groups)) if len(set(labels[groups == g])) == 2]
    panels = [("all", np.ones(len(labels), bool)), *((g, groups == g) for g in both)]
    figure.set_size_inches(4 * len(panels), 3)
    bins = np.histogram_bin_edges(scores, 40)
    for axes, (name, mine) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        for label, word in ((0, "normal"), (1, "anomaly")):
            axes.hist(scores[mine & (labels == label)], bins, density=True, alpha=0.5, label=word)
        axes.set(title=name or "no group", xlabel="score")
    figure.axes[0].legend()


def p_value_plot(figure, labels, p, metrics):
    """Share of normals and of anomalies with a p-value up to a: that of normals should stay at a, whatever a is."""
    axes = figure.subplots()
    for label, word in ((0, "test normals"), (1, "anomalies")):
        values = np.sort(p[labels == label])
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=word)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.axvline(metrics["decision"]["fpr"], color="grey", linestyle=":", label=f"--fpr {metrics['decision']['fpr']:g}")
    axes.set(xlabel="p-value a", ylabel="share with p up to a",
             title=f"{metrics['decision']['calibration_normals']} calibration normals")
    axes.legend(loc="lower right")


def training_curves(figure, log):
    """Stage 1: loss, and on held-out images by range of t. Stage 2: loss, shift accuracy, AUROC on synthetic defects."""
    figure.set_size_inches(12, 3)
    panels = (("stage 1", "diffusion", ("loss", "held_")), ("stage 2: loss", "dia", ("loss", "contrastive")),
              ("stage 2: shares and AUROCs", "dia", ("shift_acc", "val_auroc", "val_cos", "val_local")))
    for axes, (title, stage, names) in zip(figure.subplots(1, 3), panels, strict=True):
        rows = [row for row in log if row["stage"] == stage]
        for name in sorted({k for row in rows for k in row if k.startswith(names)}):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axes.set(title=title, xlabel="step")
        if rows:
            axes.legend(fontsize="small")


def report(out):
    """Draw the four pictures of a run's folder; exits where the run's files are missing."""
    out = Path(out)
    if not (out / "metrics.json").is_file() or not (out / "scores.csv").is_file():
        raise SystemExit(f"{out} has no metrics.json and scores.csv: run evaluate.py on it first.")
    metrics = json.loads((out / "metrics.json").read_text())
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, scores = np.array([int(r["label"]) for r in rows]), np.array([float(r["score"]) for r in rows])
    groups = np.array([r["group"] for r in rows])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    pictures = {"roc": lambda f: roc(f, labels, scores, metrics), "scores": lambda f: score_histograms(f, labels, scores, groups),
                "training": lambda f: training_curves(f, log)}
    if metrics.get("decision"):                             # runs scored by earlier versions have none
        p = np.array([float(r["p_value"]) for r in rows])
        pictures["p_values"] = lambda f: p_value_plot(f, labels, p, metrics)
    for name, draw in pictures.items():
        draw(figure := Figure(figsize=(4, 4), layout="constrained"))
        with whole(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    print(f"drew {', '.join(f'{name}.png' for name in pictures)} in {out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", nargs="+", default=["runs/elpv"], metavar="RUN", help="folders of runs (default: runs/elpv)")
    for out in parser.parse_args().out:
        report(out)


if __name__ == "__main__":
    run(main)
