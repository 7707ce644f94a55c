"""Distance to the nearest normal patch: what the methods with labels have to beat. Needs no labelled anomaly.

After PatchCore (Roth et al. 2022, arXiv:2106.08265): patch features of the normal images are kept, a random
sample of them or a greedy coreset; an image's score is the mean distance of its most distant patches to the
nearest of these (--top 0: of one patch, as there).
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as python -m weakly_supervised.nearest, in the project's folder.")

import warnings

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dia_lib import number, run, step_generator
from weakly_supervised.common import AGAIN, Setting, finish, flags, load


def patch_flags(description):
    """The parser of methods that score patches."""
    parser = flags(description, layers=[3, 4])
    parser.add_argument("--aggregate", type=int, choices=range(1, 16, 2), default=5, metavar="P",
                        help="a patch is the mean of P x P positions; 1, 3, 5, ... (default: 5)")
    parser.add_argument("--top", type=number(float, 0, 1), default=0.1, help="an image's score is the mean "
                        "of this share of its highest patches; 0: of one patch (default: 0.1)")
    return parser


def patch_features(maps, aggregate):
    """Aligned, aggregated patch features (B, P, C) of maps [(B, C_l, h_l, w_l), ...]; P = h w of the largest.

    Maps are brought to the size of the largest, stacked, and each position becomes the mean of its aggregate
    x aggregate neighbourhood, zeros beyond the border. WSCXR Eq. 1-3; PatchCore Eq. 2.
    """
    size = max(tuple(m.shape[2:]) for m in maps)
    if aggregate > min(size):
        warnings.warn(f"--aggregate {aggregate} is more than a map has, {size[0]} x {size[1]}: all patches "
                      "of an image are nearly the same. Take a smaller one, or a larger --image-size.",
                      stacklevel=2)
    x = torch.cat([F.interpolate(m, size, mode="bilinear") if m.shape[2:] != size else m for m in maps], 1)
    return F.avg_pool2d(x, aggregate, 1, aggregate // 2).flatten(2).transpose(1, 2)


def patches(setting, maps, chunk=16):
    """Patch features of the images that maps are of, (chunk, P, C) float32 on the device at a time."""
    for i in range(0, len(maps[0]), chunk):
        yield patch_features(load(maps, slice(i, i + chunk), setting.device), setting.args.aggregate)


def image_scores(scores, top):
    """The mean of an image's highest patches: their scores (n, P) -> (n,).  PatchCore Eq. 6 with top 0."""
    return scores.topk(max(1, round(top * scores.shape[1]))).values.mean(1)


def scorer(setting, patch_scores):
    """How `finish` scores images: by their highest patches. patch_scores: (n, P, C) -> (n, P)."""
    @torch.no_grad()
    def score(images):
        if not len(images):
            return torch.empty(0), torch.empty(0, 1)
        scores = torch.cat([patch_scores(x).cpu() for x in patches(setting, setting.features(images))])
        return image_scores(scores, setting.args.top), scores
    return score


def nearest_distance(x, memory, chunk=2 ** 24, without=None):
    """Distance of each of x (n, C) to the nearest of memory (m, C): (n,); chunk: floats at once.

    without: (m,) bool, which of memory do not count.
    """
    squares, found = memory.square().sum(1), []
    if without is not None:
        squares[without] = torch.inf
    for part in x.split(max(1, chunk // len(memory))):
        nearest = (squares - 2 * part @ memory.T).argmin(1)                 # |x|^2 is the same for all
        found.append((part - memory[nearest]).norm(dim=1))                  # exact: 0 for what is in memory
    return torch.cat(found)


def sample(setting, maps, most, seed):
    """At most `most` patch features of all images (m, C), each with the same chance; most = 0 for all.

    Also which images they are of, (m,) on the CPU.
    """
    n, P = len(maps[0]), max(array.shape[2] * array.shape[3] for array in maps)
    keep = torch.zeros(n * P, dtype=torch.bool)
    keep[torch.randperm(n * P, generator=step_generator("cpu", seed, "patches", 0))[:most or n * P]] = True
    parts = zip(patches(setting, maps), keep.view(n, P).split(16), strict=True)
    return torch.cat([x[kept.to(x.device)] for x, kept in parts]), keep.view(n, P).nonzero()[:, 0]


def greedy_coreset(x, m, generator, dims=128):
    """Indices (m,) of x (n, C): each next one is the farthest from those chosen (k-center greedy).

    Distances are those of a random projection to `dims`.  PatchCore Eq. 5 and Algorithm 1.
    """
    if x.shape[1] > dims:
        x = x @ torch.randn(x.shape[1], dims, generator=generator).to(x.device) / dims ** 0.5
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = (x - x[chosen[0]]).square().sum(1)
    for _ in range(m - 1):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def by_distance(setting, memory):
    """How images are scored: by the distances of their patches to the nearest of memory (m, C)."""
    return scorer(setting, lambda x: nearest_distance(x.flatten(0, 1), memory).view(x.shape[:2]))


def leave_one_out(setting, maps, memory, owners):
    """Scores (M,) of training images, each by the memory (m, C) without what is of this image, or its equals.

    owners: (m,), which image each patch is of.  With these scores, over many runs at most twice --fpr of the
    new normal images are called anomalies: the guarantee of the jackknife+ (Barber et al. 2021,
    arXiv:1905.02928, Thm. 1), since a new image's score by the whole memory is at most that by a part of it.
    It is exact where all patches are kept, and nearly so for a sample; a coreset has no guarantee.
    """
    digests = setting.data.digests["train"]
    owned, bar = digests[owners], tqdm(digests, "leave-one-out", unit="image", leave=False, disable=None)
    images = (x for part in patches(setting, maps) for x in part)
    scores = [nearest_distance(x, memory, without=(owned == digest).to(memory.device))
              for x, digest in zip(images, bar, strict=True)]
    return image_scores(torch.stack(scores).cpu(), setting.args.top)


def restore(settings, state, device):
    """The score of a run, from what it left: for extras.predict."""
    return by_distance(Setting.of_run(settings, device), state["memory"].to(device))


def main():
    parser = patch_flags(__doc__.splitlines()[0])
    parser.add_argument("--patches", type=number(low=0), default=20_000,
                        help="normal patches to keep, drawn at random; 0: all (default: 20000)")
    parser.add_argument("--coreset", type=number(float, above=0, high=1), default=1.0,
                        help="share of them that a greedy coreset keeps (default: 1, all)")
    setting = Setting(parser, "nearest")
    args = setting.args
    setting.say()
    maps = setting.begin()
    memory, owners = sample(setting, maps, args.patches, args.seed)
    if args.coreset < 1:
        generator = step_generator("cpu", args.seed, "coreset", 0)
        kept = greedy_coreset(memory, max(1, round(len(memory) * args.coreset)), generator)
        memory, owners = memory[kept], owners[kept]
    several = len(setting.data.digests["train"][owners].unique()) > 1
    left_out = leave_one_out(setting, maps, memory, owners) if several else None
    score, state = by_distance(setting, memory), {"memory": memory.cpu()}
    metrics = finish(setting, score, state, left_out=left_out, patches_kept=len(memory))
    print(f"auroc {metrics['auroc']:.4f}")


if __name__ == "__main__":
    run(main, AGAIN)
