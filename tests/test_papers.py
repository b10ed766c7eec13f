"""The papers: what they number, FPL's analysis against one pixel at a time, tables, commands."""

import math
import re
import shlex
import sys

import numpy as np
import pytest
import torch

import cps_fpl
from benchmarks import fpl_step, per_process
from common import Refusal
from oracles.fpl import order, regularization
from oracles.supervised import VOID, likeliest, nll
from results import analysis, commands, compare, ranks
from tiny import ROOT, resolved, script

sys.path.insert(0, str(ROOT / "docs"))
import equations  # noqa: E402


def test_every_numbered_item_has_a_function_and_a_test_or_a_reason():
    page = equations.page()
    assert page == equations.PAGE.read_text(), "python docs/equations.py --write"
    found = set(equations.places())
    numbered = {key for key in found if key.startswith(tuple(equations.NUMBERED))}
    assert numbered <= set(equations.ITEMS)
    assert set(equations.NOT_HERE) <= set(equations.ITEMS) - found
    assert 20 * len(equations.NOT_HERE) <= len(equations.ITEMS)
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if "|" in line]
    names = {name for name, _ in equations.read_tests()}
    for _, key, here, _, test, _ in rows:
        known = key in ("paper", "-") or here.startswith("not here: ") or (here and test in names)
        assert known, f"{key}: cite it in the docstring of a function that a test calls"
    assert len(rows) >= len(equations.ITEMS) + 2 * len(equations.NUMBERED)


def test_equations_that_restate_another_are_equal_to_it():
    """RESTATED of docs/equations.py: FPL Eq. (4), (5), supplement Eq. (2), (3), (5)."""
    torch.manual_seed(0)
    z, t = 2 * torch.randn(2, 2, 7, 5, 5, dtype=torch.float64)
    p, q = z.softmax(1), t.softmax(1)
    ranked, order = cps_fpl.by_rank(q)
    K = cps_fpl.fuzzy_positive_assignment(ranked, 0.9)
    Y = analysis.positives(q, K)
    hinge = z.masked_fill(Y, -torch.inf).amax(1) - z.masked_fill(~Y, torch.inf).amin(1)
    sharp = cps_fpl.fuzzy_positive_regularization(1e4 * z, order, K) / 1e4  # Eq. (6) in the limit
    assert torch.allclose(sharp, hinge.relu(), atol=1e-3)  # Eq. (5), 0 where (4)
    others = z.exp().sum(1, keepdim=True) - z.exp()
    by_logits = ((1 + z.exp() / others).log() * (q < 0.2)).sum(1)  # supplement Eq. (2)
    assert torch.allclose(cps_fpl.negative_loss(z, q), by_logits, rtol=1e-9)
    inverse = (Y / p).sum(1, keepdim=True)
    rest = (p * ~Y).sum(1, keepdim=True)
    by_prob = torch.where(Y, -rest / p, inverse * p) / (1 + rest * inverse)  # supplement Eq. (5)
    assert torch.allclose(analysis.fuzzy_gradient(z, q, K), by_prob, rtol=1e-9)


def test_the_range_of_eq_10_is_no_range_where_n_is_1():
    """FPL Eq. (10), (1 - T) / (C - K) < max p_j outside Y, for random pixels of 19 classes."""
    rng = np.random.default_rng(0)
    p, _ = cps_fpl.by_rank(torch.from_numpy(5 * rng.standard_normal((1, 19, 1, 1000))).softmax(1))
    n = cps_fpl.cumulative_classes(p, 0.9)
    K = cps_fpl.fuzzy_positive_assignment(p, 0.9)
    holds = 0.1 / (19 - K) < p.gather(1, K[:, None])[:, 0]
    assert holds[n > 1].all()
    assert (int((n == 1).sum()), int((~holds).sum())) == (321, 98)  # docs/cps_fpl.md, D24


def test_class_wise_results_of_the_paper_are_printed_beside():
    rows = [("Class", "a"), ("truck", "1.00"), ("mIoU", "2.00")]  # FPL Table 1: 73.00, 75.01
    for method, iou in compare.published("cityscapes").items():
        rows = compare.beside(rows, method, iou)
    assert rows[1:] == [("truck", "1.00", "51.35", "71.88"), ("mIoU", "2.00", "73.00", "75.01")]
    assert compare.published("camvid") == {}


