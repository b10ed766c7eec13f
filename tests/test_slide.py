"""Evaluation in windows: the sums of every pixel against a loop over windows, pixels and classes.

The oracle takes the places of windows one by one, builds no padded image, and its network's logits
are whole numbers that depend on the colour and on the place in the window: a window that is shifted
wrongly, counted twice, left out or filled with another colour changes them.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import supervised
import u2pl
from common.distributed import Group
from tests.helpers import draw_tree, flags, log, shrink, train

SCRIPTS = [supervised, mean_teacher, cps_fpl, ael_fpl, u2pl, esl]
MEAN = (124, 116, 104)  # ImageNet's 123.675, 116.28, 103.53
CLASSES = 3


def score(k, y, x, colour):
    """The logit of class k for a pixel at row y, column x of its window; a whole number."""
    red, green, blue = colour
    return (k + 1) * red - (2 * k + 1) * green + k * k * blue + 7 * y - 3 * k * x + (y + 1) * x


class Placed(torch.nn.Module):
    """The same on windows; takes nothing but one uint8 image of the side given (0: of any)."""

    def __init__(self, side=0):
        super().__init__()
        self.side, self.windows = side, []

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[:2] == (1, 3), (x.dtype, x.shape)
        assert not self.side or x.shape[2:] == (self.side, self.side), x.shape
        self.windows.append(x.clone())
        y, column = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
        logits = [score(k, y, column, x[0].long()) for k in range(CLASSES)]
        return {"logits": torch.stack(logits)[None].float()}


def starts(size, side, stride):
    """Places of windows: 0, stride, 2 stride, ... and at last the one that ends with the image."""
    places = []
    while len(places) * stride + side < size:
        places.append(len(places) * stride)
    return [*places, size - side] if size > side else [0]


def third(side):
    """The smallest whole number that is at least two thirds of side."""
    return next(n for n in range(side + 1) if 3 * n >= 2 * side)


def oracle(image, side):
    """The sums of logits as [class][row][column], and in how many windows each pixel is."""
    h, w = image.shape[1:]
    rows = image.permute(1, 2, 0).tolist()
    # an image smaller than a window: half of what is missing above and left, the rest after it
    above = (side - h) // 2 if h < side else 0
    before = (side - w) // 2 if w < side else 0
    sums = [[[0] * w for _ in range(h)] for _ in range(CLASSES)]
    seen = [[0] * w for _ in range(h)]
    for top in starts(max(h, side), side, third(side)):
        for left in starts(max(w, side), side, third(side)):
            for y in range(side):
                for x in range(side):
                    row, column = top + y - above, left + x - before
                    if 0 <= row < h and 0 <= column < w:
                        seen[row][column] += 1
                        for k in range(CLASSES):
                            sums[k][row][column] += score(k, y, x, rows[row][column])
    return sums, seen


def photograph(h, w, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, h, w), dtype=torch.uint8, generator=rng)


def slide(side):
    return SimpleNamespace(protocol="slide", crop_size=side)


WHOLE = SimpleNamespace(protocol="whole", crop_size=9)


def check(module, h, w, side):
    """Asserts sums, windows and paddings of an image; returns how many windows there were."""
    image, net = photograph(h, w, seed=100 * h + w), Placed(side)
    before = image.clone()
    logits = module.predict(net, image, slide(side), CLASSES)
    sums, seen = oracle(image, side)
    assert logits.shape == (CLASSES, h, w) and logits.dtype == torch.float32
    # whole numbers below 2^24: float32 sums are exact
    assert logits.tolist() == sums, (h, w, side)
    assert min(map(min, seen)) >= 1 and torch.equal(image, before)
    count = [len(starts(max(n, side), side, third(side))) for n in (h, w)]
    assert len(net.windows) == count[0] * count[1]
    return len(net.windows)


# ---- predict ----

SIZES = [  # height, width, side of a window, windows
    (9, 9, 9, 1),  # exactly a window
    (10, 10, 9, 4),  # one pixel more
    (9, 10, 9, 2),
    (10, 9, 9, 2),
    (15, 21, 9, 6),  # 6 apart: divides
    (16, 20, 9, 9),  # does not
    (14, 22, 9, 8),
    (5, 4, 9, 1),  # smaller: 2 above, 2 below; 2 left, 3 right
    (4, 9, 9, 1),
    (9, 4, 9, 1),
    (8, 8, 9, 1),
    (4, 14, 9, 2),  # smaller in one direction, larger in the other
    (16, 6, 9, 3),
    (1, 1, 9, 1),  # a pixel
    (1, 1, 1, 1),
    (1, 12, 9, 2),
    (3, 4, 1, 12),  # windows of a pixel
    (5, 5, 2, 9),  # two thirds of 2, up: windows side by side
    (12, 13, 8, 4),  # 6 apart, of 5.33
    (12, 12, 7, 4),  # 5 apart, of 4.67
    (12, 13, 7, 6),
]


@pytest.mark.smoke
@pytest.mark.parametrize("module", SCRIPTS)
def test_the_logits_are_the_sums_of_a_loop_over_windows_and_pixels(module):
    for h, w, side, windows in SIZES:
        assert check(module, h, w, side) == windows, (h, w, side)


def test_any_size_and_any_window_are_summed_right():
    rng = random.Random(0)
    for _ in range(60):
        check(supervised, rng.randint(1, 23), rng.randint(1, 23), rng.randint(1, 11))


def test_a_small_image_stands_in_the_middle_of_the_mean_colour():
    # rows above, below, columns left, right: an odd rest goes below and right
    for h, w, frame in ((5, 4, (2, 2, 2, 3)), (4, 9, (2, 3, 0, 0)), (8, 2, (0, 1, 3, 4))):
        image, net = photograph(h, w), Placed(9)
        supervised.predict(net, image, slide(9), CLASSES)
        ((window,),) = net.windows
        above, below, left, right = frame
        expected = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None].repeat(1, 9, 9)
        expected[:, above : 9 - below, left : 9 - right] = image
        assert torch.equal(window, expected), (h, w)


def test_the_windows_of_a_narrow_image_are_padded_in_its_short_direction_alone():
    image, net = photograph(4, 14), Placed(9)
    supervised.predict(net, image, slide(9), CLASSES)
    colour = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None]
    for window, left in zip(net.windows, (0, 5), strict=True):
        assert torch.equal(window[0, :, 2:6], image[:, :, left : left + 9])
        assert (window[0, :, :2] == colour).all() and (window[0, :, 6:] == colour).all()


@pytest.mark.parametrize(
    "side, rows, columns",
    [
        (769, (0, 255), (0, 513, 1026, 1279)),
        (800, (0, 224), (0, 534, 1068, 1248)),
        (512, (0, 342, 512), (0, 342, 684, 1026, 1368, 1536)),
    ],
)
def test_the_windows_of_a_photograph_of_cityscapes(side, rows, columns):
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(2048), indexing="ij")
    image = torch.stack([y // 8, x // 8, 8 * (y % 8) + x % 8]).to(torch.uint8)
    places = []

    class Reads(torch.nn.Module):
        """Reads off the colour of its first and its last pixel where the window is."""

        def forward(self, x):
            assert x.shape == (1, 3, side, side)
            ends = []
            for corner in (x[0, :, 0, 0], x[0, :, -1, -1]):
                row, column, rest = corner.tolist()
                ends.append((8 * row + rest // 8, 8 * column + rest % 8))
            assert ends[1] == (ends[0][0] + side - 1, ends[0][1] + side - 1)
            places.append(ends[0])
            return {"logits": torch.ones(1, 1, side, side)}

    counts = supervised.predict(Reads(), image, slide(side), 1)
    assert places == [(row, column) for row in rows for column in columns]
    assert len(places) == (18 if side == 512 else 8)
    # each pixel is counted in the windows that hold it, and is in one at least
    for row, column in ((0, 0), (1023, 2047), (511, 1025), (600, 1279), (200, 540)):
        held = [1 for t, f in places if t <= row < t + side and f <= column < f + side]
        assert counts[0, row, column].item() == len(held) >= 1
    assert counts.min() == 1


def test_voc_has_one_window_where_it_fits_and_two_where_it_does_not():
    for h, w, side, windows in ((375, 500, 513, 1), (500, 375, 512, 1), (375, 500, 480, 2)):
        net = Placed(side)
        assert supervised.predict(net, photograph(h, w), slide(side), CLASSES).shape[1:] == (h, w)
        assert len(net.windows) == windows


def test_whole_is_one_call_with_the_image_as_it_is():
    for h, w in ((5, 4), (9, 9), (14, 22)):
        image, net = photograph(h, w), Placed()
        logits = supervised.predict(net, image, WHOLE, CLASSES)
        (window,) = net.windows
        assert torch.equal(window[0], image)
        assert torch.equal(logits, Placed()(image[None])["logits"][0])


@pytest.mark.smoke
@pytest.mark.parametrize("module", SCRIPTS)
def test_on_an_image_of_a_windows_size_slide_is_whole_bit_for_bit(module, monkeypatch):
    net = tiny(module, monkeypatch)
    with torch.no_grad():
        for side in (32, 33):
            image = photograph(side, side)
            one, two = (module.predict(net, image, a, 5) for a in (slide(side), WHOLE))
            assert torch.equal(one, two) and one.std() > 0


def tiny(module, monkeypatch, classes=5, seed=0):
    """Returns a script's network with the tiny parts of tests/helpers.py, in eval mode."""
    shrink(module, monkeypatch)
    torch.manual_seed(seed)
    args = SimpleNamespace(backbone="resnet18", amp="none")
    head = module.CPSHead if module is cps_fpl else module.DeepLabV3Plus
    return module.Network(args, classes, head).eval()


