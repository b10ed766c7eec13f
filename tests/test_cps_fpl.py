"""cps_fpl.py: every function of FPL and CPS against loops over scalars; the papers' settings."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import Refusal
from common.run import resolve
from cps_fpl import (
    Args,
    Average,
    adaptive_weight,
    by_rank,
    cross_loss,
    cumulative_classes,
    fuzzy_positive_assignment,
    fuzzy_positive_loss,
    fuzzy_positive_regularization,
    k_values,
    masked_mean,
    negative_loss,
    preset,
    soft_loss,
    toggled_mask,
    watch,
)

CLASSES = [2, 3, 11, 21, 81, 200]
TEACHERS = ["random", "diffuse", "one-hot", "flat", "tied"]
BOUNDS = [0.5037, 0.8537, 0.9037, 0.9537]  # T: off V^n = n / C, where a flat teacher leaves no room
WEIGHTS = ["concave", "linear", "convex", "none"]
MEANS = ["positives", "positives_and_next"]
STRATEGIES = ["n-1", "n", "fixed2", "fixed3", "step"]
LOSSES = ["fpl", "ce", "soft", "negative"]
HALVES = [torch.bfloat16, torch.float16]
NO_T = [0.0, 1.0, -1.0, 2.0, float("nan")]

# What a comparison may miss. float32: logits below 10 and some roundings of 6e-8 each, relative.
# float64: torch's softplus is the identity above 20, which leaves out exp(-20) = 2e-9.
NEAR = {torch.float32: dict(rel=5e-6, abs=5e-6), torch.float64: dict(rel=1e-10, abs=3e-9)}


def teacher(kind, classes, seed=0, dtype=torch.float32):
    """Returns logits (2, C, 6, 5) of a teacher; "tied" ones take three values."""
    rng = torch.Generator().manual_seed(1000 * seed + 10 * classes + TEACHERS.index(kind))
    z = torch.randn(2, classes, 6, 5, generator=rng, dtype=torch.float64)
    spread = {"random": 2.0, "diffuse": 0.5, "one-hot": 1000.0, "flat": 0.0, "tied": 1.0}[kind]
    return ((z.round().clamp(-1, 1) if kind == "tied" else z) * spread).to(dtype)


def student(classes, seed=0, dtype=torch.float32):
    return teacher("random", classes, 77 + seed, dtype).requires_grad_()


def any_K(classes, seed=0):
    """Returns K (2, 6, 5), anything from 1 to C."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, classes + 1, (2, 6, 5), generator=rng)


def one(*values, dtype=torch.float32):
    """Returns a map of one pixel, (1, C, 1, 1)."""
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


def pixels(x):
    """Returns the channels of every pixel as floats, in the order of flatten() on (B, H, W)."""
    return x.detach().movedim(1, -1).flatten(0, -2).tolist()


def fpl_args(**changes):
    """Returns the flags that the functions read, as printed in the paper."""
    flags = dict(T=0.9, k_max=0, strict=True, weight="concave", mean_over="positives")
    return SimpleNamespace(
        **flags | dict(k_strategy="n-1", unsup_loss="fpl", balance=False) | changes
    )


# ---- oracles: the papers' formulas for one pixel, in float64 ----


def scalar_softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / math.fsum(e) for v in e]


def scalar_order(p):
    """Classes from likely to unlikely; of equal ones the lowest first."""
    return sorted(range(len(p)), key=lambda c: (-p[c], c))


def scalar_n(p, T, strict=True):
    """Alg. 1, first half, line for line."""
    C, p = len(p), sorted(p, reverse=True)
    V = p[0]
    for n in range(1, C + 1):
        if (V > T if strict else V >= T) or n == C:
            return n
        V = V + p[n]


def scalar_K(p, T, strict=True, k_max=0):
    K = max(scalar_n(p, T, strict) - 1, 1)
    return min(K, k_max) if k_max else K


def scalar_strategy(name, p, progress, args):
    """Supplement Table 5; never more classes than there are, nor than k_max."""
    if name in ("n", "n-1"):
        n = scalar_n(p, args.T, args.strict)
        K = n if name == "n" else max(n - 1, 1)
    else:
        third = 0 if progress < 1 / 3 else 1 if progress < 2 / 3 else 2
        K = {"fixed2": 2, "fixed3": 3, "step": 3 - third}[name]
    return min(K, len(p), args.k_max or len(p))


def undecided(p, T):
    """True if a rounding of V^n can change n."""
    return any(abs(V - T) < 1e-6 for V in itertools.accumulate(sorted(p, reverse=True)))


def undecided_order(z, K):
    """True if a rounding of the softmax can change the K likeliest classes; exact ties do not."""
    z = sorted(z, reverse=True)
    return K < len(z) and 0 < z[K - 1] - z[K] < 1e-6


def scalar_fpr(z, Y):
    """Eq. (7)."""
    positives = math.fsum(math.exp(-z[i]) for i in Y)
    negatives = math.fsum(math.exp(z[j]) for j in range(len(z)) if j not in Y)
    return math.log1p(positives * negatives)


def scalar_fpr_gradient(z, Y):
    """Eq. (8)."""
    positives = math.fsum(math.exp(-z[i]) for i in Y)
    negatives = math.fsum(math.exp(z[j]) for j in range(len(z)) if j not in Y)
    bottom = 1 + negatives * positives
    return [
        -negatives * math.exp(-z[c]) / bottom if c in Y else positives * math.exp(z[c]) / bottom
        for c in range(len(z))
    ]


def scalar_weight(p, K, kind, mean_over="positives"):
    """Eq. (11) with A = 50, Eq. (16); without a negative class its probability is 0."""
    p = sorted(p, reverse=True) + [0.0]
    last = K + (mean_over == "positives_and_next")
    mean, rest = math.fsum(p[:last]) / last, p[K]
    if kind == "concave":
        return math.log(1 + 50 * (mean - rest)) / math.log(1 + 50 * mean)
    bottom = {"linear": mean, "convex": mean + 4 * rest, "none": None}[kind]
    return 1.0 if bottom is None else (mean - rest) / bottom


def scalar_soft(z, q):
    """Supplement Eq. (4), and its gradient p - q."""
    p = scalar_softmax(z)
    value = math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
    return value, [a - b for a, b in zip(p, q, strict=True)]


def scalar_negative(z, q, threshold=0.2):
    """Supplement Eq. (1), and its gradient; 1 - p^j is the sum of the other classes."""
    top = max(z)
    e = [math.exp(v - top) for v in z]
    value, gradient, total = 0.0, [0.0] * len(z), math.fsum(e)
    for j in range(len(z)):
        if q[j] < threshold:
            others = math.fsum(e[:j] + e[j + 1 :])
            value += math.log(total) - math.log(others)
            for c in range(len(z)):
                gradient[c] += e[c] / total - (e[c] / others if c != j else 0.0)
    return value, gradient


def scalar_unsup(z, z_t, progress, args):
    """Returns (loss of a pixel, its gradient, cross-entropy with the pseudo label)."""
    q, p = scalar_softmax(z_t), scalar_softmax(z)
    best = scalar_order(z_t)[0]
    ce, ce_gradient = -math.log(p[best]), [v - (c == best) for c, v in enumerate(p)]
    if args.unsup_loss == "ce":
        return ce, ce_gradient, ce
    if args.unsup_loss == "fpl":
        K = scalar_strategy(args.k_strategy, q, progress, args)
        Y = scalar_order(z_t)[:K]
        w = scalar_weight(q, K, args.weight, args.mean_over)
        return w * scalar_fpr(z, Y), [w * g for g in scalar_fpr_gradient(z, Y)], ce
    return *(scalar_soft if args.unsup_loss == "soft" else scalar_negative)(z, q), ce


# ---- Alg. 1 ----


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("classes", CLASSES)
def test_n_and_k_are_those_of_algorithm_1(classes, dtype):
    total = skipped = 0
    for kind, T in itertools.product(TEACHERS, BOUNDS):
        prob_t = teacher(kind, classes, dtype=dtype).softmax(1)
        n, K = cumulative_classes(prob_t, T), fuzzy_positive_assignment(prob_t, T)
        assert n.dtype == K.dtype == torch.int64 and n.shape == K.shape == (2, 6, 5)
        for p, *got in zip(pixels(prob_t), n.flatten().tolist(), K.flatten().tolist(), strict=True):
            total += 1
            if undecided(p, T):
                skipped += 1
            else:
                assert got == [scalar_n(p, T), scalar_K(p, T)]
    assert skipped < 0.001 * total


