"""u2pl.py: every function of U2PL against loops over scalars; presets, recipes and flags."""

import itertools
import math
import random
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import u2pl
from benchmarks import contrastive
from common.run import parse, resolve
from u2pl import (
    Args,
    anchor_losses,
    anchor_masks,
    as_rows,
    binary_loss,
    candidates,
    centers,
    class_ranks,
    contrastive_loss,
    draw_keys,
    entropy,
    nearest,
    negative_masks,
    nth,
    preset,
    push_keys,
    quantiles,
    reliable_labels,
    unreliable_loss,
    unreliable_share,
    unsup_weight,
)

CLASSES = [2, 3, 7, 19, 21, 81]
KINDS = ["contrastive", "binary"]
BELOW_1 = 1 - 2.0**-53  # the largest float64 of a generator's [0, 1)
NEAR = dict(rel=1e-9, abs=1e-12)  # float64


def generator(*seed):
    return torch.Generator().manual_seed(hash(seed) % 2**40)


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed, shape))


def tied(classes, count, seed=0):
    """Returns probabilities (P, C), float64, of few different values: many ties."""
    p = torch.randint(1, 4, (count, classes), generator=generator(seed, classes)).double()
    return p / p.sum(1, keepdim=True)


def teacher(classes, count, seed=0):
    """Returns probabilities (P, C), float64."""
    z = torch.randn(count, classes, dtype=torch.float64, generator=generator(seed, classes, count))
    return (2 * z).softmax(1)


# ---- oracles: loops over scalars, in float64 ----


def scalar_ranks(p):
    """O(c) of one pixel."""
    order = sorted(range(len(p)), key=lambda c: (-p[c], c))
    return [order.index(c) for c in range(len(p))]


def scalar_draw(mask, u):
    """The pixels of a mask that numbers in [0, 1) draw, with replacement."""
    inside = [i for i, m in enumerate(mask) if m]
    return [inside[int(v * len(inside))] for v in u] if inside else []


def scalar_keys(mask, u):
    """At most len(u) - 1 pixels of a mask, none twice: u[0] turns the circle."""
    inside, K = [i for i, m in enumerate(mask) if m], len(u) - 1
    n = len(inside)
    if n <= K:
        return inside
    start, drawn = int(u[0] * n), []
    for j in range(K):
        low, high = j * n // K, (j + 1) * n // K
        drawn.append(inside[(start + low + int(u[j + 1] * (high - low))) % n])
    return drawn


def unit(x):
    length = max(math.sqrt(math.fsum(v * v for v in x)), 1e-12)
    return [v / length for v in x]


def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def scalar_loss(rep_s, rep_t, masks, queues, u, v, kind, tau):
    """Returns (value, gradient (P, D)): class by class, anchor by anchor, negative by negative.

    All are lists; queues: the unit keys of every class; u, v: the numbers of anchors and negatives.
    """
    P, D, values, gradients = len(rep_s), len(rep_s[0]), [], []
    for c, mask in enumerate(masks):
        drawn = scalar_draw(mask, u[c])
        if not drawn or not queues[c]:
            continue
        inside = [i for i in range(P) if mask[i]]
        center = unit([math.fsum(rep_t[i][d] for i in inside) / len(inside) for d in range(D)])
        total, gradient = 0.0, [[0.0] * D for _ in range(P)]
        for m, pixel in enumerate(drawn):
            z = unit(rep_s[pixel])
            keys = [queues[c][int(x * len(queues[c]))] for x in v[c][m]]
            positive, pull = dot(z, center) / tau, [0.0] * D
            if kind == "contrastive":  # Eq. (4)
                e = [math.exp(dot(z, k) / tau) for k in keys]
                bottom = math.exp(positive) + math.fsum(e)
                total -= math.log(math.exp(positive) / bottom) / len(drawn)
                share = [x / bottom for x in e]
                for d in range(D):
                    pull[d] = math.fsum(s * k[d] for s, k in zip(share, keys, strict=True)) / tau
                    pull[d] -= (1 - math.exp(positive) / bottom) * center[d] / tau
            else:  # Eq. (A1)
                for k in keys:
                    e = math.exp(dot(z, k) / tau)
                    p = math.exp(positive) / (math.exp(positive) + e)
                    total -= math.log(p) / len(drawn) / len(keys)
                    for d in range(D):
                        pull[d] += (1 - p) * (k[d] - center[d]) / tau / len(keys)
            along = dot(pull, z)
            length = math.sqrt(math.fsum(x * x for x in rep_s[pixel]))
            for d in range(D):
                gradient[pixel][d] += (pull[d] - along * z[d]) / length / len(drawn)
        values.append(total)
        gradients.append(gradient)
    n = max(len(values), 1)
    mean = [[math.fsum(g[i][d] for g in gradients) / n for d in range(D)] for i in range(P)]
    return math.fsum(values) / n, mean


