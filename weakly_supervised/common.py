"""What the methods of this folder share: flags, feature maps, labelled anomalies, scoring a test set."""

import argparse
import csv
import json
import math
import re
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import f1_score, roc_auc_score, roc_curve

from dia_lib import (
    Log, data_name, found, load_data, make_parser, number, pick_device, precision, read_images,
    save_checkpoint, save_grid, send, shared_flags, step_generator, to_float, whole,
)
from evaluate import measure, tell
from extras.choose import KINDS, synthetic_defects
from extras.decisions import columns_of, decisions, impossible, p_values, promise, rates_of
from extras.heat_maps import colours, heat_map, mask_of, overlay, pixel_metrics
from extras.tables import processor
from weakly_supervised.backbones import LITE, NAMES, features, load_backbone

AGAIN = "the same command begins again, with the feature maps that are in the cache"


def flags(description, layers, size=256):
    """The parser with the flags of all methods; layers and size are defaults."""
    parser = make_parser(description)
    parser.set_defaults(default_size=size)
    shared_flags(parser)
    parser.add_argument("--out", help="the folder for results, which must not hold any yet (default: "
                        "runs/<data>-<method>, and -s<seed> for a seed above 0)")
    parser.add_argument("--seed", type=number(low=0, high=2 ** 32 - 1), default=0,
                        help="seed of all draws, the labelled anomalies among them (default: 0)")
    parser.add_argument("--holdout", type=number(float, 0, 0.9), default=0.1,
                        help="share of the normals set aside (default: 0.1)")
    parser.add_argument("--backbone", default=LITE, help=f"{', '.join(NAMES)}, or dia:RUN (default: {LITE})")
    parser.add_argument("--weights", metavar="FILE",
                        help="the backbone's state dict (default: ImageNet weights are downloaded)")
    parser.add_argument("--image-size", type=number(low=16),
                        help=f"side in pixels the backbone sees (default: {size}; dia:RUN: as in the run)")
    parser.add_argument("--layers", type=int, nargs="+", default=layers, choices=(1, 2, 3, 4),
                        help=f"depths of the feature maps (default: {' '.join(map(str, layers))})")
    parser.add_argument("--fpr", type=number(float, above=0, high=0.99), default=0.05,
                        help="false-positive rate of decisions (default: 0.05)")
    parser.add_argument("--calibrate-all", action="store_true", help="all normals set aside calibrate "
                        "p-values, not half of them; then there is no val_auroc to choose settings by")
    parser.add_argument("--maps", action="store_true", help="write a heat map of each test image to OUT/maps")
    return parser


def shots_flags(parser):
    """The flags of methods that learn from labelled anomalies; returns the parser."""
    parser.add_argument("--shots", type=int, nargs="+", metavar="N",
                        help="labelled anomalies to learn from; several numbers: one run each, in "
                        "OUT/shots-N (default: 10)")
    parser.add_argument("--labelled", type=percent, nargs="+", metavar="P%",
                        help="labelled anomalies, as shares of all training images, instead of --shots: 5%% "
                        "are 54 beside 1,024 normals")
    parser.add_argument("--anomaly-class", metavar="GROUP", help="draw them from this group of anomalies "
                        "alone, and report on the others (default: from all)")
    return parser


def percent(text):
    """"5%" -> 0.05."""
    found = re.fullmatch(r"(\d*\.?\d+)%", text)
    if not found or not 0 < float(found[1]) < 100:
        raise argparse.ArgumentTypeError(f"{text}: needs a share above 0% and below 100%, as 5%")
    return float(found[1]) / 100


