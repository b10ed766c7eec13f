"""Whole runs: exact resume after a kill, the run folder, evaluation, progress, panels.

All but one use the tiny network of tests/helpers.py: what is tested is common/run.py and the
training loop, not DeepLabv3+.
"""

import hashlib
import importlib.util
import json
import multiprocessing
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import sources
import supervised
import u2pl
from common import Refusal, run
from tests.helpers import (
    differences,
    draw_tree,
    finish,
    flags,
    flat,
    kill_at_step,
    log,
    shrink,
    snapshot,
    start,
    train,
)

TEACHER = ["--cutmix", "--warmup-iters", "3"]
METHODS = [(supervised, []), (mean_teacher, TEACHER)]
METHODS += [(cps_fpl, []), (cps_fpl, ["--no-cutmix"])]
METHODS += [(u2pl, ["--warmup-iters", "3", "--bank-sizes", "20", "12"])]
METHODS += [(esl, ["--anchors", "6", "--queue", "5", "--zeta", "0.12"])]


def stop_at(module, monkeypatch, call):
    """Lets the call-th cross-entropy of a script raise KeyboardInterrupt."""
    whole, calls = module.cross_entropy, []

    def cross_entropy(logits, label):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return whole(logits, label)

    monkeypatch.setattr(module, "cross_entropy", cross_entropy)


def calls_of_steps(module, monkeypatch):
    """Returns a list that a run fills: how often each of its steps calls cross_entropy."""
    whole, step, calls = module.cross_entropy, run.Run.step, [0]

    def cross_entropy(logits, label):
        calls[-1] += 1
        return whole(logits, label)

    def counted(self, *parts):
        calls.append(0)
        step(self, *parts)

    monkeypatch.setattr(module, "cross_entropy", cross_entropy)
    monkeypatch.setattr(run.Run, "step", counted)
    return calls


# ---- exact resume ----


