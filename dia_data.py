"""The images of DIA: data sets by name, folders and npz files, decoded once into uint8 arrays.

`load_data` is what the scripts use; `dia_lib` offers it and the names beside it again. Where the data are not as expected,
the program ends with a sentence that says what was found and what is needed (SystemExit).
"""

import hashlib
import json
import os
import re
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
MEDMNIST_NORMAL = {"pneumoniamnist": 0, "breastmnist": 1, "octmnist": 3}    # MedMNIST's label of the healthy class
TREE = "expected <data>/train/<normal>/*, <data>/test/<normal>/* and <data>/test/<anything else>/*"


@dataclass
class Data:
    """A data set of normals to train on and a labelled test set. Images are uint8 (n, C, H, W), H = W.

    C is 1 if every image of the split is grey, else 3; n counts images. `held` are normals set aside, chosen by a hash
    of their names; those with `calibration` True are never used for choosing anything. `fingerprint` stands for the
    names and sizes of the training images.
    """
    name: str
    train: Tensor           # (M, C, H, W)
    train_groups: list      # M names, "" where the set has none
    held: Tensor            # (n, C, H, W)
    calibration: Tensor     # (n,) bool
    test: Tensor            # (Q, C', H, W)
    labels: Tensor          # (Q,) int64, 1 = anomaly
    groups: list            # Q names
    paths: list             # Q names, relative to the data
    fingerprint: str
    defaults: dict          # shift, t_range, image_size


@dataclass
class Item:
    """One image of a set: its relative name, label (1 = anomaly), group, and where its pixels are (path or array)."""
    name: str
    label: int
    group: str
    source: object


def load_data(data="elpv", image_size=None, splits=("train", "test"), holdout=0.1, normal_class=None, skip_bad=False):
    """Load `elpv`, an npz file in MedMNIST's format, or a folder in MVTec or ImageFolder layout. See the README.

    image_size: pixels of the square that images are brought to; None for the set's own. Arrays of an npz file are
    never enlarged. splits: ("train",) reads no test images. holdout: share of the training normals set aside. skip_bad: go on
    without images that cannot be read, and say which. Exits with a sentence when the data are not as expected. Decoded images
    are cached, and memory-mapped.
    """
    defaults = {"shift": "rotate", "t_range": (30, 130), "image_size": 224}
    path = Path(data).expanduser()
    if data == "elpv":
        items, defaults["shift"] = _elpv_items(), "perm"
    elif path.suffix == ".npz":
        items = _npz_items(path, splits, normal_class)
        native = min(items[splits[0]][0].source.shape[:2])
        defaults["image_size"] = min(native, 224)
        image_size = min(image_size or 224, native)
    elif path.is_dir():
        items = _folder_items(path, splits, normal_class)
    else:
        raise SystemExit(f"--data {data}: no such folder or npz file, and the only set known by name is elpv.")
    size = image_size or defaults["image_size"]

    items["train"].sort(key=lambda item: _hash(item.name))                  # the held-out ones come first:
    every, items["train"] = _pixels(items["train"], size, skip_bad)         # both parts stay slices of one file
    n_held = sum(_hash(item.name) >> 1 < holdout * 2 ** 63 for item in items["train"])
    calibration = torch.tensor([_hash(item.name) & 1 for item in items["train"][:n_held]], dtype=torch.bool)
    if n_held == len(items["train"]):
        raise SystemExit(f"--data {data}: {n_held} training images with --holdout {holdout} leave none to train on.")
    train, pixels, test = items["train"][n_held:], every[:0], []
    if "test" in splits:
        pixels, test = _pixels(items["test"], size, skip_bad)
    sizes = [(i.name, zlib.crc32(i.source.tobytes()) if isinstance(i.source, np.ndarray) else os.stat(i.source).st_size)
             for i in train]
    return Data(name=data_name(data), train=every[n_held:],
                train_groups=[i.group for i in train], held=every[:n_held], calibration=calibration,
                test=pixels, labels=torch.tensor([i.label for i in test], dtype=torch.int64),
                groups=[i.group for i in test], paths=[i.name for i in test],
                fingerprint=hashlib.sha256(json.dumps(sizes).encode()).hexdigest(), defaults=defaults)


