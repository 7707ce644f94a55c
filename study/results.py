"""The study's tables, from the csv files in this folder alone: no number in them is typed by hand.

    python -m study.results                     # rewrites the tables
    python -m study.results runs/elpv ...       # first adds runs that evaluate.py has scored

What stands between `<!-- study: NAME -->` and `<!-- end -->` in README.md here, and in the front page, is
replaced. Runs are grouped by their settings, stage 1's aside. A run's figure by `local` is what `python -m
extras.predict RUN --test` found, those on synthetic defects are of `python -m extras.choose RUN`; either may
be missing.
"""

import csv
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

import dia_lib
import train_dia
from evaluate import within_groups
from extras.tables import insert, markdown, mean_minutes, processor, put, spread

HERE = Path(__file__).parent
SCORES = ("csi", "cos", "local")
VALIDATION = {"csi": "val_auroc", "cos": "val_cos", "local": "val_local"}           # in rows of extras.choose
MODES = ["diffusion", "residual", "gaussian", "median", "resize", "copy", "none"]   # residual: old rows alone
NAMES = {"diffusion": "DIA (`diffusion`)", "none": "CSI (`none`)", "none, as long": "CSI for as many seconds"}
TABLED = [*MODES, "none, as long"]       # the lines of a table
PAIRS = [("diffusion", "none"), ("diffusion", "none, as long"), ("diffusion", "resize"),
         ("diffusion", "copy"), ("resize", "none"), ("residual", "none"), ("residual", "copy"),
         ("copy", "none"), ("gaussian", "none"), ("median", "none"), ("gaussian", "diffusion"),
         ("median", "diffusion")]
USUAL = {"image_size=64", "batch_size=16", "crop_min=0.3", "optimizer=adamw"}       # what most runs have
SHOWN, LONGER = "400 steps, twin_weight=1000.0", "2000 steps"                   # the two main settings
SUMMARY = {"400 steps, weight 1,000": SHOWN,
           "the same, nothing resized": "400 steps, dissolve_size=64, twin_weight=1000.0",
           "the same, 96 px": "400 steps, image_size=96, twin_weight=1000.0", "2,000 steps, weight 1": LONGER}
QUICK = "400 steps, draws=2"            # --quick as it is now
SETS = {"elpv": "ELPV, solar cells", "pneumoniamnist": "PneumoniaMNIST, chest X-rays"}
FRONT = {"diffusion": "DIA: dissolved", "none": "CSI: no third view", "resize": "only resized, no diffusion",
         "copy": "an ordinary third view"}
ABSENT = {("resize", "pneumoniamnist"): "nothing to resize at 28 px"}
PAPER = {"diffusion": "0.903", "none": "0.834"}             # DIA, arXiv:2302.14696, Table 1, PneumoniaMNIST
AS_LONG = {SHOWN: "620 steps"}          # CSI with as many seconds as DIA at that setting, not as many steps
USED_BY = {"twins": {*MODES} - {"none"}, "twin_weight": {*MODES} - {"none"}, "gain": {"residual"},
           "dissolve_size": {*MODES} - {"none", "copy"},
           "t_range": {"diffusion", "residual"}}                        # flags that do nothing in other modes
APART = {"data", "seed", "dissolve", "diffusion", "save_every"}         # in other columns, or without effect
SEEDS = range(10)                       # for reporting; choices are made with others
csv.field_size_limit(2 ** 31 - 1)       # a row of results-scores.csv has the scores of all test images

# ---- Adding runs -----------------------------------------------------------------------------------------