class Setting:
    """A parsed command line, the backbone and the data: what every method starts from."""

    def __init__(self, parser, method, argv=None):
        args = self.args = parser.parse_args(argv)
        self.changed = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}
        self.method, size = method, vars(args).pop("default_size")
        args.layers = sorted(set(args.layers))
        seed = f"-s{args.seed}" if args.seed else ""
        self.out = Path(args.out or f"runs/{data_name(args.data)}-{method}{seed}")
        if "resume" not in args:
            refuse_results(self.out)
        self.network(pick_device(args.device), keep=True)
        self.size = args.image_size = args.image_size or self.backbone.size or size
        self.data = load_data(args.data, self.size, ("train", "labelled", "test"), args.holdout,
                              args.normal_class)
        self.data.calibration |= args.calibrate_all
        self.labels = self.data.labels.numpy()
        run = self.backbone.fingerprint
        if run and run != self.data.fingerprint:
            print(f"note: {args.backbone} was trained on other images than these {len(self.data.train)}")
        if len(set(self.labels)) != 2:
            raise SystemExit(f"{self.data.name}: the test images are all of one kind; an AUROC needs both "
                             "normal and anomalous.")

    def network(self, device, keep):
        """Load the backbone; keep: feature maps go to the cache."""
        self.device, self.keep = device, keep
        self.backbone = load_backbone(self.args.backbone, self.args.weights, device)

    def found_again(self):
        """What `of_run` and extras.predict need beside the flags; paths hold in other folders, too."""
        name, colon, path = self.args.backbone.partition(":")
        weights = self.args.weights and str(Path(self.args.weights).resolve())
        return {"backbone": f"{name}:{Path(path).resolve()}" if colon else name, "weights": weights,
                "backbone_key": self.backbone.key, "side": self.data.train.shape[-1],
                "window": self.data.defaults["window"]}

    @classmethod
    def of_run(cls, settings, device):
        """What scoring new images needs: the flags and the backbone of a run. No data, no cache."""
        setting = cls.__new__(cls)
        setting.args, setting.size = argparse.Namespace(**settings), settings["image_size"]
        setting.network(device, keep=False)
        if setting.backbone.key != settings["backbone_key"]:
            raise SystemExit(f"--backbone {settings['backbone']} has other weights now than in training.")
        return setting

    def say(self, *words):
        """Print what was found, and what is about to be done."""
        args, shots = self.args, ", ".join(map(str, getattr(self.args, "shots", ["no"])))
        words = ", ".join([" ".join(map(str, args.layers)), *words, f"seed {args.seed}"])
        of = "" if shots == "no" else f" of {len(self.data.labelled):,} in train" if self.data.labelled else (
            " of the test set")
        print(f"{found(self.data)}\n{self.method}, {shots} labelled anomalies{of}, {args.backbone} at "
              f"{self.size} px, layers {words}; {precision(self.device)}", flush=True)

    def features(self, images, name=None):
        """Feature maps of images (n, ...) uint8 at the layers asked for; see backbones.features."""
        return features(self.backbone, images, self.args.layers, self.size, self.device, name=name,
                        keep=self.keep)

    def begin(self):
        """Feature maps of all images, of which it returns the training ones'; starts the clock "seconds"."""
        train = self.features(self.data.train, "training images")
        if len(self.data.held):
            self.features(self.data.held)
        self.features(self.data.test, "test images")
        self.begun = time.perf_counter()
        return train


def load(maps, rows, device):
    """Some images' maps of each array of `features`, (n, C, h, w) float32 on the device; rows: any index."""
    return [send(torch.from_numpy(np.array(array[rows])), device).float() for array in maps]


def refuse_results(folder):
    """Exit if the folder holds the results of a run, or a run of train_dia.py, or is none."""
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--out {folder} is a file: name a folder.")
    if (folder / "metrics.json").exists() or (folder / "dia.pt").exists():
        raise SystemExit(f"{folder} holds results already. Choose another folder with --out, or remove it.")


# Labelled anomalies: (n, C, H, W) uint8, n names, rows in the test set, digests (n,) of their pixels.
Shots = namedtuple("Shots", "images paths tested digests")


