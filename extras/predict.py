"""Score images of your own by a run of train_dia.py, without labels. Higher means more anomalous.

    python -m extras.predict runs/lungs new_scans               # every image below that folder
    python -m extras.predict runs/lungs new_scans --fpr 0.01    # call fewer normal images anomalies
    python -m extras.predict runs/lungs --test                  # how such decisions do on the run's test set

Writes scores.csv (path, score, p_value, anomaly, seen), most anomalous first, and examples.png, to
RUN/images/<folder's name>. The first call needs the training data, and keeps what it needs of them in
RUN/predict.pt; later ones do not.

    from extras.predict import load_images, load_run            # the same from Python
    run = load_run("runs/lungs")
    images, paths, digests = load_images("new_scans", run.settings["image_size"], run.settings["window"])
    scores, p = run.score(images)                               # (n,) and (n,)
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.predict, in the project's folder.")

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from dia_lib import (
    SUFFIXES, Encoder, Item, autocast, csi_parts, embed, load_checkpoint, load_encoder, make_parser, name_in,
    number, pick_device, read_images, run, save_checkpoint, save_grid, shared_flags, to_float, whole,
)
from evaluate import auroc_interval, data_of, remembered, training_stats, weights_of
from extras.prepare import LEFT, READ, look, page_of, scans, to_8_bit

SCORES = ("csi", "cos", "local")        # the paper's; its cosine alone; nearest neighbour of local features


def arguments(argv=None):
    parser = make_parser(__doc__, usage=None)
    parser.add_argument("run", metavar="RUN", help="folder of a run of train_dia.py")
    parser.add_argument("images", metavar="IMAGES", nargs="?", help="folder of images, at any depth")
    parser.add_argument("--test", action="store_true", help="the run's own test set instead: AUROC, and what "
                        "deciding by p <= fpr does, for each score; writes RUN/decisions.json")
    shared_flags(parser, data=None)
    parser.add_argument("--score", choices=SCORES, default="csi", help="csi: the paper's; cos: its cosine "
                        "alone; local: nearest neighbour of local features (default: csi)")
    parser.add_argument("--fpr", type=number(float, above=0, high=0.99), default=0.05,
                        help="share of normal images that may be called anomalies (default: 0.05)")
    parser.add_argument("--passes", type=number(), default=10, help="test-time passes averaged (default: 10)")
    parser.add_argument("--batch-size", type=number(), default=96,
                        help="images a step, before shifts (default: 96)")
    parser.add_argument("--to", metavar="FOLDER", help="where to write (default: RUN/images/<name>)")
    args = parser.parse_intermixed_args(argv)                   # IMAGES may stand after the flags
    if args.test == bool(args.images):
        parser.error("give either a folder of images or --test")
    return args


# ---- Images, and the local score -----------------------------------------------------------------------


def load_images(folder, size, window=None):
    """All images and scans below a folder, of any format and size. No copy is kept on disk.

    window: (low, high) that the run's set was prepared with, `settings["window"]`; new scans get the same.
    Returns images (n, C, size, size) uint8, n paths relative to the folder, and digests (n,) int64 of their
    pixels, as in Data.digests. Says how many other files there are. Exits where there is no image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SystemExit(f"{folder}: no such folder.")
    files = scans(root)
    dicom = {f for f in files if f.suffix.lower() not in SUFFIXES}
    if not files:
        raise SystemExit(f"{folder}: no image below it; looked for {READ}; {LEFT}.")
    other = sum(f.is_file() and not f.name.startswith(".") for f in root.rglob("*")) - len(files)
    if other:
        print(f"note: {other} other files below {folder} are left out; images are {READ}")
    items = [Item(name_in(root, f), 0, "", scan(f, window) if f in dicom else f) for f in files]
    pixels, digests, deep = read_images(items, size, window)
    if window and len(deep) + len(dicom) < len(files):
        print("note: some have 8 bits; the run's images were made of values {:g} to {:g}".format(*window))
    return torch.from_numpy(pixels), [i.name for i in items], torch.from_numpy(digests.view(np.int64))


