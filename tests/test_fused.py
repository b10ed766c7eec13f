"""common/fused.py: each twin computes what the definition in its script does, with --fused off.

Against the oracles, with every flag: rows of test_equations.py; rings: test_borders.py. Here: which
is taken, and FPL's layouts, types and borders.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

import ael_fpl
import cps_fpl
import esl
import u2pl
from common import fused

TYPES = [torch.float32, torch.bfloat16, torch.float64]


def assert_same(definition, z, *inputs):
    """Loss and gradient within 1e-5 of the largest, a gradient of bfloat16 within some roundings.

    What is returned beside the loss is equal.
    """
    found = []
    for loss_of in (definition, getattr(fused, definition.__name__)):
        leaf = z.clone().requires_grad_()
        result = loss_of(leaf, *inputs)
        loss, *more = result if isinstance(result, tuple) else (result,)
        upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss).to(loss.dtype)
        for _ in range(2):  # a second backward finds the same
            (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        assert gradient.dtype == z.dtype and not any(x.requires_grad for x in more)
        found.append((loss.detach(), gradient, more))
    rounded = 2e-2 if z.dtype == torch.bfloat16 else 1e-5
    for own, twin, near in zip(*(x[:2] for x in found), (1e-5, rounded), strict=True):
        assert own.dtype == twin.dtype
        largest = own.double().abs().max()
        assert (own.double() - twin.double()).abs().max() <= near * largest
    assert all(torch.equal(*pair) for pair in zip(found[0][2], found[1][2], strict=True))


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


def options(**changes):
    printed = dict(T=(0.9,), k_strategy="n-1", k_max=0, strict=True)
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
            assert_same(cps_fpl.fpl_loss, z, t, 0.0, options(k_max=k_max))
        assert_same(ael_fpl.fuzzy_positive_loss, z, t, 0.9)


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
        args = options(T=(T,), strict=strict, k_max=k_max, weight="none")
        definition = positives_of(cps_fpl.fpl_loss, t, args)
        assert torch.equal(definition, positives_of(fused.fpl_loss, t, args))
        assert torch.equal(definition.sum(1), cps_fpl.k_values(p, 0.0, args))
    flat = torch.zeros(1, 20, 1, 1)  # T is a sum of equal numbers: the last bit decides
    for T in (0.25, 0.45, 0.7, 0.9):
        assert_same(cps_fpl.fpl_loss, flat, flat, 0.0, options(T=(T,), weight="none"))


def test_what_is_not_finite_is_seen_and_a_network_of_comparators_sorts():
    clean = torch.zeros(1, 5, 2, 2)
    spoilt = clean.clone()
    spoilt[0, 1, 0, 0] = torch.nan
    for logits in ((spoilt, clean), (clean, spoilt)):
        loss, _ = fused.fpl_loss(*logits, 0.0, options())
        assert loss.isnan().flatten().tolist() == [True, False, False, False]
    p = torch.randn(33, 50)
    assert torch.equal(fused.ranked(p, 4), p.sort(0, descending=True)[0][:4])


@pytest.mark.parametrize(("C", "dtype"), [(2, torch.bfloat16), (11, torch.float32)])
def test_the_kernel_for_gpus_is_the_same_in_tritons_interpreter(C, dtype, monkeypatch):
    """Each weight and rule for K, ties among the teachers, both layouts; NaN is seen."""
    kernel = pytest.importorskip("common.fpl_triton")
    monkeypatch.setattr(fused, "kernels", lambda *logits: kernel)
    strategies = ("n-1", "n", "fixed2", "step")
    kinds = ("concave", "linear", "convex", "none")
    layouts = (torch.contiguous_format, torch.channels_last) * 2
    for layout, strategy, kind in zip(layouts, strategies, kinds, strict=True):
        t = teachers(C, dtype, layout)[..., :2]
        t = t.contiguous(memory_format=layout)
        z = (3 * torch.randn(t.shape)).to(dtype).contiguous(memory_format=layout)
        rules = dict(k_strategy=strategy, weight=kind, strict=kind != "linear")
        rules |= dict(mean_over="positives_and_next") if kind == "linear" else {}
        assert_same(cps_fpl.fpl_loss, z, t, 0.0, options(**rules))
    t[1, 1, 0, 0] = torch.nan
    for pair in ((z, t), (t, z)):
        assert fused.fpl_loss(*pair, 0.0, options())[0].isnan().nonzero().tolist() == [[1, 0, 0]]
