"""Where time and memory go. Run by hand on an idle machine; CI does not run it.

    python tests/benchmark.py                           # all sections but heldout and gpu
    python tests/benchmark.py stage2 --sizes 64         # one section
    python tests/benchmark.py heldout                   # train our UNet and theirs, compare held-out losses
    python tests/benchmark.py gpu                       # both scripts on a GPU, in two minutes

Each section prints a table. What is compared runs in turns, a step of one, a step of the other, each in a
process of its own; times are medians of --repeats steps after two of warm-up, memory is a process's peak.
Sections stage1 and heldout need `pip install denoising-diffusion-pytorch`.
"""

import json
import math
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import dia_lib as lib
import train_dia
import train_diffusion

CPU = torch.device("cpu")
B, K = 32, lib.K
SIZES = [64, 96, 128, 224]


# ---- Measuring -----------------------------------------------------------------------------------------


def worker(pipe, build, args):
    """A side of a comparison, in its own process: makes a step, runs it when told to, and answers."""
    torch.manual_seed(0)
    step = build(*args)
    while pipe.recv():
        begun = time.perf_counter()
        part = step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6                 # GB on Linux
        pipe.send((seconds, part, peak))


def in_turns(sides, repeats, warm=2):
    """{name: (build, args)} -> {name: (median seconds of a step, median of what step() returns, peak GB)}."""
    spawn, pipes, rows = multiprocessing.get_context("spawn"), {}, {name: [] for name in sides}
    for name, (build, args) in sides.items():
        pipes[name], end = spawn.Pipe()
        spawn.Process(target=worker, args=(end, build, args), daemon=True).start()
        end.close()                                                 # so that a worker that dies is noticed
    for _ in range(warm + repeats):
        for name, pipe in pipes.items():
            pipe.send(True)
            rows[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (statistics.median(seconds for seconds, _, _ in row[warm:]),
                   statistics.median(part or 0 for _, part, _ in row[warm:]), row[-1][2])
            for name, row in rows.items()}


def table(title, head, rows):
    print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row)} |")
    sys.stdout.flush()


def stem_of(size):
    """As train_dia.py chooses it."""
    return "cifar" if size <= 32 else "imagenet"


