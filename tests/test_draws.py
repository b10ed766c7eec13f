"""What is drawn, pasted, pooled and kept between steps, against oracles/ for given numbers."""

import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import u2pl
from common import Refusal
from common.distributed import Group
from oracles import ael as ael_oracle
from oracles import fpl as fpl_oracle
from oracles import mean_teacher as mt_oracle
from oracles import u2pl as u2pl_oracle

BELOW_1 = 1 - 2.0**-53  # the largest float64 of a generator's [0, 1)
some_classes = pytest.mark.parametrize(
    "classes", [2, pytest.param(21, marks=pytest.mark.smoke), 81]
)


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def uniform(*shape, seed=0):
    """In [0, 1); the first is 0 and the last the largest float64 below 1."""
    u = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u.view(-1)[0] = 0.0
    u.view(-1)[-1] = BELOW_1
    return u


def whole(classes, *shape, seed=0):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


class Scripted:
    """Stands in for a numpy generator: its numbers are a list of shares in [0, 1)."""

    def __init__(self, shares):
        self.shares = list(shares)

    def random(self, count=None):
        if count is None:
            return self.shares.pop(0)
        return np.array([self.shares.pop(0) for _ in range(count)])

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * self.shares.pop(0)

    def integers(self, low, high=None):
        low, high = (0, low) if high is None else (low, high)
        return low + int(self.shares.pop(0) * (high - low))

    def choice(self, values):
        return values[self.integers(len(values))]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "draw, oracle, count, sizes",
    [
        (ael_fpl.half_area_box, ael_oracle.half_area_box, 3, (6, 32, 129, 769)),
        (mean_teacher.cutmix_box, mt_oracle.box, 3, (6, 16, 128, 513)),
        (cps_fpl.toggled_mask, fpl_oracle.toggled_mask, 12, (16, 57, 64)),
    ],
)
def test_boxes(draw, oracle, count, sizes):
    """Half of a crop (AEL; [D13]); CPS's three boxes [D17]."""
    for size in sizes:
        shares = np.random.default_rng(size).random((100, count)).tolist()
        shares += [list(3 * s)[:count] for s in itertools.product((0.0, 0.5, BELOW_1), repeat=4)]
        for numbers in shares:
            script = Scripted(numbers)
            found = draw(script, size)
            assert not script.shares
            expected = oracle(numbers, size)
            assert found == expected if count == 3 else found[0].tolist() == expected


def test_a_component_must_be_larger_than_the_area_and_may_touch_at_corners():
    """[D23]: a cell is 4x4 pixels, the last one ends with the crop; components equally likely."""
    seen = np.zeros((8, 8), np.uint8)
    seen[1:3, 2:6] = seen[5, 5:7] = 7  # 8 cells and 2, of 64
    seen[7, 7] = 255
    large, small = (4, 8, 8, 16), (20, 20, 4, 8)
    for c, area, share, box in (
        *((7, 8 / 64, 0.0, None), (7, 7 / 64, BELOW_1, large), (7, 2 / 64, BELOW_1, large)),
        *((7, 1 / 64, 0.49, large), (7, 1 / 64, 0.5, small)),
        *((0, 52 / 64, 0.0, (0, 0, 32, 32)), (0, 53 / 64, 0.0, None), (3, 0.0, 0.0, None)),
    ):
        assert ael_fpl.component_box(seen, c, area, 32, Scripted([share])) == box
    for eye in (np.eye(4), np.eye(4)[::-1]):
        found = ael_fpl.component_box(eye.astype(np.uint8), 1, 3 / 16, 13, Scripted([0.0]))
        assert found == (0, 0, 13, 13)
    # a class is present if it covers the area: 10 cells
    for area, expected in ((0.0, True), (10 / 64, True), (11 / 64, False)):
        assert ael_fpl.presence(torch.from_numpy(seen)[None], 8, area)[0, 7] == expected