def test_raw_logits_are_summed_not_probabilities_and_not_means(monkeypatch):
    net, image = tiny(supervised, monkeypatch), photograph(32, 48)
    with torch.no_grad():
        logits = supervised.predict(net, image, slide(32), 5)
        left, right = (net(image[None, :, :, x : x + 32])["logits"][0] for x in (0, 16))
    assert torch.equal(logits[..., :16], left[..., :16])
    assert torch.equal(logits[..., 32:], right[..., 16:])
    # one float32 addition, in either order
    assert torch.equal(logits[..., 16:32], left[..., 16:] + right[..., :16])


def test_two_networks_scored_as_one_are_averaged_within_each_window(monkeypatch):
    nets = [tiny(cps_fpl, monkeypatch, seed=seed) for seed in (1, 2)]
    image = photograph(40, 27)  # two windows, padded left and right
    with torch.no_grad():
        logits = cps_fpl.predict(cps_fpl.Average(nets), image, slide(32), 5)
        padded = torch.tensor(MEAN, dtype=torch.uint8)[:, None, None].repeat(1, 40, 32)
        padded[:, :, 2:29] = image
        sums = torch.zeros(5, 40, 32)
        for top in (0, 8):
            window = padded[None, :, top : top + 32]
            probs = [net(window)["logits"].softmax(1)[0] for net in nets]
            sums[:, top : top + 32] += (sum(probs) / 2).log()
    # float32: a softmax, a logarithm and a sum of two
    assert torch.allclose(logits, sums[:, :, 2:29], rtol=1e-5, atol=1e-5)
    assert logits[:, 8:32].exp().sum(0).max() < 0.99  # in two windows: a product of two means


