"""The study: runs added, paired bootstrap, tables from the csv files, the page in step, the probe."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import STAGE2, call
from sklearn.metrics import roc_auc_score

import dia_lib
import evaluate
import train_dia
from extras import local, predict
from extras.tables import put
from study import probe, results

HEADER = ("data,dissolve,settings,seed,steps,score,minutes,val_auroc,auroc,ap,within_group_auroc,commit,"
          "processor")
USUAL = "image_size=64 batch_size=16 crop_min=0.3 optimizer=adamw"
ROWS = [f"elpv,diffusion,{USUAL} steps=400 stage1_dim=32,0,400,csi,8.0,0.70,0.71,0.8,0.75,abc,AMD EPYC",
        f"elpv,diffusion,{USUAL} steps=400 stage1_dim=32,1,400,csi,9.0,0.72,0.73,0.8,0.77,abc,AMD EPYC",
        f"elpv,diffusion,{USUAL} steps=400 stage1_dim=32,0,200,csi,4.0,0.60,0.61,0.8,0.75,abc,AMD EPYC",
        f"elpv,none,{USUAL} steps=400,1,400,csi,5.0,0.70,0.7,0.8,0.75,abc,AMD EPYC",
        f"elpv,none,{USUAL} steps=400 tau=0.2 holdout=0.3,10,400,csi,5.0,0.66,,,,abc,AMD EPYC",
        "elpv,diffusion,image_size=64 crop_min=0.3 optimizer=adamw steps=400 stage1_batch_size=16,10,400,csi,"
        "5.0,0.64,,,,abc,",
        f"other,diffusion,{USUAL} steps=400,0,400,csi,5.0,0.1,0.1,0.1,0.1,abc,AMD EPYC",
        f"elpv,diffusion,{USUAL} steps=400,11,400,csi,5.0,0.63,0.99,0.9,0.9,abc,AMD EPYC"]
# of these the third was kept on the way, and the last has a search seed, though it was tested
FLOORS = ["elpv,floor: pixels,image_size=64 holdout=0.1,,0,,,,0.8,,,,",
          "elpv,floor: encoder untrained,image_size=64,1,0,local,,,0.6,,,,",
          "elpv,floor: encoder untrained,image_size=64,10,0,local,,,0.1,,,,",
          "elpv,floor: encoder untrained,image_size=64 draws=2,1,0,csi,,,0.5,,,,"]
ROWS += [row.replace(",csi,", f",{score},") for row in ROWS for score in ("cos", "local")]


@pytest.fixture
def tables(tmp_path):
    (tmp_path / "results.csv").write_text("\n".join([HEADER, *ROWS, *FLOORS]) + "\n")
    return results.read(tmp_path / "results.csv")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A copy of the study's folder, to add runs to."""
    copy = shutil.copytree(results.HERE, tmp_path / "study", ignore=shutil.ignore_patterns("*py*"))
    shutil.copy(results.HERE.parent / "README.md", tmp_path)
    monkeypatch.setattr(results, "HERE", copy)
    return copy


def test_bootstrap_gives_the_difference_and_nothing_for_equal_runs():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 50)
    a, b = rng.normal(size=(2, 2, 80)).round(1) + np.stack([0 * labels, 0.5 * labels])[:, None]  # with ties
    gap, low, high = results.paired_bootstrap(labels, a, b)
    each = [roc_auc_score(labels, x) - roc_auc_score(labels, y) for x, y in zip(a, b, strict=True)]
    assert gap == pytest.approx(np.mean(each)) and low < gap < high
    assert results.paired_bootstrap(labels, a, a) == (0, 0, 0)


def test_bootstrap_interval_covers_at_about_its_rate_and_pairing_narrows_it():
    """True difference 0: two noisy readings of the same images. Intervals of other images are wider."""
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
    steady, swing = image[None] + np.zeros((2, 1)), np.stack([image, -image])   # a gap that hangs on the seed
    _, low, high = results.paired_bootstrap(labels, swing, steady, 500)
    assert low < -0.4 and high == 0


def test_tables_say_what_the_csv_says(tables):
    assert [r["setting"] for r in tables[:5]] == ["400 steps"] * 4 + ["400 steps, tau=0.2, holdout=0.3"]
    assert tables[5]["setting"] == "400 steps, batch_size the paper's"                  # not stage 1's batch
    lines = results.contrast(tables, "400 steps").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[2][:3] == ["DIA (`diffusion`)", "0, 1", "**0.720 ± 0.014** (0.710, 0.730)"]
    assert cells[3][:3] == ["CSI (`none`)", "1", "**0.700** (0.700)"]
    assert len(cells) == 4 and cells[2][-1] == "8.5"
    found = results.search(tables)
    assert "0.660" in found and "tau=0.2" in found and "0.7" not in found                # search seeds alone


