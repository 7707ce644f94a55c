"""The study: paired bootstrap, tables from the csv files, README in step with them, the probe."""

import csv

import numpy as np
import pytest
import torch
from conftest import STAGE2, call
from sklearn.metrics import roc_auc_score

import dia_lib
import evaluate
import train_dia
from study import calibration, probe, results

HEADER = "data,dissolve,settings,seed,steps,score,minutes,val_auroc,auroc,ap,within_group_auroc,commit,processor"
USUAL = "image_size=64 batch_size=16 crop_min=0.3 optimizer=adamw"
ROWS = [f"elpv,diffusion,{USUAL} steps=400 stage1_dim=32,0,400,csi,8.0,0.70,0.71,0.8,0.75,abc,AMD EPYC",
        f"elpv,diffusion,{USUAL} steps=400 stage1_dim=32,1,400,csi,9.0,0.72,0.73,0.8,0.77,abc,AMD EPYC",
        f"elpv,diffusion,{USUAL} steps=400 stage1_dim=32,0,200,csi,4.0,0.60,0.61,0.8,0.75,abc,AMD EPYC",       # kept on the way
        f"elpv,none,{USUAL} steps=400,1,400,csi,5.0,0.70,0.7,0.8,0.75,abc,AMD EPYC",
        f"elpv,none,{USUAL} steps=400 tau=0.2 holdout=0.3,10,400,csi,5.0,0.66,,,,abc,AMD EPYC",
        "elpv,diffusion,image_size=64 crop_min=0.3 optimizer=adamw steps=400 stage1_batch_size=16,10,400,csi,5.0,0.64,,,,abc,",
        f"other,diffusion,{USUAL} steps=400,0,400,csi,5.0,0.1,0.1,0.1,0.1,abc,AMD EPYC",
        f"elpv,diffusion,{USUAL} steps=400,11,400,csi,5.0,0.63,0.99,0.9,0.9,abc,AMD EPYC"]          # a search seed, tested
FLOORS = ["elpv,floor: pixels,image_size=64 holdout=0.1,,0,,,,0.8,,,,",
          "elpv,floor: encoder untrained,image_size=64,1,0,local,,,0.6,,,,",
          "elpv,floor: encoder untrained,image_size=64,10,0,local,,,0.1,,,,"]
ROWS += [row.replace(",csi,", f",{score},") for row in ROWS for score in ("cos", "local")]


@pytest.fixture
def tables(tmp_path):
    (tmp_path / "results.csv").write_text("\n".join([HEADER, *ROWS, *FLOORS]) + "\n")
    return results.read(tmp_path / "results.csv")


def test_bootstrap_gives_the_difference_and_nothing_for_equal_runs():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 50)
    a, b = rng.normal(size=(2, 80)).round(1), rng.normal(size=(2, 80)).round(1) + 0.5 * labels          # with ties
    gap, low, high = results.paired_bootstrap(labels, a, b)
    expected = np.mean([roc_auc_score(labels, x) - roc_auc_score(labels, y) for x, y in zip(a, b, strict=True)])
    assert gap == pytest.approx(expected) and low < gap < high
    assert results.paired_bootstrap(labels, a, a) == (0, 0, 0)


def test_bootstrap_interval_covers_at_about_its_rate_and_pairing_narrows_it():
    """True difference 0: two noisy readings of the same images. Paired intervals are narrower than those of other images."""
    covered, widths = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = np.array([0] * 60 + [1] * 90)
        image = rng.normal(size=150) + labels
        a, b = image + 0.5 * rng.normal(size=(2, 1, 150))
        _, low, high = results.paired_bootstrap(labels, a, b, 500)
        covered += low <= 0 <= high
        other = rng.normal(size=(1, 150)) + labels + 0.5 * rng.normal(size=(1, 150))
        wide = results.paired_bootstrap(labels, a, other, 500)
        widths.append((high - low) / (wide[2] - wide[1]))
    assert 85 <= covered <= 100 and np.mean(widths) < 0.8
    steady, swing = image[None] + np.zeros((2, 1)), np.stack([image, -image])           # a difference that hangs on the seed
    _, low, high = results.paired_bootstrap(labels, swing, steady, 500)
    assert low < -0.4 and high == 0


