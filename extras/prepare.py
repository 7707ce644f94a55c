"""Folders of images or scans, or a download of the paper's sets -> the folder layout that the core reads.

    python -m extras.prepare ~/Downloads/kvasir data/kvasir --set kvasir
    python -m extras.prepare scans data/scans --normal healthy --anomaly tumour bleeding
    python -m extras.prepare ct data/ct --normal healthy --anomaly nodule --window -1000 400
    python -m extras.prepare split data/split           # has train/ and test/ already: they stay as they are

Writes OUT/train/normal, OUT/test/normal, OUT/test/<group> for each group of anomalies (OUT/train/<group>
where SOURCE/train has some), and OUT/prepared.json: what it was made of, counts, what was left out and why,
window, defaults of the scripts.
8-bit images are copied as they are. Scans of more bits and DICOM files (pip install pydicom) become PNG of 8
bits: LOW..HIGH of --window turns into 0..255; without it the window in each DICOM file's header, or, where no
file has one, the 0.1 to 99.9 percentile of the training normals. Copies of an image within training, or in
training and test, are left out of training. Where no split is published, a share of the normals and all
anomalies are to test on: scikit-learn's split of the sorted names with seed 42, as for ELPV; --group-by, or
DICOM's PatientID, keeps images of one patient on one side. All is made in OUT.part, which becomes OUT at the
end.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.prepare, in the project's folder.")

import argparse
import csv
import itertools
import json
import os
import re
import shutil
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import GroupShuffleSplit
from tqdm import tqdm

from dia_lib import (
    MASKS, SUFFIXES, Item, decode, flattened, folder_items, name_in, not_read, number, run, split_items,
    stored, to_grey_levels, values_of, walk, white_is_zero, whole,
)

# Where a set comes from; what its download holds; folders of normals, of anomalies, where these say it all
SETS = {
    "sarscov2": ("kaggle.com/datasets/plameneduardo/sarscov2-ctscan-dataset", ["COVID", "non-COVID"],
                 ["non-COVID"], ["COVID"]),
    "kvasir": ("datasets.simula.no/kvasir (kvasir-dataset-v2.zip)",
               ["normal-cecum", "normal-pylorus", "normal-z-line", "polyps"],
               ["normal-cecum", "normal-pylorus", "normal-z-line"], ["polyps"]),
    "oct2017": ("kaggle.com/datasets/paultimothymooney/kermany2018", ["train/NORMAL", "test/NORMAL"], [], []),
    "aptos2019": ("kaggle.com/competitions/aptos2019-blindness-detection", ["train.csv", "train_images"],
                  [], []),
}
READ = " ".join(sorted(SUFFIXES)) + " and DICOM"
LEFT = f"folders called {', '.join(sorted(MASKS))} are not read"
Look = namedtuple("Look", "pages convert patient window")   # of `look`
Page = namedtuple("Page", "pixels window invert")           # of page_of
DEFAULTS = {"kvasir": {"shift": "perm", "t_range": [100, 200]}}             # DIA Sec. 4.1, Tab. 4


# ---- Scans ---------------------------------------------------------------------------------------------


def is_dicom(path):
    """True for a DICOM file: by its suffix, or its magic number where that says nothing; not a DICOMDIR."""
    if path.suffix.lower() in SUFFIXES or path.name.upper() == "DICOMDIR":
        return False
    with open(path, "rb") as file:
        return path.suffix.lower() in (".dcm", ".dicom") or file.read(132)[128:] == b"DICM"


def unreadable(path, error, kind="as an image"):
    """What to raise for a file that cannot be read: one sentence, of one line."""
    return SystemExit(f"{path} cannot be read {kind} ({' '.join(str(error).split())})")


def dicom(path, **how):
    """A DICOM file, read by pydicom; exits with a sentence where it is not installed or cannot read it."""
    try:
        import pydicom
    except ImportError:
        raise SystemExit(f"{path} is a DICOM file: pip install pydicom") from None
    try:
        return pydicom.dcmread(path, **how)
    except Exception as error:                          # it raises many types for files that are torn
        raise unreadable(path, error, "as DICOM") from None


def look(path):
    """A file's Look: how many pages, must they be converted, which patient, is there a window in its header
    (None where it needs none); or why it cannot be read.
    """
    try:
        if is_dicom(path):
            header = dicom(path, stop_before_pixels=True)
            pages = int(header.get("NumberOfFrames") or 1)
            if not 1 <= pages <= 100_000:
                raise ValueError(f"it claims {pages} frames")
            grey = header.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
            window = window_in(with_groups(header, 0)) is not None if grey else None
            return Look(pages, True, str(header.get("PatientID") or ""), window)
        with Image.open(path) as image:
            pages, kind = stored(image)
            return Look(pages, kind != "8-bit" or pages > 1, "", None if kind == "8-bit" else False)
    except SystemExit as stop:
        return str(stop)
    except Exception as error:                          # Pillow raises many types for files that are torn
        return unreadable(path, error).code


def page_of(path, index):
    """One page of a scan. pixels: (H, W) of any type, or uint8 (H, W, 3); window: (low, high) that a DICOM
    header asks for, or None; invert: are low values white? Exits where it cannot be read.
    """
    if is_dicom(path):
        return dicom_page(path, index)
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.seek(index)
            kind = stored(image)[1]
            if image.mode in ("F", "L") or image.mode.startswith("I"):
                return Page(np.array(values_of(image, kind)), None, kind != "8-bit" and white_is_zero(image))
            if kind != "8-bit":
                raise ValueError("colours of 16 bits: make it grey, or 8-bit")
            return Page(np.array(flattened(image)), None, False)
    except Exception as error:
        raise unreadable(path, error) from None


def with_groups(header, index):
    """A DICOM header with what enhanced files keep in functional groups, of all frames and of this one."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*(header.get("SharedFunctionalGroupsSequence") or []), *frames[index:index + 1]):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            header.update(groups[name][0] if name in groups else {})
    return header


