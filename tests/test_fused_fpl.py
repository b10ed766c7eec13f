"""FPL's loss in common/fused.py: what cps_fpl.py and ael_fpl.py define, for every option."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import ael_fpl
import cps_fpl
from common import fused

WEIGHTS = ["concave", "linear", "convex", "none"]
OVER = ["positives", "positives_and_next"]


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


def both(definition, *inputs):
    """Returns [loss, gradient, more] of the definition and of the twin."""
    found = []
    for loss_of in (definition, getattr(fused, definition.__name__)):
        z = inputs[0].clone().requires_grad_()
        result = loss_of(z, *inputs[1:])
        loss, *more = result if isinstance(result, tuple) else (result,)
        upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss)
        for _ in range(2):  # a second backward finds the same
            (gradient,) = torch.autograd.grad(loss, z, upstream.to(loss.dtype), retain_graph=True)
        assert gradient.dtype == z.dtype and not any(x.requires_grad for x in more)
        found.append((loss.detach(), gradient, *more))
    return found


def assert_same(definition, twin):
    """Loss and gradient within 1e-5 or, in bfloat16, two roundings of it; pseudo labels equal."""
    near = 2e-2 if definition[1].dtype == torch.bfloat16 else 1e-5
    assert definition[0].dtype == twin[0].dtype
    assert torch.allclose(definition[0], twin[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(definition[1].double(), twin[1].double(), rtol=near, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(definition[2:], twin[2:], strict=True))


@pytest.mark.parametrize("C", [2, 19, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_same_loss_gradient_and_pseudo_label(C, dtype, layout, monkeypatch):
    t = teachers(C, dtype, layout)
    z = (3 * torch.randn(t.shape)).to(dtype).contiguous(memory_format=layout)
    for chunk, k_max in ((32, 0), (8192, 3)):
        monkeypatch.setattr(fused, "CHUNK", chunk)
        assert_same(*both(cps_fpl.fpl_loss, z, t, 0.0, options(k_max=k_max)))
        assert_same(*both(ael_fpl.fuzzy_positive_loss, z, t, 0.9))


@pytest.mark.parametrize("strategy", ["n-1", "n", "fixed2", "fixed3", "step"])
@pytest.mark.parametrize("k_max", [0, 1, 3, 99])
def test_the_same_for_every_option(strategy, k_max):
    for C, T, strict in itertools.product((2, 7), (0.3, 0.9, 1 - 1e-7), (True, False)):
        t = teachers(C)
        z = 3 * torch.randn(t.shape)
        for number, (weight, over) in enumerate(itertools.product(WEIGHTS, OVER)):
            args = options(T=T, k_strategy=strategy, k_max=k_max, strict=strict)
            args.weight, args.mean_over = weight, over
            assert_same(*both(cps_fpl.fpl_loss, z, t, number / 7, args))


def positives_of(loss_of, t, args):
    """Returns which classes are positive, (B, C, H, W): their logits' gradient is negative."""
    z = torch.zeros_like(t).requires_grad_()
    return torch.autograd.grad(loss_of(z, t, 0.0, args)[0].sum(), z)[0] < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def test_auto_takes_the_twin_on_a_cpu():
    for definition in (cps_fpl.fpl_loss, ael_fpl.fuzzy_positive_loss):
        twin = getattr(fused, definition.__name__)
        cases = (("auto", "cpu", 1), ("auto", "cuda", 0), ("on", "cuda", 1), ("off", "cpu", 0))
        for choice, device, taken in cases:
            found = fused.pick(definition, SimpleNamespace(fused=choice), device)
            assert found is (twin if taken else definition)
