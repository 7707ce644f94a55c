"""The small library of DIA, "Dissolving Is Amplifying" (Shi et al., ECCV 2024, arXiv:2302.14696).

First the method, in the order of the paper: schedule and dissolving, UNet, views, encoder, loss, score.
Below the line of equal signs, the plumbing: images, checkpoints, random numbers, device, command line.

Letters, used everywhere:
    B  images in a batch     K  shifts (4)            V  views (2 for CSI, 3 for DIA)   N  rows of a view, K*B
    D  embedding size (128)  C H W  image             T  diffusion steps (1000)
    M  training images       Q  test images

Images are uint8 in storage and float in [0, 1] in the pipeline; the networks scale it to [-1, 1].
Rows of a batch of views are view-major, then shift, then image: row (v*K + k)*B + b. Views 0 and 1 are
positives of each other, view 2 is the dissolved one. Anomaly scores: higher means more anomalous.
Random numbers are inputs: a step draws them all first; views, networks and losses are functions of tensors.
"""

import argparse
import hashlib
import http.client
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageOps
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.datasets.utils import check_integrity
from torchvision.models import resnet18
from torchvision.transforms.functional import gaussian_blur
from torchvision.utils import make_grid
from tqdm import tqdm

K = 4       # both families of shifts have four members

# ---- Schedule and dissolving ---------------------------------------------------------------------------


def to_pm1(x):
    """[0, 1] -> [-1, 1]."""
    return x * 2 - 1


def to_01(x):
    """[-1, 1] -> [0, 1]."""
    return (x + 1) / 2


def alpha_bar(schedule="cosine", T=1000):
    """Product of 1 - beta up to and including step t, for t = 0..T-1: (T,) float32, falling from 1 to 0.

    "cosine": Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17, s = 0.008, betas clipped at 0.999.
    "linear": Ho et al. 2020, arXiv:2006.11239, Sec. 4, beta from 1e-4 to 0.02 (T = 1000; else scaled).
    """
    if schedule == "cosine":
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    else:
        raise ValueError(f"schedule {schedule!r}: expected cosine or linear")
    return torch.cumprod(1 - beta, 0).float()


def q_sample(x0, t, eps, abar):
    """Diffuse clean images to step t. Ho et al. 2020, arXiv:2006.11239, Eq. 4.

    x0, eps: (B, C, H, W) float, x0 in [-1, 1].  t: (B,) int64 in 0..T-1 (a negative t would wrap: not
    checked).  abar: (T,) float32.  Returns xt: (B, C, H, W).
    """
    a = abar[t].view(-1, 1, 1, 1)                                   # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps                     # (B, C, H, W)


@torch.no_grad()
def dissolve(unet, x, t, abar):
    """Dissolving transformation: one reverse step on *clean* images. DIA, arXiv:2302.14696, Eq. 4.

    unet: callable (x, t) -> eps of x's shape; it runs under autocast, the equation itself in float32.
    x: (B, C, H, W) float in [-1, 1].  t: (B,) int64 in 0..T-1.  abar: (T,) float32.
    Returns x_hat: like x, clamped to [-1, 1], without gradient.
    """
    with autocast(x.device):
        eps = unet(x, t)                                            # (B, C, H, W)
    a = abar[t].view(-1, 1, 1, 1)                                   # (B, 1, 1, 1)
    x_hat = (1 / a).sqrt() * x - (1 / a - 1).sqrt() * eps.float()   # Eq. 4
    return x_hat.clamp(-1, 1)


# ---- UNet ----------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); the time vector scales and shifts the second norm."""

    def __init__(self, cin, cout, time_dim):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * cout)
        self.norm2, self.conv2 = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                           # each block starts as its shortcut
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, temb):
        scale, shift = self.time(temb)[:, :, None, None].chunk(2, 1)    # (B, cout, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))                           # (B, cout, H, W)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over the H*W positions, added to its input; heads of about 32 channels."""

    def __init__(self, dim):
        super().__init__()
        self.heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
        self.norm, self.qkv = nn.GroupNorm(8, dim), nn.Conv2d(dim, 3 * dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)                     # (B, H*W, 3*C)
        q, k, v = qkv.view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)      # (B, heads, H*W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Noise predictor, after Ho et al. 2020, arXiv:2006.11239, App. B; widths as in DIA's code.

    Two residual blocks a stage, attention in the two lowest stages and the middle, a skip from every block
    and the stem.  forward(x, t): x (B, C, H, W) float, H and W divisible by 2**(stages - 1); t (B,) int64
    -> eps, same shape as x.
    """

    def __init__(self, channels=3, dim=64, dim_mults=(1, 2, 4, 8)):
        super().__init__()
        self.dim, time_dim = dim, 4 * dim
        widths, lowest = [dim] + [dim * m for m in dim_mults], len(dim_mults) - 1
        self.time = nn.Sequential(
            nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (cin, cout) in enumerate(itertools.pairwise(widths)):
            low = level >= lowest - 1
            self.down.append(nn.ModuleList([
                ResBlock(cin, cin, time_dim), ResBlock(cin, cin, time_dim),
                Attention(cin) if low else nn.Identity(),
                nn.Conv2d(cin, cout, 3, stride=1 if level == lowest else 2, padding=1)]))
            self.up.insert(0, nn.ModuleList([
                ResBlock(cout + cin, cout, time_dim), ResBlock(cout + cin, cout, time_dim),
                Attention(cout) if low else nn.Identity(),
                nn.Sequential(nn.Identity() if level == 0 else nn.Upsample(scale_factor=2),
                              nn.Conv2d(cout, cin, 3, padding=1))]))
        self.mid = nn.ModuleList([
            ResBlock(cout, cout, time_dim), Attention(cout), ResBlock(cout, cout, time_dim)])
        self.last = ResBlock(2 * dim, dim, time_dim)
        self.out = nn.Sequential(nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, channels, 3, padding=1))

    def forward(self, x, t):
        half = self.dim // 2
        freq = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))     # (dim/2,)
        angle = t[:, None].float() * freq                                                       # (B, dim/2)
        temb = self.time(torch.cat([angle.sin(), angle.cos()], 1))                              # (B, 4*dim)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))                        # (B, dim, H, W)
        skips = [h]
        for block1, block2, attention, shrink in self.down:
            skips.append(block1(h, temb))
            skips.append(attention(block2(skips[-1], temb)))
            h = shrink(skips[-1])                                                              # half the size
        h = self.mid[2](self.mid[1](self.mid[0](h, temb)), temb)
        for block1, block2, attention, grow in self.up:
            h = block1(torch.cat([h, skips.pop()], 1), temb)
            h = attention(block2(torch.cat([h, skips.pop()], 1), temb))
            h = grow(h)                                                                       # twice the size
        return self.out(self.last(torch.cat([h, skips.pop()], 1), temb))


def ema_weight(step):
    """1 - decay after step i, decay = min(0.9995, (1+i)/(10+i)). A tensor: a graph would keep a number."""
    return torch.tensor(1 - min(0.9995, (1 + step) / (10 + step)))


@torch.no_grad()
def update_ema(ema, model, weight):
    """Move the averaged weights towards the model's, by weight ()."""
    averaged = list(ema.parameters())
    change = torch._foreach_sub(list(model.parameters()), averaged)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(averaged, change)


# ---- Views: A_k = T S_k D. Flip, dissolve (view 2), shift, augment, in this order ----------------------

AUGMENT = 11    # uniform numbers that the augmentation of one row takes


def draw_step(seed, step, views, batch):
    """All random numbers of a step of stage 2 but the batch itself, uniform in [0, 1): of (seed, step) alone.

    Returns u_t (B,), u_flip (V, B), u_augment (11, V*K*B), on the CPU: parts of one block.
    """
    generator = step_generator("cpu", seed, "dia", step)
    block = torch.rand(1 + views + AUGMENT * views * K, batch, generator=generator)
    return block[0], block[1:1 + views], block[1 + views:].view(AUGMENT, -1)