def scan(path, window):
    """A DICOM file of one page as uint8, by a window (low, high), or, where that is None, by its header's."""
    seen = look(path)
    if isinstance(seen, str):
        raise SystemExit(seen)
    if seen.pages > 1:
        raise SystemExit(f"{path} has {seen.pages} pages: which of them? python -m extras.prepare takes one, "
                         "or all.")
    page = page_of(path, 0)
    if not (window or page.window or page.pixels.dtype == np.uint8):
        raise SystemExit(f"{path} names no window, and the run's images were not prepared with one: prepare "
                         "both by python -m extras.prepare.")
    return to_8_bit(page, window)


@torch.no_grad()
def local_features(encoder, images, device):
    """The direction of the encoder's third stage at each of P positions: (n, P, 256) float32 of length 1.

    images: (n, C', H, W) uint8; no shift, no augmentation. P = (H/16)**2, with the cifar stem (H/4)**2.
    Returned on the device.
    """
    training, b = encoder.training, encoder.backbone
    encoder.eval()
    x = (to_float(images, b.conv1.in_channels, device) - 0.5) / 0.5                 # as the encoder's forward
    with autocast(device):
        h = b.maxpool(b.relu(b.bn1(b.conv1(x.contiguous(memory_format=torch.channels_last)))))
        maps = b.layer3(b.layer2(b.layer1(h)))                                      # (n, 256, h, w)
    encoder.train(training)
    return F.normalize(maps.float().flatten(2).transpose(1, 2), dim=2)


def local_fit(encoder, images, device, batch=96, most=50_000):
    """What local_score needs of training images (M, C', H, W) uint8: (at most `most`, 256), a fixed draw."""
    known, keep = [], None
    for i in range(0, len(images), batch):
        features = local_features(encoder, images[i:i + batch], device)
        if keep is None:
            P = features.shape[1]
            keep = torch.zeros(len(images) * P, dtype=torch.bool)
            keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[:most]] = True
        rows = features.flatten(0, 1).cpu()                                         # (n*P, 256)
        known.append(rows[keep[i * P:i * P + len(rows)]])
    return torch.cat(known)


def local_score(known, encoder, images, device, batch=96):
    """The position least like any training image: max over positions of 1 - cosine to the nearest, (Q,).

    known: of local_fit; images: (Q, C', H, W) uint8. Higher = more anomalous. Not in the paper: the nearest
    neighbour of PatchCore (Roth et al. 2022, arXiv:2106.08265) on features of an encoder trained here.
    """
    scores, known = [], known.to(device)
    for part in images.split(batch):
        features = local_features(encoder, part, device)                            # (n, P, 256)
        chunk = max(1, 2 ** 24 // (len(known) * features.shape[1]))                 # about 64 MB
        scores += [1 - (f @ known.T).amax(2).amin(1).cpu() for f in features.split(chunk)]
    return torch.cat(scores)


# ---- A run, ready to score -----------------------------------------------------------------------------


@dataclass
class Run:
    """A trained run, ready to score images; of load_run."""
    out: Path               # the run's folder
    settings: dict          # as in dia.pt
    step: int
    encoder: Encoder
    known: dict             # axis, w, v of csi_fit; local; calibration {score: (n,)}; train, held: digests
    device: torch.device
    passes: int = 10
    batch: int = 96

    def parts(self, images, scores=SCORES, name=None):
        """{score: (n,) tensor} of images (n, C, H, W) uint8. name: of a progress bar."""
        found = {}
        if not len(images):
            return dict.fromkeys(scores, torch.empty(0))
        if len({"csi", "cos"} & set(scores)):
            shift = self.settings["shift"]
            z, logits = embed(self.encoder, images, shift, self.passes, self.device, self.batch, name)
            found = csi_parts(self.known, z, logits)
        if "local" in scores:
            found["local"] = local_score(self.known["local"], self.encoder, images, self.device, self.batch)
        return {score: found[score] for score in scores}

    def p_values(self, scores, score="csi"):
        """Conformal p-values (n,) of scores (n,), numpy: see the function below."""
        return p_values(self.known["calibration"][score].numpy(), scores)

    def score(self, images, score="csi"):
        """Scores (n,) and p-values (n,), numpy, of images (n, C, H, W) uint8 as load_images gives them.

        Higher scores and lower p-values are more anomalous. score: one of SCORES. Raises ValueError where the
        images have another type or size than the run's.
        """
        size = self.settings["image_size"]
        if images.dtype != torch.uint8 or images.shape[2:] != (size, size) or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; this run needs uint8 "
                             f"(n, 1 or 3, {size}, {size})")
        scores = self.parts(images, (score,))[score].numpy()
        return scores, self.p_values(scores, score)


