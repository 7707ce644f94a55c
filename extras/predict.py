"""Score images of your own by a trained run, without labels. Higher means more anomalous.

    python -m extras.predict runs/lungs new_scans                   # every image below that folder
    python -m extras.predict runs/lungs a.png "more/*.tif" --maps   # files, patterns; a heat map each
    python -m extras.predict runs/lungs-nearest new_scans           # a run of weakly_supervised, too
    python -m extras.predict runs/lungs new_scans --fpr 0.01        # call fewer normal images anomalies
    python -m extras.predict runs/lungs --test                      # how it decides on the run's test set

Writes scores.csv (path, score, p_value, anomaly, seen: was it in training?), most anomalous first, and
examples.png, to a new folder below RUN/images. For a run of train_dia.py the first call needs the training
data, and keeps what it needs of them in RUN/predict.pt; later ones do not.

    from extras.predict import load_run                             # the same from Python
    run = load_run("runs/lungs")
    scores, p = run.score("new_scans")      # or a file, a list of files, a PIL image, an array: (n,) and (n,)
    heat = run.heat_map("new_scans/a.png")  # (H, W), of the image's own size
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m extras.predict, in the project's folder.")

import csv
import glob
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dia_lib import (
    SUFFIXES, Item, csi_parts, decode, embed, load_checkpoint, load_encoder, load_unet, make_parser, name_in,
    new_folder, number, pick_device, read_images, run, save_checkpoint, save_grid, shared_flags, whole,
)
from evaluate import auroc_interval, data_of, remembered, training_stats, weights_of
from extras.decisions import columns_of, decisions, impossible, p_values, promise, rates_of
from extras.heat_maps import colours, heat_map, overlay
from extras.local import local_fit, local_maps, removed_maps, stage1_of, together
from extras.prepare import LEFT, READ, is_dicom, look, page_of, scans, to_8_bit

SCORES = ("csi", "cos", "local")        # the paper's; its cosine alone; nearest neighbour of local features


def arguments(argv=None):
    parser = make_parser(__doc__, usage=None)
    parser.add_argument("run", metavar="RUN", help="folder of a run of train_dia.py or of weakly_supervised")
    parser.add_argument("images", metavar="IMAGES", nargs="*", help="folders of images at any depth, files, "
                        "or patterns such as \"scans/*.png\"")
    parser.add_argument("--test", action="store_true", help="the run's own test set instead: AUROC, and what "
                        "deciding by p <= fpr does, for each score; writes RUN/decisions.json")
    shared_flags(parser, data=None)
    parser.add_argument("--score", choices=SCORES, help="of a run of train_dia.py: csi, the "
                        "paper's; cos, its cosine alone; local, nearest neighbour of local features "
                        "(default: csi)")
    parser.add_argument("--fpr", type=number(float, above=0, high=0.99), help="share of normal images that "
                        "may be called anomalies (default: the run's, or else 0.05)")
    parser.add_argument("--maps", action="store_true", help="write a heat map of each image to TO/maps: over "
                        "the image (.png), and the scores of its patches (.npy)")
    parser.add_argument("--passes", type=number(), default=10, help="test-time passes averaged (default: 10)")
    parser.add_argument("--batch-size", type=number(), default=96,
                        help="images a step, before shifts (default: 96)")
    parser.add_argument("--to", metavar="FOLDER", help="where to write (default: a new folder in RUN/images)")
    args = parser.parse_intermixed_args(argv)                   # IMAGES may stand after the flags
    if args.test == bool(args.images):
        parser.error("give either images (folders, files, patterns) or --test")
    if args.to:
        to = Path(args.to)
        if to.is_file() or to.is_dir() and any(to.iterdir()):
            parser.error(f"--to {to} is not empty: choose another folder")
        for source in args.images:
            if to.resolve().is_relative_to(Path(source).resolve()):
                parser.error(f"--to {to} is in {source}, whose images are scored: choose another folder")
    return args


# ---- Images --------------------------------------------------------------------------------------------


def files_of(sources):
    """Folders, files and patterns, a path or several: [files], the folder that their names are relative to.

    Images and scans at any depth of the folders, as absolute paths. Says how many other files there are.
    Exits where there is none.
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    found, other, folders = [], 0, []
    for source in sources:
        path = os.path.abspath(os.path.expanduser(source))
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise SystemExit(f"{source}: no such file or folder.")
        files = []
        for match in map(Path, matches):
            if match.is_dir():
                below = scans(match)
                listed = [f for f in match.rglob("*") if f.is_file() and f.name[0] != "."]
            else:                                           # what is named is read, or says why it cannot be
                named = str(match) == path
                below = [match] if named or match.suffix.lower() in SUFFIXES or is_dicom(match) else []
                listed = [match]
            files, other, folders = files + below, other + len({*listed} - {*below}), [*folders, match]
        if not files:
            raise SystemExit(f"{source}: no image below it; looked for {READ}; {LEFT}.")
        found += files
    if other:
        print(f"note: left out, since they are no images: {other} files; images are {READ}")
    alone = len(folders) == 1 and folders[0].is_dir()
    return found, folders[0] if alone else Path(os.path.commonpath([f.parent for f in found]))


