"""Data: layouts, formats, splits, held-out normals, and the sentences for what is wrong."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import mutate
import numpy as np
import pytest
import torch
from conftest import texture
from PIL import Image

import dia_lib
from dia_lib import decode, load_data, to_float


def medmnist(path, n=30, size=28, **changes):
    """A file in MedMNIST's format, 0 is normal, 1 anomalous: train 20 + 10, val 3 + 1, test 7 + 3."""
    rng, arrays = np.random.default_rng(1), {}
    for split, count in (("train", n), ("val", 4), ("test", 10)):
        labels = (np.arange(count) % 3 == 2).astype(np.uint8)[:, None]
        arrays[f"{split}_images"] = np.stack([texture(rng, size, bool(y)) for y in labels[:, 0]])
        arrays[f"{split}_labels"] = labels
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def each(images):
    """Images as a list of bytes, to compare and to count."""
    return [image.numpy().tobytes() for image in images]


def same(one, other):
    """Are two Data the same in everything?"""
    return all(torch.equal(getattr(one, k), getattr(other, k)) for k in
               ("train", "held", "calibration", "test", "labels")) and all(
        torch.equal(one.digests[k], other.digests[k]) for k in ("train", "held", "test")) and (
        one.fingerprint, one.groups, one.defaults) == (other.fingerprint, other.groups, other.defaults)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 training normals in MVTec's layout, 16 px, the last 100 of which are copies by other names."""
    root, rng = tmp_path_factory.mktemp("many") / "set", np.random.default_rng(0)
    for i in range(200):
        save(root / f"train/good/{i:03d}.png", rng.integers(0, 256, (16, 16), np.uint8))
    for i in range(200, 300):                                               # 0-49 three times in all
        shutil.copy(root / f"train/good/{i % 50:03d}.png", root / f"train/good/{i:03d}.png")
    for i in range(4):
        save(root / f"test/{('good', 'bad')[i % 2]}/{i}.png", rng.integers(0, 256, (16, 16), np.uint8))
    return root


# ELPV -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elpv():
    return load_data("elpv", 32)


def test_elpv_has_the_counts_of_the_literature(elpv):
    """1,131 training and 377 + 715 test images, mono and poly as in DRA's split (134, 243); grey."""
    train = torch.cat([elpv.train, elpv.held])
    assert train.shape == (1131, 1, 32, 32) and elpv.test.shape == (1092, 1, 32, 32)
    assert train.dtype == elpv.test.dtype == torch.uint8 and elpv.labels.sum() == 715
    normal_groups = Counter(g for g, y in zip(elpv.groups, elpv.labels, strict=True) if y == 0)
    assert normal_groups == {"mono": 134, "poly": 243}
    assert elpv.defaults == {"shift": "perm", "t_range": [30, 130], "image_size": 224, "window": None}
    assert elpv.name == "elpv"
    assert elpv.paths == sorted(elpv.paths) and len(set(elpv.paths)) == 1092
    assert 80 < len(elpv.held) < 150 and 0.35 < elpv.calibration.float().mean() < 0.65


def test_elpv_at_two_sizes_has_the_same_order(elpv):
    """Stage 2 pairs its images with stage 1's small ones by their place."""
    large = load_data("elpv", 64, ("train",))
    assert torch.equal(elpv.calibration, large.calibration) and elpv.fingerprint == large.fingerprint
    for name in ("train", "held"):
        assert torch.equal(elpv.digests[name], large.digests[name])
        small = getattr(elpv, name).float()
        shrunk = torch.nn.functional.avg_pool2d(getattr(large, name).float(), 2)            # nearly the small
        near, far = ((x - small).abs().mean((1, 2, 3)) for x in (shrunk, shrunk.roll(1, 0)))
        assert near.max() < far.mean() and (near < far).float().mean() > 0.99


# Held-out normals -------------------------------------------------------------------------------------


def test_two_sizes_give_images_in_the_same_order(many):
    """At the images' own size and at half of it, every image is at the same place, however many are equal."""
    for holdout in (0, 0.3):
        large, small = (load_data(str(many), size, holdout=holdout) for size in (16, 8))
        for name in ("train", "held", "test"):
            at_8 = [decode(image[0].numpy(), 8)[0].tobytes() for image in getattr(large, name)]
            assert at_8 == each(getattr(small, name))
            assert torch.equal(large.digests[name], small.digests[name])


