"""The images of DIA: data sets by name, folders and npz files, decoded once into uint8 arrays.

`load_data` is what the scripts use; `dia_lib` offers it and `Data` again. Where the data are not as expected,
the program ends with a sentence that says what was found and what is needed (SystemExit).
"""

import csv
import difflib
import hashlib
import http.client
import json
import os
import re
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
MEDMNIST_NORMAL = {"pneumoniamnist": 0, "breastmnist": 1, "octmnist": 3}    # MedMNIST's label of the healthy class
MEDMNIST_URL = "https://zenodo.org/records/10519652/files/{}.npz?download=1"
MEDMNIST_MD5 = {                                                            # of NAME.npz, NAME_64, NAME_128, NAME_224
    "pathmnist": "a8b06965200029087d5bd730944a56c1 55aa9c1e0525abe5a6b9d8343a507616 ac42d08fb904d92c244187169d1fd1d9 "
                 "2c51a510bcdc9cf8ddb2af93af1eadec",
    "dermamnist": "0744692d530f8e62ec473284d019b0c7 b70a2f5635c6199aeaa28c31d7202e1f 2defd784463fa5243564e855ed717de1 "
                  "8974907d8e169bef5f5b96bc506ae45d",
    "octmnist": "c68d92d5b585d8d81f7112f81e2d0842 e229e9440236b774d9f0dfef9d07bdaf 0a97e76651ace45c5d943ee3f65b63ae "
                "abc493b6d529d5de7569faaef2773ba3",
    "pneumoniamnist": "28209eda62fecd6e6a2d98b1501bb15f 8f4eceb4ccffa70c672198ea285246c6 05b46931834c231683c68f40c47b2971 "
                      "d6a3c71de1b945ea11211b03746c1fe1",
    "retinamnist": "bd4c0672f1bba3e3a89f0e4e876791e4 afda852cc34dcda56f86ad2b2457dbcc e48e916a24454daf90583d4e6efb1a18 "
                   "eae7e3b6f3fcbda4ae613ebdcbe35348",
    "breastmnist": "750601b1f35ba3300ea97c75c52ff8f6 742edef2a1fd1524b2efff4bd7ba9364 363e4b3f8d712e9b5de15470a2aaadf1 "
                   "b56378a6eefa9fed602bb16d192d4c8b",
    "bloodmnist": "7053d0359d879ad8a5505303e11de1dc 2b94928a2ae4916078ca51e05b6b800b adace1e0ed228fccda1f39692059dd4c "
                  "b718ff6835fcbdb22ba9eacccd7b2601",
    "tissuemnist": "ebe78ee8b05294063de985d821c1c34b 123ece2eba09d0aa5d698fda57103344 61b955355d7425a89687b06cca3ce0c2 "
                   "b077128c4a949f0a4eb01517f9037b9c",
    "organamnist": "68e3f8846a6bd62f0c9bf841c0d9eacc 2dcccc29b88e6da5a01161ef20cda288 eeae80d0a227a8d099027e1b3cfd3b60 "
                   "50747347e05c87dd3aaf92c49f9f3170",
    "organcmnist": "b9ceb9546e10131b32923c5bbeaea2b1 3ce34a8724ea6f548e6db4744d03b6a9 773c1f009daa3fe5d9a2a201b2a7ed94 "
                   "050f5e875dc056f6768abf94ec9995d1",
    "organsmnist": "9ab87b696fb54e2a387ebe992d6ed5f1 53a6d115339d874c25e309a994ff46d3 ded0c5fa01a95dc4978b956f613e9b8e "
                   "b354719e553fbbb2513d5533f52a4cb1",
}
CHECKSUMS = {name + size: md5 for name, every in MEDMNIST_MD5.items()
             for size, md5 in zip(("", "_64", "_128", "_224"), every.split(), strict=True)}
LARGEST = 16e9              # bytes of a download; the largest of these files has 12.6e9

