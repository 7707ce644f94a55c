"""Stage 2: train the encoder by contrasting images with their dissolved selves (DIA Sec. 3.2).

    python train_dia.py --quick                                                  # ELPV, minutes on a CPU
    python train_dia.py --data path/to/folder                                    # the paper's budget
    python train_dia.py --quick --dissolve none --out runs/elpv-csi              # the baseline, CSI

Needs the diffusion.pt of train_diffusion.py, but for --dissolve other than diffusion. Writes OUT/dia.pt and
OUT/log.jsonl.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dia_lib import (
    Encoder, K, Log, Step, autocast, batch_indices, check_batch, check_loss, check_weights, contrastive_loss,
    dissolve_view, draw_step, embed, flip, found, launches, load_checkpoint, load_data, load_unet,
    make_parser, make_views, number, parse_training, pick_device, precision, run, save_checkpoint, sha256_of,
    to_float, training_flags,
)

QUICK = dict(image_size=64, steps=400, batch_size=16)
MODES = ["diffusion", "gaussian", "median", "resize", "copy", "none"]


def arguments(argv=None):
    parser = make_parser(__doc__)
    parser.set_defaults(lr=1.0)
    training_flags(parser, "1000 epochs of at most 201", 32, "1")
    parser.add_argument("--image-size", type=number(low=8, multiple=2),
                        help="pixels (default: 224, an npz file's own if smaller)")
    parser.add_argument("--diffusion", metavar="PATH",
                        help="stage 1's checkpoint (default: OUT/diffusion.pt); "
                        "other third views take its size (default: 32)")
    parser.add_argument("--dissolve", choices=MODES, default="diffusion",
                        help="how the third view is made; none is CSI (default: diffusion)")
    parser.add_argument("--t-range", type=number(low=0, high=1000), nargs=2, metavar=("A", "B"),
                        help="t is drawn from [A, B) for each image (default: 30 130, Sec. 4.1)")
    parser.add_argument("--shift", choices=["rotate", "perm"],
                        help="shifting transformation (default: rotate; elpv: perm)")
    parser.add_argument("--twins", choices=["negative", "excluded"], default="negative",
                        help="an image's own dissolved view in the loss's denominator (default: negative)")
    parser.add_argument("--gamma", type=number(float, low=0), default=1.0,
                        help="weight of the shift classifier's loss, Eq. 9 (default: 1)")
    args, state = parse_training(parser, "dia", QUICK, argv)
    if args.t_range and args.t_range[0] >= args.t_range[1]:
        parser.error(f"--t-range {args.t_range[0]} {args.t_range[1]}: needs A below B")
    if args.lr > 1e30:
        parser.error(f"--lr {args.lr:g}: needs a number up to 1e30")
    return args, state


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive SGD, You et al. 2017, arXiv:1708.03888, Alg. 1, as torchlars has it (the paper's).

    Local rate = trust * |w| / (|g| + weight_decay * |w|), 1 where a norm is 0; then SGD with momentum.
    """

    def __init__(self, params, momentum=0.9, weight_decay=1e-6, trust=0.001):
        super().__init__(params, dict(momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, lr):
        """lr: (), the learning rate of this step."""
        for group in self.param_groups:
            decay, params = group["weight_decay"], [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, momentum = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))  # (parameters,)
            local = group["trust"] * w / (g + decay * w + 1e-8)
            local = torch.where((w > 0) & (g > 0), local, 1.0)
            update = torch._foreach_add(grads, params, alpha=decay)
            torch._foreach_mul_(update, list(local.unbind()))
            torch._foreach_mul_(momentum, group["momentum"])
            torch._foreach_add_(momentum, update)
            torch._foreach_sub_(params, torch._foreach_mul(momentum, lr))


