"""results/: FPL's analysis against one pixel at a time, comparisons, tables of runs, commands."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from common import Refusal
from common.metrics import confusion_matrix, scores
from oracles.fpl import order, regularization
from oracles.supervised import VOID, likeliest, nll
from results import analysis, commands, compare, differences, ranks, run_table
from trees import listed, refusal


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test has a current folder of its own."""
    monkeypatch.chdir(tmp_path)


# ---- FPL Sec. 3.4 and supplement Sec. 3: gradients, scores ----


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


# ---- python results/analysis.py, results/ranks.py ----


def draw_log(name, *lines, end=""):
    return listed(Path(name), *map(json.dumps, lines), end)


def log_of_k(name, values, **flags):
    """Writes a log of shares, its last line half written."""
    lines = [{"kind": "train", "step": 20 * i, "K_gt_1": v} for i, v in enumerate(values, 1)]
    start = {"kind": "start", "script": "cps_fpl.py", "args": {"out": name, **flags}}
    return draw_log(name, start, *lines, end='{"kind": "train", "st')


def test_k_draws_the_share_and_prints_three_tenths(capsys):
    pytest.importorskip("matplotlib")
    falls = [0.9, 0.8, *[0.5] * 7, 0.4, 0.2, *[0.3] * 7, 0.1, 0.0]  # twenty lines: tenths of two
    logs = log_of_k("a.jsonl", falls, T=0.9), log_of_k("b.jsonl", [0.25, 0.5, 1.0], T=0.95)
    assert analysis.main(["k", *logs, "--out", "k.png"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"([\d.]+) %", line) for line in lines]
    assert numbers == [["85.00", "30.00", "5.00"], ["25.00", "50.00", "100.00"]]
    assert "step 400 " in lines[0] and lines[0].endswith("  T 0.9")
    with Image.open("k.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


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


def log_of_scores(name, iou=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), dataset="shapes", seed=0, **more):
    """Writes the log of a run on seven classes; more: what its first line has beside the usual."""
    start = dict(kind="start", args={"dataset": dataset, "seed": seed, "total_iters": 600})
    start["lists"] = {"labeled": [20, "aaaa"], "val": [64, "bbbb"], "test": [64, "cccc"]}
    last = {"miou": sum(v or 0 for v in iou) / len(iou), "iou": iou}
    return draw_log(name, start | more, dict(kind="done", step=600, on="test", last=last))


def printed(capsys, *argv):
    """Runs the comparison; returns (rows of cells without the dashes, the lines below)."""
    compare.main(argv)
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


def test_a_comparison_of_two_logs_as_rows_and_as_columns(capsys):
    a = log_of_scores("a/log.jsonl", [0.9, 0.2, 0.3, 0.4, None, 0.6, 0.7])
    b = log_of_scores("b.jsonl", [0.8, 0.3, 0.3, 0.4, None, 0.6, 0.71])
    rows, below = printed(capsys, "a", b, "--rows")  # a folder, named after it
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
    *_, warning, flag = printed(capsys, a, log_of_scores("c.jsonl", seed=1))[1]
    assert warning.startswith("warning: seed 0 against 1:") and flag == "--seed: 0 against 1"


UNLIKE = [  # what a second run has otherwise, words of the line
    (dict(dataset="folder"), "a.jsonl, b.jsonl: data set shapes against folder"),
    (dict(classes=[*"bacdefg"]), "classes a, b, c, d, e, f, g against b, a, c, d, e, f, g"),
    (dict(lists={"labeled": [20, "aaaa"], "test": [9, "cccc"]}), "set cccc against test, 9 images"),
]
NO_LOGS = [  # a file's lines, words of the line
    (['{"kind": "start"}'], "b.jsonl: no line of kind done"),
    (["[1]", "2"], "b.jsonl: not the log of a finished run (TypeError"),
]


def test_what_cannot_be_read_or_compared_is_refused_in_one_line(capsys):
    classes = [*"abcdefg"]
    a = log_of_scores("a.jsonl", classes=classes)
    assert "no.jsonl: not the log of a finished run (No" in refusal(compare.main, ["no.jsonl", a])
    for changes, line in UNLIKE:
        b = log_of_scores("b.jsonl", **dict(classes=classes) | changes)
        assert line in refusal(compare.main, [a, b])
    for lines, line in NO_LOGS:
        assert line in refusal(compare.main, [a, listed(Path("b.jsonl"), *lines)])
    draw_log("mean.jsonl", {"kind": "train", "step": 20}, end="{")
    for words, line in (
        ("k mean.jsonl --out k.png", "mean.jsonl: no log of cps_fpl.py on unlabelled images (Key"),
        ("scores absent.pt", "absent.pt: no such checkpoint"),
    ):
        assert analysis.main(words.split()) == 2
        assert capsys.readouterr().err.startswith(f"analysis.py: {line}")
    assert not Path("k.png").exists()


