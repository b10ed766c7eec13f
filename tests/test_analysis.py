"""results/analysis.py: gradients, scores, bound against loops over scalars; both commands."""

import itertools
import json
import math
import re
import runpy
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cps_fpl
from common.run import parse, plain, resolve
from results import analysis
from tests.helpers import ROOT, draw_tree

CLOSE = dict(rel=1e-10, abs=1e-13)  # float64 against the printed formulas, which lose a few digits


def draw(seed, classes=5, spread=2.0, dtype=torch.float64):
    """Returns logits_s, prob_t (2, C, 6, 7), K in [1, C), label with every class and some 255."""
    rng = torch.Generator().manual_seed(seed)
    z, t = (spread * torch.randn(2, classes, 6, 7, generator=rng, dtype=dtype) for _ in range(2))
    K = torch.randint(1, max(classes, 2), (2, 6, 7), generator=rng)
    label = torch.randint(0, classes + 1, (2, 6, 7), generator=rng)
    return z, t.softmax(1), K, label.masked_fill(label == classes, 255)


def at(x, i, y, x_):
    """Returns the channels of a pixel as floats."""
    return x[i, :, y, x_].tolist()


# ---- oracles: one pixel, lists of floats, formulas as printed ----


def scalar_softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / math.fsum(e) for v in e]


def scalar_likeliest(p, K):
    """The K likeliest classes; of equal ones the lowest first."""
    return sorted(range(len(p)), key=lambda c: (-p[c], c))[:K]


def scalar_eq_3(z, target):
    return [p - (c == target) for c, p in enumerate(scalar_softmax(z))]


def scalar_eq_8(z, Y):
    others = [j for j in range(len(z)) if j not in Y]
    a, b = math.fsum(math.exp(-z[i]) for i in Y), math.fsum(math.exp(z[j]) for j in others)
    return [
        (-b * math.exp(-v) if c in Y else a * math.exp(v)) / (1 + b * a) for c, v in enumerate(z)
    ]


def scalar_eq_12(grad, truth, Y):
    return grad[truth] / math.fsum(grad[i] for i in Y)


def scalar_norm(grad):
    return math.sqrt(math.fsum(g * g for g in grad))


def scalar_cosine(one, two):
    dot = math.fsum(a * b for a, b in zip(one, two, strict=True))
    return dot / (scalar_norm(one) * scalar_norm(two))


def scalar_case(p, K, truth):
    order = scalar_likeliest(p, len(p))
    return 0 if truth == 255 else 1 if truth == order[0] else 2 if truth in order[:K] else 3


def scalar_measures(z, p, K, truth):
    """Oracle of `measures` at one pixel."""
    Y, top = scalar_likeliest(p, K), scalar_likeliest(p, 1)
    fuzzy, vanilla, ideal = scalar_eq_8(z, Y), scalar_eq_3(z, top[0]), scalar_eq_3(z, truth)
    scores = scalar_eq_12(vanilla, truth, top), scalar_eq_12(fuzzy, truth, Y)
    sims = scalar_cosine(fuzzy, ideal), scalar_cosine(vanilla, ideal)
    norms = map(scalar_norm, (fuzzy, vanilla, ideal))
    return [1.0, float(K == 1), *scores, *sims, float(sims[0] > 0), *norms]


# ---- gradients ----


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [2, 3, 5, 8])
def test_gradients_equal_the_printed_equations(classes):
    z, prob_t, K, label = draw(classes, classes)
    vanilla, fuzzy = analysis.vanilla_gradient(z, prob_t), analysis.fuzzy_gradient(z, prob_t, K)
    ideal, total = analysis.ideal_gradient(z, label), analysis.gradient_sum(z, prob_t, K)
    assert vanilla.shape == fuzzy.shape == ideal.shape == z.shape and total.shape == label.shape
    for place in np.ndindex(*label.shape):
        scalars, p, truth = at(z, *place), at(prob_t, *place), label[place].item()
        Y = scalar_likeliest(p, K[place].item())
        eq_8 = scalar_eq_8(scalars, Y)
        negatives = math.fsum(g for c, g in enumerate(eq_8) if c not in Y)
        assert at(fuzzy, *place) == pytest.approx(eq_8, **CLOSE)
        assert total[place].item() == pytest.approx(negatives, **CLOSE)
        expected = scalar_eq_3(scalars, scalar_likeliest(p, 1)[0])
        assert at(vanilla, *place) == pytest.approx(expected, **CLOSE)
        expected = [0.0] * classes if truth == 255 else scalar_eq_3(scalars, truth)
        assert at(ideal, *place) == pytest.approx(expected, **CLOSE)


