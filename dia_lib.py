"""The small library of DIA, "Dissolving Is Amplifying" (Shi et al., ECCV 2024, arXiv:2302.14696).

First the method, in the order of the paper: schedule and dissolving, UNet, views, encoder, contrastive loss, score.
Then, below the line of equal signs, the plumbing: synthetic defects, checkpoints, seeds, device, command line. Images are
read by dia_data.py.

Letters, used everywhere:
    B  images in a batch        K  shifts (4)             V  views (2 for CSI, 3 for DIA)      N  rows of a view, K*B
    D  embedding size (128)     C H W  image              T  diffusion steps (1000)
    M  training images          Q  test images

Images are uint8 in storage and float in [0, 1] in the pipeline; only the diffusion model works in [-1, 1].
Rows of a batch of views are view-major, then shift, then image: row (v*K + k)*B + b. Views 0 and 1 are positives of
each other, view 2 is the dissolved one. Anomaly scores: higher means more anomalous, everywhere.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms.functional import gaussian_blur
from torchvision.utils import make_grid
from tqdm import tqdm

from dia_data import Data as Data
from dia_data import data_name
from dia_data import load_data as load_data

K = 4  # both families of shifts have four members
SCORES = ("csi", "cos", "local")  # CSI's full score (the paper's), its cosine alone, the nearest neighbour of local features

# ---------------------------------------------------------------------------------------------------------------------
# Schedule and dissolving
# ---------------------------------------------------------------------------------------------------------------------


def to_pm1(x):
    """[0, 1] -> [-1, 1]."""
    return x * 2 - 1


def to_01(x):
    """[-1, 1] -> [0, 1]."""
    return (x + 1) / 2


def alpha_bar(schedule="cosine", T=1000):
    """Cumulative product of 1 - beta up to and including step t, for t = 0..T-1: (T,) float32, falling from 1 to 0.

    "cosine": Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17, s = 0.008, betas clipped at 0.999.
    "linear": Ho et al. 2020, arXiv:2006.11239, Sec. 4, beta from 1e-4 to 0.02 (for T = 1000; scaled for another T).
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

    x0, eps: (B, C, H, W) float, x0 in [-1, 1].  t: (B,) int64 in 0..T-1 (a negative t would wrap: not checked).
    abar: (T,) float32.  Returns xt: (B, C, H, W).
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