def runs_of(setting, none=False):
    """[(folder, Shots)] for each of --shots or --labelled.

    The folder is OUT, or OUT/shots-N if there are several. Labelled anomalies come from the training part of
    the set where it has any, else from the test set.  none: --shots 0 is allowed.  Exits where they cannot be
    drawn, or a folder holds a run already and --resume is not given.
    """
    args, data, runs = setting.args, setting.data, []
    if args.labelled:
        if args.shots:
            raise SystemExit("--labelled and --shots say the same: leave one of them out.")
        M = len(data.train)
        args.shots = [max(1, round(M / (1 - share) - M)) for share in args.labelled]
    shots = args.shots = sorted(set(args.shots or [10]))
    anomalies = np.flatnonzero(setting.labels == 1)
    groups = [i.group for i in data.labelled] or [data.groups[i] for i in anomalies]
    if args.anomaly_class and {data.groups[i] for i in anomalies} == {args.anomaly_class}:
        raise SystemExit(f"--anomaly-class {args.anomaly_class}: test has no other group to report on.")
    for n in shots:
        out = setting.out / f"shots-{n}" if len(shots) > 1 else setting.out
        chosen = draw_shots(groups, n, args.seed, args.anomaly_class, 0 if none else 1, not data.labelled)
        if data.labelled:
            items = [data.labelled[i] for i in chosen]
            images, digests, _ = read_images(items, data.train.shape[-1])
            chosen = Shots(torch.from_numpy(images), [i.name for i in items], [],
                           torch.from_numpy(digests.view(np.int64)))
        else:
            chosen = anomalies[chosen]
            chosen = Shots(data.test[torch.from_numpy(chosen)], [data.paths[i] for i in chosen], chosen,
                           data.digests["test"][chosen])
        if not getattr(args, "resume", False):
            refuse_results(out)
            if "resume" in args and (out / f"{setting.method}.pt").exists():
                raise SystemExit(f"{out} holds {setting.method}.pt already: go on with --resume, choose "
                                 "another folder with --out, or remove it.")
        runs.append((out, chosen))
    return runs


def draw_shots(groups, shots, seed, anomaly_class=None, least=1, tested=True):
    """Indices (shots,) of the labelled anomalies to train on, of n anomalies. groups: n names.

    As in DRA (arXiv:2203.14506) all anomalies, of one group with anomaly_class, are shuffled by
    RandomState(seed), and the first ones taken. Exits where there are too few, fewer than `least` are asked
    for, or there is no such group.  tested: they are of the test set, which has to keep some.
    """
    anomalies, known = np.arange(len(groups)), sorted(set(groups))
    if anomaly_class is not None:
        if anomaly_class not in known or tested and len(known) < 2:
            raise SystemExit(f"--anomaly-class {anomaly_class}: the groups of anomalies are "
                             f"{', '.join(known) or 'none'}"
                             f"{'; there must be another one to test on' if anomaly_class in known else ''}.")
        anomalies = np.array([i for i in anomalies if groups[i] == anomaly_class])
    most = len(anomalies) - tested
    if not least <= shots <= most:
        within = f" in {anomaly_class}" if anomaly_class else ""
        raise SystemExit(f"{shots} labelled anomalies are asked for, and there are {len(anomalies)}{within}: "
                         f"it must be from {least} to {most}{', to leave some to test on' * tested}.")
    return np.random.RandomState(seed).permutation(anomalies)[:shots]


def cycle(n, batch, seed, step):
    """Indices (batch,) of a step that goes through n anomalies again and again, always in another order."""
    turns, at = np.divmod(np.arange(step * batch, (step + 1) * batch), n)
    orders = {turn: torch.randperm(n, generator=step_generator("cpu", seed, "anomalies", turn))
              for turn in set(turns.tolist())}
    return torch.stack([orders[turn][i] for turn, i in zip(turns.tolist(), at.tolist(), strict=True)])


