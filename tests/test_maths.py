"""The method against independent oracles: loops, closed forms, other libraries."""

import colorsys
import contextlib
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, median_filter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import functional as TF

import dia_lib as lib
import train_dia
from evaluate import auroc_interval, within_groups


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Schedule and dissolving -----------------------------------------------------------------------------------


def test_alpha_bar_cosine_is_the_closed_form():
    """While no beta is clipped, the product telescopes to f(t + 1) / f(0); the released values."""
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
    """Eq. 4 is the inverse of the diffusion: given the very noise, it returns the clean image."""
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
    assert sum(p.numel() for p in lib.UNet().parameters()) > 30e6           # the default is the paper's scale
    for p in unet.parameters():                                           # blocks start at zero: wake them up
        torch.nn.init.normal_(p, std=0.05)
    x = rand(2, 1, 24, 24)
    out = unet(x, torch.tensor([5, 5]))
    assert out.shape == x.shape
    assert not torch.allclose(out, unet(x, torch.tensor([5, 900]))[:2], atol=1e-4)
    assert [lib.Attention(dim).heads for dim in (16, 48, 64, 512, 112)] == [1, 1, 2, 16, 2]
    for dim in (24, 56, 88):                                                  # widths that 32 does not divide
        assert lib.UNet(1, dim)(x[:1, :, :8, :8], torch.tensor([5])).shape == (1, 1, 8, 8)


def test_attention_is_softmax_attention_written_out():
    """softmax(q k / sqrt(d)) v for each head, with loops over heads, added to the input."""
    attention, x = lib.Attention(64), rand(3, 64, 4, 4)
    torch.nn.init.normal_(attention.out.weight)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, 1)           # (3, 64, 16) each
    heads = []
    for h in range(2):
        a, b, c = (part[:, 32 * h:32 * h + 32].transpose(1, 2) for part in (q, k, v))           # (3, 16, 32)
        heads.append((a @ b.transpose(1, 2) / 32 ** 0.5).softmax(2) @ c)
    h = torch.cat(heads, 2).transpose(1, 2).reshape(3, 64, 4, 4)
    assert torch.allclose(attention(x), x + attention.out(h), atol=1e-5)


def test_ema_is_its_closed_form():
    """ema = sum_i w_i (1 - d_i) prod_{j>i} d_j + w_init prod_j d_j, with d_i = min(0.9995, (1+i)/(10+i))."""
    model, ema, values = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False), []
    torch.nn.init.constant_(ema.weight, 2.0)
    for step in range(40):
        torch.nn.init.constant_(model.weight, math.sin(step))
        lib.update_ema(ema, model, lib.ema_weight(step))
        values.append(math.sin(step))
    decay = [(1 + i) / (10 + i) for i in range(40)]
    expected = 2.0 * math.prod(decay)
    expected += sum(v * (1 - decay[i]) * math.prod(decay[i + 1:]) for i, v in enumerate(values))
    assert ema.weight.item() == pytest.approx(expected, abs=1e-6)
    torch.nn.init.constant_(ema.weight, 1.0)
    torch.nn.init.constant_(model.weight, 0.0)
    lib.update_ema(ema, model, lib.ema_weight(10 ** 6))                         # the highest decay
    assert ema.weight.item() == pytest.approx(0.9995, abs=1e-6)


# Views -----------------------------------------------------------------------------------------------------


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


NEUTRAL = dict(jitter=0.9, contrast=0.5, hue=0.5, saturation=0.5, value=0.5, first=0.2, grey=0.9, area=1.0,
               aspect=0.5, y=0.5, x=0.5)                                        # in the order of `augment`


def neutral(n=1, **changes):
    """Uniform numbers (11, n) by which nothing is jittered or made grey, but for the changes."""
    return torch.tensor(list({**NEUTRAL, **changes}.values())).view(11, 1).expand(11, n)