# ---- python results/run_table.py, results/differences.py ----


@pytest.fixture
def finish(tmp_path, monkeypatch):
    """Returns a function that writes a finished run, with the counts of its images."""
    monkeypatch.setattr(run_table, "LOGS", tmp_path)

    def write(name, seed, hit, seconds=60):
        truth = np.full((9, 2), 100, np.int32)
        counts = dict(hit=truth * hit // 100, truth=truth, predicted=truth)
        np.savez_compressed(run_table.counts_path(name, seed), **counts)
        iou = hit / (200 - hit)
        score = {"miou": iou, "iou": [iou, *[0.5] * 10]}
        train = {"kind": "train", "time": {"elapsed_s": seconds}}
        lines = [train, {"kind": "done", "last": score, "best": score}]
        listed(run_table.log_path(name, seed), *map(json.dumps, lines))

    return write


def test_sums_over_images_give_the_mean_iou_of_the_confusion_matrix():
    pred, label = torch.randint(4, (2, 50, 60), generator=torch.Generator().manual_seed(0))
    matrix = confusion_matrix(pred, label + (label == 3) * 252, 4)  # class 3 is never labelled
    sums = (m.numpy() for m in (matrix.diag(), matrix.sum(1), matrix.sum(0)))
    assert run_table.miou(*sums) == pytest.approx(100 * scores(matrix)["miou"])


def test_half_the_size_is_the_mean_of_four_pixels_and_one_pixel_of_a_mask():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 8
    tiny.save(Path("all/val/a.png"), image)
    tiny.save(Path("all/valannot/a.png"), image[..., 0])
    run_table.halved("all", "half")
    mean = image.reshape(1, 2, 2, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(np.array(Image.open("half/val/a.png"))[0], mean[0])
    mask = np.array(Image.open("half/valannot/a.png"))[0]
    assert mask[0] in image[:, :2, 0] and mask[1] in image[:, 2:, 0]


def test_what_is_missing_comes_by_seed_then_by_cost(finish):
    rows = ("fpl-cps", "labels")
    assert run_table.missing(rows, (0, 1)) == [(n, s) for s in (0, 1) for n in reversed(rows)]
    finish("labels", 0, 50, seconds=1800)
    assert run_table.missing(rows, (0,)) == [("fpl-cps", 0)]
    assert run_table.estimate("fpl-cps") == 6 * 1800  # by the cost of a step
    assert run_table.overview(rows, (0, 1))[-1] == "3 runs left, 6.5 hours of one core"


def test_a_claim_holds_where_all_of_the_interval_is_above_zero(finish):
    pairs = ((60, 50), (70, 65), (66, 60))
    for seed, (better, worse) in enumerate(pairs):
        finish("cps", seed, better)
        finish("labels", seed, worse)
    seeds, gaps, interval = differences.difference("cps", "labels", draws=200)
    expected = [100 * (a / (200 - a) - b / (200 - b)) for a, b in pairs]
    assert gaps == pytest.approx(expected)
    assert 0 < interval[0] < sum(gaps) / 3 < interval[1]
    assert differences.verdict(seeds, interval) == "holds"
    back = differences.difference("labels", "cps", draws=200)
    assert differences.verdict(back[0], back[2]) == "does not hold"
    assert differences.verdict([0], interval) == "not yet told"
    table = differences.table()
    assert "| CPS is above labels alone | FPL Table 1 | +" in table
    assert f"| labels | 41.4 | {' | '.join(['50.0'] * 10)} |\n" in table  # its mean over seeds


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
        page = (tiny.ROOT / f"docs/{entry['script']}.md").read_text()
        assert all(f"| {row} |" in page for row in found)
    assert NEEDED.items() <= seen.items()
    commands.main(commands.Options(scripts=("u2pl_ael",), gpus=4))
    out = capsys.readouterr().out
    assert " 74.90  U2PL Table 3, U2PL (w/ AEL), 1/16" in out
    # 34,800 steps of 24 crops of 769 x 769 at 0.4 megapixels a second
    assert "34,800 steps, about 343 GPU-hours" in out
    lines = re.findall(r"torchrun --nproc_per_node 4 (\S+).py (.*)", out)
    assert len(lines) == 4
    for name, words in lines:
        assert tiny.resolved(tiny.script(name), shlex.split(words)).total_iters >= 18_600
    for name, count in (("esl", 4), ("cps_fpl", 8), ("mean_teacher", 8)):  # esl: 8 in pairs
        args = tiny.resolved(tiny.script(name), "--dataset voc --split 92".split())
        assert commands.processes(name, args, 8) == count
    with pytest.raises(Refusal, match="--scripts fixmatch: only ael_fpl, cps_fpl, "):
        commands.main(commands.Options(scripts=("fixmatch",)))
