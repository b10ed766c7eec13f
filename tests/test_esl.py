"""esl.py: every function of ESL against loops over scalars; K-means, presets and flags."""

import itertools
import math
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import cps_fpl
import esl
from common import Refusal
from common.distributed import Group
from common.run import parse, resolve
from esl import (
    Args,
    aligned,
    as_rows,
    draw_anchors,
    draw_entries,
    first_prototypes,
    info_nce,
    kmeans,
    part_contrast,
    part_ids,
    part_sums,
    preset,
    push_keys,
    soft_cross_entropy,
    soft_label,
    update_prototypes,
)

CLASSES = [2, 3, 7, 21, 81]
LABELS = ["dynamic", "topk", "soft", "hard"]
NEAR = dict(rel=1e-9, abs=1e-12)  # float64
NONE = -1  # of an oracle: no part


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**40)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, shape))


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed, shape))


def given(label="dynamic", eta=0.95, top_k=5, **more):
    return SimpleNamespace(label=label, eta=eta, top_k=top_k, **more)


# ---- oracles: loops over scalars, in float64 ----


def scalar_label(p, label, eta, k):
    """Eq. (3)-(5) of one pixel: a list."""
    if label == "soft":
        return list(p)
    order = sorted(range(len(p)), key=lambda c: (-p[c], c))
    if label == "hard":
        return [float(c == order[0]) for c in range(len(p))]
    if label == "topk":
        count = min(k, len(p))
    else:
        count, total = 0, 0.0
        for c in order:
            total, count = total + p[c], count + 1
            if total >= eta:
                break
    delta = p[order[count - 1]]
    kept = [v if v >= delta else 0.0 for v in p]
    return [v / math.fsum(kept) for v in kept]


def cosine(x, y):
    lengths = [max(math.sqrt(math.fsum(v * v for v in a)), 1e-12) for a in (x, y)]
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / lengths[0] / lengths[1]


def near(i, m, M):
    """The nearest of M pixels to the i-th of m, corners on corners; halves go up."""
    return math.floor(i * (M - 1) / (m - 1) + 0.5) if m > 1 else 0


def scalar_anchors(ids, c, K, share, u):
    """The anchors of class c: u[0] turns the circle, the others draw one from each stretch."""
    mine = [i for i, r in enumerate(ids) if r // K == c]
    n = len(mine)
    m = min(math.ceil(share * n), len(u) - 1)
    start, drawn = int(u[0] * n), []
    for j in range(m):
        low, high = j * n // m, (j + 1) * n // m
        drawn.append(mine[(start + low + int(u[j + 1] * (high - low))) % n])
    return drawn


def scalar_entries(ring, filled, q, u):
    """(positive, negatives) of one anchor as (ring, place) pairs; None if it lacks either."""
    others = [(r, i) for r, count in enumerate(filled) for i in range(count) if r != ring]
    if not filled[ring] or not others:
        return None
    positive = (ring, int(u[0] * filled[ring]))
    return positive, [others[int(v * len(others))] for v in u[1:]]


def scalar_info_nce(z, positive, negatives, sigma):
    """Eq. (10): -log Phi(z, z^+) / (Phi(z, z^+) + sum Phi(z, z^-))."""
    above = math.exp(cosine(z, positive) / sigma)
    return -math.log(above / (above + math.fsum(math.exp(cosine(z, x) / sigma) for x in negatives)))


# ---- Eq. (3)-(6), soft label ----


def probabilities(kind, classes, count=40, seed=0):
    """(1, C, 1, P) float64: drawn, of few values (ties), or one-hot."""
    if kind == "tied":
        p = torch.randint(1, 4, (count, classes), generator=generator(seed, classes)).double()
        p = p / p.sum(1, keepdim=True)
    elif kind == "one-hot":
        p = F.one_hot(torch.arange(count) % classes, classes).double()
    else:
        p = (3 * normal(count, classes, seed=seed)).softmax(1)
    return p.T[None, :, None]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["drawn", "tied", "one-hot"])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("classes", CLASSES)
def test_soft_label_is_the_loops(classes, label, kind):
    prob = probabilities(kind, classes)
    for eta, k in ((0.5, 1), (0.8, 3), (0.95, 5), (0.999, 90)):
        target = soft_label(prob, given(label, eta, k))
        assert target.shape == prob.shape and target.dtype == prob.dtype
        for j in range(prob.shape[3]):
            p = prob[0, :, 0, j].tolist()
            assert target[0, :, 0, j].tolist() == pytest.approx(scalar_label(p, label, eta, k))


