"""common/fused.py: each twin computes what the definition in its script does, with --fused off.

Against the oracles, with every flag: rows of test_equations.py; U2PL's and ESL's: test_borders.py.
Here: which is taken, and FPL's layouts, types and borders.
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
from oracles.fpl import printed

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


def teachers(C, dtype):
    """Logits (4, C, 11, 9): of a confident, a diffuse and a flat teacher, and one of many ties."""
    torch.manual_seed(C)
    t = torch.randn(4, C, 11, 9) * torch.tensor([1, 1.5, 0.1, 0])[:, None, None, None]
    t[0] += 8 * torch.eye(C)[torch.randint(C, (11, 9))].movedim(2, 0)
    t[3] = torch.randint(-1, 2, (C, 11, 9))
    t[3, :, 0] = 0  # all are equal
    return t.to(dtype)


def take(kernel, patch):
    """Lets a kernel for GPUs compute the twin, in Triton's interpreter, or the code for CPUs."""
    if kernel == "gpu":
        module = pytest.importorskip("common.fpl_triton")
        patch.setattr(fused, "kernels", lambda *logits: module)


LAYOUTS = [torch.contiguous_format, torch.channels_last]
RULES = [
    dict(k_max=3),
    dict(k_strategy="n", weight="linear", strict=False, mean_over="positives_and_next"),
    dict(k_strategy="fixed2", weight="convex"),
    dict(k_strategy="step", weight="none"),
]
CASES = [("cpu", C, dtype) for C in (2, 19, 150) for dtype in TYPES]
CASES += [("gpu", 2, torch.bfloat16), ("gpu", 11, torch.float32)]


@pytest.mark.parametrize("kernel, C, dtype", CASES)
def test_the_same_loss_gradient_and_pseudo_label(kernel, C, dtype, monkeypatch):
    """Each weight and rule for K, in parts of 32 pixels, of which the last is smaller."""
    take(kernel, monkeypatch)
    monkeypatch.setattr(fused, "CHUNK", 32)
    for layout, rule in itertools.product(LAYOUTS, RULES if kernel == "cpu" else RULES[1:]):
        t = teachers(C, dtype)[..., : 9 if kernel == "cpu" else 2]
        z = (3 * torch.randn(t.shape)).to(dtype)
        z, t = (x.contiguous(memory_format=layout) for x in (z, t))
        assert_same(cps_fpl.fpl_loss, z, t, 0.0, printed(**rule))
    assert_same(ael_fpl.fuzzy_positive_loss, z, t, 0.9)


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_the_same_classes_are_positive_where_a_sum_is_T(dtype):
    """Eighths: sums without rounding. A sum of equal numbers: the last bit decides."""
    table = [[4, 2, 1, 1], [1, 1, 2, 4], [2, 2, 2, 2], [1, 4, 1, 2], [2, 4, 2, 0], [0, 8, 0, 0]]
    t = (torch.tensor(table).double() / 8).log().to(dtype).T[None, :, :, None]
    for T, strict, k_max in itertools.product((0.5, 0.75, 0.875), (True, False), (0, 1, 2)):
        args = printed(T=(T,), strict=strict, k_max=k_max, weight="none")
        assert_same(cps_fpl.fpl_loss, torch.zeros_like(t), t, 0.0, args)
    flat = torch.zeros(1, 20, 1, 1)
    for T in (0.25, 0.45, 0.7, 0.9):
        assert_same(cps_fpl.fpl_loss, flat, flat, 0.0, printed(T=(T,), weight="none"))


@pytest.mark.parametrize("kernel", ["cpu", "gpu"])
def test_what_is_not_finite_is_seen(kernel, monkeypatch):
    take(kernel, monkeypatch)
    clean = torch.zeros(2, 5, 2, 2)
    spoilt = clean.clone()
    spoilt[1, 1, 0, 0] = torch.nan
    for logits in ((spoilt, clean), (clean, spoilt)):
        loss, _ = fused.fpl_loss(*logits, 0.0, printed())
        assert loss.isnan().nonzero().tolist() == [[1, 0, 0]]


def test_a_network_of_comparators_sorts():
    p = torch.randn(33, 50)
    assert torch.equal(fused.ranked(p, 4), p.sort(0, descending=True)[0][:4])
