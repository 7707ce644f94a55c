"""Stage 1: train a small DDPM on the normal images. Its one-step reverse is what dissolves (DIA Sec. 3.1).

    python train_diffusion.py --quick                        # ELPV, minutes on a CPU
    python train_diffusion.py --data path/to/folder          # the paper's budget: 25,000 steps of 64 images

Writes OUT/diffusion.pt (UNet, its EMA, optimizer), OUT/dissolving.png (the paper's Fig. 1) and OUT/log.jsonl.
"""

import argparse
import time

import torch
from torch.nn.functional import l1_loss
from tqdm import tqdm

from dia_data import load_data
from dia_lib import (
    Log, UNet, alpha_bar, autocast, batch_indices, check_batch, check_loss, check_weights, dissolve, fit_to,
    parse_training, pick_device, precision, q_sample, report_time, run, save_checkpoint, save_grid, send,
    step_generator, to_01, to_float, to_pm1, training_flags, update_ema,
)

QUICK = dict(dim=32, steps=400, batch_size=16, lr=1e-3)
BINS = [(0, 30), (30, 130), (130, 300), (300, 1000)]        # of t, for the held-out loss
ZERO = 0.798                                                # E|eps|, the L1 loss of predicting no noise at all


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_flags(parser)
    parser.add_argument("--steps", type=int, default=25000, help="optimizer steps (default: 25000)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: 64)")
    parser.add_argument("--dissolve-size", type=int, default=32, help="image size in pixels (default: 32, Sec. 4.1)")
    parser.add_argument("--dim", type=int, default=64, help="channels of the UNet's first stage (default: 64)")
    parser.add_argument("--schedule", choices=["cosine", "linear"], default="cosine", help="noise (default: cosine)")
    parser.add_argument("--lr", type=float, default=8e-5, help="Adam's learning rate (default: 8e-5)")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the normals used (Table 3; default: 1)")
    args, state = parse_training(parser, "diffusion", QUICK, argv)
    if args.dissolve_size < 8 or args.dissolve_size % 8:
        raise SystemExit(f"--dissolve-size {args.dissolve_size}: the UNet needs a multiple of 8 (it halves 3 times).")
    if args.dim < 8 or args.dim % 8:
        raise SystemExit(f"--dim {args.dim}: needs a multiple of 8, for group norm.")
    if not 0 < args.fraction <= 1:
        raise SystemExit(f"--fraction {args.fraction}: needs a share above 0, up to 1.")
    return args, state


@torch.no_grad()
def held_out_losses(unet, held, abar):
    """L1 loss at fixed noise and fixed t in each bin, 4 values of t an image. held: (n, C, H, W) in [-1, 1]."""
    losses = []
    for i, (low, high) in enumerate(BINS):
        generator = step_generator("cpu", 0, "held-out noise", i)
        total = 0.0
        for _ in range(4):
            t = torch.randint(low, high, (len(held),), generator=generator).to(held.device)
            eps = torch.randn(held.shape, generator=generator).to(held.device)
            for xb, tb, eb in zip(held.split(64), t.split(64), eps.split(64), strict=True):
                with autocast(held.device):
                    predicted = unet(q_sample(xb, tb, eb, abar), tb)
                total += l1_loss(predicted.float(), eb, reduction="sum").item()
        losses.append(total / (4 * held.numel()))
    return losses


def change(unet, x, abar):
    """Grey levels (of 255) by which dissolving at t = 30, 50, ... 110 changes each image of x, (n,)."""
    def one(x, t):
        return (dissolve(unet, x, torch.full((len(x),), t, device=x.device), abar) - x).abs().mean((1, 2, 3))   # (b,)

    return torch.cat([torch.stack([one(xb, t) for t in range(30, 130, 20)]).mean(0) for xb in x.split(64)]) * 127.5


def picture(path, unet, train, held, abar):
    """Four training and four held-out images (rows), real and dissolved at t = 0, 50, 100, 200, 400 (columns)."""
    rows = []
    for x in torch.cat([train[:4], held[:4]]):
        x = x[None]
        times = [torch.tensor([t], device=x.device) for t in (0, 50, 100, 200, 400)]
        rows.append([to_01(y)[0] for y in [x] + [dissolve(unet, x, t, abar) for t in times]])
    save_grid(path, rows, ["real", "t = 0", "t = 50", "t = 100", "t = 200", "t = 400"], scale=3)


