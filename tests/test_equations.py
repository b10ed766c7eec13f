"""Losses and maps of all scripts against oracles/: one table, crossed with what holds for each row.

A new script is covered by its oracles and its rows. Numbers worked out by hand and what draws:
test_borders.py. A function that stands in several scripts is one text, tested once.
"""

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

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
from oracles import esl as esl_oracle
from oracles import fpl as fpl_oracle
from oracles import mean_teacher as mt_oracle
from oracles import supervised as supervised_oracle
from oracles import u2pl as u2pl_oracle
from oracles import unimatch as unimatch_oracle

KINDS = ["random", "diffuse", "one-hot", "flat", "tied"]  # of teachers
MASKS = ["some", "all", "padded", "nothing"]
CLASSES = [2, pytest.param(21, marks=pytest.mark.smoke), 81]
HALVES = [torch.bfloat16, torch.float16]

# What a comparison may miss. float32: sums of some hundred numbers below 10, each off by 6e-8 of
# itself. float64: torch's softplus is the identity above 20, which leaves out exp(-20) = 2e-9.
NEAR = {torch.float32: dict(rel=1e-5, abs=5e-6), torch.float64: dict(rel=1e-9, abs=3e-9)}


class Case(NamedTuple):
    """What functions take: four images, or two for each of two networks."""

    z: torch.Tensor  # (4, C, H, W), the student's logits
    t: torch.Tensor  # the teacher's
    prob: torch.Tensor  # its softmax, or what takes its place
    inside: torch.Tensor  # (4, H, W) bool, the same for both halves
    label: torch.Tensor  # (4, H, W), a quarter void, and all that is outside
    rate: torch.Tensor  # (C,) multiples of 1 / 1024, so that 1 - rate is exact; a 1, and a 0

    @property
    def target(self):
        return self.prob.detach()


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
    inside = torch.cat([inside, inside])
    label = torch.randint(classes, inside.shape, generator=rng)
    label[(torch.rand(inside.shape, generator=rng) < 0.25) | ~inside] = 255
    rate = torch.randint(1, 1024, (classes,), generator=rng).to(dtype) / 1024
    rate[seed % classes] = 1.0
    rate[(seed + 1) % classes] = 0.0 if classes > 2 else 0.5
    return Case(z.to(dtype), t.to(dtype), t.to(dtype).softmax(1), inside, label, rate)