def test_n_is_the_number_of_classes_where_no_sum_exceeds_the_bound():
    for p in ([0.3, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0]):  # no sum reaches 0.95
        assert cumulative_classes(one(*p), 0.95).item() == scalar_n(p, 0.95) == 4


@pytest.mark.parametrize("classes", CLASSES)
def test_k_max_caps_k_and_0_does_not(classes):
    prob_t = teacher("diffuse", classes).softmax(1)
    for k_max in (0, 1, 2, 3, 5, 500):
        K = fuzzy_positive_assignment(prob_t, 0.9537, k_max=k_max)
        assert K.flatten().tolist() == [scalar_K(p, 0.9537, k_max=k_max) for p in pixels(prob_t)]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [*NEAR, *HALVES])
def test_strict_decides_where_a_sum_equals_the_bound(dtype):
    prob_t = one(0.125, 0.5, 0.125, 0.25, dtype=dtype)  # dyadic: all sums are exact
    for T, n, n_reached in ((0.5, 2, 1), (0.75, 3, 2), (0.875, 4, 3)):
        assert cumulative_classes(prob_t, T).item() == n
        assert cumulative_classes(prob_t, T, strict=True).item() == n
        assert cumulative_classes(prob_t, T, strict=False).item() == n_reached
        K, reached = (fuzzy_positive_assignment(prob_t, T, strict=s) for s in (True, False))
        assert (K.item(), reached.item()) == (n - 1, max(n_reached - 1, 1))
        assert fuzzy_positive_assignment(prob_t, T).item() == n - 1


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_k_lies_between_1_and_all_but_one_and_grows_with_the_bound(classes, kind):
    prob_t, last = teacher(kind, classes).softmax(1), None
    for T in (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-6):
        K = fuzzy_positive_assignment(prob_t, T)
        assert K.min() >= 1 and K.max() <= classes - 1
        assert last is None or (K >= last).all()
        last = K
    # the largest bound leaves no class but the last to the negatives, or there is one class alone
    assert last.max() == (1 if kind == "one-hot" else classes - 1)


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_likeliest_negative_lies_within_the_bounds_of_eq_10(classes, kind):
    prob_t = teacher(kind, classes, dtype=torch.float64).softmax(1)
    for T in BOUNDS:
        n, K = cumulative_classes(prob_t, T), fuzzy_positive_assignment(prob_t, T)
        maps = (x.flatten().tolist() for x in (n, K))
        for p, n_, K_ in zip(pixels(prob_t), *maps, strict=True):
            p.sort(reverse=True)
            # flat: both sides are 1 / C, one of them by a sum of K terms in float64
            assert p[K_] <= math.fsum(p[:K_]) / K_ + 1e-15
            if n_ > 1:  # a first class above T keeps K = 1, and the rest has less than 1 - T
                # supplement Eq. (8) for K = n - 1; a sum of C terms in float64
                assert math.fsum(p[K_:]) >= 1 - T - 1e-12
                assert p[K_] >= (1 - T) / (classes - K_) - 1e-14
            # supplement Eq. (7): with K = n less than that can be left
            assert n_ == classes or math.fsum(p[n_:]) < 1 - T + 1e-12


@pytest.mark.parametrize("classes", [4, 5, 11, 21, 81, 200])
def test_the_released_k_is_algorithm_1_capped_at_3(classes):
    for kind, T in itertools.product(TEACHERS, BOUNDS):
        prob_t = teacher(kind, classes, 1, torch.float64).softmax(1)
        top = prob_t.topk(3, dim=1).values
        c2, c3 = top[:, :2].sum(1), top.sum(1)
        released = 1 + (c2 < T).long() + (c3 < T).long()
        assert torch.equal(fuzzy_positive_assignment(prob_t, T, k_max=3, strict=False), released)


@pytest.mark.parametrize("dtype", HALVES)
def test_alg_1_adds_half_precision_in_float32(dtype):
    prob_t = teacher("diffuse", 200).softmax(1).to(dtype)
    for T in BOUNDS:
        n = cumulative_classes(prob_t, T)
        assert torch.equal(n, cumulative_classes(prob_t.float(), T))
        # 200 probabilities, each rounded by a relative 2^-9 or less: V^n by at most as much
        exact = (prob_t.double().sort(dim=1, descending=True).values.cumsum(1) <= T).sum(1) + 1
        assert torch.equal(n, exact.clamp(max=200))


@pytest.mark.parametrize("T", NO_T)
def test_a_bound_outside_0_and_1_is_refused_by_every_function_that_uses_it(T):
    prob_t = one(0.5, 0.3, 0.2)
    logits, inside = [prob_t, prob_t], torch.ones(1, 1, 1, dtype=torch.bool)
    calls = [
        lambda: cumulative_classes(prob_t, T),
        lambda: fuzzy_positive_assignment(prob_t, T),
        lambda: fuzzy_positive_loss(prob_t, prob_t, T),
        lambda: k_values(prob_t, 0.0, fpl_args(T=T)),
        lambda: k_values(prob_t, 0.0, fpl_args(T=T, k_strategy="n")),
        lambda: cross_loss(logits, logits, inside, 0.0, fpl_args(T=T)),
        lambda: watch(logits, inside, None, 0.0, fpl_args(T=T)),
        lambda: resolve(Args(T=T), preset),
        lambda: resolve(Args(dataset="cityscapes", split="1/8", T=T, unsup_loss="ce"), preset),
    ]
    for call in calls:
        with pytest.raises(Refusal, match=f" {T}: a number "):
            call()


def test_classes_are_ranked_by_probability_and_of_equal_ones_the_lowest_is_first():
    for kind, classes in itertools.product(TEACHERS, CLASSES):
        prob_t = teacher(kind, classes).softmax(1)
        ranked, order = by_rank(prob_t)
        rows = zip(pixels(prob_t), pixels(ranked), pixels(order), strict=True)
        for p, got, classes_of in rows:
            assert classes_of == scalar_order(p) and got == [p[c] for c in classes_of]


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_that_is_ranked_already_gives_the_same(kind):
    prob_t, z, K = teacher(kind, 11).softmax(1), student(11), any_K(11)
    ranked = by_rank(prob_t)
    assert by_rank(ranked) is ranked
    for of in (
        lambda p: cumulative_classes(p, 0.9),
        lambda p: fuzzy_positive_assignment(p, 0.9, k_max=3),
        lambda p: fuzzy_positive_regularization(z, p, K),
        lambda p: adaptive_weight(p, K),
        lambda p: k_values(p, 0.5, fpl_args(k_strategy="step")),
    ):
        assert torch.equal(of(ranked), of(prob_t))


# ---- Eq. (7) ----


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("classes", CLASSES)
def test_fuzzy_positive_regularization_is_eq_7_and_its_gradient_eq_8(classes, dtype):
    for seed, kind in enumerate(TEACHERS):
        prob_t, K = teacher(kind, classes, dtype=dtype).softmax(1), any_K(classes, seed)
        logits_s = student(classes, seed, dtype)
        loss = fuzzy_positive_regularization(logits_s, prob_t, K)
        assert loss.dtype == dtype and loss.shape == K.shape
        (gradient,) = torch.autograd.grad(loss.sum(), logits_s)
        rows = zip(pixels(logits_s), pixels(prob_t), K.flatten().tolist(), strict=True)
        sets = [(z, set(scalar_order(p)[:k])) for z, p, k in rows]
        expected = [scalar_fpr(z, Y) for z, Y in sets]
        assert loss.flatten().tolist() == pytest.approx(expected, **NEAR[dtype])
        expected = sum((scalar_fpr_gradient(z, Y) for z, Y in sets), [])
        assert sum(pixels(gradient), []) == pytest.approx(expected, **NEAR[dtype])


