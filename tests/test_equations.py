"""Losses and maps of all scripts against oracles/: one table, crossed with what holds for each row.

A new script is covered by its oracles and its rows. Numbers worked out by hand: test_borders.py;
what draws: test_samplers.py. A function that stands in several scripts is one text, tested once.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import supervised
import u2pl
from oracles import ael as ael_oracle
from oracles import esl as esl_oracle
from oracles import fpl as fpl_oracle
from oracles import mean_teacher as mt_oracle
from oracles import supervised as supervised_oracle
from oracles import u2pl as u2pl_oracle

KINDS = ["random", "diffuse", "one-hot", "flat", "tied"]  # of teachers
MASKS = ["some", "all", "padded", "nothing"]
CLASSES = [2, 3, pytest.param(21, marks=pytest.mark.smoke), 81]
HALVES = [torch.bfloat16, torch.float16]

# What a comparison may miss. float32: sums of some hundred numbers below 10, each off by 6e-8 of
# itself. float64: torch's softplus is the identity above 20, which leaves out exp(-20) = 2e-9.
NEAR = {torch.float32: dict(rel=1e-5, abs=5e-6), torch.float64: dict(rel=1e-9, abs=3e-9)}


@dataclasses.dataclass
class Case:
    """What functions take: four images, or two for each of two networks."""

    z: torch.Tensor  # (4, C, H, W), the student's logits
    t: torch.Tensor  # the teacher's
    prob: torch.Tensor  # its softmax, or what takes its place
    inside: torch.Tensor  # (4, H, W) bool, the same for both halves
    label: torch.Tensor  # (4, H, W), a quarter void, and all that is outside
    K: torch.Tensor  # (4, H, W), 1 to C
    rate: torch.Tensor  # (C,) multiples of 1 / 1024, so that 1 - rate is exact; a 1, and a 0

    @property
    def target(self):
        return self.prob.detach()


def draw_case(classes, kind="random", mask="some", seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(1000 * seed + 10 * classes + KINDS.index(kind))
    height, width = (2, 2) if classes > 21 else (5, 6)
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
    K = torch.randint(1, classes + 1, inside.shape, generator=rng)
    rate = torch.randint(1, 1024, (classes,), generator=rng).to(dtype) / 1024
    rate[seed % classes] = 1.0
    rate[(seed + 1) % classes] = 0.0 if classes > 2 else 0.5
    return Case(z.to(dtype), t.to(dtype), t.to(dtype).softmax(1), inside, label, K, rate)


def images(x):
    """(B, C, H, W) or (B, H, W) as a list of images, each a list of pixels."""
    return (x.movedim(1, -1) if x.ndim == 4 else x).flatten(1, 2).tolist()


def pixels(x):
    """All pixels of all images in one list."""
    return sum(images(x), [])


RELEASED = dict(k_max=3, strict=False, mean_over="positives_and_next", balance=True)


# ---- the table ----


class Row(NamedTuple):
    """product(case): (scalar or map, parts); oracle(case): (values, gradient of their sum, parts).

    double: whether it computes in float64 where that is given, or something in float32. counts: the
    map that says which pixels count.
    """

    name: str
    product: Any
    oracle: Any
    double: bool = True
    counts: str = "inside"


def loss(function, oracle, names, *rest, double=False):
    """A row of a function that returns a scalar loss; names: what it takes of a case."""
    names = names.split()

    def product(case):
        return function(*(getattr(case, name) for name in names), *rest), {}

    def expected(case):
        return *oracle(*(images(getattr(case, name)) for name in names), *rest), {}

    name = " ".join([function.__name__, *map(str, rest)])
    return Row(name, product, expected, double, "label" if "label" in names else "inside")


def pixel_loss(function, oracle, names):
    """A row of a function that returns a map of losses; its oracle is of one pixel."""
    names = names.split()

    def product(case):
        return function(*(getattr(case, name) for name in names)), {}

    def expected(case):
        rows = zip(*(pixels(getattr(case, name)) for name in names), strict=True)
        values, slopes = zip(*(oracle(*row) for row in rows), strict=True)
        count = len(slopes) // 4
        return list(values), [slopes[i * count : (i + 1) * count] for i in range(4)], {}

    return Row(function.__name__, product, expected)


def balanced(name):
    """Whether a row rescales FPL's loss: to what rounding says, where a flat teacher makes it 0."""
    return "balance=True" in name


