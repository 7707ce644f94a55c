"""Images of one's own, decisions with a guarantee, settings chosen without anomalies, pictures and tables."""

import base64
import contextlib
import csv
import dataclasses
import io
import json
import re
import math
import os
import shutil
import sys
from html import escape, unescape

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import STAGE2, call, texture
from PIL import Image
from scipy.stats import beta, kstest
from sklearn.metrics import roc_auc_score

import dia_lib
import evaluate
import train_dia
from dia_lib import load_data
from extras import choose, decisions, local, predict, report, tables
from weakly_supervised import nearest

CPU = torch.device("cpu")


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- Decisions -------------------------------------------------------------------------------------------


def test_p_values_count_the_calibration_images_that_are_at_least_as_anomalous():
    p = decisions.p_values(np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 1.5, 2.0, 3.0, 9.0]))
    assert np.allclose(p, np.array([5, 5, 4, 4, 2, 1]) / 5)
    assert np.isnan(decisions.p_values(np.empty(0), np.ones(2))).all()


def test_p_values_of_normals_are_uniform_and_decisions_keep_their_rate():
    """n = 59 calibration images and one new normal, drawn alike 20,000 times: p is uniform on 1/60 ... 1."""
    rng = np.random.default_rng(0)
    p = np.array([decisions.p_values(s[1:], s[:1])[0] for s in rng.normal(size=(20_000, 60))])
    counts = np.bincount((p * 60).round().astype(int), minlength=61)[1:]
    assert counts.sum() == 20_000
    assert kstest(p - rng.uniform(size=len(p)) / 60, "uniform").pvalue > 0.01
    for fpr in (0.01, 0.05, 0.2):
        noise = 4 * math.sqrt(0.2 * 0.8 / 20_000)
        rate = (p <= fpr).mean()
        assert abs(rate - decisions.expected_rate(fpr, 59)) < noise and rate <= fpr + noise


def test_too_few_calibration_images_are_said_and_decide_nothing():
    assert decisions.impossible(19, 0.05) is None and decisions.impossible(99, 0.01) is None
    assert "needs 19" in decisions.impossible(18, 0.05) and "held out" in decisions.impossible(0, 0.05)
    assert decisions.columns_of(np.array([0.05, 0.5]), 0.05, 19) == [["0.05", "0.5"], [1, 0]]
    assert decisions.columns_of(np.array([0.1, 0.5]), 0.05, 9) == [["0.1", "0.5"], ["", ""]]
    assert decisions.columns_of(np.array([np.nan]), 0.05, 0) == [[""], [""]]


def test_decisions_have_exact_intervals():
    calibration, labels = np.arange(59), np.array([0, 0, 0, 1, 1, 1])
    scores = np.array([58.5, 29.5, 23.5, 56.5, 57.5, 5.5])                      # p: 1, 30, 36, 3, 2, 54 of 60
    found = decisions.decisions(calibration, scores, labels, 0.05)
    assert found["expected_false_positive_rate"] == 3 / 60 and found["threshold"] == 56
    assert decisions.expected_rate(0.29, 99) == 0.29                            # 0.29 * 100 is 29, not 28.99
    assert found["false_positive_rate"] == 1 / 3 and found["sensitivity"] == 2 / 3
    exact = [beta.ppf(0.025, 1, 3), beta.ppf(0.975, 2, 2)]
    assert found["false_positive_rate_interval_95"] == pytest.approx(exact)
    assert decisions.rates_of(found).startswith("false positive rate 0.333 (0.008 to 0.906)  sensitivity ")
    none = decisions.decisions(calibration, scores, labels, 0.01)
    assert none["expected_false_positive_rate"] == 0 and none["threshold"] is None
    assert decisions.decisions(np.empty(0), scores, labels, 0.1) is None


def test_the_highest_rate_is_kept_by_19_of_20_sets_of_calibration_images():
    """n = 60 uniform scores: the rate of a set is the share above its threshold. Beta's 95% point."""
    rng, found = np.random.default_rng(0), decisions.highest_rate(0.05, 60)
    rates = np.array([1 - decisions.threshold(rng.uniform(size=60), 0.05) for _ in range(4000)])
    assert (rates <= found).mean() == pytest.approx(0.95, abs=0.014)            # four standard errors
    assert rates.mean() == pytest.approx(3 / 61, abs=0.002) and decisions.highest_rate(0.05, 18) == 0
    said = decisions.promise(np.arange(60), 0.05)
    assert said == ("scores above 57, by 60 calibration normals; 0.049 of new normal images are above it on "
                    "average, for 19 of 20 such sets of normals at most 0.1")
    said = decisions.promise(np.arange(60), 0.05, True)
    assert said.endswith("; about 0.049 of new normal images are above it")
    for n, best in ((7, "0.125;"), (6, "0.143;"), (13, "0.0715;"), (1999, "0.0005;")):
        assert f"the smallest --fpr is {best}" in decisions.impossible(n, 1e-6)


# ---- Images of one's own ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans(folder, tmp_path_factory):
    """Nested, of mixed formats, sizes and modes, one trained on, one held out; a text file; a hidden file."""
    root, rng = tmp_path_factory.mktemp("own") / "scans", np.random.default_rng(5)
    (root / "ward/b").mkdir(parents=True)
    Image.fromarray(texture(rng, 60)).save(root / "a.jpg")
    coloured = np.stack([texture(rng, 33, defect) for defect in (True, False, False)], 2)
    Image.fromarray(coloured).save(root / "ward/c.bmp")
    Image.fromarray(texture(rng, 50, True)).convert("RGBA").save(root / "ward/b/line.png")
    data = load_data(str(folder), 40, ("train",), 0.3)
    for name, image in (("known", data.train[0]), ("held", data.held[0])):
        Image.fromarray(image[0].numpy()).save(root / f"{name}.png")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_text("no image either")
    return root