def test_pixels_of_drawn_classes_cover_the_chosen_images():
    base, source = (
        {
            "image": whole(256, 4, 3, 6, 5, seed=seed),
            "label": whole(7, 4, 6, 5, seed=seed),
            "inside": normal(4, 6, 5, seed=seed) > 0,
        }
        for seed in (1, 2)
    )
    source["label"][normal(4, 6, 5) > 1] = 255
    drawn, chosen = torch.tensor([[0, 3], [1, 2], [5, 5], [6, 4]]), torch.arange(4) != 1
    found = ael_fpl.copy_paste(base, source, drawn, chosen)
    for (b, y, x), key in itertools.product(np.ndindex(4, 6, 5), base):
        over = b != 1 and source["label"][b, y, x].item() in drawn[b].tolist()
        expected = (source if over else base)[key]
        assert torch.equal(found[key][b, ..., y, x], expected[b, ..., y, x])


@some_classes
def test_the_confidence_of_a_class_and_its_moving_mean(classes):
    """Eq. (4), [D21], [D22]; Eq. (7)."""
    for seed, skip in np.ndindex(3, 2):
        prob = normal(4, classes, 6, 5, seed=seed).softmax(1)
        label = whole(classes, 4, 6, 5, seed=seed)
        label[uniform(4, 6, 5) < 0.2] = 255
        label[label == seed] = 255  # absent
        lists = prob.movedim(1, -1).flatten(1, 2).tolist(), label.flatten(1).tolist()
        for pooled in (1, 2, 4):
            found = ael_fpl.class_confidence(prob, label, pooled, skip)
            sums, counts = ael_oracle.class_confidence(*lists, pooled, skip)
            assert found[0].tolist() == pytest.approx(sums, rel=1e-9, abs=1e-12)
            assert found[1].tolist() == counts
            bank = uniform(classes, seed=seed)
            new = ael_fpl.update_confidence(bank, found, 0.97).tolist()
            for old, moved, total, count in zip(bank.tolist(), new, sums, counts, strict=True):
                expected = 0.97 * old + 0.03 * total / count if count else old
                assert moved == pytest.approx(expected, rel=1e-9 if count else 0)


@some_classes
def test_sampling_probabilities_and_rates_of_classes(classes):
    """Eq. (9), and Sec. 3.3; a bank that a rounding has put above 1 counts as 1."""
    bank = uniform(classes)
    bank[-1] = 1.0
    allowed = torch.arange(classes) % 3 != 1
    for power, mask in itertools.product((0.0, 0.5, 1.0, 2.0), (None, allowed)):
        found = ael_fpl.sampling_probability(bank, mask, power)
        hits = [True] * classes if mask is None else mask.tolist()
        expected = ael_oracle.sampling_probability(bank.tolist(), hits, power)
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
        rate = ael_oracle.equalization_rate(bank.tolist(), power)
        assert ael_fpl.equalization_rate(bank, power).tolist() == pytest.approx(rate, rel=1e-12)
    assert ael_fpl.sampling_probability(torch.tensor([0.5, 1 + 1e-6]), None, 0.5).isfinite().all()
    assert not ael_fpl.equalization_rate(torch.ones(5), 0.5).any()  # no NaN


@pytest.mark.parametrize("scale, dtype", [(1, torch.float32), (8, torch.float64)])
def test_draws_at_the_steps_of_the_running_sum(scale, dtype):
    p = scale * torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.0], dtype=dtype)  # dyadic
    u = [0.0, 0.25 - 2.0**-54, 0.25, 0.5 - 2.0**-54, 0.5, BELOW_1]
    u = torch.tensor(u, dtype=torch.float64)
    assert ael_fpl.draw_classes(p, u).tolist() == [1, 1, 3, 3, 4, 4]
    assert ael_fpl.draw_classes(p, u.view(2, 3).T.contiguous()).tolist() == [[1, 3], [1, 4], [3, 4]]
    assert ael_fpl.draw_classes(p, u.view(2, 3)[:, 3:]).shape == (2, 0)