def test_gradients_are_those_of_the_losses_that_train():
    z, prob_t, K, label = draw(0)
    leaf = z.clone().requires_grad_()
    loss = cps_fpl.fuzzy_positive_regularization(leaf, prob_t, K).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(analysis.fuzzy_gradient(z, prob_t, K), expected, rtol=1e-12, atol=1e-15)
    for target, grad in (
        (prob_t.argmax(1), analysis.vanilla_gradient(z, prob_t)),
        (label, analysis.ideal_gradient(z, label)),
    ):
        loss = cps_fpl.cross_entropy(leaf, target) * (target != 255).sum()  # a mean there
        (expected,) = torch.autograd.grad(loss, leaf)
        assert torch.allclose(grad, expected, rtol=0, atol=1e-6)  # it is computed in float32


def test_fuzzy_gradient_in_probabilities_is_eq_5_of_the_supplement():
    z, prob_t, K, _ = draw(1)
    fuzzy = analysis.fuzzy_gradient(z, prob_t, K)
    for place in np.ndindex(*K.shape):
        p, Y = scalar_softmax(at(z, *place)), scalar_likeliest(at(prob_t, *place), K[place].item())
        a, b = math.fsum(1 / p[i] for i in Y), math.fsum(q for j, q in enumerate(p) if j not in Y)
        expected = [(-b / q if c in Y else a * q) / (1 + b * a) for c, q in enumerate(p)]
        assert at(fuzzy, *place) == pytest.approx(expected, **CLOSE)


@pytest.mark.smoke
def test_fuzzy_is_vanilla_with_one_positive_and_zero_with_all():
    z, prob_t, K, label = draw(2)
    one, every = torch.ones_like(K), torch.full_like(K, 5)
    fuzzy, vanilla = analysis.fuzzy_gradient(z, prob_t, one), analysis.vanilla_gradient(z, prob_t)
    assert torch.allclose(fuzzy, vanilla, rtol=1e-12, atol=0)  # also where all but p_pse is tiny
    for zero in (
        analysis.fuzzy_gradient(z, prob_t, every),
        analysis.gradient_sum(z, prob_t, every),
        analysis.fuzzy_score(z, prob_t, every, label),
    ):
        assert torch.equal(zero, torch.zeros_like(zero))  # a NaN would not be equal


def test_gradients_keep_their_digits_where_the_student_is_sure():
    z = torch.tensor([20.0, 0.0, -1.0]).view(1, 3, 1, 1)  # p - 1 is 0 in float32
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    a, b = math.exp(-20), math.exp(-21)
    for grad in (
        analysis.ideal_gradient(z, label),
        analysis.vanilla_gradient(z, z.softmax(1)),
        analysis.fuzzy_gradient(z, z.softmax(1), label + 1),
    ):
        # exp, sums and products in float32
        assert at(grad, 0, 0, 0) == pytest.approx([-(a + b), a, b], rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 1e4])
