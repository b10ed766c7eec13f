"""ael_fpl.py: every function of AEL against loops over scalars; presets, recipes and flags."""

import functools
import inspect
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ael_fpl
import cps_fpl
from ael_fpl import (
    Args,
    class_confidence,
    component_box,
    consistency_loss,
    copy_paste,
    draw_classes,
    draw_partners,
    equalization_rate,
    half_area_box,
    partner_mask,
    pixel_weight,
    presence,
    preset,
    sampling_probability,
    update_confidence,
)
from common import Refusal
from common.run import parse, resolve

CLASSES = [2, 3, 11, 19, 81]
SHAPES = [(2, 6, 5), (4, 5, 9), (4, 1, 3)]  # images, height, width
TEACHERS = ["random", "diffuse", "one-hot", "tied"]
LOSSES = ["ce", "fpl"]
HALVES = [torch.bfloat16, torch.float16]
BELOW_1 = 1 - 2.0**-53  # the largest float64 of a generator's [0, 1)

# What a comparison may miss. float32: sums of some hundred numbers below 10, of 6e-8 each relative.
# float64: torch's softplus is the identity above 20, which leaves out exp(-20) = 2e-9.
NEAR = {torch.float32: dict(rel=1e-5, abs=5e-6), torch.float64: dict(rel=1e-9, abs=3e-9)}
EXACT = dict(rel=1e-12, abs=1e-14)  # float64 sums and powers of numbers below 1


def teacher(kind, classes, shape=(4, 6, 5), seed=0, dtype=torch.float64):
    """Returns logits (B, C, H, W); "tied" ones take three values."""
    rng = torch.Generator().manual_seed(1000 * seed + 10 * classes + len(kind))
    B, *size = shape
    z = torch.randn(B, classes, *size, generator=rng, dtype=torch.float64)
    spread = {"random": 2.0, "diffuse": 0.5, "one-hot": 1000.0, "flat": 0.0, "tied": 1.0}[kind]
    return ((z.round().clamp(-1, 1) if kind == "tied" else z) * spread).to(dtype)


def labels(classes, shape=(4, 6, 5), seed=0):
    """Returns (label, inside): every fifth pixel void, the last image padded right and below."""
    rng = torch.Generator().manual_seed(100 * seed + classes)
    label = torch.randint(0, classes, shape, generator=rng)
    label[torch.rand(shape, generator=rng) < 0.2] = 255
    inside = torch.ones(shape, dtype=torch.bool)
    inside[-1, shape[1] - shape[1] // 3 :], inside[-1, :, shape[2] - shape[2] // 4 :] = False, False
    label[~inside] = 255
    return label, inside


def banks(classes, seed=0):
    """Returns (C,) float32 in [0, 1], one class of each end among them if there are enough."""
    bank = torch.rand(classes, generator=torch.Generator().manual_seed(seed))
    if classes > 2:
        bank[1], bank[classes - 1] = 0.0, 1.0
    return bank


def rates(classes, seed=0, dtype=torch.float64):
    """Returns (C,) multiples of 1/1024: 1 - rate is exact. A rate of 1 and, of three, a 0."""
    rng = torch.Generator().manual_seed(seed)
    rate = torch.randint(1, 1024, (classes,), generator=rng).to(dtype) / 1024
    rate[seed % classes] = 1.0
    if classes > 2:
        rate[(seed + 1) % classes] = 0.0
    return rate


class Scripted:
    """Stands in for a numpy generator: its numbers are a list of shares in [0, 1)."""

    def __init__(self, shares):
        self.shares = list(shares)

    def random(self, count=None):
        if count is None:
            return self.shares.pop(0)
        return np.array([self.shares.pop(0) for _ in range(count)])

    def integers(self, count):
        return int(self.shares.pop(0) * count)


# ---- oracles: loops over scalars, in float64 ----


def scalar_softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / math.fsum(e) for v in e]


def scalar_K(p, args):
    """FPL Alg. 1."""
    V, n = 0.0, len(p)
    for count, q in enumerate(sorted(p, reverse=True), 1):
        V += q
        if V > args.T if args.strict else V >= args.T:
            n = count
            break
    return min(max(n - 1, 1), args.k_max or len(p))


def scalar_fpl(z, z_t, args):
    """FPL Eq. (7) times Eq. (11), and its gradient: Eq. (8) times Eq. (11)."""
    q = scalar_softmax(z_t)
    K, C = scalar_K(q, args), len(z)
    Y = set(sorted(range(C), key=lambda c: (-z_t[c], c))[:K])
    positives = math.fsum(math.exp(-z[c]) for c in Y)
    negatives = math.fsum(math.exp(z[c]) for c in range(C) if c not in Y)
    p = sorted(q, reverse=True) + [0.0]
    last = K + (args.mean_over == "positives_and_next")
    mean = math.fsum(p[:last]) / last
    w = {
        "concave": math.log1p(50 * max(mean - p[K], 0)) / math.log1p(50 * mean),
        "linear": (mean - p[K]) / mean,
        "none": 1.0,
    }[args.weight]
    bottom = 1 + positives * negatives
    gradient = [
        -w * negatives * math.exp(-z[c]) / bottom
        if c in Y
        else w * positives * math.exp(z[c]) / bottom
        for c in range(C)
    ]
    return w * math.log1p(positives * negatives), gradient


def scalar_consistency(logits_s, logits_t, inside, rate, u, pooled, args):
    """Returns (value, gradient (B, C, H, W), parts): Eq. (12) pixel by pixel."""
    (B, C, H, W), rate = logits_s.shape, rate.tolist()
    z_s, z_t = (x.detach().double().movedim(1, -1).tolist() for x in (logits_s, logits_t))
    inside, u = inside.tolist(), u.tolist()
    gradient = torch.zeros(B, C, H, W, dtype=torch.float64)
    value, unsups, balances = 0.0, [], []
    kept, confs, several, groups = [], [], [], B // pooled
    for group in range(groups):
        top = bottom = ce_sum = plain = 0.0
        slopes = []
        for b in range(group * pooled, (group + 1) * pooled):
            for y, x in itertools.product(range(H), range(W)):
                if not inside[b][y][x]:
                    continue
                z, t = z_s[b][y][x], z_t[b][y][x]
                q, p = scalar_softmax(t), scalar_softmax(z)
                best, mine = t.index(max(t)), z.index(max(z))  # of equal ones the first
                ce = max(z) + math.log(math.fsum(math.exp(v - max(z)) for v in z)) - z[best]
                loss, slope = ce, [v - (c == best) for c, v in enumerate(p)]
                if args.unsup_loss == "fpl":
                    loss, slope = scalar_fpl(z, t, args)
                w = max(q) ** args.gamma if u[b][y][x] >= 1 - rate[mine] else 0.0
                bottom += w
                if max(q) >= args.threshold:
                    top += w * loss
                    slopes.append((b, y, x, [w * g for g in slope]))
                ce_sum += ce
                plain += loss
                kept.append(w > 0)
                confs.append(max(q))
                if y % 4 == x % 4 == 0:
                    several.append(scalar_K(q, args) > 1)
        balance = ce_sum / plain if plain > 0 else 1.0
        factor = balance if args.balance else 1.0
        unsups.append(top / bottom if bottom else 0.0)
        balances.append(balance)
        value += unsups[-1] * factor / groups
        for b, y, x, slope in slopes if bottom else ():
            scale = factor / bottom / groups
            gradient[b, :, y, x] = torch.tensor(slope, dtype=torch.float64) * scale
    rows = dict(unsup=unsups, balance=balances, kept=kept, conf_t=confs, K_gt_1=several)
    return value, gradient, {k: math.fsum(v) / max(len(v), 1) for k, v in rows.items()}


def loss_args(**changes):
    """Returns the flags that consistency_loss reads, as printed."""
    flags = dict(T=0.9037, k_max=0, strict=True, weight="concave", mean_over="positives")
    flags |= dict(unsup_loss="fpl", balance=False, threshold=0.0, gamma=2.0)
    return SimpleNamespace(**flags | changes)


RELEASE = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True)


# ---- Eq. (4), (7): the confidence bank ----