@pytest.fixture(scope="module")
def scored(chain, scans, folder, tmp_path_factory):
    """A run's folder, scans scored there with the training data at hand, then without; and the print."""
    out = shutil.copytree(chain, tmp_path_factory.mktemp("scored") / "run")
    words = [out, scans, "--passes", 2, "--fpr", 0.4]
    assert call(predict, *words) is None
    (out / "stats.pt").unlink()
    away = folder.rename(folder.with_name("away"))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert call(predict, *words) is None
    finally:
        away.rename(folder)
    return out, printed.getvalue()


def test_own_images_are_scored_without_labels_and_without_the_training_data(scored):
    out, printed = scored
    to = out / "images/scans-2"                                             # of the second call
    rows = table(to / "scores.csv")
    assert rows == table(out / "images/scans/scores.csv")
    n = len(dia_lib.load_checkpoint(out / "predict.pt", "predict", "cpu")["held_scores"]["csi"])
    assert "no images: 1 files" in printed and "note: 1 of these images were trained on" in printed
    anomalies = sum(r["anomaly"] == "1" for r in rows)
    words = re.fullmatch(f"5 images: {anomalies} anomalies at --fpr 0.4 \\(scores above (.*), by {n} "
                         rf"calibration normals; .* of new normal .*\)", printed.splitlines()[-2])
    assert printed.splitlines()[-1] == f"wrote scores.csv, examples.png to {to}"
    assert [float(r["score"]) > float(words[1]) for r in rows] == [r["anomaly"] == "1" for r in rows]
    assert list(rows[0]) == ["path", "score", "p_value", "anomaly", "seen"]
    assert {r["path"] for r in rows} == {"a.jpg", "ward/c.bmp", "ward/b/line.png", "known.png", "held.png"}
    assert [float(r["score"]) for r in rows] == sorted((float(r["score"]) for r in rows), reverse=True)
    seen = {r["path"]: r["seen"] for r in rows if r["seen"]}
    assert seen == {"known.png": "training", "held.png": "held out"}
    assert all(int(r["anomaly"]) == (float(r["p_value"]) <= 0.4) for r in rows)
    assert np.asarray(Image.open(out / "images/scans/examples.png")).std() > 10


@pytest.mark.parametrize("n, fpr", [(19, 0.05), (60, 0.05), (99, 0.1), (40, 0.3)])
def test_above_the_threshold_is_the_same_as_a_small_p_value(n, fpr):
    rng = np.random.default_rng(n)
    calibration = rng.integers(0, 30, n).astype(float)                      # with ties
    scores = np.arange(-1, 31, 0.5)
    limit = decisions.threshold(calibration, fpr)
    assert np.array_equal(scores > limit, decisions.p_values(calibration, scores) <= fpr)
    assert decisions.threshold(calibration[:18], 0.05) is decisions.threshold(np.empty(0), 0.5) is None


def test_too_few_calibration_images_leave_the_column_anomaly_empty(scored, scans, tmp_path, capsys):
    assert call(predict, scored[0], scans, "--passes", 2, "--to", tmp_path) is None     # --fpr 0.05
    said = "5 images: no decisions: with 13 calibration normals the smallest --fpr is 0.0715; 0.05 needs 19"
    assert said in capsys.readouterr().out
    rows = table(tmp_path / "scores.csv")
    assert {r["anomaly"] for r in rows} == {""} and all(0 < float(r["p_value"]) <= 1 for r in rows)


@pytest.mark.parametrize("score", predict.SCORES)
def test_command_and_python_give_the_same_by_every_score(score, scored, scans, tmp_path):
    out, _ = scored
    assert call(predict, out, "--passes", 2, "--score", score, scans, "--to", tmp_path) is None
    rows = {r["path"]: r for r in table(tmp_path / "scores.csv")}
    run = predict.load_run(out, passes=2)
    images, paths = predict.load_images(scans, 40), predict.look_at(scans, None)[1]
    scores, p = run.score(images, score)
    assert np.allclose(scores, [float(rows[path]["score"]) for path in paths], atol=1e-4)
    assert np.allclose(p, [float(rows[path]["p_value"]) for path in paths], atol=1e-5)
    assert np.allclose(p, decisions.p_values(run.known["calibration"][score].numpy(), scores))
    others = [run.score(images, other)[0] for other in predict.SCORES if other != score]
    assert not any(np.allclose(scores, other, atol=1e-3) for other in others)


def test_scores_are_those_of_evaluate_for_the_same_images(scored, folder):
    """csi and cos of the test images, read as images of one's own, are the columns of scores.csv."""
    run = predict.load_run(scored[0], passes=2)
    images, paths = predict.load_images(folder / "test", 40), predict.look_at(folder / "test", None)[1]
    rows = {r["path"]: r for r in table(scored[0] / "scores.csv")}
    for score, column in (("csi", "score"), ("cos", "cos")):
        expected = [float(rows[f"test/{path}"][column]) for path in paths]
        assert np.allclose(run.score(images, score)[0], expected, atol=0.02) and np.std(expected) > 0


def test_heat_maps_of_own_images(scored, scans, tmp_path):
    """Over each image at its own size, whichever score ranks."""
    assert call(predict, scored[0], scans, "--passes", 2, "--maps", "--to", tmp_path) is None
    run = predict.load_run(scored[0], passes=2)
    for file in (f for f in scans.rglob("*") if f.suffix in (".jpg", ".bmp", ".png") and f.name[0] != "."):
        name = file.relative_to(scans)
        grid, heat = np.load(tmp_path / f"maps/{name}.npy"), run.heat_map(file)
        with Image.open(file) as image, Image.open(tmp_path / f"maps/{name}.png") as picture:
            assert picture.size == image.size == heat.shape[::-1]
        assert grid.shape == (32, 32)                                       # the dissolving size
        assert grid.min() - 2e-3 <= heat.min() and heat.max() <= grid.max() + 2e-3
    assert (tmp_path / "scores.csv").exists() and "low" in run.known and run.known["low"] < run.known["high"]


