"""The study: a table's runs, tables from the csv files, intervals, the page in step, the released quirks."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import call, texture
from scipy import stats
from sklearn.metrics import roc_auc_score

import dia_lib
import evaluate
import train_dia
import train_diffusion
from extras.tables import insert, put
from study import as_released, page, paper


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """In MedMNIST's format, 12 px: 16 training normals, 8 and 4 to hold out, 8 and 4 to test on."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("npz") / "small.npz"
    arrays = {}
    for split, normals, anomalies in (("train", 16, 0), ("val", 8, 4), ("test", 8, 4)):
        labels = np.array([0] * normals + [1] * anomalies)
        arrays[f"{split}_images"] = np.stack([texture(rng, 12, bool(label)) for label in labels])
        arrays[f"{split}_labels"] = labels[:, None]
    np.savez(path, **arrays)
    return path


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Empty tables and a copy of both pages to write to; --quick's budgets are four steps of four images."""
    home = tmp_path / "study"
    home.mkdir()
    shutil.copy(page.HERE / "README.md", home)
    shutil.copy(page.HERE.parent / "README.md", tmp_path)
    monkeypatch.setattr(page, "HERE", home)
    for module in (page, paper):
        monkeypatch.setattr(module, "TABLE", home / "results.csv")
        monkeypatch.setattr(module, "SCORES", home / "results-scores.csv")
    for module, budget in ((train_diffusion, {"steps": 4, "batch_size": 4, "dim": 8}),
                           (train_dia, {"steps": 4, "batch_size": 4})):
        for name, value in budget.items():
            monkeypatch.setitem(module.QUICK, name, value)
    return home


def run(npz, out, *lines, table="table1", seeds=(0,)):
    return call(paper, table, "--data", npz, "--normal-class", 0, "--steps", "quick", "--seeds", *seeds,
                "--out", out, *(["--lines", *lines] if lines else []))


def by_hand(rows, column="score"):
    """AUROC of a column of scores.csv: the share of pairs that are ranked right, ties count half."""
    a, n = ([float(r[column]) for r in rows if r["label"] == label] for label in "10")
    return np.mean([(x > y) + (x == y) / 2 for x in a for y in n])


# ---- Runs ----------------------------------------------------------------------------------------------


