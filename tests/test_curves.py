"""What a run leaves to look at: its name, confusion, trackers; curves, tables, the notebook."""

import importlib.util
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

LONG = " ".join(str(1 + i / 1000) for i in range(60))
NAMES = [  # script, flags, the name
    ("cps_fpl", "--dataset camvid --split 1/8", "camvid-1_8-s0"),
    ("cps_fpl", "--dataset camvid --lr 0.02", "camvid-1_8-lr0.02-s0"),
    ("cps_fpl", "--dataset camvid --lr 0.01 --workers 7 --out x", "camvid-1_8-s0"),  # the recipe's
    ("cps_fpl", "--dataset cityscapes --split 1/16 --T 0.85", "cityscapes-1_16-s0"),  # likewise
    (
        "cps_fpl",
        "--T 0.5 --scales 0.5 2 --no-cutmix",
        "shapes-1_16-scales0.5_2.0-T0.5-no_cutmix-s0",
    ),
    ("u2pl", "--init a/b/c.pt --recipe official", "shapes-1_16-init_b_c.pt-recipe_official-s0"),
    ("esl", "--backbone timm/a:ü --seed 3", "shapes-1_16-backbone_timm_a_-s3"),
    (
        "esl",
        f"--scales {LONG}",
        f"{'shapes-1_16-scales' + LONG.replace(' ', '_'):.119}-ae2b2023-s0",
    ),
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
    """A module of the same face stands in; the next test takes the real ones."""
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
    images = supervised.Images(data, data.test)
    truth = torch.cat([images[i][1].flatten() for i in range(len(data.test))])
    for which in ("last", "best"):
        confusion = torch.tensor(done[which]["confusion"])
        assert confusion.sum(1).tolist() == [(truth == c).sum() for c in range(11)]  # rows: truth
        assert metrics.scores(confusion) == done[which]
    assert start["classes"] == list(data.classes)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match=f"--track {name}: not installed; pip install {name}"):
        train(supervised, [*argv, "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("name, left", [("trackio", "own/camvid.db"), ("wandb", "run/wandb/off*")])
def test_the_trackers_themselves_write_without_a_network(name, left, tmp_path, monkeypatch):
    if not importlib.util.find_spec(name):
        pytest.skip(f"no {name} here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "own"))  # read at the import
    shrink(supervised, monkeypatch)
    argv = flags(draw_tree(tmp_path / "data"), tmp_path / "run", iters=2, evaluate=2, pictures=2)
    train(supervised, [*argv, "--track", name])
    assert list(tmp_path.glob(left))


def write_log(folder, seed, losses, miou, **more):
    """Writes a log of a step for each loss; miou None: the run is under way."""
    args = {"dataset": "camvid", "lr": 0.01, "seed": seed, "total_iters": 3, "unsup_loss": "ce"}
    start = {"kind": "start", "script": "cps_fpl.py", "args": args | more, "argv": ["--lr", "1"]}
    lines = [start | {"lists": {"labeled": [4, "aa"], "test": [9, "bb"]}, "sha256": "c"}]
    for step, loss in enumerate(losses, 1):
        time = {"elapsed_s": 60.0 * step}
        lines.append({"kind": "train", "step": step, "loss": loss, "time": time})
    lines.append({"kind": "eval", "step": len(losses), "miou": 0.5, "iou": [0.5] * 11})
    scores = {"miou": miou, "confusion": [[1] * 11] * 11}
    done = {"kind": "done", "step": 3, "on": "test", "best_step": 2, "last": scores, "best": scores}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(folder).mkdir()
    Path(folder, "log.jsonl").write_text(text + (json.dumps(done) + "\n" if miou else '{"kind'))


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


@pytest.mark.parametrize(
    "words, line", [("a a/log.jsonl", "twice"), ("a no", "no: no log of a run")]
)
def test_a_run_that_cannot_be_shown_is_refused_by_name(words, line, runs, monkeypatch):
    for command in (table.main, curves.main):
        with pytest.raises(Refusal, match=line):
            command(words.split())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Refusal, match="pip install matplotlib"):
        curves.main(["a"])


def test_check_ends_with_the_command_that_trains(tmp_path, capsys):
    root = draw_folder(tmp_path / "my own", 4)
    prepare_data.main(
        ["check", "--dataset", "folder", "--num-classes", "4", "--data-root", str(root)]
    )
    words = shlex.split(capsys.readouterr().out.splitlines()[-1], comments=True)
    args = resolved(cps_fpl, words[3:])
    assert words[:3] == ["next:", "python", "cps_fpl.py"]
    assert (args.dataset, args.num_classes, args.data_root) == ("folder", 4, str(root))


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    modules = [pytest.importorskip(m) for m in ("nbformat", "nbclient", "ipykernel", "matplotlib")]
    text = (ROOT / "docs/first_steps.ipynb").read_text()
    assert not any(cell.get("outputs") for cell in json.loads(text)["cells"])
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("common", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    notebook = modules[0].reads(text, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    modules[1].NotebookClient(notebook, timeout=600, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert "mIoU" in "".join(output.get("text", "") for output in outputs)