def flip(x, u):
    """Images (B, C, H, W), mirrored where u (B,), uniform in [0, 1), is below 0.5."""
    return torch.where(u.view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)


def shift_views(x, kind):
    """The K shifting transformations S_k of every image. CSI, arXiv:2007.08176, Sec. 2.2; DIA Sec. 3.2.

    x: (B, C, H, W), H = W, even.  kind: "rotate", by k quarter-turns, or "perm", a 2x2 jigsaw: top and bottom
    halves swapped if k >= 2, left and right halves if k is odd.  Returns (K*B, C, H, W): row k*B + b.
    """
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    if kind == "rotate":
        return torch.cat([torch.rot90(x, k, (-2, -1)) for k in range(K)])
    if kind == "perm":                                              # a roll by half the size swaps the halves
        return torch.cat([x.roll((h * (k >= 2), w * (k % 2)), (-2, -1)) for k in range(K)])
    raise ValueError(f"shift {kind!r}: expected rotate or perm")


def augment(x, u, crop=(0.08, 1.0)):
    """The random non-shifting T: colour jitter, grey, resized crop to the same size; never a flip.

    CSI, arXiv:2007.08176, App. A: jitter 0.4/0.4/0.4/0.1 with p 0.8, grey with p 0.2.
    x: (n, C, H, W) float in [0, 1], C = 1 or 3.  u: (11, n) uniform in [0, 1), or (11, 1): then the same for
    all n.  crop: lowest and highest share of the area.  Returns (n, C, H, W) in [0, 1]. On grey images
    (C = 1) hue, saturation and grey do nothing.
    """
    u = u.view(AUGMENT, -1, 1, 1, 1)
    jitter, contrast, hue, saturation, value, first, grey, area, aspect, cy, cx = u
    amount = 2 * (jitter < 0.8)                                    # (n, 1, 1, 1): 0 where nothing is jittered
    contrast = 1 + 0.4 * (contrast - 0.5) * amount
    saturation = 1 + 0.4 * (saturation - 0.5) * amount
    value = 1 + 0.4 * (value - 0.5) * amount
    hue = 0.1 * (hue - 0.5) * amount
    first = first < 0.5                                             # contrast before the rest, or after it

    def contrasted(x, factor):                                      # around each channel's mean
        return torch.lerp(x.mean((-2, -1), keepdim=True), x, factor).clamp(0, 1)

    x = contrasted(x, torch.where(first, contrast, 1))
    x = (x * value).clamp(0, 1) if x.shape[1] == 1 else jitter_hsv(x, hue, saturation, value)
    x = contrasted(x, torch.where(first, 1, contrast))
    if x.shape[1] == 3:
        x = torch.where(grey < 0.2, luma(x), x)

    # choice: a crop that does not fit keeps its area and takes the nearest aspect that fits; CSI draws again
    area = crop[0] + (crop[1] - crop[0]) * area.flatten()                               # (n,)
    aspect = 3 / 4 * (16 / 9) ** aspect.flatten()                                       # width / height
    aspect = torch.minimum(torch.maximum(aspect, area), 1 / area)
    h, w, zero = (area / aspect).sqrt(), (area * aspect).sqrt(), torch.zeros_like(area)
    cy, cx = (2 * cy.flatten() - 1) * (1 - h), (2 * cx.flatten() - 1) * (1 - w)         # of the crop's centre
    theta = torch.stack([w, zero, cx, zero, h, cy], 1).view(-1, 2, 3).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)                             # (n, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def luma(x):
    """Grey of an RGB image: (n, 3, H, W) -> (n, 1, H, W)."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def jitter_hsv(x, hue, saturation, value):
    """Shift the hue (in turns), scale saturation and value of x (n, 3, H, W) in [0, 1], by (n or 1, 1, 1, 1).

    Back to RGB by channel = v - v*s*max(0, min(k, 4 - k, 1)), k = (n + 6h) mod 6, n = 5, 3, 1 for R, G, B.
    choice: the hue of the hexagon, whose inverse this is, where CSI's code takes the hue of the circle.
    """
    r, g, b = x.unbind(1)                                                       # (n, H, W) each
    v, low = x.amax(1), x.amin(1)
    chroma = (v - low).clamp(min=1e-8)
    h = torch.where(v == g, (b - r) / chroma + 2, (r - g) / chroma + 4)
    h = torch.where(v == r, (g - b) / chroma, h) / 6                            # in turns
    s = (v - low) / v.clamp(min=1e-8)
    h, s, v = h + hue[:, 0], (s * saturation[:, 0]).clamp(0, 1), (v * value[:, 0]).clamp(0, 1)
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + 6 * h[:, None]) % 6     # (n, 3, H, W)
    return v[:, None] - (v * s)[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


@torch.no_grad()
def dissolve_view(small, H, mode="diffusion", unet=None, t=None, abar=None, canvas=32):
    """D: the image as the third view sees it, before shift and augmentation. DIA Sec. 3.1 and 4.1.

    small: (B, C, h, h) in [0, 1], the images at the size at which they are dissolved.  H: their own size, to
    which the result is scaled.  mode: "diffusion" (the paper), "gaussian" and "median" (7x7), "resize" (only
    the way down and up).  unet, t, abar: as for `dissolve`, of "diffusion" alone; smaller images are padded
    with black to its canvas (pixels) and cut out again.  Returns (B, C, H, H) in [0, 1].
    """
    h = small.shape[-1]
    if mode == "diffusion":
        edge = max(0, canvas - h) // 2
        y = to_01(dissolve(unet, to_pm1(pad_to(small, canvas)), t, abar))
        y = y[..., edge:edge + h, edge:edge + h]
    elif mode == "gaussian":
        y = gaussian_blur(small, 7, 1.4)                            # OpenCV's sigma for 7x7, as in the code
    elif mode == "median":
        windows = F.unfold(F.pad(small, (3, 3, 3, 3), mode="reflect"), 7)       # (B, C*49, h*h)
        y = windows.unflatten(1, (-1, 49)).median(2).values.view_as(small)
    elif mode == "resize":
        y = small
    else:
        raise ValueError(f"dissolve mode {mode!r}: expected diffusion, gaussian, median or resize")
    return y if h == H else F.interpolate(y, (H, H), mode="bilinear", align_corners=False, antialias=h > H)


def pad_to(x, size):
    """Images (B, C, h, h) in [0, 1] in the middle of a black square of `size` pixels; larger ones stay."""
    missing = max(0, size - x.shape[-1])
    left, right = missing // 2, missing - missing // 2
    return F.pad(x, (left, right, left, right))


def make_views(views, shift, u, crop=(0.08, 1.0)):
    """All V*K views of a batch: S_k and T of each view. DIA Sec. 3.2, Eq. 5.

    views: V tensors (B, C, H, W) in [0, 1], flipped, the third one dissolved. The flip comes before the
    shift: after a quarter-turn it would exchange 90 and 270 degrees.  u: (11, V*K*B), crop: see `augment`.
    Returns (V*K*B, C, H, W), view-major, then shift, then image.
    """
    return augment(torch.cat([shift_views(view, shift) for view in views]), u, crop)


# ---- Encoder -------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """ResNet-18 from random weights, with the projection of SimCLR and the shift classifier of CSI.

    stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no max-pool; images up to 32 px).
    forward(x): x (n, C, H, W) in [0, 1] -> z (n, 128), not normalised, shift logits (n, K), both float32.
    """

    def __init__(self, channels=3, K=K, stem="imagenet"):
        super().__init__()
        self.backbone = resnet18()
        if stem == "cifar":
            self.backbone.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
            self.backbone.maxpool = nn.Identity()
        elif stem == "imagenet":
            self.backbone.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        else:
            raise ValueError(f"stem {stem!r}: expected imagenet or cifar")
        nn.init.kaiming_normal_(self.backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.backbone.fc = nn.Identity()
        self.projection = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
        self.shift = nn.Linear(512, K)

    def forward(self, x):
        h = self.backbone(((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last))     # (n, 512)
        with torch.autocast(h.device.type, enabled=False):          # the small heads cost nothing in float32
            return self.projection(h.float()), self.shift(h.float())                        # (n, 128), (n, K)


# ---- Contrastive loss ----------------------------------------------------------------------------------


def contrastive_loss(z, views=3, tau=0.5, twins="negative"):
    """Fine-grained NT-Xent. DIA, arXiv:2302.14696, Eq. 6-7; with views=2 the loss of CSI, arXiv:2007.08176.

    z: (V*N, D), any float dtype, not normalised, view-major; float32 inside, also within an autocast block.
    Positives are rows i of view 0 and i of view 1. Every other row is a negative, the dissolved ones too,
    which have no loss of their own.  tau: temperature.  twins: an image's own dissolved row of the same shift
    is a "negative" (the paper's words) or "excluded" from the denominator (the released code since 2024).
    Returns the sum over the 2N rows of views 0 and 1, divided by V*N (as the released code normalises).
    Raises ValueError if len(z) is not a multiple of views, or twins is unknown.
    """
    if len(z) % views:
        raise ValueError(f"{len(z)} rows cannot be {views} views of the same images")
    if twins not in ("negative", "excluded"):
        raise ValueError(f"twins {twins!r}: expected negative or excluded")
    with torch.autocast(z.device.type, enabled=False):
        N = len(z) // views
        z = F.normalize(z.float(), dim=1)                                       # (V*N, D)
        sim = z[:2 * N] @ z.T / tau                                             # (2N, V*N)
        row = torch.arange(2 * N, device=z.device)[:, None]                     # (2N, 1)
        column = torch.arange(views * N, device=z.device)                       # (V*N,)
        positive = sim.gather(1, (row + N) % (2 * N)).squeeze(1)                # (2N,)
        mask = column == row                                                    # no denominator has oneself
        if views == 3 and twins == "excluded":
            mask = mask | (column == 2 * N + row % N)                           # nor one's dissolved twin
        loss = torch.logsumexp(sim.masked_fill(mask, -math.inf), 1) - positive  # (2N,), Eq. 6
        return loss.sum() / (views * N)                                         # Eq. 7


# ---- Score ---------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(encoder, images, shift, passes, device, batch=96, name=None):
    """Embeddings and shift logits under every shift, mean over test-time passes. CSI, Sec. 2.3.

    images: (M, C', H, W) uint8.  Pass p under shift k uses one draw, from (p, k) alone, for all images (flip,
    jitter, grey, crop 0.54): a score depends on its image and the run, never on batch, order or other files.
    name: label of a progress bar.  Returns z (M, K, D) and logits (M, K, K), float32 on the CPU.
    """
    training, channels = encoder.training, encoder.backbone.conv1.in_channels
    encoder.eval()
    draws = [torch.rand(1 + AUGMENT, 1, generator=step_generator("cpu", 0, "test-time view", i)).to(device)
             for i in range(passes * K)]                                                # i = p*K + k
    mirrored = [bool(u[0] < 0.5) for u in draws]
    zs, logits = [], []
    for chunk in tqdm(images.split(batch), name, unit="batch", leave=False, disable=None if name else True):
        x = to_float(chunk, channels, device)                                           # (b, C, H, W)
        plain, mirror = shift_views(x, shift).chunk(K), shift_views(x.flip(-1), shift).chunk(K)
        z_sum = logit_sum = 0
        for p in range(passes):
            rows = []
            for k in range(K):
                view = mirror[k] if mirrored[p * K + k] else plain[k]
                rows.append(augment(view, draws[p * K + k][1:], (0.54, 0.54)))          # (b, C, H, W)
            with autocast(device):
                z, logit = encoder(torch.cat(rows))                                     # (K*b, D), (K*b, K)
            z_sum, logit_sum = z_sum + z, logit_sum + logit
        zs.append((z_sum / passes).unflatten(0, (K, -1)).transpose(0, 1).cpu())         # (b, K, D)
        logits.append((logit_sum / passes).unflatten(0, (K, -1)).transpose(0, 1).cpu())     # (b, K, K)
    encoder.train(training)
    return torch.cat(zs), torch.cat(logits)


def csi_fit(z, logits):
    """What the score needs of the normal training images. CSI, arXiv:2007.08176, Sec. 2.3; DIA Sec. 3.3.

    z: (M, K, D), logits: (M, K, K), of `embed`, not normalised.
    Returns a dict: axis (K, M, D) of length 1, w (K,) = 1 / mean norm, v (K,) = 1 / mean logit of the true
    shift. Where that mean is not positive (an untrained classifier), v is 0 and a warning is given.
    """
    true_logit = logits.diagonal(dim1=1, dim2=2).mean(0)                        # (K,)
    if (true_logit <= 0).any():
        warnings.warn("the shift classifier knows nothing of some shifts yet: its part of the score is left "
                      "out there", stacklevel=2)
    return {"axis": F.normalize(z, dim=2).transpose(0, 1).contiguous(),         # (K, M, D)
            "w": 1 / z.norm(dim=2).mean(0),                                     # (K,)
            "v": torch.where(true_logit > 0, 1 / true_logit, 0.0)}              # (K,)


def csi_parts(stats, z, logits, chunk=None):
    """CSI's score and its parts, all (Q,), higher = more anomalous: csi = con + cls. DIA, Eq. 10.

    con = -mean_k max_m <f_k, axis_mk> w_k (the nearest training image's cosine times the norm),
    cls = -mean_k logit_k v_k, cos = -mean_k of that cosine alone, norm = -mean_k ||f_k|| w_k.
    chunk: test images compared at once; by default as many as take about 64 MB, however large M is.
    """
    chunk = chunk or max(1, 2 ** 22 // stats["axis"].shape[1])
    near = torch.cat([torch.bmm(f, stats["axis"].transpose(1, 2)).amax(2)                       # (K, chunk)
                      for f in z.transpose(0, 1).split(chunk, 1)], 1).T                         # (Q, K)
    norm = z.norm(dim=2)                                                                        # (Q, K)
    con = -(near * stats["w"]).mean(1)
    cls = -(logits.diagonal(dim1=1, dim2=2) * stats["v"]).mean(1)
    return {"csi": con + cls, "con": con, "cls": cls,
            "cos": -(near / norm.clamp(min=1e-12)).mean(1), "norm": -(norm * stats["w"]).mean(1)}


def csi_score(stats, z, logits):
    """CSI's ensemble over shifts, (Q,), higher = more anomalous (CSI's own points the other way). Eq. 10."""
    return csi_parts(stats, z, logits)["csi"]


# ==========================================================================================================
# Images
# ==========================================================================================================

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
PREPARE = ("Images of 8 bits are read, and of 16 that fill their range; python -m extras.prepare FOLDER NEW "
           "makes such of others.")
MASKS = {"ground_truth", "groundtruth", "gt", "mask", "masks"}          # folders that are not read
MEDMNIST_NORMAL = {"pneumoniamnist": 0, "breastmnist": 1, "octmnist": 3}    # label of the healthy class
MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}.npz?download=1"
MEDMNIST_MD5 = {
    "breastmnist": "750601b1f35ba3300ea97c75c52ff8f6",
    "breastmnist_64": "742edef2a1fd1524b2efff4bd7ba9364",
    "breastmnist_128": "363e4b3f8d712e9b5de15470a2aaadf1",
    "breastmnist_224": "b56378a6eefa9fed602bb16d192d4c8b",
    "pneumoniamnist": "28209eda62fecd6e6a2d98b1501bb15f",
    "pneumoniamnist_64": "8f4eceb4ccffa70c672198ea285246c6",
    "pneumoniamnist_128": "05b46931834c231683c68f40c47b2971",
    "pneumoniamnist_224": "d6a3c71de1b945ea11211b03746c1fe1"}
TREE = "expected <data>/train/<normal>/*, <data>/test/<normal>/* and <data>/test/<anything else>/*"
Item = namedtuple("Item", "name label group source")    # label 1 = anomaly; source: a path or an array


@dataclass
class Data:
    """A set of normals to train on and a labelled test set. Images are uint8 (n, C, H, W), H = W.

    C is 1 if every image of the split is grey, else 3. `held` are normals set aside; those with `calibration`
    True are never used for choosing anything. `digests` stand for the pixels of each image as it was read.
    """
    name: str
    train: Tensor           # (M, C, H, W)
    held: Tensor            # (n, C, H, W)
    calibration: Tensor     # (n,) bool
    test: Tensor            # (Q, C', H, W)
    labels: Tensor          # (Q,) int64, 1 = anomaly
    groups: list            # Q names
    paths: list             # Q names, relative to the data
    names: dict             # {"train": M names, "held": n names}
    deep: dict              # {"train", "test": of each image of 16 bits, how many of 256 grey levels it has}
    left_out: str           # what else lies in the folder, in words
    labelled: list          # Items of anomalies beside the training normals, not read
    digests: dict           # {"train": (M,), "held": (n,), "test": (Q,)} int64
    fingerprint: str        # of the training images
    defaults: dict          # shift, t_range, image_size; window: what extras.prepare made black and white


def load_data(data="elpv", image_size=None, splits=("train", "test"), holdout=0.1, normal_class=None):
    """Load a set by name, an npz file in MedMNIST's format, or a folder in MVTec's or ImageFolder's layout.

    image_size: pixels of the square that images are brought to; None for the set's own. Arrays of an npz file
    are never enlarged.  splits: ("train",) reads no test images, ("test",) no others: Q or M is 0 then.
    "labelled" lists the anomalies beside the training normals, and reads none.  holdout: share of the
    training normals set aside, by a hash of their pixels; where an npz file has a val split, its normals are
    set aside instead. The order of training images depends on their pixels alone.  Exits with a sentence
    where data are not as expected.
    """
    path, defaults = Path(data).expanduser(), {"shift": "rotate", "t_range": [30, 130], "image_size": 224}
    defaults["window"], left_out = None, ""
    if data == "elpv":
        if normal_class:
            raise SystemExit(f"--normal-class {normal_class}: elpv's normal class is known; leave it out.")
        items, defaults["shift"] = elpv_items(), "perm"
    elif path.suffix == ".npz" or (data in MEDMNIST_MD5 and not path.is_dir()):
        if path.suffix == ".npz" and not path.is_file():
            raise SystemExit(f"--data {path}: no such file.")
        label = normal_label(path, normal_class)                        # asked before anything is downloaded
        items = npz_items(path if path.suffix == ".npz" else medmnist(data), splits, label)
        native = min(next(iter(items.values()))[0].source.shape[:2])
        defaults["image_size"], image_size = min(native, 224), min(image_size or 224, native)
    elif path.is_dir():
        items = folder_items(path, splits, normal_class)
        known = {item.source for split in items.values() for item in split}
        left_out = not_read([path / split for split in items if split != "labelled"], known)
        if (path / "prepared.json").is_file():                              # of extras/prepare.py
            try:
                says = json.loads((path / "prepared.json").read_text())
                defaults |= says.get("defaults", {}) | {"window": says.get("window")}
            except (ValueError, TypeError, AttributeError):
                raise SystemExit(f"{path}/prepared.json is not as extras.prepare writes it.") from None
    else:
        raise SystemExit(f"--data {data}: no such folder, npz file or set; sets known by name: elpv, "
                         f"{', '.join(MEDMNIST_MD5)}.")
    size, test = image_size or defaults["image_size"], items.get("test", []) if "test" in splits else []

    normals = items.get("train", []) if "train" in splits else []
    train, digests, deep = read_images(normals, size)
    order = np.argsort(digests, kind="stable")
    train, digests, names = train[order], digests[order], [normals[i].name for i in order]
    if "val" in items:                                                  # all of train trains, as in the paper
        val = items["val"] if holdout else []
        held, held_digests, _ = read_images(val, size)
        names = {"train": names, "held": [i.name for i in val]}
    else:                                                                   # equal images are on one side
        n = int((digests < holdout * 2.0 ** 64).sum())
        held, held_digests, train, digests = train[:n], digests[:n], train[n:], digests[n:]
        names = {"train": names[n:], "held": names[:n]}
    if normals and not len(train):
        raise SystemExit(f"--data {data}: --holdout {holdout} leaves none of {len(order)} images, "
                         f"{len(set(held_digests.tolist()))} of them different, to train on")
    pixels, test_digests, test_deep = read_images(test, size)
    each = {"train": digests, "held": held_digests, "test": test_digests}
    return Data(name=data_name(data), train=torch.from_numpy(train), held=torch.from_numpy(held),
                calibration=torch.from_numpy(held_digests % 2 == 1), test=torch.from_numpy(pixels),
                labels=torch.tensor([i.label for i in test], dtype=torch.int64),
                groups=[i.group for i in test], paths=[i.name for i in test], names=names,
                deep={"train": deep, "test": test_deep}, left_out=left_out,
                labelled=items.get("labelled", []),
                digests={k: torch.from_numpy(v.view(np.int64)) for k, v in each.items()},
                fingerprint=hashlib.sha256(digests.tobytes()).hexdigest(), defaults=defaults)


def found(data):
    """What was found, for the start of each script: kind, counts, what was not read, a warning a doubt."""
    M, deep = len(data.train) + len(data.held), len(data.deep["train"])
    bits = {0: "8-bit", M: "16-bit"}.get(deep, "8- and 16-bit")
    colours = "grey" if data.train.shape[1] == 1 else "RGB"
    kinds = Counter(zip(data.labels.tolist(), data.groups, strict=True))
    tests = [f"{kind if group == kind else f'{kind} {group}'.strip()} {n:,}"
             for (label, group), n in sorted(kinds.items()) for kind in [("normal", "anomalous")[label]]]
    pairs = copies(data)
    lines = [f"{data.name}: {data.train.shape[-1]} px, {colours}, {bits}; {len(pairs)} copies between "
             "train and test",
             f"  train: normal {len(data.train):,}; held out {len(data.held):,}, {data.calibration.sum():,} "
             "of them for calibration alone"] if M else [f"{data.name}: {data.test.shape[-1]} px, test alone"]
    lines += [f"  test: {', '.join(tests) or 'no images'}"]
    lines += [f"  not read: {data.left_out}"] if data.left_out else []
    return "\n".join(lines + [f"warning: {doubt}" for doubt in doubts(data, pairs)])


def copies(data):
    """[(name, name)] of each test image that is a training or held-out image as well, and of that one."""
    known = {digest: name for split in ("train", "held")
             for digest, name in zip(data.digests[split].tolist(), data.names[split], strict=True)}
    pairs = zip(data.paths, data.digests["test"].tolist(), strict=True)
    return [(path, known[digest]) for path, digest in pairs if digest in known]


def doubts(data, pairs):
    """What looks wrong in a set, a sentence each: copies (pairs), constant images, train and test unlike."""
    def some(names):
        return ", ".join(names[:3]) + ", ..." * (len(names) > 3)

    def each(f, images):                                                    # 1,024 at a time
        return torch.cat([f(x) for x in images.split(1024)])

    def coloured(images):
        return int(each(lambda x: (x != x[:, :1]).flatten(1).any(1), images).sum())

    said, M, Q = [], len(data.train), len(data.test)
    if pairs:
        said.append(f"{len(pairs)} of {Q} test images are training or held-out images, too; their scores "
                    f"mean nothing: {some([' = '.join(pair) for pair in pairs])}")
    parts = {"training": (data.train, data.names["train"]), "test": (data.test, data.paths)}
    for kind, (images, names) in parts.items():
        constant = each(lambda x: (x == x[:, :, :1, :1]).flatten(1).all(1), images)                     # (n,)
        flat = [name for name, yes in zip(names, constant.tolist(), strict=True) if yes]
        if flat and len(flat) * 10 >= len(images):
            said.append(f"{len(flat)} of {len(images)} {kind} images are constant: {some(flat)}")
        narrow = sum(levels < 64 for levels in data.deep["train" if kind == "training" else "test"])
        if narrow and narrow * 10 >= len(images):
            said.append(f"{narrow} {kind} images of 16 bits have fewer than 64 of 256 grey levels each; see "
                        "python -m extras.prepare")
    if not Q or not M:
        return said
    normal, anomalous = data.test[data.labels == 0], data.test[data.labels == 1]
    if not len(normal):
        said.append(f"test has no folder called as the normal one in train: all {Q} count as anomalies")
    shares = [len(data.deep["train"]) / (M + len(data.held)), len(data.deep["test"]) / Q]
    if shares[0] != shares[1]:
        said.append("{:.0%} of the training images have 16 bits, {:.0%} of the test images".format(*shares))
    parts = [(x, coloured(x)) for x in (data.train, normal, anomalous) if len(x)]
    shares = [n / len(x) for x, n in parts]
    if not shares[0] and max(shares) or max(shares) - min(shares) > 0.5:
        kinds = ["training"] + ["normal test"] * (len(normal) > 0) + ["anomalous test"] * (len(anomalous) > 0)
        said.append("in colour are " + ", ".join(f"{n} of {len(x)} {kind} images" for (x, n), kind in
                                                 zip(parts, kinds, strict=True)))
    light, others = (each(lambda x: x.float().mean((1, 2, 3)), x) for x in (data.train, normal))
    low, high = light.quantile(torch.tensor([0.01, 0.99])).tolist()
    if M >= 20 and len(others) >= 5 and not low <= others.median() <= high:
        said.append(f"mean brightness is {light.median():.0f} of 255 in training images, "
                    f"{others.median():.0f} in normal test images")
    return said


def data_name(data):
    """The name of a set: elpv, the folder's, or the npz file's without its suffix."""
    return re.sub(r"\.npz$", "", Path(data).expanduser().resolve().name)


def elpv_items():
    """ELPV: normal = defect probability 0, anomaly = probability 1; see split_items."""
    try:
        import elpv_dataset
    except ImportError:
        raise SystemExit("--data elpv needs the package elpv-dataset: pip install elpv-dataset") from None
    root = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    return split_items([Item(name, int(float(p) == 1), group, root / name) for name, p, group in rows
                        if float(p) in (0, 1)])


def split_items(items, share=0.25):
    """A share of the sorted normals and all anomalies to test on, the other normals to train on; seed 42."""
    items = sorted(items, key=lambda i: i.name)
    normals = [i for i in items if i.label == 0]
    if len(normals) < 4:
        raise SystemExit(f"{len(normals)} normal images are too few to split.")
    train, test = train_test_split(normals, test_size=share, random_state=42)
    return {"train": train, "test": sorted(test + [i for i in items if i.label == 1], key=lambda i: i.name)}


def medmnist(name):
    """Path of a MedMNIST file: where MedMNIST's own package keeps it, or the cache, fetched there once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dia" / f"{name}.npz"
    for path in (Path(f"~/.medmnist/{name}.npz").expanduser(), cache):
        if check_integrity(path, MEDMNIST_MD5[name]):
            return path
    url = MEDMNIST_URL.format(name)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{error}: {name} would be kept there; the variable XDG_CACHE_HOME names another "
                         "place.") from None
    with whole(cache) as temporary:
        try:
            torch.hub.download_url_to_file(url, str(temporary))             # https, with a progress bar
        except (OSError, ValueError, http.client.HTTPException) as error:   # or no HTTP came
            why = str(error).strip()
            raise SystemExit(f"{url}: {why}. Try later, or fetch it by hand to {cache}.") from None
        if not check_integrity(temporary, MEDMNIST_MD5[name]):
            raise SystemExit(f"{url}: what came is cut or changed (its MD5 is wrong). Try again.")
    return cache