def cross_loss(progress=0.0, **changes):
    """A row of CPS: the first two images are network 1's, the others network 2's."""

    def product(case):
        both = case.z.chunk(2), case.t.chunk(2)
        return cps_fpl.cross_loss(*both, case.inside[:2], progress, fpl_oracle.printed(**changes))

    def expected(case):
        both = [(x[:2], x[2:]) for x in (images(case.z), images(case.t))]
        rest = images(case.inside[:2]), progress, fpl_oracle.printed(**changes)
        value, gradients, parts = fpl_oracle.cross_loss(*both, *rest)
        return value, gradients[0] + gradients[1], parts

    name = " ".join(["cross_loss", *(f"{k}={v}" for k, v in changes.items()), str(progress)])
    # cross-entropy is computed in float32, and so is the balance
    return Row(name, product, expected, changes.get("unsup_loss") != "ce" and not balanced(name))


def consistency_loss(pooled, **changes):
    """A row of AEL: equalization sampling keeps the pixels that a seed draws."""

    def product(case):
        torch.manual_seed(3)
        parts = case.z, case.t, case.inside, case.rate, pooled, fpl_oracle.printed(**changes)
        return ael_fpl.consistency_loss(*parts)

    def expected(case):
        torch.manual_seed(3)
        u = torch.rand(case.inside.shape, dtype=torch.promote_types(case.t.dtype, torch.float32))
        maps = [images(x) for x in (case.z, case.t, case.inside)]
        rest = case.rate.tolist(), images(u), pooled, case.z.shape[3], fpl_oracle.printed(**changes)
        return ael_oracle.consistency(*maps, *rest)

    name = " ".join(["consistency_loss", str(pooled), *(f"{k}={v}" for k, v in changes.items())])
    return Row(name, product, expected)


def regularization(z, p, K):
    return fpl_oracle.regularization(z, fpl_oracle.order(p)[:K])


def both_heads(share):
    """supervised_loss of two heads, the second one's classes in the opposite order."""
    args = SimpleNamespace(ohem_kept=share, crop_size=10, aux_weight=0.4)

    def product(case):
        out = {"logits": case.z, "aux": case.z.flip(1)}
        return supervised.supervised_loss(out, case.label, args), {}

    def expected(case):
        oracle, label, kept = supervised_oracle, images(case.label), round(share * 100)
        found = []
        for z in (case.z, case.z.flip(1)):
            rest = (label, 0.7, kept) if share else (label,)
            of = oracle.ohem_cross_entropy if share else oracle.cross_entropy
            found.append(of(images(z), *rest))
        (main, gradient), (aux, other) = found
        for image, slopes in zip(gradient, other, strict=True):
            for i, slope in enumerate(slopes):
                image[i] = [a + 0.4 * b for a, b in zip(image[i], slope[::-1], strict=True)]
        return main + 0.4 * aux, gradient, {}

    return Row(f"supervised_loss {share}", product, expected, False, "label")


def selected(share, eta):
    """A row of U2PL's Eq. (2) to (8); entropies are rounded, so that equal ones are equal."""

    def product(case):
        H = (1e6 * u2pl.entropy(case.prob.detach())).round() / 1e6
        (gamma,) = u2pl.quantiles(H, case.inside, share)
        label = u2pl.reliable_labels(mean_teacher.pseudo_labels(case.prob, case.inside), H, gamma)
        weight = u2pl.unsup_weight(label, case.inside, eta)
        parts = dict(gamma=gamma, weight=weight)
        return weight * supervised.cross_entropy(case.z, label), parts

    def expected(case):
        H = [[round(1e6 * u2pl_oracle.entropy(p)) / 1e6 for p in x] for x in images(case.prob)]
        inside = images(case.inside)
        rows = zip(sum(H, []), sum(inside, []), strict=True)
        gamma = u2pl_oracle.percentile([h for h, hit in rows if hit], share)
        label = mt_oracle.pseudo_labels(images(case.prob), inside)
        label = [[k if h < gamma else 255 for k, h in zip(*x)] for x in zip(label, H)]  # noqa: B905
        count = sum(k != 255 for x in label for k in x)
        weight = eta * sum(map(sum, inside)) / max(count, 1)  # Eq. (8)
        value, gradient = supervised_oracle.cross_entropy(images(case.z), label)
        gradient = [[supervised_oracle.scaled(g, weight) for g in x] for x in gradient]
        return weight * value, gradient, dict(gamma=gamma, weight=weight)

    return Row(f"u2pl Eq. (2) to (8) {share} {eta}", product, expected, False)