def images(x):
    """(B, C, H, W) or (B, H, W) as a list of images, each a list of pixels."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1, 2).tolist()


def pixels(x):
    """All pixels of all images in one list."""
    return sum(images(x), [])


class Row(NamedTuple):
    """product(case): (scalar, parts); oracle(case): (value, gradient, parts).

    double: whether it computes in float64 where that is given, or something in float32. counts: the
    map that says which pixels count. A gradient of None: gradcheck's takes its place.
    """

    name: str
    product: Any
    oracle: Any
    double: bool = True
    counts: str = "inside"


def loss(function, oracle, names, *rest, double=False):
    """A row of a function that returns a loss alone; names: what it takes of a case."""
    names = names.split()

    def product(case):
        return function(*(getattr(case, name) for name in names), *rest), {}

    def expected(case):
        return *oracle(*(images(getattr(case, name)) for name in names), *rest), {}

    name = " ".join([function.__name__, *map(str, rest)])
    return Row(name, product, expected, double, "label" if "label" in names else "inside")


def several(case, args):
    """K of several T, which the oracle is told; None of one."""
    if len(args.T) > 1:
        fpl_oracle.choose(case.t.movedim(1, -1).tolist(), case.inside.tolist(), args)
        return cps_fpl.adaptive_assignment(case.t, case.inside, args)


def cross_loss(progress=0.0, **changes):
    """A row of CPS: the first two images are network 1's, the others network 2's."""
    args = fpl_oracle.printed(**changes)

    def product(case):
        both = case.z.chunk(2), case.t.chunk(2)
        K = several(case, args)
        K = (None, None) if K is None else K.chunk(2)
        value, parts = cps_fpl.cross_loss(*both, case.inside[:2], progress, args, K)
        return value, counted(parts)

    def expected(case):
        both = [(x[:2], x[2:]) for x in (images(case.z), images(case.t))]
        value, gradients, parts = fpl_oracle.cross_loss(
            *both, images(case.inside[:2]), progress, args
        )
        return value, gradients[0] + gradients[1], counted(parts)

    def counted(parts):  # a balance that is only logged is of every fourth pixel: test_borders.py
        logged_only = args.unsup_loss != "ce" and not args.balance
        return {"unsup": parts["unsup"]} if logged_only else parts

    name = " ".join(["cross_loss", *(f"{k}={v}" for k, v in changes.items()), str(progress)])
    # cross-entropy is computed in float32, and so is the balance
    return Row(name, product, expected, args.unsup_loss != "ce" and not args.balance)


def consistency_loss(pooled, **changes):
    """A row of AEL: equalization sampling keeps the pixels that a seed draws."""
    args = fpl_oracle.printed(**changes)

    def product(case):
        torch.manual_seed(3)
        maps = case.z, case.t, case.inside, case.rate
        return ael_fpl.consistency_loss(*maps, pooled, args, several(case, args))

    def expected(case):
        torch.manual_seed(3)
        u = torch.rand(case.inside.shape, dtype=torch.promote_types(case.t.dtype, torch.float32))
        maps = [images(x) for x in (case.z, case.t, case.inside)]
        rest = case.rate.tolist(), images(u), pooled, case.z.shape[3], args
        return ael_oracle.consistency(*maps, *rest)

    name = " ".join(["consistency_loss", str(pooled), *(f"{k}={v}" for k, v in changes.items())])
    return Row(name, product, expected)


def weak_to_strong(**changes):
    """A row of UniMatch: what a weak image teaches its strong view, over 17 pixels."""
    args = fpl_oracle.printed(**changes)

    def consistency(z, t, inside):
        return unimatch.consistency(z, unimatch.lesson(t, inside, args), 17.0, args)

    def oracle(*maps):
        return unimatch_oracle.consistency(*maps, 17.0, args)

    row = loss(consistency, oracle, "z t inside", double=True)
    return row._replace(name=" ".join(["consistency", *(f"{k}={v}" for k, v in changes.items())]))


def equalized(pooled, divide_by, gamma=2.0):
    """A row of AEL's Eq. (12) with U2PL's labels; those that a seed draws are kept."""
    args = SimpleNamespace(divide_by=divide_by, gamma=gamma)

    def maps(case):
        label = case.t.detach().argmax(1).masked_fill(case.label == 255, 255)
        return case.z, label, u2pl.upcast(case.t.detach()).softmax(1).amax(1), case.inside

    def product(case):
        torch.manual_seed(3)
        return u2pl_ael.equalized_cross_entropy(*maps(case), case.rate, pooled, args)[0], {}

    def expected(case):
        torch.manual_seed(3)
        u = torch.rand_like(maps(case)[2])
        rest = case.rate.tolist(), images(u), pooled, args
        return *ael_oracle.equalized_cross_entropy(*map(images, maps(case)), *rest), {}

    return Row(f"equalized_cross_entropy {pooled} {divide_by} {gamma}", product, expected)


def contrast(kind, tau, of=u2pl, M=3, N=4, size=9):
    """A row of U2PL's Eq. (9) to (16): logits are features, pixels of other classes are keys."""
    args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss=kind, tau=tau)

    def chances(C):
        torch.manual_seed(7)
        return torch.rand(C, 6 + M + M * N, dtype=torch.float64)

    def product(case):
        C = case.z.shape[1]
        u = chances(C)
        rep_t = u2pl.as_rows(case.t).to(torch.promote_types(case.t.dtype, torch.float32))
        rank = u2pl.class_ranks(u2pl.as_rows(case.prob))
        label = case.label.flatten()
        unreliable = case.label[2:].flatten() != 255
        N_c = u2pl.negative_masks(rank, label, unreliable, min(3, C - 1), min(5, C))
        sizes = torch.tensor([3] + [size] * (C - 1))
        bank = torch.zeros(3 + size * (C - 1) + 1, C, dtype=rep_t.dtype)
        pushed = torch.zeros(C, dtype=torch.int64)
        for _ in range(2):
            of.push_features(bank, pushed, sizes, of.draw_features(rep_t, N_c, u[:, :6]))
        A_c = u2pl.anchor_masks(u2pl.as_rows(case.prob), label, 0.3)
        maps = A_c, bank, pushed, sizes, u[:, 6:]
        loss, counted = of.unreliable_loss(u2pl.as_rows(case.z), rep_t, *maps, args)
        return loss, {"counted": counted.sum()}

    def expected(case):
        rep_s, rep_t, prob, label = map(pixels, (case.z, case.t, case.prob, case.label))
        C = len(prob[0])
        u = chances(C).tolist()
        queues, masks = [], []
        for c in range(C):
            hits = u2pl_oracle.negatives(prob, label, c, min(3, C - 1), min(5, C))
            keys = [u2pl_oracle.unit(rep_t[i]) for i in u2pl_oracle.keys(hits, u[c][:6])]
            queues.append(u2pl_oracle.ring(keys + keys, 3 if c == 0 else size))
            # Eq. (9) to (11): labelled c, p(c) above delta_p
            masks.append([k == c and p[c] > 0.3 for p, k in zip(prob, label, strict=True)])
        anchors = [row[6 : 6 + M] for row in u]
        others = [[row[6 + M + m * N :][:N] for m in range(M)] for row in u]
        rest = masks, queues, anchors, others, kind, tau
        value, counted = u2pl_oracle.unreliable_loss(rep_s, rep_t, *rest)
        return value, None, {"counted": counted}

    name = f"{of.__name__}.unreliable_loss {kind} {tau} {N}"
    return Row(name, product, expected, True, "label")