# Sets that have to be fetched by hand: where from; what their download holds; normal classes, anomalous classes.
BY_HAND = {
    "sarscov2": ("kaggle.com/datasets/plameneduardo/sarscov2-ctscan-dataset", ["COVID", "non-COVID"], ["non-COVID"], ["COVID"]),
    "kvasir": ("datasets.simula.no/kvasir (kvasir-dataset-v2.zip)", ["normal-cecum", "normal-pylorus", "normal-z-line", "polyps"],
               ["normal-cecum", "normal-pylorus", "normal-z-line"], ["polyps"]),
    "oct2017": ("kaggle.com/datasets/paultimothymooney/kermany2018", ["train/NORMAL", "test/NORMAL"], None, None),
    "aptos2019": ("kaggle.com/competitions/aptos2019-blindness-detection", ["train.csv", "train_images"], None, None),
}
LARGE = threading.Lock()    # held while a large image is decoded
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
    """Load a set by name, an npz file in MedMNIST's format, or a folder in MVTec or ImageFolder layout. See the README.

    image_size: pixels of the square that images are brought to; None for the set's own. Arrays of an npz file are
    never enlarged. splits: ("train",) reads no test images. holdout: share of the training normals set aside. skip_bad: go on
    without images that cannot be read, and say which. Exits with a sentence when the data are not as expected. Decoded images
    are cached, and memory-mapped.
    """
    defaults = {"shift": "rotate", "t_range": (30, 130), "image_size": 224}
    path = Path(data).expanduser()
    if data == "elpv":
        items, defaults["shift"] = _elpv_items(), "perm"
    elif data in BY_HAND and not (path / "train").is_dir():                 # a folder of that name, ready for use, comes first
        items = _items_by_hand(data, splits)
        if data == "kvasir":                                                # DIA Sec. 4.1, Tab. 4
            defaults |= {"shift": "perm", "t_range": (100, 200)}
    elif path.suffix == ".npz" or (data in CHECKSUMS and not path.is_dir()):
        if data in CHECKSUMS:
            _normal_label(path, normal_class)                               # asked before anything is downloaded
            path = medmnist(data)
        items = _npz_items(path, splits, normal_class)
        native = min(items[splits[0]][0].source.shape[:2])
        defaults["image_size"] = min(native, 224)
        image_size = min(image_size or 224, native)
    elif path.is_dir():
        items = _folder_items(path, splits, normal_class)
    else:
        names = ["elpv", *BY_HAND, *CHECKSUMS]
        near = difflib.get_close_matches(str(data).lower(), names, 3) or ["elpv", *BY_HAND, *MEDMNIST_NORMAL]
        raise SystemExit(f"--data {data}: no such folder, npz file or set; names that are known: {', '.join(near)}.")
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

    Keeps no copy on disk. Says how many other files there are. Exits if there is no image, or one cannot be read; with skip_bad
    goes on and says which.
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
    items = [Item(f.relative_to(root).as_posix(), 0, "", f) for f in files]
    with tempfile.TemporaryDirectory(prefix="dia-") as scratch:
        pixels, items = _pixels(items, size, skip_bad, scratch)
    return pixels, [i.name for i in items]


def data_name(data):
    """The name of a data set: elpv, the folder's, or the npz file's without its suffix."""
    return re.sub(r"\.npz$", "", Path(data).expanduser().resolve().name)


def _hash(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _elpv_items():
    """ELPV: normal = defect probability 0, anomaly = probability 1; see _split."""
    try:
        import elpv_dataset
    except ImportError:
        raise SystemExit("--data elpv needs the package elpv-dataset: pip install elpv-dataset") from None
    root = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    return _split([Item(name, int(float(p) == 1), group, root / name) for name, p, group in rows if float(p) in (0, 1)])


def _items_by_hand(name, splits):
    """A set of BY_HAND from its unzipped download, in data/<name> or $DIA_DATA/<name>, untouched.

    Where no split is published it is as for ELPV: a quarter of the normals, scikit-learn's split with seed 42, and all anomalies.
    """
    source, expected, normal, anomalous = BY_HAND[name]
    root = Path(os.environ.get("DIA_DATA", "data")).expanduser() / name
    folders = [root, *(sorted(root.glob("*/")) + sorted(root.glob("*/*/")) if root.is_dir() else [])]     # zips hold a folder
    found = next((f for f in folders if all((f / e).exists() for e in expected)), None)
    if found is None:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing" if root.is_dir() else "no such folder"
        raise SystemExit(f"--data {name}: fetch it from {source}, and unzip it into {root} (DIA_DATA names another place than "
                         f"data); expected there: {', '.join(expected)}; found: {there}.")
    if name == "oct2017":
        return _folder_items(found, splits, "NORMAL")
    if name == "aptos2019":
        with open(found / "train.csv", newline="") as file:
            try:
                grades = [(row["id_code"], int(row["diagnosis"])) for row in csv.DictReader(file)]
            except (KeyError, ValueError):
                raise SystemExit(f"{file.name}: needed are columns id_code and diagnosis, grades from 0 to 4.") from None
        items = [Item(f"train_images/{code}.png", int(grade > 0), f"grade {grade}", found / f"train_images/{code}.png")
                 for code, grade in sorted(grades)]
        missing = [i.name for i in items if not i.source.is_file()]
        if missing:
            raise SystemExit(f"{found}: {len(missing)} images of train.csv are missing, the first is {missing[0]}: unzip again.")
    else:
        items = [Item(f.relative_to(found).as_posix(), int(folder in anomalous), folder, f)
                 for folder in normal + anomalous for f in _walk(found / folder)]
    return _split(items)


def _split(items):
    """A quarter of the sorted normals and all anomalies to test on, the other normals to train on; seed 42."""
    items = sorted(items, key=lambda i: i.name)
    normals = [i for i in items if i.label == 0]
    if len(normals) < 4:
        raise SystemExit(f"{len(normals)} normal images are too few to split.")
    train, test = train_test_split(normals, test_size=0.25, random_state=42)
    return {"train": train, "test": sorted(test + [i for i in items if i.label == 1], key=lambda i: i.name)}


def medmnist(name):
    """Path of a MedMNIST file: as MedMNIST's own package keeps it, or from the cache, downloaded there once and checked."""
    folder = cache_folder()
    for path in (Path(f"~/.medmnist/{name}.npz").expanduser(), folder / f"{name}.npz"):
        if path.is_file() and _md5(path) == CHECKSUMS[name]:
            return path
    download(MEDMNIST_URL.format(name), folder / f"{name}.npz", CHECKSUMS[name])
    return folder / f"{name}.npz"


def _md5(path):
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(2 ** 20):
            digest.update(chunk)
    return digest.hexdigest()


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        _check_url(url)
        return super().redirect_request(request, file, code, message, headers, url)


def _check_url(url):
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) != ("http", "127.0.0.1"):
        raise SystemExit(f"{url} is not https: nothing is fetched from there.")


