"""The tables of the methods that learn from a few labelled anomalies, from the runs themselves.

    python -m weakly_supervised.results runs/elpv-nearest runs/elpv-wscxr/shots-16 ...

adds the metrics.json of each folder to results.csv beside this file (a run already there is replaced) and
writes the tables in this folder's README.md, one for each set.
"""

import csv
import json
import re
import sys
from pathlib import Path

from dia_lib import data_name, run
from extras.tables import insert, markdown, mean_minutes, put, spread

TABLE = Path(__file__).parent / "results.csv"
README = TABLE.parent / "README.md"
KEY = ["data", "method", "backbone", "shots", "anomaly_class", "switches", "seed"]
FIGURES = ["auroc", "average_precision", "within_group_mean", "f1_at_fpr", "accuracy_at_fpr",
           "false_positive_rate", "f1_threshold_chosen_on_test", "accuracy_threshold_chosen_on_test",
           "auroc_seen_class", "auroc_all", "val_auroc", "pixel_auroc", "pro", "seconds"]
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
    found = metrics | {"false_positive_rate": (metrics["decision"] or {}).get("false_positive_rate")}
    values = ["" if found.get(k) is None else f"{found[k]:.4f}" for k in FIGURES]
    return dict(zip(KEY + FIGURES, map(str, key + values), strict=True)) | {"processor": metrics["processor"]}


def grouped(rows):
    """{setting, a tuple of KEY's values but the seed: its runs by seed}, in the table's order."""
    rows = sorted(rows, key=lambda r: int(r["seed"]))
    settings = {tuple(row[k] for k in KEY[:-1]) for row in rows}
    return {s: [r for r in rows if tuple(r[k] for k in KEY[:-1]) == s]
            for s in sorted(settings, key=lambda s: (s[1], s[5], s[4], s[2].split(" ")[0], int(s[3]), s[2]))}


def figures(runs, name):
    """The values of a figure in runs, without those that lack it."""
    return [float(r[name]) for r in runs if r[name]]


def table(rows):
    """Markdown of one set: a line for each method and setting, its seeds put together; no empty columns."""
    lines = []
    for (_, method, backbone, shots, group, switches), runs in grouped(rows).items():
        name = " ".join(f"`{word}`" for word in (method, *switches.split()))
        name += f" trained on {group}" if group else ""
        aurocs = figures(runs, "auroc")

        def both(*names, runs=runs):
            return " / ".join(filter(None, (spread(figures(runs, k)) for k in names)))
        lines.append({
            "method": name, "features": backbone, "labelled": shots,
            "seeds": ", ".join(r["seed"] for r in runs),
            "AUROC": f"**{spread(aurocs)}** ({', '.join(f'{v:.3f}' for v in aurocs)})",
            "mean within groups": both("within_group_mean"),
            "false-positive rate at `--fpr 0.05`": both("false_positive_rate"),
            "F1 / accuracy at it": both("f1_at_fpr", "accuracy_at_fpr"),
            "pixels: AUROC / PRO": both("pixel_auroc", "pro"),
            "minutes": mean_minutes((float(r["seconds"]) / 60, r["processor"]) for r in runs if r["seconds"]),
        })
    header = [k for k in lines[0] if any(line[k] for line in lines)]
    return markdown(header, [[line[k] for k in header] for line in lines])


def page():
    """The README.md of this folder with the tables that results.csv gives."""
    with open(TABLE, newline="") as file:
        rows, text = list(csv.DictReader(file)), README.read_text()
    for data in sorted({row["data"] for row in rows}):
        text = put(text, data, table([row for row in rows if row["data"] == data]))
    return text


def main():
    for folder in sys.argv[1:]:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; give folders that a method of weakly_supervised wrote.")
        row = row_of(json.loads(path.read_text()))
        put(README.read_text(), row["data"], "")                # exits where the page has no table of the set
        insert(TABLE, [row], KEY)
    README.write_text(page())
    print(f"wrote {TABLE} and the tables in {README}")


if __name__ == "__main__":
    run(main)