def window_in(header):
    """The window (low, high) that a DICOM header names, or None. DICOM PS3.3, C.11.2.1.2."""
    if not header.get("WindowWidth") or header.get("WindowCenter") is None:
        return None
    centre, width = (float(np.ravel(header.get(k))[0]) for k in ("WindowCenter", "WindowWidth"))
    if header.get("VOILUTFunction", "LINEAR") == "LINEAR":
        centre, width = centre - 0.5, width - 1
    width = max(width, 1e-6)
    return centre - width / 2, centre + width / 2


def dicom_page(path, index):
    """`page_of` a DICOM file, after its Modality LUT."""
    header = dicom(path)
    try:
        header = with_groups(header, index)
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
        pixels = pixel_array(header, index=index)
        if header.get("PhotometricInterpretation") == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, header)[..., :3]
            pixels = (pixels >> 8 * (pixels.dtype.itemsize - 1)).astype(np.uint8)
        if pixels.ndim == 3 and pixels.dtype != np.uint8:
            raise ValueError("colours of 16 bits: make it grey, or 8-bit")
        if pixels.ndim == 3:
            return Page(pixels, None, False)
        values = apply_modality_lut(pixels, header).astype(np.float64)
        return Page(values, window_in(header), header.get("PhotometricInterpretation") == "MONOCHROME1")
    except Exception as error:                          # among them that a decoder is not installed
        raise unreadable(path, error, "as DICOM") from None


def to_8_bit(page, window):
    """A Page -> uint8 pixels: the window's low to 0, high to 255, then inverted where that is said.

    window: (low, high), or None for the page's own. What is uint8 already stays.
    """
    pixels = page.pixels
    if pixels.dtype != np.uint8 and not (window or page.window):
        raise SystemExit("its header names no window: see --window")
    if pixels.dtype != np.uint8:
        pixels = to_grey_levels(pixels, *window or page.window)
    return 255 - pixels if page.invert else pixels


def window_of(plan, looks):
    """The window (low, high) for all pages that have to be converted, where none is asked for; None where all
    name their own. It is the 0.1 and 99.9 percentile of the normals to train on, of 10,000 values of a page
    at random. Exits where some name one and others don't, or where no training normal is to be converted.
    """
    asked = {True: [], False: []}
    for target, (item, page) in plan.items():
        if page is not None and looks[item.source].window is not None:
            asked[looks[item.source].window].append((target, item, page))
    own, without = asked[True], asked[False]
    if not without:
        return None
    train = [(item.source, page) for target, item, page in without if target.startswith("train/normal/")]
    if own or not train:
        why = f"{len(own)} others do" if own else "no training image is like them"
        raise SystemExit(f"{len(without)} scans name no window in their header, the first is "
                         f"{without[0][1].name}, and {why}: give one for all by --window LOW HIGH.")
    values, draw = [], np.random.RandomState(0)
    for path, page in tqdm(train, "finding the window", unit="page", disable=None, leave=False):
        try:
            pixels = page_of(path, page).pixels
        except SystemExit:
            continue                                                        # it will be left out, and told
        some = pixels.ravel()[draw.randint(pixels.size, size=10_000)].astype(np.float64)
        values.append(some[np.isfinite(some)])
    if not sum(map(len, values)):
        return None
    low, high = np.percentile(np.concatenate(values), [0.1, 99.9]).tolist()
    return [low, high if high > low else low + 1]