def scalar_confidence(prob, label, pooled, skip_absent):
    """Returns [sums of means], [groups that count]."""
    (B, C, H, W), prob, label = prob.shape, prob.double().tolist(), label.tolist()
    sums, counts = [0.0] * C, [0] * C
    for group, c in itertools.product(range(B // pooled), range(C)):
        of_c = [
            prob[b][c][y][x]
            for b in range(group * pooled, (group + 1) * pooled)
            for y, x in itertools.product(range(H), range(W))
            if label[b][y][x] == c
        ]
        if of_c:
            sums[c] += math.fsum(of_c) / len(of_c)
        counts[c] += bool(of_c) or not skip_absent
    return sums, counts


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_confidence_of_a_class_is_its_mean_over_each_group(classes, dtype):
    for (seed, shape), skip in itertools.product(enumerate(SHAPES), (False, True)):
        prob = teacher("random", classes, shape, seed, dtype).softmax(1)
        label, _ = labels(classes, shape, seed)
        for pooled in {1, 2, shape[0]}:
            got = class_confidence(prob, label, pooled, skip)
            assert got.shape == (2, classes) and got.dtype == dtype
            sums, counts = scalar_confidence(prob, label, pooled, skip)
            assert got[0].tolist() == pytest.approx(sums, **NEAR[dtype])
            assert got[1].tolist() == counts


def test_absent_classes_count_with_0_unless_they_are_skipped():
    prob = torch.full((4, 3, 2, 2), 0.5)
    label = torch.full((4, 2, 2), 255)
    label[0], label[3, 0, 0] = 1, 2
    assert class_confidence(prob, label, 2).tolist() == [[0, 0.5, 0.5], [2, 2, 2]]
    assert class_confidence(prob, label, 2, False).tolist() == [[0, 0.5, 0.5], [2, 2, 2]]
    assert class_confidence(prob, label, 2, True).tolist() == [[0, 0.5, 0.5], [0, 1, 1]]
    assert class_confidence(prob, label, 1, True).tolist() == [[0, 0.5, 0.5], [0, 1, 1]]
    assert class_confidence(prob, label, 4).tolist() == [[0, 0.5, 0.5], [1, 1, 1]]


def test_a_group_pools_pixels_and_not_the_means_of_images():
    prob = torch.tensor([0.25, 0.75, 0.75, 0.75]).view(1, 1, 1, 4).repeat(2, 2, 1, 1)
    label = torch.tensor([[[0, 255, 255, 255]], [[255, 0, 0, 0]]])
    assert class_confidence(prob, label, 2)[0, 0] == 0.625  # 2.5 / 4
    assert class_confidence(prob, label, 1)[0, 0] == 1.0  # 0.25 + 0.75


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("classes", CLASSES)
def test_the_parts_of_a_batch_add_up_over_processes(classes, skip):
    prob = teacher("random", classes, (8, 5, 4)).softmax(1)
    label, _ = labels(classes, (8, 5, 4))
    for pooled, world in ((1, 8), (1, 2), (2, 2), (2, 4), (4, 2)):
        whole = class_confidence(prob, label, pooled, skip)
        parts = zip(prob.chunk(world), label.chunk(world), strict=True)
        assert torch.allclose(
            whole, sum(class_confidence(p, y, pooled, skip) for p, y in parts), rtol=1e-14
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_confidences_in_half_precision_add_in_float32(dtype):
    prob = teacher("diffuse", 3, (2, 40, 40), dtype=dtype).softmax(1)
    label, _ = labels(3, (2, 40, 40))
    got = class_confidence(prob, label, 2)
    assert got.dtype == torch.float32
    assert torch.equal(got, class_confidence(prob.float(), label, 2))


@pytest.mark.parametrize("classes", CLASSES)
def test_the_bank_moves_towards_the_mean_of_the_groups(classes):
    for seed, momentum in enumerate((0.0, 0.5, 0.97, 0.999, 1.0)):
        rng = torch.Generator().manual_seed(seed)
        bank = banks(classes, seed).double()
        counts = torch.randint(0, 9, (classes,), generator=rng).double()
        means = torch.rand(classes, generator=rng, dtype=torch.float64)
        means[seed % 2] = 0.0  # counted, and unknown or absent
        got = update_confidence(bank, torch.stack([means * counts, counts]), momentum)
        rows = zip(bank.tolist(), means.tolist(), counts.tolist(), got.tolist(), strict=True)
        for old, mean, count, new in rows:
            expected = momentum * old + (1 - momentum) * mean if count else old
            assert new == pytest.approx(expected, **EXACT)
            assert count or new == old
        assert got.min() >= 0 and got.max() <= 1 and got.shape == (classes,)


def test_the_bank_stays_within_0_and_1_and_keeps_its_type():
    bank, ends = torch.tensor([0.0, 1.0, 0.3]), torch.tensor([[0.0, 8.0, 8.0], [8.0, 8.0, 8.0]])
    for _ in range(3000):
        bank = update_confidence(bank, ends, 0.999)
    assert bank.dtype == torch.float32
    # 3000 roundings of 1 - 6e-8 at most to either side
    assert bank[0] == 0 and abs(bank[1] - 1) < 2e-4 and 0.9 < bank[2] < 1
    assert torch.equal(update_confidence(bank, torch.zeros(2, 3), 0.0), bank)


# ---- Eq. (9) ----


@pytest.mark.smoke
@pytest.mark.parametrize("classes", CLASSES)
def test_sampling_probabilities_are_a_softmax_over_the_allowed_classes(classes):
    for seed, power in itertools.product(range(3), (0.0, 0.5, 1.0, 2.0)):
        bank = banks(classes, seed)
        some = torch.arange(classes) % 3 != seed
        for allowed in (None, torch.ones(classes, dtype=torch.bool), some):
            got = sampling_probability(bank, allowed, power)
            assert got.dtype == torch.float64 and got.shape == (classes,)
            here = [allowed is None or bool(allowed[c]) for c in range(classes)]
            e = [
                math.exp((1 - v) ** power) if h else 0.0
                for v, h in zip(bank.tolist(), here, strict=True)
            ]
            assert got.tolist() == pytest.approx([v / math.fsum(e) for v in e], **EXACT)
            assert all((p > 0) == h for p, h in zip(got.tolist(), here, strict=True))
    assert torch.equal(sampling_probability(bank), sampling_probability(bank, None, 1.0))
    assert torch.equal(sampling_probability(bank.numpy()), sampling_probability(bank))


def test_a_class_that_is_known_well_is_drawn_less_and_by_a_factor_of_e_at_most():
    prob = sampling_probability(torch.tensor([0.0, 0.2, 0.9, 1.0]))
    assert (prob.diff() < 0).all() and (prob[0] / prob[-1]).item() == pytest.approx(math.e)
    above = torch.tensor([0.5, 1 + 1e-6])  # as a rounding may leave it
    assert sampling_probability(above, power=0.5).isfinite().all()


def scalar_draw(p, u):
    running, total = 0.0, sum(p)
    for c, v in enumerate(p):
        running += v
        if running > u * total:
            return c


@pytest.mark.parametrize("classes", CLASSES)
def test_classes_are_drawn_by_the_inverse_of_the_running_sum(classes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        p, u = rng.random(classes), rng.random(200)
        p[rng.random(classes) < 0.3] = 0.0
        p[seed % classes] = 1.0
        got = draw_classes(torch.from_numpy(p), torch.from_numpy(u))
        assert got.dtype == torch.int64 and got.shape == (200,)
        assert got.tolist() == [scalar_draw(p.tolist(), v) for v in u.tolist()]
        # just below and above every step: float32 would not tell them apart
        for probs in (torch.from_numpy(p), torch.from_numpy(p).float()):
            steps = list(itertools.accumulate(probs.tolist()))
            u = [v / steps[-1] * side for v in steps[:-1] for side in (1 - 1e-12, 1 + 1e-12)]
            u = [v for v in u if v < 1] + [0.5]
            got = draw_classes(probs, torch.tensor(u, dtype=torch.float64))
            assert got.tolist() == [scalar_draw(probs.tolist(), v) for v in u]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "scale, dtype", [(1, torch.float64), (1, torch.float32), (8, torch.float64)]
)
def test_draws_at_the_steps_of_the_running_sum(scale, dtype):
    prob = scale * torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.0], dtype=dtype)  # dyadic
    for u, c in (
        *((0.0, 1), (0.2, 1), (0.25 - 2.0**-54, 1), (0.25, 3), (0.3, 3), (0.5 - 2.0**-54, 3)),
        *((0.5, 4), (0.75, 4), (BELOW_1, 4)),
    ):
        assert draw_classes(prob, torch.tensor([u], dtype=torch.float64)).tolist() == [c]
    assert draw_classes(prob, torch.zeros(0, dtype=torch.float64)).tolist() == []
    rows = torch.tensor([[0.0, 0.9, 0.1], [0.9, 0.9, 0.9], [0.9, 0.3, 0.2]], dtype=torch.float64)
    assert draw_classes(prob, rows[::2, 1:]).tolist() == [[4, 1], [3, 1]]
    assert draw_classes(prob, rows[:, 3:]).shape == (3, 0)


def test_classes_without_probability_are_never_drawn():
    ends = torch.tensor([0.0, 2.0**-60, 0.5, 1 - 2.0**-10, BELOW_1], dtype=torch.float64)
    for seed, classes in itertools.product(range(20), (3, 11, 81)):
        allowed = torch.zeros(classes, dtype=torch.bool)
        rng = np.random.default_rng(seed)
        allowed[rng.integers(1, classes - 1, 3)] = True  # neither the first nor the last
        prob = sampling_probability(banks(classes, seed), allowed)
        for u in (ends, torch.from_numpy(rng.random(300))):
            assert allowed[draw_classes(prob, u)].all()
        first, last = allowed.nonzero()[[0, -1], 0].tolist()
        assert draw_classes(prob, ends)[[0, -1]].tolist() == [first, last]


def test_classes_are_drawn_as_often_as_they_are_likely():
    prob = sampling_probability(banks(11, 4), torch.arange(11) != 5)
    drawn = Counter(
        draw_classes(prob, torch.from_numpy(np.random.default_rng(0).random(40_000))).tolist()
    )
    for c, p in enumerate(prob.tolist()):  # five deviations of a binomial count
        assert abs(drawn[c] - 40_000 * p) <= 5 * math.sqrt(40_000 * p * (1 - p)), c


# ---- adaptive CutMix: partners ----


def shown(classes, images, seed):
    """Returns the image bank (C, N): some classes in no image, one in all, one in a single one."""
    present = torch.rand(classes, images, generator=torch.Generator().manual_seed(seed)) < 0.4
    present[0] = False
    present[1] = torch.arange(images) == images - 1
    if classes > 2:
        present[2] = True
    return present


@pytest.mark.smoke
@pytest.mark.parametrize("classes", CLASSES)
def test_partners_are_a_class_by_eq_9_and_an_image_that_shows_it(classes):
    for seed, images in enumerate((1, 2, 7, 40)):
        bank, present = banks(classes, seed), shown(classes, images, seed)
        shares = np.random.default_rng(seed).random(2 * 30).tolist()
        got = draw_partners(bank, present, 30, script := Scripted(shares))
        assert got.shape == (30, 2) and got.dtype == torch.int64 and not script.shares
        e = [math.exp(1 - v) for v in bank.tolist()]
        for (c, image), u, v in zip(got.tolist(), shares[:30], shares[30:], strict=True):
            assert c == scalar_draw(e, u)
            where = [n for n in range(images) if present[c, n]] or list(range(images))
            assert image == where[int(v * len(where))]


def test_partners_come_from_images_that_show_the_class_each_as_often():
    bank, present = banks(5, 3), shown(5, 12, 3)
    pairs = draw_partners(bank, present, 20_000, np.random.default_rng(1)).tolist()
    classes, both = Counter(c for c, _ in pairs), Counter(map(tuple, pairs))
    e = [math.exp(1 - v) for v in bank.tolist()]
    for c in range(5):  # five deviations of binomial counts
        p = e[c] / sum(e)
        assert abs(classes[c] - 20_000 * p) <= 5 * math.sqrt(20_000 * p * (1 - p))
        where = present[c].nonzero()[:, 0].tolist() or range(12)
        assert {n for (of, n) in both if of == c} == set(where)
        for n in where:
            q = 1 / len(where)
            assert abs(both[c, n] - classes[c] * q) <= 5 * math.sqrt(classes[c] * q * (1 - q))


def test_partners_take_a_bank_of_numpy_and_none_exist_without_images():
    rngs = [np.random.default_rng(2) for _ in range(2)]
    bank, present = banks(11), shown(11, 9, 0)
    pairs = [
        draw_partners(b, present, 8, rng) for b, rng in zip((bank, bank.numpy()), rngs, strict=True)
    ]
    assert torch.equal(*pairs)
    with pytest.raises(Refusal, match="no unlabelled images"):
        draw_partners(bank, torch.zeros(11, 0, dtype=torch.bool), 4, np.random.default_rng(0))


# ---- adaptive CutMix: boxes ----


def scalar_half_box(shares, size):
    """Audit, section 1.2: height size * (1/2)^u, and what width is left of half the area."""
    u, top, left = shares
    h, w = round(size * 0.5**u), round(size * 0.5 / 0.5**u)
    return int(top * (size - h + 1)), int(left * (size - w + 1)), h, w


@pytest.mark.smoke
@pytest.mark.parametrize("size", [8, 32, 64, 129, 513, 769])
def test_a_random_box_has_half_the_area_and_lies_in_the_crop(size):
    shares = np.random.default_rng(size).random((300, 3)).tolist()
    shares += [list(s) for s in itertools.product((0.0, 0.5, BELOW_1), repeat=3)]
    for one in shares:
        top, left, h, w = half_area_box(Scripted(one), size)
        assert (top, left, h, w) == scalar_half_box(one, size)
        assert 0 <= top <= top + h <= size and 0 <= left <= left + w <= size
        assert size // 2 <= h <= size and size // 2 <= w <= size
        assert abs(h * w - size**2 / 2) <= (h + w) / 2 + 0.25  # each side off by 1/2 at most


def test_a_random_boxs_height_is_log_uniform():
    rng = np.random.default_rng(0)
    u = sorted(-math.log2(half_area_box(rng, 2**16)[2] / 2**16) for _ in range(4000))
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed by one sample of a thousand
    assert max(abs(v - (i + 0.5) / 4000) for i, v in enumerate(u)) < 1.95 / math.sqrt(4000)


def test_a_random_box_takes_every_position():
    rng, seen = np.random.default_rng(0), {}
    for _ in range(4000):
        top, left, h, w = half_area_box(rng, 6)
        assert all(type(v) is int for v in (top, left, h, w))
        seen.setdefault((h, w), []).append((top, left))
    assert {h for h, _ in seen} == {3, 4, 5, 6} and {w for _, w in seen} == {3, 4, 5, 6}
    for (h, w), corners in seen.items():
        every = set(itertools.product(range(7 - h), range(7 - w)))
        assert set(corners) == every
        count, p = Counter(corners), 1 / len(every)
        for corner in every:  # five deviations of a binomial count
            room = 5 * math.sqrt(len(corners) * p * (1 - p))
            assert abs(count[corner] - len(corners) * p) <= room


def scalar_components(seen, c):
    """Returns the components of class c as lists of cells, by filling from every cell."""
    rows, columns = len(seen), len(seen[0])
    left = {(y, x) for y in range(rows) for x in range(columns) if seen[y][x] == c}
    found = []
    while left:
        stack, cells = [left.pop()], []
        while stack:
            y, x = stack.pop()
            cells.append((y, x))
            for near in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found.append(cells)
    return found


def scalar_boxes(seen, c, area, size):
    """Returns the boxes, in pixels, of class c's components of more than area * all cells."""
    boxes = []
    for cells in scalar_components(seen, c):
        if len(cells) > area * len(seen) * len(seen[0]):
            ys, xs = zip(*cells, strict=True)
            top, left = 4 * min(ys), 4 * min(xs)
            down, right = min(4 * max(ys) + 4, size), min(4 * max(xs) + 4, size)
            boxes.append((top, left, down - top, right - left))
    return boxes


def seen_classes(classes, side, seed, grain=1, padded=False):
    """Returns (side, side) uint8 classes in squares of `grain` cells; padded below and right."""
    rng = np.random.default_rng([seed, classes, side, grain])
    n = -(-side // grain)
    seen = rng.integers(0, classes, (n, n)).astype(np.uint8)
    seen = np.ascontiguousarray(seen.repeat(grain, 0).repeat(grain, 1)[:side, :side])
    if padded:
        seen[side - side // 4 :], seen[:, side - side // 3 :] = 255, 255
    return seen


@pytest.mark.smoke
@pytest.mark.parametrize("classes", CLASSES)
def test_boxes_are_tight_around_one_large_component(classes):
    found = nothing = 0
    for seed, (side, grain) in enumerate(itertools.product((1, 4, 9, 16), (1, 3))):
        seen = seen_classes(classes, side, seed, grain, padded=seed % 2 == 1)
        for less, c in itertools.product(range(4), range(min(classes, 11))):
            size = 4 * side - less
            for cells in (0, 1.5, 4.5):
                boxes = scalar_boxes(seen.tolist(), c, cells / seen.size, size)
                box = component_box(seen, c, cells / seen.size, size, np.random.default_rng(seed))
                assert box in boxes if boxes else box is None
                found, nothing = found + bool(boxes), nothing + (not boxes)
                if box:
                    top, left, h, w = box
                    assert 0 <= top < top + h <= size and 0 <= left < left + w <= size
    assert found > 20 and nothing > 20


def test_a_component_must_be_larger_than_the_area():
    seen = np.zeros((8, 8), np.uint8)
    seen[1:3, 2:6], seen[5, 5:7] = 7, 7  # 8 cells and 2; areas of 64 cells are dyadic
    rng = np.random.default_rng(0)
    assert component_box(seen, 7, 8 / 64, 32, rng) is None
    for area in (7.99 / 64, 7 / 64, 2 / 64):
        assert all(component_box(seen, 7, area, 32, rng) == (4, 8, 8, 16) for _ in range(10))
    both = {component_box(seen, 7, 1 / 64, 32, rng) for _ in range(50)}
    assert both == {(4, 8, 8, 16), (20, 20, 4, 8)}
    assert component_box(seen, 0, 53 / 64, 32, rng) == (0, 0, 32, 32)
    assert component_box(seen, 0, 54 / 64, 32, rng) is None
    assert component_box(seen, 3, 0.0, 32, rng) is None


def test_cells_that_touch_at_a_corner_are_one_component():
    rng = np.random.default_rng(0)
    for seen in (np.eye(4), np.eye(4)[::-1]):
        seen = np.ascontiguousarray(seen).astype(np.uint8)
        assert component_box(seen, 1, 3 / 16, 16, rng) == (0, 0, 16, 16)
    apart = np.zeros((5, 5), np.uint8)
    apart[0, 0] = apart[0, 2] = apart[2, 0] = apart[4, 4] = 1
    assert component_box(apart, 1, 1 / 25, 20, rng) is None


def test_large_components_are_equally_likely_whatever_their_size():
    seen = np.zeros((20, 20), np.uint8)
    seen[:9, :9], seen[12:15, :3], seen[12, 10:18], seen[19, 19] = 1, 1, 1, 1  # 81, 9, 8, 1
    rng = np.random.default_rng(0)
    got = Counter(component_box(seen, 1, 7.5 / 400, 80, rng) for _ in range(3000))
    assert set(got) == {(0, 0, 36, 36), (48, 0, 12, 12), (48, 40, 4, 32)}
    # five deviations of a binomial count
    assert all(abs(count - 1000) <= 5 * math.sqrt(3000 * 2 / 9) for count in got.values())


@pytest.mark.parametrize("size", [16, 15, 14, 13, 513, 769])
def test_a_class_may_cover_the_whole_crop_and_void_is_no_class(size):
    side, rng = len(range(0, size, 4)), np.random.default_rng(0)
    for c in (0, 1, 80):
        seen = np.full((side, side), c, np.uint8)
        assert component_box(seen, c, 0.5, size, rng) == (0, 0, size, size)
        assert component_box(seen, c + 1, 0.0, size, rng) is None
    void = np.full((side, side), 255, np.uint8)
    assert all(component_box(void, c, 0.0, size, rng) is None for c in range(0, 200, 7))
    void[-1, -1] = 3
    last = 4 * (side - 1)
    assert component_box(void, 3, 0.0, size, rng) == (last, last, size - last, size - last)


@pytest.mark.parametrize("classes", CLASSES)
def test_a_mask_is_the_box_of_a_component_or_half_the_crop(classes):
    total = 0
    for seed, size in enumerate((16, 33, 46)):
        side = len(range(0, size, 4))
        seen = np.stack([seen_classes(classes, side, 10 * seed + i, 2, i % 2) for i in range(6)])
        chosen = np.random.default_rng(seed).integers(0, classes, 6).tolist()
        chosen[0], chosen[4] = int(seen[0, 0, 0]), int(seen[4, -1, 0])
        area = (0.9, 3.9, 4.5)[seed] / side**2
        rngs = [np.random.default_rng([seed, i]) for i in range(6)]
        mask, regions = partner_mask(seen, chosen, rngs, area, size)
        assert mask.dtype == torch.bool and mask.shape == (6, size, size)
        expected = 0
        for i, c in enumerate(chosen):
            boxes = scalar_boxes(seen[i].tolist(), c, area, size)
            expected += bool(boxes)
            rng = np.random.default_rng(
                [seed, i]
            )  # as its own was: the first numbers are the box's
            if not boxes:
                u = rng.random()
                h, w = round(size * 0.5**u), round(size * 0.5 / 0.5**u)
                boxes = [(rng.integers(size - h + 1), rng.integers(size - w + 1), h, w)]
            covers = []
            for top, left, h, w in boxes:
                rows, columns = range(top, top + h), range(left, left + w)
                covers.append(
                    [[y in rows and x in columns for x in range(size)] for y in range(size)]
                )
            assert mask[i].tolist() in covers
        assert regions == expected
        total += regions
    assert total > 0


@pytest.mark.smoke
@pytest.mark.parametrize("classes", CLASSES)
def test_a_class_is_present_if_it_covers_the_area(classes):
    for seed, area in itertools.product(range(3), (0.0, 1 / 64, 2 / 64, 4 / 64, 0.5, 1.0)):
        seen = np.stack([seen_classes(classes, 8, seed + i, 1 + i, i % 2) for i in range(4)])
        seen = np.concatenate([seen, np.full((1, 8, 8), 255, np.uint8)])
        got = presence(torch.from_numpy(seen), classes, area)
        assert got.dtype == torch.bool and got.shape == (5, classes)
        for b, c in itertools.product(range(5), range(classes)):
            cells = sum(v == c for row in seen[b].tolist() for v in row)
            assert got[b, c].item() == (cells >= area * 64)  # 64 cells: exact


def test_presence_counts_a_share_of_the_whole_crop_padding_too():
    seen = torch.full((2, 10, 20), 255, dtype=torch.uint8)
    seen[0, 0, :2], seen[1, 0, :1] = 3, 3
    assert presence(seen, 5, 0.01)[:, 3].tolist() == [True, False]
    assert presence(seen, 5, 0.01).sum() == 1


# ---- adaptive Copy-Paste ----


def picture(classes, seed, shape=(4, 6, 5)):
    """Returns a dict of image, label, inside as a loader makes it."""
    label, inside = labels(classes, shape, seed)
    rng = torch.Generator().manual_seed(seed)
    size = (shape[0], 3, *shape[1:])
    image = torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)
    return {"image": image, "label": label, "inside": inside.clone()}


@pytest.mark.smoke
@pytest.mark.parametrize("classes", CLASSES)
def test_pixels_of_drawn_classes_cover_the_chosen_images(classes):
    pasted = 0
    for seed in range(4):
        base, source = picture(classes, seed), picture(classes, seed + 50)
        base["inside"][0, :, 0] = False
        base["label"][0, :, 0] = 255
        rng = np.random.default_rng(seed)
        drawn = torch.from_numpy(rng.integers(0, classes, (4, seed)))  # none at first; may repeat
        chosen = torch.from_numpy(rng.random(4) < 0.6)
        held = [{k: v.clone() for k, v in x.items()} for x in (base, source)]
        got = copy_paste(base, source, drawn, chosen)
        assert set(got) == {"image", "label", "inside"}
        assert [(v.dtype, v.shape) for v in got.values()] == [
            (v.dtype, v.shape) for v in base.values()
        ]
        for b, y, x in itertools.product(range(4), range(6), range(5)):
            over = bool(chosen[b]) and source["label"][b, y, x].item() in drawn[b].tolist()
            pasted += over
            origin = source if over else base
            for key in got:
                assert torch.equal(got[key][b, ..., y, x], origin[key][b, ..., y, x])
            assert not over or got["label"][b, y, x] != 255
        for x, before in zip((base, source), held, strict=True):  # both are left as they were
            assert all(torch.equal(x[key], before[key]) for key in x)
    assert pasted > 0


def test_without_drawn_classes_or_chosen_images_nothing_is_pasted():
    base, source = picture(3, 0), picture(3, 1)
    none, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    nothing, all_three = torch.zeros(4, 0, dtype=torch.int64), torch.arange(3).repeat(4, 1)
    for drawn, chosen in ((nothing, every), (all_three, none), (torch.full((4, 2), 7), every)):
        got = copy_paste(base, source, drawn, chosen)
        assert all(torch.equal(got[key], base[key]) for key in base)
    got = copy_paste(base, source, all_three, every)
    valid = source["label"] != 255
    assert torch.equal(got["label"][valid], source["label"][valid])
    assert torch.equal(got["label"][~valid], base["label"][~valid])
    assert torch.equal(got["inside"], source["inside"] & valid | base["inside"] & ~valid)


# ---- equalization sampling, Eq. (13) ----


@pytest.mark.smoke
@pytest.mark.parametrize("classes", CLASSES)
def test_the_rate_of_a_class_is_what_it_lacks_of_the_worst(classes):
    for seed, beta in itertools.product(range(4), (0.5, 1.0, 2.0)):
        bank = torch.rand(classes, generator=torch.Generator().manual_seed(seed)).double()
        bank[seed % classes] = 1.0
        bank = 1 - (1 - bank) / (1, 100)[seed % 2]  # all are known well at times
        got = equalization_rate(bank, beta)
        worst = max(1 - v for v in bank.tolist())
        expected = [((1 - v) / worst) ** beta for v in bank.tolist()]
        assert got.tolist() == pytest.approx(expected, **EXACT)
        assert got.min() == 0 and got.max() == 1
    assert torch.equal(equalization_rate(bank), equalization_rate(bank, 1.0))


def test_a_bank_of_certain_classes_keeps_nothing_and_is_no_nan():
    for beta in (0.5, 1.0, 2.0):
        assert equalization_rate(torch.ones(5), beta).tolist() == [0.0] * 5
        above = torch.tensor([1 + 1e-6, 0.5])  # as a rounding may leave it
        assert equalization_rate(above, beta).tolist() == [0.0, 1.0]
    assert equalization_rate(torch.zeros(5)).tolist() == [1.0] * 5


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_weight_is_a_power_of_the_teachers_confidence_where_a_pixel_is_kept(classes, dtype):
    for seed, gamma in enumerate((0.0, 0.5, 1.0, 2.0, 3.0)):
        logits_s = teacher("tied" if seed % 2 else "random", classes, seed=seed, dtype=dtype)
        rate = rates(classes, seed, dtype)
        rng = torch.Generator().manual_seed(seed)
        conf_t, u = torch.rand(2, 4, 6, 5, generator=rng, dtype=dtype)
        u[0, 0] = 1 - rate[logits_s[0, :, 0].argmax(0)]  # just kept, but for a rate of 0
        u[0, 0] = u[0, 0].clamp(max=1 - 2.0**-24)
        got = pixel_weight(conf_t, logits_s, rate, u, gamma)
        assert got.shape == (4, 6, 5) and got.dtype == dtype
        for b, y, x in itertools.product(range(4), range(6), range(5)):
            z = logits_s[b, :, y, x].tolist()
            s = rate[z.index(max(z))].item()
            kept = u[b, y, x].item() >= 1 - s
            expected = conf_t[b, y, x].item() ** gamma if kept else 0.0
            assert got[b, y, x].item() == pytest.approx(expected, rel=2e-6, abs=0)


def test_a_rate_of_1_keeps_always_a_rate_of_0_never_and_others_as_often():
    torch.manual_seed(0)
    logits_s = torch.zeros(1, 3, 300, 300)
    logits_s[:, 0, :100], logits_s[:, 1, 100:200], logits_s[:, 2, 200:] = 1, 1, 1
    u = torch.rand(1, 300, 300)
    u[0, ::100, 0], u[0, ::100, 1] = 0.0, 1 - 2.0**-24  # the ends of torch's [0, 1)
    conf_t = torch.full_like(u, 0.5)
    got = pixel_weight(conf_t, logits_s, torch.tensor([1.0, 0.0, 0.25]), u, 2.0)[0]
    assert (got[:100] == 0.25).all() and (got[100:200] == 0).all()
    kept = (got[200:] > 0).sum().item()  # five deviations of a binomial count
    assert abs(kept - 7500) <= 5 * math.sqrt(30_000 * 0.25 * 0.75)
    logits_s.requires_grad_()
    assert not pixel_weight(conf_t, logits_s, torch.ones(3), u, 2.0).requires_grad


# ---- Eq. (12) ----


def consistency(logits_s, logits_t, inside, rate, pooled, args, seed=0):
    """Returns (loss, parts, its gradient, the uniform numbers that it drew)."""
    conf_type = torch.promote_types(logits_t.dtype, torch.float32)
    torch.manual_seed(seed)
    u = torch.rand(inside.shape, dtype=conf_type)
    torch.manual_seed(seed)
    logits_s = logits_s.detach().requires_grad_()
    loss, parts = consistency_loss(logits_s, logits_t, inside, rate, pooled, args)
    assert loss.shape == () and loss.requires_grad
    return loss.detach(), parts, torch.autograd.grad(loss, logits_s)[0], u


def check_consistency(kind, classes, pooled, args, seed, dtype, shape=(4, 6, 5)):
    """Compares value, gradient and parts with the loop."""
    logits_t = teacher(kind, classes, shape, seed, dtype)
    logits_s = teacher("random", classes, shape, seed + 77, dtype)
    rate, (_, inside) = rates(classes, seed, dtype), labels(classes, shape, seed)
    *got, u = consistency(logits_s, logits_t, inside, rate, pooled, args, seed)
    expected = scalar_consistency(logits_s, logits_t, inside, rate, u, pooled, args)
    assert got[0].dtype == got[2].dtype == dtype
    assert got[0].item() == pytest.approx(expected[0], **NEAR[dtype])
    assert torch.allclose(got[2].double(), expected[1], rtol=1e-7, atol=1e-9) or (
        dtype == torch.float32
        and torch.allclose(got[2].double(), expected[1], rtol=2e-5, atol=1e-7)
    )
    assert set(got[1]) == set(expected[2])
    for name, value in expected[2].items():
        part = got[1][name]
        assert part.shape == ()
        assert part.item() == pytest.approx(value, **NEAR[torch.float32]), name
    return expected


VARIANTS = [
    dict(),
    dict(balance=True),
    dict(threshold=0.6, gamma=1.0),
    dict(threshold=0.5, balance=True, gamma=0.5),
    RELEASE,
    dict(RELEASE, weight="linear", T=0.6537, gamma=0.0),
    dict(weight="none", k_max=2, T=0.9537, balance=True),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_consistency_loss_its_gradient_and_its_parts_are_those_of_a_loop(classes, loss):
    balances = []
    for seed, (kind, flags) in enumerate(itertools.product(TEACHERS, VARIANTS)):
        args, pooled = loss_args(unsup_loss=loss, **flags), (1, 2)[seed % 2]
        shape = (2, 5, 5) if classes == 81 else (4, 6, 5)
        out = check_consistency(kind, classes, pooled, args, seed, torch.float64, shape)
        balances.append(out[2]["balance"])
    if loss == "ce":
        assert balances == [1.0] * len(balances)
    else:
        assert max(balances) > 1.2 or classes == 2


@pytest.mark.smoke
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pooled", [1, 2, 4])
def test_groups_of_images_are_normalized_each_by_its_own_weights(pooled, loss):
    for seed, flags in enumerate((dict(), RELEASE, dict(balance=True, threshold=0.5))):
        args = loss_args(unsup_loss=loss, **flags)
        check_consistency("random", 5, pooled, args, seed, torch.float64, (4, 9, 6))
        check_consistency("random", 5, pooled, args, seed, torch.float32, (4, 9, 6))


@pytest.mark.parametrize("classes", [2, 5, 11])
def test_an_image_of_one_pixel_is_balanced_too(classes):
    for seed in range(8):
        args = loss_args(balance=True)
        check_consistency("random", classes, 1, args, seed, torch.float64, (2, 1, 1))


@pytest.mark.parametrize("loss", LOSSES)
def test_below_the_threshold_the_loss_is_0_and_the_weight_remains(loss):
    # two pixels, p = (1/2, 1/2) and almost 1: dyadic, 1/2 is at a threshold of 1/2 exactly
    logits_t = torch.tensor([[0.0, 50.0], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    logits_s = torch.tensor([[0.3, 0.1], [-0.2, 0.4]], dtype=torch.float64).view(1, 2, 1, 2)
    inside, rate = torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(2)
    ce = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.3))]
    for threshold, over in ((0.0, (0, 1)), (0.5, (0, 1)), (0.51, (1,)), (1.0, (1,))):
        args = loss_args(unsup_loss=loss, threshold=threshold, weight="none")
        got, parts, gradient, _ = consistency(logits_s, logits_t, inside, rate, 1, args)
        # Eq. (13): weights 1/4 and 1; K = 1 makes FPL's loss cross-entropy
        expected = sum((0.25, 1.0)[i] * ce[i] for i in over) / 1.25
        assert got.item() == pytest.approx(expected, **EXACT)
        assert (gradient[0, :, 0, 0] != 0).any() == (0 in over)
        assert parts["kept"] == 1


@pytest.mark.parametrize("classes", [2, 4, 8])
@pytest.mark.parametrize("pooled", [1, 2])
def test_where_fpls_loss_is_0_the_balance_is_1(classes, pooled):
    # a flat teacher of 2^n classes: no rounding, the weight of Eq. (11) is 0 on every pixel
    logits_t, logits_s = teacher("flat", classes), teacher("random", classes, seed=1)
    inside, rate = torch.ones(4, 6, 5, dtype=torch.bool), torch.ones(classes)
    for flags in (dict(balance=True), dict(balance=False)):
        got, parts, gradient, _ = consistency(
            logits_s, logits_t, inside, rate, pooled, loss_args(**flags)
        )
        assert got == 0 and parts["unsup"] == 0 and parts["balance"] == 1
        assert (gradient == 0).all()
    logits_t[:pooled] = teacher("random", classes)[:pooled]  # the first group has a loss
    args = loss_args(balance=True)
    got, parts, gradient, u = consistency(logits_s, logits_t, inside, rate, pooled, args)
    value, slope, more = scalar_consistency(logits_s, logits_t, inside, rate, u, pooled, args)
    assert got.item() == pytest.approx(value, **NEAR[torch.float64])
    assert parts["balance"].item() == pytest.approx(more["balance"], **NEAR[torch.float64])
    assert more["balance"] != 1 and (gradient[pooled:] == 0).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "flags, K", [(dict(), 2), (dict(strict=False), 1), (dict(k_max=1), 1), (dict(T=0.8), 3)]
)
def test_strictness_and_cap_reach_the_loss_and_its_share_of_several_positives(flags, K):
    logits_t, logits_s = teacher("flat", 4), teacher("random", 4, seed=1)  # V = 1/4, 1/2, 3/4, 1
    args, inside = loss_args(**dict(T=0.5, weight="none") | flags), labels(4)[1]
    got, parts, _, u = consistency(logits_s, logits_t, inside, rates(4), 1, args)
    value, _, _ = scalar_consistency(logits_s, logits_t, inside, rates(4), u, 1, args)
    assert got.item() == pytest.approx(value, **NEAR[torch.float64])
    assert parts["K_gt_1"] == (K > 1) and scalar_K([0.25] * 4, args) == K


@pytest.mark.parametrize("kind", [*TEACHERS, "flat"])
@pytest.mark.parametrize("dtype", [*NEAR, *HALVES])
def test_flat_and_tied_teachers_and_any_type_give_finite_numbers(kind, dtype):
    for classes, loss, balance in itertools.product((2, 3, 21), LOSSES, (False, True)):
        args = loss_args(unsup_loss=loss, balance=balance)
        logits_t, logits_s = (teacher(k, classes, seed=5, dtype=dtype) for k in (kind, "random"))
        inside = labels(classes)[1]
        got, parts, gradient, _ = consistency(logits_s, logits_t, inside, rates(classes), 2, args)
        assert got.isfinite() and gradient.isfinite().all() and gradient.dtype == dtype
        assert all(part.isfinite() for part in parts.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_inside_or_nothing_kept_is_0_with_a_gradient_of_0(loss):
    logits_t, logits_s = teacher("random", 5), teacher("random", 5, seed=1)
    none, every = torch.zeros(4, 6, 5, dtype=torch.bool), torch.ones(4, 6, 5, dtype=torch.bool)
    for balance, pooled in itertools.product((False, True), (1, 2)):
        args = loss_args(unsup_loss=loss, balance=balance)
        for inside, rate in ((none, torch.ones(5)), (every, torch.zeros(5))):
            got, parts, gradient, _ = consistency(logits_s, logits_t, inside, rate, pooled, args)
            assert got == 0 and parts["unsup"] == 0 and parts["kept"] == 0
            assert torch.equal(gradient, torch.zeros_like(gradient))  # a NaN would not be equal
            assert all(part.isfinite() for part in parts.values())
        some = every.clone()
        some[:2] = False  # a group of nothing counts with 0 among the groups
        got, parts, gradient, u = consistency(logits_s, logits_t, some, rates(5), pooled, args)
        value, slope, _ = scalar_consistency(logits_s, logits_t, some, rates(5), u, pooled, args)
        assert got.item() == pytest.approx(value, **NEAR[torch.float64]) and value > 0
        assert torch.allclose(gradient, slope, rtol=1e-7, atol=1e-9)
        assert (gradient[:2] == 0).all()


def test_pixels_outside_change_nothing():
    logits_t, logits_s = teacher("random", 5), teacher("random", 5, seed=1)
    _, inside = labels(5)
    inside[0, 0, 0] = False
    other_t, other_s = (
        torch.where(inside[:, None], z, teacher("random", 5, seed=9)) for z in (logits_t, logits_s)
    )
    for loss, pooled in itertools.product(LOSSES, (1, 2)):
        args = loss_args(unsup_loss=loss, balance=True)
        one, two = (
            consistency(z, t, inside, rates(5), pooled, args)
            for z, t in ((logits_s, logits_t), (other_s, other_t))
        )
        assert torch.equal(one[0], two[0]) and one[1] == two[1]
        assert torch.equal(one[2], two[2])
        assert (one[2].movedim(1, -1)[~inside] == 0).all()


@pytest.mark.smoke
@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_reaches_the_teacher_through_the_consistency_loss(loss):
    for balance in (False, True):
        args = loss_args(unsup_loss=loss, balance=balance)
        logits_t, logits_s = teacher("random", 5).requires_grad_(), teacher("random", 5, seed=1)
        total, parts = consistency_loss(
            logits_s.requires_grad_(), logits_t, labels(5)[1], rates(5), 2, args
        )
        total.backward(retain_graph=True)
        assert logits_t.grad is None and logits_s.grad.abs().sum() > 0
        (slope,) = torch.autograd.grad(sum(parts.values()) + 0 * logits_s.sum(), logits_s)
        assert (slope == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_logits_of_low_precision_count_in_float32(dtype, loss):
    args = loss_args(unsup_loss=loss, **RELEASE)
    logits_t, logits_s = (teacher("random", 19, seed=s, dtype=dtype) for s in (0, 1))
    half, full = (
        consistency(s, t, labels(19)[1], rates(19, dtype=torch.float32), 2, args)
        for s, t in ((logits_s, logits_t), (logits_s.float(), logits_t.float()))
    )
    assert torch.equal(half[0], full[0]) and half[0].dtype == torch.float32
    for name, part in half[1].items():
        assert torch.equal(part, full[1][name]) and part.dtype == torch.float32, name
    assert torch.equal(half[2], full[2].to(dtype))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", NEAR)
def test_logits_of_ten_thousand_are_finite(dtype, loss):
    for classes, balance in itertools.product((2, 3, 21), (False, True)):
        args = loss_args(unsup_loss=loss, balance=balance)
        logits_t, logits_s = (1e4 * teacher("random", classes, seed=s, dtype=dtype) for s in (2, 3))
        _, inside = labels(classes)
        rate = torch.ones(classes, dtype=dtype)
        got, parts, gradient, _ = consistency(logits_s, logits_t, inside, rate, 1, args)
        # certain networks: K = 1, every weight 1, the loss a difference of two logits
        losses = []
        for b in range(4):
            of_b = []
            for y, x in inside[b].nonzero().tolist():
                z, t = logits_s[b, :, y, x].tolist(), logits_t[b, :, y, x].tolist()
                of_b.append(max(z) - z[t.index(max(t))])
            losses.append(math.fsum(of_b) / len(of_b))
        # logits closer than 1 add up to log 2 each
        assert got.item() == pytest.approx(math.fsum(losses) / 4, rel=1e-5, abs=0.01)
        assert got > 1000 and gradient.isfinite().all() and gradient.abs().sum() > 0
        assert all(part.isfinite() for part in parts.values())


# ---- as released ----


def released(logits_s, logits_t, bank, u, args, gamma=2, beta=1):
    """Audit, sections 1.4 and 3: the released loss over one batch without padding.

    Cross-entropy of pseudo labels, 255 below the threshold, or FPL with k at most 3 times
    r = mean cross-entropy / mean FPL.
    """
    confidence, label = logits_t.softmax(1).max(1)
    s = ((1 - bank) / ((1 - bank).max() + 1e-12)) ** beta
    keep = torch.zeros_like(confidence)
    for c in range(len(bank)):
        keep[(logits_s.argmax(1) == c) & (u >= 1 - s[c])] = 1.0
    w = confidence**gamma * keep
    a = w / (w.sum() + 1e-12)
    if args.unsup_loss == "ce":
        label = label.masked_fill(confidence < args.threshold, 255)
        return (a * F.cross_entropy(logits_s, label, ignore_index=255, reduction="none")).sum()
    top, order = logits_t.softmax(1).topk(4, 1)
    sums = top.cumsum(1)
    K = 1 + (sums[:, 1] < args.T).long() + (sums[:, 2] < args.T).long()
    Y = torch.zeros_like(logits_s, dtype=torch.bool)
    for k in range(3):
        Y |= F.one_hot(order[:, k], logits_s.shape[1]).bool().movedim(-1, 1) & (K > k)[:, None]
    loss = F.softplus((-logits_s - 1e7 * ~Y).logsumexp(1) + (logits_s - 1e7 * Y).logsumexp(1))
    m = sums.gather(1, K[:, None])[:, 0] / (K + 1)
    next_one = top.gather(1, K[:, None])[:, 0]
    weight = (torch.log(1 + 50 * (m - next_one)) / torch.log(1 + 50 * m)).clamp(max=1)
    ratio = F.cross_entropy(logits_s, label).item() / (loss * weight).mean().item()
    return (a * loss * weight * ratio).sum()


@pytest.mark.parametrize("classes", [5, 11, 19])
def test_the_loss_is_the_released_one(classes):
    for seed, (kind, threshold) in enumerate(itertools.product(TEACHERS[:2], (0.0, 0.7))):
        bank = torch.rand(classes, generator=torch.Generator().manual_seed(seed)).double()
        rate, inside = equalization_rate(bank), torch.ones(4, 6, 5, dtype=torch.bool)
        for loss in LOSSES:
            args = loss_args(unsup_loss=loss, threshold=threshold if loss == "ce" else 0.0)
            vars(args).update(RELEASE)
            logits_t = teacher(kind, classes, seed=seed)
            logits_s = teacher("random", classes, seed=seed + 1).requires_grad_()
            got, _, gradient, u = consistency(logits_s, logits_t, inside, rate, 4, args)
            expected = released(logits_s, logits_t, bank, u, args)
            (slope,) = torch.autograd.grad(expected, logits_s)
            # the release adds 1e-12 to sums near 10; softplus above 20, as in NEAR
            assert got.item() == pytest.approx(expected.item(), **NEAR[torch.float64])
            assert torch.allclose(gradient, slope, rtol=1e-7, atol=1e-9)
            assert (got > 0) == (loss == "fpl" or (kind, threshold) != ("diffuse", 0.7))


SHARED = """upcast by_rank cumulative_classes fuzzy_positive_assignment masked_mean adaptive_weight
fuzzy_positive_regularization fuzzy_positive_loss""".split()


@pytest.mark.parametrize("name", SHARED)
def test_fpls_functions_are_the_text_of_cps_fpl(name):
    here, there = (inspect.getsource(getattr(module, name)) for module in (ael_fpl, cps_fpl))
    assert here == there


# ---- recipes ----

# T of supplement Tables 1 and 2, row FPL+AEL, columns as printed
TABLE_1 = {
    "resnet50": {"1/32": 0.95, "1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
    "resnet101": {"1/32": 0.9, "1/16": 0.9, "1/8": 0.85, "1/4": 0.85},
}
TABLE_2 = {
    "resnet50": {"1/16": 0.95, "1/8": 0.95, "1/4": 0.95},
    "resnet101": {"1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
}
CELLS = [
    (dataset, backbone, split, loss, T)
    for dataset, table in (("cityscapes", TABLE_1), ("voc_aug", TABLE_2))
    for backbone, row in table.items()
    for split, T in row.items()
    for loss in LOSSES
]
PRINTED = dict(k_max=0, strict=True, mean_over="positives", balance=False, threshold=0.0)
PRINTED |= dict(consistency_on="mixed", paste_draws=3, paste_prob=1.0, paste_power=1.0)
RELEASED = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True, threshold=0.0)
RELEASED |= dict(consistency_on="all", paste_draws=3, paste_prob=0.5, paste_power=0.5)


def released_flags(dataset, loss):
    """Returns what the release runs on a data set: VOC has two values of its own."""
    voc = dataset in ("voc", "voc_aug")
    own = dict(paste_draws=1, threshold=0.7 if loss == "ce" else 0.0)
    return RELEASED | (own if voc else {})


def flags_of(*words):
    """Returns the resolved flags of a command line."""
    return resolved(*map(str, words))


@functools.cache
def resolved(*words):
    return resolve(parse(Args, words), preset)


def cell_words(dataset, backbone, split, loss):
    words = ["--dataset", dataset, "--backbone", backbone, "--split", split]
    return [*words, "--unsup-loss", loss]


def test_fpls_tables_have_28_cells_of_ael():
    assert len(CELLS) == len(set(CELLS)) == 28


@pytest.mark.parametrize("dataset, backbone, split, loss, T", CELLS)
def test_every_cell_of_fpls_tables_has_its_flags(dataset, backbone, split, loss, T):
    words, city = cell_words(dataset, backbone, split, loss), dataset == "cityscapes"
    fixed = dict(backbone=backbone, split=split, unsup_loss=loss, T=T, total_iters=39_680)
    fixed |= dict(crop_size=513, scales=(0.5, 2.0), weights="auto", stem="v1c", output_stride=8)
    fixed |= dict(aspp_rates=(12, 24, 36), protocol="slide", split_family="cps", split_seed=None)
    fixed |= dict(batch_size=16, batch_size_unlabeled=8, lr=0.00125, lr_head=10.0)
    fixed |= dict(weight_decay=8e-4, decay_on="all", aux_weight=0.4, bank_momentum=0.999)
    fixed |= dict(pooled=2, region_area=0.03, bank_area=0.03, paste_not=(0,))
    fixed |= dict(unsup_weight=1.0, weight="concave", gamma=2.0, beta=1.0, skip_absent=False)
    fixed |= dict(paste_scales=(0.1, 2.0), teacher_mode="train", ema_decay=0.99)
    if city:
        fixed |= dict(crop_size=769, total_iters=18_000, paste_not=(0, 1, 2, 8, 10))
        fixed |= dict(region_area=0.005, bank_area=0.01)
    official = released_flags(dataset, loss)
    for recipe, values in (("paper", PRINTED), ("official", official)):
        args = flags_of(*words, "--recipe", recipe)
        expected = fixed | values
        assert {name: getattr(args, name) for name in expected} == expected
        assert round(args.ohem_kept * args.crop_size**2) == 50_000
        assert flags_of(*words, "--recipe", recipe, "--T", 0.77).T == 0.77
    assert vars(flags_of(*words)) == vars(flags_of(*words, "--recipe", "paper"))  # the default
    if backbone == "resnet101":  # which is the default there
        assert flags_of(*words[:2], *words[4:]).T == T
        assert flags_of(*words[:2], *words[4:]).backbone == "resnet101"


def test_where_no_table_has_a_cell_the_bound_is_0_9():
    for dataset, splits in (
        ("cityscapes", ("1/2", "all", "1/64")),
        ("voc_aug", ("1/2", "1/32", "all")),
        ("voc", ("92", "183", "366", "732", "1464", "1/8", "all")),
        ("camvid", ("1/4", "1/8", "1/16", "1/32", "all")),
        ("shapes", ("1/4", "1/8", "1/16", "1/32", "all")),
    ):
        for split, backbone in itertools.product(splits, ("resnet50", "resnet101")):
            args = Args(dataset=dataset, split=split, backbone=backbone)
            assert resolve(args, preset).T == 0.9, args
    for dataset, split in itertools.product(("cityscapes", "voc_aug"), TABLE_1["resnet50"]):
        args = Args(dataset=dataset, split=split, backbone="resnet18")
        assert resolve(args, preset).T == 0.9


EVERY = [  # words, and whether it is VOC
    (["--dataset", "shapes"], False),
    (["--dataset", "camvid"], False),
    (["--dataset", "folder", "--num-classes", "4"], False),
    (["--dataset", "cityscapes", "--split", "1/8"], False),
    (["--dataset", "voc", "--split", "92"], True),
    (["--dataset", "voc_aug", "--split", "1/16"], True),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("words, voc", EVERY)
def test_the_recipes_differ_in_what_d13_to_d19_name_alone(words, voc, loss):
    words = [*words, "--unsup-loss", loss]
    paper, official = (vars(flags_of(*words, "--recipe", r)) for r in ("paper", "official"))
    assert vars(flags_of(*words)) == paper
    expected = released_flags(words[1], loss)
    assert {name: paper[name] for name in PRINTED} == PRINTED
    assert {name: official[name] for name in expected} == expected
    changed = {name for name in paper if paper[name] != official[name]}
    assert changed == {"recipe"} | {name for name in PRINTED if PRINTED[name] != expected[name]}


OTHER = {  # a value that neither recipe nor any preset has
    "k_max": (2, "2"),
    "strict": (None, None),
    "mean_over": (None, None),
    "balance": (None, None),
    "threshold": (0.33, "0.33"),
    "consistency_on": (None, None),
    "paste_draws": (0, "0"),
    "paste_prob": (0.0, "0"),
    "paste_power": (3.0, "3"),
    "T": (0.55, "0.55"),
    "pooled": (4, "4"),
    "bank_momentum": (0.0, "0"),
    "region_area": (0.0, "0"),
    "bank_area": (0.25, "0.25"),
    "paste_not": ((3, 4), "3 4"),
    "paste_scales": ((0.5, 1.0), "0.5 1.0"),
    "batch_size_unlabeled": (6, "6"),
    "total_iters": (7, "7"),
    "crop_size": (99, "99"),
    "lr": (0.5, "0.5"),
    "lr_head": (3.0, "3"),
    "weight_decay": (0.0, "0"),
    "aux_weight": (0.1, "0.1"),
    "ohem_kept": (0.5, "0.5"),
    "aspp_rates": ((1, 2), "1 2"),
    "unsup_weight": (0.0, "0"),
    "gamma": (0.0, "0"),
    "beta": (0.5, "0.5"),
    "ema_decay": (0.5, "0.5"),
}


@pytest.mark.parametrize("name", OTHER)
def test_an_explicit_flag_beats_preset_and_recipe(name):
    value, text = OTHER[name]
    first = list(OTHER).index(name) % 2
    for i, (words, _) in enumerate(EVERY, first):  # either recipe on half of the data sets
        words = [*words, "--recipe", ("paper", "official")[i % 2]]
        before = vars(flags_of(*words))
        if value is None:  # of two values the other
            old = before[name]
            new = RELEASED[name] if old == PRINTED[name] else PRINTED[name]
            given = str(new)
        else:
            new, given = value, text
        after = vars(flags_of(*words, "--" + name.replace("_", "-"), *given.split()))
        assert before[name] != new == after[name]
        assert {key for key in after if after[key] != before[key]} == {name}


def test_what_is_never_pasted_belongs_to_the_data_set():
    for words, never in (
        (["--dataset", "shapes"], (0,)),
        (["--dataset", "camvid"], (0, 1, 3, 4, 5)),
        (["--dataset", "folder", "--num-classes", "4"], ()),
        (["--dataset", "cityscapes", "--split", "1/8"], (0, 1, 2, 8, 10)),
        (["--dataset", "voc", "--split", "92"], (0,)),
        (["--dataset", "voc_aug", "--split", "1/16"], (0,)),
    ):
        for recipe in ("paper", "official"):
            args = [*words, "--recipe", recipe]
            assert flags_of(*args).paste_not == never
            assert flags_of(*args, "--paste-not").paste_not == ()
            assert flags_of(*args, "--paste-not", 2, 3).paste_not == (2, 3)


def test_the_shares_of_regions_and_of_presence_are_roads_or_vocs():
    for (words, _), areas in zip(EVERY, ("voc", "city", "voc", "city", "voc", "voc"), strict=True):
        args = flags_of(*words)
        expected = (0.005, 0.01) if areas == "city" else (0.03, 0.03)
        assert (args.region_area, args.bank_area) == expected


def test_dilations_follow_the_output_stride_and_ohem_the_crop():
    words = cell_words("cityscapes", "resnet50", "1/8", "fpl")
    assert flags_of(*words, "--output-stride", 16).aspp_rates == (6, 12, 18)
    assert flags_of(*words, "--output-stride", 8).aspp_rates == (12, 24, 36)
    # a share of the pixels: half the side keeps a quarter
    args = flags_of(*words, "--crop-size", 385)
    assert round(args.ohem_kept * 385**2) == round(50_000 * 385**2 / 769**2)


@pytest.mark.parametrize("dataset", ["camvid", "shapes"])
def test_the_small_protocols_train_small_networks(dataset):
    args, camvid = flags_of("--dataset", dataset), dataset == "camvid"
    fixed = dict(backbone="resnet18", stem="classic", weights="none", protocol="whole", workers=2)
    fixed |= dict(batch_size=4, batch_size_unlabeled=4, lr_head=2.0, weight_decay=1e-4)
    fixed |= dict(aspp_rates=(1, 2, 3), output_stride=16, aux_weight=0.0, ohem_kept=0.0)
    fixed |= dict(bank_momentum=0.97, pooled=2, decay_on="all", T=0.9)
    fixed |= dict(split="1/8" if camvid else "1/16", crop_size=128 if camvid else 64)
    fixed |= dict(total_iters=600 if camvid else 80, lr=0.01 if camvid else 0.02)
    fixed |= dict(scales=(0.5, 2.0) if camvid else (0.75, 1.5))
    fixed |= dict(log_every=10, eval_every=150, save_every=150, pictures_every=300)
    assert {name: getattr(args, name) for name in fixed} == fixed
    args = flags_of("--dataset", dataset, "--batch-size", 8)  # the unlabelled batch follows
    assert (args.batch_size, args.batch_size_unlabeled) == (8, 8)
    assert flags_of("--dataset", dataset, "--batch-size-unlabeled", 2).batch_size == 4
    # the bank forgets as large a share of the run as 0.999 of 18,000 steps, within a factor of 2
    if camvid:
        assert 0.5 < (600 * (1 - 0.97)) / (18_000 * (1 - 0.999)) < 2


def test_a_folder_of_your_own_resolves():
    args = flags_of("--dataset", "folder", "--num-classes", 7)
    fixed = dict(backbone="resnet50", stem="classic", weights="auto", protocol="whole", split="all")
    fixed |= dict(crop_size=513, total_iters=39_680, batch_size=16, batch_size_unlabeled=8)
    fixed |= dict(output_stride=8, aspp_rates=(12, 24, 36), T=0.9, lr=0.00125, lr_head=10.0)
    fixed |= dict(log_every=50, eval_every=1000, save_every=500, pictures_every=5000, workers=4)
    assert {name: getattr(args, name) for name in fixed} == fixed
    listed = flags_of("--dataset", "cityscapes", "--labeled-list", "some.txt", "--T", 0.95)
    assert (listed.split, listed.T) == ("list", 0.95)


@pytest.mark.parametrize("dataset", ["cityscapes", "voc", "voc_aug"])
def test_the_papers_data_sets_need_a_split(dataset):
    with pytest.raises(Refusal, match="sets --split"):
        flags_of("--dataset", dataset)


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("--T", v) for v in ("0", "1", "-1", "nan")),
        *(("--threshold", v) for v in ("1.1", "-0.1")),
        *((flag, "1.01") for flag in ("--bank-momentum", "--ema-decay", "--paste-prob")),
        *((flag, "2") for flag in ("--region-area", "--bank-area")),
        *((flag, "-1") for flag in ("--gamma", "--beta", "--paste-power", "--paste-draws")),
        *((flag, "-1") for flag in ("--k-max", "--unsup-weight", "--paste-not", "--paste-scales")),
        *(("--batch-size-unlabeled", v) for v in ("0", "-8")),
        *((flag, "margin") for flag in ("--unsup-loss", "--weight", "--consistency-on")),
    ],
)
def test_values_out_of_range_are_refused(flag, value):
    with pytest.raises(Refusal, match=flag):
        flags_of("--dataset", "camvid", flag, value)
