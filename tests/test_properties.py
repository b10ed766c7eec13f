"""Properties of what every run is built on, over random cases (hypothesis).

A few hundred cases each; `python -m pytest -m slow tests/test_properties.py` takes 10,000.
"""

from collections import deque

import numpy as np
import pytest
import torch
from PIL import Image

import mean_teacher
import supervised
import u2pl

pytest.importorskip("hypothesis")  # requirements-dev.txt; the oldest versions are tested without it
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def rng_of(data):
    return np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))


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


# ---- queues ----


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
    image_label_and_inside_never_part,
    cutmix_moves_everything_alike,
    the_negatives_wait_in_queues,
]


@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_property(prop, cases):
    """Over so many random cases; they are the same every time."""
    same = dict(deadline=None, derandomize=True, database=None)
    free = settings(max_examples=cases, suppress_health_check=list(HealthCheck), **same)
    free(given(st.data())(lambda data: prop(data)))()