# ---------------------------------------------------------------------------------------------------------------------
# UNet
# ---------------------------------------------------------------------------------------------------------------------


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
    """Self-attention over the H*W positions, heads of 32 channels or a few more, added to its input."""

    def __init__(self, dim):
        super().__init__()
        self.heads = next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
        self.norm, self.qkv, self.out = nn.GroupNorm(8, dim), nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)                         # (B, H*W, 3*C)
        q, k, v = qkv.view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)          # (B, heads, H*W, C/heads) each
        if x.device.type == "cpu" and H * W <= 256:                                     # the fused one's backward is slow here
            h = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3) @ v             # (B, heads, H*W, C/heads)
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Noise predictor of the diffusion model, after Ho et al. 2020, arXiv:2006.11239, App. B; widths as in DIA's code.

    Two residual blocks a stage, attention in the two lowest stages and the middle, a skip from every block and the stem.
    forward(x, t): x (B, C, H, W) float, H and W divisible by 2**(stages - 1); t (B,) int64 -> eps, same shape as x.
    """

    def __init__(self, channels=3, dim=64, dim_mults=(1, 2, 4, 8)):
        super().__init__()
        self.dim, time_dim = dim, 4 * dim
        widths, lowest = [dim] + [dim * m for m in dim_mults], len(dim_mults) - 1
        self.time = nn.Sequential(nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (cin, cout) in enumerate(itertools.pairwise(widths)):
            low = level >= lowest - 1
            self.down.append(nn.ModuleList([
                ResBlock(cin, cin, time_dim), ResBlock(cin, cin, time_dim), Attention(cin) if low else nn.Identity(),
                nn.Conv2d(cin, cout, 3, stride=1 if level == lowest else 2, padding=1)]))
            self.up.insert(0, nn.ModuleList([
                ResBlock(cout + cin, cout, time_dim), ResBlock(cout + cin, cout, time_dim),
                Attention(cout) if low else nn.Identity(),
                nn.Sequential(nn.Identity() if level == 0 else nn.Upsample(scale_factor=2),
                              nn.Conv2d(cout, cin, 3, padding=1))]))
        self.mid = nn.ModuleList([ResBlock(cout, cout, time_dim), Attention(cout), ResBlock(cout, cout, time_dim)])
        self.last = ResBlock(2 * dim, dim, time_dim)
        self.out = nn.Sequential(nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, channels, 3, padding=1))

    def forward(self, x, t):
        half = self.dim // 2
        freq = torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))     # (dim/2,)
        angle = t[:, None].float() * freq                                                           # (B, dim/2)
        temb = self.time(torch.cat([angle.sin(), angle.cos()], 1))                                  # (B, 4*dim)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))                              # (B, dim, H, W)
        skips = [h]
        for block1, block2, attention, shrink in self.down:
            skips.append(block1(h, temb))
            skips.append(attention(block2(skips[-1], temb)))
            h = shrink(skips[-1])                                                                   # half the size
        h = self.mid[2](self.mid[1](self.mid[0](h, temb)), temb)
        for block1, block2, attention, grow in self.up:
            h = block1(torch.cat([h, skips.pop()], 1), temb)
            h = attention(block2(torch.cat([h, skips.pop()], 1), temb))
            h = grow(h)                                                                             # twice the size
        return self.out(self.last(torch.cat([h, skips.pop()], 1), temb))


def unet_of(state, device):
    """The averaged UNet of stage 1's checkpoint, without gradient, and its alpha_bar (T,)."""
    s = state["settings"]
    unet = UNet(s["channels"], s["dim"]).to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    unet.load_state_dict(state["ema"])
    return unet, alpha_bar(s["schedule"]).to(device)


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the averaged weights towards the model's after optimizer step 0, 1, ...; decay min(0.9995, (1+i)/(10+i))."""
    decay = min(0.9995, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Views: shift, augmentation, dissolved view
# ---------------------------------------------------------------------------------------------------------------------


def shift_views(x, kind):
    """The K shifting transformations S_k of every image. CSI, arXiv:2007.08176, Sec. 2.2; DIA Sec. 3.2.

    x: (B, C, H, W), H = W, even.  kind: "rotate", by k quarter-turns, or "perm", a 2x2 jigsaw: top and bottom halves
    swapped if k >= 2, left and right halves if k is odd.  Returns (K*B, C, H, W), shift-major: row k*B + b.
    """
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    if kind == "rotate":
        return torch.cat([torch.rot90(x, k, (-2, -1)) for k in range(K)])
    if kind == "perm":
        return torch.cat([x.roll((h * (k >= 2), w * (k % 2)), (-2, -1)) for k in range(K)])     # a half-turn of the torus
    raise ValueError(f"shift {kind!r}: expected rotate or perm")


def draw_augment(n, crop_scale, generator, strength=1.0):
    """Draw the random non-shifting T (colour jitter, grey, resized crop) of n images. CSI, arXiv:2007.08176, App. A.

    crop_scale: (low, high) share of the area.  generator: a torch.Generator; the draws are made on its device.
    Returns a dict of (n,) tensors; `crop` holds (height, width, y, x) of the crop, as shares in [0, 1] and offsets
    of its centre in [-1, 1]. Jitter 0.4/0.4/0.4/0.1 times strength (0 to 1) with p 0.8, grey with p 0.2.
    """
    def uniform(low, high):
        return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low

    jitter = uniform(0, 1) < 0.8
    params = {name: torch.where(jitter, uniform(neutral - most * strength, neutral + most * strength), neutral)
              for name, neutral, most in [("contrast", 1.0, 0.4), ("hue", 0.0, 0.1), ("saturation", 1.0, 0.4),
                                          ("value", 1.0, 0.4)]}
    params["contrast_first"] = uniform(0, 1) < 0.5
    params["grey"] = uniform(0, 1) < 0.2
    # choice: a crop that does not fit keeps its area and takes the nearest aspect that fits, where CSI draws again
    area = uniform(*crop_scale)
    aspect = torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))           # width / height
    aspect = torch.minimum(torch.maximum(aspect, area), 1 / area)
    h, w = (area / aspect).sqrt(), (area * aspect).sqrt()
    params["crop"] = torch.stack([h, w, uniform(-1, 1) * (1 - h), uniform(-1, 1) * (1 - w)])    # (4, n)
    return params


