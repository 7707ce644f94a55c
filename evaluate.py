"""Stage 3: score the test images of one or several runs, or images of your own. Higher means more anomalous.

    python evaluate.py                                                       # runs/elpv
    python evaluate.py --out runs/elpv runs/elpv-s1 runs/elpv-s2             # each run, and mean +- sd

    python evaluate.py --score csi                                           # the paper's score (DIA Sec. 3.3)
    python evaluate.py --out runs/lungs --images new_scans                   # images without labels
    python evaluate.py --results study/results.csv                           # and append the run to a table

Writes into each run's folder scores.csv (path, group, label, score, p_value, anomaly), metrics.json, examples.png and
stats.pt (what the score needs of the training images). The last line on stdout is `auroc 0.xxxx`, the mean over the runs.
With --images nothing but dia.pt and stats.pt is needed; scores.csv and examples.png go to RUN/images/<folder's name>.

    from dia_data import load_images                                         # the same from Python
    from evaluate import load_run
    run = load_run("runs/lungs")
    images, paths = load_images("new_scans", run.settings["image_size"])
    scores, p_values = run.score(images)                                     # (n,) and (n,)
"""

import argparse
import csv
import hashlib
import json
import math
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap, mannwhitneyu
from sklearn.metrics import average_precision_score, roc_auc_score

