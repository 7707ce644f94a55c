"""The paper's tables: trains and scores what is missing of one, then writes the tables of this folder's page.

    python -m study.paper table1 --steps quick --seeds 0 --lines CSI            # one row, on a CPU
    python -m study.paper table1 --steps 5000 --seeds 0 1 2 3 4                 # PneumoniaMNIST, on a GPU
    python -m study.paper table1                                                # the paper's budget
    python -m study.paper table2 --data data/sarscov2
    python -m study.paper                                                       # the tables alone

A run that is in results.csv is not made again; stopped and started again, the command goes on where it was.
One command at a time.
The AUROC is that of the last step: nothing is chosen on test images. Beside it stands, under its own name,
the best of several checkpoints by test AUROC, since the paper's figures are of that kind.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m study.paper, in the project's folder.")

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from scipy.optimize import brentq
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

import dia_lib
import evaluate
import train_dia
import train_diffusion
from dia_lib import load_checkpoint, load_data, load_encoder, to_float
from extras.choose import choose
from extras.tables import insert, processor
from study.page import COLUMNS, KEY, SCORES, TABLE, read, write

LINES = {                       # a line of a table: its flags in stage 1, None where it needs none, and in 2
    "DIA": ("", "--dissolve diffusion"),
    "CSI": (None, "--dissolve none"),
    "copy": (None, "--dissolve copy"),
    "resize": (None, "--dissolve resize"),
    "gaussian": (None, "--dissolve gaussian"),
    "median": (None, "--dissolve median"),
    # DIA divides its contrastive loss by V*N, so it has 2/3 of CSI's weight. LARS does not mind the scale of
    # a loss: 3/2 of the shift classifier's is the same
    "CSI, contrast x 2/3": (None, "--dissolve none --gamma 1.5"),
    "CSI, as long as DIA": (None, "--dissolve none"),                       # in seconds, stage 1 included
    "gaussian, as strong as DIA": (None, "--dissolve gaussian"),            # changes images as much
    "DIA, t 30-130": ("", "--t-range 30 130"),
    "DIA, t 130-230": ("", "--t-range 130 230"),
    "DIA, t 230-330": ("", "--t-range 230 330"),
    "DIA, t 330-430": ("", "--t-range 330 430"),
    "DIA, t 430-530": ("", "--t-range 430 530"),
    "DIA, a tenth of stage 1's images": ("--fraction 0.1", ""),
    "DIA, rotate": ("", "--shift rotate"),
    "CSI, rotate": (None, "--dissolve none --shift rotate"),
    "DIA, perm": ("", "--shift perm"),
    "CSI, perm": (None, "--dissolve none --shift perm"),
    "DIA, dissolved at 64 px": ("--dissolve-size 64", ""),
    "DIA, dissolved at 128 px": ("--dissolve-size 128", ""),
}
TABLES = {
    "table1": [line for line in LINES if not line.startswith(("DIA, ", "CSI, rotate", "CSI, perm"))],
    "table2": [line for line in LINES if ", t " in line],
    "table3": ["DIA, a tenth of stage 1's images", "DIA"],
    "table4": [line for line in LINES if line.endswith((", rotate", ", perm"))],
    "table5": ["DIA", *(line for line in LINES if "dissolved at" in line)],             # at 32 px
    "table6": [],                                                           # parameters: needs no run
}


# ---- Runs ----------------------------------------------------------------------------------------------


def call(module, *words):
    """Run a script's main() with these words as its command line."""
    torch.compiler.reset()                                  # what it has learnt of another line's shapes
    with patch.object(sys, "argv", [module.__name__, *map(str, words)]):
        module.main()


