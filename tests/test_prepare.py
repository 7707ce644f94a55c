"""extras/prepare.py: small trees shaped as each download, and plain folders, prepared, read by the core."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call, texture
from PIL import Image
from sklearn.model_selection import train_test_split

from dia_lib import Item, decode, load_data
from extras import prepare


def make(root, *names):
    """A different small image under each name."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(texture(np.random.default_rng(i), 24)).save(root / name)


def contents(folder):
    """{relative name: bytes} of all files below a folder."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def images(folder):
    """The bytes of all images below a folder, sorted."""
    return sorted(content for name, content in contents(folder).items() if name != "prepared.json")


def download(root, name):
    """A set as its download unzips below root, a few images of each folder."""
    if name == "sarscov2":
        make(root, *(f"COVID/Covid ({i}).png" for i in range(8)),
             *(f"non-COVID/Non-Covid ({i}).png" for i in range(8)))
    elif name == "kvasir":
        classes = ("dyed-lifted-polyps", "dyed-resection-margins", "esophagitis", "normal-cecum",
                   "normal-pylorus", "normal-z-line", "polyps", "ulcerative-colitis")
        make(root / "kvasir-dataset-v2", *(f"{c}/{c}-{i}.jpg" for c in classes for i in range(4)))
    elif name == "oct2017":
        make(root / "OCT2017 ", *(f"{split}/{c}/{c}-{split}-{i}.jpeg"
                                  for split, n in (("train", 6), ("test", 3), ("val", 2))
                                  for c in ("CNV", "DME", "DRUSEN", "NORMAL") for i in range(n)))
        (root / "__MACOSX").mkdir()
    else:
        grades = {f"{i:012x}": i % 5 for i in range(20)}
        make(root, *(f"train_images/{code}.png" for code in grades), "test_images/fff.png")
        rows = "".join(f"{code},{grade}\n" for code, grade in grades.items())
        (root / "train.csv").write_text(f"id_code,diagnosis\n{rows}")
        (root / "test.csv").write_text("id_code\nfff\n")


@pytest.fixture
def scans(tmp_path):
    """Plain folders: 12 normals at two sites, 3 tumours, 2 bleedings; the arguments that prepare them."""
    make(tmp_path / "scans", *(f"site a/day {i}/healthy {i}.png" for i in range(8)),
         *(f"site b/h{i}.png" for i in range(4)), *(f"ill/tumour/{i}.png" for i in range(3)),
         *(f"bleeding/{i}.png" for i in range(2)))
    return [tmp_path / "scans", tmp_path / "out", "--normal", "site a", "site b",
            "--anomaly", "ill/tumour", "bleeding"]


@pytest.mark.parametrize("name, counts", [
    ("sarscov2", {"train/normal": 6, "test/normal": 2, "test/COVID": 8}),
    ("kvasir", {"train/normal": 9, "test/normal": 3, "test/polyps": 4}),
    ("oct2017", {"train/normal": 6, "test/normal": 3, "test/DRUSEN": 3, "test/DME": 3, "test/CNV": 3}),
    ("aptos2019", {"train/normal": 3, "test/normal": 1, **{f"test/grade {i}": 4 for i in (4, 3, 2, 1)}})])
def test_downloads_are_taken_untouched(name, counts, tmp_path):
    """Every image of the set's classes comes to where the core reads it, with its bytes; the source stays."""
    source, out = tmp_path / "download", tmp_path / name
    download(source / "archive/images" if name == "sarscov2" else source, name)
    before = contents(source)
    assert call(prepare, source, out, "--set", name) is None
    assert contents(source) == before and {p.name for p in tmp_path.iterdir()} == {"download", name}
    data, says = load_data(str(out), 24, holdout=0), json.loads((out / "prepared.json").read_text())
    found = Counter(f"test/{g}" for g in data.groups)
    assert says["counts"] == {"train/normal": len(data.train), **found} == counts
    assert [g == "normal" for g in data.groups] == [y == 0 for y in data.labels.tolist()]
    assert {k: v for k, v in says.items() if k != "counts"} == {
        "set": name, "source": "download", "left_out": {}, "window": None, "window_asked_for": None,
        "not_read": {"kvasir": "", "aptos2019": ""}.get(name, says["not_read"]),
        "defaults": {"shift": "perm", "t_range": [100, 200]} if name == "kvasir" else {}}
    assert data.defaults == {"shift": "rotate", "t_range": [30, 130], "image_size": 224,
                             "window": None} | says["defaults"]
    originals = {Path(n).name: content for n, content in before.items()}
    made = {n: content for n, content in contents(out).items() if n != "prepared.json"}
    assert all(originals[Path(n).name] == content for n, content in made.items())
    if name == "oct2017":                                                   # the split that is published
        assert all(f"-{n.split('/')[0]}-" in n for n in made)
    if name == "aptos2019":
        grades = dict(line.split(",") for line in (source / "train.csv").read_text().split()[1:])
        assert {n.split("/")[1] for n in made if grades[Path(n).stem] == "0"} == {"normal"}
        assert all(n.split("/")[1] in ("normal", f"grade {grades[Path(n).stem]}") for n in made)


@pytest.mark.parametrize("flags, share", [
    (["--set", "sarscov2"], 0.25), (["--normal", "non-COVID"], 0.25),
    (["--normal", "non-COVID", "--test-share", 0.5], 0.5)])