def test_ties_at_delta_are_all_kept_and_the_sum_may_equal_eta():
    one = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1)
    assert soft_label(one, given(eta=0.75)).flatten().tolist() == [0.5, 0.25, 0.25]  # C* is 2
    assert soft_label(one, given(eta=0.5)).flatten().tolist() == [1, 0, 0]  # sum >= eta
    assert soft_label(one, given("topk", top_k=2)).flatten().tolist() == [0.5, 0.25, 0.25]
    even = torch.full((1, 4, 1, 1), 0.25)
    for label, target in (("dynamic", [0.25] * 4), ("topk", [0.25] * 4), ("hard", [1, 0, 0, 0])):
        assert soft_label(even, given(label, 0.3, 1)).flatten().tolist() == target


@pytest.mark.parametrize("eta", [0.3, 0.8, 0.95, 0.99])
def test_a_sure_pixel_is_one_hot_and_the_set_is_as_large_as_fpls_n(eta):
    prob = probabilities("drawn", 7, 400)
    target = soft_label(prob, given(eta=eta))
    n = cps_fpl.cumulative_classes(prob, eta, strict=False)
    assert (target > 0).sum(1).equal(n)
    sure = prob.amax(1) >= eta
    assert sure.any() and (target.amax(1)[sure] == 1).all() and (target.amax(1)[~sure] < 1).all()
    assert target.argmax(1).equal(prob.argmax(1))  # Eq. (9)'s class is the label's


def test_a_nan_of_the_teacher_stays_one():
    prob = torch.full((1, 3, 1, 1), math.nan)
    for label in ("dynamic", "topk", "soft"):
        assert soft_label(prob, given(label)).isnan().all()


@pytest.mark.smoke
def test_soft_cross_entropy_and_its_gradient():
    logits, inside = normal(2, 5, 3, 4).requires_grad_(), uniform(2, 3, 4) < 0.7
    target = soft_label(normal(2, 5, 3, 4, seed=1).softmax(1), given(eta=0.8))
    loss = soft_cross_entropy(logits, target, inside)
    loss.backward()
    p, values = logits.detach().softmax(1), []
    for b, y, x in itertools.product(range(2), range(3), range(4)):
        if inside[b, y, x]:
            log_p = [math.log(v) for v in p[b, :, y, x].tolist()]
            pairs = zip(target[b, :, y, x].tolist(), log_p, strict=True)
            values.append(-math.fsum(a * v for a, v in pairs))
    assert loss.item() == pytest.approx(math.fsum(values) / len(values), **NEAR)
    expected = (p - target) * inside[:, None] / inside.sum()
    assert torch.allclose(logits.grad, expected, rtol=1e-9, atol=1e-12)
    assert soft_cross_entropy(logits, target, torch.zeros_like(inside)).item() == 0
    assert soft_cross_entropy(logits.bfloat16(), target.float(), inside).dtype == torch.float32


# ---- Eq. (7), (8), (12), parts ----


@pytest.mark.parametrize("m, M", [(1, 5), (2, 9), (8, 128), (33, 513), (129, 513), (5, 5), (9, 4)])
def test_aligned_is_the_nearest_and_back_again(m, M):
    x = torch.arange(M)[None, :, None].expand(1, M, M) * 1000 + torch.arange(M)
    found = aligned(x, (m, m))[0]
    rows = [near(i, m, M) for i in range(m)]
    assert found.tolist() == [[1000 * r + c for c in rows] for r in rows]
    if 1 < m <= M:  # up and down again: every cell has its own value
        cells = torch.arange(m * m).view(1, m, m)
        assert aligned(aligned(cells, (M, M)), (m, m)).equal(cells)


@pytest.mark.smoke
@pytest.mark.parametrize("C, K, size", [(2, 1, (3, 5)), (4, 3, (9, 12)), (81, 5, (7, 7))])
def test_part_ids_are_the_loops(C, K, size):
    E, P = normal(2, 6, 3, 4, seed=C), normal(C, K, 6, seed=C)
    P[0] = 0  # a class that the labelled set does not have: its first part
    label = torch.randint(0, C, (2, *size), generator=generator(C))
    label[uniform(2, *size) < 0.2] = 255
    ids = part_ids(E, P, label)
    assert ids.dtype == torch.int64
    for b, y, x in itertools.product(range(2), range(size[0]), range(size[1])):
        c = int(label[b, y, x])
        if c == 255:
            assert ids[b, y, x] == C * K
            continue
        e = E[b, :, near(y, size[0], 3), near(x, size[1], 4)].tolist()
        cosines = [cosine(e, P[c, k].tolist()) for k in range(K)]
        assert ids[b, y, x] == c * K + max(range(K), key=lambda k: cosines[k]), (b, y, x)


