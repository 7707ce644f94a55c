"""The command lines, with tiny budgets: the whole chain, exact resume, and one sentence for each mistake."""

import copy
import csv
import functools
import json
import shutil
import statistics
import subprocess
import sys
import warnings
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
from extras import predict


class Stop(Exception):
    """Ends a run from within a test."""


def read(path):
    return torch.load(path, weights_only=True)


def first_weights(out):
    """The first convolution of the checkpoint in a run's folder, of stage 2 if it has got there."""
    if (out / "dia.pt").exists():
        return read(out / "dia.pt")["encoder"]["backbone.conv1.weight"]
    return read(out / "diffusion.pt")["ema"]["stem.weight"]


def all_differ(tensors):
    return all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


# ---- The chain -----------------------------------------------------------------------------------------


def test_chain_writes_what_it_says(own_chain, capsys):
    assert {p.name for p in own_chain.iterdir()} == {
        "diffusion.pt", "dia.pt", "dissolving.png", "log.jsonl", "scores.csv", "metrics.json", "examples.png",
        "stats.pt"}
    rows = list(csv.DictReader((own_chain / "scores.csv").open()))
    parts = ["con", "cls", "cos", "norm"]
    assert len(rows) == 30 and list(rows[0]) == ["path", "group", "label", "score", *parts]
    assert all((row["group"] == "good") == (row["label"] == "0") for row in rows)
    labels, scores = [int(row["label"]) for row in rows], [float(row["score"]) for row in rows]
    assert np.allclose(scores, [float(row["con"]) + float(row["cls"]) for row in rows], atol=1e-5)
    metrics = json.loads((own_chain / "metrics.json").read_text())
    assert metrics["score"] == "csi" and metrics["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert metrics["parts_auroc"] == {"csi": metrics["auroc"]} | {
        name: pytest.approx(roc_auc_score(labels, [float(row[name]) for row in rows])) for name in parts}
    low, high = metrics["auroc_interval_95"]
    assert low < metrics["auroc"] < high and len(metrics["floors_auroc"]) == 3
    assert (metrics["normals"], metrics["anomalies"], metrics["step"], metrics["passes"]) == (12, 18, 4, 2)
    log = log_of(own_chain)
    assert {"held_t0-29", "held_t30-129", "held_t130-299", "held_t300-999", "loss"} <= log[0].keys()
    last = [row for row in log if row["stage"] == "dia"][-1]
    assert {"loss", "contrastive", "shift_acc", "shift_acc_held", "sim_positive", "sim_twin", "sim_other",
            "lr"} <= last.keys() and last["step"] == 4
    assert log[-1] == {"stage": "evaluate", "step": 4, "auroc": metrics["auroc"], "passes": 2}
    for picture in ("dissolving.png", "examples.png"):
        assert np.asarray(Image.open(own_chain / picture)).std() > 10               # not blank

    # Again, from stats.pt, with other batches: the same scores; the last line is the AUROC.
    made = (own_chain / "stats.pt").stat().st_mtime_ns
    assert call(evaluate, "--out", own_chain, "--passes", 2, "--batch-size", 7) is None
    assert capsys.readouterr().out.splitlines()[-1] == f"auroc {metrics['auroc']:.4f}"
    again = [float(row["score"]) for row in csv.DictReader((own_chain / "scores.csv").open())]
    assert np.allclose(again, scores, atol=0.02) and made == (own_chain / "stats.pt").stat().st_mtime_ns