def download(url, path, md5, attempts=3):
    """Fetch a file, over https only (127.0.0.1 aside), of at most LARGEST bytes; at `path` only if whole and its MD5 is right.

    A connection that is cut is tried again from the start. Exits with a sentence where it can't be had.
    """
    _check_url(url)
    opener, temporary = urllib.request.build_opener(_HttpsOnly), path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        for attempt in range(1, attempts + 1):
            done, length, digest = 0, None, hashlib.md5()
            try:
                with opener.open(url, timeout=60) as answer, open(temporary, "wb") as file:
                    length = int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
                    bar = tqdm(total=length, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
                    while done <= LARGEST >= (length or 0) and (chunk := answer.read(2 ** 20)):
                        file.write(chunk)
                        digest.update(chunk)
                        done += len(chunk)
                        bar.update(len(chunk))
                    bar.close()
            except urllib.error.HTTPError as error:
                raise SystemExit(f"{url}: the server answers {error.code} {error.reason}. Try later, or fetch it by hand to "
                                 f"{path}.") from None
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                problem = f"{getattr(error, 'reason', error)}"
            else:
                if max(done, length or 0) > LARGEST:
                    raise SystemExit(f"{url} is larger than {LARGEST / 1e9:.0f} GB: not fetched.")
                problem = None if length in (None, done) else f"the connection was cut after {done} of {length} bytes"
            if not problem:
                break
            if attempt == attempts:
                raise SystemExit(f"{url}: {problem}, {attempts} times. Try later, or fetch it by hand to {path}.")
        if digest.hexdigest() != md5:
            raise SystemExit(f"{url}: the file has another checksum (MD5 {digest.hexdigest()}) than {md5}: not used.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _normal_label(path, normal_class):
    """The normal label of an npz file: --normal-class, or what is known of a file of that name."""
    known = [c for name, c in MEDMNIST_NORMAL.items() if path.stem.startswith(name)]
    if normal_class is None and not known:
        raise SystemExit(f"{path}: say which label is normal, for example --normal-class 0.")
    try:
        return int(known[0] if normal_class is None else normal_class)
    except ValueError:
        raise SystemExit(f"--normal-class {normal_class}: the labels of an npz file are integers.") from None


def _npz_items(path, splits, normal_class):
    """MedMNIST's format: train_images, train_labels, test_images, test_labels; (n, H, W) or (n, H, W, 3) uint8."""
    normal = _normal_label(path, normal_class)
    if not path.is_file():
        raise SystemExit(f"--data {path}: no such file.")
    try:
        with zipfile.ZipFile(path) as file:
            for member in file.infolist():
                if member.file_size > max(2 ** 30, 100 * member.compress_size):
                    raise SystemExit(f"{path}: {member.filename} would unpack from {member.compress_size} to {member.file_size} "
                                     "bytes: not read.")
        with np.load(path) as file:
            missing = [f"{s}_{what}" for s in splits for what in ("images", "labels") if f"{s}_{what}" not in file]
            if missing:
                raise SystemExit(f"{path}: no {', '.join(missing)}; found {', '.join(file) or 'nothing'}. "
                                 "MedMNIST's format has train_images, train_labels, test_images, test_labels.")
            arrays = {s: (file[f"{s}_images"], file[f"{s}_labels"]) for s in splits}
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
        raise SystemExit(f"{path} is not a readable npz file; it may be truncated: fetch it again.") from None
    except MemoryError as error:
        raise SystemExit(f"{path} does not fit into memory, or claims so ({error}).") from None
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
            image = Image.open(source)
            pixels = image.width * image.height
            if pixels > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million at most")
            with LARGE if pixels > 2e7 else nullcontext():                  # one at a time: it may need half a GB
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):                              # 16-bit grey
                    deep = np.array(image)
                    deep //= 257
                    image = Image.fromarray(deep.clip(0, 255).astype(np.uint8))
                image.load()
                return _square(image, size)
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
            raise SystemExit(f"{source} cannot be read as an image ({error}): repair or remove it.") from None
    return _square(image, size)


def _square(image, size):
    """A PIL image -> (3, size, size) uint8, and whether it is grey."""
    image = image.convert("RGB")
    red, green, blue = image.split()
    grey = all(ImageChops.difference(red, other).getbbox() is None for other in (green, blue))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1), grey


