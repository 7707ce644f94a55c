"""Report on runs that have been scored: one HTML page each, and its pictures. Needs matplotlib.

    python -m extras.report runs/elpv
    python -m extras.report runs/lungs --data moved/lungs           # where the images are now

Reads what evaluate.py, or a method of weakly_supervised, has written into each run's folder. Writes there
report.html, a page that needs no other file, and roc.png, scores.png, training.png and p_values.png. P-values
of a run of train_dia.py are shown where extras.predict has left a predict.pt.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.report, in the project's folder.")

import base64
import csv
import io
import json
from collections import namedtuple
from html import escape
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from torchvision.transforms.functional import to_pil_image

from dia_lib import data_name, found, load_checkpoint, load_data, make_parser, run, whole
from evaluate import data_of, remembered
from extras.decisions import decisions, impossible, p_values
from extras.heat_maps import overlay
from extras.predict import calibrated, key_of, load_run

# A run's results. metrics: as in metrics.json. labels, scores, groups: (Q,) arrays, paths: Q names, as in
# scores.csv. log: rows of log.jsonl. p: (Q,) p-values by n calibration normals, or None. fpr: of decisions.
Results = namedtuple("Results", "out metrics paths labels scores groups log p n fpr decision")
WORDS = ("normal", "anomaly")


def read(out):
    """The Results in a run's folder; exits where files are missing, damaged, or of two different runs."""
    if not (out / "metrics.json").is_file() or not (out / "scores.csv").is_file():
        several = ", ".join(sorted(path.parent.name for path in out.glob("shots-*/metrics.json")))
        raise SystemExit(f"{out} has several runs: give one of its folders {several}." if several else
                         f"{out} has no metrics.json and scores.csv: run evaluate.py on it first.")
    try:
        metrics = json.loads((out / "metrics.json").read_text())
        with open(out / "scores.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        labels = np.array([int(r["label"]) for r in rows])
        paths, groups = [r["path"] for r in rows], np.array([r["group"] for r in rows])
        scores = np.array([float(r["score"]) for r in rows])
        if [metrics["normals"], metrics["anomalies"]] != [(labels == 0).sum(), (labels == 1).sum()]:
            raise ValueError
        lines = (out / "log.jsonl").read_text().splitlines(True) if (out / "log.jsonl").is_file() else []
        log = [json.loads(line) for line in lines if line.endswith("\n")]       # the last may be torn
        fpr, p, n, decision = metrics["settings"].get("fpr", 0.05), None, None, metrics.get("decision")
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{out}: metrics.json, scores.csv or log.jsonl is damaged, or they are of different "
                         "runs. Score it again.") from None
    if "decision" in metrics:                                                   # of weakly_supervised
        n = (decision or {"calibration_normals": 0})["calibration_normals"]
        p = np.array([float(r["p_value"]) for r in rows]) if n else None
    elif (out / "predict.pt").is_file():
        key = key_of(load_checkpoint(out / "dia.pt", "dia", "cpu"), metrics["passes"])
        if known := remembered(out / "predict.pt", "predict", key):
            calibration = calibrated(known, out)["calibration"]["csi"].numpy()
            n, decision = len(calibration), decisions(calibration, scores, labels, fpr)
            p = p_values(calibration, scores) if n else None
    return Results(out, metrics, paths, labels, scores, groups, log, p, n, fpr, decision)


# ---- Pictures --------------------------------------------------------------------------------------------


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
    settings = metrics["settings"]
    axes.set(xlabel="share of normals called anomalies", ylabel="share of anomalies found", aspect="equal",
             title=f"{data_name(settings['data'])}, {metrics.get('score') or settings['method']}")
    axes.legend(loc="lower right")


def by_group(labels, groups):
    """{group: (Q,) bool} of groups with anomalies: these, and the group's own normals, or all if it has none.

    Most anomalies first; a group that would be all images is left out.
    """
    sizes = {g: int(labels[groups == g].sum()) for g in sorted(set(groups))}
    rows = {}
    for g in sorted((g for g in sizes if sizes[g]), key=lambda g: -sizes[g]):
        own = (groups == g) & (labels == 0)
        rows[g] = (groups == g) & (labels == 1) | (own if own.any() else labels == 0)
    return {g: mine for g, mine in rows.items() if not mine.all()}


