"""The command lines, with tiny budgets: the whole chain, exact resume, and one sentence for each mistake."""

import csv
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGE1, STAGE2, call, flat, log_of
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_data import medmnist

import dia_lib
import evaluate
import train_dia
import train_diffusion


def test_chain_writes_what_the_readme_says(own_chain, folder, capsys):
    assert {p.name for p in own_chain.iterdir()} == {"diffusion.pt", "dia.pt", "dissolving.png", "log.jsonl", "scores.csv",
                                                 "metrics.json", "examples.png", "stats.pt"}
    rows = list(csv.DictReader((own_chain / "scores.csv").open()))
    assert len(rows) == 30 and list(rows[0]) == ["path", "group", "label", "score", "p_value", "anomaly"]
    metrics = json.loads((own_chain / "metrics.json").read_text())
    assert metrics["auroc"] == pytest.approx(roc_auc_score([int(r["label"]) for r in rows], [float(r["score"]) for r in rows]))
    low, high = metrics["auroc_interval_95"]
    assert low <= metrics["auroc"] <= high and len(metrics["floors_auroc"]) == 3 and set(metrics["parts_auroc"]) == {
        "csi", "con", "cls", "cos", "norm", "local"}
    wrong = [float(r["p_value"]) <= 0.05 for r in rows if r["label"] == "0"]
    assert metrics["decision"]["false_positive_rate"] == np.mean(wrong) and metrics["decision"]["calibration_normals"] > 2
    log = [json.loads(line) for line in (own_chain / "log.jsonl").read_text().splitlines()]
    assert {"held_t0-29", "held_t30-129", "loss"} <= log[0].keys() and log[0]["zero"] == 0.798
    last = [r for r in log if r["stage"] == "dia"][-1]
    assert {"shift_acc", "shift_acc_held", "sim_positive", "sim_twin", "sim_other", "val_auroc", "lr"} <= last.keys()
    assert 0 <= last["val_auroc"] <= 1
    for picture in ("dissolving.png", "examples.png"):
        assert np.asarray(Image.open(own_chain / picture)).std() > 10               # not blank

    # Again, from stats.pt, with other batches: the same scores; the last line is the AUROC.
    assert call(evaluate, "--out", own_chain, "--passes", 2, "--batch-size", 7) is None
    assert capsys.readouterr().out.splitlines()[-1] == f"auroc {metrics['auroc']:.4f}"
    again = [float(r["score"]) for r in csv.DictReader((own_chain / "scores.csv").open())]
    assert np.allclose(again, [float(r["score"]) for r in rows], atol=0.02)


@pytest.mark.parametrize("mode", ["residual", "gaussian", "median", "resize", "copy", "none"])
def test_every_mode_trains_and_is_evaluated(mode, chain, folder, tmp_path, capsys):
    args = ["--diffusion", chain / "diffusion.pt"] if mode == "residual" else []
    stage2 = [*STAGE2[:1], "1", *STAGE2[2:]]
    assert call(train_dia, "--data", folder, "--out", tmp_path, "--dissolve", mode, "--twins", "excluded", *stage2, *args) is None
    assert call(evaluate, "--out", tmp_path, "--passes", 1) is None
    assert (tmp_path / "examples.png").exists()
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert ("sim_twin" in row) == (mode != "none")


def test_several_runs_give_mean_and_sd(own_chain, capsys):
    assert call(evaluate, "--out", own_chain, own_chain, "--passes", 1) is None
    lines = capsys.readouterr().out.splitlines()
    assert "+- 0.0000" in lines[-2] and lines[-1].startswith("auroc ")