def plain(name):
    """"DIA, t 30-130" -> "dia-t-30-130": of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def budget_of(args):
    """The flags of both stages for --steps and --batch-size, and a name for them."""
    size = ["--batch-size", args.batch_size] if args.batch_size else []
    flags, name = {"full": ([], "the paper's steps" if size else "the paper's budget"),
                   "quick": (["--quick"], "`--quick`")}.get(
        args.steps, (["--steps", args.steps], f"{args.steps} steps"))
    return [*flags, *size], name + (f" of {args.batch_size} images" if size else "")


@cache
def code_version():
    """The commit this code is at, with a + if *.py files differ from it; "" where that can't be told."""
    def git(*words):
        return subprocess.run(["git", "-C", str(TABLE.parent), *words], capture_output=True, text=True,
                              timeout=10, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return git("rev-parse", "--short=7", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def chip(device):
    """What seconds are seconds of: the processor's name, threads where it is not a GPU, and the precision."""
    threads = torch.get_num_threads()
    text = f", {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else ""
    return processor(device) + text + (", bfloat16" if dia_lib.has_bfloat16(device) else ", float32")


def logged(out, stage, name):
    """The rows of a run's log in which a stage has written this value."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage and name in row]


def two_passes(folder, data, device):
    """AUROC on the test images of the weights in a folder, by two test-time passes: as `choose` takes."""
    state = load_checkpoint(folder / "dia.pt", "dia", device)
    return evaluate.auroc_of(load_encoder(state, device), data, state["settings"]["shift"], 2, device)


def held_out(args, mode, pixels, device):
    """Up to 64 held-out images (n, C, H, H), and what stage 2 dissolves of them (n, C, h, h), in [0, 1]."""
    def images(size):
        data = load_data(args.data, size, ("train",), normal_class=args.normal_class)
        return to_float(data.held[~data.calibration][:64], data.train.shape[1], device)

    x = images(train_dia.QUICK["image_size"] if args.steps == "quick" else None)
    return x, images(pixels if mode == "diffusion" else min(pixels, x.shape[-1]))


def change(x, small, mode, t_range=(0, 1), unet=None, abar=None, canvas=32):
    """Mean absolute change, in grey levels of 255, that a third view makes. Images: those of `held_out`."""
    t = torch.linspace(*t_range, len(x) + 1, device=x.device)[:-1].long()
    view = train_dia.dissolve_view(small, x.shape[-1], mode, unet, t, abar, canvas)
    return (view - x).abs().mean().item() * 255


def change_of(args, out, stage1, device):
    """`change` by the third view of a run; None if it changes nothing. stage1: path of its checkpoint."""
    s = load_checkpoint(out / "dia.pt", "dia", "cpu")["settings"]
    if s["dissolve"] in ("none", "copy"):
        return None
    unet = train_dia.load_unet(load_checkpoint(stage1, "diffusion", "cpu"), device) if stage1 else [None] * 2
    x, small = held_out(args, s["dissolve"], s["dissolve_size"], device)
    return change(x, small, s["dissolve"], s["t_range"], *unet, s["dissolve_size"]) if len(x) else None


def with_sigma(sigma):
    """While it lasts, gaussian third views are blurred by this sigma, in pixels."""
    def blur(x, *_):
        radius = min(x.shape[-1] - 1, math.ceil(3 * sigma))
        return gaussian_blur(x, 2 * radius + 1, sigma)

    return patch.object(dia_lib, "gaussian_blur", blur)


def as_strong(target, x, small):
    """The sigma, in pixels, by which a gaussian third view changes images by target grey levels; or exits."""
    def above(sigma):
        with with_sigma(sigma):
            return change(x, small, "gaussian") - target

    try:
        sigma = brentq(above, 0.05, 20, xtol=1e-3)
    except ValueError:                                                      # of one sign at both ends
        raise SystemExit(f"no blur changes images by {target:.2f} grey levels as DIA does") from None
    print(f"a sigma of {sigma:.2f} px changes held-out images by {target:.2f} grey levels, as DIA does")
    return sigma


def steps_of(args):
    """Steps of stage 2, of an epoch as the released code counts them, and the set's own settings."""
    size = args.batch_size or (train_dia.QUICK["batch_size"] if args.steps == "quick" else 32)
    data = load_data(args.data, 32, ("train",), normal_class=args.normal_class)
    dia_lib.check_batch(size, len(data.train))
    epoch = min(len(data.train) // size, 201)
    steps = {"quick": train_dia.QUICK["steps"], "full": 1000 * epoch}.get(args.steps, args.steps)
    return steps, epoch, data.defaults


def make(args, line, seed, flags, steps, around):
    """Train and score a line with one seed, where results.csv has it not yet; its rows and scores go there.

    flags: the line's, as in LINES.  steps: of stage 2.  around: a context in which that trains.
    """
    budget_flags, budget = budget_of(args)
    code_version()                                                      # asked now: it may change meanwhile
    name = dia_lib.data_name(args.data) + (f" normal {args.normal_class}" if args.normal_class else "")
    key = dict(zip(KEY, (name, budget, line, str(seed)), strict=True))
    title = f"{line}; {name}, {budget}, seed {seed}"
    rows = {tuple(row[k] for k in KEY): row for row in read(TABLE)}
    if tuple(key.values()) in rows:
        print(f"{title}: in results.csv already")
        return
    print(f"\n{title}", flush=True)
    first, second = flags
    words = ["--data", args.data, "--device", args.device, "--seed", seed, "--resume", *budget_flags]
    words += ["--normal-class", args.normal_class] if args.normal_class else []
    words += ["--launch", args.launch] if args.launch else []
    device, folder = dia_lib.pick_device(args.device), Path(args.out) / plain(f"{name} {budget}")
    folder, second = folder / f"s{seed}", second.split()
    out, stage1, seconds, reports = folder / plain(line), None, 0.0, []

    def other(line, column):                                                # what another line's row says
        row = rows.get(tuple((key | {"line": line}).values()), {})
        if not row.get(column):
            anew = f"delete its row and {folder / plain(line)}, and make it anew"
            raise SystemExit(f"results.csv has no {column} of {line}, which this line needs: "
                             + (anew if row else "make that first"))
        return row[column]

    if first is not None:
        at = folder / plain(f"stage1 {first}")
        call(train_diffusion, *words, *first.split(), "--out", at)
        second, stage1 = [*second, "--diffusion", at / "diffusion.pt"], at / "diffusion.pt"
        seconds = logged(at, "diffusion", "seconds")[-1]["seconds"]
        reports = [f"{r['step']} {r['change_train']:.2f} {r['change_held']:.2f}"
                   for r in logged(at, "diffusion", "change_held")]
    if line == "CSI, as long as DIA":
        if other("DIA", "processor") != other("CSI", "processor"):
            raise SystemExit("DIA and CSI were trained on different processors: their seconds do not compare")
        longer = sum(float(other("DIA", f"seconds_{i}")) for i in (1, 2)) / float(other("CSI", "seconds_2"))
        steps = round(steps * longer)
        second += ["--steps", steps]
    if line == "gaussian, as strong as DIA":
        images = held_out(args, "gaussian", 32, device)
        around = with_sigma(as_strong(float(other("DIA", "change")), *images))
    second += ["--save-every", math.ceil(steps / args.kept)]
    origin = out / "origin.json"                                        # it may be scored elsewhere, later
    if not origin.exists():
        out.mkdir(parents=True, exist_ok=True)
        origin.write_text(json.dumps({"commit": code_version(), "processor": chip(device)}))
    with around:
        call(train_dia, *words, *second, "--out", out)
        changed = change_of(args, out, stage1, device)
    known = tuple((key | {"line": "floor: encoder untrained"}).values()) in rows
    floors = patch.object(evaluate, "floors", lambda *_: {})                # not again: half of the time
    with floors if known or line not in ("DIA", "CSI") else nullcontext():
        call(evaluate, "--device", args.device, "--out", out)
    add(key, out, device, {"change": changed, "stage1": "; ".join(reports), "seconds_1": seconds,
                           **json.loads(origin.read_text())})
    print(f"{title}: in results.csv, with its scores in {SCORES.name}", flush=True)


def add(key, out, device, more):
    """Put a run that is scored, its floors and its scores into the tables. key, more: columns of its row."""
    state = load_checkpoint(out / "dia.pt", "dia", "cpu")
    data = evaluate.data_of(state["settings"], out)
    kept = sorted(out.glob("step-*"), key=lambda path: int(path.name[5:]))
    if not kept:
        raise SystemExit(f"{out}: the weights kept on the way are gone: delete that folder to train anew")
    each = [two_passes(path, data, device) for path in tqdm(kept, "checkpoints", leave=False)]
    metrics = json.loads((out / "metrics.json").read_text())
    chosen = choose(out, device)[1] if (~data.calibration).sum() > 1 else {}
    row = {**key, "auroc": metrics["auroc"], "test_best": max(each), "test_last": each[-1], "kept": len(each),
           "steps": state["step"], "made_defects": chosen.get("val_auroc"),
           "val_anomalies": chosen.get("val_real"), **more,
           "seconds_2": logged(out, "dia", "seconds")[-1]["seconds"]}
    floors = [dict.fromkeys(COLUMNS, "") | key | {"line": f"floor: {floor}", "auroc": auroc}
              for floor, auroc in metrics["floors_auroc"].items()]
    images = read(out / "scores.csv")
    labels = {**dict.fromkeys(KEY, ""), "data": key["data"], "values": " ".join(i["label"] for i in images)}
    if any(r != labels for r in read(SCORES) if r["data"] == key["data"] and not r["line"]):
        raise SystemExit(f"{SCORES.name} has a {key['data']} with other test images: rename this one")
    insert(SCORES, [{**key, "values": " ".join(f"{float(i['score']):.6g}" for i in images)}, labels], KEY)
    insert(TABLE, [{k: "" if r[k] is None else f"{r[k]:.4f}" if isinstance(r[k], float) else r[k]
                    for k in COLUMNS} for r in [*floors, row]], KEY)    # last: it says that all is there
    for path in kept:
        shutil.rmtree(path)


def steps_type(text):
    """"full", "quick" or a number of steps."""
    try:
        return text if text in ("full", "quick") else dia_lib.number()(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or full, or quick") from None


def run_flags(description):
    """A parser of what run tables have in common."""
    parser = dia_lib.make_parser(description, usage=None)
    dia_lib.shared_flags(parser, data="pneumoniamnist")
    parser.add_argument("--seeds", type=dia_lib.number(low=0), nargs="+", default=[0, 1, 2],
                        help="(default: 0 1 2)")
    parser.add_argument("--steps", default="full", type=steps_type, help="of both stages: full, the paper's; "
                        "quick, those of --quick; or a number (default: full)")
    parser.add_argument("--batch-size", type=dia_lib.number(), help="images a step (default: the stages')")
    parser.add_argument("--kept", type=dia_lib.number(), default=20,
                        help="checkpoints of stage 2 that are tested (default: 20)")
    parser.add_argument("--launch", choices=["eager", "compile", "graph", "both"],
                        help="as train_dia.py --help has it")
    parser.add_argument("--out", default="runs/paper", help="where runs are kept (default: runs/paper)")
    return parser


def main():
    parser = run_flags(__doc__)
    parser.add_argument("table", nargs="?", choices=TABLES, help="whose runs to make (default: none)")
    parser.add_argument("--lines", nargs="+", choices=LINES, metavar="LINE",
                        help="these lines alone (default: all of the table)")
    args = parser.parse_args()
    lines, steps = TABLES.get(args.table, []), None
    if set(args.lines or []) - set(lines):
        parser.error("--lines: name a table before it, and lines of that table" + ": " * bool(lines)
                     + ", ".join(map(repr, lines)))
    lines = args.lines or lines
    if lines:
        steps, _, defaults = steps_of(args)
        size, (low, high) = defaults["image_size"], defaults["t_range"]
        if args.steps == "quick":
            size = min(size, train_dia.QUICK["image_size"])
        too_large = {f"DIA, dissolved at {n} px" for n in (64, 128) if n > size}
        if size <= 32:
            too_large.add("resize")
        own = [f"t {low}-{high}", defaults["shift"]]                        # DIA and CSI have them
        for line in too_large & set(lines):
            print(f"{line}: nothing to measure on images of {size} px")
        lines = [line for line in lines if line not in too_large]
        lines = [line.split(", ")[0] if line.split(", ")[-1] in own else line for line in lines]
    make_all(args, {line: LINES[line] for line in lines}, steps)


def make_all(args, lines, steps, around=lambda line: nullcontext()):
    """`make` for all seeds and lines; what can't be made is told at the end, when the tables are written.

    lines: {name: flags of both stages}.  steps: of stage 2.  around: the context in which a line's trains.
    """
    dia_lib.launches(args.launch, 1, dia_lib.pick_device(args.device))      # exits now if it can't be
    if (table := read(TABLE)) and list(table[0]) != COLUMNS:
        raise SystemExit(f"{TABLE} is of another version, with other columns. Move it and {SCORES.name} "
                         "away, or take those of this version.")
    failed = []
    for seed in args.seeds:
        for line, flags in lines.items():
            try:
                make(args, line, seed, flags, steps, around(line))
            except (SystemExit, torch.OutOfMemoryError) as stop:
                failed.append(f"{line}, seed {seed}: {stop}")
                print(failed[-1], flush=True)
    write()
    if failed:
        raise SystemExit("not made: " + "; ".join(failed))


if __name__ == "__main__":
    dia_lib.run(main, "the same command goes on where it was")