def score_histograms(figure, labels, scores, groups):
    """Scores of normals and anomalies: a panel of all, and one each of the (at most 8) groups of by_group."""
    panels = [("all", np.ones(len(labels), bool)), *by_group(labels, groups).items()][:9]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure.set_size_inches(4 * columns, 3 * lines)
    bins = np.histogram_bin_edges(scores, 40)
    for i, (name, mine) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        for label, word in enumerate(WORDS):
            axes.hist(scores[mine & (labels == label)], bins, density=True, alpha=0.5, label=word)
        axes.set(title=name or "no group", xlabel="score", yticks=[])
    figure.axes[0].legend()


def training_curves(figure, log):
    """Stage 1: loss, and held-out by range of t. Stage 2: losses, shift accuracy, AUROCs of extras.choose.

    Methods of weakly_supervised: losses. A panel of which the log has nothing is left out.
    """
    panels = (("stage 1", ["diffusion"], ("loss", "held_")),
              ("stage 2: loss", ["dia"], ("loss", "contrastive")),
              ("stage 2: shares and AUROCs", ["dia", "choose"], ("shift_acc", "val_")),
              *((f"{method}: loss", [method], ("loss",)) for method in ("wscxr", "dra", "ckaad")))
    drawn = []
    for title, stages, names in panels:
        rows = [row for row in log if row["stage"] in stages]
        lines = {name: [(row["step"], row[name]) for row in rows if name in row]
                 for name in sorted({k for row in rows for k in row if k.startswith(names)})}
        if lines:
            drawn.append((title, lines, "step" if {"diffusion", "dia"} & set(stages) else "epoch"))
    figure.set_size_inches(4 * max(1, len(drawn)), 3)
    for i, (title, lines, unit) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), i + 1)
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
        axes.set(title=title, xlabel=unit)
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


def panels(figure, name):
    """HTML of the panels of a figure, each a picture of its own, so that a page can place them anew."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()).padded(0.05)
        figure.savefig(file := io.BytesIO(), dpi=170, format="png", bbox_inches=box)
        yield picture(file, f"{name}: {axes.get_title()}")


# ---- The page --------------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light }
body { font: 16px/1.45 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 0 auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 1.2rem 0 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
.big { font-size: 2.2rem; margin: .2rem 0 }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto; font-size: .9rem }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #eee }
td:last-child, pre, figcaption { overflow-wrap: anywhere; min-width: 3rem }
pre { white-space: pre-wrap }
.row { display: flex; flex-wrap: wrap; gap: 1rem }
.row > img { width: 22rem; max-width: 100%; align-self: start }
figure { margin: 0; width: 15%; min-width: 9rem; font-size: .8rem }
figure.pair { width: 31.5%; min-width: min(18rem, 100%) }
figure img { width: 100%; image-rendering: pixelated }
figure.pair img { width: 49% }
@media print { h2, h3 { break-after: avoid } figure, img, tr { break-inside: avoid } .row { gap: .5rem 1% }
  .row > img { width: 44% } figure, figure.pair { min-width: 0 } }"""


def paragraph(words):
    return f"<p>{escape(words)}</p>"