def test_a_tables_runs_are_made_scored_and_put_on_the_pages(npz, study, tmp_path, capsys):
    """Every column against the run's own files; weights kept on the way are scored, then deleted."""
    lines = ["DIA", "CSI", "CSI, as long as DIA", "gaussian, as strong as DIA"]
    two = tmp_path / "two"
    (tmp_path / "README.md").write_text(put((tmp_path / "README.md").read_text(), "front", "nothing"))
    assert run(npz, tmp_path / "runs", *lines) is None
    rows = {r["line"]: r for r in page.read(study / "results.csv")}
    assert set(lines) < rows.keys() and sum(name.startswith("floor: ") for name in rows) == 3
    folder = tmp_path / "runs" / "small-normal-0-quick" / "s0"
    for line in lines:
        out, row = folder / paper.plain(line), rows[line]
        images = page.read(out / "scores.csv")
        assert float(row["auroc"]) == pytest.approx(by_hand(images), abs=6e-5)
        assert (row["data"], row["budget"], row["seed"]) == ("small normal 0", "`--quick`", "0")
        assert not list(out.glob("step-*"))
        shutil.copytree(out, two, dirs_exist_ok=True)
        assert call(evaluate, "--out", two, "--passes", 2) is None
        floors = json.loads((out / "metrics.json").read_text())["floors_auroc"]
        assert len(floors) == (3 if line == "DIA" else 0)                   # once for each seed
        metrics = json.loads((two / "metrics.json").read_text())
        assert float(row["test_last"]) == pytest.approx(metrics["auroc"], abs=6e-5)
        assert float(row["seconds_2"]) == pytest.approx(paper.logged(out, "dia", "seconds")[-1]["seconds"])
        chosen = paper.logged(out, "choose", "val_real")[-1]
        assert float(row["made_defects"]) == pytest.approx(chosen["val_auroc"], abs=6e-5)
        assert float(row["val_anomalies"]) == pytest.approx(chosen["val_real"], abs=6e-5)
    assert rows["DIA"]["kept"] == rows["CSI"]["kept"] == "4"
    assert float(rows["DIA"]["seconds_1"]) > 0 == float(rows["CSI"]["seconds_1"])
    reports = [r.split() for r in rows["DIA"]["stage1"].split("; ")]
    assert [int(r[0]) for r in reports] == [1, 2, 3, 4] and not rows["CSI"]["stage1"]
    assert not rows["CSI"]["change"] and float(rows["DIA"]["change"]) > 1
    assert float(rows[lines[3]]["change"]) == pytest.approx(float(rows["DIA"]["change"]), rel=0.02)
    steps = dia_lib.load_checkpoint(folder / paper.plain(lines[2]) / "dia.pt", "dia", "cpu")["step"]
    assert rows[lines[2]]["steps"] == str(steps) and rows["CSI"]["steps"] == "4"
    dia, csi = ([float(rows[line][f"seconds_{i}"]) for i in (1, 2)] for line in ("DIA", "CSI"))
    assert steps == pytest.approx(4 * sum(dia) / csi[1], abs=0.51)
    text = (study / "README.md").read_text()
    assert f"**{float(rows['DIA']['auroc']):.3f}**" in text and "(DIA) - (CSI)" in text
    assert "not run" in (tmp_path / "README.md").read_text()

    tables, before = (study / "results.csv").read_text(), len(list(folder.glob("*")))
    capsys.readouterr()
    assert run(npz, tmp_path / "elsewhere", *lines) is None                 # nothing is made again
    assert (study / "results.csv").read_text() == tables and not (tmp_path / "elsewhere").exists()
    assert capsys.readouterr().out.count("in results.csv already") == 4 and before == 5
    table = page.read(study / "results.csv")
    with open(study / "results.csv", "w", newline="") as file:              # a row of an earlier version
        csv.writer(file).writerows([page.COLUMNS, *((r | {"change": ""}).values() for r in table[:-1])])
    assert "delete its row" in run(npz, tmp_path / "elsewhere", lines[3])


def test_the_best_by_test_is_that_of_the_weights_kept_on_the_way(npz, study, tmp_path, monkeypatch):
    found = {"step-6": 0.9, "step-12": 0.3}
    monkeypatch.setitem(train_dia.QUICK, "steps", 12)
    monkeypatch.setattr(paper, "two_passes", lambda folder, data, device: found[folder.name])
    assert call(paper, "table1", "--data", npz, "--normal-class", 0, "--steps", "quick", "--seeds", 0,
                "--lines", "CSI", "--kept", 2, "--out", tmp_path) is None
    row, = [r for r in page.read(study / "results.csv") if r["line"] == "CSI"]
    assert (row["test_best"], row["test_last"], row["kept"]) == ("0.9000", "0.3000", "2")