def test_normals_are_split_as_scikit_learn_splits_their_sorted_names(flags, share, tmp_path):
    download(tmp_path / "set", "sarscov2")
    assert call(prepare, tmp_path / "set", tmp_path / "out", *flags) is None
    names = sorted(p.name for p in (tmp_path / "set/non-COVID").iterdir())
    train, test = train_test_split(names, test_size=share, random_state=42)
    for split, expected in (("train", train), ("test", test)):
        assert sorted(p.name for p in (tmp_path / "out" / split / "normal").iterdir()) == sorted(expected)


def test_plain_folders_at_any_depth(scans, tmp_path):
    assert call(prepare, *scans) is None
    data = load_data(str(tmp_path / "out"), 24, holdout=0)
    assert len(data.train) == 9 and Counter(data.groups) == {"normal": 3, "tumour": 3, "bleeding": 2}
    assert images(tmp_path / "out") == images(tmp_path / "scans")
    assert json.loads((tmp_path / "out/prepared.json").read_text()) == {
        "set": None, "source": "scans", "left_out": {}, "not_read": "", "window": None, "defaults": {},
        "window_asked_for": None,
        "counts": {"train/normal": 9, "test/normal": 3, "test/tumour": 3, "test/bleeding": 2}}


def test_without_anomalies_there_is_no_group(scans, tmp_path):
    assert call(prepare, *scans[:-3]) is None
    assert [p.name for p in (tmp_path / "out/test").iterdir()] == ["normal"]
    assert load_data(str(tmp_path / "out"), 24).labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("folder, names, made", [
    ("ill", ["0.png", "a/0.png", "a/b/0.png", "a/1.png"],                  # one name at several sites
     ["ill/0.png", "ill/a/0.png", "ill/a/b/0.png", "1.png"]),
    ("ill", ["a/x.png", "b/X.png", "b/y.png"], ["ill/a/x.png", "ill/b/X.png", "y.png"]),    # but for the case
    ("ill.png", ["a/1.png", "b/1.png", "ill.png", "2.png"],                     # a folder called as an image
     ["ill.png/a/1.png", "ill.png/b/1.png", "ill.png/ill.png", "2.png"])])
def test_names_that_clash_get_their_folders_in_front(folder, names, made, tmp_path):
    """All images come through, also where the file system ignores the case; other names stay."""
    make(tmp_path / "set", *(f"{folder}/{name}" for name in names), *(f"well/{i}.png" for i in range(4)))
    assert call(prepare, tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", folder) is None
    assert images(tmp_path / "out") == images(tmp_path / "set")
    assert set(contents(tmp_path / "out/test" / folder)) == set(made)


def test_images_that_cannot_be_read_are_left_out_and_named(scans, tmp_path, capsys):
    """Torn, empty, no images: not copied, told with a reason; OUT names no place of this machine."""
    names = "site a/day 3/healthy 3.png", "site b/h1.png", "ill/tumour/1.png"
    torn, empty, text = (tmp_path / "scans" / n for n in names)
    torn.write_bytes(torn.read_bytes()[:200])
    empty.write_bytes(b"")
    text.write_text("hello")
    assert call(prepare, *scans) is None
    told, written = capsys.readouterr().out, (tmp_path / "out/prepared.json").read_text()
    says = json.loads(written)
    assert set(says["left_out"]) == set(names) and "3 left out" in told and str(tmp_path) not in written
    assert all(f"left out: {n}: " in told and "cannot be read" in why for n, why in says["left_out"].items())
    data = load_data(str(tmp_path / "out"), 24, holdout=0)
    assert says["counts"] == {"train/normal": len(data.train), **Counter(f"test/{g}" for g in data.groups)}
    assert sum(says["counts"].values()) == 17 - 3 and data.groups.count("tumour") == 2
    assert call(prepare, *scans) is None and "was prepared before" in capsys.readouterr().out
    for file in (tmp_path / "scans").rglob("site*/**/*.png"):
        file.write_bytes(b"")
    assert "no image to train on can be read" in call(prepare, scans[0], tmp_path / "none", *scans[2:])


def count_copies(monkeypatch):
    """The names of the files that are copied from now on."""
    copied, real = [], shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *paths: (copied.append(paths[0].name), real(*paths)))
    return copied


STOPPED = """
import concurrent.futures as futures, functools, os, runpy, shutil, sys, time, dia_lib
real, n, sent = shutil.copyfile, [0], int(sys.argv.pop(1))
def copyfile(source, target):
    n[0] += 1
    if n[0] == 6:
        open(target, "wb").write(open(source, "rb").read()[:50])
        os.kill(os.getpid(), sent)
        time.sleep(1)
    real(source, target)
shutil.copyfile = copyfile
futures.ThreadPoolExecutor = functools.partial(futures.ThreadPoolExecutor, 1)
runpy.run_module("extras.prepare", run_name="__main__")
"""


