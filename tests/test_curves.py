"""What a run leaves to look at: its name, confusion, trackers; curves, tables, the notebook."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cps_fpl
import prepare_data
import supervised
from common import Refusal, metrics
from common.flags import run_name
from results import curves, logs, table
from tiny import ROOT, draw_folder, draw_tree, flags, resolved, shrink, train
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
    data = supervised.load(resolved(supervised, argv))
    assert start["classes"] == list(data.classes)
    images = supervised.Images(data, data.test)
    truth = torch.cat([images[i][1].flatten() for i in range(len(data.test))])
    for which in ("last", "best"):
        confusion = torch.tensor(done[which]["confusion"])
        assert confusion.sum(1).tolist() == [(truth == c).sum() for c in range(11)]  # rows: truth
        assert metrics.scores(confusion) == done[which]
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


def test_check_ends_with_the_command_that_trains(tmp_path, capsys):
    root = str(draw_folder(tmp_path / "my own", 4))
    words = ["check", "--dataset", "folder", "--num-classes", "4", "--data-root", root]
    prepare_data.main(words)
    said, *argv = shlex.split(capsys.readouterr().out.splitlines()[-1], comments=True)
    args = resolved(cps_fpl, argv[2:])
    assert (said, *argv[:2]) == ("next:", "python", "cps_fpl.py")
    assert (args.dataset, args.num_classes, args.data_root) == ("folder", 4, root)


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