def test_runs_are_gathered_in_a_table(own_chain, folder, tmp_path, monkeypatch):
    """A line a run, replaced when it comes again; kept weights are runs of their own; validation needs no test image."""
    table = tmp_path / "study" / "results.csv"
    args = ["--data", folder, "--out", tmp_path / "run", *STAGE2, "--steps", "2", "--dissolve", "resize", "--tau", "0.2",
            "--dissolve-size", "40", "--every", "1", "--keep", "--jitter", "0"]
    assert call(train_dia, *args) is None
    assert "--results" in call(evaluate, "--validation-only", "--out", own_chain)
    for passes in (1, 2):
        assert call(evaluate, "--out", own_chain, tmp_path / "run", "--passes", passes, "--results", table) is None
    with monkeypatch.context() as m:
        m.setattr(evaluate, "load_data", None)                                  # no image is read, no test image either
        assert call(evaluate, "--out", tmp_path / "run/step-1", tmp_path / "run", "--validation-only", "--results", table) is None
    every = list(csv.DictReader(table.open()))
    rows = [r for r in every if not r["dissolve"].startswith("floor")]
    floors = {r["dissolve"].removeprefix("floor: "): float(r["auroc"]) for r in every if r["dissolve"].startswith("floor")}
    expected = json.loads((tmp_path / "run/metrics.json").read_text())["floors_auroc"]
    assert len(every) == 13 and floors == pytest.approx(expected, abs=1e-4)
    assert list(rows[0]) == ["data", "dissolve", "settings", "seed", "steps", "score", "minutes", "val_auroc", "auroc", "ap",
                             "within_group_auroc", "commit", "processor"]
    assert [(r["data"], r["dissolve"], r["steps"]) for r in rows[::3]] == [("tiles", "diffusion", "4"), ("tiles", "resize", "2"),
                                                                           ("tiles", "resize", "1")]
    assert [r["score"] for r in rows] == list(dia_lib.SCORES) * 3
    assert {"stage1_steps=4", "stage1_dim=8", "holdout=0.3", "steps=4"} <= set(rows[0]["settings"].split())
    assert {"tau=0.2", "dissolve_size=40", "jitter=0.0"} <= set(rows[3]["settings"].split())
    assert rows[6]["settings"] == rows[3]["settings"] and rows[6]["auroc"] == "" and 0 <= float(rows[6]["val_auroc"]) <= 1
    scores = list(csv.DictReader((tmp_path / "study/results-scores.csv").open()))
    assert [(r["dissolve"], r["score"]) for r in scores] == [("", "labels"), *((d, s) for d in ("diffusion", "resize")
                                                                               for s in dia_lib.SCORES)]
    labels = [int(v) for v in scores[0]["values"].split()]
    for out, found, line in ((own_chain, rows[:3], scores[1:4]), (tmp_path / "run", rows[3:6], scores[4:7])):
        metrics = json.loads((out / "metrics.json").read_text())
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        last = [r for r in log if "val_auroc" in r][-1]
        assert metrics["passes"] == 2 and metrics["score"] == "local"
        assert float(found[2]["auroc"]) == pytest.approx(metrics["auroc"], abs=1e-4)
        for row, values in zip(found, line, strict=True):
            assert float(row["auroc"]) == pytest.approx(metrics["parts_auroc"][row["score"]], abs=1e-4)
            again = roc_auc_score(labels, [float(v) for v in values["values"].split()])
            assert float(row["auroc"]) == pytest.approx(again, abs=1e-3)
            assert float(row["val_auroc"]) == pytest.approx(last[evaluate.VALIDATION[row["score"]]], abs=1e-4)
            assert row["processor"] == dia_lib.processor(torch.device("cpu")) != ""
            assert float(row["minutes"]) * 60 == pytest.approx(last["seconds"], abs=3)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "another table" in call(evaluate, "--out", own_chain, "--validation-only", "--results", tmp_path / "other.csv")


def test_every_flag_of_the_method_reaches_the_weights(chain, folder, tmp_path):
    """One step with a flag gives other weights than one step without; a wrong wiring would give the same."""
    def weights(name, *flags):
        args = [*STAGE2[2:], "--steps", "1", "--diffusion", chain / "diffusion.pt", "--dissolve", "residual",
                "--optimizer", "lars", "--lr", "1"]
        assert call(train_dia, "--data", folder, "--out", tmp_path / name, *args, *flags) is None
        return torch.load(tmp_path / name / "dia.pt", weights_only=True)["encoder"]["backbone.conv1.weight"]

    seen = [weights("plain")]
    for flag, value in (("tau", 0.2), ("gamma", 0), ("gain", 3), ("jitter", 0), ("twin-weight", 100), ("twins", "excluded")):
        seen.append(weights(flag, f"--{flag}", value))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_checkpoint_from_before_a_flag_is_resumed_with_its_default(chain, folder, tmp_path):
    assert call(train_dia, "--data", folder, "--out", tmp_path, *STAGE2, "--dissolve", "none", "--keep") is None
    state = torch.load(tmp_path / "dia.pt", weights_only=True)
    for name in ("tau", "gamma", "gain", "jitter", "twin_weight", "every", "keep", "changed"):
        del state["settings"][name]
    del state["seconds"], state["validation"]
    torch.save(state | {"step": 2}, tmp_path / "dia.pt")
    assert "was started with 0.5" in call(train_dia, "--data", folder, "--out", tmp_path, "--resume", "--tau", "0.2")
    assert call(train_dia, "--data", folder, "--out", tmp_path, "--resume", "--every", "1") is None
    assert "resume the folder above" in call(train_dia, "--data", folder, "--out", tmp_path / "step-2", "--resume")