def load_images(sources, size, window=None):
    """All images and scans of folders, files and patterns, of any format and size: (n, C, size, size) uint8.

    sources: a path or several.  window: (low, high) that the run's set was prepared with,
    `settings["window"]`; new scans get the same.  Exits where there is none, or one cannot be read.
    """
    return read_files(files_of(sources)[0], size, window)[0]


def read_files(files, size, window, fewest=64):
    """As read_images, of files and scans: images are a tensor, digests int64 as in Data.digests."""
    items = [Item(str(f), 0, "", partial(source_of, f, window)) for f in files]
    pixels, digests, deep = read_images(items, size, window, fewest)
    return torch.from_numpy(pixels), digests.view(np.int64), deep


def source_of(path, window):
    """What `decode` reads of a file: its path, or of a DICOM file of one page its pixels, uint8.

    By a window (low, high), or, where that is None, by its header's.
    """
    if path.suffix.lower() in SUFFIXES:
        return path
    seen = look(path)
    if isinstance(seen, str):
        raise SystemExit(seen)
    if seen.pages > 1:
        raise SystemExit(f"{path} has {seen.pages} pages: which of them? python -m extras.prepare takes one, "
                         "or all.")
    page = page_of(path, 0)
    if not (window or page.window or page.pixels.dtype == np.uint8):
        raise SystemExit(f"{path} names no window, and the run's images were not prepared with one: prepare "
                         "both by python -m extras.prepare.")
    return to_8_bit(page, window)


# ---- A run, ready to score -----------------------------------------------------------------------------


@dataclass
class Run:
    """A trained run, ready to score images; of load_run. Safe to use from several threads."""
    out: Path               # the run's folder
    settings: dict          # of its training
    measure: Callable       # images (n, C, size, size) uint8, scores, maps -> {score: (n,)}, (n, P) if maps
    known: dict             # calibration {score: (n,)}; low, high: of heat maps; digests of what it has seen
    batch: int = 96

    @property
    def size(self):
        """Side of the images that it takes."""
        return size_of(self.settings)

    @property
    def scores(self):
        """Names of the scores that it has; the first one ranks."""
        return tuple(self.known["calibration"])

    def parts(self, images, scores=None, maps=False, name=None):
        """{score: (n,)} and, with maps, their patches' scores (n, P), of images (n, C, size, size) uint8.

        scores: names (default: all).  name: of a progress bar.
        """
        scores, found, grids = self.scores if scores is None else scores, [], []
        bar = tqdm(images.split(self.batch), name, unit="batch", leave=False, disable=None if name else True)
        for part in bar if len(images) else ():
            values, grid = self.measure(part, scores, maps)
            found.append(values)
            grids += [grid] if maps else []
        found = {name: torch.cat([torch.empty(0), *(part[name] for part in found)]) for name in scores}
        return found, torch.cat(grids) if grids else torch.empty(0, 1)

    def p_values(self, scores, score=None):
        """Conformal p-values (n,) of scores (n,), numpy: see extras.decisions."""
        return p_values(self.known["calibration"][score or self.scores[0]].numpy(), scores)

    def images(self, source):
        """Images (n, C, size, size) uint8, of whatever `score` takes."""
        size, window = self.size, self.settings.get("window")
        if isinstance(source, torch.Tensor):
            shape = tuple(source.shape)
            if source.dtype != torch.uint8 or shape[2:] != (size, size) or shape[1] not in (1, 3):
                raise ValueError(f"images are {source.dtype} {shape}; this run needs uint8 "
                                 f"(n, 1 or 3, {size}, {size})")
            return source
        several = not isinstance(source, str | os.PathLike | np.ndarray | Image.Image)
        source = list(source) if several else [source]
        if not source:
            return torch.empty(0, 1, size, size, dtype=torch.uint8)
        paths = [isinstance(image, str | os.PathLike) for image in source]
        if all(paths):
            return load_images(source, size, window)
        if any(paths):
            raise ValueError("a list has paths, or pictures and arrays, not both")
        for image in source:
            if isinstance(image, Image.Image):
                if image.mode[0] in "IF":
                    raise ValueError(f"a picture has mode {image.mode}: give the path of its file")
                image.load()
            elif not isinstance(image, np.ndarray):
                raise ValueError(f"a {type(image).__name__} is no path, picture or array")
            elif image.dtype != np.uint8 or not image.size or image.shape[2:] not in ((), (3,)):
                raise ValueError(f"an array is {image.dtype} {image.shape}; needs uint8 (H, W) or (H, W, 3)")
        return torch.from_numpy(read_images([Item("", 0, "", image) for image in source], size, window)[0])

    def score(self, source, score=None):
        """Scores (n,) and p-values (n,), numpy. Higher scores and lower p-values are more anomalous.

        source: a path (a folder, in the order of load_images; a file; a pattern), a PIL image, an array uint8
        (H, W[, 3]) of any size, a list of paths or of pictures and arrays, or a tensor (n, 1 or 3, size,
        size) uint8.  score: one of self.scores (default: the first). Raises ValueError where pictures, arrays
        or tensors have another type or shape; SystemExit with a sentence where a file cannot be read.
        """
        score = score or self.scores[0]
        scores = self.parts(self.images(source), (score,))[0][score].numpy()
        return scores, self.p_values(scores, score)

    def heat_map(self, source):
        """Where an image is anomalous: (H, W) float32 of its own size, numpy, in units of patch scores.

        source: a path of a file, a PIL image, or an array uint8 (H, W[, 3]).
        """
        images, window = self.images(source), self.settings.get("window")
        if isinstance(source, list) and len(source) == 1:
            source = source[0]
        if len(images) != 1:
            raise ValueError(f"a heat map is of one image, not of {len(images)}")
        path = files_of(source)[0][0] if isinstance(source, str | os.PathLike) else None
        size = decode(source_of(path, window) if path else source, None, window)[0].shape[1:]
        return heat_map(self.parts(images, (), maps=True)[1][0], size).numpy()


