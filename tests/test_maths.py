"""The method against independent oracles: loops, closed forms, other libraries."""

import colorsys
import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import median_filter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import functional as TF

import dia_lib as lib
import train_dia
from evaluate import auroc_interval, within_groups


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Schedule and dissolving ---------------------------------------------------------------------------------------------


def test_alpha_bar_cosine_is_the_closed_form():
    """While no beta is clipped, the product telescopes to f(t + 1) / f(0); values of the released schedule."""
    abar = lib.alpha_bar("cosine")
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    for t in (0, 30, 100, 400, 900):
        assert abar[t].item() == pytest.approx(f[t + 1] / f[0], rel=1e-4)
    for t, value in ((30, 0.9965), (65, 0.987), (100, 0.972), (130, 0.954), (200, 0.898), (400, 0.646)):
        assert abar[t].item() == pytest.approx(value, abs=6e-4)
    assert (abar.diff() < 0).all() and abar[-1] < 1e-5


def test_alpha_bar_linear_is_a_product_of_one_minus_beta():
    abar, product = lib.alpha_bar("linear"), 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert abar[t].item() == pytest.approx(product, rel=1e-4)


def test_dissolve_recovers_x0_when_eps_is_the_true_noise():
    """Eq. 4 is the inverse of the diffusion: given the very noise, it returns the clean image, for each image's own t."""
    abar, t = lib.alpha_bar(), torch.tensor([0, 30, 129, 400])
    x0, eps = rand(4, 3, 8, 8) * 1.8 - 0.9, torch.randn(4, 3, 8, 8)
    xt = lib.q_sample(x0, t, eps, abar)
    assert torch.allclose(lib.dissolve(lambda x, t: eps, xt, t, abar), x0, atol=1e-4)


def test_dissolve_is_eq_4_clamped_and_without_gradient():
    abar, t, x = lib.alpha_bar(), torch.tensor([80, 300]), (rand(2, 1, 4, 4) * 2 - 1).requires_grad_()
    eps = rand(2, 1, 4, 4, seed=1)
    x_hat = lib.dissolve(lambda x, t: eps, x, t, abar)
    for i in range(2):
        a = abar[t[i]].item()
        expected = ((1 / a) ** 0.5 * x[i] - (1 / a - 1) ** 0.5 * eps[i]).clamp(-1, 1)
        assert torch.allclose(x_hat[i], expected, atol=1e-6)
    assert not x_hat.requires_grad


def test_unet_keeps_the_shape_and_uses_t():
    unet = lib.UNet(1, 8)
    assert sum(p.numel() for p in lib.UNet().parameters()) > 30e6               # the default is the paper's scale
    for p in unet.parameters():                                                 # blocks start at zero: wake them up
        torch.nn.init.normal_(p, std=0.05)
    x = rand(2, 1, 24, 24)
    out = unet(x, torch.tensor([5, 5]))
    assert out.shape == x.shape
    assert not torch.allclose(out, unet(x, torch.tensor([5, 900]))[:2], atol=1e-4)
    assert [lib.Attention(dim).heads for dim in (16, 48, 64, 512, 112)] == [1, 1, 2, 16, 2]
    for dim in (24, 56, 88):                                                    # widths that 32 does not divide
        assert lib.UNet(1, dim)(x[:1, :, :8, :8], torch.tensor([5])).shape == (1, 1, 8, 8)


def test_attention_equals_the_library():
    """The written-out softmax against torch's fused one, with the same weights."""
    attention, x = lib.Attention(64), rand(3, 64, 4, 4)
    torch.nn.init.normal_(attention.out.weight)
    qkv = attention.qkv(attention.norm(x)).flatten(2).transpose(1, 2).view(3, 16, 3, 2, 32).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(3, 4, 4, 64).permute(0, 3, 1, 2)
    assert torch.allclose(attention(x), x + attention.out(h), atol=1e-5)


def test_ema_forgets_the_initial_weights():
    """After 300 steps less than 1e-6 of the initial weights is left."""
    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(ema.weight)
    torch.nn.init.zeros_(model.weight)
    for step in range(300):
        lib.update_ema(ema, model, step)
    assert 0 <= ema.weight.item() < 1e-6


# Views ---------------------------------------------------------------------------------------------------------------