def load_run(out, device="auto", passes=10, batch=96, data=None):
    """Read a run's dia.pt and predict.pt; where that is missing, it is made from the training data.

    data: the run's Data, if it is at hand.  Exits where a file is missing or not what it should be.
    """
    out, device = Path(out), pick_device(device)
    state = load_checkpoint(out / "dia.pt", "dia", device)
    key, encoder = {"weights": weights_of(state), "passes": passes}, load_encoder(state, device)
    known = remembered(out / "predict.pt", "predict", key)
    run = Run(out, state["settings"], state["step"], encoder, known, device, passes, batch)
    if known is None:
        data = data or data_of(run.settings, out, ("train",))
        stats = training_stats(out, state, encoder, data, passes, device, batch)
        run.known = {**{k: stats[k] for k in ("axis", "w", "v")}, "train": data.digests["train"],
                     "held": data.digests["held"], "local": local_fit(encoder, data.train, device, batch)}
        run.known["calibration"] = run.parts(data.held[data.calibration])
        save_checkpoint(out / "predict.pt", "predict", key, run.known)
    return run


# ---- Decisions -----------------------------------------------------------------------------------------


def p_values(calibration, scores):
    """Conformal p-values (n,): the share of normals at least as anomalous, the image itself counted as one.

    (1 + #{calibration >= score}) / (len(calibration) + 1); Vovk et al. 2005, Bates et al. 2023
    (arXiv:2104.08279), Eq. 2. If the image is normal and as the calibration images are (exchangeable),
    P(p <= a) <= a for every a. nan without any calibration image.
    """
    if not len(calibration):
        return np.full(len(scores), np.nan)
    below = np.searchsorted(np.sort(calibration), scores, side="left")      # those strictly below
    return (1 + len(calibration) - below) / (len(calibration) + 1)


def expected_rate(fpr, n):
    """Mean false-positive rate of deciding by p <= fpr with n calibration images."""
    return math.floor(fpr * (n + 1) + 1e-9) / (n + 1)                       # 0.29 * 100 is 29, not 28.99


def decisions(p, labels, fpr, n):
    """What deciding by p <= fpr does on labelled images: rates with exact (Clopper-Pearson) 95% intervals.

    p, labels: (Q,) arrays; n: the number of calibration images; None without any.
    """
    if not n:
        return None
    result = {"fpr": fpr, "calibration_normals": n, "expected_false_positive_rate": expected_rate(fpr, n)}
    for name, label in (("false_positive_rate", 0), ("sensitivity", 1)):
        found, total = int((p[labels == label] <= fpr).sum()), int((labels == label).sum())
        interval = binomtest(found, total).proportion_ci(method="exact")
        result |= {name: found / total, f"{name}_interval_95": [float(v) for v in interval]}
    return result


def impossible(n, fpr):
    """Why n calibration images can never give a p-value of at most fpr, or None."""
    if n == 0:
        return "no decisions: no normals were held out for calibration in training (--holdout)"
    if expected_rate(fpr, n) == 0:
        return (f"no decisions: with {n} calibration normals no p-value is below {1 / (n + 1):.3f}; --fpr "
                f"{fpr:g} needs {math.ceil(1 / fpr - 1e-9) - 1}: train with more --holdout, or raise --fpr")
    return None