@pytest.mark.parametrize("kind", ["rotate", "perm"])
def test_shift_can_be_read_off_every_view(kind):
    """The flip trap: with both top corners marked (so that a flip *before* the shift changes nothing), every
    augmented view still shows its own S_k. A flip after a quarter-turn would exchange k = 1 and k = 3."""
    x = torch.zeros(16, 1, 8, 8)
    x[:, :, 0, 0] = x[:, :, 0, -1] = 1
    _, u_flip, u = lib.draw_step(0, 0, 3, 16)
    views = lib.make_views([lib.flip(x, u_v) for u_v in u_flip], kind, u, (1.0, 1.0))
    patterns = lib.shift_views(x[:1], kind)                                     # (K, 1, 8, 8)
    cos = F.normalize(views.flatten(1), dim=1) @ F.normalize(patterns.flatten(1), dim=1).T
    assert torch.equal(cos.argmax(1), torch.arange(4).repeat_interleave(16).repeat(3))


def test_order_of_views_is_view_then_shift_then_image():
    """Row (v*K + k)*B + b is image b under shift k in view v, augmented by its own numbers."""
    B = 5
    x = (torch.arange(B) / 10 + 0.2).view(B, 1, 1, 1).expand(B, 1, 8, 8).clone()      # b/10 + 0.2
    x[:, :, 0, 0] += 0.1                                                            # which shift it is
    views = lib.make_views([x, x + 0.02, x + 0.05], "perm", neutral(12 * B), (1, 1))
    for v, more in enumerate((0, 0.02, 0.05)):
        for k in range(4):
            for b in range(B):
                image = views[(v * 4 + k) * B + b]
                assert image.median().item() == pytest.approx(b / 10 + 0.2 + more, abs=1e-5)
                assert divmod(int(image.argmax()), 8) == (4 * (k >= 2), 4 * (k % 2))
    u = neutral(12 * B).clone()
    u[6, 7] = 0.0                                                                   # grey, for row 7 alone
    red = x.expand(-1, 3, -1, -1) * torch.tensor([1, 0.5, 0.2]).view(3, 1, 1)
    grey = lib.make_views([red] * 3, "perm", u, (1, 1))
    assert ((grey[:, 0] - grey[:, 1]).abs().amax((1, 2)) < 1e-5).nonzero().tolist() == [[7]]


def test_flip_mirrors_half_of_the_images():
    x, u = rand(20, 1, 8, 8), rand(20, seed=3)
    out = lib.flip(x, u)
    for i in range(20):
        assert torch.equal(out[i], x[i].flip(-1) if u[i] < 0.5 else x[i])
    assert 4 < (u < 0.5).sum() < 16


def test_draws_of_a_step_are_one_uniform_block_of_seed_and_step():
    """The parts have their shapes, share no number, lie in [0, 1), and follow from (seed, step) alone."""
    t, flips, u = lib.draw_step(3, 7, 3, 5)
    assert t.shape == (5,) and flips.shape == (3, 5) and u.shape == (11, 60)
    every = torch.cat([t, flips.flatten(), u.flatten()])
    assert 0 <= every.min() and every.max() < 1 and len(every.unique()) == len(every)
    torch.manual_seed(9)
    again = lib.draw_step(3, 7, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip((t, flips, u), again, strict=True))
    assert not any(torch.equal(lib.draw_step(*other, 3, 5)[2], u) for other in ((3, 8), (4, 7)))


@pytest.mark.parametrize("C", [1, 3])
def test_augment_with_neutral_draws_changes_nothing(C):
    x = rand(2, C, 9, 9)
    assert torch.allclose(lib.augment(x, neutral()), x, atol=1e-5)


def test_jitter_has_its_ranges_and_its_rate(monkeypatch):
    """Hue +-0.1, saturation and value 0.6 to 1.4, for 80% of the rows; the others are left alone."""
    seen = []
    monkeypatch.setattr(lib, "jitter_hsv", lambda x, *factors: seen.extend(factors) or x)
    lib.augment(rand(2000, 3, 2, 2), rand(11, 2000, seed=1))
    for factor, middle, most in zip(seen, (0, 1, 1), (0.1, 0.4, 0.4), strict=True):
        away = (factor.flatten() - middle).abs()
        assert 0.97 * most < away.max() <= most + 1e-6 and 0.17 < (away == 0).float().mean() < 0.23
    assert (seen[0] < 0).any() and (seen[0] > 0).any()