def augment(x, params):
    """Apply draws of `draw_augment`: jitter, then grey, then resized crop to the same size; never a flip.

    x: (n, C, H, W) float in [0, 1], C = 1 or 3.  params: of n draws, or of one draw, then the same for all n.
    Returns (n, C, H, W) in [0, 1]. On grey images (C = 1) hue, saturation and grey do nothing.
    """
    n, C = x.shape[:2]
    p = {name: value.view(-1, 1, 1, 1) for name, value in params.items() if name != "crop"}     # (n or 1, 1, 1, 1)

    def contrast(x, factor):                                       # around each channel's mean
        return torch.lerp(x.mean((-2, -1), keepdim=True), x, factor).clamp(0, 1)

    x = contrast(x, torch.where(p["contrast_first"], p["contrast"], 1))
    x = (x * p["value"]).clamp(0, 1) if C == 1 else jitter_hsv(x, p["hue"], p["saturation"], p["value"])
    x = contrast(x, torch.where(p["contrast_first"], 1, p["contrast"]))
    if C == 3:
        x = torch.where(p["grey"], luma(x), x)
    h, w, dy, dx = params["crop"]                                   # (n or 1,) each
    zero = torch.zeros_like(h)
    theta = torch.stack([w, zero, dx, zero, h, dy], 1).view(-1, 2, 3).expand(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)                     # (n, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def luma(x):
    """Grey of an RGB image: (n, 3, H, W) -> (n, 1, H, W)."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def jitter_hsv(x, hue, saturation, value):
    """Shift the hue (in turns), scale saturation and value. x: (n, 3, H, W) in [0, 1]; the others (n or 1, 1, 1, 1).

    HSV back to RGB by channel = v - v*s*max(0, min(k, 4 - k, 1)), k = (n + 6h) mod 6, n = 5, 3, 1 for R, G, B.
    choice: the hue of the hexagon, whose inverse this is, where CSI's code takes the hue of the circle.
    """
    r, g, b = x.unbind(1)                                                       # (n, H, W) each
    v, low = x.amax(1), x.amin(1)
    chroma = (v - low).clamp(min=1e-8)
    h = torch.where(v == r, (g - b) / chroma, torch.where(v == g, (b - r) / chroma + 2, (r - g) / chroma + 4)) / 6
    s = (v - low) / v.clamp(min=1e-8)                                           # h in turns
    h, s, v = h + hue[:, 0], (s * saturation[:, 0]).clamp(0, 1), (v * value[:, 0]).clamp(0, 1)
    k = (torch.arange(5, 0, -2, device=x.device).view(1, 3, 1, 1) + 6 * h[:, None]) % 6     # (n, 3, H, W)
    return v[:, None] - (v * s)[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


@torch.no_grad()
def dissolve_view(unet, x, t, abar, size, mode, y=None, gain=1.0):
    """The image as the third view sees it, before shift and augmentation. DIA Sec. 4.1.

    x: (B, C, H, W) in [0, 1], H = W.  unet, t, abar: as for `dissolve`; not used by the modes without diffusion.
    size: pixels at which dissolving happens; larger images are brought there and back by antialiased bilinear
    resizing, smaller ones are padded with zeros and cropped back.  mode: "diffusion" (the paper), "residual" (only
    what diffusion took away is taken from x, `gain` times), "gaussian" and "median" (7x7 at that size), "resize" (down and up, no
    more), "copy" (x itself).  y: (B, C, size, size), x dissolved before (a bank's).  Returns like x, in [0, 1].
    """
    if mode == "copy":
        return x
    H, small = x.shape[-1], fit_to(x, size)                                     # (B, C, size, size)
    y = dissolve_small(unet, small, t, abar, mode) if y is None else y

    def back(y):
        if H < size:
            left = (size - H) // 2
            return y[..., left:left + H, left:left + H]
        return y if H == size else F.interpolate(y, (H, H), mode="bilinear", align_corners=False)

    return (x + gain * back(y - small)).clamp(0, 1) if mode == "residual" else back(y)


def dissolve_small(unet, small, t, abar, mode):
    """The dissolving itself, at its own size: small (B, C, size, size) in [0, 1] -> like small. See `dissolve_view`."""
    if mode in ("diffusion", "residual"):
        return to_01(dissolve(unet, to_pm1(small), t, abar))
    if mode == "gaussian":
        return gaussian_blur(small, 7, 1.4)                                     # OpenCV's sigma for 7x7, as in the code
    if mode == "median":
        windows = F.unfold(F.pad(small, (3, 3, 3, 3), mode="reflect"), 7)       # (B, C*49, size*size)
        return windows.unflatten(1, (-1, 49)).median(2).values.view_as(small)
    if mode == "resize":
        return small
    raise ValueError(f"dissolve mode {mode!r}")


def fit_to(x, size):
    """(B, C, H, H) in [0, 1] -> (B, C, size, size): zero-padded if smaller, antialiased bilinear if larger."""
    H = x.shape[-1]
    if H < size:
        left = (size - H) // 2
        return F.pad(x, (left, size - H - left, left, size - H - left))
    return x if H == size else F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)


def make_views(x, views, shift, crop_scale, generator, dissolve=None, jitter=1.0):
    """All V*K views of a batch: flip, (third view) dissolve, shift, augment, in this order. DIA Sec. 3.2, Eq. 5.

    The flip comes before the shift: after a quarter-turn it would exchange 90 and 270 degrees.
    x: (B, C, H, W) in [0, 1].  dissolve: for view 2; callable (flipped images, flip (B, 1, 1, 1) bool) -> like images.
    jitter: strength of the colour jitter, 0 to 1.
    Returns (V*K*B, C, H, W), view-major, then shift, then image.
    """
    branches = []
    for v in range(views):
        flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
        xv = torch.where(flip, x.flip(-1), x)                           # (B, C, H, W)
        if v == 2:
            xv = dissolve(xv, flip)                                     # D
        branches.append(shift_views(xv, shift))                         # S_k: (K*B, C, H, W)
    x = torch.cat(branches)                                             # (V*K*B, C, H, W)
    return augment(x, draw_augment(len(x), crop_scale, generator, jitter))      # T


# ---------------------------------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------------------------------


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3, stride 1, padding 1, no bias, that takes 2x2 maps on a CPU by one dense matrix: the same sums.

    Forward and backward then take 42 ms instead of 115 (384 maps, 512 channels, bfloat16, two cores with AVX512-BF16).
    """

    def forward(self, x):
        if x.shape[-2:] != (2, 2) or x.device.type != "cpu":
            return super().forward(x)
        # output (i, j) sees input (k, l) through weight[..., 1 + k - i, 1 + l - j]
        dense = torch.stack([self.weight[:, :, 1 - i:3 - i, 1 - j:3 - j] for i in (0, 1) for j in (0, 1)])  # (4, O, I, 2, 2)
        y = F.linear(x.flatten(1), dense.flatten(2).flatten(0, 1))                                          # (n, 4*O)
        return y.view(len(x), 2, 2, -1).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """ResNet-18 from random weights, with the projection of SimCLR and the shift classifier of CSI.

    stem: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3 stride 1, no max-pool; for images up to 32 px).
    forward(x): x (n, C, H, W) in [0, 1] -> z (n, 128), not normalised, and shift logits (n, K), both float32.
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
        for conv in self.backbone.layer4.modules():                         # its maps are 2x2 for images of 64 px
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                conv.__class__ = Conv3x3                                    # the same weights under the same names
        self.projection = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
        self.shift = nn.Linear(512, K)

    @staticmethod
    def scaled(x):
        """[0, 1] -> [-1, 1], channels last: the first operation on any input."""
        return ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)

    def local(self, x):
        """Features of the third stage, before any pooling: (n, 256, H/16, W/16), H/4 with the cifar stem."""
        b = self.backbone
        return b.layer3(b.layer2(b.layer1(b.maxpool(b.relu(b.bn1(b.conv1(self.scaled(x))))))))

    def forward(self, x):
        h = self.backbone(self.scaled(x))                                   # (n, 512)
        with torch.autocast(h.device.type, enabled=False):                  # the small heads cost nothing in float32
            return self.projection(h.float()), self.shift(h.float())        # (n, 128), (n, K)


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive loss
# ---------------------------------------------------------------------------------------------------------------------


def contrastive_loss(z, views=3, tau=0.5, twins="negative", twin_weight=1.0):
    """Fine-grained NT-Xent. DIA, arXiv:2302.14696, Eq. 6-7; with views=2 the loss of CSI, arXiv:2007.08176, Sec. 2.2.

    z: (V*N, D), any float dtype, not normalised, view-major; float32 inside, also within an autocast block.
    Positives are rows i of view 0 and i of view 1. Every other row is a negative, the dissolved ones too, which have
    no loss of their own. twins: an image's own dissolved row of the same shift is a "negative" (the paper's words)
    or is "excluded" from the denominator (the released code's default since 2024). tau: temperature.
    twin_weight: how many times a twin counts in the denominator (1: as any other negative, the paper).
    Returns the sum over the 2N rows of views 0 and 1, divided by V*N (as the released code normalises).
    Raises ValueError if len(z) is not a multiple of views, or twins is unknown.
    """
    if len(z) % views:
        raise ValueError(f"{len(z)} rows cannot be {views} views of the same images")
    if twins not in ("negative", "excluded"):
        raise ValueError(f"twins {twins!r}: expected negative or excluded")
    with torch.autocast(z.device.type, enabled=False):
        N = len(z) // views
        z = F.normalize(z.float(), dim=1)                                   # (V*N, D)
        sim = z[:2 * N] @ z.T / tau                                         # (2N, V*N), Eq. 6
        row = torch.arange(2 * N, device=z.device)
        positive = sim[row, (row + N) % (2 * N)]                            # (2N,)
        weight = torch.ones_like(sim)                                       # of each term of the denominator
        weight[row, row] = 0                                                # oneself
        if views == 3:
            weight[row, 2 * N + row % N] = 0 if twins == "excluded" else twin_weight    # one's dissolved twin
        loss = torch.logsumexp(sim + weight.log(), 1) - positive            # (2N,)
        return loss.sum() / (views * N)                                     # Eq. 7


# ---------------------------------------------------------------------------------------------------------------------
# Score
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(encoder, images, shift, passes, device, batch=96, name=None, jitter=1.0):
    """Embeddings and shift logits under every shift, averaged over test-time passes. CSI, arXiv:2007.08176, Sec. 2.3.

    images: (M, C', H, W) uint8.  Pass p under shift k uses one draw, from (p, k) alone, for all images (flip, jitter,
    grey, crop 0.54): a score depends on its image and the run, never on batch, order or other files.
    name: label of a progress bar.  jitter: its strength in training.
    Returns z (M, K, D) and logits (M, K, K), float32 on the CPU.
    """
    training, channels = encoder.training, encoder.backbone.conv1.in_channels
    encoder.eval()
    draws = [[] for _ in range(passes)]                                                 # (flip, params) of pass p, shift k
    for p in range(passes):
        for k in range(K):
            g = step_generator("cpu", 0, "test-time view", p * K + k)
            flip = torch.rand(1, generator=g).item() < 0.5
            draws[p].append((flip, {n: v.to(device) for n, v in draw_augment(1, (0.54, 0.54), g, jitter).items()}))
    zs, logits = [], []
    bar = tqdm(images.split(batch), name, unit="batch", leave=False, disable=None if name else True)
    for chunk in bar:
        x = to_float(chunk, channels, device)                                           # (b, C, H, W)
        shifted = {flip: shift_views(x.flip(-1) if flip else x, shift).chunk(K) for flip in (False, True)}
        z_sum = logit_sum = 0
        for p in range(passes):
            rows = [augment(shifted[flip][k], params) for k, (flip, params) in enumerate(draws[p])]     # K of (b, C, H, W)
            with autocast(device):
                z, logit = encoder(torch.cat(rows))                                     # (K*b, D), (K*b, K)
            z_sum, logit_sum = z_sum + z.float(), logit_sum + logit.float()
        zs.append((z_sum / passes).unflatten(0, (K, -1)).transpose(0, 1).cpu())         # (b, K, D)
        logits.append((logit_sum / passes).unflatten(0, (K, -1)).transpose(0, 1).cpu())    # (b, K, K)
    encoder.train(training)
    return torch.cat(zs), torch.cat(logits)


def csi_fit(z, logits):
    """What the score needs of the normal training images. CSI, arXiv:2007.08176, Sec. 2.3; DIA Sec. 3.3.

    z: (M, K, D), logits: (M, K, K), of `embed`, not normalised.
    Returns a dict: axis (K, M, D) of length 1, w (K,) = 1 / mean norm, v (K,) = 1 / mean logit of the true shift.
    Where that mean is not positive (an untrained classifier), v is 0 and a warning is given, never a flipped sign.
    """
    true_logit = logits.diagonal(dim1=1, dim2=2).mean(0)                    # (K,)
    if (true_logit <= 0).any():
        warnings.warn("the shift classifier knows nothing of some shifts yet: its part of the score is left out there",
                      stacklevel=2)
    return {"axis": F.normalize(z, dim=2).transpose(0, 1).contiguous(),     # (K, M, D)
            "w": 1 / z.norm(dim=2).mean(0),                                 # (K,)
            "v": torch.where(true_logit > 0, 1 / true_logit, 0.0)}          # (K,)


def csi_parts(stats, z, logits, chunk=None):
    """The score and its parts, all (Q,), higher = more anomalous: score = con + cls; cos is con without the norm.

    con = -mean_k max_m <f_k, axis_mk> w_k (the nearest training image's cosine times the norm),
    cls = -mean_k logit_k v_k, norm = -mean_k ||f_k|| w_k. DIA, arXiv:2302.14696, Eq. 10.
    chunk: test images compared at once; by default as many as take about 64 MB, however large M is.
    """
    chunk = chunk or max(1, 2 ** 22 // stats["axis"].shape[1])
    near = torch.cat([torch.bmm(f, stats["axis"].transpose(1, 2)).amax(2)               # (K, chunk)
                      for f in z.transpose(0, 1).split(chunk, 1)], 1).T                 # (Q, K), cosine x norm
    norm = z.norm(dim=2)                                                                # (Q, K)
    con = -(near * stats["w"]).mean(1)
    cls = -(logits.diagonal(dim1=1, dim2=2) * stats["v"]).mean(1)
    return {"score": con + cls, "con": con, "cls": cls,
            "cos": -(near / norm.clamp(min=1e-12)).mean(1), "norm": -(norm * stats["w"]).mean(1)}


def csi_score(stats, z, logits):
    """CSI's ensemble over shifts, (Q,), higher = more anomalous (CSI's own points the other way; turned in csi_parts)."""
    return csi_parts(stats, z, logits)["score"]


@torch.no_grad()
def local_features(encoder, images, device):
    """The direction of the encoder's features at each of P positions of a batch of images, (n, P, 256) float32, length 1.

    images: (n, C', H, W) uint8; no shift, no augmentation. P = (H/16)**2, (H/4)**2 with the cifar stem. On the device.
    """
    training, channels = encoder.training, encoder.backbone.conv1.in_channels
    encoder.eval()
    with autocast(device):
        maps = encoder.local(to_float(images, channels, device))                        # (n, 256, h, w)
    encoder.train(training)
    return F.normalize(maps.float().flatten(2).transpose(1, 2), dim=2)


def local_fit(encoder, images, device, batch=96, most=50_000):
    """What local_score needs of the normal training images, (M, ...) uint8: (at most `most`, 256), drawn by a fixed seed."""
    known, keep = [], None
    for i in range(0, len(images), batch):
        found = local_features(encoder, images[i:i + batch], device).flatten(0, 1)      # (n*P, 256)
        if keep is None:
            P = len(found) // len(images[:batch])
            keep = torch.zeros(len(images) * P, dtype=torch.bool)
            keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[:most]] = True
        known.append(found.cpu()[keep[i * P:i * P + len(found)]])
    return torch.cat(known)


def local_score(known, encoder, images, device, batch=96):
    """The position least like any of the normal training images: max over positions of 1 - cosine to the nearest, (Q,).

    known: of local_fit; images: (Q, ...) uint8. Higher = more anomalous. Not in the paper: the nearest neighbour of
    PatchCore (Roth et al. 2022, arXiv:2106.08265) on the features of an encoder trained here, not on ImageNet.
    """
    scores, known = [], known.to(device)
    for part in images.split(batch):
        found = local_features(encoder, part, device)                                   # (n, P, 256)
        chunk = max(1, 2 ** 24 // (len(known) * found.shape[1]))                        # about 64 MB
        scores += [1 - (f @ known.T).amax(2).amin(1).cpu() for f in found.split(chunk)]
    return torch.cat(scores)


def fit_normals(encoder, images, shift, passes, device, batch=96, name=None, jitter=1.0):
    """All that the scores need of the normal training images: csi_fit's dict and "local". See `embed`, `local_features`."""
    stats = csi_fit(*embed(encoder, images, shift, passes, device, batch, name, jitter))
    return stats | {"local": local_fit(encoder, images, device, batch)}


def score_images(encoder, stats, images, shift, passes, device, batch=96, name=None, jitter=1.0):
    """All SCORES and parts of scores of the images: a dict of (Q,), higher = more anomalous; "csi" is csi_score."""
    z, logits = embed(encoder, images, shift, passes, device, batch, name, jitter)
    return score_embedded(encoder, stats, images, z, logits, device, batch)


def score_embedded(encoder, stats, images, z, logits, device, batch=96):
    """As score_images, of images whose z and logits `embed` has given already."""
    parts = csi_parts(stats, z, logits)
    return {"csi": parts.pop("score"), **parts, "local": local_score(stats["local"], encoder, images, device, batch)}


# =====================================================================================================================
# Images on the device
# =====================================================================================================================


def place(images, device):
    """On CUDA, images that fit into a quarter of its free memory, moved there; else the images, memory-mapped as they are."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return images.to(device)
    return images


def send(x, device):
    """x on the device, without waiting for work under way there: CUDA copies from page-locked memory meanwhile."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def to_float(images, channels, device):
    """uint8 (n, C', H, W) -> float (n, channels, H, W) in [0, 1] on the device; grey <-> RGB as needed."""
    return to_channels(send(images, device).float() / 255, channels)


def to_channels(x, channels):
    """Images (n, C', H, W) in [0, 1] -> (n, channels, H, W): grey <-> RGB as needed."""
    if x.shape[1] < channels:
        return x.expand(-1, channels, -1, -1)
    if x.shape[1] > channels:
        return luma(x)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic defects
# ---------------------------------------------------------------------------------------------------------------------


def synthetic_defects(images, kind, generator):
    """Copies of normal images with one defect each, to choose settings by, without any real anomaly.

    images: (n, C, H, W) uint8.  kind: "line", a dark thin polyline (a crack), or "patch", a piece of the image pasted
    elsewhere (CutPaste, Li et al. 2021, arXiv:2104.04015).  Returns uint8, like images. Draws on the CPU.
    """
    n, _, H, W = images.shape

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    if kind == "line":
        yx = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1) / H       # (H, W, 2)
        points, angle = [uniform(0.2, 0.8, n, 2)], uniform(0, 2 * math.pi, n)
        for _ in range(3):
            angle = angle + uniform(-0.7, 0.7, n)
            points.append(points[-1] + torch.stack([angle.sin(), angle.cos()], 1) * uniform(0.08, 0.2, n, 1))
        distance = torch.full((n, H, W), 9.0)
        for a, b in itertools.pairwise(points):                             # distance to each of the three segments
            ab, ap = (b - a)[:, None, None], yx - a[:, None, None]                                      # (n, H, W, 2)
            along = ((ap * ab).sum(-1) / (ab * ab).sum(-1)).clamp(0, 1)
            distance = torch.minimum(distance, (ap - along[..., None] * ab).norm(dim=-1))
        width = uniform(0.01, 0.025, n, 1, 1)                               # half-width, share of the side
        cover = ((width - distance) * H + 0.5).clamp(0, 1)                  # antialiased over one pixel
        keep = 1 - cover * uniform(0.4, 0.8, n, 1, 1)
        return (images * keep[:, None]).round().to(torch.uint8)
    if kind == "patch":
        def brighter(piece):
            return (piece * uniform(0.9, 1.1, 1)).round().clamp(0, 255).to(torch.uint8)
        return torch.stack([cut_paste(image, brighter, generator) for image in images])
    raise ValueError(f"defect {kind!r}: expected line or patch")


def cut_paste(image, change, generator):
    """A copy of image (C, H, W) with a random rectangle of 2-15% of the area, aspect 0.3 to 1/0.3, pasted at a random place.

    change: what becomes of the piece on its way, (C, h, w) -> (C, h, w).  CutPaste, arXiv:2104.04015.
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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint, seed, device, command line
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def whole(path):
    """Give a temporary path to write to; it becomes `path` when the block ends, or nothing does if it fails."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:                                # a full disk does not say which file
        raise error if error.filename or not error.errno else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, kind, settings, state):
    """Write {kind, settings, **state} whole or not at all, synced to disk. OSError where there is no room."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        torch.save({"kind": kind, "settings": {**settings, "format": 1}, **state}, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path, kind, device):
    """Read a checkpoint of save_checkpoint, without unpickling code. Exits if it is none, or another stage's."""
    if not Path(path).is_file():
        script = {"diffusion": "train_diffusion.py", "stats": "evaluate.py"}.get(kind, "train_dia.py")
        raise SystemExit(f"{path}: no such checkpoint. Run {script} with the same --data and --out first.")
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=False)
        found, settings = state["kind"], state["settings"]
    except Exception:                           # torch raises many types for files that are not checkpoints
        raise SystemExit(f"{path} is not a checkpoint of this project, or is truncated: train this stage again.") from None
    if found != kind:
        raise SystemExit(f"{path} is a {found} checkpoint, a {kind} checkpoint is needed here.")
    if settings.get("format") != 1:
        raise SystemExit(f"{path} has format {settings.get('format')}, this version reads format 1.")
    return state


