"""Stage 3: score the test images of one or several runs. Higher means more anomalous.

    python evaluate.py                                                       # runs/elpv
    python evaluate.py --out runs/elpv runs/elpv-s1 runs/elpv-s2             # each run, and mean +- sd

    python evaluate.py --score csi                                           # the paper's score (DIA Sec. 3.3)
    python evaluate.py --results study/results.csv                           # and append the run to a table

Writes into each run's folder scores.csv (path, group, label, score), metrics.json, examples.png and stats.pt (what
the score needs of the training images). The last line on stdout is `auroc 0.xxxx`, the mean over the runs.
"""

import argparse
import csv
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.metrics import average_precision_score, roc_auc_score

from dia_data import data_name, load_data
from dia_lib import (
    SCORES, Encoder, K, Log, UNet, alpha_bar, dissolve_view, fit_normals, fit_to, load_checkpoint, pick_device, run,
    save_checkpoint, save_grid, score_images, sha256_of, shared_flags, to_float, whole,
)


csv.field_size_limit(2 ** 31 - 1)                           # a row of results-scores.csv has the scores of all test images
VALIDATION = {"csi": "val_auroc", "cos": "val_cos", "local": "val_local"}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_flags(parser, data=None)
    parser.add_argument("--out", nargs="+", metavar="RUN", help="folders of runs (default: runs/<data>)")
    parser.add_argument("--score", choices=SCORES, default="local", help="csi: CSI's full score, the paper's; cos: its cosine "
                        "alone; local: nearest neighbour of local features (default: local)")
    parser.add_argument("--passes", type=int, default=10, help="test-time passes averaged (default: 10)")
    parser.add_argument("--batch-size", type=int, default=96, help="images a step, before shifts (default: 96)")
    parser.add_argument("--results", metavar="FILE", help="append each run to this csv table (a run already there is replaced), "
                        "and its scores to FILE with -scores before the suffix")
    parser.add_argument("--validation-only", action="store_true",
                        help="with --results: append what training found on held-out normals, read no test image")
    args = parser.parse_args(argv)
    if args.validation_only and not args.results:
        raise SystemExit("--validation-only: says what to append to --results FILE; give both.")
    args.out = args.out or [f"runs/{data_name(args.data or 'elpv')}"]
    if args.passes < 1 or args.batch_size < 1:
        raise SystemExit("--passes and --batch-size need at least 1.")
    return args


def auroc_interval(labels, scores):
    """AUROC and its 95% interval: percentile bootstrap over normals and anomalies apart, 2,000 resamples.

    labels, scores: (Q,) arrays. The interval is None if there are fewer than 2 normals or 2 anomalies.
    """
    value = float(roc_auc_score(labels, scores))
    if min((labels == 0).sum(), (labels == 1).sum()) < 2:
        return value, None

    def auroc(anomalies, normals, axis):
        return mannwhitneyu(anomalies, normals, axis=axis).statistic / (anomalies.shape[axis] * normals.shape[axis])

    result = bootstrap((scores[labels == 1], scores[labels == 0]), auroc, n_resamples=2000, batch=100,
                       method="percentile", rng=np.random.default_rng(0))
    return value, [float(v) for v in result.confidence_interval]


def within_groups(labels, scores, groups):
    """AUROC of each group's anomalies against the same group's normals, for groups that hold both; {name: AUROC}."""
    groups = np.array(groups)
    return {g: float(roc_auc_score(labels[groups == g], scores[groups == g])) for g in sorted(set(groups))
            if len(set(labels[groups == g])) == 2}


