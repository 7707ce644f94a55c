"""Decisions with a guarantee, images of one's own, and the same from Python."""

import csv
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import STAGE1, STAGE2, call, texture
from PIL import Image
from scipy.stats import beta, kstest

import dia_data
import evaluate
import train_dia
import train_diffusion
from dia_data import load_data, load_images
from study import calibration


def test_p_values_count_the_calibration_images_that_are_at_least_as_anomalous():
    p = evaluate.p_values(np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 1.5, 2.0, 3.0, 9.0]))
    assert np.allclose(p, np.array([5, 5, 4, 4, 2, 1]) / 5)
    assert np.isnan(evaluate.p_values(np.empty(0), np.ones(2))).all()


def test_p_values_of_normals_are_uniform_and_decisions_keep_their_rate():
    """n = 59 calibration images and one new normal, drawn alike 20,000 times: p is uniform on 1/60 ... 60/60."""
    rng = np.random.default_rng(0)
    p = np.array([evaluate.p_values(s[1:], s[:1])[0] for s in rng.normal(size=(20_000, 60))])
    counts = np.bincount((p * 60).round().astype(int), minlength=61)[1:]
    assert counts.sum() == 20_000 and kstest(p - rng.uniform(size=len(p)) / 60, "uniform").pvalue > 0.01
    for fpr in (0.01, 0.05, 0.2):
        expected = math.floor(fpr * 60 + 1e-9) / 60
        assert abs((p <= fpr).mean() - expected) < 4 * math.sqrt(0.2 * 0.8 / 20_000) and (p <= fpr).mean() <= fpr + 0.01


def test_too_few_calibration_images_are_said():
    assert evaluate.impossible(19, 0.05) is None and evaluate.impossible(99, 0.01) is None
    assert "needs 19" in evaluate.impossible(18, 0.05) and "held out" in evaluate.impossible(0, 0.05)


def test_decisions_have_exact_intervals():
    p, labels = np.array([0.01, 0.5, 0.6, 0.05, 0.02, 0.9]), np.array([0, 0, 0, 1, 1, 1])
    found = evaluate.decisions(p, labels, 0.05, 59)
    assert found["expected_false_positive_rate"] == 3 / 60                              # 0.05 * 60 is 3, not 2.9999
    assert found["false_positive_rate"] == 1 / 3 and found["sensitivity"] == 2 / 3
    assert found["false_positive_rate_interval_95"] == pytest.approx([beta.ppf(0.025, 1, 3), beta.ppf(0.975, 2, 2)])
    assert evaluate.decisions(p, labels, 0.01, 59)["expected_false_positive_rate"] == 0
    assert evaluate.decisions(p, labels, 0.1, 0) is None


def test_deals_keep_the_rate(chain, capsys):
    scores = np.random.default_rng(0).gamma(2, size=436)
    for fpr, expected in ((0.05, 3 / 60), (0.2, 12 / 60), (0.01, 0)):
        assert abs(calibration.deal(scores, 59, fpr, 400).mean() - expected) < 0.01
    assert call(calibration, "--out", chain) is None
    assert "do they differ? p = " in capsys.readouterr().out