def sha256_of(path):
    """Hex digest of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def code_version():
    """The commit this code is at, with a + if *.py files differ from it; "" where that can't be told."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10,
                              check=True)

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py").stdout
        return git("rev-parse", "--short=7", "HEAD").stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def step_generator(device, seed, stream, step):
    """A torch.Generator that is a function of (seed, stream name, step) alone: what makes resume exact."""
    entropy = (seed, zlib.crc32(stream.encode()), step)
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def batch_indices(n, batch, seed, step):
    """Indices (batch,) of a step: a fresh permutation of n images each epoch; the last partial batch is dropped."""
    epoch, position = divmod(step, n // batch)
    order = torch.randperm(n, generator=step_generator("cpu", seed, "epoch", epoch))
    return order[position * batch:(position + 1) * batch]


def pick_device(name):
    """"auto" -> cuda, mps or cpu. Exits if CUDA is asked for and not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise SystemExit(f"--device {name}: this machine or this build of torch has no such device. "
                         "Use --device cpu, or leave it out.") from None
    return torch.device(name)


def processor(device):
    """Name of the chip that computes, without its trade marks ("AMD EPYC 9B14", "NVIDIA L4"): what minutes are minutes of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"^model name\s*: *(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):                                            # not Linux, or a chip that has no such line
        name = platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|\d+-Core|@.*", " ", name).split())


def has_bfloat16(device):
    """True where bfloat16 is computed in hardware, not emulated: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        with torch.cuda.device(device):                                     # which the answer is of
            return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def precision(device):
    """What the networks compute in, for the start line: "bfloat16", or "float32" and why."""
    if has_bfloat16(device):
        return "bfloat16"
    return f"float32 (bfloat16 is only emulated on this {device.type})" if device.type in ("cpu", "cuda") else "float32"


def autocast(device):
    """Mixed precision for the networks' forward passes: bfloat16 where the hardware has it, else float32.

    What runs outside it is float32, but for convolutions on CUDA from Ampere on: torch's TF32 settings are left as they are, on
    for convolutions and off for matrix products.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def shared_flags(parser, data="elpv"):
    """The flags that mean the same in every script; data: the default of --data, None for the run's own."""
    parser.add_argument("--data", default=data, help="elpv, another set's name, a folder, or an npz file (default: "
                        f"{data or 'as in training'})")
    parser.add_argument("--normal-class", help="folder or label of the normal class, where it can't be told (default: none)")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")


def training_flags(parser):
    """The flags of both training scripts."""
    shared_flags(parser)
    parser.add_argument("--out", help="the run's folder (default: runs/<data>, and -s<seed> for a seed above 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and draws (default: 0)")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of the normals set aside (default: 0.1)")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint, if there is one, with its settings")
    parser.add_argument("--quick", action="store_true", help="settings for minutes on a CPU, listed in the README")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile (default: on CUDA; takes minutes to start on a CPU)")