def test_floors_are_by_hand_and_by_as_many_passes(own_chain):
    """The untrained encoder's is the AUROC of a run of no steps."""
    metrics = json.loads((own_chain / "metrics.json").read_text())
    state = read(own_chain / "dia.pt")
    s, data = state["settings"], evaluate.data_of(state["settings"], own_chain)
    torch.manual_seed(s["seed"])
    encoder = dia_lib.Encoder(s["channels"], 4, s["stem"])

    def untrained(passes):
        train, test = (dia_lib.embed(encoder, images, s["shift"], passes, torch.device("cpu"))
                       for images in (data.train, data.test))
        with warnings.catch_warnings(action="ignore"):
            return roc_auc_score(data.labels, dia_lib.csi_score(dia_lib.csi_fit(*train), *test))

    grey = data.test.double().mean((1, 2, 3)).numpy()
    assert metrics["passes"] == 2 and abs(untrained(1) - untrained(2)) > 0.01
    assert metrics["floors_auroc"]["encoder untrained"] == pytest.approx(untrained(2), abs=0.005)
    assert metrics["floors_auroc"]["minus mean brightness"] == pytest.approx(
        roc_auc_score(data.labels, -grey), abs=0.005)


def test_every_mode_trains_is_evaluated_and_is_another(chain, folder, tmp_path):
    """One step of each gives other weights; gaussian at another stage 1's size is another mode again."""
    flags = [*STAGE2, "--steps", "1"]
    other = ["--dissolve-size", "24", "--steps", "1"]
    assert call(train_diffusion, "--data", folder, "--out", tmp_path / "small", *STAGE1, *other) is None
    runs = {mode: (mode, []) for mode in train_dia.MODES}
    runs["diffusion"] = ("diffusion", ["--diffusion", chain / "diffusion.pt"])
    runs["gaussian, 24"] = ("gaussian", ["--diffusion", tmp_path / "small/diffusion.pt"])
    for name, (mode, more) in runs.items():
        out = tmp_path / name
        assert call(train_dia, "--data", folder, "--out", out, "--dissolve", mode, *flags, *more) is None
        assert ("sim_twin" in log_of(out)[0]) == (mode != "none")
        if name in train_dia.MODES[1:]:                             # the first is evaluated elsewhere
            assert call(evaluate, "--out", out, "--passes", 1) is None and (out / "examples.png").exists()
        size = read(out / "dia.pt")["settings"]["dissolve_size"]
        assert size == (24 if name == "gaussian, 24" else 32)
    assert all_differ([first_weights(tmp_path / name) for name in runs])


@pytest.mark.parametrize("n, shift, learned, said", [
    (8, -1, True, True), (8, 0, True, False), (8, 1, True, False), (7, -1, True, False),
    (8, -1, False, False)])
def test_memorising_is_said_where_it_can_be_told(n, shift, learned, said, monkeypatch, capsys):
    """Not of a few images, nor of a model that has learned nothing yet; `change` of held-out images is 5."""
    spread = torch.linspace(-0.1, 0.1, n)
    monkeypatch.setattr(train_diffusion, "change", lambda unet, x, abar: spread + x)
    found = train_diffusion.changes(None, 5 + shift, 5, None, learned)
    assert found == {"change_train": pytest.approx(5 + shift), "change_held": pytest.approx(5)}
    printed = capsys.readouterr()
    assert ("begun to memorise" in printed.out + printed.err) == said


def test_several_runs_give_mean_and_sd(monkeypatch, capsys):
    known = {"a": 0.6, "b": 0.9}
    monkeypatch.setattr(evaluate, "evaluate", lambda out, args, device: {"auroc": known[out.name]})
    assert call(evaluate, "--out", "runs/a", "runs/b") is None
    two, last = capsys.readouterr().out.splitlines()
    assert "0.6000, 0.9000; mean 0.7500 +- 0.2121" in two and last == "auroc 0.7500"
    assert call(evaluate, "--out", "runs/b") is None
    assert capsys.readouterr().out.splitlines() == ["auroc 0.9000"]