def test_shifts_are_turns_and_jigsaws():
    x = rand(3, 2, 6, 6)
    rotated, jigsaw = lib.shift_views(x, "rotate"), lib.shift_views(x, "perm")
    assert rotated.shape == jigsaw.shape == (12, 2, 6, 6)
    for k in range(4):
        for b in range(3):
            assert np.array_equal(rotated[k * 3 + b], np.rot90(x[b], k, (1, 2)))
            top, bottom = x[b][:, :3], x[b][:, 3:]
            rows = torch.cat([bottom, top] if k >= 2 else [top, bottom], 1)
            left, right = rows[:, :, :3], rows[:, :, 3:]
            assert torch.equal(jigsaw[k * 3 + b], torch.cat([right, left] if k % 2 else [left, right], 2))


@pytest.mark.parametrize("kind", ["rotate", "perm"])
def test_shift_can_be_read_off_every_view(kind):
    """The flip trap: with both top corners marked (so that a flip *before* the shift changes nothing), every augmented
    view still shows its own S_k. A flip after a quarter-turn would exchange k = 1 and k = 3."""
    x = torch.zeros(16, 1, 8, 8)
    x[:, :, 0, 0] = x[:, :, 0, -1] = 1
    views = lib.make_views(x, 3, kind, (1.0, 1.0), torch.Generator().manual_seed(0), dissolve=lambda y, flip: y)
    patterns = lib.shift_views(x[:1], kind)                                     # (K, 1, 8, 8)
    cos = F.normalize(views.flatten(1), dim=1) @ F.normalize(patterns.flatten(1), dim=1).T
    assert torch.equal(cos.argmax(1), torch.arange(4).repeat_interleave(16).repeat(3))


def test_order_of_views_is_view_then_shift_then_image():
    """Row (v*K + k)*B + b is image b under shift k in view v; only view 2 is dissolved, before shift and augmentation."""
    B = 5
    x = (torch.arange(B) / 10 + 0.2).view(B, 1, 1, 1).expand(B, 1, 8, 8).clone()        # image b is flat, b/10 + 0.2
    seen = []

    def dissolve(y, flip):
        seen.append(y.shape)
        return y + 0.05

    params = {"contrast": 1.0, "hue": 0.0, "saturation": 1.0, "value": 1.0}
    original, lib_draw = lib.draw_augment, lambda n, s, g, strength: {
        **{k: torch.full((n,), v) for k, v in params.items()}, "contrast_first": torch.ones(n, dtype=torch.bool),
        "grey": torch.zeros(n, dtype=torch.bool), "crop": torch.tensor([1.0, 1, 0, 0]).view(4, 1).expand(4, n)}
    lib.draw_augment = lib_draw
    try:
        views = lib.make_views(x, 3, "perm", (1, 1), torch.Generator(), dissolve)
    finally:
        lib.draw_augment = original
    assert seen == [(B, 1, 8, 8)]
    for v in range(3):
        for k in range(4):
            for b in range(B):
                assert views[(v * 4 + k) * B + b].mean().item() == pytest.approx(b / 10 + 0.2 + 0.05 * (v == 2), abs=1e-5)


def test_dissolving_is_told_which_images_are_flipped():
    x, seen = rand(20, 1, 8, 8), []
    lib.make_views(x, 3, "perm", (1, 1), torch.Generator().manual_seed(0), lambda y, flip: seen.append((y, flip)) or y)
    (y, flip), = seen
    assert flip.shape == (20, 1, 1, 1) and 4 < flip.sum() < 16
    assert torch.equal(y, torch.where(flip, x.flip(-1), x))


def neutral(n=1, **changes):
    params = {"contrast": 1.0, "hue": 0.0, "saturation": 1.0, "value": 1.0, **changes}
    return {**{k: torch.full((n,), float(v)) for k, v in params.items() if k not in ("crop", "grey")},
            "contrast_first": torch.ones(n, dtype=torch.bool), "grey": torch.tensor([changes.get("grey", False)] * n),
            "crop": torch.tensor(changes.get("crop", [1.0, 1, 0, 0])).view(4, 1).expand(4, n)}


@pytest.mark.parametrize("C", [1, 3])
def test_augment_with_neutral_draws_changes_nothing(C):
    x = rand(2, C, 9, 9)
    assert torch.allclose(lib.augment(x, neutral()), x, atol=1e-5)