def test_heat_map_adds_up_the_local_score_and_what_dissolving_removes(scored, none_held, folder):
    """Each in units of held-out normals; the local score alone where no stage 1 was used."""
    run, data = predict.load_run(scored[0], passes=2), load_data(str(folder), 40, holdout=0.3)
    cpu, new = torch.device("cpu"), data.test[:5]
    state = dia_lib.load_checkpoint(scored[0] / "dia.pt", "dia", "cpu")
    encoder, stage1 = dia_lib.load_encoder(state, cpu), dia_lib.load_checkpoint(
        scored[0] / "diffusion.pt", "diffusion", "cpu")
    unet, abar = dia_lib.load_unet(stage1, cpu)
    x = torch.nn.functional.interpolate(new / 255, (32, 32), mode="bilinear", antialias=True)
    gone = sum((x - dia_lib.to_01(dia_lib.dissolve(unet, x * 2 - 1, torch.full((5,), t), abar))).abs()
               for t in (30, 54, 79, 104, 129)).mean(1) / 5                 # (5, 32, 32)
    assert torch.allclose(local.removed_maps(unet, abar, new, 32, (30, 130), cpu), gone.flatten(1), atol=0.01)
    maps = [[local.local_maps(run.known["local"], encoder, images, cpu),
             local.removed_maps(unet, abar, images, 32, (30, 130), cpu)] for images in (data.held, new)]
    units = []
    for of_held, of_test in zip(*maps, strict=True):
        low, high = np.quantile(of_held.numpy(), [0.5, 0.999])
        side = round(of_test.shape[1] ** 0.5)
        grid = (of_test.view(-1, 1, side, side) - low) / (2 * high - 2 * low)
        units.append(torch.nn.functional.interpolate(grid, (32, 32), mode="bilinear").flatten(1))
    found = run.parts(new, (), maps=True)[1]
    assert torch.allclose(found, units[0] + units[1], atol=0.05) and found.std() > 0.1
    csi = predict.load_run(none_held, passes=1)
    assert csi.known["stage1"] is None and csi.parts(new, (), maps=True)[1].shape[1] < 32 * 32