def learning_rate(step, steps, peak):
    """Warm-up from peak/10 over 1% of the steps, then cosine to 0."""
    warm = max(1, steps // 100)
    if step < warm:
        return peak * (0.1 + 0.9 * (step + 1) / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


@torch.no_grad()
def readable(z, logits, labels, views):
    """Numbers of a batch that one can read: shift accuracy, mean cosines. z: (V*N, D) view-major, N = K*B."""
    N = len(z) // views
    v = F.normalize(z.float(), dim=1).view(views, K, N // K, -1)            # (V, K, B, D)
    cos = v[0] @ v[1].transpose(1, 2)                                       # (K, B, B): of the same shift
    own = cos.diagonal(dim1=1, dim2=2)                                      # (K, B)
    other = (cos.sum() - own.sum()) / max(1, cos.numel() - own.numel())
    row = {"shift_acc": (logits.argmax(1) == labels).float().mean(),
           "sim_positive": own.mean(), "sim_other": other}
    if views == 3:
        row["sim_twin"] = (v[0] * v[2]).sum(2).mean()                       # an image and its third view
    return {k: v.item() for k, v in row.items()}


def shift_accuracy(encoder, held, shift, device):
    """The shift classifier's accuracy on held-out normals (n, C, H, W) uint8; exits if z is not finite."""
    z, logits = embed(encoder, held, shift, 1, device)
    if not z.isfinite().all():
        raise SystemExit("the embeddings of held-out images are not finite. Try a smaller --lr.")
    return {"shift_acc_held": (logits.argmax(2) == torch.arange(K)).float().mean().item()}


def load_stage1(args, data, state):
    """Stage 1's checkpoint and what it is known by; exits if it is not of these images."""
    path = Path(args.diffusion or args.out / "diffusion.pt")
    stage1, digest = load_checkpoint(path, "diffusion", "cpu"), sha256_of(path)
    s = stage1["settings"]
    if s["fingerprint"] != data.fingerprint:
        raise SystemExit(f"{path} was trained on other images than these ({s['data']}, --holdout "
                         f"{s['holdout']}): use the same --data and --holdout in both stages.")
    if state and state["settings"]["diffusion_sha256"] != digest:
        raise SystemExit(f"--resume: {path} is not the stage 1 that this run was started with; name it by "
                         "--diffusion.")
    if stage1["step"] < s["steps"]:
        print(f"note: {path} stopped at step {stage1['step']} of {s['steps']}")
    given = {k: v for k, v in s["given"].items() if k not in ("data", "save_every")}
    return stage1, {"dissolve_size": s["dissolve_size"], "diffusion": str(path), "diffusion_sha256": digest,
                    "stage1": {**given, "steps": stage1["step"]}}


def main():
    args, state = arguments()
    device = pick_device(args.device)

    # Data
    data = load_data(args.data, args.image_size, holdout=args.holdout, normal_class=args.normal_class)
    M, channels, size = len(data.train), data.train.shape[1], data.train.shape[-1]
    check_batch(args.batch_size, M)
    if size % 2:
        raise SystemExit(f"--image-size {size}: the shifts need an even number; use {size - 1}.")
    if state and state["settings"]["fingerprint"] != data.fingerprint:
        raise SystemExit(f"--resume: {args.out}/dia.pt was trained on other images than --data {args.data} "
                         "has now.")
    args.image_size, args.shift = size, args.shift or data.defaults["shift"]
    args.t_range = args.t_range or list(data.defaults["t_range"])
    args.steps = args.steps or 1000 * min(M // args.batch_size, 201)            # the released code's epoch
    views, start = 2 if args.dissolve == "none" else 3, state["step"] if state else 0
    if start == args.steps:
        print(f"stage 2 done: {args.out}/dia.pt has all its {args.steps} steps already")
        return
    compiled, graph = launches(args.launch, args.steps - start, device)

    # Stage 1
    unet = abar = small = None
    known = {"dissolve_size": 32, "diffusion": None, "diffusion_sha256": None, "stage1": None}
    if args.dissolve == "diffusion" or args.diffusion:
        stage1, known = load_stage1(args, data, state)
    pixels = known["dissolve_size"]
    if args.dissolve == "diffusion":
        unet, abar = load_unet(stage1, device)
    if args.dissolve not in ("copy", "none"):           # read at the dissolving size, just as by stage 1
        smaller = pixels if unet else min(pixels, size)
        small = load_data(args.data, smaller, ("train",), args.holdout, args.normal_class).train

    # Model
    torch.manual_seed(args.seed)
    stem = "cifar" if size <= 32 else "imagenet"
    encoder = Encoder(channels, K, stem).to(device, memory_format=torch.channels_last)

    # Optimizer
    optimizer = LARS(encoder.parameters())

    # Resume
    if state:
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
    forward, unet = (torch.compile(encoder), unet and torch.compile(unet)) if compiled else (encoder, unet)
    log = Log(args.out, "dia", start, args.steps)
    settings = {k: getattr(args, k) for k in args.given}
    settings |= {"given": args.given, "channels": channels, "stem": stem, **known}
    settings |= {"fingerprint": data.fingerprint, "window": data.defaults["window"]}
    print(f"stage 2, {found(data)}\ndissolve {args.dissolve}, t in [{args.t_range[0]}, {args.t_range[1]}), "
          f"shift {args.shift}; batches of {args.batch_size} x {K} shifts x {views} views, {args.steps} "
          f"steps, LARS lr {args.lr:g}, seed {args.seed}; {precision(device)}", flush=True)

    # Train
    labels = torch.arange(K, device=device).repeat_interleave(args.batch_size).repeat(views)        # (V*K*B,)

    def step_of(u_t, u_flip, u, lr, images, smaller=None):
        """Draws of `draw_step`; lr (); images (B, C, H, H) and, to be dissolved, (B, C, h, h), uint8."""
        x = to_float(images, channels, device)                                  # (B, C, H, H)
        parts = [flip(x, u_v) for u_v in u_flip]                                # V of (B, C, H, H)
        if smaller is not None:                                                 # the third one is dissolved
            y = flip(to_float(smaller, channels, device), u_flip[2])            # (B, C, h, h)
            t = args.t_range[0] + (u_t * (args.t_range[1] - args.t_range[0])).long()            # (B,)
            parts[2] = dissolve_view(y, size, args.dissolve, unet, t, abar, pixels)
        x = make_views(parts, args.shift, u)                                    # (V*K*B, C, H, H), Eq. 5
        with autocast(device):
            z, logits = forward(x)                                              # (V*K*B, D), (V*K*B, K)
        contrast = contrastive_loss(z, views, twins=args.twins)                 # Eq. 6-7
        loss = contrast + args.gamma * F.cross_entropy(logits, labels)          # Eq. 8-9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lr)
        return torch.stack([loss, contrast]).detach(), z.detach(), logits.detach()

    train_step = Step(step_of, device, graph)
    report = max(1, min(100, args.steps // 20))
    every = args.save_every or max(1, min(2000, args.steps // 4))
    running = []
    bar = tqdm(range(start, args.steps), "stage 2", args.steps, initial=start, unit="image",
               unit_scale=args.batch_size, disable=None)
    for step in bar:
        batch = batch_indices(M, args.batch_size, args.seed, step)
        images = [part[batch] for part in (data.train, small) if part is not None]
        lr = learning_rate(step, args.steps, args.lr)
        draws = draw_step(args.seed, step, views, args.batch_size)
        pair, z, logits = train_step(*draws, torch.tensor(lr), *images)

        done = step + 1
        running.append(pair)                                                    # loss, its contrastive part
        log.estimate(done, pair[0], train_step.warm)
        due = done % every == 0 or done == args.steps
        if due or done % report == 0:                               # the only place that waits for results
            (losses, contrasts), running = torch.stack(running, 1).tolist(), []
            check_loss(losses, done, lr)
            row = readable(z, logits, labels, views)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", shift_acc=f"{row['shift_acc']:.2f}")
            if due:
                check_weights(encoder, done, lr)
                held = data.held[~data.calibration][:512]                  # the other half is never looked at
                row |= shift_accuracy(encoder, held, args.shift, device) if len(held) else {}
            log(done, loss=sum(losses) / len(losses), contrastive=sum(contrasts) / len(contrasts), **row,
                lr=lr, seconds=log.seconds())
        if due and (done == args.steps or args.save_every or log.affords()):
            with log.saving():
                result = {"step": done, "encoder": encoder.state_dict()}
                if args.save_every:
                    save_checkpoint(args.out / f"step-{done}/dia.pt", "dia", settings, result)
                if done < args.steps:
                    result |= {"optimizer": optimizer.state_dict()}
                save_checkpoint(args.out / "dia.pt", "dia", settings, result)
    print(f"stage 2 done: {args.out}/dia.pt")


if __name__ == "__main__":
    run(main)