def test_floors_are_those_of_the_reporting_seeds_and_new_ones_stand_apart(tables, tmp_path):
    found = results.floors(tmp_path / "results.csv")
    assert found == {("encoder untrained, `csi`", "64 px, draws=2"): [0.5],
                     ("encoder untrained, `local`", "64 px"): [0.6], ("pixels", "64 px"): [0.8]}
    assert list(found) == sorted(found)


def test_comparison_takes_the_seeds_of_both_sides(tables):
    rng, labels = np.random.default_rng(0), np.array([0] * 30 + [1] * 50)
    scores = {"labels": labels} | {results.key_of(r): rng.normal(size=80) for r in tables}
    line = results.comparisons(tables, scores, "400 steps").splitlines()[2]
    assert line.startswith("| diffusion - none | 1 (images only) | ")
    a, b = (scores[results.key_of(tables[i])] for i in (1, 3))
    assert f"{roc_auc_score(labels, a) - roc_auc_score(labels, b):+.3f} (" in line


def test_comparison_leaves_out_what_has_no_scores(tables):
    """A run without scores by `local` gives an empty cell there; the others stay in their columns."""
    rng, labels = np.random.default_rng(0), np.array([0] * 30 + [1] * 50)
    scores = {results.key_of(r): rng.normal(size=80) for r in tables}

    def cells(known):
        lines = results.comparisons(tables, {**known, "labels": labels}, "400 steps").splitlines()[2:]
        return [cell.strip() for line in lines for cell in line.split("|")[1:-1]]

    for score, i in (("csi", 2), ("local", 4)):
        fewer = {k: v for k, v in scores.items() if k[-1] != score or k[1] != "none"}
        expected = cells(scores)
        assert expected[i]
        expected[i] = ""
        assert cells(fewer) == expected
    assert cells({}) == []


def test_baselines_stand_beside_settings_that_they_do_not_have():
    full = "400 steps, t_range=100-200, dissolve_size=64, gain=4.0, twin_weight=1000.0"
    assert results.as_run(full, "none") == "400 steps"
    assert results.as_run(full, "copy") == "400 steps, twin_weight=1000.0"
    assert results.as_run(full, "resize") == "400 steps, dissolve_size=64, twin_weight=1000.0"
    assert results.as_run(full, "residual") == full
    assert results.as_run(full, "diffusion") == full.replace(", gain=4.0", "")
    assert results.as_run("400 steps, twins=excluded, draws=2", "none") == "400 steps, draws=2"
    assert results.as_run(results.SHOWN, "none, as long") == "620 steps"
    assert results.as_run("7 steps", "none, as long") == ""


def test_settings_whose_runs_stand_beside_another_have_no_table(tables, monkeypatch):
    assert results.settings_tested(tables) == ["400 steps"]                     # search seeds' are not there
    weighed = [{**tables[0], "setting": s} for s in ("400 steps, twin_weight=9.0", "60 steps")]
    assert results.settings_tested(tables + weighed) == ["60 steps", "400 steps", weighed[0]["setting"]]
    alone = [r for r in tables if r["dissolve"] == "none"]
    assert results.settings_tested(alone) == ["400 steps"]
    assert results.settings_tested(alone + weighed[:1]) == ["400 steps, twin_weight=9.0"]
    monkeypatch.setitem(results.AS_LONG, "400 steps, twin_weight=9.0", "620 steps")
    longer = [{**r, "setting": "620 steps"} for r in alone]
    assert results.settings_tested(alone + longer + weighed[:1]) == ["400 steps, twin_weight=9.0"]


def test_csi_for_as_many_seconds_has_a_line_of_its_own(tables, monkeypatch):
    monkeypatch.setitem(results.AS_LONG, "400 steps", "620 steps")
    longer = [{**r, "setting": "620 steps", "auroc": 0.9} for r in tables
              if r["dissolve"] == "none" and r["seed"] == 1]
    table = results.contrast(tables + longer, "400 steps")
    assert "| CSI (`none`) | 1 | **0.700** (0.700)" in table
    assert "| CSI for as many seconds | 1 | **0.900** (0.900)" in table


