"""The tables of this folder's page and of the front page, from results.csv and results-scores.csv."""

import csv
import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ttest_1samp
from torch.utils.flop_counter import FlopCounterMode

import dia_lib
from extras.tables import markdown, put, spread

HERE = Path(__file__).parent
TABLE, SCORES = HERE / "results.csv", HERE / "results-scores.csv"
KEY = ["data", "budget", "line", "seed"]
COLUMNS = [*KEY, "auroc", "test_best", "test_last", "kept", "steps", "made_defects", "val_anomalies",
           "change", "stage1", "seconds_1", "seconds_2", "commit", "processor"]
SETS = {"elpv": "ELPV", "pneumoniamnist": "PneumoniaMNIST", "sarscov2": "SARS-CoV-2",
        "chest_xray_224": "chest X-rays"}
PAPER = {                       # arXiv:2302.14696, Tables 1 to 5: mean AUROC
    **{(data, "DIA"): auroc for data, auroc in {
        "pneumoniamnist": 0.903, "sarscov2": 0.851, "kvasir": 0.860, "aptos2019": 0.934}.items()},
    **{(data, "CSI"): auroc for data, auroc in {
        "pneumoniamnist": 0.834, "sarscov2": 0.785, "kvasir": 0.609, "aptos2019": 0.927}.items()},
    **{("sarscov2", f"DIA, {line}"): auroc for line, auroc in {
        "t 130-230": 0.827, "t 230-330": 0.790, "t 330-430": 0.815, "t 430-530": 0.803, "perm": 0.841,
        "dissolved at 64 px": 0.803, "dissolved at 128 px": 0.807}.items()},
    ("pneumoniamnist", "DIA, a tenth of stage 1's images"): 0.745,
}
PAIRS = [("DIA", "copy"), ("DIA", "CSI"), ("copy", "CSI"), ("CSI, contrast x 2/3", "CSI"),
         ("DIA", "CSI, as long as DIA"), ("gaussian", "DIA"), ("gaussian, as strong as DIA", "DIA"),
         ("DIA", "resize"), ("resize", "CSI"), ("DIA, rotate", "CSI, rotate"), ("DIA, perm", "CSI, perm")]
FRONT = [("elpv", "`--quick`"), ("pneumoniamnist", "`--quick`")]            # columns on the front page
FRONT_LINES = {"DIA": "DIA: dissolved", "CSI": "CSI: no third view", "copy": "`copy`: an ordinary third view"}
csv.field_size_limit(2 ** 31 - 1)               # a row of results-scores.csv has all test images' scores


def read(path):
    """The rows of a csv table, [] where there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def runs_of(rows, data, budget, line):
    """{seed: row} of a line's runs."""
    return {int(r["seed"]): r for r in rows if (r["data"], r["budget"], r["line"]) == (data, budget, line)}


def figures(runs, name):
    """The values of a column in runs, in order of their seeds; [] where a run lacks it."""
    values = [runs[seed][name] for seed in sorted(runs)]
    return [float(v) for v in values] if all(values) else []


def lines_of(rows, data, budget):
    """The names of lines that have runs at one set and budget, in the order of the table."""
    names = dict.fromkeys(r["line"] for r in rows if (r["data"], r["budget"]) == (data, budget))
    return [name for name in names if not name.startswith("floor: ")]


def minutes_of(runs):
    """Mean minutes of training, both stages, on each processor: "42.6 (AMD EPYC, 1 thread, bfloat16)"."""
    each = {}
    for row in runs.values():
        name = row["processor"] + ("" if row["seconds_1"] else "; stage 2 alone")
        each.setdefault(name, []).append((float(row["seconds_1"] or 0) + float(row["seconds_2"])) / 60)
    return ", ".join(f"{statistics.fmean(minutes):.1f} ({name})" for name, minutes in sorted(each.items()))