@pytest.mark.parametrize("classes", CLASSES)
def test_the_gradient_in_probabilities_and_its_sum_are_those_of_the_supplement(classes):
    prob_t = teacher("random", classes, dtype=torch.float64).softmax(1)
    logits_s, K = student(classes, dtype=torch.float64), any_K(classes).clamp(max=classes - 1)
    (gradient,) = torch.autograd.grad(
        fuzzy_positive_regularization(logits_s, prob_t, K).sum(), logits_s
    )
    maps = (pixels(logits_s), pixels(prob_t), K.flatten().tolist(), pixels(gradient))
    for z, q, k, got in zip(*maps, strict=True):
        p, Y = scalar_softmax(z), set(scalar_order(q)[:k])
        rest = math.fsum(p[j] for j in range(classes) if j not in Y)
        inverse = math.fsum(1 / p[i] for i in Y)
        bottom = 1 + rest * inverse
        expected = [  # supplement Eq. (5)
            -rest / p[c] / bottom if c in Y else inverse * p[c] / bottom for c in range(classes)
        ]
        # quotients of float64 sums; torch's softplus leaves out exp(-20) = 2e-9 above 20
        assert got == pytest.approx(expected, rel=1e-10, abs=3e-9)
        assert all(got[c] < 0 for c in Y)
        assert all(g > 0 for c, g in enumerate(got) if c not in Y)
        # supplement Eq. (6), and the norm of its Eq. (10)
        positive, negative = (
            math.fsum(g for c, g in enumerate(got) if (c in Y) == here) for here in (True, False)
        )
        assert -positive == pytest.approx(negative, rel=1e-12)
        assert negative == pytest.approx(rest * inverse / bottom, rel=1e-8)
        assert math.hypot(*got) <= math.sqrt(2)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_with_one_positive_it_is_cross_entropy_in_value_and_gradient(classes, kind):
    prob_t, logits_s = teacher(kind, classes).softmax(1), student(classes)
    losses = [
        fuzzy_positive_regularization(logits_s, prob_t, torch.ones(2, 6, 5, dtype=torch.int64)),
        F.cross_entropy(logits_s, prob_t.argmax(1), reduction="none"),  # Eq. (2), (9)
    ]
    gradients = [torch.autograd.grad(loss.sum(), logits_s)[0] for loss in losses]
    # float32, values below 20: two log-sum-exp of numbers below 10
    assert torch.allclose(*losses, rtol=1e-6, atol=4e-6)
    assert torch.allclose(*gradients, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("classes", CLASSES)
def test_with_all_classes_positive_loss_and_gradient_are_0(classes, scale):
    prob_t, K = teacher("random", classes).softmax(1), torch.full((2, 6, 5), classes)
    logits_s = (scale * student(classes)).detach().requires_grad_()
    loss = fuzzy_positive_regularization(logits_s, prob_t, K)
    (gradient,) = torch.autograd.grad(loss.sum(), logits_s)
    assert torch.equal(loss, torch.zeros_like(loss))  # a NaN would not be equal
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("classes", CLASSES)
def test_positives_are_pushed_up_and_negatives_down_by_the_same_total(classes, kind):
    logits_t = teacher(kind, classes)
    prob_t, K = logits_t.softmax(1), any_K(classes, 3)
    # the student agrees, disagrees, or knows nothing of the teacher
    for logits_s in (logits_t.clone(), -logits_t, student(classes).detach()):
        logits_s.requires_grad_()
        loss = fuzzy_positive_regularization(logits_s, prob_t, K)
        (gradient,) = torch.autograd.grad(loss.sum(), logits_s)
        rows = zip(pixels(prob_t), K.flatten().tolist(), pixels(gradient), strict=True)
        for p, k, g in rows:
            Y = scalar_order(p)[:k]
            assert all(g[c] <= 0 for c in Y)
            assert all(v >= 0 for c, v in enumerate(g) if c not in Y)
        # up to 200 float32 numbers whose sizes add to 2 at most; each is exp of a difference of
        # logits, which has lost what lies below their last bit
        rounding = 1e-5 + 1.2e-7 * logits_s.abs().max().item()
        assert gradient.sum(1).abs().max() < rounding
        assert gradient.abs().sum(1).max() <= 2 + rounding


def test_equal_probabilities_are_ordered_by_class():
    cases = [
        ([0.25, 0.25, 0.25, 0.25], 2, {0, 1}),
        ([0.25, 0.25, 0.25, 0.25], 3, {0, 1, 2}),
        ([0.2, 0.3, 0.2, 0.3], 1, {1}),
        ([0.2, 0.3, 0.2, 0.3], 3, {0, 1, 3}),
    ]
    for p, k, Y in cases:
        logits_s = one(0.3, -0.2, 0.1, 0.4).requires_grad_()
        fuzzy_positive_regularization(logits_s, one(*p), torch.full((1, 1, 1), k)).sum().backward()
        (gradient,) = pixels(logits_s.grad)
        assert {c for c in range(4) if gradient[c] < 0} == Y


@pytest.mark.parametrize("classes", CLASSES)
def test_the_smooth_loss_lies_above_its_relu_form_and_close_to_it(classes):
    prob_t, K = teacher("random", classes).softmax(1), any_K(classes).clamp(max=classes - 1)
    for scale in (0.0, 0.1, 1.0, 10.0, 1e4):
        logits_s = scale * student(classes).detach()
        loss = fuzzy_positive_regularization(logits_s, prob_t, K)
        rows = zip(pixels(logits_s), pixels(prob_t), K.flatten().tolist(), strict=True)
        for got, (z, p, k) in zip(loss.flatten().tolist(), rows, strict=True):
            order = scalar_order(p)
            gap = max(z[j] for j in order[k:]) - min(z[i] for i in order[:k])
            relu = max(gap, 0.0)  # Eq. (5)
            # each of Eq. (6) adds log of the number of its terms at most; float32 of relu's size
            rounding = 1e-6 * (1 + relu)
            assert relu - rounding <= got <= relu + math.log1p(k * (classes - k)) + rounding


@pytest.mark.parametrize("classes", CLASSES)
def test_a_constant_added_to_all_logits_of_a_pixel_changes_nothing(classes):
    prob_t, K = teacher("random", classes).softmax(1), any_K(classes)
    logits_s = student(classes, dtype=torch.float64).detach()
    losses = [fuzzy_positive_regularization(logits_s + c, prob_t, K) for c in (0.0, 300.0, -300.0)]
    # float64 sums of numbers near 300
    assert torch.allclose(losses[0], losses[1], atol=1e-11)
    assert torch.allclose(losses[0], losses[2], atol=1e-11)


# ---- Eq. (11), (16) ----


@pytest.mark.smoke
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_weight_is_eq_11_or_16(classes, kind):
    for dtype, mean_over, name in itertools.product(NEAR, MEANS, TEACHERS):
        prob_t = teacher(name, classes, 2, dtype).softmax(1)
        for K in (fuzzy_positive_assignment(prob_t, 0.9037), any_K(classes, 5)):
            weight = adaptive_weight(prob_t, K, kind, mean_over)
            assert weight.dtype == dtype and weight.shape == K.shape
            assert weight.min() >= 0 and weight.max() <= 1
            rows = zip(pixels(prob_t), K.flatten().tolist(), strict=True)
            expected = [scalar_weight(p, k, kind, mean_over) for p, k in rows]
            assert weight.flatten().tolist() == pytest.approx(expected, **NEAR[dtype])


def test_without_a_name_the_weight_is_concave_over_the_positives():
    prob_t, K = teacher("random", 11).softmax(1), any_K(11)
    assert torch.equal(
        adaptive_weight(prob_t, K), adaptive_weight(prob_t, K, "concave", "positives")
    )


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("mean_over", MEANS)
def test_a_certain_teacher_weighs_1_and_a_flat_one_0(classes, mean_over):
    K = torch.ones(1, 1, 1, dtype=torch.int64)
    certain = one(*[0.0] * (classes - 1), 1.0)
    for kind in WEIGHTS:
        assert adaptive_weight(certain, K, kind, mean_over).item() == 1
    for k, kind in itertools.product({1, classes // 2, classes - 1}, WEIGHTS[:3]):
        flat = torch.full((1, classes, 1, 1), 1 / classes)
        # the mean of up to 200 equal float32 numbers is off by a few 1e-7 of itself
        assert adaptive_weight(flat, K * k, kind, mean_over).item() < 2e-6
    assert adaptive_weight(flat, K, "none", mean_over).item() == 1


def test_a_mean_that_rounding_has_put_below_the_likeliest_negative_weighs_0():
    p = one(0.25, 0.25 + 2e-6, 0.1)  # as a sum of equal probabilities may come out
    for mean_over, kind in itertools.product(MEANS, WEIGHTS[:3]):
        weight = adaptive_weight((p, None), torch.ones(1, 1, 1, dtype=torch.int64), kind, mean_over)
        assert weight.item() == 0


@pytest.mark.parametrize("mean_over", MEANS)
@pytest.mark.parametrize("classes", CLASSES)
def test_without_a_negative_class_the_weight_is_1(classes, mean_over):
    prob_t, K = teacher("diffuse", classes).softmax(1), torch.full((2, 6, 5), classes)
    for kind in WEIGHTS:
        assert (adaptive_weight(prob_t, K, kind, mean_over) == 1).all()


def weight_curve(kind, mean, count=40):
    """Returns the weights of K = 2 positives with this mean for rising likeliest negatives."""
    rest = torch.linspace(0, mean, count + 2, dtype=torch.float64)[1:-1]
    top = torch.full_like(rest, mean)
    prob_t = torch.stack([top, top, rest, torch.zeros_like(rest)]).view(1, 4, 1, count)
    return adaptive_weight(prob_t, torch.full((1, 1, count), 2), kind)[0, 0]


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.3, 0.45])
def test_the_weight_falls_with_the_likeliest_negative_concave_above_linear_above_convex(mean):
    concave, linear, convex = (weight_curve(kind, mean) for kind in WEIGHTS[:3])
    for curve in (concave, linear, convex):
        assert 0 < curve.min() and curve.max() < 1
        assert (curve.diff() < 0).all()
    assert (concave > linear).all() and (linear > convex).all()
    assert (concave.diff().diff() < 0).all() and (convex.diff().diff() > 0).all()
    assert linear.diff().diff().abs().max() < 1e-14  # float64 numbers below 1


@pytest.mark.smoke
def test_the_printed_and_the_released_mean_give_the_audits_weights():
    # audit, section 3, row 4: two probabilities, weight over K + 1 and over K classes; K = 1
    cases = [
        (0.98, 0.01, 0.994, 0.997),
        (0.90, 0.05, 0.967, 0.985),
        (0.70, 0.25, 0.781, 0.881),
        (0.55, 0.40, 0.486, 0.639),
    ]
    for p1, p2, released, printed in cases:
        prob_t, K = one(p2, p1, 1 - p1 - p2), torch.ones(1, 1, 1, dtype=torch.int64)
        got = [adaptive_weight(prob_t, K, mean_over=m).item() for m in MEANS]
        assert got == pytest.approx([printed, released], abs=5e-4)  # three printed digits


# ---- fuzzy_positive_loss ----


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("classes", CLASSES)
def test_loss_and_weight_come_from_the_teachers_probabilities(classes, dtype):
    total = skipped = 0
    recipes = [dict(), dict(k_max=3, strict=False, mean_over="positives_and_next")]
    for (seed, kind), flags in itertools.product(enumerate(TEACHERS), recipes):
        logits_t, logits_s = teacher(kind, classes, 3, dtype), student(classes, seed, dtype)
        loss, weight = fuzzy_positive_loss(logits_s, logits_t, 0.8537, **flags)
        assert loss.dtype == weight.dtype == dtype and loss.shape == weight.shape == (2, 6, 5)
        maps = (pixels(logits_s), pixels(logits_t), *(pixels(x[:, None]) for x in (loss, weight)))
        for z, z_t, (got,), (w,) in zip(*maps, strict=True):
            p = scalar_softmax(z_t)
            K = scalar_K(p, 0.8537, k_max=flags.get("k_max", 0))
            total += 1
            if undecided(p, 0.8537) or undecided_order(z_t, K):
                skipped += 1
                continue
            Y = set(scalar_order(z_t)[:K])
            assert got == pytest.approx(scalar_fpr(z, Y), **NEAR[dtype])
            expected = scalar_weight(p, K, "concave", flags.get("mean_over", "positives"))
            assert w == pytest.approx(expected, **NEAR[dtype])
    assert skipped < 0.001 * total


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("mean_over", MEANS)
def test_flags_reach_the_parts_of_the_loss(kind, mean_over):
    logits_t, logits_s = teacher("diffuse", 11), student(11)
    prob_t = logits_t.softmax(1)
    for T, k_max in itertools.product((0.8, 0.95), (0, 1, 2)):
        loss, weight = fuzzy_positive_loss(
            logits_s, logits_t, T, k_max=k_max, weight=kind, mean_over=mean_over
        )
        K = fuzzy_positive_assignment(prob_t, T, k_max=k_max)
        assert torch.equal(loss, fuzzy_positive_regularization(logits_s, prob_t, K))
        assert torch.equal(weight, adaptive_weight(prob_t, K, kind, mean_over))


@pytest.mark.parametrize("flags, K", [(dict(), 2), (dict(strict=True), 2), (dict(strict=False), 1)])
def test_strict_reaches_the_loss_and_is_the_default(flags, K):
    logits_s = one(0.3, -0.2, 0.1, 0.4)
    logits_t = one(0.25, 0.25, 0.25, 0.25)  # V = 1/4, 1/2, 3/4, 1, all exact
    loss, _ = fuzzy_positive_loss(logits_s, logits_t, 0.5, **flags)
    expected = fuzzy_positive_regularization(logits_s, logits_t, torch.full((1, 1, 1), K))
    assert torch.equal(loss, expected)


@pytest.mark.smoke
def test_no_gradient_reaches_the_teacher():
    logits_s, logits_t = student(11), teacher("diffuse", 11).requires_grad_()
    for kind in WEIGHTS:
        loss, weight = fuzzy_positive_loss(logits_s, logits_t, 0.9, weight=kind)
        assert not weight.requires_grad
        (loss * weight).sum().backward()
    assert logits_t.grad is None
    assert (logits_s.grad != 0).any(1).all()


def test_a_network_that_teaches_itself_learns_as_a_student_alone():
    logits, copy = student(11), student(11)
    loss, weight = fuzzy_positive_loss(logits, logits, 0.9)
    (loss * weight).sum().backward()
    loss, weight = fuzzy_positive_loss(copy, copy.detach().clone(), 0.9)
    (loss * weight).sum().backward()
    assert torch.equal(logits.grad, copy.grad)


# ---- supplement Eq. (1), (4) ----


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("of, scalar", [(soft_loss, scalar_soft), (negative_loss, scalar_negative)])
def test_soft_and_negative_loss_are_the_supplements(of, scalar, classes, dtype):
    for seed, kind in enumerate(TEACHERS):
        prob_t, logits_s = (
            teacher(kind, classes, dtype=dtype).softmax(1),
            student(classes, seed, dtype),
        )
        logits_s = logits_s[:, :, :2].detach().requires_grad_()  # the gradient's loop is C^2 long
        prob_t = prob_t[:, :, :2]
        loss = of(logits_s, prob_t)
        assert loss.dtype == dtype and loss.shape == (2, 2, 5)
        (gradient,) = torch.autograd.grad(loss.sum(), logits_s)
        rows = zip(pixels(logits_s), pixels(prob_t), strict=True)
        values, gradients = zip(*(scalar(z, q) for z, q in rows), strict=True)
        assert loss.flatten().tolist() == pytest.approx(list(values), **NEAR[dtype])
        assert sum(pixels(gradient), []) == pytest.approx(sum(gradients, []), **NEAR[dtype])


@pytest.mark.parametrize("classes", CLASSES)
def test_the_soft_loss_is_a_divergence(classes):
    logits_s, logits_t = student(classes, dtype=torch.float64), teacher("random", classes)
    assert (soft_loss(logits_s, logits_t.double().softmax(1)) > 0).all()
    # sums of float64 numbers below 1
    assert soft_loss(logits_s, logits_s.softmax(1)).abs().max() < 1e-12
    assert (
        soft_loss(logits_s, one(1.0, *[0.0] * (classes - 1)).expand(2, -1, 6, 5)).isfinite().all()
    )


def test_a_class_is_negative_below_the_threshold_of_the_teacher_not_at_it():
    logits_s = one(0.5, -0.3, 0.2, 0.1, dtype=torch.float64)
    p = scalar_softmax([0.5, -0.3, 0.2, 0.1])
    for prob_t, threshold, negatives in (
        ([0.25, 0.125, 0.5, 0.125], 0.5, (0, 1, 3)),  # dyadic: one is at the threshold exactly
        ([0.41, 0.19, 0.21, 0.19], 0.2, (1, 3)),
        ([0.3, 0.3, 0.2001, 0.1999], 0.2, (3,)),
        ([0.25, 0.25, 0.25, 0.25], 0.2, ()),
    ):
        loss = negative_loss(logits_s, one(*prob_t), threshold).item()
        # float64 logarithms of numbers near 1
        assert loss == pytest.approx(-sum(math.log(1 - p[j]) for j in negatives), abs=1e-14)
        assert threshold != 0.2 or negative_loss(logits_s, one(*prob_t)).item() == loss


@pytest.mark.parametrize("dtype", NEAR)
def test_the_negative_loss_keeps_its_digits_for_a_student_that_is_certain(dtype):
    z = [40.0, 0.0, -5.0]
    loss = negative_loss(one(*z, dtype=dtype), one(0.1, 0.8, 0.1, dtype=dtype)).item()
    # 1 - p of the first class is 4e-18, which 1 - p would round to 0
    assert loss == pytest.approx(scalar_negative(z, [0.1, 0.8, 0.1])[0], rel=1e-6)


@pytest.mark.parametrize("name", ["fpl", "soft", "negative"])
def test_gradients_pass_gradcheck(name):
    rng = torch.Generator().manual_seed(4)
    z, q = torch.randn(2, 1, 5, 2, 3, generator=rng, dtype=torch.float64)
    K, prob_t = torch.tensor([[[1, 2, 3], [4, 5, 2]]]), q.softmax(1)
    of = {
        "fpl": lambda z: fuzzy_positive_regularization(z, prob_t, K),
        "soft": lambda z: soft_loss(z, prob_t),
        "negative": lambda z: negative_loss(z, prob_t),
    }[name]
    assert torch.autograd.gradcheck(of, z.requires_grad_())


# ---- precision ----


def losses_of(logits_s, prob_t, K):
    """Returns the three losses of Table 4 and the weight."""
    return (
        fuzzy_positive_regularization(logits_s, prob_t, K),
        soft_loss(logits_s, prob_t),
        negative_loss(logits_s, prob_t),
        adaptive_weight(prob_t, K),
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("classes", [2, 21, 200])
def test_half_precision_is_widened_to_float32_before_anything_is_computed(classes, dtype):
    logits_s, prob_t = student(classes).detach().to(dtype), teacher("random", classes).softmax(1)
    halves = losses_of(logits_s, prob_t.to(dtype), any_K(classes))
    wide = losses_of(logits_s.float(), prob_t.to(dtype).float(), any_K(classes))
    for half, full in zip(halves, wide, strict=True):
        assert half.dtype == torch.float32 and torch.equal(half, full)
    logits_t = teacher("random", classes).to(dtype)
    half = fuzzy_positive_loss(logits_s, logits_t, 0.9)
    full = fuzzy_positive_loss(logits_s.float(), logits_t.float(), 0.9)
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("classes", [2, 21, 200])
def test_half_precision_logits_give_nearly_the_loss_of_float32(classes, dtype):
    logits_s, prob_t = student(classes).detach(), teacher("random", classes).softmax(1)
    half, full = (
        fuzzy_positive_regularization(z, prob_t, any_K(classes))
        for z in (logits_s.to(dtype), logits_s)
    )
    # the gradient's sizes add to 2 at most; a logit moves by half an eps of itself at most
    bound = 2 * logits_s.abs().max() * torch.finfo(dtype).eps / 2
    assert 0 < (half - full).abs().max() <= bound + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 21, 200])
