"""results/: FPL's analysis against one pixel at a time, tables of comparisons, the commands."""

import itertools
import json
import math
import os
import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cps_fpl
import u2pl
from common.data import FACTS
from common.run import plain, refusing
from oracles.fpl import order, regularization
from oracles.supervised import VOID, likeliest, nll
from results import analysis, compare, ranks
from tiny import ROOT, draw_tree, resolved, shrink

CLOSE = dict(rel=1e-9, abs=1e-12)  # float64 against the printed formulas, which lose a few digits


def refusal(capsys, command, *argv):
    """Runs what has to be refused: one line on stderr and code 2; returns the line."""

    def end(code):
        raise SystemExit(code)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(os, "_exit", end)
        patch.setattr(sys, "argv", [command.__file__])
        words = [str(word) for word in argv]
        refusing(lambda: command.main(words) and end(2))  # analysis.main returns its code
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1, out + err
    return err


# ---- FPL Sec. 3.4 and supplement Sec. 3: gradients, scores ----


def draw(seed, classes=5, spread=2.0, dtype=torch.float64):
    """Returns logits_s, prob_t (2, C, 6, 7), K in [1, C], label with every class and some 255."""
    rng = torch.Generator().manual_seed(seed)
    z, t = (spread * torch.randn(2, classes, 6, 7, generator=rng, dtype=dtype) for _ in range(2))
    K = torch.randint(1, classes + 1, (2, 6, 7), generator=rng)
    label = torch.randint(0, classes + 1, (2, 6, 7), generator=rng)
    return z, t.softmax(1), K, label.masked_fill(label == classes, VOID)


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
    fuzzy = analysis.fuzzy_gradient(z, prob_t, K)
    vanilla, ideal = analysis.vanilla_gradient(z, prob_t), analysis.ideal_gradient(z, label)
    return {
        "fuzzy": fuzzy,
        "vanilla": vanilla,
        "ideal": ideal,
        "sum": analysis.gradient_sum(z, prob_t, K),
        "case": analysis.case(prob_t, K, label),
        "R^f": analysis.fuzzy_score(z, prob_t, K, label),
        "R^v": analysis.vanilla_score(z, prob_t, label),
        "sim(f,ide)": analysis.cosine(fuzzy, ideal),
        "sim(v,ide)": analysis.cosine(vanilla, ideal),
        "|G^f|": analysis.norm(fuzzy),
        "|G^v|": analysis.norm(vanilla),
        "|G^ide|": analysis.norm(ideal),
    }


@pytest.mark.smoke
@pytest.mark.parametrize("classes", [2, 3, 5, 8])
def test_gradients_scores_and_cases_are_the_papers(classes):
    z, prob_t, K, label = inputs = draw(classes, classes)
    found = computed(*inputs)
    assert found["case"].dtype == torch.int64
    assert set(found["case"].flatten().tolist()) == {0, 1, 2, 3}
    for i, y, x in np.ndindex(*label.shape):
        pixel = z[i, :, y, x].tolist(), prob_t[i, :, y, x].tolist()
        expected = scalar(*pixel, K[i, y, x].item(), label[i, y, x].item())
        for name, value in expected.items():
            got = found[name][i, :, y, x] if isinstance(value, list) else found[name][i, y, x]
            assert got.tolist() == pytest.approx(value, **CLOSE), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.1, 3.0, 1e4])
def test_ranges(spread, dtype):
    eps = 8 * torch.finfo(dtype).eps  # sums of five terms up to 1
    seen = set()
    for seed in range(5):
        z, prob_t, K, label = draw(seed, spread=spread, dtype=dtype)
        found = computed(z, prob_t, K, label)
        Y = analysis.positives(prob_t, K)
        assert Y.sum(1).equal(K) and (found["fuzzy"][Y] <= 0).all()
        assert (found["fuzzy"][~Y] >= 0).all()
        for sign, part in ((-1, Y), (1, ~Y)):  # positives and negatives cancel
            total = (found["fuzzy"] * part).sum(1)
            assert torch.allclose(total, sign * found["sum"], rtol=0, atol=eps)
        for name in ("fuzzy", "vanilla", "ideal"):
            assert found[name].abs().max() <= 1 + eps and found[name].sum(1).abs().max() <= eps
        for name, where, low, high in (
            ("sum", K > 0, 0, 1),
            ("|G^f|", K > 0, 0, math.sqrt(2) + eps),
            ("|G^v|", K > 0, 0, math.sqrt(2) + eps),
            ("|G^ide|", K > 0, 0, math.sqrt(2) + eps),
            ("sim(f,ide)", K > 0, -1, 1),
            ("R^v", found["case"] == 1, 1, 1),  # Eq. (13)
            ("R^f", found["case"] == 1, 0, 1),
            ("R^f", (found["case"] == 1) & (K == 1), 1, 1),
            ("R^v", found["case"] == 2, -1, 0),  # Eq. (14)
            ("R^f", found["case"] == 2, 0, 1),
            ("R^v", found["case"] == 3, -1, 0),  # Eq. (15)
            ("R^f", found["case"] == 3, -1, 0),
            ("R^f", found["case"] == 0, 0, 0),
        ):
            if where.any():
                assert low <= found[name][where].min() and found[name][where].max() <= high, name
                seen.add((name, low, high))
    assert len(seen) == 11