def test_the_page_of_another_test_set_says_what_the_run_was_trained_on(own_chain, folder, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(folder / "test", tmp_path / "new/test")
    assert call(evaluate, "--out", own_chain, "--passes", 2, "--data", tmp_path / "new") is None
    assert call(report, own_chain / "tests/new") is None
    html = (own_chain / "tests/new/report.html").read_text()
    assert "trained_on" in html and "images are of another set than the run" in html and str(folder) in html


def test_stage_1_that_comes_back_is_used_again(own_chain, folder, capsys):
    """Without it heat maps do with the local score, which is said; predict.pt is made anew with it."""
    path, grids = own_chain / "diffusion.pt", []
    state = dia_lib.load_checkpoint(own_chain / "dia.pt", "dia", "cpu")
    settings = state.pop("settings") | {"diffusion": str(path)}
    dia_lib.save_checkpoint(own_chain / "dia.pt", "dia", settings, state)
    for there in (False, False, True, False):
        if there != path.exists():
            path.rename(own_chain / "away.pt") if path.exists() else (own_chain / "away.pt").rename(path)
        run = predict.load_run(own_chain, passes=1)
        said = "is gone: heat maps do without" in capsys.readouterr().out
        grids.append(run.parts(load_data(str(folder), 40, holdout=0.3).test[:2], (), maps=True)[1].shape[1])
        assert said == (len(grids) < 3)
    assert grids[0] == grids[1] < grids[2] == grids[3] == 32 * 32


def test_held_out_normals_calibrate_but_for_those_that_something_was_chosen_by(scored, folder, tmp_path):
    data = load_data(str(folder), 40, ("train",), 0.3)
    shutil.copytree(scored[0], tmp_path / "run")
    assert 0 < data.calibration.sum() < len(data.held)
    half = data.held[data.calibration]
    for mine, chosen in ((data.held, None), (half, "."), (half, "step-1")):     # by whose log it is known
        if chosen:
            shutil.rmtree(tmp_path / "run"), shutil.copytree(scored[0], tmp_path / "run")
            dia_lib.Log(tmp_path / "run" / chosen, "choose", math.inf)(1, show=False)
        run = predict.load_run(tmp_path / "run", passes=2)
        for score in predict.SCORES:
            assert np.allclose(run.score(mine, score)[0], run.known["calibration"][score], atol=0.02)
    assert run.known["train"] == data.digests["train"].tolist()
    assert run.known["held"] == data.digests["held"].tolist()


def test_predict_pt_is_made_again_for_another_checkpoint_other_passes_or_a_broken_file(own_chain, folder):
    def scores(passes=2):
        run = predict.load_run(own_chain, "cpu", passes)
        return run, run.score(images)[0]

    images = predict.load_images(folder / "test", 40)
    _, first = scores()
    path = own_chain / "predict.pt"
    before = path.stat().st_mtime_ns
    run, again = scores()
    assert path.stat().st_mtime_ns == before and np.array_equal(first, again)           # read, not made
    scores(passes=1)
    assert dia_lib.load_checkpoint(path, "predict", "cpu")["settings"]["passes"] == 1
    path.write_bytes(path.read_bytes()[:1000])
    assert np.allclose(scores()[1], first, atol=0.02)
    state = dia_lib.load_checkpoint(own_chain / "dia.pt", "dia", "cpu")
    state["encoder"]["projection.2.weight"] *= 2
    dia_lib.save_checkpoint(own_chain / "dia.pt", "dia", state.pop("settings"), state)
    other, doubled = scores()
    assert not torch.allclose(other.known["w"], run.known["w"], rtol=0.05)
    assert not np.array_equal(doubled, first)


def test_images_of_another_type_or_size_are_refused(scored):
    run = predict.load_run(scored[0], passes=2)
    for images in (torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 32, 32, dtype=torch.uint8),
                   torch.zeros(1, 2, 40, 40, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="needs uint8"):
            run.score(images)


def files_below(*roots):
    return {p: p.stat().st_mtime_ns for root in roots for p in root.rglob("*") if p.is_file()}


def test_nothing_is_written_outside_the_target_folder(own_chain, scans, folder, tmp_path, monkeypatch):
    """The first call leaves predict.pt in the run's folder, the next one only what it was asked for."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen, to = (tmp_path, scans, folder), tmp_path / "new/place"
    for extra in ({own_chain / "predict.pt"}, set()):
        before = files_below(*seen)
        assert call(predict, own_chain, scans, "--passes", 2, "--to", to) is None
        after = files_below(*seen)
        changed = {p for p in after if after[p] != before.get(p)}
        assert changed == {to / "scores.csv", to / "examples.png"} | extra and before.keys() <= after.keys()
        shutil.rmtree(to)


def test_test_set_gives_auroc_and_decisions_of_every_score(scored, folder, capsys):
    out, _ = scored
    assert call(predict, out, "--test", "--passes", 2, "--fpr", 0.4) is None
    printed, result = capsys.readouterr().out, json.loads((out / "decisions.json").read_text())
    metrics, run = json.loads((out / "metrics.json").read_text()), predict.load_run(out, passes=2)
    assert list(result) == list(predict.SCORES)
    assert result["csi"]["auroc"] == pytest.approx(metrics["auroc"], abs=0.02)
    data = load_data(str(folder), 40, holdout=0.3)
    labels = data.labels.numpy()
    for score, found in result.items():
        scores = run.score(data.test, score)[0]
        assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=0.02)
        calibration = run.known["calibration"][score].numpy()
        assert found["decision"] == decisions.decisions(calibration, scores, labels, 0.4)
        assert f"{score:5s} AUROC {found['auroc']:.4f}  false positive rate" in printed
    assert call(predict, out, "--test", "--passes", 2) is None                          # --fpr 0.05
    printed = capsys.readouterr().out
    assert "no decisions: with 13" in printed and "false positive rate" not in printed


@pytest.fixture(scope="module")
def none_held(folder, tmp_path_factory):
    """A run with no held-out normals."""
    out = tmp_path_factory.mktemp("none") / "run"
    words = [*STAGE2, "--dissolve", "none", "--holdout", "0"]
    assert call(train_dia, "--data", folder, "--out", out, *words) is None
    return out


def test_without_held_out_normals_there_are_scores_but_no_p_values(none_held, scans, tmp_path, capsys):
    assert call(predict, none_held, scans, "--passes", 1, "--to", tmp_path) is None
    assert "no normals were held out for calibration" in capsys.readouterr().out
    rows = table(tmp_path / "scores.csv")
    assert {(r["p_value"], r["anomaly"]) for r in rows} == {("", "")}
    assert len({r["score"] for r in rows}) == 5
    assert call(predict, none_held, "--test", "--passes", 1) is None
    found = json.loads((none_held / "decisions.json").read_text())
    assert [found[score]["decision"] for score in predict.SCORES] == [None] * 3


@pytest.mark.parametrize("words, sentence", [
    (["nowhere"], "nowhere: no such file or folder"), (["empty"], "no image below it"),
    (["bad"], "torn.png cannot be read"),
    ([], "give either images"), (["empty", "--test"], "give either images"),
    (["empty", "--fpr", "1"], "above 0, up to 0.99"), (["empty", "--passes", "0"], "an integer from 1 on"),
    (["--test", "--data", "normals"], "normals has no test set with both")])
def test_what_is_asked_wrongly_is_said(words, sentence, chain, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/torn.png").write_bytes((folder / "train/good/000.png").read_bytes()[:200])
    shutil.copytree(folder, "normals", ignore=shutil.ignore_patterns("scratch", "dent"))
    assert sentence in call(predict, chain, *words)


def test_missing_runs_and_training_data_are_said(own_chain, scans, folder, tmp_path):
    assert "no such checkpoint. Run train_dia.py" in call(predict, tmp_path / "nothing", scans)
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("test"))
    away = folder.rename(folder.with_name("away"))
    try:
        assert "which is not there" in call(predict, own_chain, scans)            # the first call needs them
        assert call(predict, own_chain, scans, "--data", other, "--passes", 2) is None      # they were moved
    finally:
        away.rename(folder)
    for path in list((other / "train/good").iterdir())[:20]:
        path.unlink()
    assert "other images" in call(predict, own_chain, scans, "--data", other)


# ---- The local score -------------------------------------------------------------------------------------


def test_local_score_is_the_farthest_position_from_its_nearest(monkeypatch):
    g = torch.Generator().manual_seed(0)
    normal, images = (F.normalize(torch.randn(n, 9, 5, generator=g), dim=2) for n in (7, 6))
    monkeypatch.setattr(local, "local_features", lambda encoder, images, device: images)
    known = local.local_fit(None, normal, CPU, batch=3)
    slow = [max(min(1 - (p @ q).item() for q in normal.flatten(0, 1)) for p in image) for image in images]
    assert known.shape == (63, 5)
    assert np.allclose(local.local_score(known, None, images, CPU, batch=4), slow, atol=1e-6)
    assert local.local_score(known, None, normal, CPU).abs().max() < 1e-5
    few = [local.local_fit(None, normal, CPU, batch, most=10) for batch in (2, 7)]
    assert few[0].shape == (10, 5) and torch.equal(*few)                                # whatever the batch


@pytest.mark.parametrize("stem, P", [("imagenet", 4), ("cifar", 64)])
def test_local_features_are_the_third_stage_of_the_plain_images(stem, P):
    """What layer3 gives when the encoder's own forward is called, grey image or the same in RGB."""
    torch.manual_seed(0)
    encoder, images = dia_lib.Encoder(1, 4, stem).train(), torch.randint(0, 256, (3, 1, 32, 32)).byte()
    found = local.local_features(encoder, images, CPU)
    assert found.shape == (3, P, 256) and torch.allclose(found.norm(dim=2), torch.ones(3, P), atol=1e-5)
    assert encoder.training and not found.requires_grad
    kept = []
    encoder.eval().backbone.layer3.register_forward_hook(lambda module, args, out: kept.append(out))
    encoder(images.float() / 255)
    expected = F.normalize(kept[0].flatten(2).transpose(1, 2), dim=2)
    assert torch.allclose(found, expected, atol=0.05)                                   # bfloat16
    in_colour = local.local_features(encoder, images.expand(-1, 3, -1, -1), CPU)
    assert torch.allclose(in_colour, found, atol=0.05)


# ---- Settings chosen without anomalies -------------------------------------------------------------------


def test_synthetic_defects_are_local_and_repeatable():
    images = (torch.rand(6, 1, 48, 48, generator=torch.Generator().manual_seed(0)) * 60 + 120).to(torch.uint8)
    for kind in choose.KINDS:
        def make(kind=kind):
            return choose.synthetic_defects(images, kind, torch.Generator().manual_seed(2))
        defects = make()
        changed = (defects != images).float().mean((1, 2, 3))
        assert torch.equal(defects, make()) and defects.dtype == torch.uint8
        assert (changed > 0).all() and (kind == "haze" or (changed < 0.25).all())
    line = choose.synthetic_defects(images, "line", torch.Generator().manual_seed(2))
    assert (line <= images).all()                                               # a crack is dark
    haze = choose.synthetic_defects(images, "haze", torch.Generator().manual_seed(2)).float()
    rough = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (haze, images.float(), line.float())]
    assert rough[0] < rough[1] < rough[2]                                   # a veil has no edges of its own
    assert ((haze - images).abs().amax((1, 2, 3)) > 5).all()
    with pytest.raises(ValueError, match="line, patch, haze"):
        choose.synthetic_defects(images, "dent", torch.Generator())


