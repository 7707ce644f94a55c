"""Where time and memory go. Run by hand on an idle machine; CI does not run it.

    python tests/benchmark.py                           # all sections but heldout, about half an hour on two cores
    python tests/benchmark.py stage2 --sizes 64         # one section
    python tests/benchmark.py heldout                   # train our UNet and theirs, compare held-out losses: a quarter of one

Each section prints a table. What is compared runs in turns, a step of one, a step of the other, each in a process of its
own; times are medians of --repeats steps after two of warm-up, memory is a process's peak. Sections stage1 and heldout need
`pip install denoising-diffusion-pytorch`.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dia_lib as lib           # noqa: E402
import train_dia                # noqa: E402
import train_diffusion          # noqa: E402

CPU = torch.device("cpu")
B, K = 32, lib.K


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def memory(field="VmHWM"):
    """Resident memory of this process in GB: VmHWM its peak; VmRSS now, RssAnon its own, RssFile mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1e6


def timed(f, repeats, warm=2):
    """Median seconds of f()."""
    seconds = []
    for _ in range(warm + repeats):
        begun = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[warm:])


def worker(pipe, build, args):
    """A side of a comparison, in its own process: makes a step, runs it when told to, answers with seconds and memory."""
    torch.manual_seed(0)
    step = build(*args)
    while pipe.recv():
        begun = time.perf_counter()
        part = step()
        pipe.send((time.perf_counter() - begun, part, memory()))


def in_turns(sides, repeats, warm=2):
    """{name: (build, args)} -> {name: (median seconds of a step, median of what step() returns, peak GB)}."""
    spawn, pipes, rows = multiprocessing.get_context("spawn"), {}, {name: [] for name in sides}
    for name, (build, args) in sides.items():
        pipes[name], end = spawn.Pipe()
        spawn.Process(target=worker, args=(end, build, args), daemon=True).start()
        end.close()                                                         # so that a worker that dies is noticed
    for _ in range(warm + repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            rows[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (statistics.median(r[0] for r in row[warm:]), statistics.median(r[1] or 0 for r in row[warm:]), row[-1][2])
            for name, row in rows.items()}


def chip():
    """One convolution that suits the chip, as a side in turns with the others: step() returns its TFLOP/s in bfloat16."""
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(384, 256, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    return lambda: 2e-12 * 384 * 16 * 9 * 256 ** 2 / timed(lambda: conv(x), 10)


def table(title, head, rows):
    print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row)} |")
    sys.stdout.flush()


