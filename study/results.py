"""The README's tables and plot of the study, from study/results.csv alone: no number in them is typed by hand.

    python -m study.results                 # rewrites what stands between the study's markers in README.md; draws the plots

A block between `<!-- study: NAME -->` and `<!-- end -->` holds the table that BLOCKS has for NAME. Plots need matplotlib.
Settings are written as they differ from the paper's; runs are grouped by them, stage 1's aside.
"""

import csv
import re
import statistics
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MODES = ["diffusion", "residual", "gaussian", "median", "resize", "copy", "none"]
NAMES = {"diffusion": "DIA (`diffusion`)", "none": "CSI (`none`)"}
PAIRS = [("diffusion", "none"), ("diffusion", "resize"), ("residual", "copy")]
SEEDS = (0, 1, 2)                       # for reporting; choices are made with others


def read(path):
    """The rows of results.csv as dicts: seed and steps int, figures float or None, and `setting` without stage 1's part."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {k: int(row[k]) for k in ("seed", "steps")}
        row |= {k: float(row[k]) if row[k] else None for k in ("minutes", "val_auroc", "auroc", "ap", "within_group_auroc")}
        row["setting"] = " ".join(word for word in row["settings"].split() if not word.startswith("stage1_"))
    return rows


def last(rows):
    """Those of the rows that are a run's last step."""
    return [row for row in rows if f"steps={row['steps']}" in row["setting"].split()]


def spread(values):
    """"0.704 ± 0.018" of several values, "0.704" of one, "" of none."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def markdown(header, rows):
    """A Markdown table of strings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def contrast(rows, setting):
    """The table of one setting: a line a mode, the test AUROC of every reporting seed, their mean, and what goes with it."""
    table = []
    for mode in MODES:
        runs = {r["seed"]: r for r in last(rows) if (r["dissolve"], r["setting"]) == (mode, setting) and r["seed"] in SEEDS}
        if any(r["auroc"] for r in runs.values()):
            values = [runs[s]["auroc"] if s in runs else None for s in SEEDS]
            table.append([NAMES.get(mode, f"`{mode}`"), *("" if v is None else f"{v:.3f}" for v in values),
                          f"**{spread(values)}**",
                          *(spread(r[k] for r in runs.values()) for k in ("within_group_auroc", "ap", "val_auroc")),
                          f"{statistics.fmean(r['minutes'] for r in runs.values()):.1f}"])
    return markdown(["third view", *(f"seed {s}" for s in SEEDS), "AUROC", "within group", "average precision", "`val_auroc`",
                     "minutes"], table)


def paired_bootstrap(labels, first, second, resamples=2000, seed=0):
    """Difference of mean AUROC, first - second, and its 95% percentile interval: over test images and over seeds, paired.

    labels: (Q,) 0 or 1; first, second: (S, Q) scores of S runs each, of the same seeds in the same order. Images are drawn
    anew within each label, and seeds among the S, the same for both sides. Returns (difference, low, high).
    """
    labels, rng = np.asarray(labels), np.random.default_rng(seed)

    def wins(scores):                                       # (anomalies, normals): 1 where ranked right, 1/2 where tied
        a, n = scores[labels == 1][:, None], scores[labels == 0][None]
        return (a > n) + 0.5 * (a == n)

    gaps = [wins(np.asarray(a)) - wins(np.asarray(b)) for a, b in zip(first, second, strict=True)]
    A, N = gaps[0].shape
    wa = rng.multinomial(A, np.full(A, 1 / A), resamples) / A                                   # (resamples, A)
    wn = rng.multinomial(N, np.full(N, 1 / N), resamples) / N
    each = np.stack([((wa @ gap) * wn).sum(1) for gap in gaps], 1)                              # (resamples, S)
    ws = rng.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), resamples) / len(gaps)
    low, high = np.quantile((each * ws).sum(1), [0.025, 0.975])
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def comparisons(rows, scores, setting):
    """The paired differences of PAIRS at one setting, over the reporting seeds that both sides have."""
    labels, table = scores["labels"], []
    for pair in PAIRS:
        runs = [{r["seed"]: scores[r["dissolve"], r["settings"], r["seed"], r["steps"]] for r in last(rows)
                 if (r["dissolve"], r["setting"]) == (mode, setting) and r["seed"] in SEEDS and r["auroc"]} for mode in pair]
        seeds = sorted(set(runs[0]) & set(runs[1]))
        if seeds:
            gap, low, high = paired_bootstrap(labels, *([run[s] for s in seeds] for run in runs))
            table.append([f"{pair[0]} - {pair[1]}", f"{gap:+.3f}", f"{low:+.3f} to {high:+.3f}", ", ".join(map(str, seeds))])
    return markdown(["AUROC", "difference", "95% interval", "seeds"], table)