# ---- What goes where -----------------------------------------------------------------------------------


def listing(folder):
    """The first names in a folder, in words."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8) or "nothing"


def set_items(root, name):
    """Items of a set's download, by split. It is at root, or one or two levels below: zips hold a folder."""
    where, expected, normal, anomalous = SETS[name]
    folders = [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))] if root.is_dir() else []
    at = next((f for f in folders if all((f / e).exists() for e in expected)), None)
    if at is None:
        raise SystemExit(f"--set {name}: fetch it from {where}, and unzip it into {root}; expected there: "
                         f"{', '.join(expected)}; found: {listing(root)}.")
    if name == "oct2017":
        return folder_items(at, ("train", "test"), "NORMAL")                # its split is published
    return split_items(graded_items(at) if name == "aptos2019" else plain_items(at, normal, anomalous))


def graded_items(root):
    """APTOS 2019: train.csv has a grade for each image of train_images; grade 0 is normal."""
    with open(root / "train.csv", newline="", encoding="utf-8-sig") as file:
        try:
            grades = {row["id_code"]: int(row["diagnosis"]) for row in csv.DictReader(file)}
        except (KeyError, ValueError, TypeError, csv.Error):
            raise SystemExit(f"{file.name}: needed are columns id_code and diagnosis, a grade.") from None
    images = {path.stem: path for path in walk(root / "train_images")}
    missing = sorted(grades.keys() - images.keys())
    if missing:
        raise SystemExit(f"{root}: {len(missing)} images of train.csv are missing, the first is "
                         f"train_images/{missing[0]}.png: unzip it again.")
    return [Item(f"train_images/{images[code].name}", int(grade > 0), f"grade {grade}", images[code])
            for code, grade in grades.items()]


def scans(folder):
    """All images and DICOM files below a folder."""
    return [f for f in walk(folder, suffixes=None) if f.suffix.lower() in SUFFIXES or is_dicom(f)]


def layout_items(root, normal_class):
    """Items of a folder with train/ and test/, by split; anomalies in train/ stay there."""
    items = folder_items(root, ("train", "labelled", "test"), normal_class, scans)
    return {"train": items["train"] + items["labelled"], "test": items["test"]}


def plain_items(root, normal, anomalous):
    """All images below folders of normals and of anomalies, which name the groups. root: absolute."""
    items, folders = [], []
    for label, folder in [(0, f) for f in normal] + [(1, f) for f in anomalous]:
        flag = f"{'--anomaly' if label else '--normal'} {folder}"
        path = Path(os.path.normpath(root / folder))
        if not path.is_relative_to(root) or not path.is_dir():
            raise SystemExit(f"{flag}: no such folder below {root}; found: {listing(root)}.")
        if label and path.name.startswith("."):
            raise SystemExit(f"{flag}: a group of anomalies cannot be called {path.name}; rename it.")
        files = scans(path)
        if not files:
            raise SystemExit(f"{flag}: no image below {path}; looked for {READ}; {LEFT}.")
        items += [Item(name_in(root, f), label, path.name, f) for f in files]
        folders.append(path)
    for one, other in itertools.permutations(folders, 2):
        if one.is_relative_to(other):
            raise SystemExit(f"{one} is in {other}: its images would be there twice.")
    return items


