"""CKAAD: network, losses, its theorem's alignment, maps, pixel metrics; command line, resume, mistakes."""

import csv
import json
import shutil
from argparse import ArgumentTypeError, Namespace

import numpy as np
import pytest
import torch
from conftest import call, flat, log_of
from PIL import Image
from scipy import ndimage
from sklearn.metrics import auc, roc_auc_score
from torch import nn

from extras import heat_maps
from weakly_supervised import ckaad, common


def maps_of(n, channels=(8, 16), side=8, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, side // 2 ** i, side // 2 ** i, generator=generator) + shift
            for i, c in enumerate(channels)]


class Maps(list):
    """Maps in the place of images: their length is the number of images."""

    def __len__(self):
        return len(self[0])


def as_numpy(maps):
    return [m.numpy() for m in maps]


# The mathematics --------------------------------------------------------------------------------------------


def test_autoencoder_has_the_papers_size_and_shapes():
    """ResNet-18's layers 2 and 3 at 256 px: 13.5 million weights; reconstructions have the maps' shapes."""
    net = ckaad.AutoEncoder([128, 256])
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(13.5, abs=0.05)
    maps = [torch.rand(2, 128, 32, 32), torch.rand(2, 256, 16, 16)]
    assert [m.shape for m in net(maps)] == [m.shape for m in maps] and min(m.min() for m in net(maps)) >= 0
    three = maps_of(2, (4, 8, 12), 16)
    found = ckaad.AutoEncoder([4, 8, 12], signed=True)(three)
    assert [m.shape for m in found] == [m.shape for m in three] and max(m.min() for m in found) < 0
    torch.manual_seed(0)
    plain = ckaad.AutoEncoder([8, 16])
    torch.manual_seed(0)
    scaled = ckaad.AutoEncoder([8, 16], sizes=[0.5, 4.0])           # maps of another scale are the same to it
    maps = maps_of(2)
    for m, f in zip(plain(maps), scaled([maps[0] * 0.5, maps[1] * 4.0]), strict=True):
        assert torch.allclose(m, f, atol=1e-5)


def test_reconstruction_loss_is_the_cosine_of_whole_maps():
    maps, found = maps_of(3), maps_of(3, seed=1)
    expected = sum(1 - np.dot(m[i].ravel(), f[i].ravel()) / np.linalg.norm(m[i]) / np.linalg.norm(f[i])
                   for m, f in zip(as_numpy(maps), as_numpy(found), strict=True) for i in range(3)) / 3
    assert ckaad.reconstruction_loss(maps, found).item() == pytest.approx(expected, rel=1e-5)
    assert ckaad.reconstruction_loss(maps, maps).item() == pytest.approx(0, abs=1e-6)


def test_discriminator_loss_has_its_closed_form():
    normal, anomalous = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 7.0, 4.0])
    generated = torch.tensor([[6.0, 2.0]])
    for values in (normal, anomalous, generated):
        values.requires_grad_()
    loss = ckaad.discriminator_loss(normal, anomalous, generated, gamma=0.25, margin=5.0)
    assert loss.item() == pytest.approx(1.25 + 0.75 * (4 + 0 + 1) / 3 + 0.25 * (0 + 3) / 2)
    loss.backward()
    assert normal.grad.tolist() == [0.5, 0.5]                               # normal energy goes down,
    assert anomalous.grad.tolist() == pytest.approx([-0.25, 0, -0.25])    # that of anomalies up to the margin
    assert generated.grad.tolist() == [[0, -0.125]]
    assert ckaad.discriminator_loss(normal, None, generated, gamma=1.0).item() == pytest.approx(1.25 + 1.5)
    energy = ckaad.Discriminator(8)(maps_of(2)[0])
    assert energy.shape == (2, 64) and energy.min() >= 0
    scaled = ckaad.Discriminator(8, image=True)
    assert torch.allclose(scaled(maps_of(2)[0]), scaled(maps_of(2)[0] * 7), atol=1e-5)
    assert scaled(maps_of(2)[0]).shape == (2, 1)