from dia_data import data_name, load_data, load_images
from dia_lib import (
    SCORES, Encoder, K, Log, dissolve_view, fit_normals, fit_to, load_checkpoint, pick_device, run, save_checkpoint,
    save_grid, score_images, sha256_of, shared_flags, to_float, unet_of, whole,
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
    parser.add_argument("--fpr", type=float, default=0.05, help="share of normal images that may be called anomalies (default: "
                        "0.05)")
    parser.add_argument("--images", metavar="FOLDER", help="score all images below this folder, without labels, not the test set")
    parser.add_argument("--report", action="store_true", help="draw roc.png, scores.png, p_values.png, training.png: report.py")
    parser.add_argument("--results", metavar="FILE", help="append each run to this csv table (a run already there is replaced), "
                        "and its scores to FILE with -scores before the suffix")
    parser.add_argument("--validation-only", action="store_true",
                        help="with --results: append what training found on held-out normals, read no test image")
    args = parser.parse_args(argv)
    if args.validation_only and not args.results:
        raise SystemExit("--validation-only: says what to append to --results FILE; give both.")
    if args.images and (args.results or args.report):
        raise SystemExit("--results and --report are about AUROCs; images of --images have no labels: leave one of them out.")
    if args.report:
        import report  # noqa: F401  (before the work, since it needs matplotlib)
    if not 0 < args.fpr < 1:
        raise SystemExit(f"--fpr {args.fpr}: needs a share between 0 and 1.")
    args.out = args.out or [f"runs/{data_name(args.data or 'elpv')}"]
    if args.passes < 1 or args.batch_size < 1:
        raise SystemExit("--passes and --batch-size need at least 1.")
    return args


@dataclass
class Run:
    """A trained run, ready to score images; of load_run."""
    out: Path               # the run's folder
    settings: dict          # as in dia.pt
    step: int
    encoder: Encoder
    stats: dict             # of fit_normals; "calibration": {score: (n,)}; "train", "held": int64 digests of the images
    device: torch.device
    passes: int = 10
    batch: int = 96

    def parts(self, images, name=None):
        """All scores and their parts, a dict of (n,) tensors; see score_images of dia_lib. name: for a progress bar."""
        s = self.settings
        return score_images(self.encoder, self.stats, images, s["shift"], self.passes, self.device, self.batch, name, s["jitter"])

    def p_values(self, scores, score="local"):
        """Conformal p-values (n,) of scores (n,), numpy; nan where no normals were set aside. See p_values below."""
        return p_values(self.stats["calibration"][score].numpy(), scores)

    def score(self, images, score="local"):
        """Scores (n,) and p-values (n,), numpy, of images (n, C, H, W), uint8, as load_images(folder, image_size) gives them.

        Higher scores and lower p-values are more anomalous. score: one of SCORES.
        """
        size = self.settings["image_size"]
        if images.dtype != torch.uint8 or images.shape[2:] != (size, size) or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; this run needs uint8 (n, 1 or 3, {size}, {size})")
        scores = self.parts(images)[score].numpy()
        return scores, self.p_values(scores, score)


def load_run(out, device="auto", passes=10, batch=96, data=None):
    """Read a run's dia.pt and stats.pt; a stats.pt of another checkpoint or other passes is made again from the training data.

    data: the run's Data, if it is at hand.  Exits where a file is missing or not what it should be.
    """
    out, device = Path(out), torch.device(device) if device != "auto" else pick_device(device)
    state = load_checkpoint(out / "dia.pt", "dia", device)
    s = {"jitter": 1.0, "gain": 1.0, **state["settings"]}                   # runs of earlier versions have none of these
    encoder = Encoder(s["channels"], K, s["stem"]).to(device, memory_format=torch.channels_last)
    encoder.load_state_dict(state["encoder"])
    encoder.eval()                                                          # and stays so: threads may share it
    run = Run(out, s, state["step"], encoder, None, device, passes, batch)
    key = sha256_of(out / "dia.pt")
    run.stats = load_stats(out / "stats.pt", key, passes)
    if run.stats is None or (data and not torch.equal(run.stats["held"], digests(data.held))):
        data = data or data_of(s, out)
        run.stats = fit_normals(encoder, data.train, s["shift"], passes, device, batch, "training images", s["jitter"])
        calibration = run.parts(data.held[data.calibration]) if data.calibration.any() else {}
        run.stats |= {"calibration": {name: calibration.get(name, torch.empty(0)) for name in SCORES},
                      "train": digests(data.train), "held": digests(data.held)}
        save_checkpoint(out / "stats.pt", "stats", {"key": key, "passes": passes}, run.stats)
    return run


def data_of(settings, out, splits=("train",), data=None, normal_class=None, skip_bad=False):
    """The images that a run was trained on, by the settings of its dia.pt; the others: flags that are given now. Exits if these
    images are others."""
    s, data = settings, data or settings["data"]
    found = load_data(data, s["image_size"], splits, s["holdout"], normal_class or s["normal_class"],
                      skip_bad or s.get("skip_bad_images", False))
    if found.fingerprint != s["fingerprint"]:
        raise SystemExit(f"{out}/dia.pt was trained on other images than --data {data} has now.")
    return found


def digests(images):
    """A number for the pixels of each of images (n, C, H, W), uint8: (n,) int64, equal for a grey image and the same in RGB."""
    found = []
    for image in images.numpy():
        grey = all((image[0] == channel).all() for channel in image[1:])
        digest = hashlib.sha256((image[:1] if grey else image).tobytes()).digest()
        found.append(int.from_bytes(digest[:8], "little", signed=True))
    return torch.tensor(found, dtype=torch.int64)


def p_values(calibration, scores):
    """Conformal p-values (n,): the share of normal images that are at least as anomalous, the image itself counted as one.

    (1 + #{calibration >= score}) / (len(calibration) + 1); Vovk et al. 2005, Bates et al. 2023 (arXiv:2104.08279), Eq. 2. If
    the image is normal and as the calibration images are (exchangeable), P(p <= a) <= a for every a. nan without any.
    """
    if not len(calibration):
        return np.full(len(scores), np.nan)
    below = np.searchsorted(np.sort(calibration), scores, side="left")                  # calibration images strictly below
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def expected_rate(fpr, calibration):
    """False-positive rate of deciding by p <= fpr with n calibration images, in the mean over draws of these and of test images:
    floor(fpr (n + 1)) / (n + 1)."""
    return math.floor(fpr * (calibration + 1) + 1e-9) / (calibration + 1)           # 0.05 * 60 is 3, not 2.9999


def decisions(p, labels, fpr, calibration):
    """What deciding by p <= fpr does on labelled images: rates with exact (Clopper-Pearson) 95% intervals; None without any p.

    p, labels: (n,) arrays; calibration: the number of calibration images.
    """
    if not calibration:
        return None
    result = {"fpr": fpr, "calibration_normals": calibration,
              "expected_false_positive_rate": expected_rate(fpr, calibration)}
    for name, label in (("false_positive_rate", 0), ("sensitivity", 1)):
        found, n = int((p[labels == label] <= fpr).sum()), int((labels == label).sum())
        result |= {name: found / n, f"{name}_interval_95": [float(v) for v in binomtest(found, n).proportion_ci(method="exact")]}
    return result


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


def measure(labels, scores, groups, p, fpr, calibration):
    """What any method's scores (Q,) of labelled test images come to: the part of metrics.json that all methods share.

    labels (Q,), 1 = anomaly; groups: Q names; p, fpr, calibration: see `decisions`.
    """
    auroc, interval = auroc_interval(labels, scores)
    within = within_groups(labels, scores, groups)
    return {"auroc": auroc, "auroc_interval_95": interval, "average_precision": float(average_precision_score(labels, scores)),
            "within_group_auroc": within, "within_group_mean": statistics.fmean(within.values()) if within else None,
            "decision": decisions(p, labels, fpr, calibration),
            "normals": int((labels == 0).sum()), "anomalies": int(labels.sum())}


def tell(metrics):
    """Print what `measure` found."""
    interval = metrics["auroc_interval_95"]
    spread = f"95% interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "too few images for an interval"
    print(f"  AUROC {metrics['auroc']:.4f}  ({spread})  average precision {metrics['average_precision']:.4f}")
    if metrics["within_group_auroc"]:
        print("  within group: " + "  ".join(f"{n} {v:.3f}" for n, v in metrics["within_group_auroc"].items())
              + f"  mean {metrics['within_group_mean']:.3f}")
    if d := metrics["decision"]:
        print("  " + (impossible(d["calibration_normals"], d["fpr"])
                      or "at --fpr {fpr:g}, by {calibration_normals} calibration normals: ".format(**d) + "  ".join(
            f"{n.replace('_', ' ')} {d[n]:.3f} ({d[f'{n}_interval_95'][0]:.3f} to {d[f'{n}_interval_95'][1]:.3f})"
            for n in ("false_positive_rate", "sensitivity"))))


def write_scores(path, paths, groups, labels, scores, p, fpr, calibration):
    """scores.csv of labelled test images: a row an image."""
    write(path, lambda file: csv.writer(file).writerows(
        [("path", "group", "label", "score", "p_value", "anomaly"),
         *zip(paths, groups, labels, scores, *columns_of(p, fpr, calibration), strict=True)]))


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


def examples(path, images, picked, run):
    """Rows of images, {caption: indices}. Beside each its third view, dissolved at the middle of the range of t, and a map of
    four times their difference, the mean over eleven t of the range."""
    s, out, device = run.settings, run.out, run.device
    mode, unet, abar, t = s["dissolve"], None, None, torch.zeros(1, dtype=torch.int64)
    if mode in ("diffusion", "residual"):
        found = [p for p in (out / "diffusion.pt", Path(s["diffusion"])) if p.is_file() and sha256_of(p) == s["diffusion_sha256"]]
        if found:
            state = load_checkpoint(found[0], "diffusion", device)
            unet, abar = unet_of(state, device)
            a, b = s["t_range"]
            t = torch.cat([torch.tensor([(a + b) // 2]), torch.linspace(a, b - 1, 10).long()]).to(device)
        else:
            mode = "none"
            print(f"  stage 1's checkpoint ({s['diffusion']}) is not there: examples.png shows no dissolved images")
    plain, rows = mode in ("none", "copy"), []
    for chosen in picked.values():
        row = []
        for i in chosen.tolist():
            x = to_float(images[i:i + 1], s["channels"], device)
            row.append(x[0])
            if not plain:
                x = x.expand(len(t), -1, -1, -1)
                twins = dissolve_view(unet, x, t, abar, s["dissolve_size"], mode, gain=s["gain"])       # (len(t), C, H, W)
                row += [twins[0], (4 * (x - twins).abs().mean((0, 1))).clamp(0, 1)[None]]
        rows.append(row)
    captions = ["image"] * 4 if plain else ["image", mode if unet is None else f"t = {int(t[0])}", "4 x |diff|"] * 4
    rows = [row + [None] * (len(captions) - len(row)) for row in rows]      # fewer than 4 images of a kind
    save_grid(path, rows, captions, scale=max(1, 128 // s["image_size"]), names=list(picked))


def evaluate(out, args, device):
    """Score the test images of one run; write its files; return its metrics."""
    begun = time.perf_counter()
    state = load_checkpoint(out / "dia.pt", "dia", device)
    s = {"jitter": 1.0, **state["settings"]}
    data = data_of(s, out, ("train", "test"), args.data, args.normal_class, args.skip_bad_images)
    labels = data.labels.numpy()
    if len(set(labels)) != 2:
        raise SystemExit(f"{data.name}: all {len(labels)} test images are {'anomalies' if labels.all() else 'normal'}; "
                         "an AUROC needs both normal and anomalous test images.")
    print(f"{out}: {data.name}, {len(data.train)} training images, {len(labels)} test images ({labels.sum()} anomalies), "
          f"dissolve {s['dissolve']}, seed {s['seed']}, step {state['step']} of {s['steps']}", flush=True)
    run = load_run(out, device, args.passes, args.batch_size, data)
    torch.manual_seed(s["seed"])
    untrained = Encoder(s["channels"], K, s["stem"]).to(device, memory_format=torch.channels_last)
    parts = run.parts(data.test, "test images")
    scores = parts[args.score].numpy()
    p, n = run.p_values(scores, args.score), len(run.stats["calibration"][args.score])

    metrics = {
        "score": args.score, **measure(labels, scores, data.groups, p, args.fpr, n),
        "parts_auroc": {n: float(roc_auc_score(labels, part.numpy())) for n, part in parts.items()},
        "floors_auroc": floors(data, untrained, s["shift"], s["jitter"], args.score, device, args.batch_size),
        "passes": args.passes, "step": state["step"], "settings": s, "seconds": round(time.perf_counter() - begun, 1)}
    write(out / "metrics.json", lambda file: json.dump(metrics, file, indent=1))
    if args.results:
        append_result(Path(args.results), state, labels, parts, data.groups, metrics)
    write_scores(out / "scores.csv", data.paths, data.groups, labels, scores, p, args.fpr, n)
    Log(out, "evaluate", math.inf)(state["step"], show=False, score=args.score, auroc=metrics["auroc"],
                                   auroc_interval_95=metrics["auroc_interval_95"], passes=args.passes)
    tell(metrics)
    print("  parts: " + "  ".join(f"{n} {v:.3f}" for n, v in metrics["parts_auroc"].items()))
    for name, floor in metrics["floors_auroc"].items():
        print(f"  floor: {name} {floor:.3f}{'' if floor < metrics['auroc'] else '  <- not beaten'}")
    order = parts[args.score].argsort(descending=True)
    ranked = {name: order[data.labels[order] == label] for name, label in (("anomalies", 1), ("normals", 0))}
    picked = {f"{name}, {where}": r[:4] if "high" in where else r[-4:]
              for name, r in ranked.items() for where in ("highest scores", "lowest")}
    examples(out / "examples.png", data.test, picked, run)
    print(f"  wrote scores.csv, metrics.json, examples.png, stats.pt to {out} in {metrics['seconds']:.0f} s", flush=True)
    return metrics


def columns_of(p, fpr, calibration):
    """The columns p_value and anomaly (0 or 1) of p-values (n,), by so many calibration images; empty where there are none, or
    nothing can be decided."""
    undecided = impossible(calibration, fpr)
    return [["" if math.isnan(v) else f"{v:.6g}" for v in p], ["" if undecided else int(v <= fpr) for v in p]]


def impossible(calibration, fpr):
    """Why that many calibration images can never give a p-value of at most fpr, or None."""
    if calibration == 0:
        return "no decisions: no normals were held out in training (--holdout)"
    if expected_rate(fpr, calibration) == 0:
        return (f"no decisions: with {calibration} calibration normals no p-value is below {1 / (calibration + 1):.3f}; --fpr "
                f"{fpr:g} needs {math.ceil(1 / fpr - 1e-9) - 1}: train with a larger --holdout, or give a larger --fpr")
    return None


def score_folder(out, args, device):
    """Score all images below args.images by one run, without labels; write scores.csv, most anomalous first, and examples.png."""
    s = load_checkpoint(out / "dia.pt", "dia", device)["settings"]
    data = data_of(s, out, ("train",), args.data, args.normal_class, args.skip_bad_images) if args.data else None
    run = load_run(out, device, args.passes, args.batch_size, data)
    images, paths = load_images(args.images, run.settings["image_size"], args.skip_bad_images)
    scores = run.parts(images, "images")[args.score]
    p, n = run.p_values(scores.numpy(), args.score), len(run.stats["calibration"][args.score])
    order = scores.argsort(descending=True, stable=True)
    known = {**dict.fromkeys(run.stats["held"].tolist(), "held out"), **dict.fromkeys(run.stats["train"].tolist(), "training")}
    seen = [known.get(digest, "") for digest in digests(images).tolist()]
    rows = list(zip(paths, scores.tolist(), *columns_of(p, args.fpr, n), seen, strict=True))
    folder = out / "images" / Path(args.images).resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "scores.csv", lambda file: csv.writer(file).writerows(
        [("path", "score", "p_value", "anomaly", "seen"), *(rows[i] for i in order.tolist())]))
    examples(folder / "examples.png", images, {"highest scores": order[:4], "next": order[4:8], "lowest": order[-4:]}, run)
    if "training" in seen:
        print(f"note: {seen.count('training')} of these images were trained on (column `seen`): their scores are too low")
    found = int((p <= args.fpr).sum())
    verdict = impossible(n, args.fpr) or f"{found} anomalies at --fpr {args.fpr:g}, by {n} calibration normals"
    print(f"{len(paths)} images: {verdict}; wrote scores.csv and examples.png to {folder}", flush=True)


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
    rows, each = [], [{**blank, "data": run["data"], "score": "labels", "values": " ".join(map(str, labels))}] if parts else []
    for score in SCORES:
        figures = {"minutes": state.get("seconds", math.nan) / 60, "val_auroc": validation.get(VALIDATION[score]),
                   "auroc": None, "ap": None, "within_group_auroc": None}
        if parts:
            values = parts[score].numpy()
            within = within_groups(labels, values, groups)
            figures |= {"auroc": roc_auc_score(labels, values), "ap": average_precision_score(labels, values),
                        "within_group_auroc": statistics.fmean(within.values()) if within else None}
        figures = {k: "" if v is None else f"{v:.4f}" for k, v in figures.items()}
        rows.append({**run, "score": score, **figures, **{k: state["settings"].get(k, "") for k in ("commit", "processor")}})
        if parts:
            each.append({**run, "score": score, "values": " ".join(f"{v:.7g}" for v in values)})
    for name, value in (metrics or {"floors_auroc": {}})["floors_auroc"].items():
        floor = {**dict.fromkeys(rows[0], ""), "data": run["data"], "dissolve": f"floor: {name}", "steps": 0,
                 "auroc": f"{value:.4f}"}
        names = ["image_size", "holdout"]
        if "untrained" in name:
            floor |= {"seed": run["seed"], "score": metrics["score"]}
            names.append("jitter")
        floor["settings"] = " ".join(f"{k}={state['settings'].get(k, 1.0)}" for k in names)
        rows.append(floor)
    insert(path, rows, [*run, "score"])
    if each:
        insert(path.with_name(f"{path.stem}-scores{path.suffix}"), each, [*run, "score"])


def insert(path, rows, key):
    """Write rows (dicts) into a csv table, at its end, or in place of those with the same key (names of columns).

    What is empty in a new row stays as it was. Not for two processes at once.
    """
    columns, table = list(rows[0]), {}

    def put(row):
        same = tuple(row[k] for k in key)
        table[same] = {k: v or table.get(same, row)[k] for k, v in row.items()}

    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise SystemExit(f"{path} is another table: its columns are {reader.fieldnames}, not {columns}.")
            for row in reader:
                put(row)
    for row in rows:
        put({k: str(v) for k, v in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, lambda file: csv.writer(file, lineterminator="\n").writerows([columns, *(r.values() for r in table.values())]))


def load_stats(path, key, passes):
    """What an earlier evaluation of the same checkpoint with the same passes found of the training images, or None."""
    if not path.exists():
        return None
    try:
        state = load_checkpoint(path, "stats", "cpu")
    except SystemExit:
        return None                                                         # it is made again
    return state if (state["settings"]["key"], state["settings"]["passes"]) == (key, passes) and "calibration" in state else None


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
    if args.images:
        for out in args.out:
            score_folder(Path(out), args, device)
        return
    results = [evaluate(Path(out), args, device) for out in args.out]
    if args.report:
        from report import report
        for out in args.out:
            report(out)
    values = [r["auroc"] for r in results]
    if len(values) > 1:
        print(f"{len(values)} runs: AUROC {', '.join(f'{v:.4f}' for v in values)}; mean {statistics.fmean(values):.4f} "
              f"+- {statistics.stdev(values):.4f}")
    print(f"auroc {statistics.fmean(values):.4f}")


if __name__ == "__main__":
    run(main)