def test_tables_say_what_the_csv_says(tables):
    assert [r["setting"] for r in tables[:5]] == ["400 steps"] * 4 + ["400 steps, tau=0.2, holdout=0.3"]
    assert tables[5]["setting"] == "400 steps, batch_size the paper's"                              # not stage 1's batch
    lines = results.contrast(tables, "400 steps").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[2][:3] == ["DIA (`diffusion`)", "0, 1", "**0.720 ± 0.014** (0.710, 0.730)"] and cells[2][-1] == "8.5"
    assert cells[3][:3] == ["CSI (`none`)", "1", "**0.700** (0.700)"] and len(cells) == 4
    found = results.search(tables)
    assert "0.660" in found and "tau=0.2" in found and "0.7" not in found.replace("`", "")               # dev seeds alone
    text = "a\n<!-- study: x -->\nold\n<!-- end -->\nb"
    assert results.put(text, "x", "| new |") == "a\n<!-- study: x -->\n\n| new |\n\n<!-- end -->\nb"
    with pytest.raises(SystemExit, match="no block"):
        results.put(text, "y", "")


def test_minutes_of_another_processor_are_named():
    assert results.mean_minutes([(8.0, "AMD EPYC 9B14"), (None, ""), (9.0, "AMD EPYC")]) == "8.5"
    assert results.mean_minutes([(5.0, "Intel Xeon"), (8.0, "AMD EPYC"), (6.0, "Intel Xeon")]) == "8.0, 5.5 (Intel Xeon)"
    assert results.mean_minutes([(None, "")]) == "" and results.mean_minutes([(4.0, "")]) == "4.0"


def test_floors_are_those_of_the_reporting_seeds(tables, tmp_path):
    found = results.floors(tmp_path / "results.csv")
    assert list(found.items()) == [(("encoder untrained, `local`", "64 px"), [0.6]), (("pixels", "64 px"), [0.8])]


def test_comparison_takes_the_seeds_of_both_sides(tables):
    rng, labels = np.random.default_rng(0), np.array([0] * 30 + [1] * 50)
    scores = {"labels": labels} | {results.key(r): rng.normal(size=80) for r in tables}
    line = results.comparisons(tables, scores, "400 steps").splitlines()[2]
    assert line.startswith("| diffusion - none | 1 (images only) | ")
    a, b = (scores[results.key(tables[i])] for i in (1, 3))
    assert f"{roc_auc_score(labels, a) - roc_auc_score(labels, b):+.3f} (" in line


def test_baselines_stand_beside_settings_that_they_do_not_have():
    full = "400 steps, t_range=100-200, dissolve_size=64, gain=4.0, twin_weight=1000.0"
    assert results.as_run(full, "none") == "400 steps" and results.as_run(full, "copy") == "400 steps, twin_weight=1000.0"
    assert results.as_run(full, "resize") == "400 steps, dissolve_size=64, twin_weight=1000.0"
    assert results.as_run(full, "residual") == full and results.as_run(full, "diffusion") == full.replace(", gain=4.0", "")
    assert results.as_run(results.SHOWN, "none, as long") == "620 steps" and results.as_run("7 steps", "none, as long") == ""


def test_settings_whose_runs_stand_beside_another_have_no_table(tables, monkeypatch):
    assert results.settings_tested(tables) == ["400 steps"]                                         # search seeds' are not there
    weighed = [{**tables[0], "setting": "400 steps, twin_weight=9.0"}, {**tables[0], "setting": "60 steps"}]
    assert results.settings_tested(tables + weighed) == ["60 steps", "400 steps", "400 steps, twin_weight=9.0"]
    alone = [r for r in tables if r["dissolve"] == "none"]
    assert results.settings_tested(alone) == ["400 steps"] and results.settings_tested(alone + weighed[:1]) == [
        "400 steps, twin_weight=9.0"]
    monkeypatch.setitem(results.AS_LONG, "400 steps, twin_weight=9.0", "620 steps")
    longer = [{**r, "setting": "620 steps"} for r in alone]
    assert results.settings_tested(alone + longer + weighed[:1]) == ["400 steps, twin_weight=9.0"]


def test_csi_for_as_many_seconds_has_a_line_of_its_own(tables, monkeypatch):
    monkeypatch.setitem(results.AS_LONG, "400 steps", "620 steps")
    longer = [{**r, "setting": "620 steps", "auroc": 0.9} for r in tables if r["dissolve"] == "none" and r["seed"] == 1]
    table = results.contrast(tables + longer, "400 steps")
    assert "| CSI (`none`) | 1 | **0.700** (0.700)" in table and "| CSI for as many seconds | 1 | **0.900** (0.900)" in table


def test_pages_are_in_step_with_the_results():
    """What python -m study.results writes is what stands there: no number typed by hand, none forgotten."""
    assert all(path.read_text() == text for path, text in results.pages().items())


