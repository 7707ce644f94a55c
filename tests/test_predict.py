"""Runs of every method score new images by one command, and from Python."""

import csv
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from test_data import medmnist

from extras import decisions, heat_maps, predict
from weakly_supervised import ckaad, dra, nearest, wscxr

METHODS = {
    "nearest": (nearest, ["--layers", 1, 2, "--maps"]),
    "wscxr": (wscxr, ["--layers", 1, 2, "--shots", 2, "--epochs", 2]),
    "dra": (dra, ["--shots", 2, "--epochs", 1, "--batch-size", 6, "--layers", 2]),
    "ckaad": (ckaad, ["--shots", 2, "--layers", 1, 2, "--image-size", 64, "--epochs", 1, "--batch-size", 8])}


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tiny, tmp_path_factory):
    """A run's folder, of each method with labels, and what was written there."""
    module, words = METHODS[request.param]
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert call(module, *tiny, *words, "--out", out) is None
    return out


def rows_of(path):
    return {row["path"]: row for row in csv.DictReader(path.open())}


def test_every_method_scores_new_images_as_its_test_set(trained, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert call(predict, trained, folder / "test", "--fpr", 0.3, "--maps", "--to", tmp_path / "new") is None
    assert not (tmp_path / "cache").exists()                    # feature maps of new images are not kept
    own, new = rows_of(trained / "scores.csv"), rows_of(tmp_path / "new/scores.csv")
    assert len(new) == 30 and len(own) >= 28
    scores = np.array([[float(row["score"]), float(new[path[5:]]["score"])] for path, row in own.items()])
    assert np.abs(scores[:, 0] - scores[:, 1]).max() < 1e-3 * scores[:, 0].std() > 0
    assert all(row["p_value"] == new[path[5:]]["p_value"] for path, row in own.items())
    values = [float(row["score"]) for row in new.values()]
    assert values == sorted(values, reverse=True)
    run = predict.load_run(trained)
    limit = decisions.threshold(run.known["calibration"][run.scores[0]].numpy(), 0.3)
    assert all((row["anomaly"] == "1") == (float(row["score"]) > limit) for row in new.values())
    for path in new:
        with Image.open(tmp_path / f"new/maps/{path}.png") as picture:
            assert picture.size == (40, 40) and picture.mode == "RGB"
        grid = np.load(tmp_path / f"new/maps/{path}.npy")
        assert grid.shape[0] == grid.shape[1] and np.isfinite(grid).all() and grid.std() > 0


def test_one_image_alone_is_the_same_image_in_a_batch(trained, folder):
    run, files = predict.load_run(trained), sorted((folder / "test/dent").iterdir())
    together = run.score(files)[0]
    alone = np.array([run.score(file)[0][0] for file in files])
    assert np.abs(together - alone).max() < 1e-3 * together.std()


def test_python_takes_paths_pictures_and_arrays_of_any_size(trained, folder):
    run, file = predict.load_run(trained), folder / "test/scratch/000.png"
    with Image.open(file) as picture:
        pixels = np.array(picture)
        sources = [file, str(file), [file], picture.copy(), pixels, [pixels], np.stack([pixels] * 3, 2)]
    scores = [run.score(source) for source in sources]
    assert all(s.shape == p.shape == (1,) for s, p in scores)
    assert np.ptp([s[0] for s, _ in scores]) == 0
    larger = Image.fromarray(pixels).resize((120, 80))
    heat = run.heat_map(larger)
    assert heat.shape == (80, 120) and heat.dtype == np.float32 and heat.std() > 0
    assert run.heat_map(file).shape == run.heat_map([pixels]).shape == (40, 40)
    for several in (folder / "test/dent", str(folder / "test/dent/*.png")):
        assert run.score(several)[0].shape == (6,)
    for bad, word in ((pixels.astype(float), "uint8"), (pixels[None, None], "uint8"),
                      (np.zeros((9, 9, 4), np.uint8), "uint8"), ([file, pixels], "both"),
                      (np.zeros((0, 0), np.uint8), "uint8"), ([[1, 2]], "a list is no path"),
                      (larger.convert("I"), "mode I")):
        with pytest.raises(ValueError, match=word):
            run.score(bad)
    with pytest.raises(ValueError, match="of one image, not of 6"):
        run.heat_map(folder / "test/dent")
    assert run.score([])[0].shape == run.score([])[1].shape == (0,)
    twice = run.score([file, folder / "test/dent/000.png", file])[0]                # each that was given
    assert twice.shape == (3,) and twice[0] == twice[2] != twice[1]


def test_threads_give_the_same(trained, folder):
    run, files = predict.load_run(trained), sorted((folder / "test").rglob("*.png"))
    expected, found = run.score(files)[0], {}

    def work(i):
        found[i] = run.score(files[i::3])[0]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert np.allclose(found[i], expected[i::3], atol=1e-3 * expected.std())


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A run of nearest, for what does not depend on the method."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert call(nearest, *tiny, "--out", out) is None
    return out


def test_files_folders_and_patterns(one, folder, tmp_path, monkeypatch):
    """Names are relative to what all have in common; a file counts once; each call has its own folder."""
    monkeypatch.chdir(folder / "test/good")
    words = [folder / "test/dent/000.png", "../dent", str(folder / "test/good/00[0-3].png")]
    assert call(predict, one, *words) is None
    assert call(predict, one, folder / "test/dent") is None
    assert call(predict, one, folder / "test/dent") is None
    assert call(predict, one, folder / "test/dent/*.png") is None
    found = {path.name: rows_of(path / "scores.csv") for path in (one / "images").iterdir()}
    assert found.keys() == {"images", "dent", "dent-2", "images-2"}
    assert found["dent"] == found["dent-2"] == found["images-2"]
    names = [*(f"dent/{i:03d}.png" for i in range(6)), *(f"good/{i:03d}.png" for i in range(4))]
    assert sorted(found["images"]) == names
    assert len((one / "images/images/scores.csv").read_text().splitlines()) == 1 + len(names)
    assert "is not empty" in call(predict, one, *words, "--to", one)
    assert "whose images are scored" in call(predict, one, "../dent", "--to", "../dent/new")
    assert "no such file or folder" in call(predict, one, folder / "*.gif")
    assert "no image below it" in call(predict, one, tmp_path)


def test_a_pattern_leaves_out_what_is_no_image(one, folder, tmp_path, capsys):
    shutil.copy(folder / "test/dent/000.png", tmp_path / "a b.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert call(predict, one, tmp_path / "*", "--to", tmp_path / "to") is None
    assert "left out, since they are no images: 1 files" in capsys.readouterr().out
    assert set(rows_of(tmp_path / "to/scores.csv")) == {"a b.png"}
    assert "notes.txt" in call(predict, one, tmp_path / "notes.txt", "--to", tmp_path / "2")


def test_images_are_read_in_batches_and_judged_as_one_set(one, tmp_path, capsys):
    """Grey and colour in any batch; a 16-bit image of few grey levels, which alone would be refused."""
    rng, scans = np.random.default_rng(0), tmp_path / "scans"
    scans.mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 65536, (40, 40), dtype=np.uint16)).save(scans / f"{i}.png")
    Image.fromarray(rng.integers(0, 12, (40, 40), dtype=np.uint16) * 257).save(scans / "narrow.png")
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(scans / "colour.png")
    found = []
    for size in (1, 4, 96):
        assert call(predict, one, scans, "--batch-size", size, "--to", tmp_path / str(size)) is None
        rows = rows_of(tmp_path / str(size) / "scores.csv")
        found.append([float(rows[name]["score"]) for name in sorted(rows)])
        assert np.asarray(Image.open(tmp_path / str(size) / "examples.png")).std() > 10
        said = "1 of 6 images have 16 bits and fewer than 64 of 256 grey levels"
        assert said in capsys.readouterr().out
    assert len(found[0]) == 6 and np.ptp(found, axis=0).max() < 1e-3 * np.std(found[0])
    for path in scans.glob("[0-9c]*"):
        path.unlink()
    assert "12 grey levels of 256" in call(predict, one, scans)