def parse_training(parser, kind, quick, argv=None):
    """Parse the command line of a training script: flags > (--resume) the checkpoint's settings > (--quick) > defaults.

    Returns args (with .out a Path) and the checkpoint to resume from, or None if there is none yet. Exits when OUT holds a
    checkpoint of this stage and --resume is not given, or a flag contradicts the run to resume.
    """
    first = parser.parse_args(argv)
    out = Path(first.out or f"runs/{data_name(first.data)}" + (f"-s{first.seed}" if first.seed else ""))
    path, state = out / f"{kind}.pt", None
    if first.resume and path.exists():
        state = load_checkpoint(path, kind, "cpu")
        defaults = vars(parser.parse_args([f"--out={out}"]))                        # for flags that came after the run
        saved = {k: state["settings"].get(k, v) for k, v in defaults.items()
                 if k not in ("out", "resume", "device", "compile", "quick")}
        parser.set_defaults(**saved)
    elif path.exists():
        raise SystemExit(f"{path} exists. Go on with --resume, or choose another folder with --out.")
    else:
        if first.resume:
            print(f"note: --resume: there is no {path} yet; starting from the beginning, with this command's flags")
        if first.quick:
            parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    if state:
        given = saved | state["settings"].get("changed", {})                        # an image size may have been cut down since
        for name in set(saved) - {"data", "diffusion", "every", "keep"}:            # files may have moved
            if getattr(args, name) not in (saved[name], given[name]):
                raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: the run in {out} was started with "
                                 f"{saved[name]}. Leave the flag out, or choose another folder with --out.")
    if args.seed < 0:
        raise SystemExit(f"--seed {args.seed}: needs a number from 0 on.")
    if not 0 <= args.holdout < 1:
        raise SystemExit(f"--holdout {args.holdout}: needs a share from 0 to below 1.")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise SystemExit(f"--lr {args.lr}: needs a number above 0.")
    if args.steps is not None and args.steps < 1:
        raise SystemExit(f"--steps {args.steps}: needs at least 1.")
    args.out = out
    return args, state


