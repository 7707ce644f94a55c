"""The `local` score of DIA's encoder, and DIA's heat map: neither is in the paper.

The score is PatchCore's (Roth et al. 2022, arXiv:2106.08265), on features of an encoder trained here. The
heat map adds up the score of each position and what dissolving removes there.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from dia_lib import autocast, dissolve_view, load_checkpoint, sha256_of, to_float


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


def local_maps(known, encoder, images, device, batch=96):
    """1 - cosine to the nearest position of any training image: (Q, P). Higher = more anomalous.

    known: of local_fit; images: (Q, C', H, W) uint8.
    """
    maps, known = [], known.to(device)
    for part in images.split(batch):
        features = local_features(encoder, part, device)                            # (n, P, 256)
        chunk = max(1, 2 ** 24 // (len(known) * features.shape[1]))                 # about 64 MB
        maps += [1 - (f @ known.T).amax(2).cpu() for f in features.split(chunk)]
    return torch.cat(maps)


def local_score(known, encoder, images, device, batch=96):
    """The position least like any training image, (Q,): the highest of `local_maps`."""
    return local_maps(known, encoder, images, device, batch).amax(1)


def stage1_of(settings, out):
    """Stage 1's checkpoint of a run that dissolves by it, else None. Says so where it is gone."""
    if settings["dissolve"] != "diffusion":
        return None
    for path in (Path(settings["diffusion"]), out / "diffusion.pt"):
        if path.is_file() and sha256_of(path) == settings["diffusion_sha256"]:
            stage1 = load_checkpoint(path, "diffusion", "cpu")
            return {"settings": stage1["settings"], "ema": stage1["ema"]}
    print(f"note: {settings['diffusion']} is gone: heat maps do without what dissolving removes")
    return None


@torch.no_grad()
def removed_maps(unet, abar, images, pixels, t_range, device, batch=96):
    """What dissolving removes, |x - x_hat|: the mean over channels and 5 values of t, (Q, h * h).  DIA Eq. 4.

    unet, abar: of load_unet.  images: (Q, C, H, H) uint8.  pixels: the dissolving size; h is H where that is
    smaller.  t_range: [A, B), as in training.
    """
    maps, h = [torch.empty(0, 1)], min(pixels, images.shape[-1])
    steps = torch.linspace(t_range[0], t_range[1] - 1, 5).long().tolist()
    for part in images.split(batch) if len(images) else ():
        x = to_float(part, unet.stem.in_channels, device)
        x = F.interpolate(x, (h, h), mode="bilinear", antialias=True)
        each = (torch.full((len(x),), t, device=device) for t in steps)
        removed = [x - dissolve_view(x, h, "diffusion", unet, t, abar, pixels) for t in each]
        maps.append(torch.stack(removed).abs().mean((0, 2)).flatten(1).cpu())
    return torch.cat(maps[1:] or maps)


def together(maps, scales):
    """The sum of maps [(n, P), ...] of the same images, each in units of its colours (extras.heat_maps)."""
    side, total = max(math.isqrt(grid.shape[1]) for grid in maps), 0
    for grid, scale in zip(maps, scales, strict=True):
        own = math.isqrt(grid.shape[1])
        units = (grid - scale["low"]) / max(scale["high"] - scale["low"], 1e-12)
        total = total + F.interpolate(units.view(-1, 1, own, own), (side, side), mode="bilinear").flatten(1)
    return total