@pytest.mark.parametrize("sent, left", [(signal.SIGKILL, 12), (signal.SIGTERM, 11)])
def test_a_stopped_run_goes_on_with_the_same_command(sent, left, scans, tmp_path, monkeypatch, capsys):
    """Stopped while it wrote the sixth of 17 files: nothing to read yet; only the others are then copied."""
    done = subprocess.run([sys.executable, "-c", STOPPED, str(int(sent)), *map(str, scans)], cwd=ROOT,
                          capture_output=True, text=True)
    if sent == signal.SIGTERM:
        assert done.returncode == 128 + sent and "stopped; the same command goes on from there" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == -sent, done.stderr
    assert not (tmp_path / "out").exists() and len(contents(tmp_path / "out.part")) == 6
    torn = [n for n in contents(tmp_path / "out.part") if n.endswith(".tmp")]
    assert len(torn) == (sent == signal.SIGKILL)
    copied = count_copies(monkeypatch)
    assert call(prepare, *scans) is None and len(copied) == left and not (tmp_path / "out.part").exists()
    assert call(prepare, scans[0], tmp_path / "at once", *scans[2:]) is None
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    copied.clear()
    capsys.readouterr()
    assert call(prepare, *scans) is None and copied == []
    assert "was prepared before: train/normal 9" in capsys.readouterr().out


def test_a_file_of_another_size_is_copied_again(scans, tmp_path, monkeypatch):
    assert call(prepare, *scans) is None
    (tmp_path / "out").rename(tmp_path / "out.part")
    torn = next((tmp_path / "out.part/train/normal").iterdir())
    torn.write_bytes(b"torn")
    copied = count_copies(monkeypatch)
    assert call(prepare, *scans) is None and copied == [torn.name]
    assert images(tmp_path / "out") == images(tmp_path / "scans")


def test_an_out_that_holds_other_things_is_refused(scans, tmp_path, monkeypatch):
    """Files of one's own, another preparation, a changed or missing image: nothing is written over them."""
    out, other = tmp_path / "out", "holds other things"
    out.mkdir()
    assert call(prepare, *scans) is None                                    # an empty folder will do
    (out / ".DS_Store").write_text("")                                      # hidden files do not count
    assert call(prepare, *scans) is None
    before = contents(out)
    assert other in call(prepare, *scans[:-1])                              # without the group bleeding
    assert other in call(prepare, *scans, "--test-share", 0.5)
    shutil.copytree(scans[0], tmp_path / "other scans")
    assert other in call(prepare, tmp_path / "other scans", *scans[1:])
    assert contents(out) == before
    some = next((out / "train/normal").iterdir())
    for spoil in (lambda: some.write_bytes(b"?"), some.unlink, lambda: (out / "notes.txt").write_text(""),
                  (out / "prepared.json").unlink, lambda: (out / "prepared.json").write_text("[]")):
        spoil()
        changed = contents(out)
        assert other in call(prepare, *scans) and contents(out) == changed
        shutil.rmtree(out)
        for name, content in before.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    (tmp_path / "file").write_text("")
    assert other in call(prepare, scans[0], tmp_path / "file", *scans[2:])
    make(tmp_path, "new.part/train/normal/mine.png")
    said = call(prepare, scans[0], tmp_path / "new", *scans[2:])
    assert "holds train/normal/mine.png, which this command does not make" in said
    assert not (tmp_path / "new").exists() and len(contents(tmp_path / "new.part")) == 1


def test_what_is_missing_in_a_download_is_said(tmp_path):
    root, out = tmp_path / "sets", tmp_path / "out"
    for name in prepare.SETS:
        download(root / name, name)
    (root / "sarscov2/COVID").rename(root / "sarscov2/covid19")
    said = call(prepare, root / "sarscov2", out, "--set", "sarscov2")
    assert "fetch it from kaggle.com/datasets/plameneduardo" in said and "unzip it into" in said
    assert "expected there: COVID, non-COVID; found: covid19, non-COVID" in said
    assert "found: no such folder" in call(prepare, root / "nothing", out, "--set", "kvasir")
    (root / "empty").mkdir()
    said = call(prepare, root / "empty", out, "--set", "oct2017")
    assert "expected there: train/NORMAL, test/NORMAL; found: nothing" in said
    (root / "aptos2019/train_images/000000000003.png").unlink()
    assert "1 images of train.csv are missing, the first is train_images/000000000003.png" in \
        call(prepare, root / "aptos2019", out, "--set", "aptos2019")
    for text in ("id,grade\n1,2\n", "id_code,diagnosis\n1,severe\n", "id_code,diagnosis\n1\n"):
        (root / "aptos2019/train.csv").write_text(text)
        said = call(prepare, root / "aptos2019", out, "--set", "aptos2019")
        assert "needed are columns id_code and diagnosis" in said
    assert not out.exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("flags, sentence", [
    (["--normal", "nowhere"], "--normal nowhere: no such folder below"),
    (["--normal", "../elsewhere"], "found: bleeding, ill, notes, site a, site b"),
    (["--normal", "notes"], "no image below"),
    (["--normal", "site a", "--anomaly", "site a/day 1"], "its images would be there twice"),
    (["--normal", "site a", "site b/../site a"], "its images would be there twice"),
    (["--normal", "ill/tumour"], "3 normal images are too few to split"),
    (["--normal", "site a", "--anomaly", "ill/Normal"], "cannot be called Normal"),
    (["--normal", "site a", "--test-share", "0"], "needs a number above 0"),
    (["--normal", "site a", "--test-share", "0.8"], "up to 0.75"),
    (["--set", "kvasir", "--anomaly", "bleeding"], "go with --normal"),
    (["--set", "kvasir", "--normal", "site a"], "not allowed with argument --set"),
    (["--set", "imagenet"], "invalid choice"), ([], "has no folder train: say which folders are"),
    (["--group-by", "x"], "go with --normal"),
    (["--normal", "site a", "--window", "5", "5"], "needs LOW below HIGH")])
