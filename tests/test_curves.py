"""What a run leaves to look at: its name, trackers, curves, tables, the papers' figures."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import supervised
from common import Refusal, metrics
from common.data import FACTS
from common.flags import run_name
from results import analysis, curves, figures, logs, table
from tiny import ROOT, draw_tree, flags, resolved, shrink, train, with_acting
from tiny import script as module_of
from trees import listed, refusal

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
def test_a_tracker_gets_scores_per_class_and_panels_and_the_log_the_confusion(
    name, tmp_path, monkeypatch, capsys
):
    """A module of the same face stands in."""
    calls, out = [], tmp_path / "run"
    stub = SimpleNamespace(__spec__=SimpleNamespace(origin="here"), Image=str)
    stub.init = lambda **words: calls.append((0, words))
    stub.log = lambda found, step: calls.append((step, found))
    stub.finish = lambda: calls.append((9, {"finished": True}))
    monkeypatch.setitem(sys.modules, name, stub)
    shrink(supervised, monkeypatch)
    argv = [*flags(draw_tree(tmp_path / "data"), out, pictures=4), "--track", name]
    train(supervised, argv)
    assert [step for step, _ in calls] == sorted(step for step, _ in calls)
    found = {key: value for _, values in calls for key, value in values.items()}
    start, *_, done = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert (found["name"], found["project"], found["finished"]) == ("run", "camvid", True)
    assert found["done/best/iou/sky"] == done["best"]["iou"][0] and found["train/loss"] > 0
    assert found["panels/val"] == str(out / "panels/000008-val.png") and "panels/train" in found
    assert f"curves.py {out}" in capsys.readouterr().out
    assert start["classes"] == list(FACTS["camvid"]["classes"])
    for which in ("last", "best"):
        assert metrics.scores(torch.tensor(done[which]["confusion"])) == done[which]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match=f"--track {name}: not installed; pip install {name}"):
        train(supervised, [*argv, "--out", str(tmp_path / "other")])


def write_log(folder, seed, losses, miou, **more):
    """Writes a log of a step for each loss; miou None: the run is under way."""
    args = {"dataset": "camvid", "lr": 0.01, "seed": seed, "total_iters": 3, "unsup_loss": "ce"}
    lists = {"labeled": [4, "aa"], "test": [9, "bb"]}
    start = dict(kind="start", script="cps_fpl.py", args=args | more, argv=["--lr", "1"])
    lines = [start | {"lists": lists, "sha256": "c"}]
    for step, loss in enumerate(losses, 1):
        lines.append(dict(kind="train", step=step, loss=loss, time={"elapsed_s": 60.0 * step}))
    lines.append(dict(kind="eval", step=len(losses), miou=0.5, iou=[0.5] * 11))
    scores = dict(miou=miou, confusion=[[1] * 11] * 11)
    if miou:
        lines.append(dict(kind="done", step=3, on="test", best_step=2, last=scores, best=scores))
    cut = "" if miou else '{"kind'
    listed(Path(folder, "log.jsonl"), *map(json.dumps, lines), cut)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log("b", 1, [2, 4, 6], 0.3)
    write_log("a", 0, [1, 2, 2], 0.2)
    write_log("lr", 0, [3, 3, 3], 0.4, lr=0.1, balance=True)
    write_log("open", 2, [5, 5], None)
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
    old = sorted(map(str, (ROOT / "results").glob("*/*.jsonl")))  # older logs stay readable
    names = logs.labels(logs.grouped(logs.read_all(old)))
    assert len(set(names)) == len(names) < len(old)


def test_a_run_that_cannot_be_shown_is_refused_by_name(runs, monkeypatch):
    for command in (table.main, curves.main):
        assert "twice" in refusal(command, ["a", "a/log.jsonl"])
        assert "no: no log of a run" in refusal(command, ["a", "no"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal(curves.main, ["a"])


# ---- the papers' figures ----


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


def test_points_of_two_groups_stay_together_in_the_plane():
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 20)
    x = np.eye(6)[labels] + 0.05 * rng.standard_normal((40, 6))
    assert figures.purity(x, labels) == 1
    assert 0.3 < figures.purity(rng.standard_normal((40, 6)), labels) < 0.7  # 19 of 39
    points = figures.tsne(x)
    gaps = np.linalg.norm(points[:, None] - points, axis=2)
    same = labels[:, None] == labels
    assert points.shape == (40, 2) and gaps[same].max() < gaps[~same].min()
    P = figures.similarities(((x[:, None] - x) ** 2).sum(2), 5)
    assert np.allclose(P, P.T) and P.sum() == pytest.approx(1, abs=1e-6)


SCRIPTS = ("cps_fpl", "u2pl", "esl", "supervised")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of tiny runs of SCRIPTS, with checkpoints of steps 4 and 8, the working one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        tree = draw_tree(Path("tree").absolute())
        for name in SCRIPTS:
            shrink(module_of(name), patch)
            train(module_of(name), with_acting(name, flags(tree, name)))
        yield list(SCRIPTS)


def test_every_figure_is_drawn_of_whole_runs_and_says_what_it_lacks_of_less(trained, capsys):
    pytest.importorskip("matplotlib")
    figures.main([*trained, "--out", "drawn", "--images", "2", "--shown", "1"])
    text = capsys.readouterr().out
    pictures = sorted(path.stem for path in Path("drawn").iterdir())
    assert pictures == sorted(figures.FIGURES) and text.count("  the paper: ") == len(pictures)
    for name in pictures:
        with Image.open(f"drawn/{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 22)) > 8, name
    # the same as evaluation, and as results/analysis.py, on the same images
    for name in trained:
        lines = [json.loads(line) for line in open(f"{name}/log.jsonl")]
        miou = [e["miou"] for e in lines if e["kind"] == "eval"][-1]
        assert re.search(rf": {name} \({name}.py\), step 8: mIoU {100 * miou:.2f} %", text), name
    assert analysis.main(["scores", "cps_fpl/last.pt", "--images", "2", "--device", "cpu"]) == 0
    for row in capsys.readouterr().out.splitlines()[2:]:
        case, share, _, _, vanilla, fuzzy, *_ = row.split()
        found = re.search(rf"case {case}: (\S+) % of pixels, R\^v (\S+), R\^f (\S+)\n", text)
        expected = [float(share), float(vanilla), float(fuzzy)]
        assert [*map(float, found.groups())] == pytest.approx(expected, abs=6e-3, nan_ok=True)
    figures.main(["cps_fpl/log.jsonl", "--out", "fewer"])
    text = capsys.readouterr().out
    assert {path.stem for path in Path("fewer").iterdir()} == {"fpl_4a", "fpl_4b"}
    assert "fpl_s3: not drawn: FPL supplement Fig. 3" in text
    assert text.count("needs a checkpoint of a run of cps_fpl.py\n") == 8
    with pytest.raises(Refusal, match="tree: no log of a run"):
        figures.main(["tree"])


def test_means_by_case_of_spread_logits(trained, capsys):
    """Of a checkpoint of cps_fpl.py: shares, scores of Eq. (13) to (15)."""
    saved = torch.load("cps_fpl/last.pt")
    for state in saved["networks"].values():
        state["head.classify.1.weight"] *= 40
    torch.save(saved, "spread.pt")
    words = "scores spread.pt --images 2 --device cpu --T 0.8".split()
    assert analysis.main(words) == 0
    printed = capsys.readouterr().out
    head, names, *lines = printed.splitlines()
    assert head == "step 8, 2 images of val, branch 2 teaches branch 1, T 0.8"
    assert names.split()[:3] == ["case", "pixels", "K"]
    number, share, _, sure, vanilla, fuzzy, *_ = zip(*map(str.split, lines), strict=True)
    assert number == ("1", "2", "3") and sum(map(float, share)) == pytest.approx(100, abs=0.02)
    assert vanilla[0] == "1.0000" and float(vanilla[2]) < 0 < float(fuzzy[1])
    assert sure[1] == "0.0000"
    assert analysis.main([*words, "--precise-bn", "2"]) == 0  # BN as evaluation has it
    assert capsys.readouterr().out != printed


def test_keep_holds_what_a_run_wrote_by_a_second_name(trained):
    figures.main(["esl", "--keep"])  # it has ended: one look
    assert os.path.samefile("esl/last.pt", "esl/kept/000008.pt")
    os.remove("esl/last.pt")
    assert list(figures.read_run("esl").checkpoints) == [4, 8]
    assert figures.read_run("esl/kept/000008.pt").last == 8


# ---- the notebook ----


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
