"""Shared by the tests: a cache of their own, and a small folder of real-looking images with a known structure."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))


def texture(rng, size, defect=False):
    """A smooth grey image; with `defect`, a dark line across it. uint8 (size, size)."""
    y, x = np.mgrid[:size, :size] / size
    image = 140 + 40 * np.sin(6 * x + rng.uniform(0, 6)) * np.cos(5 * y + rng.uniform(0, 6)) + rng.normal(0, 4, (size, size))
    if defect:
        image[np.abs(y - x + rng.uniform(-0.2, 0.2)) < 0.06] = 20
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Decoded images go to a folder of this test session, not to the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A set in MVTec's layout: 40 training normals, 12 test normals, 12 scratched and 6 dented anomalies, 40 px, grey."""
    root, rng = tmp_path_factory.mktemp("data") / "tiles", np.random.default_rng(0)
    for name, count, defect in (("train/good", 40, False), ("test/good", 12, False), ("test/scratch", 12, True),
                                ("test/dent", 6, True)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(texture(rng, 40, defect)).save(root / name / f"{i:03d}.png")
    return root