@some_classes
def test_partners_are_a_class_by_eq_9_and_an_image_that_shows_it(classes):
    for seed, count in enumerate((1, 2, 7, 40)):
        present = uniform(classes, count, seed=seed) < 0.4
        present[0] = False  # nowhere: any image
        bank, shares = uniform(classes, seed=seed), uniform(60, seed=seed).tolist()
        script = Scripted(shares)
        found = ael_fpl.draw_partners(bank, present, 30, script)
        expected = ael_oracle.draw_partners(bank.tolist(), present.tolist(), 30, shares)
        assert found.tolist() == expected and not script.shares
    with pytest.raises(Refusal, match="no unlabelled images"):
        ael_fpl.draw_partners(bank, present[:, :0], 4, Scripted([]))


def test_candidates_have_more_entropy_than_gamma_or_less_than_the_lower_limit():
    """Eq. (6), (8), (11), (15), Table 4; gamma is numpy's percentile of what is inside [D20]."""
    H = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    inside = torch.tensor([[[True, True, True, False]]])
    limits = H[0, 0, 1], H[0, 0, 1]  # neither where it is equal
    for which, expected in {"unreliable": [2], "reliable": [0], "all": [0, 1, 2]}.items():
        found = u2pl.candidates(H, inside, *limits, which)
        assert found.flatten().nonzero().flatten().tolist() == expected
    label = u2pl.reliable_labels(torch.tensor([[[3, 4, 5, 6]]]), H, H[0, 0, 2])
    assert label.tolist() == [[[3, 4, 255, 255]]]
    assert u2pl.unsup_weight(label, inside, 2.5) == 3.75
    assert u2pl.unsup_weight(label.fill_(255), inside, 2.5) == 7.5  # no label: as of one
    nothing = u2pl.quantiles(H, inside & False, 0.8, 0.2)
    assert nothing.tolist() == [math.inf] * 2  # and lets nothing through
    shares = 0.0, 0.2, 0.5, 0.8, 1.0
    H = normal(2, 9, 7).abs()
    inside = normal(2, 9, 7, seed=1) > 0
    found = u2pl.quantiles(H.masked_fill(~inside, torch.nan), inside, *shares)
    expected = np.percentile(H[inside].numpy(), [100 * q for q in shares])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    half = torch.tensor([[0.5, 0.5], [0.25, 0.75]])  # an anchor has more than delta_p
    found = u2pl.anchor_masks(half, torch.tensor([0, 1]), 0.5)
    assert found.tolist() == [[False, False], [False, True]]