def test_logits_of_ten_thousand_give_finite_losses_and_gradients(classes, dtype):
    for logits in (1e4 * student(classes).detach().sign(), 5e3 * student(classes).detach()):
        logits_s = logits.to(dtype).requires_grad_()
        for logits_t in (logits_s.detach(), -logits_s.detach(), logits_s.detach().roll(1, 1)):
            prob_t = logits_t.float().softmax(1)
            loss, weight = fuzzy_positive_loss(logits_s, logits_t, 0.9)
            for x in (loss * weight, *losses_of(logits_s, prob_t, any_K(classes))[:3]):
                (gradient,) = torch.autograd.grad(x.sum(), logits_s)
                assert x.isfinite().all() and gradient.isfinite().all()
            assert weight.isfinite().all()
        assert loss.max() > 1e3  # a teacher that disagrees is felt


# ---- K by strategy ----


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("classes", [2, 3, 11, 200])
def test_k_follows_its_strategy_and_no_cap_is_exceeded(strategy, classes):
    prob_t = teacher("diffuse", classes).softmax(1)
    for k_max, progress in itertools.product((0, 1, 2, 3), (0.0, 0.3, 0.34, 0.66, 0.67, 0.999)):
        args = fpl_args(T=0.9037, k_max=k_max, k_strategy=strategy)
        K = k_values(prob_t, progress, args)
        assert K.dtype == torch.int64 and K.shape == (2, 6, 5)
        expected = [scalar_strategy(strategy, p, progress, args) for p in pixels(prob_t)]
        assert K.flatten().tolist() == expected