def split(items, share, group_by, looks):
    """`split_items`, but images of one group on one side; those of groups with an anomaly are to test on.

    group_by: a regular expression that finds the group in a name; None: DICOM's PatientID, if there is any.
    """
    def group_of(item):
        if group_by:
            match = re.search(group_by, item.name)
            return match and (match[1] if match.groups() else match[0])
        return looks[item.source].patient

    groups = [group_of(item) for item in items]
    if not any(groups):
        if group_by:
            raise SystemExit(f"--group-by {group_by}: found in no name, such as {items[0].name}.")
        print("no patients are known: images are split one by one; see --group-by")
        return split_items(items, share)
    if alone := [i.name for i, g in zip(items, groups, strict=True) if not g]:
        raise SystemExit(f"{len(alone)} of {len(items)} images have no group, the first is {alone[0]}: see "
                         "--group-by.")
    ill = {g for i, g in zip(items, groups, strict=True) if i.label}
    pairs = sorted(((i, g) for i, g in zip(items, groups, strict=True)), key=lambda pair: pair[0].name)
    well = [(i, g) for i, g in pairs if g not in ill]
    if len({g for _, g in well}) < 4:
        raise SystemExit(f"{len({g for _, g in well})} groups or patients without anomalies are too few to "
                         "split: add some, or make folders train and test yourself.")
    splitter = GroupShuffleSplit(1, test_size=share, random_state=42)
    chosen, _ = next(splitter.split(well, groups=[g for _, g in well]))
    known = {well[i][1] for i in chosen}
    print(f"{len(set(groups))} groups or patients, {len(known)} of them to train on")
    return {"train": [i for i, g in pairs if g in known], "test": [i for i, g in pairs if g not in known]}


def targets(items, looks, pages):
    """Where each image goes: {"train/normal/a.png": (item, page), ...}.

    page: which one becomes a PNG; None where the file is copied. Of names that clash each gets its folders in
    front. pages: "first" or "all" of several; exits where that isn't said.
    """
    groups, plan = {}, {}
    several = [i for every in items.values() for i in every if looks[i.source].pages > 1]
    if several and not pages:
        raise SystemExit(f"{len(several)} files have several pages, the first is {several[0].name}: say "
                         "--pages first, or --pages all.")
    for split, every in items.items():
        for item in every:
            if item.label and item.group.lower() == "normal":
                raise SystemExit(f"{item.name}: a group of anomalies cannot be called {item.group}; rename "
                                 "it.")
            groups.setdefault(f"{split}/{item.group if item.label else 'normal'}", []).append(item)
    for folder, every in groups.items():
        names = [Path(i.name).name + ".png" * looks[i.source].convert for i in every]
        taken = Counter(name.lower() for name in names)                     # some systems ignore the case
        taken.update({i.name.split("/")[0].lower() for i in every})         # the folders in front count, too
        for name, item in zip(names, every, strict=True):
            seen, above = looks[item.source], f"{folder}/{item.name.rpartition('/')[0]}"
            target = f"{folder if taken[name.lower()] == 1 else above}/{name}"
            if seen.pages == 1 or pages == "first":
                made = {target: (item, 0 if seen.convert else None)}
            else:
                made = {f"{target.removesuffix('.png')}-{page:04d}.png": (item, page)
                        for page in range(seen.pages)}
            if clash := plan.keys() & made.keys():
                raise SystemExit(f"{item.name} and another file would both become {clash.pop()}: rename one.")
            plan |= made
    return plan


def scans_in(plan):
    """Is there anything to be converted?"""
    return any(page is not None for _, page in plan.values())


def there(target, source, page):
    """Is a target made already, of this source? It has the source's time, to 2 s, and a copy its size."""
    if not target.is_file():
        return False
    new, old = target.stat(), source.stat()
    return abs(new.st_mtime - old.st_mtime) <= 2 and (page is not None or new.st_size == old.st_size)


def foreign(folder, plan):
    """The first file in a folder that is not of the plan, or None; hidden files do not count."""
    known = {*plan, "prepared.json"}
    files = (f.relative_to(folder).as_posix() for f in sorted(folder.rglob("*"))
             if f.is_file() and not f.name.startswith("."))
    return next((f for f in files if f.removesuffix(".tmp") not in known), None)


def begin(part, window):
    """Note in part by which window its images are made; what a stopped command made by another one goes."""
    file = part / "prepared.json"
    if file.is_file() and json.loads(file.read_text()).get("window") != window:
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    with whole(file) as temporary:
        temporary.write_text(json.dumps({"window": window}))


