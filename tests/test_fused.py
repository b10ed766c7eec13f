"""common/fused.py: each twin computes what the definition in its script does, with --fused off.

The same numbers u: the same pixels, rows and banks; loss and gradient within 1e-5.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ael_fpl
import cps_fpl
import esl
import u2pl
from common import fused

TYPES = [torch.float32, torch.bfloat16, torch.float64]
WEIGHTS = ["concave", "linear", "convex", "none"]
OVER = ["positives", "positives_and_next"]
CLASSES = pytest.mark.parametrize("C", [2, 7, 81])


def both(definition, rep, *inputs):
    """Returns [loss, gradient, more] of the definition and of its twin."""
    found = []
    for loss_of in (definition, getattr(fused, definition.__name__)):
        leaf = rep.clone().requires_grad_()
        result = loss_of(leaf, *inputs)
        loss, *more = result if isinstance(result, tuple) else (result,)
        upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss).to(loss.dtype)
        for _ in range(2):  # a second backward finds the same
            (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        assert gradient.dtype == rep.dtype and not any(x.requires_grad for x in more)
        found.append((loss.detach(), gradient, *more))
    return found


def assert_same(definition, twin):
    """Loss and gradient within 1e-5 of the largest, a gradient of bfloat16 within some roundings.

    What is returned beside the loss is equal.
    """
    rounded = 5e-2 if definition[1].dtype == torch.bfloat16 else 1e-5
    for mine, own, near in zip(twin, definition, (1e-5, rounded), strict=False):
        assert mine.dtype == own.dtype and mine.shape == own.shape
        scale = own.double().abs().max().item() or 1.0
        assert (mine.double() - own.double()).abs().max().item() <= near * scale
    assert all(torch.equal(*pair) for pair in zip(definition[2:], twin[2:], strict=True))


def test_fused_says_which_is_taken():
    """auto: the twin, but FPL's on a CPU alone, where benchmarks/fpl_loss.py shows a gain."""
    of_fpl = (cps_fpl.fpl_loss, ael_fpl.fuzzy_positive_loss)
    contrasts = (u2pl.unreliable_loss, esl.part_contrast)
    others = (*contrasts, u2pl.draw_features, u2pl.push_features, esl.push_features)
    for definition in of_fpl + others:
        twin = getattr(fused, definition.__name__)
        on_gpu = definition if definition in of_fpl else twin
        cases = ("auto", "cpu", twin), ("auto", "cuda", on_gpu), ("on", "cuda", twin)
        for choice, device, expected in (*cases, ("off", "cpu", definition)):
            assert fused.pick(definition, SimpleNamespace(fused=choice), device) is expected


