"""Losses, weights and schedules at their borders, by hand; what is drawn, pasted, pooled and kept
between steps, against oracles/ for given numbers.
"""

import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import supervised
import u2pl
from common import Refusal, fused
from common.distributed import Group
from oracles import ael as ael_oracle
from oracles import fpl as fpl_oracle
from oracles import mean_teacher as mt_oracle
from oracles import u2pl as u2pl_oracle

BELOW_1 = 1 - 2.0**-53  # the largest float64 of a generator's [0, 1)
some_classes = pytest.mark.parametrize("classes", [2, 81])


def normal(*shape, seed=0, spread=1.0):
    rng = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, dtype=torch.float64, generator=rng)


def uniform(*shape, seed=0):
    """In [0, 1); the first is 0 and the last the largest float64 below 1."""
    u = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u.view(-1)[0] = 0.0
    u.view(-1)[-1] = BELOW_1
    return u


def whole(classes, *shape, seed=0):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


DYADIC = (0.125, 0.5, 0.125, 0.25)  # all sums are exact, in any type


def pixel(*values, dtype=torch.float32):
    """A map of one pixel, (1, C, 1, 1)."""
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


def kept(logits, loss):
    """How many pixels of each image a loss reaches."""
    (gradient,) = torch.autograd.grad(loss, logits)
    return [int(g.any(0).sum()) for g in gradient]


def test_ohem_keeps_all_pixels_tied_with_the_last_one():
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0, :2] = -2.0  # 16 hard pixels; 32 tied; 16 easy ones
    logits[:, 0, 6:] = 3.0
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    for min_kept, count in ((0, 16), (16, 16), (17, 48), (48, 48), (49, 64)):
        loss = supervised.ohem_cross_entropy(logits.requires_grad_(), label, 0.0, min_kept)
        assert kept(logits, loss) == [count]