def pixel(values, **more):
    return torch.tensor(values, **more).view(1, -1, 1, 1)


def test_borders_worked_out_by_hand():
    z = pixel([20.0, 0.0, -1.0])  # p - 1 is 0 in float32
    zero = torch.zeros(1, 1, 1, dtype=torch.int64)
    a, b = math.exp(-20), math.exp(-21)
    found = computed(z, z.softmax(1), zero + 1, zero)
    for name in ("ideal", "vanilla", "fuzzy"):  # exp, sums and products in float32
        assert found[name].flatten().tolist() == pytest.approx([-(a + b), a, b], rel=1e-5, abs=0)
    sure = computed(pixel([300.0, 0, 0]), pixel([1.0, 0, 0]), zero + 1, zero)
    wrong = computed(pixel([300.0, 0, 0]), pixel([1.0, 0, 0]), zero + 1, zero + 1)
    assert sure["|G^ide|"].item() == 0
    assert wrong["|G^ide|"].item() == pytest.approx(2**0.5)  # one rounding in float32
    z = pixel([5.0, 1.0, 0.0])  # the print's e^{-z} would give the softmax of -z, -0.2689
    score = analysis.fuzzy_score(z, z.softmax(1), zero + 1, zero + 1).item()
    assert score == pytest.approx(-math.e / (math.e + 1), rel=1e-6)
    z, prob_t = pixel([2000.0, 1000.0, 0.0, -1.0]), pixel([0.5, 0.3, 0.15, 0.05])  # of one order
    assert not analysis.fuzzy_gradient(z, prob_t, zero + 2).any()  # it underflows, its ratio not
    scores = [(1, 0), (-1, 1), (0, -math.e / (math.e + 1)), (0, -1 / (math.e + 1))]
    for truth, expected in enumerate(scores):
        found = computed(z, prob_t, zero + 2, zero + truth)
        assert (found["R^v"].item(), found["R^f"].item()) == pytest.approx(expected, rel=1e-6)
    even, K = torch.full((1, 4, 1, 4), 0.25), torch.full((1, 1, 4), 2)  # ties: the lowest class
    assert analysis.case(even, K, torch.arange(4).view(1, 1, 4)).tolist() == [[[1, 2, 3, 3]]]
    grad = analysis.vanilla_gradient(torch.zeros(1, 4, 1, 4), even)
    assert grad[0, :, 0, 2].tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_bfloat16_logits_are_widened_and_a_sorted_teacher_gives_the_same():
    z, prob_t, K, label = draw(3, dtype=torch.float32)
    wider = computed(z.bfloat16().float(), prob_t, K, label)
    for name, value in computed(z.bfloat16(), cps_fpl.by_rank(prob_t), K, label).items():
        assert torch.equal(value, wider[name]) and value.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1.0, 1e30])
def test_cosine_knows_no_length_and_stays_in_its_range(scale):
    rng = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, 4, 9, 9, generator=rng) for _ in range(2))
    # float32, four products; 1e-38 has lost digits of its smallest parts
    for other, expected in (
        (two, analysis.cosine(one, two)),
        (one, torch.ones(3, 9, 9)),
        (-one, -torch.ones(3, 9, 9)),  # rounding would go beyond these ends
        (torch.zeros_like(one), torch.zeros(3, 9, 9)),
    ):
        found = analysis.cosine(scale * one, other)
        assert -1 <= found.min() and found.max() <= 1
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.allclose(analysis.norm(scale * one) / scale, one.norm(dim=1), rtol=1e-5)