def test_every_flag_of_the_method_reaches_the_weights(folder, tmp_path):
    """One step with a flag gives other weights than one without; a wrong wiring would give the same."""
    def weights(module, name, *flags):
        assert call(module, "--data", folder, "--out", tmp_path / name, "--steps", "1", *flags) is None
        return first_weights(tmp_path / name)

    stage1 = [*STAGE1[2:-2], "--holdout", "0"]
    seen = [weights(train_diffusion, "1", *stage1)]
    for flag, value in (("schedule", "linear"), ("fraction", 0.5), ("lr", 2e-3), ("dissolve-size", 40),
                        ("batch-size", 4), ("seed", 1)):
        seen.append(weights(train_diffusion, f"1{flag}", *stage1, f"--{flag}", value))
    assert all_differ(seen)
    stage2 = [*STAGE2[3:-2], "--holdout", "0", "--diffusion", tmp_path / "1/diffusion.pt"]          # LARS
    seen = [weights(train_dia, "2", *stage2)]
    for flag, *value in (("gamma", 0), ("twins", "excluded"), ("t-range", 500, 600), ("shift", "perm"),
                         ("lr", 2), ("diffusion", tmp_path / "1seed/diffusion.pt")):
        seen.append(weights(train_dia, f"2{flag}", *stage2, f"--{flag}", *value))
    assert all_differ(seen)


@pytest.mark.parametrize("pixels, size, flags", [
    (40, 32, ["--image-size", 40]), (40, 32, ["--image-size", 64]), (40, 40, ["--image-size", 64]),
    (28, 32, [])])
def test_stage_2_dissolves_the_very_images_of_stage_1(pixels, size, flags, folder, tmp_path, monkeypatch):
    """What is noised in stage 1 equals what the UNet gets in stage 2, to the bit; each image has its t."""
    data, seen = folder if pixels == 40 else medmnist(tmp_path / "pneumoniamnist.npz"), {}
    q_sample, args = dia_lib.q_sample, ["--data", data, "--out", tmp_path, "--steps", "1", "--holdout", "0.3"]

    def noise(x, t, *rest):
        seen.setdefault(1, (x, t))                                  # later ones are held out
        return q_sample(x, t, *rest)

    def stop(unet, x, t, abar):
        seen[2] = x, t
        raise Stop

    for module in (train_diffusion, train_dia):
        monkeypatch.setattr(module, "flip", lambda x, u: x)
    monkeypatch.setattr(train_diffusion, "q_sample", noise)
    monkeypatch.setattr(dia_lib, "dissolve", stop)
    n = len(dia_lib.load_data(str(data), 32, ("train",), 0.3).train)
    args += ["--batch-size", n]                                                 # all of them in a step
    assert call(train_diffusion, *args, "--dim", "8", "--dissolve-size", size) is None
    with pytest.raises(Stop):
        call(train_dia, *args, *flags)
    assert seen[1][0].shape == seen[2][0].shape == (n, 1, size, size)
    one, two = (sorted(row.numpy().tobytes() for row in seen[stage][0]) for stage in (1, 2))
    assert one == two and len(set(one)) == n
    assert 30 <= seen[2][1].min() and seen[2][1].max() < 130 and len(seen[2][1].unique()) > n / 2


@pytest.mark.parametrize("module, flags, by", [
    (train_diffusion, [*STAGE1, "--holdout", "0"], 0.3),
    (train_dia, [*STAGE2, "--shift", "perm"], 0.1)])
def test_twenty_steps_lower_the_loss(module, flags, by, chain, folder, tmp_path, monkeypatch):
    losses, more = [], ["--diffusion", chain / "diffusion.pt"] if module is train_dia else []
    monkeypatch.setattr(module, "check_loss", lambda values, *rest: losses.extend(values))
    assert call(module, "--data", folder, "--out", tmp_path, *flags, *more, "--steps", "20") is None
    first, last = statistics.fmean(losses[:5]), statistics.fmean(losses[15:])
    assert len(losses) == 20 and last < first - by, (first, last)