@pytest.mark.parametrize("total", [3, 30, 600, 39_680, 44_640])
def test_the_step_strategy_takes_a_class_less_with_every_third_of_the_steps(total):
    prob_t = teacher("random", 4)[:1, :, :1, :1].softmax(1)
    thirds = [math.ceil(total / 3), math.ceil(2 * total / 3)]
    for step in {0, *thirds, *(t - 1 for t in thirds), total - 1}:
        expected = 3 - sum(step >= t for t in thirds)
        K = k_values(prob_t, step / total, fpl_args(k_strategy="step"))
        assert K.flatten().tolist() == [expected]


@pytest.mark.parametrize("strategy, K, reached", [("n-1", 2, 1), ("n", 3, 2)])
def test_strict_reaches_the_strategies(strategy, K, reached):
    prob_t = one(0.125, 0.5, 0.125, 0.25)  # dyadic: 0.75 is reached exactly
    for strict, expected in ((True, K), (False, reached)):
        args = fpl_args(T=0.75, strict=strict, k_strategy=strategy)
        assert k_values(prob_t, 0.0, args).item() == expected


# ---- cross_loss ----


def branches(seed, classes=5, dtype=torch.float64, kind="random"):
    """Returns logits of two students, leaves, and of two teachers, and inside."""
    students = [student(classes, 10 * seed + i, dtype) for i in (1, 2)]
    teachers = [teacher(kind, classes, 10 * seed + i, dtype).requires_grad_() for i in (3, 4)]
    rng = torch.Generator().manual_seed(seed)
    return students, teachers, torch.rand(2, 6, 5, generator=rng) < 0.7


def check_cross_loss(seed, args, progress=0.0, classes=5, dtype=torch.float64, kind="random"):
    """Compares value, parts and gradients of cross_loss with the loop over scalars.

    Cross-entropy is computed in float32 whatever the logits are, and so is the balance.
    """
    students, teachers, inside = branches(seed, classes, dtype, kind)
    loss, parts = cross_loss(students, teachers, inside, progress, args)
    loss.backward()
    assert set(parts) == {"unsup", "balance"}
    assert not any(x.requires_grad or x.ndim for x in parts.values())
    unsup = ce = 0.0
    gradients = []
    for own, other in ((0, 1), (1, 0)):
        here = pixels(inside[:, None])
        rows = zip(pixels(students[own]), pixels(teachers[other]), here, strict=True)
        results = [scalar_unsup(z, z_t, progress, args) if hit else None for z, z_t, (hit,) in rows]
        count = sum(result is not None for result in results)
        unsup += math.fsum(result[0] for result in results if result) / count
        ce += math.fsum(result[2] for result in results if result) / count
        none = [0.0] * classes
        gradients.append([[g / count for g in result[1]] if result else none for result in results])
    dtype = torch.float32 if args.unsup_loss == "ce" else dtype
    assert parts["unsup"].item() == pytest.approx(unsup, **NEAR[dtype])
    assert parts["balance"].item() == pytest.approx(ce / unsup, **NEAR[torch.float32])
    balanced = args.balance and args.unsup_loss == "fpl"
    factor = parts["balance"].item() if balanced else 1.0
    assert loss.item() == pytest.approx(unsup * factor, **NEAR[dtype])
    assert not balanced or loss.item() == pytest.approx(ce, **NEAR[torch.float32])
    assert loss.dtype == dtype and loss.shape == ()
    for branch, rows in zip(students, gradients, strict=True):
        got, expected = sum(pixels(branch.grad), []), [factor * g for g in sum(rows, [])]
        assert got == pytest.approx(expected, **NEAR[dtype])
        assert not (branch.grad != 0).any(1)[~inside].any()
    assert all(net.grad is None for net in teachers)


@pytest.mark.smoke
@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_cross_loss_is_a_loop_over_both_directions_and_the_pixels_inside(loss, balance):
    for seed, dtype in enumerate(NEAR):
        check_cross_loss(seed, fpl_args(unsup_loss=loss, balance=balance), dtype=dtype)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("balance", [False, True])
def test_every_strategy_of_k_reaches_the_cross_loss(strategy, balance):
    flags = dict(T=0.8537, balance=balance, k_strategy=strategy)
    for seed, progress in enumerate((0.0, 0.5, 0.8)):
        check_cross_loss(seed, fpl_args(**flags), progress, kind="diffuse")
        check_cross_loss(seed, fpl_args(**flags, k_max=2), progress, kind="diffuse")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("mean_over", MEANS)
def test_weight_and_mean_reach_the_cross_loss(kind, mean_over):
    check_cross_loss(6, fpl_args(weight=kind, mean_over=mean_over))
    official = fpl_args(weight=kind, mean_over=mean_over, k_max=3, strict=False, balance=True)
    check_cross_loss(7, official, kind="diffuse")


