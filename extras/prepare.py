"""Downloads of the paper's other sets, or plain folders of images -> the folder layout that the core reads.

    python -m extras.prepare ~/Downloads/kvasir data/kvasir --set kvasir
    python -m extras.prepare scans data/scans --normal healthy --anomaly tumour bleeding

Writes OUT/train/normal, OUT/test/normal, OUT/test/<group> for each group of anomalies, and
OUT/prepared.json (what it was made of, counts, images left out and why, defaults that the scripts take).
Files are copied as they are. A set's download is taken untouched, as it unzips. Where no split is
published, a share of the normals and all anomalies are to test on: scikit-learn's split of the sorted
names with seed 42, as for ELPV. All is made in OUT.part, which becomes OUT at the end: nothing half done
is read.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from dia_lib import SUFFIXES, Item, decode, folder_items, number, run, split_items, walk, whole

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
DEFAULTS = {"kvasir": {"shift": "perm", "t_range": [100, 200]}}             # DIA Sec. 4.1, Tab. 4


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


def plain_items(root, normal, anomalous):
    """All images below folders of normals and of anomalies, which name the groups. root: absolute."""
    items, folders = [], []
    for label, folder in [(0, f) for f in normal] + [(1, f) for f in anomalous]:
        flag = f"{'--anomaly' if label else '--normal'} {folder}"
        path = Path(os.path.normpath(root / folder))
        if not path.is_relative_to(root) or not path.is_dir():
            raise SystemExit(f"{flag}: no such folder below {root}; found: {listing(root)}.")
        if label and path.name.lower() == "normal":
            raise SystemExit(f"{flag}: a group of anomalies cannot be called {path.name}; rename the folder.")
        files = walk(path)
        if not files:
            raise SystemExit(f"{flag}: no image below {path}; looked for {', '.join(sorted(SUFFIXES))}.")
        items += [Item(f.relative_to(root).as_posix(), label, path.name, f) for f in files]
        folders.append(path)
    for one, other in itertools.permutations(folders, 2):
        if one.is_relative_to(other):
            raise SystemExit(f"{one} is in {other}: its images would be there twice.")
    return items


def targets(items, root):
    """Where each image goes: {"train/normal/a.png": "healthy/a.png", ...}, from names below root.

    Of names that clash each gets its folders in front.
    """
    groups, plan = {}, {}
    for split, every in items.items():
        for item in every:
            groups.setdefault(f"{split}/{item.group if item.label else 'normal'}", []).append(item)
    for folder, every in groups.items():
        names = [Path(i.name).name for i in every]
        taken = Counter(name.lower() for name in names)                     # some systems ignore the case
        taken.update({i.name.split("/")[0].lower() for i in every})         # the folders in front count, too
        for name, item in zip(names, every, strict=True):
            plan[f"{folder}/{name if taken[name.lower()] == 1 else item.name}"] = \
                item.source.relative_to(root).as_posix()
    return plan


def there(target, source):
    return target.is_file() and target.stat().st_size == source.stat().st_size


def foreign(folder, plan):
    """The first file in a folder that is not of the plan, or None; hidden files do not count."""
    known = {*plan, "prepared.json"}
    files = (f.relative_to(folder).as_posix() for f in sorted(folder.rglob("*"))
             if f.is_file() and not f.name.startswith("."))
    return next((f for f in files if f.removesuffix(".tmp") not in known), None)


def copy(source, target):
    """Copy an image as it is, if it is not there yet. Returns why it cannot be read, or None."""
    if not there(target, source):
        try:
            decode(source, 8)
        except SystemExit as stop:
            return str(stop).partition(": repair or remove it")[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as temporary:
            shutil.copyfile(source, temporary)
    return None


def copy_all(plan, root, part):
    """Copy all images into part, in parallel. Returns those that cannot be read: {name below root: why}."""
    left_out = {}
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(lambda target: copy(root / plan[target], part / target), plan)
        bar = tqdm(reasons, "copying", len(plan), unit="image", disable=None, leave=False)
        for name, why in zip(plan.values(), bar, strict=True):
            if why:
                left_out[name] = why.replace(f"{root}{os.sep}", "")         # no paths of this machine
    return left_out


def note(plan, root, left_out, name):
    """What prepared.json says."""
    counts = Counter("/".join(target.split("/")[:2]) for target in plan if plan[target] not in left_out)
    return {"set": name, "source": root.name, "counts": counts, "left_out": left_out,
            "defaults": DEFAULTS.get(name, {})}


def is_prepared(out, plan, root, name):
    """True if OUT is what this command makes, False if nothing is there. Exits if it holds other things."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    try:
        says = json.loads((out / "prepared.json").read_text())
        made = {target: source for target, source in plan.items() if source not in says["left_out"]}
        if says == note(plan, root, says["left_out"], name) and not foreign(out, made) and all(
                there(out / target, root / source) for target, source in made.items()):
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass                                                                # no prepared.json of ours
    raise SystemExit(f"{out} holds other things than this command makes; remove it, or choose another OUT.")


def arguments():
    parser = argparse.ArgumentParser(prog="python -m extras.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder of a download, or of folders of images")
    parser.add_argument("out", metavar="OUT", help="folder to make, outside SOURCE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--set", choices=SETS, help="SOURCE is the download of this set, from "
                      + ", ".join(where for where, *_ in SETS.values()))
    what.add_argument("--normal", nargs="+", metavar="FOLDER", help="folders of normals, below SOURCE")
    parser.add_argument("--anomaly", nargs="+", metavar="FOLDER", help="folders of anomalies, below SOURCE")
    parser.add_argument("--test-share", type=number(float, above=0, high=0.75),
                        help="share of the normals to test on (default: 0.25)")
    args = parser.parse_args()
    if args.set and (args.anomaly or args.test_share):
        parser.error("--anomaly and --test-share go with --normal; a --set brings its own")
    return args


def main():
    args = arguments()
    root, out = (Path(os.path.abspath(Path(p).expanduser())) for p in (args.source, args.out))
    if out.resolve().is_relative_to(root.resolve()):
        raise SystemExit(f"OUT {out} lies in SOURCE {root}: choose an OUT elsewhere.")
    plan = targets(set_items(root, args.set) if args.set else split_items(
        plain_items(root, args.normal, args.anomaly or []), args.test_share or 0.25), root)
    part, done = out.with_name(f"{out.name}.part"), is_prepared(out, plan, root, args.set)
    if not done:
        if wrong := foreign(part, plan):
            raise SystemExit(f"{part} holds {wrong}, which this command does not make; remove it, or choose "
                             "another OUT.")
        left_out = copy_all(plan, root, part)
        for name, why in left_out.items():
            print(f"left out: {name}: {why}")
        says = note(plan, root, left_out, args.set)
        if not says["counts"]["train/normal"]:
            raise SystemExit(f"{root}: no image to train on can be read.")
        with whole(part / "prepared.json") as temporary:
            temporary.write_text(json.dumps(says, indent=1) + "\n")
        if out.exists():
            out.rmdir()                                                     # an empty folder
        part.rename(out)
    says = json.loads((out / "prepared.json").read_text())
    print(f"{out} {'was prepared before' if done else 'is prepared'}: "
          f"{', '.join(f'{folder} {n:,}' for folder, n in says['counts'].items())}; "
          f"{len(says['left_out'])} left out. Use it as --data {args.out}")


if __name__ == "__main__":
    run(main, "the same command goes on from there")