def test_features_wait_in_rings():
    """Alg. 1: a new feature takes the place of the oldest; any number, rings of any size."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        K, sizes = int(rng.integers(1, 8)), rng.integers(1, 10, 3).tolist()
        bank, pushed = torch.zeros(sum(sizes) + 1, 1), torch.zeros(3, dtype=torch.int64)
        offered = torch.from_numpy(rng.random((3, 6 * K, 2), np.float32))
        offered[..., 1] = (offered[..., 1] < 0.6).float()
        for turn in offered.split(K, 1):
            u2pl.push_features(bank, pushed, torch.tensor(sizes), turn)
        for ring, row, size, count in zip(bank[:-1].split(sizes), offered, sizes, pushed):  # noqa: B905
            features = row[row[:, 1] > 0, 0].tolist()
            expected = u2pl_oracle.ring(features, size)
            assert ring.flatten().tolist() == expected + [0] * (size - len(expected))
            assert count == len(features)
        assert bank[-1] == 0


@pytest.mark.parametrize("m, M", [(1, 5), (2, 9), (8, 128), (33, 513), (129, 513), (5, 5), (9, 4)])
def test_pixels_of_a_smaller_map(m, M):
    """U2PL [D21]: row floor(i M / m). ESL [D24]: corners on corners, the nearest, halves go up."""
    places = {
        u2pl.nearest: lambda i, m, M: i * M // m,
        esl.aligned: lambda i, m, M: math.floor(i * (M - 1) / max(m - 1, 1) + 0.5),
    }
    x = torch.arange(2 * M * (M + 2)).view(2, M, M + 2)
    for resized, place in places.items():
        rows = [place(i, m, M) for i in range(m)]
        columns = [place(i, m + 1, M + 2) for i in range(m + 1)]
        found = resized(x, (m, m + 1)).view(2, m, m + 1)  # U2PL: in the order of labels
        assert torch.equal(found, x[:, rows][:, :, columns])


def test_soft_labels_at_their_borders():
    def label(p, kind, eta=0.95, top_k=5):
        args = SimpleNamespace(label=kind, eta=eta, top_k=top_k)
        return esl.soft_label(torch.tensor(p).view(1, -1, 1, 1), args).flatten().tolist()

    assert label([0.5, 0.25, 0.25], "dynamic", 0.75) == [0.5, 0.25, 0.25]  # C* is 2; ties are kept
    assert label([0.5, 0.25, 0.25], "dynamic", 0.5) == [1, 0, 0]  # sum >= eta
    assert label([0.5, 0.25, 0.25], "topk", top_k=2) == [0.5, 0.25, 0.25]
    for kind, target in (("dynamic", [0.25] * 4), ("topk", [0.25] * 4), ("hard", [1, 0, 0, 0])):
        assert label([0.25] * 4, kind, 0.3, 1) == target
    for kind in ("dynamic", "topk", "soft"):
        assert all(map(math.isnan, label([math.nan] * 3, kind)))


def test_kmeans_by_hand():
    """[D22]: k-means++ by u, Lloyd's steps of directions, raw means at last; zeros for no part."""
    # the second of three directions, then the third; the first is as near to both: the lowest
    found = esl.kmeans(torch.eye(3).double(), 2, torch.tensor([0.5, 0.75]), steps=1)
    assert found.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    here, there = (torch.tensor(x) + 0.3 * normal(20, 3) for x in ([1.0, 2, 2], [-4.0, 0, 1]))
    found = esl.kmeans(torch.cat([here, there]), 2, uniform(2))
    assert torch.allclose(found, torch.stack([here.mean(0), there.mean(0)]), rtol=1e-9)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])  # two directions
    assert sorted(esl.kmeans(x, 5, uniform(5)).tolist()) == [[0, 0]] * 3 + [[0, 3], [1.5, 0]]
    assert not esl.kmeans(x[:0], 3, uniform(3)).any()


def test_first_prototypes_are_of_the_pixels_with_the_lowest_numbers(monkeypatch):
    """[D22]: 5,000 of each class, by numbers of the seed and the image; class 2 is nowhere."""

    def read(item, with_label):
        rng = np.random.default_rng(item)
        label = rng.choice(np.array([0, 1, 255], np.uint8), (130 + item, 120))
        image = rng.integers(0, 256, (*label.shape, 3)).astype(np.uint8)
        return Image.fromarray(image), Image.fromarray(label)

    seen = []
    monkeypatch.setattr(esl, "kmeans", lambda x, K, u: seen.append(x) or torch.full((K, 3), len(x)))
    args, group = SimpleNamespace(seed=3, parts=2), Group(0, 1, torch.device("cpu"))
    data = SimpleNamespace(labeled=[0, 1], num_classes=3, read=read)
    encoder = lambda image: {"encoder": image.float()}  # noqa: E731
    found = esl.first_prototypes(encoder, data, 3, args, group)
    assert found.tolist() == [[[5_000] * 3] * 2] * 2 + [[[0] * 3] * 2]
    for c in range(2):
        pixels = []
        for i in range(2):
            image, label = map(np.array, read(i, True))
            u = np.random.default_rng([3, zlib.crc32(b"pixels"), i]).random(label.size)
            rows = image.reshape(-1, 3).astype(float)
            pixels += [(u[j], rows[j].tolist()) for j in np.flatnonzero(label.ravel() == c)]
        assert len(pixels) > 5_000
        assert seen[c].tolist() == [x for _, x in sorted(pixels)[:5_000]]