def validate(setting, score, held_scores):
    """AUROC of held-out normals (256 at most) against the same images with a synthetic defect: to choose by.

    score: as in `finish`; held_scores: (n,) of the held-out normals that may choose. Returns the mean over
    KINDS; None without any.
    """
    held, aurocs = setting.data.held[~setting.data.calibration][:256], []
    if not len(held):
        return None
    for i, kind in enumerate(KINDS):
        defects = synthetic_defects(held, kind, step_generator("cpu", 0, "synthetic defects", i))
        scores = torch.cat([held_scores[:256], score(defects)[0]])
        aurocs.append(float(roc_auc_score([0] * len(held) + [1] * len(defects), scores)))
    return sum(aurocs) / len(aurocs)


def f1_accuracy(labels, decided):
    """F1 and accuracy of decisions (Q,) bool."""
    return float(f1_score(labels, decided)), float((decided == labels).mean())


def youden(labels, scores):
    """F1 and accuracy at the threshold of the best TPR - FPR on these very labels: as WSCXR reports them."""
    false, true, thresholds = roc_curve(labels, scores)
    return f1_accuracy(labels, scores >= thresholds[(true - false).argmax()])


def finish(setting, score, state, out=None, shots=None, left_out=None, **more):
    """Score held-out and test images, write and print the results; return metrics.

    score: images (n, C, H, W) uint8 -> their scores (n,) and, for pictures, those of their patches (n, P), on
    the CPU.  state: what the method's `restore` makes `score` of again; it goes into OUT/predict.pt, for
    extras.predict.  out: another folder than the setting's.  shots: the Shots that were trained on; those of
    the test set are left out.  left_out: leave-one-out scores of training normals (M,), which calibrate, too.
    more: further entries of metrics.json.
    """
    data, args, out = setting.data, setting.args, out or setting.out
    held, held_maps = score(data.held)
    calibration = held[data.calibration]
    calibration = (calibration if left_out is None else torch.cat([calibration, left_out])).numpy()
    n = len(calibration)
    test = np.setdiff1d(np.arange(len(data.labels)), shots.tested if shots else [])
    scores, maps = score(data.test)                                                             # (Q,), (Q, P)
    scores, labels, groups, apart = scores.numpy(), setting.labels, np.array(data.groups), {}
    if getattr(args, "anomaly_class", None):                   # DRA's hard setting: anomalies of other groups
        seen, normal = groups[test] == args.anomaly_class, labels[test] == 0
        apart = {name: float(roc_auc_score(labels[rows], scores[rows])) for name, rows in
                 (("auroc_seen_class", test[seen | normal]), ("auroc_all", test)) if labels[rows].any()}
        test = test[~seen | normal]
    mine, truth, p = scores[test], labels[test], p_values(calibration, scores[test])
    f1, accuracy = (None, None) if impossible(n, args.fpr) else f1_accuracy(truth, p <= args.fpr)
    best_f1, best_accuracy = youden(truth, mine)
    metrics = {
        **measure(truth, mine, groups[test]), **apart,
        "decision": decisions(calibration, mine, truth, args.fpr, left_out is not None),
        "val_auroc": validate(setting, score, held[~data.calibration]), **more,
        "f1_at_fpr": f1, "accuracy_at_fpr": accuracy,
        "f1_threshold_chosen_on_test": best_f1, "accuracy_threshold_chosen_on_test": best_accuracy,
        "shots": shots.paths if shots else [],
        "settings": {**vars(args), "out": str(out), "method": setting.method, "changed": setting.changed,
                     "fingerprint": data.fingerprint},
        "seconds": round(time.perf_counter() - setting.begun, 1), "processor": processor(setting.device)}
    masks = {i: mask for i in test[truth == 1]
             if (mask := mask_of(args.data, data.paths[i], setting.size)) is not None}
    if masks:                                                          # anomalies without a mask are left out
        blank = torch.zeros(setting.size, setting.size, dtype=torch.bool)
        masks |= dict.fromkeys(test[truth == 0], blank)
        heat = torch.stack([heat_map(maps[i], setting.size) for i in masks])
        metrics |= pixel_metrics(heat, torch.stack(list(masks.values())))

    out.mkdir(parents=True, exist_ok=True)
    with whole(out / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        columns = [data.paths[i] for i in test], groups[test], truth, mine, *columns_of(p, args.fpr, n)
        csv.writer(file).writerows([("path", "group", "label", "score", "p_value", "anomaly"),
                                    *zip(*columns, strict=True)])
    colour = colours(held_maps if len(held) else maps[test[truth == 0]])
    pictures(setting, out, scores, maps, test, **colour)
    settings = metrics["settings"] | setting.found_again()
    known = {"calibration": {setting.method: torch.from_numpy(calibration)}, **colour, "state": state,
             "left_out": left_out is not None,
             "train": data.digests["train"].tolist(), "held": data.digests["held"].tolist(),
             "labelled": shots.digests.tolist() if shots else []}
    save_checkpoint(out / "predict.pt", "predict", settings, known)
    with whole(out / "metrics.json") as temporary:                          # last: it says that all is there
        temporary.write_text(json.dumps(metrics, indent=1))
    values = {k: metrics[k] for k in ("auroc", "auroc_interval_95", "val_auroc")}
    Log(out, "evaluate", math.inf)(0, show=False, **values)
    say(metrics, impossible(n, args.fpr) or
        f"anomalies at --fpr {args.fpr:g}: {promise(calibration, args.fpr, left_out is not None)}")
    print(f"  wrote scores.csv, metrics.json, predict.pt, examples.png{', maps/' if args.maps else ''} "
          f"to {out} after {metrics['seconds']:.0f} s", flush=True)
    return metrics


def say(metrics, decided):
    """Print what `finish` found. decided: how it decides, in words."""
    tell(metrics)
    print(f"  {decided}")
    if metrics["f1_at_fpr"] is not None:
        print(f"  on test: {rates_of(metrics['decision'])}  "
              "F1 {f1_at_fpr:.3f}  accuracy {accuracy_at_fpr:.3f}".format(**metrics))
    if "auroc_all" in metrics:
        group = metrics["settings"]["anomaly_class"]
        seen = f"of {group} {metrics['auroc_seen_class']:.4f}" if "auroc_seen_class" in metrics else (
            f"test has no {group}")
        print(f"  that is of anomalies other than {group}; {seen}, of all {metrics['auroc_all']:.4f}")
    if "pro" in metrics:
        print("  pixels: AUROC {pixel_auroc:.4f}, PRO {pro:.4f}".format(**metrics))
    if metrics["val_auroc"] is not None:
        print(f"  synthetic defects on held-out normals: AUROC {metrics['val_auroc']:.3f}")


def pictures(setting, out, scores, maps, test, low, high):
    """examples.png, and with --maps OUT/maps/: heat maps over images. low, high: of `colours`."""
    def pair(i):
        image = to_float(setting.data.test[i:i + 1], 3, "cpu")[0]                               # (3, H, W)
        return image, overlay(image, maps[i], low, high)

    order = torch.from_numpy(test[np.argsort(-scores[test], kind="stable")])
    labels, rows = setting.data.labels[order], {}
    for name, label in (("anomalies", 1), ("normals", 0)):
        ranked = order[labels == label].tolist()
        rows |= {f"{name}, highest scores": ranked[:4], f"{name}, lowest": ranked[-4:]}
    grid = [[tile for i in row for tile in pair(i)] for row in rows.values()]
    scale, captions = max(1, 128 // setting.data.test.shape[-1]), ["image", "score of patches"]
    grid = [row + [None] * (8 - len(row)) for row in grid]
    save_grid(out / "examples.png", grid, captions * 4, scale, list(rows))
    if setting.args.maps:
        for i in test.tolist():
            path = out / "maps" / f"{setting.data.paths[i]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_grid(path, [list(pair(i))], captions, scale)
