"""What has an encoder learned? Similarities and a sensitivity curve, from held-out normals alone.

    python -m study.probe --diffusion runs/elpv/diffusion.pt --out runs/elpv runs/elpv-csi --results probe.csv

For each run: the mean cosine of a held-out normal image's embedding to that of its third view in four modes,
of its augmented self and of other images; and the AUROC of the same normals against themselves with one dark
spot, for each of several diameters and contrasts: how small and how faint a defect does the encoder see? No
test image is read. The probe.csv of this folder is an older table, with a fifth mode.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from dia_lib import (
    AUGMENT, augment, autocast, dissolve_view, load_checkpoint, load_data,
    load_encoder, load_unet, make_parser, pick_device, run, step_generator, to_float,
)
from evaluate import data_of
from extras.choose import quick_scorer
from extras.predict import SCORES
from extras.tables import insert
from study.results import run_key

DIAMETERS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)          # share of the image's side
CONTRASTS = (0.1, 0.2, 0.4, 0.8)                    # share of the brightness taken away
MODES = ("resize", "gaussian", "median", "diffusion")


def spots(images, diameter, contrast, generator):
    """Copies of the images with one dark disc each, antialiased over a pixel, at a random place inside.

    images: (n, C, H, W) uint8.  diameter: share of the side; contrast: share of the brightness taken away.
    """
    n, _, H, W = images.shape
    yx = torch.stack(torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij"), -1)
    place = torch.rand(n, 1, 1, 2, generator=generator) * (1 - diameter) + diameter / 2
    distance = (yx - place * torch.tensor([H, W])).norm(dim=-1)                                 # (n, H, W)
    cover = (diameter * H / 2 - distance + 0.5).clamp(0, 1)
    return (images * (1 - contrast * cover[:, None])).round().to(torch.uint8)


@torch.no_grad()
def similarities(encoder, x, small, unet, abar, t, canvas):
    """Mean cosine of each image's embedding to those of its altered selves.

    x (n, C, H, W) and small (n, C, h, h), float in [0, 1]: the images, and at stage 1's size; t: an int.
    unet, abar, canvas: as for dissolve_view. Returns {"sim_<mode>": mean, ..., "sim_augmented", "sim_other"}.
    """
    def axis(images):
        with autocast(x.device):
            return F.normalize(encoder(images)[0].float(), dim=1)                                   # (n, D)

    z, times, row = axis(x), torch.full((len(x),), t, device=x.device), {}
    for mode in MODES:
        # as in train_dia.py: without diffusion nothing is enlarged
        y = small if mode == "diffusion" or small.shape[-1] < x.shape[-1] else x
        view = dissolve_view(y, x.shape[-1], mode, unet, times, abar, canvas)
        row[f"sim_{mode}"] = (z * axis(view)).sum(1).mean().item()
    u = torch.rand(AUGMENT, len(x), generator=step_generator("cpu", 0, "probe", 0)).to(x.device)
    row["sim_augmented"] = (z * axis(augment(x, u, (0.54, 0.54)))).sum(1).mean().item()
    cosines = z @ z.T
    row["sim_other"] = ((cosines.sum() - cosines.diagonal().sum()) / (len(z) * (len(z) - 1))).item()
    return row


def sensitivity(encoder, train, held, shift, device):
    """AUROC of held-out normals against themselves with a spot, {"<score>_<diameter>_<contrast>": value}.

    train: (M, C, H, W), held: (n, C, H, W) uint8. Scored by extras.choose's quick_scorer; the spots are
    the same for every run.
    """
    scores = quick_scorer(encoder, train, shift, device)
    normal, row = scores(held), {}
    for i, diameter in enumerate(DIAMETERS):
        for contrast in CONTRASTS:
            generator = step_generator("cpu", 0, "spots", i)            # the same places for each contrast
            images = torch.cat([spots(held, diameter, contrast, generator) for _ in range(2)])
            labels, spotted = [0] * len(held) + [1] * len(images), scores(images)
            for score in SCORES:
                value = float(roc_auc_score(labels, torch.cat([normal[score], spotted[score]])))
                row[f"{score}_{diameter:g}_{contrast:g}"] = value
    return row


def main():
    parser = make_parser(__doc__, usage=None)
    parser.add_argument("--out", nargs="+", required=True, metavar="RUN",
                        help="folders of runs of train_dia.py")
    parser.add_argument("--diffusion", required=True, metavar="PATH",
                        help="stage 1's checkpoint, for the dissolved views")
    parser.add_argument("--results", required=True, metavar="FILE", help="the csv table to append to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    device = pick_device(args.device)
    stage1 = load_checkpoint(args.diffusion, "diffusion", device)
    (unet, abar), canvas = load_unet(stage1, device), stage1["settings"]["dissolve_size"]
    for out in args.out:
        state = load_checkpoint(Path(out) / "dia.pt", "dia", device)
        s, encoder = state["settings"], load_encoder(state, device)
        data = data_of(s, out, ("train",))
        if data.fingerprint != stage1["settings"]["fingerprint"]:
            raise SystemExit(f"{out} and {args.diffusion} were not trained on the same images.")
        mine = ~data.calibration
        if mine.sum() < 2:
            raise SystemExit(f"{out} set {mine.sum()} normals aside to look at, 2 are needed: train with a "
                             "larger --holdout.")
        small = load_data(s["data"], canvas, ("train",), s["holdout"], s["normal_class"])  # in the same order
        x, small = (to_float(images[mine][:512], s["channels"], device) for images in (data.held, small.held))
        row = similarities(encoder, x, small, unet, abar, sum(s["t_range"]) // 2, canvas)
        row |= sensitivity(encoder, data.train, data.held[mine][:512], s["shift"], device)
        key = run_key(s, state["step"])
        row = {**key, **{k: f"{v:.4f}" for k, v in row.items()}}
        insert(Path(args.results), [row], list(key))
        print(f"{out}: " + "  ".join(f"{k} {row[k]}" for k in row if k.startswith("sim_")), flush=True)


if __name__ == "__main__":
    run(main)