def columns_of(p, fpr, n):
    """The columns p_value and anomaly (0 or 1) of p-values (Q,); empty where nothing can be decided."""
    undecided = impossible(n, fpr)
    return [["" if math.isnan(v) else f"{v:.6g}" for v in p], ["" if undecided else int(v <= fpr) for v in p]]


# ---- The two things that the command does ----------------------------------------------------------------


def examples(path, images, order):
    """The most anomalous images, the next ones and the least anomalous, eight a row, as one picture."""
    picked = {"highest scores": order[:8], "next": order[8:16], "lowest": order[16:][-8:]}
    picked = {name: row.tolist() for name, row in picked.items() if len(row)}
    rows = [[images[i] / 255 for i in row] + [None] * (8 - len(row)) for row in picked.values()]
    save_grid(path, rows, [], max(1, 128 // images.shape[-1]), list(picked))


def score_folder(run, images, paths, digests, score, fpr, to):
    """Score the images of load_images; write scores.csv and examples.png to a folder."""
    scores = run.parts(images, (score,), "images")[score]
    p, n = run.p_values(scores.numpy(), score), len(run.known["calibration"][score])
    order = scores.argsort(descending=True, stable=True)
    known = {**dict.fromkeys(run.known["held"].tolist(), "held out"),
             **dict.fromkeys(run.known["train"].tolist(), "training")}
    seen = [known.get(digest, "") for digest in digests.tolist()]
    rows = list(zip(paths, scores.tolist(), *columns_of(p, fpr, n), seen, strict=True))
    to.mkdir(parents=True, exist_ok=True)
    with whole(to / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("path", "score", "p_value", "anomaly", "seen"),
                                    *(rows[i] for i in order.tolist())])
    examples(to / "examples.png", images, order)
    if trained := seen.count("training"):
        print(f"note: {trained} of these images were trained on (column `seen`): their scores are too low")
    found = f"{int((p <= fpr).sum())} anomalies at --fpr {fpr:g}, by {n} calibration normals"
    print(f"{len(paths)} images: {impossible(n, fpr) or found}; wrote scores.csv and examples.png to {to}")


def score_test(run, data, fpr):
    """AUROC and decisions of each score on the run's labelled test set; write decisions.json."""
    labels, n, result = data.labels.numpy(), len(run.known["calibration"]["csi"]), {}
    print(f"{run.out}: {len(labels)} test images ({labels.sum()} anomalies); "
          + (impossible(n, fpr) or f"deciding at --fpr {fpr:g}, by {n} calibration normals"))
    for score, values in run.parts(data.test, name="test images").items():
        auroc, interval = auroc_interval(labels, values.numpy())
        d = decisions(run.p_values(values.numpy(), score), labels, fpr, n)
        result[score] = {"auroc": auroc, "auroc_interval_95": interval, "decision": d}
        rates = [] if impossible(n, fpr) else [
            f"{name.replace('_', ' ')} {d[name]:.3f} ({{:.3f}} to {{:.3f}})".format(*d[f"{name}_interval_95"])
            for name in ("false_positive_rate", "sensitivity")]
        print("  ".join([f"  {score:5s} AUROC {auroc:.4f}", *rates]))
    with whole(run.out / "decisions.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(f"wrote decisions.json to {run.out}")


def main():
    args = arguments()
    out, device, data = Path(args.run), pick_device(args.device), None
    settings = load_checkpoint(out / "dia.pt", "dia", "cpu")["settings"]
    if args.images:
        found = load_images(args.images, settings["image_size"], settings.get("window"))    # mistakes first
    if args.test or args.data:
        data = data_of(settings, out, ("train", "test")[:1 + args.test], args.data, args.normal_class)
    if args.test and len(set(data.labels.tolist())) != 2:
        raise SystemExit(f"--test: {data.name} has no test set with both normal and anomalous images.")
    loaded = load_run(out, device, args.passes, args.batch_size, data)
    if args.test:
        score_test(loaded, data, args.fpr)
    else:
        to = args.to or out / "images" / Path(args.images).expanduser().resolve().name
        score_folder(loaded, *found, args.score, args.fpr, Path(to))


if __name__ == "__main__":
    run(main, "nothing that was written before is lost")