def test_the_cross_loss_of_fpl_is_fuzzy_positive_loss_times_its_weight():
    students, teachers, inside = branches(9, kind="diffuse")
    flags = dict(k_max=2, strict=False, weight="linear", mean_over="positives_and_next")
    expected = 0.0
    for logits_s, logits_t in zip(students, reversed(teachers), strict=True):
        loss, weight = fuzzy_positive_loss(logits_s, logits_t, 0.9, **flags)
        expected += (loss * weight)[inside].mean().item()
    got, _ = cross_loss(students, teachers, inside, 0.0, fpl_args(**flags))
    assert got.item() == pytest.approx(expected, rel=1e-12)  # two float64 means


def test_strict_reaches_the_cross_loss():
    students = [one(0.3, -0.2, 0.1, 0.4), one(0.1, 0.2, 0.3, -0.4)]
    teachers, inside = [one(0.0, 0.0, 0.0, 0.0)] * 2, torch.ones(1, 1, 1, dtype=torch.bool)
    flags = dict(T=0.5, weight="none")
    for strict, strategy in itertools.product((True, False), ("n-1", "n")):
        args = fpl_args(**flags, strict=strict, k_strategy=strategy)
        loss, _ = cross_loss(students, teachers, inside, 0.0, args)
        Y = range((2 if strict else 1) + (strategy == "n"))
        expected = sum(scalar_fpr(z, Y) for net in students for z in pixels(net))
        assert loss.item() == pytest.approx(expected, **NEAR[torch.float32])


def test_each_network_is_taught_by_the_other_alone():
    students, teachers, inside = branches(1)
    for name in LOSSES:
        args, losses = fpl_args(unsup_loss=name), []
        for i, change in itertools.product((0, 1), (False, True)):
            changed = [
                net.roll(2, 1) if change and i == n else net for n, net in enumerate(teachers)
            ]
            loss, _ = cross_loss(students, changed, inside, 0.0, args)
            losses.append(torch.autograd.grad(loss, students))
        for i, (before, after) in enumerate((losses[:2], losses[2:])):
            assert torch.equal(before[i], after[i])
            assert not torch.equal(before[1 - i], after[1 - i])


@pytest.mark.parametrize("loss", LOSSES)
def test_what_lies_outside_changes_neither_loss_nor_gradient(loss):
    students, teachers, inside = branches(2)
    args, results = fpl_args(unsup_loss=loss, balance=True), []
    for noise in (0.0, 50.0):
        both = [
            [(z + noise * z.sin() * ~inside[:, None]).detach().requires_grad_() for z in nets]
            for nets in (students, teachers)
        ]
        value, parts = cross_loss(*both, inside, 0.0, args)
        gradients = torch.autograd.grad(value, both[0])
        results.append([value, parts["unsup"], parts["balance"], *gradients])
        assert all((g[(~inside)[:, None].expand_as(g)] == 0).all() for g in gradients)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_pixel_inside_loss_and_gradient_are_0(loss, balance):
    students, teachers, inside = branches(3)
    args = fpl_args(unsup_loss=loss, balance=balance)
    value, parts = cross_loss(students, teachers, torch.zeros_like(inside), 0.0, args)
    gradients = torch.autograd.grad(value, students)
    assert value.item() == parts["unsup"].item() == 0
    assert parts["balance"].item() == 1  # there is nothing to rescale
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_balance_is_1_where_the_loss_is_exactly_0_and_its_cross_entropy_is_not():
    students, teachers, inside = branches(4)
    for kind in ("none", "concave"):  # every class is positive: Eq. (7) has no negative
        args = fpl_args(k_strategy="n", T=1 - 1e-12, weight=kind, balance=True)
        value, parts = cross_loss(students, teachers, inside, 0.0, args)
        ce, _ = cross_loss(students, teachers, inside, 0.0, fpl_args(unsup_loss="ce"))
        assert ce.item() > 0.1 and value.item() == parts["unsup"].item() == 0
        assert parts["balance"].item() == 1 and parts["balance"].shape == ()
        assert not any(g.any() for g in torch.autograd.grad(value, students))


@pytest.mark.parametrize("flags", [dict(), dict(weight="none"), dict(k_strategy="fixed2")])
def test_balance_keeps_the_direction_and_takes_the_value_of_cross_entropy(flags):
    students, teachers, inside = branches(4)
    plain, balanced, ce = (
        cross_loss(students, teachers, inside, 0.0, fpl_args(**flags | more))
        for more in (dict(), dict(balance=True), dict(unsup_loss="ce"))
    )
    # quotient and product in float64, of a cross-entropy in float32
    assert balanced[0].item() == pytest.approx(ce[0].item(), rel=1e-14)
    assert plain[0].item() == plain[1]["unsup"].item() == balanced[1]["unsup"].item()
    assert plain[1]["balance"].item() == balanced[1]["balance"].item() != 1
    gradients = (torch.autograd.grad(x, students) for x, _ in (plain, balanced))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a * plain[1]["balance"], b, rtol=1e-12, atol=1e-15)


def test_balance_takes_the_value_of_cross_entropy_where_almost_everything_is_learnt():
    _, teachers, inside = branches(4)
    students = [12 * (z.detach() == z.amax(1, True)).double() for z in reversed(teachers)]
    args = fpl_args(balance=True, T=0.1), fpl_args(unsup_loss="ce")  # K = 1
    (balanced, parts), (ce, _) = (cross_loss(students, teachers, inside, 0.0, a) for a in args)
    assert 0 < parts["unsup"].item() < 1e-3
    assert balanced.item() == pytest.approx(ce.item(), rel=1e-14)  # quotient and product in float64


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_balance_rescales_no_loss_but_that_of_fpl(loss):
    students, teachers, inside = branches(4)
    results = [
        cross_loss(students, teachers, inside, 0.0, fpl_args(unsup_loss=loss, balance=balance))
        for balance in (False, True)
    ]
    assert results[0][0].item() == results[1][0].item() == results[1][1]["unsup"].item()
    gradients = [torch.autograd.grad(x, students) for x, _ in results]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert loss != "ce" or results[0][1]["balance"].item() == 1


def test_balance_is_finite_where_teachers_are_flat_and_nothing_is_learnt():
    students, _, inside = branches(5, dtype=torch.float32)
    for classes_left in (fpl_args(balance=True), fpl_args(balance=True, k_strategy="n", T=0.99)):
        flat = [torch.zeros(2, 5, 6, 5)] * 2
        value, parts = cross_loss(students, flat, inside, 0.0, classes_left)
        gradients = torch.autograd.grad(value, students)
        assert value.isfinite() and parts["balance"].isfinite()
        assert all(g.isfinite().all() for g in gradients)
    assert value.item() == 0  # all classes are positive