def test_ohem_keeps_a_share_of_the_pixels_of_a_crop():
    """U2PL's L_s; the auxiliary head alike, times its weight. Share, crop, pixels that it keeps."""
    label = torch.randint(4, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    # all are easy, of different losses, so that none tie with the last one
    logits = normal(2, 4, 16, 16) / 5 + 4 * F.one_hot(label, 4).movedim(3, 1)
    for share, crop, count in (
        *((50_000 / 769**2, 16, 22), (50_000 / 769**2, 32, 87)),  # U2PL's released code
        *((50_000 / 800**2, 16, 20), (50_000 / 800**2, 40, 125), (1e-6, 16, 1)),  # CPS's
    ):
        args = SimpleNamespace(aux_weight=0.4, ohem_kept=share, crop_size=crop)
        loss = supervised.supervised_loss({"logits": logits.requires_grad_()}, label, args)
        assert kept(logits, loss) == [count] * 2
        both = supervised.supervised_loss({"logits": logits, "aux": 0 * logits}, label, args)
        assert both.item() == pytest.approx(loss.item() + 0.4 * math.log(4), rel=1e-6)


def test_schedules():
    for step, length in itertools.product(range(31), (1, 20)):
        expected = math.exp(-5 * (1 - min(step / length, 1)) ** 2)  # T&V App. B
        assert mean_teacher.sigmoid_rampup(step, length) == pytest.approx(expected, rel=1e-14)
    assert mean_teacher.sigmoid_rampup(10**6, 20) == mean_teacher.sigmoid_rampup(0, 0) == 1.0
    # [D12]: n / (n + 1), at most the limit; the first update copies the student
    for count, decay in ((0, 0.0), (1, 0.5), (3, 0.75), (97, 97 / 98), (100, 0.99), (10**6, 0.99)):
        assert mean_teacher.ema_decay(count, 0.99) == pytest.approx(decay, rel=1e-15)
    # U2PL Eq. (7), in stairs: an epoch is 12.5 steps
    args = SimpleNamespace(alpha_0=0.2, epochs=80, total_iters=1000, dpa=True)
    for step, left in ((0, 80), (12, 80), (13, 79), (24, 79), (25, 78), (500, 40), (999, 1)):
        assert u2pl.unreliable_share(step, args) == pytest.approx(0.2 * left / 80, rel=1e-12)
    args.dpa = False
    assert u2pl.unreliable_share(999, args) == 0.2


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_strict_decides_where_a_sum_equals_the_bound(dtype):
    p, _ = cps_fpl.by_rank(pixel(*DYADIC, dtype=dtype))  # V = 1/2, 3/4, 7/8, 1
    for T, n, reached in ((0.5, 2, 1), (0.75, 3, 2), (0.875, 4, 3)):
        assert cps_fpl.cumulative_classes(p, T) == n  # strict is the default
        for strict, n_of in ((True, n), (False, reached)):
            assert cps_fpl.cumulative_classes(p, T, strict) == n_of
            K = cps_fpl.fuzzy_positive_assignment(p, T, strict=strict)
            assert K == max(n_of - 1, 1)
    for short in ((0.3, 0.3, 0.2, 0.1), (0.0, 0.0, 0.0, 0.0)):  # no sum reaches T: all classes
        assert cps_fpl.cumulative_classes(pixel(*short, dtype=dtype), 0.95) == 4


def test_a_class_is_negative_below_the_threshold_not_at_it():
    """Also: 1 - p of a certain student is 4e-18, which 1 - p would round to 0."""
    z = pixel(0.5, -0.3, 0.2, 0.1, dtype=torch.float64)
    p = z.softmax(1).flatten().tolist()
    for prob, threshold, negatives in (
        (DYADIC, 0.5, (0, 2, 3)),
        ((0.41, 0.19, 0.21, 0.19), 0.2, (1, 3)),
        ((0.25, 0.25, 0.25, 0.25), 0.2, ()),
    ):
        loss = cps_fpl.negative_loss(z, pixel(*prob), threshold).item()
        assert loss == pytest.approx(-sum(math.log(1 - p[j]) for j in negatives), abs=1e-14)
    z, q = [40.0, 0.0, -5.0], [0.1, 0.8, 0.1]
    for dtype in (torch.float32, torch.float64):
        loss = cps_fpl.negative_loss(pixel(*z, dtype=dtype), pixel(*q, dtype=dtype)).item()
        assert loss == pytest.approx(fpl_oracle.negative(z, q)[0], rel=1e-6)


def test_where_the_loss_of_fpl_is_exactly_0_the_balance_is_1():
    """[D16]. No class is negative, logits of any size; the teacher is flat; nothing is inside."""
    nets = [normal(2, 4, 6, 5, seed=seed, spread=2.0) for seed in range(4)]
    flat = [torch.zeros(2, 4, 6, 5, dtype=torch.float64)] * 2  # 1/4: no rounding
    inside = normal(2, 6, 5, seed=4) > -1
    for scale, teachers, mask, changes in (
        (1, nets[2:], inside, dict(k_strategy="n", T=1 - 1e-12)),
        (1e4, nets[2:], inside, dict(k_strategy="n", T=1 - 1e-12)),
        (1, flat, inside, dict()),
        (1, nets[2:], inside & False, dict()),
    ):
        students = [(scale * z).requires_grad_() for z in nets[:2]]
        args = fpl_oracle.printed(balance=True, **changes)
        value, parts = cps_fpl.cross_loss(students, teachers, mask, 0.0, args)
        assert value.item() == parts["unsup"].item() == 0 and parts["balance"].item() == 1
        assert not any(g.any() for g in torch.autograd.grad(value, students))


def test_statistics_are_of_every_fourth_pixel_of_both_networks():
    logits = [normal(2, 5, 13, 10, seed=seed, spread=0.5) for seed in (1, 2)]
    label = torch.randint(5, (2, 13, 10), generator=torch.Generator().manual_seed(3))
    mask = normal(2, 13, 10, seed=3) > 0
    args = fpl_oracle.printed()
    prob = torch.cat([z.softmax(1)[..., ::4, ::4] for z in logits])
    truth = torch.cat([label, label])[:, None, ::4, ::4]
    above = (prob > prob.gather(1, truth)).sum(1)  # classes likelier than the true one
    p, _ = cps_fpl.by_rank(prob)
    K = cps_fpl.k_values(p, 0.5, args)
    of_teachers = {"K": K, "K_gt_1": K > 1, "weight": cps_fpl.adaptive_weight(p, K)}
    of_labels = {"pseudo_acc": above == 0, "coverage": above < K}
    for statistics, given, nothing, expected in (
        (cps_fpl.teacher_statistics, mask, mask & False, of_teachers),
        (cps_fpl.label_statistics, label.where(mask, 255), torch.full_like(label, 255), of_labels),
    ):
        found = statistics(logits, given, 0.5, args)
        assert list(found) == list(expected)
        for name, x in expected.items():
            inside = x[torch.cat([mask, mask])[:, ::4, ::4]]
            assert found[name].item() == pytest.approx(inside.double().mean().item(), rel=1e-5)
        assert not any(statistics(logits, nothing, 0.0, args).values())


def test_the_average_is_of_probabilities_not_of_logits():
    """Also of certain networks, of which windows are summed: the surer one decides."""

    def average(*logits):
        networks = [nn.Identity() for _ in logits]
        for net, z in zip(networks, logits, strict=True):
            net.register_forward_hook(lambda *_, z=z: {"logits": z})
        return cps_fpl.Average(networks)(torch.zeros(1))["logits"]

    logits = [normal(1, 11, 1, 1, seed=seed, spread=9.0) for seed in (1, 2, 3)]
    expected = sum(z.softmax(1) for z in logits) / 3
    assert torch.allclose(average(*logits).exp(), expected, rtol=1e-9)
    z = torch.full((1, 4, 1, 2), -1e4)
    z[0, 1, 0, 0] = 1e4
    z[0, 2, 0, 1] = 2e4
    assert average(z, z).isfinite().all() and average(z, z).sum(3).argmax(1) == 2


def test_a_teacher_at_the_threshold_is_certain():
    """AEL [D18]: below it the loss is 0, the weight remains. p is (1/2, 1/2)."""
    inside = torch.ones(1, 1, 1, dtype=torch.bool)
    for threshold, expected in ((0.5, math.log1p(math.exp(-0.5))), (0.51, 0.0)):
        args = fpl_oracle.printed(unsup_loss="ce", threshold=threshold)
        maps = pixel(0.3, -0.2), pixel(0.0, 0.0), inside
        value, parts = ael_fpl.consistency_loss(*maps, torch.ones(2), 1, args)
        assert value.item() == pytest.approx(expected, rel=1e-6) and parts["kept"] == 1


def test_a_balance_that_is_only_logged_is_of_every_fourth_pixel_each_way():
    students, teachers = torch.randn(2, 2, 1, 5, 9, 10)
    inside = torch.rand(1, 9, 10) < 0.7
    pseudo = teachers.argmax(2).masked_fill(~inside, 255).flip(0)[..., ::4, ::4]
    pairs = zip(students[..., ::4, ::4], pseudo, strict=True)
    ce = sum(cps_fpl.cross_entropy(z, label) for z, label in pairs)
    for kind in ("fpl", "soft", "negative"):
        args = fpl_oracle.printed(unsup_loss=kind)
        value, logged = cps_fpl.cross_loss(list(students), list(teachers), inside, 0.0, args)
        assert logged["balance"].item() == pytest.approx((ce / value).item(), rel=1e-5)


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
        offered = torch.from_numpy(rng.random((3, 6 * K, 2), np.float32))
        offered[..., 1] = (offered[..., 1] < 0.6).float()
        bank, pushed = torch.zeros(sum(sizes) + 1, 1), torch.zeros(3, dtype=torch.int64)
        twins = bank.clone(), pushed.clone()
        for turn in offered.split(K, 1):
            u2pl.push_features(bank, pushed, torch.tensor(sizes), turn)
            fused.push_features(*twins, torch.tensor(sizes), turn)
            assert torch.equal(bank, twins[0]) and torch.equal(pushed, twins[1])
        expected = []
        for row, size in zip(offered, sizes, strict=True):
            ring = u2pl_oracle.ring(row[row[:, 1] > 0, 0].tolist(), size)
            expected += ring + [0] * (size - len(ring))
        assert bank.flatten().tolist() == expected + [0]
        assert torch.equal(pushed, (offered[..., 1] > 0).sum(1))


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