def make(item, page, target, window):
    """Copy an image as it is, or write its page as 8-bit PNG, if that is not there yet.

    Returns the digest of its pixels, or why it cannot be read.
    """
    source, digest = item.source, None
    try:
        if not there(target, source, page):
            if page is None:
                digest = decode(source, 8)[1]                               # first: it may be torn
            else:
                image = Image.fromarray(to_8_bit(page_of(source, page), window))
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as temporary:
                if page is None:
                    shutil.copyfile(source, temporary)
                else:
                    image.save(temporary, format="PNG")
                os.utime(temporary, ns=(source.stat().st_mtime_ns,) * 2)                # see `there`
        return digest or decode(target, 8)[1]
    except SystemExit as stop:
        return str(stop).partition(": repair or remove it")[0]


def make_all(plan, part, window):
    """Make all images in part, in parallel: {target: digest}, and {target: why it cannot be read}."""
    with ThreadPoolExecutor() as pool:
        try:
            done = pool.map(lambda target: make(*plan[target], part / target, window), plan)
            bar = tqdm(done, "writing", len(plan), unit="image", disable=None, leave=False)
            found = dict(zip(plan, bar, strict=True))
        except BaseException:                                               # stopped: begin no other image
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return ({k: v for k, v in found.items() if not isinstance(v, str)},
            {k: v for k, v in found.items() if isinstance(v, str)})


def copies(digests):
    """{target: why} of training images that are in test as well, or a second time in training: of a normal
    and an anomaly the normal.
    """
    def order(target):
        return not target.startswith("test/"), target.startswith("train/normal/"), target

    first = {}
    for target in sorted(digests, key=order):
        first.setdefault(digests[target], target)
    return {t: f"the same image as {first[d]}" for t, d in digests.items()
            if t.startswith("train/") and first[d] != t}


def named(plan, target):
    """How a target's source is called: its name, with the page, from 1, where all of several are taken."""
    item, page = plan[target]
    several = page is not None and target.endswith(f"-{page:04d}.png")
    return f"{item.name}, page {page + 1}" if several else item.name


def note(plan, root, left_out, args, window, other):
    """What prepared.json says. left_out: {source: why}; other: of not_read."""
    counts = Counter("/".join(t.split("/")[:2]) for t in plan if named(plan, t) not in left_out)
    return {"set": args.set, "source": root.name, "counts": counts, "left_out": left_out, "not_read": other,
            "window": window, "window_asked_for": args.window, "defaults": DEFAULTS.get(args.set, {})}


def is_prepared(out, plan, root, args):
    """True if OUT is what this command makes, False if nothing is there. Exits if it holds other things."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    try:
        says = json.loads((out / "prepared.json").read_text())
        made = {t: plan[t] for t in plan if named(plan, t) not in says["left_out"]}
        same = says == note(plan, root, says["left_out"], args, says["window"], says["not_read"])
        if same and not foreign(out, made) and all(
                there(out / target, item.source, page) for target, (item, page) in made.items()):
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass                                                                # no prepared.json of ours
    raise SystemExit(f"{out} holds other things than this command makes, or its source has changed; remove "
                     "it, or choose another OUT.")


def regex(text):
    """A regular expression that is not empty, or one sentence."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text}: not a regular expression ({error})") from None
    if not text:
        raise argparse.ArgumentTypeError("needs a regular expression, such as 'p[0-9]+'")
    return text


def arguments():
    parser = argparse.ArgumentParser(prog="python -m extras.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder of a download, or of folders of images")
    parser.add_argument("out", metavar="OUT", help="folder to make, outside SOURCE")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--set", choices=SETS, help="SOURCE is the download of this set; "
                      + ", ".join(f"{name}: {where}" for name, (where, *_) in SETS.items()))
    what.add_argument("--normal", nargs="+", metavar="FOLDER", help="folders of normals, below SOURCE, which "
                      "are to be split into train and test")
    what.add_argument("--normal-class", metavar="NAME", help="the normal class of a SOURCE that has train/ "
                      "and test/ (default: good, normal or ok)")
    parser.add_argument("--anomaly", nargs="+", metavar="FOLDER", help="folders of anomalies, below SOURCE")
    parser.add_argument("--test-share", type=number(float, above=0, high=0.75),
                        help="share of the normals to test on, or of the groups without anomalies (default: "
                        "0.25)")
    parser.add_argument("--group-by", type=regex, metavar="REGEX", help="what in a file's name, "
                        "below SOURCE, tells a patient or a part: its images stay on one side, and are to "
                        "test on where one is an anomaly")
    parser.add_argument("--window", type=number(float, -1e10, 1e10), nargs=2, metavar=("LOW", "HIGH"),
                        help="values that become black and white in scans of more than 8 bits, for example "
                        "-1000 400 (lungs in CT)")
    parser.add_argument("--pages", choices=["first", "all"], help="which pages of files that have several")
    args = parser.parse_args()
    if not args.normal and (args.anomaly or args.test_share or args.group_by):
        parser.error("--anomaly, --test-share and --group-by go with --normal")
    if not args.normal and not args.set and not (Path(args.source).expanduser() / "train").is_dir():
        parser.error(f"{args.source} has no folder train: say which folders are --normal and --anomaly, or "
                     "which --set it is")
    if args.window and args.window[0] >= args.window[1]:
        parser.error(f"--window {args.window[0]:g} {args.window[1]:g}: needs LOW below HIGH")
    return args


