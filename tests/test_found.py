"""Images as they are, through the command lines: what is odd is refused with a sentence, or said first."""

import csv
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGE1, STAGE2, call
from PIL import Image
from test_prepare import write_dicom

import evaluate
import train_dia
import train_diffusion
from extras import predict, prepare
from weakly_supervised import nearest


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(path)


def each(root, pattern, change, suffix=".png"):
    """Write every image of some folders again, changed and in another format."""
    for path in sorted(root.glob(f"{pattern}/*.png")):
        pixels = change(np.asarray(Image.open(path)).astype(int))
        path.unlink()
        save(path.with_suffix(suffix), pixels)


def hounsfield(x):                                          # -1000 to 1000
    return (x - 128) * 2000 // 255


def rgb16(path, values):
    """A PNG of 16-bit colours, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(values[..., None], 3, 2))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", *values.shape[::-1], 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


def colours_of_12_bits(root):
    for path in root.glob("*/*/*.png"):
        rgb16(path, np.asarray(Image.open(path)).astype(int) * 16)


def pages(root):
    first = Image.open(root / "train/good/000.png")
    first.save(root / "train/good/pages.tif", save_all=True, append_images=[first])


REFUSED = {             # name: (what is done to the folder of tiles, the sentence)
    "float 0 to 1": (lambda r: each(r, "*/*", lambda x: (x / 255).astype(np.float32), ".tif"),
                     "has float values, 0"),
    "float HU": (lambda r: each(r, "*/*", lambda x: hounsfield(x).astype(np.float32), ".tif"),
                 "has float values, -"),
    "signed HU": (lambda r: each(r, "*/*", lambda x: hounsfield(x).astype(np.int32), ".tif"),
                  "has signed values, -"),
    "HU + 32768": (lambda r: each(r, "*/*", lambda x: (hounsfield(x) + 32768).astype(np.uint16)),
                   "40 images of 16 bits have values of about "),
    "12 bits of 16": (lambda r: each(r, "*/*", lambda x: (x * 16).astype(np.uint16)),
                      "40 images of 16 bits have values of about "),
    "12 bits of 16, colour": (colours_of_12_bits, "40 images of 16 bits have values of about "),
    "pages": (pages, "pages.tif has 2 pages: which of them?"),
    "torn": (lambda r: (r / "train/good/torn.png").write_bytes(b"?"),
             "let python -m extras.prepare leave it out"),
    "another name in test": (lambda r: (r / "test/good").rename(r / "test/Good"), "Is it Good?"),
    "a usual name in test": (lambda r: (r / "test/good").rename(r / "test/normal"), "Is it normal?"),
    "split by no one": (lambda r: (r / "train").rename(r / "training"),
                        "Other layouts: python -m extras.prepare"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_go_wrong_is_refused_before_training(case, folder, tmp_path):
    change, sentence = REFUSED[case]
    change(root := shutil.copytree(folder, tmp_path / "set"))
    flags = {train_diffusion: STAGE1, train_dia: [*STAGE2, "--dissolve", "copy"]}
    for module, small in flags.items():
        said = call(module, "--data", root, "--out", tmp_path / "out", *small)
        assert sentence in said and "\n" not in said and not (tmp_path / "out").exists()
        assert any(word in said for word in ("extras.prepare", "same name"))            # what to do


def copied(root):
    for i in range(3):
        shutil.copy(root / f"train/good/00{i}.png", root / f"test/dent/copy{i}.png")


def masked(root):
    each(root, "test/dent", lambda x: x.astype(np.uint8))
    for i in range(6):
        save(root / f"test/dent/00{i}_mask.png", np.zeros((40, 40), np.uint8))
        save(root / f"ground_truth/dent/00{i}.png", np.zeros((40, 40), np.uint8))
        save(root / f"test/masks/00{i}.png", np.zeros((40, 40), np.uint8))


def stray(root):
    for i in range(4):
        save(root / f"train/{i}.png", np.zeros((40, 40), np.uint8))
    (root / "train/good/a.dcm").write_bytes(b"?")
    (root / "train/good/b.gif").write_bytes(b"?")


def transparent(root):
    each(root, "test/*", lambda x: np.dstack([np.full((40, 40, 3), 200), 255 * (x > 130)]).astype(np.uint8))


SAID = {                # name: (what is done to the folder of tiles, a line of what is said)
    "nothing": (lambda root: None, None),
    "binarised": (lambda r: each(r, "*/*", lambda x: (x > 140).astype(np.uint8) * 255), None),
    "16 bits of the full range": (lambda r: each(r, "*/*", lambda x: (x * 257).astype(np.uint16)), None),
    "bits": (lambda r: each(r, "test/*", lambda x: (x * 257).astype(np.uint16)),
             "warning: 0% of the training images have 16 bits, 100% of the test images"),
    "colour": (lambda r: each(r, "test/*", lambda x: np.dstack([x, x, 280 - x]).astype(np.uint8)),
               "warning: in colour are 0 of 27 training images, 12 of 12 normal test images, 18 of 18 "
               "anomalous test images"),
    "one coloured anomaly": (lambda r: Image.new("RGB", (40, 40), "red").save(r / "test/dent/000.png"),
                             "in colour are 0 of 27 training images, 0 of 12 normal test images, 1 of"),
    "bright": (lambda r: each(r, "test/*", lambda x: (x // 4 + 190).astype(np.uint8)),
               "warning: mean brightness"),
    "constant": (lambda r: each(r, "train/*", lambda x: (x * 0 + x[0, 0]).astype(np.uint8)),
                 "are constant: train/good/"),
    "a tenth constant": (lambda r: each(r, "test/dent", lambda x: (x * 0).astype(np.uint8)),
                         "warning: 6 of 30 test images are constant: test/dent/000.png, test/dent/001.png, "
                         "test/dent/002.png, ..."),
    "copies": (copied, "warning: 3 of 33 test images are training or held-out images, too; their "
                       "scores mean nothing: test/dent/copy0.png = train/good/000.png"),
    "masks": (masked, "  not read: 6 .png in test/dent; 6 .png in test/masks"),
    "stray": (stray, "  not read: 1 .dcm in train/good; 1 .gif in train/good; 4 .png in train"),
    "hidden colours": (transparent, "warning: mean brightness"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_odd_is_said_first(case, folder, tmp_path, capsys):
    """The same lines from the first stage on; where nothing is odd, no warning."""
    change, line = SAID[case]
    change(root := shutil.copytree(folder, tmp_path / "set"))
    assert call(train_diffusion, "--data", root, "--out", tmp_path / "out", *STAGE1, "--steps", 1) is None
    said = capsys.readouterr().out.splitlines()
    first = next(i for i, text in enumerate(said) if "copies between train and test" in text)
    odd = [text for text in said if text.startswith("warning: ") or "not read:" in text]
    assert len(odd) == (line is not None) or case in ("hidden colours", "constant")
    assert line is None or any(line in text for text in odd)
    assert said[first + 1].startswith("  train: normal ") and said[first + 2].startswith("  test: ")
    assert all("begun to memorise" not in text for text in said)


def test_every_stage_says_it_and_so_do_the_others(folder, tmp_path, capsys, weights):
    copied(root := shutil.copytree(folder, tmp_path / "set"))
    warning = "warning: 3 of 33 test images are training or held-out images, too"
    for module, flags in ((train_diffusion, STAGE1), (train_dia, STAGE2), (evaluate, ["--passes", 1])):
        assert call(module, "--data", root, "--out", tmp_path / "out", *flags) is None
        assert warning in capsys.readouterr().out
    assert call(nearest, "--data", root, "--out", tmp_path / "nearest", "--backbone", "resnet18", "--weights",
                weights, "--image-size", 32) is None
    assert warning in capsys.readouterr().out
    assert call(predict, tmp_path / "out", root / "test", "--to", tmp_path / "new") is None
    rows = list(csv.DictReader((tmp_path / "new/scores.csv").open()))
    assert {row["path"] for row in rows if row["seen"]} == {f"dent/copy{i}.png" for i in range(3)}


def test_names_that_are_not_utf_8_come_through_all_stages(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "set")
    try:
        os.rename(root / "test/dent/000.png", os.fsencode(root / "test/dent") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    os.rename(root / "train/good/000.png", os.fsencode(root / "train/good") + b"/\xfe.png")
    for module, flags in ((train_diffusion, STAGE1), (train_dia, STAGE2), (evaluate, ["--passes", 1])):
        assert call(module, "--data", root, "--out", tmp_path / "out", *flags) is None
    assert "test/dent/%ff.png" in (tmp_path / "out/scores.csv").read_text(encoding="utf-8")


def test_moved_data_are_asked_for_by_their_flag(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "set")
    for module, flags in ((train_diffusion, STAGE1), (train_dia, STAGE2)):
        assert call(module, "--data", root, "--out", tmp_path / "out", *flags) is None
    root.rename(tmp_path / "moved")
    said = call(evaluate, "--out", tmp_path / "out", "--passes", 1)
    assert f"--data {root}, which is not there" in said and "say by --data" in said
    assert call(evaluate, "--out", tmp_path / "out", "--passes", 1, "--data", tmp_path / "moved") is None


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    said = call(train_diffusion, "--data", "pneumoniamnist", "--out", tmp_path / "out", *STAGE1)
    assert "XDG_CACHE_HOME names another place" in said and "\n" not in said


def test_no_image_gives_an_empty_result(own_chain):
    run = predict.load_run(own_chain)
    images = torch.zeros(0, 1, run.settings["image_size"], run.settings["image_size"], dtype=torch.uint8)
    scores, p = run.score(images)
    assert scores.shape == p.shape == (0,)


def test_new_scans_get_the_window_of_the_training_images(folder, tmp_path):
    """Prepared, trained, scored: a scan as it came has the score of its prepared image."""
    raw = shutil.copytree(folder, tmp_path / "raw")
    each(raw, "*/*", lambda x: hounsfield(x).astype(np.float32), ".tif")
    assert call(prepare, raw, tmp_path / "set") is None
    assert call(train_dia, "--data", tmp_path / "set", "--out", tmp_path / "run", *STAGE2, "--dissolve",
                "none") is None
    low, high = predict.load_run(tmp_path / "run").settings["window"]
    assert -400 < low < -200 and 300 < high < 600
    scores = {}
    for name in ("raw/test", "set/test", "raw/test/dent"):
        to = tmp_path / "scores" / name
        assert call(predict, tmp_path / "run", tmp_path / name, "--passes", 1, "--to", to) is None
        rows = csv.DictReader((to / "scores.csv").open())
        scores[name] = {f"{row['path'].split('/')[-1][:3]}{row['path'][:4]}": row["score"] for row in rows}
    a, b = scores["raw/test"], scores["set/test"]
    assert len(a) == 30 and a == {k.replace("norm", "good"): v for k, v in b.items()}
    assert sorted(scores["raw/test/dent"].values()) == sorted(v for k, v in a.items() if k.endswith("dent"))


def test_new_dicom_files(own_chain, folder, tmp_path):
    """By the header's window, where the run's images had none; several pages, or no window, are refused."""
    pytest.importorskip("pydicom")
    x = np.asarray(Image.open(folder / "test/dent/000.png")).astype(np.int16)
    new, header = tmp_path / "new", {"WindowCenter": 128, "WindowWidth": 256}        # 0 to 255
    write_dicom(new / "scan", x, **header)
    save(new / "same.png", x.astype(np.uint8))
    assert call(predict, own_chain, new, "--passes", 1, "--to", tmp_path / "to") is None
    one, other = csv.DictReader((tmp_path / "to/scores.csv").open())
    assert {one["path"], other["path"]} == {"scan", "same.png"} and one["score"] == other["score"]
    write_dicom(new / "more.dcm", np.stack([x, x]), **header)
    assert "more.dcm has 2 pages: which of them?" in call(predict, own_chain, new, "--to", tmp_path / "2")
    write_dicom(new / "more.dcm", x)
    assert "more.dcm names no window" in call(predict, own_chain, new, "--to", tmp_path / "2")
    (new / "more.dcm").write_bytes(b"?")
    assert "more.dcm cannot be read as DICOM" in call(predict, own_chain, new, "--to", tmp_path / "2")


@pytest.mark.parametrize("file", ["extras/prepare.py", "extras/predict.py", "weakly_supervised/nearest.py"])
def test_rooms_are_run_as_modules_in_the_projects_folder(file, tmp_path):
    done = subprocess.run([sys.executable, ROOT / file, "a"], capture_output=True, text=True, cwd=tmp_path)
    module = file.removesuffix(".py").replace("/", ".")
    assert done.returncode == 1 and done.stderr == f"Run it as python -m {module}, in the project's folder.\n"
