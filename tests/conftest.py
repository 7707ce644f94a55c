"""Shared by the tests: a cache of their own, a small folder of images with a known structure, a run on it."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import dia_lib
import evaluate
import train_dia
import train_diffusion

ROOT = Path(__file__).parent.parent
AFFORDS = dia_lib.Log.affords
STAGE1 = ["--steps", "4", "--batch-size", "8", "--dim", "8", "--lr", "1e-3", "--holdout", "0.3"]
STAGE2 = ["--quick", "--steps", "4", "--batch-size", "4", "--image-size", "40", "--holdout", "0.3"]


def call(module, *args):
    """Run a script's main() as `python script args` would; returns None, or the sentence it ended with.

    Where argparse ends it (exit code 2), that is the last line it wrote to stderr.
    """
    argv, sys.argv = sys.argv, [module.__name__, *map(str, args)]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as written:
            dia_lib.run(module.main)
    except SystemExit as stop:
        assert stop.code not in (0, None)
        return written.getvalue().strip().splitlines()[-1] if stop.code == 2 else stop.code
    finally:
        sys.argv = argv
        sys.stderr.write(written.getvalue())


def flat(value, prefix=""):
    """Nested dicts and lists as one dict, {"/encoder/conv1.weight": value, ...}."""
    if isinstance(value, dict):
        return {k2: v2 for k, v in value.items() for k2, v2 in flat(v, f"{prefix}/{k}").items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), prefix)
    return {prefix: value}


def log_of(out):
    """The rows of a run's log without seconds."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def texture(rng, size, defect=False):
    """A smooth grey image; with `defect`, a dark line across it. uint8 (size, size)."""
    y, x = np.mgrid[:size, :size] / size
    image = 140 + 40 * np.sin(6 * x + rng.uniform(0, 6)) * np.cos(5 * y + rng.uniform(0, 6))
    image += rng.normal(0, 4, (size, size))
    if defect:
        image[np.abs(y - x + rng.uniform(-0.2, 0.2)) < 0.06] = 20
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Downloads and feature maps go to a folder of this test session, not to the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def any_disk():
    """A checkpoint is written whenever one is due, however slow the disk is."""
    patch = pytest.MonkeyPatch()
    patch.setattr(dia_lib.Log, "affords", lambda self: True)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """MVTec's layout, 40 px, grey: 40 training and 12 test normals, 12 scratched and 6 dented anomalies."""
    root, rng = tmp_path_factory.mktemp("data") / "tiles", np.random.default_rng(0)
    for name, count in (("train/good", 40), ("test/good", 12), ("test/scratch", 12), ("test/dent", 6)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(texture(rng, 40, "good" not in name)).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file with random weights for torchvision's ResNet-18."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny(folder, weights):
    """Flags of a small run of a method with labelled anomalies."""
    own = ["--backbone", "resnet18", "--weights", weights, "--image-size", 32, "--holdout", 0.3]
    return ["--data", folder, *own]


@pytest.fixture(scope="session")
def chain(folder, tmp_path_factory):
    """A tiny run of all stages on the folder of tiles, for all tests to read; `own_chain` is a copy."""
    out = tmp_path_factory.mktemp("chain") / "run"
    assert call(train_diffusion, "--data", folder, "--out", out, *STAGE1) is None
    assert call(train_dia, "--data", folder, "--out", out, *STAGE2) is None
    assert call(evaluate, "--out", out, "--passes", 2) is None
    return out


@pytest.fixture
def own_chain(chain, tmp_path):
    return shutil.copytree(chain, tmp_path / "chain")
