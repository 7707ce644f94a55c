"""Stage 2: train the encoder by contrasting images with their dissolved selves (DIA Sec. 3.2).

    python train_dia.py --quick                                                     # ELPV, minutes on a CPU
    python train_dia.py --data path/to/folder                                       # the paper's budget
    python train_dia.py --quick --dissolve none --out runs/elpv-csi                 # the baseline, CSI
    python train_dia.py --quick --dissolve residual --diffusion runs/elpv/diffusion.pt --out runs/elpv-residual

Needs the diffusion.pt of train_diffusion.py. Writes OUT/dia.pt and OUT/log.jsonl.
"""

import argparse
import itertools
import math
import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from dia_data import cache_path, load_data, new_array
from dia_lib import (
    SCORES, Encoder, K, Log, autocast, batch_indices, check_batch, check_loss, check_weights,
    code_version, contrastive_loss, dissolve_small, dissolve_view, embed, fit_normals, fit_to, load_checkpoint, make_views,
    parse_training, pick_device, place, precision, processor, report_time, run, save_checkpoint, score_embedded, score_images,
    send, sha256_of, step_generator, synthetic_defects, to_float, training_flags, unet_of,
)

QUICK = dict(image_size=64, steps=400, batch_size=16, crop_min=0.3, optimizer="adamw", twin_weight=1000.0)
MODES = ["diffusion", "residual", "gaussian", "median", "resize", "copy", "none"]


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_flags(parser)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 1000 epochs of at most 201)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step, before shifts and views (default: 32)")
    parser.add_argument("--image-size", type=int, help="pixels (default: 224, an npz file's own if smaller)")
    parser.add_argument("--every", type=int, metavar="N", help="validate and save every N steps (default: a quarter of the "
                        "steps, at most 2000)")
    parser.add_argument("--keep", action="store_true", help="keep the weights of each save, as OUT/step-N/dia.pt")
    method = parser.add_argument_group("method")
    method.add_argument("--diffusion", metavar="PATH", help="stage 1's checkpoint (default: OUT/diffusion.pt)")
    method.add_argument("--dissolve", choices=MODES, default="diffusion",
                        help="how the third view is made; none is CSI (default: diffusion)")
    method.add_argument("--t-range", type=int, nargs=2, metavar=("A", "B"),
                        help="diffusion steps t are drawn from [A, B) for each image (default: 30 130, Sec. 4.1)")
    method.add_argument("--dissolve-size", type=int, help="pixels at which the third view is made (default: stage 1's; "
                        "32 for the modes without a diffusion model)")
    method.add_argument("--gain", type=float, default=1.0, help="of residual: times what diffusion took away (default: 1)")
    method.add_argument("--bank", type=int, metavar="S", default=0, help="for long runs: dissolve S versions of each image "
                        "once, then draw from them (default: 0, dissolve anew in each step)")
    method.add_argument("--shift", choices=["rotate", "perm"], help="shifting transformation (default: rotate; elpv: perm)")
    method.add_argument("--twins", choices=["negative", "excluded"], default="negative",
                        help="an image's own dissolved view in the loss's denominator (default: negative)")
    method.add_argument("--twin-weight", type=float, default=1.0,
                        help="how many times that view counts there (default: 1, as any other negative; --quick: 1000)")
    method.add_argument("--tau", type=float, default=0.5, help="temperature of the contrastive loss (default: 0.5)")
    method.add_argument("--gamma", type=float, default=1.0, help="weight of the shift classifier's loss, Eq. 9 (default: 1)")
    method.add_argument("--jitter", type=float, default=1.0, help="strength of the colour jitter, from 0 (off) to 1 (default: 1)")
    method.add_argument("--crop-min", type=float, default=0.08, help="smallest area of the resized crop (default: 0.08)")
    method.add_argument("--optimizer", choices=["lars", "adamw"], default="lars", help="(default: lars, the paper's code)")
    method.add_argument("--lr", type=float, help="highest learning rate (default: LARS 1.0, AdamW 1e-3)")
    paper = vars(parser.parse_args([]))
    args, state = parse_training(parser, "dia", QUICK, argv)
    idle = {"twin_weight": args.dissolve == "none" or args.twins == "excluded",          # flags that do nothing here
            "dissolve_size": args.dissolve in ("none", "copy"), "t_range": args.dissolve not in ("diffusion", "residual")}
    apart = {"data", "out", "seed", "device", "resume", "quick", "compile", "diffusion", "dissolve", "every", "keep",
             "skip_bad_images"}
    args.changed = state["settings"].get("changed", {}) if state else {     # from the paper's settings, before any is worked out
        k: v for k, v in vars(args).items() if v != paper[k] and k not in apart and not idle.get(k)}
    if args.t_range and not 0 <= args.t_range[0] < args.t_range[1] <= 1000:
        raise SystemExit(f"--t-range {args.t_range[0]} {args.t_range[1]}: needs 0 <= A < B <= 1000.")
    if args.bank < 0 or args.bank % 2:
        raise SystemExit(f"--bank {args.bank}: needs an even number (half of the versions are flipped), or 0 for none.")
    if args.bank and args.dissolve not in ("diffusion", "residual"):
        raise SystemExit(f"--bank {args.bank}: --dissolve {args.dissolve} uses no diffusion model, leave --bank out.")
    if not 0 < args.crop_min <= 1:
        raise SystemExit(f"--crop-min {args.crop_min}: needs a share above 0, up to 1.")
    if not 0 <= args.jitter <= 1:
        raise SystemExit(f"--jitter {args.jitter}: needs a number from 0 (off) to 1.")
    for name in ("tau", "twin_weight", "gain"):
        if not 0 < getattr(args, name) < math.inf:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: needs a number above 0.")
    if args.gain != 1 and args.dissolve != "residual":
        raise SystemExit(f"--gain {args.gain}: --dissolve {args.dissolve} has no gain, leave it out.")
    if not 0 <= args.gamma < math.inf:
        raise SystemExit(f"--gamma {args.gamma}: needs a number from 0 on.")
    if args.every is not None and args.every < 1:
        raise SystemExit(f"--every {args.every}: needs at least 1.")
    if args.dissolve_size is not None and args.dissolve_size < 8:
        raise SystemExit(f"--dissolve-size {args.dissolve_size}: needs at least 8.")
    if args.image_size is not None and (args.image_size < 8 or args.image_size % 2):
        raise SystemExit(f"--image-size {args.image_size}: needs an even number from 8 on.")
    return args, state


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive SGD, You et al. 2017, arXiv:1708.03888, Alg. 1, as torchlars has it (the paper's optimizer).

    Local rate = trust * |w| / (|g| + weight_decay * |w|), 1 where a norm is 0; then SGD with momentum.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = [self.state[p]["momentum"] for p in params]
            w, g = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))    # (parameters,)
            local = group["trust"] * w / (g + group["weight_decay"] * w + 1e-8)
            local = torch.where((w > 0) & (g > 0), local, 1.0)
            update = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(update, list(local.unbind()))
            torch._foreach_mul_(momentum, group["momentum"])
            torch._foreach_add_(momentum, update)
            torch._foreach_add_(params, momentum, alpha=-group["lr"])