def gmacs(module, *inputs):
    """Multiply-accumulates of one forward pass, in G."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2e9


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2
# ---------------------------------------------------------------------------------------------------------------------


def finish_step(encoder, optimizer, x, forward):
    """Forward, losses, backward, optimizer: the same on both sides."""
    z, logits = forward(x)
    labels = torch.arange(K).repeat_interleave(B).repeat(3)
    loss = lib.contrastive_loss(z) + F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def textbook_step(size):
    """The step as the released code has it: float32, contiguous, a UNet call for each shift, each shift augmented apart."""
    lib.has_bfloat16 = lambda device: False
    lib.Conv3x3.forward = nn.Conv2d.forward
    torch.channels_last = torch.contiguous_format                           # as if there were no other
    encoder, unet, abar = lib.Encoder(1), lib.UNet(1).requires_grad_(False), lib.alpha_bar()
    optimizer, images, g = train_dia.LARS(encoder.parameters(), 0.1), torch.rand(B, 1, size, size), torch.Generator()

    def step():
        rows, dissolving = [], 0.0
        for v in range(3):
            for k in range(K):
                x = torch.where(torch.rand(B, 1, 1, 1) < 0.5, images.flip(-1), images)
                if v == 2:
                    begun = time.perf_counter()
                    x = lib.dissolve_view(unet, x, torch.randint(30, 130, (1,)).expand(B), abar, 32, "diffusion")
                    dissolving += time.perf_counter() - begun
                x = x.roll((size // 2 * (k >= 2), size // 2 * (k % 2)), (-2, -1))
                rows.append(lib.augment(x, lib.draw_augment(B, (0.08, 1), g)))
        finish_step(encoder, optimizer, torch.cat(rows), encoder)
        return dissolving

    return step


def our_step(size, banked):
    """The step of train_dia.py, with fresh dissolving or from a bank of 16 versions of each of 1,012 images."""
    encoder = lib.Encoder(1).to(memory_format=torch.channels_last)
    unet = lib.UNet(1).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    abar, g = lib.alpha_bar(), torch.Generator()
    optimizer, images = train_dia.LARS(encoder.parameters(), 0.1), torch.randint(0, 256, (1012, 1, size, size), dtype=torch.uint8)
    bank = torch.randint(0, 256, (1012, 8, 2, 1, 32, 32), dtype=torch.uint8) if banked else None
    dissolving = [0.0]

    def third_view(x, flip):
        begun = time.perf_counter()
        y = train_dia.draw_from(bank, torch.randperm(1012)[:B], flip, g, CPU) if banked else None
        x = lib.dissolve_view(unet, x, torch.randint(30, 130, (B,)), abar, 32, "diffusion", y)
        dissolving[0] = time.perf_counter() - begun
        return x

    def forward(x):
        with lib.autocast(CPU):
            return encoder(x)

    def step():
        x = lib.to_float(images[torch.randperm(1012)[:B]], 1, CPU)
        finish_step(encoder, optimizer, lib.make_views(x, 3, "perm", (0.08, 1), g, third_view), forward)
        return dissolving[0]

    return step


def bank_making(size):
    """Four dissolved versions of each of 64 images."""
    unet = lib.UNet(1).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    images, abar = torch.randint(0, 256, (64, 1, size, size), dtype=torch.uint8), lib.alpha_bar()

    def step():
        with tempfile.TemporaryDirectory() as folder:
            train_dia.make_bank(Path(folder) / "bank", unet, images, 1, 4, (30, 130), abar, 32, 0, CPU)

    return step


def stage2(args):
    lib.Conv3x3.forward = nn.Conv2d.forward                                 # counted as what it stands for; timed elsewhere
    rows = []
    for size in args.sizes:
        sides = {"chip": (chip, ()), "textbook": (textbook_step, (size,)), "ours": (our_step, (size, False)),
                 "ours, bank": (our_step, (size, True))}
        result = in_turns(sides, args.repeats)
        ceiling = result["chip"][1]
        encoder = 3 * 3 * K * B * gmacs(lib.Encoder(1), torch.rand(1, 1, size, size))             # backward: twice forward
        unet = B * gmacs(lib.UNet(1), torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64))
        for name, calls in (("textbook", 4), ("ours", 1), ("ours, bank", 0)):
            seconds, dissolving, peak = result[name]
            tflop = 2e-3 * (encoder + calls * unet)
            rows.append([size, name, seconds, f"{result['textbook'][0] / seconds:.2f}", f"{dissolving:.3f}",
                         f"{100 * dissolving / seconds:.1f}%", tflop,
                         f"{100 * tflop / seconds / ceiling:.0f}% of {ceiling:.2f}", f"{peak:.2f}"])
    table(f"Stage 2: a step of {B} images x {K} shifts x 3 views, grey, UNet dim 64",
          ["px", "side", "seconds a step", "x textbook", "of it dissolving, s", "share", "TFLOP", "of the chip's TFLOP/s",
           "peak GB"], rows)
    made = in_turns({"": (bank_making, (args.sizes[0],))}, 3, 1)[""][0] / 256
    print(f"\nMaking a bank takes {1000 * made:.1f} ms a version; dissolving anew {1000 * result['ours'][1] / B:.1f} ms.")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1
# ---------------------------------------------------------------------------------------------------------------------


def make_unet(name):
    """"ours" or "theirs": dim 64, one channel."""
    if name == "ours":
        return lib.UNet(1)
    from denoising_diffusion_pytorch import Unet                           # not needed by the other sections
    return Unet(64, channels=1, dim_mults=(1, 2, 4, 8))


def stage1_step(name, bfloat16, channels_last, batch):
    unet = make_unet(name).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer, abar = torch.optim.Adam(unet.parameters(), 8e-5, fused=True), lib.alpha_bar()

    def step():
        x0, eps, t = torch.rand(batch, 1, 32, 32) * 2 - 1, torch.randn(batch, 1, 32, 32), torch.randint(0, 1000, (batch,))
        xt = lib.q_sample(x0, t, eps, abar)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            predicted = unet(xt.contiguous(memory_format=torch.channels_last) if channels_last else xt, t)
        optimizer.zero_grad()
        F.l1_loss(predicted.float(), eps).backward()
        optimizer.step()

    return step


def stage1(args):
    x, t = torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64)
    sizes = {n: (sum(p.numel() for p in make_unet(n).parameters()) / 1e6, gmacs(make_unet(n), x, t)) for n in ("ours", "theirs")}
    rows = []
    for batch in (16, 64):
        sides = {"chip": (chip, ()), "ours, bf16, channels_last": (stage1_step, ("ours", True, True, batch)),
                 "theirs, bf16, channels_last": (stage1_step, ("theirs", True, True, batch)),
                 "theirs, bf16": (stage1_step, ("theirs", True, False, batch)),
                 "theirs, float32": (stage1_step, ("theirs", False, False, batch))}
        result = in_turns(sides, args.repeats)
        ceiling = result.pop("chip")[1]
        for name, (seconds, _, peak) in result.items():
            size = sizes[name.split(",")[0]]
            rows.append([batch, name, f"{size[0]:.1f}", f"{size[1]:.3f}", seconds,
                         f"{seconds / result['ours, bf16, channels_last'][0]:.2f}",
                         f"{100 * 6e-3 * batch * size[1] / seconds / ceiling:.0f}% of {ceiling:.2f}", f"{peak:.2f}"])
    table("Stage 1: a step; theirs is denoising-diffusion-pytorch's Unet(64)",
          ["images", "side", "M parameters", "GMAC", "seconds a step", "x ours", "of the chip's TFLOP/s", "peak GB"], rows)


def heldout_run(pipe, name, out, steps, lr):
    train_diffusion.UNet = lambda channels, dim: make_unet(name)
    sys.argv = f"x --quick --device cpu --dim 64 --steps {steps} --lr {lr} --seed 10 --out {out}".split()
    train_diffusion.main()
    pipe.send(json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-2]))


def heldout(args):
    make_unet("theirs")                                                     # is it there?
    rows, spawn = [], multiprocessing.get_context("spawn")
    for name in ("ours", "theirs"):
        with tempfile.TemporaryDirectory() as folder:
            pipe, end = spawn.Pipe()
            process = spawn.Process(target=heldout_run, args=(end, name, f"{folder}/run", args.steps, args.lr))
            process.start()
            end.close()
            row = pipe.recv()
            process.join()
        rows.append([name, args.steps, args.lr, *(f"{v:.4f}" for k, v in row.items() if k.startswith("held_")), row["seconds"]])
    table("Stage 1: held-out L1 loss on ELPV, 16 images a step, seed 10",
          ["UNet", "steps", "lr", *(f"t {a}-{b - 1}" for a, b in train_diffusion.BINS), "seconds"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring, data, the chip
# ---------------------------------------------------------------------------------------------------------------------


def nearest(M, Q=1000):
    """Score Q images against M training images, all random; step() returns the memory in GB that this adds at its peak."""
    stats = {"axis": F.normalize(torch.randn(K, M, 128), dim=2), "w": torch.ones(K), "v": torch.ones(K)}
    z, logits = torch.randn(Q, K, 128), torch.rand(Q, K, K)

    def step():
        Path("/proc/self/clear_refs").write_text("5")                       # the peak starts anew
        before = memory("VmRSS")
        lib.csi_parts(stats, z, logits)
        return memory() - before

    return step


def embedding(size):
    encoder, images = lib.Encoder(1).to(memory_format=torch.channels_last), torch.randint(0, 256, (96, 1, size, size)).byte()
    return lambda: lib.embed(encoder, images, "perm", 10, CPU) and None


def score(args):
    rows = []
    for size in args.sizes[:1]:
        seconds, _, peak = in_turns({"": (embedding, (size,))}, 3, 1)[""]
        rows.append([f"embed, {size} px, 10 passes x {K} shifts", f"{96 / seconds:.1f} images/s", f"{peak:.2f}"])
    for M in (10 ** 3, 10 ** 4, 10 ** 5):
        seconds, added, _ = in_turns({"": (nearest, (M,))}, args.repeats)[""]
        rows.append([f"nearest of {M:,} training images, 1,000 test images", f"{seconds:.2f} s", f"adds {added:.2f}"])
    table("Stage 3", ["what", "rate", "peak GB"], rows)


def photographs(root, count, size=224):
    """A folder of JPEGs in MVTec's layout: smooth random pictures."""
    folder, rng = root / "train/good", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        image = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:05d}.jpg", quality=90)


