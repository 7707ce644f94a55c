"""Heat maps: the scores of patches over an image, and how well they find what masks mark."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.metrics import auc, roc_auc_score, roc_curve
from torchvision.transforms.functional import gaussian_blur

from dia_lib import decode, to_channels


def heat_map(scores, size):
    """Patch scores (P,) of a square grid as a map of size (H, W), or of a side: bilinear, then smoothed.

    A side above 256 is smoothed at 256, which is the same but for a pixel, and then enlarged.
    """
    side, size = math.isqrt(len(scores)), (size, size) if isinstance(size, int) else tuple(size)
    first = tuple(min(256, n) for n in size)
    maps = smoothed(F.interpolate(scores.view(1, 1, side, side), first, mode="bilinear"))
    return (F.interpolate(maps, size, mode="bilinear") if size != first else maps)[0, 0]


def smoothed(maps):
    """Maps (n, 1, H, W) under a Gaussian of 4 pixels in 256, to four deviations, as in both papers' code."""
    sigma = [4 * side / 256 for side in maps.shape[:1:-1]]                                  # along W, along H
    return gaussian_blur(maps, [2 * math.ceil(4 * s) + 1 for s in sigma], sigma)


def colours(maps):
    """{low, high}: the colours of heat maps, by held-out normals' patch scores (n, P); 0 and 1 without any.

    Red begins at their median, and is full twice as far above it as their highest one in a thousand.
    """
    if not maps.numel():
        return {"low": 0.0, "high": 1.0}
    values = np.quantile(maps.numpy(), [0.5, 0.999])
    return {"low": float(values[0]), "high": float(2 * values[1] - values[0])}


def overlay(image, scores, low, high):
    """The image (C, H, W) in [0, 1] as RGB, reddened where it is above `low`, most from `high` on.

    scores: of its patches (P,), as for heat_map.
    """
    image = to_channels(image[None], 3)[0]
    heat = ((heat_map(scores, image.shape[1:]) - low) / max(high - low, 1e-12)).clamp(0, 1)
    red = torch.stack([heat, torch.zeros_like(heat), torch.zeros_like(heat)])
    return image * (1 - 0.6 * heat) + 0.6 * red


def mask_of(data, path, size):
    """Where the anomaly is in a test image of MVTec's layout, (size, size) bool; None where no mask says it.

    data: the folder; path: relative, test/<group>/<name>.png; its mask is
    ground_truth/<group>/<name>_mask.png. A pixel is in it from half the highest value on: thin anomalies do
    not vanish where masks are made smaller, and 0 and 1 are read, too.
    """
    inner = Path(path).with_suffix("").parts[1:]
    file = Path(data).expanduser().joinpath("ground_truth", *inner[:-1], f"{inner[-1]}_mask.png")
    mask = decode(file, size)[0][0] if file.is_file() else np.zeros(1)
    return torch.from_numpy(mask > mask.max() / 2) if mask.any() else None


def pixel_metrics(heat, masks, most=0.3):
    """pixel_auroc, and pro: the mean share of a region that is found, over false-positive rates to `most`.

    heat: (Q, H, H) float; masks: (Q, H, H) bool. A region is a connected one, over corners too. Bergmann et
    al. 2020 (arXiv:1911.02357), Sec. 4; the area is divided by `most`, so that 1 is perfect.
    """
    weights = np.ones(masks.shape)
    for weight, mask in zip(weights, masks.numpy(), strict=True):
        regions, _ = ndimage.label(mask, np.ones((3, 3)))
        weight[mask] = 1 / np.bincount(regions.ravel())[regions[mask]]
    truth, values = masks.numpy().ravel(), heat.numpy().ravel()
    false, pro, _ = roc_curve(truth, values, sample_weight=weights.ravel())
    within = false < most
    area = auc(np.append(false[within], most), np.append(pro[within], np.interp(most, false, pro)))
    return {"pixel_auroc": float(roc_auc_score(truth, values)), "pro": float(area / most)}