def test_hsv_jitter_agrees_with_colorsys():
    x = rand(2, 3, 4, 4)
    out = lib.augment(x, neutral(jitter=0, hue=0.85, saturation=0.75, value=0.25))
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
    turned = lib.jitter_hsv(x, one * 1.1, one, one)
    assert torch.allclose(lib.jitter_hsv(x, one * 0.1, one, one), turned, atol=1e-4)
    grey = rand(1, 1, 5, 5).expand(1, 3, 5, 5)
    assert torch.allclose(lib.jitter_hsv(grey, one * 0.1, one * 1.4, one), grey, atol=1e-6)
    assert lib.jitter_hsv(torch.zeros(1, 3, 2, 2), one * 0.1, one, one).abs().max() == 0


def test_grey_and_contrast_agree_with_torchvision():
    x = rand(2, 3, 6, 6)
    assert torch.allclose(lib.augment(x, neutral(grey=0.1)), TF.rgb_to_grayscale(x, 3), atol=2e-3)
    one = rand(2, 1, 6, 6)
    for first in (0.2, 0.8):                                               # before the other jitter, or after
        out = lib.augment(one, neutral(jitter=0, contrast=0.125, first=first))
        assert torch.allclose(out, TF.adjust_contrast(one.expand(2, 3, 6, 6), 0.7)[:, :1], atol=1e-3)
    low, high = (lib.augment(one, neutral(jitter=0, contrast=0, value=1, first=f)) for f in (0.2, 0.8))
    assert not torch.allclose(low, high, atol=0.01)                             # clamped at other places