START = """
import sys, time
begun = time.perf_counter()
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, dia_lib, benchmark
imported = time.perf_counter() - begun
data = dia_lib.load_data({folder!r}, {size}, ("train",))
loaded = time.perf_counter() - begun - imported
for step in range({steps}):
    x = dia_lib.to_float(data.train[dia_lib.batch_indices(len(data.train), 32, 0, step)], 3, torch.device("cpu"))
steps = time.perf_counter() - begun - imported - loaded
print(len(data.train) + len(data.held), imported, loaded, steps, benchmark.memory("RssAnon"), benchmark.memory("RssFile"))
"""


def data(args):
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        photographs(Path(scratch) / "photos", args.jpegs)
        code = START.format(root=str(ROOT), folder=f"{scratch}/photos", size=224, steps=200)
        for title in ("first start (decodes)", "warm start", "warm start"):
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                 env={**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache"}).stdout
            n, imported, loaded, steps, anonymous, files = map(float, out.split())
            rows.append([title, f"{int(n):,}", f"{imported:.1f}", f"{loaded:.1f}", f"{n / loaded:.0f}",
                         f"{1000 * steps / 200:.1f}", f"{anonymous:.2f}", f"{files:.2f}"])
    table("Data: a folder of colour JPEGs at 224 px, then 200 batches of 32",
          ["", "images", "import, s", "load_data, s", "images/s", "ms a batch", "own memory, GB", "mapped cache, GB"], rows)


def ceilings(args):
    """TFLOP/s of 3x3 convolutions of ResNet-18 (forward, channels_last) and of a matrix product: what the chip can do."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for channels, side, n in ((64, 56, 96), (128, 28, 96), (256, 14, 96), (256, 4, 384)):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(dtype=dtype, memory_format=torch.channels_last)
            x = torch.randn(n, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                seconds = timed(lambda conv=conv, x=x: conv(x), args.repeats)
            rows.append([str(dtype)[6:], f"{channels} channels, {side} px, {n} images",
                         f"{2e-12 * n * side * side * 9 * channels ** 2 / seconds:.3f}"])
        a = torch.randn(2048, 2048).to(dtype)
        rows.append([str(dtype)[6:], "matrix product, 2048", f"{2e-12 * 2048 ** 3 / timed(lambda a=a: a @ a, args.repeats):.3f}"])
    table("The chip", ["type", "what", "TFLOP/s"], rows)


def main():
    sections = {"ceilings": ceilings, "stage2": stage2, "stage1": stage1, "score": score, "data": data, "heldout": heldout}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*sections, []], help="(default: all but heldout)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 224], help="pixels (default: 64 96 128 224)")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed (default: 5)")
    parser.add_argument("--jpegs", type=int, default=26000, help="images in section data (default: 26000)")
    parser.add_argument("--steps", type=int, default=400, help="steps of section heldout (default: 400)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of section heldout (default: 3e-4)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {lib.precision(CPU)}, "
          f"{torch.cpu.get_capabilities().get('cpu_name', '')}")
    for name in args.sections or list(sections)[:-1]:
        sections[name](args)


if __name__ == "__main__":
    main()
