"""Losses of all scripts against oracles/: one table, crossed with what holds for each row.

A new script is covered by its oracles and its rows. Twins in common/fused.py are rows too; the end
is what oracles cannot say of FPL's. Numbers worked out by hand, draws, contrasts: test_borders.py.
"""

import itertools
import shutil
import sysconfig
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import supervised
import u2pl
import u2pl_ael
import unimatch
from common import fused
from oracles import ael as ael_oracle
from oracles import fpl as fpl_oracle
from oracles import supervised as supervised_oracle

KINDS = ["random", "diffuse", "one-hot", "flat", "tied"]  # of teachers
MASKS = ["some", "all", "padded", "nothing"]
CLASSES = [2, 5, pytest.param(21, marks=pytest.mark.smoke), 81]

# What a comparison may miss. float32: sums of some hundred numbers below 10, each off by 6e-8 of
# itself. float64: torch's softplus is the identity above 20, which leaves out exp(-20) = 2e-9.
NEAR = {torch.float32: dict(rel=1e-5, abs=5e-6), torch.float64: dict(rel=1e-9, abs=3e-9)}


class Case(NamedTuple):
    """What functions take: four images, or two of each of two networks, in turns."""

    z: torch.Tensor  # (4, C, H, W), the student's logits
    t: torch.Tensor  # the teacher's
    prob: torch.Tensor  # its softmax
    inside: torch.Tensor  # (4, H, W) bool, the same for both networks
    label: torch.Tensor  # (4, H, W), a quarter void, and all that is outside
    rate: torch.Tensor  # (C,) multiples of 1 / 1024, so that 1 - rate is exact; a 1, and a 0


def draw_case(classes, kind="random", mask="some", seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1000 * seed + 10 * classes + KINDS.index(kind))
    height, width = (5, 6) if classes < 6 else (3, 5) if classes < 22 else (2, 2)
    shape = (4, classes, height, width)
    z = 2 * torch.randn(shape, generator=rng, dtype=torch.float64)
    t = torch.randn(shape, generator=rng, dtype=torch.float64)
    spread = {"random": 2.0, "diffuse": 0.5, "one-hot": 1000.0, "flat": 0.0, "tied": 1.0}[kind]
    t = spread * (t.round().clamp(-1, 1) if kind == "tied" else t)
    inside = torch.rand(2, height, width, generator=rng) < {"some": 0.7, "nothing": 0}.get(mask, 1)
    if mask == "padded":  # one image of each network has nothing
        inside[1] = False
    inside = inside.repeat_interleave(2, 0)
    label = torch.randint(classes, inside.shape, generator=rng)
    label[(torch.rand(inside.shape, generator=rng) < 0.25) | ~inside] = 255
    rate = torch.randint(1, 1024, (classes,), generator=rng).to(dtype) / 1024
    rate[seed % classes] = 1.0
    rate[(seed + 1) % classes] = 0.0 if classes > 2 else 0.5
    if seed % 2:
        z, t = (x.contiguous(memory_format=torch.channels_last) for x in (z, t))
    return Case(z.to(dtype), t.to(dtype), t.to(dtype).softmax(1), inside, label, rate)


def plain(case):
    """What oracles take: of each map a list of images, of each of these a list of pixels.

    u: what equalization sampling draws after the seed of `run`.
    """
    maps = case._asdict() | {"u": torch.rand_like(u2pl.upcast(case.t[:, 0]))}
    maps |= {name: maps[name].movedim(1, -1) for name in ("z", "t", "prob")}
    rate = maps.pop("rate").tolist()
    lists = {name: x.flatten(1, 2).tolist() for name, x in maps.items()}
    return SimpleNamespace(**lists, rate=rate, width=case.z.shape[3])


class Row(NamedTuple):
    """product(case): (scalar, parts); oracle(plain case): (value, gradient), or (..., parts).

    double: whether it computes in float64 where that is given, or something in float32.
    """

    name: str
    product: Any
    oracle: Any
    double: bool = True


def loss(function, oracle, names, *rest):
    """A row of a function that returns a loss alone; names: what it takes of a case."""
    take = attrgetter(*names.split())
    return Row(
        f"{function.__name__} {rest}",
        lambda case: (function(*take(case), *rest), {}),
        lambda case: oracle(*take(case), *rest),
        double=False,
    )


def cross_loss(progress=0.0, **changes):
    """A row of CPS."""
    args = fpl_oracle.printed(**changes)

    def product(case):
        students, teachers = ([x[::2], x[1::2]] for x in (case.z, case.t))
        return cps_fpl.cross_loss(students, teachers, case.inside[::2], progress, args)

    return Row(
        f"cross_loss {progress} {changes}",
        product,
        lambda case: fpl_oracle.cross_loss(case.z, case.t, case.inside, progress, case.width, args),
        # cross-entropy is computed in float32, and so is the balance
        double=args.unsup_loss != "ce" and not args.balance,
    )


