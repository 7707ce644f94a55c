"""The README's table of the methods that learn from a few labelled anomalies, from the runs themselves.

    python -m weakly_supervised.results runs/elpv-nearest runs/elpv-wscxr/shots-16 ...

adds the metrics.json of each folder to results.csv beside this file (a run already there is replaced) and writes the table.
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
from study.results import README, markdown, put, spread

TABLE = Path(__file__).parent / "results.csv"
KEY = ["data", "method", "backbone", "shots", "anomaly_class", "switches", "seed"]
FIGURES = ["auroc", "average_precision", "within_group_mean", "f1_at_fpr", "accuracy_at_fpr", "f1_threshold_chosen_on_test",
           "accuracy_threshold_chosen_on_test", "auroc_seen_class", "auroc_all", "val_auroc", "seconds"]
ELSEWHERE = {"data", "out", "seed", "backbone", "shots", "anomaly_class", "device", "maps", "layers",
             "image_size", "resume"}    # flags that have columns of their own, or change no figure


def row_of(metrics):
    """A run's row, from its metrics.json."""
    s = metrics["settings"]
    name, _, path = s["backbone"].partition(":")                            # a run stands for the kind of runs: runs/elpv-csi-s1
    backbone = f"{name}:{re.sub(r'-s[0-9]+$', '', Path(path).name)}" if path else name
    switches = [f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in s["changed"].items() if k not in ELSEWHERE]
    key = [data_name(s["data"]), s["method"], f"{backbone} {s['image_size']} px, layers {' '.join(map(str, s['layers']))}",
           len(metrics["shots"]), s.get("anomaly_class") or "", " ".join(switches), s["seed"]]
    values = ["" if metrics.get(k) is None else f"{metrics[k]:.4f}" for k in FIGURES]
    return dict(zip(KEY + FIGURES, map(str, key + values), strict=True))


def table(rows, data="elpv"):
    """Markdown: a line for each method and setting on one data set, its seeds put together."""
    lines, settings = [], {tuple(row[k] for k in KEY[:-1]): None for row in rows if row["data"] == data}
    for setting in sorted(settings, key=lambda s: (s[1], s[5], s[4], s[2].split(" ")[0], int(s[3]))):
        runs = sorted((r for r in rows if tuple(r[k] for k in KEY[:-1]) == setting), key=lambda r: int(r["seed"]))
        values = {k: [float(r[k]) if r[k] else None for r in runs] for k in FIGURES}
        _, method, backbone, shots, group, switches = setting
        name = " ".join([f"`{method}`", *(f"`{w}`" for w in switches.split()), *([f"trained on {group}"] if group else [])])
        each = ", ".join(f"{v:.3f}" for v in values["auroc"])
        seeds = ", ".join(r["seed"] for r in runs)
        seconds = [v for v in values["seconds"] if v is not None]                   # not of runs that were paused
        minutes = f"{statistics.fmean(seconds) / 60:.1f}" if seconds else ""
        lines.append([name, backbone, shots, seeds, f"**{spread(values['auroc'])}** ({each})",
                      spread(values["within_group_mean"]),
                      " / ".join(filter(None, (spread(values["f1_at_fpr"]), spread(values["accuracy_at_fpr"])))),
                      minutes])
    return markdown(["method", "features", "labelled anomalies", "seeds", "AUROC", "mean within groups",
                     "F1 / accuracy at `--fpr 0.05`", "minutes"], lines)


def readme():
    """The text of README.md with the table as results.csv has it."""
    with open(TABLE, newline="") as file:
        return put(README.read_text(), "weakly supervised", table(list(csv.DictReader(file))))


def main():
    for folder in sys.argv[1:]:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; give the folders that a method of weakly_supervised wrote.")
        row = row_of(json.loads(path.read_text()))
        insert(TABLE, list(row), row, KEY)
    README.write_text(readme())
    print(f"wrote {TABLE.name} and the table in {README.name}")


if __name__ == "__main__":
    run(main)
