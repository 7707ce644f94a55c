"""Pictures of runs that evaluate.py has scored: ROC, scores, training, p-values. Needs matplotlib.

    python -m extras.report runs/elpv

Reads scores.csv, metrics.json and log.jsonl of each run; writes roc.png, scores.png and training.png there,
and p_values.png where extras.predict has left a predict.pt. Also holds helpers for tables of results.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.report, in the project's folder.")

import csv
import json
import platform
import re
import statistics
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve

from dia_lib import load_checkpoint, make_parser, run, whole
from evaluate import remembered, weights_of
from extras.decisions import p_values

PROCESSOR = "AMD EPYC"                  # that minutes are of, where no other is named

# ---- Tables of results -----------------------------------------------------------------------------------


def processor(device):
    """Name of the chip that computes ("AMD EPYC 9B14", "NVIDIA L4"): what minutes are minutes of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"^model name\s*: *(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):                            # not Linux, or a chip that has no such line
        name = platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|\d+-Core|@.*", " ", name).split())


def markdown(header, rows):
    """A Markdown table of strings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def spread(values):
    """"0.704 ± 0.018" of several values, "0.704" of one, "" of none; None does not count."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def mean_minutes(pairs):
    """"42.6" of several (minutes, processor); "42.6, 27.0 (Intel Xeon)" where they were measured on two.

    None, the minutes of a run that was paused, does not count; "" of none.
    """
    each = {}
    for minutes, name in pairs:
        if minutes is not None:
            named = name and not name.startswith(PROCESSOR)
            each.setdefault(f" ({name})" if named else "", []).append(minutes)
    return ", ".join(f"{statistics.fmean(minutes):.1f}{name}" for name, minutes in sorted(each.items()))


def put(text, name, table):
    """The text of a page with what stands between the markers of `name` replaced by the table."""
    pattern = re.compile(rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"A README.md has no block <!-- study: {name} --> ... <!-- end -->.")
    return pattern.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)


def insert(path, rows, key):
    """Write rows (dicts) into a csv table, at its end, or in place of those that agree in the columns `key`.

    What is empty in a new row stays as it was. Not for two processes at once. Exits if the columns differ.
    """
    columns, table = list(rows[0]), {}

    def add(row):
        same = tuple(row[k] for k in key)
        table[same] = {k: v or table.get(same, row)[k] for k, v in row.items()}

    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise SystemExit(f"{path} is another table: it has {reader.fieldnames}, not {columns}")
            for row in reader:
                add(row)
    for row in rows:
        add({k: str(v) for k, v in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *(r.values() for r in table.values())])


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