def memorised(unet, train, held, abar, log, step):
    """Has the model memorised its training images? Then it no longer dissolves them. Says so, and logs both changes."""
    on_train, on_held = change(unet, train, abar), change(unet, held, abar)
    log(step, change_train=on_train.mean().item(), change_held=on_held.mean().item())
    tqdm.write(f"dissolving changes training images by {on_train.mean():.2f} grey levels, held-out ones by {on_held.mean():.2f}")
    noise = (on_train.var() / len(on_train) + on_held.var() / len(on_held)).sqrt()              # of the difference
    if on_train.mean() < on_held.mean() - 2 * noise:
        tqdm.write("it changes training images less: the model has begun to memorise them, so stage 1 is too long; "
                   "use fewer --steps")


def main():
    args, state = arguments()
    device = pick_device(args.device)
    compiled = args.compile if args.compile is not None else device.type == "cuda"

    # Data
    data = load_data(args.data, args.dissolve_size, ("train",), args.holdout, args.normal_class, args.skip_bad_images)
    channels = data.train.shape[1]
    n = max(1, round(len(data.train) * args.fraction))
    check_batch(args.batch_size, n)
    if state and state["settings"]["fingerprint"] != data.fingerprint:
        raise SystemExit(f"--resume: {args.out}/diffusion.pt was trained on other images than --data {args.data} has now.")

    def prepare(images):
        return to_pm1(fit_to(to_float(images, channels, device), args.dissolve_size))

    train = data.train[:n].to(device)                                       # 32x32: the whole set fits on the device
    held = prepare(data.held[~data.calibration])                            # the calibration half is never looked at

    # Model
    torch.manual_seed(args.seed)
    unet = UNet(channels, args.dim).to(device, memory_format=torch.channels_last)
    ema = UNet(channels, args.dim).to(device, memory_format=torch.channels_last).requires_grad_(False)
    ema.load_state_dict(unet.state_dict())
    abar = alpha_bar(args.schedule).to(device)

    # Optimizer
    optimizer = torch.optim.Adam(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)

    # Resume
    start = 0
    if state:
        unet.load_state_dict(state["unet"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        if start == args.steps:
            print(f"stage 1 done: {args.out}/diffusion.pt has all its {args.steps} steps already")
            return
    forward = torch.compile(unet) if compiled else unet
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, "diffusion", start)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "compile", "quick")}
    settings |= {"channels": channels, "fingerprint": data.fingerprint}
    print(f"stage 1, {data.name}: {n} training and {len(held)} held-out normals, {channels} x {args.dissolve_size} px; "
          f"UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters; batch {args.batch_size}, "
          f"{args.steps} steps, lr {args.lr:g}, seed {args.seed}; {device}, "
          f"{precision(device)}, torch {torch.__version__}", flush=True)

    # Train
    every = max(1, min(2500, args.steps // 4))                              # steps between reports and checkpoints
    running, losses, warm, begun = [], [], 0.0, time.perf_counter() - log.seconds
    bar = tqdm(range(start, args.steps), "stage 1", args.steps, initial=start, unit="image",
               unit_scale=args.batch_size, disable=None)
    for step in bar:
        generator = step_generator(device, args.seed, "diffusion", step)
        x0 = prepare(train[send(batch_indices(n, args.batch_size, args.seed, step), device)])    # (B, C, H, W)
        flip = torch.rand(len(x0), 1, 1, 1, generator=generator, device=device) < 0.5
        x0 = torch.where(flip, x0.flip(-1), x0)
        t = torch.randint(0, len(abar), (len(x0),), generator=generator, device=device)         # (B,)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        with autocast(device):
            predicted = forward(q_sample(x0, t, eps, abar), t)
        loss = l1_loss(predicted.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, unet, step)
        running.append(loss.detach())

        done = step + 1
        warm = report_time(done, start, args.steps, loss, warm, args.quick)
        if done % 20 == 0 or done % every == 0 or done == args.steps:       # the only places that read results
            values = torch.stack(running).tolist()
            check_loss(values, done, args.lr)
            bar.set_postfix(loss=f"{values[-1]:.4f}")
            losses += values
            running = []
        if done % every == 0 or done == args.steps:
            check_weights(unet, done, args.lr)
            log(done, loss=sum(losses) / len(losses), seconds=round(time.perf_counter() - begun, 1), zero=ZERO,
                **({f"held_t{a}-{b - 1}": v for (a, b), v in zip(BINS, held_out_losses(ema, held, abar), strict=True)}
                   if len(held) else {}))
            picture(args.out / "dissolving.png", ema, prepare(train[:4]), held, abar)
            if done == args.steps and len(held) > 1:
                memorised(ema, prepare(train[:max(len(held), 32)]), held, abar, log, done)
            save_checkpoint(args.out / "diffusion.pt", "diffusion", settings, {
                "step": done, "unet": unet.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})
            losses = []
    print(f"stage 1 done: {args.out}/diffusion.pt, picture in {args.out}/dissolving.png")


if __name__ == "__main__":
    run(main)