def test_the_cost_of_a_step_is_measured_in_every_mode():
    """FPL supplement Table 7, with the tests' tiny network."""
    rows = fpl_step.measure(fpl_step.parsed(["--quick"]))["rows"]
    assert [min(row[mode] for mode in fpl_step.MODES) > 0 for row in rows] == [True] * 3


def test_what_is_per_image_does_not_know_the_number_of_processes():
    given = per_process.batch()
    zero = ["OHEM, per image", "FPL on CPS, balance per image", "AEL Eq. (12), mixed images"]
    for name, loss_of in per_process.LOSSES.items():
        whole = per_process.gradient(loss_of, given, 1)
        far = per_process.apart(per_process.gradient(loss_of, given, 4), whole)
        assert (far < 1e-3) == (name in [*zero, per_process.GROUPS]), name


# ---- FPL Sec. 3.4 and supplement Sec. 3: gradients, scores; U2PL Fig. 2 ----


def cosine(one, two):
    lengths = math.hypot(*one) * math.hypot(*two)
    return math.fsum(a * b for a, b in zip(one, two, strict=True)) / lengths if lengths else 0.0


def scalar(z, p, K, truth):
    """Oracle of all of them at one pixel: {name: list or number}; Eq. (12) from the gradients."""
    Y, top = order(p)[:K], likeliest(p)
    known = truth != VOID
    fuzzy, vanilla = regularization(z, Y)[1], nll(z, top)[1]
    ideal = nll(z, truth)[1] if known else [0.0] * len(z)
    found = {"fuzzy": fuzzy, "vanilla": vanilla, "ideal": ideal}
    found["sum"] = math.fsum(g for c, g in enumerate(fuzzy) if c not in Y)  # supplement Eq. (6)
    found["case"] = (1 if truth == top else 2 if truth in Y else 3) if known else 0
    found["R^f"] = fuzzy[truth] / math.fsum(fuzzy[i] for i in Y) if known and K < len(z) else 0.0
    found["R^v"] = vanilla[truth] / vanilla[top] if known else 0.0
    found["sim(f,ide)"], found["sim(v,ide)"] = cosine(fuzzy, ideal), cosine(vanilla, ideal)
    found |= {"|G^f|": math.hypot(*fuzzy), "|G^v|": math.hypot(*vanilla)}
    return found | {"|G^ide|": math.hypot(*ideal)}


@pytest.mark.smoke
@pytest.mark.parametrize("classes, dtype", [(2, 64), (3, 64), (8, 64), (5, 16)])
def test_gradients_scores_and_cases_are_the_papers(classes, dtype):
    """Every number of a pixel against the printed formulas; logits of 16 bits are widened."""
    rng = torch.Generator().manual_seed(classes)
    z, t = (2 * torch.randn(2, classes, 6, 7, generator=rng).double() for _ in range(2))
    z = z if dtype == 64 else z.bfloat16()
    prob_t = t.softmax(1)
    K = torch.randint(1, classes + 1, (2, 6, 7), generator=rng)
    label = torch.randint(0, classes + 1, (2, 6, 7), generator=rng)
    label[label == classes] = VOID
    found = analysis.measures(z, prob_t, K, label)
    found["fuzzy"] = analysis.fuzzy_gradient(z, prob_t, K)
    found["vanilla"] = analysis.vanilla_gradient(z, prob_t)
    found["ideal"] = analysis.ideal_gradient(z, label)
    found["sum"] = analysis.gradient_sum(z, prob_t, K)
    found["case"] = analysis.case(prob_t, K, label)
    close = dict(rel=1e-9, abs=1e-12) if dtype == 64 else dict(rel=1e-4, abs=1e-6)
    assert set(found["case"].flatten().tolist()) == {0, 1, 2, 3}
    for i, y, x in np.ndindex(*label.shape):
        pixel = z[i, :, y, x].tolist(), prob_t[i, :, y, x].tolist()
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