def test_summary_has_the_settings_below_each_other(tables, monkeypatch):
    monkeypatch.setattr(results, "SUMMARY", {"a": "400 steps", "b": "400 steps, image_size=96", "c": "2000 steps"})
    longer = [{**r, "setting": "2000 steps", "auroc": 0.9} for r in tables if r["dissolve"] == "none" and r["seed"] == 1]
    cells = [line.strip("| ").split(" | ") for line in results.summary(tables + longer).splitlines()]
    scores = [f"`{s}`" for s in results.SCORES]
    assert cells[0] == ["setting", "score", "DIA (`diffusion`)", "CSI (`none`)"] and [c[1] for c in cells[2:]] == scores * 3
    assert [c[2:] for c in cells[2:]] == ([["0.720 ± 0.014", "0.700"]] * len(scores) + [["not run"] * 2] * len(scores)
                                          + [["not run", "0.900"]] * len(scores))


def test_curves_have_the_steps_kept_on_the_way(tables):
    """Of the reporting runs alone; CSI stands beside settings whose twin it does not have."""
    found = results.curves(tables, "diffusion", "400 steps", "csi")
    assert {seed: [(r["steps"], r["auroc"]) for r in run] for seed, run in found.items()} == {0: [(200, 0.61), (400, 0.71)],
                                                                                             1: [(400, 0.73)]}
    assert list(results.curves(tables, "none", "400 steps, twin_weight=1000.0", "csi")) == [1]


def test_plots_and_similarities(tables, tmp_path):
    probes = [{"dissolve": m, "seed": str(i), "sim_resize": v, **{f"csi_{d}_{c}": "0.7" for d in (0.1, 0.2) for c in (0.2, 0.8)}}
              for i, (m, v) in enumerate((("diffusion", "0.5"), ("diffusion", "0.7"), ("none", "0.9")))]
    assert results.similarities(probes).splitlines()[2:] == ["| DIA (`diffusion`) | 0, 1 | 0.60 |", "| CSI (`none`) | 2 | 0.90 |"]
    pytest.importorskip("matplotlib")
    results.plot_contrast(tmp_path / "contrast.png", tables, {"a": "400 steps", "b": "2000 steps"})
    results.plot_sensitivity(tmp_path / "sensitivity.png", probes, "csi")
    results.plot_curves(tmp_path / "curves.png", tables, "400 steps")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("contrast", "curves", "sensitivity"))


def test_spots_are_one_dark_disc_inside_the_image():
    images = torch.full((50, 1, 64, 64), 200, dtype=torch.uint8)
    for diameter in probe.DIAMETERS:
        out = probe.spots(images, diameter, 0.4, dia_lib.step_generator("cpu", 0, "spots", 0))
        area = (200 - out.float()).sum((1, 2, 3)) / (200 * 0.4)
        assert torch.allclose(area, torch.full_like(area, 3.1416 * (64 * diameter / 2) ** 2), rtol=0.25)
        assert out.min() >= 120 and (out[:, :, [0, -1]] == 200).float().mean() > 0.9
    assert not torch.equal(out[0], out[1])


def test_probe_of_a_run(chain, folder, tmp_path, monkeypatch, capsys):
    """Similarities of an encoder that has seen little, and a spot that is hard to miss against one that can't be seen."""
    monkeypatch.setattr(probe, "DIAMETERS", (1 / 16, 1 / 2))
    monkeypatch.setattr(probe, "CONTRASTS", (0.001, 0.8))
    argv = ["--out", chain, "--diffusion", chain / "diffusion.pt", "--results", tmp_path / "probe.csv"]
    assert call(probe, *argv) is None and call(probe, *argv) is None
    row, = csv.DictReader((tmp_path / "probe.csv").open())
    assert {"sim_resize", "sim_diffusion", "sim_residual", "sim_augmented", "sim_other", "local_0.5_0.8"} <= row.keys()
    assert row["dissolve"] == "diffusion" and all(-1 <= float(v) <= 1 for k, v in row.items() if k.startswith("sim_"))
    assert 0.4 <= float(row["local_0.0625_0.001"]) <= 0.6 and float(row["local_0.5_0.8"]) > 0.8
    other = tmp_path / "other"
    args = ["--data", folder, "--out", other, *STAGE2, "--holdout", "0.2", "--dissolve", "none", "--steps", 1]
    assert call(train_dia, *args) is None
    assert "not trained on the same images" in call(probe, "--out", other, *argv[2:])
    assert "Run evaluate.py" in call(calibration, "--out", other)
    assert evaluate.run_key(torch.load(chain / "dia.pt", weights_only=True))["steps"] == 4