def test_which_run_is_meant_is_said(one, tiny, folder, chain, tmp_path, monkeypatch):
    images = folder / "test/dent"
    assert "for runs of train_dia.py" in call(predict, one, "--test")
    assert "for runs of train_dia.py" in call(predict, one, images, "--score", "local")
    assert call(wscxr, *tiny, "--shots", 2, 3, "--epochs", 1, "--out", tmp_path / "several") is None
    assert "give one of its folders shots-2, shots-3" in call(predict, tmp_path / "several", images)
    assert call(predict, tmp_path / "several/shots-3", folder / "test", "--to", tmp_path / "to") is None
    seen = {path: row["seen"] for path, row in rows_of(tmp_path / "to/scores.csv").items() if row["seen"]}
    assert len(seen) == 3 and set(seen.values()) == {"labelled"} and not any("good" in path for path in seen)
    shutil.copytree(one, tmp_path / "old").joinpath("predict.pt").unlink()
    assert "of an earlier version" in call(predict, tmp_path / "old", images)
    assert "holds results already" in call(nearest, *tiny, "--out", chain)          # a run of train_dia.py


def test_red_is_where_the_patch_is(one, tmp_path):
    """One high patch off the diagonal, over images small and large."""
    grid = torch.zeros(8, 8)
    grid[1, 5] = 1.0
    for size in ((64, 64), (40, 120), (900, 600)):
        heat = heat_maps.heat_map(grid.flatten(), size)
        assert heat.shape == size
        y, x = np.unravel_index(int(heat.argmax()), size)
        assert abs(y / size[0] - 1.5 / 8) < 0.03 and abs(x / size[1] - 5.5 / 8) < 0.03
        grey = torch.full((1, *size), 100, dtype=torch.uint8)
        predict.write_map(tmp_path, "a.png", grid.flatten(), grey, 0, 0.5)
        picture = np.asarray(Image.open(tmp_path / "maps/a.png.png")).astype(int)
        assert np.array_equal(np.load(tmp_path / "maps/a.png.npy"), grid.numpy())
        assert picture.shape == (*size, 3) and (picture[-1, 0] == 100).all()
        red = np.unravel_index((picture[..., 0] - picture[..., 1]).argmax(), size)
        assert abs(red[0] - y) <= size[0] / 8 and abs(red[1] - x) <= size[1] / 8


def test_arrays_of_an_npz_file_are_scored_at_their_size(tiny, tmp_path):
    """They are 28 px, the backbone sees 64: new images are brought to 28 first, as the training ones were."""
    file = medmnist(tmp_path / "set.npz")
    out = tmp_path / "run"
    words = [*tiny[2:6], "--image-size", 64, "--normal-class", 0]
    assert call(nearest, "--data", file, *words, "--out", out) is None
    with np.load(file) as arrays:
        images = arrays["test_images"]
    own = [float(row["score"]) for row in csv.DictReader((out / "scores.csv").open())]
    run = predict.load_run(out)
    assert run.size == 28 and np.allclose(run.score(list(images))[0], own, rtol=1e-3)


def test_weights_that_changed_are_refused(one, tiny, folder):
    weights = tiny[5]
    kept = weights.read_bytes()
    try:
        state = torch.load(weights, weights_only=True)
        state["conv1.weight"] *= 2
        torch.save(state, weights)
        assert "has other weights now than in training" in call(predict, one, folder / "test/dent")
    finally:
        weights.write_bytes(kept)