def test_a_stopped_run_goes_on_and_gives_the_same_row(npz, study, tmp_path, monkeypatch):
    """Stopped within stage 1, within stage 2, after training, when all but a guide is scored."""
    assert run(npz, tmp_path / "whole", "DIA") is None
    whole, = [r for r in page.read(study / "results.csv") if r["line"] == "DIA"]
    (study / "results.csv").unlink()

    def stop(*_):
        raise SystemExit("stopped")

    def stop_at(step, draw):
        return lambda *args: stop() if args[-1] == step else draw(*args)

    indices = dia_lib.batch_indices
    for commit, module, name, value in (("a", train_diffusion, "batch_indices", stop_at(2, indices)),
                                        ("b", train_dia, "batch_indices", stop_at(3, indices)),
                                        ("c", evaluate, "main", stop), ("d", paper, "choose", stop)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            patch.setattr(paper, "code_version", lambda commit=commit: commit)
            assert "DIA, seed 0: stopped" in run(npz, tmp_path / "parts", "DIA")
            assert not (study / "results.csv").exists()
    assert run(npz, tmp_path / "parts", "DIA") is None
    parts, = [r for r in page.read(study / "results.csv") if r["line"] == "DIA"]
    assert (whole["commit"], parts["commit"]) == (paper.code_version(), "b")       # what began to train it
    for row in (whole, parts):
        del row["seconds_1"], row["seconds_2"], row["commit"]
    assert parts == whole

    (study / "results.csv").unlink()                                        # to make it anew is to train anew
    assert "weights kept on the way are gone: delete" in run(npz, tmp_path / "parts", "DIA")
    table = page.read(study / "results-scores.csv")
    insert(study / "results-scores.csv", [r | {"values": "1 0"} for r in table if not r["line"]], page.KEY)
    assert "a small normal 0 with other test images" in run(npz, tmp_path / "whole-2", "CSI")


def test_what_cant_be_made_is_told_and_the_rest_is_made(npz, study, tmp_path, monkeypatch):
    """Lines that need DIA's row, without one; the line after them has its row, and the pages are written."""
    lines = ["CSI, as long as DIA", "gaussian, as strong as DIA", "CSI"]
    said = run(npz, tmp_path / "runs", *lines)
    assert said.startswith("not made: CSI, as long as DIA, seed 0: results.csv has no processor of DIA")
    assert "gaussian, as strong as DIA, seed 0: results.csv has no change of DIA" in said
    assert {r["line"] for r in page.read(study / "results.csv") if "floor" not in r["line"]} == {"CSI"}
    assert "small normal 0" in (study / "README.md").read_text()
    assert "--lines: name a table" in call(paper, "--lines", "CSI")

    def full(args, line, *_):
        if line == "DIA":
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(paper, "make", full)
    assert run(npz, tmp_path / "runs", "DIA", "CSI") == "not made: DIA, seed 0: no memory"


@pytest.mark.parametrize(("has", "says"), [(True, "bfloat16"), (False, "float32")])
def test_seconds_are_of_a_processor_its_threads_and_a_precision(monkeypatch, has, says):
    """The same chip's name stands for processors with bfloat16 and without: their seconds do not compare."""
    monkeypatch.setattr(dia_lib, "has_bfloat16", lambda device: has)
    assert re.fullmatch(rf".+, \d+ threads?, {says}", paper.chip(torch.device("cpu")))


def test_what_no_run_can_have_stops_all_at_once(npz, study, tmp_path):
    """Before any run is made, and once, not for each line and seed."""
    words = ["table1", "--data", npz, "--normal-class", 0, "--device", "cpu", "--out", tmp_path / "runs"]
    assert call(paper, *words, "--steps", "quick", "--launch", "graph").startswith("--launch graph: CUDA")
    assert call(paper, *words, "--steps", 9, "--batch-size", 99).startswith("--batch-size 99: there are 16")
    assert "quik: needs an integer from 1 on, or full, or quick" in call(paper, *words, "--steps", "quik")
    (study / "results.csv").write_text("data,budget\nelpv,full\n")
    assert "of another version" in call(paper, *words, "--steps", "quick")
    assert not (tmp_path / "runs").exists()


def test_lines_that_are_a_sets_own_settings_are_dia(npz, study, tmp_path, monkeypatch):
    """t from 30, quarter-turns and 32 px are DIA's defaults for this set: those runs are not made twice."""
    made = []
    monkeypatch.setattr(paper, "make", lambda args, line, *more: made.append(line))
    for table in ("table2", "table4", "table5"):
        assert run(npz, tmp_path, table=table) is None
    assert made == ["DIA", "DIA, t 130-230", "DIA, t 230-330", "DIA, t 330-430", "DIA, t 430-530",
                    "DIA", "CSI", "DIA, perm", "CSI, perm", "DIA"]          # 12 px are not dissolved at 64
    assert "of that table: 'DIA', 'DIA, dissolved at 64 px'" in run(npz, tmp_path, "CSI", table="table5")
    assert run(npz, tmp_path, "resize", "copy") is None and made[-1] == "copy" and len(made) == 11


def test_every_line_and_every_command_of_the_page_is_taken(npz, monkeypatch):
    for first, second in paper.LINES.values():
        if first is not None:
            train_diffusion.arguments(["--out", "nowhere", *first.split()])
        train_dia.arguments(["--out", "nowhere", *second.split()])
    commands = re.findall(r"^python -m (study\.\w+)([^#\n]*)", (page.HERE / "README.md").read_text(), re.M)
    assert len(commands) >= 3
    for name, words in commands:
        with monkeypatch.context() as patch:
            patch.setattr(paper, "make", lambda *_: None)
            patch.setattr(paper, "write", lambda: None)
            patch.setattr(dia_lib, "check_batch", lambda *_: None)          # the set has but 16 images
            patch.setattr(paper, "load_data", lambda *_, **__: dia_lib.load_data(str(npz), normal_class="0"))
            assert call(paper if name == "study.paper" else as_released, *words.split()) is None
    assert set().union(*paper.TABLES.values()) == set(paper.LINES)


def test_contrast_by_two_thirds_is_a_step_of_gamma_three_halves():
    """LARS steps by the direction of a gradient alone, but for weight decay: 2/3 c + s is 2/3 (c + 3/2 s)."""
    args, _ = train_dia.arguments(paper.LINES["CSI, contrast x 2/3"][1].split() + ["--out", "nowhere"])
    assert args.gamma * 2 / 3 == 1 and args.dissolve == "none"
    steps = []
    for scale in (1, 2 / 3):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        before = layer.weight.detach().clone()
        optimizer = train_dia.LARS(layer.parameters())
        (scale * layer(torch.ones(2, 5)).square().sum()).backward()
        optimizer.step(torch.tensor(1.0))
        steps.append(layer.weight.detach() - before)
    assert steps[0].norm() > 0 and torch.allclose(*steps, rtol=1e-4)


def test_sigma_is_found_by_the_change_it_makes():
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with paper.with_sigma(1.3):
        target = paper.change(x, x, "gaussian")
    assert paper.as_strong(target, x, x) == pytest.approx(1.3, abs=0.01)
    usual = paper.change(x, x, "gaussian")
    assert usual == pytest.approx((dia_lib.dissolve_view(x, 28, "gaussian") - x).abs().mean().item() * 255)
    assert usual != pytest.approx(target, rel=0.01)             # with_sigma is over
    with pytest.raises(SystemExit, match="no blur changes images by 200"):
        paper.as_strong(200, x, x)


# ---- Tables --------------------------------------------------------------------------------------------


def test_bootstrap_gives_the_difference_and_nothing_for_equal_runs():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 50)
    a, b = rng.normal(size=(2, 2, 80)).round(1) + np.stack([0 * labels, 0.5 * labels])[:, None]  # with ties
    low, high = page.paired_bootstrap(labels, a, b)
    each = [roc_auc_score(labels, x) - roc_auc_score(labels, y) for x, y in zip(a, b, strict=True)]
    assert low < np.mean(each) < high
    assert page.paired_bootstrap(labels, a, a) == (0, 0)