def code_version():
    """The commit this code is at, with a + if *.py files differ from it; "" where that can't be told."""
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parents[1]), *words], capture_output=True,
                              text=True, timeout=10, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=7", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def run_key(settings, step):
    """What tells a run from others in a table: data, dissolve, settings other than the paper's, seed, steps.

    settings: those in its dia.pt; step: that of its weights.
    """
    s, mode = settings, settings["dissolve"]
    paper = train_dia.arguments(["--out", os.devnull])[0].given             # where no run can be
    idle = APART | {flag for flag, modes in USED_BY.items() if mode not in modes}
    words = {k: v for k, v in s["given"].items() if v != paper[k] and k not in idle}
    words["steps"] = s["steps"]
    if mode in USED_BY["dissolve_size"] and s["dissolve_size"] != 32:
        words["dissolve_size"] = s["dissolve_size"]
    # Since commit ff45be6 other normals are held out and random numbers are drawn in another order: this word
    # keeps this version's runs apart from older ones, whatever their settings.
    words["draws"] = 2
    if mode == "diffusion":
        words |= {f"stage1_{k}": v for k, v in s["stage1"].items()      # what stages share is not said twice
                  if k not in ("holdout", "normal_class") and (k, v) != ("seed", s["seed"])}
    text = " ".join(f"{k}={'-'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in words.items())
    return {"data": dia_lib.data_name(s["data"]), "dissolve": mode, "settings": text, "seed": s["seed"],
            "steps": step}


def read_log(out, step):
    """Minutes of stage 2 up to a step, and what extras.choose found at it, {} where it wasn't asked."""
    folders = [out.parent, out] if out.name == f"step-{step}" else [out]    # --save-every's: the log is above
    rows = [json.loads(line) for path in (folder / "log.jsonl" for folder in folders) if path.is_file()
            for line in path.read_text().splitlines()]
    seconds = [r["seconds"] for r in rows if r["stage"] == "dia" and r["step"] <= step and "seconds" in r]
    chosen = [r for r in rows if r["stage"] == "choose" and r["step"] == step]
    return seconds[-1] / 60 if seconds else None, chosen[-1] if chosen else {}


def add(out, chip):
    """Add a run that evaluate.py has scored to both tables, in place of its rows where it is there already.

    out: its folder, or a step-N of --save-every; chip: the processor it was trained on. A row a score, and
    one for each floor. Exits where the run's files are missing or do not belong together.
    """
    for name in ("metrics.json", "scores.csv"):
        if not (out / name).is_file():
            raise SystemExit(f"{out} has no {name}: run evaluate.py --out {out} first.")
    metrics = json.loads((out / "metrics.json").read_text())
    s, step = metrics["settings"], metrics.get("step")
    if metrics.get("score") != "csi" or s.get("format") != 2:
        raise SystemExit(f"{out}/metrics.json is not of this version of evaluate.py: score the run again.")
    with open(out / "scores.csv", newline="") as file:
        images = list(csv.DictReader(file))
    labels, groups = np.array([int(i["label"]) for i in images]), [i["group"] for i in images]
    minutes, chosen = read_log(out, step)
    key, rows, each = run_key(s, step), [], []
    blank = dict.fromkeys([*key, "score", "minutes", "val_auroc", "auroc", "ap", "within_group_auroc",
                           "commit", "processor"])                          # the columns of results.csv
    mine = {**blank, **key, "minutes": minutes, "commit": code_version(), "processor": chip}

    for score, column in (("csi", "score"), ("cos", "cos")):
        values = np.array([float(i[column]) for i in images])
        within = within_groups(labels, values, groups).values()
        rows.append({**mine, "score": score, "val_auroc": chosen.get(VALIDATION[score]),
                     "auroc": roc_auc_score(labels, values), "ap": average_precision_score(labels, values),
                     "within_group_auroc": statistics.fmean(within) if within else None})
        each.append({**key, "score": score, "values": " ".join(f"{v:.7g}" for v in values)})
    if (out / "decisions.json").is_file():
        found = json.loads((out / "decisions.json").read_text())
        if abs(found["csi"]["auroc"] - rows[0]["auroc"]) > 1e-3:
            raise SystemExit(f"{out}/decisions.json is of other weights, or --passes, than scores.csv: run "
                             f"python -m extras.predict {out} --test --passes {metrics['passes']} again.")
        rows.append({**mine, "score": "local", "val_auroc": chosen.get(VALIDATION["local"]),
                     "auroc": found["local"]["auroc"]})
    for name, auroc in metrics["floors_auroc"].items():
        seeded = {"seed": s["seed"], "score": "csi"} if "untrained" in name else {}
        rows.append({**blank, "data": key["data"], "dissolve": f"floor: {name}", "steps": 0, "auroc": auroc,
                     "settings": f"image_size={s['image_size']} holdout={s['holdout']} draws=2", **seeded})
    each.insert(0, {**dict.fromkeys(each[0], ""), "data": key["data"], "score": "labels",
                    "values": " ".join(map(str, labels))})

    table = HERE / "results-scores.csv"
    known = read_scores(table, key["data"]).get("labels", labels) if table.exists() else labels
    if not np.array_equal(known, labels):
        raise SystemExit(f"{out} was scored on other test images than the runs on {key['data']} in {table}.")
    insert(HERE / "results.csv", [{k: "" if v is None else f"{v:.4f}" if isinstance(v, float) else v
                                   for k, v in row.items()} for row in rows], [*key, "score"])
    insert(table, each, [*key, "score"])


# ---- Reading them ----------------------------------------------------------------------------------------


def describe(settings):
    """A row's settings for people: without what is USUAL and stage 1's; "400 steps, tau=0.2"."""
    words = settings.split()
    found = dict(word.split("=") for word in words)
    other = [w for w in words if w not in USUAL and not w.startswith(("steps=", "stage1_"))]
    if "draws" not in found:                    # later runs always have the paper's optimizer and crops
        other += [f"{w.split('=')[0]} the paper's" for w in sorted(USUAL) if w.split("=")[0] not in found]
    return ", ".join([f"{found['steps']} steps", *other])


def as_run(setting, mode):
    """The setting of a mode's runs where others have `setting`: without the flags that do nothing in it."""
    if mode == "none, as long":
        return AS_LONG.get(setting, "")
    idle = "|".join(flag for flag, modes in USED_BY.items() if mode not in modes)
    return re.sub(f", ({idle})=[^,]*", "", setting) if idle else setting


def is_last(row):
    """True for a run's last step, False for one kept on the way."""
    return f"steps={row['steps']}" in row["settings"].split()


def is_tested(row):
    """True for a reporting run with a test AUROC, at its last step or on the way."""
    return row["seed"] in SEEDS and row["auroc"] is not None


def read(path, data="elpv"):
    """The rows of results.csv on one data set but floors, with setting and last; figures float or None."""
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["data"] == data and "floor" not in r["dissolve"]]
    for row in rows:
        row["setting"] = describe(row["settings"])
        row["last"] = is_last(row)
        row |= {k: int(row[k]) for k in ("seed", "steps")}
        row |= {k: float(row[k]) if row[k] else None
                for k in ("minutes", "val_auroc", "auroc", "within_group_auroc")}
    return rows