def test_jitter_is_scaled_by_its_strength_and_off_at_zero():
    draws = {s: lib.draw_augment(2000, (0.5, 1), torch.Generator().manual_seed(0), s) for s in (0.0, 0.5, 1.0)}
    for name, middle, most in [("contrast", 1, 0.4), ("hue", 0, 0.1), ("saturation", 1, 0.4), ("value", 1, 0.4)]:
        away = {s: (d[name] - middle).abs() for s, d in draws.items()}
        assert (away[0.0] == 0).all() and torch.allclose(away[0.5], away[1.0] / 2, atol=1e-6)
        assert 0.97 * most < away[1.0].max() <= most + 1e-6 and 0.15 < (away[1.0] == 0).float().mean() < 0.25
    assert torch.equal(draws[0.0]["crop"], draws[1.0]["crop"])                  # the other draws do not move


def test_hsv_jitter_agrees_with_colorsys():
    x = rand(2, 3, 4, 4)
    out = lib.augment(x, neutral(hue=0.07, saturation=1.2, value=0.8))
    for i in range(2):
        for r in range(4):
            for c in range(4):
                h, s, v = colorsys.rgb_to_hsv(*x[i, :, r, c].tolist())
                h, s, v = (h + 0.07) % 1, min(1, s * 1.2), min(1, v * 0.8)
                assert np.allclose(out[i, :, r, c], colorsys.hsv_to_rgb(h, s, v), atol=1e-4)


def test_hsv_jitter_of_nothing_and_of_grey():
    """Neutral HSV is the identity; a full turn too; grey stays grey, and black black."""
    x = rand(3, 3, 5, 5)
    one = torch.ones(1, 1, 1, 1)
    assert torch.allclose(lib.jitter_hsv(x, one * 0, one, one), x, atol=1e-5)
    assert torch.allclose(lib.jitter_hsv(x, one * 0.1, one, one), lib.jitter_hsv(x, one * 1.1, one, one), atol=1e-4)
    grey = rand(1, 1, 5, 5).expand(1, 3, 5, 5)
    assert torch.allclose(lib.jitter_hsv(grey, one * 0.1, one * 1.4, one), grey, atol=1e-6)
    assert lib.jitter_hsv(torch.zeros(1, 3, 2, 2), one * 0.1, one, one).abs().max() == 0


def test_grey_and_contrast_agree_with_torchvision():
    x = rand(2, 3, 6, 6)
    assert torch.allclose(lib.augment(x, neutral(grey=True)), TF.rgb_to_grayscale(x, 3), atol=2e-3)
    one = rand(2, 1, 6, 6)
    assert torch.allclose(lib.augment(one, neutral(contrast=0.7)), TF.adjust_contrast(one.expand(2, 3, 6, 6), 0.7)[:, :1],
                          atol=1e-3)


