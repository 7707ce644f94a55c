"""A mutator of image and npz files: finds input that ends in a traceback, hangs, or takes much memory.

    python tests/mutate.py 5000 [seed]          # by hand; prints findings, and keeps their files in mutated/

Each file is read as the scripts read it: it must give an image, or end with one sentence (SystemExit), within
10 s of a processor and with at most 1 GB more than the process has. The suite runs it over 200 files.
"""

import io
import itertools
import random
import resource
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from dia_lib import decode, npz_items
from extras.prepare import look, page_of, to_8_bit

FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "pgm": "PPM"}


def originals():
    """Small files of every kind, as (name, bytes)."""
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    rgb = Image.fromarray(np.stack([grey, grey[::-1], grey], 2))
    images = [rgb.convert(mode) for mode in ("RGB", "L", "1", "RGBA", "P", "CMYK", "F")]
    images.append(Image.fromarray(grey.astype(np.uint16) * 257))
    for suffix, name in FORMATS.items():
        for image in images:
            try:
                image.save(file := io.BytesIO(), name)
                yield f"{image.mode.replace(';', '')}.{suffix}", file.getvalue()
            except (OSError, ValueError):
                pass                                        # a mode that this format does not have
    for values in (grey.astype(np.int32) - 99, grey.astype(np.uint16) + 30000, grey.astype(np.float32)):
        pages = [Image.fromarray(values), Image.fromarray(values)]
        pages[0].save(file := io.BytesIO(), "TIFF", save_all=True, append_images=pages[1:])
        yield f"{values.dtype}-pages.tif", file.getvalue()
    try:
        from pydicom import examples
    except ImportError:
        examples = None
    for name in ("ct", "mr", "overlay") if examples else ():                # files that pydicom ships
        yield f"{name}.dcm", examples.get_path(name).read_bytes()
    arrays = {"images": grey[:36].reshape(6, 15, 20), "labels": (np.arange(6) % 2).astype(np.uint8)}
    for save in (np.savez, np.savez_compressed):
        save(file := io.BytesIO(),
             **{f"{split}_{what}": a for split in ("train", "val", "test") for what, a in arrays.items()})
        yield f"{save.__name__}.npz", file.getvalue()


def bombs():
    """Small files that claim much.

    npz files of 1.1 GB of zeros, of a false shape, of objects; images above and just below PIL's limit, the
    last one in colour.
    """
    for name, images in (("zeros.npz", 1100), ("claim.npz", 2 ** 40)):
        small = {f"{split}_{what}": np.zeros((1, 8, 8)[:n], np.uint8) for split in ("train", "test")
                 for what, n in (("images", 3), ("labels", 1)) if (split, what) != ("train", "images")}
        np.savez(file := io.BytesIO(), **small)
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as z, \
                z.open("train_images.npy", "w") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (images, 1024, 1024)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(images if name == "zeros.npz" else 1):
                member.write(bytes(2 ** 20))
        yield name, file.getvalue()
    np.savez(file := io.BytesIO(),
             **{f"{s}_{what}": np.array([{}]) for s in ("train", "test") for what in ("images", "labels")})
    yield "objects.npz", file.getvalue()
    for mode, side, colour in (("1", 20000, 0), ("1", 12000, 0), ("L", 9400, 0), ("I;16", 9400, 0),
                               ("RGBA", 9400, "red")):
        Image.new(mode, (side, side), colour).save(file := io.BytesIO(), "PNG", compress_level=1)
        yield f"{mode.replace(';', '')}-{side}.png", file.getvalue()


def mutate(data, rng):
    """The bytes, some changed, left out, doubled or put in; half of the time among the first: headers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(rng.choice((len(data), min(len(data), 200))) or 1)
        n = rng.choice((1, 1, 2, 4, 8, 64))
        data[at:at + n] = rng.choice((b"", rng.randbytes(n), bytes(n), b"\xff" * n, data[at:at + n] * 2,
                                      b"\x7f\xff\xff\xff", b"99999999"))
        if rng.random() < 0.1:
            del data[at:]
    return bytes(data)


def read(path):
    """None if the file is read, or refused with one sentence, in time; else what is wrong."""
    begun = time.process_time()                             # not the clock's, which depends on the load
    try:
        sources = [path]
        if path.suffix == ".npz":
            splits = npz_items(path, ("train", "test"), 0)
            sources = [item.source for items in splits.values() for item in items]
        else:
            seen = look(path)                                               # as extras.prepare does
            if not isinstance(seen, str) and seen.convert:
                sources.insert(0, to_8_bit(page_of(path, seen.pages - 1), (-100, 300)))
        for source in sources:
            image = decode(source, 32, (-100, 300) if len(sources) > 1 else None)[0]
            if image.dtype != np.uint8 or image.shape[0] not in (1, 3) or image.shape[1:] != (32, 32):
                return f"decoded to {image.dtype} {image.shape}"
    except SystemExit as stop:
        if not isinstance(stop.code, str) or "\n" in stop.code or len(stop.code) > 600:
            return f"not a sentence: {stop.code!r}"
    except BaseException:
        return traceback.format_exc()
    seconds = time.process_time() - begun
    return f"{seconds:.1f} s" if seconds > 10 else None


def hunt(folder, n, seed=0):
    """Read the bombs and n mutated files; what is wrong, as [(name, what)]. Other files are deleted."""
    rng, before, findings = random.Random(seed), resource.getrlimit(resource.RLIMIT_AS), []
    statm = Path("/proc/self/statm")
    has = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None
    chosen = rng.choices(list(originals()), k=n)
    mutated = ((f"{i:05d}-{name}", mutate(data, rng)) for i, (name, data) in enumerate(chosen))
    files = itertools.chain([*bombs()], mutated)
    if has:                                                 # counted before the bombs were made
        resource.setrlimit(resource.RLIMIT_AS, (has + 2 ** 30, before[1]))
    try:
        for name, data in files:
            (path := Path(folder) / name).write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrong = read(path)
            findings += [(name, wrong)] if wrong else []
            None if wrong else path.unlink()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return findings


if __name__ == "__main__":
    Path("mutated").mkdir(exist_ok=True)
    found = hunt("mutated", int(sys.argv[1]), *map(int, sys.argv[2:]))
    for name, wrong in found:
        print(f"{name}: {wrong.strip().splitlines()[-1]}")
    print(f"{sys.argv[1]} mutated files and the bombs, {len(found)} findings")