# ---- evaluate ----


class Memory:
    """A data set in memory: items are indices of images (3, H, W) and labels (H, W)."""

    def __init__(self, sizes, classes=5):
        rng = np.random.default_rng(0)
        self.num_classes, self.images, self.labels = classes, [], []
        for i, (h, w) in enumerate(sizes):
            label = rng.integers(0, classes, (h, w)).astype(np.uint8)
            label[rng.random((h, w)) < 0.2] = 255
            self.images.append(photograph(h, w, seed=i))
            self.labels.append(label)
        self.items = list(range(len(sizes)))

    def read(self, item, with_label):
        assert with_label
        picture = Image.fromarray(self.images[item].permute(1, 2, 0).numpy())
        return picture, Image.fromarray(self.labels[item])


def evaluated(module, net, data, monkeypatch, **flags_):
    """Returns evaluate's scores and maps, and the confusion matrix that it reduced."""
    seen, args = [], SimpleNamespace(workers=0, **flags_)

    def reduced(x, *rest):
        seen.append(x.clone())
        return x

    with monkeypatch.context() as patch:
        patch.setattr(module.distributed, "reduced", reduced)
        group = Group(0, 1, torch.device("cpu"))
        scores, maps = module.evaluate(net, data, data.items, args, group)
    (confusion,) = seen
    return scores, maps, confusion


