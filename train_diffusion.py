"""Stage 1: train a small DDPM on the normal images. Its one-step reverse is what dissolves (DIA Sec. 3.1).

    python train_diffusion.py --quick                        # ELPV, minutes on a CPU
    python train_diffusion.py --data path/to/folder          # the paper's budget: 25,000 steps of 64 images

Writes OUT/diffusion.pt (UNet, its EMA, and until the last step the optimizer), OUT/dissolving.png (the
paper's Fig. 1), OUT/log.jsonl.
"""

import torch
from torch.nn.functional import l1_loss
from tqdm import tqdm

from dia_lib import (
    Log, Step, UNet, alpha_bar, autocast, batch_indices, check_batch, check_loss, check_weights, dissolve,
    ema_weight, flip, found, launches, load_data, make_parser, number, pad_to, parse_training, pick_device,
    precision, q_sample, run, save_checkpoint, save_grid, step_generator, to_01, to_float, to_pm1,
    training_flags, update_ema,
)

QUICK = dict(dim=16, steps=600, batch_size=16, lr=1e-3)
BINS = [(0, 30), (30, 130), (130, 300), (300, 1000)]        # of t, for the held-out loss
ZERO = 0.798                                               # E|eps|, the L1 loss of predicting no noise


def arguments(argv=None):
    parser = make_parser(__doc__)
    parser.set_defaults(steps=25000, lr=8e-5)
    training_flags(parser, steps=25000, batch_size=64, lr="8e-5")
    parser.add_argument("--dissolve-size", type=number(low=8, multiple=8), default=32,
                        help="pixels at which images are dissolved (default: 32, Sec. 4.1)")
    parser.add_argument("--dim", type=number(low=8, multiple=8), default=64,
                        help="channels of the UNet's first stage (default: 64)")
    parser.add_argument("--schedule", choices=["cosine", "linear"], default="cosine",
                        help="noise (default: cosine)")
    parser.add_argument("--fraction", type=number(float, above=0, high=1), default=1.0,
                        help="share of the normals used (Table 3; default: 1)")
    return parse_training(parser, "diffusion", QUICK, argv)


@torch.no_grad()
def held_out_losses(unet, held, abar):
    """{bin: L1 loss} at fixed noise and t, 4 values of t an image. held: (n, C, H, W) in [-1, 1]."""
    losses = {}
    for i, (low, high) in enumerate(BINS):
        generator, total = step_generator("cpu", 0, "held-out noise", i), 0.0
        for _ in range(4):
            t = torch.randint(low, high, (len(held),), generator=generator).to(held.device)
            eps = torch.randn(held.shape, generator=generator).to(held.device)
            for xb, tb, eb in zip(held.split(64), t.split(64), eps.split(64), strict=True):
                with autocast(held.device):
                    predicted = unet(q_sample(xb, tb, eb, abar), tb)
                total += l1_loss(predicted.float(), eb, reduction="sum").item()
        losses[f"held_t{low}-{high - 1}"] = total / (4 * held.numel())
    return losses


def change(unet, x, abar):
    """Grey levels (of 255) by which dissolving at t = 30, 50, ... 110 changes each image of x, (n,)."""
    def one(x, t):
        x_hat = dissolve(unet, x, torch.full((len(x),), t, device=x.device), abar)
        return (x_hat - x).abs().mean((1, 2, 3)) * 127.5                                        # (b,)

    return torch.cat([sum(one(xb, t) for t in range(30, 130, 20)) / 5 for xb in x.split(64)])


def changes(unet, train, held, abar, learned):
    """How much dissolving changes training and held-out images; says so where it memorises the former.

    learned: is its loss below that of predicting no noise at all?
    """
    on_train, on_held = change(unet, train, abar), change(unet, held, abar)
    noise = (on_train.var() / len(on_train) + on_held.var() / len(on_held)).sqrt()         # of the difference
    if learned and len(on_held) >= 8 and on_train.mean() < on_held.mean() - 2 * noise:
        tqdm.write("dissolving changes training images less than held-out ones: the model has begun to "
                   "memorise them, so stage 1 is too long; use fewer --steps")
    return {"change_train": on_train.mean().item(), "change_held": on_held.mean().item()}


def picture(path, unet, train, held, abar):
    """Four training and four held-out images (rows), and dissolved at t = 0, 50, 100, 200, 400 (columns)."""
    times = (0, 50, 100, 200, 400)
    x = torch.cat([train[:4], held[:4]])
    columns = [x] + [dissolve(unet, x, torch.full((len(x),), t, device=x.device), abar) for t in times]
    names = ["training"] * len(train[:4]) + ["held out"] * len(held[:4])
    save_grid(path, list(to_01(torch.stack(columns, 1))), ["real"] + [f"t = {t}" for t in times], 3, names)


