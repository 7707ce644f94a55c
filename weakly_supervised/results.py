"""The table of the methods that learn from a few labelled anomalies, from the runs themselves.

    python -m weakly_supervised.results runs/elpv-nearest runs/elpv-wscxr/shots-16 ...

adds the metrics.json of each folder to results.csv beside this file (a run already there is replaced) and
writes the table in this folder's README.md: a line for each method and setting, a column for each set.
"""

import csv
import json
import re
import sys
from pathlib import Path

from dia_lib import data_name, run
from extras.tables import insert, markdown, put, spread

TABLE = Path(__file__).parent / "results.csv"
README = TABLE.parent / "README.md"
KEY = ["data", "method", "backbone", "shots", "anomaly_class", "switches", "seed"]
FIGURES = ["auroc", "average_precision", "within_group_mean", "f1_at_fpr", "accuracy_at_fpr",
           "false_positive_rate", "f1_threshold_chosen_on_test", "accuracy_threshold_chosen_on_test",
           "auroc_seen_class", "auroc_all", "val_auroc", "pixel_auroc", "pro", "seconds"]
ELSEWHERE = {"data", "out", "seed", "backbone", "shots", "anomaly_class", "device", "maps", "layers",
             "resume", "labelled"}    # flags that have columns of their own, or change no figure
METHODS = ["nearest", "wscxr", "dra", "ckaad"]
SETS = {"chest_xray_224": "chest X-rays", "elpv": "ELPV", "magnetic_tile": "magnetic tiles"}
PUBLISHED = {           # (method, switches or group, labelled): {set: AUROC}, on the papers' own backbones
    ("nearest", "", "0"): {"chest_xray_224": "0.904"},                      # PatchCore in WSCXR's Table I
    ("wscxr", "", "2"): {"chest_xray_224": "0.947"}, ("wscxr", "", "4"): {"chest_xray_224": "0.963"},
    ("wscxr", "", "8"): {"chest_xray_224": "0.970"}, ("wscxr", "", "16"): {"chest_xray_224": "0.972"},
    ("wscxr", "mining=False mixing=False", "16"): {"chest_xray_224": "0.892"},
    ("wscxr", "mixing=False", "16"): {"chest_xray_224": "0.949"},
    ("wscxr", "mining=False", "16"): {"chest_xray_224": "0.922"},
    ("dra", "heads=seen", "1"): {"elpv": "0.514"}, ("dra", "heads=seen", "10"): {"elpv": "0.846"},
    ("dra", "", "1"): {"elpv": "0.675"}, ("dra", "", "10"): {"elpv": "0.845"},
    ("dra", "heads=seen", "5%"): {"chest_xray_224": "0.958"}, ("dra", "", "5%"): {"chest_xray_224": "0.936"},
    ("dra", "mono", "10"): {"elpv": "0.731"}, ("dra", "poly", "10"): {"elpv": "0.800"},
    ("ckaad", "strategy=recon", "0"): {"chest_xray_224": "0.856"},
    ("ckaad", "", "1%"): {"chest_xray_224": "0.932"}, ("ckaad", "", "2%"): {"chest_xray_224": "0.952"},
    ("ckaad", "", "5%"): {"chest_xray_224": "0.966"},
    ("ckaad", "strategy=minus-anomaly", "5%"): {"chest_xray_224": "0.923"},
    ("ckaad", "strategy=gan", "5%"): {"chest_xray_224": "0.952"},
    ("ckaad", "strategy=image", "5%"): {"chest_xray_224": "0.960"},
}


def row_of(metrics):
    """A run's row, from its metrics.json."""
    s = metrics["settings"]
    name, _, path = s["backbone"].partition(":")                # a run stands for its seeds: runs/elpv-csi-s1
    backbone = f"{name}:{re.sub(r'-s[0-9]+$', '', Path(path).name)}" if path else name
    switches = [f"{k}={'+'.join(v) if isinstance(v, list) else v}"
                for k, v in s["changed"].items() if k not in ELSEWHERE]
    features = f"{backbone} {s['image_size']} px, layers {' '.join(map(str, s['layers']))}"
    n, shares = len(metrics["shots"]), sorted(s.get("labelled") or [])
    told_apart = shares and len(shares) == len(s["shots"])              # two shares may be one number
    share = shares[s["shots"].index(n)] if told_apart else None
    key = [data_name(s["data"]), s["method"], features, n, s.get("anomaly_class") or "",
           " ".join(switches), s["seed"]]
    found = metrics | {"false_positive_rate": (metrics["decision"] or {}).get("false_positive_rate")}
    values = ["" if found.get(k) is None else f"{found[k]:.4f}" for k in FIGURES]
    return dict(zip(KEY + FIGURES, map(str, key + values), strict=True)) | {
        "labelled": f"{100 * share:g}%" if share else "", "processor": metrics["processor"]}


def figures(runs, name):
    """The values of a figure in runs, without those that lack it."""
    return [float(r[name]) for r in runs if r[name]]


def cell(runs, published):
    """AUROC of runs that differ in their seed: mean ± sd, each; the paper's; AUROC and PRO of pixels.

    "" of fewer than three: they are in results.csv alone.
    """
    if len(runs) < 3:
        return ""
    values = figures(runs, "auroc")
    words = [f"{spread(values)} ({', '.join(f'{v:.3f}' for v in values)})"]
    words += [f"paper {published}"] * bool(published)
    if pixels := figures(runs, "pixel_auroc"):
        words.append(f"pixel AUROC {spread(pixels)}, PRO {spread(figures(runs, 'pro'))}")
    return "; ".join(words)


def table(rows):
    """Markdown: a line for each method and setting, a column for each set, seeds put together."""
    rows, lines = sorted(rows, key=lambda r: int(r["seed"])), {}
    for row in rows:
        labelled = row["labelled"] or row["shots"]
        line = tuple(row[k] for k in ("method", "switches", "anomaly_class", "backbone")) + (labelled,)
        lines.setdefault(line, {}).setdefault(row["data"], []).append(row)

    def order(line):
        method, switches, group, backbone, labelled = line
        return (METHODS.index(method), backbone.startswith("dia:"), switches, group, backbone,
                float(labelled.rstrip("%")))

    found = []
    for line in sorted(lines, key=order):
        method, switches, group, backbone, labelled = line
        own = backbone.startswith("dia:")                                   # no paper has that
        published = {} if own else PUBLISHED.get((method, switches or group, labelled), {})
        name = " ".join(f"`{word}`" for word in (method, *switches.split()))
        cells = [cell(lines[line].get(data, []), published.get(data)) for data in SETS]
        if any(cells):
            features = backbone.removeprefix("efficientnet_lite0 ").replace(" px, layers", " px,")
            found.append([name + f", trained on {group}" * bool(group), features, labelled, *cells])
    return markdown(["method", "features", "labelled", *SETS.values()], found)


def page():
    """The README.md of this folder with the table that results.csv gives."""
    with open(TABLE, newline="") as file:
        return put(README.read_text(), "AUROC", table(csv.DictReader(file)))


def main():
    for folder in sys.argv[1:]:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file; give folders that a method of weakly_supervised wrote.")
        row = row_of(json.loads(path.read_text()))
        if row["data"] not in SETS:
            raise SystemExit(f"{folder}: the page has no column of {row['data']}.")
        insert(TABLE, [row], KEY)
    README.write_text(page())
    print(f"wrote {TABLE} and the table in {README}")


if __name__ == "__main__":
    run(main)