def masks_of(C, P):
    """Masks (C, P): of four classes one has no pixel, one all, one some and one a single pixel."""
    share = torch.tensor([0.0, 1.0, 0.4, 0.0])[torch.arange(C) % 4]
    masks = torch.rand(C, P) < share[:, None]
    masks[3::4, P // 2] = True
    return masks


@CLASSES
@pytest.mark.parametrize("K", [1, 8, 300])
def test_the_same_features_are_drawn_and_pushed(C, K):
    """Rings of 5 to 40 rows, so that they turn, and some are smaller than a push."""
    torch.manual_seed(C + K)
    sizes = torch.randint(5, 41, (C,))
    banks = [torch.zeros(int(sizes.sum()) + 1, 6) for _ in range(2)]
    counts = [torch.zeros(C, dtype=torch.int64) for _ in range(2)]
    for _ in range(4):
        rep_t, masks, u = torch.randn(200, 6), masks_of(C, 200), torch.rand(C, K + 1).double()
        definition, twin = (x.draw_features(rep_t, masks, u) for x in (u2pl, fused))
        real = definition[..., -1:]
        assert torch.equal(twin[..., -1:], real) and torch.equal(twin * real, definition)
        u2pl.push_features(banks[0], counts[0], sizes, definition)
        fused.push_features(banks[1], counts[1], sizes, twin)
        assert torch.equal(*banks) and torch.equal(*counts)
    assert counts[0][0] == 0 and counts[0][1] == 4 * min(K, 200)


@CLASSES
@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("M, N", [(9, 4), (3, 600)])
def test_the_same_unreliable_loss(C, dtype, M, N):
    """Classes without an anchor, without a negative, rings half full, full and turned."""
    torch.manual_seed(C)
    rep_s, rep_t = torch.randn(300, 8).to(dtype), torch.randn(300, 8)
    sizes = torch.randint(5, 41, (C,))
    bank = F.normalize(torch.randn(int(sizes.sum()) + 1, 8), dim=1).to(dtype)
    c = torch.arange(C)
    pushed = torch.stack([sizes // 2, sizes, 3 * sizes + 1, 0 * sizes, 1 + 0 * sizes])[c % 5, c]
    masks, u = masks_of(C, 300), torch.rand(C, M + M * N).double()
    cases = (masks, pushed), (masks & False, pushed), (masks, 0 * pushed)
    for kind, (A_c, count) in itertools.product(("contrastive", "binary"), cases):
        args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss=kind, tau=0.5)
        inputs = rep_s, rep_t, A_c, bank, count, sizes, u, args
        found = both(u2pl.unreliable_loss, *inputs)
        assert_same(*found)
        assert torch.equal(found[0][2], A_c.any(1) & (count > 0))
        assert (found[0][0] > 0) == found[0][2].any() == (A_c is masks and count is pushed)


@CLASSES
@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_same_part_contrast(C, dtype, share, K=3, q=4, A=7, N=9):
    """Classes without a candidate, parts without a feature, rings half full and turned."""
    torch.manual_seed(C)
    args = SimpleNamespace(parts=K, queue=q, anchors=A, negatives=N, anchor_share=share, sigma=0.5)
    rep_s, ids = torch.randn(400, 8).to(dtype), torch.randint(0, C * K + 1, (400,))
    ids[ids // K == 1] = C * K
    bank = F.normalize(torch.randn(C * K * q + 1, 8), dim=1)
    pushed = torch.tensor([0, 2, q, 3 * q + 1])[torch.arange(C * K) % 4]
    u = torch.rand(C, A + 1).double(), torch.rand(C, A, 1 + N).double()
    alone = (torch.arange(C * K) == 1).long()  # one part has a feature: no negatives
    cases = (ids, pushed), (ids * 0 + C * K, pushed), (ids, 0 * pushed), (ids, alone)
    for chosen, count in cases:
        found = both(esl.part_contrast, rep_s, chosen, bank, count, *u, args)
        assert_same(*found)
        assert (found[0][0] > 0) == (0 < found[0][2] < A * C) == (chosen is ids and count is pushed)


def options(**changes):
    printed = dict(T=0.9, k_strategy="n-1", k_max=0, strict=True)
    return SimpleNamespace(**printed | dict(weight="concave", mean_over="positives") | changes)


def teachers(C, dtype=torch.float32, layout=torch.channels_last):
    """Logits (4, C, 11, 9): of a confident, a diffuse and a flat teacher, and one of many ties."""
    torch.manual_seed(C)
    t = torch.randn(4, C, 11, 9) * torch.tensor([1, 1.5, 0.1, 0])[:, None, None, None]
    t[0] += 8 * torch.eye(C)[torch.randint(C, (11, 9))].movedim(2, 0)
    t[3] = torch.randint(-1, 2, (C, 11, 9))
    t[3, :, 0] = 0  # all are equal
    return t.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("C", [2, 19, 150])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_loss_gradient_and_pseudo_label(C, dtype, monkeypatch):
    """In parts of 32 pixels and of all, in either layout."""
    for chunk, layout in ((32, torch.contiguous_format), (8192, torch.channels_last)):
        monkeypatch.setattr(fused, "CHUNK", chunk)
        t = teachers(C, dtype, layout)
        z = (3 * torch.randn(t.shape)).to(dtype).contiguous(memory_format=layout)
        for k_max in (0, 3):
            assert_same(*both(cps_fpl.fpl_loss, z, t, 0.0, options(k_max=k_max)))
        assert_same(*both(ael_fpl.fuzzy_positive_loss, z, t, 0.9))


@pytest.mark.parametrize("strategy", ["n-1", "n", "fixed2", "fixed3", "step"])
def test_the_same_for_every_option(strategy):
    rng = random.Random(strategy)
    for C, T, strict, k_max in itertools.product(
        (2, 7), (0.3, 0.9, 1 - 1e-7), (True, False), (0, 1, 3, 99)
    ):
        args = options(T=T, k_strategy=strategy, k_max=k_max, strict=strict)
        args.weight, args.mean_over = rng.choice(WEIGHTS), rng.choice(OVER)
        t = teachers(C)
        assert_same(*both(cps_fpl.fpl_loss, 3 * torch.randn(t.shape), t, rng.random(), args))


def positives_of(loss_of, t, args):
    """Returns which classes are positive, (B, C, H, W): their logits' gradient is negative."""
    z = torch.zeros_like(t).requires_grad_()
    return torch.autograd.grad(loss_of(z, t, 0.0, args)[0].sum(), z)[0] < 0


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_the_same_classes_are_positive_in_ties_and_where_a_sum_is_T(dtype):
    """Eighths: sums without rounding. The lowest classes of a tie are the positive ones."""
    table = [[4, 2, 1, 1], [1, 1, 2, 4], [2, 2, 2, 2], [1, 4, 1, 2], [2, 4, 2, 0], [0, 8, 0, 0]]
    t = (torch.tensor(table).double() / 8).log().to(dtype).T[None, :, :, None]
    p, _ = cps_fpl.by_rank(t.float().softmax(1))
    for T, strict, k_max in itertools.product((0.5, 0.75, 0.875), (True, False), (0, 1, 2)):
        args = options(T=T, strict=strict, k_max=k_max, weight="none")
        definition = positives_of(cps_fpl.fpl_loss, t, args)
        assert torch.equal(definition, positives_of(fused.fpl_loss, t, args))
        assert torch.equal(definition.sum(1), cps_fpl.k_values(p, 0.0, args))
    flat = torch.zeros(1, 20, 1, 1)  # T is a sum of equal numbers: the last bit decides
    for T in (0.25, 0.45, 0.7, 0.9):
        args = options(T=T, weight="none")
        found = [positives_of(module.fpl_loss, flat, args) for module in (cps_fpl, fused)]
        assert found[0].any() and torch.equal(*found)


def test_what_is_not_finite_is_seen_and_a_network_of_comparators_sorts():
    clean = torch.zeros(1, 5, 2, 2)
    spoilt = clean.clone()
    spoilt[0, 1, 0, 0] = torch.nan
    for logits in ((spoilt, clean), (clean, spoilt)):
        loss, _ = fused.fpl_loss(*logits, 0.0, options())
        assert loss.isnan().flatten().tolist() == [True, False, False, False]
    for C, R in itertools.product((1, 2, 3, 19, 33, 150), (1, 2, 4, 33, 150)):
        p = torch.randn(C, 50)
        assert torch.equal(fused.ranked(p, min(R, C)), p.sort(0, descending=True)[0][:R])
