"""results/: FPL's analysis against one pixel at a time, tables of comparisons, the commands."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cps_fpl
from common import Refusal
from common.flags import plain
from oracles.fpl import order, regularization
from oracles.supervised import VOID, likeliest, nll
from results import analysis, compare, ranks
from tiny import draw_tree, resolved, shrink


def refusal(capsys, command, *argv):
    """Returns the one line that a command is refused with."""
    try:
        assert command.main([str(word) for word in argv]) == 2  # analysis.py prints it itself
        line = capsys.readouterr().err.strip()
    except Refusal as error:
        line = str(error)
    assert line and "\n" not in line
    return line


# ---- FPL Sec. 3.4 and supplement Sec. 3: gradients, scores ----


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


# ---- python results/analysis.py, results/ranks.py ----


def draw_log(path, lines, end=""):
    """Writes a log of these lines; returns its path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return str(path)


def log_of_k(path, values, name="K_gt_1", **flags):
    """Writes a log in the format of common/run.py, its last line half written."""
    lines = [{"kind": "start", "script": "cps_fpl.py", "args": {"out": str(path), **flags}}]
    lines += [{"kind": "train", "step": 20 * i, name: v} for i, v in enumerate(values, 1)]
    return draw_log(path, lines, '{"kind": "train", "st')