def normal_label(path, normal_class):
    """The normal label of an npz file: --normal-class, or what is known of a file of that name."""
    known = [c for name, c in MEDMNIST_NORMAL.items() if path.stem.startswith(name)]
    if normal_class is None and not known:
        raise SystemExit(f"{path}: say which label is normal, for example --normal-class 0.")
    try:
        return int(known[0] if normal_class is None else normal_class)
    except ValueError:
        raise SystemExit(f"--normal-class {normal_class}: the labels of an npz file are integers.") from None


def npz_items(path, splits, normal):
    """MedMNIST's format: {train, test and, if there, val}_images uint8 (n, H, W[, 3]), and _labels."""
    try:
        with zipfile.ZipFile(path) as file:                                 # a bomb is refused unread
            large = [m for m in file.infolist() if m.file_size > max(2 ** 30, 100 * m.compress_size)]
        if large:
            raise SystemExit(f"{path}: {large[0].filename} would unpack from {large[0].compress_size} to "
                             f"{large[0].file_size} bytes: not read.")
        with np.load(path) as file:
            wanted, splits = splits, [s for s in ("train", "test") if s in splits]
            splits += ["val"] if "val_images" in file and "train" in splits else []
            missing = {f"{s}_{what}" for s in splits for what in ("images", "labels")} - set(file)
            if missing:
                raise SystemExit(f"{path}: no {', '.join(sorted(missing))}; found {', '.join(file)}. Needed: "
                                 "train_images, train_labels, test_images, test_labels, as in MedMNIST.")
            arrays = {s: (file[f"{s}_images"], file[f"{s}_labels"]) for s in splits}
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
        raise SystemExit(f"{path} is not a readable npz file; it may be truncated: fetch it again.") from None
    except MemoryError as error:
        raise SystemExit(f"{path} does not fit into memory, or claims so ({error}).") from None
    items = {}
    for split, (images, labels) in arrays.items():
        if images.dtype != np.uint8 or images.ndim != 3 and images.shape[3:] != (3,):
            raise SystemExit(f"{path}: {split}_images is {images.dtype} {images.shape}; "
                             "needed are 2-D images, uint8, (n, H, W) or (n, H, W, 3).")
        if labels.dtype.kind not in "iub" or labels.shape not in ((len(images),), (len(images), 1)):
            raise SystemExit(f"{path}: {split}_labels is {labels.dtype} {labels.shape}; needed is one "
                             f"integer for each of {len(images)} images.")
        labels = labels.flatten().tolist()
        items[split] = [Item(f"{split}/{i:06d}", int(y != normal), str(y), image) for i, (image, y) in
                        enumerate(zip(images, labels, strict=True)) if split == "test" or y == normal]
        if not items[split]:
            raise SystemExit(f"{path}: no {split} image has the normal label {normal}; labels found: "
                             f"{', '.join(map(str, sorted(set(labels)))) or 'none'}.")
    if "labelled" in wanted:
        items["labelled"] = [Item(f"train/{i:06d}", 1, str(int(y)), image) for i, (image, y) in
                             enumerate(zip(arrays["train"][0], arrays["train"][1].flat, strict=True))
                             if y != normal]
    return items