def test_npz_of_28_pixels_goes_through_all_stages(tmp_path):
    """MedMNIST's size: padded to 32 for the UNet, 3x3 stem, rotations, LARS; val's normals are set aside."""
    path = medmnist(tmp_path / "pneumoniamnist_mini.npz")
    args = ["--data", path, "--out", tmp_path / "run", "--steps", "2", "--batch-size", "2"]
    assert call(train_diffusion, *args, "--dim", "8", "--schedule", "linear") is None
    assert call(train_dia, *args) is None
    assert call(evaluate, "--out", tmp_path / "run", "--passes", 1) is None
    s = read(tmp_path / "run/dia.pt")["settings"]
    assert (s["image_size"], s["stem"], s["shift"], s["lr"]) == (28, "cifar", "rotate", 1)
    assert (s["dissolve_size"], s["stage1"]["schedule"], s["t_range"]) == (32, "linear", [30, 130])


def test_quick_on_a_small_npz_does_not_enlarge_it(tmp_path, capsys):
    args = ["--data", medmnist(tmp_path / "pneumoniamnist_mini.npz"), "--out", tmp_path / "run", "--quick",
            "--steps", "1", "--batch-size", "2", "--dissolve", "resize"]
    assert call(train_dia, *args) is None
    assert "28 px" in capsys.readouterr().out
    s = read(tmp_path / "run/dia.pt")["settings"]
    assert (s["image_size"], s["lr"]) == (28, 1)
    larger = [*args, "--image-size", 64, "--out", tmp_path / "other"]
    assert call(train_dia, *larger) is None and call(train_dia, *larger, "--resume") is None
    assert "was started with 64" in call(train_dia, *larger, "--resume", "--image-size", 32)


def test_colour_images_few_of_each_and_none_held_out(tmp_path, capsys):
    """RGB, 8 training images, no held-out ones, one anomaly: all runs, and says what could not be done."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    for name, count in (("train/good", 8), ("test/good", 3), ("test/bad", 1)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    args = ["--data", root, "--out", tmp_path / "run", "--holdout", "0", "--steps", "2", "--batch-size", "4"]
    assert call(train_diffusion, *args, "--dim", "8") is None
    assert call(train_dia, *args, "--image-size", "32") is None
    assert not any(key.startswith(("held", "change", "shift_acc_held")) for row in log_of(tmp_path / "run")
                   for key in row)
    assert call(evaluate, "--out", tmp_path / "run", "--passes", 1) is None
    assert json.loads((tmp_path / "run/metrics.json").read_text())["auroc_interval_95"] is None
    assert "too few for an interval" in capsys.readouterr().out
    assert read(tmp_path / "run/dia.pt")["settings"]["channels"] == 3


def test_save_every_keeps_weights_that_the_next_stage_takes(chain, folder, tmp_path, capsys):
    """OUT/step-N holds the weights after N steps, and keeping them changes nothing in the run."""
    args = ["--data", folder, "--out", tmp_path, "--save-every", "2"]
    assert call(train_diffusion, *args, *STAGE1) is None
    first, second, last, other = (read(out / "diffusion.pt")["ema"]["stem.weight"] for out in (
        tmp_path / "step-2", tmp_path / "step-4", tmp_path, chain))
    assert not torch.equal(first, last) and torch.equal(second, last) and torch.equal(last, other)
    assert call(train_dia, *args, *STAGE2, "--diffusion", tmp_path / "step-2/diffusion.pt") is None
    assert "stopped at step 2 of 4" in capsys.readouterr().out
    assert call(evaluate, "--passes", 1, "--out", tmp_path, tmp_path / "step-2") is None
    folders = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in (".", "step-2")]
    assert [m["step"] for m in folders] == [4, 2] and folders[0]["auroc"] != folders[1]["auroc"]
    for module, start in ((train_diffusion, STAGE1), (train_dia, STAGE2)):
        code = call(module, "--data", folder, "--out", tmp_path / "step-2", "--resume", *start)
        assert "resume the folder above" in code


# ---- The same again: resume, seeds, compiled -----------------------------------------------------------


@pytest.mark.parametrize("module, kind, flags, steps", [
    (train_diffusion, "diffusion", STAGE1, 8), (train_dia, "dia", STAGE2, 8),
    (train_dia, "dia", [*STAGE2[1:], "--dissolve", "copy"], 4)])                # LARS
def test_resumed_run_equals_an_uninterrupted_one(module, kind, flags, steps, chain, folder, tmp_path,
                                                 monkeypatch, capsys):
    """Stopped after its first checkpoint and again with --resume: the same weights, EMA and optimizer, bit
    for bit, across an epoch's end (8 steps), and the same log but for the seconds."""
    def save_then_stop(*args):
        dia_lib.save_checkpoint(*args)
        raise Stop

    def save_and_keep(path, kind, settings, state):
        kept[path.parent].append(copy.deepcopy(flat(state)))
        dia_lib.save_checkpoint(path, kind, settings, state)

    out, whole = tmp_path / "run", tmp_path / "whole"
    kept = {out: [], whole: []}
    flags = ["--data", folder, *flags, "--steps", steps]
    if kind == "dia":
        flags += ["--diffusion", chain / "diffusion.pt"]
    with monkeypatch.context() as m:
        m.setattr(module, "save_checkpoint", save_then_stop)
        with pytest.raises(Stop):
            call(module, *flags, "--out", out)
    assert read(out / f"{kind}.pt")["step"] == steps // 4
    resume = ["--resume", "--data", folder, "--out", out]           # the settings come from the checkpoint
    if kind == "dia":                                               # and so does its stage 1
        other = ["--data", folder, "--out", tmp_path / "other", *STAGE1, "--steps", "1"]
        assert call(train_diffusion, *other) is None
        assert "not the stage 1" in call(module, *resume, "--diffusion", tmp_path / "other/diffusion.pt")
    monkeypatch.setattr(module, "save_checkpoint", save_and_keep)
    assert call(module, *resume) is None
    assert f"going on from step {steps // 4} of {steps}\n" in capsys.readouterr().out
    assert call(module, *flags, "--out", whole) is None
    assert "going on" not in capsys.readouterr().out

    assert [len(kept[o]) for o in (out, whole)] == [3, 4]
    for a, b in zip(kept[out], kept[whole][1:], strict=True):
        assert a.keys() == b.keys()
        assert any("momentum" in k or "exp_avg" in k for k in a) == (a["/step"] < steps)    # not in the last
        for k in a:
            assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k
    assert log_of(out) == log_of(whole)


