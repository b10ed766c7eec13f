"""Properties of what every run is built on, over random cases (hypothesis).

A few hundred cases each; `python -m pytest -m slow tests/test_properties.py` takes 10,000.
"""

import tempfile
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ael_fpl
import mean_teacher
import supervised
import u2pl
from common import Refusal
from common.data import Data, Item
from sources import read_list

pytest.importorskip("hypothesis")  # requirements-dev.txt; the oldest versions are tested without it
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def rng_of(data):
    return np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))


def torch_rng_of(data):
    return torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))


# ---- lists, id tables ----


def lists_are_read_as_written_and_a_bad_line_is_named(data):
    word = st.text("abcxyz019_-é", min_size=1, max_size=8)
    keys = data.draw(st.lists(word, min_size=1, max_size=12, unique=True))
    tab = data.draw(st.booleans())
    lines, expected = [], {}
    for key in keys:
        mask = data.draw(st.sampled_from([None, "None", f"masks/{key}.png"]))
        spaced = "/a b/" if tab and mask else "/a/"  # a line without a TAB is split at spaces
        image = data.draw(st.sampled_from(["", "/", "JPEGImages/", spaced])) + key
        expected[key] = (image.lstrip("/"), mask if mask != "None" else None)
        lines.append(image + ("\t" if tab else "  ") * (mask is not None) + (mask or ""))
        lines += data.draw(st.sampled_from([[], [""], ["  "]]))
    bad = data.draw(st.sampled_from([None, "twice", "key", "columns", "dots"]))
    place = len(lines) if bad == "twice" else data.draw(st.integers(0, len(lines)))
    if bad:
        wrong = {"twice": keys[0], "key": "?", "columns": "p\tq\tr" if tab else "p q r"}
        lines.insert(place, wrong.get(bad, f"../{keys[0]}0"))
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    text = end.join(lines) + data.draw(st.sampled_from(["", end]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode())
        if bad:
            with pytest.raises(Refusal, match=f"list.txt:{place + 1}: "):
                read_list(path, r"[^/ ?]+$")
        else:
            found = read_list(path, r"[^/ ?]+$")
            assert list(found) == keys and found == expected


EVALUATED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
PUBLISHED = {  # (data set, end of a mask's name): class of each value that may stand there
    ("camvid", ".png"): {i: i for i in range(11)} | {11: 255},
    ("voc", ".png"): {i: i for i in range(21)},
    ("cityscapes", "_gtFine_labelTrainIds.png"): {i: i for i in range(19)},
    ("cityscapes", "_gtFine_labelIds.png"): dict.fromkeys(range(34), 255)
    | {value: i for i, value in enumerate(EVALUATED)},
}


def masks_hold_what_their_id_table_says_and_strangers_are_named(data):
    (name, end), table = data.draw(st.sampled_from([*PUBLISHED.items(), (("folder", ""), None)]))
    args = SimpleNamespace(dataset=name, num_classes=0, ignore_index=255)
    if table is None:  # any classes, any ignored value
        args.num_classes = data.draw(st.integers(2, 200))
        args.ignore_index = data.draw(st.sampled_from([0, 255, args.num_classes]))
        table = {i: i for i in range(args.num_classes)}
    table = table | {args.ignore_index: 255}
    rng, size = rng_of(data), data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    values = rng.choice(list(table), size).astype(np.uint8)
    values[rng.random(size) < 0.3] = args.ignore_index
    stranger = data.draw(st.one_of(st.none(), st.integers(0, 255).filter(lambda x: x not in table)))
    if stranger is not None:
        y, x = rng.integers(size[0]), rng.integers(size[1])
        values[y, x] = stranger
    with tempfile.TemporaryDirectory() as folder:
        image, mask = Path(folder) / "a.png", Path(folder) / f"mask{end or '.png'}"
        Image.new("RGB", size[::-1]).save(image)
        Image.fromarray(values).save(mask)
        read = Data(args, [], [], [], []).read
        if stranger is None:
            found = np.asarray(read(Item("a", image, mask), True)[1])
            assert found.tolist() == [[table[x] for x in row] for row in values.tolist()]
        else:
            with pytest.raises(Refusal, match=f"value {stranger} at row {y}, column {x};"):
                read(Item("a", image, mask), True)


# ---- augmentation ----


def image_label_and_inside_never_part(data):
    rng = rng_of(data)
    width, height = data.draw(st.integers(3, 40)), data.draw(st.integers(3, 40))
    crop, low = data.draw(st.integers(4, 48)), data.draw(st.floats(0.3, 2))
    scales = data.draw(st.sampled_from([(low, low + 0.5), (low,), (0.5, 1.0, 1.5), (0.5, 2.0)]))
    cell = data.draw(st.integers(1, 12))
    blocks = rng.integers(0, 7, (height // cell + 1, width // cell + 1)).astype(np.uint8)
    label = blocks.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    image = Image.fromarray(np.repeat(30 * label[..., None] + 10, 3, 2))
    seed = data.draw(st.integers(0, 2**32 - 1))

    def augmented(mask):
        return supervised.augment(image, mask, np.random.default_rng(seed), crop, scales)

    out, found, inside = augmented(Image.fromarray(label))
    alone, none, same = augmented(None)
    assert none is None and np.array_equal(alone, out) and np.array_equal(same, inside)
    assert out.shape == (3, crop, crop) and found.shape == inside.shape == (crop, crop)
    mean = np.array([round(m) for m in supervised.MEAN])
    assert (found[~inside] == 255).all() and (found[inside] < 7).all()
    assert (out[:, ~inside] == mean[:, None]).all()
    rows, columns = inside.any(1), inside.any(0)
    assert np.array_equal(inside, np.outer(rows, columns))  # a rectangle, in one piece
    for part in (rows, columns):
        where = np.flatnonzero(part)
        assert len(where) and where[-1] - where[0] == len(where) - 1
    if scales[0] < 1:
        return
    # bilinear: of the four pixels around a point, each is the nearest of some place within two
    # pixels of the enlarged image; where those all have one label, so have the four
    for y, x in zip(*np.nonzero(inside), strict=True):
        near = found[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        if near.size == 25 and (near == near[0, 0]).all():
            assert abs(int(out[0, y, x]) - (30 * int(found[y, x]) + 10)) <= 1


def cutmix_moves_everything_alike(data):
    rng = rng_of(data)
    pairs, size = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 24))
    boxes = [mean_teacher.cutmix_box(rng, size) for _ in range(2 * pairs)]
    number = torch.arange(2 * pairs * size * size).view(2 * pairs, size, size)
    maps = (number[:, None].expand(-1, 3, -1, -1).clone(), number.clone(), number % 2 == 0)
    image, label, inside = mean_teacher.cutmix(boxes, *maps)
    assert maps[1].equal(number)  # not in place
    for i, (top, left, h, w) in enumerate(boxes):
        assert 0 <= top <= size - h and 0 <= left <= size - w and 2 * h > size // 2
        expected = number[i].clone()
        box = (slice(top, top + h), slice(left, left + w))
        expected[box] = number[i ^ 1][box]
        assert label[i].equal(expected) and image[i].equal(expected.expand(3, -1, -1))
        assert inside[i].equal(expected % 2 == 0)


# ---- losses ----


def ohem_takes_the_hard_pixels(data):
    rng = torch_rng_of(data)
    B, C = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 5))
    h, w = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    logits = 3 * torch.randn(B, C, h, w, generator=rng)
    label = torch.randint(0, C, (B, h, w), generator=rng)
    label[torch.rand(B, h, w, generator=rng) < data.draw(st.sampled_from([0, 0.5, 1]))] = 255
    threshold = data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    kept = data.draw(st.integers(0, 50))
    found = supervised.ohem_cross_entropy(logits, label, threshold, kept)
    means = []
    for image, truth in zip(logits.double().softmax(1), label, strict=True):
        p = [image[c, y, x].item() for (y, x), c in np.ndenumerate(truth.numpy()) if c != 255]
        limit = sorted(p)[min(max(kept, 1), h * w, len(p)) - 1] if p else 0
        limit = 1.0 if len(p) < max(kept, 1) else max(limit, threshold)
        if any(abs(v - limit) < 1e-6 and v != limit for v in p):
            return  # float32 decides
        hard = [v for v in p if v <= limit + 1e-9]
        means.append(-np.mean(np.log(hard)) if hard else 0.0)
    assert found.item() == pytest.approx(np.mean(means), rel=1e-4, abs=1e-6)


