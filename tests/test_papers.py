"""What the papers number has a row and a test; what they print otherwise; decisions of D rows."""

import sys

import numpy as np
import torch

import ael_fpl
import cps_fpl
from benchmarks import fpl_step, per_process
from common import distributed
from results import analysis, compare
from tiny import ROOT, resolved

sys.path.insert(0, str(ROOT / "docs"))
import equations  # noqa: E402


def test_every_numbered_item_has_a_function_and_a_test_or_a_reason():
    page = equations.page()
    assert page == equations.PAGE.read_text(), "python docs/equations.py --write"
    found = set(equations.places())
    unknown = [
        key for key in found - set(equations.ITEMS) if key.startswith((*equations.NUMBERED,))
    ]
    assert not unknown and set(equations.NOT_HERE) <= set(equations.ITEMS) - found
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


def test_without_cutmix_no_mask_has_a_box():
    state = {"confidence": torch.ones(7), "present": torch.ones(7, 9).bool()}
    state["draws"] = torch.ones(4, 2, 2, dtype=torch.int64)  # class 1, which is everywhere
    logits = torch.zeros(4, 7, 64, 64)
    logits[:, 1] = 1
    group = distributed.Group(0, 1, torch.device("cpu"))
    rest = [0, 1], state, np.random.default_rng(0), resolved(ael_fpl, ["--no-cutmix"]), group
    mask, regions = ael_fpl.adaptive_cutmix(logits, torch.ones(4, 64, 64).bool(), *rest)
    assert regions == 0 and len(mask) == 2 and not mask.any()


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