def test_a_run_of_another_version_is_not_resumed(own_chain, folder):
    """One with a setting that is no flag any more would go on with other settings than it began with."""
    state = dia_lib.load_checkpoint(own_chain / "dia.pt", "dia", "cpu")
    settings = state.pop("settings")
    settings["given"]["optimizer"] = "adamw"
    dia_lib.save_checkpoint(own_chain / "dia.pt", "dia", settings, state)
    assert "another version of this script: it has a setting optimizer" in call(
        train_dia, "--data", folder, "--out", own_chain, "--resume")


@pytest.mark.parametrize("module", [train_diffusion, train_dia])
def test_resuming_a_finished_run_is_no_mistake(module, chain, folder, capsys):
    """It may have been killed after its last checkpoint; a chain of commands goes on."""
    before = (chain / "log.jsonl").read_bytes()
    assert call(module, "--data", folder, "--out", chain, "--resume") is None
    said = capsys.readouterr().out
    assert "has all its 4 steps already" in said and "going on" not in said
    assert (chain / "log.jsonl").read_bytes() == before


def test_equal_seeds_equal_files_and_other_seeds_other_runs(folder, tmp_path):
    """To the byte: stage 2 knows its stage 1 by the file's digest."""
    for module, flags in ((train_diffusion, STAGE1), (train_dia, [*STAGE2, "--dissolve", "none"])):
        runs = [tmp_path / f"{module.__name__}-{i}" for i in range(3)]
        for out, seed in zip(runs, (3, 3, 4), strict=True):
            seeded = ["--steps", 1, "--seed", seed]
            assert call(module, "--data", folder, "--out", out, *flags, *seeded) is None
        a, b, c = (dia_lib.sha256_of(next(out.glob("*.pt"))) for out in runs)
        assert a == b != c and all_differ([first_weights(out) for out in runs[1:]])