def test_wrong_flags_are_one_sentence(flags, sentence, scans, tmp_path):
    (tmp_path / "scans/notes").mkdir()
    make(tmp_path, "elsewhere/0.png")
    make(tmp_path / "scans", "ill/Normal/0.png")
    said = call(prepare, *scans[:2], *flags)
    assert sentence in said and "\n" not in said and not (tmp_path / "out").exists()


def test_out_inside_source_is_refused(scans, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scans", target_is_directory=True)
    for out in (tmp_path / "scans/out", tmp_path / "link/deep/out", tmp_path / "scans"):
        assert "lies in SOURCE" in call(prepare, scans[0], out, *scans[2:])


# ---- Scans -----------------------------------------------------------------------------------------------


def values(i, low=-1000, high=400, side=24):
    """A scan's values, float64 (side, side): a texture that fills low to high."""
    pixels = texture(np.random.default_rng(i), side).astype(float)
    return low + (pixels - pixels.min()) / (pixels.max() - pixels.min()) * (high - low)


def tiff(path, *pages):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = (Image.fromarray(page) for page in pages)
    first.save(path, save_all=True, append_images=others)


KINDS = {"float": lambda v: v.astype(np.float32), "signed": lambda v: v.astype(np.int32),
         "shifted": lambda v: (v + 32768).astype(np.uint16),
         "12 bits": lambda v: (v + 1000).astype(np.uint16)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, (-500, 100)])
def test_scans_of_more_bits_become_8_bit_images_by_one_window(kind, window, tmp_path, capsys):
    """LOW..HIGH to 0..255; by default percentiles of the training images; the core refuses the scans."""
    source, out = tmp_path / "scans", tmp_path / "out"
    offset = {"shifted": 32768, "12 bits": 1000}.get(kind, 0)
    for i in range(8):
        tiff(source / f"well/{i}.tif", KINDS[kind](values(i)))
    tiff(source / "ill/0.tif", KINDS[kind](values(9, -1000, 1400)))
    shutil.copytree(source / "well", tmp_path / "plain/train/good")
    with pytest.raises(SystemExit, match="extras.prepare"):
        load_data(str(tmp_path / "plain"), 24)
    flags = ["--window", *(w + offset for w in window)] if window else []
    assert call(prepare, source, out, "--normal", "well", "--anomaly", "ill", *flags) is None
    says = json.loads((out / "prepared.json").read_text())
    low, high = (w - offset for w in says["window"])
    assert (low, high) == (window or (pytest.approx(-1000, abs=15), pytest.approx(400, abs=15)))
    assert f"values from {says['window'][0]:g} to" in capsys.readouterr().out
    made = np.asarray(Image.open(out / "test/ill/0.tif.png")).astype(float)
    expected = ((values(9, -1000, 1400) - low) / (high - low) * 255).clip(0, 255)
    assert made.shape == (24, 24) and abs(made - expected).max() <= 1.5 * 255 / (high - low) + 0.51
    before = contents(out)
    assert call(prepare, source, out, "--normal", "well", "--anomaly", "ill", *flags) is None
    assert "was prepared before" in capsys.readouterr().out and contents(out) == before
    assert len(load_data(str(out), 24, holdout=0).train) == 6


def test_pages_have_to_be_asked_for(tmp_path):
    make(tmp_path / "set", *(f"well/{i}.png" for i in range(4)))
    tiff(tmp_path / "set/ill/scan.tif", *(texture(np.random.default_rng(i), 24) for i in range(20, 23)))
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill"]
    assert "1 files have several pages, the first is ill/scan.tif: say --pages" in call(prepare, *command)
    assert call(prepare, *command, "--pages", "all") is None
    for i in range(3):
        made = Image.open(tmp_path / f"out/test/ill/scan.tif-{i:04d}.png")
        assert np.array_equal(np.asarray(made), texture(np.random.default_rng(20 + i), 24))
    command[1] = tmp_path / "first"
    assert call(prepare, *command, "--pages", "first") is None
    assert [p.name for p in (tmp_path / "first/test/ill").iterdir()] == ["scan.tif.png"]


def test_copies_are_left_out_of_training_and_listed(tmp_path, capsys):
    """Within training the first name stays; of training and test the one in test."""
    make(tmp_path / "set", *(f"well/{i}.png" for i in range(12)), "ill/0.png", "ill/1.png")
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill"]
    names = sorted(f"{i}.png" for i in range(12))
    train, test = train_test_split(names, test_size=0.25, random_state=42)
    one, other, third = sorted(train)[:3]
    shutil.copy(tmp_path / "set/well" / one, tmp_path / "set/well" / other)
    shutil.copy(tmp_path / "set/well" / test[0], tmp_path / "set/well" / third)
    assert call(prepare, *command) is None
    says = json.loads((tmp_path / "out/prepared.json").read_text())
    assert says["left_out"] == {f"well/{other}": f"the same image as train/normal/{one}",
                                f"well/{third}": f"the same image as test/normal/{test[0]}"}
    assert says["counts"] == {"train/normal": 7, "test/normal": 3, "test/ill": 2}
    assert f"left out: well/{third}: the same image as" in capsys.readouterr().out
    assert call(prepare, *command) is None and "was prepared before" in capsys.readouterr().out