def test_positives_and_negatives_cancel_and_no_norm_is_above_sqrt_2(spread, dtype):
    eps = 8 * torch.finfo(dtype).eps  # sums of five terms up to 1
    for seed in range(5):
        z, prob_t, K, label = draw(seed, spread=spread, dtype=dtype)
        Y = analysis.positives(prob_t, K)
        fuzzy, total = analysis.fuzzy_gradient(z, prob_t, K), analysis.gradient_sum(z, prob_t, K)
        assert Y.sum(1).equal(K) and (fuzzy[Y] <= 0).all() and (fuzzy[~Y] >= 0).all()
        assert torch.allclose((fuzzy * Y).sum(1), -total, rtol=0, atol=eps)
        assert torch.allclose((fuzzy * ~Y).sum(1), total, rtol=0, atol=eps)
        assert 0 <= total.min() and total.max() <= 1
        for grad in (
            fuzzy,
            analysis.vanilla_gradient(z, prob_t),
            analysis.ideal_gradient(z, label),
        ):
            assert grad.abs().max() <= 1 + eps and grad.sum(1).abs().max() <= eps
            norm = analysis.norm(grad)
            assert 0 <= norm.min() and norm.max() <= math.sqrt(2) + eps


def test_bounds_of_the_norm_are_reached():
    sure = torch.tensor([300.0, 0.0, 0.0]).view(1, 3, 1, 1)
    right, wrong = torch.tensor([[[0]]]), torch.tensor([[[1]]])
    assert analysis.norm(analysis.ideal_gradient(sure, right)).item() == 0
    # one rounding in float32
    assert analysis.norm(analysis.ideal_gradient(sure, wrong)).item() == pytest.approx(2**0.5)


# ---- cases and scores ----


@pytest.mark.smoke
def test_cases_are_those_of_section_3_4():
    for seed in range(4):
        _, prob_t, K, label = draw(seed)
        cases = analysis.case(prob_t, K, label)
        assert cases.dtype == torch.int64 and cases.shape == label.shape
        assert set(cases.flatten().tolist()) == {0, 1, 2, 3}
        for place in np.ndindex(*label.shape):
            p, truth = at(prob_t, *place), label[place].item()
            assert cases[place] == scalar_case(p, K[place].item(), truth)


def test_ties_of_the_teacher_go_to_the_lowest_class():
    prob_t = torch.full((1, 4, 1, 4), 0.25)
    K, label = torch.full((1, 1, 4), 2), torch.arange(4).view(1, 1, 4)
    assert analysis.case(prob_t, K, label).tolist() == [[[1, 2, 3, 3]]]
    grad = analysis.vanilla_gradient(torch.zeros(1, 4, 1, 4), prob_t)
    assert at(grad, 0, 0, 2) == [-0.75, 0.25, 0.25, 0.25]


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [2, 3, 5, 8])
def test_scores_equal_eq_12_to_15(classes):
    z, prob_t, K, label = draw(classes + 10, classes)
    vanilla = analysis.vanilla_score(z, prob_t, label)
    fuzzy = analysis.fuzzy_score(z, prob_t, K, label)
    for place in np.ndindex(*label.shape):
        scalars, p, truth = at(z, *place), at(prob_t, *place), label[place].item()
        if truth == 255:
            assert vanilla[place] == fuzzy[place] == 0
            continue
        Y, q = scalar_likeliest(p, K[place].item()), scalar_softmax(scalars)
        eq_12 = scalar_eq_12(scalar_eq_8(scalars, Y), truth, Y)
        if truth in Y:  # Eq. (13), (14)
            closed = math.exp(-scalars[truth]) / math.fsum(math.exp(-scalars[i]) for i in Y)
        else:  # Eq. (15) with the sign of Eq. (8)
            others = [math.exp(v) for j, v in enumerate(scalars) if j not in Y]
            closed = -math.exp(scalars[truth]) / math.fsum(others)
        assert fuzzy[place].item() == pytest.approx(eq_12, **CLOSE)
        assert fuzzy[place].item() == pytest.approx(closed, **CLOSE)
        top = Y[0]
        eq_12 = scalar_eq_12(scalar_eq_3(scalars, top), truth, [top])
        closed = 1.0 if truth == top else q[truth] / (q[top] - 1)
        assert vanilla[place].item() == pytest.approx(eq_12, **CLOSE)
        assert vanilla[place].item() == pytest.approx(closed, **CLOSE)


