"""Data: layouts, formats, splits, held-out normals, cache, and the sentences for what is wrong."""

import os

import mutate
import numpy as np
import pytest
import torch
from conftest import texture
from PIL import Image

import dia_data
from dia_data import _folder_items, _hash, load_data
from dia_lib import to_float


def medmnist(path, n=30, size=28, **changes):
    """A file in MedMNIST's format: label 0 normal, 1 anomaly."""
    rng, arrays = np.random.default_rng(1), {}
    for split, count in (("train", n), ("val", 4), ("test", 10)):
        labels = (np.arange(count) % 3 == 2).astype(np.uint8)[:, None]
        arrays |= {f"{split}_images": np.stack([texture(rng, size, bool(y)) for y in labels[:, 0]]), f"{split}_labels": labels}
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_elpv_has_the_counts_of_the_literature():
    """1,131 training and 377 + 715 test images; mono and poly as in DRA's split (454, 677; 134, 243); grey."""
    data = load_data("elpv", 32, holdout=0)
    assert data.train.shape == (1131, 1, 32, 32) and data.test.shape == (1092, 1, 32, 32) and data.train.dtype == torch.uint8
    assert data.labels.sum() == 715 and len(data.held) == 0
    assert sorted((g, data.train_groups.count(g)) for g in set(data.train_groups)) == [("mono", 454), ("poly", 677)]
    normal_groups = [g for g, y in zip(data.groups, data.labels, strict=True) if y == 0]
    assert (normal_groups.count("mono"), normal_groups.count("poly")) == (134, 243)
    assert data.defaults["shift"] == "perm" and data.defaults["t_range"] == (30, 130)


def test_held_out_normals_are_apart_and_do_not_depend_on_size_or_file_order():
    small, large, more = (load_data("elpv", s, ("train",), h) for s, h in ((32, 0.1), (48, 0.1), (32, 0.3)))
    assert len(small.held) + len(small.train) == 1131 and 80 < len(small.held) < 150
    assert small.fingerprint == large.fingerprint != more.fingerprint
    assert torch.equal(small.held, more.held[:len(small.held)])                 # a larger share holds the smaller one
    held = {i.numpy().tobytes() for i in small.held}
    assert not any(i.numpy().tobytes() in held for i in small.train)
    assert 0.35 < small.calibration.float().mean() < 0.65 and len(small.calibration) == len(small.held)


def test_mvtec_layout(folder):
    data = load_data(str(folder), 32, holdout=0.2)
    assert len(data.train) + len(data.held) == 40 and data.train.shape[1:] == (1, 32, 32)
    assert data.labels.tolist() == [int(p.split("/")[1] != "good") for p in data.paths] and data.labels.sum() == 18
    assert data.groups == [p.split("/")[1] for p in data.paths] and data.paths == sorted(data.paths)
    assert data.name == "tiles" and data.defaults["image_size"] == 224
    assert load_data(str(folder), 32, ("train",)).test.shape[0] == 0