def load_run(out, device="auto", passes=10, batch=96, data=None):
    """A Run of the folder that train_dia.py or a method of weakly_supervised left.

    passes: of DIA and CSI.  data: the run's Data, if it is at hand: the first call for a run of train_dia.py
    makes its predict.pt from them.  Exits where a file is missing or not what it should be.
    """
    out, device = Path(out), pick_device(device)
    method, state = method_of(out)
    if method == "dia":
        return dia_run(out, state, device, passes, batch, data)
    score = import_module(f"weakly_supervised.{method}").restore(state["settings"], state["state"], device)

    def measure(images, scores, maps):
        found, grid = score(images)
        return dict.fromkeys(scores, found), grid
    return Run(out, state["settings"], measure, state, batch)


def size_of(settings):
    """Side of the images that a run takes: what they were read at, where its backbone sees another size."""
    return settings.get("side", settings["image_size"])


def method_of(out):
    """Which method left a run in a folder, "dia" or one of weakly_supervised; its dia.pt or predict.pt."""
    if out.parent.name == "tests" and (out.parent.parent / "dia.pt").exists():
        raise SystemExit(f"{out} is a test of {out.parent.parent}: give that folder.")
    if (out / "dia.pt").exists() or not out.is_dir():
        return "dia", load_checkpoint(out / "dia.pt", "dia", "cpu")
    several = sorted(path.parent.name for path in out.glob("shots-*/predict.pt"))
    if several and not (out / "predict.pt").exists():
        raise SystemExit(f"{out} has several runs: give one of its folders {', '.join(several)}.")
    if (out / "metrics.json").exists() and not (out / "predict.pt").exists():
        raise SystemExit(f"{out} has no predict.pt: the run is of an earlier version. Run its command again, "
                         "that of dra and ckaad with --resume.")
    name = "predict" if (out / "predict.pt").exists() else "dia"
    state = load_checkpoint(out / f"{name}.pt", name, "cpu")
    if "method" not in state["settings"]:
        raise SystemExit(f"{out} has no dia.pt, which its predict.pt was made for.")
    return state["settings"]["method"], state


def key_of(state, passes):
    """What the predict.pt of a dia.pt's state was made with."""
    return {"weights": weights_of(state), "passes": passes, "maps": "together"}