def floors(path, data="elpv"):
    """{(floor, images): [AUROC of each seed that has it]} in results.csv, sorted."""
    found = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            mine = row["data"] == data and row["seed"] in ("", *map(str, SEEDS))
            if mine and row["dissolve"].startswith("floor: "):
                by = f", `{row['score']}`" if row["score"] else ""
                name = row["dissolve"].removeprefix("floor: ") + by
                words = dict(word.split("=") for word in row["settings"].split())
                size = f"{words['image_size']} px" + (f", draws={words['draws']}" if "draws" in words else "")
                found.setdefault((name, size), []).append(float(row["auroc"]))
    return dict(sorted(found.items()))


def key_of(row):
    """What tells a run and score from others in both tables."""
    return row["data"], row["dissolve"], row["settings"], int(row["seed"]), int(row["steps"]), row["score"]


def read_scores(path, data="elpv"):
    """results-scores.csv on one data set as {key_of a row: (Q,) array}, and {"labels": (Q,)}."""
    with open(path, newline="") as file:
        return {"labels" if r["score"] == "labels" else key_of(r): np.array(r["values"].split(), float)
                for r in csv.DictReader(file) if r["data"] == data}


def read_probes(path, setting, data="elpv"):
    """The rows of probe.csv on one data set, of the reporting seeds, at one setting."""
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["data"] == data and is_last(r)]
    return [r for r in rows if int(r["seed"]) in SEEDS
            and describe(r["settings"]) == as_run(setting, r["dissolve"])]