def test_bootstrap_interval_covers_at_about_its_rate_and_pairing_narrows_it():
    """True difference 0: two noisy readings of the same images. Intervals of other images are wider."""
    covered, widths = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = np.array([0] * 60 + [1] * 90)
        image = rng.normal(size=150) + labels
        a, b = image + 0.5 * rng.normal(size=(2, 1, 150))
        low, high = page.paired_bootstrap(labels, a, b, 500)
        covered += low <= 0 <= high
        other = rng.normal(size=(1, 150)) + labels + 0.5 * rng.normal(size=(1, 150))
        wide = page.paired_bootstrap(labels, a, other, 500)
        widths.append((high - low) / (wide[1] - wide[0]))
    assert 85 <= covered <= 99 and np.mean(widths) < 0.8
    steady, swing = image[None] + np.zeros((2, 1)), np.stack([image, -image])   # a gap that hangs on the seed
    low, high = page.paired_bootstrap(labels, swing, steady, 500)
    assert low < -0.4 and high == 0


def row(line, seed, auroc, data="pneumoniamnist", budget="9 steps", **more):
    return dict.fromkeys(page.COLUMNS, "") | {
        "data": data, "budget": budget, "line": line, "seed": str(seed), "auroc": str(auroc),
        "seconds_2": "120", "processor": "AMD EPYC, 1 thread", "commit": "abc"} | more


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_results_say_what_the_rows_say():
    rows = [row("DIA", 0, 0.8, seconds_1="60", change="11.5", test_best="0.85", test_last="0.7", kept="20",
                made_defects="0.7"),
            row("DIA", 1, 0.9, seconds_1="120", change="12.5", test_best="0.95", test_last="0.8", kept="20",
                commit="def"),
            row("CSI", 0, 0.7, processor="NVIDIA H200", seconds_1="0.0", kept="20"),
            row("CSI", 0, 0.1, data="elpv"), row("CSI", 0, 0.2, budget="8 steps")]
    header, _, dia, csi = cells(page.results(rows, "pneumoniamnist", "9 steps"))
    assert header == ["", "seeds", "AUROC at the last step", "paper", "two passes: last", "best by test",
                      "of", "change", "minutes", "commit"]
    assert dia == ["DIA", "0, 1", "**0.850 ± 0.071** (0.800, 0.900)", "0.903", "0.750 ± 0.071",
                   "0.900 ± 0.071", "20", "12.000 ± 0.707", "3.5 (AMD EPYC, 1 thread)", "abc, def"]
    assert csi == ["CSI", "0", "**0.700** (0.700)", "0.834", "", "", "", "", "2.0 (NVIDIA H200)", "abc"]


