"""Stage 3: score the test images of one or several runs by CSI's rule (DIA Sec. 3.3). Higher: more anomalous.

    python evaluate.py                                              # runs/elpv
    python evaluate.py --out runs/elpv runs/elpv-s1 runs/elpv-s2    # each run, and mean +- sd
    python evaluate.py --out runs/lungs --data other                # a run scored before, on another test/

Writes into each run's folder scores.csv (a row an image), metrics.json, examples.png, and stats.pt (what the
score needs of the training images); of another set, into a new folder there. The last line on stdout is
`auroc 0.xxxx`, the mean over the runs.
"""

import csv
import json
import math
import statistics
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.metrics import average_precision_score, roc_auc_score

from dia_lib import (
    MEDMNIST_MD5, Encoder, K, Log, csi_fit, csi_parts, csi_score, data_name, embed, found, load_checkpoint,
    load_data, load_encoder, make_parser, new_folder, number, pick_device, run, save_checkpoint, save_grid,
    shared_flags, to_float, whole,
)


def main():
    args = arguments()
    device = pick_device(args.device)
    values = [evaluate(Path(out), args, device)["auroc"] for out in args.out]
    if len(values) > 1:
        print(f"{len(values)} runs: AUROC {', '.join(f'{v:.4f}' for v in values)}; mean "
              f"{statistics.fmean(values):.4f} +- {statistics.stdev(values):.4f}")
    print(f"auroc {statistics.fmean(values):.4f}")


def arguments(argv=None):
    parser = make_parser(__doc__)
    shared_flags(parser, data=None)
    parser.add_argument("--out", nargs="+", metavar="RUN", help="folders of runs (default: runs/<data>)")
    parser.add_argument("--passes", type=number(), default=10, help="test-time passes averaged (default: 10)")
    parser.add_argument("--batch-size", type=number(), default=96, help="images a step (default: 96)")
    args = parser.parse_args(argv)
    args.out = args.out or [f"runs/{data_name(args.data or 'elpv')}"]
    return args