def test_npz_at_two_sizes_gives_images_in_the_same_order(tmp_path):
    path = str(medmnist(tmp_path / "pneumoniamnist.npz"))
    large, small = load_data(path, 28), load_data(path, 14)
    for name in ("train", "held", "test"):
        at_14 = [decode(image[0].numpy(), 14)[0].tobytes() for image in getattr(large, name)]
        assert at_14 == each(getattr(small, name)) and len(at_14)


def test_equal_images_are_on_the_same_side_and_in_the_same_half(many):
    """At many shares, as a cut by number rarely falls between equal images."""
    for share in np.arange(0.1, 0.9, 0.05):
        data = load_data(str(many), 16, ("train",), share)
        held, half = each(data.held), data.calibration.tolist()
        assert not set(held) & set(each(data.train)) and len(held) + len(data.train) == 300
        assert len(set(zip(held, half, strict=True))) == len(set(held)) and 0 < sum(half) < len(half)


def test_shares_are_about_right_and_nested(many):
    """A larger share holds the smaller one, image by image and half by half."""
    shares, before, named = (0, 0.1, 0.3, 0.6, 0.9), set(), {}
    for share in shares:
        data = load_data(str(many), 16, ("train",), share)
        held = Counter(each(data.held))
        distinct = len(held)
        assert abs(distinct - 200 * share) < 4 * (200 * share * (1 - share)) ** 0.5 + 1e-9
        assert before <= set(held)
        halves = dict(zip(each(data.held), data.calibration.tolist(), strict=True))
        assert all(halves[image] == half for image, half in named.items())
        before, named = set(held), halves
    assert 0.3 < sum(named.values()) / len(named) < 0.7


def test_nothing_depends_on_names_places_or_the_order_of_files(many, tmp_path):
    """The same training images by other names, in other folders, another format: the same sets, in order."""
    files = sorted((many / "train/good").iterdir())
    for i, file in enumerate(np.random.default_rng(1).permutation(files)):
        target = tmp_path / f"other/train/ok/{i % 7}/{i}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target)
    one, other = (load_data(str(root), 16, ("train",), 0.3) for root in (many, tmp_path / "other"))
    assert same(one, other) and one.name != other.name


def test_the_fingerprint_is_of_the_training_images(many, tmp_path):
    """It changes with a pixel of a training image and with the share, not with test images or the size."""
    shutil.copytree(many, tmp_path / "set")
    first = load_data(str(many), 16).fingerprint
    shutil.rmtree(tmp_path / "set/test/bad")
    assert load_data(str(tmp_path / "set"), 8).fingerprint == first
    assert load_data(str(many), 16, holdout=0.2).fingerprint != first
    pixels = np.array(Image.open(many / "train/good/150.png"))
    pixels[3, 4] ^= 1
    for name in ("150", "151"):                                             # at least one of them trains
        save(tmp_path / f"set/train/good/{name}.png", pixels)
    assert load_data(str(tmp_path / "set"), 16).fingerprint != first


def test_npz_with_a_val_split(tmp_path):
    """Val's normals are held out and all training normals train, whatever the share; with 0, none is."""
    path = str(medmnist(tmp_path / "pneumoniamnist_mini.npz"))
    with np.load(path) as file:
        normal = {s: [image.tobytes() for image in file[f"{s}_images"][file[f"{s}_labels"][:, 0] == 0]]
                  for s in ("train", "val")}
    for share in (0.1, 0.9):
        data = load_data(path, holdout=share)
        assert each(data.held) == normal["val"] and sorted(each(data.train)) == sorted(normal["train"])
        assert len(data.calibration) == 3 and len(data.digests["held"]) == 3
    data = load_data(path, holdout=0)
    assert len(data.held) == len(data.calibration) == 0
    assert sorted(each(data.train)) == sorted(normal["train"])