def test_crop_agrees_with_cutting_and_resizing():
    """The lower right quarter, cut by hand and enlarged bilinearly, away from its border."""
    x = rand(1, 1, 16, 16)
    out = lib.augment(x, neutral(y=1.0, x=1.0), (0.25, 0.25))                   # aspect u 0.5 is a square
    by_hand = F.interpolate(x[..., 8:, 8:], (16, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(out[..., 1:-1, 1:-1], by_hand[..., 1:-1, 1:-1], atol=1e-5)


def test_crops_have_the_drawn_area_and_aspect_and_lie_inside():
    """Read off what is cropped: an image whose channels are its own coordinates."""
    axis = (torch.arange(64) + 0.5) / 64
    image = torch.stack([axis[:, None].expand(64, 64), axis[None].expand(64, 64), torch.zeros(64, 64)])
    u = rand(11, 1000, seed=1)
    u[0], u[6] = 0.9, 0.9                                                       # no jitter, no grey
    out = lib.augment(image.expand(1000, 3, 64, 64), u)
    h = (out[:, 0, 40, 32] - out[:, 0, 24, 32]) * 4                             # 16 of 64 rows apart
    w = (out[:, 1, 32, 40] - out[:, 1, 32, 24]) * 4
    assert torch.allclose(h * w, 0.08 + 0.92 * u[7], atol=0.02)
    small = h * w < 0.5
    assert torch.allclose((w / h)[small], (3 / 4 * (16 / 9) ** u[8])[small], atol=0.05)
    cy, cx = out[:, 0, 31:33, 32].mean(1), out[:, 1, 32, 31:33].mean(1)
    assert torch.allclose(cy, 0.5 + (u[9] - 0.5) * (1 - h), atol=0.02)
    assert torch.allclose(cx, 0.5 + (u[10] - 0.5) * (1 - w), atol=0.02)


def test_one_draw_serves_a_whole_batch():
    x, u = rand(4, 3, 8, 8), rand(11, 1, seed=3)
    together = lib.augment(x, u, (0.54, 0.54))
    for i in range(4):
        assert torch.allclose(together[i:i + 1], lib.augment(x[i:i + 1], u, (0.54, 0.54)), atol=1e-6)


def test_augment_treats_each_image_by_its_own_draw():
    x, u = rand(1, 3, 8, 8).expand(6, 3, 8, 8), rand(11, 6, seed=5)
    out = lib.augment(x, u)
    for i in range(6):
        assert torch.allclose(out[i:i + 1], lib.augment(x[:1], u[:, i:i + 1]), atol=1e-5)
    assert (out[0] - out[1]).abs().mean() > 0.01


# The dissolved view ----------------------------------------------------------------------------------------


def test_small_images_are_padded_and_cropped_back():
    """28 px images are dissolved on a 32 px canvas with black around them, and come back at 28 px."""
    seen = []

    def unet(x, t):
        seen.append(x)
        return torch.zeros_like(x)

    x, abar, t = rand(2, 1, 28, 28) * 0.5 + 0.25, torch.ones(1000), torch.tensor([50, 60])
    out = lib.dissolve_view(x, 28, "diffusion", unet, t, abar, 32)
    assert torch.allclose(out, x, atol=1e-6)
    assert seen[0].shape == (2, 1, 32, 32)
    assert (seen[0][:, :, :2] == -1).all() and (seen[0][..., -2:] == -1).all()
    assert lib.pad_to(x, 33).shape[-1] == 33 and all(torch.equal(lib.pad_to(x, size), x) for size in (28, 8))


def test_dissolving_happens_in_minus_one_to_one():
    """The UNet sees 2x - 1 (the released code fed it [0, 1]), and takes away in that scale."""
    x, t, abar = torch.full((1, 1, 32, 32), 0.75), torch.tensor([100]), lib.alpha_bar()
    a = abar[100].item()
    out = lib.dissolve_view(x, 32, "diffusion", lambda x, t: x, t, abar)        # eps = x = 0.5
    expected = (0.5 * ((1 / a) ** 0.5 - (1 / a - 1) ** 0.5) + 1) / 2
    assert torch.allclose(out, torch.full_like(x, expected), atol=1e-5)


def test_the_dissolved_view_is_scaled_to_the_images_size():
    """Up bilinearly, each image with its own t; down antialiased where the images are the smaller ones."""
    x, t, abar = rand(2, 3, 32, 32), torch.tensor([40, 900]), lib.alpha_bar()
    small = lib.dissolve_view(x, 32, "diffusion", lambda x, t: 0.1 * x, t, abar)
    out = lib.dissolve_view(x, 64, "diffusion", lambda x, t: 0.1 * x, t, abar)
    assert torch.equal(out, F.interpolate(small, (64, 64), mode="bilinear", align_corners=False))
    alone = lib.dissolve_view(x[:1], 32, "diffusion", lambda x, t: 0.1 * x, t[:1], abar)
    assert torch.allclose(small[:1], alone)
    down = lib.dissolve_view(x, 16, "resize")
    assert torch.allclose(down, F.interpolate(x, (16, 16), mode="bilinear", antialias=True))


def test_modes_without_diffusion_act_at_the_size_they_are_given():
    x = rand(2, 1, 28, 28)
    median = torch.from_numpy(np.stack([median_filter(i[0].numpy(), 7, mode="mirror") for i in x]))[:, None]
    assert torch.equal(lib.dissolve_view(x, 28, "median"), median)       # no black frame, whatever the canvas
    assert torch.equal(lib.dissolve_view(x, 28, "resize"), x)
    blurred = np.stack([gaussian_filter(i[0].numpy(), 1.4, mode="mirror", radius=3) for i in x])
    assert np.allclose(lib.dissolve_view(x, 28, "gaussian")[:, 0], blurred, atol=1e-5)
    flat = torch.full((1, 1, 32, 32), 0.3)
    for mode in ("resize", "gaussian", "median"):
        assert torch.allclose(lib.dissolve_view(flat, 64, mode), torch.full((1, 1, 64, 64), 0.3), atol=1e-5)
    with pytest.raises(ValueError, match="dissolve mode"):
        lib.dissolve_view(x, 28, "copy")


# Contrastive loss ------------------------------------------------------------------------------------------


def loss_by_loops(z, views, tau, twins):
    """Eq. 6-7, one pair at a time."""
    N, total = len(z) // views, 0.0
    z = z / z.norm(dim=1, keepdim=True)
    for i in range(2 * N):
        denominator = 0.0
        for j in range(views * N):
            is_twin = j >= 2 * N and j - 2 * N == i % N
            if j != i and not (is_twin and twins == "excluded"):
                denominator = denominator + torch.exp(z[i] @ z[j] / tau)
        j = i + N if i < N else i - N
        total = total - torch.log(torch.exp(z[i] @ z[j] / tau) / denominator)
    return total / (views * N)


@pytest.mark.parametrize("views, twins", [(3, "negative"), (3, "excluded"), (2, "negative")])
@pytest.mark.parametrize("tau", [0.5, 0.2])
def test_loss_equals_the_loops_with_gradients(views, twins, tau):
    z = torch.randn(views * 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = z.float().requires_grad_(), z.clone().requires_grad_()
    fast, slow = lib.contrastive_loss(a, views, tau, twins), loss_by_loops(b, views, tau, twins)
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


# Score -----------------------------------------------------------------------------------------------------


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
    assert parts["con"].mean().item() == pytest.approx(-1, abs=1e-4)
    assert parts["cls"].mean().item() == pytest.approx(-1, abs=1e-4)
    for chunk in (1, 3, 1000):
        assert torch.allclose(lib.csi_parts(stats, z, logits, chunk)["csi"], parts["csi"], atol=1e-5)


def test_an_untrained_classifier_is_left_out_with_a_warning():
    z, logits, _ = fitted()
    with pytest.warns(UserWarning, match="left out"):
        stats = lib.csi_fit(z, logits - 10)
    assert (stats["v"] == 0).all()


def test_embedding_is_independent_of_batch_and_order():
    """A score depends on its image and the run: not on its batch, order, or other images."""
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


def test_embedding_is_the_mean_over_passes_of_shifted_and_augmented_images(monkeypatch):
    """Written out: pass p under shift k has its own draw (p, k); flip, S_k, then T with crops of 0.54."""
    monkeypatch.setattr(lib, "has_bfloat16", lambda device: False)
    torch.manual_seed(0)
    encoder, images = lib.Encoder(1, stem="cifar").eval(), (rand(3, 1, 16, 16) * 255).to(torch.uint8)
    z, logits = lib.embed(encoder, images, "rotate", 2, torch.device("cpu"))
    x = images.float() / 255
    for k in range(4):
        each = []
        for p in range(2):
            u = torch.rand(12, 1, generator=lib.step_generator("cpu", 0, "test-time view", p * 4 + k))
            turned = torch.rot90(lib.flip(x, u[0]), k, (-2, -1))
            each.append(encoder(lib.augment(turned, u[1:], (0.54, 0.54))))
        for found, i in ((z, 0), (logits, 1)):
            assert torch.allclose(found[:, k], (each[0][i] + each[1][i]).detach() / 2, atol=1e-5)


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


def test_auroc_interval_covers_at_its_rate():
    """Of 200 samples from two normals one apart (AUROC 0.7602), 95% of the intervals hold the truth, to
    within three standard errors: 90.4 to 99.6%."""
    rng, hits, labels = np.random.default_rng(1), 0, np.array([0] * 40 + [1] * 40)
    for _ in range(200):
        low, high = auroc_interval(labels, rng.normal(labels, 1))[1]
        hits += low <= 0.7602 <= high
    assert 0.904 <= hits / 200 <= 0.996


def test_within_groups_needs_both_labels():
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.9, 0.8, 0.2, 0.5])
    assert within_groups(labels, scores, ["a", "a", "b", "b", "c"]) == {"a": 1.0, "b": 0.0}


# Optimizer -------------------------------------------------------------------------------------------------


def test_lars_equals_the_textbook():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.bias)                                        # norm 0: local rate 1
    weights = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in weights]
    optimizer = train_dia.LARS(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(rand(4, 3, seed=step)).square().sum().backward()
        for i, p in enumerate(model.parameters()):
            w, g = weights[i], p.grad
            local = 0.001 * w.norm() / (g.norm() + 1e-6 * w.norm() + 1e-8) if w.norm() > 0 else 1.0
            buffers[i] = 0.9 * buffers[i] + local * (g + 1e-6 * w)
            weights[i] = w - 0.5 * buffers[i]
        optimizer.step(torch.tensor(0.5))
        for w, p in zip(weights, model.parameters(), strict=True):
            assert torch.allclose(w, p, atol=1e-6)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train_dia.learning_rate(s, 1000, 2.0) for s in range(1000)]
    assert rates[0] == pytest.approx(2 * 0.19) and rates[9] == pytest.approx(2) == max(rates)
    assert rates[-1] < 1e-4 and train_dia.learning_rate(505, 1000, 2.0) == pytest.approx(1, abs=1e-2)