def floors(data, encoder, shift, jitter, part, device, batch):
    """AUROCs that a trained model has to beat: mean brightness, pixels, and the same encoder untrained."""
    labels = data.labels.numpy()

    def pixels(images):                                 # 32 px images divided by their mean (n, 1024), and the mean (n, 1)
        flat = torch.cat([fit_to(to_float(chunk, 1, device), 32).flatten(1) for chunk in images.split(256)])
        mean = flat.mean(1, keepdim=True)
        return flat / mean.clamp(min=1e-6), mean

    (test, brightness), (train, _) = pixels(data.test), pixels(data.train)
    nearest = torch.cat([torch.cdist(chunk, train).amin(1) for chunk in test.split(256)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # untrained: that is the point
        stats = fit_normals(encoder, data.train, shift, 1, device, batch, jitter=jitter)
        untrained = score_images(encoder, stats, data.test, shift, 1, device, batch, jitter=jitter)[part]
    scores = {"minus mean brightness": -brightness[:, 0], "nearest neighbour on 32 px pixels": nearest,
              "encoder untrained": untrained}
    return {name: float(roc_auc_score(labels, score.cpu().numpy())) for name, score in scores.items()}


def examples(path, data, score, settings, out, device):
    """Most and least anomalous test images of each label; beside each its dissolved version and their difference."""
    mode, unet, abar, t = settings["dissolve"], None, None, None
    if mode in ("diffusion", "residual"):
        found = [p for p in (out / "diffusion.pt", Path(settings["diffusion"]))
                 if p.is_file() and sha256_of(p) == settings["diffusion_sha256"]]
        if found:
            state = load_checkpoint(found[0], "diffusion", device)
            unet = UNet(settings["channels"], state["settings"]["dim"]).to(device)
            unet.load_state_dict(state["ema"])
            abar = alpha_bar(state["settings"]["schedule"]).to(device)
            t = torch.tensor([sum(settings["t_range"]) // 2], device=device)
        else:
            mode = "none"
            print(f"  stage 1's checkpoint ({settings['diffusion']}) is not there: examples.png shows no dissolved images")
    plain, rows, order = mode in ("none", "copy"), [], score.argsort(descending=True)
    for label in (1, 0):
        ranked = order[data.labels[order] == label]
        for picked in (ranked[:4], ranked[-4:]):
            row = []
            for i in picked.tolist():
                x = to_float(data.test[i:i + 1], settings["channels"], device)
                twin = x if plain else dissolve_view(unet, x, t, abar, settings["dissolve_size"], mode, gain=settings["gain"])
                row += [x[0]] if plain else [x[0], twin[0], (4 * (x - twin).abs()).clamp(0, 1)[0]]
            rows.append(row)
    captions = ["image"] * 4 if plain else ["image", mode if t is None else f"t = {int(t)}", "4 x |diff|"] * 4
    rows = [row + [None] * (len(captions) - len(row)) for row in rows]      # fewer than 4 images of a label
    names = ["anomalies, highest scores", "anomalies, lowest", "normals, highest", "normals, lowest"]
    save_grid(path, rows, captions, scale=max(1, 128 // settings["image_size"]), names=names)


def evaluate(out, args, device):
    """Score one run; write its files; return its metrics."""
    begun = time.perf_counter()
    state = load_checkpoint(out / "dia.pt", "dia", device)
    s = {"jitter": 1.0, "gain": 1.0, **state["settings"]}                   # runs of earlier versions have none of these
    data = load_data(args.data or s["data"], s["image_size"], ("train", "test"), s["holdout"],
                     args.normal_class or s["normal_class"])
    if data.fingerprint != s["fingerprint"]:
        raise SystemExit(f"{out}/dia.pt was trained on other images than --data {args.data or s['data']} has now.")
    labels = data.labels.numpy()
    if len(set(labels)) != 2:
        raise SystemExit(f"{data.name}: all {len(labels)} test images are {'anomalies' if labels.all() else 'normal'}; "
                         "an AUROC needs both normal and anomalous test images.")
    torch.manual_seed(s["seed"])
    untrained = Encoder(s["channels"], K, s["stem"]).to(device, memory_format=torch.channels_last)
    encoder = Encoder(s["channels"], K, s["stem"]).to(device, memory_format=torch.channels_last)
    encoder.load_state_dict(state["encoder"])

    print(f"{out}: {data.name}, {len(data.train)} training images, {len(labels)} test images ({labels.sum()} anomalies), "
          f"dissolve {s['dissolve']}, seed {s['seed']}, step {state['step']} of {s['steps']}", flush=True)
    key = sha256_of(out / "dia.pt")
    stats = load_stats(out / "stats.pt", key, args.passes)
    if stats is None:
        stats = fit_normals(encoder, data.train, s["shift"], args.passes, device, args.batch_size, "training images",
                            s["jitter"])
        save_checkpoint(out / "stats.pt", "stats", {"key": key, "passes": args.passes}, stats)
    parts = score_images(encoder, stats, data.test, s["shift"], args.passes, device, args.batch_size, "test images",
                         s["jitter"])
    scores = parts[args.score].numpy()

    auroc, interval = auroc_interval(labels, scores)
    groups = within_groups(labels, scores, data.groups)
    metrics = {
        "score": args.score, "auroc": auroc, "auroc_interval_95": interval,
        "average_precision": float(average_precision_score(labels, scores)),
        "parts_auroc": {n: float(roc_auc_score(labels, p.numpy())) for n, p in parts.items()},
        "within_group_auroc": groups, "within_group_mean": statistics.fmean(groups.values()) if groups else None,
        "floors_auroc": floors(data, untrained, s["shift"], s["jitter"], args.score, device, args.batch_size),
        "normals": int((labels == 0).sum()), "anomalies": int(labels.sum()), "passes": args.passes, "step": state["step"],
        "settings": s, "seconds": round(time.perf_counter() - begun, 1)}
    write(out / "metrics.json", lambda file: json.dump(metrics, file, indent=1))
    if args.results:
        append_result(Path(args.results), state, labels, parts, data.groups, metrics)
    write(out / "scores.csv", lambda file: csv.writer(file).writerows(
        [("path", "group", "label", "score"), *zip(data.paths, data.groups, labels, scores, strict=True)]))
    Log(out, "evaluate", math.inf)(state["step"], show=False, score=args.score, auroc=auroc, auroc_interval_95=interval,
                                   passes=args.passes)
    spread = f"95% interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "too few images for an interval"
    print(f"  AUROC {auroc:.4f}  ({spread})  average precision {metrics['average_precision']:.4f}")
    print("  parts: " + "  ".join(f"{n} {v:.3f}" for n, v in metrics["parts_auroc"].items()))
    if groups:
        print("  within group: " + "  ".join(f"{n} {v:.3f}" for n, v in groups.items())
              + f"  mean {metrics['within_group_mean']:.3f}")
    for name, floor in metrics["floors_auroc"].items():
        print(f"  floor: {name} {floor:.3f}{'' if floor < auroc else '  <- not beaten'}")
    examples(out / "examples.png", data, parts[args.score], s, out, device)
    print(f"  wrote scores.csv, metrics.json, examples.png, stats.pt to {out} in {metrics['seconds']:.0f} s", flush=True)
    return metrics


def run_key(state):
    """What tells a run from others in a table: data, dissolve, settings other than the paper's, seed, steps; from its dia.pt."""
    s = state["settings"]
    stage1 = {f"stage1_{k}": v for k, v in (s.get("stage1") or {}).items() if (k, v) != ("seed", s["seed"])}
    settings = " ".join(f"{k}={'-'.join(map(str, v)) if isinstance(v, list) else v}"
                        for k, v in {**s.get("changed", {}), "steps": s["steps"], **stage1}.items())
    return {"data": data_name(s["data"]), "dissolve": s["dissolve"], "settings": settings, "seed": s["seed"],
            "steps": state["step"]}


def append_result(path, state, labels=None, parts=None, groups=None, metrics=None):
    """Append a run to the table at path, a row for each of SCORES, and its scores beside it; rows there already are replaced.

    Without labels, parts, groups (those of the test images) and metrics, what the checkpoint knows of held-out normals
    alone. The floors of metrics get rows of their own, with steps 0.
    """
    run, validation, blank = run_key(state), state.get("validation", {}), dict.fromkeys(run_key(state), "")
    scores_path = path.with_name(f"{path.stem}-scores{path.suffix}")
    if parts:
        row = {**blank, "data": run["data"], "score": "labels", "values": " ".join(map(str, labels))}
        insert(scores_path, list(row), row, [*run, "score"])
    for score in SCORES:
        figures = {"minutes": state.get("seconds", math.nan) / 60, "val_auroc": validation.get(VALIDATION[score]),
                   "auroc": None, "ap": None, "within_group_auroc": None}
        if parts:
            values = parts[score].numpy()
            within = within_groups(labels, values, groups)
            figures |= {"auroc": roc_auc_score(labels, values), "ap": average_precision_score(labels, values),
                        "within_group_auroc": statistics.fmean(within.values()) if within else None}
        figures = {k: "" if v is None else f"{v:.4f}" for k, v in figures.items()}
        row = {**run, "score": score, **figures, "commit": state["settings"].get("commit", "")}
        columns = list(row)
        insert(path, columns, row, [*run, "score"])
        if parts:
            row = {**run, "score": score, "values": " ".join(f"{v:.7g}" for v in values)}
            insert(scores_path, list(row), row, [*run, "score"])
    for name, value in (metrics or {"floors_auroc": {}})["floors_auroc"].items():
        floor = {**dict.fromkeys(columns, ""), "data": run["data"], "dissolve": f"floor: {name}", "steps": 0,
                 "auroc": f"{value:.4f}"}
        names = ["image_size", "holdout"]
        if "untrained" in name:
            floor |= {"seed": run["seed"], "score": metrics["score"]}
            names.append("jitter")
        floor["settings"] = " ".join(f"{k}={state['settings'].get(k, 1.0)}" for k in names)
        insert(path, columns, floor, [*run, "score"])


def insert(path, columns, row, key):
    """Write the row (a dict) into a csv table, at its end, or in place of the one with the same key (names of columns).

    What is empty in the new row stays as it was.
    """
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        if reader.fieldnames != columns:
            raise SystemExit(f"{path} is another table: its columns are {reader.fieldnames}, not {columns}.")
    row = {k: str(v) for k, v in row.items()}
    same = [i for i, r in enumerate(rows) if all(r[k] == row[k] for k in key)]
    if same:
        rows[same[0]] = {k: v or rows[same[0]][k] for k, v in row.items()}
    else:
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: csv.writer(file, lineterminator="\n").writerows([columns, *([r[c] for c in columns] for r in rows)]))


def load_stats(path, key, passes):
    """fit_normals's result of an earlier evaluation of the same checkpoint with the same passes, or None."""
    if not path.exists():
        return None
    try:
        state = load_checkpoint(path, "stats", "cpu")
    except SystemExit:
        return None                                                         # it is made again
    return state if (state["settings"]["key"], state["settings"]["passes"]) == (key, passes) and "local" in state else None


def write(path, writer):
    """Write a text file whole or not at all."""
    with whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer(file)


def main():
    args = arguments()
    device = pick_device(args.device)
    if args.validation_only:
        for out in args.out:
            append_result(Path(args.results), load_checkpoint(Path(out) / "dia.pt", "dia", "cpu"))
        print(f"appended {len(args.out)} runs to {args.results}")
        return
    results = [evaluate(Path(out), args, device) for out in args.out]
    values = [r["auroc"] for r in results]
    if len(values) > 1:
        print(f"{len(values)} runs: AUROC {', '.join(f'{v:.4f}' for v in values)}; mean {statistics.fmean(values):.4f} "
              f"+- {statistics.stdev(values):.4f}")
    print(f"auroc {statistics.fmean(values):.4f}")


if __name__ == "__main__":
    run(main)