def gmacs(module, *inputs):
    """Multiply-accumulates of one forward pass, in G."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2e9


# ---- Stage 2 -------------------------------------------------------------------------------------------


def finish_step(encoder, optimizer, x):
    """Forward, losses, backward, optimizer: the same on both sides."""
    with lib.autocast(x.device):
        z, logits = encoder(x)
    labels = torch.arange(K, device=x.device).repeat_interleave(B).repeat(3)
    loss = lib.contrastive_loss(z) + F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(torch.tensor(0.1, device=x.device))


def textbook_step(size, device="cpu"):
    """As the released code has it: float32, contiguous, a UNet call for each shift, augmented apart."""
    lib.has_bfloat16 = lambda device: False
    torch.channels_last = torch.contiguous_format                           # as if there were no other
    torch.backends.cudnn.benchmark = True
    with torch.device(device):
        encoder, unet = lib.Encoder(1, stem=stem_of(size)), lib.UNet(1).requires_grad_(False)
        images = torch.rand(B, 1, size, size)
    optimizer, abar = train_dia.LARS(encoder.parameters()), lib.alpha_bar().to(device)

    def step():
        rows, dissolving = [], 0.0
        for v in range(3):
            for k in range(K):
                x = lib.flip(images, torch.rand(B, device=device))
                if v == 2:
                    begun, t = time.perf_counter(), torch.randint(30, 130, (1,), device=device).expand(B)
                    small = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
                    x = lib.dissolve_view(small, size, "diffusion", unet, t, abar)
                    dissolving += time.perf_counter() - begun
                x = x.roll((size // 2 * (k >= 2), size // 2 * (k % 2)), (-2, -1))
                rows.append(lib.augment(x, torch.rand(lib.AUGMENT, B, device=device)))
        finish_step(encoder, optimizer, torch.cat(rows))
        return dissolving

    return step


def our_step(size):
    """The step of train_dia.py, on 1,012 images."""
    encoder = lib.Encoder(1).to(memory_format=torch.channels_last)
    unet = lib.UNet(1).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    abar, optimizer = lib.alpha_bar(), train_dia.LARS(encoder.parameters())
    images, small = (torch.randint(0, 256, (1012, 1, h, h), dtype=torch.uint8) for h in (size, 32))

    def step():
        rows, (u_t, u_flip, u) = torch.randperm(1012)[:B], lib.draw_step(0, 0, 3, B)
        x1, x2 = (lib.flip(lib.to_float(images[rows], 1, CPU), u_v) for u_v in u_flip[:2])
        begun = time.perf_counter()
        y = lib.flip(lib.to_float(small[rows], 1, CPU), u_flip[2])
        x3 = lib.dissolve_view(y, size, "diffusion", unet, 30 + (100 * u_t).long(), abar)
        dissolving = time.perf_counter() - begun
        finish_step(encoder, optimizer, lib.make_views([x1, x2, x3], "perm", u, (0.08, 1)))
        return dissolving

    return step


def stage2(args):
    rows = []
    for size in args.sizes or SIZES:
        sides = {"textbook": (textbook_step, (size,)), "ours": (our_step, (size,))}
        result = in_turns(sides, args.repeats)
        encoder = gmacs(lib.Encoder(1), torch.rand(1, 1, size, size))
        unet = gmacs(lib.UNet(1), torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64))
        for name, calls in (("textbook", 4), ("ours", 1)):
            seconds, dissolving, peak = result[name]
            tflop = 2e-3 * B * (3 * 3 * K * encoder + calls * unet)         # backward costs two forwards
            rows.append([size, name, seconds, f"{result['textbook'][0] / seconds:.2f}",
                         f"{100 * dissolving / seconds:.1f}%", tflop / seconds, f"{peak:.2f}"])
    table(f"Stage 2: a step of {B} images x {K} shifts x 3 views, grey, UNet dim 64",
          ["px", "side", "seconds a step", "x textbook", "of it dissolving", "TFLOP/s", "peak GB"], rows)


# ---- Stage 1 -------------------------------------------------------------------------------------------


def make_unet(name):
    """"ours" or "theirs": dim 64, one channel."""
    if name == "ours":
        return lib.UNet(1)
    from denoising_diffusion_pytorch import Unet                    # not needed by the other sections
    return Unet(64, channels=1, dim_mults=(1, 2, 4, 8))


def stage1_step(name, bfloat16, memory_format, batch, device="cpu"):
    torch.backends.cudnn.benchmark = True
    unet, abar = make_unet(name).to(device, memory_format=memory_format), lib.alpha_bar().to(device)
    optimizer = torch.optim.Adam(unet.parameters(), 8e-5, fused=True)

    def step():
        x0, eps = (torch.randn(batch, 1, 32, 32, device=device) for _ in range(2))
        t = torch.randint(0, 1000, (batch,), device=device)
        xt = lib.q_sample(x0, t, eps, abar).contiguous(memory_format=memory_format)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            predicted = unet(xt, t)
        optimizer.zero_grad()
        F.l1_loss(predicted.float(), eps).backward()
        optimizer.step()

    return step


def stage1(args):
    x, t, rows = torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64), []
    last, plain = torch.channels_last, torch.contiguous_format
    for batch in (16, 64):
        sides = {"ours, bf16, channels_last": (stage1_step, ("ours", True, last, batch)),
                 "theirs, bf16, channels_last": (stage1_step, ("theirs", True, last, batch)),
                 "theirs, bf16": (stage1_step, ("theirs", True, plain, batch)),
                 "theirs, float32": (stage1_step, ("theirs", False, plain, batch))}
        result = in_turns(sides, args.repeats)
        ours = result["ours, bf16, channels_last"][0]
        for name, (seconds, _, peak) in result.items():
            unet = make_unet(name.split(",")[0])
            size, macs = sum(p.numel() for p in unet.parameters()) / 1e6, gmacs(unet, x, t)
            rows.append([batch, name, f"{size:.1f}", f"{macs:.3f}", seconds, f"{seconds / ours:.2f}",
                         6e-3 * batch * macs / seconds, f"{peak:.2f}"])
    table("Stage 1: a step; theirs is denoising-diffusion-pytorch's Unet(64)",
          ["images", "side", "M parameters", "GMAC", "seconds a step", "x ours", "TFLOP/s", "peak GB"], rows)


def heldout(args):
    """Train both UNets by train_diffusion.py itself."""
    rows, flags = [], f"x --quick --device cpu --dim 64 --steps {args.steps} --lr {args.lr} --seed 10 --out"
    for name in ("theirs", "ours"):
        train_diffusion.UNet = lambda channels, dim, name=name: make_unet(name)
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = [*flags.split(), folder]
            train_diffusion.main()
            log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        row = [row for row in log if "loss" in row][-1]
        rows.append([name, *(f"{v:.4f}" for k, v in row.items() if k.startswith("held_")), row["seconds"]])
    table(f"Stage 1: held-out L1 loss on ELPV, 16 images a step, {args.steps} steps, rate {args.lr}, seed 10",
          ["UNet", *(f"t {a}-{b - 1}" for a, b in train_diffusion.BINS), "seconds"], rows)


# ---- Stage 3 -------------------------------------------------------------------------------------------


def nearest(M, Q=1000):
    """Score Q images against M training images, all random."""
    stats = {"axis": F.normalize(torch.randn(K, M, 128), dim=2), "w": torch.ones(K), "v": torch.ones(K)}
    z, logits = torch.randn(Q, K, 128), torch.rand(Q, K, K)
    return lambda: lib.csi_parts(stats, z, logits) and None


def embedding(size):
    encoder = lib.Encoder(1).to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (96, 1, size, size), dtype=torch.uint8)
    return lambda: lib.embed(encoder, images, "perm", 10, CPU) and None


def score(args):
    size = (args.sizes or SIZES)[0]
    seconds, _, peak = in_turns({"": (embedding, (size,))}, 3, 1)[""]
    rows = [[f"embed, {size} px, 10 passes x {K} shifts", f"{96 / seconds:.1f} images/s", peak]]
    for M in (10 ** 3, 10 ** 4, 10 ** 5):
        seconds, _, peak = in_turns({"": (nearest, (M,))}, args.repeats)[""]
        rows.append([f"nearest of {M:,} training images, 1,000 test images", f"{seconds:.2f} s", peak])
    table("Stage 3", ["what", "rate", "peak GB"], rows)


# ---- A GPU ---------------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a script once its step has been timed."""


