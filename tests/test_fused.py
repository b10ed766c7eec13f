"""common/fused.py: each twin computes what the definition in its script does, with --fused off.

The same numbers u: the same pixels, rows and banks; loss and gradient within 1e-5.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import esl
import u2pl
from common import fused

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
CLASSES = pytest.mark.parametrize("C", [2, 7, 81])


def assert_near(found, expected):
    """Both within 1e-5 of the largest number."""
    scale = float(expected.double().abs().max()) or 1.0
    assert float((found.double() - expected.double()).abs().max()) <= 1e-5 * scale


def valued(loss_of, rep, *inputs):
    """Returns the loss, what is returned beside it, and the gradient of the features."""
    leaf = rep.clone().requires_grad_()
    loss, count = loss_of(leaf, *inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.shape == () and not count.requires_grad
    return loss.detach(), count, gradient.float()


def same_loss(script, rep, *inputs):
    """Asserts that definition and twin agree; returns the loss and the count."""
    name = "unreliable_loss" if script is u2pl else "part_contrast"
    loss, count, gradient = valued(getattr(fused, name), rep, *inputs)
    definition = valued(getattr(script, name), rep, *inputs)
    assert torch.equal(count, definition[1])
    assert_near(loss, definition[0])
    if rep.dtype == torch.float32:
        assert_near(gradient, definition[2])
    else:  # a gradient that is rounded to bfloat16 once, or for each class
        assert (gradient - definition[2]).norm() <= 5e-2 * definition[2].norm()
    return loss, count


# ---- U2PL ----


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
@DTYPES
@pytest.mark.parametrize("kind", ["contrastive", "binary"])
@pytest.mark.parametrize("M, N", [(9, 4), (3, 600)])
def test_the_same_unreliable_loss(C, dtype, kind, M, N):
    """Classes without an anchor, without a negative, rings half full, full and turned."""
    torch.manual_seed(C)
    args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss=kind, tau=0.5)
    rep_s, rep_t = torch.randn(300, 8).to(dtype), torch.randn(300, 8)
    sizes = torch.randint(5, 41, (C,))
    bank = F.normalize(torch.randn(int(sizes.sum()) + 1, 8), dim=1).to(dtype)
    c = torch.arange(C)
    pushed = torch.stack([sizes // 2, sizes, 3 * sizes + 1, 0 * sizes, 1 + 0 * sizes])[c % 5, c]
    masks, u = masks_of(C, 300), torch.rand(C, M + M * N).double()
    _, counted = same_loss(u2pl, rep_s, rep_t, masks, bank, pushed, sizes, u, args)
    assert torch.equal(counted, masks.any(1) & (pushed > 0)) and 0 < counted.sum() < C
    for empty in ((masks & False, pushed), (masks, 0 * pushed)):
        inputs = rep_t, empty[0], bank, empty[1], sizes, u, args
        loss, counted = same_loss(u2pl, rep_s, *inputs)
        assert loss == 0 and not counted.any()


# ---- ESL ----


@CLASSES
@DTYPES
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
    loss, count = same_loss(esl, rep_s, ids, bank, pushed, *u, args)
    assert loss > 0 and 0 < count < A * C
    alone = (torch.arange(C * K) == 1).long()  # one part has a feature: no negatives
    for nothing in ((ids * 0 + C * K, pushed), (ids, 0 * pushed), (ids, alone)):
        loss, count = same_loss(esl, rep_s, nothing[0], bank, nothing[1], *u, args)
        assert loss == 0 and count == 0


# ---- the scripts ----


def test_a_definition_has_its_twin_and_the_scripts_share_its_text():
    for choice, args in ((fused, "auto"), (fused, "on"), (None, "off")):
        for script, names in ((u2pl, "draw_features unreliable_loss"), (esl, "part_contrast")):
            for name in [*names.split(), "push_features"]:
                expected = getattr(choice or script, name)
                assert fused.pick(getattr(script, name), SimpleNamespace(fused=args)) is expected