def test_without_cutmix_networks_teach_and_learn_at_once_but_teach_without_gradient():
    students, _, inside = branches(6)
    for loss, balance in itertools.product(LOSSES, (False, True)):
        args = fpl_args(unsup_loss=loss, balance=balance)
        once, _ = cross_loss(students, students, inside, 0.0, args)
        apart, _ = cross_loss(students, [net.detach() for net in students], inside, 0.0, args)
        for a, b in zip(*(torch.autograd.grad(x, students) for x in (once, apart)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_cross_loss_of_half_precision_is_computed_in_float32(loss, dtype):
    students, teachers, inside = branches(8, dtype=torch.float32)
    halves = [[z.detach().to(dtype) for z in nets] for nets in (students, teachers)]
    wide = [[z.float() for z in nets] for nets in halves]
    args = fpl_args(unsup_loss=loss, balance=True)
    half, full = (cross_loss(*nets, inside, 0.0, args) for nets in (halves, wide))
    assert half[0].dtype == torch.float32 and half[0].item() == full[0].item()
    assert half[1]["unsup"].item() == full[1]["unsup"].item()


# ---- watch, masked_mean ----


def test_the_masked_mean_is_a_mean_over_the_mask_and_0_over_nothing():
    rng = torch.Generator().manual_seed(9)
    x, mask = torch.randn(2, 6, 5, generator=rng), torch.rand(2, 6, 5, generator=rng) < 0.4
    values = [
        v for v, hit in zip(x.flatten().tolist(), mask.flatten().tolist(), strict=True) if hit
    ]
    # float32 sum of some twenty numbers near 1
    assert masked_mean(x, mask).item() == pytest.approx(math.fsum(values) / len(values), abs=1e-6)
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0
    count = masked_mean(mask, torch.ones_like(mask))  # a map of True and False
    assert count.item() == pytest.approx(mask.sum().item() / mask.numel(), rel=1e-6)
    counts = torch.arange(60).view(2, 6, 5)  # a map of whole numbers
    assert masked_mean(counts, torch.ones_like(mask)).item() == 29.5


def watched(seed, classes, kind):
    """Returns logits of both networks (2, C, 13, 10), mask and label."""
    rng = torch.Generator().manual_seed(seed)
    spread = {"random": 2.0, "diffuse": 0.5}[kind]
    logits = [spread * torch.randn(2, classes, 13, 10, generator=rng) for _ in (1, 2)]
    label = torch.randint(classes, (2, 13, 10), generator=rng)
    label[torch.rand(2, 13, 10, generator=rng) < 0.3] = 255
    return logits, torch.rand(2, 13, 10, generator=rng) < 0.6, label


def rows_seen(logits, mask, label):
    """Yields (logits, label) of the pixels that watch reads."""
    for net, b, y, x in itertools.product(logits, (0, 1), range(0, 13, 4), range(0, 10, 4)):
        if mask[b, y, x]:
            yield net[b, :, y, x].tolist(), label[b, y, x].item()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["random", "diffuse"])
def test_watch_averages_k_and_weight_over_every_fourth_pixel_of_both_networks(kind, strategy):
    logits, mask, label = watched(1, 5, kind)
    for weight, mean_over, k_max in itertools.product(WEIGHTS, MEANS, (0, 2)):
        args = fpl_args(weight=weight, mean_over=mean_over, k_max=k_max, k_strategy=strategy)
        got = watch(logits, mask, None, 0.5, args)
        probs = [scalar_softmax(z) for z, _ in rows_seen(logits, mask, label)]
        Ks = [scalar_strategy(strategy, p, 0.5, args) for p in probs]
        weights = [scalar_weight(p, K, weight, mean_over) for p, K in zip(probs, Ks, strict=True)]
        expected = {"K": Ks, "K_gt_1": [K > 1 for K in Ks], "weight": weights}
        assert set(got) == set(expected)
        for name, values in expected.items():
            mean = math.fsum(values) / len(values)
            assert got[name].item() == pytest.approx(mean, **NEAR[torch.float32]), name
            assert got[name].shape == ()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_watch_scores_the_likeliest_and_the_positive_classes_where_the_truth_is_known(strategy):
    logits, _, label = watched(2, 5, "diffuse")
    args, seen = fpl_args(k_strategy=strategy), {"pseudo_acc": [], "coverage": []}
    got = watch(logits, label != 255, label, 0.5, args)
    for z, truth in rows_seen(logits, label != 255, label):
        p = scalar_softmax(z)
        rank = scalar_order(p).index(truth)
        seen["pseudo_acc"].append(rank == 0)
        seen["coverage"].append(rank < scalar_strategy(strategy, p, 0.5, args))
    assert set(got) == set(seen)
    for name, hits in seen.items():
        # a quotient of whole numbers in float32
        assert got[name].item() == pytest.approx(sum(hits) / len(hits), rel=1e-6), name
        assert 0 < sum(hits) < len(hits)


def test_watch_keeps_no_graph_and_is_0_over_an_empty_mask():
    logits, mask, label = watched(3, 5, "random")
    logits = [z.requires_grad_() for z in logits]
    for truth in (None, label):
        got = watch(logits, mask, truth, 0.0, fpl_args())
        assert not any(x.requires_grad for x in got.values())
        nothing = watch(logits, torch.zeros_like(mask), truth, 0.0, fpl_args())
        assert all(x.item() == 0 for x in nothing.values())


# ---- CutMix ----


class Scripted:
    """Stands in for a numpy generator: uniform() takes its numbers from a list of shares."""

    def __init__(self, shares):
        self.shares = list(shares)

    def uniform(self, low=0.0, high=1.0):
        return low + (high - low) * self.shares.pop(0)


def scalar_mask(shares, size):
    """CPS's mask_gen: a box has a third of the area, and turns what it covers."""
    mask = [[False] * size for _ in range(size)]
    for k in range(3):
        area, form, top, left = shares[4 * k : 4 * k + 4]
        area = 0.25 + 0.25 * area
        tall = math.exp(form * math.log(area))
        h, w = (round(side * math.sqrt(1 / 3) * size) for side in (tall, area / tall))
        y, x = round((size - h) * top), round((size - w) * left)
        assert 0 <= y <= y + h <= size and 0 <= x <= x + w <= size
        for row in range(y, y + h):
            for column in range(x, x + w):
                mask[row][column] = not mask[row][column]
    return mask


@pytest.mark.smoke
@pytest.mark.parametrize("size", [16, 57, 64])
def test_a_mask_is_three_boxes_that_toggle(size):
    rng, overlaps = np.random.default_rng(size), 0
    for _ in range(40):
        shares = rng.random(12).tolist()
        mask = toggled_mask(script := Scripted(shares), size)
        assert mask.shape == (1, size, size) and mask.dtype == torch.bool
        assert mask[0].tolist() == scalar_mask(shares, size)
        assert not script.shares
        overlaps += mask.sum().item() < 0.23 * size * size  # less than the boxes' areas together
    assert overlaps > 3


def test_boxes_reach_the_borders_and_stay_inside():
    for corner in itertools.product((0.0, 1.0), repeat=4):
        shares = [*corner] * 3  # three equal boxes: two cancel each other
        assert toggled_mask(Scripted(shares), 32)[0].tolist() == scalar_mask(shares, 32)
        rows = toggled_mask(Scripted(shares), 32)[0].any(1)
        assert rows[0 if corner[2] == 0 else 31] and not rows[31 if corner[2] == 0 else 0]


def test_a_thousand_masks_cover_what_the_audit_measured():
    rng = np.random.default_rng(0)
    shares = [toggled_mask(rng, 100).double().mean().item() for _ in range(1000)]
    # audit, section 1.6: mean 0.252, deviation 0.070, from 0.10 to 0.46, of 1000 masks as well. Two
    # such means differ by 0.07 * sqrt(2 / 1000) = 0.0031, two deviations by 0.0022: three of these
    assert abs(np.mean(shares) - 0.252) < 0.0093
    assert abs(np.std(shares) - 0.070) < 0.0066
    assert 0.03 < min(shares) < 0.15 and 0.40 < max(shares) <= 0.5


def test_a_mask_is_a_function_of_the_generators_seed():
    masks = [toggled_mask(np.random.default_rng(seed), 64) for seed in (5, 5, 6)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    rng = np.random.default_rng(5)
    first, second = toggled_mask(rng, 64), toggled_mask(rng, 64)
    assert torch.equal(first, masks[0]) and not torch.equal(first, second)


# ---- Average ----


class Constant(nn.Module):
    """A network that returns these logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return {"logits": self.logits + 0 * x}


@pytest.mark.parametrize("classes", [2, 11])
def test_the_average_is_of_probabilities_not_of_logits(classes):
    logits = [teacher("random", classes, seed) for seed in (1, 2)]
    out = Average([Constant(z) for z in logits])(torch.zeros(1))
    assert set(out) == {"logits"} and out["logits"].shape == logits[0].shape
    for a, b, got in zip(*map(pixels, (*logits, out["logits"])), strict=True):
        pairs = zip(scalar_softmax(a), scalar_softmax(b), strict=True)
        expected = [math.log((p + q) / 2) for p, q in pairs]
        assert got == pytest.approx(expected, **NEAR[torch.float32])
    sure, torn = one(9.0, 0.0, 0.0), one(-9.0, 2.0, 0.0)
    average = Average([Constant(sure), Constant(torn)])
    assert average(torch.zeros(1))["logits"].argmax(1).item() == 0
    assert (sure + torn).argmax(1).item() == 1


def test_the_average_holds_the_networks_themselves():
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    average = Average(nets)
    assert len(average) == 2 and all(a is b for a, b in zip(average, nets, strict=True))
    average.eval()
    assert not any(net.training for net in nets)
    average.train()
    assert all(net.training for net in nets)


# ---- recipes ----

# T of supplement Tables 1 and 2, rows without and with CutMix, columns as printed
TABLE_1 = {
    ("resnet50", False): {"1/32": 0.95, "1/16": 0.9, "1/8": 0.9, "1/4": 0.9},
    ("resnet101", False): {"1/32": 0.95, "1/16": 0.95, "1/8": 0.95, "1/4": 0.9},
    ("resnet50", True): {"1/32": 0.9, "1/16": 0.85, "1/8": 0.85, "1/4": 0.85},
    ("resnet101", True): {"1/32": 0.9, "1/16": 0.85, "1/8": 0.85, "1/4": 0.85},
}
TABLE_2 = {
    ("resnet50", False): {"1/16": 0.9, "1/8": 0.9, "1/4": 0.9},
    ("resnet101", False): {"1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
    ("resnet50", True): {"1/16": 0.95, "1/8": 0.9, "1/4": 0.9},
    ("resnet101", True): {"1/16": 0.9, "1/8": 0.9, "1/4": 0.9},
}
# Table 3; printed over 1/32, 1/16, 1/8, 1/4, which are the main paper's 1/16 to 1/2 of 1,464
TABLE_3 = {"92": 0.95, "183": 0.85, "366": 0.85, "732": 0.85}
CELLS = [
    (dataset, backbone, cutmix, split, T)
    for dataset, table in (("cityscapes", TABLE_1), ("voc_aug", TABLE_2))
    for (backbone, cutmix), row in table.items()
    for split, T in row.items()
]


def flags_of(dataset, split=None, **flags):
    return resolve(Args(dataset=dataset, split=split, **flags), preset)


@pytest.mark.parametrize("dataset, backbone, cutmix, split, T", CELLS)
def test_the_bound_of_every_cell_is_the_supplements(dataset, backbone, cutmix, split, T):
    for recipe in ("paper", "official"):
        flags = dict(backbone=backbone, cutmix=cutmix, recipe=recipe)
        assert flags_of(dataset, split, **flags).T == T
        assert flags_of(dataset, split, **flags, T=0.77).T == 0.77
    if backbone == "resnet101":  # which is the default there
        args = flags_of(dataset, split, cutmix=cutmix)
        assert (args.T, args.backbone) == (T, "resnet101")


@pytest.mark.parametrize("split", TABLE_3)
@pytest.mark.parametrize("backbone", [None, "resnet50", "resnet101"])
def test_bound_and_weight_of_few_labels_are_table_3s_and_its_authors(split, backbone):
    args = flags_of("voc", split, backbone=backbone)
    assert args.T == TABLE_3[split]
    # audit, section 1.3: 0.1, and 0.5 for 183 labels and more
    assert args.unsup_weight == (0.1 if split == "92" else 0.5)
    args = flags_of("voc", split, backbone=backbone, T=0.6, unsup_weight=3.0)
    assert (args.T, args.unsup_weight) == (0.6, 3.0)


def test_where_no_table_has_a_cell_the_bound_is_0_9():
    for dataset, splits in (
        ("cityscapes", ("1/2", "all", "1/64")),
        ("voc_aug", ("1/2", "1/32", "all", "92")),
        ("voc", ("1464", "all", "1/4", "1/16", "91")),
        ("camvid", (None, "1/4", "1/8", "1/16", "1/32", "all", "92")),
        ("shapes", (None, "1/4", "1/8", "1/16", "1/32", "all", "92")),
    ):
        for split, cutmix in itertools.product(splits, (False, True)):
            assert flags_of(dataset, split, cutmix=cutmix).T == 0.9, (dataset, split, cutmix)
    for split in TABLE_3:
        assert flags_of("voc", split, cutmix=False).T == 0.9
        assert flags_of("voc", split, cutmix=False).unsup_weight == 1.5
    for dataset, split in itertools.product(
        ("cityscapes", "voc_aug"), ("1/4", "1/8", "1/16", "1/32")
    ):
        assert flags_of(dataset, split, backbone="resnet18").T == 0.9


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_the_weight_of_the_cross_loss_is_cps(recipe):
    for dataset, split, without, mixed in (
        ("cityscapes", "1/8", 6.0, 5.0),
        ("voc_aug", "1/8", 1.5, 1.0),
        ("voc", "1464", 1.5, 1.0),
        ("camvid", None, 1.5, 1.0),
        ("shapes", None, 1.5, 1.0),
    ):
        flags = dict(split=split, recipe=recipe)
        assert flags_of(dataset, **flags).unsup_weight == mixed  # CutMix is the default
        assert flags_of(dataset, **flags, cutmix=True).unsup_weight == mixed
        assert flags_of(dataset, **flags, cutmix=False).unsup_weight == without
        assert flags_of(dataset, **flags, unsup_weight=0.0).unsup_weight == 0.0


SPLITS = [
    *(("cityscapes", split) for split in ("1/32", "1/16", "1/8", "1/4", "1/2", "all")),
    *(("voc_aug", split) for split in ("1/16", "1/8", "1/4", "1/2", "all")),
    *(("voc", split) for split in ("92", "183", "366", "732", "1464")),
]


@pytest.mark.parametrize("dataset, split", SPLITS)
def test_steps_rates_batches_and_crops_are_those_that_acted_in_the_release(dataset, split):
    city = dataset == "cityscapes"
    for backbone, recipe in itertools.product(("resnet50", "resnet101"), ("paper", "official")):
        args = flags_of(dataset, split, backbone=backbone, recipe=recipe)
        assert args.total_iters == (44_640 if city else 39_680)
        assert args.crop_size == (800 if city else 512)
        assert (args.lr, args.lr_head) == (0.0025, 1.0)  # audit, section 2.6
        assert (args.weight_decay, args.decay_on) == (8e-4 if city else 4e-4, "weights")
        assert (args.batch_size, args.batch_size_unlabeled) == (8, 8)
        assert args.scales == (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
        assert round(args.ohem_kept * args.crop_size**2) == (50_000 if city else 0)
        assert (args.output_stride, args.aspp_rates, args.aux_weight) == (16, (6, 12, 18), 0.0)
        assert (args.k_strategy, args.unsup_loss, args.weight) == ("n-1", "fpl", "concave")
        assert (args.cutmix, args.same_image_cutmix, args.evaluate) == (True, False, "branch1")


def test_ohem_keeps_its_share_of_any_crop():
    args = flags_of("cityscapes", "1/8", crop_size=400)
    assert round(args.ohem_kept * args.crop_size**2) == 12_500
    assert flags_of("camvid").ohem_kept == flags_of("shapes").ohem_kept == 0


def test_the_unlabelled_batch_follows_the_labelled_one():
    args = flags_of("voc_aug", "1/8", batch_size=16, lr=0.005)
    assert (args.batch_size, args.batch_size_unlabeled) == (16, 16)
    args = flags_of("voc_aug", "1/8", batch_size_unlabeled=2)
    assert (args.batch_size, args.batch_size_unlabeled) == (8, 2)


PRINTED = dict(k_max=0, strict=True, mean_over="positives", balance=False)
RELEASED = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True)


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize(
    "dataset, split", [("shapes", None), ("camvid", "1/8"), *SPLITS[2::4], ("voc", "92")]
)
def test_the_recipes_differ_in_cap_strictness_mean_and_balance_alone(dataset, split, cutmix):
    paper, official = (
        vars(flags_of(dataset, split, cutmix=cutmix, recipe=recipe))
        for recipe in ("paper", "official")
    )
    changed = {name for name in paper if paper[name] != official[name]}
    assert changed == {"recipe", "k_max", "strict", "mean_over", "balance"}
    assert {name: paper[name] for name in PRINTED} == PRINTED
    assert {name: official[name] for name in RELEASED} == RELEASED
    assert vars(flags_of(dataset, split, cutmix=cutmix)) == paper  # the default


@pytest.mark.parametrize("name", PRINTED)
def test_an_explicit_flag_beats_either_recipe(name):
    for recipe, other in (("paper", RELEASED), ("official", PRINTED)):
        args = flags_of("camvid", recipe=recipe, **{name: other[name]})
        rest = RELEASED if recipe == "official" else PRINTED
        assert {key: getattr(args, key) for key in rest} == rest | {name: other[name]}


@pytest.mark.parametrize("loss", [soft_loss, negative_loss])
def test_the_teachers_probabilities_get_no_gradient_and_count_in_float32(loss):
    logits_s = torch.zeros(1, 3, 1, 1, requires_grad=True)
    prob_t = torch.tensor([0.8, 0.2, 0.0]).view(1, 3, 1, 1).requires_grad_()
    loss(logits_s, prob_t).sum().backward()
    assert prob_t.grad is None and logits_s.grad.abs().sum() > 0
    half = prob_t.detach().half()  # 0.2 in half precision is below 0.2
    assert torch.equal(loss(logits_s, half), loss(logits_s, half.float()))


def test_the_weight_gets_no_gradient_and_the_last_step_has_one_positive():
    prob_t = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1).requires_grad_()
    K = torch.ones(1, 1, 1, dtype=torch.int64)
    assert not adaptive_weight(prob_t, K).requires_grad
    args = SimpleNamespace(k_strategy="step", T=0.9, strict=True, k_max=0)
    assert k_values(prob_t, 1.0, args).item() == 1
