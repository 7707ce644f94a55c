"""Runs of every method score new images by one command, and from Python."""

import csv
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

from extras import decisions, predict
from weakly_supervised import ckaad, dra, nearest, wscxr

METHODS = {
    "nearest": (nearest, ["--maps"]), "wscxr": (wscxr, ["--shots", 2, "--epochs", 2]),
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
    assert run.heat_map(file).shape == (40, 40)
    for several in (folder / "test/dent", str(folder / "test/dent/*.png")):
        assert run.score(several)[0].shape == (6,)
    for bad in (pixels.astype(float), pixels[None, None], np.zeros((9, 9, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            run.score(bad)


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


def test_files_folders_and_patterns(trained, folder, tmp_path):
    """Names are relative to what all have in common; a file counts once; each call has its own folder."""
    words = [folder / "test/dent/000.png", folder / "test/dent", str(folder / "test/good/00[0-3].png")]
    assert call(predict, trained, *words) is None
    assert call(predict, trained, folder / "test/dent") is None
    assert call(predict, trained, folder / "test/dent") is None
    found = {path.name: rows_of(path / "scores.csv") for path in (trained / "images").iterdir()}
    assert found.keys() == {"images", "dent", "dent-2"} and found["dent"] == found["dent-2"]
    names = [*(f"dent/{i:03d}.png" for i in range(6)), *(f"good/{i:03d}.png" for i in range(4))]
    assert sorted(found["images"]) == names
    shutil.rmtree(trained / "images")
    assert "holds scores.csv already" in call(predict, trained, *words, "--to", trained)
    assert "no such file or folder" in call(predict, trained, folder / "*.gif")
    assert "no image below it" in call(predict, trained, tmp_path)
    assert "metrics.json already" in call(predict, trained, "--test")


def test_weights_that_changed_are_refused(trained, tiny, folder):
    if trained.parent.name.startswith(("dra", "ckaad")):
        pytest.skip("the same code as for the others")
    weights = tiny[5]
    kept = weights.read_bytes()
    try:
        state = torch.load(weights, weights_only=True)
        state["conv1.weight"] *= 2
        torch.save(state, weights)
        assert "has other weights now than in training" in call(predict, trained, folder / "test/dent")
    finally:
        weights.write_bytes(kept)