def test_the_score_outside_y_falls_with_the_logit_of_the_truth():
    z = torch.tensor([5.0, 1.0, 0.0]).view(1, 3, 1, 1)
    prob_t, K = z.softmax(1), torch.ones(1, 1, 1, dtype=torch.int64)
    likely = analysis.fuzzy_score(z, prob_t, K, torch.tensor([[[1]]])).item()
    # the print's e^{-z} would give the softmax of -z, -0.2689
    assert likely == pytest.approx(-math.e / (math.e + 1), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 1e4])
def test_scores_are_in_the_papers_ranges(spread, dtype):
    seen = set()
    for seed in range(5):
        z, prob_t, K, label = draw(seed, spread=spread, dtype=dtype)
        cases = analysis.case(prob_t, K, label)
        vanilla = analysis.vanilla_score(z, prob_t, label)
        fuzzy = analysis.fuzzy_score(z, prob_t, K, label)
        for name, R, c, low, high in (
            ("13, v", vanilla, cases == 1, 1, 1),
            ("13, f", fuzzy, cases == 1, 0, 1),
            ("13, f, K = 1", fuzzy, (cases == 1) & (K == 1), 1, 1),
            ("14, v", vanilla, cases == 2, -1, 0),
            ("14, f", fuzzy, cases == 2, 0, 1),
            ("15, v", vanilla, cases == 3, -1, 0),
            ("15, f", fuzzy, cases == 3, -1, 0),
            ("255", fuzzy, cases == 0, 0, 0),
        ):
            if c.any():
                assert low <= R[c].min() and R[c].max() <= high, name
                seen.add(name)
    assert len(seen) == 8


def test_scores_stand_where_the_gradient_underflows():
    z = torch.tensor([2000.0, 1000.0, 0.0, -1.0]).view(1, 4, 1, 1)
    prob_t, K = z.softmax(1), torch.full((1, 1, 1), 2)
    prob_t = prob_t + torch.tensor([0.3, 0.2, 0.1, 0.0]).view(1, 4, 1, 1)  # the rank of z
    assert not analysis.fuzzy_gradient(z, prob_t, K).any()
    for truth, vanilla, fuzzy in (
        (0, 1.0, 0.0),
        (1, -1.0, 1.0),
        (2, 0.0, -math.e / (math.e + 1)),
        (3, 0.0, -1 / (math.e + 1)),
    ):
        label = torch.full((1, 1, 1), truth)
        assert analysis.vanilla_score(z, prob_t, label).item() == vanilla
        # exp and one division in float32
        assert analysis.fuzzy_score(z, prob_t, K, label).item() == pytest.approx(fuzzy, rel=1e-6)


def test_bfloat16_logits_are_widened_and_a_sorted_teacher_gives_the_same():
    z, prob_t, K, label = draw(3, dtype=torch.float32)
    half, rank = z.bfloat16(), cps_fpl.by_rank(prob_t)
    for function, *last in (
        (analysis.vanilla_gradient,),
        (analysis.fuzzy_gradient, K),
        (analysis.gradient_sum, K),
        (analysis.fuzzy_score, K, label),
        (analysis.vanilla_score, label),
    ):
        wider = function(half.float(), prob_t, *last)
        assert wider.dtype == torch.float32
        assert torch.equal(wider, function(half, rank, *last))
    assert torch.equal(analysis.case(rank, K, label), analysis.case(prob_t, K, label))


# ---- cosine and norm ----


@pytest.mark.smoke
def test_cosine_and_norm_equal_loops_over_scalars():
    z, prob_t, K, label = draw(4, spread=3.0)
    one, two = analysis.fuzzy_gradient(z, prob_t, K), analysis.ideal_gradient(z, label)
    cosine, norm = analysis.cosine(one, two), analysis.norm(one)
    assert cosine.min() < -0.1 and cosine.max() > 0.1  # both signs were drawn
    for place in np.ndindex(*label.shape):
        a, b = at(one, *place), at(two, *place)
        assert norm[place].item() == pytest.approx(scalar_norm(a), **CLOSE)
        expected = 0.0 if label[place] == 255 else scalar_cosine(a, b)
        assert cosine[place].item() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1.0, 1e30])