def test_npz_without_a_val_split(tmp_path):
    """Part of the training normals is held out; the same images as files are held out alike."""
    path = medmnist(tmp_path / "pneumoniamnist.npz", n=90, val_images=None, val_labels=None)
    data = load_data(str(path), holdout=0.5)
    assert 15 < len(data.held) < 45 and len(data.train) + len(data.held) == 60
    with np.load(path) as file:
        for i, (image, label) in enumerate(zip(file["train_images"], file["train_labels"], strict=True)):
            save(tmp_path / f"set/train/{'ill' if label else 'good'}/{i}.png", image)
    files = load_data(str(tmp_path / "set"), 28, ("train",), holdout=0.5)
    assert torch.equal(files.train, data.train) and torch.equal(files.held, data.held)
    assert torch.equal(files.calibration, data.calibration) and files.fingerprint == data.fingerprint


# Layouts and formats ----------------------------------------------------------------------------------


def test_mvtec_layout(folder):
    data = load_data(str(folder), 32, holdout=0.2)
    assert len(data.train) + len(data.held) == 40 and data.train.shape[1:] == (1, 32, 32)
    assert data.labels.tolist() == [int(p.split("/")[1] != "good") for p in data.paths]
    assert data.labels.sum() == 18 and data.name == "tiles"
    assert data.groups == [p.split("/")[1] for p in data.paths] and data.paths == sorted(data.paths)
    assert data.defaults == {"shift": "rotate", "t_range": [30, 130], "image_size": 224, "window": None}
    assert [len(data.digests[k]) for k in ("train", "held", "test")] == [len(data.train), len(data.held), 30]
    assert [decode(folder / path, 32)[0].tobytes() for path in data.paths] == each(data.test)
    assert load_data(str(folder), 32, ("train",)).test.shape[0] == 0


def test_defaults_of_prepared_json(folder, tmp_path):
    """Those of extras/prepare.py's prepared.json stand over the core's, and the size is used."""
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set/prepared.json").write_text(json.dumps(
        {"set": "kvasir", "defaults": {"shift": "perm", "t_range": [100, 200], "image_size": 48}}))
    data = load_data(str(tmp_path / "set"))
    assert data.defaults == {"shift": "perm", "t_range": [100, 200], "image_size": 48, "window": None}
    assert data.train.shape[-1] == 48 and load_data(str(tmp_path / "set"), 32).train.shape[-1] == 32
    (tmp_path / "set/prepared.json").write_text("{}")
    assert load_data(str(tmp_path / "set"), 32).defaults["shift"] == "rotate"
    for text in ("{", "[]", '{"defaults": 3}'):
        (tmp_path / "set/prepared.json").write_text(text)
        assert "prepared.json is not" in sentence(str(tmp_path / "set"), 32)