# ---- supplement, Eq. (7) and (8): a bound ----


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
    assert least(classes, classes, 0.9, classes) == least(1, 1, 0.9, classes) == 0  # Eq. (7)


# ---- python results/analysis.py, results/ranks.py ----


def draw_log(path, lines, end=""):
    """Writes a log of these lines; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return str(path)


def log_of_k(path, values, name="K_gt_1", **flags):
    """Writes a log in the format of common/run.py, its last line half written."""
    lines = [{"kind": "start", "script": "cps_fpl.py", "args": {"out": str(path), **flags}}]
    lines += [{"kind": "train", "step": 20 * i, name: v} for i, v in enumerate(values, 1)]
    lines.insert(3, {"kind": "eval", "step": 40, "on": "val", "miou": 0.1})
    return draw_log(path, lines, '{"kind": "train", "st')


def test_k_draws_the_share_and_prints_three_tenths(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    falls = [0.9, 0.8, *[0.5] * 7, 0.4, 0.2, *[0.3] * 7, 0.1, 0.0]  # twenty lines: tenths of two
    one = log_of_k(tmp_path / "one.jsonl", falls, T=0.9, seed=0)
    two = log_of_k(tmp_path / "two.jsonl", [0.25, 0.5, 1.0], T=0.95, seed=0)
    out = tmp_path / "k.png"
    assert analysis.main(["k", one, two, "--out", str(out)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"([\d.]+) %", line) for line in lines]
    assert numbers == [["85.00", "30.00", "5.00"], ["25.00", "50.00", "100.00"]]
    assert "step 400 " in lines[0] and lines[0].endswith("  T 0.9")
    assert "step 60 " in lines[1] and lines[1].endswith("  T 0.95")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"), int)
    colours = np.ptp(pixels, axis=2) > 100  # the two curves; axes and words are grey
    assert 300 < colours.sum() < 0.1 * colours.size
    assert analysis.main(["k", one, one, "--out", str(out)]) == 0  # nothing differs: by file
    assert capsys.readouterr().out.count(f"  {tmp_path.name}/one.jsonl\n") == 2
    assert analysis.main(["k", one, "--out", str(tmp_path / "no/k.png")]) == 2
    assert "no/k.png: No such file" in capsys.readouterr().err
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: seen.append(self.axes[0]))
    assert analysis.main(["k", two, "--out", "unused.png"]) == 0
    (line,) = seen[0].lines
    assert line.get_xydata().tolist() == [[20, 25], [40, 50], [60, 100]]  # per cent
    assert line.get_label() == f"{tmp_path.name}/two.jsonl"


def draw_checkpoint(module, names, head, tmp_path, monkeypatch):
    """Returns (path, content) of an untrained script's checkpoint: tiny networks, spread logits."""
    shrink(module, monkeypatch)
    tree = draw_tree(tmp_path / "tree", train=4, val=3, test=0)
    argv = ["--dataset", "camvid", "--data-root", str(tree), "--split", "1/2"]
    args, networks = resolved(module, argv), {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        networks[name] = module.Network(args, 11, getattr(module, head)).state_dict()
        networks[name]["head.classify.1.weight"] *= 40
    script = f"{module.__name__}.py"
    content = {"script": script, "step": 600, "args": plain(args), "networks": networks}
    torch.save(content, tmp_path / "last.pt")
    return tmp_path / "last.pt", content


@pytest.fixture
def of_cps(tmp_path, monkeypatch):
    return draw_checkpoint(cps_fpl, ("branch1", "branch2"), "CPSHead", tmp_path, monkeypatch)


@pytest.fixture
def of_u2pl(tmp_path, monkeypatch):
    return draw_checkpoint(u2pl, ("student", "teacher"), "U2PLHead", tmp_path, monkeypatch)


def outputs(module, head, content, name, images):
    """Yields (logits (1, C, H, W), label (1, H, W)) of val images by a checkpoint's network."""
    net = module.Network(resolved(module, ["--dataset", "camvid"]), 11, getattr(module, head))
    net.load_state_dict(content["networks"][name])
    root = content["args"]["data_root"]
    for i in images:
        image = np.array(Image.open(f"{root}/val/val{i}.jpg").convert("RGB"))
        truth = np.array(Image.open(f"{root}/valannot/val{i}.png"))
        with torch.no_grad():
            logits = net.eval()(torch.from_numpy(image).permute(2, 0, 1)[None])["logits"]
        yield logits, torch.from_numpy(np.where(truth == 11, VOID, truth))[None].long()


@pytest.mark.parametrize("flags, T, images", [([], 0.8, (0, 1)), (["--T", "0.95"], 0.95, (0,))])
def test_scores_prints_the_means_of_every_case(flags, T, images, of_cps, capsys):
    path, content = of_cps
    torch.save(content | {"args": content["args"] | {"T": 0.8}}, path)
    argv = ["scores", str(path), "--images", str(len(images)), "--device", "cpu", *flags]
    assert analysis.main(argv) == 0
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head == f"step 600, {len(images)} images of val, branch 2 teaches branch 1, T {T}"
    names = [names[i : i + 11].strip() for i in range(4, len(names), 11)]
    assert names[:2] == ["pixels", "K = 1"] and len(names) == 10
    sums = {1: [], 2: [], 3: []}
    both = [outputs(cps_fpl, "CPSHead", content, name, images) for name in content["networks"]]
    for (z, label), (teacher, _) in zip(*both, strict=True):
        prob_t = teacher.softmax(1)  # float32 as there: order and K are the same
        for y, x in np.ndindex(*label.shape[1:]):
            if label[0, y, x] == VOID:
                continue
            p = prob_t[0, :, y, x].tolist()
            V = itertools.accumulate(sorted(p, reverse=True))
            K = max(next(n for n, v in enumerate(V, 1) if v > T or n == 11) - 1, 1)
            row = scalar(z[0, :, y, x].tolist(), p, K, label[0, y, x].item())
            row |= {"K = 1": K == 1, "sim(f)>0": row["sim(f,ide)"] > 0}
            sums[row["case"]].append([row[name] for name in names[1:]])
    total = sum(map(len, sums.values()))
    for (c, rows), line in zip(sums.items(), lines, strict=True):
        number, share, _, *cells = line.split()
        assert len(rows) > 20 and int(number) == c
        assert float(share) == pytest.approx(100 * len(rows) / total, abs=0.006)  # two digits
        expected = np.mean(np.array(rows, float), 0)
        assert [float(v) for v in cells] == pytest.approx(expected, abs=6e-5)  # four digits


def test_scores_of_no_pixel_are_nan_and_those_of_a_sure_student_are_directions(of_cps, capsys):
    path, content = of_cps
    argv = ["scores", str(path), "--images", "1", "--device", "cpu"]
    content["args"]["k_strategy"] = "step"  # K = 1 at the end: no second case
    torch.save(content, path)
    assert analysis.main(argv) == 0
    _, _, first, second, third = capsys.readouterr().out.splitlines()
    assert second.split()[:4] == ["2", "0.00", "%", "nan"]
    assert float(first.split()[3]) == 1 and "nan" not in first + third
    content["args"]["k_strategy"] = "n-1"
    for net in content["networks"].values():
        net["head.classify.1.bias"][0] += 300  # gradients of e^-300: 0 in float32
    torch.save(content, path)
    assert analysis.main(argv) == 0
    _, _, sure, _, wrong = capsys.readouterr().out.splitlines()
    assert sure.split()[3:9] == ["1.0000"] * 6  # K = 1, R and sim: as in Sec. 3.4
    assert wrong.split()[6] == wrong.split()[7]


@pytest.mark.parametrize("classes, alpha", [(2, 0.4), (11, 0.2), (23, 0.05)])
def test_counts_of_ranks_equal_a_loop_over_pixels(classes, alpha):
    rng = torch.Generator().manual_seed(classes)
    prob = (2 * torch.randn(1, classes, 9, 14, generator=rng, dtype=torch.float64)).softmax(1)
    label = torch.randint(0, classes, (1, 9, 14), generator=rng)
    label[0, :2] = VOID
    pixels = []
    for y, x in np.ndindex(9, 14):
        p, truth = prob[0, :, y, x].tolist(), label[0, y, x].item()
        if truth != VOID:
            pixels.append((-math.fsum(v * math.log(v) for v in p if v), order(p).index(truth)))
    gamma = np.percentile([H for H, _ in pixels], 100 * (1 - alpha))
    expected = np.zeros((2, classes))
    for H, rank in pixels:
        expected[int(H > gamma), rank] += 1
    assert ranks.counts(prob, label, alpha).tolist() == expected.tolist()


def test_lines_of_ranks():
    found = torch.tensor([[60, 10, 5, 4, 1], [8, 5, 4, 2, 1]])
    head, reliable, unreliable, last = ranks.lines(found, 3, 20)
    assert head.split() == ["pixels", "share", "0", "1", "2", "3..4", "false"]
    assert reliable.split() == ["reliable", "80.00", "75.00", "12.50", "6.25", "6.25", "3.12"]
    assert unreliable.split() == ["unreliable", "20.00", "40.00", "25.00", "20.00", "15.00", "7.50"]
    assert "20.00 false" in last
    assert list(ranks.lines(found, 1, 3))[2].split()[-1] == "22.50"
    assert list(ranks.lines(found, 10, 20))[2].split()[-1] == "5.00"  # cut to the last rank


@pytest.mark.parametrize("step, name", [(60, "student"), (61, "teacher")])
def test_ranks_are_of_the_network_that_is_scored(of_u2pl, capsys, step, name):
    path, content = of_u2pl
    torch.save(content | {"step": step}, path)
    ranks.main([str(path), "--images", "2", "--device", "cpu", "--alpha-0", "0.3"])
    head, *table = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{name} of step {step}, 2 images")
    shown = outputs(u2pl, "U2PLHead", content, name, (0, 1))
    found = sum(ranks.counts(logits.softmax(1), label, 0.3) for logits, label in shown)
    assert table == list(ranks.lines(found, 3, 20))


# ---- python results/compare.py ----

CPS, FPL = (ROOT / f"results/cps_fpl/camvid-1_8-{name}.jsonl" for name in ("cps", "fpl"))
TABLE_6 = """Wall 44.40 51.71 7.31, Fence 45.26 48.26 3.00, Truck 51.35 71.88 20.53,
Terrain 56.46 60.67 4.21, Rider 59.32 59.78 0.46, Pole 62.81 62.97 0.16,
Motorcycle 65.82 65.28 -0.54, Train 69.67 71.69 2.02, Light 70.71 70.84 0.13,
Bicycle 76.87 76.99 0.12, Sign 76.92 76.74 -0.18, Sidewalk 77.85 77.93 0.08,
Person 80.95 81.20 0.25, Bus 82.24 80.99 -1.25, Building 90.79 91.10 0.31,
Vegetation 91.64 92.00 0.36, Car 93.39 94.27 0.88, Sky 93.59 94.01 0.42, Road 97.03 96.97 -0.06"""
SHUFFLED = """Road Sidewalk Building Wall Fence Pole Light Sign Vegetation Terrain Sky Person Rider
Car Truck Bus Train Motorcycle Bicycle""".split()  # in the order of Cityscapes' ids
IOU = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # of shapes' seven classes


def log_of_scores(path, iou, dataset="shapes", on="test", best=None, drop=(), **more):
    """Writes a log with the scores iou (0 to 1) in a run's format; returns its path as text."""
    args = {"dataset": dataset, "seed": more.get("seed", 0), "total_iters": more.get("steps", 600)}
    lists = {"labeled": [20, "aaaa"], "val": [64, "bbbb"], "test": [64, "cccc"]}
    lists |= more.get("lists", {})
    scores = {}
    for name, values in (("last", iou), ("best", best or iou)):
        miou = more.get("miou", sum(v or 0 for v in values) / len(values))
        scores[name] = {"miou": miou, "iou": values}
    lines = [{"kind": "start", "args": args, "lists": lists}, {"kind": "train", "step": 600}]
    lines += [{"kind": "done", "step": 600, "on": on, **scores}]
    return draw_log(path, [line for line in lines if line["kind"] not in drop])


def printed(capsys, *argv):
    """Runs the comparison; returns (rows of cells without the dashes, the lines below)."""
    compare.main([str(word) for word in argv])
    table, below = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert set("".join(rows.pop(1))) == {"-", ":"}
    return rows, below.splitlines()


def test_table_6_of_fpls_supplement_comes_out_as_printed():
    table = [row.split() for row in TABLE_6.split(",")]
    scores = {name: [float(x) for x in numbers] for name, *numbers in table}
    a, b = ([scores[name][i] for name in SHUFFLED] for i in (0, 1))
    head, *rows, last = compare.cells(("AEL", "AEL+FPL"), SHUFFLED, a, b, (72.5, 74.75))
    assert head == ("Class", "AEL", "AEL+FPL", "Improvement")
    assert [[*row[:3], row[3].replace("+", "")] for row in rows] == table
    assert last == ("mIoU", "72.50", "74.75", "+2.25")
    # by hand: 37.28 / 9 points and 0.93 / 10
    text = "15 of 19 classes rise, 4 fall; on average +4.14 in the 9 hardest, +0.09 in 10 others"
    assert compare.summary(a, b) == text
    lines = compare.markdown([("Class", "road"), ("A", "100.00")]).splitlines()
    assert lines == ["| Class |   road |", "| ----: | -----: |", "|     A | 100.00 |"]


def test_ties_stand_by_index_and_absent_classes_last():
    a, b = [30.0, None, 10.0, 30.0, 5.0, 10.0], [1.0, 2.0, 3.0, 4.0, None, 6.0]
    assert compare.hardest_first(a, b) == ([2, 5, 0, 3], [1, 4])
    assert compare.hardest_first([0.0] * 12, [1.0] * 12) == (list(range(12)), [])
    with pytest.raises(ValueError):
        compare.hardest_first([1.0], [1.0, 2.0])


PAIRS = [  # IoU of two runs, their mIoU as logged; the printed mIoU; what rises and falls
    # absent in both: the mIoU is as logged, over the present ones
    ([40.0, None, 20.0, 10.0], [41.0, None, 20.0, 9.0], (70.01, 70.02), "70.01 70.02 +0.01",
     "1 of 3 classes rise, 1 fall; on average -1.00 in the 1 hardest, +0.50 in 2 others"),
    # a class that one run lacks is in neither mIoU, whichever it is
    ([40.0, 0.0, 20.0], [42.0, None, 21.0], (20.0, 31.5), "30.00 31.50 +1.50", "2 of 2"),
    ([42.0, None, 21.0], [40.0, 0.0, 20.0], (31.5, 20.0), "31.50 30.00 -1.50", "0 of 2"),
    # each lacks another one: the numbers of absent classes are equal, the classes are not
    ([None, 1.0, 8.0], [1.0, None, 9.0], (4.5, 5.0), "8.00 9.00 +1.00", "1 of 1"),
    # 0.0033 and 0.0067: the improvement is that between the printed 0.00 and 0.01
    ([0.0, 0.0, 0.01, 1.0], [0.0, 0.0, 0.02, None], (1.0, 1.0), "0.00 0.01 +0.01", "1 of 3"),
    ([None], [1.0], (0.0, 1.0), "0.00 0.00 +0.00", "0 of 0 classes rise, 0 fall; "),
    ([], [], (1.0, 2.0), "1.00 2.00 +1.00", "0 of 0 classes rise, 0 fall; "),
    ([1.1], [1.1], (1.1, 1.1), "1.10 1.10 +0.00", "0 of 1 classes rise, 0 fall; "),
]  # fmt: skip


@pytest.mark.parametrize("a, b, mious, last, text", PAIRS)
def test_mious_are_over_the_classes_that_both_have(a, b, mious, last, text):
    _, *rows, miou = compare.cells("AB", "wxyz"[: len(a)], a, b, mious)
    assert miou == ("mIoU", *last.split()) and compare.summary(a, b).startswith(text)
    absent = [name for name, *pair in zip("wxyz", a, b, strict=False) if None in pair]
    assert rows[len(a) - len(absent) :] == [(name, *["absent"] * 3) for name in absent]


def test_a_run_is_a_folder_or_a_log_and_named_after_it(tmp_path, capsys, monkeypatch):
    one = log_of_scores(tmp_path / "one/log.jsonl", IOU)
    two = log_of_scores(tmp_path / "two.v1.jsonl", IOU)
    same = log_of_scores(tmp_path / "sub/two.v1.jsonl", IOU)
    monkeypatch.chdir(tmp_path / "one")
    for pair, names in (
        ((tmp_path / "one", two), ["one", "two.v1"]),
        ((one, two), ["one", "two.v1"]),
        ((".", two), ["one", "two.v1"]),
        ((two, same), [two, same]),
    ):
        assert printed(capsys, *pair, "--rows")[0][0][1:3] == names


def test_rows_are_the_columns_turned(tmp_path, capsys):
    a = log_of_scores(tmp_path / "a.jsonl", [0.9, 0.2, 0.3, 0.4, None, 0.6, 0.7], miou=0.516667)
    b = log_of_scores(tmp_path / "b.jsonl", [0.8, 0.3, 0.3, 0.4, None, 0.6, 0.71], miou=0.518333)
    rows, below = printed(capsys, a, b, "--rows")
    columns, same = printed(capsys, a, b)
    assert [list(row) for row in zip(*columns, strict=True)] == rows and below == same
    assert columns == [
        ["Class", "disc", "ring", "square", "triangle", "star", "background", "diamond", "mIoU"],
        ["a", "20.00", "30.00", "40.00", "60.00", "70.00", "90.00", "absent", "51.67"],
        ["b", "30.00", "30.00", "40.00", "60.00", "71.00", "80.00", "absent", "51.83"],
        ["Improvement", "+10.00", *["+0.00"] * 3, "+1.00", "-10.00", "absent", "+0.16"],
    ]
    assert below == [
        "last step, test, 64 images, set cccc; one seed each",
        "2 of 6 classes rise, 1 fall; on average +3.33 in the 3 hardest, -3.00 in 3 others",
    ]
    folders = [log_of_scores(tmp_path / f"{x}.jsonl", [0.3, 0.1], dataset="folder") for x in "cd"]
    assert printed(capsys, *folders)[0][0] == ["Class", "class 1", "class 0", "mIoU"]


def test_last_or_best_is_read(tmp_path, capsys):
    a = log_of_scores(tmp_path / "a.jsonl", [0.1] * 7, best=[0.2] * 7)
    b = log_of_scores(tmp_path / "b.jsonl", [0.1] * 7)
    for flags, word, gain in ((), "last", "+0.00"), (("--score", "best"), "best", "-10.00"):
        rows, below = printed(capsys, a, b, "--rows", *flags)
        assert rows[-1][3] == rows[1][3] == gain and below[0].startswith(f"{word} step, ")


def test_two_published_runs_compare(capsys):
    (classes, a, b, gain), below = printed(capsys, CPS, FPL)
    assert sorted(classes[1:-1]) == sorted(FACTS["camvid"]["classes"])
    assert classes[-5:] == ["car", "building", "road", "sky", "mIoU"]
    assert a[0] == "camvid-1_8-cps" and a[-5:] == ["1.50", "40.38", "57.43", "68.23", "15.31"]
    assert b[-2:] == ["82.97", "19.11"] and gain[-2:] == ["+14.74", "+3.80"]
    assert below[0] == "last step, test, 233 images, set 5dadde69; one seed each"
    assert below[1].startswith("4 of 11 classes rise, 1 fall; ") and len(below) == 2


@pytest.mark.parametrize(
    "command, argv",
    [("compare", [str(CPS), "absent.jsonl"]), ("analysis", "k absent.jsonl --out k.png".split())],
)
def test_a_command_finds_the_repository_and_ends_with_code_2(
    command, argv, tmp_path, monkeypatch, capfd
):
    script = str(ROOT / f"results/{command}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".", str(ROOT))])
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out and str(ROOT) in sys.path
    assert err.startswith(f"{command}.py: absent.jsonl: ") and err.count("\n") == 1


# ---- refusals and warnings of all three ----


@pytest.mark.parametrize(
    "more, words",
    [
        ({"lists": {"labeled": [20, "ee"]}}, "warning: labelled 20 images, set aaaa against 20"),
        ({"seed": 1}, "warning: seed 0 against 1"),
        ({"steps": 300}, "warning: steps 600 against 300"),
        ({"seed": 1, "steps": 300}, "warning: seed 0 against 1; steps 600 against 300"),
        ({"lists": {"val": [1, "ffff"]}}, "0 of 7"),  # not what both were scored on: no warning
    ],
)
def test_other_labels_seeds_and_steps_are_warned_of_in_one_line(more, words, tmp_path, capsys):
    a, b = (log_of_scores(tmp_path / f"{x}.jsonl", IOU, **y) for x, y in (("a", {}), ("b", more)))
    _, below = printed(capsys, a, b)
    assert len(below) == 2 + words.startswith("warning") and below[-1].startswith(words)


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The current folder, with logs of which each is wrong in its own way."""
    monkeypatch.chdir(tmp_path)
    a = Path(log_of_scores(Path("a.jsonl"), IOU)).read_text()
    Path("bare").mkdir()
    log_of_k(Path("k.jsonl"), [0.5])
    log_of_k(Path("mean.jsonl"), [0.5], name="consistency")
    log_of_k(Path("none.jsonl"), [])
    log_of_scores(Path("unfinished.jsonl"), IOU, drop=["done"])
    log_of_scores(Path("cut.jsonl"), IOU, drop=["start"])
    log_of_scores(Path("six.jsonl"), IOU[1:])
    log_of_scores(Path("three.jsonl"), IOU[:3], dataset="folder")
    log_of_scores(Path("seven.jsonl"), IOU, dataset="folder")
    log_of_scores(Path("strange.jsonl"), IOU, dataset="strange")
    log_of_scores(Path("other.jsonl"), IOU, on="train")
    log_of_scores(Path("val.jsonl"), IOU, on="val")
    log_of_scores(Path("set.jsonl"), IOU, lists={"test": [64, "dd"]})
    log_of_scores(Path("count.jsonl"), IOU, lists={"test": [65, "cccc"]})
    Path("lists.jsonl").write_text(a.replace('"lists": {', '"lists": [], "other": {'))
    contents = {"half": a[:-20].encode(), "words": b"no\nlog\n", "list": b"[1]\n2\n"}
    for name, content in (contents | {"empty": b"", "bin": b"\xff\xfe\0"}).items():
        Path(f"{name}.jsonl").write_bytes(content)


PNG = "--out k.png"
REFUSED = [  # command, its words, words of the line
    *((analysis, f"k {name}.jsonl {PNG}", f"{name}.jsonl: no log of cps_fpl.py")
      for name in ("mean", "none", "words", "list", "absent")),
    (analysis, f"k {ROOT}/results/supervised/camvid-all.jsonl {PNG}", "K_gt_1"),
    (analysis, "k k.jsonl", "--out"),
    (analysis, f"k k.jsonl {PNG} --ouch", "--ouch"),
    (analysis, "", "k|scores"),
    (analysis, "scores last.pt --images some", "--images"),
    (analysis, "scores", "CHECKPOINT"),
    (ranks, "", "CHECKPOINT"),
    *((compare, pair.format(f"{name}.jsonl"), f"compare.py: {name}.jsonl: {words}")
      for pair in ("a.jsonl {}", "{} a.jsonl")
      for name, words in (
          ("unfinished", "no line of kind done"),
          ("cut", "not the log of a finished run (KeyError: 'args')"),
          ("lists", "not the log of a finished run (AttributeError"),
          ("absent", "not the log of a finished run (No such file or directory)"),
          ("six", "not the log of a finished run (ValueError: 6 classes, shapes has 7)"),
          ("strange", "not the log of a finished run (KeyError: 'strange'"),
          ("other", "not the log of a finished run (KeyError: 'train'"),
          ("empty", ""), ("half", ""), ("words", ""), ("list", ""), ("bin", ""))),
    (compare, "bare a.jsonl", "compare.py: bare/log.jsonl: "),
    (compare, "a.jsonl seven.jsonl", "a.jsonl, seven.jsonl: data set shapes against folder"),
    (compare, "a.jsonl val.jsonl", "scored on test, 64 images, set cccc against val, 64 images"),
    (compare, "a.jsonl set.jsonl", "set cccc against test, 64 images, set dd"),
    (compare, "a.jsonl count.jsonl", "64 images, set cccc against test, 65 images"),
    (compare, "three.jsonl seven.jsonl", "classes 3 against 7"),
    (compare, "a.jsonl", "B"),
    (compare, "a.jsonl a.jsonl --score worst", "worst"),
    (compare, "a.jsonl a.jsonl third", "third"),
]  # fmt: skip


@pytest.mark.parametrize("command, words, line", REFUSED)
def test_what_cannot_be_read_or_compared_is_refused(command, words, line, broken, capsys):
    assert line in refusal(capsys, command, *words.split())
    assert not Path("k.png").exists()


def test_no_matplotlib_is_refused(broken, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "requirements-dev.txt" in refusal(capsys, analysis, *f"k k.jsonl {PNG}".split())


@pytest.mark.parametrize("command, fixture", [(analysis, "of_cps"), (ranks, "of_u2pl")])
def test_what_cannot_be_scored_is_refused(command, fixture, tmp_path, capsys, request):
    path, content = request.getfixturevalue(fixture)
    words = ["scores"] * (command is analysis)
    for more, line in (
        ([path, "--images", 0], "--images 0: a number from 1 to 3"),
        ([path, "--images", 4], "--images 4: a number from 1 to 3"),
        ([path, "--nonsense", 3], "--nonsense"),
        ([path, "--data-root", tmp_path / "no"], "no such folder"),
        ([tmp_path / "absent.pt"], "no such checkpoint"),
    ):
        assert line in refusal(capsys, command, *words, *more)
    torch.save(content | {"script": "mean_teacher.py"}, path)
    assert "written by mean_teacher.py" in refusal(capsys, command, *words, path)