def test_the_page_is_in_step_with_the_results():
    """What python -m study.results writes is what stands there: no number typed by hand, none forgotten."""
    assert (results.HERE / "README.md").read_text() == results.page()
    front = (results.HERE.parent / "README.md").read_text()
    assert front == put(front, "front", results.front())


def test_the_front_page_has_the_runs_of_quick_and_the_highest_floor(study):
    """Means of last steps by csi on both sets, beside what the paper has and the highest of the floors."""
    n = results.QUICK.split()[0]
    mine = f"image_size=64 batch_size=16 steps={n} draws=2"
    runs = [("elpv,none", 0, 0.5), ("elpv,none", 1, 0.7), ("elpv,none", 10, 0.9),
            ("pneumoniamnist,diffusion", 0, 0.8)]
    rows = [f"{run},{mine},{seed},{n},csi,1,,{auroc},,,abc," for run, seed, auroc in runs]
    rows += ["elpv,floor: pixels,image_size=64 holdout=0.1 draws=2,,0,,,,0.75,,,,",
             "elpv,floor: pixels,image_size=64 holdout=0.1,,0,,,,0.99,,,,",
             "elpv,floor: untrained,image_size=64 holdout=0.1 draws=2,0,0,csi,,,0.74,,,,"]
    (study / "results.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    cells = [line.strip("| ").split(" | ") for line in results.front().splitlines()]
    assert cells[2] == ["DIA: dissolved", "not run", "0.800", "0.903"]
    assert cells[3] == ["CSI: no third view", "0.600 ± 0.141", "not run", "0.834"]
    assert cells[-1][:3] == ["the highest floor", "0.750, pixels", "not run"]


def test_what_was_tried_for_quick_is_told_by_setting(study):
    setting = "none,LARS,16,0.08"
    rows = ["data,dissolve,optimizer,batch_size,crop_min,steps,seed,auroc,line,patch,haze,cos,local,real",
            f"elpv,{setting},200,10,0.6,0.5,0.6,0.7,0,0,", f"elpv,{setting},200,11,0.8,0.7,0.8,0.9,0,0,",
            f"pneumoniamnist,{setting},200,10,0.5,0.4,0.5,0.6,0,0,0.9",
            f"elpv,{setting},400,10,0.1,0.1,0.1,0.1,0,0,"]
    (study / "quick.csv").write_text("\n".join(rows) + "\n")
    lines = results.tried().splitlines()[2:]
    assert lines[0] == ("| CSI (`none`) | 200 steps of 16, LARS, crops from 0.08 | "
                        "0.700 / 0.600 / 0.700 / 0.800 | 0.500 / 0.400 / 0.500 / 0.600 | 0.900 | 2, 1 |")
    assert "400 steps" in lines[1] and lines[1].endswith("|  |  | 1, 0 |") and len(lines) == 2


def test_summary_has_the_settings_below_each_other(tables, monkeypatch):
    settings = {"a": "400 steps", "b": "400 steps, image_size=96", "c": "2000 steps"}
    monkeypatch.setattr(results, "SUMMARY", settings)
    longer = [{**r, "setting": "2000 steps", "auroc": 0.9} for r in tables
              if r["dissolve"] == "none" and r["seed"] == 1]
    cells = [line.strip("| ").split(" | ") for line in results.summary(tables + longer).splitlines()]
    scores = [f"`{s}`" for s in results.SCORES]
    assert cells[0] == ["setting", "score", "DIA (`diffusion`)", "CSI (`none`)"]
    assert [c[1] for c in cells[2:]] == scores * 3
    assert [c[2:] for c in cells[2:]] == ([["0.720 ± 0.014", "0.700"]] * 3 + [["not run"] * 2] * 3
                                          + [["not run", "0.900"]] * 3)


def test_similarities_are_means_over_the_runs_of_a_mode():
    cells = {f"csi_{d}_{c}": "0.7" for d in (0.1, 0.2) for c in (0.2, 0.8)}
    probes = [{"dissolve": m, "seed": str(i), "sim_resize": v, **cells}
              for i, (m, v) in enumerate((("diffusion", "0.5"), ("diffusion", "0.7"), ("none", "0.9")))]
    assert results.similarities(probes).splitlines()[2:] == ["| DIA (`diffusion`) | 0, 1 | 0.60 |",
                                                             "| CSI (`none`) | 2 | 0.90 |"]


def by_hand(rows, column):
    """AUROC of a column of scores.csv: the share of pairs that are ranked right, ties count half."""
    a, n = ([float(r[column]) for r in rows if r["label"] == label] for label in "10")
    return np.mean([(x > y) + (x == y) / 2 for x in a for y in n])


def test_a_scored_run_is_added_once_with_its_figures(own_chain, study, monkeypatch):
    """AUROCs and scores of csi and cos are those of scores.csv; the same run again replaces its rows.

    Rows that were there stay as they were. `local` has a row as soon as extras.predict has been at work;
    figures on synthetic defects are of the last row of extras.choose. Then the page is written.
    """
    before = {name: (study / name).read_text() for name in ("results.csv", "results-scores.csv")}
    monkeypatch.setattr(results, "page", lambda: "the page")
    assert call(results, own_chain) is None
    with open(own_chain / "scores.csv", newline="") as file:
        images = list(csv.DictReader(file))
    rows = results.read(study / "results.csv", "tiles")
    assert [r["score"] for r in rows] == ["csi", "cos"] and {r["dissolve"] for r in rows} == {"diffusion"}
    for row, column in zip(rows, ("score", "cos"), strict=True):
        assert row["auroc"] == pytest.approx(by_hand(images, column), abs=6e-5)
        words = row["settings"].split()
        assert {"draws=2", "steps=4", "batch_size=4", "image_size=40", "holdout=0.3", "stage1_dim=8",
                "stage1_steps=4"} <= set(words)
        assert not {"data", "seed", "dissolve", "gamma", "stage1_seed"} & {w.split("=")[0] for w in words}
        assert (row["seed"], row["steps"], row["last"]) == (0, 4, True)
        assert row["val_auroc"] is None and row["processor"]
    log = [json.loads(line) for line in (own_chain / "log.jsonl").read_text().splitlines()]
    seconds = [r["seconds"] for r in log if r["stage"] == "dia"][-1]
    assert rows[0]["minutes"] == pytest.approx(seconds / 60, abs=6e-5)
    scores = results.read_scores(study / "results-scores.csv", "tiles")
    assert scores["labels"].tolist() == [float(r["label"]) for r in images]
    for row, column in zip(rows, ("score", "cos"), strict=True):
        assert scores[results.key_of(row)] == pytest.approx([float(r[column]) for r in images], rel=1e-6)
    floors = results.floors(study / "results.csv", "tiles")
    metrics = json.loads((own_chain / "metrics.json").read_text())
    assert sorted(name for name, _ in floors) == ["encoder untrained, `csi`", "minus mean brightness",
                                                  "nearest neighbour on 32 px pixels"]
    assert floors["encoder untrained, `csi`", "40 px, draws=2"] == [
        pytest.approx(metrics["floors_auroc"]["encoder untrained"], abs=6e-5)]

    assert call(predict, own_chain, "--test", "--passes", 2) is None
    found = json.loads((own_chain / "decisions.json").read_text())
    found["local"]["auroc"] = 0.4321                            # it may be that of cos on so few images
    (own_chain / "decisions.json").write_text(json.dumps(found))
    dia_lib.Log(own_chain, "choose", 4)(4, show=False, val_auroc=0.1, val_cos=0.2, val_local=0.3)
    dia_lib.Log(own_chain, "choose", 4)(4, show=False, val_auroc=0.7, val_cos=0.8, val_local=0.9)
    assert call(results, own_chain) is None
    rows = results.read(study / "results.csv", "tiles")
    assert [(r["score"], r["val_auroc"]) for r in rows] == [("csi", 0.7), ("cos", 0.8), ("local", 0.9)]
    assert rows[2]["auroc"] == 0.4321
    assert len(results.read_scores(study / "results-scores.csv", "tiles")) == 3             # none of local
    for name, text in before.items():
        assert (study / name).read_text().startswith(text)
    assert (study / "README.md").read_text() == "the page"


def test_new_rows_have_a_table_of_their_own_and_leave_the_old_ones_alone(own_chain, study, capsys):
    """Of the same data and steps as older rows: each table says what it said, and there is one more."""
    def tables():
        rows = results.read(study / "results.csv")
        each = {s: results.contrast(rows, s) for s in results.settings_tested(rows)}
        return each | {"summary": results.summary(rows), "search": results.search(rows)}

    rng, before = np.random.default_rng(0), tables()
    labels = results.read_scores(study / "results-scores.csv")["labels"].astype(int)
    metrics, scores = json.loads((own_chain / "metrics.json").read_text()), []
    for mode in ("diffusion", "none"):
        s = metrics["settings"]
        usual = {"image_size": 64, "batch_size": 16, "steps": 2000, "holdout": 0.1}
        s |= {"data": "elpv", "dissolve": mode, **usual, "given": {**s["given"], **usual}}
        (own_chain / "metrics.json").write_text(json.dumps({**metrics, "step": 2000, "settings": s}))
        scores.append(labels + rng.normal(size=len(labels)))
        lines = [f"{y},,{score},{score}" for y, score in zip(labels, scores[-1], strict=True)]
        (own_chain / "scores.csv").write_text("\n".join(["label,group,score,cos", *lines]))
        results.add(own_chain, "chip")
    after, new = tables(), "2000 steps, draws=2"
    assert after == {**before, new: after[new]} and new not in before
    a, b = (roc_auc_score(labels, side) for side in scores)
    first, second = after[new].splitlines()[2:]
    assert first.startswith(f"| DIA (`diffusion`) | 0 | **{a:.3f}** ({a:.3f}) | **{a:.3f}** ({a:.3f}) | ")
    assert second.startswith(f"| CSI (`none`) | 0 | **{b:.3f}** ({b:.3f}) |")
    each = results.read_scores(study / "results-scores.csv")
    line, = results.comparisons(results.read(study / "results.csv"), each, new).splitlines()[2:]
    assert line.startswith(f"| diffusion - none | 0 (images only) | {a - b:+.3f} (")
    assert len(line.split("|")) == 6                                            # none by local


def test_weights_kept_on_the_way_have_their_own_rows(own_chain, study):
    """--save-every's step-N: a row of its own, with the minutes and steps up to it."""
    kept = own_chain / "step-2"
    kept.mkdir()
    metrics = json.loads((own_chain / "metrics.json").read_text())
    (kept / "metrics.json").write_text(json.dumps({**metrics, "step": 2}))
    shutil.copy(own_chain / "scores.csv", kept)
    log = [{"stage": "dia", "step": step, "seconds": 60.0 * step} for step in (1, 2, 3, 4)]
    (own_chain / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    results.add(own_chain, "chip")
    results.add(kept, "chip")
    rows = [r for r in results.read(study / "results.csv", "tiles") if r["score"] == "csi"]
    assert [(r["steps"], r["last"], r["minutes"]) for r in rows] == [(4, True, 4.0), (2, False, 2.0)]


def test_runs_that_do_not_fit_are_refused_and_nothing_is_added(own_chain, study, tmp_path):
    before = (study / "results.csv").read_text()
    assert "has no metrics.json: run evaluate.py" in call(results, tmp_path)
    results.add(own_chain, "chip")
    added = (study / "results.csv").read_text()
    scores, metrics = own_chain / "scores.csv", json.loads((own_chain / "metrics.json").read_text())
    text = scores.read_text()
    (own_chain / "decisions.json").write_text('{"csi": {"auroc": 0.0123}, "local": {"auroc": 0.9}}')
    assert "decisions.json is of other weights" in call(results, own_chain)
    (own_chain / "decisions.json").unlink()
    scores.write_text(re.sub(r"\n.*\n$", "\n", text))                                   # one image less
    assert "other test images" in call(results, own_chain)
    scores.write_text(text)
    (own_chain / "metrics.json").write_text(json.dumps({**metrics, "settings": {"method": "nearest"}}))
    assert "not of this version" in call(results, own_chain)
    assert (study / "results.csv").read_text() == added != before


def test_key_has_what_differs_from_the_paper_and_acts(chain):
    """Of flags as they were given; not those that do nothing in a mode, nor stage 1 where none is used."""
    s = dia_lib.load_checkpoint(chain / "dia.pt", "dia", "cpu")["settings"]

    def words(**changes):
        given = s["given"] | {k: v for k, v in changes.items() if k in s["given"]}
        return results.run_key({**s, **changes, "given": given}, 4)["settings"]

    usual = "image_size=40 holdout=0.3 steps=4 batch_size=4 draws=2"
    assert set(words(dissolve="none").split()) == set(usual.split())
    idle = words(dissolve="none", twins="excluded", t_range=[3, 9], dissolve_size=64)
    assert set(idle.split()) == set(usual.split())
    resized = words(dissolve="resize", t_range=[3, 9], dissolve_size=64)
    assert set(resized.split()) == {*usual.split(), "dissolve_size=64"}
    one = words(t_range=[3, 9], gamma=2.0, normal_class="good")
    assert {"t_range=3-9", "gamma=2.0", "normal_class=good"} <= set(one.split())
    assert "stage1_seed=5" in words(stage1={**s["stage1"], "seed": 5})
    other = results.run_key({**s, "seed": 5, "stage1": {**s["stage1"], "seed": 5}}, 4)
    assert "stage1_seed" not in other["settings"] and other["seed"] == 5


def test_spots_are_one_dark_disc_inside_the_image():
    images = torch.full((50, 1, 64, 64), 200, dtype=torch.uint8)
    for diameter in probe.DIAMETERS:
        out = probe.spots(images, diameter, 0.4, dia_lib.step_generator("cpu", 0, "spots", 0))
        area = (200 - out.float()).sum((1, 2, 3)) / (200 * 0.4)
        assert torch.allclose(area, torch.full_like(area, 3.1416 * (64 * diameter / 2) ** 2), rtol=0.25)
        assert out.min() >= 120 and (out[:, :, [0, -1]] == 200).float().mean() > 0.9
    assert not torch.equal(out[0], out[1])


def test_similarities_are_of_the_views_that_stage_2_makes():
    """A mode's view is of the small image, but without diffusion never of one enlarged for the UNet."""
    x = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    class Flat(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1), None

    def cosine(view):
        return torch.nn.functional.cosine_similarity(x.flatten(1), view.flatten(1)).mean().item()

    def unet(y, t):
        return 0.1 * t.view(-1, 1, 1, 1) * torch.ones_like(y)

    abar = dia_lib.alpha_bar()
    for h in (8, 24):
        small = torch.rand(6, 1, h, h, generator=torch.Generator().manual_seed(1))
        row = probe.similarities(Flat(), x, small, unet, abar, 7, 32)
        y, times = small if h < 16 else x, torch.full((6,), 7)
        for mode in ("resize", "gaussian", "median"):
            assert row[f"sim_{mode}"] == pytest.approx(cosine(dia_lib.dissolve_view(y, 16, mode)), abs=1e-6)
        view = dia_lib.dissolve_view(small, 16, "diffusion", unet, times, abar, 32)
        assert row["sim_diffusion"] == pytest.approx(cosine(view), abs=1e-6)


def test_probe_of_a_run(chain, folder, tmp_path, monkeypatch, capsys):
    """Similarities of an encoder that saw little; a spot that can't be missed, one that can't be seen."""
    monkeypatch.setattr(probe, "DIAMETERS", (1 / 16, 1 / 2))
    monkeypatch.setattr(probe, "CONTRASTS", (0.001, 0.1, 0.8))
    argv = ["--out", chain, "--diffusion", chain / "diffusion.pt", "--results", tmp_path / "probe.csv"]
    assert call(probe, *argv) is None and call(probe, *argv) is None
    row, = csv.DictReader((tmp_path / "probe.csv").open())
    assert {"sim_resize", "sim_diffusion", "sim_augmented", "sim_other", "local_0.5_0.8"} <= row.keys()
    assert row["dissolve"] == "diffusion" and "draws=2" in row["settings"].split()
    assert all(-1 <= float(v) <= 1 for k, v in row.items() if k.startswith("sim_"))
    assert 0.4 <= float(row["local_0.0625_0.001"]) <= 0.6 and float(row["local_0.5_0.8"]) > 0.8
    state = dia_lib.load_checkpoint(chain / "dia.pt", "dia", "cpu")
    data, encoder = evaluate.data_of(state["settings"], chain), dia_lib.load_encoder(state, "cpu")
    held, cpu = data.held[~data.calibration], torch.device("cpu")
    generator = dia_lib.step_generator("cpu", 0, "spots", 1)                # of the second diameter
    images = torch.cat([held, *(probe.spots(held, 1 / 2, 0.1, generator) for _ in range(2))])
    by_local = local.local_score(local.local_fit(encoder, data.train, cpu), encoder, images, cpu)
    stats = dia_lib.csi_fit(*dia_lib.embed(encoder, data.train, "rotate", 2, cpu))
    parts = dia_lib.csi_parts(stats, *dia_lib.embed(encoder, images, "rotate", 2, cpu))
    for score, values in (("local", by_local), ("csi", parts["csi"]), ("cos", parts["cos"])):
        auroc = roc_auc_score(torch.arange(len(images)) >= len(held), values)
        assert float(row[f"{score}_0.5_0.1"]) == pytest.approx(auroc, abs=6e-5)
    other = tmp_path / "other"
    args = ["--data", folder, "--out", other, *STAGE2, "--holdout", "0.2", "--dissolve", "none", "--steps", 1]
    assert call(train_dia, *args) is None
    assert "not trained on the same images" in call(probe, "--out", other, *argv[2:])