def test_k_draws_the_share_and_prints_three_tenths(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    falls = [0.9, 0.8, *[0.5] * 7, 0.4, 0.2, *[0.3] * 7, 0.1, 0.0]  # twenty lines: tenths of two
    one = log_of_k(tmp_path / "one.jsonl", falls, T=0.9, seed=0)
    two = log_of_k(tmp_path / "two.jsonl", [0.25, 0.5, 1.0], T=0.95, seed=0)
    out = tmp_path / "k.png"
    assert analysis.main(["k", one, two, "--out", str(out)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"([\d.]+) %", line) for line in lines]
    assert numbers == [["85.00", "30.00", "5.00"], ["25.00", "50.00", "100.00"]]
    assert "step 400 " in lines[0] and lines[0].endswith("  T 0.9")
    with Image.open(out) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_scores_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Shares and means by case, of an untrained cps_fpl.py with spread logits."""
    monkeypatch.chdir(tmp_path)
    shrink(cps_fpl, monkeypatch)
    tree = draw_tree(tmp_path / "tree", train=4, val=3, test=0)
    argv = ["--dataset", "camvid", "--data-root", str(tree), "--split", "1/2"]
    args, networks = resolved(cps_fpl, argv), {}
    for seed, name in enumerate(("branch1", "branch2")):
        torch.manual_seed(seed)
        networks[name] = cps_fpl.Network(args, 11, cps_fpl.CPSHead).state_dict()
        networks[name]["head.classify.1.weight"] *= 40
    content = {"script": "cps_fpl.py", "step": 600, "args": plain(args), "networks": networks}
    torch.save(content, "last.pt")
    words = "scores last.pt --images 2 --device cpu --T 0.8"
    assert analysis.main([*words.split(), "--precise-bn", "0"]) == 0
    running = capsys.readouterr().out
    assert analysis.main(words.split()) == 0  # BN as evaluation has it
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head == "step 600, 2 images of val, branch 2 teaches branch 1, T 0.8"
    number, share, _, sure, vanilla, fuzzy, *_ = zip(*map(str.split, lines), strict=True)
    assert "\n".join([head, names, *lines, ""]) != running
    assert number == ("1", "2", "3") and sum(map(float, share)) == pytest.approx(100, abs=0.02)
    assert vanilla[0] == "1.0000" and float(vanilla[2]) < 0 < float(fuzzy[1])  # Eq. (13) to (15)
    assert sure[1] == "0.0000" and names.split()[:3] == ["case", "pixels", "K"]


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


# ---- python results/compare.py ----

SEVEN = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # IoU of shapes' seven classes


def log_of_scores(path, iou, dataset="shapes", drop="", seed=0, lists=None, **start):
    """Writes a log with the scores iou (0 to 1) in a run's format; returns its path as text."""
    args = {"dataset": dataset, "seed": seed, "total_iters": 600}
    known = {"labeled": [20, "aaaa"], "val": [64, "bbbb"], "test": [64, "cccc"], **(lists or {})}
    last = {"miou": sum(v or 0 for v in iou) / len(iou), "iou": iou}
    lines = [{"kind": "start", "args": args, "lists": known, **start}]
    lines += [{"kind": "done", "step": 600, "on": "test", "last": last}]
    return draw_log(path, [line for line in lines if line["kind"] != drop])


def printed(capsys, *argv):
    """Runs the comparison; returns (rows of cells without the dashes, the lines below)."""
    compare.main([str(word) for word in argv])
    table, below = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert set("".join(rows.pop(1))) == {"-", ":"}
    return rows, below.splitlines()


PAIRS = [  # IoU of two runs, their mIoU as logged; the printed mIoU; what rises and falls
    # each lacks another one: the numbers of absent classes are equal, the classes are not
    ([None, 1.0, 8.0], [1.0, None, 9.0], (4.5, 5.0), "8.00 9.00 +1.00", "1 of 1"),
    # 0.0033 and 0.0067: the improvement is that between the printed 0.00 and 0.01
    ([0.0, 0.0, 0.01, 1.0], [0.0, 0.0, 0.02, None], (1.0, 1.0), "0.00 0.01 +0.01", "1 of 3"),
]  # fmt: skip


@pytest.mark.parametrize("a, b, mious, last, text", PAIRS)
def test_mious_are_over_the_classes_that_both_have(a, b, mious, last, text):
    _, *rows, miou = compare.cells("AB", "wxyz"[: len(a)], a, b, mious)
    assert miou == ("mIoU", *last.split()) and compare.summary(a, b).startswith(text)
    absent = [name for name, *pair in zip("wxyz", a, b, strict=False) if None in pair]
    assert rows[len(a) - len(absent) :] == [(name, *["absent"] * 3) for name in absent]


def test_a_comparison_of_two_logs_as_rows_and_as_columns(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    a = log_of_scores(tmp_path / "a/log.jsonl", [0.9, 0.2, 0.3, 0.4, None, 0.6, 0.7])
    b = log_of_scores(tmp_path / "b.jsonl", [0.8, 0.3, 0.3, 0.4, None, 0.6, 0.71])
    rows, below = printed(capsys, Path(a).parent, b, "--rows")  # a folder, named after it
    columns, same = printed(capsys, a, b)
    assert [list(row) for row in zip(*columns, strict=True)] == rows and below == same
    assert [row[:-1] for row in columns] == [
        ["Class", "disc", "ring", "square", "triangle", "star", "background", "diamond"],
        ["a", "20.00", "30.00", "40.00", "60.00", "70.00", "90.00", "absent"],
        ["b", "30.00", "30.00", "40.00", "60.00", "71.00", "80.00", "absent"],
        ["Improvement", "+10.00", *["+0.00"] * 3, "+1.00", "-10.00", "absent"],
    ]
    assert below == [
        "last step, test, 64 images, set cccc; one seed each",
        "2 of 6 classes rise, 1 fall; on average +3.33 in the 3 hardest, -3.00 in 3 others",
    ]


# ---- refusals and warnings of all three ----


def test_other_labels_seeds_and_steps_are_warned_of_and_flags_that_differ_named(tmp_path, capsys):
    a = log_of_scores(tmp_path / "a.jsonl", SEVEN)
    b = log_of_scores(tmp_path / "b.jsonl", SEVEN, seed=1, lists={"labeled": [20, "ee"]})
    words = "warning: labelled 20 images, set aaaa against 20 images, set ee; seed 0 against 1"
    *_, warning, flag = printed(capsys, a, b)[1]
    assert warning.startswith(words) and flag == "--seed: 0 against 1"


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The current folder, with logs of which each is wrong in its own way."""
    monkeypatch.chdir(tmp_path)
    log_of_k(Path("mean.jsonl"), [0.5], name="consistency")
    log_of_scores(Path("a.jsonl"), SEVEN)
    log_of_scores(Path("unfinished.jsonl"), SEVEN, drop="done")
    log_of_scores(Path("seven.jsonl"), SEVEN, dataset="folder")
    log_of_scores(Path("set.jsonl"), SEVEN, lists={"test": [64, "dd"]})
    log_of_scores(Path("named.jsonl"), SEVEN, classes=list("abcdefg"))
    log_of_scores(Path("swapped.jsonl"), SEVEN, classes=list("bacdefg"))
    Path("list.jsonl").write_bytes(b"[1]\n2\n")


REFUSED = [  # command, its words, words of the line
    (analysis, "k mean.jsonl --out k.png", "mean.jsonl: no log of cps_fpl.py"),
    (analysis, "", "k|scores"),
    (analysis, "scores absent.pt", "no such checkpoint"),
    (ranks, "", "CHECKPOINT"),
    (compare, "a.jsonl unfinished.jsonl", "unfinished.jsonl: no line of kind done"),
    (compare, "no.jsonl a.jsonl", "no.jsonl: not the log of a finished run (No such file"),
    (compare, "a.jsonl list.jsonl", "list.jsonl: "),
    (compare, "a.jsonl seven.jsonl", "a.jsonl, seven.jsonl: data set shapes against folder"),
    (compare, "named.jsonl swapped.jsonl", "classes a, b, c, d, e, f, g against b, a, c, d"),
    (compare, "a.jsonl set.jsonl", "scored on test, 64 images, set cccc against test, 64 images"),
]


@pytest.mark.parametrize("command, words, line", REFUSED)
def test_what_cannot_be_read_or_compared_is_refused(command, words, line, broken, capsys):
    assert line in refusal(capsys, command, *words.split())
    assert not Path("k.png").exists()
