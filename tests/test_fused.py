"""common/fused.py: each twin computes what the definition in its script does, with --fused off.

Against the oracles, with every flag: rows of test_equations.py; U2PL's and ESL's: test_borders.py.
Here: which is taken, FPL's borders, and its kernel for GPUs in Triton's interpreter.
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

RULES = [
    dict(k_max=3),
    dict(k_strategy="n", weight="linear", strict=False, mean_over="positives_and_next"),
    dict(k_strategy="fixed2", weight="convex"),
    dict(k_strategy="step", weight="none"),
]


def assert_same(z, t, args):
    """The pseudo label is equal, loss and gradient up to rounding, also by a second backward."""
    found = []
    for loss_of in (cps_fpl.fpl_loss, fused.fpl_loss):
        leaf = z.clone().requires_grad_()
        loss, pseudo = loss_of(leaf, t, 0.0, args)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), retain_graph=True)
        assert gradient.dtype == z.dtype
        found.append((pseudo, loss, gradient))
    for near, own, twin in zip(
        (0, 1e-5, max(1e-5, 2 * torch.finfo(z.dtype).eps)), *found, strict=True
    ):
        assert own.dtype == twin.dtype
        assert (own.double() - twin.double()).abs().max() <= near * own.double().abs().max()


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


@pytest.fixture(params=["cpu", "gpu"])
def kernel(request, monkeypatch):
    """Lets the code for CPUs compute the twin, or the kernel for GPUs."""
    if request.param == "gpu":
        module = pytest.importorskip("common.fpl_triton")
        monkeypatch.setattr(fused, "kernels", lambda *logits: module)


@pytest.mark.parametrize("C, dtype", [(2, torch.bfloat16), (11, torch.float32)])
def test_the_same_loss_gradient_and_pseudo_label(C, dtype, kernel):
    """Each weight and rule for K, of teachers that are confident, diffuse, of ties and flat."""
    torch.manual_seed(C)
    t = torch.randn(4, C, 11, 2) * torch.tensor([8, 1, 1, 0])[:, None, None, None]
    t[2].round_()
    z = 3 * torch.randn(t.shape)
    for layout, rule in itertools.product((torch.contiguous_format, torch.channels_last), RULES):
        logits = [x.to(dtype).contiguous(memory_format=layout) for x in (z, t)]
        assert_same(*logits, printed(**rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_classes_are_positive_where_a_sum_is_T(dtype):
    """Eighths: sums without rounding. A sum of equal numbers: the last bit decides."""
    table = [[4, 2, 1, 1], [1, 1, 2, 4], [2, 2, 2, 2], [1, 4, 1, 2], [2, 4, 2, 0], [0, 8, 0, 0]]
    t = (torch.tensor(table).double() / 8).log().to(dtype).T[None, :, :, None]
    for T, strict, k_max in itertools.product((0.5, 0.75, 0.875), (True, False), (0, 1, 2)):
        args = printed(T=(T,), strict=strict, k_max=k_max, weight="none")
        assert_same(torch.zeros_like(t), t, args)
    flat = torch.zeros(1, 20, 1, 1)
    for T in (0.25, 0.45, 0.7, 0.9):
        assert_same(flat, flat, printed(T=T, weight="none"))


def test_what_is_not_finite_is_seen(kernel):
    clean = torch.zeros(2, 5, 2, 2)
    spoilt = clean.clone()
    spoilt[1, 1, 0, 0] = torch.nan
    for logits in ((spoilt, clean), (clean, spoilt)):
        loss, _ = fused.fpl_loss(*logits, 0.0, printed())
        assert loss.isnan().nonzero().tolist() == [[1, 0, 0]]
