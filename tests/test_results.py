"""What is made of runs and read in papers: names, trackers, curves, tables, comparisons, figures;
FPL's analysis, pixel by pixel; what the papers number and print, and the commands to get there.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import cps_fpl
import supervised
import unimatch
from benchmarks import fpl_step, per_process
from common import Refusal
from common.flags import run_name
from oracles.fpl import order, printed, regularization
from oracles.supervised import VOID, likeliest, nll
from results import (
    analysis,
    commands,
    compare,
    curves,
    differences,
    figures,
    logs,
    ranks,
    run_table,
    table,
    unimatch_fpl,
)
from tiny import ROOT, draw_tree, flags, resolved, save, shrink, train, with_acting
from tiny import script as module_of
from trees import listed, refusal

sys.path.insert(0, str(ROOT / "docs"))
import equations  # noqa: E402

pytestmark = pytest.mark.usefixtures("empty_folder")


LONG = " ".join(str(1 + i / 1000) for i in range(60))
LONG_NAME = f"{'shapes-1_16-scales' + LONG.replace(' ', '_'):.119}-ae2b2023-s0"
NAMES = [  # script, flags, the name
    ("cps_fpl", "--dataset camvid --split 1/8", "camvid-1_8-s0"),
    ("cps_fpl", "--dataset camvid --lr 0.02", "camvid-1_8-lr0.02-s0"),
    ("cps_fpl", "--dataset camvid --lr 0.01 --workers 7 --out x", "camvid-1_8-s0"),  # the recipe's
    ("cps_fpl", "--T 0.5 0.6 --no-cutmix", "shapes-1_16-T0.5_0.6-no_cutmix-s0"),
    ("u2pl", "--init a/b/c.pt --recipe official", "shapes-1_16-init_b_c.pt-recipe_official-s0"),
    ("esl", "--backbone timm/a:ü --seed 3", "shapes-1_16-backbone_timm_a_-s3"),
    ("esl", f"--scales {LONG}", LONG_NAME),
]


@pytest.mark.parametrize("name, words, expected", NAMES)
def test_a_run_is_named_by_the_flags_given_that_differ_from_its_recipe(name, words, expected):
    module, argv = module_of(name), words.split()
    found = run_name(f"/x/{name}.py", resolved(module, argv), module.preset, argv)
    assert found == f"{name}-{expected}" and len(found) <= 135


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_scores_per_class_and_panels(name, monkeypatch, capsys):
    """A module of the same face stands in."""
    stub = Mock(__spec__=SimpleNamespace(origin="here"), Image=str)
    monkeypatch.setitem(sys.modules, name, stub)
    shrink(supervised, monkeypatch)
    argv = [*flags(draw_tree(Path("data")), "run", pictures=4), "--track", name]
    train(supervised, argv)
    steps = [logged.kwargs["step"] for logged in stub.log.call_args_list]
    assert steps == sorted(steps)
    assert [word for word, *_ in stub.method_calls] == ["init", *["log"] * len(steps), "finish"]
    found = dict(stub.init.call_args.kwargs)
    for logged in stub.log.call_args_list:
        found |= logged.args[0]
    done = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert (found["name"], found["project"]) == ("run", "camvid")
    assert found["done/best/iou/sky"] == done["best"]["iou"][0] and found["train/loss"] > 0
    assert found["panels/val"] == "run/panels/000008-val.png" and "panels/train" in found
    assert "curves.py run" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match=f"--track {name}: not installed; pip install {name}"):
        train(supervised, [*argv, "--out", "other"])


def write_log(path, *lines, end="", first=None, **args):
    """Writes the log of a run of cps_fpl.py; first: what its first line has beside the usual."""
    usual = dict(dataset="camvid", lr=0.01, seed=0, total_iters=3, unsup_loss="ce")
    start = dict(kind="start", script="cps_fpl.py", args=usual | args, argv=["--lr", "1"])
    start |= dict(lists={"labeled": [4, "aa"], "test": [9, "bb"]}, sha256="c")
    return listed(Path(path), *map(json.dumps, [start | (first or {}), *lines]), end)


def log_of_losses(folder, losses, miou, **args):
    """Writes a log of a step for each loss; miou None: the run is under way."""
    lines = [
        dict(kind="train", step=step, loss=loss, time={"elapsed_s": 60.0 * step})
        for step, loss in enumerate(losses, 1)
    ]
    lines.append(dict(kind="eval", step=len(losses), miou=0.5, iou=[0.5] * 11))
    scores = dict(miou=miou, confusion=[[1] * 11] * 11)
    if miou:
        lines.append(dict(kind="done", step=3, on="test", best_step=2, last=scores, best=scores))
    write_log(f"{folder}/log.jsonl", *lines, end="" if miou else '{"kind', **args)


@pytest.fixture
def runs():
    log_of_losses("b", [2, 4, 6], 0.3, seed=1)
    log_of_losses("a", [1, 2, 2], 0.2)
    log_of_losses("lr", [3, 3, 3], 0.4, lr=0.1, balance=True)
    log_of_losses("open", [5, 5], None, seed=2)
    return ["b", "a", "lr", "open"]


def test_seeds_are_one_curve_and_one_row_and_no_run_is_lost(runs, capsys):
    pytest.importorskip("matplotlib")
    table.main(runs)
    lines = capsys.readouterr().out.splitlines()
    many = "25.00 (20.00 to 30.00)"
    assert lines[0] == "camvid: mIoU in per cent on test, 9 images, set bb"
    assert lines[4] == f"| CPS, lr 0.01 | 0, 1, 2 (1 unfinished) | {many} | {many} | 2, 2 | 3 |"
    assert lines[5] == "| CPS, lr 0.1 | 0 | 40.00 | 40.00 | 2 | 3 |"
    assert lines[-1] == "note: open/log.jsonl: not finished, step 2 of 3"
    groups = logs.grouped(logs.read_all(runs))
    steps, values = curves.curve(groups[0], "loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [[1, 2], [2, 4], [5, 5]]
    assert logs.labels(groups) == ["lr 0.01, 3 seeds", "lr 0.1"]
    other = groups[1][0]._replace(start=groups[1][0].start | {"world": 2})
    assert logs.notes([[groups[1][0], other]])[0].endswith("numbers of processes [1, 2]")
    curves.main([*runs, "--out", "x"])
    assert lines[-1] in capsys.readouterr().out and Path("x.png").stat().st_size > 10_000
    text = Path("x.html").read_text()
    assert text.count("data:image/png") == 3 and many in text  # curves, two confusions
    assert "<script" not in text and "http" not in text
    old = logs.read_all([ROOT / "results/*/*.jsonl"])  # older logs stay readable
    names = logs.labels(logs.grouped(old))
    assert len(set(names)) == len(names) < len(old)


def test_a_run_that_cannot_be_shown_is_refused_by_name(runs, monkeypatch):
    for command in (table.main, curves.main):
        assert "twice" in refusal(command, ["a", "a/log.jsonl"])
        assert "no: no log of a run" in refusal(command, ["a", "no"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal(curves.main, ["a"])


# ---- python results/compare.py, results/analysis.py ----


def test_k_draws_the_share_and_prints_three_tenths(capsys):
    pytest.importorskip("matplotlib")
    falls = [0.9, 0.8, *[0.5] * 7, 0.4, 0.2, *[0.3] * 7, 0.1, 0.0]  # twenty lines: tenths of two
    for name, T, shares in ("a.jsonl", 0.9, falls), ("b.jsonl", 0.95, [0.25, 0.5, 1.0]):
        lines = [{"kind": "train", "step": 20 * i, "K_gt_1": v} for i, v in enumerate(shares, 1)]
        write_log(name, *lines, end='{"kind": "train", "st', out=name, T=T)
    assert analysis.main("k a.jsonl b.jsonl --out k.png".split()) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    numbers = [re.findall(r"([\d.]+) %", line) for line in lines]
    assert numbers == [["85.00", "30.00", "5.00"], ["25.00", "50.00", "100.00"]]
    assert "step 400 " in lines[0] and lines[0].endswith("  T 0.9")
    with Image.open("k.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def log_of_scores(name, iou=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), first=None, **args):
    """Writes the log of a run on seven classes."""
    last = {"miou": sum(v or 0 for v in iou) / len(iou), "iou": iou}
    done = dict(kind="done", step=3, on="test", last=last)
    return write_log(name, done, first=first, **dict(dataset="shapes") | args)


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


COMPARED = """\
|       Class |   disc |  ring | square | triangle |  star | background | diamond |  mIoU |
| ----------: | -----: | ----: | -----: | -------: | ----: | ---------: | ------: | ----: |
|           a |  20.00 | 30.00 |  40.00 |    60.00 | 70.00 |      90.00 |  absent | 44.29 |
|           b |  30.00 | 30.00 |  40.00 |    60.00 | 71.00 |      80.00 |  absent | 44.43 |
| Improvement | +10.00 | +0.00 |  +0.00 |    +0.00 | +1.00 |     -10.00 |  absent | +0.14 |