def main():
    args = arguments()
    root, out = (Path(os.path.realpath(Path(p).expanduser())) for p in (args.source, args.out))
    part = out.with_name(f"{out.name}.part")
    if out.is_relative_to(root) or part.is_relative_to(root) or root.is_relative_to(part):
        raise SystemExit(f"OUT {out} or {part.name} lies in SOURCE {root}: choose an OUT elsewhere.")
    above = [root / split for split in ("train", "test")]                       # where images are looked for
    if args.normal:
        every = plain_items(root, args.normal, args.anomaly or [])
        above = [Path(os.path.normpath(root / folder)) for folder in args.normal + (args.anomaly or [])]
    else:
        items = set_items(root, args.set) if args.set else layout_items(root, args.normal_class)
        every = [item for side in items.values() for item in side]
    if args.set:
        above = sorted({item.source.parent for item in every})
    sources = [item.source for item in every]
    with ThreadPoolExecutor() as pool:
        found = pool.map(look, sources)
        bar = tqdm(found, "reading headers", len(sources), unit="image", disable=None, leave=False)
        looks = dict(zip(sources, bar, strict=True))
    unread = {i.name: looks[i.source] for i in every if isinstance(looks[i.source], str)}
    if args.normal:
        read = [i for i in every if i.name not in unread]
        if all(i.label for i in read):
            raise SystemExit(f"{root}: no image to train on can be read.")
        items = split(read, args.test_share or 0.25, args.group_by, looks)
    items = {k: [i for i in v if i.name not in unread] for k, v in items.items()}
    known, tested = ({looks[i.source].patient for i in items[k]} - {""} for k in ("train", "test"))
    if both := sorted(known & tested):
        print(f"warning: patients in train and in test: {len(both)}, the first is {both[0]}")
    plan = targets(items, looks, args.pages)
    done, other = is_prepared(out, plan, root, args), not_read(above, {item.source for item in every})
    if not done:
        if stray := foreign(part, plan):
            raise SystemExit(f"{part} holds {stray}, which this command does not make; remove it, or choose "
                             "another OUT.")
        window = args.window or window_of(plan, looks)
        if scans_in(plan):
            begin(part, window)
        digests, wrong = make_all(plan, part, window)
        same = copies(digests)
        for target in same:
            (part / target).unlink()
        left_out = unread | {named(plan, t): why for t, why in (wrong | same).items()}
        left_out = {name: why.replace(f"{root}{os.sep}", "").encode(errors="replace").decode()
                    for name, why in left_out.items()}                      # no paths of this machine
        for name, why in list(left_out.items())[:20]:
            print(f"left out: {name}: {why}")
        if len(left_out) > 20:
            print(f"and {len(left_out) - 20} more, in {args.out}/prepared.json")
        says = note(plan, root, left_out, args, window if scans_in(plan) else None, other)
        if not says["counts"]["train/normal"]:
            raise SystemExit(f"{root}: no image is left to train on.")
        with whole(part / "prepared.json") as temporary:
            temporary.write_text(json.dumps(says, indent=1) + "\n")
        if out.exists():
            out.rmdir()                                                     # an empty folder
        part.rename(out)
    says = json.loads((out / "prepared.json").read_text())
    if says["not_read"]:
        print(f"not read: {says['not_read']}")
    if says["window"]:
        print("values from {:g} to {:g} are black to white".format(*says["window"]))
    print(f"{out} {'was prepared before' if done else 'is prepared'}: "
          f"{', '.join(f'{folder} {n:,}' for folder, n in says['counts'].items())}; "
          f"{len(says['left_out'])} left out. Use it as --data {args.out}")


if __name__ == "__main__":
    run(main, "the same command goes on from there")