def _pixels(items, size, skip_bad=False, folder=None):
    """The images of a split as one uint8 tensor (n, C, size, size), decoded once, then memory-mapped from the cache; its items.

    With skip_bad, images that cannot be read are left out, else they end the program. folder: instead of the cache's; it may
    be removed afterwards.
    """
    def stamp(source):
        if isinstance(source, np.ndarray):
            return zlib.crc32(source.tobytes())
        try:
            stat = os.stat(source)
        except OSError:
            return str(source)                                              # decode will say what is wrong
        return str(source.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def decode(item):
        try:
            return _decode(item.source, size)
        except SystemExit:
            if not skip_bad:
                raise
            return None

    path = cache_path([size, [(i.name, stamp(i.source)) for i in items]])
    path = Path(folder or path.parent) / path.name
    note = path.with_suffix(".json")                                        # which images could not be read, if there were any
    if not path.exists():
        note.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor() as pool:
            rgb = new_array(f"{scratch}/rgb.npy", (len(items), 3, size, size))
            all_grey, good = True, []
            decoded = pool.map(decode, items)
            for i, found in enumerate(tqdm(decoded, "decoding", len(items), unit="image", disable=None, leave=False)):
                if found is not None:
                    rgb[len(good)], grey = found
                    all_grey = all_grey and grey
                    good.append(i)
            shape = (len(good), 1 if all_grey else 3, size, size)
            if good and shape != rgb.shape:                                 # a smaller file will do
                every, rgb = rgb, new_array(f"{scratch}/less.npy", shape)
                for i in range(len(good)):
                    rgb[i] = every[i, :shape[1]]
            rgb.flush()
            if len(good) < len(items):
                note.write_text(json.dumps(sorted(set(range(len(items))) - set(good))))
            if good:
                os.replace(rgb.filename, path)
    bad = [items[i] for i in json.loads(note.read_text())] if note.exists() else []
    if any(decode(item) for item in bad):                                   # it can be read by now: all once more
        path.unlink(missing_ok=True)
        return _pixels(items, size, skip_bad, folder)
    if bad:
        names = ", ".join(item.name for item in bad[:3]) + (", ..." if len(bad) > 3 else "")
        if len(bad) == len(items):
            raise SystemExit(f"none of the {len(items)} images can be read: {names}.")
        print(f"note: left out {len(bad)} of {len(items)} images, which cannot be read: {names}")
        left_out = {id(item) for item in bad}
        items = [item for item in items if id(item) not in left_out]
    mapped = folder is None or os.name == "posix"                           # elsewhere a mapped file can't be removed
    return torch.from_numpy(np.load(path, mmap_mode="c" if mapped else None)), items    # "c": the file stays as it is


def new_array(path, shape, dtype=np.uint8):
    """A memory-mapped array in a new npy file. OSError where there is no room for it (later it would be a crash)."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array


def cache_path(key):
    """Where an array that follows from `key` (anything json can write) is kept: ~/.cache/dia, or below $XDG_CACHE_HOME."""
    return cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"


def cache_folder():
    """~/.cache/dia, or below $XDG_CACHE_HOME; made if it is not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dia"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