def test_generator_loss_has_its_closed_form():
    torch.manual_seed(0)
    normal, anomalous = maps_of(4), maps_of(2, shift=1.0, seed=1)
    for strategy in ckaad.STRATEGIES:
        model = ckaad.CKAAD([8, 16], strategy, signed=True)
        found = model.reconstruct(normal, anomalous)
        expected = plain = ckaad.reconstruction_loss(normal, [f[:4] for f in found])
        if strategy == "minus-anomaly":                                     # Eq. 4
            expected = plain - 0.1 * ckaad.reconstruction_loss(anomalous, [f[4:] for f in found])
        if model.adversarial:                                               # Eq. 13, 11
            gamma = 1 if strategy == "gan" else 0.5
            normals, anomalies, generated = (model.energies(maps) for maps in (normal, anomalous, found))
            expected = plain + 0.1 * gamma * sum(e.mean() for e in generated)
            wanted = sum(n.mean() + (1 - gamma) * (5 - a).relu().mean() + gamma * (5 - g).relu().mean()
                         for n, a, g in zip(normals, anomalies, generated, strict=True))
            loss, energies = model.discriminator_loss(normal, anomalous, found)
            assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
            each = [torch.cat(kind, 1).mean().item() for kind in (normals, anomalies, generated)]
            assert energies.tolist() == pytest.approx(each, rel=1e-5) and not energies.requires_grad
        assert model.loss(normal, anomalous, found, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)
        assert (strategy == "recon") == (expected.item() == plain.item())
    x, patch = maps_of(2)[0], ckaad.Discriminator(8)              # an energy for each position, from it alone
    assert torch.allclose(patch(x.flip(2, 3)), patch(x).flip(1), atol=1e-6)
    assert patch(x)[0].unique().numel() == 64
    gan = ckaad.CKAAD([8, 16], "gan", signed=True)                          # knows no anomalies
    losses = [gan.discriminator_loss(normal, maps_of(2, shift=s), found)[0].item() for s in (1.0, 9.0)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("strategy", ["gan", "image", "patch"])
def test_each_loss_moves_its_own_network_alone(strategy):
    model = ckaad.CKAAD([8, 16], strategy, signed=True)
    normal, anomalous = maps_of(4), maps_of(2, shift=1.0)
    found = model.reconstruct(normal, anomalous)
    model.discriminator_loss(normal, anomalous, found)[0].backward()
    assert all(p.grad is None for p in model.autoencoder.parameters())
    before = [p.grad.clone() for p in model.discriminators.parameters()]
    model.loss(normal, anomalous, found, 0.1).backward()
    assert all(p.grad is not None for p in model.autoencoder.parameters())
    assert all(torch.equal(p.grad, b) for p, b in zip(model.discriminators.parameters(), before, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_reconstructions_of_anomalies_become_normal():
    """The theorem on a toy: normal patches point one way, anomalous ones another.

    Plain reconstruction has learned to copy both; after adversarial training the reconstructions of anomalies
    point the normal way, and normal ones still do.
    """
    directions = torch.eye(16)[:2] * 3

    def batch(kind, step, n=16):
        generator = torch.Generator().manual_seed(100 * step + kind)
        noise = torch.randn(n, 16, 4, 4, generator=generator) * 0.3
        if kind == 0:
            return [noise + directions[0].view(1, 16, 1, 1)]
        where = torch.rand(n, 1, 4, 4, generator=generator) < 0.5       # half of an anomalous image is normal
        return [noise + torch.where(where, directions[1].view(1, 16, 1, 1), directions[0].view(1, 16, 1, 1))]

    class Mixer(nn.Module):                               # a stand-in for the auto-encoder, from the identity
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(16, 64, 1), nn.ReLU(), nn.Conv2d(64, 16, 1))

        def forward(self, maps):
            return [maps[0] + self.net(maps[0])]

    cosines = {}
    for strategy in ("recon", "patch"):
        torch.manual_seed(0)
        model = ckaad.CKAAD([16], strategy, signed=True)
        model.autoencoder = Mixer()
        optimizer = torch.optim.Adam(model.autoencoder.parameters(), 1e-2)
        critic = torch.optim.Adam(model.discriminators.parameters(), 1e-2) if model.adversarial else None
        for step in range(300):
            normal, anomalous = batch(0, step), batch(1, step)
            found = model.reconstruct(normal, anomalous)
            if critic:
                critic.zero_grad()
                model.discriminator_loss(normal, anomalous, found)[0].backward()
                critic.step()
            optimizer.zero_grad()
            model.loss(normal, anomalous, found, 0.2).backward()
            optimizer.step()
        with torch.no_grad():
            x = batch(1, 999)[0]
            anomalous = x[:, 1] > 1.5                            # (n, 4, 4): patches that point the other way
            found = nn.functional.normalize(model.autoencoder([x])[0], dim=1)
            normal = nn.functional.normalize(model.autoencoder(batch(0, 999))[0], dim=1)
        cosines[strategy] = (found[:, 0][anomalous].mean().item(), normal[:, 0].mean().item())
    assert cosines["recon"][0] < 0.5 and cosines["patch"][0] > 0.75
    assert min(cosines["recon"][1], cosines["patch"][1]) > 0.9


def test_maps_and_scores_equal_a_loop():
    maps, found = maps_of(2), maps_of(2, seed=1)
    of_layers = ckaad.anomaly_maps(maps, found)
    for m, f, a in zip(maps, found, of_layers, strict=True):
        for i in range(m.shape[2]):
            for j in range(m.shape[3]):
                u, v = m[1, :, i, j].numpy(), f[1, :, i, j].numpy()
                expected = 1 - u @ v / np.linalg.norm(u) / np.linalg.norm(v)
                assert a[1, i, j].item() == pytest.approx(expected, abs=1e-5)
    size, whole = 32, np.zeros((32, 32))
    for a in of_layers:                                                     # corners on corners, bilinear
        side = a.shape[1]
        at = np.linspace(0, side - 1, size)
        rows = np.array([np.interp(at, range(side), a[1, i]) for i in range(side)])             # (side, size)
        whole += np.array([np.interp(at, range(side), rows[:, j]) for j in range(size)]).T
    smooth = ndimage.gaussian_filter(whole, 0.5, mode="mirror", truncate=4.0)
    scores = ckaad.image_scores(ckaad.whole_map(of_layers, size))
    assert scores[1].item() == pytest.approx(np.sort(smooth.ravel())[-2:].mean(), rel=5e-3)
    ramp = torch.linspace(0, 1, 256).expand(1, 256, 256)         # at 256 px the mean of the highest 100 of it
    assert ckaad.image_scores(ramp[:, None]).item() == pytest.approx(1, abs=0.02)
    spot = torch.zeros(1, 256, 256)
    spot[:, 100:150, 100:150] = 1
    spot[:, 120:124, 120:145] = 9                                           # 100 pixels, smoothed
    smooth = ndimage.gaussian_filter(spot[0].numpy(), 4, mode="mirror")
    expected = np.sort(smooth.ravel())[-100:].mean()
    assert ckaad.image_scores(spot[:, None]).item() == pytest.approx(expected, rel=1e-3)
    assert ckaad.image_scores(ckaad.whole_map([m[:, :1, :1] for m in of_layers], 8)).shape == (2,)


def test_scores_and_maps_are_those_of_the_reconstructions():
    torch.manual_seed(0)
    setting = Namespace(features=as_numpy, device=torch.device("cpu"), size=32)
    maps, model = maps_of(5), ckaad.CKAAD([8, 16], signed=True).eval()
    scores, whole = ckaad.scorer(setting, model, batch=2)(Maps(maps))
    with torch.no_grad():
        expected = ckaad.whole_map(ckaad.anomaly_maps(maps, model.autoencoder(maps)), 32)
    torch.testing.assert_close(whole.view(5, 1, 32, 32), expected, atol=1e-5, rtol=0)       # other batches
    torch.testing.assert_close(scores, ckaad.image_scores(expected), atol=2e-2, rtol=0)
    assert scores.std() > 0.05                                      # so that the tolerance tells images apart
    smooth = heat_maps.smoothed(whole[0].view(1, 1, 32, 32))
    assert heat_maps.heat_map(whole[0], 32).max() == pytest.approx(smooth.max())
    none = ckaad.scorer(setting, model)(Maps([m[:0] for m in maps]))
    assert none[0].shape == (0,) and none[1].shape == (0, 1)


@pytest.mark.parametrize("text", ["5", "0%", "100%", "-1%", "many%", "nan%"])
def test_a_share_is_per_cent(text):
    assert common.percent("5%") == 0.05 and common.percent("0.1%") == 0.001
    with pytest.raises(ArgumentTypeError, match="as 5%"):
        common.percent(text)


def test_distorted_images_are_moved_by_a_share_of_their_side():
    for side in (16, 64, 256):
        x = torch.linspace(0, 255, side).round().to(torch.uint8)            # position is brightness
        x = x.expand(2, 1, side, side)
        state = torch.get_rng_state()
        found = ckaad.distorted(x, 3)
        assert torch.equal(torch.get_rng_state(), state) and torch.equal(found, ckaad.distorted(x, 3))
        assert not torch.equal(found, ckaad.distorted(x, 4)) and not torch.equal(found[0], found[1])
        inside = slice(side // 8, -(side // 8))
        moved = (found.float() - x.float())[..., inside, inside].std() / 255
        assert 0.009 < moved < 0.018, (side, moved)


def test_pixel_metrics_equal_a_count():
    """Over every threshold, the share of each region found, and the false-positive rate; area up to 0.3."""
    rng = np.random.default_rng(0)
    masks = torch.zeros(3, 12, 12, dtype=torch.bool)
    masks[0, 2:4, 2:9] = masks[0, 8:11, 1:3] = masks[1, 5, 5] = masks[1, 6, 6] = True          # three regions
    heat = torch.from_numpy(rng.normal(size=(3, 12, 12)) + masks.numpy() * 0.2)
    heat[1][masks[1]] += 3                                                 # the smallest region is found best
    regions = [(0, slice(2, 4), slice(2, 9)), (0, slice(8, 11), slice(1, 3)), (1, [5, 6], [5, 6])]
    rates, found = [0.0], [0.0]
    for threshold in sorted(heat.flatten().tolist(), reverse=True):
        over = heat >= threshold
        rates.append((over & ~masks).sum().item() / (~masks).sum().item())
        found.append(np.mean([over[r].float().mean().item() for r in regions]))
    at = np.searchsorted(rates, 0.3)
    rates, found = np.array(rates), np.array(found)
    end = np.interp(0.3, rates, found)
    area = auc(np.append(rates[:at], 0.3), np.append(found[:at], end)) / 0.3
    metrics = heat_maps.pixel_metrics(heat, masks)
    assert metrics["pro"] == pytest.approx(area, abs=1e-7)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks.flatten(), heat.flatten()))
    assert heat_maps.pixel_metrics(masks.float(), masks)["pro"] == pytest.approx(1)


def test_masks_keep_thin_anomalies_and_may_be_of_ones(tmp_path):
    """One pixel of 64 in each direction, halved and quartered; masks of 0 and 1; empty ones."""
    file = tmp_path / "ground_truth/scratch/000_mask.png"
    file.parent.mkdir(parents=True)
    for high in (1, 255):
        mask = np.zeros((64, 64), np.uint8)
        mask[20:44, 31] = high
        Image.fromarray(mask).save(file)
        for size in (64, 32, 16):
            if high == 1 and size < 64:
                continue                                           # 1 of 255 is nothing once it is shared out
            found = heat_maps.mask_of(tmp_path, "test/scratch/000.png", size)
            rows, columns = found.nonzero().unbind(1)
            assert (columns + 0.5 - 31.5 * size / 64).abs().max() < 1
            assert abs(len(set(rows.tolist())) - 24 * size / 64) <= 1
    Image.fromarray(mask * 0).save(file)
    assert heat_maps.mask_of(tmp_path, "test/scratch/000.png", 64) is None
    assert heat_maps.mask_of(tmp_path, "test/scratch/001.png", 64) is None


# The command line -------------------------------------------------------------------------------------------


FEW = ["--layers", 1, 2, "--image-size", 64, "--epochs", 3, "--batch-size", 8]


@pytest.fixture(scope="module")
def masked(folder, tmp_path_factory):
    """The folder of tiles with a ground_truth for its scratches: where an image is dark."""
    root = shutil.copytree(folder, tmp_path_factory.mktemp("masked") / "tiles")
    for path in sorted((root / "test/scratch").iterdir()):
        mask = root / "ground_truth/scratch" / f"{path.stem}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((np.asarray(Image.open(path)) < 60) * 255).astype(np.uint8)).save(mask)
    return root


def test_ckaad_from_the_command_line(tiny, masked, chain, tmp_path, monkeypatch, capsys):
    args = ["--data", masked, *tiny[2:], *FEW]
    real, given = heat_maps.pixel_metrics, []
    monkeypatch.setattr(common, "pixel_metrics", lambda *maps: given.append(maps) or real(*maps))
    assert call(ckaad, *args, "--shots", 2, 6, "--out", tmp_path / "a", "--maps") is None
    printed = capsys.readouterr().out
    found = {k: json.loads((tmp_path / f"a/shots-{k}/metrics.json").read_text()) for k in (2, 6)}
    assert printed.splitlines()[-1] == f"auroc {found[6]['auroc']:.4f}" and "PRO" in printed
    for k, metrics in found.items():
        rows = list(csv.DictReader((tmp_path / f"a/shots-{k}/scores.csv").open()))
        assert len(metrics["shots"]) == k and len(rows) == 30 - k
        assert not set(metrics["shots"]) & {r["path"] for r in rows}
        scores, labels = [float(r["score"]) for r in rows], [int(r["label"]) for r in rows]
        assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, scores)) and 0 < metrics["pro"] <= 1
        heat, masks = given.pop(0)                       # of scratches and normals; of dents there is no mask
        files = sorted(masked.joinpath("ground_truth/scratch").iterdir())
        files = [np.asarray(Image.open(f).resize((64, 64), Image.Resampling.BILINEAR)) > 127 for f in files
                 if any(r["path"] == f"test/scratch/{f.stem.removesuffix('_mask')}.png" for r in rows)]
        assert len(heat) == len(masks) == 12 + len(files) and masks.flatten(1).any(1).sum() == len(files)
        assert all(any(np.array_equal(mask, f) for f in files) for mask in masks.numpy() if mask.any())
    log = log_of(tmp_path / "a/shots-6")
    assert [r["step"] for r in log if r["stage"] == "ckaad"] == [1, 2, 3] and log[2]["loss"] < log[0]["loss"]
    assert len({log[0][name] for name in ckaad.ENERGIES}) == 3
    assert all(log[0][name] < 5 for name in ckaad.ENERGIES)
    state = {}
    for name, extra in (("same", []), ("recon", ["--strategy", "recon"]),
                        ("minus", ["--strategy", "minus-anomaly"]), ("gan", ["--strategy", "gan"]),
                        ("image", ["--strategy", "image"]), ("weight", ["--lambda", 0.5]),
                        ("critic", ["--critic-lr", 0.01]),
                        ("dent", ["--anomaly-class", "dent", "--shots", 3]), ("none", ["--shots", 0]),
                        ("share", ["--labelled", "20%"])):
        shots = [] if name in ("recon", "share") else ["--shots", 6]
        assert call(ckaad, *args, *shots, *extra, "--out", tmp_path / name) is None, name
        state[name] = torch.load(tmp_path / name / "ckaad.pt", weights_only=True)
    first = flat(torch.load(tmp_path / "a/shots-6/ckaad.pt", weights_only=True)["model"])
    assert all(torch.equal(v, first[k]) for k, v in flat(state["same"]["model"]).items())
    assert (tmp_path / "same/scores.csv").read_text() == (tmp_path / "a/shots-6/scores.csv").read_text()
    weights = [s["model"]["autoencoder.bottleneck.0.body.0.weight"].sum().item() for s in state.values()]
    assert len(set(weights)) == len(state)
    shots = {name: len(json.loads((tmp_path / name / "metrics.json").read_text())["shots"]) for name in state}
    normals = 40 - round(40 * 0.3)
    assert shots["recon"] == shots["none"] == 0 and abs(shots["share"] - normals / 4) < 2
    assert shots["dent"] == 3
    assert "critic" not in state["recon"] and "critic" in state["gan"]
    for name, of in (("optimizer", "autoencoder."), ("critic", "discriminators.")):      # each learns its own
        weights = [k for k in state["same"]["model"] if k.startswith(of) and not k.endswith("sizes")]
        assert len(state["same"][name]["param_groups"][0]["params"]) == len(weights) > 4
    sizes = state["same"]["model"]["autoencoder.sizes"].tolist()   # of the maps, taken from the normal images
    assert min(sizes) > 0 and sizes[0] != sizes[1]
    assert sizes == state["gan"]["model"]["autoencoder.sizes"].tolist()
    own = [*args[:2], "--holdout", 0.3, *FEW, "--backbone", f"dia:{chain}", "--shots", 2]
    assert call(ckaad, *own, "--out", tmp_path / "dia") is None