def test_a_pasted_piece_is_a_rectangle_of_the_image_of_2_to_15_percent():
    """In an image whose pixels name their place, all pasted pixels are off by the same number."""
    H, W, g = 60, 90, torch.Generator().manual_seed(0)
    image, areas = torch.arange(H * W).view(1, H, W), []
    for _ in range(50):
        shapes = []
        out = choose.cut_paste(image, lambda piece, shapes=shapes: shapes.append(piece.shape[1:]) or piece, g)
        y, x = (out[0] != image[0]).nonzero(as_tuple=True)
        (h, w), = shapes
        areas.append(h * w / (H * W))
        moved = (image - out)[0, y, x]                                      # the same for every pixel of it
        assert out.dtype == image.dtype and len(set(moved.tolist())) <= 1 and len(y) in (0, h * w)
    assert 0.015 < min(areas) < 0.04 and 0.12 < max(areas) < 0.16


@pytest.fixture
def halves(chain, folder, monkeypatch):
    """A function: choose's figures of the chain, its Data changed by the given function first."""
    data = load_data(str(folder), 40, ("train",), 0.3)

    def figures(change=lambda data: data):
        monkeypatch.setattr(choose, "data_of", lambda *args: change(data))
        return choose.choose(chain, CPU)[1]

    monkeypatch.setattr(choose, "Log", lambda *args: lambda *args, **values: None)
    return figures


def test_figures_are_repeatable_and_never_look_at_calibration(halves):
    def altered(calibration):
        def change(data):
            held = data.held.clone()
            held[data.calibration == calibration] = 255 - held[data.calibration == calibration]
            return dataclasses.replace(data, held=held)
        return change

    figures = halves()
    assert list(figures) == ["val_auroc", "val_line", "val_patch", "val_haze", "val_cos", "val_local"]
    assert figures["val_auroc"] == pytest.approx(sum(figures[f"val_{kind}"] for kind in choose.KINDS) / 3)
    assert halves() == figures and halves(altered(True)) == figures
    assert halves(altered(False)) != figures