def contrast(kind, tau, M=3, N=4, size=9):
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
        known = case.label[2:].flatten() != 255
        N_c = u2pl.negative_masks(rank, label, known, min(3, C - 1), min(5, C))
        sizes = torch.tensor([3] + [size] * (C - 1))
        bank = torch.zeros(3 + size * (C - 1) + 1, C, dtype=rep_t.dtype)
        pushed = torch.zeros(C, dtype=torch.int64)
        for _ in range(2):
            u2pl.push_keys(bank, pushed, sizes, u2pl.draw_keys(rep_t, N_c, u[:, :6]))
        A_c = u2pl.anchor_masks(u2pl.as_rows(case.prob), label, 0.3)
        maps = A_c, bank, pushed, sizes, u[:, 6:]
        loss, counted = u2pl.unreliable_loss(u2pl.as_rows(case.z), rep_t, *maps, args)
        return loss, {"counted": counted.sum()}

    def expected(case):
        maps = case.z, case.t, case.prob, case.label
        rep_s, rep_t, prob, label = map(pixels, maps)
        C, half = len(prob[0]), len(prob) // 2
        u = chances(C).tolist()
        ranks = [u2pl_oracle.ranks(p) for p in prob]
        queues, masks = [], []
        for c in range(C):
            hits = [
                u2pl_oracle.is_labelled_negative(ranks[i], label[i], c, min(3, C - 1))
                if i < half
                else u2pl_oracle.is_unlabelled_negative(
                    ranks[i], label[i] != 255, c, min(3, C - 1), min(5, C)
                )
                for i in range(2 * half)
            ]
            keys = [u2pl_oracle.unit(rep_t[i]) for i in u2pl_oracle.keys(hits, u[c][:6])]
            queues.append(u2pl_oracle.ring(keys + keys, 3 if c == 0 else size))
            masks.append([u2pl_oracle.is_anchor(*x, c, 0.3) for x in zip(prob, label, strict=True)])
        anchors = [row[6 : 6 + M] for row in u]
        others = [[row[6 + M + m * N :][:N] for m in range(M)] for row in u]
        rest = masks, queues, anchors, others, kind, tau
        value, counted = u2pl_oracle.unreliable_loss(rep_s, rep_t, *rest)
        return value, None, {"counted": sum(counted)}

    return Row(f"unreliable_loss {kind} {tau} {M} {N}", product, expected, True, "label")


