"""DRA: a network trained end to end by a few labelled anomalies and many made ones, a head for each kind.

Ding, Pang and Shen 2022, "Catching Both Gray and Black Swans" (arXiv:2203.14506), Sec. 3, with its equation
numbers. `--heads seen` is DevNet (arXiv:2108.00462): the labelled anomalies alone, by the same loss.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m weakly_supervised.dra, in the project's folder.")

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from dia_lib import (
    Log, autocast, batch_indices, check_loss, number, run, step_generator, to_channels, to_float,
)
from extras.choose import cut_paste
from weakly_supervised.common import Setting, cycle, finish, flags, runs_of, shots_flags
from weakly_supervised.resume import Checkpoint, results_of

HEADS = ("seen", "pseudo", "residual", "normality")
NORMAL, SEEN, PSEUDO = 0, 1, 2                                              # kinds of training images
LEARNS = {                                                        # head: kinds that it sees, kinds with y = 1
    "seen": ((NORMAL, SEEN), (SEEN,)),                                      # Eq. 3
    "pseudo": ((NORMAL, PSEUDO), (PSEUDO,)),                                # Eq. 5
    "residual": ((NORMAL, SEEN, PSEUDO), (SEEN, PSEUDO)),                   # Eq. 8
    "normality": ((NORMAL, SEEN, PSEUDO), (NORMAL,)),                       # Eq. 9
    "joint": ((NORMAL, SEEN, PSEUDO), (SEEN, PSEUDO)),         # not disentangled (Sec. 4.5): one head for all
}
OPTIMIZERS = {"code": (2e-4, 1e-5), "paper": (1e-3, 1e-2)}             # Adam's learning rate and weight decay
STEPS = 20                                                                  # steps an epoch


class PatchHead(nn.Module):
    """Score of each position by a 1x1 convolution; the image's is the mean of the highest tenth (Eq. 2-3).

    forward(maps (n, C, h, w)) -> image scores (n,), position scores (n, h*w), all >= 0.  composite: a 3x3
    convolution before.
    """

    def __init__(self, channels, composite=False):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.before = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()) if composite else nn.Identity()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, maps):
        positions = self.score(self.before(maps)).flatten(1).abs()
        return positions.topk(max(1, positions.shape[1] // 10)).values.mean(1), positions


class NormalityHead(nn.Module):
    """Score of the mean over positions, high for normal images (Eq. 9): maps (n, C, h, w) -> (n,), >= 0."""

    def __init__(self, channels):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(channels, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, maps):
        return self.score(maps.mean((2, 3))).squeeze(1).abs()


class DRA(nn.Module):
    """Backbone and heads.

    images: some normal ones (n, channels, H, W) in [0, 1]; size: pixels that all are brought to. The maps are
    divided by the deviation they have on these before training: heads that begin far above the margin of 5,
    as on efficientnet_lite0, learn nothing from anomalies. maps(x): images -> feature maps (n, C, h, w), one
    for each scale: 1, and 1/2 if scales is 2. forward(maps, reference): reference, for each scale the mean
    map (1, C, h, w) of normal images -> {head: scores (n,)}, the mean over scales, and the positions' scores
    at the first scale (n, h*w), the sum over heads.
    """

    def __init__(self, backbone, layer, images, heads=HEADS, scales=1, size=None):
        super().__init__()
        self.backbone, self.layer, self.scales, self.size = backbone, layer, scales, size or images.shape[-1]
        with torch.no_grad():
            first = backbone(self.fit(images.to(backbone.mean.device)), (layer,))[0]
        self.register_buffer("deviation", first.std())
        channels = first.shape[1]
        backbone.requires_grad_()
        for module in backbone.modules():               # efficientnet_lite0 has 0.01: too slow for 600 steps
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        self.heads = nn.ModuleDict({head: NormalityHead(channels) if head == "normality" else
                                    PatchHead(channels, composite=head == "residual") for head in heads})

    def fit(self, x):
        size = (self.size, self.size)
        return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)

    def maps(self, x):
        x = self.fit(x)
        with autocast(x.device):
            every = [x] if self.scales == 1 else [x, F.interpolate(x, scale_factor=0.5)]
            return [self.backbone(y, (self.layer,))[0] / self.deviation for y in every]

    def forward(self, maps, reference):
        scores, positions = dict.fromkeys(self.heads, 0.0), torch.zeros_like(maps[0][:, 0]).flatten(1)
        for i, (m, r) in enumerate(zip(maps, reference, strict=True)):
            for name, head in self.heads.items():
                found = head(r - m if name == "residual" else m)                                       # Eq. 7
                if name != "normality":
                    found, at = found
                    if i == 0:
                        positions = positions + at
                scores[name] = scores[name] + found / self.scales
        return scores, positions


def reference_of(maps):
    """The mean over images of maps [(n, C, h, w), ...]: [(1, C, h, w), ...].  Eq. 6."""
    return [m.mean(0, keepdim=True) for m in maps]


def anomaly_score(scores):
    """{head: (n,)} -> (n,): the heads for anomalies, less that for normality (Sec. 3.2, "... Inference")."""
    return sum(-value if head == "normality" else value for head, value in scores.items())


def deviation_loss(scores, y, generator, margin=5.0):
    """Mean of (1 - y) |dev| + y max(0, margin - dev), dev = (score - mean) / sd of 5,000 draws of N(0, 1).

    scores, y: (n,), y 1 for what shall score high.  Pang et al. 2019 (arXiv:1911.08623), Eq. 4-6.
    """
    prior = torch.randn(5000, generator=generator, device=scores.device)
    deviation = (scores - prior.mean()) / prior.std()
    return torch.where(y == 1, (margin - deviation).relu(), deviation.abs()).mean()


def head_losses(scores, kind, generator):
    """{head: deviation loss} over the images that each learns from; kind: (n,) NORMAL, SEEN or PSEUDO."""
    losses = {}
    for head, s in scores.items():
        sees, high = (torch.isin(kind, torch.tensor(kinds, device=kind.device)) for kinds in LEARNS[head])
        losses[head] = deviation_loss(s[sees], high[sees].float(), generator)
    return losses


def cutmix(image, generator):
    """A pseudo anomaly: a piece of image (C, H, W) in [0, 1], its colours jittered, pasted.  Eq. 4."""
    brightness, contrast, saturation, hue = ((torch.rand(4, generator=generator) - 0.5) * 0.2).tolist()
    change = [lambda p: TF.adjust_brightness(p, 1 + brightness),
              lambda p: TF.adjust_contrast(p, 1 + contrast),
              lambda p: TF.adjust_saturation(p, 1 + saturation), lambda p: TF.adjust_hue(p, hue)]

    def jitter(piece):
        for i in torch.randperm(4 if len(piece) == 3 else 2, generator=generator).tolist():  # grey has no hue
            piece = change[i](piece)
        return piece
    return cut_paste(image, jitter, generator)


def rotate(x, degrees):
    """Images (n, C, H, H), turned counterclockwise by degrees (n,); mirrored at the border."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    zero = torch.zeros_like(cos)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    # choice: not black there, as released: no test image has black corners
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def draw_batch(normals, anomalies, batch_size, pseudo, seed, step):
    """A step's images (batch_size, C, H, W) in [0, 1], turned by any angle, and their kind, on the CPU.

    normals, anomalies: uint8.  A third are labelled anomalies; pseudo: a third are pseudo anomalies, made
    from normal images, else these stay normal.
    """
    generator = step_generator("cpu", seed, "dra", step)
    third = batch_size // 3
    rows = batch_indices(len(normals), 2 * third, seed, step)
    parts = normals[rows], anomalies[cycle(len(anomalies), third, seed, step)]
    x = torch.cat([to_channels(part.float(), max(p.shape[1] for p in parts)) for part in parts]) / 255
    kind = torch.tensor([NORMAL] * 2 * third + [SEEN] * third)
    if pseudo:
        for i in torch.randperm(2 * third, generator=generator)[:third]:
            x[i], kind[i] = cutmix(x[i], generator), PSEUDO
    return rotate(x, (torch.rand(len(x), generator=generator) * 2 - 1) * 180), kind