def test_imagefolder_layout_nested_mixed_sizes_and_formats(tmp_path):
    """0_normal and 1_abnormal, images in nested and linked folders, of every mode and format, decode to what they show."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    grey = texture(rng, 40)
    rgb = np.stack([grey, grey // 2, 255 - grey], 2)
    deep = root / "train/0_normal/site a/day 1"
    deep.mkdir(parents=True)
    Image.fromarray(grey).save(deep / "a_grey.png")
    Image.fromarray(rgb).save(deep / "b_rgb.png")
    Image.fromarray(np.dstack([rgb, np.full_like(grey, 90)])).save(deep / "c_rgba.png")
    Image.fromarray(rgb).quantize(64).save(deep / "d_palette.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep / "e_16bit.png")
    Image.fromarray(rgb).save(deep / "f.JPEG", quality=95)
    Image.fromarray(np.pad(rgb, ((0, 20), (0, 60), (0, 0)), mode="edge")).save(deep / "g_wide.jpg")
    (deep / "notes.txt").write_text("not an image")
    (deep / "back").symlink_to(root / "train", target_is_directory=True)        # a loop
    (root / "train/1_abnormal").mkdir()
    Image.fromarray(rgb).save(root / "train/1_abnormal/x.png")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Image.fromarray(rgb).save(outside / "linked.png")
    (root / "train/0_normal/link").symlink_to(outside, target_is_directory=True)
    data = load_data(str(root), 40, ("train",), holdout=0)
    assert data.train.shape == (8, 3, 40, 40)
    names = [i.name for i in sorted(_folder_items(root, ("train",), None)["train"], key=lambda i: _hash(i.name))]
    images = {name.rsplit("/", 1)[1]: image.permute(1, 2, 0).numpy().astype(int) for name, image in
              zip(names, data.train, strict=True)}
    assert (images["a_grey.png"] == grey[..., None]).all() and (images["e_16bit.png"] == grey[..., None]).all()
    assert (images["b_rgb.png"] == rgb).all() and (images["c_rgba.png"] == rgb).all() and (images["linked.png"] == rgb).all()
    assert abs(images["d_palette.png"] - rgb).mean() < 12 and abs(images["f.JPEG"] - rgb).mean() < 12


def test_rgb_files_without_colour_are_grey(tmp_path):
    (tmp_path / "train/good").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.stack([texture(np.random.default_rng(i), 20)] * 3, 2)).save(tmp_path / f"train/good/{i}.png")
    assert load_data(str(tmp_path), 16, ("train",), holdout=0).train.shape == (3, 1, 16, 16)
    speck = np.full((200, 200, 3), 90, np.uint8)
    speck[0, 0, 0] = 93                                                     # colour that vanishes at 16 px is colour still
    Image.fromarray(speck).save(tmp_path / "train/good/speck.png")
    assert load_data(str(tmp_path), 16, ("train",), holdout=0).train.shape == (4, 3, 16, 16)


def test_npz_in_medmnist_format(tmp_path):
    path = str(medmnist(tmp_path / "pneumoniamnist_mini.npz"))
    data = load_data(path, holdout=0)
    assert data.train.shape == (20, 1, 28, 28) and data.test.shape == (10, 1, 28, 28)
    assert data.labels.tolist() == [int(i % 3 == 2) for i in range(10)] and data.paths[3] == "test/000003"
    assert load_data(path, 64).train.shape[-1] == 28                            # never enlarged
    assert load_data(path, 14).train.shape[-1] == 14
    with np.load(path) as file:
        assert torch.equal(data.test[:, 0], torch.from_numpy(file["test_images"]))
    flipped = load_data(path, normal_class="1", holdout=0)
    assert len(flipped.train) == 10 and flipped.labels.sum() == 7


def test_cache_is_used_and_follows_the_files(tmp_path, monkeypatch):
    """The second call decodes nothing; a changed image is seen; the cached file cannot be changed through the tensor."""
    (tmp_path / "train/good").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(texture(np.random.default_rng(i), 20)).save(tmp_path / f"train/good/{i}.png")
    first = load_data(str(tmp_path), 16, ("train",), holdout=0).train.clone()
    load_data(str(tmp_path), 16, ("train",), holdout=0).train.zero_()
    with monkeypatch.context() as m:
        m.setattr(dia_data, "_decode", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(load_data(str(tmp_path), 16, ("train",), holdout=0).train, first)
    Image.fromarray(texture(np.random.default_rng(9), 20)).save(tmp_path / "train/good/0.png")
    os.utime(tmp_path / "train/good/0.png", ns=(1, 1))
    assert not torch.equal(load_data(str(tmp_path), 16, ("train",), holdout=0).train, first)


def test_to_float_matches_channels():
    x = torch.tensor([[[[0]], [[255]], [[0]]]], dtype=torch.uint8)
    assert to_float(x, 3, "cpu").flatten().tolist() == [0, 1, 0]
    assert to_float(x, 1, "cpu").item() == pytest.approx(0.587)
    assert to_float(x[:, 1:2], 3, "cpu").flatten().tolist() == [1, 1, 1]


# What is wrong, in one sentence --------------------------------------------------------------------------------------


def sentence(*args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        load_data(*args, **kwargs)
    assert "\n" not in stop.value.code
    return stop.value.code


def test_wrong_folders(tmp_path, folder):
    assert "no such folder" in sentence("nowhere/at/all")
    (tmp_path / "a").mkdir()
    assert "no folder train" in sentence(str(tmp_path)) and "found a" in sentence(str(tmp_path))
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert "no candidates for the normal class" in sentence(str(tmp_path))
    for name in ("cats", "dogs", "good", "normal"):
        (tmp_path / "train" / name).mkdir(exist_ok=True)
        Image.fromarray(texture(np.random.default_rng(0), 20)).save(tmp_path / "train" / name / "0.png")
    assert "several candidates" in sentence(str(tmp_path)) and "--normal-class" in sentence(str(tmp_path))
    assert "no candidates" in sentence(str(tmp_path), normal_class="horses")
    assert len(load_data(str(tmp_path), 16, ("train",), 0, "dogs").train) == 1
    assert "no test images" in sentence(str(tmp_path), normal_class="dogs")
    assert "leave none" in sentence(str(folder), 16, ("train",), holdout=0.9999999)


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "train/good").mkdir(parents=True)
    good = tmp_path / "train/good/0.png"
    Image.fromarray(texture(np.random.default_rng(0), 60)).save(good)
    (tmp_path / "train/good/torn.png").write_bytes(good.read_bytes()[:900])
    assert "torn.png cannot be read" in sentence(str(tmp_path), 16, ("train",))
    (tmp_path / "train/good/torn.png").write_bytes(b"")
    assert "torn.png cannot be read" in sentence(str(tmp_path), 16, ("train",))


def test_wrong_npz(tmp_path):
    good = medmnist(tmp_path / "scans.npz")
    assert "--normal-class 0" in sentence(str(good))
    assert "no train image has the normal label 7" in sentence(str(good), normal_class="7")
    assert "integers" in sentence(str(good), normal_class="benign")
    assert "no such file" in sentence(str(tmp_path / "absent.npz"), normal_class="0")
    assert "no train_labels" in sentence(str(medmnist(tmp_path / "a.npz", train_labels=None)), normal_class="0")
    volume = medmnist(tmp_path / "b.npz", train_images=np.zeros((3, 8, 8, 8), np.uint8))
    assert "2-D images" in sentence(str(volume), normal_class="0")
    labels = medmnist(tmp_path / "c.npz", train_labels=np.zeros((30, 14), np.uint8))
    assert "one integer for each of 30 images" in sentence(str(labels), normal_class="0")
    for wrong in (np.array(3), np.array(["a"] * 30), np.full(30, np.nan)):
        assert "one integer" in sentence(str(medmnist(tmp_path / "h.npz", train_labels=wrong)), normal_class="0")
    empty = medmnist(tmp_path / "i.npz", train_images=np.zeros((0, 8, 8), np.uint8), train_labels=np.zeros((0, 1), np.uint8))
    assert "no train image" in sentence(str(empty), normal_class="0")
    objects = tmp_path / "d.npz"
    np.savez(objects, train_images=np.array([{}], dtype=object))
    torn = good.read_bytes()[:5000]
    for name, content in (("e.npz", torn), ("f.npz", b"hello"), ("g.npz", b""), ("d.npz", objects.read_bytes())):
        (tmp_path / name).write_bytes(content)
        message = sentence(str(tmp_path / name), normal_class="0")
        assert "not a readable npz" in message or "no train_labels" in message


def test_a_small_file_that_unpacks_to_much_is_refused_unread(tmp_path):
    (tmp_path / "zeros.npz").write_bytes(dict(mutate.bombs())["zeros.npz"])
    with pytest.raises(SystemExit, match="would unpack from"):
        load_data(tmp_path / "zeros.npz", normal_class=0)


def test_mutated_files_and_bombs_are_read_or_refused_with_one_sentence(tmp_path):
    assert mutate.hunt(tmp_path, 200) == []


def test_the_mutator_finds_what_is_wrong(tmp_path, monkeypatch):
    def broken(source, size):
        if b"IHDR" not in source.read_bytes():
            raise KeyError("a traceback")

    monkeypatch.setattr(mutate, "_decode", broken)
    monkeypatch.setattr(mutate, "bombs", lambda: [])
    found = mutate.hunt(tmp_path, 100)
    assert found and all("KeyError" in wrong for _, wrong in found) and (tmp_path / found[0][0]).exists()