@pytest.mark.smoke
@pytest.mark.parametrize("module", SCRIPTS)
def test_slide_and_whole_agree_on_images_of_the_crops_size(module, monkeypatch):
    net, data = tiny(module, monkeypatch), Memory([(32, 32)] * 5)
    slid = evaluated(module, net, data, monkeypatch, protocol="slide", crop_size=32)
    whole = evaluated(module, net, data, monkeypatch, protocol="whole", crop_size=32)
    assert slid[0] == whole[0] and torch.equal(slid[2], whole[2])
    for name in ("image", "label", "prediction"):
        assert all(torch.equal(a, b) for a, b in zip(slid[1][name], whole[1][name], strict=True))


def test_padding_is_never_scored_and_every_labelled_pixel_is(monkeypatch):
    net, data = Placed(9), Memory([(5, 4), (1, 1), (14, 22), (4, 14), (9, 9)], CLASSES)
    scores, maps, confusion = evaluated(
        supervised, net, data, monkeypatch, protocol="slide", crop_size=9
    )
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for image, label in zip(data.images, data.labels, strict=True):
        sums, _ = oracle(image, 9)
        for y, row in enumerate(label.tolist()):
            for x, truth in enumerate(row):
                of = [sums[k][y][x] for k in range(CLASSES)]
                if truth != 255:
                    expected[truth, of.index(max(of))] += 1
    assert torch.equal(confusion, expected)
    labelled = sum(int((label != 255).sum()) for label in data.labels)
    assert int(confusion.sum()) == labelled > 100
    correct = expected.diag().sum() / expected.sum()
    assert scores["accuracy"] == pytest.approx(correct.item(), abs=1e-6)
    for name in ("image", "label", "prediction"):  # panels show the images as they are
        sizes = [tuple(shot.shape[-2:]) for shot in maps[name]]
        assert sizes == [label.shape for label in data.labels[: len(sizes)]]


def test_evaluating_twice_gives_the_same_and_leaves_the_network_alone(monkeypatch):
    net, data = tiny(supervised, monkeypatch), Memory([(40, 27), (33, 70)])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags_ = dict(protocol="slide", crop_size=32)
    one, two = (evaluated(supervised, net.train(), data, monkeypatch, **flags_) for _ in (1, 2))
    assert one[0] == two[0] and torch.equal(one[2], two[2]) and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("module, extra", [(mean_teacher, []), (cps_fpl, ["--evaluate", "mean"])])
def test_a_run_with_slide_scores_its_windows(module, extra, tmp_path, monkeypatch):
    shrink(module, monkeypatch)
    tree, out = draw_tree(tmp_path / "data"), tmp_path / "run"  # 48 x 36 pixels, crop 32
    calls, predict = [], module.predict

    def counted(net, image, args, num_classes):
        calls.append((args.protocol, tuple(image.shape)))
        return predict(net, image, args, num_classes)

    monkeypatch.setattr(module, "predict", counted)
    argv = [*flags(tree, out, iters=8, evaluate=8), "--protocol", "slide", "--lr", "0.3", *extra]
    train(module, argv)
    assert log(out)[0]["args"]["protocol"] == "slide"
    assert calls == [("slide", (3, 36, 48))] * 6  # two of val, then two of test for last and best
    last = {}
    for protocol in ("slide", "whole"):
        argv = ["--eval-only", "--checkpoint", str(out / "last.pt"), "--eval-on", "test"]
        with monkeypatch.context() as patch:
            patch.setattr(module, "report", lambda data, results, on: last.update(results) or "")
            train(module, [*argv, "--protocol", protocol])
        assert calls[-1][0] == protocol
        assert last.pop("step 8") == log(out)[-1]["last"] or protocol == "whole"