def table(rows, header=()):
    """An HTML table. Numbers get four digits, lists and dicts lose their brackets."""
    def text(v):
        return f"{v:.4g}" if isinstance(v, float) else v if isinstance(v, str) else str(v).strip("[]{}")

    lines = ["".join(f"<th>{escape(name)}</th>" for name in header)] if header else []
    lines += ["".join(f"<td>{escape(text(v))}</td>" for v in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(file, alt):
    """An image whose PNG is part of the page. file: io.BytesIO."""
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def figures_table(metrics):
    """Floors, and all other numbers of metrics.json."""
    floors, parts = metrics.get("floors_auroc", {}), metrics.get("parts_auroc", {})
    rows = [(f"floor: {k}", v, "" if v < metrics["auroc"] else "not beaten") for k, v in floors.items()]
    rows += [(k.replace("_", " ").replace("auroc", "AUROC"), v, "") for k, v in metrics.items()
             if isinstance(v, float) and k not in ("auroc", "seconds")]
    return table(rows + [(f"AUROC of {k} alone", v, "") for k, v in parts.items() if k != metrics["score"]])


def groups_table(results):
    """A row a group and label; the AUROC is of the images of its panel in the histograms."""
    labels, scores, mine, rows = results.labels, results.scores, by_group(results.labels, results.groups), []
    for group, label in sorted(set(zip(results.groups.tolist(), labels.tolist(), strict=True))):
        these = scores[(results.groups == group) & (labels == label)]
        among = mine.get(group, np.ones(len(labels), bool))
        auroc = f"{roc_auc_score(labels[among], scores[among]):.3f}" if label else ""
        rows.append([group or "no group", WORDS[label], f"{len(these):,}", float(np.median(these)), auroc])
    return table(rows, ("group", "kind", "images", "median score", "AUROC"))


def decision_table(results):
    """What deciding by p <= fpr did, as in extras.predict; or why there is no decision."""
    if "trained_on" in results.metrics:
        return paragraph("There are none: these images are of another set than the run's own.")
    if results.n is None:
        return paragraph(f"None yet: python -m extras.predict {results.out} --test makes them.")
    if said := impossible(results.n, results.fpr):
        return paragraph(f"There are {said}.")
    d = results.decision
    rates = [(k.replace("_", " "), f"{d[k]:.3f}", "{:.3f} to {:.3f}".format(*d[f"{k}_interval_95"]))
             for k in ("false_positive_rate", "sensitivity")]
    expected = d["expected_false_positive_rate"]
    above = f", which are scores above {d['threshold']:.6g}" if "threshold" in d else ""
    said = (f"An image is called an anomaly where p is at most {d['fpr']:g}, by {results.n:,} calibration "
            f"normals{above}. The false positive rate should be about {expected:.3f}.")
    if d["false_positive_rate_interval_95"][0] > expected:
        said += " It is higher: the test normals may be unlike those that were held out."
    return paragraph(said) + table(rates, ("", "rate", "95% interval"))


def telling(labels, scores):
    """{title: rows, at most 6} of the images that say most. None is there twice; mistakes go first."""
    order = np.argsort(-scores, kind="stable")
    normals, anomalies = (order[labels[order] == label] for label in (0, 1))
    return {"Normals with the highest scores": normals[:6],
            "Anomalies with the lowest scores": anomalies[::-1][:6],
            "Anomalies with the highest scores": anomalies[:-6][:6],
            "Normals with the lowest scores": normals[6:][::-1][:6]}


def overlays_of(results, data):
    """{path: PIL images} of the telling images: as they are and, where the run has them, with heat maps."""
    rows = [i for mine in telling(results.labels, results.scores).values() for i in mine]
    images = data.test[[data.paths.index(results.paths[i]) for i in rows]]
    tiles = {results.paths[i]: [image] for i, image in zip(rows, images.float() / 255, strict=True)}
    if results.n is not None and (results.out / "predict.pt").is_file():
        try:
            scorer = load_run(results.out, passes=results.metrics.get("passes", 10), data=data)
            grids = scorer.parts(images, (), maps=True)[1]
        except SystemExit as error:                                 # the backbone's weights are gone, say
            print(f"note: the page is without heat maps: {error}")
            grids = []
        for grid, pair in zip(grids, tiles.values(), strict=False):
            pair.append(overlay(pair[0], grid, scorer.known["low"], scorer.known["high"]))
    return {path: [to_pil_image(image) for image in pair] for path, pair in tiles.items()}


def figure_of(results, i, overlays):
    """A test image of the page, its heat map where there is one, and what is known of it."""
    path, group, kind, html = results.paths[i], results.groups[i], WORDS[results.labels[i]], ""
    tiles = overlays.get(path, [])
    for tile, word in zip(tiles, ("", ", heat map"), strict=False):
        tile.thumbnail((320, 320))
        tile.save(png := io.BytesIO(), format="PNG")
        html += picture(png, f"{kind} {path}{word}") + "\n"
    p = f", p\u00a0{results.p[i]:.3g}" if results.p is not None else ""
    named = "" if group.lower() in ("", kind) else f", {group}"
    words = [path, f"{kind}{named}", f"score {results.scores[i]:.4g}{p}",
             f"rank {1 + (results.scores > results.scores[i]).sum():,} of {len(results.scores):,}"]
    return (f"<figure{' class=pair' * (len(tiles) == 2)}>{html}<figcaption>"
            f"{'<br>'.join(map(escape, words))}</figcaption></figure>")


def page(results, plots, data, gone):
    """The HTML page. plots: {name: HTML}; data: the run's Data, or None, and then `gone` says why."""
    overlays = overlays_of(results, data) if data else {}
    m, settings = results.metrics, results.metrics["settings"]
    third = settings.get("dissolve")
    method = settings.get("method") or ("CSI" if third == "none" else f"DIA, dissolve {third}")
    title = escape(f"{data_name(settings['data'])}: {method}, seed {settings['seed']}")
    interval = m["auroc_interval_95"]
    interval = "95% interval {:.3f} to {:.3f}".format(*interval) if interval else "too few for an interval"
    note = paragraph(f"The images could not be read again. {gone}") if gone else ""
    images = "\n".join(
        f"<h3>{name}</h3>\n<div class=row>{''.join(figure_of(results, i, overlays) for i in rows)}</div>"
        for name, rows in telling(results.labels, results.scores).items() if len(rows))
    rows = {k: v for k, v in settings.items() if k not in ("given", "changed", "format")}
    more = ("trained_on", "step", "passes", "patches_kept", "shots", "seconds", "processor")
    rows |= {k: m[k] for k in more if k in m}
    sections = {"ROC": plots["roc"],
                "Scores by group": groups_table(results) + paragraph(
                    "AUROC: a group's anomalies against its own normals, or against all if it has none.")
                + plots["scores"],
                "P-values": decision_table(results) + plots.get("p_values", ""),
                "Training": plots.get("training"),
                "The 24 most telling images": note + paragraph(
                    "Red: the most anomalous patches.") * ("class=pair" in images) + images,
                "Settings": table(rows.items()),
                "Data": note or f"<pre>{escape(found(data))}</pre>"}
    body = "\n".join(f"<section><h2>{name}</h2>\n{part}</section>" for name, part in sections.items() if part)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{STYLE}
</style></head><body>
<h1>{title}</h1>
<p class="big">AUROC {m["auroc"]:.3f}</p>
<p>{interval}; {m["normals"]:,} normal and {m["anomalies"]:,} anomalous test images</p>
{figures_table(m)}
{body}
<p>Research code, not for clinical decisions.</p>
</body></html>
"""


def report(out, where=None):
    """Write a run's page and pictures; where: its data, if they are elsewhere now."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install matplotlib") from None
    results, data, gone = read(out), None, ""
    labels, scores, settings = results.labels, results.scores, results.metrics["settings"]
    try:
        splits = ("train", "test", *["labelled"] * ("method" in settings))
        if "trained_on" in results.metrics:                                 # another set than the run's own
            data = load_data(where or settings["data"], settings["image_size"], ("test",),
                             normal_class=settings["normal_class"])
        else:
            data = data_of(settings, out, splits, where)
        if not set(results.paths) <= set(data.paths):
            raise SystemExit(f"{data.name} has other test images now.")
    except (SystemExit, OSError) as error:
        if where:
            raise
        gone = str(error)
        print(f"note: the page is without images: {gone}")
    draw = {"roc": lambda figure: roc(figure, labels, scores, results.metrics),
            "scores": lambda figure: score_histograms(figure, labels, scores, results.groups),
            "training": lambda figure: training_curves(figure, results.log)}
    if results.p is not None:
        draw["p_values"] = lambda figure: p_value_plot(figure, labels, results.p, results.n, results.fpr)
    plots = {}
    for name, plot in draw.items():
        plot(figure := Figure(figsize=(4, 4), layout="constrained"))
        if figure.axes:                                                     # none where nothing was trained
            with whole(out / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=110, format="png")
            plots[name] = f"<div class=row>{''.join(panels(figure, name))}</div>"
    with whole(out / "report.html") as temporary:
        temporary.write_text(page(results, plots, data, gone), encoding="utf-8")
    print(f"drew {', '.join(f'{name}.png' for name in plots)} in {out}, and wrote report.html")


def main():
    parser = make_parser(__doc__, usage=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs that have been scored")
    parser.add_argument("--data", help="where the runs' images are now (default: as in training)")
    args = parser.parse_args()
    for out in args.runs:
        report(Path(out), args.data)


if __name__ == "__main__":
    run(main, "nothing that was written before is lost")
