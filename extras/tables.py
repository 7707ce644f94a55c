"""Helpers for tables of results: numbers as text, Markdown, csv tables, the name of the chip."""

import csv
import platform
import re
import statistics
from pathlib import Path

import torch

from dia_lib import whole


def processor(device):
    """Name of the chip that computes ("AMD EPYC 9B14", "NVIDIA L4"): what minutes are minutes of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"^model name\s*: *(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):                            # not Linux, or a chip that has no such line
        name = platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|\d+-Core|@.*", " ", name).split())


def markdown(header, rows):
    """A Markdown table of strings."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def spread(values):
    """"0.704 ± 0.018" of several values, "0.704" of one, "" of none; None does not count."""
    values = [v for v in values if v is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def put(text, name, table):
    """The text of a page with what stands between the markers of `name` replaced by the table."""
    pattern = re.compile(rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"A README.md has no block <!-- study: {name} --> ... <!-- end -->.")
    return pattern.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", text)


def insert(path, rows, key):
    """Write rows (dicts) into a csv table, at its end, or in place of those that agree in the columns `key`.

    What is empty in a new row stays as it was. Not for two processes at once. Exits if the columns differ.
    """
    columns, table = list(rows[0]), {}

    def add(row):
        same = tuple(row[k] for k in key)
        table[same] = {k: v or table.get(same, row)[k] for k, v in row.items()}

    if path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise SystemExit(f"{path} is another table: it has {reader.fieldnames}, not {columns}")
            for row in reader:
                add(row)
    for row in rows:
        add({k: str(v) for k, v in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *(r.values() for r in table.values())])
