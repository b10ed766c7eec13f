"""results/: FPL's analysis against one pixel at a time."""

import math

import numpy as np
import pytest
import torch

from oracles.fpl import order, regularization
from oracles.supervised import VOID, likeliest, nll
from results import analysis


def norm(grad):
    return math.sqrt(math.fsum(g * g for g in grad))


def cosine(one, two):
    dot = math.fsum(a * b for a, b in zip(one, two, strict=True))
    return dot / (norm(one) * norm(two)) if norm(one) and norm(two) else 0.0


def scalar(z, p, K, truth):
    """Oracle of all of them at one pixel: {name: list or number}; Eq. (12) from the gradients."""
    rank = order(p)
    Y, top = rank[:K], likeliest(p)
    known = truth != VOID
    fuzzy, vanilla = regularization(z, Y)[1], nll(z, top)[1]
    ideal = nll(z, truth)[1] if known else [0.0] * len(z)
    found = {"fuzzy": fuzzy, "vanilla": vanilla, "ideal": ideal}
    found["sum"] = math.fsum(g for c, g in enumerate(fuzzy) if c not in Y)  # supplement Eq. (6)
    found["case"] = (1 if truth == top else 2 if truth in Y else 3) if known else 0
    found["R^f"] = fuzzy[truth] / math.fsum(fuzzy[i] for i in Y) if known and K < len(z) else 0.0
    found["R^v"] = vanilla[truth] / vanilla[top] if known else 0.0
    found["sim(f,ide)"], found["sim(v,ide)"] = cosine(fuzzy, ideal), cosine(vanilla, ideal)
    return found | {"|G^f|": norm(fuzzy), "|G^v|": norm(vanilla), "|G^ide|": norm(ideal)}


def computed(z, prob_t, K, label):
    """What results/analysis.py has of the same names."""
    return analysis.measures(z, prob_t, K, label) | {
        "fuzzy": analysis.fuzzy_gradient(z, prob_t, K),
        "vanilla": analysis.vanilla_gradient(z, prob_t),
        "ideal": analysis.ideal_gradient(z, label),
        "sum": analysis.gradient_sum(z, prob_t, K),
        "case": analysis.case(prob_t, K, label),
    }


@pytest.mark.smoke
@pytest.mark.parametrize("classes, dtype", [(2, 64), (3, 64), (8, 64), (5, 16)])
def test_gradients_scores_and_cases_are_the_papers(classes, dtype):
    """Every number of a pixel against the printed formulas; logits of 16 bits are widened."""
    rng = torch.Generator().manual_seed(classes)
    z, t = (2 * torch.randn(2, classes, 6, 7, generator=rng).double() for _ in range(2))
    z = z if dtype == 64 else z.bfloat16()
    K = torch.randint(1, classes + 1, (2, 6, 7), generator=rng)
    label = torch.randint(0, classes + 1, (2, 6, 7), generator=rng)
    label[label == classes] = VOID
    found = computed(z, t.softmax(1), K, label)
    close = dict(rel=1e-9, abs=1e-12) if dtype == 64 else dict(rel=1e-4, abs=1e-6)
    assert set(found["case"].flatten().tolist()) == {0, 1, 2, 3}
    for i, y, x in np.ndindex(*label.shape):
        pixel = z[i, :, y, x].tolist(), t.softmax(1)[i, :, y, x].tolist()
        expected = scalar(*pixel, K[i, y, x].item(), label[i, y, x].item())
        for name, value in expected.items():
            got = found[name][i, :, y, x] if isinstance(value, list) else found[name][i, y, x]
            assert got.tolist() == pytest.approx(value, **close), name


def test_a_score_outside_the_set_has_the_sign_that_eq_8_gives():
    """Eq. (15) prints e^{-z}, which would be the softmax of -z; the limit where G^f underflows."""
    z = torch.tensor([2000.0, 1000.0, 0.0, -1.0]).view(1, 4, 1, 1)
    prob_t = torch.tensor([0.5, 0.3, 0.15, 0.05]).view(1, 4, 1, 1)  # of one order
    K = torch.full((1, 1, 1), 2)
    assert not analysis.fuzzy_gradient(z, prob_t, K).any()
    for truth, expected in enumerate([0, 1, -math.e / (math.e + 1), -1 / (math.e + 1)]):
        score = analysis.fuzzy_score(z, prob_t, K, torch.full((1, 1, 1), truth)).item()
        assert score == pytest.approx(expected, rel=1e-6)


def test_the_bound_on_the_mass_of_the_negatives_is_reached_by_equal_ones():
    """Supplement Eq. (8), corrected: V^{n-1} = T, and equal probabilities behind K, reach it."""
    C, n, K, T = 19, 6, 5, 0.9
    numbers = (torch.full((1, 1, 1), number) for number in (n, K))
    m = (1 - T) / (C - n + 1)
    p = [(1 - (C - K) * m) / K] * K + [m] * (C - K)
    assert sum(p[: n - 1]) == pytest.approx(T) and sum(p) == pytest.approx(1)
    bound = analysis.least_negative_mass(*numbers, T, C).item()
    assert sum(p[K:]) == pytest.approx(bound, rel=1e-6)