def test_report_draws_four_pictures_or_says_what_is_missing(own_chain, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib.figure", None)
        m.delitem(sys.modules, "report", raising=False)
        assert "pip install matplotlib" in call(evaluate, "--out", own_chain, "--report")
    pytest.importorskip("matplotlib")
    import report
    assert "run evaluate.py on it first" in call(report, "--out", tmp_path)
    assert call(evaluate, "--out", own_chain, "--passes", 2, "--report") is None
    assert "drew roc.png, scores.png, training.png, p_values.png" in capsys.readouterr().out
    assert all((own_chain / f"{name}.png").stat().st_size > 5000 for name in ("roc", "scores", "training", "p_values"))


@pytest.fixture
def scans(folder, tmp_path):
    """Images of one's own: nested, mixed formats and sizes, one that was trained on, one held out, a text file."""
    root, rng = tmp_path / "scans", np.random.default_rng(5)
    (root / "ward/b").mkdir(parents=True)
    Image.fromarray(texture(rng, 60)).save(root / "a.jpg")
    Image.fromarray(np.stack([texture(rng, 33, True)] * 3, 2)).save(root / "ward/line.bmp")
    Image.fromarray(texture(rng, 50, True)).convert("RGBA").save(root / "ward/b/line.png")
    data = load_data(str(folder), 40, ("train",), 0.3)
    for name, image in (("known", data.train[0]), ("held", data.held[0])):
        Image.fromarray(image[0].numpy()).save(root / f"{name}.png")
    (root / "notes.txt").write_text("no image")
    return root


def test_own_images_are_scored_without_the_training_data(chain, own_chain, scans, folder, capsys):
    away = folder.rename(folder.with_name("away"))                                      # the data are gone
    try:
        assert call(evaluate, "--out", own_chain, "--images", scans, "--passes", 2) is None
        assert "5 images: no decisions: with" in capsys.readouterr().out                # four calibration images are too few
        assert {r["anomaly"] for r in csv.DictReader((own_chain / "images/scans/scores.csv").open())} == {""}
        assert call(evaluate, "--out", own_chain, "--images", scans, "--passes", 2, "--fpr", 0.4) is None
    finally:
        away.rename(folder)
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((own_chain / "images/scans/scores.csv").open()))
    assert "note: 1 other files" in printed and "note: 1 of these images were trained on" in printed
    assert printed.splitlines()[-1].startswith("5 images: ") and str(own_chain / "images/scans") in printed
    assert list(rows[0]) == ["path", "score", "p_value", "anomaly", "seen"]
    assert {r["path"] for r in rows} == {"a.jpg", "ward/line.bmp", "ward/b/line.png", "known.png", "held.png"}
    assert [float(r["score"]) for r in rows] == sorted((float(r["score"]) for r in rows), reverse=True)
    assert {r["path"]: r["seen"] for r in rows if r["seen"]} == {"known.png": "training", "held.png": "held out"}
    assert all(int(r["anomaly"]) == (float(r["p_value"]) <= 0.4) for r in rows)
    assert np.asarray(Image.open(own_chain / "images/scans/examples.png")).std() > 10

    # The same from Python, and the same as the test set's scores where they are the same images.
    run = evaluate.load_run(own_chain, passes=2)
    images, paths = load_images(scans, run.settings["image_size"])
    scores, p = run.score(images)
    by_path, data = {r["path"]: r for r in rows}, load_data(str(folder), 40, ("train",), 0.3)
    calibration = run.score(data.held[data.calibration])[0]                             # no other held-out image serves for it
    assert 0 < len(calibration) < len(data.held)
    assert np.allclose(calibration, run.stats["calibration"]["local"], atol=0.02)
    assert np.allclose(scores, [float(by_path[path]["score"]) for path in paths], atol=1e-4)
    assert np.allclose(p, [float(by_path[path]["p_value"]) for path in paths], atol=1e-5)
    images, paths = load_images(folder / "test", 40)
    table = {r["path"]: float(r["score"]) for r in csv.DictReader((chain / "scores.csv").open())}
    assert np.allclose(run.score(images)[0], [table[f"test/{path}"] for path in paths], atol=0.02)
    names = set(os.listdir(dia_data.cache_folder()))
    load_images(scans, 36)
    assert set(os.listdir(dia_data.cache_folder())) == names                            # no copy is kept
    assert not run.encoder.training
    with pytest.raises(ValueError, match="uint8"):
        run.score(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("words, sentence", [
    (["--images", "nowhere"], "no such folder"), (["--images", "."], "no image below it"),
    (["--images", "scans", "--results", "x.csv"], "have no labels"), (["--images", "scans", "--report"], "have no labels"),
    (["--fpr", "1"], "between 0 and 1")])
def test_what_is_asked_wrongly_is_said(words, sentence, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in call(evaluate, "--out", chain, "--passes", 2, *words)


def test_bad_images_end_the_program_or_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    def fail(source):
        raise SystemExit(f"{source} cannot be read")

    root, decode = tmp_path / "tiles", dia_data._decode
    (root / "train/good").mkdir(parents=True)
    for i in range(24):
        Image.fromarray(texture(np.random.default_rng(i), 32)).save(root / f"train/good/{i:02d}.png")
    whole = load_data(str(root), 32, ("train",), 0).train
    torn = root / "train/good/05.png"
    torn.write_bytes(torn.read_bytes()[:200])
    argv = ["--data", root, *STAGE1]
    assert "05.png cannot be read" in call(train_diffusion, *argv, "--out", tmp_path / "a")
    assert call(train_diffusion, *argv, "--out", tmp_path / "b", "--skip-bad-images") is None
    assert "left out 1 of 24 images, which cannot be read: train/good/05.png" in capsys.readouterr().out
    assert "05.png cannot be read" in call(train_diffusion, *argv, "--out", tmp_path / "c")       # also when the rest is cached
    assert call(train_dia, "--data", root, *STAGE2, "--out", tmp_path / "b", "--skip-bad-images") is None
    words = ["--out", tmp_path / "b", "--passes", 1, "--images", root, "--skip-bad-images"]
    assert call(evaluate, *words, "--data", root) is None                               # the training images are read again
    for _ in range(2):                                                                  # decoded, and from the cache
        data = load_data(str(root), 16, ("train",), 0, skip_bad=True)
        assert data.train.shape == (23, 1, 16, 16)
    data = load_data(str(root), 32, ("train",), 0, skip_bad=True)
    assert {x.numpy().tobytes() for x in data.train} < {x.numpy().tobytes() for x in whole}
    Image.fromarray(texture(np.random.default_rng(5), 32)).save(torn)                   # repaired: it is there again
    assert load_data(str(root), 32, ("train",), 0).train.shape[0] == 24
    with monkeypatch.context() as m:                                                    # a passing fault, the file unchanged
        m.setattr(dia_data, "_decode", lambda source, size: fail(source) if source.name == "03.png" else decode(source, size))
        assert load_data(str(root), 24, ("train",), 0, skip_bad=True).train.shape[0] == 23
    for skip in (True, False):
        assert load_data(str(root), 24, ("train",), 0, skip_bad=skip).train.shape[0] == 24
    for file in (root / "train/good").iterdir():
        file.write_bytes(b"")
    assert "none of the 24 images can be read" in call(train_diffusion, *argv, "--out", tmp_path / "d", "--skip-bad-images")
