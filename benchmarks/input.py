"""A training sample from files and from the cache of decoded images: milliseconds of a processor.

    python benchmarks/input.py           # writes results/input.json
    python benchmarks/input.py --quick   # two images of each kind, nothing written

Images as Cityscapes has them (2048x1024, PNG, crop 800) and as VOC has them (500x375, JPEG, crop
512), drawn here: smooth noise and a grain by which a file is about as long as a photograph's. A
sample is what a loader's process makes for one image: supervised.py's Samples, with and without a
mask; one way is from files with Pillow's affine warp of the image instead of torch's scaling of
what the crop shows, as it was once. First it is asserted that files and cache give the same
samples, bit for bit, and the warp within two grey levels. Then they take turns in one process;
medians of processor time, ratios to the files, [lowest..highest] over the rounds. The files are in
the system's memory: a disk that has to be waited for comes on top, and a cache is longer than its
files (6.3 MB of an image for 2.8 MB of PNG, 0.56 MB for 0.1 MB of JPEG).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import prepare_data  # noqa: E402
from common.sources import load  # noqa: E402
from supervised import IGNORE, MEAN, Samples, Stream, random_scale  # noqa: E402

RESULT = ROOT / "results" / "input.json"
KINDS = {  # (width, height), suffix, grain in grey levels, crop
    "Cityscapes-sized PNG": ((2048, 1024), "png", 2, 800),
    "VOC-sized JPEG": ((500, 375), "jpg", 12, 512),
}
SCALES = (0.5, 2.0)
LENGTHS = (2_975, 10_582, 118_287)  # of Cityscapes' list, VOC's and COCO's


def draw(root, size, suffix, grain, count):
    """Writes `count` images and masks of so many pixels as a data set of the kind folder."""
    rng = np.random.default_rng(0)
    width, height = size
    for part, images in (("train", count), ("val", 1)):
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True)
        for i in range(images):
            coarse = rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8)
            smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            noise = rng.integers(-grain, grain + 1, (height, width, 1))
            image = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / f"images/{part}/{i}.{suffix}", quality=95)
            coarse = rng.integers(0, 19, (height // 32, width // 32), np.uint8)
            mask = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)
            mask.save(root / f"masks/{part}/{i}.png")


def samples(root, cache, with_label, crop):
    """Returns supervised.py's Samples of a folder."""
    args = SimpleNamespace(dataset="folder", data_root=str(root), split="all", split_seed=None)
    args.num_classes = 19
    args.ignore_index = 255
    args.labeled_list = ""
    args.unlabeled_list = ""
    args.cache = cache
    args.seed = 0
    args.crop_size = crop
    data = load(args)
    return Samples("labeled", Stream(data.labeled, 1, with_label, SCALES), data, args)


class ReadOnly:
    """What Samples do before they augment: number -> image and mask as PIL has them."""

    def __init__(self, found):
        self.found = found

    def __getitem__(self, number):
        item = self.found.items[self.found.which(number)]
        return self.found.data.read(item, self.found.with_label)


class Warped(ReadOnly):
    """Samples by one affine warp of Pillow's, which cuts values to whole grey levels."""

    def __getitem__(self, number):
        image, label = super().__getitem__(number)
        crop = self.found.crop
        rng = np.random.default_rng([*self.found.warp_seed, number])
        scale = random_scale(rng, self.found.scales)
        size = np.array(image.size)
        seen = np.minimum(np.ceil(crop / scale), size).astype(int)
        new = np.minimum(np.ceil(seen * scale), crop).astype(int)
        flip = rng.random() < 0.5
        x, y = (int(rng.integers(room + 1)) for room in size - seen)
        left, top = (crop - new) // 2
        sx, sy = seen / new
        self.warp = (sx, 0, x - left * sx, 0, sy, y - top * sy)
        if flip:
            self.warp = (-sx, 0, x + seen[0] + left * sx, 0, sy, y - top * sy)
        pixels = self.warped(image, Image.Resampling.BILINEAR, tuple(round(m) for m in MEAN))
        inside = np.zeros((crop, crop), bool)
        inside[top : top + new[1], left : left + new[0]] = True
        sample = {"image": np.ascontiguousarray(pixels.transpose(2, 0, 1)), "inside": inside}
        if label is not None:
            sample["label"] = self.warped(label, Image.Resampling.NEAREST, IGNORE)
        return sample

    def warped(self, picture, kernel, padding):
        """Returns the crop of a picture as an array."""
        size = (self.found.crop, self.found.crop)
        mode = Image.Transform.AFFINE
        return np.array(picture.transform(size, mode, self.warp, kernel, fillcolor=padding))


def forget(found):
    """Makes a cache check its pixels again, as a new process does when it first reads them."""
    found.data.cache.seen.clear()