def test_readable_numbers():
    """Similarities of positives, twins and other images, on embeddings where they are known."""
    B, V = 2, 3
    z = torch.eye(8)[None, :4 * B].repeat(V, 1, 1)              # each (k, b) its own axis, equal in all views
    z[2] = -z[2]                                                     # the dissolved view points the other way
    labels = torch.arange(4).repeat_interleave(B).repeat(V)
    row = train_dia.readable(z.flatten(0, 1), F.one_hot(labels, 4).float(), labels, V)
    assert row == {"shift_acc": 1.0, "sim_positive": 1.0, "sim_other": 0.0, "sim_twin": -1.0}


def test_randomness_is_a_function_of_seed_stream_and_step():
    def draw(*key):
        return torch.rand(4, generator=lib.step_generator("cpu", *key)).tolist()
    assert draw(0, "dia", 5) == draw(0, "dia", 5)
    keys = ((0, "dia", 5), (1, "dia", 5), (0, "dia", 6), (0, "epoch", 5))
    assert len({tuple(draw(*key)) for key in keys}) == 4


def test_every_image_comes_once_an_epoch():
    batches = [lib.batch_indices(10, 3, 0, step) for step in range(6)]
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9 and first.tolist() != second.tolist()


def test_encoder_in_both_stems_keeps_its_heads_in_float32():
    """The 3x3 stem keeps the size, the 7x7 stem quarters it; z and logits are float32."""
    for stem, side in (("cifar", 32), ("imagenet", 8)):
        encoder, sizes = lib.Encoder(3, stem=stem), []
        first = encoder.backbone.layer1
        first.register_forward_hook(lambda module, args, out, s=sizes: s.append(out.shape[-1]))
        with torch.autocast("cpu", torch.bfloat16):
            z, logits = encoder(rand(4, 3, 32, 32))
        assert z.shape == (4, 128) and logits.shape == (4, 4) and z.dtype == logits.dtype == torch.float32
        assert sizes == [side]
    with pytest.raises(ValueError, match="stem"):
        lib.Encoder(3, stem="none")