@pytest.mark.smoke
@pytest.mark.parametrize("module, extra", METHODS)
def test_a_run_stopped_in_any_step_and_resumed_equals_the_whole_one(
    module, extra, tmp_path, monkeypatch
):
    shrink(module, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    numbers = dict(iters=7, log=2, evaluate=2, save=3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with monkeypatch.context() as patch:
        calls = calls_of_steps(module, patch)
        train(module, flags(tree, whole, **numbers) + extra)
    assert len(calls) == 8 and calls.pop() == 0
    for step, count in enumerate(calls):  # in its first call, its second, ... and round again
        call = sum(calls[:step]) + 1 + step % count
        argv = flags(tree, stopped, **numbers) + extra
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(module, patch, call)
            train(module, argv)
        train(module, argv + ["--resume"])
        assert differences(whole, stopped) == [], f"stopped in cross-entropy {call}"
        shutil.rmtree(stopped)


@pytest.mark.parametrize("module, extra", METHODS[:4])  # others: their own test_*_run.py
def test_a_run_killed_at_a_random_step_and_resumed_equals_the_whole_one(
    module, extra, tmp_path, monkeypatch
):
    seed = random.randrange(10_000)
    print(f"the kill's seed: {seed}")
    shrink(module, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    iters = 60 if module is cps_fpl else 150  # its steps are longer
    numbers = dict(iters=iters, log=2, evaluate=50, save=3)
    extra = [*TEACHER[:-1], "70"] if module is mean_teacher else extra
    argv = flags(tree, tmp_path / "killed", **numbers) + extra
    process = start(module.__name__, argv, hold=iters - 1)
    kill_at_step(process, tmp_path / "killed", random.Random(seed).randint(1, iters * 2 // 3))
    kinds = [json.loads(line)["kind"] for line in whole_lines(tmp_path / "killed")]
    assert "done" not in kinds, f"killed too late, seed {seed}"
    train(module, argv + ["--resume"])
    train(module, flags(tree, tmp_path / "whole", **numbers) + extra)
    assert differences(tmp_path / "whole", tmp_path / "killed") == [], seed


def whole_lines(folder):
    return (folder / "log.jsonl").read_text().rpartition("\n")[0].splitlines()


@pytest.mark.parametrize("module, extra", METHODS[1:3])
def test_two_processes_killed_and_resumed_equal_the_whole_run_and_each_other(
    module, extra, tmp_path
):
    seed = random.randrange(10_000)
    print(f"the kill's seed: {seed}")
    tree = draw_tree(tmp_path / "data")
    # most checkpoints fall between two log lines, where each process has sums of its own
    iters = 30 if module is cps_fpl else 60  # its steps are longer
    numbers = dict(iters=iters, log=5, evaluate=60, save=6, batch=4)
    extra = [*TEACHER[:-1], "20"] if module is mean_teacher else extra
    killed = flags(tree, tmp_path / "killed", **numbers) + extra
    process = start(module.__name__, killed, processes=2, hold=iters - 1)
    kill_at_step(process, tmp_path / "killed", random.Random(seed).randint(1, iters * 2 // 3))
    kinds = [json.loads(line)["kind"] for line in whole_lines(tmp_path / "killed")]
    assert "done" not in kinds, f"killed too late, seed {seed}"
    whole = flags(tree, tmp_path / "whole", **numbers) + extra
    finish(start(module.__name__, whole, killed + ["--resume"], processes=2))
    ranks = [(tmp_path / f"whole.rank{k}").read_text() for k in (0, 1)]
    assert len(ranks[0].splitlines()) == iters // 6
    assert ranks[0] == ranks[1], "networks differ between the processes"
    assert differences(tmp_path / "whole", tmp_path / "killed") == [], seed


# ---- the run folder ----


@pytest.mark.smoke
def test_resume_without_a_checkpoint_starts_from_zero(tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    train(supervised, flags(tree, tmp_path / "whole"))
    train(supervised, flags(tree, tmp_path / "new") + ["--resume"])
    (tmp_path / "cut").mkdir()
    first, second = log(tmp_path / "whole")[:2]
    lines = json.dumps(first) + "\n" + json.dumps(second) + "\n"
    (tmp_path / "cut/log.jsonl").write_text(lines)  # killed before its first checkpoint
    train(supervised, flags(tree, tmp_path / "cut") + ["--resume"])
    assert "starting from zero" in capsys.readouterr().out
    assert differences(tmp_path / "whole", tmp_path / "new") == []
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_resuming_a_finished_run_changes_nothing(tmp_path, monkeypatch):
    shrink(mean_teacher, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    train(mean_teacher, flags(tree, tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    train(mean_teacher, flags(tree, tmp_path / "run") + ["--resume"])
    assert differences(tmp_path / "before", tmp_path / "run") == []


def test_an_existing_folder_is_never_overwritten(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    train(supervised, flags(tree, tmp_path / "run"))
    before = snapshot(tmp_path)
    with pytest.raises(Refusal, match="exists: --resume goes on there"):
        train(supervised, flags(tree, tmp_path / "run") + ["--seed", "1"])
    assert snapshot(tmp_path) == before


def test_without_out_a_run_takes_a_free_name_and_resume_the_newest(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    monkeypatch.chdir(tmp_path)
    argv = flags(draw_tree(tmp_path / "data"), "", iters=4)
    name = Path("runs/supervised-camvid-1_4-s0")
    train(supervised, argv + ["--resume"])  # nothing to go on with: the first name
    assert log(name)[-1]["kind"] == "done"
    first = snapshot(name)
    train(supervised, argv)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(supervised, patch, 3)
        train(supervised, argv)
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        name.name + s for s in ("", "-2", "-3")
    ]
    third = Path(f"{name}-3")
    assert log(third)[-1]["kind"] == "train"
    train(supervised, argv + ["--resume"])
    assert differences(name, third) == [] and snapshot(name) == first
    assert len(list(Path("runs").iterdir())) == 3


@pytest.mark.parametrize("end", ["half a line", "all but the newline", "steps after it"])
def test_the_log_is_cut_back_to_the_step_of_the_checkpoint(end, tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    numbers = dict(iters=8, log=2, evaluate=8, save=4)
    train(supervised, flags(tree, tmp_path / "whole", **numbers))
    argv = flags(tree, tmp_path / "run", **numbers)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(supervised, patch, 7)
        train(supervised, argv)
    path = tmp_path / "run/log.jsonl"
    text = path.read_text()
    assert [line.get("step") for line in log(tmp_path / "run")] == [None, 2, 4, 6]
    if end == "half a line":
        path.write_text(text + '{"kind": "train", "step": 8, "lo')
    elif end == "all but the newline":  # of the last line that stays
        path.write_text("".join(text.splitlines(keepends=True)[:3]).rstrip("\n"))
    train(supervised, argv + ["--resume"])
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.smoke
def test_the_first_line_of_the_log_says_what_ran_on_what(tmp_path, monkeypatch):
    shrink(mean_teacher, monkeypatch)
    tree = draw_tree(tmp_path / "data", train=8, val=3, test=2)
    argv = flags(tree, tmp_path / "run", iters=2) + ["--cutmix", "--lr", "0.003"]
    monkeypatch.setattr(sys, "argv", ["mean_teacher.py", *argv])
    train(mean_teacher, argv)
    first, *others = log(tmp_path / "run")
    assert first["kind"] == "start" and all(line["kind"] != "start" for line in others)
    assert first["script"] == "mean_teacher.py" and first["argv"] == argv
    source = Path(mean_teacher.__file__).read_bytes()
    assert first["sha256"] == hashlib.sha256(source).hexdigest()
    args = first["args"]
    assert (args["cutmix"], args["lr"], args["batch_size_unlabeled"]) == (True, 0.003, 2)
    assert None not in [value for name, value in args.items() if name != "split_seed"]
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["python"] == sys.version.split()[0]
    assert {"numpy", "pillow", "torchvision"} <= set(first["versions"])
    assert first["device"].startswith("CPU") and first["world"] == 1
    hashes = {"labeled": ["train0", "train4"], "val": ["val0", "val1", "val2"]}
    hashes |= {"unlabeled": [f"train{i}" for i in (1, 2, 3, 5, 6, 7)], "test": ["test0", "test1"]}
    for name, keys in hashes.items():
        digest = hashlib.sha1("\n".join(keys).encode()).hexdigest()[:8]
        assert first["lists"][name] == [len(keys), digest], name


def test_a_checkpoint_holds_tensors_and_plain_values_only(tmp_path, monkeypatch):
    shrink(mean_teacher, monkeypatch)
    train(mean_teacher, flags(draw_tree(tmp_path / "data"), tmp_path / "run"))
    for name in ("last.pt", "best.pt"):
        leaves = flat(torch.load(tmp_path / "run" / name, weights_only=True))
        assert {type(v) for v in leaves.values()} <= {
            torch.Tensor,
            int,
            float,
            str,
            bool,
            type(None),
        }
        names = {key.split(".")[2] for key in leaves if key.startswith(".networks.")}
        assert names == {"student", "teacher"}
        assert leaves[".script"] == "mean_teacher.py"
    assert any("momentum_buffer" in key for key in flat(torch.load(tmp_path / "run/last.pt")))


def test_a_save_that_breaks_off_leaves_the_old_checkpoint_and_does_no_harm(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    numbers = dict(iters=6, log=1, evaluate=6, save=2)
    train(supervised, flags(tree, tmp_path / "whole", **numbers))
    argv, save, saves = flags(tree, tmp_path / "run", **numbers), torch.save, []

    def half_a_save(content, file):
        saves.append(1)
        save(content, file)
        if len(saves) == 2:  # the second last.pt
            file.truncate(file.tell() // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half_a_save)
        train(supervised, argv)
    assert list((tmp_path / "run").glob("*.tmp")), "the broken file should lie there"
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 2
    for name in ("last.tmp", "best.tmp", "log.tmp"):  # and any other that a kill may leave
        (tmp_path / "run" / name).write_bytes(b"half")
    train(supervised, argv + ["--resume"])
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_checkpoint_may_be_due_before_the_first_line_of_the_log(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    train(supervised, flags(tree, tmp_path / "run", iters=4, log=4, evaluate=4, save=1))
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 4


@pytest.mark.smoke
@pytest.mark.parametrize("bad", [3, 4])
def test_a_loss_that_is_not_finite_is_refused_with_its_step_and_never_saved(
    bad, tmp_path, monkeypatch
):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    whole, calls = supervised.cross_entropy, []

    def cross_entropy(logits, label):
        calls.append(1)
        return whole(logits, label) * (float("nan") if len(calls) == bad else 1.0)

    monkeypatch.setattr(supervised, "cross_entropy", cross_entropy)
    with pytest.raises(Refusal, match=f"not finite at step {bad}\\b"):
        train(supervised, flags(tree, tmp_path / "run", iters=8, log=2, evaluate=2, save=2))
    assert len(calls) == 4  # found when the next line is due
    for name in ("last.pt", "best.pt"):
        saved = flat(torch.load(tmp_path / "run" / name, weights_only=True))
        assert saved[".step"] == 2
        assert all(v.isfinite().all() for v in saved.values() if torch.is_tensor(v))
    assert all(line.get("step", 0) <= 2 for line in log(tmp_path / "run"))


# ---- a start from the networks of another run ----

SCRIPTS = {"supervised": supervised, "mean_teacher": mean_teacher, "cps_fpl": cps_fpl}
SCRIPTS |= {"ael_fpl": ael_fpl, "u2pl": u2pl, "esl": esl}
HEADS = {"cps_fpl": "CPS", "u2pl": "features", "esl": "features"}  # the others' are alike
SOURCES = {  # writer and reader: for each network of the reader the one that it starts from
    ("supervised", "supervised"): {"student": "student"},
    ("supervised", "mean_teacher"): {"student": "student", "teacher": "student"},
    ("supervised", "cps_fpl"): {"branch1": "student", "branch2": "student"},
    ("mean_teacher", "supervised"): {"student": "student"},
    ("mean_teacher", "mean_teacher"): {"student": "student", "teacher": "teacher"},
    ("mean_teacher", "cps_fpl"): {"branch1": "student", "branch2": "student"},
    ("supervised", "ael_fpl"): {"student": "student", "teacher": "student"},
    ("mean_teacher", "ael_fpl"): {"student": "student", "teacher": "teacher"},
    ("ael_fpl", "mean_teacher"): {"student": "student", "teacher": "teacher"},
    ("ael_fpl", "cps_fpl"): {"branch1": "student", "branch2": "student"},
    ("cps_fpl", "ael_fpl"): {"student": "branch1", "teacher": "branch1"},
    ("cps_fpl", "supervised"): {"student": "branch1"},
    ("cps_fpl", "mean_teacher"): {"student": "branch1", "teacher": "branch1"},
    ("cps_fpl", "cps_fpl"): {"branch1": "branch1", "branch2": "branch2"},
    ("supervised", "u2pl"): {"student": "student", "teacher": "student"},
    ("mean_teacher", "u2pl"): {"student": "student", "teacher": "teacher"},
    ("cps_fpl", "u2pl"): {"student": "branch1", "teacher": "branch1"},
    ("u2pl", "u2pl"): {"student": "student", "teacher": "teacher"},
    ("u2pl", "supervised"): {"student": "student"},
    ("u2pl", "mean_teacher"): {"student": "student", "teacher": "teacher"},
    ("u2pl", "cps_fpl"): {"branch1": "student", "branch2": "student"},
    ("supervised", "esl"): {"student": "student", "teacher": "student"},
    ("cps_fpl", "esl"): {"student": "branch1", "teacher": "branch1"},
    ("esl", "esl"): {"student": "student", "teacher": "teacher"},
    ("esl", "mean_teacher"): {"student": "student", "teacher": "teacher"},
}
CUTMIX = {mean_teacher: ["--cutmix", "--warmup-iters", "0"]}


def small(module, patch):
    """Gives a script its tiny network, CPS a head with other tensors than the others have."""
    shrink(module, patch)
    if module is cps_fpl:

        class Other(module.CPSHead):
            def __init__(self, channels, num_classes, args):
                super().__init__(channels, num_classes, args)
                self.norm = torch.nn.BatchNorm2d(num_classes)

        patch.setattr(module, "CPSHead", Other)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tree, and the folder of a run of each script on it: <script>/last.pt, best.pt."""
    folder = tmp_path_factory.mktemp("written")
    draw_tree(folder / "data")
    for name, module in SCRIPTS.items():
        with pytest.MonkeyPatch.context() as patch:
            small(module, patch)
            argv = flags(folder / "data", folder / name, evaluate=3, save=8)
            train(module, argv + CUTMIX.get(module, []) + ["--lr", "0.1"])
    return folder


def begun(module, argv, monkeypatch):
    """Returns the networks of a run as its first step finds them."""
    found, restore = {}, run.Run.restore

    def restored(self, networks, *rest):
        step = restore(self, networks, *rest)
        states = {name: net.state_dict() for name, net in networks.items()}
        found.update({k: {n: v.clone() for n, v in s.items()} for k, s in states.items()})
        assert step == 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "restore", restored)
        train(module, argv)
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("file", ["last.pt", "best.pt"])
@pytest.mark.parametrize("writer, reader", SOURCES)
def test_a_run_starts_from_the_networks_of_another(
    writer, reader, file, written, tmp_path, monkeypatch, capsys
):
    module, path = SCRIPTS[reader], written / writer / file
    small(module, monkeypatch)
    argv = flags(written / "data", tmp_path / "run") + CUTMIX.get(module, [])
    own = begun(module, argv, monkeypatch)
    assert "starting from zero" in capsys.readouterr().out
    mine = begun(module, argv + ["--init", str(path)], monkeypatch)
    saved = torch.load(path, weights_only=True)
    fits = HEADS.get(writer) == HEADS.get(reader)
    assert set(mine) == set(own) == set(SOURCES[writer, reader])
    words = []
    for name, source in SOURCES[writer, reader].items():
        words.append(f"{name} from its {source}" + ("" if fits else ", head random"))
        assert set(mine[name]) == set(own[name])
        for key, value in mine[name].items():
            given = saved["networks"][source] if fits or key.startswith("backbone.") else own[name]
            assert torch.equal(value, given[key]), (name, key)
        changed = [k for k, v in mine[name].items() if not torch.equal(v, own[name][k])]
        assert {k.split(".")[0] for k in changed} == (
            {"backbone", "head"} if fits else {"backbone"}
        )
    step = saved["step"]
    assert step == 8 if file == "last.pt" else step in (3, 6, 8)
    line = f"run folder: {tmp_path}/run, starting from {path}, step {step}: {'; '.join(words)}\n"
    assert line in capsys.readouterr().out
    if reader == "cps_fpl" and writer != reader:  # alike but for the heads: they can disagree
        one, two = mine["branch1"], mine["branch2"]
        assert all(torch.equal(one[k], two[k]) for k in one if k.startswith("backbone."))
        assert not torch.equal(one["head.classify.1.weight"], two["head.classify.1.weight"])


@pytest.mark.parametrize("module, extra", METHODS[1:3])
def test_a_run_from_a_checkpoint_trains_and_says_so_in_its_log(
    module, extra, written, tmp_path, monkeypatch
):
    small(module, monkeypatch)
    path, runs = str(written / "supervised/best.pt"), {}
    for name, init in (("zero", []), ("init", ["--init", path]), ("again", ["--init", path])):
        train(module, flags(written / "data", tmp_path / name) + extra + init)
        runs[name] = log(tmp_path / name)
    assert runs["init"][0]["args"]["init"] == path and runs["zero"][0]["args"]["init"] == ""
    assert runs["init"][1]["loss"] != runs["zero"][1]["loss"]
    assert differences(tmp_path / "init", tmp_path / "again") == []
    saved = torch.load(tmp_path / "init/last.pt", weights_only=True)
    assert saved["args"]["init"] == path
    # only the networks come from there: steps, momenta and the best score are the run's own
    assert saved["step"] == 8 and runs["init"][1]["step"] == 2


@pytest.mark.parametrize("module, extra", METHODS[1:3])
def test_a_run_from_a_checkpoint_resumed_equals_the_whole_one(
    module, extra, written, tmp_path, monkeypatch, capsys
):
    small(module, monkeypatch)
    path = shutil.copy(written / "mean_teacher/last.pt", tmp_path / "start.pt")
    numbers = dict(iters=6, log=1, evaluate=3, save=2)
    extra = extra + ["--init", str(path)]
    train(module, flags(written / "data", tmp_path / "whole", **numbers) + extra)
    argv = flags(written / "data", tmp_path / "run", **numbers) + extra
    with monkeypatch.context() as patch:
        calls = calls_of_steps(module, patch)
        train(module, flags(written / "data", tmp_path / "count", **numbers) + extra)
    for stopped, words in ((1, f"starting from {path}, step 8: "), (4, "going on from step 4\n")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(module, patch, sum(calls[:stopped]) + 1)
            train(module, argv)
        assert (tmp_path / "run/last.pt").exists() == (stopped == 4)
        if stopped == 4:
            path.unlink()  # not needed any more
        capsys.readouterr()
        train(module, argv + ["--resume"])
        assert words in capsys.readouterr().out
        assert differences(tmp_path / "whole", tmp_path / "run") == []
        shutil.rmtree(tmp_path / "run")


def test_a_run_is_not_resumed_from_another_start(written, tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    argv = flags(written / "data", tmp_path / "run")
    train(supervised, argv)
    start_ = ["--init", str(written / "supervised/last.pt")]
    with pytest.raises(Refusal, match="another recipe, --init  there and .*last.pt here"):
        train(supervised, argv + ["--resume"] + start_)


def test_eval_only_does_not_need_the_file_that_a_run_began_with(
    written, tmp_path, monkeypatch, capsys
):
    shrink(supervised, monkeypatch)
    path = shutil.copy(written / "supervised/last.pt", tmp_path / "start.pt")
    argv = flags(written / "data", tmp_path / "run") + ["--init", str(path)]
    train(supervised, argv)
    path.unlink()
    score = f"{100 * log(tmp_path / 'run')[-1]['last']['miou']:.2f}"
    argv = ["--eval-only", "--checkpoint", str(tmp_path / "run/last.pt"), "--eval-on", "test"]
    for more in ([], ["--init", "no.pt"]):
        capsys.readouterr()
        train(supervised, argv + more)
        printed = capsys.readouterr().out
        assert re.search(r"^mIoU +([\d.]+)$", printed, re.M)[1] == score
        assert "starting from" not in printed


def network(module, head, classes=3, **others):
    """Returns a real network: resnet18 with CPS's head or U2PL's."""
    names = dict(backbone="resnet18", stem="classic", weights="none", output_stride=16)
    args = module.Args(**names | dict(aux_weight=0.0, aspp_rates=(1, 2)) | others)
    return module.Network(args, classes, getattr(module, head))


def test_a_head_of_another_method_or_other_classes_stays_random(tmp_path):
    source = network(mean_teacher, "DeepLabV3Plus")
    path, saved = tmp_path / "best.pt", {"student": source.state_dict()}
    content = {"script": "mean_teacher.py", "step": 7, "args": {}, "networks": saved}
    torch.save(content, path)
    for module, head, others, fits in (
        (supervised, "DeepLabV3Plus", {}, True),
        (supervised, "DeepLabV3Plus", dict(classes=4), False),
        (supervised, "DeepLabV3Plus", dict(aux_weight=0.4), False),
        (cps_fpl, "CPSHead", {}, False),
        (u2pl, "U2PLHead", {}, False),  # without the representation head no other part is taken
    ):
        net = network(module, head, **others)
        own = {k: v.clone() for k, v in net.state_dict().items()}
        words = run.load_init(str(path), {"net": net})
        end = "" if fits else ", head random"
        assert words == f"{path}, step 7: net from its student{end}"
        for key, value in net.state_dict().items():
            given = saved["student"] if fits or key.startswith("backbone.") else own
            assert torch.equal(value, given[key]), key
    for others in (dict(stem="v1c"), dict(backbone="resnet50")):
        with pytest.raises(Refusal) as refusal:
            run.load_init(str(path), {"net": network(supervised, "DeepLabV3Plus", **others)})
        line = str(refusal.value)
        assert line.startswith(f"{path}: does not fit these flags (") and "\n" not in line


def test_a_second_branch_never_starts_as_the_twin_of_the_first(tmp_path):
    source = network(supervised, "DeepLabV3Plus").state_dict()
    content = {"script": "supervised.py", "step": 7, "args": {}, "networks": {"student": source}}
    torch.save(content, tmp_path / "best.pt")
    for names, heads in ((("branch1", "branch2"), 1), (("student", "teacher"), 2)):
        nets = {name: network(supervised, "DeepLabV3Plus") for name in names}
        words = run.load_init(str(tmp_path / "best.pt"), nets)
        weight = "head.classify.6.weight"
        weight = weight if weight in source else [k for k in source if "head" in k][-1]
        same = [torch.equal(net.state_dict()[weight], source[weight]) for net in nets.values()]
        assert sum(same) == heads == 2 - words.count("head random"), words
        key = "backbone.conv1.weight"
        assert all(torch.equal(net.state_dict()[key], source[key]) for net in nets.values())


# ---- evaluation ----


@pytest.mark.parametrize("module, extra", METHODS)
def test_eval_only_prints_the_scores_of_the_done_line(module, extra, tmp_path, monkeypatch, capsys):
    shrink(module, monkeypatch)
    tree, out = draw_tree(tmp_path / "data", val=5, test=3), tmp_path / "run"
    train(module, flags(tree, out, evaluate=1) + extra)
    done, evals = log(out)[-1], [line for line in log(out) if line["kind"] == "eval"]
    best = max(evals, key=lambda line: line["miou"])
    assert done["kind"] == "done" and done["on"] == "test" and done["best_step"] == best["step"]
    before = snapshot(tmp_path)
    for name in ("last", "best"):
        for on, score in (("test", done[name]), ("val", evals[-1] if name == "last" else best)):
            capsys.readouterr()
            argv = ["--eval-only", "--checkpoint", str(out / f"{name}.pt"), "--eval-on", on]
            train(module, argv + ["--data-root", str(tree), "--workers", "0"])
            printed = capsys.readouterr().out
            assert re.search(r"^mIoU +([\d.]+)$", printed, re.M)[1] == f"{100 * score['miou']:.2f}"
            step = 8 if name == "last" else done["best_step"]
            assert re.search(rf"IoU on {on} +step {step}$", printed, re.M)
    assert snapshot(tmp_path) == before


def test_eval_only_needs_no_flag_but_the_checkpoint(tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    train(supervised, flags(draw_tree(tmp_path / "data"), tmp_path / "run", iters=2))
    assert f"--eval-only --checkpoint {tmp_path}/run/best.pt" in capsys.readouterr().out
    train(supervised, ["--eval-only", "--checkpoint", f"{tmp_path}/run/best.pt"])
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.parametrize("module, extra", METHODS[:3])
def test_eval_only_takes_another_protocol_than_the_run_had(
    module, extra, tmp_path, monkeypatch, capsys
):
    shrink(module, monkeypatch)
    tree, out = draw_tree(tmp_path / "data"), tmp_path / "run"
    train(module, flags(tree, out) + extra)
    assert log(out)[0]["args"]["protocol"] == "whole"
    seen, calls, report, predict = [], [], module.report, module.predict

    def watched(net, image, args, num_classes):
        calls.append((args.protocol, args.crop_size))
        return predict(net, image, args, num_classes)

    monkeypatch.setattr(module, "report", lambda *a: seen.append(a[1]["step 8"]) or report(*a))
    monkeypatch.setattr(module, "predict", watched)
    argv = ["--eval-only", "--checkpoint", str(out / "last.pt"), "--eval-on", "test"]
    for more in ([], ["--protocol", "slide"], ["--protocol", "slide", "--crop-size", "48"]):
        train(module, argv + more)
    assert calls[::2] == [("whole", 32), ("slide", 32), ("slide", 48)] == calls[1::2]
    assert seen[0] == log(out)[-1]["last"]
    assert capsys.readouterr().out.count("mIoU of a constant") == 4


def test_the_score_is_that_of_one_confusion_matrix_over_all_images(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    tree, out = draw_tree(tmp_path / "data", val=3), tmp_path / "run"
    train(supervised, flags(tree, out, iters=2))
    args = run.resolve(run.parse(supervised.Args, flags(tree, out, iters=2)), supervised.preset)
    images = sources.load(args)
    net = supervised.Network(args, images.num_classes, supervised.DeepLabV3Plus).eval()
    net.load_state_dict(torch.load(out / "last.pt", weights_only=True)["networks"]["student"])
    confusion = torch.zeros(11, 11, dtype=torch.int64)
    for i in range(3):
        image = torch.from_numpy(np.array(Image.open(tree / f"val/val{i}.jpg")))
        with torch.no_grad():
            pred = net(image.permute(2, 0, 1)[None])["logits"].argmax(1)[0].flatten().tolist()
        label = list(Image.open(tree / f"valannot/val{i}.png").tobytes())
        for p, y in zip(pred, label, strict=True):
            if y < 11:  # 11 is CamVid's void
                confusion[y, p] += 1
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    miou = (confusion.diag()[union > 0] / union[union > 0]).double().mean().item()
    scored = next(line for line in log(out) if line["kind"] == "eval")
    assert scored["miou"] == pytest.approx(miou, abs=1e-6)


# ---- what a run prints and draws ----


def test_bf16_on_the_cpu_trains_the_real_network_to_a_finite_loss(tmp_path):
    argv = flags(draw_tree(tmp_path / "data"), tmp_path / "run", iters=2, evaluate=2, save=2)
    train(supervised, argv + ["--amp", "bf16"])
    line = next(line for line in log(tmp_path / "run") if line["kind"] == "train")
    assert 0 < line["loss"] < 100
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["networks"]["student"]
    assert saved["backbone.conv1.weight"].dtype == torch.float32
    shutil.rmtree(tmp_path / "run")  # 240 MB


@pytest.mark.smoke
def test_without_a_terminal_progress_is_plain_lines_with_an_eta(tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    train(supervised, flags(draw_tree(tmp_path / "data"), tmp_path / "run"))
    text = capsys.readouterr()
    assert text.err == ""
    lines = [line for line in text.out.splitlines() if line.startswith("step ")]
    for step in (2, 4, 6, 8):
        mine = [line for line in lines if line.startswith(f"step {step}/8  loss ")]
        assert len(mine) == 1 and re.search(r"ETA \d+:\d\d:\d\d$", mine[0])
    assert [line[:19] for line in lines if "val mIoU" in line] == [
        "step 4/8  val mIoU ",
        "step 8/8  val mIoU ",
    ]


def test_on_a_terminal_progress_is_a_live_line(tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(supervised, flags(tree, tmp_path / "run"))
    text = capsys.readouterr()
    assert "\r" in text.err and "step/s" in text.err and re.search(r"\b8/8\b", text.err)
    assert "mIoU" in text.out and "\r" not in text.out


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="no tensorboard here")
def test_tensorboard_writes_an_event_file(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    train(supervised, flags(tree, tmp_path / "run") + ["--tensorboard"])
    (path,) = (tmp_path / "run").glob("events.out.tfevents.*")
    content = path.read_bytes()
    assert b"train/loss" in content and b"eval/miou" in content


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="no tensorboard here")
def test_a_process_that_is_not_the_first_ends_well_with_tensorboard(tmp_path, monkeypatch):
    shrink(supervised, monkeypatch)
    argv = flags(draw_tree(tmp_path / "data"), tmp_path / "run") + ["--tensorboard"]
    args = run.resolve(run.parse(supervised.Args, argv), supervised.preset)
    second = supervised.distributed.Group(1, 2, torch.device("cpu"))
    run.Run(args, supervised.__file__, second, sources.load(args)).finish({}, "test")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, extra", METHODS)
def test_panels_are_pictures_of_the_maps_of_a_step(module, extra, tmp_path, monkeypatch):
    shrink(module, monkeypatch)
    tree = draw_tree(tmp_path / "data", val=3)
    train(module, flags(tree, tmp_path / "run", iters=4, evaluate=4, pictures=2) + extra)
    sizes = {}
    for path in (tmp_path / "run/panels").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            colours = picture.convert("RGB").getcolors(1 << 20)
            sizes[path.name] = picture.size
        assert len(colours) > 20, f"{path.name} shows nothing"
    assert set(sizes) == {"000002-train.png", "000004-train.png", "000004-val.png"}
    assert sizes["000004-val.png"][1] == 3 * 176  # a row for each of three images
    # from step 4 on a teacher has five maps of the unlabelled batch, before it there are three
    counts = (3, 5 if module in (mean_teacher, u2pl) else 3)
    if module is cps_fpl:  # with CutMix the mixed images too, and what they are taught
        counts = (6, 6) if extra else (8, 8)
    counts = (5, 5) if module is esl else counts
    assert sizes["000002-train.png"] == (counts[0] * 164, 2 * 176)
    assert sizes["000004-train.png"] == (counts[1] * 164, 2 * 176)


@pytest.mark.smoke
def test_dry_run_prints_the_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys):
    tree = draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    train(mean_teacher, flags(tree, "") + ["--dry-run", "--cutmix"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["cutmix", "True"], ["total_iters", "8"], ["lr", "0.01"], ["split", "1/4"]):
        assert row in lines
    assert any("labelled" in line and "2" in line for line in lines)  # per process
    keys = hashlib.sha1(b"train0\ntrain4").hexdigest()[:8]
    assert any("labeled" in line and "2," in line and keys in line for line in lines)
    assert snapshot(tmp_path) == before and not Path("runs").exists()


def test_list_presets_shows_the_numbers_of_the_papers_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    train(mean_teacher, ["--list-presets"])
    table = capsys.readouterr().out
    train(supervised, ["--list-presets"])
    floor = capsys.readouterr().out

    def shown(table, miou, flags, source):
        lines = [line for line in table.splitlines() if miou in line.split()]
        return any(flags in line and source in line for line in lines)

    # U2PL, arXiv:2203.03884v2, Tables 1 to 3
    assert shown(table, "52.16", "--dataset voc --split 92 --cutmix", "U2PL Table 1, CutMix")
    assert shown(table, "70.96", "--dataset voc --split 1464", "U2PL Table 1, MT")
    assert shown(table, "78.15", "--dataset cityscapes --split 1/2", "U2PL Table 3, MT")
    assert shown(floor, "67.87", "--dataset voc_aug --split 1/16", "U2PL Table 2, SupOnly")
    assert "SupOnly" not in table and "CutMix" not in floor
    papers = json.loads((Path(run.__file__).parent / "papers.json").read_text())
    cells = sum(len(entry["miou"]) for entry in papers if entry["script"] == "mean_teacher")
    assert len([line for line in table.splitlines() if "--dataset" in line]) == cells
    assert list(tmp_path.iterdir()) == []


def test_no_loader_process_is_left_after_a_run(tmp_path, monkeypatch):
    shrink(mean_teacher, monkeypatch)
    tree, out = draw_tree(tmp_path / "data"), tmp_path / "run"
    begin, started = multiprocessing.process.BaseProcess.start, []
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda p: (started.append(p), begin(p))
    )
    train(mean_teacher, flags(tree, out, iters=4, workers=1))
    assert len(started) >= 2  # a loader process for each stream
    assert not any(process.is_alive() for process in started)