def percentiles_are_numpys(data):
    rng = rng_of(data)
    H = rng.random(data.draw(st.integers(1, 80))) * data.draw(st.sampled_from([1e-6, 1, 1e6]))
    H = np.round(H, data.draw(st.sampled_from([1, 9])))
    inside = rng.random(len(H)) < data.draw(st.sampled_from([0.05, 0.5, 1]))
    shares = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4))
    tensors = torch.from_numpy(H).view(1, 1, -1), torch.from_numpy(inside).view(1, 1, -1)
    for q, found in zip(shares, u2pl.quantiles(*tensors, *shares).tolist(), strict=True):
        expected = np.percentile(H[inside], 100 * q) if inside.any() else np.inf
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)


# ---- banks, queues ----


def the_confidence_bank_is_a_moving_mean(data):
    rng = torch_rng_of(data)
    C, groups = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3))
    pooled, momentum = data.draw(st.integers(1, 2)), data.draw(st.floats(0, 1))
    skip = data.draw(st.booleans())
    prob = torch.randn(groups * pooled, C, 3, 4, generator=rng).double().softmax(1)
    label = torch.randint(0, C, (groups * pooled, 3, 4), generator=rng)
    label[torch.rand(label.shape, generator=rng) < data.draw(st.sampled_from([0, 0.9, 1]))] = 255
    bank = torch.rand(C, generator=rng, dtype=torch.float64)
    sums = ael_fpl.class_confidence(prob, label, pooled, skip)
    found = ael_fpl.update_confidence(bank, sums, momentum)
    for c in range(C):
        means = []
        for g in range(groups):
            part = slice(g * pooled, (g + 1) * pooled)
            hits = prob[part, c][label[part] == c].tolist()
            means += [np.mean(hits) if hits else 0.0] if hits or not skip else []
        old = bank[c].item()
        new = momentum * old + (1 - momentum) * np.mean(means) if means else old
        assert found[c].item() == pytest.approx(new, rel=1e-9, abs=1e-12)
        assert 0 <= found[c] <= 1