def consistency_loss(pooled, **changes):
    """A row of AEL's Eq. (12) with the labels of a teacher."""
    args = fpl_oracle.printed(**changes)
    take = attrgetter(*"z t inside rate".split())
    return Row(
        f"consistency_loss {pooled} {changes}",
        lambda case: ael_fpl.consistency_loss(*take(case), pooled, args),
        lambda case: ael_oracle.consistency(*take(case), case.u, pooled, case.width, args),
    )


def weak_to_strong(**changes):
    """A row of UniMatch: what a weak image teaches its strong view, over 17 pixels."""
    args = fpl_oracle.printed(**changes)
    oracle = ael_oracle.weak_to_strong

    def product(case):
        target = unimatch.make_target(case.t, case.inside, args)
        return unimatch.consistency(case.z, target, 17.0, args), {}

    return Row(
        f"consistency {changes}",
        product,
        lambda case: oracle(case.z, case.t, case.inside, 17.0, args),
    )


def soft_label(kind, eta=0.0, top_k=0):
    """A row of ESL's Eq. (3) to (6): cross-entropy with the labels of a teacher."""
    args = SimpleNamespace(label=kind, eta=eta, top_k=top_k)

    def product(case):
        target = esl.soft_label(case.prob.detach(), args)
        return esl.soft_cross_entropy(case.z, target, case.inside), {}

    def oracle(case):
        given = case.z, case.prob, case.inside, kind, eta, top_k
        return supervised_oracle.soft_cross_entropy(*given)

    return Row(f"soft_label {kind} {eta} {top_k}", product, oracle)


RELEASED = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True)
STRATEGIES = ["n-1", "n", "fixed2", "fixed3", "step"]
WEIGHTS = ["concave", "linear", "convex", "none"]
OVER = ["positives", "positives_and_next"]
BOTH_OHEM = supervised.ohem_cross_entropy, supervised_oracle.ohem_cross_entropy
OHEM = [(0.7, 3), (0.05, 0), (0.2, 7), (0.1, 1000), (1.0, 1)]  # threshold, pixels at least
ROWS = [
    loss(supervised.cross_entropy, supervised_oracle.cross_entropy, "z label"),
    loss(mean_teacher.consistency_ce, supervised_oracle.consistency_ce, "z prob inside"),
    loss(mean_teacher.consistency_mse, supervised_oracle.consistency_mse, "z prob inside"),
    *(cross_loss(unsup_loss=name) for name in ("fpl", "ce", "soft", "negative")),
    cross_loss(**RELEASED),
    consistency_loss(1, unsup_loss="ce", threshold=0.5),  # which two equal classes reach
    cross_loss(fused="on"),
    consistency_loss(2),
    consistency_loss(4, **RELEASED, threshold=0.5),
    weak_to_strong(),
    weak_to_strong(unsup_loss="ce", threshold=0.5),
    soft_label("soft"),
]
VARIANTS = [  # flags that reach a loss: every value of each, compared at a few classes
    *(loss(*BOTH_OHEM, "z label", *rest) for rest in OHEM),
    *(cross_loss(unsup_loss=name, balance=True) for name in ("ce", "soft", "negative")),
    cross_loss(k_strategy="fixed2", balance=True),  # of 2 classes none is negative: exactly 0
    *(cross_loss(0.5, T=0.8537, k_strategy=name, k_max=k) for name in STRATEGIES for k in (0, 2)),
    *(cross_loss(p, k_strategy="step") for p in (0.33, 1 / 3, 0.66, 2 / 3, 0.999)),
    *(cross_loss(T=0.5037, strict=s, fused=f) for s in (True, False) for f in ("on", "off")),
    *(cross_loss(0.5, T=0.8537, k_strategy=name, k_max=3, fused="on") for name in STRATEGIES),
    *(cross_loss(weight=w, mean_over=over, fused="on") for w in WEIGHTS for over in OVER),
    *(cross_loss(weight=w, mean_over=over) for w in WEIGHTS for over in OVER),
    *(consistency_loss(p, **c) for p in (1, 2) for c in (dict(balance=True), RELEASED)),
    consistency_loss(2, fused="on"),
    consistency_loss(4, unsup_loss="ce", gamma=0.0),
    consistency_loss(2, weight="convex", k_max=2, strict=False, threshold=0.6, gamma=1.0),
    weak_to_strong(fused="on"),
    weak_to_strong(T=0.6037, k_max=3, strict=False, weight="linear"),
    weak_to_strong(unsup_loss="ce", threshold=0.3),
    soft_label("hard"),
    *(soft_label("dynamic", eta) for eta in (0.5, 0.8, 0.999)),
    *(soft_label("topk", top_k=k) for k in (1, 3, 90)),
]


