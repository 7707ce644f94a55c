"""What the quirks of the paper's released code are worth: DIA with five of them, and with each alone.

    python -m study.as_released --steps 5000 --seeds 0 1 2              # PneumoniaMNIST
    python -m study.as_released --steps 5000 --quirks all input

The quirks stand in for functions that train_dia.py takes from dia_lib.py; no file of the core is changed, and
no line of the released code is used. What stays ours: stage 1, how images are scaled up, one flip of an image
for its four shifts, the evaluation. A sixth quirk, the epoch that is best on the test set, is a column of the
page's table, for every line.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m study.as_released, in the project's folder.")

from unittest.mock import patch

import torch

import dia_lib
import train_dia
from dia_lib import K, augment, batch_indices, draw_step, shift_views
from study.paper import make_all, run_flags, steps_of

QUIRKS = {
    "all": "the five below together",
    "input": "the UNet, trained on [-1, 1], is given [0, 1]; what it returns is not scaled either",
    "t": "t from 30 to 99, one for a whole batch and shift",
    "raw": "the UNet's weights after the last step in place of their average",
    "twins": "an image's own dissolved view of the same shift is not among its negatives",
    "draws": "from the second epoch on, each epoch repeats the draws of the second",
}

FLAGS = {"t": "--t-range 30 100", "twins": "--twins excluded"}              # quirks that stage 2 knows


def unscaled(*args):
    """`dissolve_view` without a scale: images in [0, 1] (B, C, h, h) -> (B, C, H, H), within [-1, 1]."""
    with patch.multiple(dia_lib, to_pm1=lambda x: x, to_01=lambda x: x):
        return dia_lib.dissolve_view(*args)


def by_shift(view):
    """A `dissolve_view` that dissolves K times, with one t each: (B, C, h, h) -> (K, B, C, H, H).

    Of the t that stage 2 has drawn for its images, K serve.
    """
    def views(small, H, mode, unet, t, abar, canvas=32):
        each = t[torch.linspace(0, len(t) - 1, K).long()]
        return torch.stack([view(small, H, mode, unet, tk.expand(len(small)), abar, canvas) for tk in each])

    return views


def make_views(views, shift, u, crop=(0.08, 1.0)):
    """dia_lib's, of a third view (K, B, C, H, W) that was dissolved for each shift apart."""
    third = [shift_views(part, shift).unflatten(0, (K, -1))[k] for k, part in enumerate(views[2])]
    return augment(torch.cat([*(shift_views(view, shift) for view in views[:2]), *third]), u, crop)


def raw_unet(state, device):
    """`load_unet`, of the weights that were not averaged."""
    return dia_lib.load_unet({**state, "ema": state["unet"]}, device)


def patched(names, epoch):
    """A context in which stage 2 has these quirks. epoch: the steps of one."""
    def repeated(step):
        return step if step < epoch else epoch + step % epoch

    view = unscaled if "input" in names else dia_lib.dissolve_view
    changes = {"dissolve_view": by_shift(view) if "t" in names else view}
    if "t" in names:
        changes["make_views"] = make_views
    if "raw" in names:
        changes["load_unet"] = raw_unet
    if "draws" in names:
        changes["draw_step"] = lambda seed, step, *sizes: draw_step(seed, repeated(step), *sizes)
        changes["batch_indices"] = lambda n, batch, seed, step: batch_indices(n, batch, seed, repeated(step))
    return patch.multiple(train_dia, **changes)


def main():
    parser = run_flags(__doc__)
    parser.add_argument("--quirks", nargs="+", choices=QUIRKS, default=list(QUIRKS), help="; ".join(
        f"{name}: {text}" for name, text in QUIRKS.items()) + " (default: each of them)")
    args = parser.parse_args()
    steps, epoch, _ = steps_of(args)
    names = {f"DIA, as released: {name}": set(QUIRKS) if name == "all" else {name} for name in args.quirks}
    flags = {line: " ".join(FLAGS[name] for name in FLAGS if name in names[line]) for line in names}
    make_all(args, {line: ("", flags[line]) for line in names}, steps,
             lambda line: patched(names[line], epoch))


if __name__ == "__main__":
    dia_lib.run(main, "the same command goes on where it was")