def test_differences_are_paired_by_seed_and_have_both_intervals():
    rng, labels = np.random.default_rng(0), np.array([0] * 30 + [1] * 50)
    scores, rows = {("pneumoniamnist", "", "", ""): labels}, []
    for line, seeds in (("DIA", (0, 1, 2)), ("copy", (0, 1, 3)), ("CSI", (2,))):
        for seed in seeds:
            scores["pneumoniamnist", "9 steps", line, str(seed)] = drawn = rng.normal(size=80) + labels
            rows.append(row(line, seed, roc_auc_score(labels, drawn)))
    _, _, copy, csi = cells(page.differences(rows, scores, "pneumoniamnist", "9 steps"))
    gaps = [float(rows[s]["auroc"]) - float(rows[3 + s]["auroc"]) for s in (0, 1)]
    low, high = stats.t.interval(0.95, 1, np.mean(gaps), stats.sem(gaps))
    assert copy[:4] == ["(DIA) - (copy)", "0, 1", f"{np.mean(gaps):+.3f}", f"{low:+.3f} to {high:+.3f}"]
    assert re.fullmatch(r"[+-]0\.\d{3} to [+-]0\.\d{3}", copy[4])
    assert csi[:2] == ["(DIA) - (CSI)", "2"] and csi[3] == ""              # one seed has no t interval
    assert page.differences(rows[:1], scores, "pneumoniamnist", "9 steps") == ""
    variant = "DIA, as released: t"
    scores["pneumoniamnist", "9 steps", variant, "0"] = scores["pneumoniamnist", "9 steps", "DIA", "0"]
    rows.append(row(variant, 0, rows[0]["auroc"]))
    last = cells(page.differences(rows, scores, "pneumoniamnist", "9 steps"))[-1]
    assert last[:3] == ["(DIA, as released: t) - (DIA)", "0", "+0.000"]     # every variant against DIA


def test_changes_by_stage_1_are_means_over_seeds():
    rows = [row("DIA", 0, 0.8, stage1="500 10.00 11.00; 1000 8.00 9.00"),
            row("DIA", 1, 0.8, stage1="500 12.00 13.00")]
    said = page.memorised(rows, "pneumoniamnist", "9 steps")
    assert said.endswith("500 steps 11.00 and 12.00; 1,000 steps 8.00 and 9.00.")
    assert page.memorised([row("DIA", 0, 0.8)], "pneumoniamnist", "9 steps") == ""


