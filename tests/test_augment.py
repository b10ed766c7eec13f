"""One warp for image, label and inside; samples are a function of seed, stream and number."""

import functools
import itertools
import random
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import shapes
from common.data import Data, Item
from common.distributed import Group
from supervised import Samples, Stream, augment, open_stream
from trees import flags, refusal

MEAN = (124, 116, 104)  # 255 * (0.485, 0.456, 0.406), rounded


group = functools.partial(Group, device=torch.device("cpu"))


def ten_shapes():
    items = [Item(key) for key in shapes.keys("train")[:10]]
    return Data(flags(dataset="shapes"), items, items, [], [])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def literal(image, label, crop, scales, seed):
    """Scales the whole image and its label, mirrors both, cuts the crop out of a large canvas.

    Bilinear by torch without antialiasing; the label's pixel below the centre of each new pixel.
    """
    rng, (w, h) = np.random.default_rng(seed), image.size
    if len(scales) != 2:
        scale = rng.choice(scales)
    elif scales[0] < 1 < scales[1]:  # either half of the range is equally likely
        below = rng.random() < 0.5
        scale = rng.uniform(scales[0], 1) if below else rng.uniform(1, scales[1])
    else:
        scale = rng.uniform(*scales)
    nw, nh = max(int(w * scale), 1), max(int(h * scale), 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    pixels = F.interpolate(pixels, (nh, nw), mode="bilinear", antialias=False)[0].numpy()
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in ((nh, h), (nw, w)))
    classes = np.asarray(label)[rows][:, columns]  # floor((x + 1/2) * w / nw), in whole numbers
    if rng.random() < 0.5:
        pixels, classes = pixels[:, :, ::-1], classes[:, ::-1]
    x = (nw - crop) // 2 if nw < crop else int(rng.integers(nw - crop + 1))
    y = (nh - crop) // 2 if nh < crop else int(rng.integers(nh - crop + 1))
    canvas = np.empty((3, nh + 2 * crop, nw + 2 * crop))
    canvas[:] = np.array(MEAN)[:, None, None]
    ids, inside = (np.full(canvas.shape[1:], value) for value in (255, False))
    middle = (slice(crop, crop + nh), slice(crop, crop + nw))
    canvas[(slice(None), *middle)], ids[middle], inside[middle] = pixels, classes, True
    window = (slice(crop + y, 2 * crop + y), slice(crop + x, 2 * crop + x))
    return canvas[(slice(None), *window)], ids[window], inside[window]


# width, height, crop; of odd sizes no pixel's centre lies between two others
SIZES = [(37, 37, 37), (61, 41, 23), (23, 45, 70), (13, 39, 29), (1, 1, 5), (41, 27, 90)]
for w, h, crop in np.random.default_rng(0).integers(0, 24, (20, 3)).tolist():
    SIZES.append((2 * w + 1, 2 * h + 1, 2 * crop + 1))
SCALES = [(0.5, 2.0), (0.75, 1.5), (1.0, 2.0), (0.5, 1.0), (0.5, 1.0, 1.5, 2.0), (1.25,), (0.6,)]


@pytest.mark.smoke
@pytest.mark.parametrize("scales", SCALES)
def test_image_label_and_inside_are_one_literal_warp(scales):
    """The image also where there is no label."""
    rng = np.random.default_rng(3)
    for (width, height, crop), seed in itertools.product(SIZES, range(6)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        label = Image.fromarray(rng.integers(240, 256, (height, width), dtype=np.uint8))
        pixels, classes, inside = augment(image, label, np.random.default_rng(seed), crop, scales)
        soft, hard, within = literal(image, label, crop, scales, seed)
        assert pixels.dtype == classes.dtype == np.uint8 and inside.dtype == bool
        assert np.array_equal(classes, hard) and np.array_equal(inside, within)
        lost = soft - pixels
        assert lost.min() >= -1e-6 and lost.max() <= 1 + 1e-6  # PIL cuts off the fraction
        assert not lost[:, ~inside].any()
        alone = augment(image, None, np.random.default_rng(seed), crop, scales)
        assert np.array_equal(alone[0], pixels) and alone[1] is None
        assert np.array_equal(alone[2], inside)


def literal_sample(data, items, stream, seed, number, crop=24, scales=(0.5, 2.0)):
    """The item of a round's own order [D4], with an augmentation of the number's own.

    Stream "a.b" takes the order of stream "a". All runs in results/ drew theirs so.
    """
    order, warp = (zlib.crc32(name.encode()) for name in (stream.split(".")[0], stream))
    lap, place = divmod(number, len(items))
    index = np.random.default_rng([seed, order, 0, lap]).permutation(len(items))[place]
    image, label = data.read(items[index], True)
    rng = np.random.default_rng([seed, warp, 1, number])
    names, arrays = ("image", "label", "inside"), augment(image, label, rng, crop, scales)
    return {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=True)}


NUMBERS = [0, 7, 9, 10, 13, 29, 34, 102]


@pytest.mark.smoke
@pytest.mark.parametrize("stream", ["labeled", "unlabeled.2", "unlabeled.3.4"])
def test_a_sample_is_the_literal_one_whatever_order_and_number_of_workers(stream):
    data = ten_shapes()
    for seed, items in ((0, data.labeled), (3, data.labeled), (3, data.labeled[3:4])):
        samples = Samples(stream, Stream(items, 8, True, (0.5, 2.0)), data, flags(seed=seed))
        expected = [literal_sample(data, items, stream, seed, n) for n in NUMBERS]
        found = [samples[n] for n in reversed(NUMBERS)][::-1]
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
        index = samples.which(13)  # another sample's image under this number
        assert same(samples.sample(index, 13), samples[13])
    loader = torch.utils.data.DataLoader(samples, batch_sampler=[NUMBERS], num_workers=2)
    for name, tensor in next(iter(loader)).items():
        assert all(torch.equal(t, one[name]) for t, one in zip(tensor, expected, strict=True))


@pytest.mark.smoke
def test_processes_share_the_batches_of_a_stream_and_may_begin_at_any_step():
    """Step s holds the numbers 8 s to 8 s + 7, of which each process has its share."""
    data, before = ten_shapes(), (torch.get_rng_state(), random.getstate())
    expected = [literal_sample(data, data.labeled, "labeled", 0, n) for n in range(32)]
    for world, rank, start in ((1, 0, 0), (1, 0, 3), (2, 0, 0), (2, 1, 1), (4, 3, 0), (4, 3, 4)):
        batches = list(open_stream("labeled", data, flags(), group(rank, world), start))
        assert len(batches) == 4 - start
        for step, batch in enumerate(batches, start):
            first = 8 * step + 8 // world * rank
            share = expected[first : first + 8 // world]
            assert same(batch, {name: torch.stack([one[name] for one in share]) for name in batch})
    # the global generators are left alone
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize(
    "batch, here, images, words",
    [
        (9, group(0, 2), True, "9 labeled images do not divide over 2 processes"),
        (4, group(3, 4), True, "1 labeled image per process: plain BN needs two"),
        (8, group(0, 1), False, "no labeled images in --split all of shapes: give fewer"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(batch, here, images, words):
    args = flags(dataset="shapes", batch_size=batch)
    data = ten_shapes() if images else Data(args, [], [], [], [])
    assert refusal(open_stream, "labeled", data, args, here, 0).startswith(words)