@pytest.mark.parametrize("module, flags", [(train_diffusion, STAGE1), (train_dia, STAGE2)])
def test_compiled_run_equals_one_that_is_not(module, flags, chain, folder, tmp_path, monkeypatch):
    """torch.compile's tracing alone, which is what may break; its names don't get into the checkpoint."""
    compiled, more = [], ["--diffusion", chain / "diffusion.pt"] if module is train_dia else []
    one = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(type(net).__name__) or one(net))
    args = ["--data", folder, *flags, "--steps", 1, "--holdout", 0.3 if more else 0, *more]
    assert call(module, *args, "--out", tmp_path / "plain") is None and not compiled
    assert call(module, *args, "--out", tmp_path / "compiled", "--launch", "compile") is None
    assert compiled == (["Encoder", "UNet"] if module is train_dia else ["UNet"])
    a, b = (flat(read(next((tmp_path / name).glob("*.pt")))) for name in ("plain", "compiled"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(v.float(), b[k].float(), atol=1e-5) for k, v in a.items() if torch.is_tensor(v))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_unet_equals_one_that_is_not():
    """A real compilation, of one stage of the UNet, half a minute: blocks, attention and time vector."""
    torch.manual_seed(0)
    unet = dia_lib.UNet(1, 8, (1,)).requires_grad_(False)
    for p in unet.parameters():                                     # those that begin at zero hide mistakes
        p += 0.05 * torch.randn_like(p)
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 500])
    assert torch.allclose(torch.compile(unet)(x, t), unet(x, t), atol=1e-4) and unet(x, t).std() > 0.1


# ---- What is wrong, in one sentence --------------------------------------------------------------------


def test_wrong_flags(folder, tmp_path, chain):
    """Each is refused before anything is written."""
    new = ["--data", folder, "--out", tmp_path / "new"]
    stage2 = [*new, *STAGE2]
    odd = ["--data", medmnist(tmp_path / "pneumoniamnist_odd.npz", size=27), "--out", tmp_path / "new"]
    cases = [
        (train_diffusion, [*new, "--dissolve-size", "20"], "20: needs an integer from 8 on, a multiple of 8"),
        (train_diffusion, [*new, "--dim", "12"], "a multiple of 8"),
        (train_diffusion, [*new, "--batch-size", "1000"], "take from 1 to"),
        (train_diffusion, [*new, "--batch-size", "0"], "from 1 on"),
        (train_diffusion, [*new, "--fraction", "0"], "above 0, up to 1"),
        (train_diffusion, [*new, "--holdout", "1"], "from 0, up to 0.9"),
        (train_diffusion, [*new, "--steps", "0"], "from 1 on"),
        (train_diffusion, [*new, "--steps", "1.5"], "an integer"),
        (train_diffusion, [*new, "--seed", "-1"], "an integer from 0, up to 9223372036854775807"),
        (train_diffusion, [*new, "--seed", 2 ** 64], "up to 9223372036854775807"),
        (train_diffusion, [*new, "--lr", "-1"], "above 0"),
        (train_diffusion, [*new, "--lr", "nan"], "above 0"),
        (train_diffusion, [*new, "--save-every", "0"], "from 1 on"),
        (train_diffusion, [*new, "--schedule", "other"], "invalid choice"),
        (train_diffusion, [*new, "--normal-class", "other"], "--normal-class"),
        (train_diffusion, ["--data", "no/such/path", "--out", tmp_path / "new"], "no such folder"),
        (train_dia, stage2, "Run train_diffusion.py"),
        (train_dia, [*stage2, "--t-range", "50", "50"], "needs A below B"),
        (train_dia, [*stage2, "--t-range", "900", "1001"], "from 0, up to 1000"),
        (train_dia, [*stage2, "--image-size", "31"], "a multiple of 2"),
        (train_dia, [*odd, "--batch-size", "2"], "an even number; use 26"),
        (train_dia, [*stage2, "--batch-size", "41"], "take from 1 to"),
        (train_dia, [*stage2, "--gamma", "-1"], "from 0 on"),
        (train_dia, [*stage2, "--lr", "1e39"], "up to 1e30"),
        (train_dia, [*stage2, "--dissolve", "residual"], "invalid choice"),
        (train_dia, [*stage2, "--bank", "4"], "unrecognized arguments"),
        (train_dia, [*stage2, "--diffusion", chain / "dia.pt"], "is a dia checkpoint"),
        (train_dia, [*stage2, "--diffusion", folder / "train/good/000.png"], "not a checkpoint"),
        (train_dia, [*stage2, "--diffusion", chain / "diffusion.pt", "--holdout", "0.2"], "other images"),
        (train_diffusion, ["--data", folder, "--out", chain, *STAGE1], "--resume"),
        (train_dia, ["--data", folder, "--out", chain, *STAGE2], "--resume"),
        (train_dia, ["--data", folder, "--out", chain, "--resume", "--lr", "0.5"], "was started with"),
        (evaluate, ["--out", chain, "--passes", "0"], "from 1 on"),
        (evaluate, ["--out", tmp_path / "new"], "no such checkpoint"),
    ]
    if not torch.cuda.is_available():
        cases.append((train_diffusion, [*new, "--device", "cuda"], "no such device"))
    before = {path: path.stat().st_mtime_ns for path in chain.iterdir()}
    for module, args, expected in cases:
        code = call(module, *args)
        assert isinstance(code, str) and expected in code and "\n" not in code, (args, code)
    assert not (tmp_path / "new").exists()
    assert before == {path: path.stat().st_mtime_ns for path in chain.iterdir()}