def test_front_page_has_its_columns_and_the_highest_floor(study):
    quick = {"budget": "`--quick`"}
    rows = [row("DIA", 0, 0.5, **quick), row("DIA", 1, 0.7, **quick), row("CSI", 0, 0.4, **quick),
            row("CSI", 1, 0.5, **quick), row("floor: pixels", 0, 0.75, **quick),
            row("floor: pixels", 1, 0.75, **quick), row("floor: pixels", 0, 0.99),
            row("floor: untrained", 0, 0.8, **quick), row("floor: untrained", 1, 0.6, **quick),
            row("copy", 1, 0.8, **quick)]                                   # not of the seeds that DIA has
    with open(study / "results.csv", "w", newline="") as file:
        csv.writer(file).writerows([page.COLUMNS, *(r.values() for r in rows)])
    assert page.floors(rows + [row("floor: untrained", 2, 0.8, **quick)], "pneumoniamnist", "`--quick`") == {
        "pixels": [0.75], "untrained": [0.8, 0.6, 0.8]}                     # of a floor without seeds, one
    table = cells(page.front())
    column = page.FRONT.index(("pneumoniamnist", "`--quick`")) + 1
    low, high = stats.t.interval(0.95, 1, 0.15, stats.sem([0.1, 0.2]))
    assert [line[column] for line in table[2:]] == [
        "0.600 ± 0.141", "0.450 ± 0.071", "0.800 (seeds: 1)", "0.750, pixels",
        f"+0.150 ({low:+.3f} to {high:+.3f})", "-0.100 (one seed)"]
    assert table[2][-1] == "0.903" and table[3][-1] == "0.834" and table[2][1] == "not run"


def test_multiply_adds_are_counted_by_hand():
    """The encoder's are ResNet-18's 1.81 G at 224 px; a UNet at 64 px has four times those at 32 px."""
    table = cells(page.table6())[2:]
    assert [float(c) for c in table[3][1:]] == pytest.approx([11.51, 1.81], abs=0.02)
    assert float(table[1][2]) == pytest.approx(4 * float(table[0][2]), rel=0.05)
    count = sum(p.numel() for p in dia_lib.UNet(3).parameters()) / 1e6
    assert float(table[0][1]) == pytest.approx(count, abs=0.006)


def test_pages_of_one_seed_say_so(study):
    """No interval of one seed, no floors where none are; a row of an earlier version has stage 2 alone."""
    quick = {"budget": "`--quick`", "seconds_1": "60"}
    rows = [row("DIA", 0, 0.75, **quick | {"seconds_1": ""}), row("CSI", 0, 0.5, **quick)]
    with open(study / "results.csv", "w", newline="") as file:
        csv.writer(file).writerows([page.COLUMNS, *(r.values() for r in rows)])
    labels = np.array([0, 0, 1, 1])
    insert(study / "results-scores.csv", [
        {**dict.fromkeys(page.KEY, ""), "data": "pneumoniamnist", "values": " ".join(map(str, labels))},
        *({**{k: r[k] for k in page.KEY}, "values": values} for r, values in
          zip(rows, ("1 3 2 4", "1 4 2 3"), strict=True))], page.KEY)
    text = page.tables()
    assert "| (DIA) - (CSI) | 0 | +0.250 |  |  |" in text and "Floors" not in text
    assert "2.0 (AMD EPYC, 1 thread; stage 2 alone)" in text and "3.0 (AMD EPYC, 1 thread) |" in text
    column = page.FRONT.index(("pneumoniamnist", "`--quick`")) + 1
    assert cells(page.front())[-2][column] == "+0.250 (one seed)"


def test_the_page_is_in_step_with_the_results(tmp_path, monkeypatch):
    """What python -m study.paper writes is what stands there: no number typed by hand, none forgotten."""
    home = tmp_path / "study"
    home.mkdir()
    for path in (page.HERE / "README.md", page.HERE.parent / "README.md"):
        shutil.copy(path, home if path.parent == page.HERE else tmp_path)
    pages = [(page.HERE / "README.md").read_text(), (page.HERE.parent / "README.md").read_text()]
    monkeypatch.setattr(page, "HERE", home)
    page.write()
    assert [(home / "README.md").read_text(), (tmp_path / "README.md").read_text()] == pages
    assert list(page.read(page.TABLE)[0]) == page.COLUMNS