def test_a_patient_is_on_one_side(tmp_path, capsys):
    """100 patients with four slices each, ten of them with an anomaly in one."""
    make(tmp_path / "set", *(f"well/p{p:03d}-{s}.png" for p in range(100) for s in range(4) if p >= 10 or s),
         *(f"ill/p{p:03d}-0.png" for p in range(10)))
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill"]
    assert call(prepare, *command, "--group-by", r"p(\d+)-") is None
    sides = {side: {f.name[:4] for f in (tmp_path / "out" / side).rglob("*.png")}
             for side in ("train", "test")}
    assert not sides["train"] & sides["test"] and {f"p{p:03d}" for p in range(10)} <= sides["test"]
    assert len(sides["train"]) == 67
    assert "100 groups or patients, 67 of them to train on" in capsys.readouterr().out
    assert sum(json.loads((tmp_path / "out/prepared.json").read_text())["counts"].values()) == 400
    command[1] = tmp_path / "other"
    assert "found in no name" in call(prepare, *command, "--group-by", "patient")
    assert "300 of 400 images have no group" in call(prepare, *command, "--group-by", "p0[0-4].-[01]")
    assert "too few to split" in call(prepare, *command, "--group-by", "p")
    assert not (tmp_path / "other").exists()


def write_dicom(path, pixels, **header):
    """A small DICOM file; pixels: int16 or uint16 (H, W) or (frames, H, W)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = (
        1, "MONOCHROME2", 16, 16, 15)
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.Rows, ds.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.PixelData = pixels.tobytes()
    for key, value in header.items():
        setattr(ds, key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def test_dicom_files_by_their_header_or_a_window(tmp_path, capsys):
    """Modality LUT, then the header's window or --window, then MONOCHROME1 inverted; patients on one side."""
    pytest.importorskip("pydicom")
    scan = [(values(i) + 1024).astype(np.uint16) for i in range(12)]
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": -300.5, "WindowWidth": 1001}
    for i in range(10):
        write_dicom(tmp_path / f"set/well/{i}.dcm", scan[i], PatientID=f"P{i // 2}", **hounsfield)
    write_dicom(tmp_path / "set/ill/a", scan[10], PatientID="Q", **hounsfield,
                PhotometricInterpretation="MONOCHROME1")
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill"]
    assert prepare.page_of(tmp_path / "set/ill/a", 0).window == (-801, 199)         # PS3.3, C.11.2.1.2
    assert call(prepare, *command) is None
    expected = ((scan[10].astype(float) - 1024 + 801) / 1000 * 255).clip(0, 255)
    made = np.asarray(Image.open(tmp_path / "out/test/ill/a.png")).astype(float)
    assert abs(made - (255 - expected)).max() <= 1
    sides = [{int(f.name.split(".")[0]) // 2 for f in (tmp_path / "out" / side / "normal").iterdir()}
             for side in ("train", "test")]
    assert not sides[0] & sides[1] and len(sides[0]) == 3
    assert json.loads((tmp_path / "out/prepared.json").read_text())["window"] is None
    command[1] = tmp_path / "windowed"
    assert call(prepare, *command, "--window", -1000, 0) is None
    made = np.asarray(Image.open(tmp_path / "windowed/test/ill/a.png")).astype(float)
    assert abs(made - (255 - ((scan[10].astype(float) - 24) / 1000 * 255).clip(0, 255))).max() <= 1
    (tmp_path / "set/ill/torn.dcm").write_bytes((tmp_path / "set/ill/a").read_bytes()[:100])
    (tmp_path / "set/ill/cut.dcm").write_bytes((tmp_path / "set/ill/a").read_bytes()[:-500])
    command[1] = tmp_path / "torn"
    assert call(prepare, *command) is None
    left_out = json.loads((tmp_path / "torn/prepared.json").read_text())["left_out"]
    assert set(left_out) == {"ill/torn.dcm", "ill/cut.dcm"}
    assert all("cannot be read as DICOM" in why for why in left_out.values())


def test_a_split_that_is_there_stays(tmp_path, capsys):
    """SOURCE with train/ and test/: so do anomalies in train/; a flag names another normal class."""
    make(tmp_path / "set", *(f"train/NORMAL/{i}.png" for i in range(5)), "train/ILL/6.png", "train/ILL/7.png",
         *(f"test/NORMAL/{i}.png" for i in range(3)), "test/ILL/8.png", "test/ILL/mask/9.png")
    shutil.copy(tmp_path / "set/test/ILL/8.png", tmp_path / "set/train/ILL/9.png")
    assert call(prepare, tmp_path / "set", tmp_path / "out") is None
    says = json.loads((tmp_path / "out/prepared.json").read_text())
    assert says["counts"] == {"train/normal": 5, "train/ILL": 2, "test/ILL": 1, "test/normal": 3}
    assert says["left_out"] == {"train/ILL/9.png": "the same image as test/ILL/8.png"}
    assert contents(tmp_path / "out/train/normal") == contents(tmp_path / "set/train/NORMAL")
    (tmp_path / "set/train/NORMAL").rename(tmp_path / "set/train/well")
    (tmp_path / "set/test/NORMAL").rename(tmp_path / "set/test/well")
    command = [tmp_path / "set", tmp_path / "well"]
    assert "Name it with --normal-class" in call(prepare, *command)
    assert call(prepare, *command, "--normal-class", "well") is None
    assert (tmp_path / "well/train/normal/0.png").is_file()


def test_patients_on_both_sides_of_a_split_that_is_there_are_said(tmp_path, capsys):
    pytest.importorskip("pydicom")
    for i, name in enumerate(("train/good/a", "train/good/b", "test/good/a", "test/bad/a")):
        write_dicom(tmp_path / f"set/{name}.dcm", values(i).astype(np.int16), PatientID=f"P{i % 3}")
    assert call(prepare, tmp_path / "set", tmp_path / "out") is None
    assert "warning: patients in train and in test: 1, the first is P0" in capsys.readouterr().out


def test_a_stopped_command_with_another_window_begins_again(tmp_path, monkeypatch):
    for i in range(8):
        tiff(tmp_path / f"set/well/{i}.tif", values(i).astype(np.float32))
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well"]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "copies", stop)
        assert call(prepare, *command, "--window", -1000, 400) != 0
    assert len(contents(tmp_path / "out.part")) == 9
    assert call(prepare, *command, "--window", -200, 0) is None
    command[1] = tmp_path / "other"
    assert call(prepare, *command, "--window", -200, 0) is None
    assert images(tmp_path / "out") == images(tmp_path / "other")
    assert "holds other things" in call(prepare, *command, "--window", -1000, 400)


def test_a_scan_and_an_image_that_would_get_one_name(tmp_path):
    make(tmp_path / "set", *(f"well/{i}.png" for i in range(4)), "ill/a.tif.png", "ill/b.tif-0001.png")
    tiff(tmp_path / "set/ill/b.tif", *(values(i).astype(np.float32) for i in range(2)))
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill", "--window", 0, 9,
               "--pages"]
    assert "would both become test/ill/b.tif-0001.png" in call(prepare, *command, "all")
    tiff(tmp_path / "set/ill/a.tif", values(0).astype(np.float32))
    assert "would both become test/ill/ill/a.tif.png" in call(prepare, *command, "first")
    (tmp_path / "set/ill/a.tif.png").unlink()
    assert call(prepare, *command, "first") is None and len(contents(tmp_path / "out/test/ill")) == 3