def load_images(folder, size, skip_bad=False):
    """All images below a folder, whatever their format and size: (n, C, size, size) uint8, and their n relative paths.

    Says how many other files there are. Exits if there is no image, or one cannot be read; with skip_bad says which.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SystemExit(f"--images {folder}: no such folder.")
    files = _walk(root)
    if not files:
        raise SystemExit(f"--images {folder}: no image below it; looked for {', '.join(sorted(SUFFIXES))}.")
    other = sum(f.is_file() and f.suffix.lower() not in SUFFIXES for f in root.rglob("*"))
    if other:
        print(f"note: {other} other files below {folder} are left out; images are {', '.join(sorted(SUFFIXES))}")
    pixels, items = _pixels([Item(f.relative_to(root).as_posix(), 0, "", f) for f in files], size, skip_bad)
    return pixels, [i.name for i in items]


def data_name(data):
    """The name of a data set: elpv, the folder's, or the npz file's without its suffix."""
    return re.sub(r"\.npz$", "", Path(data).expanduser().resolve().name)


def _hash(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _elpv_items():
    """ELPV: normal = defect probability 0, anomaly = probability 1; 75/25 split of the sorted normals, seed 42."""
    try:
        import elpv_dataset
    except ImportError:
        raise SystemExit("--data elpv needs the package elpv-dataset: pip install elpv-dataset") from None
    from sklearn.model_selection import train_test_split
    root = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    items = [Item(name, int(float(p) == 1), group, root / name)
             for name, p, group in sorted(rows) if float(p) in (0, 1)]
    train, test = train_test_split([i for i in items if i.label == 0], test_size=0.25, random_state=42)
    return {"train": train, "test": sorted(test + [i for i in items if i.label == 1], key=lambda i: i.name)}


def _npz_items(path, splits, normal_class):
    """MedMNIST's format: train_images, train_labels, test_images, test_labels; (n, H, W) or (n, H, W, 3) uint8."""
    known = [c for name, c in MEDMNIST_NORMAL.items() if path.stem.startswith(name)]
    if normal_class is None and not known:
        raise SystemExit(f"{path}: say which label is normal, for example --normal-class 0.")
    try:
        normal = int(known[0] if normal_class is None else normal_class)
    except ValueError:
        raise SystemExit(f"--normal-class {normal_class}: the labels of an npz file are integers.") from None
    if not path.is_file():
        raise SystemExit(f"--data {path}: no such file.")
    try:
        zipfile.ZipFile(path).close()
        with np.load(path) as file:
            missing = [f"{s}_{what}" for s in splits for what in ("images", "labels") if f"{s}_{what}" not in file]
            if missing:
                raise SystemExit(f"{path}: no {', '.join(missing)}; found {', '.join(file) or 'nothing'}. "
                                 "MedMNIST's format has train_images, train_labels, test_images, test_labels.")
            arrays = {s: (file[f"{s}_images"], file[f"{s}_labels"]) for s in splits}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile):
        raise SystemExit(f"{path} is not a readable npz file; it may be truncated: fetch it again.") from None
    items = {}
    for split, (images, labels) in arrays.items():
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise SystemExit(f"{path}: {split}_images is {images.dtype} {images.shape}; "
                             "needed are 2-D images, uint8, (n, H, W) or (n, H, W, 3).")
        if labels.dtype.kind not in "iub" or labels.size != len(images) or labels.shape[:1] != images.shape[:1]:
            raise SystemExit(f"{path}: {split}_labels is {labels.dtype} {labels.shape}; needed is one integer for each of "
                             f"{len(images)} images.")
        labels = labels.reshape(-1)
        items[split] = [Item(f"{split}/{i:06d}", int(label != normal), f"{int(label)}", image)
                        for i, (image, label) in enumerate(zip(images, labels, strict=True))
                        if split == "test" or label == normal]
        if not items[split]:
            raise SystemExit(f"{path}: no {split} image has the normal label {normal}; "
                             f"labels found: {', '.join(map(str, np.unique(labels))) or 'none'}.")
    return items