def test_cosine_knows_no_length_and_stays_in_its_range(scale):
    rng = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, 4, 9, 9, generator=rng) for _ in range(2))
    cosine = analysis.cosine(scale * one, two)
    for other in (two, one, -one):  # the last two reach the ends, rounding would go beyond
        both = analysis.cosine(scale * one, other)
        assert -1 <= both.min() and both.max() <= 1
    # float32, four products; 1e-38 has lost digits of its smallest parts
    assert torch.allclose(cosine, analysis.cosine(one, two), atol=1e-5)
    assert torch.allclose(analysis.cosine(scale * one, one), torch.ones(()), atol=1e-6)
    assert torch.allclose(analysis.cosine(scale * one, -one), -torch.ones(()), atol=1e-6)
    assert torch.allclose(analysis.norm(scale * one) / scale, one.norm(dim=1), rtol=1e-5)


def test_cosine_with_nothing_is_zero():
    one = torch.zeros(1, 3, 2, 2)
    assert torch.equal(analysis.cosine(one, torch.ones(1, 3, 2, 2)), torch.zeros(1, 2, 2))
    assert torch.equal(analysis.norm(one), torch.zeros(1, 2, 2))


# ---- supplement, Eq. (7) and (8) ----


def least(n, K, T, classes):
    """least_negative_mass at one pixel, as a float."""
    n, K = (torch.full((1, 1, 1), v) for v in (n, K))
    return analysis.least_negative_mass(n, K, T, classes).item()