def parts_drawn(C=3, K=2, B=2, D=4, h=5, w=6, seed=0):
    """x (B, D, h, w) and ids (B, h, w), some of no part; part 1 is nowhere."""
    ids = torch.randint(0, C * K + 1, (B, h, w), generator=generator(seed))
    return normal(B, D, h, w, seed=seed), ids.masked_fill(ids == 1, C * K)


@pytest.mark.smoke
def test_part_sums_are_the_loops_and_prototypes_of_absent_parts_stay():
    x, ids = parts_drawn()
    sums = part_sums(x, ids, 6)
    assert sums.shape == (2, 6, 5) and sums.dtype == torch.float32
    found = {}
    for b, r in itertools.product(range(2), range(6)):
        mine = [(y, i) for y, i in itertools.product(range(5), range(6)) if ids[b, y, i] == r]
        found[b, r] = [x[b, :, y, i].tolist() for y, i in mine]
        total = [math.fsum(v[d] for v in found[b, r]) for d in range(4)]
        assert sums[b, r].tolist() == pytest.approx([*total, len(mine)], rel=1e-5, abs=1e-5)
    P = normal(3, 2, 4, seed=5)
    new = update_prototypes(P, sums.sum(0), 0.9)
    for r in range(6):
        old, every = P.flatten(0, 1)[r].tolist(), found[0, r] + found[1, r]
        expected = old
        if every:
            mean = [math.fsum(v[d] for v in every) / len(every) for d in range(4)]
            expected = [0.9 * a + 0.1 * b for a, b in zip(old, mean, strict=True)]
        assert new.flatten(0, 1)[r].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert new[0, 1].equal(P[0, 1])  # bit for bit
    again = part_sums(x, ids.masked_fill(ids >= 0, 6), 6)
    assert not again.any() and update_prototypes(P, again.sum(0), 0.9).equal(P)


# ---- Eq. (9), anchors ----