def calibrated(known, out):
    """What a predict.pt of train_dia.py holds, and {score: (n,)} of the held-out normals that calibrate.

    These are all, or, where extras.choose has looked at the run or a step of it, the half that it left alone.
    """
    run = out.parent if out.name.startswith("step-") else out
    logs = [log for log in (out / "log.jsonl", *run.glob("step-*/log.jsonl")) if log.exists()]
    chosen = any('"stage": "choose"' in log.read_text() for log in logs)
    mine = known["calibration_half"] if chosen else slice(None)
    return known | {"calibration": {score: values[mine] for score, values in known["held_scores"].items()}}


def dia_run(out, state, device, passes, batch, data):
    """The Run of a dia.pt; RUN/predict.pt is made where it is missing, or of another checkpoint or passes."""
    settings, encoder, key = state["settings"], load_encoder(state, device), key_of(state, passes)
    known, made, first = remembered(out / "predict.pt", "predict", key), False, None
    if known is None or known["stage1"] is None:
        first = stage1_of(settings, out)
    if known is None or known["stage1"] is None and first:
        made, data = True, data or data_of(settings, out, ("train",))
        stats = training_stats(out, state, encoder, data, passes, device, batch)
        known = {**{k: stats[k] for k in ("axis", "w", "v")},
                 **{k: data.digests[k].tolist() for k in ("train", "held")},
                 "local": local_fit(encoder, data.train, device, batch), "stage1": first}

    @cache
    def stage1():
        return load_unet(known["stage1"], device)

    def grids(images, local):                       # with what dissolving removes, where stage 1 is there
        if not known["stage1"]:
            return [local]
        pixels, t_range = settings["dissolve_size"], settings["t_range"]
        return [local, removed_maps(*stage1(), images, pixels, t_range, device)]

    def measure(images, scores, maps):
        found, grid = {}, None
        if len({"csi", "cos"} & set(scores)):
            z, logits = embed(encoder, images, settings["shift"], passes, device, batch)
            found = csi_parts(known, z, logits)
        if "local" in scores or maps:
            grid = local_maps(known["local"], encoder, images, device)
            found["local"] = grid.amax(1)
        if maps:
            grid = together(grids(images, grid), known["scales"])
        return {score: found[score] for score in scores}, grid

    if made:
        local = local_maps(known["local"], encoder, data.held, device)
        known["scales"] = [colours(grid) for grid in grids(data.held, local)]
        scores, maps = Run(out, settings, measure, known, batch).parts(data.held, SCORES, maps=True)
        known |= {"held_scores": scores, "calibration_half": data.calibration, **colours(maps)}
        save_checkpoint(out / "predict.pt", "predict", key, known)
    return Run(out, settings, measure, calibrated(known, out), batch)


# ---- The two things that the command does ----------------------------------------------------------------


