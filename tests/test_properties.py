"""Properties of what every run is built on, over random cases (hypothesis).

A few hundred cases each; `python -m pytest -m slow tests/test_properties.py` takes 10,000.
"""

from collections import deque

import numpy as np
import pytest
import torch

import u2pl
from test_augment import assert_literal, pictures

pytest.importorskip("hypothesis")  # requirements-dev.txt; the oldest versions are tested without it
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def rng_of(data):
    return np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))


def a_crop_is_the_literal_one(data):
    width, height = (2 * data.draw(st.integers(0, 20)) + 1 for _ in range(2))
    crop, low = data.draw(st.integers(1, 48)), data.draw(st.floats(0.3, 2))
    scales = data.draw(st.sampled_from([(low, low + 0.5), (low,), (0.5, 1.0, 1.5), (0.5, 2.0)]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    assert_literal(*pictures(height, width, rng_of(data)), crop, scales, seed)


def features_wait_in_queues(data):
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
        u2pl.push_features(bank, pushed, torch.tensor(sizes), offered)
    for c, ring in enumerate(bank[:-1, 0].split(sizes)):
        filled = min(int(pushed[c]), sizes[c])
        turn = int(pushed[c]) % sizes[c] if filled == sizes[c] else 0
        assert ring.roll(-turn)[:filled].tolist() == list(queues[c])  # the oldest first
        assert not ring[filled:].any()
    assert bank[-1] == 0


PROPERTIES = [a_crop_is_the_literal_one, features_wait_in_queues]


@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_property(prop, cases):
    """Over so many random cases; they are the same every time."""
    same = dict(deadline=None, derandomize=True, database=None)
    free = settings(max_examples=cases, suppress_health_check=list(HealthCheck), **same)
    free(given(st.data())(lambda data: prop(data)))()