@pytest.mark.smoke
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_anchors_are_the_loops(share):
    C, K, A = 4, 3, 6
    for seed in range(20):
        ids = torch.randint(0, C * K + 1, (2, 5, 5), generator=generator(seed))
        ids[ids // K == 2] = C * K  # class 2 has no candidate
        u = uniform(C, A + 1, seed=seed)
        pixels, real = draw_anchors(ids, C, K, given(anchor_share=share), u)
        assert pixels.shape == real.shape == (C, A)
        for c in range(C):
            expected = scalar_anchors(ids.flatten().tolist(), c, K, share, u[c].tolist())
            assert pixels[c][real[c]].tolist() == expected, (seed, c)
            assert len(set(expected)) == len(expected)
        assert not real[2].any()


@pytest.mark.parametrize("count, cap", [(1, 5), (9, 5), (30, 5), (30, 64), (101, 64)])
def test_anchors_number_and_chances(count, cap):
    """ceil(0.1 n), at most the cap; every pixel equally often."""
    ids, drawn, turns = torch.zeros(count, dtype=torch.int64), Counter(), 3000
    for seed in range(turns):
        pixels, real = draw_anchors(
            ids, 1, 1, given(anchor_share=0.1), uniform(1, cap + 1, seed=seed)
        )
        m = min(math.ceil(0.1 * count), cap)
        assert int(real.sum()) == m
        drawn.update(pixels[real].tolist())
    each = turns * m / count
    assert set(drawn) == set(range(count))
    assert max(abs(n - each) for n in drawn.values()) < 5 * math.sqrt(each) + 1


# ---- queues, Eq. (10) ----


def test_queues_keep_the_newest_in_order():
    bank, pushed, sizes = (
        torch.zeros(3 * 4 + 1, 2),
        torch.zeros(3, dtype=torch.int64),
        torch.full((3,), 4),
    )
    queues, number = [[], [], []], 0
    for turn in range(7):
        offered = torch.zeros(3, 3, 3)
        for r, i in itertools.product(range(3), range(3)):
            if (r + i + turn) % 3 or r == 1:
                number += 1
                offered[r, i] = torch.tensor([number, -number, 17.0])  # 17 pixels
                queues[r] = [*queues[r], number][-4:]
        push_keys(bank, pushed, sizes, offered)
        for r in range(3):
            assert sorted(bank[4 * r : 4 * r + len(queues[r]), 0].tolist()) == queues[r]
    assert not bank[-1].any()


def rings(C, K, q, D, seed=0, empty=()):
    """A bank of unit keys, rings filled to different lengths."""
    filled = torch.randint(1, q + 1, (C * K,), generator=generator(seed, C))
    filled[list(empty)] = 0
    bank = F.normalize(normal(C * K * q + 1, D, seed=seed), dim=1)
    for r in range(C * K):
        bank[r * q + int(filled[r]) : (r + 1) * q] = 1e3  # never drawn
    bank[-1] = 0
    return bank, filled


@pytest.mark.smoke
@pytest.mark.parametrize(
    "C, K, empty", [(2, 1, ()), (3, 2, (0, 4)), (2, 1, (0,)), (2, 2, (1, 2, 3)), (2, 2, range(4))]
)
def test_entries_are_the_loops_and_never_negative_from_their_own_ring(C, K, empty):
    q, A, N = 5, 6, 40
    for seed in range(10):
        _, filled = rings(C, K, q, 2, seed, empty)
        ring = torch.randint(0, C * K, (C, A), generator=generator(seed))
        u = uniform(C, A, 1 + N, seed=seed)
        u[0, 0] = 1 - 2.0**-53  # the largest
        u[0, 1] = 0
        rows, both = draw_entries(ring, filled, q, u)
        assert rows.shape == (C, A, 1 + N) and rows.min() >= 0 and rows.max() <= C * K * q
        for c, a in itertools.product(range(C), range(A)):
            expected = scalar_entries(int(ring[c, a]), filled.tolist(), q, u[c, a].tolist())
            assert bool(both[c, a]) == (expected is not None)
            if expected:
                positive, negatives = expected
                assert rows[c, a].tolist() == [r * q + i for r, i in (positive, *negatives)]
                assert all(r != int(ring[c, a]) for r, _ in negatives)


def test_negatives_are_drawn_evenly_from_the_union():
    filled, q = torch.tensor([3, 1, 4, 0, 2]), 4
    rows, _ = draw_entries(torch.tensor([[2]]), filled, q, uniform(1, 1, 60_001))
    counts = Counter(rows[0, 0, 1:].tolist())
    assert set(counts) == {0, 1, 2, 4, 16, 17}
    assert max(abs(n - 10_000) for n in counts.values()) < 500


def contrast_case(C=3, K=2, q=4, D=5, empty=(), dtype=torch.float64, A=4, N=7, size=(6, 6)):
    """rep_s, ids at twice its size, state, args."""
    bank, filled = rings(C, K, q, D, 1, empty)
    state = dict(
        prototypes=torch.zeros(C, K, 1), bank=bank.to(dtype), pushed=filled + (filled == q) * 9
    )
    ids = torch.randint(0, C * K + 1, (2, 11, 11), generator=generator(4))
    args = given(parts=K, queue=q, anchors=A, negatives=N, anchor_share=0.3, sigma=0.5)
    return normal(2, D, *size, seed=3).to(dtype).requires_grad_(), ids, state, args, filled


@pytest.mark.smoke
@pytest.mark.parametrize(
    "empty, absent", [((), ()), ((1, 4), ()), ((), (1,)), (range(6), ()), ((), (0, 1, 2))]
)
def test_contrast_is_the_loops(empty, absent):
    rep_s, ids, state, args, filled = contrast_case(empty=empty)
    for c in absent:
        ids[ids // 2 == c] = 6
    torch.manual_seed(5)
    loss, count = part_contrast(rep_s, ids, state, args)
    torch.manual_seed(5)
    u = torch.rand(3, args.anchors + 1, dtype=torch.float64).tolist()
    v = torch.rand(3, args.anchors, 1 + args.negatives, dtype=torch.float64).tolist()
    places = [near(i, 6, 11) for i in range(6)]
    small = [int(ids[b, y, x]) for b, y, x in itertools.product(range(2), places, places)]
    z = [rep_s[b, :, y, x].tolist() for b, y, x in itertools.product(range(2), range(6), range(6))]
    total, number = 0.0, 0
    for c in range(3):
        losses = []
        for a, pixel in enumerate(scalar_anchors(small, c, 2, args.anchor_share, u[c])):
            found = scalar_entries(small[pixel], filled.tolist(), 4, v[c][a])
            if found:
                positive, *negatives = (
                    state["bank"][r * 4 + i].tolist() for r, i in (found[0], *found[1])
                )
                losses.append(scalar_info_nce(z[pixel], positive, negatives, 0.5))
        total += math.fsum(losses) / len(losses) if losses else 0.0
        number += len(losses)
    assert int(count) == number and (number > 0) == (len(empty) < 6 and len(absent) < 3)
    assert loss.item() == pytest.approx(total / 3, **NEAR)
    loss.backward()
    assert rep_s.grad.isfinite().all() and bool(rep_s.grad.any()) == (number > 0)


def test_contrast_gradient_and_lower_precision():
    rep_s, ids, state, args, _ = contrast_case()

    def call(x):
        torch.manual_seed(5)
        return part_contrast(x, ids, state, args)[0]

    assert torch.autograd.gradcheck(call, (rep_s,))
    state["bank"] = state["bank"].float()
    low = call(rep_s.detach().bfloat16())
    assert low.dtype == torch.float32 and low.item() == pytest.approx(
        call(rep_s.detach().float()).item(), rel=0.02
    )


def test_equal_cosines_give_log_of_all_entries():
    z, bank = F.normalize(torch.ones(3, 4), dim=1), F.normalize(torch.ones(9, 4), dim=1)
    rows = torch.zeros(3, 256, dtype=torch.int64)
    assert info_nce(z, bank, rows, 0.5).tolist() == pytest.approx([math.log(256)] * 3, rel=1e-5)


# ---- K-means before training ----


def clusters(K, each=40, D=16, spread=0.05, seed=0):
    """Points around K directions at right angles, of many lengths; which is whose."""
    which = torch.arange(K).repeat_interleave(each)[
        torch.randperm(K * each, generator=generator(seed))
    ]
    x = torch.eye(D, dtype=torch.float64)[which] + spread * normal(K * each, D, seed=seed).abs()
    return x * (0.5 + 3 * uniform(K * each, 1, seed=seed)), which


@pytest.mark.parametrize("K", [1, 3, 5, 10])
def test_kmeans_finds_separated_clusters_and_returns_their_raw_means(K):
    for seed in range(5):
        x, which = clusters(K, seed=seed)
        P = kmeans(x, K, uniform(K, seed=seed))
        means = torch.stack([x[which == k].mean(0) for k in range(K)])
        assert torch.allclose(P[P.argmax(1).argsort()], means)
        assert P.equal(kmeans(x, K, uniform(K, seed=seed)))
        assert kmeans(2 * x, K, uniform(K, seed=seed)).allclose(2 * P)


def test_kmeans_is_lloyds_loop():
    """On overlapping points: spherical, from the same first centres, a pixel at a time."""
    x, K, u = normal(60, 3, seed=2), 4, uniform(4, seed=1)
    unit = [[v / math.sqrt(math.fsum(w * w for w in row)) for v in row] for row in x.tolist()]
    gaps, centers = [1.0] * 60, []
    for k in range(K):
        at, place = float(u[k]) * math.fsum(gaps), 0
        while math.fsum(gaps[: place + 1]) <= at:
            place += 1
        centers.append(unit[place])
        near_one = [1 - cosine(row, centers[-1]) for row in unit]
        gaps = [min(a, b) if min(a, b) > 1e-6 else 0.0 for a, b in zip(gaps, near_one, strict=True)]
    for step in range(30):
        mine = [max(range(K), key=lambda k: cosine(row, centers[k])) for row in unit]
        rows = x.tolist() if step == 29 else unit
        for k in range(K):
            some = [row for row, m in zip(rows, mine, strict=True) if m == k]
            if some:
                mean = [math.fsum(r[d] for r in some) / len(some) for d in range(3)]
                length = math.sqrt(math.fsum(v * v for v in mean)) if step < 29 else 1.0
                centers[k] = [v / length for v in mean]
    assert kmeans(x, K, u).flatten().tolist() == pytest.approx(sum(centers, []), rel=1e-6, abs=1e-9)


def test_kmeans_takes_more_than_a_few_steps_and_an_emptied_cluster_keeps_its_centre(monkeypatch):
    x, u = normal(300, 3, seed=1), uniform(6, seed=1)
    whole, few = kmeans(x, 6, u), kmeans(x, 6, u, steps=8)
    assert not few.equal(whole) and kmeans(x, 6, u, steps=29).equal(whole)  # it has come to rest
    one_hot, seen = F.one_hot, []

    def emptied(index, count):  # the second step takes all away from the last cluster
        seen.append(1)
        return one_hot(index % 5 if len(seen) == 2 else index, count)

    one = F.normalize(kmeans(x, 6, u, steps=1), dim=1)[5]
    monkeypatch.setattr(F, "one_hot", emptied)
    kept = kmeans(x, 6, u, steps=2)[5]
    assert seen == [1, 1] and kept.norm() == pytest.approx(1.0)
    assert kept @ one > 0.9  # the unit mean of the step before; one is of raw features


def test_kmeans_of_few_pixels_leaves_zeros():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])  # two directions
    P = kmeans(x, 5, uniform(5))
    assert sorted(P.tolist()) == [[0, 0], [0, 0], [0, 0], [0, 3], [1.5, 0]]
    assert kmeans(x[:0], 3, uniform(3)).equal(torch.zeros(3, 2))
    assert kmeans(torch.zeros(4, 2), 2, uniform(2)).equal(torch.zeros(2, 2))
    assert kmeans(x[2:], 1, uniform(1)).equal(x[2:])


