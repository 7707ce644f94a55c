"""Choose settings without any anomaly: held-out normals against the same images with a synthetic defect.

    python -m extras.choose runs/a runs/b                         # several settings
    python -m extras.choose runs/a/step-*                         # several steps of one, kept by --save-every

Prints each run's AUROCs, best last by the paper's score (csi, mean over the kinds of defect), and appends
them to RUN/log.jsonl. The last line is `best RUN`. Held-out normals that calibrate p-values are not looked
at. `real` is by csi on the anomalies of an npz file's val split, if it has any; nothing is ordered by it.

A caution: synthetic defects mislead where real anomalies are of another kind. On chest X-rays thin lines had
0.962 where the true AUROC was 0.739. Trust an order of settings only if the kinds agree on it.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.choose, in the project's folder.")

import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from dia_lib import (
    MEDMNIST_MD5, Item, Log, csi_fit, csi_parts, embed, load_checkpoint, load_encoder, make_parser, medmnist,
    normal_label, pick_device, read_images, run, shared_flags, step_generator,
)
from evaluate import data_of
from extras.local import local_fit, local_score
from extras.predict import SCORES

KINDS = ("line", "patch", "haze")       # of synthetic defects: thin, with edges, diffuse


def synthetic_defects(images, kind, generator):
    """Copies of normal images with one defect each.

    images: (n, C, H, W) uint8.  kind: "line", a dark thin polyline (a crack); "patch", a piece of the image
    pasted elsewhere (CutPaste, Li et al. 2021, arXiv:2104.04015); or "haze", a cloud without edges that veils
    the image with some grey (an opacity, a stain).  Returns the like. Draws on the CPU.
    """
    n, _, H, W = images.shape

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    yx = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1) / H      # (H, W, 2)
    if kind == "line":
        points, angle = [uniform(0.2, 0.8, n, 2)], uniform(0, 2 * math.pi, n)
        for _ in range(3):
            angle = angle + uniform(-0.7, 0.7, n)
            points.append(points[-1] + torch.stack([angle.sin(), angle.cos()], 1) * uniform(0.08, 0.2, n, 1))
        distance = torch.full((n, H, W), 9.0)
        for a, b in itertools.pairwise(points):                         # distance to each of three segments
            ab, ap = (b - a)[:, None, None], yx - a[:, None, None]                            # (n, H, W, 2)
            along = ((ap * ab).sum(-1) / (ab * ab).sum(-1)).clamp(0, 1)
            distance = torch.minimum(distance, (ap - along[..., None] * ab).norm(dim=-1))
        width = uniform(0.01, 0.025, n, 1, 1)                           # half-width, share of the side
        cover = ((width - distance) * H + 0.5).clamp(0, 1)              # antialiased over one pixel
        keep = 1 - cover * uniform(0.4, 0.8, n, 1, 1)
        return (images * keep[:, None]).round().to(torch.uint8)
    if kind == "patch":
        def brighter(piece):
            return (piece * uniform(0.9, 1.1, 1)).round().clamp(0, 255).to(torch.uint8)
        return torch.stack([cut_paste(image, brighter, generator) for image in images])
    if kind == "haze":
        centre, radius = uniform(0.25, 0.75, n, 1, 1, 2), uniform(0.2, 0.45, n, 1, 1)
        blob = torch.exp(-((yx - centre).norm(dim=-1) / radius) ** 2)                           # (n, H, W)
        cloud = F.interpolate(uniform(0.5, 1, n, 1, 4, 4), (H, W), mode="bicubic")[:, 0].clamp(0, 1)
        veil, grey = blob * cloud * uniform(0.6, 1, n, 1, 1), uniform(0, 255, n, 1, 1, 1)
        return torch.lerp(images.float(), grey, veil[:, None]).round().to(torch.uint8)
    raise ValueError(f"defect {kind!r}: expected {', '.join(KINDS)}")


def cut_paste(image, change, generator):
    """A copy of image (C, H, W), a random rectangle of it pasted elsewhere. CutPaste, arXiv:2104.04015.

    The rectangle has 2-15% of the area, aspect 0.3 to 1/0.3.  change: what becomes of the piece on its way,
    (C, h, w) -> (C, h, w).
    """
    def uniform(low, high):
        return torch.rand(1, generator=generator).item() * (high - low) + low

    H, W = image.shape[1:]
    area, aspect = uniform(0.02, 0.15), math.exp(uniform(math.log(0.3), -math.log(0.3)))
    h, w = (max(1, min(side, round(side * (area * r) ** 0.5))) for side, r in ((H, aspect), (W, 1 / aspect)))
    y, x, y2, x2 = (int(uniform(0, side - s + 1)) for side, s in ((H, h), (W, w), (H, h), (W, w)))
    out = image.clone()
    out[:, y2:y2 + h, x2:x2 + w] = change(image[:, y:y + h, x:x + w])
    return out


def quick_scorer(encoder, train, shift, device):
    """images (n, C, H, W) uint8 -> {score: (n,)} of SCORES and csi's parts, by 2 passes, for comparisons.

    train: (M, C, H, W) uint8, of which 512 serve.  Exits if embeddings are not finite.
    """
    train = train[:512]
    stats, known = csi_fit(*embed(encoder, train, shift, 2, device)), local_fit(encoder, train, device)

    def scores(images):
        z, logits = embed(encoder, images, shift, 2, device)
        if not z.isfinite().all():
            raise SystemExit("the embeddings are not finite: training has diverged. Try a smaller --lr.")
        return csi_parts(stats, z, logits) | {"local": local_score(known, encoder, images, device)}
    return scores


def validate(encoder, train, held, shift, device, real=()):
    """AUROCs of normals held (n, C, H, W) uint8 against themselves with a defect, three copies of each kind.

    encoder, train, shift, device: as for quick_scorer.  val_auroc is by csi, val_cos by its cosine, val_local
    by local_score, each the mean over KINDS; val_line, val_patch and val_haze are by csi. real: anomalies
    (m, C, H, W) uint8; val_real is the AUROC against them by csi, if there are any. Draws nothing that
    depends on the run, so that runs can be compared.
    """
    scores = quick_scorer(encoder, train, shift, device)
    normal, auroc = scores(held), {}
    for i, kind in enumerate(KINDS):
        generator = step_generator("cpu", 0, "synthetic defects", i)
        defects = torch.cat([synthetic_defects(held, kind, generator) for _ in range(3)])
        labels, anomalous = [0] * len(held) + [1] * len(defects), scores(defects)
        for name in SCORES:
            auroc[name, kind] = float(roc_auc_score(labels, torch.cat([normal[name], anomalous[name]])))
    mean = {name: statistics.fmean(auroc[name, kind] for kind in KINDS) for name in SCORES}
    figures = {"val_auroc": mean["csi"], **{f"val_{kind}": auroc["csi", kind] for kind in KINDS},
               "val_cos": mean["cos"], "val_local": mean["local"]}
    if len(real):
        labels = [0] * len(held) + [1] * len(real)
        figures["val_real"] = float(roc_auc_score(labels, torch.cat([normal["csi"], scores(real)["csi"]])))
    return figures


def val_anomalies(data, image_size, normal_class):
    """The anomalies in the val split of a MedMNIST file, (m, C, H, W) uint8; none for other data."""
    if not data.endswith(".npz") and data not in MEDMNIST_MD5:
        return ()
    path = Path(data).expanduser() if data.endswith(".npz") else medmnist(data)
    with np.load(path) as file:
        if "val_images" not in file:
            return ()
        anomalous = file["val_labels"].flatten() != normal_label(path, normal_class)
        images = file["val_images"][anomalous]
    return torch.from_numpy(read_images([Item("", 1, "", image) for image in images], image_size)[0])


def choose(out, device, where=None, normal_class=None):
    """`validate` of a run's folder, appended to its log; returns its step and figures."""
    state = load_checkpoint(out / "dia.pt", "dia", device)
    data = data_of(state["settings"], out, ("train",), where, normal_class)
    held = data.held[~data.calibration][:512]
    if len(held) < 2:
        raise SystemExit(f"{out}: {len(held)} held-out normals serve for choosing, 2 at least are needed: "
                         "train with a larger --holdout.")
    s, size = state["settings"], data.train.shape[-1]
    real = val_anomalies(where or s["data"], size, normal_class or s["normal_class"])
    figures = validate(load_encoder(state, device), data.train, held, s["shift"], device, real)
    Log(out, "choose", math.inf)(state["step"], show=False, **figures)
    print(f"{out}: step {state['step']}, {len(held)} held-out normals", flush=True)
    return state["step"], figures


def main():
    parser = make_parser(__doc__, usage=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or step-N of --save-every")
    shared_flags(parser, data=None)
    args = parser.parse_args()
    device = pick_device(args.device)
    found = [(out, *choose(Path(out), device, args.data, args.normal_class)) for out in args.runs]
    names = ["csi", *KINDS, "cos", "local", *(["real"] if "val_real" in found[0][2] else [])]
    print("".join(f"{name:>7}" for name in names), "    step  run")
    for out, step, figures in sorted(found, key=lambda row: row[2]["val_auroc"]):
        print("".join(f"{value:7.3f}" for value in figures.values()), f" {step:7d}  {out}")
    print("note: synthetic defects mislead where real anomalies are of another kind: see whether line, patch "
          "and haze agree")
    print(f"best {out}")


if __name__ == "__main__":
    run(main, "nothing that was written before is lost")