def tested(rows, mode, setting, score):
    """The reporting runs' rows of a mode and setting with a test AUROC, at the last step or on the way."""
    wanted = mode.split(",")[0], as_run(setting, mode), score
    return [r for r in rows if (r["dissolve"], r["setting"], r["score"]) == wanted and is_tested(r)]


def of(rows, mode, setting, score):
    """{seed: row} of the reporting runs of a mode and setting that were tested at their last step."""
    found = [r for r in tested(rows, mode, setting, score) if r["last"]]
    if len({r["seed"] for r in found}) < len(found):
        raise SystemExit(f"results.csv: several runs of {mode}, {setting}, with the same seed: they differ "
                         "in stage 1.")
    return {r["seed"]: r for r in found}


def settings_tested(rows):
    """Settings with a reporting run, fewest steps first; not those whose runs all stand in other tables."""
    ran = {(r["dissolve"], r["setting"]) for r in rows if r["last"] and is_tested(r)}
    beside = {(mode.split(",")[0], as_run(s, mode)) for _, s in ran for mode in TABLED
              if as_run(s, mode) != s}
    return sorted({s for _, s in ran - beside}, key=lambda s: (int(s.split()[0]), s))


# ---- Tables ----------------------------------------------------------------------------------------------


def scored_by(rows, setting):
    """Those of SCORES by which a setting has runs."""
    return [s for s in SCORES if any(of(rows, mode, setting, s) for mode in TABLED)]


def contrast(rows, setting):
    """The table of one setting: a line a mode; by each score the mean over seeds, and each seed's AUROC."""
    table, scores = [], scored_by(rows, setting)
    for mode in TABLED:
        runs = [of(rows, mode, setting, score) for score in scores]
        if any(runs):
            each = [", ".join(f"{by[s]['auroc']:.3f}" for s in sorted(by)) for by in runs]
            means = [spread(r["auroc"] for r in by.values()) for by in runs]
            table.append([NAMES.get(mode, f"`{mode}`"), ", ".join(map(str, sorted(runs[0]))),
                          *(m and f"**{m}** ({values})" for m, values in zip(means, each, strict=True)),
                          mean_minutes((r["minutes"], r["processor"]) for r in runs[0].values())])
    return markdown(["third view", "seeds", *(f"AUROC by `{score}`" for score in scores), "minutes"], table)


def summary(rows):
    """The table of the settings of SUMMARY: a line for each and each score, a column a mode, mean AUROCs."""
    modes = [m for m in MODES if any(of(rows, m, s, SCORES[0]) for s in SUMMARY.values())]
    lines = [[name, f"`{score}`", *(spread(r["auroc"] for r in of(rows, m, s, score).values()) or "not run"
                                    for m in modes)] for name, s in SUMMARY.items() for score in SCORES]
    return markdown(["setting", "score", *(NAMES.get(m, f"`{m}`") for m in modes)], lines)