def timed(module, argv, repeats):
    """Run a script's main until its step has been timed: a dict of figures.

    ms: mean of `repeats` steps after 10; kernels: milliseconds of the kernels of one of the next 3;
    dissolving: the share of them below dissolve_view, known in an eager step alone; peak: GB.
    """
    at, device, profile = {}, lib.pick_device("auto"), torch.profiler.profile()
    cuda, before = device.type == "cuda", (module.Step, train_dia.dissolve_view)

    class Timed(lib.Step):
        done = 0

        def __call__(self, *inputs):
            outputs = super().__call__(*inputs)
            self.done += 1
            if self.done in (10, 10 + repeats, 13 + repeats):
                outputs[0].sum().item()                                     # waits for the device
                at[self.done] = time.perf_counter()
            if self.done == 10 + repeats:
                profile.start()
            elif self.done == 13 + repeats:
                profile.stop()
                raise Enough
            return outputs

    def dissolve_view(*args):
        with torch.profiler.record_function("dissolving"):
            return lib.dissolve_view(*args)

    module.Step, train_dia.dissolve_view, sys.argv = Timed, dissolve_view, ["", *map(str, argv)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        module.main()
    except Enough:
        events = profile.key_averages()
    module.Step, train_dia.dissolve_view = before
    inside = sum(e.device_time_total if cuda else e.cpu_time_total for e in events
                 if e.key == "dissolving" and e.device_type == DeviceType.CPU)
    if cuda:                                            # the kernels, not also the operations they belong to
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kernels = sum(e.self_device_time_total if cuda else e.self_cpu_time_total for e in events)
    assert kernels, "the profiler has seen no kernel"
    return {"ms": (at[10 + repeats] - at[10]) / repeats * 1e3, "kernels": kernels / 3e3,
            "dissolving": f"{inside / kernels:.0%}" if inside else "",
            "peak": torch.cuda.max_memory_allocated() / 1e9 if cuda else math.nan}


def ceiling(device, n):
    """TFLOP/s of the product of two bfloat16 matrices (n, n)."""
    a = torch.randn(n, n, device=device).bfloat16()
    for i in range(13):
        if i == 3:
            a[0, 0].item()                                                  # waits for the device
            begun = time.perf_counter()
        b = a @ a
    b[0, 0].item()
    return 10 * 2e-12 * n ** 3 / (time.perf_counter() - begun)


def gpu(args):
    """The scripts themselves in each way to launch a step, beside float32: stage 1, our UNet; stage 2, the
    textbook's step. --sizes: 28, 64 and 224 px by default.
    """
    device, plain, rows = lib.pick_device("auto"), torch.contiguous_format, []
    cuda = device.type == "cuda"
    repeats = 50 if cuda else args.repeats
    top, root = ceiling(device, 8192 if cuda else 1024), Path(__file__).parent.parent
    unet = gmacs(lib.UNet(1), torch.rand(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64))

    def case(module, name, tflop, textbook, argv):
        seconds = in_turns({"": textbook}, repeats)[""][0]
        rows.append([name, "float32, eager", seconds * 1e3, "", "", f"{tflop / seconds / top:.1%}", ""])
        for launch in ["eager", "graph"] if cuda else ["eager"]:
            flags = ["--steps", 1000, "--launch", launch, "--out", out / f"{name}-{launch}"]
            row = timed(module, [*argv, *flags], repeats)
            rows.append([name, launch, row["ms"], row["kernels"], row["dissolving"],
                         f"{tflop / row['ms'] * 1e3 / top:.1%}", row["peak"]])

    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes or [28, 64, 224]:
            out = Path(folder) / str(size)
            pixels, labels = np.random.default_rng(0).bytes(256 * size ** 2), np.zeros(256, int)
            pixels = np.frombuffer(pixels, np.uint8).reshape(256, size, size)
            np.savez(f"{out}.npz", train_images=pixels, train_labels=labels, test_images=pixels,
                     test_labels=labels)
            data = ["--data", f"{out}.npz", "--normal-class", "0", "--holdout", "0"]
            command, begun = [sys.executable, root / "train_diffusion.py", *data], time.perf_counter()
            command += ["--steps", "1", "--out", out / "one"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"{size} px: {time.perf_counter() - begun:.1f} s from the shell to stage 1's checkpoint of "
                  "one step", flush=True)
            if not rows:
                case(train_diffusion, "stage 1, 64 images, 32 px", 6e-3 * 64 * unet,
                     (stage1_step, ("ours", False, plain, 64, device.type)), data)
            encoder = gmacs(lib.Encoder(1, stem=stem_of(size)), torch.rand(1, 1, size, size))
            case(train_dia, f"stage 2, {B} images, {size} px", 2e-3 * B * (9 * K * encoder + unet),
                 (textbook_step, (size, device.type)), [*data, "--diffusion", out / "one/diffusion.pt"])
    table(f"The scripts on {torch.cuda.get_device_name() if cuda else 'a CPU'}, UNet dim 64; the ceiling is "
          f"{top:.3g} TFLOP/s in bfloat16",
          ["what", "launch", "ms a step", "of it kernels", "dissolving", "of the ceiling", "peak GB"], rows)


def main():
    sections = {"stage2": stage2, "stage1": stage1, "score": score, "heldout": heldout, "gpu": gpu}
    parser = lib.make_parser(__doc__)
    parser.add_argument("sections", nargs="*", choices=[*sections, []],
                        help="(default: all but heldout and gpu)")
    parser.add_argument("--sizes", type=int, nargs="+",
                        help="pixels (default: 64 96 128 224; gpu: 28 64 224)")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed (default: 5)")
    parser.add_argument("--steps", type=int, default=400, help="steps of section heldout (default: 400)")
    parser.add_argument("--lr", type=float, default=3e-4, help="rate of section heldout (default: 3e-4)")
    args = parser.parse_args()
    print(f"{lib.precision(CPU)}, {torch.get_num_threads()} threads, "
          f"{torch.cpu.get_capabilities().get('cpu_name', '')}")
    for name in args.sections or list(sections)[:3]:
        sections[name](args)


if __name__ == "__main__":
    main()