def test_figures_are_high_where_defects_score_high_and_half_where_there_are_none(halves, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(choose, "synthetic_defects", lambda images, kind, generator: torch.zeros_like(images))
        assert halves()["val_local"] == 1
        m.setattr(choose, "synthetic_defects", lambda images, kind, generator: images)
        assert all(value == pytest.approx(0.5, abs=0.1) for value in halves().values())
    assert halves()["val_local"] > 0.6                                      # even of an encoder of 4 steps


def test_choose_sorts_runs_best_last_and_logs_their_figures(own_chain, tmp_path, monkeypatch, capsys):
    second = shutil.copytree(own_chain, tmp_path / "second/step-4")
    rows = [json.loads(line) for line in (own_chain / "log.jsonl").read_text().splitlines()]
    figures = {"val_auroc": 0.75, "val_line": 0.9, "val_patch": 0.6, "val_haze": 0.7, "val_cos": 0.5,
               "val_local": 0.25}
    each = iter([figures, {**figures, "val_auroc": 0.7, "val_line": 0.8}])
    monkeypatch.setattr(choose, "validate", lambda *args: next(each))
    assert call(choose, own_chain, second) is None
    *_, header, worse, better, note, best = capsys.readouterr().out.splitlines()
    assert header.split() == ["csi", "line", "patch", "haze", "cos", "local", "step", "run"]
    assert worse.split() == ["0.700", "0.800", "0.600", "0.700", "0.500", "0.250", "4", str(second)]
    assert better.split() == ["0.750", "0.900", "0.600", "0.700", "0.500", "0.250", "4", str(own_chain)]
    assert "mislead" in note and best == f"best {own_chain}"
    after = [json.loads(line) for line in (own_chain / "log.jsonl").read_text().splitlines()]
    assert after == [*rows, {"stage": "choose", "step": 4, **figures}]


def test_anomalies_of_a_val_split_are_scored_apart(tmp_path, halves, monkeypatch):
    """`real`: all val images with another label than the normal one, at the size of the run, if any."""
    path, labels = tmp_path / "pneumoniamnist.npz", np.array([[0], [1], [1], [0]], np.uint8)
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    np.savez(path, train_images=images, val_images=images, val_labels=labels)
    assert torch.equal(choose.val_anomalies(str(path), 28, None), torch.from_numpy(images[1:3, None]))
    assert torch.equal(choose.val_anomalies(str(path), 28, "1"), torch.from_numpy(images[[0, 3], None]))
    assert choose.val_anomalies(str(path), 14, None).shape == (2, 1, 14, 14)
    np.savez(path, train_images=images)
    assert len(choose.val_anomalies(str(path), 28, None)) == len(choose.val_anomalies("elpv", 28, None)) == 0

    monkeypatch.setattr(choose, "quick_scorer", lambda *args: lambda x: dict.fromkeys(
        choose.SCORES, x.float().mean((1, 2, 3))))
    before = halves()
    for brightness in (0, 255):                             # of real anomalies, where the score is brightness
        real = torch.full((9, 1, 40, 40), brightness, dtype=torch.uint8)
        monkeypatch.setattr(choose, "val_anomalies", lambda *args, real=real: real)
        assert halves() == {**before, "val_real": brightness / 255}


def test_choose_needs_held_out_normals(none_held, capsys):
    assert "0 held-out normals serve for choosing" in call(choose, none_held)


def test_choose_end_to_end(own_chain, capsys):
    assert call(choose, own_chain) is None
    assert capsys.readouterr().out.splitlines()[-1] == f"best {own_chain}"


def test_diverged_embeddings_end_with_a_sentence(own_chain):
    state = dia_lib.load_checkpoint(own_chain / "dia.pt", "dia", "cpu")
    state["encoder"]["projection.2.bias"][0] = math.nan
    dia_lib.save_checkpoint(own_chain / "dia.pt", "dia", state.pop("settings"), state)
    assert "diverged" in call(choose, own_chain)


# ---- Pictures and tables ---------------------------------------------------------------------------------


def test_report_draws_the_pictures_or_says_what_is_missing(own_chain, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        assert call(report, own_chain) == "pictures need matplotlib: pip install matplotlib"
    pytest.importorskip("matplotlib")
    assert "run evaluate.py on it first" in call(report, tmp_path)
    assert call(report, own_chain) is None
    assert "drew roc.png, scores.png, training.png in" in capsys.readouterr().out
    run = predict.load_run(own_chain, passes=2)                           # as evaluate's passes in the chain
    plotted, plot = [], report.p_value_plot
    monkeypatch.setattr(report, "p_value_plot", lambda *args: plotted.append(args) or plot(*args))
    assert call(report, own_chain) is None
    (_, labels, p, n, fpr), = plotted
    rows = table(own_chain / "scores.csv")
    assert np.array_equal(p, run.p_values(np.array([float(r["score"]) for r in rows])))
    assert labels.tolist() == [int(r["label"]) for r in rows] and n == len(run.known["calibration"]["csi"])
    html, _, figures = page_of(own_chain)
    assert captions(figures) == expected_captions([{**r, "p_value": v} for r, v in zip(rows, p, strict=True)])
    assert f"There are {decisions.impossible(n, fpr)}." in html and fpr == 0.05
    names = ("roc", "scores", "training", "p_values")
    assert "drew roc.png, scores.png, training.png, p_values.png in" in capsys.readouterr().out
    assert all(np.asarray(Image.open(own_chain / f"{name}.png").convert("L")).std() > 10 for name in names)


SECTIONS = ["ROC", "Scores by group", "P-values", "Training", "The 24 most telling images", "Settings",
            "Data"]


def page_of(out):
    """A report.html that needs no other file, as (HTML without pictures, [(alt, image)], [figure's HTML])."""
    html = (out / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', html)
    assert len(pictures) == html.count("<img") == html.count("src=")
    bare = re.sub(r'"data:image/png;base64,[^"]*"', '""', html)
    assert not re.search(r"https?:|<script|<link|<iframe|href|url\(|@import", bare)
    images = [(unescape(alt), Image.open(io.BytesIO(base64.b64decode(data)))) for alt, data in pictures]
    return bare, images, re.findall(r"<figure.*?</figure>", bare, re.S)


def sections_of(html):
    return re.findall(r"<section><h2>(.*?)</h2>", html)


def captions(figures):
    """The lines below each image of a page."""
    return [unescape(re.search("<figcaption>(.*)</figcaption>", figure, re.S)[1]).split("<br>")
            for figure in figures]


def expected_captions(rows):
    """The first three lines of the captions, by scores.csv: four times six, in this order."""
    ranked = sorted(rows, key=lambda row: -float(row["score"]))
    normals, anomalies = ([row for row in ranked if row["label"] == label] for label in "01")
    shown = [*normals[:6], *anomalies[:-7:-1], *anomalies[:6], *normals[:-7:-1]]
    kinds = [f"{('normal', 'anomaly')[int(row['label'])]}, {row['group']}" for row in shown]
    p = [f", p\u00a0{float(row['p_value']):.3g}" if "p_value" in row else "" for row in shown]
    return [[row["path"], kind, f"score {float(row['score']):.4g}{more}",
             f"rank {ranked.index(row) + 1} of 30"]
            for row, kind, more in zip(shown, kinds, p, strict=True)]


def test_the_page_of_a_run_shows_what_scores_csv_says(chain, own_chain, folder):
    """The figures, a row a group, 24 test images; nothing that is not there."""
    pytest.importorskip("matplotlib")
    metrics = json.loads((own_chain / "metrics.json").read_text())
    assert call(report, own_chain) is None
    html, images, figures = page_of(own_chain)
    rows = table(own_chain / "scores.csv")
    assert sections_of(html) == SECTIONS and captions(figures) == expected_captions(rows)
    assert f"AUROC {metrics['auroc']:.3f}<" in html and "12 normal and 18 anomalous test images" in html
    for name, floor in metrics["floors_auroc"].items():
        beaten = "" if floor < metrics["auroc"] else "not beaten"
        assert f"<td>floor: {name}</td><td>{floor:.4g}</td><td>{beaten}</td>" in html
    for group, label, n in (("dent", 1, 6), ("good", 0, 12), ("scratch", 1, 12)):
        mine = [float(r["score"]) for r in rows if r["group"] == group]
        against = [float(r["score"]) for r in rows if r["group"] == "good"]
        auroc = f"{roc_auc_score([0] * 12 + [1] * n, against + mine):.3f}" if label else ""
        assert (f"<td>{group}</td><td>{('normal', 'anomaly')[label]}</td><td>{n}</td><td>"
                f"{np.median(mine):.4g}</td><td>{auroc}</td>") in html
    assert "extras.predict" in html and "Red:" not in html                  # no p-values, no heat maps yet
    assert dia_lib.found(load_data(str(folder), 40, holdout=0.3)) in unescape(html)
    for (alt, image), (path, kind, *_) in zip(images[-24:], captions(figures), strict=True):
        assert alt == f"{kind.split(',')[0]} {path}"
        assert np.array_equal(image, Image.open(folder / path))
    assert "<td>steps</td><td>4</td>" in html and "<td>image_size</td><td>40</td>" in html


def test_the_page_of_a_run_with_heat_maps_and_names_that_html_would_read(tiny, folder, tmp_path):
    """nearest --maps: each image beside its map, p-values, decisions; < & and quotes are escaped."""
    pytest.importorskip("matplotlib")
    root, out = shutil.copytree(folder, tmp_path / 'a<b>&"c"'), tmp_path / "run"
    (root / "test/dent").rename(root / "test/<i>dent&amp;'")
    for i, file in enumerate(sorted((root / "test").rglob("*.png"))):
        file.rename(file.with_name(f'{i}"<img>.png'))
    assert call(nearest, "--data", root, *tiny[2:], "--fpr", 0.3, "--maps", "--out", out) is None
    assert call(report, out) is None
    html, images, figures = page_of(out)
    rows, metrics = table(out / "scores.csv"), json.loads((out / "metrics.json").read_text())
    assert sections_of(html) == [name for name in SECTIONS if name != "Training"]       # nothing was trained
    assert not re.search(r"<(b|i|img)>", html) and "&amp;amp;&#x27;" in html
    assert captions(figures) == expected_captions(rows)
    assert f"<title>{escape(root.name)}: nearest, seed 0</title>" in html
    decision = metrics["decision"]
    assert f"by {decision['calibration_normals']} calibration normals" in html
    assert f"<td>sensitivity</td><td>{decision['sensitivity']:.3f}</td>" in html
    data = load_data(str(root), 32, holdout=0.3)
    for k, (path, *_) in enumerate(captions(figures)):
        (alt, image), (alt2, heat) = images[len(images) - 48 + 2 * k:][:2]
        assert path in alt and alt2 == f"{alt}, heat map"
        pixels = data.test[data.paths.index(path), 0].numpy()
        assert np.abs(np.asarray(image.convert("L")).astype(int) - pixels).max() <= 1
        red, green, _ = np.moveaxis(np.asarray(heat).astype(int), 2, 0)
        assert heat.size == image.size and (red >= green).all() and (green <= pixels + 1).all()
    assert any((np.asarray(heat)[..., 0] > np.asarray(heat)[..., 1].astype(int) + 50).any()
               for _, heat in images[-47::2])


def test_a_page_without_the_images_says_so_and_has_the_rest(own_chain, folder, tmp_path, capsys):
    """They are found again by --data; there, other images are an error."""
    pytest.importorskip("matplotlib")
    metrics = json.loads((own_chain / "metrics.json").read_text())
    metrics["settings"]["data"] = str(tmp_path / "gone")
    (own_chain / "metrics.json").write_text(json.dumps(metrics))
    assert call(report, own_chain) is None
    said = f"was trained on --data {tmp_path / 'gone'}, which is not there"
    html, images, figures = page_of(own_chain)
    assert sections_of(html) == SECTIONS and html.count(said) == 2 and said in capsys.readouterr().out
    assert captions(figures) == expected_captions(table(own_chain / "scores.csv"))
    assert len(images) == len(re.findall('alt="(roc|scores|training):', html)) == 1 + 3 + 3
    assert call(report, own_chain, "--data", folder) is None
    html, images, _ = page_of(own_chain)
    assert said not in html and len(images) == 7 + 24
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "train/good/000.png").unlink()
    (own_chain / "report.html").unlink()
    assert "was trained on other images than --data" in call(report, own_chain, "--data", other)
    assert not (own_chain / "report.html").exists()


@pytest.mark.parametrize("name, text", [
    ("metrics.json", "{"), ("metrics.json", "{}"), ("log.jsonl", "{\n"), ("scores.csv", "path,label\na,0\n"),
    ("scores.csv", "path,group,label,score\na,g,0,1.5\nb,g,1,2.5\n")])
def test_results_that_are_damaged_or_of_two_runs_are_one_sentence(name, text, own_chain):
    pytest.importorskip("matplotlib")
    (own_chain / name).write_text(text)
    assert "damaged, or they are of different runs" in call(report, own_chain)
    assert not (own_chain / "report.html").exists()


def test_telling_images_are_mistakes_first_and_none_twice():
    labels, scores = np.array([0] * 8 + [1] * 4), np.array([*range(8), 9, 3.5, 8, 7.5])
    assert [rows.tolist() for rows in report.telling(labels, scores).values()] == [
        [7, 6, 5, 4, 3, 2], [9, 11, 10, 8], [], [0, 1]]


def test_training_curves_take_the_rows_of_each_stage():
    Figure = pytest.importorskip("matplotlib.figure").Figure
    log = [{"stage": "diffusion", "step": 2, "loss": 0.5, "held_t0-29": 0.6, "seconds": 1.0},
           {"stage": "dia", "step": 3, "loss": 4.0, "contrastive": 3.0},
           {"stage": "dia", "step": 4, "shift_acc": 0.5, "shift_acc_held": 0.4},
           {"stage": "choose", "step": 3, "val_auroc": 0.7}, {"stage": "evaluate", "step": 3, "auroc": 0.9}]
    report.training_curves(figure := Figure(), log)
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    assert drawn == [{"held_t0-29": [[2, 0.6]], "loss": [[2, 0.5]]},
                     {"contrastive": [[3, 3.0]], "loss": [[3, 4.0]]},
                     {"shift_acc": [[4, 0.5]], "shift_acc_held": [[4, 0.4]], "val_auroc": [[3, 0.7]]}]
    report.training_curves(figure := Figure(), [{"stage": "evaluate", "step": 0, "loss": 1.0}])
    assert not figure.axes                                                  # no empty panels
    report.training_curves(figure, [{"stage": "dra", "step": 1, "loss": 2.0, "held": 1.0}])
    assert [axes.get_title() for axes in figure.axes] == ["dra: loss"]


def test_p_value_plot_is_the_share_up_to_each_value():
    Figure = pytest.importorskip("matplotlib.figure").Figure
    p, labels = np.array([0.5, 0.25, 0.5, 1.0, 0.125]), np.array([0, 0, 0, 0, 1])
    report.p_value_plot(figure := Figure(), labels, p, 7)
    normals, anomalies, _, threshold = figure.axes[0].lines
    assert normals.get_xydata().tolist() == [[0, 0], [0.25, 0.25], [0.5, 0.5], [0.5, 0.75], [1, 1], [1, 1]]
    assert anomalies.get_xydata().tolist() == [[0, 0], [0.125, 1], [1, 1]]
    assert threshold.get_xdata()[0] == 0.05


def test_roc_and_histograms_show_the_scores_of_each_label_and_group():
    Figure = pytest.importorskip("matplotlib.figure").Figure
    labels, scores = np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 3.0, 4.0])
    metrics = {"auroc": 1.0, "score": "csi", "settings": {"data": "a/b"}}
    report.roc(figure := Figure(), labels, scores, metrics)
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert [0, 1] in curves["AUROC 1.000"] and figure.axes[0].get_title() == "b, csi"
    groups = np.array(["m", "p", "m", "q"])
    report.score_histograms(figure := Figure(), labels, scores, groups)
    assert [axes.get_title() for axes in figure.axes] == ["all", "m", "q"]      # p has no anomaly
    mine = {name: rows.tolist() for name, rows in report.by_group(labels, groups).items()}
    assert mine == {"m": [True, False, True, False], "q": [True, True, False, True]}    # q has no normal
    assert not report.by_group(labels, np.array(["n", "n", "a", "a"]))          # a would be all images again