def folder_items(root, splits, normal_class, files_of=None):
    """MVTec's or ImageFolder's layout: train/<normal>, test/<normal>, test/<anything else>, nested or not.

    Where the test images alone are asked for, --normal-class or a usual name says which are normal.
    files_of: finds the images below a folder; by default `walk`.
    """
    def below(folder):
        folders = folder.iterdir() if folder.is_dir() else []
        return sorted(p.name for p in folders if p.is_dir() and not p.name.startswith("."))

    def usual(classes):
        return [c for c in classes if re.sub(r"^\d+[_-]?", "", c).lower() in ("good", "normal", "ok")]

    train, test, files_of = root / "train", root / "test", files_of or walk
    alone = splits == ("test",) and test.is_dir()
    if not train.is_dir() and not alone:
        raise SystemExit(f"{root}: no folder train; {TREE}; found {', '.join(below(root)) or 'no folder'}. "
                         "Other layouts: python -m extras.prepare.")
    classes, groups = ([c for c in below(folder) if files_of(folder / c)] for folder in (train, test))
    train, classes = (test, groups) if alone else (train, classes)
    normal = usual(classes) if len(classes) > 1 or alone else classes
    if normal_class:
        normal = [c for c in classes if c == normal_class]
    if normal_class and not normal:
        raise SystemExit(f"--normal-class {normal_class}: no such folder with images in {train}; found "
                         f"{', '.join(classes) or 'none'}.")
    if len(normal) != 1:
        raise SystemExit(f"{train}: {'several' if normal else 'no'} candidates for the normal class; {TREE}; "
                         f"found {', '.join(classes) or 'no folder with images'}. "
                         f"{'Name it with --normal-class.' if classes else PREPARE}")
    alike = [c for c in groups if c.lower() == normal[0].lower()] or usual(groups)
    if alike and normal[0] not in groups:
        raise SystemExit(f"{test}: no folder {normal[0]}, which is the normal class in {train}; found "
                         f"{', '.join(groups)}. Is it {alike[0]}? Give both folders the same name.")
    items = {}
    if not alone:
        items["train"] = [Item(name_in(root, f), 0, "", f) for f in files_of(train / normal[0])]
    if "labelled" in splits:
        items["labelled"] = [Item(name_in(root, f), 1, c, f)
                             for c in classes if c != normal[0] for f in files_of(train / c)]
    if "test" in splits:
        items["test"] = [Item(name_in(root, f), int(c != normal[0]), c, f)
                         for c in groups for f in files_of(test / c)]
    return items