def read_scores(path):
    """results-scores.csv as {(dissolve, settings, seed, steps): (Q,) array}, and {"labels": (Q,)}."""
    with open(path, newline="") as file:
        return {("labels" if r["dissolve"] == "labels" else (r["dissolve"], r["settings"], int(r["seed"]), int(r["steps"]))):
                np.array(r["scores"].split(), float) for r in csv.DictReader(file)}


def search(rows, base):
    """val_auroc of every choice tried with other seeds than the reporting ones, by mode; `base`: the setting words left out."""
    runs = [r for r in last(rows) if r["seed"] not in SEEDS and r["val_auroc"] is not None]
    found = {}
    for r in runs:
        words = [w for w in r["settings"].split() if w not in base.split() and not w.startswith(("stage1_batch", "stage1_lr"))]
        found.setdefault(" ".join(words) or "as it is", {}).setdefault(r["dissolve"], []).append(r["val_auroc"])
    return markdown(["change", *(f"`{m}`" for m in MODES)],
                    [[name, *(", ".join(f"{v:.3f}" for v in by.get(m, [])) for m in MODES)] for name, by in found.items()])


def put(text, name, table):
    """The text with what stands between the markers of `name` replaced by the table."""
    pattern = re.compile(rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no block <!-- study: {name} --> ... <!-- end -->.")
    return pattern.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)


def plot_curves(path, rows, settings):
    """AUROC on the test set over steps, a panel a setting: a line through the means of each mode, a dot each seed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for axes, (title, setting) in zip(panels, settings.items(), strict=True):
        for i, mode in enumerate(MODES):
            runs = [r for r in rows if (r["dissolve"], r["setting"]) == (mode, setting) and r["seed"] in SEEDS and r["auroc"]]
            if runs:
                steps = sorted({r["steps"] for r in runs})
                means = [statistics.fmean(r["auroc"] for r in runs if r["steps"] == s) for s in steps]
                axes.plot(steps, means, color=f"C{i}", label=mode)
                axes.plot([r["steps"] for r in runs], [r["auroc"] for r in runs], ".", color=f"C{i}")
        axes.set(title=title, xlabel="steps")
    axes.legend()
    figure.axes[0].set_ylabel("AUROC on the test set")
    figure.savefig(path, dpi=110)


def plot_sensitivity(path, probes, setting):
    """AUROC of held-out normals against themselves with one dark spot: a panel a contrast, a line a mode, over the diameter."""
    from matplotlib.figure import Figure
    cells = [name.split("_")[1:] for name in probes[0] if name.startswith("auroc_")]
    contrasts = sorted({c for _, c in cells}, key=float)
    figure = Figure(figsize=(3 * len(contrasts), 3.2), layout="constrained")
    for axes, contrast in zip(figure.subplots(1, len(contrasts), sharey=True), contrasts, strict=True):
        diameters = sorted({d for d, c in cells if c == contrast}, key=float)
        for i, mode in enumerate(MODES):
            runs = [r for r in probes if (r["dissolve"], r["setting"]) == (mode, setting)]
            if runs:
                means = [statistics.fmean(float(r[f"auroc_{d}_{contrast}"]) for r in runs) for d in diameters]
                axes.plot([100 * float(d) for d in diameters], means, color=f"C{i}", marker=".", label=mode)
        axes.set(title=f"{float(contrast):.0%} darker", xlabel="diameter, % of the side", xscale="log")
    axes.legend()
    figure.axes[0].set_ylabel("AUROC")
    figure.savefig(path, dpi=110)