def test_crop_agrees_with_cutting_and_resizing():
    """The lower right quarter, cut by hand and enlarged bilinearly, away from its border."""
    x = rand(1, 1, 16, 16)
    out = lib.augment(x, neutral(crop=[0.5, 0.5, 0.5, 0.5]))
    by_hand = F.interpolate(x[..., 8:, 8:], (16, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(out[..., 1:-1, 1:-1], by_hand[..., 1:-1, 1:-1], atol=1e-5)


def test_crops_have_the_drawn_area_and_lie_inside():
    h, w, dy, dx = lib.draw_augment(5000, (0.08, 1.0), torch.Generator().manual_seed(1))["crop"]
    assert 0.08 <= (h * w).min() < 0.09 and 0.99 < (h * w).max() <= 1.0001
    assert (h <= 1.0001).all() and (w <= 1.0001).all()
    assert ((h + dy.abs()) <= 1.0001).all() and ((w + dx.abs()) <= 1.0001).all()
    assert (w / h).min() > 0.74 and (w / h).max() < 1.34


def test_one_draw_serves_a_whole_batch():
    x = rand(4, 3, 8, 8)
    params = lib.draw_augment(1, (0.54, 0.54), torch.Generator().manual_seed(3))
    together = lib.augment(x, params)
    for i in range(4):
        assert torch.allclose(together[i:i + 1], lib.augment(x[i:i + 1], params), atol=1e-6)


def test_augment_treats_each_image_by_its_own_draw():
    x, generator = rand(1, 3, 8, 8).expand(6, 3, 8, 8), torch.Generator().manual_seed(5)
    params = lib.draw_augment(6, (0.08, 1.0), generator)
    out = lib.augment(x, params)
    for i in range(6):
        alone = {k: v[..., i:i + 1] for k, v in params.items()}
        assert torch.allclose(out[i:i + 1], lib.augment(x[:1], alone), atol=1e-5)
    assert (out[0] - out[1]).abs().mean() > 0.01


# The dissolved view --------------------------------------------------------------------------------------------------


def nothing(x, t):
    """A UNet that finds no noise: dissolving then only divides by sqrt(abar)."""
    return torch.zeros_like(x)


def test_small_images_are_padded_and_cropped_back():
    """28 px images are dissolved on a 32 px canvas with zeros (black) around them, and come back at 28 px."""
    seen = []

    def unet(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    x, abar, t = rand(2, 1, 28, 28) * 0.5 + 0.25, torch.ones(1000), torch.tensor([50, 60])
    out = lib.dissolve_view(unet, x, t, abar, 32, "diffusion")
    assert torch.allclose(out, x, atol=1e-6)
    assert seen[0].shape == (2, 1, 32, 32) and (seen[0][:, :, :2] == -1).all() and (seen[0][..., -2:] == -1).all()


def test_dissolving_happens_in_minus_one_to_one():
    """The UNet sees 2x - 1 (the released code fed it [0, 1]), and what it takes away is taken in that scale."""
    x, t, abar = torch.full((1, 1, 32, 32), 0.75), torch.tensor([100]), lib.alpha_bar()
    a = abar[100].item()
    out = lib.dissolve_view(lambda x, t: x, x, t, abar, 32, "diffusion")        # eps = x = 0.5
    assert torch.allclose(out, torch.full_like(x, (0.5 * ((1 / a) ** 0.5 - (1 / a - 1) ** 0.5) + 1) / 2), atol=1e-5)


def test_modes_without_diffusion():
    x, median = rand(2, 1, 32, 32), None
    median = torch.from_numpy(np.stack([median_filter(i[0].numpy(), 7, mode="mirror") for i in x]))[:, None]
    assert torch.equal(lib.dissolve_view(None, x, None, None, 32, "median"), median)
    assert torch.equal(lib.dissolve_view(None, x, None, None, 32, "resize"), x)             # no resize at native size
    assert torch.equal(lib.dissolve_view(None, x, None, None, 32, "copy"), x)
    flat = torch.full((1, 1, 64, 64), 0.3)
    for mode in ("resize", "gaussian", "median"):
        assert torch.allclose(lib.dissolve_view(None, flat, None, None, 32, mode), flat, atol=1e-5)
    big = rand(1, 1, 64, 64)
    assert lib.dissolve_view(None, big, None, None, 32, "resize").var() < big.var() / 2


def test_residual_takes_away_only_what_diffusion_took():
    """With a UNet that finds nothing and abar = 1, `residual` returns the image in full resolution; `diffusion` does not."""
    x, t = rand(2, 3, 64, 64), torch.tensor([40, 90])
    assert torch.allclose(lib.dissolve_view(nothing, x, t, torch.ones(1000), 32, "residual"), x, atol=1e-6)
    assert (lib.dissolve_view(nothing, x, t, torch.ones(1000), 32, "diffusion") - x).abs().mean() > 0.05


def test_gain_multiplies_what_diffusion_took():
    x, t = 0.4 + 0.2 * rand(2, 1, 32, 32), torch.tensor([40, 90])
    one, three = (lib.dissolve_view(lambda x, t: x, x, t, lib.alpha_bar(), 32, "residual", gain=g) - x for g in (1.0, 3.0))
    assert one.abs().max() > 1e-3 and torch.allclose(three, 3 * one, atol=1e-5)


def test_bank_holds_every_image_dissolved_at_every_part_of_the_range(tmp_path):
    """A "UNet" whose eps is x + (t - 80) / 50, with abar = 1/2, leaves a flat picture of t: 2.5 grey levels a step."""
    images, abar = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8), torch.full((1000,), 0.5)

    def unet(x, t):
        return 2 ** 0.5 * x + ((t - 80) / 50).view(-1, 1, 1, 1)

    args = (images, 1, 8, (30, 130), abar, 8)
    bank = train_dia.make_bank(tmp_path / "a.npy", unet, *args, 0, torch.device("cpu"))
    assert bank.shape == (70, 4, 2, 1, 8, 8) and bank.dtype == torch.uint8
    flat = bank.flatten(3).float()                                          # (70, 4, 2, 64)
    t = 80 - 50 * (flat.mean(3) / 255 * 2 - 1)
    part = torch.arange(4).view(1, 4, 1)
    assert (flat.std(3) < 0.6).all() and (t > 29.5 + 25 * part).all() and (t < 54.5 + 25 * part).all()
    assert (t - 30 - 25 * part).round().unique().numel() == 25              # each t of a part, for some image
    again = train_dia.make_bank(tmp_path / "b.npy", unet, *args, 0, torch.device("cpu"))
    other = train_dia.make_bank(tmp_path / "c.npy", unet, *args, 1, torch.device("cpu"))
    assert torch.equal(bank, again) and not torch.equal(bank, other)
    assert torch.equal(train_dia.make_bank(tmp_path / "a.npy", None, *args, 0, torch.device("cpu")), bank)      # read back


def test_the_view_from_the_bank_is_the_view_without_it_to_half_a_grey_level(tmp_path):
    """A "UNet" that changes nothing; the range of t is one step, abar[30] = 1. Flipped where flipped, at any image size."""
    for size in (64, 32, 28):
        images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
        args = (lambda x, t: torch.zeros_like(x), torch.tensor([30] * 3), torch.ones(1000), 32)
        bank = train_dia.make_bank(tmp_path / f"{size}.npy", args[0], images, 3, 4, (30, 31), args[2], 32, 0, torch.device("cpu"))
        rows, flip = torch.tensor([4, 1, 1]), torch.tensor([True, False, True]).view(3, 1, 1, 1)
        x = torch.where(flip, images[rows].flip(-1), images[rows]).float() / 255
        y = train_dia.draw_from(bank, rows, flip, torch.Generator().manual_seed(0), torch.device("cpu"))
        for mode in ("diffusion", "residual"):
            view = lib.dissolve_view(None, x, None, None, 32, mode, y)
            assert torch.allclose(view, lib.dissolve_view(*args[:1], x, *args[1:], mode), atol=0.5 / 255 + 1e-6)


def test_drawing_from_the_bank_takes_every_slot_and_the_right_one():
    bank = torch.arange(5 * 4 * 2, dtype=torch.uint8).view(5, 4, 2, 1, 1, 1).expand(5, 4, 2, 1, 8, 8)
    rows, flip = torch.tensor([3, 0]), torch.tensor([False, True]).view(2, 1, 1, 1)
    seen = set()
    for seed in range(40):
        y = train_dia.draw_from(bank, rows, flip, torch.Generator().manual_seed(seed), torch.device("cpu"))
        seen.add(tuple((y[:, 0, 0, 0] * 255).round().int().tolist()))
    assert {a for a, _ in seen} == {24, 26, 28, 30} and {b for _, b in seen} == {1, 3, 5, 7}


# Contrastive loss ----------------------------------------------------------------------------------------------------


def loss_by_loops(z, views, tau, twins, twin_weight=1):
    """Eq. 6-7, one pair at a time."""
    N, total = len(z) // views, 0.0
    z = z / z.norm(dim=1, keepdim=True)
    for i in range(2 * N):
        denominator = 0.0
        for j in range(views * N):
            is_twin = j >= 2 * N and j - 2 * N == i % N
            if j != i and not (is_twin and twins == "excluded"):
                denominator = denominator + torch.exp(z[i] @ z[j] / tau) * (twin_weight if is_twin else 1)
        j = i + N if i < N else i - N
        total = total - torch.log(torch.exp(z[i] @ z[j] / tau) / denominator)
    return total / (views * N)


@pytest.mark.parametrize("views, twins", [(3, "negative"), (3, "excluded"), (2, "negative")])
@pytest.mark.parametrize("tau, weight", [(0.5, 1), (0.2, 10)])
def test_loss_equals_the_loops_with_gradients(views, twins, tau, weight):
    z = torch.randn(views * 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = z.float().requires_grad_(), z.clone().requires_grad_()
    fast, slow = lib.contrastive_loss(a, views, tau, twins, weight), loss_by_loops(b, views, tau, twins, weight)
    fast.backward()
    slow.backward()
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    assert torch.allclose(a.grad.double(), b.grad, atol=1e-6)


def test_loss_inside_autocast_is_the_loss_outside_bit_for_bit():
    z = torch.randn(36, 128)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lib.contrastive_loss(z)
    assert inside.dtype == torch.float32 and torch.equal(inside, lib.contrastive_loss(z))


def test_loss_refuses_rows_that_are_no_views():
    with pytest.raises(ValueError, match="views"):
        lib.contrastive_loss(torch.randn(10, 4), views=3)
    with pytest.raises(ValueError, match="twins"):
        lib.contrastive_loss(torch.randn(9, 4), twins="some")


# Score ---------------------------------------------------------------------------------------------------------------


def fitted(M=7, D=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, logits = torch.randn(M, 4, D, generator=g), torch.randn(M, 4, 4, generator=g) + 3 * torch.eye(4)
    return z, logits, lib.csi_fit(z, logits)


def test_score_equals_a_loop_over_images():
    z, logits, stats = fitted()
    g = torch.Generator().manual_seed(9)
    zq, lq = torch.randn(5, 4, 6, generator=g), torch.randn(5, 4, 4, generator=g)
    score = lib.csi_score(stats, zq, lq)
    for q in range(5):
        normality = 0.0
        for k in range(4):
            w = 1 / np.mean([z[m, k].norm().item() for m in range(7)])
            v = 1 / np.mean([logits[m, k, k].item() for m in range(7)])
            cosines = [F.cosine_similarity(zq[q, k], z[m, k], dim=0).item() for m in range(7)]
            normality += (max(cosines) * zq[q, k].norm().item() * w + lq[q, k, k].item() * v) / 4
        assert score[q].item() == pytest.approx(-normality, abs=1e-4)


def test_score_of_training_images_is_most_normal_and_chunks_do_not_matter():
    z, logits, stats = fitted(M=40)
    parts = lib.csi_parts(stats, z, logits)
    assert torch.allclose(parts["cos"], torch.full((40,), -1.0), atol=1e-5)
    assert parts["con"].mean().item() == pytest.approx(-1, abs=1e-4) and parts["cls"].mean().item() == pytest.approx(-1, abs=1e-4)
    for chunk in (1, 3, 1000):
        assert torch.allclose(lib.csi_parts(stats, z, logits, chunk)["score"], parts["score"], atol=1e-5)


def test_an_untrained_classifier_is_left_out_with_a_warning():
    z, logits, _ = fitted()
    with pytest.warns(UserWarning, match="left out"):
        stats = lib.csi_fit(z, logits - 10)
    assert (stats["v"] == 0).all()


def test_local_score_is_the_farthest_position_from_its_nearest(monkeypatch):
    g = torch.Generator().manual_seed(0)
    normal, images = (F.normalize(torch.randn(n, 9, 5, generator=g), dim=2) for n in (7, 6))
    monkeypatch.setattr(lib, "local_features", lambda encoder, images, device: images)          # the features themselves
    known = lib.local_fit(None, normal, torch.device("cpu"), batch=3)
    slow = [max(min(1 - (p @ q).item() for q in normal.flatten(0, 1)) for p in image) for image in images]
    assert known.shape == (63, 5) and np.allclose(lib.local_score(known, None, images, "cpu", batch=4), slow, atol=1e-6)
    assert lib.local_score(known, None, normal, "cpu").abs().max() < 1e-5
    few = [lib.local_fit(None, normal, torch.device("cpu"), batch, most=10) for batch in (2, 7)]
    assert few[0].shape == (10, 5) and torch.equal(*few)                                        # whatever the batch


@pytest.mark.parametrize("stem, P", [("imagenet", 4), ("cifar", 64)])
def test_local_features_are_the_third_stage_of_the_plain_images(stem, P):
    encoder, images = lib.Encoder(1, 4, stem).train(), torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    found = lib.local_features(encoder, images, torch.device("cpu"))
    assert found.shape == (3, P, 256) and torch.allclose(found.norm(dim=2), torch.ones(3, P), atol=1e-5) and encoder.training
    kept = []
    encoder.eval().backbone.layer3.register_forward_hook(lambda module, args, out: kept.append(out))
    encoder(images.float() / 255)
    assert torch.allclose(F.normalize(kept[0].flatten(2).transpose(1, 2), dim=2), found, atol=0.05)        # bfloat16


def test_embedding_is_independent_of_batch_and_order():
    """A score depends on its image and the run: not on the batch it comes in, its order, nor on other images."""
    torch.manual_seed(0)
    encoder = lib.Encoder(1, stem="cifar")
    images = (rand(7, 1, 16, 16) * 255).to(torch.uint8)
    z, logits = lib.embed(encoder, images, "rotate", 2, torch.device("cpu"), batch=7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    z2, logits2 = lib.embed(encoder, images[order], "rotate", 2, torch.device("cpu"), batch=2)
    scale = z.abs().max().item()
    tolerance = 0.02 if lib.has_bfloat16(torch.device("cpu")) else 1e-5       # bfloat16 sums in another order
    assert torch.allclose(z2, z[order], atol=tolerance * scale)
    assert torch.allclose(logits2, logits[order], atol=tolerance * logits.abs().max().item())
    assert encoder.training and not torch.allclose(z[0], z[1], atol=0.02 * scale)


def test_embedding_in_float32_is_exactly_independent(monkeypatch):
    monkeypatch.setattr(lib, "has_bfloat16", lambda device: False)
    test_embedding_is_independent_of_batch_and_order()


def test_embedding_leaves_the_global_random_state_alone():
    encoder, state = lib.Encoder(1, stem="cifar"), torch.random.get_rng_state()
    lib.embed(encoder, torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "perm", 1, torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())


def test_auroc_of_perfect_inverted_and_constant_scores():
    labels = np.array([0] * 30 + [1] * 20)
    for scores, expected in ((labels, 1.0), (-labels, 0.0), (labels * 0, 0.5)):
        auroc, interval = auroc_interval(labels, scores.astype(float))
        assert auroc == expected and interval == [expected, expected]


def test_auroc_interval_covers_at_about_its_rate():
    """Of 60 samples from two normals one apart (AUROC 0.7602), about 95% of the intervals hold the truth."""
    rng, hits, labels = np.random.default_rng(1), 0, np.array([0] * 60 + [1] * 60)
    for _ in range(60):
        low, high = auroc_interval(labels, rng.normal(labels, 1))[1]
        hits += low <= 0.7602 <= high
    assert 51 <= hits <= 60


def test_within_groups_needs_both_labels():
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.9, 0.8, 0.2, 0.5])
    assert within_groups(labels, scores, ["a", "a", "b", "b", "c"]) == {"a": 1.0, "b": 0.0}


# Optimizer -----------------------------------------------------------------------------------------------------------


def test_lars_equals_the_textbook():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.bias)                                        # norm 0: local rate 1
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    optimizer = train_dia.LARS(model.parameters(), 0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(rand(4, 3, seed=step)).square().sum().backward()
        for i, p in enumerate(model.parameters()):
            w, g = weights[i], p.grad
            local = 0.001 * w.norm() / (g.norm() + 1e-6 * w.norm() + 1e-8) if w.norm() > 0 else 1.0
            buffers[i] = 0.9 * buffers[i] + local * (g + 1e-6 * w)
            weights[i] = w - 0.5 * buffers[i]
        optimizer.step()
        for w, p in zip(weights, model.parameters(), strict=True):
            assert torch.allclose(w, p, atol=1e-6)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train_dia.learning_rate(s, 1000, 1.0, "lars") for s in range(1000)]
    assert 0.1 < rates[0] < 0.2 and rates[9] == pytest.approx(1.0) and rates[-1] < 1e-4
    rates = [train_dia.learning_rate(s, 1000, 1e-3, "adamw") for s in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(1e-3) and rates.index(max(rates)) == 99


def test_readable_numbers():
    """Similarities of positives, twins and other images, on embeddings where they are known."""
    B, V = 2, 3
    z = torch.eye(8)[None, :4 * B].repeat(V, 1, 1)                          # each (k, b) its own axis, equal in all views
    z[2] = -z[2]                                                            # the dissolved view points the other way
    labels = torch.arange(4).repeat_interleave(B).repeat(V)
    row = train_dia.readable(z.flatten(0, 1), F.one_hot(labels, 4).float(), labels, V)
    assert row == {"shift_acc": 1.0, "sim_positive": 1.0, "sim_other": 0.0, "sim_twin": -1.0}


def test_randomness_is_a_function_of_seed_stream_and_step():
    def draw(*key):
        return torch.rand(4, generator=lib.step_generator("cpu", *key)).tolist()
    assert draw(0, "dia", 5) == draw(0, "dia", 5)
    assert len({tuple(draw(*key)) for key in ((0, "dia", 5), (1, "dia", 5), (0, "dia", 6), (0, "epoch", 5))}) == 4


def test_every_image_comes_once_an_epoch():
    batches = [lib.batch_indices(10, 3, 0, step) for step in range(6)]
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9 and first.tolist() != second.tolist()


def test_encoder_learns_in_both_stems_and_keeps_heads_in_float32():
    for stem in ("cifar", "imagenet"):
        encoder = lib.Encoder(3, stem=stem)
        with torch.autocast("cpu", torch.bfloat16):
            z, logits = encoder(rand(4, 3, 32, 32))
        assert z.shape == (4, 128) and logits.shape == (4, 4) and z.dtype == logits.dtype == torch.float32
        (z.sum() + logits.sum()).backward()
        assert all(p.grad is not None for p in encoder.parameters())


def test_a_2x2_map_is_convolved_by_one_matrix_with_the_same_result():
    conv = lib.Conv3x3(5, 7, 3, padding=1, bias=False)
    x = rand(4, 5, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, x2 = conv.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    y, expected = conv(x), F.conv2d(x2, weight, padding=1)
    assert torch.allclose(y, expected, atol=1e-6)
    upstream = rand(*y.shape)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert torch.allclose(x.grad, x2.grad, atol=1e-5) and torch.allclose(conv.weight.grad, weight.grad, atol=1e-5)
    x = rand(4, 5, 6, 4)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, padding=1))
    assert sum(isinstance(m, lib.Conv3x3) for m in lib.Encoder(1).modules()) == 3


def test_networks_and_loss_compile_without_a_graph_break():
    """torch.compile is the default on CUDA; fullgraph=True raises at a break. Traced on the CPU, not translated."""
    unet, encoder = lib.UNet(1, 8), lib.Encoder(1)
    labels = torch.arange(4).repeat_interleave(2).repeat(3)

    def loss(x):
        z, logits = encoder(x)
        return lib.contrastive_loss(z) + F.cross_entropy(logits, labels)

    x, t = rand(2, 1, 32, 32), torch.tensor([3, 900])
    with lib.autocast(x.device):
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x, t), unet(x, t), atol=0.02)
        x = rand(24, 1, 64, 64)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert compiled(x).item() == pytest.approx(loss(x).item(), rel=0.02)