def falling(total, parts, largest):
    """Yields every falling list of so many integers, at most largest each, with this sum."""
    if parts == 0:
        if total == 0:
            yield []
        return
    for first in range(min(total, largest), -(-total // parts) - 1, -1):
        for rest in falling(total - first, parts - 1, first):
            yield [first, *rest]


@pytest.mark.smoke
@pytest.mark.parametrize("classes, T", [(3, (12, 24)), (4, (18, 24)), (5, (18, 24)), (5, (8, 24))])
def test_the_bound_is_the_least_of_all_probabilities_on_a_grid(classes, T):
    T, found = Fraction(*T), {}
    for counts in falling(24, classes, 24):  # in exact arithmetic: no rounding at V = T
        V = [Fraction(v, 24) for v in itertools.accumulate(counts)]
        n = next(i for i, v in enumerate(V, 1) if v > T)  # Alg. 1
        for K in range(1, n):
            found.setdefault((n, K), []).append(1 - V[K - 1])
    assert max(n for n, _ in found) == classes * T // 1 + 1  # (n - 1) / C <= V^{n-1} <= T
    reached = set()
    for (n, K), masses in found.items():
        bound = least(n, K, float(T), classes)
        assert float(min(masses)) >= bound - 1e-6, (n, K)  # float32
        if (24 * (1 - T)) % (classes - n + 1) == 0:  # the vector that reaches it is on the grid
            assert float(min(masses)) == pytest.approx(bound, rel=1e-6), (n, K)
            reached.add(n - K)
        printed = Fraction(K, n - 1) * (1 - T)  # supplement Eq. (8)
        assert float(printed) == pytest.approx(bound) if K == n - 1 else printed < 1 - T < bound
    assert reached, "the grid reaches no bound"


@pytest.mark.parametrize("seed", range(6))
def test_random_probabilities_keep_the_bound_of_alg_1(seed):
    T, classes, seen = (0.6, 0.9, 0.95)[seed % 3], 2 + 3 * seed, set()
    for spread in (0.3, 1.0, 2.0, 4.0):
        prob_t = draw(seed, classes, spread)[1]
        n = cps_fpl.cumulative_classes(prob_t, T)
        p = prob_t.sort(dim=1, descending=True).values
        for less in range(1, classes):
            K = (n - less).clamp(min=1)
            mass = 1 - p.cumsum(1).gather(1, K[:, None] - 1)[:, 0]
            bound = analysis.least_negative_mass(n, K, T, classes)
            assert (mass >= bound - 1e-6).all()  # the bound comes in float32
            assert (bound[n == 1] == 0).all() and (bound[n > 1] >= 1 - T - 1e-6).all()
            seen |= set(n.flatten().tolist())
    assert classes == 2 or len(seen) > 2


@pytest.mark.parametrize("classes, n, K", [(3, 2, 1), (11, 5, 2), (19, 4, 1), (21, 21, 3)])
def test_the_bound_is_reached_and_no_push_goes_below_it(classes, n, K):
    T = max(0.9, (n - 1) / classes + 0.01)  # Alg. 1 has n - 1 classes up to T: T >= (n - 1) / C
    tail = (1 - T) / (classes - n + 1)
    p = np.full(classes, tail)
    p[:K] = (1 - tail * (classes - K)) / K
    assert (np.diff(p) <= 0).all() and p.sum() == pytest.approx(1)
    assert p[: n - 1].sum() == pytest.approx(T) and p[:n].sum() > T + tail / 2
    assert p[K:].sum() == pytest.approx(least(n, K, T, classes), rel=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(200):  # near it: pushed, sorted again, and still with this n
        q = -np.sort(-p * np.exp(0.05 * rng.standard_normal(classes)))
        q /= q.sum()
        if q[: n - 1].sum() <= T < q[:n].sum():
            assert q[K:].sum() >= least(n, K, T, classes) - 1e-7


def test_nothing_bounds_the_negatives_of_k_equal_n():
    assert least(4, 4, 0.9, 7) == least(1, 1, 0.9, 7) == least(7, 7, 0.9, 7) == 0  # Eq. (7)


# ---- python results/analysis.py k ----


def draw_log(path, values, name="K_gt_1", **flags):
    """Writes a log in the format of common/run.py, its last line half written."""
    lines = [{"kind": "start", "script": "cps_fpl.py", "args": {"out": str(path), **flags}}]
    lines += [{"kind": "train", "step": 20 * i, name: v} for i, v in enumerate(values, 1)]
    lines.insert(3, {"kind": "eval", "step": 40, "on": "val", "miou": 0.1})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + '{"kind": "train", "st')
    return str(path)


def refusal(capsys, *argv):
    """Runs a command that has to be refused; returns its one line."""
    assert analysis.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("analysis.py: ") and err.count("\n") == 1, err
    return err


def test_k_draws_the_share_and_prints_three_tenths(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    falls = [0.9, 0.8, *[0.5] * 7, 0.4, 0.2, *[0.3] * 7, 0.1, 0.0]  # twenty lines: tenths of two
    one = draw_log(tmp_path / "one.jsonl", falls, T=0.9, seed=0)
    two = draw_log(tmp_path / "two.jsonl", [0.25, 0.5, 1.0], T=0.95, seed=0)
    out = tmp_path / "k.png"
    assert analysis.main(["k", one, two, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"([\d.]+) %", line) for line in lines[1:]]
    assert numbers == [["85.00", "30.00", "5.00"], ["25.00", "50.00", "100.00"]]
    assert "step 400 " in lines[1] and lines[1].endswith("  T 0.9")
    assert "step 60 " in lines[2] and lines[2].endswith("  T 0.95")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"), int)
    colours = np.ptp(pixels, axis=2) > 100  # the two curves; axes and words are grey
    assert 300 < colours.sum() < 0.1 * colours.size
    assert analysis.main(["k", one, one, "--out", str(out)]) == 0  # nothing differs: by file
    assert capsys.readouterr().out.count(f"  {tmp_path.name}/one.jsonl\n") == 2


def test_curves_are_the_logs_in_per_cent(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: seen.append(self.axes[0]))
    log = draw_log(tmp_path / "log.jsonl", [0.75, 0.5, 0.125])
    assert analysis.main(["k", log, "--out", "unused.png"]) == 0
    (line,) = seen[0].lines
    assert line.get_xydata().tolist() == [[20, 75], [40, 50], [60, 12.5]]
    assert line.get_label() == f"{tmp_path.name}/log.jsonl"


def test_logs_without_k_are_refused(tmp_path, capsys):
    out = tmp_path / "k.png"
    log = draw_log(tmp_path / "mean.jsonl", [0.5], name="consistency")
    assert "mean.jsonl: no log of cps_fpl.py" in refusal(capsys, "k", log, "--out", out)
    log = draw_log(tmp_path / "none.jsonl", [])
    assert "none.jsonl" in refusal(capsys, "k", log, "--out", out)
    (tmp_path / "words.jsonl").write_text("no\nlog\n")
    assert "words.jsonl" in refusal(capsys, "k", tmp_path / "words.jsonl", "--out", out)
    (tmp_path / "list.jsonl").write_text("[1]\n2\n")
    assert "list.jsonl" in refusal(capsys, "k", tmp_path / "list.jsonl", "--out", out)
    assert "absent.jsonl" in refusal(capsys, "k", tmp_path / "absent.jsonl", "--out", out)
    assert "K_gt_1" in refusal(
        capsys, "k", ROOT / "results/supervised/camvid-all.jsonl", "--out", out
    )
    assert not out.exists()


def test_wrong_words_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    log = draw_log(tmp_path / "log.jsonl", [0.5])
    assert "--out" in refusal(capsys, "k", log)
    assert "--ouch" in refusal(capsys, "k", log, "--out", tmp_path / "k.png", "--ouch")
    assert "k|scores" in refusal(capsys)
    assert "--images" in refusal(capsys, "scores", "last.pt", "--images", "some")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refusal(capsys, "k", log, "--out", tmp_path / "k.png")
    assert "requirements-dev.txt" in line


def test_a_folder_that_is_absent_is_refused_for_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    log = draw_log(tmp_path / "log.jsonl", [0.5])
    assert analysis.main(["k", log, "--out", str(tmp_path / "no/k.png")]) == 2
    assert "no/k.png: No such file" in capsys.readouterr().err


def test_the_script_finds_the_repository_from_anywhere(tmp_path, monkeypatch, capsys):
    script = str(ROOT / "results/analysis.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(ROOT))])
    monkeypatch.setattr(sys, "argv", [script, "k", "absent.jsonl", "--out", "k.png"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 2 and str(ROOT) in sys.path
    assert capsys.readouterr().err.startswith("analysis.py: absent.jsonl: ")


# ---- python results/analysis.py scores ----


def tiny_backbone(args):
    """A stand-in for make_backbone: every stage keeps eight channels."""
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
    net.relu, net.maxpool = nn.ReLU(), nn.Identity()
    net.layer1, net.layer2, net.layer3, net.layer4 = (nn.Identity() for _ in range(4))
    return net


class TinyHead(nn.Module):
    """A stand-in for CPSHead with logits of both signs and some size."""

    def __init__(self, channels, num_classes, args):
        super().__init__()
        self.classify = nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(8, num_classes, 1))
        nn.init.normal_(self.classify[1].weight, std=1.5)

    def forward(self, stages, size):
        return {"logits": cps_fpl.upsample(self.classify(stages[3]), size)}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Returns (path, saved content) of an untrained cps_fpl.py with tiny networks."""
    monkeypatch.setattr(cps_fpl, "make_backbone", tiny_backbone)
    monkeypatch.setattr(cps_fpl, "CPSHead", TinyHead)
    tree = draw_tree(tmp_path / "tree", train=4, val=3, test=0)
    argv = ["--dataset", "camvid", "--data-root", str(tree), "--split", "1/2", "--T", "0.8"]
    args = resolve(parse(cps_fpl.Args, argv), cps_fpl.preset)
    torch.manual_seed(1)
    nets = {name: cps_fpl.Network(args, 11, TinyHead) for name in ("branch1", "branch2")}
    content = {"script": "cps_fpl.py", "step": 600, "args": plain(args)}
    content["networks"] = {name: net.state_dict() for name, net in nets.items()}
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt", content


def scalar_table(content, indices, T):
    """Returns {case: row of scalar_measures' sums} over val images of a checkpoint."""
    args = parse(cps_fpl.Args, ["--data-root", content["args"]["data_root"]])
    sums = {c: [0.0] * 10 for c in (1, 2, 3)}
    logits = []
    for name in ("branch1", "branch2"):
        net = cps_fpl.Network(args, 11, TinyHead)
        net.load_state_dict(content["networks"][name])
        logits.append(net.eval())
    for i in indices:
        root = content["args"]["data_root"]
        pixels = np.array(Image.open(f"{root}/val/val{i}.jpg").convert("RGB"))
        truth = np.array(Image.open(f"{root}/valannot/val{i}.png"))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            student, teacher = (net(x)["logits"] for net in logits)
        prob_t = teacher.softmax(1)  # float32 as there: order and K are the same
        for y, x_ in np.ndindex(*truth.shape):
            if truth[y, x_] == 11:  # CamVid's void
                continue
            p = at(prob_t, 0, y, x_)
            V = list(itertools.accumulate(sorted(p, reverse=True)))
            K = max(next(n for n, v in enumerate(V, 1) if v > T or n == 11) - 1, 1)
            row = scalar_measures(at(student, 0, y, x_), p, K, int(truth[y, x_]))
            c = scalar_case(p, K, int(truth[y, x_]))
            sums[c] = [a + b for a, b in zip(sums[c], row, strict=True)]
    return sums


@pytest.mark.parametrize("flags, indices, T", [([], (0, 1), 0.8), (["--T", "0.95"], (0,), 0.95)])
def test_scores_prints_the_means_of_every_case(checkpoint, capsys, flags, indices, T):
    path, content = checkpoint
    argv = ["scores", str(path), "--images", str(len(indices)), "--device", "cpu", *flags]
    assert analysis.main(argv) == 0
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"step 600, {len(indices)} images of val, ") and head.endswith(f"T {T}")
    assert names.split()[:2] == ["case", "pixels"] and len(names.split("  ")) > 9
    sums = scalar_table(content, indices, T)
    total = sum(row[0] for row in sums.values())
    for c, line in zip((1, 2, 3), lines, strict=True):
        number, share, _, *cells = line.split()
        assert sums[c][0] > 20 and int(number) == c
        assert float(share) == pytest.approx(100 * sums[c][0] / total, abs=0.006)  # two digits
        expected = [v / sums[c][0] for v in sums[c][1:]]
        assert [float(v) for v in cells] == pytest.approx(expected, abs=6e-5)  # four digits


def test_scores_of_a_case_without_a_pixel_are_nan(checkpoint, capsys):
    path, content = checkpoint
    content["args"]["k_strategy"] = "step"  # K = 1 at the end: no second case
    torch.save(content, path)
    assert analysis.main(["scores", str(path), "--images", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:4] == ["2", "0.00", "%", "nan"]
    assert float(lines[2].split()[3]) == 1 and "nan" not in lines[2] + lines[4]


def test_scores_of_a_sure_student_keep_its_directions(checkpoint, capsys):
    path, content = checkpoint
    for net in content["networks"].values():
        net["head.classify.1.bias"][0] += 300  # gradients of e^-300: 0 in float32
    torch.save(content, path)
    assert analysis.main(["scores", str(path), "--images", "1", "--device", "cpu"]) == 0
    _, _, sure, _, wrong = capsys.readouterr().out.splitlines()
    assert sure.split()[3:9] == ["1.0000"] * 6  # K = 1, R and sim: as in Sec. 3.4
    assert wrong.split()[6] == wrong.split()[7]


def test_checkpoints_that_cannot_be_scored_are_refused(checkpoint, tmp_path, capsys):
    path, content = checkpoint
    for count in (0, 4):
        line = refusal(capsys, "scores", path, "--images", count, "--device", "cpu")
        assert f"--images {count}: a number from 1 to 3" in line
    assert "--nonsense" in refusal(capsys, "scores", path, "--nonsense", "3")
    assert "no such folder" in refusal(capsys, "scores", path, "--data-root", tmp_path / "no")
    assert "no such checkpoint" in refusal(capsys, "scores", tmp_path / "absent.pt")
    torch.save(content | {"script": "mean_teacher.py"}, path)
    assert "written by mean_teacher.py" in refusal(capsys, "scores", path)