# ---- Eq. (5) to (8) ----


@pytest.mark.parametrize("classes", CLASSES)
def test_entropy(classes):
    prob = teacher(classes, 30).T.reshape(1, classes, 5, 6)
    H = entropy(prob)
    assert H.shape == (1, 5, 6)
    for y, x in itertools.product(range(5), range(6)):
        p = prob[0, :, y, x].tolist()
        assert H[0, y, x].item() == pytest.approx(-math.fsum(q * math.log(q) for q in p), **NEAR)
    flat = torch.full((1, classes, 1, 1), 1 / classes)
    assert entropy(flat).item() == pytest.approx(math.log(classes), rel=1e-6)
    sure = F.one_hot(torch.tensor([[[1]]]), classes).movedim(3, 1).float()
    assert entropy(sure).item() == 0
    assert entropy(flat.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("seed", range(6))
def test_quantiles_are_numpys_percentiles_of_the_pixels_inside(seed):
    H = uniform(3, 5, 7, seed=seed)
    H = (H * 4).round() if seed % 2 else H  # ties
    inside = uniform(3, 5, 7, seed=100 + seed) < [1.0, 0.5, 0.02][seed % 3]
    inside[0, 0, 0] = True
    shares = [0.0, 0.2, 0.5, 0.8, 0.95, 1.0]
    found = quantiles(H.masked_fill(~inside, torch.nan), inside, *shares)
    for q, gamma in zip(shares, found.tolist(), strict=True):
        assert gamma == pytest.approx(np.percentile(H[inside].numpy(), 100 * q), **NEAR)
    found = quantiles(H.float(), inside, *shares)
    assert found.dtype == torch.float32
    for q, gamma in zip(shares, found.tolist(), strict=True):
        assert gamma == pytest.approx(np.percentile(H[inside].numpy(), 100 * q), rel=1e-6)


def test_quantile_of_nothing_lets_nothing_through():
    H, inside = uniform(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool)
    gamma, lower = quantiles(H, inside, 0.8, 0.2)
    assert gamma == lower == math.inf
    for which in ("unreliable", "reliable", "all"):
        assert not candidates(H, inside, gamma, lower, which).any()


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.4])
def test_labels_weight_and_candidates(alpha):
    H, inside = uniform(2, 8, 9), uniform(2, 8, 9, seed=1) < 0.7
    pseudo = torch.randint(0, 5, H.shape, generator=generator(2)).masked_fill(~inside, 255)
    gamma, lower = quantiles(H, inside, 1 - alpha, alpha)
    label, kept, counts = reliable_labels(pseudo, H, gamma), 0, Counter()
    groups = {w: candidates(H, inside, gamma, lower, w) for w in ("unreliable", "reliable", "all")}
    limits = np.percentile(H[inside].numpy(), [100 * (1 - alpha), 100 * alpha])
    for at in itertools.product(*map(range, H.shape)):
        h, ok = H[at].item(), inside[at].item()
        assert label[at] == (pseudo[at] if h < limits[0] else 255)
        kept += label[at].item() != 255
        assert groups["unreliable"][at] == (ok and h > limits[0])
        assert groups["reliable"][at] == (ok and h < limits[1])
        assert groups["all"][at] == ok
        counts["inside"] += ok
    for eta in (1.0, 2.5):
        expected = eta * counts["inside"] / kept
        assert unsup_weight(label, inside, eta).item() == pytest.approx(expected, rel=1e-6)
    assert unsup_weight(torch.full_like(label, 255), inside, 1.0).isfinite()