def learning_rate(lr, epoch, optimizer):
    """"code": a tenth of it from epochs 9, 19, 29 (from 0) on, as released; "paper": constant."""
    return lr * 0.1 ** ((epoch + 1) // 10) if optimizer == "code" else lr


@torch.no_grad()
def settle(model, forward, batches=STEPS):
    """Take batch norm's means and variances anew, as the mean over forward(0), forward(1), ...

    Those kept while the weights change are of older weights, and with the paper's learning rate wrong by far.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    for i in range(batches):
        forward(i)


def train(setting, model, references, anomalies, out):
    """Train a DRA model on the setting's normals and the anomalies; from OUT/dra.pt with --resume.

    references: (R, C, H, W) in [0, 1]; anomalies: (n, C, H, W) uint8.
    """
    args, device, normals = setting.args, setting.device, setting.data.train
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=OPTIMIZERS[args.optimizer][1])
    checkpoint = Checkpoint(setting, out, model, {"optimizer": optimizer}, len(anomalies))
    start, losses = checkpoint.load(), []
    log = Log(out, "dra", start // STEPS)
    steps, pseudo = args.epochs * STEPS, any(PSEUDO in LEARNS[head][0] for head in args.heads)

    def forward(step):
        images, kind = draw_batch(normals, anomalies, args.batch_size, pseudo, args.seed, step)
        maps = model.maps(to_channels(torch.cat([references, images]).to(device), setting.backbone.channels))
        reference = reference_of([m[:len(references)] for m in maps])
        return model([m[len(references):] for m in maps], reference)[0], kind.to(device)

    model.train()
    name = f"{len(anomalies)} labelled"
    for step in tqdm(range(start, steps), name, steps, initial=start, unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, step // STEPS, args.optimizer)
        scores, kind = forward(step)
        found = head_losses(scores, kind, step_generator(device, args.seed, "deviation", step))
        loss = sum(found.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(torch.stack([loss.detach(), *(v.detach() for v in found.values())]))
        done = step + 1
        if done % STEPS == 0:
            values = torch.stack(losses).cpu()                                               # (20, 1 + heads)
            check_loss(values[:, 0].tolist(), done, args.lr)
            losses = []
            log(done // STEPS, show=False, seconds=log.seconds(),
                **dict(zip(("loss", *found), values.mean(0).tolist(), strict=True)))
            if done % (5 * STEPS) == 0 and done < steps:
                checkpoint.save(done, args.lr)
    settle(model, lambda i: forward(steps + i))
    checkpoint.save(steps, args.lr)
    setting.begun = log.begun
    return model.eval()


def scorer(setting, model, references, batch=32):
    """How `finish` scores images; the reference is that of the same clean images for all of them."""
    channels, device = setting.backbone.channels, setting.device
    with torch.no_grad():
        reference = reference_of(model.maps(to_channels(references.to(device), channels)))

    @torch.no_grad()
    def score(images):
        scores, positions = [torch.empty(0)], [torch.empty(0, reference[0][0, 0].numel())]
        for part in images.split(batch):
            of_heads, at = model(model.maps(to_float(part, channels, device)), reference)
            scores.append(anomaly_score(of_heads).cpu())
            positions.append(at.cpu())
        return torch.cat(scores), torch.cat(positions)
    return score


def model_of(setting, references):
    """An untrained DRA on the setting's backbone; references: (R, C, H, W) in [0, 1]."""
    args, backbone = setting.args, setting.backbone
    model = DRA(backbone.eval(), args.layers[0], to_channels(references, backbone.channels), args.heads,
                args.scales, setting.size)
    return model.to(setting.device, memory_format=torch.channels_last)


def restore(settings, state, device):
    """The score of a run, from what it left: for extras.predict."""
    setting = Setting.of_run(settings, device)
    model = model_of(setting, state["references"])
    model.load_state_dict(state["model"])
    return scorer(setting, model.eval(), state["references"])


def main():
    parser = shots_flags(flags(__doc__.splitlines()[0], layers=[3], size=160))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=LEARNS, help="which to train and "
                        f"to sum (default: {' '.join(HEADS)}; seen: DevNet; joint: one for all anomalies)")
    parser.add_argument("--references", type=number(), default=5,
                        help="normal images that residuals are taken from (default: 5)")
    parser.add_argument("--scales", type=int, choices=(1, 2), default=1,
                        help="2: also at half the size (default: 1)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="code",
                        help="Adam as released, 2e-4, decay 1e-5, a tenth after each 10 epochs; or as in the "
                        "paper, 1e-3, decay 1e-2 (default: code)")
    parser.add_argument("--lr", type=number(float, above=0),
                        help="the learning rate to begin with (default: the optimizer's)")
    parser.add_argument("--epochs", type=number(), default=30, help=f"of {STEPS} steps each (default: 30)")
    parser.add_argument("--batch-size", type=number(low=3, multiple=3), default=48, help="images a step, a "
                        "third of them labelled anomalies, a third pseudo anomalies (default: 48)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/dra.pt, with the same flags")
    setting = Setting(parser, "dra")
    args, data = setting.args, setting.data
    if len(args.layers) > 1:
        raise SystemExit(f"--layers {' '.join(map(str, args.layers))}: needs one of 1 to 4 here.")
    if args.batch_size // 3 * 2 > len(data.train):
        raise SystemExit(f"--batch-size {args.batch_size}: two thirds of it are normals, and there are "
                         f"{len(data.train)}.")
    if args.references > len(data.train):
        raise SystemExit(f"--references {args.references}: there are {len(data.train)} normal images.")
    args.lr = args.lr or OPTIMIZERS[args.optimizer][0]
    args.heads = [head for head in LEARNS if head in args.heads]
    runs = runs_of(setting)
    draws = [step_generator("cpu", args.seed, "references", i) for i in range(2)]
    picked = torch.randperm(len(data.train), generator=draws[0])[:args.references]
    turns = torch.rand(args.references, generator=draws[1]) * 360
    references = rotate(data.train[picked] / 255, turns)         # clean, and the same in training and testing
    setting.say(f"heads {', '.join(args.heads)}", f"{args.epochs * STEPS} steps of {args.batch_size}")
    fresh = {k: v.clone() for k, v in setting.backbone.state_dict().items()}
    for out, shots in runs:
        metrics = results_of(setting, out, len(shots.images))
        if metrics:
            continue
        torch.manual_seed(args.seed)                                        # the heads' first weights
        setting.backbone.load_state_dict(fresh)
        model = model_of(setting, references)
        model = train(setting, model, references, shots.images, out)
        state = {"model": model.state_dict(), "references": references}
        metrics = finish(setting, scorer(setting, model, references), state, out, shots)
    print(f"auroc {metrics['auroc']:.4f}")


if __name__ == "__main__":
    run(main)