@pytest.fixture(autouse=True)
def few_pixels_at_a_time(monkeypatch):
    """The twin of FPL's loss takes an image in parts, of which the last one is smaller."""
    monkeypatch.setattr(fused, "CHUNK", 16)


every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def run(row, case):
    """Value, parts and gradient of a row; no teacher gets a gradient, and parts give none."""
    torch.manual_seed(3)
    leaves = [x.detach().requires_grad_() for x in (case.z, case.t, case.prob)]
    value, parts = row.product(case._replace(**dict(zip(("z", "t", "prob"), leaves, strict=True))))
    assert value.shape == ()
    whole = value + sum(part.sum() for part in parts.values())
    gradient, *others = torch.autograd.grad(whole, leaves, allow_unused=True)
    assert others == [None, None]
    return value, parts, gradient


def compare(row, case, near=None):
    """Value, gradient and parts of a row are its oracle's."""
    value, parts, found = run(row, case)
    torch.manual_seed(3)
    expected, gradient, *more = row.oracle(plain(case))
    expected_parts = more[0] if more else {}
    near = near or NEAR[case.z.dtype if row.double else torch.float32]
    assert value.item() == pytest.approx(expected, **near)
    slopes = sum(gradient, [])
    assert found.movedim(1, -1).flatten().tolist() == pytest.approx(slopes, **near)
    assert set(parts) == set(expected_parts)
    for name, part in parts.items():
        if name == "balance" and 0 < parts["unsup"] + expected_parts["unsup"] < 1e-9:
            continue  # what rounding says; 1 where the loss is exactly 0
        wanted = torch.tensor(expected_parts[name], dtype=torch.float64)
        assert torch.allclose(part.double().flatten(), wanted, rtol=1e-5, atol=5e-6), name


@pytest.mark.parametrize("classes", CLASSES)
@every_row
def test_value_and_gradient(row, classes):
    """Eq. by Eq.; ties go to the lowest class, void and outside do not count, nothing is 0."""
    for seed, kind in enumerate(KINDS):
        if kind != "flat" or "'balance': True" not in row.name:  # a factor of what is 0 by rounding
            compare(row, draw_case(classes, kind, MASKS[seed % 3], seed))
    compare(row, draw_case(classes, "diffuse", "nothing", 8))
    compare(row, draw_case(classes, "random", "some", 9, torch.float32))


@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_every_flag_reaches_its_loss(row):
    for seed, (kind, classes) in enumerate(itertools.product(("random", "tied"), (2, 5, 11))):
        compare(row, draw_case(classes, kind, MASKS[seed % 3], 20 + seed))


def extremes():
    """Cases in float64: two of usual logits, and of 10,000 what can come together."""
    for classes, kind in itertools.product((2, 19), ("random", "flat")):
        yield draw_case(classes, kind)
    for classes, mask in ((2, "some"), (5, "all")):
        drawn = draw_case(classes, "random", mask)
        ones, others = drawn.z.clamp(-1, 1), drawn.t.clamp(-1, 1)
        students = 1e4 * ones.sign(), 1e4 * ones, torch.where(ones > 0.5, 1e4, ones)
        for z, t in itertools.product(students, (1e4 * others, -students[0], 0 * ones)):
            yield drawn._replace(z=z, t=t, prob=t.softmax(1))


@every_row
def test_any_type_counts_in_float32(row):
    """Half precision gives what its numbers give in float32, finite; the oracle's in float64."""
    for case in extremes():
        if row.double:
            compare(row, case, dict(rel=1e-9, abs=1e-7))
        for dtype in (torch.bfloat16, torch.float16):
            low = {name: getattr(case, name).to(dtype) for name in ("z", "t", "prob")}
            wide = {name: x.float() for name, x in low.items()}
            value, parts, gradient = run(row, case._replace(**low, rate=case.rate.float()))
            same, same_parts, other = run(row, case._replace(**wide, rate=case.rate.float()))
            assert value.dtype == torch.float32 and torch.equal(value, same)
            for name, part in parts.items():
                assert part.dtype != dtype and torch.equal(part, same_parts[name])
            assert all(x.isfinite().all() for x in (value, gradient, *parts.values()))
            # it comes back in the type of the logits: rounded to 8 or 11 bits, of two heads twice
            assert torch.allclose(gradient.float(), other, rtol=0.02, atol=3e-4)


