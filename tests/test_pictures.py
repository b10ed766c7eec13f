"""Scale, flip and crop of image, label and inside; samples and streams; windows, scores, panels."""

import itertools
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import supervised
from common import shapes
from common.data import Data, Item
from common.distributed import Group
from common.metrics import scores
from common.pictures import colour, panels, with_legend
from supervised import Samples, Stream, augment, open_stream
from trees import flags

MEAN = (124, 116, 104)  # 255 * (0.485, 0.456, 0.406), rounded
CPU = torch.device("cpu")


def ten_shapes():
    items = [Item(key) for key in shapes.keys("train")[:10]]
    return Data(flags(dataset="shapes"), items, items, [], [])


def literal(image, label, crop, scales, seed):
    """Cuts out what the crop shows, mirrors it, scales it, and lays it into the middle of a canvas.

    Bilinear by torch without antialiasing; the label's pixel below the centre of each new pixel, or
    -1 where that lies between two.
    """
    rng, size = np.random.default_rng(seed), image.size
    if len(scales) == 2 and scales[0] < 1 < scales[1]:  # its halves are equally likely
        scales = (scales[0], 1) if rng.random() < 0.5 else (1, scales[1])
    scale = rng.uniform(*scales) if len(scales) == 2 else rng.choice(scales)
    step = -1 if rng.random() < 0.5 else 1
    parts, places, below, between = [], [], [], []
    for length in size:
        shown = int(-(-crop // scale))
        new = crop if shown < length else min(int(-(-length * scale // 1)), crop)
        start = int(rng.integers(length - shown + 1)) if shown < length else 0
        shown = min(shown, length)
        parts.append(slice(start, start + shown))
        places.append(slice((crop - new) // 2, (crop - new) // 2 + new))
        index, rest = np.divmod((2 * np.arange(new) + 1) * shown, 2 * new)  # (x + 1/2) shown / new
        below.append(index)
        between.append(rest == 0)
    part = np.asarray(image)[parts[1], parts[0]][:, ::step].astype(float)
    soft = torch.from_numpy(part.transpose(2, 0, 1)[None])
    shape = (len(below[1]), len(below[0]))
    soft = F.interpolate(soft, shape, mode="bilinear", antialias=False)[0]
    hard = np.asarray(label, int)[parts[1], parts[0]][:, ::step][np.ix_(below[1], below[0])]
    hard[between[1][:, None] | between[0]] = -1
    pixels = np.tile(np.reshape(MEAN, (3, 1, 1)).astype(float), (1, crop, crop))
    classes, inside = np.full((crop, crop), 255), np.zeros((crop, crop), bool)
    for canvas, content in ((pixels, soft), (classes, hard), (inside, True)):
        canvas[..., places[1], places[0]] = content
    return pixels, classes, inside


# width, height, crop
SIZES = [(37, 37, 37), (61, 41, 23), (23, 45, 70), (13, 39, 29), (1, 1, 5), (41, 27, 90)]
SIZES += (2 * np.random.default_rng(0).integers(0, 24, (20, 3)) + 1).tolist()
SCALES = [(0.5, 2.0), (0.75, 1.5), (1.0, 2.0), (0.5, 1.0), (0.5, 1.0, 1.5, 2.0), (1.25,), (0.6,)]


@pytest.mark.smoke
@pytest.mark.parametrize("scales", SCALES)
def test_image_label_and_inside_are_one_literal_warp(scales):
    rng = np.random.default_rng(3)
    for (width, height, crop), seed in itertools.product(SIZES, range(3)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        label = Image.fromarray(rng.integers(240, 256, (height, width), dtype=np.uint8))
        pixels, classes, inside = augment(image, label, np.random.default_rng(seed), crop, scales)
        soft, hard, within = literal(image, label, crop, scales, seed)
        assert pixels.dtype == classes.dtype == torch.uint8 and inside.dtype == torch.bool
        assert np.array_equal(inside, within)
        assert ((classes.numpy() == hard) | (hard < 0)).all()
        error = pixels.numpy() - soft
        assert np.abs(error).max() <= 1 + 1e-6  # torch rounds twice: columns, then rows
        assert not error[:, ~inside.numpy()].any()
        alone, nothing, within = augment(image, None, np.random.default_rng(seed), crop, scales)
        assert nothing is None
        assert np.array_equal(alone, pixels) and np.array_equal(within, inside)


@pytest.mark.smoke
@pytest.mark.parametrize("stream", ["labeled", "unlabeled.3.4"])
def test_a_sample_is_the_literal_one_in_whatever_order(stream):
    """The item of a round's own order [D4], with an augmentation of the number's own.

    Stream "a.b" takes the order of stream "a". All runs in results/ drew theirs so.
    """
    data = ten_shapes()
    order, warp = (zlib.crc32(name.encode()) for name in (stream.split(".")[0], stream))
    for seed, items in ((3, data.labeled), (0, data.labeled[3:4])):
        samples = Samples(stream, Stream(items, 8, True, (0.5, 2.0)), data, flags(seed=seed))
        for n in (102, 13, 10, 9, 0):
            lap, place = divmod(n, len(items))
            index = np.random.default_rng([seed, order, 0, lap]).permutation(len(items))[place]
            rng = np.random.default_rng([seed, warp, 1, n])
            image, label, inside = augment(*data.read(items[index], True), rng, 24, (0.5, 2.0))
            expected = dict(image=image, label=label, inside=inside)
            assert samples[n].keys() == expected.keys()
            assert all(np.array_equal(samples[n][key], x) for key, x in expected.items())


CLASSES = 3


def photograph(h, w, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, h, w), dtype=torch.uint8, generator=rng)


def score(window):
    """The logits (CLASSES, h, w) of a window: whole numbers below 2^24, exact in float32."""
    red, green, blue = window.long()
    y, x = torch.arange(window.shape[1])[:, None], torch.arange(window.shape[2])
    rows = ((k + 1) * red - (2 * k + 1) * green + k * k * blue - 3 * k * x for k in range(CLASSES))
    return torch.stack([row + 7 * y + (y + 1) * x for row in rows])


class Placed(torch.nn.Module):
    """score as a network; keeps the windows that it is shown."""

    def __init__(self):
        super().__init__()
        self.windows, self.modes = [], set()

    def forward(self, x, upsampled=True):
        self.upsampled = upsampled
        self.modes.add((self.training, torch.is_grad_enabled()))
        self.windows.append(x[0].clone())
        logits = score(x[0])[None].float()
        return {"logits": logits.contiguous(memory_format=torch.channels_last)}


def starts(size, side):
    """Places of windows: two thirds of a side apart, rounded up; the last one ends at the end."""
    return [*range(0, size - side, -(-2 * side // 3)), size - side]


def windowed(image, side):
    """The sums of logits of every pixel and the windows, taken one by one."""
    h, w = image.shape[1:]
    # an image smaller than a window: half of what is missing above and left, the rest after it
    above, before = max(side - h, 0) // 2, max(side - w, 0) // 2
    canvas = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None]
    canvas = canvas.repeat(1, max(h, side), max(w, side))
    canvas[:, above : above + h, before : before + w] = image
    sums, windows = torch.zeros(CLASSES, *canvas.shape[1:], dtype=torch.int64), []
    for y in starts(canvas.shape[1], side):
        for x in starts(canvas.shape[2], side):
            windows.append(canvas[:, y : y + side, x : x + side])
            sums[:, y : y + side, x : x + side] += score(windows[-1])
    return sums[:, above : above + h, before : before + w], windows


WINDOWS = [  # height, width, side of a window, windows
    *((9, 9, 9, 1), (10, 10, 9, 4), (15, 21, 9, 6), (14, 22, 9, 8)),  # 6 apart: divides, does not
    *((5, 4, 9, 1), (4, 14, 9, 2), (16, 6, 9, 3)),  # smaller: padded
    *((1, 1, 1, 1), (5, 5, 2, 9), (12, 13, 8, 4), (12, 13, 7, 6)),  # 2/3 of 2, 8 and 7, up
]


@pytest.mark.smoke
def test_the_logits_are_the_sums_of_a_loop_over_windows():
    for h, w, side, count in WINDOWS:
        image, net = photograph(h, w, seed=h), Placed()
        rows = []
        for some in supervised.slide(net, image, side, CLASSES):
            assert some.stride(0) == 1  # classes last in memory: argmax over planes is slow
            rows.append(some.clone())
        logits, (sums, windows) = torch.cat(rows, 1), windowed(image, side)
        assert logits.dtype == torch.float32 and torch.equal(logits.long(), sums), (h, w, side)
        assert len(windows) == count
        assert all(torch.equal(a, b) for a, b in zip(net.windows, windows, strict=True))
    assert [starts(1024, n) for n in (769, 512)] == [[0, 255], [0, 342, 512]]


@pytest.mark.smoke
@pytest.mark.parametrize("protocol", ["slide", "whole"])
@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_every_labelled_pixel_is_scored_once_and_padding_never(monkeypatch, protocol, rank, world):
    sizes = [(5, 4), (1, 1), (14, 22), (4, 14), (9, 9), (3, 3), (6, 5), (8, 8), (5, 9)]
    photographs = [photograph(h, w, seed=h) for h, w in sizes]
    rng = np.random.default_rng(0)
    labels = [rng.choice(np.array([0, 1, 2, 255], np.uint8), size) for size in sizes]

    def read(i, with_label):
        return Image.fromarray(photographs[i].permute(1, 2, 0).numpy()), Image.fromarray(labels[i])

    data = SimpleNamespace(num_classes=CLASSES, read=read, require_pixels=lambda *_: None)
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for image, label in list(zip(photographs, labels, strict=True))[rank::world]:
        sums = windowed(image, 9)[0] if protocol == "slide" else score(image)
        counted = label < CLASSES
        np.add.at(expected.numpy(), (label[counted], sums.argmax(0)[counted]), 1)
    monkeypatch.setattr(supervised.distributed, "reduced", lambda x: 5 * x)  # of all processes
    net, group = Placed(), Group(rank, world, CPU)
    args = SimpleNamespace(protocol=protocol, crop_size=9, workers=0, precise_bn=0)
    result, maps = supervised.evaluate(net, data, range(9), args, group)
    assert net.training and net.modes == {(False, False)}  # the mode is given back
    assert net.upsampled == (protocol == "slide")  # whole: done a few classes at a time
    assert result == scores(5 * expected)
    shown = (0, 2, 4, 6) if world == 1 else (1, 3, 5, 7)
    for i, image, label, prediction in zip(shown, *maps.values(), strict=True):
        assert torch.equal(image, photographs[i]) and np.array_equal(label, labels[i])
        assert prediction.shape == label.shape  # panels show the images as they are


def test_the_likeliest_class_of_upsampled_logits_is_found_in_parts():
    """24 classes at a time; of ties, which are exact here, the lowest class."""
    for classes in (2, 24, 25, 81):
        logits = torch.from_numpy(np.random.default_rng(0).integers(3, size=(2, classes, 5, 7)))
        expected = supervised.upsample(logits.float(), (17, 25)).numpy().argmax(1)
        assert np.array_equal(supervised.likeliest(logits.float(), (17, 25)), expected)


def test_statistics_of_fixed_batches_for_an_evaluation_alone():
    """--precise-bn: means of the first batches of the labelled stream, equal on all processes."""
    data = ten_shapes()
    args = supervised.Args(batch_size=4, crop_size=24, scales=(1.0, 1.5), total_iters=3, workers=0)
    stream = open_stream("labeled", data, args, Group(0, 1, CPU), 0)
    values = [batch["image"].double().transpose(0, 1).flatten(1) for batch in stream]
    mean, var = (sum(getattr(x, name)(1) for x in values) / 3 for name in ("mean", "var"))
    args = replace(args, precise_bn=3, total_iters=99)
    for training in (True, False):
        norm = torch.nn.BatchNorm2d(3)
        norm.running_mean += 5
        net = torch.nn.Sequential(torch.nn.Dropout(0.5), norm).train(training)
        net.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
        with supervised.evaluating(net, data, args, Group(1, 2, CPU)):
            assert not any(part.training for part in net.modules())
            assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-5)
            assert torch.allclose(norm.running_var.double(), var, rtol=1e-5)
        assert {part.training for part in net.modules()} == {training}
        assert norm.running_mean.tolist() == [5] * 3 and norm.running_var.tolist() == [1] * 3
        assert norm.momentum == 0.1 and norm.num_batches_tracked == 0


MANY = 2**40  # Cityscapes' 500 images are 2**30 pixels; float32 would lose the 3 and the 1
ALL = 2 * MANY + 3
TABLES = [  # IoU of each class, None without any pixel; accuracy; mIoU of the best constant
    ([[3, 0, 1, 0], [0] * 4, [2, 0, 4, 0], [0] * 4], [3 / 6, None, 4 / 7, None], 7 / 10, 3 / 10),
    ([[3, 1], [0, 0]], [3 / 4, 0.0], 3 / 4, 1.0),  # a class that is only predicted counts as zero
    ([[3, 0], [1, 0]], [3 / 4, 0.0], 3 / 4, 3 / 8),  # and one that is only in the labels
    ([[0] * 3] * 3, [None] * 3, 0.0, 0.0),  # only ignored pixels
    ([[MANY, 3], [0, MANY]], [MANY / (MANY + 3)] * 2, 2 * MANY / ALL, (MANY + 3) / ALL / 2),
]


@pytest.mark.smoke
@pytest.mark.parametrize("table, iou, accuracy, constant", TABLES)
def test_scores_worked_out_by_hand(table, iou, accuracy, constant):
    present = [x for x in iou if x is not None]
    result = scores(torch.tensor(table))
    assert result.pop("iou") == [None if x is None else round(x, 6) for x in iou]
    assert result.pop("confusion") == table
    mean = sum(present) / max(len(present), 1)
    # a few float64 operations; what is missing to 1 may be 1e-12
    assert [*result.values()] == pytest.approx([mean, accuracy, constant], abs=1e-15)


PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 90, 250]], np.uint8)


def test_a_map_is_coloured_by_its_kind():
    image, white = photograph(5, 4), [255] * 3
    assert np.array_equal(colour(image, PALETTE), image.permute(1, 2, 0))
    found = colour(np.array([[0, 1, 2], [255, 3, -1]]), PALETTE)  # everything outside is white
    assert found.tolist() == [PALETTE.tolist(), [white] * 3]
    assert colour(np.array([[True, False]]), PALETTE).tolist() == [[white, [0] * 3]]
    grey = colour(torch.tensor([[0.0, 0.5, 1.0, 1.7, -0.2]]), PALETTE)  # probabilities
    assert grey.tolist() == [[[x] * 3 for x in (0, 127, 255, 255, 0)]]


@pytest.mark.smoke
def test_panels_have_every_map_in_its_place():
    label = torch.arange(40 * 60).view(40, 60) % 3
    maps = {"image": photograph(40, 60), "label": label, "inside": label > 0}
    rows = [maps, {"image": maps["image"][:, :, :20]}]  # then a narrower picture, and fewer of them
    pixels = np.array(panels(rows, PALETTE, height=80))
    # 120 x 80, 16 above it for a title, 4 behind it; enlarged without mixed colours
    for i, one in enumerate(maps.values()):
        cell = pixels[16:96, 124 * i : 124 * i + 120]
        assert np.array_equal(cell, colour(one, PALETTE).repeat(2, 0).repeat(2, 1))
    assert (pixels[16:96, 120::124] == 255).all() and (pixels[:16] != 255).any()
    assert np.array_equal(pixels[96 + 16 :, :40], pixels[16:96, :40])
    assert (pixels[96:, 60:] == 255).all()  # nothing beside the narrow one


def test_a_legend_below_a_picture_has_a_square_of_every_colour():
    picture = Image.new("RGB", (120, 30), (1, 2, 3))
    sheet = np.array(with_legend(picture, ["road", "a name of many words", "sky"], PALETTE))
    assert (sheet[:30] == (1, 2, 3)).all() and sheet.shape == (30 + 3 * 24, 120, 3)  # a row each
    for row, colour_of in enumerate(PALETTE[:3]):
        square = sheet[30 + 24 * row :][7:18, 7:18]
        assert (square == colour_of).all()