def name_in(root, file):
    """The name of a file below root; bytes that are not UTF-8 become as %ff."""
    name = os.fsencode(file.relative_to(root).as_posix())
    return name.decode(errors="backslashreplace").replace("\\x", "%")


def not_read(folders, known):
    """What lies in folders and is not among the known paths: "12 .png in test/masks; 1 .dcm in train"."""
    other = Counter()
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and not file.name.startswith(".") and file not in known:
                where = "/".join(file.relative_to(folder.parent).parts[:-1][:2])
                other[f"{file.suffix or 'other'} in {where}"] += 1
    return "; ".join(f"{n:,} {what}" for what, n in sorted(other.items()))


def walk(folder, above=None, suffixes=SUFFIXES):
    """All images below a folder, sorted by name, but masks: folders of MASKS, x_mask.png or x_mask_1.png
    beside x.png, xyz beside rgb. Links are followed, but not back to a folder above.  suffixes: None for any.
    """
    real, files = folder.resolve(), []
    above = set(real.parents) if above is None else above
    if real in above or folder.name.lower() in MASKS:
        return []
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    stems = {p.stem for p in paths}
    for path in paths:
        if path.is_dir():
            files += [] if path.name == "xyz" and "rgb" in stems else walk(path, above | {real}, suffixes)
        elif suffixes is None or path.suffix.lower() in suffixes:
            mask = re.fullmatch(r"(.+)_mask(_\d+)?", path.stem, re.IGNORECASE)
            files += [] if mask and mask[1] in stems else [path]
    return files