@pytest.mark.parametrize("words, flags", [
    (["--lr", 1e20], "--lr or --critic-lr"), (["--critic-lr", 1e20], "--lr or --critic-lr"),
    (["--lr", 1e20, "--strategy", "minus-anomaly"], "--lr")])
def test_diverging_names_the_rates(words, flags, tiny, tmp_path):
    said = call(ckaad, *tiny, *FEW, "--shots", 2, "--out", tmp_path / "run", *words)
    assert "the loss is nan at step" in said and said.endswith(f"Try a smaller {flags}.")
    assert not (tmp_path / "run/ckaad.pt").exists()


def test_more_labels_than_anomalies(tiny, tmp_path):
    assert "labelled anomalies are asked for, and there are 18" in call(
        ckaad, *tiny, *FEW, "--labelled", "70%", "--out", tmp_path / "run")


def test_a_stopped_run_goes_on_exactly(tiny, folder, tmp_path, monkeypatch, capsys):
    args = [*tiny, *FEW, "--epochs", 4, "--batch-size", 14, "--shots", 2]
    assert call(ckaad, *args, "--out", tmp_path / "whole") is None
    real, calls = ckaad.load, []

    def stop(*given):
        calls.append(given)
        if len(calls) == 2 * 5 + 2:                       # two loads a step; the last checkpoint is of step 4
            raise KeyboardInterrupt
        return real(*given)
    with monkeypatch.context() as m:
        m.setattr(ckaad, "load", stop)
        assert call(ckaad, *args, "--out", tmp_path / "cut") == 130
    assert "go on with --resume" in call(ckaad, *args, "--out", tmp_path / "cut")
    said = call(ckaad, *args, "--epochs", 5, "--resume", "--out", tmp_path / "cut")
    assert "made with --epochs 4, not 5" in said
    assert call(ckaad, *args, "--resume", "--out", tmp_path / "cut") is None
    whole, cut = (torch.load(tmp_path / name / "ckaad.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(v, flat(cut["model"])[k]) for k, v in flat(whole["model"]).items())
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole") and whole["step"] == cut["step"]
    assert (tmp_path / "cut/scores.csv").read_text() == (tmp_path / "whole/scores.csv").read_text()
    capsys.readouterr()
    assert call(ckaad, *args, "--resume", "--out", tmp_path / "cut") is None
    assert "has its results already" in capsys.readouterr().out
    assert call(ckaad, *args, "--resume", "--maps", "--out", tmp_path / "cut") is None  # asked for afterwards
    rows = list(csv.DictReader((tmp_path / "cut/scores.csv").open()))
    assert len(list((tmp_path / "cut/maps").rglob("*.png"))) == len(rows)
    assert (tmp_path / "cut/scores.csv").read_text() == (tmp_path / "whole/scores.csv").read_text()
    assert call(ckaad, *args, "--resume", "--fpr", 0.4, "--out", tmp_path / "cut") is None
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("cut", "whole")]
    assert [m["settings"]["fpr"] for m in metrics] == [0.4, 0.05]
    assert metrics[0]["auroc"] == metrics[1]["auroc"]
    fewer = shutil.copytree(folder, tmp_path / "fewer")
    for path in sorted(fewer.joinpath("train").rglob("*.png"))[:10]:        # of 40, some of which train
        path.unlink()
    said = call(ckaad, "--data", fewer, *args[2:], "--resume", "--out", tmp_path / "cut")
    assert "made with other images" in said


@pytest.mark.parametrize("words, sentence", [
    (["--layers", 2, 4], "needs neighbours"), (["--epochs", 0], "--epochs: 0: needs an integer from 1 on"),
    (["--batch-size", 300], "--batch-size 300: there are"),
    (["--lambda", -1], "from 0 on"), (["--critic-lr", 0], "--critic-lr: 0: needs a number above 0"),
    (["--lr", 0], "--lr: 0: needs a number above 0"),
    (["--strategy", "recon"], "leave --shots"), (["--strategy", "recon", "--shots", 10], "leave --shots"),
    (["--layers", 2, 3, "--image-size", 48], "the last even"), (["--image-size", 60], "half the one before"),
    (["--layers", 3, "--image-size", 32], "take a multiple of 32, from 64 on"),
    (["--layers", 3, 4, "--image-size", 160], "take a multiple of 64, from 128 on"),
    (["--shots", 18], "from 0 to 17"),
    (["--labelled", "20%"], "leave one of them out"),
    (["--labelled", "20%", "--shots", 10], "leave one of them out"),
    (["--anomaly-class", "bent"], "are dent, scratch"),
    (["--anomaly-class", "bent", "--shots", 0], "are dent, scratch")])
def test_what_is_asked_wrongly_is_said(words, sentence, tiny, tmp_path):
    assert sentence in call(ckaad, *tiny, *FEW, "--shots", 2, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