def test_values_are_those_that_the_file_means(tmp_path):
    """Where Pillow drops a sign, or adds one: 8 bits signed, 32 bits unsigned."""
    for values, kind in ((np.array([[-128, -45], [0, 127]], np.int8), "signed"),
                         (np.array([[-32000, -7], [0, 32000]], np.int16), "signed"),
                         (np.array([[0, 7], [2 ** 31, 2 ** 32 - 1]], np.uint32), "32-bit"),
                         (np.array([[-2 ** 31, 7], [0, 2 ** 31 - 1]], np.int32), "signed")):
        bits, code = values.itemsize * 8, 1 if values.dtype.kind == "u" else 2
        tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: values.nbytes}
        tags[339] = code
        file = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes) + values.tobytes() + struct.pack("<H", 10)
        file += b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags.items()) + struct.pack("<I", 0)
        (tmp_path / "a.tif").write_bytes(file)
        with pytest.raises(SystemExit, match=f"has {kind} values"):
            decode(tmp_path / "a.tif", 2)
        assert prepare.look(tmp_path / "a.tif").convert
        assert np.array_equal(prepare.page_of(tmp_path / "a.tif", 0).pixels, values)


def test_names_that_are_not_utf_8(tmp_path, capsys):
    make(tmp_path / "set", *(f"well/{i}.png" for i in range(5)))
    torn = os.fsencode(tmp_path / "set/well") + b"/\xfe.png"
    try:
        os.rename(tmp_path / "set/well/0.png", os.fsencode(tmp_path / "set/well") + b"/\xff.png")
        Path(os.fsdecode(torn)).write_bytes(b"?")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert call(prepare, tmp_path / "set", tmp_path / "out", "--normal", "well") is None
    assert "left out: well/%fe.png: " in capsys.readouterr().out
    assert len(load_data(str(tmp_path / "out"), 24, holdout=0).train) == 3


def test_dicom_files_that_pydicom_ships(tmp_path):
    """CT, MR, palette, two kinds of colour with 30 frames, an overlay: all become images of 8 bits."""
    pydicom = pytest.importorskip("pydicom")
    for name in ("ct", "mr", "overlay", "palette_color", "rgb_color", "ybr_color"):
        path = Path(pydicom.examples.get_path(name))
        seen = prepare.look(path)
        page = prepare.page_of(path, seen.pages - 1)
        image = prepare.to_8_bit(page, None if page.window else (-800, 900))
        assert image.dtype == np.uint8 and image.std() > 10 and (image.ndim == 3) == ("color" in name)
        assert seen.pages == (30 if name == "ybr_color" else 1)