def read_images(items, size, window=None, fewest=64):
    """All images of a split, decoded in parallel: uint8 (n, C, size, size), their digests uint64 (n,), and
    of each that has more than 8 bits the number of its grey levels. size, window: see `decode`.

    A source may be a function, which returns what `decode` reads.  fewest: grey levels that all 16-bit images
    together must have. Exits where one cannot be read.
    """
    def read(item):
        return decode(item.source() if callable(item.source) else item.source, size, window)

    pixels, digests = np.empty((len(items), 1, size, size), np.uint8), np.empty(len(items), np.uint64)
    levels, deep, first = np.zeros(256, bool), [], None
    with ThreadPoolExecutor() as pool:
        images = pool.map(read, items)
        bar = tqdm(images, "reading images", len(items), unit="image", disable=None, leave=False)
        for i, (image, digest, used) in enumerate(bar):
            if len(image) > pixels.shape[1]:                                # the first one with colours
                pixels = np.repeat(pixels, 3, 1)
            pixels[i], digests[i] = image, digest
            if used is not None:
                levels |= used
                deep.append(int(used.sum()))
                first = first or items[i].name
    if deep and not window and levels.sum() < fewest:
        used = np.flatnonzero(levels)
        raise SystemExit(f"{first} and the like: {len(deep)} images of 16 bits have values of about "
                         f"{257 * used[0]} to {257 * used[-1] + 256} of 65535, which leaves {len(used)} grey "
                         f"levels of 256. {PREPARE}")
    return pixels, digests, deep


def stored(image):
    """What the file of an opened image holds: pages, and "8-bit", "16-bit", "32-bit", "signed" or "float"."""
    pages = getattr(image, "n_frames", 1) if image.format != "MPO" else 1       # MPO: a photo and its preview
    raw = str(image.tile[0].args) if getattr(image, "tile", None) else ""
    if image.mode == "F":
        return pages, "float"
    if 2 in np.ravel(getattr(image, "tag_v2", {}).get(339, 1)):                 # TIFF's SampleFormat
        return pages, "signed"
    if ";32" in raw:
        return pages, "32-bit"
    deep = image.mode.startswith("I") or re.search("(?<!BGR);16", raw)      # BGR;16: 5 or 6 bits a colour
    return pages, "16-bit" if deep else "8-bit"


def values_of(image, kind):
    """The values of an opened grey image, as its file means them; kind: of `stored`."""
    values = np.asarray(image)                  # Pillow drops the sign of 8 bits, and gives one to all of 32
    if kind == "signed" and values.dtype == np.uint8:
        return values.view(np.int8)
    return values.view(np.uint32) if kind == "32-bit" else values


def to_grey_levels(values, low, high):
    """Values of any type -> uint8: low and what is below to 0, high and what is above to 255."""
    values = values.astype(np.result_type(values.dtype, np.float32))        # 32-bit integers need float64
    values -= low
    values *= 255 / (high - low)
    np.fmin(np.fmax(values, 0, out=values), 255, out=values)                # what is not a number becomes 0
    return np.rint(values, out=values).astype(np.uint8)


def white_is_zero(image):
    """True for an opened TIFF whose low values are white; Pillow turns those of 8 bits itself."""
    return getattr(image, "tag_v2", {}).get(262) == 0


def flattened(image):
    """An opened image of 8 bits as RGB; what is transparent becomes black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def decode(source, size, window=None):
    """A path, array uint8 (H, W[, 3]) or PIL image -> pixels uint8 (C, size, size), a digest, levels.

    C is 1 if it is grey. Brought to a square by antialiased bilinear resizing; with size None it stays as it
    is, (C, H, W). The digest, an int of 64 bits, is of all its pixels.
    window: (low, high), values that become 0 and 255 where the file has more than 8 bits; without it, 16 bits
    unsigned are taken by their full range, and others refused.  levels: (256,) bool, the grey levels used
    where the file has more than 8 bits, else None.
    """
    # choice: the aspect is not kept (as in the released code), what is transparent becomes black
    try:
        image = source if isinstance(source, Image.Image) else (
            Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, {Image.MAX_IMAGE_PIXELS:,} at most")
        (pages, kind), inverted = stored(image), white_is_zero(image)
        if pages > 1:
            raise SystemExit(f"{source} has {pages} pages: which of them? {PREPARE}")
        image = ImageOps.exif_transpose(image)
        if kind != "8-bit" and not image.mode.startswith(("RGB", "LA")):                    # grey
            values = values_of(image, kind)
            if window is None and kind != "16-bit":
                raise SystemExit(f"{source} has {kind} values, {values.min():g} to {values.max():g}. "
                                 f"{PREPARE}")
            values = to_grey_levels(values, *window) if window else np.minimum(values // 257, 255)
            image = Image.fromarray(values.astype(np.uint8) ^ (255 * inverted))
        image = flattened(image)
        red, green, blue = image.split()
        if all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue)):
            image = red
        digest = hashlib.sha256(f"{image.size}".encode())
        digest.update(image.tobytes())
        levels = np.bincount(np.asarray(image).ravel(), minlength=256) > 0 if kind != "8-bit" else None
        if size:                                                    # nothing changes if it has that size
            image = image.resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, TypeError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{source} cannot be read as an image ({str(error) or 'too little memory'}): repair "
                         "or remove it, or let python -m extras.prepare leave it out.") from None
    pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
    return pixels, int.from_bytes(digest.digest()[:8], "little"), levels


# ---- Device --------------------------------------------------------------------------------------------


def pick_device(name):
    """"auto" -> cuda, mps or cpu. Exits if a device is asked for that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise SystemExit(f"--device {name}: this machine or this build of torch has no such device. "
                         "Use --device cpu, or leave it out.") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                                       # whose streams are current
    return device


