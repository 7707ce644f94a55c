"""The tables of the methods that learn from a few labelled anomalies, from the runs themselves.

    python -m weakly_supervised.results runs/elpv-nearest runs/elpv-wscxr/shots-16 ...

adds the metrics.json of each folder to results.csv beside this file (a run already there is replaced) and writes the tables: of
all runs in the README.md of this folder, of the systems as they come in the one above.
"""

import csv
import json
import re
import statistics
import sys
from pathlib import Path

from dia_data import data_name
from dia_lib import run
from evaluate import insert
from study import results as study
from study.results import markdown, put, spread

TABLE = Path(__file__).parent / "results.csv"
README, DETAILS = study.README, TABLE.parent / "README.md"
KEY = ["data", "method", "backbone", "shots", "anomaly_class", "switches", "seed"]
FIGURES = ["auroc", "average_precision", "within_group_mean", "f1_at_fpr", "accuracy_at_fpr", "f1_threshold_chosen_on_test",
           "accuracy_threshold_chosen_on_test", "auroc_seen_class", "auroc_all", "val_auroc", "seconds"]
ELSEWHERE = {"data", "out", "seed", "backbone", "shots", "anomaly_class", "device", "maps", "layers",
             "resume", "labelled"}    # flags that have columns of their own, or change no figure
SYSTEMS = {("nearest", ""): "nearest neighbour", ("nearest", "aggregate=1"): "nearest neighbour", ("wscxr", ""): "WSCXR",
           ("wscxr", "aggregate=1"): "WSCXR", ("dra", ""): "DRA", ("dra", "heads=seen"): "DevNet", ("ckaad", ""): "CKAAD",
           ("ckaad", "strategy=recon"): "CKAAD's auto-encoder alone"}


def row_of(metrics):
    """A run's row, from its metrics.json."""
    s = metrics["settings"]
    name, _, path = s["backbone"].partition(":")                            # a run stands for the kind of runs: runs/elpv-csi-s1
    backbone = f"{name}:{re.sub(r'-s[0-9]+$', '', Path(path).name)}" if path else name
    switches = [f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in s["changed"].items() if k not in ELSEWHERE]
    key = [data_name(s["data"]), s["method"], f"{backbone} {s['image_size']} px, layers {' '.join(map(str, s['layers']))}",
           len(metrics["shots"]), s.get("anomaly_class") or "", " ".join(switches), s["seed"]]
    values = ["" if metrics.get(k) is None else f"{metrics[k]:.4f}" for k in FIGURES]
    return dict(zip(KEY + FIGURES, map(str, key + values), strict=True)) | {"processor": metrics["processor"]}


def grouped(rows, data="elpv"):
    """{setting, a tuple of KEY's values but the seed: its runs by seed} of one data set, in the order of the tables."""
    rows = sorted((r for r in rows if r["data"] == data), key=lambda r: int(r["seed"]))
    settings = {tuple(row[k] for k in KEY[:-1]) for row in rows}
    return {s: [r for r in rows if tuple(r[k] for k in KEY[:-1]) == s]
            for s in sorted(settings, key=lambda s: (s[1], s[5], s[4], s[2].split(" ")[0], int(s[3])))}


def figures(runs, name):
    """The values of a figure in runs, without those that lack it."""
    return [float(r[name]) for r in runs if r[name]]


def minutes(runs):
    """The mean minutes of runs, for a table, without those that lack them (they were paused)."""
    return study.mean_minutes((float(r["seconds"]) / 60, r["processor"]) for r in runs if r["seconds"])


def table(rows):
    """Markdown: a line for each method and setting, its seeds put together."""
    lines = []
    for (_, method, backbone, shots, group, switches), runs in grouped(rows).items():
        name = " ".join([f"`{method}`", *(f"`{w}`" for w in switches.split()), *([f"trained on {group}"] if group else [])])
        aurocs = figures(runs, "auroc")
        decided = (spread(figures(runs, k)) for k in ("f1_at_fpr", "accuracy_at_fpr"))
        lines.append([name, backbone, shots, ", ".join(r["seed"] for r in runs),
                      f"**{spread(aurocs)}** ({', '.join(f'{v:.3f}' for v in aurocs)})",
                      spread(figures(runs, "within_group_mean")), " / ".join(filter(None, decided)), minutes(runs)])
    return markdown(["method", "features", "labelled anomalies", "seeds", "AUROC", "mean within groups",
                     "F1 / accuracy at `--fpr 0.05`", "minutes"], lines)


def systems(rows, encoders, floors):
    """Markdown: every system as it comes, on the same split, best first.

    rows: of results.csv; encoders, floors: of study.results.read and floors.
    """
    found = []
    for (name, images), values in floors.items():
        if images == "64 px":                                               # the size of the runs below
            found.append([f"floor: {name}", "0", "none", values, ""])
    for mode in study.MODES:
        runs = study.of(encoders, mode, study.LONGER, "local").values()
        if runs:
            name = f"{study.NAMES.get(mode, f'`{mode}`')}, score `local` (64 px, {study.LONGER})"
            took = study.mean_minutes((r["minutes"], r["processor"]) for r in runs)
            found.append([name, "0", "none", [r["auroc"] for r in runs], took])
    for (_, method, backbone, shots, group, switches), runs in grouped(rows).items():
        name = SYSTEMS.get((method, switches))
        if name and not group:
            features = re.sub("^dia:[^ ]*", "DIA's encoder", backbone.split(",")[0])
            outside = "none" if backbone.startswith("dia:") else "ImageNet"
            found.append([f"{name} ({features})", shots, outside, figures(runs, "auroc"), minutes(runs)])
    found.sort(key=lambda line: -statistics.fmean(line[3]))
    return markdown(["system", "labelled anomalies", "outside data", "AUROC", "seeds", "minutes"],
                    [[name, shots, outside, f"**{spread(values)}**", str(len(values)), took]
                     for name, shots, outside, values, took in found])


def pages():
    """{path: text} of the pages with these tables, as the csv files have them."""
    with open(TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    others = study.HERE / "results.csv"
    return {DETAILS: put(DETAILS.read_text(), "weakly supervised", table(rows)),
            README: put(README.read_text(), "systems", systems(rows, study.read(others), study.floors(others)))}


def main():
    for folder in sys.argv[1:]:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; give the folders that a method of weakly_supervised wrote.")
        row = row_of(json.loads(path.read_text()))
        insert(TABLE, [row], KEY)
    for path, text in pages().items():
        path.write_text(text)
    print(f"wrote {TABLE} and the tables in {DETAILS} and {README}")


if __name__ == "__main__":
    run(main)
