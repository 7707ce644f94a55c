"""The table of the methods that learn from a few labelled anomalies, from the runs themselves.

    python -m weakly_supervised.results runs/elpv-nearest runs/elpv-wscxr/shots-16 ...

adds the metrics.json of each folder to results.csv beside this file (a run already there is replaced) and
writes the table in this folder's README.md.
"""

import csv
import json
import re
import sys
from pathlib import Path

from dia_lib import data_name, run
from extras.report import insert, markdown, mean_minutes, put, spread

TABLE = Path(__file__).parent / "results.csv"
README = TABLE.parent / "README.md"
KEY = ["data", "method", "backbone", "shots", "anomaly_class", "switches", "seed"]
FIGURES = ["auroc", "average_precision", "within_group_mean", "f1_at_fpr", "accuracy_at_fpr",
           "f1_threshold_chosen_on_test", "accuracy_threshold_chosen_on_test", "auroc_seen_class",
           "auroc_all", "val_auroc", "seconds"]
ELSEWHERE = {"data", "out", "seed", "backbone", "shots", "anomaly_class", "device", "maps", "layers",
             "resume", "labelled"}    # flags that have columns of their own, or change no figure


def row_of(metrics):
    """A run's row, from its metrics.json."""
    s = metrics["settings"]
    name, _, path = s["backbone"].partition(":")                # a run stands for its seeds: runs/elpv-csi-s1
    backbone = f"{name}:{re.sub(r'-s[0-9]+$', '', Path(path).name)}" if path else name
    switches = [f"{k}={'+'.join(v) if isinstance(v, list) else v}"
                for k, v in s["changed"].items() if k not in ELSEWHERE]
    features = f"{backbone} {s['image_size']} px, layers {' '.join(map(str, s['layers']))}"
    key = [data_name(s["data"]), s["method"], features, len(metrics["shots"]), s.get("anomaly_class") or "",
           " ".join(switches), s["seed"]]
    values = ["" if metrics.get(k) is None else f"{metrics[k]:.4f}" for k in FIGURES]
    return dict(zip(KEY + FIGURES, map(str, key + values), strict=True)) | {"processor": metrics["processor"]}


def grouped(rows, data="elpv"):
    """{setting, a tuple of KEY's values but the seed: its runs by seed} of one set, in the table's order."""
    rows = sorted((r for r in rows if r["data"] == data), key=lambda r: int(r["seed"]))
    settings = {tuple(row[k] for k in KEY[:-1]) for row in rows}
    return {s: [r for r in rows if tuple(r[k] for k in KEY[:-1]) == s]
            for s in sorted(settings, key=lambda s: (s[1], s[5], s[4], s[2].split(" ")[0], int(s[3])))}


def figures(runs, name):
    """The values of a figure in runs, without those that lack it."""
    return [float(r[name]) for r in runs if r[name]]


def table(rows):
    """Markdown: a line for each method and setting, its seeds put together."""
    lines = []
    for (_, method, backbone, shots, group, switches), runs in grouped(rows).items():
        name = " ".join(f"`{word}`" for word in (method, *switches.split()))
        name += f" trained on {group}" if group else ""
        minutes = mean_minutes((float(r["seconds"]) / 60, r["processor"]) for r in runs if r["seconds"])
        aurocs = figures(runs, "auroc")
        decided = (spread(figures(runs, k)) for k in ("f1_at_fpr", "accuracy_at_fpr"))
        lines.append([name, backbone, shots, ", ".join(r["seed"] for r in runs),
                      f"**{spread(aurocs)}** ({', '.join(f'{v:.3f}' for v in aurocs)})",
                      spread(figures(runs, "within_group_mean")), " / ".join(filter(None, decided)), minutes])
    return markdown(["method", "features", "labelled anomalies", "seeds", "AUROC", "mean within groups",
                     "F1 / accuracy at `--fpr 0.05`", "minutes"], lines)


def page():
    """The README.md of this folder with the table that results.csv gives."""
    with open(TABLE, newline="") as file:
        return put(README.read_text(), "weakly supervised", table(list(csv.DictReader(file))))


def main():
    for folder in sys.argv[1:]:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; give folders that a method of weakly_supervised wrote.")
        insert(TABLE, [row_of(json.loads(path.read_text()))], KEY)
    README.write_text(page())
    print(f"wrote {TABLE} and the table in {README}")


if __name__ == "__main__":
    run(main)