def _folder_items(root, splits, normal_class):
    """MVTec or ImageFolder layout: train/<normal>, test/<normal>, test/<anything else>; nested folders are walked."""
    def below(folder):
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) \
            if folder.is_dir() else []

    train = root / "train"
    if not train.is_dir():
        raise SystemExit(f"{root}: no folder train; {TREE}; found {', '.join(below(root)) or 'no folder'}.")
    classes = [c for c in below(train) if _walk(train / c)]
    usual = [c for c in classes if re.sub(r"^\d+[_-]?", "", c).lower() in ("good", "normal")]
    candidates = [c for c in classes if c == normal_class] if normal_class else \
        (classes if len(classes) == 1 else usual)
    if len(candidates) != 1:
        raise SystemExit(f"{train}: {'no' if not candidates else 'several'} candidates for the normal class; "
                         f"{TREE}; found {', '.join(classes) or 'no folder with images'}. "
                         "Name it with --normal-class.")
    normal = candidates[0]
    items = {}
    if "train" in splits:
        items["train"] = [Item(f.relative_to(root).as_posix(), 0, "", f) for f in _walk(train / normal)]
    if "test" in splits:
        test = root / "test"
        items["test"] = [Item(f.relative_to(root).as_posix(), int(c != normal), c, f)
                         for c in below(test) for f in _walk(test / c)]
        if not items["test"]:
            raise SystemExit(f"{test}: no test images; {TREE}; found {', '.join(below(root))}.")
    return items


def _walk(folder, above=None):
    """All images below a folder, sorted by name; links are followed, a link back to a folder above is not."""
    real = folder.resolve()
    above = set(real.parents) if above is None else above
    if real in above:
        return []
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            files += _walk(path, above | {real})
        elif path.suffix.lower() in SUFFIXES:
            files.append(path)
    return files


def _decode(source, size):
    """One image -> (3, size, size) uint8, and whether it is grey. Brought to a square by antialiased bilinear resizing."""
    # choice: the aspect is not kept (as in the released code), transparency is dropped, 16 bits are scaled by their full range
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        try:
            image = ImageOps.exif_transpose(Image.open(source))
            if image.mode.startswith("I"):                                  # 16-bit grey
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise SystemExit(f"{source} cannot be read as an image ({error}): repair or remove it.") from None
    image = image.convert("RGB")
    red, green, blue = image.split()
    grey = red.tobytes() == green.tobytes() == blue.tobytes()
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1), grey


def _pixels(items, size, skip_bad=False):
    """The images of a split as one uint8 tensor (n, C, size, size), decoded once, then memory-mapped from the cache; its items.

    With skip_bad, images that cannot be read are left out, else they end the program.
    """
    def stamp(source):
        if isinstance(source, np.ndarray):
            return zlib.crc32(source.tobytes())
        stat = os.stat(source)
        return str(source), stat.st_size, stat.st_mtime_ns

    def decode(item):
        try:
            return _decode(item.source, size)
        except SystemExit:
            if not skip_bad:
                raise
            return None

    path = cache_path([size, [(i.name, stamp(i.source)) for i in items]])
    note = path.with_suffix(".json")                                        # which images cannot be read, if there are any
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor() as pool:
            rgb = np.lib.format.open_memmap(f"{scratch}/rgb.npy", "w+", np.uint8, (len(items), 3, size, size))
            all_grey, good = True, []
            decoded = pool.map(decode, items)
            for i, found in enumerate(tqdm(decoded, "decoding", len(items), unit="image", disable=None, leave=False)):
                if found is not None:
                    rgb[len(good)], grey = found
                    all_grey = all_grey and grey
                    good.append(i)
            shape = (len(good), 1 if all_grey else 3, size, size)
            if good and shape != rgb.shape:                                 # a smaller file will do
                every, rgb = rgb, np.lib.format.open_memmap(f"{scratch}/less.npy", "w+", np.uint8, shape)
                for i in range(len(good)):
                    rgb[i] = every[i, :shape[1]]
            rgb.flush()
            if len(good) < len(items):
                note.write_text(json.dumps(sorted(set(range(len(items))) - set(good))))
            if good:
                os.replace(rgb.filename, path)
    bad = [items[i] for i in json.loads(note.read_text())] if note.exists() else []
    if bad and not skip_bad:
        _decode(bad[0].source, size)                                        # ends the program
    if bad:
        names = ", ".join(item.name for item in bad[:3]) + (", ..." if len(bad) > 3 else "")
        if len(bad) == len(items):
            raise SystemExit(f"none of the {len(items)} images can be read: {names}.")
        print(f"note: left out {len(bad)} of {len(items)} images, which cannot be read: {names}")
        left_out = {id(item) for item in bad}
        items = [item for item in items if id(item) not in left_out]
    return torch.from_numpy(np.load(path, mmap_mode="c")), items            # copy on write: the file stays as it is


def cache_path(key):
    """Where an array that follows from `key` (anything json can write) is kept: ~/.cache/dia, or below $XDG_CACHE_HOME."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dia"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"
