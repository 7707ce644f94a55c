"""The `local` score and heat map of DIA's encoder: nearest neighbours of its features, position by position.

Not in the paper: PatchCore (Roth et al. 2022, arXiv:2106.08265) on features of an encoder trained here.
"""

import torch
import torch.nn.functional as F

from dia_lib import autocast, to_float


@torch.no_grad()
def local_features(encoder, images, device):
    """The direction of the encoder's third stage at each of P positions: (n, P, 256) float32 of length 1.

    images: (n, C', H, W) uint8; no shift, no augmentation. P = (H/16)**2, with the cifar stem (H/4)**2.
    Returned on the device.
    """
    training, b = encoder.training, encoder.backbone
    encoder.eval()
    x = (to_float(images, b.conv1.in_channels, device) - 0.5) / 0.5                 # as the encoder's forward
    with autocast(device):
        h = b.maxpool(b.relu(b.bn1(b.conv1(x.contiguous(memory_format=torch.channels_last)))))
        maps = b.layer3(b.layer2(b.layer1(h)))                                      # (n, 256, h, w)
    encoder.train(training)
    return F.normalize(maps.float().flatten(2).transpose(1, 2), dim=2)


def local_fit(encoder, images, device, batch=96, most=50_000):
    """What local_score needs of training images (M, C', H, W) uint8: (at most `most`, 256), a fixed draw."""
    known, keep = [], None
    for i in range(0, len(images), batch):
        features = local_features(encoder, images[i:i + batch], device)
        if keep is None:
            P = features.shape[1]
            keep = torch.zeros(len(images) * P, dtype=torch.bool)
            keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[:most]] = True
        rows = features.flatten(0, 1).cpu()                                         # (n*P, 256)
        known.append(rows[keep[i * P:i * P + len(rows)]])
    return torch.cat(known)


def local_maps(known, encoder, images, device, batch=96):
    """1 - cosine to the nearest position of any training image: (Q, P). Higher = more anomalous.

    known: of local_fit; images: (Q, C', H, W) uint8.
    """
    maps, known = [], known.to(device)
    for part in images.split(batch):
        features = local_features(encoder, part, device)                            # (n, P, 256)
        chunk = max(1, 2 ** 24 // (len(known) * features.shape[1]))                 # about 64 MB
        maps += [1 - (f @ known.T).amax(2).cpu() for f in features.split(chunk)]
    return torch.cat(maps)


def local_score(known, encoder, images, device, batch=96):
    """The position least like any training image, (Q,): the highest of `local_maps`."""
    return local_maps(known, encoder, images, device, batch).amax(1)