def test_a_torn_log_line_is_dropped(folder, tmp_path):
    log = '{"stage": "dia", "step": 1}\n{"stage": "diffusion", "step": 9}\n{"stage": "dif'
    (tmp_path / "log.jsonl").write_text(log)
    assert call(train_diffusion, "--data", folder, "--out", tmp_path, *STAGE1, "--steps", "1") is None
    assert [(row["stage"], row["step"]) for row in log_of(tmp_path)][:2] == [("dia", 1), ("diffusion", 1)]


def test_wrong_checkpoints(chain, tmp_path):
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "dia.pt").write_bytes((chain / "dia.pt").read_bytes()[:20000])
    assert "truncated" in call(evaluate, "--out", torn)
    (torn / "dia.pt").write_bytes((chain / "diffusion.pt").read_bytes())
    assert "is a diffusion checkpoint" in call(evaluate, "--out", torn)
    torch.save({"kind": "dia", "settings": {"format": 1}}, torn / "dia.pt")
    code = call(evaluate, "--out", torn)
    assert "format 1" in code and "train this stage again" in code

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "unpickled",)

    torch.save({"kind": "dia", "settings": Attack()}, torn / "dia.pt")
    assert "not a checkpoint" in call(evaluate, "--out", torn) and not (tmp_path / "unpickled").exists()
    assert [p.name for p in torn.iterdir()] == ["dia.pt"]                   # nothing was written
    other = medmnist(tmp_path / "pneumoniamnist_mini.npz")
    assert "other images" in call(evaluate, "--out", chain, "--data", other)