def check_batch(batch_size, n):
    """Exit unless a batch fits into the training set."""
    if not 1 <= batch_size <= n:
        raise SystemExit(f"--batch-size {batch_size}: there are {n} training images; it must be from 1 to {n}.")


class Log:
    """OUT/log.jsonl: one JSON object a line. Rows of this stage after `step` (the checkpoint's) are cut at the start.

    `seconds` is what the last row of this stage that is kept says, 0 without one: a resumed run counts on from there.
    """

    def __init__(self, out, stage, step):
        self.path, self.stage = Path(out) / "log.jsonl", stage
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]      # a last line may be torn
        rows = [(line, row) for line, row in rows if row["stage"] != stage or row["step"] <= step]
        if len(rows) < len(lines):
            with whole(self.path) as temporary:
                temporary.write_text("".join(line for line, _ in rows))
        seconds = [row["seconds"] for _, row in rows if row["stage"] == stage and "seconds" in row]
        self.seconds = seconds[-1] if seconds else 0.0

    def __call__(self, step, show=True, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        if show:
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            tqdm.write(f"step {step}  {shown}")


def check_loss(values, done, lr, flag="--lr"):
    """Exit if one of the losses of the last len(values) steps is not finite; done: the number of steps so far; flag: lr's."""
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {done - len(values) + i + 1} (learning rate {lr:.3g}); last "
                             f"finite value {values[i - 1] if i else 'before the last report'}. Try a smaller {flag}.")