def part_contrast(share, K=2, q=3, A=4, N=5):
    """A row of ESL's Eq. (7) to (12): the teacher's logits are its features, at every stage."""
    args = SimpleNamespace(parts=K, queue=q, anchors=A, negatives=N, anchor_share=share, sigma=0.5)

    def chances(C):
        torch.manual_seed(7)
        prototypes = torch.randn(C, K, C, dtype=torch.float64)
        prototypes[0] = 0.0  # a class that the labelled set does not have: its first part
        torch.manual_seed(8)
        u = torch.rand(C, A + 1, dtype=torch.float64)
        return prototypes, u, torch.rand(C, A, 1 + N, dtype=torch.float64)

    def product(case):
        C = case.z.shape[1]
        wide = torch.promote_types(case.t.dtype, torch.float32)
        P = chances(C)[0].to(wide)
        with torch.no_grad():
            # twice as fine: the nearest pixels, corners on corners, are those of the features
            fine = case.label.repeat_interleave(2, 1).repeat_interleave(2, 2)
            ids = esl.part_ids(case.t, P, fine)
            sums = esl.part_sums(case.t, ids, C * K)
            new = esl.update_prototypes(P, sums.sum(0), 0.9)
        bank, pushed = torch.zeros(C * K * q + 1, C), torch.zeros(C * K, dtype=torch.int64)
        each = sums.transpose(0, 1)  # of an image; (C K, 4, D + 1)
        offered = torch.cat([F.normalize(each[..., :-1], dim=2), each[..., -1:]], 2)
        esl.push_keys(bank, pushed, torch.full((C * K,), q), offered)
        state = dict(prototypes=P, bank=bank.to(wide), pushed=pushed)
        torch.manual_seed(8)
        loss, count = esl.part_contrast(case.z, ids, state, args)
        weights = torch.arange(1.0, C * K * C + 1, dtype=new.dtype).view_as(new).log()
        return loss, dict(count=count, prototypes=(new * weights).mean())

    def expected(case):
        C, (P, u, v) = case.z.shape[1], chances(case.z.shape[1])
        P = P.to(torch.promote_types(case.t.dtype, torch.float32)).tolist()
        features, ids = images(case.t), []
        for image, label in zip(features, images(case.label), strict=True):
            ids.append([esl_oracle.part_of(e, c, P) for e, c in zip(image, label, strict=True)])
        queues, new = [], []
        for r in range(C * K):
            found = [[e for e, of in zip(*x, strict=True) if of == r] for x in zip(features, ids)]  # noqa: B905
            keys = [u2pl_oracle.unit(u2pl_oracle.mean(x)) for x in found if x]
            queues.append(u2pl_oracle.ring(keys, q))
            new += esl_oracle.moved_prototype(P[r // K][r % K], sum(found, []), 0.9)
        rest = sum(ids, []), queues, u.tolist(), v.tolist(), K, share, 0.5
        value, count = esl_oracle.part_contrast(pixels(case.z), *rest)
        weighted = math.fsum(x * math.log(i) for i, x in enumerate(new, 1)) / len(new)
        return value, None, dict(count=count, prototypes=weighted)

    return Row(f"part_contrast {share}", product, expected, False, "label")


ROWS = [
    loss(supervised.cross_entropy, supervised_oracle.cross_entropy, "z label"),
    *(
        loss(supervised.ohem_cross_entropy, supervised_oracle.ohem_cross_entropy, "z label", *rest)
        for rest in ((0.7, 3), (0.05, 0), (0.2, 7), (0.1, 1000), (1.0, 1))
    ),
    both_heads(0.0),
    both_heads(0.07),
    loss(mean_teacher.consistency_ce, mt_oracle.consistency_ce, "z prob inside"),
    loss(mean_teacher.consistency_mse, mt_oracle.consistency_mse, "z prob inside"),
    pixel_loss(cps_fpl.fuzzy_positive_regularization, regularization, "z prob K"),
    pixel_loss(cps_fpl.soft_loss, fpl_oracle.soft, "z prob"),
    pixel_loss(cps_fpl.negative_loss, fpl_oracle.negative, "z prob"),
    *(cross_loss(unsup_loss=name) for name in ("fpl", "ce", "soft", "negative")),
    cross_loss(**RELEASED),
    consistency_loss(1, unsup_loss="ce", threshold=0.6),
    consistency_loss(2),
    consistency_loss(4, **RELEASED, threshold=0.5),
    loss(esl.soft_cross_entropy, esl_oracle.soft_cross_entropy, "z target inside", double=True),
    selected(0.8, 1.0),
    contrast("contrastive", 0.5),
    contrast("binary", 0.1),
    part_contrast(0.1),
    part_contrast(1.0),
]
STRATEGIES = ["n-1", "n", "fixed2", "fixed3", "step"]
WEIGHTS = ["concave", "linear", "convex", "none"]
OVER = ["positives", "positives_and_next"]
CHUNKS = [(1, 1), (5, 515), (7, 200)]  # anchors and negatives: an anchor at a time; two, and one
VARIANTS = [  # flags that reach a loss: every value of each, compared at a few classes
    *(cross_loss(unsup_loss=name, balance=True) for name in ("ce", "soft", "negative")),
    *(
        cross_loss(progress, T=0.8537, k_strategy=name, k_max=k_max, balance=bool(k_max))
        for name, progress, k_max in itertools.product(STRATEGIES, (0.0, 0.5, 0.8), (0, 2))
    ),
    *(cross_loss(weight=kind, mean_over=over) for kind, over in itertools.product(WEIGHTS, OVER)),
    *(selected(*x) for x in ((0.2, 2.5), (0.5, 1.0), (1.0, 1.0), (0.0, 1.0))),
    *(contrast("contrastive", tau) for tau in (10, 1, 0.1, 0.01)),
    *(contrast(kind, 0.5, M, N) for kind in ("contrastive", "binary") for M, N in CHUNKS),
    *(part_contrast(share) for share in (0.0, 0.5)),
    *(consistency_loss(p, **c) for p in (1, 2) for c in (dict(balance=True), RELEASED)),
    *(consistency_loss(p, unsup_loss="ce", gamma=g) for p, g in ((2, 0.5), (4, 0.0))),
    consistency_loss(2, threshold=0.5, balance=True, gamma=0.5),
    consistency_loss(1, **RELEASED, weight="linear", T=0.6537, gamma=0.0),
    consistency_loss(4, weight="none", k_max=2, T=0.9537, balance=True),
    consistency_loss(2, weight="convex", strict=False, threshold=0.6, gamma=1.0),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def compare(row, case, near=None):
    """Value, gradient and parts of a row are its oracle's."""
    z = case.z.detach().requires_grad_()
    value, parts = row.product(dataclasses.replace(case, z=z))
    expected, gradient, expected_parts = row.oracle(case)
    near = near or NEAR[case.z.dtype if row.double else torch.float32]
    assert value.dtype in (case.z.dtype, torch.float32)
    assert value.flatten().tolist() == pytest.approx(
        expected if isinstance(expected, list) else [expected], **near
    )
    (found,) = torch.autograd.grad(value.sum(), z)
    if gradient is None:
        if case.z.dtype == torch.float64 and case.z.shape[1] < 5 and case.z.abs().max() < 100:
            of = lambda x: row.product(dataclasses.replace(case, z=x))[0]  # noqa: E731
            assert torch.autograd.gradcheck(of, z, fast_mode=True)
        gradient = images(found)
    slopes = [number for image in gradient for slope in image for number in slope]
    assert found.movedim(1, -1).flatten().tolist() == pytest.approx(slopes, **near)
    assert set(parts) == set(expected_parts)
    for name, part in parts.items():
        assert part.shape == (), name
        if name == "balance" and parts["unsup"] < 1e-9:
            continue  # test_borders.py
        assert part.item() == pytest.approx(expected_parts[name], **NEAR[torch.float32]), name


@pytest.mark.parametrize("classes", CLASSES)
@every_row
def test_value_and_gradient(row, classes):
    """Eq. by Eq.; ties go to the lowest class, void and outside do not count, nothing is 0."""
    for seed, kind in enumerate(KINDS):
        if kind != "flat" or not balanced(row.name):
            compare(row, draw_case(classes, kind, MASKS[seed % 2], seed))
    compare(row, draw_case(classes, "random", "padded", 7))
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
        ones = drawn.z.clamp(-1, 1)
        others = drawn.t.clamp(-1, 1)
        mixed = torch.where(ones > 0.5, 1e4, ones)
        students = 1e4 * ones.sign(), 1e4 * ones, mixed
        for z, t in itertools.product(students, (1e4 * others, -students[0], 0 * ones)):
            case = dataclasses.replace(drawn, z=z, t=t, prob=t.softmax(1))
            if row.double:
                compare(row, case, dict(rel=1e-9, abs=1e-7))
            for dtype in (torch.float32, *HALVES):
                z = case.z.to(dtype).requires_grad_()
                low = dict(z=z, t=t.to(dtype), rate=case.rate.float(), prob=case.prob.to(dtype))
                value, parts = row.product(dataclasses.replace(case, **low))
                (gradient,) = torch.autograd.grad(value.sum(), z)
                assert value.isfinite().all() and gradient.isfinite().all()
                assert all(part.isfinite() for part in parts.values())


@every_row
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_counts_in_float32(row, dtype):
    for classes, kind in itertools.product((2, 19), ("random", "flat")):
        case = draw_case(classes, kind, dtype=torch.float32)
        found = []
        for widen in (lambda x: x, torch.Tensor.float):
            logits = {name: widen(getattr(case, name).to(dtype)) for name in ("z", "t", "prob")}
            z = logits["z"].requires_grad_()
            value, parts = row.product(dataclasses.replace(case, **logits))
            (gradient,) = torch.autograd.grad(value.sum(), z)
            found.append([value, *parts.values(), gradient.float()])
        assert not any(x.dtype in HALVES for x in found[0][:-1])
        assert all(torch.equal(x, y) for x, y in zip(found[0][:-1], found[1][:-1], strict=True))
        # it comes back in the type of the logits: rounded to 8 or 11 bits, of two heads twice
        assert torch.allclose(found[0][-1], found[1][-1], rtol=0.02, atol=3e-4)


@every_row
def test_the_teacher_gets_no_gradient_and_parts_give_none(row):
    case = draw_case(5, "random")
    for x in (case.z, case.t, case.prob):
        x.requires_grad_()
    value, parts = row.product(case)
    value.sum().backward(retain_graph=True)
    assert case.t.grad is None and case.prob.grad is None
    assert case.z.grad.any()
    for part in parts.values():
        if part.requires_grad:
            (gradient,) = torch.autograd.grad(part, case.z, retain_graph=True)
            assert not gradient.any()


@every_row
def test_pixels_that_do_not_count_change_nothing(row):
    """Value, parts and gradient are the same bit for bit, and the gradient there is 0."""
    case = draw_case(5, "diffuse")
    other = draw_case(5, "random", seed=3)
    hidden = (case.label == 255 if row.counts == "label" else ~case.inside)[:, None]
    found = []
    for source in (case, other):
        logits = {
            name: torch.where(hidden, getattr(source, name), getattr(case, name)).detach()
            for name in ("z", "t", "prob")
        }
        z = logits["z"].requires_grad_()
        value, parts = row.product(dataclasses.replace(case, **logits))
        value = value if value.ndim == 0 else value[case.inside]  # a map has no mask of its own
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert not gradient[hidden.expand_as(z)].any()
        found.append([value, *parts.values(), gradient])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@every_row
def test_memory_in_any_order_gives_the_same(row):
    case = draw_case(5, "random")
    value, parts = row.product(case)
    for lay in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],  # every other number of a row
    ):
        laid = {name: lay(getattr(case, name)) for name in ("z", "t", "prob")}
        assert not laid["z"].is_contiguous()
        again, same = row.product(dataclasses.replace(case, **laid))
        # the order of sums alone
        assert torch.allclose(again, value, rtol=1e-6, atol=1e-9)
        for name in parts:
            assert torch.allclose(same[name], parts[name], rtol=1e-6), name


# ---- maps of the teacher: no gradient ----


def label_of(kind, eta=0.95, top_k=5):
    args = SimpleNamespace(label=kind, eta=eta, top_k=top_k)
    name = f"soft_label {kind} {eta} {top_k}"
    return (
        name,
        lambda case: esl.soft_label(case.prob, args),
        lambda p, K: esl_oracle.soft_label(p, kind, eta, top_k),
    )


def positives_of(progress, **changes):
    name = " ".join(["k_values", str(progress), *map(str, changes.values())])
    return (
        name,
        lambda case: cps_fpl.k_values(case.prob, progress, fpl_oracle.printed(**changes)),
        lambda p, K: fpl_oracle.positives(p, fpl_oracle.printed(**changes), progress),
    )


def weight_of(kind, over):
    return (
        f"adaptive_weight {kind} {over}",
        lambda case: cps_fpl.adaptive_weight(case.prob, case.K, kind, over),
        lambda p, K: fpl_oracle.weight(p, K, kind, over),
    )


def assignment_of(T, k_max, strict):
    changes = fpl_oracle.printed(T=T, k_max=k_max, strict=strict)
    rest = dict(k_max=k_max, strict=strict)
    return (
        f"fuzzy_positive_assignment {T} {k_max} {strict}",
        lambda case: cps_fpl.fuzzy_positive_assignment(case.prob, T, **rest),
        lambda p, K: fpl_oracle.positives(p, changes),
    )


THIRDS = (0.0, 0.33, 1 / 3, 0.66, 2 / 3, 0.999)
BOUNDS = (0.5037, 0.8537, 0.9037, 0.9537)  # off n / C, where a flat teacher leaves no room
MAPS = [  # (name, of a case, the oracle of a pixel's p and K)
    *(
        (
            f"cumulative_classes {T} {strict}",
            lambda case, T=T, strict=strict: cps_fpl.cumulative_classes(case.prob, T, strict),
            lambda p, K, T=T, strict=strict: fpl_oracle.cumulative_classes(p, T, strict),
        )
        for T, strict in itertools.product(BOUNDS, (True, False))
    ),
    *(assignment_of(T, k, s) for T, k, s in zip(BOUNDS, (0, 3, 1, 500), (1, 0, 1, 1), strict=True)),
    *(positives_of(0.5, k_strategy=name, k_max=k) for name in STRATEGIES for k in (0, 1, 2, 3)),
    *(positives_of(progress, k_strategy="step") for progress in THIRDS),
    *(weight_of(kind, over) for kind in WEIGHTS for over in OVER),
    *(label_of(k, *x) for k in ("dynamic", "topk") for x in ((0.5, 1), (0.8, 3), (0.999, 90))),
    label_of("soft"),
    label_of("hard"),
    (
        "pseudo_labels",
        lambda case: mean_teacher.pseudo_labels(case.prob, torch.ones_like(case.inside)),
        lambda p, K: supervised_oracle.likeliest(p),
    ),
    ("entropy", lambda case: u2pl.entropy(case.prob), lambda p, K: u2pl_oracle.entropy(p)),
]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name, product, oracle", MAPS, ids=[row[0] for row in MAPS])
def test_maps(name, product, oracle, classes):
    for seed, kind in enumerate(KINDS):
        for dtype in NEAR if kind == "random" else (torch.float64,):
            case = draw_case(classes, kind, seed=seed, dtype=dtype)
            found = product(case)
            whole = isinstance(oracle(pixels(case.prob)[0], 1), int)
            assert found.dtype == (torch.int64 if whole else dtype)
            assert found.shape in (case.prob.shape, case.inside.shape)
            assert not found.requires_grad
            rows = zip(pixels(case.prob), pixels(case.K), strict=True)
            expected = torch.tensor([oracle(p, K) for p, K in rows], dtype=torch.float64)
            found = torch.tensor(pixels(found), dtype=torch.float64)
            near = NEAR[dtype]
            assert not name.startswith("adaptive") or 0 <= found.min() and found.max() <= 1
            assert torch.allclose(found, expected, rtol=near["rel"], atol=near["abs"])


@pytest.mark.parametrize("name, product, oracle", MAPS, ids=[row[0] for row in MAPS])
@pytest.mark.parametrize("dtype", HALVES)
def test_maps_of_half_precision_count_in_float32(name, product, oracle, dtype):
    case = draw_case(200, "diffuse", dtype=torch.float32)
    prob = case.prob.to(dtype)
    half, wide = (product(dataclasses.replace(case, prob=p)) for p in (prob, prob.float()))
    if name.startswith("soft_label"):  # of the type of prob
        assert half.dtype == dtype
        return
    assert half.dtype == wide.dtype
    assert torch.equal(half, wide)


# ---- no wait, fixed shapes ----

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "a boolean")


