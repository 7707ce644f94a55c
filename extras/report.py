"""Pictures of runs that evaluate.py has scored: ROC, scores, training, p-values. Needs matplotlib.

    python -m extras.report runs/elpv

Reads scores.csv, metrics.json and log.jsonl of each run; writes roc.png, scores.png and training.png there,
and p_values.png where extras.predict has left a predict.pt.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.report, in the project's folder.")

import csv
import json
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from dia_lib import load_checkpoint, make_parser, run, whole
from evaluate import remembered, weights_of
from extras.predict import p_values

# ---- Pictures of a run -----------------------------------------------------------------------------------


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
             title=f"{Path(metrics['settings']['data']).name}, {metrics['score']}")
    axes.legend(loc="lower right")


def score_histograms(figure, labels, scores, groups):
    """Scores of normals and anomalies, a panel a group that has both, and one of all."""
    both = [g for g in sorted(set(groups)) if len(set(labels[groups == g])) == 2]
    panels = [("all", np.ones(len(labels), bool)), *((g, groups == g) for g in both)]
    figure.set_size_inches(4 * len(panels), 3)
    bins = np.histogram_bin_edges(scores, 40)
    for axes, (name, mine) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, word in ((0, "normal"), (1, "anomaly")):
            axes.hist(scores[mine & (labels == label)], bins, density=True, alpha=0.5, label=word)
        axes.set(title=name or "no group", xlabel="score", yticks=[])
    figure.axes[0].legend()


def training_curves(figure, log):
    """Stage 1: loss, and held-out by range of t. Stage 2: losses, shift accuracy, AUROCs of extras.choose."""
    figure.set_size_inches(12, 3)
    panels = (("stage 1", ["diffusion"], ("loss", "held_")),
              ("stage 2: loss", ["dia"], ("loss", "contrastive")),
              ("stage 2: shares and AUROCs", ["dia", "choose"], ("shift_acc", "val_")))
    for axes, (title, stages, names) in zip(figure.subplots(1, 3), panels, strict=True):
        rows = [row for row in log if row["stage"] in stages]
        for name in sorted({k for row in rows for k in row if k.startswith(names)}):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axes.set(title=title, xlabel="step")
        if axes.lines:
            axes.legend(fontsize="small")


def p_value_plot(figure, labels, p, n, fpr=0.05):
    """Share of normals, and of anomalies, with a p-value up to a: that of normals should stay at a."""
    axes = figure.subplots()
    for label, word in ((0, "test normals"), (1, "anomalies")):
        values = np.sort(p[labels == label])
        shares = np.arange(1, len(values) + 1) / len(values)
        axes.step([0, *values, 1], [0, *shares, 1], where="post", label=word)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.axvline(fpr, color="grey", linestyle=":", label=f"--fpr {fpr:g}")
    axes.set(xlabel="p-value a", ylabel="share with p up to a", title=f"{n} calibration normals")
    axes.legend(loc="lower right")


def report(out):
    """Draw the pictures of a run's folder; exits where the run's files, or matplotlib, are missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install matplotlib") from None
    if not (out / "metrics.json").is_file() or not (out / "scores.csv").is_file():
        raise SystemExit(f"{out} has no metrics.json and scores.csv: run evaluate.py on it first.")
    metrics = json.loads((out / "metrics.json").read_text())
    with open(out / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, scores = np.array([int(r["label"]) for r in rows]), np.array([float(r["score"]) for r in rows])
    groups = np.array([r["group"] for r in rows])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    weights = weights_of(load_checkpoint(out / "dia.pt", "dia", "cpu"))
    known = remembered(out / "predict.pt", "predict", {"weights": weights, "passes": metrics["passes"]})
    calibration = known["calibration"]["csi"].numpy() if known else []
    pictures = {"roc": lambda figure: roc(figure, labels, scores, metrics),
                "scores": lambda figure: score_histograms(figure, labels, scores, groups),
                "training": lambda figure: training_curves(figure, log)}
    if len(calibration):
        p = p_values(calibration, scores)
        pictures["p_values"] = lambda figure: p_value_plot(figure, labels, p, len(calibration))
    for name, draw in pictures.items():
        draw(figure := Figure(figsize=(4, 4), layout="constrained"))
        with whole(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    print(f"drew {', '.join(f'{name}.png' for name in pictures)} in {out}")


def main():
    parser = make_parser(__doc__, usage=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs that evaluate.py has scored")
    for out in parser.parse_args().runs:
        report(Path(out))


if __name__ == "__main__":
    run(main, "nothing that was written before is lost")