def check_weights(model, done, lr):
    """Exit if a weight is not finite: asked before a checkpoint is written over an older one."""
    if not all(v.isfinite().all() for v in model.state_dict().values()):
        raise SystemExit(f"a weight is not finite after step {done} (learning rate {lr:.3g}). Try a smaller --lr.")


def report_time(done, start, steps, loss, warm, quick):
    """Print once, 6 steps after start, how long a run will take; name --quick if that is over 12 hours.

    Called after every step, with the last loss to wait for. Timed are the 4 steps after the first 2, which warm up and
    compile: returns the clock of the first of these two moments, to be passed in as `warm` again.
    """
    if done not in (start + 2, start + 6):
        return warm
    loss.item()
    if done == start + 2:
        return time.perf_counter()
    seconds = (time.perf_counter() - warm) / 4
    total = seconds * (steps - done)
    text = f"{total / 3600:.1f} hours" if total > 5400 else f"{total / 60:.1f} minutes"
    hint = "; --quick takes minutes" if total > 12 * 3600 and not quick else ""
    tqdm.write(f"estimated time: {text} ({seconds:.2f} s a step){hint}")
    return warm


def save_grid(path, rows, captions, scale=1, names=None):
    """Write rows of images ((C, H, H) float in [0, 1], None for a gap) as one PNG, a caption a column, a name a row."""
    H = max(image.shape[-1] for row in rows for image in row if image is not None)
    blank = torch.ones(3, H, H)
    tiles = [blank if image is None else image.expand(3, -1, -1).cpu() for row in rows for image in row]
    tiles = F.interpolate(torch.stack(tiles), scale_factor=scale)
    grid = make_grid(tiles, nrow=len(rows[0]), padding=2, pad_value=1)                      # (3, height, width)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    left = 160 if names else 0
    picture = Image.new("RGB", (left + pixels.shape[1], 16 + pixels.shape[0]), "white")
    picture.paste(Image.fromarray(pixels), (left, 16))
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        draw.text((left + 4 + i * (H * scale + 2), 2), caption, fill="black")
    for i, name in enumerate(names or []):
        draw.text((4, 16 + i * (H * scale + 2) + H * scale // 2 - 6), name, fill="black")
    with whole(path) as temporary:
        picture.save(temporary, format="PNG")


def run(main, advice="a training run goes on from its last checkpoint with --resume"):
    """Call main(); end a Ctrl-C, a SIGTERM and errors of the file system with one sentence, not a traceback."""
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