class Labelled:
    """A data set of `count` images whose colour says the class; class 2 is nowhere."""

    def __init__(self, count=6, num_classes=3):
        self.labeled, self.num_classes = list(range(count)), num_classes

    def read(self, item, with_label):
        rng = np.random.default_rng(item)
        size = (24 + 8 * (item % 2), 32)
        label = rng.integers(0, 2, (size[1] // 8, size[0] // 8)).repeat(8, 0).repeat(8, 1)
        label[:8, :8] = 255
        image = rng.integers(0, 256, (*label.shape, 3)).astype(np.uint8)
        return Image.fromarray(image), Image.fromarray(label.astype(np.uint8))


class Encoder:
    """Colours at stride 8 as features."""

    def __call__(self, image):
        return {"encoder": F.avg_pool2d(image.float(), 8)}


def prototypes(monkeypatch, world, data=None, seed=0, D=3):
    """first_prototypes of each process, one after another; and what K-means saw."""
    data, args, seen = data or Labelled(), given(seed=seed, parts=2), []
    cpu, whole, sent = torch.device("cpu"), esl.kmeans, [[] for _ in range(world)]
    monkeypatch.setattr(esl, "kmeans", lambda x, K, u: seen.append(x) or whole(x, K, u))
    for rank in range(world):  # first what each would send, then with that of all
        monkeypatch.setattr(
            esl.distributed,
            "gathered",
            lambda x, rank=rank: sent[rank].append(x.clone()) or x[None],
        )
        first_prototypes(Encoder(), data, D, args, Group(rank, world, cpu))
    found = []
    for rank in range(world):
        place = itertools.count()
        monkeypatch.setattr(
            esl.distributed,
            "gathered",
            lambda x, place=place: (
                torch.stack([s[i] for i in [next(place)] for s in sent]) if x.ndim < 3 else x[None]
            ),
        )
        seen.clear()
        found.append(first_prototypes(Encoder(), data, D, args, Group(rank, world, cpu)))
    monkeypatch.setattr(esl, "kmeans", whole)
    return found, list(seen)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_first_prototypes_do_not_depend_on_the_processes(world, monkeypatch):
    (one,), pixels = prototypes(monkeypatch, 1)
    assert one.shape == (3, 2, 3) and one[:2].any(2).all() and not one[2].any()
    assert len(pixels[0]) + len(pixels[1]) == sum(
        (24 + 8 * (i % 2)) // 8 * 4 - 1
        for i in range(6)  # all but one cell of 255
    )
    several, _ = prototypes(monkeypatch, world)
    assert all(P.equal(one) for P in several)
    (other,), _ = prototypes(monkeypatch, 1, seed=1)
    assert not other.equal(one)


def test_of_too_many_pixels_those_with_the_lowest_numbers_remain(monkeypatch):
    seen, args, data = [], given(seed=3, parts=2), Labelled(4)
    images = [data.read(i, True) for i in range(4)]
    images = [tuple(x.resize((90, 80), Image.Resampling.NEAREST) for x in pair) for pair in images]
    data.read = lambda item, with_label: images[item]
    monkeypatch.setattr(esl, "kmeans", lambda x, K, u: seen.append(x) or x.new_zeros(K, 3))
    whole = lambda image: {"encoder": image.float()}  # noqa: E731  stride 1
    first_prototypes(whole, data, 3, args, Group(0, 1, torch.device("cpu")))
    for c in range(2):
        pixels = []
        for i, (image, label) in enumerate(images):
            u = np.random.default_rng([3, zlib.crc32(b"pixels"), i]).random(80 * 90)
            rows, classes = np.array(image).reshape(-1, 3), np.array(label).ravel()
            pixels += [(u[j], tuple(rows[j])) for j in np.flatnonzero(classes == c)]
        assert len(pixels) > 5_000
        assert seen[c].tolist() == [list(map(float, x)) for _, x in sorted(pixels)[:5_000]]
    assert seen[2].shape == (0, 3)


@pytest.mark.parametrize("C, D", [(19, 2048), (21, 2048), (81, 2048), (11, 512), (2, 2048)])
def test_first_prototypes_stay_within_their_memory(C, D, monkeypatch):
    """The tensor of pixels has at most 1 GiB; here none is made."""
    made, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *s, **k: made.append(s) or zeros(*s[:1], 1, D))
    monkeypatch.setattr(esl, "kmeans", lambda x, K, u: zeros(K, D))
    args, data = given(seed=0, parts=2), Labelled(0, C)
    first_prototypes(None, data, D, args, Group(0, 1, torch.device("cpu")))
    assert made[0][0] == C and made[0][2] == D
    assert 4 * math.prod(made[0]) <= 2**30 and made[0][1] >= 1_600


# ---- no wait, fixed shapes ----


WAITS = "_local_scalar_dense nonzero masked_select unique boolean".split()


class Calls(TorchDispatchMode):
    """Keeps (operation, shapes of its results)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        out = operation(*inputs, **(named or {}))
        for index in (y for x in inputs if isinstance(x, (list, tuple)) for y in x):
            if torch.is_tensor(index) and "index" in str(operation) and index.dtype == torch.bool:
                self.seen.append(("a boolean index", ()))
        some = out if isinstance(out, (list, tuple)) else [out]
        self.seen.append((str(operation), [tuple(x.shape) for x in some if torch.is_tensor(x)]))
        return out


def whole_step(label, prob, inside, E, C=6, K=2, q=5):
    """A step's part of the losses seam from the teacher's outputs to the gradient; its calls."""
    B, rng = len(inside), generator(3)
    rep_s = torch.randn(2 * B, 4, 8, 8, generator=rng).requires_grad_()
    rep_t, P = torch.randn(2 * B, 4, 8, 8, generator=rng), torch.rand(C, K, 3, generator=rng)
    bank, pushed = torch.zeros(C * K * q + 1, 4), torch.zeros(C * K, dtype=torch.int64)
    logits, sizes = torch.randn(B, C, 16, 16, generator=rng), torch.full((C * K,), q)
    args = given(parts=K, queue=q, anchors=4, negatives=5, anchor_share=0.1, sigma=0.5)
    torch.manual_seed(0)
    with Calls() as calls:
        both = torch.cat([label, prob.argmax(1).masked_fill(~inside, 255)])
        ids = part_ids(E, P, both)
        mu = part_sums(rep_t, ids, C * K).transpose(0, 1)
        push_keys(
            bank, pushed, sizes, torch.cat([F.normalize(mu[..., :-1], dim=2), mu[..., -1:]], 2)
        )
        P = update_prototypes(P, part_sums(E, ids, C * K).sum(0), 0.99)
        sure = torch.cat([torch.ones_like(inside), inside & (prob.amax(1) > 0.5)])
        state = dict(prototypes=P, bank=bank, pushed=pushed)
        loss, count = part_contrast(rep_s, ids.masked_fill(~sure, C * K), state, args)
        for kind in LABELS:
            loss = loss + soft_cross_entropy(logits, soft_label(prob, given(kind)), inside)
        loss.backward()
    return calls.seen, int(count)


@pytest.mark.smoke
def test_a_step_never_waits_and_its_shapes_are_fixed():
    rng, found = generator(1), []
    for kind in ("drawn", "nothing", "one class"):
        prob = torch.rand(2, 6, 16, 16, generator=rng).mul(8).softmax(1)
        label = torch.randint(0, 6, (2, 16, 16), generator=rng)
        inside, E = (
            torch.rand(2, 16, 16, generator=rng) < 0.9,
            torch.rand(4, 3, 4, 4, generator=rng),
        )
        if kind == "nothing":
            label, inside = torch.full_like(label, 255), torch.zeros_like(inside)
        if kind == "one class":
            label = torch.zeros_like(label)
        found.append(whole_step(label, prob, inside, E))
    assert found[0][0] == found[1][0] == found[2][0]  # operation by operation, shape by shape
    assert found[0][1] > 0 and found[1][1] == 0
    for name, _ in found[0][0]:
        assert not any(word in name for word in WAITS), name
    with Calls() as calls:  # the detector sees
        found[0][1] and torch.ones(2)[torch.ones(2).bool()].sum().item()
    names = " ".join(name for name, _ in calls.seen)
    assert "boolean" in names and "_local_scalar_dense" in names


# ---- the head ----


def test_the_head_returns_its_features_while_its_own_flag_is_set():
    sides = ((64, 16), (128, 8), (256, 4), (512, 4))
    stages = [torch.randn(2, c, s, s, requires_grad=True) for c, s in sides]
    head = esl.ESLHead([64, 128, 256, 512], 5, given(aspp_rates=(1, 2, 3), aux_weight=0.4))
    out = head(stages, (64, 64))
    assert set(out) == {"logits", "rep", "encoder", "aux"} and head.width == 512
    assert out["logits"].shape == out["aux"].shape == (2, 5, 64, 64)
    assert out["rep"].shape == (2, 512, 16, 16) and out["encoder"] is stages[3]
    out["rep"].sum().backward()
    assert stages[0].grad.any() and stages[3].grad.any()  # low-level and ASPP features
    assert set(head.eval()(stages, (64, 64))) == {"logits", "aux"}
    head.training = True  # as main sets the teacher's
    assert "rep" in head(stages, (64, 64)) and not head.represent.training


# ---- presets and flags ----


def resolved(*words):
    return resolve(parse(Args, list(words)), preset)


def test_presets():
    voc = resolved("--dataset", "voc", "--split", "732")
    assert (voc.batch_size, voc.batch_size_unlabeled, voc.lr, voc.lr_head) == (8, 8, 0.001, 10.0)
    assert (voc.weight_decay, voc.crop_size, voc.ohem_kept, voc.backbone) == (
        1e-4,
        513,
        0,
        "resnet101",
    )
    city = resolved("--dataset", "cityscapes", "--split", "1/4")
    assert (city.batch_size, city.batch_size_unlabeled, city.lr, city.lr_head) == (8, 8, 0.01, 1.0)
    assert city.ohem_kept > 0 and city.aux_weight == 0.4 and city.weight_decay == 5e-4
    for args in (voc, city):
        paper = dict(eta=0.95, parts=5, zeta=0.95, anchor_share=0.1, negatives=255, sigma=0.5)
        paper |= dict(theta=0.99, unsup_weight=0.2, contrast_weight=0.1, label="dynamic")
        assert {name: getattr(args, name) for name in paper} == paper
        assert (args.anchors, args.queue, args.cutmix_prob) == (256, 256, 1.0)
    # 80 passes over 10,582 - 732, 200 over 2,975 - 744 images, of 8 images a step
    assert voc.total_iters == 80 * (math.ceil(9850 / 4) // 2)
    assert city.total_iters == 200 * math.ceil(2231 / 8)
    small = resolved("--dataset", "camvid")
    assert (small.batch_size, small.batch_size_unlabeled, small.queue) == (4, 4, 64)
    assert resolved("--batch-size", "4").batch_size_unlabeled == 4


@pytest.mark.parametrize(
    "words, line",
    [
        ("--recipe official", "no code of ESL was ever released; leave --recipe out"),
        ("--eta 1", "--eta 1.0: a number between 0 and 1; --label soft"),
        ("--eta 0", "--eta 0.0: a number between 0 and 1"),
        ("--parts 0", "--parts 0: a number from 1"),
        ("--queue 0", "--queue 0: a number from 1"),
        ("--top-k 0", "--top-k 0: a number from 1"),
        ("--sigma 0", "--sigma 0.0: a number from"),
        ("--theta 1.5", "--theta 1.5: a number from 0 to 1"),
        ("--zeta 2", "--zeta 2.0: a number from 0 to 1"),
        ("--anchor-share 1.1", "--anchor-share 1.1: a number from 0 to 1"),
        ("--label fuzzy", "dynamic"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(words, line):
    with pytest.raises(Refusal) as refusal:
        resolved(*words.split())
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_as_rows_goes_with_flattened_ids():
    x = normal(2, 3, 4, 5)
    assert as_rows(x)[1 * 20 + 2 * 5 + 3].equal(x[1, :, 2, 3])