class Calls(TorchDispatchMode):
    """Keeps (operation, shapes of its results)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        out = operation(*inputs, **(named or {}))
        for index in (y for x in inputs if isinstance(x, (list, tuple)) for y in x):
            if torch.is_tensor(index) and index.dtype == torch.bool and "index" in str(operation):
                self.seen.append(("a boolean index", ()))
        outs = out if isinstance(out, (list, tuple)) else [out]
        self.seen.append((str(operation), [tuple(x.shape) for x in outs if torch.is_tensor(x)]))
        return out


@pytest.mark.smoke
@every_row
def test_a_loss_never_waits_for_the_device_and_its_shapes_are_fixed(row):
    """Whatever the labels, the same operations make the same shapes, and none asks for a value."""
    found = []
    for kind, mask in (("random", "some"), ("flat", "nothing"), ("one-hot", "all")):
        case = draw_case(5, kind, mask)
        with Calls() as calls:
            value, _ = row.product(dataclasses.replace(case, z=case.z.requires_grad_()))
            value.sum().backward()
        found.append(calls.seen)
    assert found[0] == found[1] == found[2]
    assert not [name for name, _ in found[0] if any(word in name for word in WAITS)]
    with Calls() as calls:  # what is looked for would be seen
        case.prob[case.inside[:, None].expand_as(case.prob)].sum().item()
    assert {"a boolean index", "aten._local_scalar_dense.default"} <= {n for n, _ in calls.seen}


@pytest.mark.parametrize("M, N", [(50, 256), (256, 50), (4, 5000)])
def test_u2pl_never_holds_the_keys_of_all_anchors(M, N):
    case = draw_case(21)
    with Calls() as calls:
        contrast("contrastive", 0.5, M, N).product(case)
    largest = max(
        math.prod(shape)
        for name, shapes in calls.seen
        for shape in shapes
        if "index_select" in name
    )
    assert largest == 21 * 21 * max(512 // N * N, N)  # of all anchors: C D M N
