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
from common import Refusal
from common.run import resolve
from oracles import fpl as fpl_oracle
from oracles import mean_teacher as mt_oracle
from oracles import supervised as supervised_oracle

NEAR = dict(rel=1e-9, abs=3e-9)  # float64; torch's softplus leaves out exp(-20) above 20
DYADIC = (0.125, 0.5, 0.125, 0.25)  # all sums are exact, in any type


def pixel(*values, dtype=torch.float32):
    """A map of one pixel, (1, C, 1, 1)."""
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


def drawn(*shape, seed=0, spread=2.0):
    rng = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=rng, dtype=torch.float64)


def everywhere(*shape, value=True):
    return torch.full(shape, value)


# ---- supervised ----

U2PL = 50_000 / 769**2  # the share of a crop that the released OHEM keeps at least
CPS = 50_000 / 800**2
COUNTS = [(U2PL, 16, 22), (U2PL, 32, 87), (U2PL, 40, 135), (CPS, 16, 20), (CPS, 40, 125)]


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


@pytest.mark.parametrize("share, crop, count", [*COUNTS, (0.3, 20, 120), (1e-6, 16, 1)])
def test_ohem_keeps_a_share_of_the_pixels_of_a_crop(share, crop, count):
    label = torch.randint(4, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = drawn(2, 4, 16, 16) + 40 * F.one_hot(label, 4).movedim(3, 1)  # all are easy
    args = SimpleNamespace(aux_weight=0.0, ohem_kept=share, crop_size=crop)
    # of different losses, so that none tie with the last one
    logits = (logits / 10).requires_grad_()
    assert kept(logits, supervised.supervised_loss({"logits": logits}, label, args)) == [count] * 2


# ---- Mean Teacher ----


def test_schedules():
    for step, length in itertools.product(range(31), (0, 1, 20)):
        expected = mt_oracle.rampup(step, length)
        assert mean_teacher.sigmoid_rampup(step, length) == pytest.approx(expected, rel=1e-14)
    assert mean_teacher.sigmoid_rampup(10**6, 20) == mean_teacher.sigmoid_rampup(0, 0) == 1.0
    # [D12]: n / (n + 1), at most the limit; the first update copies the student
    for count, decay in ((0, 0.0), (1, 0.5), (3, 0.75), (97, 97 / 98), (100, 0.99), (10**6, 0.99)):
        assert mean_teacher.ema_decay(count, 0.99) == pytest.approx(decay, rel=1e-15)
    assert mean_teacher.ema_decay(3, 0.6) == 0.6


@pytest.mark.smoke
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("buffers", ["own", "average"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_teacher_moves(decay, buffers, layout):
    """Of BN only the running statistics, and only with `average`; the student stays as it is."""
    nets = [nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)) for _ in range(2)]
    nets[0].to(memory_format=layout)
    for seed, net in enumerate(nets):
        net(drawn(2, 2, 5, 5, seed=seed).float())  # moves BN's statistics
        net[1].weight.data.uniform_()
    before = [{k: x.flatten().tolist() for k, x in net.state_dict().items()} for net in nets]
    mean_teacher.update_teacher(*nets, decay, buffers)
    for name, tensor in nets[1].state_dict().items():
        assert tensor.flatten().tolist() == before[1][name]
        tensor.zero_()  # no memory is shared
    params = dict(nets[0].named_parameters())
    assert all(p.is_leaf and p.grad_fn is None for p in params.values())
    for name, now in nets[0].state_dict().items():
        moves = name in params or (buffers == "average" and "running" in name)
        old, new = (x[name] for x in before)
        expected = mt_oracle.moved(old, new, decay) if moves else old
        # numbers near 1, two float32 roundings; a decay of 0 is a copy bit for bit
        room = 1e-6 if decay else 0
        assert now.flatten().tolist() == pytest.approx(expected, rel=0, abs=room), name


# ---- FPL: Alg. 1, Eq. (7) ----


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_strict_decides_where_a_sum_equals_the_bound(dtype):
    prob = pixel(*DYADIC, dtype=dtype)  # V = 1/2, 3/4, 7/8, 1
    for T, n, reached in ((0.5, 2, 1), (0.75, 3, 2), (0.875, 4, 3)):
        assert cps_fpl.cumulative_classes(prob, T) == n  # strict is the default
        K = max(reached - 1, 1)
        for strict, n_of, K_of in ((True, n, n - 1), (False, reached, K)):
            assert cps_fpl.cumulative_classes(prob, T, strict) == n_of
            assert cps_fpl.fuzzy_positive_assignment(prob, T, strict=strict) == K_of
            args = fpl_oracle.printed(T=T, strict=strict, k_strategy="n")
            assert cps_fpl.k_values(prob, 0.0, args) == n_of
        assert cps_fpl.fuzzy_positive_assignment(prob, T) == n - 1
    for short in ((0.3, 0.3, 0.2, 0.1), (0.0, 0.0, 0.0, 0.0)):  # no sum reaches T: all classes
        assert cps_fpl.cumulative_classes(pixel(*short, dtype=dtype), 0.95) == 4


@pytest.mark.parametrize("T", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_a_bound_outside_0_and_1_is_refused(T):
    prob = pixel(*DYADIC)
    for call in (
        lambda: cps_fpl.fuzzy_positive_assignment(prob, T),
        lambda: cps_fpl.fuzzy_positive_loss(prob, prob, T),
        lambda: cps_fpl.k_values(prob, 0.0, fpl_oracle.printed(T=T, k_strategy="n")),
        lambda: resolve(cps_fpl.Args(dataset="camvid", T=T, unsup_loss="ce"), cps_fpl.preset),
    ):
        with pytest.raises(Refusal, match=f" {T}: a number "):
            call()


def test_without_a_negative_class_eq_7_is_exactly_0():
    """Value and gradient, for logits of any size; a NaN would not be equal."""
    for scale in (1.0, 1e4):
        z = (scale * drawn(2, 5, 6, 5)).requires_grad_()
        every = everywhere(2, 6, 5, value=5)
        loss = cps_fpl.fuzzy_positive_regularization(z, z.detach().softmax(1), every)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert torch.equal(loss, 0 * every.double()) and torch.equal(gradient, 0 * z)


# ---- FPL: Eq. (11), (16) ----

OVER = ["positives", "positives_and_next"]


@pytest.mark.parametrize(
    "first, second, released, printed",  # K = 1, the weights to three digits
    [(0.98, 0.01, 0.994, 0.997), (0.9, 0.05, 0.967, 0.985)]
    + [(0.7, 0.25, 0.781, 0.881), (0.55, 0.4, 0.486, 0.639)],
)
def test_the_printed_and_the_released_mean(first, second, released, printed):
    prob = pixel(second, first, 1 - first - second)
    weights = [
        cps_fpl.adaptive_weight(prob, everywhere(1, 1, 1, value=1), mean_over=m) for m in OVER
    ]
    assert [w.item() for w in weights] == pytest.approx([printed, released], abs=5e-4)
    assert not any(w.requires_grad for w in weights)


def test_fuzzy_positive_loss_is_eq_7_and_eq_11_of_the_teachers_logits():
    z, t = drawn(1, 5, 6, 5), drawn(1, 5, 6, 5, seed=1, spread=0.5)
    t[..., 0] = 0.0  # flat
    prob = t.softmax(1)
    one = dict(k_max=2, strict=False, weight="convex", mean_over="positives_and_next")
    for T, changes in itertools.product((0.6, 0.75), ({}, one)):
        loss, weight = cps_fpl.fuzzy_positive_loss(z, t.requires_grad_(), T, **changes)
        args = fpl_oracle.printed(T=T, **changes)
        K = cps_fpl.k_values(prob, 0.0, args)
        assert torch.equal(loss, cps_fpl.fuzzy_positive_regularization(z, prob, K))
        expected = cps_fpl.adaptive_weight(prob, K, args.weight, args.mean_over)
        assert torch.equal(weight, expected) and not (loss.requires_grad or weight.requires_grad)
    default = cps_fpl.adaptive_weight(prob, K)
    assert torch.equal(default, cps_fpl.adaptive_weight(prob, K, "concave", "positives"))


# ---- supplement Eq. (1), (4) ----


@pytest.mark.parametrize(
    "prob, threshold, negatives",
    [
        ((0.25, 0.125, 0.5, 0.125), 0.5, (0, 1, 3)),  # dyadic: one is at the threshold exactly
        ((0.41, 0.19, 0.21, 0.19), 0.2, (1, 3)),
        ((0.3, 0.3, 0.2001, 0.1999), 0.2, (3,)),
        ((0.25, 0.25, 0.25, 0.25), 0.2, ()),
    ],
)
def test_a_class_is_negative_below_the_threshold_not_at_it(prob, threshold, negatives):
    z = [0.5, -0.3, 0.2, 0.1]
    p = supervised_oracle.softmax(z)
    loss = cps_fpl.negative_loss(pixel(*z, dtype=torch.float64), pixel(*prob), threshold).item()
    assert loss == pytest.approx(-sum(math.log(1 - p[j]) for j in negatives), abs=1e-14)


def test_the_negative_loss_of_a_certain_student_keeps_its_digits():
    """1 - p of the first class is 4e-18, which 1 - p would round to 0."""
    z, q = [40.0, 0.0, -5.0], [0.1, 0.8, 0.1]
    for dtype in (torch.float32, torch.float64):
        loss = cps_fpl.negative_loss(pixel(*z, dtype=dtype), pixel(*q, dtype=dtype)).item()
        assert loss == pytest.approx(fpl_oracle.negative(z, q)[0], rel=1e-6)


# ---- CPS ----


def branches(classes=5, spread=2.0):
    """Logits of two students, leaves, of two teachers, and inside."""
    nets = [drawn(2, classes, 6, 5, seed=seed, spread=spread) for seed in range(4)]
    return [z.requires_grad_() for z in nets[:2]], nets[2:], drawn(2, 6, 5, seed=4) > -1


def test_balance_gives_the_value_of_cross_entropy():
    """[D16]: also where almost everything is learnt."""
    students, teachers, inside = branches()
    learnt = [12 * (t == t.amax(1, True)).double() for t in reversed(teachers)]
    for nets, changes in ((students, {}), (students, dict(weight="none")), (learnt, dict(T=0.1))):
        args = fpl_oracle.printed(balance=True, **changes), fpl_oracle.printed(unsup_loss="ce")
        (value, parts), (ce, _) = (cps_fpl.cross_loss(nets, teachers, inside, 0.0, a) for a in args)
        # quotient and product in float64, of a cross-entropy in float32
        assert value.item() == pytest.approx(ce.item(), rel=1e-14)
        assert nets is students or 0 < parts["unsup"] < 1e-3


def test_where_the_loss_of_fpl_is_exactly_0_the_balance_is_1():
    """No class is negative; the teacher is flat; nothing is inside."""
    students, teachers, inside = branches(4)
    flat = [torch.zeros(2, 4, 6, 5, dtype=torch.float64)] * 2  # 1/4: no rounding
    none = torch.zeros_like(inside)
    for nets, mask, changes in (
        (teachers, inside, dict(k_strategy="n", T=1 - 1e-12)),
        (teachers, inside, dict(k_strategy="n", T=1 - 1e-12, weight="none")),
        (flat, inside, dict()),
        (teachers, none, dict()),
    ):
        for balance in (False, True):
            args = fpl_oracle.printed(balance=balance, **changes)
            value, parts = cps_fpl.cross_loss(students, nets, mask, 0.0, args)
            assert value.item() == parts["unsup"].item() == 0
            assert parts["balance"].item() == 1
            assert not any(g.any() for g in torch.autograd.grad(value, students))


@pytest.mark.parametrize("loss", ["fpl", "ce", "soft", "negative"])
def test_networks_may_teach_and_learn_at_once_but_teach_without_gradient(loss):
    students, _, inside = branches()
    found = []
    for teachers in (students, [z.detach() for z in students]):  # without CutMix, and apart
        args = fpl_oracle.printed(unsup_loss=loss, balance=True)
        value, _ = cps_fpl.cross_loss(students, teachers, inside, 0.0, args)
        found.append(torch.autograd.grad(value, students))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_masked_mean():
    x, mask = drawn(2, 6, 5), drawn(2, 6, 5, seed=1) > 0
    assert cps_fpl.masked_mean(x, mask).item() == pytest.approx(x[mask].mean().item(), rel=1e-12)
    assert cps_fpl.masked_mean(x, torch.zeros_like(mask)) == 0
    assert cps_fpl.masked_mean(mask, everywhere(2, 6, 5)).item() == pytest.approx(
        mask.sum().item() / 60, rel=1e-6
    )
    assert cps_fpl.masked_mean(torch.arange(60).view(2, 6, 5), everywhere(2, 6, 5)) == 29.5


@pytest.mark.parametrize("strategy", ["n-1", "n", "fixed2", "fixed3", "step"])
@pytest.mark.parametrize("truth", [False, True])
def test_watch_reads_every_fourth_pixel_of_both_networks(truth, strategy):
    logits = [drawn(2, 5, 13, 10, seed=seed, spread=0.5).requires_grad_() for seed in (1, 2)]
    label = torch.randint(5, (2, 13, 10), generator=torch.Generator().manual_seed(3))
    label[drawn(2, 13, 10) > 1] = 255
    mask = label != 255 if truth else drawn(2, 13, 10, seed=3) > 0
    kept = [z.movedim(1, -1)[:, ::4, ::4][mask[:, ::4, ::4]].tolist() for z in logits]
    known = 2 * label[:, ::4, ::4][mask[:, ::4, ::4]].tolist() if truth else None
    for k_max, weight in ((0, "concave"), (2, "linear")):
        args = fpl_oracle.printed(k_strategy=strategy, k_max=k_max, weight=weight)
        found = cps_fpl.watch(logits, mask, label if truth else None, 0.5, args)
        expected = fpl_oracle.statistics(sum(kept, []), args, 0.5, known)
        assert {name: x.item() for name, x in found.items()} == pytest.approx(expected, rel=1e-5)
        assert not any(x.requires_grad or x.ndim for x in found.values())
    nothing = cps_fpl.watch(logits, torch.zeros_like(mask), label if truth else None, 0.0, args)
    assert all(x == 0 for x in nothing.values())


class Constant(nn.Module):
    """A network that returns these logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return {"logits": self.logits + 0 * x}


def test_the_average_is_of_probabilities_not_of_logits():
    """Also of certain networks, of which windows are summed: the surer one decides."""
    for classes in (2, 3, 11):
        logits = [drawn(1, classes, 1, 1, seed=seed, spread=9.0) for seed in (1, 2, 3)]
        nets = [Constant(z) for z in logits]
        average = cps_fpl.Average(nets)
        assert list(average) == nets and not average.eval()[2].training
        found = average(torch.zeros(1))
        expected = fpl_oracle.average([z.flatten().tolist() for z in logits])
        assert found["logits"].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert set(found) == {"logits"} and found["logits"].shape == (1, classes, 1, 1)
    z = torch.full((1, 4, 1, 2), -1e4)
    z[0, 1, 0, 0] = 1e4
    z[0, 2, 0, 1] = 2e4
    found = cps_fpl.Average([Constant(z), Constant(z)])(torch.zeros(1))["logits"]
    assert found.isfinite().all() and found.sum(3).argmax(1) == 2


# ---- AEL, Eq. (12), (13) ----


def consistency(z, t, inside, rate, pooled, args):
    """Returns value, parts and gradient, with a seed that does not matter: rates are 0 or 1."""
    z = z.detach().requires_grad_()
    value, parts = ael_fpl.consistency_loss(z, t, inside, rate, pooled, args)
    return value.item(), parts, torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("loss", ["ce", "fpl"])
@pytest.mark.parametrize(
    "threshold, over", [(0.0, (0, 1)), (0.5, (0, 1)), (0.51, (1,)), (1.0, (1,))]
)
def test_below_the_threshold_the_loss_is_0_and_the_weight_remains(loss, threshold, over):
    # two pixels, p = (1/2, 1/2) and almost 1: 1/2 is at a threshold of 1/2 exactly
    t = torch.tensor([[0.0, 50.0], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    z = torch.tensor([[0.3, 0.1], [-0.2, 0.4]], dtype=torch.float64).view(1, 2, 1, 2)
    args = fpl_oracle.printed(unsup_loss=loss, threshold=threshold, weight="none")
    value, parts, gradient = consistency(z, t, everywhere(1, 1, 2), torch.ones(2), 1, args)
    # Eq. (13): weights 1/4 and 1; K = 1 makes FPL's loss cross-entropy
    ce = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.3))]
    expected = sum((0.25, 1.0)[i] * ce[i] for i in over) / 1.25
    assert value == pytest.approx(expected, rel=1e-12)
    assert bool(gradient[0, :, 0, 0].any()) == (0 in over)
    assert parts["kept"] == 1


@pytest.mark.parametrize("pooled", [1, 2])
@pytest.mark.parametrize("balance", [False, True])
def test_groups_without_a_loss_have_a_balance_of_1_and_groups_of_nothing_count_0(balance, pooled):
    """A flat teacher of four classes: no rounding; nothing inside; nothing kept."""
    z, t = drawn(4, 4, 5, 5), drawn(4, 4, 5, 5, seed=1)
    flat, inside, ones = torch.zeros_like(t), everywhere(4, 5, 5), torch.ones(4)
    args = fpl_oracle.printed(balance=balance)
    for teacher, mask, rate in ((flat, inside, ones), (t, ~inside, ones), (t, inside, 0 * ones)):
        value, parts, gradient = consistency(z, teacher, mask, rate, pooled, args)
        assert value == parts["unsup"] == 0 and torch.equal(gradient, 0 * z)
        assert parts["kept"] == (teacher is flat)
        assert parts["balance"] == 1 or not rate.any()
    alone = consistency(z[:pooled], t[:pooled], inside[:pooled], ones, pooled, args)
    t[pooled:] = 0.0  # the first group has a loss
    value, parts, gradient = consistency(z, t, inside, ones, pooled, args)
    groups = 4 // pooled
    assert value == pytest.approx(alone[0] / groups, rel=1e-12)
    expected = (alone[1]["balance"].item() + groups - 1) / groups
    assert parts["balance"].item() == pytest.approx(expected, rel=1e-12)
    assert gradient[:pooled].any() and not gradient[pooled:].any()


def test_a_rate_of_1_keeps_always_a_rate_of_0_never():
    """Kept where u >= 1 - rate of the student's class, u in [0, 1); detached."""
    z = torch.eye(3)[:, :, None, None].expand(3, 3, 1, 4)  # image c is of class c
    u = torch.tensor([0.0, 0.5, 0.75, 1 - 2.0**-24]).expand(3, 1, 4)
    conf_t = torch.full_like(u, 0.5)
    rate = torch.tensor([1.0, 0.0, 0.25])
    for gamma in (0.0, 1.0, 2.0):
        found = ael_fpl.pixel_weight(conf_t, z.clone().requires_grad_(), rate, u, gamma)
        w = 0.5**gamma
        assert found[:, 0].tolist() == [[w] * 4, [0.0] * 4, [0.0, 0.0, w, w]]
        assert not found.requires_grad


def test_the_equalization_rate_of_banks_at_their_ends():
    for beta in (0.5, 1.0, 2.0):
        assert ael_fpl.equalization_rate(torch.ones(5), beta).tolist() == [0.0] * 5  # no NaN
        above = torch.tensor([1 + 1e-6, 0.5])  # as a rounding may leave it
        assert ael_fpl.equalization_rate(above, beta).tolist() == [0.0, 1.0]
    assert ael_fpl.equalization_rate(torch.zeros(5)).tolist() == [1.0] * 5