COMPILE_FROM = 20000        # steps from which on torch.compile is taken to pay, on CUDA


def launches(name, steps, device):
    """(torch.compile?, a CUDA graph?), by --launch and the steps to go. Exits where it can't be."""
    name = name or ("compile" if device.type == "cuda" and steps >= COMPILE_FROM else "eager")
    if name in ("graph", "both") and device.type != "cuda":
        raise SystemExit(f"--launch {name}: CUDA graphs need an NVIDIA GPU, and this is {device}.")
    return name in ("compile", "both"), name in ("graph", "both")


class Step:
    """A step of training as one call; with graph=True, on CUDA, as one launch instead of thousands.

    function: tensors on the device -> tensors. The first calls (EAGER) run it as it is, the next records it
    (torch.cuda.graph), and that is replayed on later inputs. So what differs from step to step is an input,
    or a tensor that function itself changes, and never a number. Gradients and the optimizer's state are
    made in the first calls: nothing outside of function may put others in their place later.
    __call__(*inputs): tensors on the CPU, of the same shapes each time -> what function returns, to keep.
    """

    EAGER = 3

    def __init__(self, function, device, graph=False):
        self.function, self.device, self.calls = function, device, 0
        self.graph = torch.cuda.CUDAGraph() if graph else None
        self.stream = torch.cuda.Stream(device) if graph else None          # the one that will record
        self.warm = self.EAGER + 2 if graph else 2                          # calls that are slower
        torch.backends.cudnn.benchmark = True                               # shapes stay the same

    def __call__(self, *inputs):
        if self.graph is None:
            return self.function(*(send(x, self.device) for x in inputs))
        self.calls += 1
        if self.calls == 1:
            self.inputs = [torch.empty_like(x, device=self.device) for x in inputs]
        for place, x in zip(self.inputs, inputs, strict=True):
            place.copy_(x.pin_memory(), non_blocking=True)
        if self.calls <= self.EAGER:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.outputs = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.calls == self.EAGER + 1:                                # records, and computes nothing
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.outputs = self.function(*self.inputs)
            self.graph.replay()
        return [x.clone() for x in self.outputs]                            # the next replay writes over them


def autocast(device):
    """Mixed precision for the networks' forward passes: bfloat16 where the hardware has it, else float32.

    What runs outside it is float32, but for convolutions on CUDA from Ampere on: torch's TF32 settings are
    left as they are, on for convolutions and off for matrix products.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device):
    """True where the hardware computes bfloat16: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        with torch.cuda.device(device):                                     # which the answer is of
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def precision(device):
    """What the networks compute on and in, for the start line."""
    kind = "bfloat16" if has_bfloat16(device) else f"float32 (this {device.type} has no fast bfloat16)"
    return f"{device}, {kind}, torch {torch.__version__}"


def to_float(images, channels, device):
    """uint8 (n, C', H, W) -> float (n, channels, H, W) in [0, 1] on the device; grey <-> RGB as needed."""
    return to_channels(send(images, device).float() / 255, channels)