def paired_bootstrap(labels, first, second, resamples=2000, seed=0):
    """Difference of mean AUROC, first - second, and its 95% interval over test images and seeds, paired.

    labels: (Q,) 0 or 1; first, second: (S, Q) scores of S runs each, of the same seeds in the same order.
    Images are drawn anew within each label, and seeds among the S, the same for both sides; the interval is
    between percentiles. Returns (difference, low, high).
    """
    labels, rng = np.asarray(labels), np.random.default_rng(seed)

    def wins(scores):                       # (anomalies, normals): 1 where ranked right, 1/2 where tied
        a, n = scores[labels == 1][:, None], scores[labels == 0][None]
        return (a > n) + 0.5 * (a == n)

    gaps = [wins(np.asarray(a)) - wins(np.asarray(b)) for a, b in zip(first, second, strict=True)]
    A, N = gaps[0].shape
    wa = rng.multinomial(A, np.full(A, 1 / A), resamples) / A                               # (resamples, A)
    wn = rng.multinomial(N, np.full(N, 1 / N), resamples) / N
    each = np.stack([((wa @ gap) * wn).sum(1) for gap in gaps], 1)                          # (resamples, S)
    ws = rng.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), resamples) / len(gaps)
    low, high = np.quantile((each * ws).sum(1), [0.025, 0.975])
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def comparisons(rows, scores, setting):
    """The paired differences of PAIRS at one setting, by each score, over seeds with scores on both sides."""
    table, names = [], scored_by(rows, setting)
    for first, second in PAIRS:
        cells, paired = [], []
        for score in names:
            a, b = ({seed: scores[key_of(row)] for seed, row in of(rows, mode, setting, score).items()
                     if key_of(row) in scores} for mode in (first, second))     # `local` may have none
            cells.append("")
            if seeds := sorted(set(a) & set(b)):
                sides = ([side[seed] for seed in seeds] for side in (a, b))
                gap, low, high = paired_bootstrap(scores["labels"], *sides)
                cells[-1], paired = f"{gap:+.3f} ({low:+.3f} to {high:+.3f})", seeds
        if paired:
            seeds = ", ".join(map(str, paired)) + (" (images only)" if len(paired) == 1 else "")
            table.append([f"{first} - {second}", seeds, *cells])
    return markdown(["difference of AUROC, 95% interval", "seeds", *(f"`{s}`" for s in names)], table)


def search(rows):
    """val_auroc, by each score, of every setting tried with other seeds than the reporting ones, by mode."""
    found = {}
    for r in rows:
        if r["last"] and r["seed"] not in SEEDS and r["val_auroc"] is not None:
            by = found.setdefault(r["setting"], {}).setdefault(r["dissolve"], {s: [] for s in SCORES})
            by[r["score"]].append(r["val_auroc"])
    modes = [m for m in MODES if any(m in by for by in found.values())]
    return markdown([" / ".join(f"`{s}`" for s in SCORES), *(f"`{m}`" for m in modes)],
                    [[name, *(" / ".join(spread(by[m][s]) for s in SCORES) if m in by else "" for m in modes)]
                     for name, by in found.items()])


def similarities(probes):
    """Mean cosine of a held-out normal to its altered selves, by the mode its encoder was trained with."""
    kinds = [k for k in probes[0] if k.startswith("sim_")]
    lines = [[NAMES.get(m, f"`{m}`"), ", ".join(sorted(r["seed"] for r in runs)),
              *(f"{statistics.fmean(float(r[k]) for r in runs):.2f}" for k in kinds)]
             for m in MODES if (runs := [r for r in probes if r["dissolve"] == m])]
    return markdown(["trained with", "seeds", *(k.removeprefix("sim_") for k in kinds)], lines)