def test_views_networks_and_losses_never_leave_the_gpu(monkeypatch):
    """Shapes only, on a pretended CUDA device: a host read, or a tensor left on the CPU, raises here as it would stall there.
    Not covered, since they talk to the driver: the copies of `send` and the backward pass."""
    class Cuda:                                                             # in place of a torch.Generator("cuda")
        device = torch.device("cuda")

    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, device: rand(*shape, device=device))
    monkeypatch.setattr(lib, "autocast", lambda device: contextlib.nullcontext())
    with FakeTensorMode():
        with Cuda.device:
            encoder, unet, abar = lib.Encoder(3), lib.UNet(3, 8), lib.alpha_bar()
            x, t, labels = torch.empty(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64), torch.zeros(48, dtype=torch.int64)
        x = lib.make_views(x, 3, "perm", (0.08, 1), Cuda, lambda y, flip: lib.dissolve_view(unet, y, t, abar, 32, "residual"))
        z, logits = encoder(x)
        loss = lib.contrastive_loss(z) + F.cross_entropy(logits, labels)
        for p in encoder.parameters():
            p.grad = torch.empty_like(p)
        train_dia.LARS(encoder.parameters(), 1.0).step()
        assert loss.device.type == "cuda" and loss.shape == ()
        with pytest.raises(DataDependentOutputException):                   # so that this test can fail
            loss.item()
        with pytest.raises(RuntimeError, match="cpu"):
            z + torch.zeros(48, 128)


def test_synthetic_defects_are_local_and_repeatable():
    images = (rand(6, 1, 48, 48) * 60 + 120).to(torch.uint8)
    for kind, largest in (("line", 0.25), ("patch", 0.25)):
        def make(kind=kind):
            return lib.synthetic_defects(images, kind, torch.Generator().manual_seed(2))
        defects = make()
        changed = (defects != images).float().mean((1, 2, 3))
        assert torch.equal(defects, make()) and defects.dtype == torch.uint8
        assert (changed > 0).all() and (changed < largest).all()
    line = lib.synthetic_defects(images, "line", torch.Generator().manual_seed(2))
    assert (line <= images).all()                                           # a crack is dark


def test_a_copy_of_the_model_is_not_needed_to_evaluate():
    """embed() leaves weights and batch norm statistics as they were."""
    encoder = lib.Encoder(1, stem="cifar")
    before = copy.deepcopy(encoder.state_dict())
    lib.embed(encoder, torch.zeros(3, 1, 16, 16, dtype=torch.uint8), "perm", 1, torch.device("cpu"))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