def part_contrast(share, of=esl, K=2, q=3, A=4, N=5):
    """A row of ESL's Eq. (7) to (12): the teacher's logits are its features, at every stage."""
    args = SimpleNamespace(parts=K, queue=q, anchors=A, negatives=N, anchor_share=share, sigma=0.5)

    def chances(C, dtype):
        torch.manual_seed(7)
        prototypes = torch.randn(C, K, C, dtype=torch.float64)
        prototypes[0] = 0.0  # a class that the labelled set does not have: its first part
        u = torch.rand(C, A + 1, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        return prototypes.to(wide), u, torch.rand(C, A, 1 + N, dtype=torch.float64)

    def product(case):
        C = case.z.shape[1]
        P, *u = chances(C, case.t.dtype)
        ids = esl.part_ids(case.t.detach(), P, case.label)
        sums = esl.part_sums(case.t.detach(), ids, C * K)
        new = esl.update_prototypes(P, sums.sum(0), 0.9)
        bank = torch.zeros(C * K * q + 1, C, dtype=P.dtype)
        pushed = torch.zeros(C * K, dtype=torch.int64)
        each = sums.transpose(0, 1)  # of an image; (C K, 4, D + 1)
        offered = torch.cat([F.normalize(each[..., :-1], dim=2), each[..., -1:]], 2)
        esl.push_features(bank, pushed, torch.full((C * K,), q), offered)
        rep_s = esl.as_rows(case.z)
        loss, count = of.part_contrast(rep_s, ids.flatten(), bank, pushed, *u, args)
        return loss, dict(count=count, prototypes=new)

    def expected(case):
        C = case.z.shape[1]
        P, u, v = (x.tolist() for x in chances(C, case.t.dtype))
        features, ids = images(case.t), []
        for image, label in zip(features, images(case.label), strict=True):
            ids.append([esl_oracle.part_of(e, c, P) for e, c in zip(image, label, strict=True)])
        queues, new = [], []
        for r in range(C * K):
            found = [[e for e, of in zip(*x, strict=True) if of == r] for x in zip(features, ids)]  # noqa: B905
            keys = [u2pl_oracle.unit(u2pl_oracle.mean(x)) for x in found if x]
            queues.append(u2pl_oracle.ring(keys, q))
            new += esl_oracle.moved_prototype(P[r // K][r % K], sum(found, []), 0.9)
        rest = sum(ids, []), queues, u, v, K, share, 0.5
        value, count = esl_oracle.part_contrast(pixels(case.z), *rest)
        return value, None, dict(count=count, prototypes=new)

    return Row(f"{of.__name__}.part_contrast {share}", product, expected, False, "label")


RELEASED = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True)
STRATEGIES = ["n-1", "n", "fixed2", "fixed3", "step"]
WEIGHTS = ["concave", "linear", "convex", "none"]
SEVERAL = (0.4437, 0.6437, 0.8937, 0.9837)  # A-FPL's --T
OVER = ["positives", "positives_and_next"]
BOTH_OHEM = supervised.ohem_cross_entropy, supervised_oracle.ohem_cross_entropy
OHEM = [(0.7, 3), (0.05, 0), (0.2, 7), (0.1, 1000), (1.0, 1)]  # threshold, pixels at least
ROWS = [
    loss(supervised.cross_entropy, supervised_oracle.cross_entropy, "z label"),
    loss(mean_teacher.consistency_ce, mt_oracle.consistency_ce, "z prob inside"),
    loss(mean_teacher.consistency_mse, mt_oracle.consistency_mse, "z prob inside"),
    *(cross_loss(unsup_loss=name) for name in ("fpl", "ce", "soft", "negative")),
    cross_loss(**RELEASED),
    consistency_loss(1, unsup_loss="ce", threshold=0.6),
    cross_loss(fused="on"),
    consistency_loss(2),
    consistency_loss(4, **RELEASED, threshold=0.5),
    weak_to_strong(),
    weak_to_strong(unsup_loss="ce", threshold=0.3),
    equalized(2, "reliable"),
    loss(esl.soft_cross_entropy, esl_oracle.soft_cross_entropy, "z target inside", double=True),
    contrast("contrastive", 0.5),
    contrast("binary", 0.1),
    contrast("contrastive", 0.5, fused),
    part_contrast(0.1),
    part_contrast(0.1, fused),
]
VARIANTS = [  # flags that reach a loss: every value of each, compared at a few classes
    *(loss(*BOTH_OHEM, "z label", *rest) for rest in OHEM),
    *(cross_loss(unsup_loss=name, balance=True) for name in ("ce", "soft", "negative")),
    *(cross_loss(0.5, T=0.8537, k_strategy=name, k_max=k) for name in STRATEGIES for k in (0, 2)),
    *(cross_loss(p, k_strategy="step") for p in (0.33, 1 / 3, 0.66, 2 / 3, 0.999)),
    *(cross_loss(T=T, strict=s) for T in (0.5037, 0.9537) for s in (True, False)),
    *(cross_loss(0.5, T=0.8537, k_strategy=name, k_max=3, fused="on") for name in STRATEGIES),
    *(cross_loss(weight=kind, mean_over=over) for kind in WEIGHTS for over in OVER),
    *(cross_loss(weight=w, mean_over=OVER[w == "linear"], fused="on") for w in WEIGHTS),
    *(contrast(kind, 0.1, fused, N=n) for kind in ("contrastive", "binary") for n in (4, 600)),
    part_contrast(1.0, fused),
    *(contrast("contrastive", tau) for tau in (10, 0.01)),
    *(part_contrast(share) for share in (0.0, 0.5, 1.0)),
    *(consistency_loss(p, **c) for p in (1, 2) for c in (dict(balance=True), RELEASED)),
    consistency_loss(2, fused="on"),
    weak_to_strong(fused="on"),
    weak_to_strong(T=0.6037, k_max=3, strict=False, weight="linear"),
    weak_to_strong(unsup_loss="ce", threshold=0.6),
    *(cross_loss(T=SEVERAL, **c) for c in ({}, RELEASED)),
    *(consistency_loss(2, T=SEVERAL, **c) for c in ({}, RELEASED)),
    *(consistency_loss(p, unsup_loss="ce", gamma=g) for p, g in ((2, 0.5), (4, 0.0))),
    *(equalized(p, over, p / 2) for p in (1, 4) for over in ("reliable", "all")),
    consistency_loss(1, **RELEASED, weight="linear", T=0.6537, gamma=0.0),
    consistency_loss(2, weight="convex", k_max=2, strict=False, threshold=0.6, gamma=1.0),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def run(row, case):
    """Value, parts and gradient of a row."""
    z = case.z.detach().requires_grad_()
    value, parts = row.product(case._replace(z=z))
    assert value.shape == ()
    return value, parts, torch.autograd.grad(value, z)[0]


def compare(row, case, near=None):
    """Value, gradient and parts of a row are its oracle's."""
    value, parts, found = run(row, case)
    expected, gradient, expected_parts = row.oracle(case)
    near = near or NEAR[case.z.dtype if row.double else torch.float32]
    assert value.item() == pytest.approx(expected, **near)
    if gradient is not None:
        slopes = [number for image in gradient for slope in image for number in slope]
        assert found.movedim(1, -1).flatten().tolist() == pytest.approx(slopes, **near)
    elif case.z.dtype == torch.float64 and case.z.shape[1] < 6 and case.z.abs().max() < 100:
        of = lambda x: row.product(case._replace(z=x))[0]  # noqa: E731
        assert torch.autograd.gradcheck(of, case.z.requires_grad_(), fast_mode=True)
    assert set(parts) == set(expected_parts)
    for name, part in parts.items():
        if name == "balance" and 0 < parts["unsup"] < 1e-9:
            continue  # what rounding says; 1 where the loss is exactly 0
        wanted = torch.tensor(expected_parts[name], dtype=torch.float64)
        assert torch.allclose(part.double().flatten(), wanted, rtol=1e-5, atol=5e-6), name


@pytest.mark.parametrize("classes", CLASSES)
@every_row
def test_value_and_gradient(row, classes):
    """Eq. by Eq.; ties go to the lowest class, void and outside do not count, nothing is 0."""
    for seed, kind in enumerate(KINDS):
        if kind != "flat" or "balance=True" not in row.name:  # a factor of what is 0 by rounding
            compare(row, draw_case(classes, kind, MASKS[seed % 3], seed))
    compare(row, draw_case(classes, "diffuse", "nothing", 8))
    compare(row, draw_case(classes, "random", "some", 9, torch.float32))


@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.name)
def test_every_flag_reaches_its_loss(row):
    for seed, (kind, classes) in enumerate(itertools.product(("random", "diffuse"), (2, 5, 11))):
        compare(row, draw_case(classes, kind, MASKS[seed % 3], 20 + seed))


@every_row
def test_logits_of_ten_thousand(row):
    """Finite in any type, and the oracle's value in float64."""
    for classes, mask in ((2, "some"), (5, "all")):
        drawn = draw_case(classes, "random", mask)
        ones, others = drawn.z.clamp(-1, 1), drawn.t.clamp(-1, 1)
        students = 1e4 * ones.sign(), 1e4 * ones, torch.where(ones > 0.5, 1e4, ones)
        for z, t in itertools.product(students, (1e4 * others, -students[0], 0 * ones)):
            case = drawn._replace(z=z, t=t, prob=t.softmax(1))
            if row.double:
                compare(row, case, dict(rel=1e-9, abs=1e-7))
            for dtype in (torch.float32, *HALVES):
                low = case._replace(z=z.to(dtype), t=t.to(dtype), prob=case.prob.to(dtype))
                value, parts, gradient = run(row, low._replace(rate=case.rate.float()))
                assert all(x.isfinite().all() for x in (value, gradient, *parts.values()))


@every_row
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_counts_in_float32(row, dtype):
    for classes, kind in itertools.product((2, 19), ("random", "flat")):
        case = draw_case(classes, kind, dtype=torch.float32)
        low = {name: getattr(case, name).to(dtype) for name in ("z", "t", "prob")}
        wide = {name: x.float() for name, x in low.items()}
        value, parts, gradient = run(row, case._replace(**low))
        same, same_parts, other = run(row, case._replace(**wide))
        assert value.dtype == torch.float32 and torch.equal(value, same)
        for name, part in parts.items():
            assert part.dtype not in HALVES and torch.equal(part, same_parts[name])
        # it comes back in the type of the logits: rounded to 8 or 11 bits, of two heads twice
        assert torch.allclose(gradient.float(), other, rtol=0.02, atol=3e-4)


@every_row
def test_the_teacher_gets_no_gradient_and_parts_give_none(row):
    case = draw_case(5, "random")
    for x in (case.z, case.t, case.prob):
        x.requires_grad_()
    value, parts = row.product(case)
    (value + sum(part.sum() for part in parts.values())).backward()
    assert case.t.grad is None and case.prob.grad is None
    assert case.z.grad.any() and torch.equal(case.z.grad, run(row, case)[2])


@every_row
def test_pixels_that_do_not_count_change_nothing(row):
    """Value, parts and gradient are the same bit for bit, and the gradient there is 0."""
    case, other = draw_case(5, "diffuse"), draw_case(5, "random", seed=3)
    hidden = (case.label == 255 if row.counts == "label" else ~case.inside)[:, None]
    laid = {n: torch.where(hidden, getattr(other, n), getattr(case, n)) for n in ("z", "t", "prob")}
    value, parts, gradient = run(row, case)
    same, same_parts, again = run(row, case._replace(**laid))
    assert not gradient[hidden.expand_as(gradient)].any()
    assert torch.equal(value, same) and torch.equal(gradient, again)
    assert all(torch.equal(part, same_parts[name]) for name, part in parts.items())


MAPS = {"entropy": (lambda case: u2pl.entropy(case.prob), u2pl_oracle.entropy)}
LABELS = [("soft", 0, 0), ("hard", 0, 0)]
LABELS += [(k, *x) for k in ("dynamic", "topk") for x in ((0.5, 1), (0.8, 3), (0.999, 90))]
for words in LABELS:
    flags = SimpleNamespace(**dict(zip(("label", "eta", "top_k"), words, strict=True)))
    MAPS["soft_label {} {} {}".format(*words)] = (
        lambda case, flags=flags: esl.soft_label(case.prob, flags),
        lambda p, words=words: esl_oracle.soft_label(p, *words),
    )


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", MAPS)
def test_maps(name, classes):
    product, oracle = MAPS[name]
    for seed, kind in enumerate(KINDS):
        for dtype in NEAR if kind == "random" else (torch.float64,):
            case = draw_case(classes, kind, seed=seed, dtype=dtype)
            found = product(case)
            assert found.dtype == dtype
            expected = torch.tensor([oracle(p) for p in pixels(case.prob)], dtype=torch.float64)
            found = torch.tensor(pixels(found), dtype=torch.float64)
            near = NEAR[dtype]
            assert torch.allclose(found, expected, rtol=near["rel"], atol=near["abs"])