def test_npz_of_28_pixels_goes_through_all_stages(tmp_path, capsys):
    """MedMNIST's size: padded to 32 for the UNet, 3x3 stem, rotations, LARS; the anomalies in it have another label."""
    path = medmnist(tmp_path / "pneumoniamnist_mini.npz")
    args = ["--data", path, "--out", tmp_path / "run", "--steps", "2", "--batch-size", "4"]
    assert call(train_diffusion, *args, "--dim", "8", "--schedule", "linear") is None
    assert call(train_dia, *args) is None
    assert call(evaluate, "--out", tmp_path / "run", "--passes", 1) is None
    settings = torch.load(tmp_path / "run/dia.pt", weights_only=True)["settings"]
    assert (settings["stem"], settings["shift"], settings["optimizer"], settings["image_size"]) == ("cifar", "rotate", "lars", 28)


@pytest.mark.parametrize("module, kind, extra", [(train_diffusion, "diffusion", STAGE1), (train_dia, "dia", STAGE2),
                                                 (train_dia, "dia", [*STAGE2, "--bank", "4", "--dissolve", "residual"])])
def test_resumed_run_equals_an_uninterrupted_one(module, kind, extra, chain, folder, tmp_path, monkeypatch):
    """Stopped after its checkpoint at step 2 and again with --resume: the same weights, EMA and optimizer, bit for bit,
    and the same log but for the seconds."""
    class Stop(Exception):
        pass

    def save_then_stop(*args):
        save(*args)
        raise Stop

    save, out = dia_lib.save_checkpoint, tmp_path / "run"
    extra = ["--data", folder, "--out", out, *extra, "--steps", "8"]
    if kind == "dia":
        extra += ["--diffusion", chain / "diffusion.pt"]
    with monkeypatch.context() as m:
        m.setattr(module, "save_checkpoint", save_then_stop)
        with pytest.raises(Stop):
            call(module, *extra)
    assert torch.load(out / f"{kind}.pt", weights_only=True)["step"] == 2
    resume = ["--resume", "--data", folder, "--out", out]                   # the settings come from the checkpoint
    if kind == "dia":                                                       # and so does the stage 1 it was started with
        assert call(train_diffusion, "--data", folder, "--out", tmp_path / "other", *STAGE1, "--seed", "9") is None
        assert "--resume" in call(module, *resume, "--diffusion", tmp_path / "other/diffusion.pt")
    assert call(module, *resume) is None
    whole = tmp_path / "whole"
    assert call(module, *[whole if a == out else a for a in extra]) is None

    a, b = (flat(torch.load(o / f"{kind}.pt", weights_only=True)) for o in (out, whole))
    if kind == "dia":
        assert 0 < a.pop("/seconds") and 0 < b.pop("/seconds")                  # the only thing that may differ
    assert a.keys() == b.keys() and any("momentum" in k or "exp_avg" in k for k in a)
    for k in a:
        assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k
    assert log_of(out) == log_of(whole)


@pytest.mark.parametrize("module", [train_diffusion, train_dia])
def test_resuming_a_finished_run_is_no_mistake(module, chain, folder, capsys):
    """It may have been killed after its last checkpoint; a chain of commands goes on."""
    before = (chain / "log.jsonl").read_bytes()
    assert call(module, "--data", folder, "--out", chain, "--resume") is None
    assert "has all its 4 steps already" in capsys.readouterr().out and (chain / "log.jsonl").read_bytes() == before


def test_bank_is_used_made_once_and_made_again_where_it_is_lost(chain, folder, tmp_path, monkeypatch):
    """Other weights than without a bank; the same from the cache as from a bank made anew, compiled or not."""
    args = ["--data", folder, "--diffusion", chain / "diffusion.pt", *STAGE2, "--steps", 2]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = {}
    for name, extra in (("fresh", []), ("made", ["--bank", "4"]), ("cached", ["--bank", "4"]), ("lost", ["--bank", "4"]),
                        ("other", ["--bank", "4", "--t-range", "30", "90"])):
        if name == "lost":
            for file in (tmp_path / "cache/dia").iterdir():
                file.unlink()
        with monkeypatch.context() as m:
            if name == "cached":
                m.setattr(train_dia, "dissolve_small", None)                # not called
            assert call(train_dia, *args, "--out", tmp_path / name, *extra) is None
        weights[name] = torch.load(tmp_path / name / "dia.pt", weights_only=True)["encoder"]["backbone.conv1.weight"]
    assert torch.equal(weights["made"], weights["cached"]) and torch.equal(weights["made"], weights["lost"])
    assert not torch.equal(weights["made"], weights["fresh"]) and not torch.equal(weights["made"], weights["other"])
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert call(train_dia, *args, "--out", tmp_path / "compiled", "--bank", "2", "--compile") is None