def send(x, device):
    """x on the device; CUDA copies it from page-locked memory, without waiting for work under way there."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_channels(x, channels):
    """Images (n, C', H, W) in [0, 1] -> (n, channels, H, W): grey <-> RGB as needed."""
    return luma(x) if x.shape[1] > channels else x.expand(-1, channels, -1, -1)


# ---- Random numbers and checkpoints --------------------------------------------------------------------


def step_generator(device, seed, stream, step):
    """A torch.Generator that is a function of (seed, stream name, step) alone: what makes resume exact."""
    entropy = (seed, zlib.crc32(stream.encode()), step)
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def batch_indices(n, batch, seed, step):
    """Indices (batch,) of a step: n images in a new order each epoch; the last partial batch is dropped."""
    epoch, position = divmod(step, n // batch)
    order = torch.randperm(n, generator=step_generator("cpu", seed, "epoch", epoch))
    return order[position * batch:(position + 1) * batch]


def new_folder(path):
    """The path, or with -2, -3, ... at its end where it is taken."""
    taken = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return path if not path.exists() else next(p for p in taken if not p.exists())


@contextmanager
def whole(path):
    """Give a temporary path to write to; it becomes `path` when the block ends, unless the block fails."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:                                # a full disk does not say which file
        known = error.filename or not error.errno
        raise error if known else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, kind, settings, state):
    """Write {kind, settings, **state} whole or not at all, synced to disk. OSError where there is no room."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary, open(temporary, "wb") as file:
        torch.save({"kind": kind, "settings": {**settings, "format": 2}, **state}, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, kind, device):
    """Read a checkpoint of save_checkpoint, unpickling no code. Exits if it is none, or of another kind."""
    if not Path(path).is_file():
        script = "train_diffusion.py" if kind == "diffusion" else "train_dia.py"
        raise SystemExit(f"{path}: no such checkpoint. Run {script} with the same --data and --out first.")
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=False)
        found, version = state["kind"], state["settings"]["format"]
    except Exception:                           # torch raises many types for files that are not checkpoints
        raise SystemExit(f"{path} is not a checkpoint of this project, or is truncated: train this stage "
                         "again.") from None
    if found != kind:
        raise SystemExit(f"{path} is a {found} checkpoint, a {kind} checkpoint is needed here.")
    if version != 2:
        raise SystemExit(f"{path} was written by another version of this project (format {version}, this one "
                         "reads 2): train this stage again.")
    return state


def sha256_of(path):
    """Hex digest of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_unet(state, device):
    """The averaged UNet of stage 1's checkpoint, without gradient, and its alpha_bar (T,).

    Where the device has bfloat16, its convolutions have bfloat16 weights: call it within autocast.
    """
    s = state["settings"]
    unet = UNet(s["channels"], s["dim"]).to(device, memory_format=torch.channels_last)
    unet.load_state_dict(state["ema"])
    if has_bfloat16(torch.device(device)):
        for module in unet.modules():               # what autocast would do in every call
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.bfloat16()
    return unet.requires_grad_(False).eval(), alpha_bar(s["schedule"]).to(device)


def load_encoder(state, device):
    """The encoder of stage 2's checkpoint, in evaluation mode."""
    s = state["settings"]
    encoder = Encoder(s["channels"], K, s["stem"]).to(device, memory_format=torch.channels_last)
    encoder.load_state_dict(state["encoder"])
    return encoder.eval()


# ---- Command line, log, pictures -----------------------------------------------------------------------


def number(kind=int, low=1, high=math.inf, above=None, multiple=1):
    """An argparse type: a number from low (or above `above`) to high, a multiple of `multiple`."""
    words = "an integer " if kind is int else "a number "
    words += f"above {above}" if above is not None else f"from {low}" + (" on" if high == math.inf else "")
    words += f", up to {high}" if high < math.inf else ""
    words += f", a multiple of {multiple}" if multiple > 1 else ""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        fits = (value >= low if above is None else value > above) and value <= high and value < math.inf
        if not fits or multiple > 1 and value % multiple:
            raise argparse.ArgumentTypeError(f"{text}: needs {words}")
        return value
    return parse


def make_parser(description, usage="%(prog)s [flags]; --help lists them"):
    """An argument parser whose errors are a sentence, not a page; usage None: argparse's own."""
    return argparse.ArgumentParser(description=description, usage=usage,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def shared_flags(parser, data="elpv"):
    """The flags that mean the same in every script; data: the default of --data, None for the run's own."""
    parser.add_argument("--data", default=data, help="elpv, another set's name, a folder, or an npz file "
                        f"(default: {data or 'as in training'})")
    parser.add_argument("--normal-class", help="folder or label of the normal class, where it can't be told")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")


def training_flags(parser, steps, batch_size, lr):
    """The flags of both training scripts; batch_size: a default; steps, lr: what to say of theirs."""
    shared_flags(parser)
    parser.add_argument("--out", help="the run's folder (default: runs/<data>, or runs/<data>-s<seed>)")
    parser.add_argument("--seed", type=number(low=0, high=2 ** 63 - 1), default=0,
                        help="of weights and draws (default: 0)")
    parser.add_argument("--holdout", type=number(float, 0, 0.9), default=0.1,
                        help="share of the normals set aside (default: 0.1)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint and settings")
    parser.add_argument("--quick", action="store_true", help="the paper's method on a laptop's budget")
    parser.add_argument("--launch", choices=["eager", "compile", "graph", "both"],
                        help="eager; compile: torch.compile, takes minutes to start; graph: a step is one "
                        "CUDA graph, not run on a GPU yet; both (default: eager; compile on CUDA from "
                        f"{COMPILE_FROM:,} steps on)")
    parser.add_argument("--steps", type=number(), help=f"optimizer steps (default: {steps})")
    parser.add_argument("--batch-size", type=number(), default=batch_size,
                        help=f"images a step (default: {batch_size})")
    parser.add_argument("--lr", type=number(float, above=0), help=f"highest learning rate (default: {lr})")
    parser.add_argument("--save-every", type=number(), metavar="N",
                        help="save every N steps, and keep the weights of each, in OUT/step-N")


def parse_training(parser, kind, quick, argv=None):
    """Parse a training script's command line: flags > (--resume) the checkpoint's > (--quick) > defaults.

    Returns args (with .out a Path, .given the settings as they were given) and the checkpoint to resume from,
    or None if there is none yet. Exits when OUT holds a checkpoint of this stage and --resume is not given,
    or a flag contradicts the run to resume.
    """
    first = parser.parse_args(argv)
    out = Path(first.out or f"runs/{data_name(first.data)}" + (f"-s{first.seed}" if first.seed else ""))
    path, state, given = out / f"{kind}.pt", None, {}
    if first.resume and path.exists():
        state = load_checkpoint(path, kind, "cpu")
        if "optimizer" not in state and state["step"] < state["settings"]["steps"]:
            raise SystemExit(f"--resume: {path} was kept by --save-every; resume the folder above it.")
        given = state["settings"]["given"]
        if other := given.keys() - vars(first).keys():
            raise SystemExit(f"--resume: {path} is of another version of this script: it has a setting "
                             f"{', '.join(sorted(other))}. Start again in another folder with --out.")
    elif path.exists():
        raise SystemExit(f"{path} exists. Go on with --resume, or choose another folder with --out.")
    elif first.resume:
        print(f"note: --resume: there is no {path} yet; starting from the beginning")
    parser.set_defaults(**(given or (quick if first.quick else {})))
    args = parser.parse_args(argv)
    for name in given.keys() - {"data", "diffusion", "save_every"}:                     # files may have moved
        if getattr(args, name) != given[name]:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: {out} was started with "
                             f"{given[name]}. Leave the flag out, or choose another folder with --out.")
    if state and state["step"] < state["settings"]["steps"]:
        print(f"going on from step {state['step']} of {state['settings']['steps']}")
    apart = ("out", "resume", "device", "launch", "quick")
    args.given, args.out = {k: v for k, v in vars(args).items() if k not in apart}, out
    return args, state


def check_batch(batch_size, n):
    """Exit unless a batch fits into the training set."""
    if batch_size > n:
        raise SystemExit(f"--batch-size {batch_size}: there are {n} training images; take from 1 to {n}.")


class Log:
    """OUT/log.jsonl, one JSON object a line, and the clock of a stage that trains from `step` to `steps`.

    Rows of this stage after `step` (the checkpoint's) are cut at the start; seconds go on counting from the
    last one that is kept.
    """

    def __init__(self, out, stage, step=0, steps=0):
        self.path, self.stage, self.start, self.steps = Path(out) / "log.jsonl", stage, step, steps
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]  # the last may be torn
        rows = [(line, row) for line, row in rows if row["stage"] != stage or row["step"] <= step]
        if len(rows) < len(lines):
            with whole(self.path) as temporary:
                temporary.write_text("".join(line for line, _ in rows))
        before = [row["seconds"] for _, row in rows if row["stage"] == stage and "seconds" in row]
        self.begun = time.perf_counter() - (before[-1] if before else 0.0)
        self.saved, self.cost = time.perf_counter(), 0.0

    def __call__(self, step, show=True, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        if show:
            words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
            tqdm.write(f"step {step}  " + "  ".join(words))

    def seconds(self):
        """Seconds of training so far, those before a --resume among them."""
        return round(time.perf_counter() - self.begun, 1)

    @contextmanager
    def saving(self):
        """Times the block, in which a checkpoint is written."""
        begun = time.perf_counter()
        yield
        self.saved = time.perf_counter()
        self.cost = self.saved - begun

    def affords(self):
        """Is it time for a checkpoint? One like the last has to take at most 2% of the time since then."""
        return time.perf_counter() - self.saved >= 50 * self.cost

    def estimate(self, done, loss, first):
        """Called after every step: says once how long a run will take, by 4 steps after the `first` ones."""
        if done == self.start + first:                      # these warm up, compile and record
            loss.item()                                     # wait for the device
            self.warm = time.perf_counter()
        elif done == self.start + first + 4:
            loss.item()
            seconds = (time.perf_counter() - self.warm) / 4
            left = seconds * (self.steps - done)
            text = f"{left / 3600:.1f} hours" if left > 5400 else f"{left / 60:.1f} minutes"
            tqdm.write(f"time left: {text} ({seconds:.3g} s a step)")


def check_loss(values, done, lr, flag="--lr"):
    """Exit if one of the losses of the last len(values) steps is not finite. done: steps so far."""
    for i, value in enumerate(values):
        if not math.isfinite(value):
            last = values[i - 1] if i else "before the last report"
            raise SystemExit(f"the loss is {value} at step {done - len(values) + i + 1} (rate {lr:.3g}; "
                             f"last finite value {last}). Try a smaller {flag}.")


def check_weights(model, done, lr):
    """Exit if a weight is not finite: asked before a checkpoint is written over an older one."""
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise SystemExit(f"a weight is not finite after step {done} (rate {lr:.3g}). Try a smaller --lr.")


def save_grid(path, rows, captions, scale=1, names=()):
    """Write rows of images (C, H, H) in [0, 1], None for a gap, as a PNG with captions and names of rows."""
    H = max(image.shape[-1] for row in rows for image in row if image is not None)
    blank = torch.ones(3, H, H)
    tiles = [blank if image is None else image.expand(3, -1, -1).cpu() for row in rows for image in row]
    tiles = F.interpolate(torch.stack(tiles), scale_factor=scale)
    grid = (make_grid(tiles, len(rows[0]), padding=2, pad_value=1) * 255).round().to(torch.uint8)
    left, side = 160 if names else 0, H * scale + 2
    picture = Image.new("RGB", (left + grid.shape[2], 16 + grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (left, 16))
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        draw.text((left + 4 + i * side, 2), caption, fill="black")
    for i, name in enumerate(names):
        draw.text((4, 10 + i * side + side // 2), name, fill="black")
    with whole(path) as temporary:
        picture.save(temporary, format="PNG")


def run(main, advice="a training run goes on from its last checkpoint with --resume"):
    """Call main(); end a Ctrl-C, a SIGTERM and errors of the file system with a sentence, not a traceback."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\nstopped; {advice}.", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except OSError as error:
        sys.exit(f"{error}. Nothing that was written before is lost.")
    finally:
        signal.signal(signal.SIGTERM, before)