def test_enhanced_dicom_has_its_values_and_window_in_functional_groups(tmp_path):
    """Slope, intercept and window of all frames, or of one, as enhanced CT and MR keep them."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset

    def groups(intercept=None, centre=None):
        ds = Dataset()
        if intercept is not None:
            ds.PixelValueTransformationSequence = [item := Dataset()]
            item.RescaleIntercept, item.RescaleSlope, item.RescaleType = intercept, 2, "HU"
        if centre is not None:
            ds.FrameVOILUTSequence = [item := Dataset()]
            item.WindowCenter, item.WindowWidth = centre, 401
        return ds

    frames = np.arange(2 * 24 * 24, dtype=np.uint16).reshape(2, 24, 24)
    write_dicom(tmp_path / "a.dcm", frames, SharedFunctionalGroupsSequence=[groups(-1024, 40)],
                PerFrameFunctionalGroupsSequence=[groups(), groups(centre=300)])
    for i, centre in enumerate((40, 300)):
        page = prepare.page_of(tmp_path / "a.dcm", i)
        assert np.array_equal(page.pixels, frames[i] * 2.0 - 1024)
        assert page.window == (centre - 200.5, centre + 199.5)


def test_dicom_headers_that_mislead(tmp_path, capsys):
    """Impossible frame counts, half a window, DICOMDIR, names of UIDs, mixed windows."""
    pytest.importorskip("pydicom")
    window = {"WindowCenter": 0, "WindowWidth": 1001}
    for i in range(8):
        write_dicom(tmp_path / f"set/well/1.2.840.{i}", values(i).astype(np.int16), **window)
    write_dicom(tmp_path / "set/ill/claims.dcm", values(8).astype(np.int16), **window)
    header = (tmp_path / "set/ill/claims.dcm").read_bytes()
    for name, frames in (("claims", "2000000000"), ("negative", "-1")):
        more = {"NumberOfFrames": frames, **window}
        write_dicom(tmp_path / f"set/ill/{name}.dcm", values(8).astype(np.int16), **more)
    (tmp_path / "set/ill/DICOMDIR").write_bytes(header)
    write_dicom(tmp_path / "set/ill/thin.dcm", values(11).astype(np.int16), WindowCenter=0, WindowWidth=0.5)
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill"]
    assert call(prepare, *command, "--pages", "all") is None
    says = json.loads((tmp_path / "out/prepared.json").read_text())
    assert says["counts"] == {"train/normal": 6, "test/normal": 2, "test/ill": 1}
    assert says["not_read"] == "1 other in ill" and "not read: 1 other in ill" in capsys.readouterr().out
    assert {name: why.split(" (")[-1] for name, why in says["left_out"].items()} == {
        "ill/claims.dcm": "it claims 2000000000 frames)", "ill/negative.dcm": "it claims -1 frames)"}
    thin = np.asarray(Image.open(tmp_path / "out/test/ill/thin.dcm.png"))
    assert np.array_equal(thin > 0, values(11).astype(np.int16) >= 0)
    command[1] = tmp_path / "mixed"
    for name, more in (("ill/none.dcm", {}), ("ill/none.dcm", {"WindowWidth": 200}), ("well/1.2.840.3", {})):
        write_dicom(tmp_path / "set" / name, values(3).astype(np.int16), **more)
        assert f"1 scans name no window in their header, the first is {name}, and 9 others do: give" in call(
            prepare, *command, "--pages", "all")
        write_dicom(tmp_path / "set" / name, values(3).astype(np.int16), **window)
    write_dicom(tmp_path / "set/ill/none.dcm", values(3).astype(np.int16))
    assert call(prepare, *command, "--pages", "all", "--window", -1000, 400) is None


def test_what_is_not_read_is_counted(scans, tmp_path, capsys):
    make(tmp_path / "scans", "site a/day 1/healthy 1_mask.png", "site a/masks/1.png",
         "ill/tumour/0_Mask_1.png")
    for name in ("site a/volume.nii.gz", "bleeding/film.gif", "elsewhere.txt"):
        (tmp_path / "scans" / name).write_bytes(b"?")
    assert call(prepare, *scans) is None
    counted = ("1 .gif in bleeding; 1 .gz in site a; 1 .png in site a/day 1; 1 .png in site a/masks; "
               "1 .png in tumour")
    assert f"not read: {counted}\n" in capsys.readouterr().out
    says = json.loads((tmp_path / "out/prepared.json").read_text())
    assert says["not_read"] == counted and sum(says["counts"].values()) == 17


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_source_that_has_changed_is_seen(suffix, tmp_path):
    """Also where the new file has the same size and an older time, as unzip leaves it."""
    def write(i, seed, age):
        path = tmp_path / f"set/well/{i}{suffix}"
        pixels = texture(np.random.default_rng(seed), 24)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.float32) if suffix == ".tif" else pixels).save(path, **{
            ".png": {"compress_level": 0}, ".tif": {}}[suffix])
        os.utime(path, ns=(10 ** 18 - age * 10 ** 9,) * 2)

    for i in range(8):
        write(i, i, 0)
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--window", 0, 255]
    assert call(prepare, *command) is None and call(prepare, *command) is None
    before = contents(tmp_path / "out")
    write(3, 33, 100)
    assert "holds other things" in call(prepare, *command)
    (tmp_path / "out").rename(tmp_path / "out.part")                            # as if it had been stopped
    (tmp_path / "out.part/prepared.json").write_text('{"window": [0.0, 255.0]}')
    assert call(prepare, *command) is None
    after = contents(tmp_path / "out")
    assert [name for name in after if after[name] != before[name]] == [
        name for name in after if Path(name).name.startswith("3.")]


def test_the_window_is_of_all_columns_and_large_values_keep_their_steps(tmp_path):
    band = np.full((200, 1000), 1000, np.float32)
    band[:, 50:90] = 30000
    tiff(tmp_path / "band.tif", band)
    file = tmp_path / "band.tif"
    plan = {"train/normal/a.png": (Item("a", 0, "", file), 0)}
    assert prepare.window_of(plan, {file: prepare.look(file)}) == [1000, 30000]
    large = (np.arange(256, dtype=np.uint32) + 2 ** 31).reshape(16, 16)
    page = prepare.Page(large, None, False)
    assert np.array_equal(prepare.to_8_bit(page, (2 ** 31, 2 ** 31 + 255)), np.arange(256).reshape(16, 16))


def test_white_may_be_zero_and_pages_may_hide_colours(tmp_path):
    grey = texture(np.random.default_rng(0), 24)
    Image.fromarray(grey).save(tmp_path / "8.tif", tiffinfo={262: 0})                   # Pillow turns these
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.tif", tiffinfo={262: 0})
    assert np.array_equal(decode(tmp_path / "8.tif", 24)[0][0], grey)
    assert np.array_equal(decode(tmp_path / "16.tif", 24)[0][0], 255 - grey)
    page = prepare.page_of(tmp_path / "16.tif", 0)
    assert np.array_equal(prepare.to_8_bit(page, (0, 65535)), 255 - grey)
    assert np.array_equal(prepare.page_of(tmp_path / "8.tif", 0).pixels, grey)
    hidden = Image.new("RGBA", (24, 24), (200, 200, 200, 0))
    hidden.save(tmp_path / "hidden.tif", save_all=True, append_images=[hidden])
    assert prepare.page_of(tmp_path / "hidden.tif", 1).pixels.max() == 0


@pytest.mark.parametrize("words, said", [
    (["--normal", "well", "--group-by", "("], "not a regular expression"),
    (["--normal", "well", "--group-by", ""], "needs a regular expression"),
    (["--normal", "mask"], "folders called ground_truth, groundtruth, gt, mask, masks are not read"),
    (["--normal", "well", "--anomaly", ".x"], "cannot be called .x")])
def test_more_wrong_flags(words, said, tmp_path):
    make(tmp_path / "set", *(f"{name}/{i}.png" for name in ("well", "mask", ".x") for i in range(4)))
    told = call(prepare, tmp_path / "set", tmp_path / "out", *words)
    assert said in told and "\n" not in told
    assert not (tmp_path / "out").exists()


def test_a_source_called_as_what_is_being_made_is_not_touched(tmp_path):
    make(tmp_path / "a.part", *(f"well/{i}.png" for i in range(4)))
    before = contents(tmp_path)
    assert "choose an OUT elsewhere" in call(prepare, tmp_path / "a.part", tmp_path / "a", "--normal", "well")
    assert contents(tmp_path) == before


def test_a_window_is_asked_for_where_training_says_nothing_of_it(tmp_path):
    """Normals of 8 bits and anomalies of more; a window that was asked for and now is not."""
    make(tmp_path / "set", *(f"well/{i}.png" for i in range(4)))
    for i in range(2):
        tiff(tmp_path / f"set/ill/{i}.tif", values(i).astype(np.float32))
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well", "--anomaly", "ill"]
    said = call(prepare, *command)
    assert "2 scans name no window" in said
    assert "no training image is like them: give one for all by --window" in said
    assert call(prepare, *command, "--window", -1000, 400) is None
    assert "holds other things" in call(prepare, *command, "--window", -1000, 300)
    for i in range(4):
        tiff(tmp_path / f"set/well/{i}.tif", values(i + 5).astype(np.float32))
        (tmp_path / f"set/well/{i}.png").unlink()
    command[1] = tmp_path / "other"
    assert call(prepare, *command, "--window", -1000, 400) is None
    assert "holds other things" in call(prepare, *command)
    assert "needs a number" in call(prepare, *command, "--window", "nan", 400)


def test_an_image_that_is_called_normal_and_not(tmp_path):
    """Of a training normal and a training anomaly with equal pixels the normal goes, whatever their names."""
    make(tmp_path / "set", *(f"train/good/{i}.png" for i in range(4)), "test/good/0.png", "test/good/1.png")
    for i, name in enumerate(("a", "z")):
        (tmp_path / f"set/train/{name}").mkdir()
        shutil.copy(tmp_path / f"set/train/good/{i}.png", tmp_path / f"set/train/{name}/{i}.png")
    assert call(prepare, tmp_path / "set", tmp_path / "out") is None
    assert set(json.loads((tmp_path / "out/prepared.json").read_text())["left_out"]) == {
        "train/good/0.png", "train/good/1.png"}
    (tmp_path / "set/train/z").rename(tmp_path / "set/train/normal")
    said = call(prepare, tmp_path / "set", tmp_path / "well", "--normal-class", "good")
    assert "cannot be called normal" in said


def test_few_patients_are_one_sentence(tmp_path, capsys):
    make(tmp_path / "set", *(f"well/p{i}-{j}.png" for i in range(3) for j in range(4)))
    command = [tmp_path / "set", tmp_path / "out", "--normal", "well"]
    said = call(prepare, *command, "--group-by", "p[0-9]", "--test-share", 0.75)
    assert said.startswith("3 groups or patients without anomalies are too few to split")
    assert call(prepare, *command) is None
    assert "no patients are known: images are split one by one; see --group-by" in capsys.readouterr().out