# ---- The released code's quirks ------------------------------------------------------------------------


def test_quirks_are_what_they_say():
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    abar, seen = dia_lib.alpha_bar(), []

    def unet(y, t):
        seen.append((y, t))
        return 0.1 * y

    t = torch.arange(30, 126, 12)
    view = as_released.unscaled(x, 28, "diffusion", unet, t, abar, 32)
    padded = dia_lib.pad_to(x, 32)
    assert torch.equal(seen[0][0], padded)                                  # [0, 1] goes in
    a, b = ((1 / abar[t]).sqrt().view(-1, 1, 1, 1), (1 / abar[t] - 1).sqrt().view(-1, 1, 1, 1))
    assert torch.allclose(view, (a * padded - b * 0.1 * padded).clamp(-1, 1)[..., 2:30, 2:30], atol=1e-5)

    seen.clear()
    views = as_released.by_shift(dia_lib.dissolve_view)(x, 28, "diffusion", unet, t, abar, 32)
    assert views.shape == (4, 8, 1, 28, 28) and len(seen) == 4
    for (_, times), first in zip(seen, t[[0, 2, 4, 7]], strict=True):
        assert times.shape == (8,) and torch.all(times == first)

    u = torch.rand(11, 3 * 4 * 8, generator=torch.Generator().manual_seed(1))
    same = as_released.make_views([x, x.flip(3), x.expand(4, -1, -1, -1, -1)], "rotate", u)
    assert torch.equal(same, dia_lib.make_views([x, x.flip(3), x], "rotate", u))
    other = as_released.make_views([x, x, torch.stack([x, x, 0 * x, x])], "rotate", u)
    where = (other != dia_lib.make_views([x, x, x], "rotate", u)).flatten(1).any(1).nonzero().flatten()
    assert set(where.tolist()) <= set(range((2 * 4 + 2) * 8, (2 * 4 + 3) * 8)) and len(where) == 8


def test_draws_repeat_from_the_second_epoch_on():
    usual = [dia_lib.batch_indices(12, 4, 0, step) for step in range(9)]
    drawn = [dia_lib.draw_step(0, step, 3, 4)[1] for step in range(9)]
    with as_released.patched({"draws"}, 3):
        again = [train_dia.batch_indices(12, 4, 0, step) for step in range(9)]
        flips = [train_dia.draw_step(0, step, 3, 4)[1] for step in range(9)]
    for step in range(9):
        at = step if step < 6 else step - 3
        assert torch.equal(again[step], usual[at]) and torch.equal(flips[step], drawn[at])
    assert not torch.equal(flips[0], flips[3])
    assert train_dia.draw_step is dia_lib.draw_step                         # the core is as it was


def test_all_quirks_train_and_leave_their_rows(npz, study, tmp_path):
    """All five at once, raw weights and twins alone, beside DIA: each gives another encoder."""
    words = ["--data", npz, "--normal-class", 0, "--steps", "quick", "--seeds", 0, "--out", tmp_path / "runs"]
    assert run(npz, tmp_path / "runs", "DIA") is None
    assert call(as_released, *words, "--quirks", "all", "raw", "twins") is None
    rows = {r["line"]: r for r in page.read(study / "results.csv") if "floor" not in r["line"]}
    assert list(rows) == ["DIA", *(f"DIA, as released: {name}" for name in ("all", "raw", "twins"))]
    folder = tmp_path / "runs" / "small-normal-0-quick" / "s0"
    states = [dia_lib.load_checkpoint(folder / paper.plain(line) / "dia.pt", "dia", "cpu") for line in rows]
    weights = [torch.cat([v.flatten().float() for v in s["encoder"].values()]) for s in states]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])
    assert [s["settings"]["twins"] for s in states] == ["negative", "excluded", "negative", "excluded"]
    assert [list(s["settings"]["t_range"]) for s in states] == [[30, 130], [30, 100], [30, 130], [30, 130]]
    assert len(list(folder.glob("stage1*"))) == 1                           # one stage 1 for all