@pytest.mark.parametrize("divide_by", ["reliable", "all"])
@pytest.mark.parametrize("pooled", [1, 2])
def test_eq_12_with_labels_of_a_sure_teacher_is_consistency_loss(divide_by, pooled):
    """U2PL's labels in AEL: a void one keeps its weight, or counts as what is not inside."""
    args = fpl_oracle.printed(unsup_loss="ce", threshold=0.4, gamma=1.5, divide_by=divide_by)
    z, t, _, inside, _, rate = draw_case(5, mask="padded", dtype=torch.bfloat16)
    conf, label = u2pl.upcast(t).softmax(1).max(1)
    label[conf < 0.4] = 255
    counted = inside & (label < 255) if divide_by == "reliable" else inside
    results = []
    for function, *given in (
        (u2pl_ael.equalized_cross_entropy, label, conf, inside),
        (ael_fpl.consistency_loss, t, counted),
    ):
        torch.manual_seed(3)
        value, _ = function(z.requires_grad_(), *given, rate, pooled, args)
        results.append((value, *torch.autograd.grad(value, z)))
    assert all(map(torch.equal, *results))


# ---- common/fused.py: which is taken, FPL's borders, its kernel for GPUs in an interpreter ----

COMPILER = shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists()
RULES = [
    dict(k_max=3),
    dict(k_strategy="n", weight="linear", strict=False, mean_over="positives_and_next"),
    dict(k_strategy="fixed2", weight="convex"),
    dict(k_strategy="step", weight="none"),
]


def assert_same(z, t, args):
    """The pseudo label is equal, loss and gradient up to rounding."""
    found = []
    for loss_of in (cps_fpl.fpl_loss, fused.fpl_loss):
        leaf = z.clone().requires_grad_()
        loss, pseudo = loss_of(leaf, t, 0.0, args)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), retain_graph=True)
        assert gradient.dtype == z.dtype
        found.append((pseudo, loss, gradient))
    rounded = max(1e-5, 2 * torch.finfo(z.dtype).eps)
    for near, own, twin in zip((0, 1e-5, rounded), *found, strict=True):
        assert own.dtype == twin.dtype
        assert (own.double() - twin.double()).abs().max() <= near * own.double().abs().max()
    with pytest.raises(RuntimeError, match="has one backward"):  # the twin's is gone
        torch.autograd.grad(loss, leaf, torch.ones_like(loss))


def test_fused_says_which_is_taken():
    """auto: the twin, but FPL's on a CPU alone, where benchmarks/fpl_loss.py shows a gain."""
    for definition in (cps_fpl.fpl_loss, ael_fpl.fuzzy_positive_loss, esl.push_features):
        twin = getattr(fused, definition.__name__)
        on_gpu = twin if definition is esl.push_features else definition
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
    """Each weight and rule for K; teachers that are confident, diffuse, of ties and flat.

    Eighths: sums that are T. Of equal numbers: the last bit of a sum decides.
    """
    torch.manual_seed(C)
    t = torch.randn(4, C, 11, 2) * torch.tensor([8, 1, 1, 0])[:, None, None, None]
    t[2].round_()
    z = 3 * torch.randn(t.shape)
    for layout, rule in itertools.product((torch.contiguous_format, torch.channels_last), RULES):
        logits = [x.to(dtype).contiguous(memory_format=layout) for x in (z, t)]
        assert_same(*logits, fpl_oracle.printed(**rule))
    eighths = [[4, 2, 1, 1], [1, 1, 2, 4], [2, 2, 2, 2], [1, 4, 1, 2], [2, 4, 2, 0], [0, 8, 0, 0]]
    t = (torch.tensor(eighths).double() / 8).log().to(dtype).T[None, :, :, None].contiguous()
    for T, strict, k_max in itertools.product((0.5, 0.75, 0.875), (True, False), (0, 1, 2)):
        rule = dict(T=T, strict=strict, k_max=k_max, weight="none")
        assert_same(torch.zeros_like(t), t, fpl_oracle.printed(**rule))
    flat = torch.zeros(1, 20, 1, 1)
    for T in (0.25, 0.45, 0.7, 0.9):
        assert_same(flat, flat, fpl_oracle.printed(T=T, weight="none"))


def test_what_is_not_finite_is_seen(kernel):
    clean = torch.zeros(2, 5, 2, 2)
    spoilt = clean.clone()
    spoilt[1, 1, 0, 0] = torch.nan
    for logits in ((spoilt, clean), (clean, spoilt)):
        loss, _ = fused.fpl_loss(*logits, 0.0, fpl_oracle.printed())
        assert loss.isnan().nonzero().tolist() == [[1, 0, 0]]


@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.skipif(not COMPILER, reason="inductor wants a C++ compiler and Python's headers")
def test_what_inductor_makes_of_it_is_the_same(monkeypatch):
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(fused, "fpl_of_pixels", torch.compile(fused.fpl_of_pixels))
    t = torch.randn(1, 4, 16, 1)
    t[..., :8, :] = t[..., :8, :].round()  # ties
    assert_same(3 * torch.randn(t.shape), t, fpl_oracle.printed())
    assert counters["stats"]["unique_graphs"] > 0  # it was compiled