def test_imagefolder_layout_nested_linked_and_mixed(tmp_path):
    """0_normal and 1_abnormal, images in nested and linked folders, of any size; a link back ends a walk."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    deep = root / "train/0_normal/site a/day 1"
    images = [rng.integers(0, 256, (20 + i, 30 - i), np.uint8) for i in range(6)]
    save(deep / "a.png", images[0])
    save(deep / "B.JPEG", images[1])
    save(root / "train/0_normal/c.tif", images[2])
    save(tmp_path / "elsewhere/d.png", images[3])
    save(root / "train/1_abnormal/x.png", images[4])
    save(root / "train/0_normal/.hidden.png", images[5])
    (deep / "notes.txt").write_text("not an image")
    (deep / "back").symlink_to(root / "train", target_is_directory=True)
    (root / "train/0_normal/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    data = load_data(str(root), 24, ("train",), holdout=0)
    assert data.train.shape == (4, 1, 24, 24)
    files = deep / "a.png", deep / "B.JPEG", root / "train/0_normal/c.tif", tmp_path / "elsewhere/d.png"
    assert sorted(each(data.train)) == sorted(decode(file, 24)[0].tobytes() for file in files)


def test_modes_and_formats_decode_to_what_they_show(tmp_path):
    """Exactly where the format is lossless; 16 bits by their full range; on black where transparent; EXIF."""
    grey = texture(np.random.default_rng(0), 40)
    rgb = np.stack([grey, grey // 2, 255 - grey], 2)
    image, alpha = Image.fromarray(rgb), np.where(grey > 140, 90, 255).astype(np.uint8)
    exact, near = tmp_path / "exact", tmp_path / "near"
    for suffix in ("png", "bmp", "tif", "ppm"):
        save(exact / f"rgb.{suffix}", rgb)
    image.save(exact / "rgb.webp", lossless=True)
    for suffix in ("png", "bmp", "tif", "pgm"):
        save(exact / f"grey.{suffix}", grey)
    save(exact / "rgba.png", np.dstack([rgb, alpha]))
    save(exact / "greya.png", np.dstack([grey, alpha]))
    for suffix in ("png", "tif", "pgm"):
        save(exact / f"grey16.{suffix}", grey.astype(np.uint16) * 257)
    deep = np.array([[0, 256, 257], [513, 514, 65535]], np.uint16)
    save(tmp_path / "deep.png", deep)
    assert decode(np.array([[0, 0, 1], [1, 2, 255]], np.uint8), 3)[1] == decode(tmp_path / "deep.png", 3)[1]
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # to be shown turned by 90 degrees
    image.rotate(90, expand=True).save(exact / "rgb_turned.png", exif=exif)
    near.mkdir()
    image.quantize(64).save(near / "palette.png")
    image.save(near / "a.JPEG", quality=95)
    image.convert("CMYK").save(near / "cmyk.jpg", quality=95)
    image.save(near / "lossy.webp", quality=95)
    for file in sorted(exact.iterdir()):
        shown = np.broadcast_to(grey, (1, 40, 40)) if file.name.startswith("grey") else rgb.transpose(2, 0, 1)
        over = alpha if file.stem in ("rgba", "greya") else 255
        assert abs(decode(file, 40)[0] - shown * (over / 255)).max() <= (over is alpha), file.name
    for file in sorted(near.iterdir()):
        error = decode(file, 40)[0] - rgb.transpose(2, 0, 1).astype(int)
        assert error.shape == (3, 40, 40) and abs(error).mean() < 12, file.name
    bits = grey > 128
    Image.fromarray(bits).save(exact / "bits.png")
    assert np.array_equal(decode(exact / "bits.png", 40)[0][0], bits * 255)


def test_resizing_is_to_a_square_bilinear_and_antialiased(tmp_path):
    """The aspect is not kept; a fine pattern becomes its mean; at its own size nothing changes."""
    fine = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (40, 60))
    save(tmp_path / "fine.png", fine)
    pixels = decode(tmp_path / "fine.png", 10)[0]
    assert pixels.shape == (1, 10, 10) and abs(pixels.astype(int) - 127.5).max() < 3
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    assert np.array_equal(decode(ramp, 64)[0][0], ramp)
    half = np.asarray(Image.fromarray(ramp).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(ramp, 32)[0][0], half)


def test_digests_are_of_the_pixels_shown(tmp_path):
    """Equal for one image as grey, RGB, 16 bits, array, turned by EXIF, at any size; else different."""
    grey = texture(np.random.default_rng(0), 40)[:, :30].copy()
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "rgb.bmp", np.stack([grey] * 3, 2))
    save(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    sources = [*tmp_path.iterdir(), grey, np.stack([grey] * 3, 2)]
    assert len({decode(source, size)[1] for source in sources for size in (8, 33)}) == 1 and len(sources) == 6
    changed, speck = grey.copy(), np.stack([grey] * 3, 2)
    changed[39, 29] ^= 1
    speck[0, 0, 0] ^= 1
    others = [changed, speck, np.ascontiguousarray(grey.T), grey.reshape(30, 40), grey[:, ::-1].copy()]
    digests = [decode(source, 8)[1] for source in (grey, *others)]
    assert len(set(digests)) == 6 and all(isinstance(d, int) and 0 <= d < 2 ** 64 for d in digests)


def test_rgb_files_without_colour_are_grey(tmp_path):
    for i in range(3):
        save(tmp_path / f"train/good/{i}.png", np.stack([texture(np.random.default_rng(i), 20)] * 3, 2))
    assert load_data(str(tmp_path), 16, ("train",), holdout=0).train.shape == (3, 1, 16, 16)
    speck = np.full((200, 200, 3), 90, np.uint8)
    speck[0, 0, 0] = 93                                                 # colour that vanishes at 16 px
    save(tmp_path / "train/good/speck.png", speck)
    images = load_data(str(tmp_path), 16, ("train",), holdout=0).train
    assert images.shape == (4, 3, 16, 16)
    assert {decode(p, 16)[0][0].tobytes() for p in (tmp_path / "train/good").iterdir()} == {
        image[c].numpy().tobytes() for image in images for c in range(3)}      # the grey ones are as before


def test_npz_in_medmnist_format(tmp_path):
    path = str(medmnist(tmp_path / "pneumoniamnist_mini.npz"))
    data = load_data(path, holdout=0)
    assert data.train.shape == (20, 1, 28, 28) and data.test.shape == (10, 1, 28, 28)
    assert data.labels.tolist() == [int(i % 3 == 2) for i in range(10)] and data.paths[3] == "test/000003"
    assert data.groups == [str(y) for y in data.labels.tolist()] and data.defaults["image_size"] == 28
    assert load_data(path, 64).train.shape[-1] == 28                                # never enlarged
    assert load_data(path, 14).train.shape[-1] == 14
    with np.load(path) as file:
        assert torch.equal(data.test[:, 0], torch.from_numpy(file["test_images"]))
    flipped = load_data(path, normal_class="1", holdout=0)
    assert len(flipped.train) == 10 and flipped.labels.sum() == 7
    assert len(load_data(path, 14, ("train",)).test) == 0
    colours = np.random.default_rng(0).integers(0, 256, (30, 28, 28, 3), np.uint8)
    path = str(medmnist(tmp_path / "breastmnist.npz", train_images=colours))
    data = load_data(path, normal_class=0, holdout=0)
    expected = [image.transpose(2, 0, 1).tobytes() for i, image in enumerate(colours) if i % 3 != 2]
    assert sorted(each(data.train)) == sorted(expected) and data.test.shape[1] == 1


def test_to_float_matches_channels():
    x = torch.tensor([[[[0]], [[255]], [[0]]]], dtype=torch.uint8)
    assert to_float(x, 3, "cpu").flatten().tolist() == [0, 1, 0]
    assert to_float(x, 1, "cpu").item() == pytest.approx(0.587)
    assert to_float(x[:, 1:2], 3, "cpu").flatten().tolist() == [1, 1, 1]


# What is wrong, in one sentence -----------------------------------------------------------------------


def sentence(*args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        load_data(*args, **kwargs)
    assert "\n" not in stop.value.code
    return stop.value.code


def test_wrong_folders(tmp_path, folder):
    assert "no such folder" in sentence("nowhere/at/all")
    (tmp_path / "a").mkdir()
    assert "no folder train" in sentence(str(tmp_path))
    assert "found a. Other layouts: python -m extras.prepare" in sentence(str(tmp_path))
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert "no candidates for the normal class" in sentence(str(tmp_path))
    for name in ("cats", "dogs", "good", "normal"):
        save(tmp_path / "train" / name / "0.png", texture(np.random.default_rng(0), 20))
    assert "several candidates" in sentence(str(tmp_path)) and "--normal-class" in sentence(str(tmp_path))
    assert "horses: no such folder" in sentence(str(tmp_path), normal_class="horses")
    assert "found cats, dogs, good" in sentence(str(tmp_path), normal_class="Good")
    assert len(load_data(str(tmp_path), 16, ("train",), 0, "dogs").train) == 1
    assert len(load_data(str(tmp_path), 16, normal_class="dogs").test) == 0
    assert "leaves none of 40 images" in sentence(str(folder), 16, ("train",), holdout=0.9999999)


def test_unreadable_images_are_named(tmp_path):
    good = tmp_path / "train/good/0.png"
    save(good, texture(np.random.default_rng(0), 60))
    for content in (good.read_bytes()[:900], b"", b"hello"):
        (tmp_path / "train/good/torn.png").write_bytes(content)
        assert "torn.png cannot be read" in sentence(str(tmp_path), 16, ("train",))
    (tmp_path / "train/good/torn.png").unlink()
    (tmp_path / "train/good/gone.png").symlink_to(tmp_path / "nowhere")
    assert "gone.png cannot be read" in sentence(str(tmp_path), 16, ("train",))


def test_wrong_npz(tmp_path):
    good = medmnist(tmp_path / "scans.npz")
    assert "--normal-class 0" in sentence(str(good))
    assert "no train image has the normal label 7" in sentence(str(good), normal_class="7")
    assert "integers" in sentence(str(good), normal_class="benign")
    assert "no such file" in sentence(str(tmp_path / "absent.npz"))
    assert "leave it out" in sentence("elpv", normal_class="0")

    def refused(**changes):
        return sentence(str(medmnist(tmp_path / "wrong.npz", **changes)), normal_class="0")

    assert "no train_labels" in refused(train_labels=None) and "no val_labels" in refused(val_labels=None)
    assert "2-D images" in refused(train_images=np.zeros((3, 8, 8, 8), np.uint8))
    assert "2-D images" in refused(test_images=np.zeros((10, 8, 8), np.float32))
    for wrong in (np.zeros((30, 14), np.uint8), np.array(3), np.array(["a"] * 30), np.full(30, np.nan)):
        assert "one integer for each of 30 images" in refused(train_labels=wrong)
    none = np.zeros((0, 8, 8), np.uint8)
    assert "no train image" in refused(train_images=none, train_labels=none[:, :1, 0])
    assert "not a readable npz" in refused(train_images=np.array([{}], dtype=object))
    for content in (good.read_bytes()[:5000], b"hello", b""):
        (tmp_path / "torn.npz").write_bytes(content)
        assert "not a readable npz" in sentence(str(tmp_path / "torn.npz"), normal_class="0")


def test_a_small_file_that_unpacks_to_much_is_refused_unread(tmp_path):
    (tmp_path / "zeros.npz").write_bytes(next(data for name, data in mutate.bombs() if name == "zeros.npz"))
    with pytest.raises(SystemExit, match="would unpack from"):
        load_data(tmp_path / "zeros.npz", normal_class=0)


def test_mutated_files_and_bombs_are_read_or_refused_with_one_sentence(tmp_path):
    assert mutate.hunt(tmp_path, 200) == []


def test_the_mutator_finds_what_is_wrong(tmp_path, monkeypatch):
    def broken(source, size, window=None):
        if isinstance(source, Path) and b"IHDR" not in source.read_bytes():
            raise KeyError("a traceback")
        return np.zeros((3, size, size), np.uint8), 0

    monkeypatch.setattr(mutate, "decode", broken)
    monkeypatch.setattr(mutate, "bombs", lambda: [])
    found = mutate.hunt(tmp_path, 100)
    assert found and all("KeyError" in wrong for _, wrong in found if not wrong.startswith("\n"))
    assert (tmp_path / found[0][0]).exists()


# What is found ------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A function: makes a set of 30 training normals, 8 test normals and 4 anomalies, 16 px."""
    def make(train=lambda x: x, test=lambda x: x, root=tmp_path / "set"):
        for split, group, n in (("train", "good", 30), ("test", "good", 8), ("test", "bad", 4)):
            for i in range(n):
                pixels = texture(np.random.default_rng((len(split), len(group), i)), 16)
                save(root / split / group / f"{i:02d}.png", (train if split == "train" else test)(pixels))
        return root
    return make