def results(rows, data, budget):
    """The table of one set and budget: a line for each method with its seeds put together."""
    table = []
    for line in lines_of(rows, data, budget):
        runs = runs_of(rows, data, budget, line)
        aurocs, published = figures(runs, "auroc"), PAPER.get((data, line))
        longer = f" ({', '.join(runs[s]['steps'] for s in sorted(runs))} steps)" if "as long" in line else ""
        table.append({
            "": line + longer, "seeds": ", ".join(map(str, sorted(runs))),
            "AUROC at the last step": f"**{spread(aurocs)}** ({', '.join(f'{v:.3f}' for v in aurocs)})",
            "paper": f"{published:.3f}" if published else "",
            "two passes: last": spread(figures(runs, "test_last")),
            "best by test": spread(figures(runs, "test_best")),
            "of": ", ".join(sorted({r["kept"] for r in runs.values()})) if figures(runs, "test_best") else "",
            "made defects": spread(figures(runs, "made_defects")),
            "val anomalies": spread(figures(runs, "val_anomalies")),
            "change": spread(figures(runs, "change")), "minutes": minutes_of(runs),
            "commit": ", ".join(sorted({r["commit"] for r in runs.values()}))})
    header = [k for k in table[0] if any(line[k] for line in table)]
    return markdown(header, [[line[k] for k in header] for line in table])