def main():
    args, state = arguments()
    device, start = pick_device(args.device), state["step"] if state else 0
    compiled, graph = launches(args.launch, args.steps - start, device)

    # Data
    data = load_data(args.data, args.dissolve_size, holdout=args.holdout, normal_class=args.normal_class)
    n, channels, H = max(1, round(len(data.train) * args.fraction)), data.train.shape[1], args.dissolve_size
    check_batch(args.batch_size, n)
    if state and state["settings"]["fingerprint"] != data.fingerprint:
        raise SystemExit(f"--resume: {args.out}/diffusion.pt was trained on other images than --data "
                         f"{args.data} has now.")
    if start == args.steps:
        print(f"stage 1 done: {args.out}/diffusion.pt has all its {args.steps} steps already")
        return

    def prepare(images):                                    # (B, C, h, h) uint8 -> (B, C, H, H) in [-1, 1]
        return to_pm1(pad_to(to_float(images, channels, device), H))

    held = prepare(data.held[~data.calibration])            # the calibration half is never looked at
    seen = prepare(data.train[:min(n, max(len(held), 32))])                 # beside them, in reports

    # Model
    torch.manual_seed(args.seed)
    unet = UNet(channels, args.dim).to(device, memory_format=torch.channels_last)
    ema = UNet(channels, args.dim).to(device, memory_format=torch.channels_last).requires_grad_(False)
    ema.load_state_dict(unet.state_dict())
    abar = alpha_bar(args.schedule).to(device)

    # Optimizer
    optimizer = torch.optim.Adam(unet.parameters(), args.lr, (0.9, 0.99), fused=True, capturable=True)

    # Resume
    if state:
        unet.load_state_dict(state["unet"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["capturable"] = True              # which an older checkpoint has not
    forward = torch.compile(unet) if compiled else unet
    log = Log(args.out, "diffusion", start, args.steps)
    settings = {k: getattr(args, k) for k in args.given}
    settings |= {"given": args.given, "channels": channels, "fingerprint": data.fingerprint}
    print(f"stage 1, {found(data)}\nUNet {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters; "
          f"{n} images in batches of {args.batch_size}, {args.steps} steps, lr {args.lr:g}, seed "
          f"{args.seed}; {precision(device)}", flush=True)

    # Train
    def step_of(images, u_t, u_flip, eps, weight):
        """images (B, C, h, h) uint8; u_t, u_flip (B,) in [0, 1); eps (B, C, H, W); weight () of the EMA."""
        x0, t = flip(prepare(images), u_flip), (u_t * len(abar)).long()     # (B, C, H, W), (B,) in 0..T-1
        xt = q_sample(x0, t, eps, abar)
        with autocast(device):
            predicted = forward(xt, t)
        loss = l1_loss(predicted.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, unet, weight)
        return [loss.detach()]

    train_step = Step(step_of, device, graph)
    every = args.save_every or max(1, min(2500, args.steps // 4))      # steps between reports and checkpoints
    running, losses = [], []
    bar = tqdm(range(start, args.steps), "stage 1", args.steps, initial=start, unit="image",
               unit_scale=args.batch_size, disable=None)
    for step in bar:
        images = data.train[batch_indices(n, args.batch_size, args.seed, step)]
        generator = step_generator("cpu", args.seed, "diffusion", step)
        u_t, u_flip = torch.rand(2, args.batch_size, generator=generator)
        eps = torch.randn(args.batch_size, channels, H, H, generator=generator)
        (loss,) = train_step(images, u_t, u_flip, eps, ema_weight(step))

        done = step + 1
        running.append(loss)
        log.estimate(done, loss, train_step.warm)
        due = done % every == 0 or done == args.steps
        if due or done % 20 == 0:                                   # the only place that waits for results
            values, running = torch.stack(running).tolist(), []
            check_loss(values, done, args.lr)
            bar.set_postfix(loss=f"{values[-1]:.4f}")
            losses += values
        if due:
            check_weights(unet, done, args.lr)
            on_held = held_out_losses(ema, held, abar) if len(held) else {}
            if len(held) > 1:
                on_held |= changes(ema, seen, held, abar, on_held["held_t30-129"] < ZERO)
            log(done, loss=sum(losses) / len(losses), zero=ZERO, **on_held, seconds=log.seconds())
            losses = []
        if due and (done == args.steps or args.save_every or log.affords()):
            with log.saving():
                picture(args.out / "dissolving.png", ema, prepare(data.train[:4]), held, abar)
                result = {"step": done, "ema": ema.state_dict()}
                if args.save_every:
                    save_checkpoint(args.out / f"step-{done}/diffusion.pt", "diffusion", settings, result)
                result |= {"unet": unet.state_dict()}
                if done < args.steps:
                    result |= {"optimizer": optimizer.state_dict()}
                save_checkpoint(args.out / "diffusion.pt", "diffusion", settings, result)
    print(f"stage 1 done: {args.out}/diffusion.pt, picture in {args.out}/dissolving.png")


if __name__ == "__main__":
    run(main)