def tried():
    """What was tried for --quick, from quick.csv: AUROCs by csi of held-out normals, a line a setting."""
    found = {}
    with open(HERE / "quick.csv", newline="") as file:
        for row in csv.DictReader(file):
            name = "{steps} steps of {batch_size}, {optimizer}, crops from {crop_min}".format(**row)
            for data in SETS:
                if row["data"] == data:
                    found.setdefault((row["dissolve"], name), {}).setdefault(data, []).append(row)

    def means(rows, *names):
        return " / ".join(f"{statistics.fmean(float(r[name]) for r in rows):.3f}" for name in names)

    kinds = ("auroc", "line", "patch", "haze")
    table = [[NAMES[mode], name, *(means(by[data], *kinds) if data in by else "" for data in SETS),
              means(by["pneumoniamnist"], "real") if "pneumoniamnist" in by else "",
              ", ".join(str(len(by.get(data, []))) for data in SETS)] for (mode, name), by in found.items()]
    header = [f"{name.split(',')[0]}: mean / {' / '.join(kinds[1:])}" for name in SETS.values()]
    return markdown(["third view", "setting", *header, "PneumoniaMNIST's val anomalies", "seeds"], table)


def front():
    """The front page's table: AUROC by csi of --quick on SETS, a line a third view, and the best floor."""
    each = {data: read(HERE / "results.csv", data) for data in SETS}
    table = [[name, *(spread(r["auroc"] for r in of(rows, mode, QUICK, "csi").values())
                      or ABSENT.get((mode, data), "not run") for data, rows in each.items()),
              PAPER.get(mode, "")] for mode, name in FRONT.items()]
    highest = []
    for data in SETS:
        known = {name: statistics.fmean(values) for (name, size), values
                 in floors(HERE / "results.csv", data).items() if "draws=2" in size}
        name = max(known, key=known.get, default="")
        highest.append(f"{known[name]:.3f}, {name.split(',')[0]}" if known else "not run")
    table.append(["the highest floor", *highest, ""])
    paper = "the paper: full budget, best test epoch"
    return markdown(["third view", *SETS.values(), f"PneumoniaMNIST in {paper}"], table)


def page():
    """README.md with its tables as the csv files have them."""
    table, blocks = HERE / "results.csv", []
    each = {data: (read(table, data), read_scores(HERE / "results-scores.csv", data)) for data in SETS}
    for data, name in SETS.items():
        rows, scores = each[data]
        new = [r for r in rows if "draws=2" in r["setting"]]
        blocks += [f"**{name}, {s.removesuffix(', draws=2')}**\n\n{contrast(new, s)}\n\n"
                   f"{comparisons(new, scores, s)}" for s in settings_tested(new)]
        blocks.append(markdown([f"floor, {name}", "seeds", "AUROC"], [
            [floor, str(len(values)), spread(values)] for (floor, size), values
            in floors(table, data).items() if "draws=2" in size]))
    text = put((HERE / "README.md").read_text(), "quick", "\n\n".join(blocks))
    text = put(text, "tried", tried())

    rows, scores = each["elpv"]
    tables = [f"**{s}**\n\n{contrast(rows, s)}\n\n{comparisons(rows, scores, s)}" for s in (LONGER, SHOWN)]
    tables.append(markdown(["floor", "images", "seeds", "AUROC"], [
        [*name, str(len(values)), spread(values)]
        for name, values in floors(table).items() if "draws=2" not in name[1]]))
    text = put(text, "summary", summary(rows))
    text = put(text, "contrast", "\n\n".join(tables))
    text = put(text, "probe", similarities(read_probes(HERE / "probe.csv", LONGER)))
    return put(text, "search", search(rows))


def main():
    parser = dia_lib.make_parser(__doc__, usage=None)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs to add, or step-N of "
                        "--save-every; a run that is there already is replaced")
    parser.add_argument("--device", default="auto", help="where they were trained (default: auto)")
    args = parser.parse_args()
    chip = processor(dia_lib.pick_device(args.device))
    for out in args.runs:
        add(Path(out), chip)
        print(f"added {out}")
    (HERE / "README.md").write_text(page())
    (HERE.parent / "README.md").write_text(put((HERE.parent / "README.md").read_text(), "front", front()))
    print(f"wrote the tables in {HERE / 'README.md'}, and the one of the front page")


if __name__ == "__main__":
    dia_lib.run(main, "nothing that was written before is lost")