def paired_bootstrap(labels, first, second, resamples=2000, seed=0):
    """95% interval of a difference of mean AUROC, first - second, over test images and seeds, paired.

    labels: (Q,) 0 or 1; first, second: (S, Q) scores of S runs each, of the same seeds in the same order.
    Images are drawn anew within each label, and seeds among the S, the same for both sides; the interval is
    between percentiles. Returns (low, high).
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
    return tuple(np.quantile((each * ws).sum(1), [0.025, 0.975]).tolist())


def gaps_of(rows, data, budget, first, second):
    """Differences of AUROC, first - second, of the seeds that both have: {seed: gap}, and a 95% t interval.

    The interval is None of fewer than two seeds.
    """
    a, b = (runs_of(rows, data, budget, line) for line in (first, second))
    gaps = {seed: float(a[seed]["auroc"]) - float(b[seed]["auroc"]) for seed in sorted(set(a) & set(b))}
    return gaps, ttest_1samp(list(gaps.values()), 0).confidence_interval() if len(gaps) > 1 else None


def between(interval):
    """"-0.048 to +0.023"; "" of None."""
    return "{:+.3f} to {:+.3f}".format(*interval) if interval else ""


def differences(rows, scores, data, budget):
    """Differences of AUROC, paired by seeds, at one set and budget, each with two intervals; "" without any.

    They are those of PAIRS, and of every variant of DIA against DIA.
    """
    table = []
    variants = [(line, "DIA") for line in lines_of(rows, data, budget) if line.startswith("DIA, ")]
    for first, second in PAIRS + variants:
        gaps, by_t = gaps_of(rows, data, budget, first, second)
        if gaps:
            sides = [[scores[data, budget, line, str(s)] for s in gaps] for line in (first, second)]
            drawn = by_t and paired_bootstrap(scores[data, "", "", ""], *sides)
            table.append([f"({first}) - ({second})", ", ".join(map(str, gaps)),
                          f"{statistics.fmean(gaps.values()):+.3f}", between(by_t), between(drawn)])
    header = ["difference", "seeds", "mean", "95%, t over seeds", "95%, bootstrap of seeds and images"]
    return markdown(header, table) if table else ""


def floors(rows, data, budget):
    """{floor: its AUROCs} of one set and budget. The untrained encoder has one for each seed, others one."""
    found = {}
    for row in rows:
        if (row["data"], row["budget"]) == (data, budget) and row["line"].startswith("floor: "):
            found.setdefault(row["line"].removeprefix("floor: "), []).append(float(row["auroc"]))
    return {floor: values if len(set(values)) > 1 else values[:1] for floor, values in found.items()}


def memorised(rows, data, budget):
    """A sentence: how much dissolving changes training and held-out images, after steps of stage 1."""
    found = {}
    for row in runs_of(rows, data, budget, "DIA").values():
        for report in filter(None, row["stage1"].split("; ")):
            step, *values = report.split()
            found.setdefault(int(step), []).append([float(v) for v in values])
    each = (f"{step:,} steps {statistics.fmean(v[0] for v in values):.2f} and "
            f"{statistics.fmean(v[1] for v in values):.2f}" for step, values in sorted(found.items()))
    return ("Stage 1's own log has other t, and the black border of small images. By it training and "
            f"held-out images change by (grey levels): {'; '.join(each)}." if found else "")


def table6():
    """Parameters and multiply-adds of both networks for one RGB image, all layers counted."""
    def macs(module, *inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops() / 2e9

    unet, encoder = dia_lib.UNet(3), dia_lib.Encoder(3)
    table = [[f"UNet, {size} px", unet, macs(unet, torch.rand(1, 3, size, size), torch.zeros(1).long())]
             for size in (32, 64, 128)]
    table.append(["encoder, 224 px", encoder, macs(encoder, torch.rand(1, 3, 224, 224))])
    return markdown(["network", "parameters, M", "multiply-adds of an image, G"], [
        [name, f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}", f"{count:.2f}"]
        for name, net, count in table])


def tables():
    """All runs in Markdown, a section for each set and budget."""
    rows, blocks = read(TABLE), []
    scores = {tuple(r[k] for k in KEY): np.array(r["values"].split(), float) for r in read(SCORES)}
    for data in dict.fromkeys(r["data"] for r in rows):
        name = SETS.get(data, data)
        for budget in dict.fromkeys(r["budget"] for r in rows if r["data"] == data and lines_of(
                rows, data, r["budget"])):
            blocks += [f"**{name}, {budget}**", results(rows, data, budget),
                       differences(rows, scores, data, budget), memorised(rows, data, budget)]
            each = [f"{floor} {spread(values)}" for floor, values in floors(rows, data, budget).items()]
            blocks += [f"Floors: {'; '.join(each)}."] if each else []
    return "\n\n".join(filter(None, blocks))


def front():
    """The table of the front page: AUROC at the last step, a line a third view, a column a set and budget."""
    rows = read(TABLE)
    table = []
    for line, name in FRONT_LINES.items():
        cells = []
        for column in FRONT:
            runs, dia = runs_of(rows, *column, line), runs_of(rows, *column, "DIA")
            other = f" (seeds: {', '.join(map(str, sorted(runs)))})" if runs.keys() != dia.keys() else ""
            cells.append(spread(figures(runs, "auroc")) + other if runs else "not run")
        published = f"{PAPER['pneumoniamnist', line]:.3f}" if line in ("DIA", "CSI") else ""
        table.append([name, *cells, published])
    best = [max(floors(rows, *column).items(), key=lambda floor: statistics.fmean(floor[1]), default=None)
            for column in FRONT]
    table.append(["the highest floor", *(f"{spread(b[1])}, {b[0]}" if b else "not run" for b in best), ""])
    for second in ("CSI", "copy"):
        both = [gaps_of(rows, *column, "DIA", second) for column in FRONT]
        table.append([f"DIA - {second}, 95% interval", *(
            f"{statistics.fmean(gaps.values()):+.3f} ({between(interval) or 'one seed'})" if gaps else
            "not run" for gaps, interval in both), ""])
    return markdown(["third view", *(f"{SETS[data]}, {budget}" for data, budget in FRONT),
                     "PneumoniaMNIST in the paper"], table)


def write():
    """Write the tables of this folder's page and of the front page, as results.csv has them."""
    page = put((HERE / "README.md").read_text(), "runs", tables())
    (HERE / "README.md").write_text(put(page, "table6", table6()))
    path = HERE.parent / "README.md"
    path.write_text(put(path.read_text(), "front", front()))
    print(f"wrote the tables of {HERE / 'README.md'} and of {path}")