def lines(root, **kwargs):
    return dia_lib.found(load_data(str(root), 16, **{"holdout": 0.2, **kwargs})).splitlines()


def test_what_is_found_is_said_line_by_line(tree, tmp_path):
    first, train, test = lines(tree())
    n = int(re.search(r"held out (\d+)", train)[1])
    assert first == "set: 16 px, grey, 8-bit; 0 copies between train and test" and 0 < n < 15
    assert train.startswith(f"  train: normal {30 - n}; held out {n}, ") and train.endswith("alone")
    assert test == "  test: normal good 8, anomalous bad 4"
    for split in ("train", "test"):
        (tmp_path / "set" / split / "good").rename(tmp_path / "set" / split / "normal")
    assert lines(tmp_path / "set")[2] == "  test: normal 8, anomalous bad 4"
    shutil.rmtree(tmp_path / "set/test")
    assert lines(tmp_path / "set")[2] == "  test: no images"
    first, *_ = lines(medmnist(tmp_path / "pneumoniamnist.npz"))                # its val anomalies apart
    assert first == "pneumoniamnist: 16 px, grey, 8-bit; 0 copies between train and test"


def test_images_that_are_in_train_and_test_are_counted_and_named(tree):
    root = tree()
    for i in range(5):
        shutil.copy(root / f"train/good/{i:02d}.png", root / f"test/bad/{i:02d}.png")
    first, *_, warning = lines(root)
    assert first.endswith("5 copies between train and test")
    pairs = ", ".join(f"test/bad/{i:02d}.png = train/good/{i:02d}.png" for i in range(3))
    assert warning == ("warning: 5 of 13 test images are training or held-out images, too; their scores mean "
                       f"nothing: {pairs}, ...")