def test_views_networks_and_losses_never_leave_the_gpu(monkeypatch):
    """Shapes only, on a pretended CUDA device: a host read, or a tensor left on the CPU, raises here as it
    would stall there. Not covered, since they talk to the driver: copies of `send`, the backward pass."""
    monkeypatch.setattr(lib, "autocast", lambda device: contextlib.nullcontext())
    with FakeTensorMode():
        with torch.device("cuda"):
            encoder, unet, abar = lib.Encoder(3), lib.UNet(3, 8), lib.alpha_bar()
            x, t, labels = torch.empty(4, 3, 64, 64), torch.zeros(4).long(), torch.zeros(48).long()
            small, flips, u = torch.empty(4, 3, 32, 32), torch.empty(3, 4), torch.empty(11, 48)
        third = lib.dissolve_view(lib.flip(small, flips[2]), 64, "diffusion", unet, t, abar)
        x = lib.make_views([lib.flip(x, flips[0]), lib.flip(x, flips[1]), third], "perm", u, (0.08, 1))
        z, logits = encoder(x)
        loss = lib.contrastive_loss(z) + F.cross_entropy(logits, labels)
        for p in encoder.parameters():
            p.grad = torch.empty_like(p)
        train_dia.LARS(encoder.parameters()).step(torch.empty(()))
        assert loss.device.type == "cuda" and loss.shape == ()
        with pytest.raises(DataDependentOutputException):                   # so that this test can fail
            loss.item()
        with pytest.raises(RuntimeError, match="cpu"):
            z + torch.zeros(48, 128)


def test_a_copy_of_the_model_is_not_needed_to_evaluate():
    """embed() leaves weights and batch norm statistics as they were."""
    encoder = lib.Encoder(1, stem="cifar")
    before = copy.deepcopy(encoder.state_dict())
    lib.embed(encoder, torch.zeros(3, 1, 16, 16, dtype=torch.uint8), "perm", 1, torch.device("cpu"))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