def seconds(found, numbers):
    """Returns the processor time of a sample, a mean over their numbers."""
    begin = time.process_time()
    for number in numbers:
        found[number]
    return (time.process_time() - begin) / len(numbers)


def assert_equal(ways, numbers):
    """Asserts that all ways give the same samples, bit for bit."""
    first, *others = ways.values()
    for number in numbers:
        sample = first[number]
        for other in others:
            found = other[number]
            assert found.keys() == sample.keys()
            assert all(torch.equal(found[name], sample[name]) for name in sample)


def assert_near(warped, found, numbers):
    """Asserts that the warp gives images within two grey levels of the samples.

    But for a frame of two pixels, where it mixes in what the crop does not show.
    """
    middle = (..., slice(2, -2), slice(2, -2))
    for number in numbers:
        sample = found[number]
        other = warped[number]
        assert np.array_equal(other["inside"], sample["inside"])
        error = other["image"] - sample["image"].numpy().astype(int)
        assert np.abs(error[middle]).max() <= 2


def timed(ways, numbers, rounds):
    """Returns {way: {ms, ratio, low, high}}; ratios to the first way."""
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, found in ways.items():
            if name == "cache, first time":
                forget(found)
            times[name].append(seconds(found, numbers))
    base = next(iter(times.values()))
    rows = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        rows[name] = {"ms": 1e3 * statistics.median(own), "ratio": statistics.median(ratios)}
        rows[name] |= {"low": min(ratios), "high": max(ratios)}
    return rows


def compared(root, cache, with_label, crop, rounds):
    """Returns {way: {ms, ratio, low, high}} of a kind of images."""
    ways = {"files": samples(root, "", with_label, crop)}
    ways["cache"] = samples(root, cache, with_label, crop)
    ways["cache, first time"] = samples(root, cache, with_label, crop)
    numbers = range(2 * len(ways["files"].items))
    assert_equal(ways, numbers)
    ways["files, Pillow's warp"] = Warped(ways["files"])
    assert_near(ways["files, Pillow's warp"], ways["files"], numbers)
    ways["files, reading alone"] = ReadOnly(ways["files"])
    ways["cache, reading alone"] = ReadOnly(ways["cache"])
    return timed(ways, numbers, rounds)


def orders(rounds):
    """Returns [{images, us, drawn_us}]: to find which image a sample shows, for lists of 3 lengths.

    us: as Samples do; drawn_us: drawing the whole order for every sample, as once.
    """
    rows = []
    for length in LENGTHS:
        stream = Stream(list(range(length)), 1, False, SCALES)
        found = Samples("labeled", stream, None, SimpleNamespace(seed=0, crop_size=1))
        numbers = range(length - 100, length + 100)  # over the end of a lap

        def drawn(number, found=found, length=length):
            lap, place = divmod(number, length)
            return np.random.default_rng([*found.order_seed, lap]).permutation(length)[place]

        assert [found.which(n) for n in numbers] == [drawn(n) for n in numbers]
        times = {found.which: [], drawn: []}
        for _ in range(rounds):
            for which, own in times.items():
                begin = time.process_time()
                for number in numbers:
                    which(number)
                own.append(1e6 * (time.process_time() - begin) / len(numbers))
        own, whole = (statistics.median(times[which]) for which in (found.which, drawn))
        rows.append({"images": length, "us": own, "drawn_us": whole})
        print(f"which of {length:7}: {own:.2f} us, drawn for every sample {whole:.0f} us")
    return rows


def measure(count, rounds):
    """Returns {where, rows, orders}; prints the rows as they come."""
    rows = []
    for kind, (size, suffix, grain, crop) in KINDS.items():
        with tempfile.TemporaryDirectory() as top:
            root = Path(top) / "data"
            draw(root, size, suffix, grain, count)
            cache = f"{top}/cache"
            source = dict(dataset="folder", data_root=str(root), num_classes=19)
            prepare_data.Cache(**source, out=cache).run()
            bytes_of = [path.stat().st_size for path in root.glob("images/train/*")]
            for with_label in (False, True):
                found = compared(root, cache, with_label, crop, rounds)
                row = {"kind": kind, "file_mb": statistics.mean(bytes_of) / 1e6, "crop": crop}
                rows.append(row | {"mask": with_label, "ways": found})
                print(f"\n{kind}, {row['file_mb']:.2f} MB, crop {crop}, mask: {with_label}")
                for name, way in found.items():
                    spread = f"[{way['low']:.2f}..{way['high']:.2f}]"
                    print(f"  {name:22}{way['ms']:8.2f} ms  {way['ratio']:5.2f} {spread}")
    where = {"torch": torch.__version__, "load": os.getloadavg()[0], "rounds": rounds}
    return where | {"rows": rows, "orders": orders(rounds)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--images", type=int, default=6, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.images = 2
        args.rounds = 2
    found = measure(args.images, args.rounds)
    if not args.quick:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