def test_share_falls_in_stairs():
    args = SimpleNamespace(alpha_0=0.2, epochs=80, total_iters=1000, dpa=True)
    for step in range(1000):
        t = math.floor(80 * step / 1000)
        assert unreliable_share(step, args) == pytest.approx(0.2 * (1 - t / 80), rel=1e-12)
    assert len({unreliable_share(step, args) for step in range(1000)}) == 80
    assert unreliable_share(0, args) == 0.2 and unreliable_share(999, args) > 0
    args.dpa = False
    assert {unreliable_share(step, args) for step in range(1000)} == {0.2}
    args = SimpleNamespace(alpha_0=0.4, epochs=200, total_iters=10, dpa=True)  # fewer steps
    assert unreliable_share(9, args) == pytest.approx(0.04)


# ---- pixels at stride 4 ----


@pytest.mark.parametrize("full, small", [((513, 513), (129, 129)), ((769, 64), (193, 17))])
def test_nearest_takes_the_floor(full, small):
    x = torch.arange(full[0] * full[1]).view(1, *full)
    found = nearest(x, small).view(small)
    for i, j in random.Random(0).sample(list(itertools.product(*map(range, small))), 500):
        assert found[i, j] == x[0, i * full[0] // small[0], j * full[1] // small[1]]


def test_pixels_are_in_the_order_of_labels_and_a_view():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    rows = as_rows(x)
    assert rows.data_ptr() == x.data_ptr() and rows.is_contiguous()
    label = torch.arange(2 * 4 * 5).view(2, 4, 5)
    for b, i, j in itertools.product(range(2), range(4), range(5)):
        assert rows[label[b, i, j]].equal(x[b, :, i, j])
    assert nearest(label, (4, 5)).equal(torch.arange(40))


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("make", [teacher, tied])
def test_ranks_anchors_and_negatives(classes, make):
    P, U = 60, 25  # the last 25 pixels are the unlabelled images'
    prob, rng = make(classes, P), generator(classes)
    label = torch.randint(0, classes, (P,), generator=rng)
    label[torch.rand(P, generator=rng) < 0.3] = 255
    some = torch.rand(U, generator=rng) < 0.5
    rank = class_ranks(prob)
    expected = [scalar_ranks(p) for p in prob.tolist()]
    assert rank.T.tolist() == expected
    A_c = anchor_masks(prob, label, 0.3)
    r_l, r_h = min(3, classes - 1), min(20, classes)
    N_c = negative_masks(rank, label, some, r_l, r_h)
    assert N_c.shape == A_c.shape == (classes, P)
    for i, c in itertools.product(range(P), range(classes)):
        y = label[i].item()
        assert A_c[c, i] == (y == c and prob[i, c].item() > 0.3)
        if i < P - U:
            assert N_c[c, i] == (y != 255 and y != c and expected[i][c] < r_l)
        else:
            assert N_c[c, i] == (some[i - P + U].item() and r_l <= expected[i][c] < r_h)
    assert N_c[:, P - U :].any()  # clipped limits leave unlabelled negatives for any classes


def test_an_anchor_has_more_than_delta_p():
    prob = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert not anchor_masks(prob, torch.tensor([0, 1]), 0.5)[:, 0].any()
    assert anchor_masks(prob, torch.tensor([0, 1]), 0.5)[1, 1]


def test_centers():
    rep, masks = torch.randn(20, 4, dtype=torch.float64), uniform(3, 20) < 0.5
    masks[1] = False
    found = centers(rep, masks)
    for c in range(3):
        inside = [i for i in range(20) if masks[c, i]]
        for d in range(4):
            mean = math.fsum(rep[i, d].item() for i in inside) / max(len(inside), 1)
            assert found[c, d].item() == pytest.approx(mean, **NEAR)


# ---- drawing, the bank ----


def test_nth():
    masks = uniform(5, 40) < torch.tensor([[0.0], [0.1], [0.5], [0.9], [1.0]])
    for c, mask in enumerate(masks):
        inside = mask.nonzero()[:, 0]
        n = torch.arange(max(len(inside), 1))
        found = nth(mask[None], n[None])[0]
        assert found.equal(inside) if len(inside) else found.equal(torch.tensor([39])), c


@pytest.mark.parametrize("K", [1, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_keys_are_drawn_as_a_loop_draws_them(K, seed):
    P, C = 33, 6
    masks = uniform(C, P, seed=seed) < torch.tensor([[0.0], [0.05], [0.2], [0.5], [0.9], [1.0]])
    u = uniform(C, K + 1, seed=10 + seed)
    u[0], u[-1, 1:], u[-2] = 0.0, BELOW_1, BELOW_1
    rep = torch.randn(P, 5, dtype=torch.float64, generator=generator(seed))
    offered = draw_keys(rep, masks, u)
    assert offered.shape == (C, K, 6)
    for c in range(C):
        drawn = scalar_keys(masks[c].tolist(), u[c].tolist())
        assert len(drawn) == len(set(drawn)) == min(K, int(masks[c].sum()))
        assert offered[c, :, -1].tolist() == [1.0] * len(drawn) + [0.0] * (K - len(drawn))
        for key, i in zip(offered[c], drawn, strict=False):
            assert key[:-1].tolist() == pytest.approx(unit(rep[i].tolist()), **NEAR)


def test_every_pixel_has_the_same_chance_to_be_a_key():
    n, K, turns = 11, 4, 20_000
    rng = np.random.default_rng(0)
    rep = torch.eye(n, dtype=torch.float64)
    u = torch.from_numpy(rng.random((turns, K + 1)))
    offered = draw_keys(rep, torch.ones(turns, n, dtype=torch.bool), u)
    seen = offered[..., :-1].sum((0, 1))
    spread = math.sqrt(turns * K / n * (1 - K / n))
    assert (seen - turns * K / n).abs().max() < 4.5 * spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_bank_is_a_queue_for_each_class(dtype):
    sizes, D, K = [7, 3, 5], 4, 4
    bank = torch.zeros(sum(sizes) + 1, D, dtype=dtype)
    pushed, rng = torch.zeros(3, dtype=torch.int64), generator(1)
    queues = [deque(maxlen=size) for size in sizes]
    for turn in range(30):
        offered = torch.randn(3, K, D + 1, generator=rng, dtype=torch.float64)
        # real ones anywhere: those of several processes stand one after another
        offered[..., -1] = (torch.rand(3, K, generator=rng) < [0.0, 0.3, 1.0][turn % 3]).double()
        push_keys(bank, pushed, torch.tensor(sizes), offered)
        for c, k in itertools.product(range(3), range(K)):
            if offered[c, k, -1]:
                queues[c].append(offered[c, k, :-1].to(dtype).tolist())
        for c, queue in enumerate(queues):
            at = sum(sizes[:c])
            filled = min(int(pushed[c]), sizes[c])
            assert filled == len(queue)
            assert sorted(bank[at : at + filled].tolist()) == sorted(queue)
            assert not bank[at + filled : at + sizes[c]].any()
        assert not bank[-1].any()


class Places(TorchDispatchMode):
    """Keeps the rows that index_copy_ writes."""

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        if "index_copy_" in str(operation):
            self.rows = inputs[2].tolist()
        return operation(*inputs, **(named or {}))


def test_no_row_of_the_bank_is_written_twice_in_a_step():
    """A GPU writes in any order: a ring that is too small takes the newest keys alone."""
    sizes, bank, pushed = torch.tensor([7, 3]), torch.zeros(11, 2), torch.tensor([5, 2])
    offered = torch.ones(2, 9, 3)
    offered[1, 4, 2] = 0
    with Places() as places:
        push_keys(bank, pushed, sizes, offered)
    rows = [row for row in places.rows if row != 10]
    assert sorted(rows) == list(range(10)) and pushed.tolist() == [14, 10]


# ---- Eq. (4), (A1) ----


def case(classes, seed=0, D=5, M=3, N=4, P=40):
    """Returns what unreliable_loss takes, float64: classes without anchors, with empty banks."""
    rng = generator(classes, seed)
    rep_s = torch.randn(P, D, generator=rng, dtype=torch.float64)
    rep_t = torch.randn(P, D, generator=rng, dtype=torch.float64)
    masks = F.one_hot(torch.randint(0, classes, (P,), generator=rng), classes).T.bool()
    sizes = torch.tensor([9] + [6] * (classes - 1))
    pushed = torch.randint(1, 20, (classes,), generator=rng)
    masks[seed % classes] = False
    pushed[(seed + 1) % classes] = 0
    bank = F.normalize(torch.randn(int(sizes.sum()) + 1, D, generator=rng).double(), dim=1)
    u = torch.rand(classes, M + M * N, generator=rng, dtype=torch.float64)
    u[-1] = BELOW_1
    return rep_s.requires_grad_(), rep_t, masks, bank, pushed, sizes, u


def compared(case, kind, tau, M=3, N=4):
    """Asserts value, gradient and count of classes to be those of the loops; returns the value."""
    rep_s, rep_t, masks, bank, pushed, sizes, u = case
    args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss=kind, tau=tau)
    loss, counted = unreliable_loss(*case, args)
    (gradient,) = torch.autograd.grad(loss, rep_s)
    first = (sizes.cumsum(0) - sizes).tolist()
    filled = torch.minimum(pushed, sizes).tolist()
    queues = [bank[a : a + n].tolist() for a, n in zip(first, filled, strict=True)]
    u, v = u[:, :M].tolist(), u[:, M:].view(-1, M, N).tolist()
    lists = rep_s.tolist(), rep_t.tolist(), masks.tolist(), queues
    value, expected = scalar_loss(*lists, u, v, kind, tau)
    assert loss.item() == pytest.approx(value, **NEAR)
    assert torch.allclose(
        gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert counted.tolist() == [any(m) and n > 0 for m, n in zip(lists[2], filled, strict=True)]
    return value


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_loops(classes, kind, seed):
    value = compared(case(classes, seed), kind, 0.5)
    assert value > 0 or classes == 2  # of two classes one has no anchor, the other no key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [10, 1, 0.5, 0.1, 0.01])
def test_every_temperature_of_table_a6(kind, tau):
    compared(case(7, 5), kind, tau)


@pytest.mark.parametrize("kind", KINDS)
def test_without_anchors_or_keys_there_is_no_loss(kind):
    for empty in (2, 4):  # masks; pushed
        parts = list(case(7))
        parts[empty] = torch.zeros_like(parts[empty])
        assert compared(tuple(parts), kind, 0.5) == 0
        loss, counted = unreliable_loss(
            *parts, SimpleNamespace(anchors=3, negatives=4, unreliable_loss=kind, tau=0.5)
        )
        assert loss.requires_grad and not counted.any()


@pytest.mark.parametrize("kind", KINDS)
def test_one_anchor_and_many_chunks(kind):
    compared(case(4, M=1, N=1), kind, 0.5, M=1, N=1)
    compared(case(4, M=5, N=515), kind, 0.5, M=5, N=515)  # an anchor at a time
    compared(case(4, M=7, N=200), kind, 0.5, M=7, N=200)  # two, and one


def test_the_teachers_features_and_the_bank_get_no_gradient():
    rep_s, rep_t, masks, bank, pushed, sizes, u = case(7)
    args = SimpleNamespace(anchors=3, negatives=4, unreliable_loss="contrastive", tau=0.5)
    assert not draw_keys(rep_t.clone().requires_grad_(), masks, u[:, :3]).requires_grad
    push_keys(bank, pushed, sizes, torch.ones(7, 2, 6).double().requires_grad_())
    assert not bank.requires_grad
    loss, _ = unreliable_loss(rep_s, rep_t, masks, bank, pushed, sizes, u, args)
    loss.backward()
    assert rep_t.grad is None and bank.grad is None
    assert (rep_s.grad.abs().sum(1) > 0).sum() <= 3 * 7


def test_half_precision_is_computed_in_float32():
    rep_s, rep_t, masks, bank, pushed, sizes, u = case(7)
    args = SimpleNamespace(anchors=3, negatives=4, unreliable_loss="contrastive", tau=0.5)
    half = rep_s.detach().bfloat16().requires_grad_()
    loss, _ = unreliable_loss(half, rep_t.float(), masks, bank.bfloat16(), pushed, sizes, u, args)
    assert loss.dtype == torch.float32
    exact = (half.detach().double(), rep_t, masks, bank.bfloat16().double(), pushed, sizes, u)
    assert loss.item() == pytest.approx(unreliable_loss(*exact, args)[0].item(), rel=1e-5)


def test_equations_4_and_a1_of_one_negative_are_equal():
    positive, negative = uniform(3, 5) * 2 - 1, uniform(3, 5, 1) * 2 - 1
    one, two = (f(positive, negative, 0.5) for f in (contrastive_loss, binary_loss))
    assert torch.allclose(one, two, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    args = SimpleNamespace(negatives=300, unreliable_loss=kind, tau=0.5)  # an anchor at a time
    z, center = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    bank, rows = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 20, (2, 3, 300))

    def call(z):
        return anchor_losses(F.normalize(z, dim=2), center, bank, rows, args)

    assert torch.autograd.gradcheck(call, (z.requires_grad_(),))
    with torch.no_grad():
        assert call(z).equal(call(z.detach()))


# ---- no wait, fixed shapes ----


class Calls(TorchDispatchMode):
    """Keeps (operation, shapes of its results)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        out = operation(*inputs, **(named or {}))
        for index in (y for x in inputs if isinstance(x, (list, tuple)) for y in x):
            if torch.is_tensor(index) and "index" in str(operation) and index.dtype == torch.bool:
                self.seen.append(("a boolean index", ()))
        some = out if isinstance(out, (list, tuple)) else [out]
        self.seen.append((str(operation), [tuple(x.shape) for x in some if torch.is_tensor(x)]))
        return out


@pytest.mark.parametrize("M, N", [(50, 256), (256, 50), (4, 5000)])
def test_a_step_never_holds_the_keys_of_all_anchors(M, N):
    given = case(3, D=64, M=M, N=N)
    args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss="contrastive", tau=0.5)
    with Calls() as calls:
        unreliable_loss(*given, args)[0].backward()
    largest = max(math.prod(shape) for _, shapes in calls.seen for shape in shapes)
    assert largest == 3 * 64 * max(512 // N * N, N)  # of all anchors: 3 * 64 * M * N


def whole_step(label, prob, inside, C=6, B=2, size=8, M=4, N=5, K=3):
    """A step's part of the losses seam from the teacher's outputs to the gradient; its calls."""
    rng = generator(3)
    rep_s = torch.randn(2 * B * size * size, 4, generator=rng).requires_grad_()
    rep_t = torch.randn(2 * B * size * size, 4, generator=rng)
    sizes = torch.tensor([9] + [6] * (C - 1))
    bank, pushed = torch.zeros(int(sizes.sum()) + 1, 4), torch.zeros(C, dtype=torch.int64)
    u = torch.rand(C, K + 1 + M + M * N, generator=rng, dtype=torch.float64)
    args = SimpleNamespace(anchors=M, negatives=N, unreliable_loss="contrastive", tau=0.5)
    with Calls() as calls:
        H = entropy(prob[B:])
        gamma, lower = quantiles(H, inside, 0.8, 0.2)
        y_u = reliable_labels(label[B:], H, gamma)
        some = nearest(candidates(H, inside, gamma, lower, "unreliable"), (size, size))
        both = nearest(torch.cat([label[:B], y_u]), (size, size))
        N_c = negative_masks(class_ranks(as_rows(prob)), both, some, 3, 6)
        push_keys(bank, pushed, sizes, draw_keys(rep_t, N_c, u[:, : K + 1]))
        A_c = anchor_masks(as_rows(prob), both, 0.3)
        loss, counted = unreliable_loss(rep_s, rep_t, A_c, bank, pushed, sizes, u[:, K + 1 :], args)
        loss.backward()
    return calls.seen, loss.item(), int(counted.sum())


@pytest.mark.smoke
def test_no_wait_and_fixed_shapes():
    """Whatever the labels, the same operations make the same shapes, and none asks for a value."""
    prob = torch.randn(4, 6, 8, 8, generator=generator(0)).mul(3).softmax(1)
    label = prob.argmax(1)
    full, none = torch.ones(2, 8, 8, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)
    usual = whole_step(label, prob, full)
    assert usual[1] > 0 and usual[2] > 1
    nothing = whole_step(torch.full_like(label, 255), prob, none)
    assert nothing[1] == 0 and nothing[2] == 0
    one = whole_step(torch.full_like(label, 2), prob, full)
    assert usual[0] == nothing[0] == one[0]
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "boolean", "is_nonzero")
    assert not [name for name, _ in usual[0] if any(w in name for w in waits)]
    with Calls() as calls:  # what is looked for would be seen
        prob[prob > 0.5], prob.sum().item()
    assert {"a boolean index", "aten._local_scalar_dense.default"} <= {n for n, _ in calls.seen}


# ---- network, presets, flags ----


def resolved(*words):
    return resolve(parse(Args, [str(word) for word in words]), preset)


def test_the_head_adds_features_in_training_alone():
    args = resolved("--aux-weight", "0.4")
    torch.manual_seed(0)
    head = u2pl.U2PLHead([8, 8, 8, 16], 5, args)
    plain = u2pl.DeepLabV3Plus([8, 8, 8, 16], 5, args)
    shapes = ((8, 9), (8, 5), (8, 3), (16, 3))
    stages = [torch.randn(2, channels, size, size) for channels, size in shapes]
    out = head(stages, (33, 33))
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "logits": (2, 5, 33, 33),
        "coarse": (2, 5, 9, 9),
        "rep": (2, 256, 9, 9),
        "aux": (2, 5, 33, 33),
    }
    same = {k: v for k, v in head.state_dict().items() if not k.startswith("represent")}
    plain.load_state_dict(same)
    out, expected = head.eval()(stages, (33, 33)), plain.eval()(stages, (33, 33))
    assert "rep" not in out and set(expected) == {"logits", "aux"}
    assert all(out[name].equal(expected[name]) for name in expected)
    assert out["logits"].equal(u2pl.upsample(out["coarse"], (33, 33)))
    count = sum(p.numel() for p in head.represent.parameters())
    assert count == 1_836_800  # the released network's
    dropped = [m.p for m in head.represent if isinstance(m, torch.nn.Dropout2d)]
    assert dropped == [0.1, 0.1]
    leaves = [stage.clone().requires_grad_() for stage in stages]
    head.train()(leaves, (33, 33))["rep"].sum().backward()  # L_c trains the backbone too
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, True]


PAPER = dict(anchors=50, negatives=256, contrast_weight=0.1, tau=0.5, alpha_0=0.2, eta=1.0)
PAPER |= dict(delta_p=0.3, ranks=(3, 20), keys=512, unreliable_loss="contrastive", dpa=True)
PAPER |= dict(bank=True, bank_dtype="fp32", negatives_from="unreliable", cutmix=True)
PAPER |= dict(bank_sizes=(50_000, 30_000), ema_decay=0.99, cutmix_prob=0.5)


@pytest.mark.parametrize("dataset", ["voc", "voc_aug", "cityscapes"])
def test_table_a1_is_the_default(dataset):
    split = {"voc": "732", "voc_aug": "1/4", "cityscapes": "1/4"}[dataset]
    args = resolved("--dataset", dataset, "--split", split)
    assert {name: getattr(args, name) for name in PAPER} == PAPER
    epochs, share = (200, 10) if dataset == "cityscapes" else (80, 80)
    assert args.epochs == epochs and args.warmup_iters == args.total_iters // share
    assert args.batch_size == args.batch_size_unlabeled == 16
    official = resolved("--dataset", dataset, "--split", split, "--recipe", "official")
    changed = {k for k, v in vars(args).items() if getattr(official, k) != v} - {"recipe"}
    city = {"warmup_iters"} if dataset == "cityscapes" else set()
    assert changed == {"anchors", "negatives", "contrast_weight"} | city
    assert (official.anchors, official.negatives) == (256, 50)
    assert official.contrast_weight == (0.125 if city else 0.25)
    assert official.warmup_iters == (0 if city else args.warmup_iters)


@pytest.mark.parametrize("dataset", ["shapes", "camvid"])
def test_small_protocols_have_a_small_bank(dataset):
    args = resolved("--dataset", dataset)
    assert args.bank_sizes == (5_000, 3_000) and args.warmup_iters == args.total_iters // 10


@pytest.mark.parametrize(
    "words, name",
    [
        ("--alpha-0 1.2", "--alpha-0 1.2"),
        ("--delta-p -0.1", "--delta-p"),
        ("--ranks 5 5", "--ranks .5, 5.: the first below"),
        ("--tau 0", "--tau 0"),
        ("--anchors 0", "--anchors 0"),
        ("--negatives 0", "--negatives 0"),
        ("--keys 0", "--keys 0"),
        ("--epochs 0", "--epochs 0"),
        ("--bank-sizes 0 5", "--bank-sizes 0"),
        ("--bank-sizes 5", "--bank-sizes"),
        ("--unreliable-loss bce", "bce"),
        ("--negatives-from some", "some"),
        ("--bank-dtype fp16", "fp16"),
    ],
)
def test_refused_flags_are_named(words, name):
    with pytest.raises(u2pl.Refusal, match=name):
        resolved(*words.split())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("M, N", [(50, 256), (16, 5)])
def test_both_sides_of_the_benchmark_compute_the_same(M, N, dtype):
    size = dict(images=4, size=25, channels=16, first=900, rest=700)
    contrastive.compared(contrastive.Args(**size, anchors=M, negatives=N, bank_dtype=dtype))