def the_negatives_wait_in_queues(data):
    rng = rng_of(data)
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    K, turns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6))
    bank, pushed = torch.zeros(sum(sizes) + 1, 1), torch.zeros(len(sizes), dtype=torch.int64)
    queues = [deque(maxlen=size) for size in sizes]
    number = 0
    for _ in range(turns):
        offered = torch.zeros(len(sizes), K, 2)
        for c, k in np.ndindex(len(sizes), K):
            number += 1
            offered[c, k] = torch.tensor([float(number), float(rng.random() < 0.6)])
            if offered[c, k, 1]:
                queues[c].append(float(number))
        u2pl.push_keys(bank, pushed, torch.tensor(sizes), offered)
    for c, ring in enumerate(bank[:-1, 0].split(sizes)):
        filled = min(int(pushed[c]), sizes[c])
        turn = int(pushed[c]) % sizes[c] if filled == sizes[c] else 0
        assert ring.roll(-turn)[:filled].tolist() == list(queues[c])  # the oldest first
        assert not ring[filled:].any()
    assert bank[-1] == 0


PROPERTIES = [
    lists_are_read_as_written_and_a_bad_line_is_named,
    masks_hold_what_their_id_table_says_and_strangers_are_named,
    image_label_and_inside_never_part,
    cutmix_moves_everything_alike,
    ohem_takes_the_hard_pixels,
    percentiles_are_numpys,
    the_confidence_bank_is_a_moving_mean,
    the_negatives_wait_in_queues,
]
RARE = pytest.mark.slow
COUNTS = [pytest.param(200, id="some"), pytest.param(10_000, id="ten thousand", marks=RARE)]


@pytest.mark.parametrize("cases", COUNTS)
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_property(prop, cases):
    """Over so many random cases; they are the same every time."""
    same = dict(deadline=None, derandomize=True, database=None)
    free = settings(max_examples=cases, suppress_health_check=list(HealthCheck), **same)
    free(given(st.data())(lambda data: prop(data)))()
