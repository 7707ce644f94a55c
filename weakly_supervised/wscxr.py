"""WSCXR: mine anomalous patches in a few labelled images, mix them with normal ones, tell both apart.

Ni et al., "Weakly Supervised Anomaly Detection for Chest X-Ray Image", Sec. II, with the paper's equation
numbers. Features of a frozen backbone; a linear discriminator, as released; an image's score is the mean of
its most anomalous patches (--top 0: of one, as there).
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m weakly_supervised.wscxr, in the project's folder.")

import argparse
import math
import time

import torch
from torch import nn
from tqdm import tqdm

from dia_lib import (
    Log, batch_indices, check_batch, check_loss, number, run, send, step_generator,
)
from weakly_supervised.common import AGAIN, Setting, finish, runs_of, shots_flags
from weakly_supervised.nearest import nearest_distance, patch_flags, patches, sample, scorer


def mine(anomalous, normal, retention):
    """The patches of anomalous images that are least like any normal one.  Eq. 4-5.

    anomalous: all patches of the labelled anomalies (n, C), of which floor(retention * n), at least 1, are
    kept; normal: (m, C).
    """
    distance = nearest_distance(anomalous, normal)
    return anomalous[distance.topk(max(1, math.floor(retention * len(anomalous)))).indices]


def mix(mined, normal, low, generator):
    """For each normal patch (n, C) an anomalous one, a m_a + (1 - a) m_n.  Eq. 6.

    m_a: a random one of mined (m, C); m_n: the normal patch; a: from U(low, 1).
    """
    picked = torch.randint(len(mined), (len(normal),), generator=generator, device=normal.device)
    alpha = torch.rand(len(normal), 1, generator=generator, device=normal.device) * (1 - low) + low
    return torch.lerp(normal, mined[picked], alpha)


def hinge(normal, anomalous):
    """max(0, 1/2 + D(normal)) + max(0, 1/2 - D(anomalous)), the mean.  Eq. 7, shifted by 1/2 as released."""
    return (0.5 + normal).relu().mean() + (0.5 - anomalous).relu().mean()


def discriminator(kind, channels):
    """(n, C) -> (n, 1). kind: "linear", no bias, Xavier-normal weights, as released; or "mlp"."""
    if kind == "linear":
        net = nn.Linear(channels, 1, bias=False)
        nn.init.xavier_normal_(net.weight)
        return net
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 1))


def train(setting, normal, mined, out):
    """A trained discriminator. normal (M, P, C) float16: patches of normals; mined (n, C) float32."""
    args, device = setting.args, setting.device
    torch.manual_seed(args.seed)
    net = discriminator(args.discriminator, normal.shape[2]).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, weight_decay=1e-5)
    low, epoch = 0.1 if args.mixing else 1.0, len(normal) // args.batch_size
    log, losses = Log(out, "wscxr", 0), []
    for step in tqdm(range(args.epochs * epoch), f"{len(mined)} mined patches", unit="step", disable=None):
        generator = step_generator(device, args.seed, "wscxr", step)
        rows = batch_indices(len(normal), args.batch_size, args.seed, step)
        x = send(normal[rows], device).flatten(0, 1).float()                                        # (B*P, C)
        loss = hinge(net(x), net(mix(mined, x, low, generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % (10 * epoch) == 0 or step + 1 == args.epochs * epoch:
            values = torch.stack(losses).tolist()
            check_loss(values, step + 1, args.lr)
            log((step + 1) // epoch, show=False, loss=sum(values) / len(values))
            losses = []
    return net.eval()


def by_discriminator(setting, net):
    """How images are scored: by what the discriminator says of their patches."""
    return scorer(setting, lambda x: net(x).squeeze(2))


def restore(settings, state, device):
    """The score of a run, from what it left: for extras.predict."""
    setting, weights = Setting.of_run(settings, device), state["discriminator"]
    net = discriminator(settings["discriminator"], next(iter(weights.values())).shape[1])
    net.load_state_dict(weights)
    return by_discriminator(setting, net.to(device).eval())


def main():
    parser = shots_flags(patch_flags(__doc__.splitlines()[0]))
    parser.add_argument("--retention", type=number(float, above=0, high=1), default=0.2,
                        help="share of the anomalies' patches that mining keeps (default: 0.2)")
    parser.add_argument("--mining", action=argparse.BooleanOptionalAction, default=True,
                        help="mine patches, or take them all")
    parser.add_argument("--mixing", action=argparse.BooleanOptionalAction, default=True,
                        help="mix them with normal patches, or take them as they are")
    parser.add_argument("--discriminator", choices=("linear", "mlp"), default="linear",
                        help="linear, as released, or the paper's MLP (default: linear)")
    parser.add_argument("--patches", type=number(low=0), default=200_000, help="normal patches that mining "
                        "compares with, drawn at random; 0: all (default: 200000)")
    parser.add_argument("--epochs", type=number(), default=100,
                        help="passes over the normal images (default: 100)")
    parser.add_argument("--batch-size", type=number(), default=8, help="normal images a step (default: 8)")
    parser.add_argument("--lr", type=number(float, above=0), default=2e-4,
                        help="Adam's learning rate (default: 2e-4)")
    setting = Setting(parser, "wscxr")
    args, data = setting.args, setting.data
    check_batch(args.batch_size, len(data.train))
    runs = runs_of(setting)
    setting.say(f"{args.epochs} epochs")
    maps = setting.begin()
    normal = torch.cat([x.half().cpu() for x in patches(setting, maps)])          # (M, P, C), 220 kB an image
    known = sample(setting, maps, args.patches, args.seed)[0] if args.mining else None
    for out, shots in runs:
        setting.begun = time.perf_counter()
        anomalous = torch.cat([*patches(setting, setting.features(shots.images))]).flatten(0, 1)
        mined = mine(anomalous, known, args.retention) if args.mining else anomalous
        net = train(setting, normal, mined, out)
        print(f"{len(shots.images)} labelled, {len(mined)} of {len(anomalous)} patches:")
        state = {"discriminator": net.state_dict()}
        metrics = finish(setting, by_discriminator(setting, net), state, out, shots)
    print(f"auroc {metrics['auroc']:.4f}")


if __name__ == "__main__":
    run(main, AGAIN)