last step, test, 9 images, set bb; one seed each
2 of 6 classes rise, 1 fall; on average +3.33 in the 3 hardest, -3.00 in 3 others
"""


def test_a_comparison_of_two_logs_as_columns_and_as_rows(capsys):
    a = log_of_scores("a/log.jsonl", [0.9, 0.2, 0.3, 0.4, None, 0.6, 0.7])
    b = log_of_scores("b.jsonl", [0.8, 0.3, 0.3, 0.4, None, 0.6, 0.71])
    compare.main(["a", b])  # a folder, named after it
    assert capsys.readouterr().out == COMPARED
    compare.main([a, b, "--rows"])
    rows, below = capsys.readouterr().out.split("\n\n")
    assert "|       star |  70.00 |  71.00 |       +1.00 |\n" in rows and below in COMPARED
    compare.main([a, log_of_scores("c.jsonl", seed=1)])
    *_, warning, flag = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: seed 0 against 1:") and flag == "--seed: 0 against 1"


UNLIKE = [  # what a second run has otherwise, words of the line
    (dict(dataset="folder"), "a.jsonl, b.jsonl: data set shapes against folder"),
    (dict(first={"classes": [*"bacdefg"]}), "triangle, star against b, a, c, d"),
    (dict(first={"lists": {"labeled": [4, "aa"], "test": [8, "bb"]}}), "9 images, set bb against"),
]


def test_what_cannot_be_read_or_compared_is_refused_in_one_line(capsys):
    a = log_of_scores("a.jsonl")
    assert "no.jsonl: no log of a run (No" in refusal(compare.main, ["no.jsonl", a])
    for changes, line in UNLIKE:
        assert line in refusal(compare.main, [a, log_of_scores("b.jsonl", **changes)])
    going = write_log("b.jsonl")
    assert "b.jsonl: no line of kind done: let the run finish" in refusal(compare.main, [a, going])
    other = listed(Path("b.jsonl"), "[1]", "2")
    assert "b.jsonl: no log of a run (TypeError" in refusal(compare.main, [a, other])
    write_log("mean.jsonl", {"kind": "train", "step": 20}, end="{")
    for words, line in (
        ("k mean.jsonl --out k.png", "mean.jsonl: no log of cps_fpl.py on unlabelled images (Key"),
        ("scores absent.pt", "absent.pt: no such checkpoint"),
        ("scores .", ".: a folder; give its best.pt or last.pt"),
        (f"scores {'a' * 300}", f"{'a' * 300}: damaged, or no checkpoint"),
    ):
        assert analysis.main(words.split()) == 2
        assert capsys.readouterr().err.startswith(f"analysis.py: {line}")
    assert not Path("k.png").exists()


# ---- python results/run_table.py, results/differences.py ----


def finish(name, seed, hit):
    """Writes a finished run, and its counts; class 2 is only predicted, class 3 is nowhere."""
    truth = np.tile([100, 100, 0, 0], (9, 1))
    counts = dict(hit=truth * hit // 100, truth=truth, predicted=truth + [0, 0, 1, 0])
    np.savez_compressed(run_table.counts_path(name, seed), **counts)
    iou = hit / (200 - hit)
    score = {"miou": iou, "iou": [iou]}
    train = {"kind": "train", "time": {"elapsed_s": 60}}
    lines = [train, {"kind": "done", "last": score, "best": score}]
    listed(run_table.log_path(name, seed), *map(json.dumps, lines))


def test_half_the_size_is_the_mean_of_four_pixels_and_one_pixel_of_a_mask():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 8
    save(Path("all/val/a.png"), image)
    save(Path("all/valannot/a.png"), image[..., 0])
    run_table.halved("all", "half")
    mean = image.reshape(1, 2, 2, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(np.array(Image.open("half/val/a.png"))[0], mean[0])
    mask = np.array(Image.open("half/valannot/a.png"))[0]
    assert mask[0] in image[:, :2, 0] and mask[1] in image[:, 2:, 0]


def test_every_published_run_was_made_by_the_command_of_its_row():
    """Of flags that came later, a log says nothing."""
    places = SimpleNamespace(runs="runs/camvid-lite")
    runs = [(name, seed) for name in run_table.ROWS for seed in run_table.SEEDS]
    runs = [run for run in runs if run_table.log_path(*run).is_file()]
    assert len(runs) >= 90
    for run in runs:
        start = json.loads(run_table.log_path(*run).read_text().partition("\n")[0])
        name, *argv = run_table.command(*run, places)[1:]
        assert start["script"] == name
        args = json.loads(json.dumps(asdict(resolved(module_of(name[:-3]), argv))))
        for key in args.keys() & start["args"].keys() - {"out", "data_root", "resume"}:
            assert args[key] == start["args"][key], (run, key)


def test_what_is_missing_is_told_and_a_claim_holds_where_the_interval_is_above_zero(monkeypatch):
    monkeypatch.setattr(run_table, "LOGS", Path())
    assert run_table.estimate("cps") == 6 * 600  # by the cost of a step, 1 s without a run
    pairs = ((60, 50), (70, 65), (66, 60))
    for seed, (better, worse) in enumerate(pairs):
        finish("cps", seed, better)
        finish("labels-cps", seed, worse)
    rows = ("fpl-cps", "esl", "labels-cps")  # by seed, then by cost
    missing = [("esl", 0), ("fpl-cps", 0), ("esl", 1), ("fpl-cps", 1)]
    assert run_table.missing(rows, (0, 1)) == missing
    assert run_table.estimate("labels-cps") == 60 and run_table.estimate("fpl-cps") == 6 * 15
    assert run_table.overview(rows, (0, 1))[-1] == "4 runs left, 0.1 hours of one core"
    seeds, gaps, interval = differences.difference("cps", "labels-cps", draws=200)
    expected = [100 * 2 / 3 * (a / (200 - a) - b / (200 - b)) for a, b in pairs]
    assert gaps == pytest.approx(expected)
    assert 0 < interval[0] < sum(gaps) / 3 < interval[1]
    assert differences.verdict(seeds, interval) == "holds"
    back = differences.difference("labels-cps", "cps", draws=200)
    assert differences.verdict(back[0], back[2]) == "does not hold"
    assert differences.verdict([0], interval) == "not yet told"
    table = differences.tables()["docs/results.md"]
    assert "| CPS is above labels alone | FPL Table 1 | 41.4 to 48.7 | +" in table
    assert "| FPL improves CPS | FPL Table 1 | - | - | - | not yet told |" in table


def test_weights_boundaries_and_stages_by_hand():
    rest, weights = figures.weight_curves(points=39)
    for x, concave, linear, convex in zip(rest, *weights.values(), strict=True):
        gap = 0.475 - x  # T / K - max over the negatives
        expected = [np.log1p(50 * gap) / np.log1p(50 * 0.475), gap / 0.475, gap / (0.475 + 4 * x)]
        assert [concave, linear, convex] == pytest.approx(expected, abs=1e-12)
    label = torch.randint(0, 2, (1, 9, 12), generator=torch.Generator().manual_seed(3)) * 255
    label[:, :, 4:] = 1
    for y, x in np.ndindex(9, 12):
        around = label[0, max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4]
        assert figures.at_boundary(label)[0, y, x] == (len(around.unique()) > 1)
    steps = dict.fromkeys((7, 48, 60, 100, 120))
    for total, expected in ((120, [7, 60, 120]), (1000, [100, 120]), (8, [7])):
        run = figures.Run("", "", {"total_iters": total}, None, steps)
        assert figures.stages(run) == expected


def test_neighbours_of_two_groups_are_of_their_own():
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 20)
    x = np.eye(6)[labels] + 0.05 * rng.standard_normal((40, 6))
    assert figures.purity(x, labels) == 1
    assert 0.3 < figures.purity(rng.standard_normal((40, 6)), labels) < 0.7  # 19 of 39


SCRIPTS = ("cps_fpl", "u2pl", "esl", "supervised")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of tiny runs of SCRIPTS with checkpoints of steps 4 and 8; cps_fpl's is surer."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tree = draw_tree(folder / "tree")
        for name in SCRIPTS:
            shrink(module_of(name), patch)
            train(module_of(name), with_acting(name, flags(tree, name)))
        saved = torch.load("cps_fpl/last.pt")
        for state in saved["networks"].values():
            state["head.classify.1.weight"] *= 40
        torch.save(saved, "cps_fpl/last.pt")
        yield folder


def test_every_figure_is_drawn_and_says_what_the_logs_and_scores_do(trained, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(trained)
    figures.main([*SCRIPTS, "--out", "drawn", "--images", "2", "--shown", "1"])
    text = capsys.readouterr().out
    pictures = sorted(path.stem for path in Path("drawn").iterdir())
    assert pictures == sorted(figures.FIGURES) and text.count("  the paper: ") == len(pictures)
    for name in pictures:
        with Image.open(f"drawn/{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 22)) > 8, name
    for name in SCRIPTS[1:]:
        miou = 100 * logs.read(name).evals[-1]["miou"]
        assert re.search(rf": {name} \({name}.py\), step 8: mIoU {miou:.2f} %", text), name
    words = "scores cps_fpl/last.pt --images 2 --device cpu".split()
    assert analysis.main(words) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "step 8, 2 images of val, branch 2 teaches branch 1, T 0.9"
    number, share, _, sure, vanilla, fuzzy, *_ = zip(*map(str.split, lines), strict=True)
    assert sum(map(float, share)) == pytest.approx(100, abs=0.02) and sure[1] == "0.0000"
    assert vanilla[0] == "1.0000" and float(vanilla[2]) < 0 < float(fuzzy[1])  # Eq. (13) to (15)
    said = re.findall(r"case (\d): (\S+) % of pixels, R\^v (\S+), R\^f (\S+)\n", text)
    for found, expected in zip(said, zip(number, share, vanilla, fuzzy, strict=True), strict=True):
        assert [*map(float, found)] == pytest.approx([*map(float, expected)], abs=6e-3)
    assert analysis.main([*words, "--precise-bn", "2"]) == 0  # BN as evaluation has it
    assert capsys.readouterr().out.splitlines()[2:] != lines


def test_a_figure_that_cannot_be_drawn_says_what_it_lacks(trained, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(trained)
    figures.main(["cps_fpl/log.jsonl", "--out", "fewer"])
    text = capsys.readouterr().out
    assert {path.stem for path in Path("fewer").iterdir()} == {"fpl_4a", "fpl_4b"}
    assert "fpl_s3: not drawn: FPL supplement Fig. 3" in text
    assert text.count("needs a checkpoint of a run of cps_fpl.py\n") == 8
    assert "tree: no log of a run" in refusal(figures.main, ["tree"])


def test_counts_of_images_are_those_of_the_score(trained, monkeypatch):
    monkeypatch.chdir(trained)
    counts = run_table.count_images(Path("supervised"))
    sums = [counts[kind].sum(0) for kind in run_table.COUNTS.split()]
    done = json.loads(Path("supervised/log.jsonl").read_text().splitlines()[-1])
    assert run_table.miou(*sums) == pytest.approx(100 * done["last"]["miou"])
    assert len(counts["hit"]) > 1 and (counts["truth"].sum(1) > 0).all()


def test_keep_holds_what_a_run_wrote_by_a_second_name(trained, monkeypatch):
    monkeypatch.chdir(trained)
    figures.main(["esl", "--keep"])  # it has ended: one look
    assert os.path.samefile("esl/last.pt", "esl/kept/000008.pt")
    os.remove("esl/last.pt")
    figures.main(["esl", "--keep"])  # as between the two names of a checkpoint
    line = refusal(figures.main, "esl --keep --shown 1".split())
    assert line == "--shown 1 does nothing here: it needs no --keep"
    assert list(figures.read_run("esl").checkpoints) == [4, 8]
    assert figures.read_run("esl/kept/000008.pt").last == 8


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat, nbclient, *_ = map(pytest.importorskip, "nbformat nbclient ipykernel".split())
    text = (ROOT / "docs/first_steps.ipynb").read_text()
    assert not any(cell.get("outputs") for cell in json.loads(text)["cells"])
    left_out = shutil.ignore_patterns(".*", "runs", "data", "shared", "tests")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    notebook = nbformat.reads(text, as_version=4)
    where = {"metadata": {"path": str(tmp_path / "copy")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert "mIoU" in "".join(output.get("text", "") for output in outputs)


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
        known = key in ("paper", "-") or here.startswith("not here: ")
        known = known or (here and set(test.split(", ")) <= names)
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
    assert [min(mode["s"] for mode in row["modes"].values()) > 0 for row in rows] == [True] * 3


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
    args = [resolved(module_of(name), shlex.split(words)) for name, words in lines]
    assert len(args) == 4 and min(one.total_iters for one in args) >= 18_600
    for name, more, count in (
        ("esl", "", 4),  # 8 images in pairs
        ("cps_fpl", "", 8),
        ("mean_teacher", "--cutmix", 8),  # 16 in pairs
        ("mean_teacher", "--no-cutmix", 16),
    ):
        args = resolved(module_of(name), f"--dataset voc --split 92 {more}".split())
        assert commands.processes(args, 16) == count
    with pytest.raises(Refusal, match="--scripts fixmatch: only ael_fpl, cps_fpl, "):
        commands.main(commands.Options(scripts=("fixmatch",)))


def test_what_fpl_does_there_is_counted_and_drawn(monkeypatch, capsys):
    """Pixels: sure and right; 0.65, wrong, the truth second; void. T 0.95: K is 1, 2, 2."""
    prob = torch.tensor([[0.97, 0.02, 0.01], [0.65, 0.25, 0.1], [0.4, 0.3, 0.3]])
    args = printed(T=0.95)
    found = unimatch_fpl.counts(prob.log().T[None, :, None], torch.tensor([[[0, 1, 255]]]), args)
    assert found.tolist() == [[0] * 4] * 2 + [[1, 0, 1, 1]] + [[0] * 4] * 3 + [[1, 1, 1, 0]]
    shrink(unimatch, monkeypatch)
    run, out = Path("run"), Path("x.png")
    argv = flags(draw_tree(Path("data")), run, log=1, iters=2, evaluate=2, save=2)
    train(unimatch, [*argv, *"--unsup-loss fpl --T 0.2 0.5".split()])
    rows = (f"log {run}", 0), (f"val {run}/last.pt --images 2", 0)
    for words, code in (*rows, (f"val {run}/last.pt --images 9", 2), (f"log {out}", 2)):
        out.unlink(missing_ok=True)
        assert unimatch_fpl.main([*words.split(), "--out", str(out)]) == code
        assert out.exists() == (code == 0)
    assert "2 images of val, T 0.2 0.5" in capsys.readouterr().out