def test_helpers_of_tables():
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert tables.spread([0.7, 0.8, None]) == "0.750 ± 0.071"
    assert tables.spread([0.7]) == "0.700" and tables.spread([None]) == ""
    page = "x\n<!-- study: a -->\nold\n<!-- end -->\ny\n<!-- study: b -->\nkept\n<!-- end -->\n"
    assert tables.put(page, "a", "| new \\1 |") == page.replace("old\n", "\n| new \\1 |\n\n")
    with pytest.raises(SystemExit, match="study: c"):
        tables.put(page, "c", "")
    assert tables.processor(CPU) and not {"CPU", "Processor"} & set(tables.processor(CPU).split())


def test_insert_replaces_rows_with_the_same_key_and_keeps_what_is_empty(tmp_path):
    path = tmp_path / "new/table.csv"
    for rows in ([("a", 0.5, 3), ("b", 0.6, "")], [("c", 0.9, 1), ("a", 0.7, "")]):
        rows = [dict(zip(("run", "auroc", "minutes"), row, strict=True)) for row in rows]
        tables.insert(path, rows, ["run"])
    assert path.read_text() == "run,auroc,minutes\na,0.7,3\nb,0.6,\nc,0.9,1\n"
    with pytest.raises(SystemExit, match="another table"):
        tables.insert(path, [{"run": "a", "loss": 1}], ["run"])
    assert path.read_text().startswith("run,auroc,minutes\n") and os.listdir(path.parent) == ["table.csv"]
