"""Losses, weights and schedules at their borders: numbers worked out by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ael_fpl
import cps_fpl
import mean_teacher
import supervised
import u2pl
from oracles import fpl as fpl_oracle

DYADIC = (0.125, 0.5, 0.125, 0.25)  # all sums are exact, in any type


def pixel(*values, dtype=torch.float32):
    """A map of one pixel, (1, C, 1, 1)."""
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


def drawn(*shape, seed=0, spread=2.0):
    rng = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=rng, dtype=torch.float64)


U2PL = 50_000 / 769**2  # the share of a crop that the released OHEM keeps at least
CPS = 50_000 / 800**2
COUNTS = [(U2PL, 16, 22), (U2PL, 32, 87), (CPS, 16, 20), (CPS, 40, 125), (1e-6, 16, 1)]


def kept(logits, loss):
    """How many pixels of each image a loss reaches."""
    (gradient,) = torch.autograd.grad(loss, logits)
    return [int(g.any(0).sum()) for g in gradient]


@pytest.mark.parametrize("min_kept, count", [(0, 16), (16, 16), (17, 48), (48, 48), (49, 64)])
def test_ohem_keeps_all_pixels_tied_with_the_last_one(min_kept, count):
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0, :2] = -2.0  # 16 hard pixels; 32 tied; 16 easy ones
    logits[:, 0, 6:] = 3.0
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    loss = supervised.ohem_cross_entropy(logits.requires_grad_(), label, 0.0, min_kept)
    assert kept(logits, loss) == [count]


@pytest.mark.parametrize("share, crop, count", COUNTS)
def test_ohem_keeps_a_share_of_the_pixels_of_a_crop(share, crop, count):
    """U2PL's L_s; the auxiliary head alike, times its weight."""
    label = torch.randint(4, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = drawn(2, 4, 16, 16) + 40 * F.one_hot(label, 4).movedim(3, 1)  # all are easy
    args = SimpleNamespace(aux_weight=0.4, ohem_kept=share, crop_size=crop)
    # of different losses, so that none tie with the last one
    logits = (logits / 10).requires_grad_()
    loss = supervised.supervised_loss({"logits": logits}, label, args)
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
    nets = [drawn(2, 4, 6, 5, seed=seed) for seed in range(4)]
    flat = [torch.zeros(2, 4, 6, 5, dtype=torch.float64)] * 2  # 1/4: no rounding
    inside = drawn(2, 6, 5, seed=4) > -1
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
    logits = [drawn(2, 5, 13, 10, seed=seed, spread=0.5) for seed in (1, 2)]
    label = torch.randint(5, (2, 13, 10), generator=torch.Generator().manual_seed(3))
    mask = drawn(2, 13, 10, seed=3) > 0
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


def constant(logits):
    """A network that returns these logits."""
    net = nn.Identity()
    net.register_forward_hook(lambda *_: {"logits": logits})
    return net


def test_the_average_is_of_probabilities_not_of_logits():
    """Also of certain networks, of which windows are summed: the surer one decides."""
    logits = [drawn(1, 11, 1, 1, seed=seed, spread=9.0) for seed in (1, 2, 3)]
    average = cps_fpl.Average([constant(z) for z in logits])(torch.zeros(1))["logits"]
    assert torch.allclose(average.exp(), sum(z.softmax(1) for z in logits) / 3, rtol=1e-9)
    z = torch.full((1, 4, 1, 2), -1e4)
    z[0, 1, 0, 0] = 1e4
    z[0, 2, 0, 1] = 2e4
    found = cps_fpl.Average([constant(z), constant(z)])(torch.zeros(1))["logits"]
    assert found.isfinite().all() and found.sum(3).argmax(1) == 2


def test_a_teacher_at_the_threshold_is_certain():
    """AEL [D18]: below it the loss is 0, the weight remains. p is (1/2, 1/2)."""
    inside = torch.ones(1, 1, 1, dtype=torch.bool)
    for threshold, expected in ((0.5, math.log1p(math.exp(-0.5))), (0.51, 0.0)):
        args = fpl_oracle.printed(unsup_loss="ce", threshold=threshold)
        maps = pixel(0.3, -0.2), pixel(0.0, 0.0), inside
        value, parts = ael_fpl.consistency_loss(*maps, torch.ones(2), 1, args)
        assert value.item() == pytest.approx(expected, rel=1e-6) and parts["kept"] == 1


@pytest.mark.parametrize("kind", ["fpl", "soft", "negative"])
def test_a_balance_that_is_only_logged_is_of_every_fourth_pixel_each_way(kind):
    students = torch.randn(2, 1, 5, 9, 10)
    teachers = torch.randn(2, 1, 5, 9, 10)
    inside = torch.rand(1, 9, 10) < 0.7
    args = fpl_oracle.printed(unsup_loss=kind)
    value, logged = cps_fpl.cross_loss(list(students), list(teachers), inside, 0.0, args)
    pseudo = teachers.argmax(2).masked_fill(~inside, 255)[..., ::4, ::4]
    ce = sum(
        cps_fpl.cross_entropy(z[..., ::4, ::4], label)
        for z, label in zip(students, pseudo.flip(0), strict=True)
    )
    assert logged["balance"].item() == pytest.approx((ce / value).item(), rel=1e-5)
