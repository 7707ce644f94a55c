"""CKAAD: an auto-encoder of feature maps, taught by labelled anomalies to make anomalous patches normal.

"Boosting Fine-Grained Visual Anomaly Detection with Coarse-Knowledge-Aware Adversarial Learning" (AAAI 2025),
with its equation numbers: an energy discriminator sets normal patches apart from reconstructed ones and from
those of anomalous images, of which none is known to be anomalous itself. An image's map is the distance
between its features and their reconstruction.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m weakly_supervised.ckaad, in the project's folder.")

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import ElasticTransform
from tqdm import tqdm

from dia_lib import Log, autocast, batch_indices, check_batch, check_loss, number, run
from extras.heat_maps import smoothed
from weakly_supervised.common import Setting, cycle, finish, flags, load, runs_of, shots_flags
from weakly_supervised.resume import Checkpoint, results_of

STRATEGIES = "recon", "minus-anomaly", "gan", "image", "patch"     # as in Tab. 3
MARGIN, GAMMA = 5.0, 0.5                                                    # a and gamma of Eq. 11
ENERGIES = ("energy_normal", "energy_anomalous", "energy_reconstructed")    # in log.jsonl


class Block(nn.Module):
    """Residual block of two convolutions with instance norm; stride 2 halves the map, up doubles it."""

    def __init__(self, cin, cout, stride=1, up=False, last=nn.ReLU):
        super().__init__()

        def first(side):
            if up:
                return nn.ConvTranspose2d(cin, cout, 2, 2, bias=False)
            return nn.Conv2d(cin, cout, side, stride, side // 2, bias=False)

        self.body = nn.Sequential(first(3), norm(cout), nn.ReLU(), nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
                                  norm(cout))
        self.shortcut, self.last = nn.Identity(), last()
        if up or stride > 1 or cin != cout:
            self.shortcut = nn.Sequential(first(1), norm(cout))

    def forward(self, x):
        return self.last(self.body(x) + self.shortcut(x))


def norm(channels):
    return nn.InstanceNorm2d(channels, affine=True)


class AutoEncoder(nn.Module):
    """Maps [(n, C_s, h_s, w_s), ...], each half the size of the one before -> their reconstructions.  Eq. 1.

    channels: C_s of each.  signed: the features are no ReLU's output, and may be negative.  sizes: the maps'
    root mean squares, by which they are divided before they are fused. What is read of reconstructions does
    not depend on their scale.
    """

    def __init__(self, channels, signed=False, sizes=None):
        super().__init__()
        deepest, depth = channels[-1], len(channels)
        self.register_buffer("sizes", torch.tensor(sizes or [1.0] * depth))
        self.down = nn.ModuleList()                                      # each map to the size of the deepest
        for i, c in enumerate(channels):
            widths = [c * 2 ** j for j in range(depth - i)]
            self.down.append(nn.Sequential(*[layer for cin, cout in itertools.pairwise(widths) for layer in (
                nn.Conv2d(cin, cout, 3, 2, 1, bias=False), norm(cout), nn.ReLU())]))
        fused = sum(c * 2 ** (depth - 1 - i) for i, c in enumerate(channels))
        self.bottleneck = nn.Sequential(Block(fused, 2 * deepest, stride=2), Block(2 * deepest, 2 * deepest))
        self.up, cin = nn.ModuleList(), 2 * deepest
        for c in reversed(channels):
            last = nn.Identity if signed else nn.ReLU
            self.up.append(nn.Sequential(Block(cin, c, up=True), Block(c, c, last=last)))
            cin = c
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps):
        x = [down(m / size) for down, m, size in zip(self.down, maps, self.sizes, strict=True)]
        x = self.bottleneck(torch.cat(x, 1))
        found = []
        for up in self.up:
            x = up(x)
            found.append(x)
        return [m.float() for m in reversed(found)]


class Discriminator(nn.Module):
    """Energy >= 0 of each patch, or image: low for normal ones. Maps (n, C, h, w) -> (n, h*w), or (n, 1)."""

    def __init__(self, channels, image=False):
        super().__init__()
        self.image = image
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.LeakyReLU(0.1),
                                  nn.Conv2d(channels, channels, 1, bias=False), nn.LeakyReLU(0.1))
        self.energy = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, maps):
        x = self.body(F.normalize(maps, dim=1)).float()
        if self.image:
            x = x.mean((2, 3), keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            return self.energy(x).flatten(1).abs()


def reconstruction_loss(maps, found):
    """Sum over layers of 1 - cos of flattened maps, the mean over images: lists of (n, C, h, w).  Eq. 2."""
    pairs = zip(maps, found, strict=True)
    return sum((1 - F.cosine_similarity(m.flatten(1), f.flatten(1))).mean() for m, f in pairs)


def discriminator_loss(normal, anomalous, generated, gamma=GAMMA, margin=MARGIN):
    """Energies of patches, tensors of any shape -> scalar.  Eq. 8, 11; gamma 1: without the anomalies."""
    loss = normal.mean() + gamma * (margin - generated).relu().mean()
    return loss + (1 - gamma) * (margin - anomalous).relu().mean() if gamma < 1 else loss


class CKAAD(nn.Module):
    """Auto-encoder and, for each layer, a discriminator; strategy: one of STRATEGIES.

    Below, normal, anomalous and found are lists of feature maps [(n, C, h, w), ...]; found is what
    `reconstruct` gave of both.
    """

    def __init__(self, channels, strategy="patch", signed=False, sizes=None):
        super().__init__()
        self.strategy, self.gamma = strategy, 1.0 if strategy == "gan" else GAMMA
        self.autoencoder = AutoEncoder(channels, signed, sizes)
        self.adversarial = strategy in ("gan", "image", "patch")
        self.discriminators = nn.ModuleList([Discriminator(c, strategy != "patch") for c in channels]
                                            if self.adversarial else [])

    def reconstruct(self, normal, anomalous=None):
        maps = [torch.cat(pair) for pair in zip(normal, anomalous, strict=True)] if anomalous else normal
        with autocast(normal[0].device):
            return self.autoencoder(maps)

    def energies(self, maps):
        with autocast(maps[0].device):
            return [d(m) for d, m in zip(self.discriminators, maps, strict=True)]

    def discriminator_loss(self, normal, anomalous, found):
        """Sum over layers of Eq. 11 ("image": Eq. 8; "gan": without the anomalies' term).

        No gradient for the auto-encoder. Also returns the mean energies of normal, anomalous and
        reconstructed patches, (3,), to be looked at.
        """
        energies = [self.energies(maps) for maps in (normal, anomalous, [f.detach() for f in found])]
        loss = sum(discriminator_loss(*layer, self.gamma) for layer in zip(*energies, strict=True))
        return loss, torch.stack([torch.cat(kind, 1).detach().mean() for kind in energies])

    def loss(self, normal, anomalous, found, weight):
        """What the auto-encoder learns by, Eq. 13 ("recon": Eq. 2; "minus-anomaly": Eq. 4).

        No gradient for the discriminators.
        """
        n = len(normal[0])
        loss = reconstruction_loss(normal, [f[:n] for f in found])
        if self.strategy == "minus-anomaly":
            return loss - weight * reconstruction_loss(anomalous, [f[n:] for f in found])
        if not self.adversarial:
            return loss
        self.discriminators.requires_grad_(False)
        energies = self.energies(found)
        self.discriminators.requires_grad_(True)
        return loss + weight * self.gamma * sum(e.mean() for e in energies)     # what of Eq. 12 depends on it


def anomaly_maps(maps, found):
    """[(n, C, h, w), ...] and their reconstructions -> 1 - cos over channels, [(n, h, w), ...].  Eq. 14."""
    return [1 - F.cosine_similarity(m, f, dim=1) for m, f in zip(maps, found, strict=True)]


def whole_map(maps, size):
    """Anomaly maps [(n, h, w), ...], each brought to size x size, and summed: (n, 1, size, size)."""
    return sum(F.interpolate(m[:, None], (size, size), mode="bilinear", align_corners=True) for m in maps)


def image_scores(whole):
    """Summed maps (n, 1, H, H) -> (n,): the mean of the highest pixels, once smoothed.

    At a size of 256 the highest are 100, as released; at others as much of the image.
    """
    highest = max(1, round(100 * (whole.shape[-1] / 256) ** 2))
    return smoothed(whole).flatten(1).topk(highest).values.mean(1)


def scorer(setting, model, batch=32):
    """How `finish` scores images: (n,), and the summed maps (n, size * size), which it smooths itself."""
    @torch.no_grad()
    def score(images):
        arrays, scores, wholes = setting.features(images), [torch.empty(0)], [torch.empty(0, 1)]
        for i in range(0, len(images), batch):
            maps = load(arrays, slice(i, i + batch), setting.device)
            found = model.autoencoder(maps)                     # in float32: the same alone and in a batch
            whole = whole_map(anomaly_maps(maps, found), setting.size)
            scores.append(image_scores(whole).cpu())
            wholes.append(whole.flatten(1).cpu())
        return torch.cat(scores), torch.cat(wholes[1:] or wholes)
    return score


def distorted(images, seed):
    """Elastically distorted copies of normal images (n, C, H, W): anomalies where none is labelled.

    As in the paper's appendix, by torchvision's standards at 256 pixels but for alpha 200; at other sizes by
    as much of the image.
    """
    part = images.shape[-1] / 256
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transform = ElasticTransform(alpha=200.0 * part ** 2, sigma=5.0 * part)
        return torch.stack([transform(image) for image in images])


def train(setting, model, normals, anomalies, out):
    """Train a CKAAD model on arrays of feature maps [(n, C, h, w), ...]; from OUT/ckaad.pt with --resume."""
    args, device = setting.args, setting.device
    def adam(network, lr):
        return torch.optim.Adam(network.parameters(), lr, betas=(0.5, 0.999), fused=True)

    optimizer = adam(model.autoencoder, args.lr)
    critic = adam(model.discriminators, args.critic_lr) if model.adversarial else None
    n, labelled, epoch = len(normals[0]), len(anomalies[0]), len(normals[0]) // args.batch_size  # its steps
    optimizers = {"optimizer": optimizer} | ({"critic": critic} if critic else {})
    checkpoint = Checkpoint(setting, out, model, optimizers, labelled)
    start, steps, losses = checkpoint.load(), args.epochs * epoch, []
    log = Log(out, "ckaad", start // epoch)
    for step in tqdm(range(start, steps), args.strategy, steps, initial=start, unit="step", disable=None):
        x = load(normals, batch_indices(n, args.batch_size, args.seed, step).sort().values, device)
        y = load(anomalies, cycle(labelled, args.batch_size, args.seed, step), device) if labelled else None
        found = model.reconstruct(x, y)
        if critic:
            discriminate, energies = model.discriminator_loss(x, y, found)
            critic.zero_grad()
            discriminate.backward()
            nn.utils.clip_grad_norm_(model.discriminators.parameters(), 1.0)
            critic.step()
        loss = model.loss(x, y, found, args.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(torch.stack([loss.detach(), *([discriminate.detach(), *energies] if critic else [])]))
        done = step + 1
        if done % epoch == 0:
            values = torch.stack(losses).cpu()                              # (steps, 1 or 5)
            check_loss(values[:, 0].tolist(), done, args.lr, "--lr or --critic-lr" if critic else "--lr")
            losses = []
            log(done // epoch, show=False, seconds=log.seconds(),
                **dict(zip(("loss", "discriminator", *ENERGIES), values.mean(0).tolist(), strict=False)))
            checkpoint.save(done, args.lr)
    setting.begun = log.begun
    return model.eval()


def restore(settings, state, device):
    """The score of a run, from what it left: for extras.predict."""
    setting = Setting.of_run(settings, device)
    model = CKAAD(state["channels"], settings["strategy"], state["signed"])
    model.load_state_dict(state["model"])
    return scorer(setting, model.to(device).eval())


def main():
    parser = shots_flags(flags(__doc__.splitlines()[0], layers=[2, 3], size=160))
    parser.add_argument("--strategy", choices=STRATEGIES, default="patch", help="what the labelled anomalies "
                        "serve for: nothing (recon), to be reconstructed badly, or one of three adversarial "
                        "losses (default: patch)")
    parser.add_argument("--lambda", dest="weight", type=number(float, 0), default=0.02, help="weight of the "
                        "adversarial loss; in minus-anomaly of the anomalies' reconstruction (default: 0.02)")
    parser.add_argument("--epochs", type=number(), default=40,
                        help="passes over the normal images (default: 40)")
    parser.add_argument("--batch-size", type=number(), default=8,
                        help="normal images a step, and as many anomalies (default: 8)")
    parser.add_argument("--lr", type=number(float, above=0), default=1e-3,
                        help="Adam's learning rate for the auto-encoder (default: 1e-3)")
    parser.add_argument("--critic-lr", type=number(float, above=0), default=1e-4,
                        help="Adam's learning rate for the discriminators (default: 1e-4)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckaad.pt, with the same flags")
    setting = Setting(parser, "ckaad")
    args, data = setting.args, setting.data
    check_batch(args.batch_size, len(data.train))
    if args.layers != list(range(args.layers[0], args.layers[-1] + 1)):
        raise SystemExit(f"--layers {' '.join(map(str, args.layers))}: needs neighbours, as 2 3.")
    if args.strategy == "recon":                                            # is tested on all
        if args.shots or args.labelled:
            raise SystemExit("--strategy recon learns from no labelled anomaly: leave --shots and --labelled "
                             "out.")
        args.shots = [0]
    runs = runs_of(setting, none=True)
    blank = torch.zeros(1, setting.backbone.channels, setting.size, setting.size, device=setting.device)
    sides = [found.shape[2] for found in setting.backbone(blank, args.layers)]
    if any(a != 2 * b for a, b in itertools.pairwise(sides)) or sides[-1] % 2 or sides[-1] < 4:
        unit = 2 * 2 ** round(math.log2(setting.size / sides[-1]))
        raise SystemExit(f"--image-size {setting.size}: the sides of the maps are "
                         f"{', '.join(map(str, sides))}; each must be half the one before, and the last even "
                         f"and at least 4: take a multiple of {unit}, from {2 * unit} on.")
    setting.say(f"strategy {args.strategy}", f"{args.epochs} epochs")
    maps = setting.begin()
    some = [array[::-(-len(array) // 64)].astype(np.float32) for array in maps]           # of up to 64 images
    signed, sizes = any((m < 0).any() for m in some), [float(np.square(m).mean() ** 0.5) for m in some]
    channels = [array.shape[1] for array in maps]
    for out, shots in runs:
        metrics = results_of(setting, out, len(shots.images))
        if metrics:
            continue
        if args.strategy == "recon":
            anomalies = [array[:0] for array in maps]
        else:
            images = shots.images if len(shots.images) else distorted(data.train, args.seed)
            anomalies = setting.features(images, "anomalies")
        torch.manual_seed(args.seed)                                        # the first weights
        model = CKAAD(channels, args.strategy, signed, sizes).to(setting.device)
        model = train(setting, model, maps, anomalies, out)
        state = {"model": model.state_dict(), "channels": channels, "signed": signed}
        metrics = finish(setting, scorer(setting, model), state, out, shots)
    print(f"auroc {metrics['auroc']:.4f}")


if __name__ == "__main__":
    run(main)