def learning_rate(step, steps, peak, optimizer):
    """Warm-up, then cosine to 0. LARS: from peak/10 over the first 1% of the steps; AdamW: from 0 over the first 10%."""
    warm, low = (max(1, steps // 100), 0.1) if optimizer == "lars" else (max(1, steps // 10), 0.0)
    if step < warm:
        return peak * (low + (1 - low) * (step + 1) / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@torch.no_grad()
def make_bank(path, unet, images, channels, slots, t_range, abar, size, seed, device):
    """Dissolve `slots` versions of every training image once: uint8 (M, slots/2, 2, C, size, size), memory-mapped.

    [m, s, 1] is of the flipped image. Its t is drawn from the s-th of slots/2 equal parts of t_range, so that each image
    has them all; t is a function of (seed, m, s, flip), and batches are fixed, so that a resumed run makes the same bank.
    """
    if not path.exists():
        u = torch.rand(len(images), slots // 2, 2, generator=step_generator("cpu", seed, "bank", 0))
        part = (torch.arange(slots // 2)[:, None] + u) / (slots // 2)                               # (M, slots/2, 2)
        t = t_range[0] + (part * (t_range[1] - t_range[0])).long().clamp(max=t_range[1] - t_range[0] - 1)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            bank = new_array(f"{scratch}/bank", (*t.shape, channels, size, size))
            for i in tqdm(range(0, len(images), 64), "dissolving", unit="image", unit_scale=64, disable=None, leave=False):
                x = fit_to(to_float(images[i:i + 64], channels, device), size)                      # (64, C, size, size)
                for s, flip in itertools.product(range(slots // 2), range(2)):
                    y = dissolve_small(unet, x.flip(-1) if flip else x, t[i:i + 64, s, flip].to(device), abar, "diffusion")
                    bank[i:i + 64, s, flip] = (y * 255).round().to(torch.uint8).cpu()
            bank.flush()
            os.replace(f"{scratch}/bank", path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def draw_from(bank, rows, flip, generator, device):
    """One dissolved version (B, C, size, size) in [0, 1] of each of the images rows (B,), flipped where flip (B, 1, 1, 1)."""
    slot = torch.randint(bank.shape[1], rows.shape, generator=generator)
    y = bank[send(rows, bank.device), send(slot, bank.device)]                                      # (B, 2, C, size, size)
    y = to_float(y.flatten(0, 1), bank.shape[3], device).unflatten(0, (-1, 2))
    return torch.where(flip, y[:, 1], y[:, 0])


@torch.no_grad()
def readable(z, logits, labels, views):
    """Numbers of one batch that one can read: shift accuracy, and mean cosines. z: (V*N, D) view-major, N = K*B."""
    N = len(z) // views
    v = F.normalize(z.float(), dim=1).view(views, N, -1)                        # (V, N, D)
    cross = (v[0] @ v[1].T).view(K, N // K, K, N // K)
    same_shift = cross.diagonal(dim1=0, dim2=2)                                 # (B, B, K)
    own = same_shift.diagonal(dim1=0, dim2=1)                                   # (K, B)
    other = (same_shift.sum() - own.sum()) / max(1, same_shift.numel() - own.numel())
    row = {"shift_acc": (logits.argmax(1) == labels).float().mean().item(), "sim_positive": own.mean().item(),
           "sim_other": other.item()}
    if views == 3:
        row["sim_twin"] = (v[0] * v[2]).sum(1).mean().item()                    # an image and its dissolved self
    return row


def validate(encoder, train, held, shift, jitter, device):
    """Label-free numbers on held-out normals against the same images with a synthetic defect, and shift_acc_held.

    train: (M, ...), held: (n, ...) uint8. val_auroc is by CSI's score, val_cos by its cosine, val_local by local_score;
    each is the mean over the two kinds of defect. Draws nothing at random that depends on the run, so that runs can be
    compared.
    """
    stats = fit_normals(encoder, train[:512], shift, 2, device, jitter=jitter)
    z, logits = embed(encoder, held, shift, 2, device, jitter=jitter)
    if not z.isfinite().all():
        raise SystemExit("the embeddings of held-out images are not finite: training has diverged. Try a smaller --lr.")
    normal, auroc = score_embedded(encoder, stats, held, z, logits, device), {}
    for i, kind in enumerate(("line", "patch")):
        generator = step_generator("cpu", 0, "synthetic defects", i)
        defects = torch.cat([synthetic_defects(held, kind, generator) for _ in range(3)])
        parts = score_images(encoder, stats, defects, shift, 2, device, jitter=jitter)
        for name in SCORES:
            scores = torch.cat([normal[name], parts[name]])
            auroc[name, kind] = float(roc_auc_score([0] * len(held) + [1] * len(defects), scores))
    mean = {name: (auroc[name, "line"] + auroc[name, "patch"]) / 2 for name in SCORES}
    correct = logits.argmax(2) == torch.arange(K)                               # (n, K)
    return {"val_auroc": mean["csi"], "val_line": auroc["csi", "line"], "val_patch": auroc["csi", "patch"],
            "val_cos": mean["cos"], "val_local": mean["local"], "shift_acc_held": correct.float().mean().item()}


def main():
    args, state = arguments()
    device = pick_device(args.device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"

    # Data
    data = load_data(args.data, args.image_size, ("train",), args.holdout, args.normal_class, args.skip_bad_images)
    M, channels, size = len(data.train), data.train.shape[1], data.train.shape[-1]
    check_batch(args.batch_size, M)
    if args.image_size and args.image_size != size:
        print(f"note: the images are {size} px; they are not enlarged to {args.image_size}")
    if size % 2:
        raise SystemExit(f"--image-size {size}: the shifts need an even number; use {size - 1}.")
    if state and state["settings"]["fingerprint"] != data.fingerprint:
        raise SystemExit(f"--resume: {args.out}/dia.pt was trained on other images than --data {args.data} has now.")
    args.image_size, args.shift = size, args.shift or data.defaults["shift"]
    args.t_range = list(args.t_range or data.defaults["t_range"])
    args.lr = args.lr or {"lars": 1.0, "adamw": 1e-3}[args.optimizer]
    args.steps = args.steps or 1000 * min(M // args.batch_size, 201)            # the released code's epoch
    stem, views = ("cifar" if size <= 32 else "imagenet"), (2 if args.dissolve == "none" else 3)
    held = data.held[~data.calibration]                                         # the other half is never looked at

    # Stage 1
    unet = abar = path = digest = stage1 = None
    if args.dissolve in ("diffusion", "residual"):
        path = Path(args.diffusion or args.out / "diffusion.pt")
        diffusion, digest = load_checkpoint(path, "diffusion", device), sha256_of(path)
        stage1 = diffusion["settings"]
        if stage1["fingerprint"] != data.fingerprint:
            raise SystemExit(f"{path} was trained on other images than these ({stage1['data']}, --holdout "
                             f"{stage1['holdout']}): use the same --data and --holdout in both stages.")
        if stage1["channels"] != channels:
            raise SystemExit(f"{path} has {stage1['channels']} channels, these images have {channels}: train stage 1 again.")
        if state and state["settings"]["diffusion_sha256"] != digest:
            raise SystemExit(f"--resume: {path} is not the stage 1 checkpoint this run was started with; name it by --diffusion.")
        if diffusion["step"] < stage1["steps"]:
            print(f"note: {path} stopped at step {diffusion['step']} of {stage1['steps']}")
        unet, abar = unet_of(diffusion, device)
        if args.dissolve_size not in (None, stage1["dissolve_size"]):
            raise SystemExit(f"--dissolve-size {args.dissolve_size}: {path} was trained at {stage1['dissolve_size']} px; leave "
                             "the flag out, or train stage 1 at that size.")
        args.dissolve_size = stage1["dissolve_size"]
        stage1 = {k: stage1[k] for k in ("steps", "batch_size", "dim", "lr", "schedule", "fraction", "dissolve_size", "seed")}
        stage1["steps"] = diffusion["step"]
    args.dissolve_size = args.dissolve_size or 32

    # Model
    torch.manual_seed(args.seed)
    encoder = Encoder(channels, K, stem).to(device, memory_format=torch.channels_last)

    # Optimizer
    if args.optimizer == "lars":
        optimizer = LARS(encoder.parameters(), args.lr)
    else:
        optimizer = torch.optim.AdamW(encoder.parameters(), args.lr, weight_decay=0.01, fused=True)

    # Resume
    start = 0
    if state:
        if "optimizer" not in state:
            raise SystemExit(f"--resume: {args.out}/dia.pt was kept by --keep, to evaluate; resume the folder above it.")
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        if start == args.steps:
            print(f"stage 2 done: {args.out}/dia.pt has all its {args.steps} steps already")
            return
    forward = torch.compile(encoder) if compiled else encoder
    unet = torch.compile(unet) if compiled and unet is not None else unet
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, "dia", start)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "compile", "quick", "diffusion")}
    settings |= {"channels": channels, "stem": stem, "fingerprint": data.fingerprint, "diffusion": path and str(path),
                 "diffusion_sha256": digest, "stage1": stage1, "commit": code_version(),
                 "processor": processor(device)}
    print(f"stage 2, {data.name}: {M} training and {len(held)} held-out normals, {channels} x {size} px; dissolve "
          f"{args.dissolve}{f' from a bank of {args.bank}' if args.bank else ''}, t in [{args.t_range[0]}, "
          f"{args.t_range[1]}), shift {args.shift}, twins {args.twins}; batch "
          f"{args.batch_size} x {K} shifts x {views} views = {args.batch_size * K * views} rows, {args.steps} steps, "
          f"{args.optimizer} lr {args.lr:g}, seed {args.seed}; {device}, "
          f"{precision(device)}, torch {torch.__version__}", flush=True)

    # Images, and dissolved images, where the batches come from
    train, bank = place(data.train, device), None
    if args.bank:
        file = cache_path(["bank", 1, digest, zlib.crc32(data.train.numpy()), args.bank, args.t_range, args.seed,
                           device.type, precision(device)])
        bank = make_bank(file, unet, train, channels, args.bank, args.t_range, abar, args.dissolve_size, args.seed, device)
        bank = place(bank, device)

    # Train
    labels = torch.arange(K, device=device).repeat_interleave(args.batch_size).repeat(views)       # (V*K*B,)
    report, args.every = max(1, min(100, args.steps // 20)), args.every or max(1, min(2000, args.steps // 4))
    running, warm, begun = [], 0.0, time.perf_counter() - (state.get("seconds", 0) if state else 0)
    bar = tqdm(range(start, args.steps), "stage 2", args.steps, initial=start, unit="image",
               unit_scale=args.batch_size, disable=None)
    for step in bar:
        generator = step_generator(device, args.seed, "dia", step)
        rows = batch_indices(M, args.batch_size, args.seed, step)
        x = to_float(train[send(rows, train.device)], channels, device)                             # (B, C, H, W)
        t = torch.randint(*args.t_range, (len(x),), generator=generator, device=device)             # (B,)

        def third_view(x3, flip, step=step, rows=rows, t=t):
            y = None if bank is None else draw_from(bank, rows, flip, step_generator("cpu", args.seed, "slots", step), device)
            return dissolve_view(unet, x3, t, abar, args.dissolve_size, args.dissolve, y, args.gain)

        x = make_views(x, views, args.shift, (args.crop_min, 1.0), generator, third_view, args.jitter)     # (V*K*B, C, H, W)
        with autocast(device):
            z, logits = forward(x)                                              # (V*K*B, D), (V*K*B, K)
        contrast = contrastive_loss(z, views, args.tau, args.twins, args.twin_weight)
        loss = contrast + args.gamma * F.cross_entropy(logits, labels)          # DIA Eq. 9
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.optimizer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running.append(torch.stack([loss.detach(), contrast.detach()]))

        done = step + 1
        warm = report_time(done, start, args.steps, loss, warm, args.quick)
        saving = done % args.every == 0 or done == args.steps
        if saving or done % report == 0:                                        # the only places that read results
            values = torch.stack(running).tolist()                              # (steps, 2)
            check_loss([v[0] for v in values], done, optimizer.param_groups[0]["lr"])
            row = readable(z, logits, labels, views)
            bar.set_postfix(loss=f"{values[-1][0]:.3f}", shift_acc=f"{row['shift_acc']:.2f}")
            validation = {}
            if saving:
                check_weights(encoder, done, optimizer.param_groups[0]["lr"])
                validation = validate(encoder, train, held[:512], args.shift, args.jitter, device) if len(held) > 1 else {}
            log(done, loss=sum(v[0] for v in values) / len(values), contrastive=sum(v[1] for v in values) / len(values),
                **row, **validation, lr=optimizer.param_groups[0]["lr"], seconds=round(time.perf_counter() - begun, 1))
            running = []
        if saving:
            result = {"step": done, "encoder": encoder.state_dict(), "validation": validation,
                      "seconds": time.perf_counter() - begun}
            if args.keep:
                (args.out / f"step-{done}").mkdir(exist_ok=True)
                save_checkpoint(args.out / f"step-{done}" / "dia.pt", "dia", settings, result)
            save_checkpoint(args.out / "dia.pt", "dia", settings, {**result, "optimizer": optimizer.state_dict()})
    print(f"stage 2 done: {args.out}/dia.pt")


if __name__ == "__main__":
    run(main)