def test_a_run_is_scored_on_another_test_set(own_chain, folder, tmp_path, capsys):
    """Of which it needs test/ alone: the same scores, in a folder of its own. The run's results stay."""
    new, words = tmp_path / "new", ["--out", own_chain, "--passes", 2]
    shutil.copytree(folder / "test", new / "test")
    before = {path.name: path.read_bytes() for path in own_chain.iterdir() if path.is_file()}
    assert call(evaluate, *words, "--data", new) is None
    printed = capsys.readouterr().out
    assert "new: 40 px, test alone" in printed and "only the test images of new are read" in printed
    assert "warning" not in printed
    assert (own_chain / "tests/new/scores.csv").read_bytes() == before["scores.csv"]
    metrics, own = (json.loads((own_chain / name).read_text()) for name in
                    ("tests/new/metrics.json", "metrics.json"))
    assert metrics["auroc"] == own["auroc"] and metrics["settings"]["data"] == str(new)
    assert list(metrics["floors_auroc"]) == ["minus mean brightness"] and len(own["floors_auroc"]) == 3
    trained = dia_lib.load_data(str(folder), 40, ("train",), 0.3).names["train"][0]
    shutil.copy(folder / trained, new / "test/good/known.png")
    (new / "test/good").rename(new / "test/fine")
    assert "no candidates for the normal class" in call(evaluate, *words, "--data", new)
    assert call(evaluate, *words, "--data", new, "--normal-class", "fine") is None
    assert len((own_chain / "tests/new-2/scores.csv").read_text().splitlines()) == 32
    assert "warning: 1 of these images were trained on" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in own_chain.iterdir() if path.is_file()}
    moved = shutil.copytree(folder, tmp_path / "moved")                     # the run's own images, elsewhere
    assert call(evaluate, *words, "--data", moved) is None and not (own_chain / "tests/moved").exists()
    (moved / trained).unlink()                                              # it is another set now
    assert call(evaluate, *words, "--data", moved) is None and (own_chain / "tests/moved").exists()
    images = np.zeros((4, 40, 40), np.uint8)
    images[:, ::3] = np.arange(4)[:, None, None] * 60
    np.savez(tmp_path / "other.npz", test_images=images, test_labels=np.array([0, 1, 0, 1]))
    assert call(evaluate, *words, "--data", tmp_path / "other.npz", "--normal-class", 1) is None
    assert len((own_chain / "tests/other/scores.csv").read_text().splitlines()) == 5
    assert "is a test of" in call(predict, own_chain / "tests/new", folder / "test")
    (own_chain / "stats.pt").unlink()
    assert "another set than its own, score it on its own first" in call(evaluate, *words, "--data", new)


def test_test_set_with_one_label_only(folder, tmp_path):
    root, run = tmp_path / "one", tmp_path / "run"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        (root / split / "good").symlink_to(folder / split / "good", target_is_directory=True)
    flags = [*STAGE2, "--steps", 1, "--dissolve", "none"]
    assert call(train_dia, "--data", root, "--out", run, *flags) is None
    assert "both normal and anomalous" in call(evaluate, "--out", run)
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize("module, lr, steps, what", [
    (train_dia, "1e30", 8, "the loss is"), (train_dia, "1e30", 4, "embeddings"),
    (train_diffusion, "1e30", 8, "the loss is"), (train_diffusion, "1e39", 4, "a weight")])
def test_what_is_not_finite_stops_the_run_before_it_is_saved(module, lr, steps, what, folder, tmp_path):
    """The loss (8 steps: looked at after two), the embeddings or the weights (4 steps: after one)."""
    flags = [*STAGE2, "--dissolve", "none"] if module is train_dia else STAGE1
    code = call(module, "--data", folder, "--out", tmp_path, *flags, "--lr", lr, "--steps", steps)
    assert what in code and "smaller --lr" in code and not list(tmp_path.glob("*.pt"))


def test_a_mistake_at_the_shell_ends_with_few_lines_and_an_exit_code():
    for flags, code, lines in ((["--data", "no/such/path"], 1, 1), (["--steps", "no"], 2, 2)):
        command = [sys.executable, ROOT / "train_diffusion.py", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and done.stdout == "" and len(done.stderr.splitlines()) == lines
        assert flags[1] in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", [train_diffusion, train_dia, evaluate])
def test_flags_are_at_most_twenty_and_each_has_a_help_text(module, monkeypatch, capsys):
    parser = dia_lib.make_parser("text")
    monkeypatch.setattr(module, "make_parser", lambda text: parser)
    with pytest.raises(SystemExit) as stop:
        module.arguments(["--help"])
    flags = [action for action in parser._actions if action.dest != "help"]
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and 5 <= len(flags) <= 20
    assert all(action.help and action.help.strip() and action.option_strings[0] in shown for action in flags)