@pytest.mark.parametrize("C, n, K, T", [(3, 2, 1, 0.5), (5, 4, 2, 0.75), (19, 6, 5, 0.9)])
def test_the_bound_on_the_mass_of_the_negatives_holds_and_is_reached(C, n, K, T):
    """Supplement Eq. (8), corrected: V^{n-1} = T, and equal probabilities behind K, reach it."""
    numbers = (torch.full((1, 1, 1), number) for number in (n, K))
    bound = analysis.least_negative_mass(*numbers, T, C).item()
    m = (1 - T) / (C - n + 1)
    p = [(1 - (C - K) * m) / K] * K + [m] * (C - K)
    assert p[0] >= m and sum(p[: n - 1]) == pytest.approx(T) and sum(p) == pytest.approx(1)
    assert sum(p[K:]) == pytest.approx(bound, rel=1e-6)
    for p in np.sort(np.random.default_rng(0).dirichlet(np.full(C, 0.4), 10_000))[:, ::-1]:
        assert p[: n - 1].sum() > T or p[K:].sum() >= bound - 1e-6  # float32


def test_counts_of_ranks_equal_a_loop_over_pixels():
    rng = torch.Generator().manual_seed(0)
    prob = (2 * torch.randn(1, 11, 9, 14, generator=rng, dtype=torch.float64)).softmax(1)
    label = torch.randint(0, 11, (1, 9, 14), generator=rng)
    label[0, :2] = VOID
    pixels = []
    for y, x in np.ndindex(9, 14):
        p, truth = prob[0, :, y, x].tolist(), label[0, y, x].item()
        if truth != VOID:
            pixels.append((-math.fsum(v * math.log(v) for v in p if v), order(p).index(truth)))
    gamma = np.percentile([H for H, _ in pixels], 80)
    expected = np.zeros((2, 11))
    for H, rank in pixels:
        expected[int(H > gamma), rank] += 1
    assert ranks.counts(prob, label, 0.2).tolist() == expected.tolist()


# ---- python results/commands.py ----

NEEDED = {  # a script, and a word of its flags or source: the rows that keep its number away
    ("cps_fpl", "FPL Table 1, FPL+CPS w/ cutmix"): "D9 D5 D18 D11",
    ("cps_fpl", "FPL Table 2, CPS w/o cutmix"): "D9 D5",
    ("ael_fpl", "FPL Table 1, AEL (rerun)"): "D9 D5 D32",
    ("ael_fpl", "U2PL Table 3, AEL (rerun)"): "D9 D5",
    ("ael_fpl", "FPL Table 2, FPL+AEL"): "D9 D5 D5 D28",
    ("u2pl_ael", "U2PL Table 3, U2PL (w/ AEL)"): "D9 D5 D16 D35",
    ("unimatch", "UniMatch logs, last"): "D9",
    ("esl", "ESL Table of Cityscapes, R101"): "",
}


def test_every_entry_has_its_command_steps_hours_and_the_rows_that_say_why(capsys):
    seen = {}
    for entry, _ in commands.entries():
        found = [reason.split(":")[0] for reason in commands.reasons(entry)]
        seen[entry["script"], entry["source"]] = " ".join(found)
        page = (ROOT / f"docs/{entry['script']}.md").read_text()
        assert all(f"| {row} |" in page for row in found)
    assert NEEDED.items() <= seen.items()
    commands.main(commands.Options(scripts=("u2pl_ael",), gpus=4))
    out = capsys.readouterr().out
    assert " 74.90  U2PL Table 3, U2PL (w/ AEL), 1/16" in out
    # 34,800 steps of 24 crops of 769 x 769 at 0.4 megapixels a second
    assert "34,800 steps, about 343 GPU-hours" in out
    lines = re.findall(r"torchrun --nproc_per_node 4 (\S+).py (.*)", out)
    args = [resolved(script(name), shlex.split(words)) for name, words in lines]
    assert len(args) == 4 and min(one.total_iters for one in args) >= 18_600
    for name, count in (("esl", 4), ("cps_fpl", 8), ("mean_teacher", 8)):  # esl: 8 in pairs
        args = resolved(script(name), "--dataset voc --split 92".split())
        assert commands.processes(name, args, 8) == count
    with pytest.raises(Refusal, match="--scripts fixmatch: only ael_fpl, cps_fpl, "):
        commands.main(commands.Options(scripts=("fixmatch",)))