def test_equal_seeds_equal_runs_and_other_seeds_other_runs(folder, tmp_path):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert call(train_diffusion, "--data", folder, "--out", tmp_path / name, *STAGE1, "--steps", 1, "--seed", seed) is None
        weights.append(torch.load(tmp_path / name / "diffusion.pt", weights_only=True)["ema"]["stem.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    a, b = (tmp_path / name / "diffusion.pt" for name in "ab")
    assert dia_lib.sha256_of(a) == dia_lib.sha256_of(b)                     # by which stage 2 knows its stage 1


# What is wrong, in one sentence --------------------------------------------------------------------------------------


def test_wrong_training_flags(folder, tmp_path, chain):
    """Each is refused before anything is written."""
    new = ["--data", folder, "--out", tmp_path / "new"]
    cases = [
        (train_diffusion, [*new, "--dissolve-size", "20"], "multiple of 8"),
        (train_diffusion, [*new, "--dim", "12"], "multiple of 8"),
        (train_diffusion, [*new, "--batch-size", "1000"], "from 1 to"),
        (train_diffusion, [*new, "--batch-size", "0"], "from 1 to"),
        (train_diffusion, [*new, "--fraction", "0"], "above 0"),
        (train_diffusion, [*new, "--holdout", "1"], "below 1"),
        (train_diffusion, [*new, "--steps", "0"], "at least 1"),
        (train_diffusion, [*new, "--seed", "-1"], "from 0 on"),
        (train_diffusion, [*new, "--lr", "-1"], "above 0"),
        (train_diffusion, ["--data", "no/such/path", "--out", tmp_path / "new"], "no such folder"),
        (train_dia, [*new, *STAGE2], "Run train_diffusion.py"),
        (train_dia, [*new, *STAGE2, "--t-range", "50", "50"], "0 <= A < B <= 1000"),
        (train_dia, [*new, *STAGE2, "--t-range", "900", "1001"], "0 <= A < B <= 1000"),
        (train_dia, [*new, *STAGE2, "--image-size", "31"], "even number"),
        (train_dia, [*new, *STAGE2, "--crop-min", "0"], "above 0"),
        (train_dia, [*new, *STAGE2, "--bank", "3"], "even number"),
        (train_dia, [*new, *STAGE2, "--bank", "4", "--dissolve", "resize"], "leave --bank out"),
        (train_dia, [*new, *STAGE2, "--batch-size", "41"], "from 1 to"),
        (train_dia, [*new, *STAGE2, "--tau", "0"], "above 0"),
        (train_dia, [*new, *STAGE2, "--jitter", "1.5"], "from 0 (off) to 1"),
        (train_dia, [*new, *STAGE2, "--gamma", "-1"], "from 0 on"),
        (train_dia, [*new, *STAGE2, "--every", "0"], "at least 1"),
        (train_dia, [*new, *STAGE2, "--gain", "2"], "has no gain"),
        (train_dia, [*new, *STAGE2, "--twin-weight", "0"], "above 0"),
        (train_dia, [*new, *STAGE2, "--dissolve-size", "4", "--dissolve", "resize"], "at least 8"),
        (train_dia, [*new, *STAGE2, "--diffusion", chain / "diffusion.pt", "--dissolve-size", "64"], "was trained at 32 px"),
        (train_dia, [*new, *STAGE2, "--diffusion", chain / "dia.pt"], "is a dia checkpoint"),
        (train_dia, [*new, *STAGE2, "--diffusion", folder / "train/good/000.png"], "not a checkpoint"),
        (train_dia, [*new, *STAGE2, "--diffusion", chain / "diffusion.pt", "--holdout", "0.2"], "other images"),
        (train_diffusion, ["--data", folder, "--out", chain, *STAGE1], "--resume"),
        (train_dia, ["--data", folder, "--out", chain, *STAGE2], "--resume"),
        (train_dia, ["--data", folder, "--out", chain, "--resume", "--lr", "0.5"], "was started with"),
    ]
    if not torch.cuda.is_available():
        cases.append((train_diffusion, [*new, "--device", "cuda"], "no such device"))
    for module, args, expected in cases:
        code = call(module, *args)
        assert isinstance(code, str) and expected in code and "\n" not in code, (args, code)
    assert not (tmp_path / "new").exists()


def test_quick_on_a_small_npz_does_not_enlarge_it(tmp_path, capsys):
    args = ["--data", medmnist(tmp_path / "pneumoniamnist_mini.npz"), "--out", tmp_path / "run", "--quick", "--steps", "2"]
    assert call(train_diffusion, *args, "--dim", "8") is None
    assert call(train_dia, *args) is None
    assert "28 px" in capsys.readouterr().out
    settings = torch.load(tmp_path / "run/dia.pt", weights_only=True)["settings"]
    assert (settings["image_size"], settings["optimizer"], settings["lr"]) == (28, "adamw", 1e-3)
    larger = [*args, "--image-size", 64, "--diffusion", tmp_path / "run/diffusion.pt", "--out", tmp_path / "other"]
    assert call(train_dia, *larger) is None and call(train_dia, *larger, "--resume") is None    # the same command goes on
    assert "was started with 28" in call(train_dia, *larger, "--resume", "--image-size", 32)


def test_colour_images_few_of_each_and_none_held_out(tmp_path, capsys):
    """RGB, 8 training images, no held-out ones, one anomaly: everything runs, and says what it could not do."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    for name, count in (("train/good", 8), ("test/good", 3), ("test/bad", 1)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    args = ["--data", root, "--out", tmp_path / "run", "--holdout", "0", "--steps", "2", "--batch-size", "4"]
    assert call(train_diffusion, *args, "--dim", "8") is None
    assert "held-out ones by" not in capsys.readouterr().out
    assert call(train_dia, *args, "--image-size", "32") is None
    assert call(evaluate, "--out", tmp_path / "run", "--passes", 1) is None
    assert json.loads((tmp_path / "run/metrics.json").read_text())["auroc_interval_95"] is None
    assert "too few images" in capsys.readouterr().out
    assert torch.load(tmp_path / "run/dia.pt", weights_only=True)["settings"]["channels"] == 3


def test_a_torn_log_line_is_dropped(folder, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"stage": "dia", "step": 1}\n{"stage": "diffusion", "step": 9}\n{"stage": "dif')
    assert call(train_diffusion, "--data", folder, "--out", tmp_path, *STAGE1, "--steps", "1") is None
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows[:2]] == [("dia", 1), ("diffusion", 1)]


def test_wrong_checkpoints(chain, folder, tmp_path):
    assert "no such checkpoint" in call(evaluate, "--out", tmp_path / "absent")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "dia.pt").write_bytes((chain / "dia.pt").read_bytes()[:20000])
    assert "truncated" in call(evaluate, "--out", torn)
    (torn / "dia.pt").write_bytes((chain / "diffusion.pt").read_bytes())
    assert "is a diffusion checkpoint" in call(evaluate, "--out", torn)

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "unpickled",)

    torch.save({"kind": "dia", "settings": Attack()}, torn / "dia.pt")
    assert "not a checkpoint" in call(evaluate, "--out", torn) and not (tmp_path / "unpickled").exists()
    other = medmnist(tmp_path / "pneumoniamnist_mini.npz")
    assert "other images" in call(evaluate, "--out", chain, "--data", other)


def test_test_set_with_one_label_only(tmp_path, folder):
    root = tmp_path / "one"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        (root / split / "good").symlink_to(folder / split / "good", target_is_directory=True)
    assert call(train_dia, "--data", root, "--out", tmp_path / "run", *STAGE2, "--steps", 1, "--dissolve", "none") is None
    assert "both normal and anomalous" in call(evaluate, "--out", tmp_path / "run")
    assert not (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize("steps", [4, 8])
def test_a_loss_or_weight_that_is_not_finite_stops_the_run(steps, folder, tmp_path):
    """Found in the loss (8 steps: after two), or in the embeddings before they are saved (4 steps: after one)."""
    args = [*STAGE2, "--dissolve", "none", "--lr", "1e30", "--steps", steps]
    code = call(train_dia, "--data", folder, "--out", tmp_path, *args)
    assert "finite" in code and "smaller --lr" in code and not (tmp_path / "dia.pt").exists()


def test_a_mistake_at_the_shell_ends_with_one_line_and_exit_code_1():
    done = subprocess.run([sys.executable, ROOT / "train_diffusion.py", "--data", "no/such/path"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and "no/such/path" in done.stderr


def test_help_names_every_flag_and_its_default(capsys):
    for module in (train_diffusion, train_dia, evaluate):
        argv, sys.argv = sys.argv, [module.__name__, "--help"]
        with pytest.raises(SystemExit) as stop:
            module.main()
        sys.argv = argv
        assert stop.value.code == 0 and "default" in capsys.readouterr().out