def examples(path, run, files):
    """The most anomalous files, the next ones and the least anomalous, eight a row, as one picture.

    files: the most anomalous first.
    """
    picked = {"highest scores": files[:8], "next": files[8:16], "lowest": files[16:][-8:]}
    picked = {name: row for name, row in picked.items() if row}
    window = run.settings.get("window")
    images = [read_files(row, run.size, window, fewest=0)[0] / 255 for row in picked.values()]
    rows = [[*row] + [None] * (8 - len(row)) for row in images]
    save_grid(path, rows, [], max(1, 128 // run.size), list(picked))


def write_map(to, name, grid, picture, low, high):
    """TO/maps/<name>.png, the picture (C, H, W) uint8 reddened, and <name>.npy, its patches' scores."""
    path, side = to / "maps" / name, math.isqrt(len(grid))
    path.parent.mkdir(parents=True, exist_ok=True)
    heat = overlay(picture / 255, grid, low, high)
    Image.fromarray((heat * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(f"{path}.png")
    np.save(f"{path}.npy", grid.view(side, side).numpy())


def look_at(sources, window):
    """The files of `sources`, each once, and their names; all have been read once, and can be."""
    files, root = files_of(sources)
    files = list(dict.fromkeys(files))
    names = [name_in(root, f) for f in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SystemExit(f"{root}: two files would both be called {twice}: rename one.")
    _, _, deep = read_files(files, 1, window)                           # one pixel of each: they need no room
    narrow = sum(levels < 64 for levels in deep)
    if narrow and not window:
        print(f"warning: {narrow} of {len(files)} images have 16 bits and fewer than 64 of 256 grey levels: "
              "they may be scans of 12 bits, which look black here; see python -m extras.prepare")
    if window and len(deep) + sum(f.suffix.lower() not in SUFFIXES for f in files) < len(files):
        print("note: some have 8 bits; the run's images were made of values {:g} to {:g}".format(*window))
    return files, names


def score_images(run, files, names, score, fpr, maps, to):
    """Score the files of look_at; write scores.csv, examples.png and with maps TO/maps to a folder."""
    window, colour = run.settings.get("window"), (run.known["low"], run.known["high"])
    scores, digests = [], []
    to.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(0, len(files), run.batch), "images", unit="batch", leave=False, disable=None):
        part = files[i:i + run.batch]
        images, these, _ = read_files(part, run.size, window, fewest=0)
        found, grids = run.parts(images, (score,), maps)
        scores, digests = [*scores, found[score]], digests + these.tolist()
        for file, name, grid in zip(part, names[i:i + run.batch], grids, strict=True) if maps else ():
            picture = decode(source_of(file, window), None, window)[0]
            write_map(to, name, grid, torch.tensor(picture), *colour)
    scores, calibration = torch.cat(scores), run.known["calibration"][score].numpy()
    p, n = run.p_values(scores.numpy(), score), len(calibration)
    order = scores.argsort(descending=True, stable=True).tolist()
    words = {"held": "held out", "labelled": "labelled", "train": "training"}
    known = {digest: word for part, word in words.items() for digest in run.known.get(part, ())}
    seen = [known.get(digest, "") for digest in digests]
    rows = list(zip(names, scores.tolist(), *columns_of(p, fpr, n), seen, strict=True))
    with whole(to / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([("path", "score", "p_value", "anomaly", "seen"),
                                    *(rows[i] for i in order)])
    examples(to / "examples.png", run, [files[i] for i in order])
    if trained := seen.count("training"):
        print(f"note: {trained} of these images were trained on (column `seen`): their scores are too low")
    if labelled := seen.count("labelled"):
        print(f"note: {labelled} of these images were labelled anomalies in training: their scores are too "
              "high")
    left_out = run.known.get("left_out", False)
    decided = impossible(n, fpr) or (f"{int((p <= fpr).sum())} anomalies at --fpr {fpr:g} "
                                     f"({promise(calibration, fpr, left_out)})")
    wrote = ", ".join(["scores.csv", "examples.png", *["maps/"] * maps])
    print(f"{len(names)} images: {decided}\nwrote {wrote} to {to}")


def score_test(run, data, fpr):
    """AUROC and decisions of each score on the run's labelled test set; write decisions.json."""
    labels, n, result = data.labels.numpy(), len(run.known["calibration"][run.scores[0]]), {}
    print(f"{run.out}: {len(labels)} test images ({labels.sum()} anomalies); "
          + (impossible(n, fpr) or f"deciding at --fpr {fpr:g}, by {n} calibration normals"))
    for score, values in run.parts(data.test, name="test images")[0].items():
        auroc, interval = auroc_interval(labels, values.numpy())
        decision = decisions(run.known["calibration"][score].numpy(), values.numpy(), labels, fpr)
        result[score] = {"auroc": auroc, "auroc_interval_95": interval, "decision": decision}
        rates = "" if impossible(n, fpr) else f"  {rates_of(decision)}  threshold {decision['threshold']:.6g}"
        print(f"  {score:5s} AUROC {auroc:.4f}{rates}")
    with whole(run.out / "decisions.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(f"wrote decisions.json to {run.out}")


def main():
    args = arguments()
    out, device, data = Path(args.run), pick_device(args.device), None
    method, state = method_of(out)
    settings = state["settings"]
    if method != "dia" and (args.test or args.score or args.data or args.normal_class):
        raise SystemExit("--test, --score, --data and --normal-class are for runs of train_dia.py; what "
                         f"{method} decides on its test set is in {out}/metrics.json.")
    if args.images:                                                                         # mistakes first
        found = look_at(args.images, settings.get("window"))
    if args.test or args.data:
        data = data_of(settings, out, ("train", "test")[:1 + args.test], args.data, args.normal_class)
    if args.test and len(set(data.labels.tolist())) != 2:
        raise SystemExit(f"--test: {data.name} has no test set with both normal and anomalous images.")
    loaded = load_run(out, device, args.passes, args.batch_size, data)
    fpr = args.fpr or settings.get("fpr", 0.05)
    if args.test:
        score_test(loaded, data, fpr)
    else:
        name = Path(args.images[0]).expanduser().resolve().name
        alone = len(args.images) == 1 and Path(args.images[0]).expanduser().exists()
        name = name if alone else "images"
        to = Path(args.to) if args.to else new_folder(out / "images" / name)
        score_images(loaded, *found, args.score or loaded.scores[0], fpr, args.maps, to)


if __name__ == "__main__":
    run(main, "nothing that was written before is lost")
