"""What has an encoder learned? Similarities and a sensitivity curve, from held-out normals alone.

    python -m study.probe --diffusion runs/elpv/diffusion.pt --out runs/elpv runs/elpv-csi --results study/probe.csv

For each run: the mean cosine of a held-out normal image's embedding to that of its third view under five modes, of its
augmented self and of other images; and the AUROC of the same normals against themselves with one dark spot, for each of
several diameters and contrasts: how small and how faint a defect does the encoder see? No test image is read.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from dia_lib import (
    SCORES, Encoder, K, augment, autocast, dissolve_view, draw_augment, fit_normals, load_checkpoint, pick_device, run,
    score_images, step_generator, to_float, unet_of,
)
from evaluate import data_of, insert, run_key

DIAMETERS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)          # share of the image's side
CONTRASTS = (0.1, 0.2, 0.4, 0.8)                    # share of the brightness taken away
MODES = ("resize", "gaussian", "median", "diffusion", "residual")


def spots(images, diameter, contrast, generator):
    """Copies of the images, (n, C, H, W) uint8, with one dark disc each, antialiased over a pixel, at a random place inside."""
    n, _, H, W = images.shape
    yx = torch.stack(torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij"), -1)       # (H, W, 2)
    centre = (torch.rand(n, 1, 1, 2, generator=generator) * (1 - diameter) + diameter / 2) * torch.tensor([H, W])
    cover = (diameter * H / 2 - (yx - centre).norm(dim=-1) + 0.5).clamp(0, 1)                               # (n, H, W)
    return (images * (1 - contrast * cover[:, None])).round().to(torch.uint8)


@torch.no_grad()
def similarities(encoder, x, unet, abar, t, size, jitter):
    """Mean cosine of each image's embedding to those of its altered selves. x: (n, C, H, W) float in [0, 1]; t: an int.

    The views of modes need unet and abar where they dissolve. Returns {"sim_<mode>": mean, ..., "sim_augmented", "sim_other"}.
    """
    encoder.eval()

    def axis(images):
        with autocast(x.device):
            return F.normalize(encoder(images)[0].float(), dim=1)                                           # (n, D)

    z, steps, row = axis(x), torch.full((len(x),), t, device=x.device), {}
    for mode in MODES:
        row[f"sim_{mode}"] = (z * axis(dissolve_view(unet, x, steps, abar, size, mode))).sum(1).mean().item()
    draws = draw_augment(len(x), (0.54, 0.54), step_generator("cpu", 0, "probe", 0), jitter)
    row["sim_augmented"] = (z * axis(augment(x, {k: v.to(x.device) for k, v in draws.items()}))).sum(1).mean().item()
    cosines = z @ z.T
    row["sim_other"] = ((cosines.sum() - cosines.diagonal().sum()) / (len(z) * (len(z) - 1))).item()
    return row


def sensitivity(encoder, train, held, shift, jitter, device):
    """AUROC of held-out normals against themselves with a spot, {"<score>_<diameter>_<contrast>": value}; the same spots for all.

    train: (M, ...), held: (n, ...) uint8. As in `validate` of train_dia.py: 512 training images, 2 passes.
    """
    stats = fit_normals(encoder, train[:512], shift, 2, device, jitter=jitter)
    normal, row = score_images(encoder, stats, held, shift, 2, device, jitter=jitter), {}
    for i, diameter in enumerate(DIAMETERS):
        for contrast in CONTRASTS:
            generator = step_generator("cpu", 0, "spots", i)                            # the same places for each contrast
            images = torch.cat([spots(held, diameter, contrast, generator) for _ in range(2)])
            parts = score_images(encoder, stats, images, shift, 2, device, jitter=jitter)
            labels = [0] * len(held) + [1] * len(images)
            for score in SCORES:
                value = float(roc_auc_score(labels, torch.cat([normal[score], parts[score]])))
                row[f"{score}_{diameter:g}_{contrast:g}"] = value
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", nargs="+", required=True, metavar="RUN", help="folders of runs of train_dia.py")
    parser.add_argument("--diffusion", required=True, metavar="PATH", help="stage 1's checkpoint, for the dissolved views")
    parser.add_argument("--results", required=True, metavar="FILE", help="the csv table to append to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    device = pick_device(args.device)
    stage1 = load_checkpoint(args.diffusion, "diffusion", device)
    for out in args.out:
        state = load_checkpoint(Path(out) / "dia.pt", "dia", device)
        s = {"jitter": 1.0, **state["settings"]}
        data = data_of(s, out)
        if data.fingerprint != stage1["settings"]["fingerprint"]:
            raise SystemExit(f"{out} and {args.diffusion} were not trained on the same images.")
        encoder = Encoder(s["channels"], K, s["stem"]).to(device, memory_format=torch.channels_last)
        encoder.load_state_dict(state["encoder"])
        held = data.held[~data.calibration][:512]
        if len(held) < 2:
            raise SystemExit(f"{out} set {len(held)} normals aside to look at, 2 are needed: train with a larger --holdout.")
        x, t, size = to_float(held, s["channels"], device), sum(s["t_range"]) // 2, stage1["settings"]["dissolve_size"]
        row = similarities(encoder, x, *unet_of(stage1, device), t, size, s["jitter"])
        row |= sensitivity(encoder, data.train, held, s["shift"], s["jitter"], device)
        row = {**run_key(state), **{k: f"{v:.4f}" for k, v in row.items()}}
        insert(Path(args.results), [row], list(run_key(state)))
        print(f"{out}: " + "  ".join(f"{k} {row[k]}" for k in row if k.startswith("sim_")), flush=True)


if __name__ == "__main__":
    run(main)