@pytest.mark.parametrize("changes, warning", [
    ({"train": lambda x: x * 0 + 7}, "constant: train/good/"),
    ({"test": lambda x: x * 0 + 7}, "12 of 12 test images are constant: test/bad/00.png, test/bad/01.png"),
    ({"test": lambda x: np.dstack([x, x // 2, x // 3])},
     "in colour are 0 of {M} training images, 8 of 8 normal"),
    ({"train": lambda x: np.dstack([x, x // 2, x])},
     "in colour are {M} of {M} training images, 0 of 8 normal"),
    ({"test": lambda x: x // 4 + 190}, "mean brightness is "),
    ({"test": lambda x: x.astype(np.uint16) * 257}, "0% of the training images have 16 bits, 100% of"),
    ({"train": lambda x: x, "test": lambda x: x}, None)])
def test_what_looks_wrong_is_said(changes, warning, tree):
    root = tree(**changes)
    _, train, _, *said = lines(root)
    M = re.search(r"normal (\d+)", train)[1]
    assert all(line.startswith("warning: ") for line in said)
    if warning is None:
        assert said == []
    else:
        assert any(warning.format(M=M) in line for line in said), said


def test_what_is_not_read_is_counted(tree):
    """Masks, images outside the classes' folders, other formats: none of them is trained on or scored."""
    root = tree()
    before = load_data(str(root), 16)
    mask = np.full((16, 16), 255, np.uint8)
    for name in ("test/ground_truth/bad/00_mask.png", "test/bad/03_mask.png", "test/mask/00.png",
                 "train/good/masks/0.png", "train/loose.png", "train/bad/0.png"):
        save(root / name, mask)
    for name in ("train/good/scan.dcm", "test/bad/film.gif", "train/good/.hidden"):
        (root / name).write_bytes(b"?")
    assert same(load_data(str(root), 16), before)
    assert lines(root)[3] == ("  not read: 1 .dcm in train/good; 1 .gif in test/bad; 1 .png in test/bad; "
                              "1 .png in test/ground_truth; 1 .png in test/mask; 1 .png in train; 1 .png in "
                              "train/bad; 1 .png in train/good")


def test_mvtec_3d_reads_rgb_alone(tmp_path):
    for split, group in (("train", "good"), ("test", "good"), ("test", "crack")):
        for part in ("rgb", "gt", "xyz"):
            save(tmp_path / "set" / split / group / part / "000.png", texture(np.random.default_rng(0), 16))
    data = load_data(str(tmp_path / "set"), 16, holdout=0)
    assert data.paths == ["test/crack/rgb/000.png", "test/good/rgb/000.png"] and len(data.train) == 1


def test_names_that_are_not_utf_8_and_jfif_are_read(tree):
    root = tree()
    os.rename(root / "test/bad/00.png", os.fsencode(root / "test/bad") + b"/\xff00.png")
    Image.fromarray(texture(np.random.default_rng(0), 16)).save(root / "test/bad/a.jfif", "JPEG")
    paths = load_data(str(root), 16).paths
    assert {"test/bad/%ff00.png", "test/bad/a.jfif"} <= set(paths) and all(p.encode() for p in paths)


def test_classes_that_are_called_differently_are_found_before_training(tree):
    root = tree()
    (root / "test/good").rename(root / "test/Good")
    assert "no folder good, which is the normal class in" in sentence(str(root), 16, ("train",))
    assert "Is it Good?" in sentence(str(root), 16, ("train",))
    (root / "test/Good").rename(root / "test/normal")
    assert "Is it normal?" in sentence(str(root), 16, ("train",))
    (root / "test/normal").rename(root / "test/fine")                   # it may be a set of anomalies alone
    assert load_data(str(root), 16).labels.sum() == 12


@pytest.mark.parametrize("values, said", [
    (lambda x: x.astype(np.float32) / 255, "has float values, 0"),
    (lambda x: x.astype(np.int32) - 1000, "has signed values, -"),
    (lambda x: x.astype(np.uint16) * 16, "30 images of 16 bits have values of about "),
    (lambda x: x.astype(np.uint16) * 2 + 32000, "30 images of 16 bits have values of about ")])
def test_scans_that_8_bits_would_spoil_are_refused(values, said, tmp_path):
    for i in range(30):
        (tmp_path / "train/good").mkdir(parents=True, exist_ok=True)
        pixels = values(texture(np.random.default_rng(i), 16))
        Image.fromarray(pixels).save(tmp_path / f"train/good/{i}.tif")
    told = sentence(str(tmp_path), 16, ("train",))
    assert said in told and "python -m extras.prepare" in told and "\n" not in told


def test_two_levels_of_8_bits_and_the_full_range_of_16_are_read(tree, tmp_path):
    assert lines(tree(train=lambda x: (x > 128) * np.uint8(255)))[0].startswith("set: 16 px, grey, 8-bit")
    deep = tree(lambda x: x.astype(np.uint16) * 257, lambda x: x.astype(np.uint16) * 257, tmp_path / "deep")
    assert lines(deep)[0].startswith("deep: 16 px, grey, 16-bit") and len(lines(deep)) == 3


def test_several_pages_are_refused_and_hidden_colours_are_black(tmp_path):
    first = Image.fromarray(texture(np.random.default_rng(0), 16))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[first])
    with pytest.raises(SystemExit, match="has 2 pages"):
        decode(tmp_path / "pages.tif", 16)
    hidden = np.full((16, 16, 4), 200, np.uint8)
    hidden[..., 3] = np.arange(16)[:, None] // 8 * 255
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    pixels = decode(tmp_path / "hidden.png", 16)[0]
    assert (pixels[:, :8] == 0).all() and (pixels[:, 8:] == 200).all()


def test_doubts_of_levels_colours_and_names(tree, tmp_path):
    """A 16-bit set that is dark but for one image; colours of some; no normal class in test; few images."""
    def warnings(root):
        return [line for line in lines(root, holdout=0) if line.startswith("warning: ")]

    root = tree(lambda x: x.astype(np.uint16) * 16, lambda x: x.astype(np.uint16) * 16, tmp_path / "deep")
    for name in ("train/good/00.png", "test/good/00.png"):
        save(root / name, np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    assert warnings(root)[1:] == [
        "warning: 29 training images of 16 bits have fewer than 64 of 256 grey levels each; see python -m "
        "extras.prepare",
        "warning: 11 test images of 16 bits have fewer than 64 of 256 grey levels each; see python -m "
        "extras.prepare"]
    root = tree(root=tmp_path / "colours")
    for name in ("train/good/00.png", *(f"test/bad/0{i}.png" for i in range(4))):
        Image.new("RGB", (16, 16), (90, 200, 30 + int(name[-5]))).save(root / name)
    said = "in colour are 1 of 30 training images, 0 of 8 normal test images, 4 of 4 anomalous test images"
    assert f"warning: {said}" in warnings(root)
    root = tree(root=tmp_path / "names")
    (root / "train/good").rename(root / "train/healthy")
    (root / "test/good").rename(root / "test/control")
    said = "test has no folder called as the normal one in train: all 12 count as anomalies"
    assert warnings(root) == [f"warning: {said}"]
    root = tree(test=lambda x: x // 4 + 190, root=tmp_path / "few")
    for path in sorted((root / "test/good").iterdir())[4:]:
        path.unlink()
    assert warnings(root) == []
    bmp = tmp_path / "565.bmp"
    header = b"BM" + (66 + 512).to_bytes(4, "little") + bytes(4) + (66).to_bytes(4, "little")
    header += b"".join(n.to_bytes(size, "little") for n, size in (
        (40, 4), (16, 4), (16, 4), (1, 2), (16, 2), (3, 4), (512, 4), (0, 4), (0, 4), (0, 4), (0, 4),
        (0xF800, 4), (0x07E0, 4), (0x001F, 4)))
    bmp.write_bytes(header + bytes(range(256)) * 2)
    assert decode(bmp, 16)[2] is None                                           # 8 bits and less a colour