def evaluate(out, args, device):
    """Score the test images of one run; write its files; return its metrics."""
    state = load_checkpoint(out / "dia.pt", "dia", device)
    s, encoder = state["settings"], load_encoder(state, device)
    stats = remembered(out / "stats.pt", "stats", stats_key(state, args.passes))
    data, to = data_to_score(s, out, stats, args)
    labels = data.labels.numpy()
    if len(set(labels)) != 2:
        kind = "anomalies" if labels.all() else "normal"
        raise SystemExit(f"{data.name}: all {len(labels)} test images are {kind}; an AUROC needs both "
                         "normal and anomalous test images.")
    print(f"{out}, dissolve {s['dissolve']}, seed {s['seed']}, step {state['step']} of {s['steps']}; "
          f"{found(data)}", flush=True)

    log = Log(to, "evaluate", math.inf)
    stats = stats or training_stats(out, state, encoder, data, args.passes, device, args.batch_size)
    z, logits = embed(encoder, data.test, s["shift"], args.passes, device, args.batch_size, "test images")
    parts = {name: part.numpy() for name, part in csi_parts(stats, z, logits).items()}    # csi, con, cls, ...
    metrics = {"score": "csi", **measure(labels, parts["csi"], data.groups),
               "parts_auroc": {name: float(roc_auc_score(labels, part)) for name, part in parts.items()},
               "floors_auroc": floors(data, s, args.passes, device, args.batch_size),
               "passes": args.passes, "step": state["step"], "seconds": log.seconds(),
               "settings": {**s, "data": args.data or s["data"]}}
    if to != out:                                                           # another set than the run's own
        metrics |= {"trained_on": s["data"]}
        metrics["settings"]["normal_class"] = args.normal_class             # the run's says nothing of it

    with whole(to / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1))
    with whole(to / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        names = list(parts)[1:]                                             # con, cls, cos, norm
        csv.writer(file).writerows([("path", "group", "label", "score", *names),
                                    *zip(data.paths, data.groups, labels, *parts.values(), strict=True)])
    examples(to / "examples.png", data, parts["csi"])
    log(state["step"], show=False, auroc=metrics["auroc"], passes=args.passes)
    tell(metrics)
    print("  parts: " + "  ".join(f"{n} {v:.3f}" for n, v in metrics["parts_auroc"].items()))
    for name, floor in metrics["floors_auroc"].items():
        print(f"  floor: {name} {floor:.3f}{'' if floor < metrics['auroc'] else '  <- not beaten'}")
    print(f"  wrote scores.csv, metrics.json, examples.png{', stats.pt' if to == out else ''} to {to} in "
          f"{metrics['seconds']:.0f} s")
    return metrics


def data_to_score(settings, out, stats, args):
    """The run's own Data and its folder; or, of another set, its test images and a new folder in OUT/tests.

    stats: of the run's training images, which another set needs, or None.
    """
    size, normal = settings["image_size"], args.normal_class or settings["normal_class"]
    why = f"{out} was trained on other images than --data {args.data} has."
    try:
        train = args.data and load_data(args.data, size, ("train",), settings["holdout"], normal)
    except SystemExit as error:                                             # no train, or none that serves
        train, why = None, error
    if not args.data or train and train.fingerprint == settings["fingerprint"]:
        return data_of(settings, out, data=args.data, normal_class=args.normal_class), out
    if not stats:
        raise SystemExit(f"{why} To score {out} on another set than its own, score it on its own first, by "
                         f"--passes {args.passes}.")
    data = load_data(args.data, size, ("test",), normal_class=args.normal_class)
    print(f"note: {out} was trained on other images: only the test images of {data.name} are read")
    if data.test.shape[-1] != size:
        raise SystemExit(f"{data.name} has images of {data.test.shape[-1]} px; {out} needs {size} px.")
    windows = data.defaults["window"], settings.get("window")
    if windows[0] != windows[1]:
        print("warning: prepared with the window {}, the training images with {}".format(*windows))
    if data.test.shape[1] > settings["channels"]:
        print("warning: some of these images are in colour, and no training image was: they are made grey")
    trained = set(stats["train"].tolist())
    if copies := sum(digest in trained for digest in data.digests["test"].tolist()):
        print(f"warning: {copies} of these images were trained on: their scores mean nothing")
    return data, new_folder(out / "tests" / data.name)


def data_of(settings, out, splits=("train", "test"), data=None, normal_class=None):
    """The images that a run was trained on, by the settings of its dia.pt; exits if they are others now."""
    s = settings
    if not data and s["data"] not in ("elpv", *MEDMNIST_MD5) and not Path(s["data"]).exists():
        raise SystemExit(f"{out} was trained on --data {s['data']}, which is not there, seen from this "
                         "folder: say by --data where it is.")
    data = data or s["data"]
    loaded = load_data(data, s["image_size"], splits, s["holdout"], normal_class or s["normal_class"])
    if loaded.fingerprint != s["fingerprint"]:
        raise SystemExit(f"{out} was trained on other images than --data {data} has now.")
    return loaded


def training_stats(out, state, encoder, data, passes, device, batch=96):
    """csi_fit of the training images, from OUT/stats.pt where an earlier call left it for this checkpoint."""
    path, key = out / "stats.pt", stats_key(state, passes)
    stats = remembered(path, "stats", key)
    if stats is None:
        shift = state["settings"]["shift"]
        stats = csi_fit(*embed(encoder, data.train, shift, passes, device, batch, "training images"))
        stats["train"] = data.digests["train"]
        save_checkpoint(path, "stats", key, stats)
    return stats


def stats_key(state, passes):
    """What a stats.pt was made of. Those of earlier versions have no digests of the images."""
    return {"weights": weights_of(state), "passes": passes, "digests": True}


def weights_of(state):
    """A number that stands for the encoder's weights in a checkpoint of stage 2."""
    return zlib.crc32(b"".join(v.cpu().numpy().tobytes() for v in state["encoder"].values()))


def remembered(path, kind, key):
    """What an earlier call left in a checkpoint with this key in its settings; None if it has to be made."""
    try:
        state = load_checkpoint(path, kind, "cpu")
    except SystemExit:                                                      # there is none, or it is broken
        return None
    return state if key.items() <= state["settings"].items() else None


def measure(labels, scores, groups):
    """What scores (Q,) of labelled test images come to. labels: (Q,), 1 = anomaly; groups: Q names."""
    auroc, interval = auroc_interval(labels, scores)
    within = within_groups(labels, scores, groups)
    return {"auroc": auroc, "auroc_interval_95": interval,
            "average_precision": float(average_precision_score(labels, scores)), "within_group_auroc": within,
            "within_group_mean": statistics.fmean(within.values()) if within else None,
            "normals": int((labels == 0).sum()), "anomalies": int(labels.sum())}


def auroc_interval(labels, scores):
    """AUROC and its 95% interval: percentile bootstrap over normals and anomalies apart, 2,000 resamples.

    labels, scores: (Q,) arrays. The interval is None if there are fewer than 2 normals or 2 anomalies.
    """
    value = float(roc_auc_score(labels, scores))
    if min((labels == 0).sum(), (labels == 1).sum()) < 2:
        return value, None

    def auroc(anomalies, normals, axis):
        wins = mannwhitneyu(anomalies, normals, axis=axis).statistic
        return wins / (anomalies.shape[axis] * normals.shape[axis])

    result = bootstrap((scores[labels == 1], scores[labels == 0]), auroc, n_resamples=2000, batch=100,
                       method="percentile", rng=np.random.default_rng(0))
    return value, [float(v) for v in result.confidence_interval]


def within_groups(labels, scores, groups):
    """{group: AUROC of its anomalies against its own normals}, for groups that hold both."""
    groups = np.array(groups)
    return {g: float(roc_auc_score(labels[groups == g], scores[groups == g])) for g in sorted(set(groups))
            if len(set(labels[groups == g])) == 2}


def floors(data, settings, passes, device, batch):
    """AUROCs that a trained model has to beat: mean brightness, pixels, and the same encoder untrained.

    The last by as many test-time passes as the model. Without training images it is the first alone.
    """
    def flat(images):                       # at 32 px, divided by the mean (n, 32*32), and the mean (n,)
        side = min(32, images.shape[-1])                                    # smaller ones stay as they are
        grey = (to_float(chunk, 1, "cpu") for chunk in images.split(256))
        small = torch.cat([F.interpolate(x, (side, side), mode="bilinear", antialias=True) for x in grey])
        small = small.flatten(1)
        return small / small.mean(1, keepdim=True).clamp(min=1e-6), small.mean(1)

    test, brightness = flat(data.test)
    if not len(data.train):
        return {"minus mean brightness": float(roc_auc_score(data.labels, -brightness))}
    train, _ = flat(data.train)
    nearest = torch.cat([torch.cdist(chunk, train).amin(1) for chunk in test.split(256)])
    torch.manual_seed(settings["seed"])                     # the weights that training began with
    encoder = Encoder(settings["channels"], K, settings["stem"]).to(device, memory_format=torch.channels_last)
    untrained = auroc_of(encoder, data, settings["shift"], passes, device, batch, "the encoder untrained")
    return {"minus mean brightness": float(roc_auc_score(data.labels, -brightness)),
            "nearest neighbour on 32 px pixels": float(roc_auc_score(data.labels, nearest)),
            "encoder untrained": untrained}


def auroc_of(encoder, data, *how):
    """AUROC of an encoder on the test images, nothing kept. how: what `embed` takes after the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of a classifier that knows nothing yet
        stats = csi_fit(*embed(encoder, data.train, *how))
    return float(roc_auc_score(data.labels, csi_score(stats, *embed(encoder, data.test, *how))))


def examples(path, data, scores):
    """The eight most and least anomalous test images of each label, as one picture."""
    size, order, rows = data.test.shape[-1], torch.from_numpy(np.argsort(-scores, kind="stable")), {}
    for name, label in (("anomalies", 1), ("normals", 0)):
        mine = order[data.labels[order] == label]
        rows |= {f"{name}, highest scores": mine[:8], f"{name}, lowest": mine[-8:]}
    tiles = [list(data.test[row].float() / 255) for row in rows.values()]
    tiles = [row + [None] * (8 - len(row)) for row in tiles]                # fewer than 8 images of a kind
    save_grid(path, tiles, [], max(1, 128 // size), list(rows))


def tell(metrics):
    """Print what `measure` found."""
    interval = metrics["auroc_interval_95"]
    spread = f"95% interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "too few for an interval"
    print(f"  AUROC {metrics['auroc']:.4f}  ({spread})  average precision {metrics['average_precision']:.4f}")
    if metrics["within_group_auroc"]:
        print("  within group: " + "  ".join(f"{n} {v:.3f}" for n, v in metrics["within_group_auroc"].items())
              + f"  mean {metrics['within_group_mean']:.3f}")


if __name__ == "__main__":
    run(main)
