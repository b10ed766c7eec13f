"""Contracts of a whole run, over all scripts: what it leaves, exact resume, flags, starts, scores.

A new script is covered by its rows in tiny.py and in FLAGS below.
"""

import hashlib
import importlib.util
import json
import math
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

import recorder
import tiny
from benchmarks.runs import differences, flat, log
from common import Refusal, run
from processes import digest, kill_at_step, snapshot, start

UNLABELED = (1, 2, 3, 5, 6, 7)  # of train0 to train7, at 1/4
NETWORKS = {"supervised": ["student"], "cps_fpl": ["branch1", "branch2"]}
NETWORKS = {name: NETWORKS.get(name, ["student", "teacher"]) for name in tiny.SCRIPTS}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("run") / "data", val=3)


def small(name, tree, out, *words, **numbers):
    """Flags of a run of a few steps in which a method does all that it does."""
    return [*tiny.flags(tree, out, **numbers), *tiny.MORE.get(name, "").split(), *words]


def train(name, argv, patch):
    """Makes a run of the tiny script."""
    with patch.context() as own:
        tiny.shrink(tiny.script(name), own)
        tiny.train(tiny.script(name), argv)


def stopped(name, argv, patch, step):
    """Makes a run that is interrupted in a step, before anything of it is logged."""
    with patch.context() as own, pytest.raises(KeyboardInterrupt):
        recorder.stop_in(own, step)
        train(name, argv, own)


# ---- what a run leaves ----


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Returns a function of a script's name: its recorded run, made once, in folder <name>."""
    folder, runs = tmp_path_factory.mktemp("finished"), {}

    def of(name):
        if name not in runs:
            words = ["--lr", "0.1", "--seed", "1"]
            numbers = dict(iters=8, evaluate=3, save=8, pictures=4)
            argv = small(name, tree, folder / name, *words, **numbers)
            script = tiny.script(name)
            with pytest.MonkeyPatch.context() as patch:
                tiny.shrink(script, patch)
                found = recorder.watch(patch, script, argv)
            found.out = folder / name
            found.log = log(found.out)
            found.args = tiny.resolved(script, argv)
            runs[name] = found
        return runs[name]

    return of


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_lines_of_the_log_are_means_since_the_line_before(name, finished):
    found = finished(name)
    lines = [line for line in found.log if line["kind"] == "train"]
    names = tiny.LINES[name].split()
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line, number in zip(lines, (0, 2, 4, 6), strict=True):
        steps = found.steps[number : number + 2]
        assert list(line) == ["kind", "step", "lr", *names, "time"]
        for part in names:
            mean = sum(step.parts[part] for step in steps) / 2
            assert line[part] == pytest.approx(mean, rel=1e-6, abs=1e-12)
        spent = list(steps[0].spent)
        assert spent[0] == "data"
        assert list(line["time"]) == [*(f"{part}_ms" for part in spent), "step_ms", "elapsed_s"]
        for part in spent:
            mean = 1e3 * sum(step.spent[part] for step in steps) / 2
            assert line["time"][f"{part}_ms"] == pytest.approx(mean, abs=0.01) and mean > 0
        assert sum(line["time"][f"{part}_ms"] for part in spent) < line["time"]["step_ms"]
        # poly: of the last step of the line
        assert line["lr"] == pytest.approx(0.1 * (1 - (number + 1) / 8) ** 0.9, rel=1e-12)
    kinds = [line["kind"] for line in found.log]
    assert kinds == "start train eval train train eval train eval done".split()


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_checkpoint_holds_tensors_and_plain_values_only(name, finished):
    for file in ("last.pt", "best.pt"):
        saved = torch.load(finished(name).out / file, weights_only=True)
        kinds = {type(value) for value in flat(saved).values()}
        assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
        assert list(saved["networks"]) == NETWORKS[name] and saved["script"] == f"{name}.py"
        if file == "last.pt":
            assert list(saved["state"]) == tiny.STATE.get(name, "").split() and saved["step"] == 8
            assert any("momentum_buffer" in key for key in flat(saved))
            for key, x in saved["state"].items():
                assert torch.equal(x, finished(name).steps[-1].state[key])


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_panels_are_pictures_of_the_maps_of_a_step(name, finished):
    found, sizes = finished(name), {}
    for path in (found.out / "panels").iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, f"{path.name} shows nothing"
            sizes[path.name] = picture.size
    vals = {f"00000{step}-val.png" for step in (3, 6, 8)}
    assert set(sizes) == {"000004-train.png", "000008-train.png", *vals}
    assert all(sizes[val][1] == 3 * 176 for val in vals)  # a row for each of three images
    for step in (4, 8):
        assert sizes[f"00000{step}-train.png"] == (len(found.steps[step - 1].maps) * 164, 2 * 176)


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_one_network_is_scored_in_eval_mode_and_eval_only_repeats_it(
    name, finished, tree, monkeypatch, capsys
):
    found, script = finished(name), tiny.script(name)
    done, evals = found.log[-1], [line for line in found.log if line["kind"] == "eval"]
    best = max(evals, key=lambda line: line["miou"])
    assert done["kind"] == "done" and done["on"] == "test" and done["best_step"] == best["step"]
    assert all(modes == {False} for _, modes in found.scored)
    warm = getattr(found.args, "warmup_iters", 0)

    def scored(step):
        key = "student" if step <= warm and name != "cps_fpl" else tiny.SCORED[name]
        return digest({"": found.steps[step - 1].nets[key]})

    steps = [3, 6, 8, 8, best["step"]]  # validations, then the last and the best on test
    assert [bits for bits, _ in found.scored] == [scored(step) for step in steps]
    before = snapshot(found.out)
    tiny.shrink(script, monkeypatch)
    for file in ("last", "best"):
        on_val = evals[-1] if file == "last" else best
        for on, score in (("test", done[file]), ("val", on_val)):
            capsys.readouterr()
            argv = ["--eval-only", "--checkpoint", str(found.out / f"{file}.pt"), "--eval-on", on]
            tiny.train(script, argv)
            printed = capsys.readouterr().out
            assert re.search(r"^mIoU +([\d.]+)$", printed, re.M)[1] == f"{100 * score['miou']:.2f}"
            step = 8 if file == "last" else done["best_step"]
            assert re.search(rf"IoU on {on} +step {step}$", printed, re.M)
    assert snapshot(found.out) == before


def test_the_score_is_that_of_one_confusion_matrix_over_all_images(finished, tree, monkeypatch):
    found, script = finished("supervised"), tiny.script("supervised")
    net = found.networks["student"].eval()
    net.load_state_dict(found.steps[2].nets["student"])
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
    line = next(line for line in found.log if line["kind"] == "eval")
    assert line["miou"] == pytest.approx(miou, abs=1e-6)
    # --eval-only may take another protocol than the run had
    seen, calls, report, predict = [], [], script.report, script.predict

    def watched(net, image, args, num_classes):
        calls.append((args.protocol, args.crop_size))
        return predict(net, image, args, num_classes)

    tiny.shrink(script, monkeypatch)
    monkeypatch.setattr(script, "report", lambda *a: seen.append(a[1]["step 8"]) or report(*a))
    monkeypatch.setattr(script, "predict", watched)
    argv = ["--eval-only", "--checkpoint", str(found.out / "last.pt"), "--eval-on", "test"]
    for more in ([], ["--protocol", "slide"], ["--protocol", "slide", "--crop-size", "48"]):
        tiny.train(script, argv + more)
    assert calls[::2] == [("whole", 32), ("slide", 32), ("slide", 48)] == calls[1::2]
    assert seen[0] == found.log[-1]["last"]


@pytest.mark.smoke
def test_the_first_line_of_the_log_says_what_ran_on_what(tree, tmp_path, monkeypatch, capsys):
    argv = small("mean_teacher", tree, tmp_path / "run", "--lr", "0.003", iters=2)
    monkeypatch.setattr(sys, "argv", ["mean_teacher.py", *argv])
    train("mean_teacher", argv, monkeypatch)
    assert f"--eval-only --checkpoint {tmp_path}/run/best.pt" in capsys.readouterr().out
    first, *others = log(tmp_path / "run")
    assert first["kind"] == "start" and all(line["kind"] != "start" for line in others)
    assert first["script"] == "mean_teacher.py" and first["argv"] == argv
    source = Path(tiny.script("mean_teacher").__file__).read_bytes()
    assert first["sha256"] == hashlib.sha256(source).hexdigest()
    args = first["args"]
    assert (args["cutmix"], args["lr"], args["batch_size_unlabeled"]) == (True, 0.003, 2)
    assert None not in [value for name, value in args.items() if name != "split_seed"]
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["python"] == sys.version.split()[0]
    assert {"numpy", "pillow", "torchvision"} <= set(first["versions"])
    assert first["device"].startswith("CPU") and first["world"] == 1
    keys = {"labeled": ["train0", "train4"], "val": ["val0", "val1", "val2"]}
    keys |= {"unlabeled": [f"train{i}" for i in UNLABELED], "test": ["test0", "test1"]}
    for name, some in keys.items():
        set_hash = hashlib.sha1("\n".join(some).encode()).hexdigest()[:8]
        assert first["lists"][name] == [len(some), set_hash], name
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    capsys.readouterr()
    train("mean_teacher", small("mean_teacher", tree, "", "--dry-run"), monkeypatch)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (["cutmix", "True"], ["total_iters", "8"], ["lr", "0.01"], ["split", "1/4"]):
        assert row in lines
    assert ["labelled", "per", "process", "2"] in lines
    assert ["labeled", "images", "2,", "set", first["lists"]["labeled"][1]] in lines
    assert snapshot(tmp_path) == before and not Path("runs").exists()


# ---- exact resume ----

RESUMED = [pytest.param(name, "", marks=pytest.mark.smoke) for name in tiny.SCRIPTS]
RESUMED += [("cps_fpl", "--no-cutmix"), ("ael_fpl", "--recipe official --teacher-mode eval")]
RESUMED += [("u2pl", "--bank-dtype bf16"), ("u2pl", "--no-bank --ranks 1 4")]
RESUMED += [("esl", "--no-contrast --label hard")]


@pytest.mark.parametrize("name, words", RESUMED)
def test_a_run_stopped_in_any_step_and_resumed_equals_the_whole_one(
    name, words, tree, tmp_path, monkeypatch
):
    """Nothing saved yet; right after a save and between two lines; all saved; long after a save."""
    numbers, whole, out = dict(iters=7, log=2, evaluate=2), tmp_path / "whole", tmp_path / "out"
    train(name, small(name, tree, whole, *words.split(), save=8, **numbers), monkeypatch)
    for step, save in ((1, 3), (4, 3), (6, 1), (7, 5)):
        argv = small(name, tree, out, *words.split(), save=save, **numbers)
        stopped(name, argv, monkeypatch, step)
        at = (step - 1) // save * save
        assert at == 0 or torch.load(out / "last.pt", weights_only=True)["step"] == at
        train(name, argv + ["--resume"], monkeypatch)
        assert differences(whole, out, but=["save_every"]) == [], step
        if step < 7:
            shutil.rmtree(out)
    shutil.copytree(out, tmp_path / "before")  # finished: nothing changes
    train(name, argv + ["--resume"], monkeypatch)
    assert differences(tmp_path / "before", out) == []


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_run_killed_at_a_random_step_and_resumed_equals_the_whole_one(
    name, tree, tmp_path, monkeypatch
):
    """The killed one has loader processes, the others have none."""
    seed = random.randrange(10_000)
    print(f"the kill's seed: {seed}")
    out, numbers = tmp_path / "killed", dict(iters=30, log=2, evaluate=25, save=3)
    process = start(name, small(name, tree, out, workers=1, **numbers), hold=29)
    kill_at_step(process, out, random.Random(seed).randint(1, 20))
    assert '"done"' not in (out / "log.jsonl").read_text(), f"killed too late, seed {seed}"
    train(name, small(name, tree, out, "--resume", **numbers), monkeypatch)
    train(name, small(name, tree, tmp_path / "whole", **numbers), monkeypatch)
    assert differences(tmp_path / "whole", out, but=["workers"]) == [], seed


@pytest.mark.parametrize("end", ["half a line", "all but the newline", "steps after it"])
def test_the_log_is_cut_back_to_the_step_of_the_checkpoint(end, tree, tmp_path, monkeypatch):
    numbers = dict(iters=8, log=2, evaluate=8, save=4)
    train("supervised", small("supervised", tree, tmp_path / "whole", **numbers), monkeypatch)
    argv = small("supervised", tree, tmp_path / "run", **numbers)
    stopped("supervised", argv, monkeypatch, 7)
    path = tmp_path / "run/log.jsonl"
    text = path.read_text()
    assert [line.get("step") for line in log(tmp_path / "run")] == [None, 2, 4, 6]
    if end == "half a line":
        path.write_text(text + '{"kind": "train", "step": 8, "lo')
    elif end == "all but the newline":  # of the last line that stays
        path.write_text("".join(text.splitlines(keepends=True)[:3]).rstrip("\n"))
    train("supervised", argv + ["--resume"], monkeypatch)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.smoke
def test_resume_without_a_checkpoint_starts_from_zero(tree, tmp_path, monkeypatch, capsys):
    for name, words in (("whole", []), ("new", ["--resume"])):
        train("supervised", small("supervised", tree, tmp_path / name, *words), monkeypatch)
    (tmp_path / "cut").mkdir()
    first, second = log(tmp_path / "whole")[:2]
    lines = json.dumps(first) + "\n" + json.dumps(second) + "\n"
    (tmp_path / "cut/log.jsonl").write_text(lines)  # killed before its first checkpoint
    capsys.readouterr()
    train("supervised", small("supervised", tree, tmp_path / "cut", "--resume"), monkeypatch)
    assert "starting from zero" in capsys.readouterr().out
    for name in ("new", "cut"):
        assert differences(tmp_path / "whole", tmp_path / name) == []


def test_a_folder_is_never_overwritten_and_resume_takes_the_newest(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = small("supervised", tree, "", iters=4, log=4, save=1)  # saved before the first line
    name = Path("runs/supervised-camvid-1_4-s0")
    train("supervised", argv + ["--resume"], monkeypatch)  # nothing to go on with: the first name
    assert log(name)[-1]["kind"] == "done"
    assert torch.load(name / "last.pt", weights_only=True)["step"] == 4
    first = snapshot(name)
    train("supervised", argv, monkeypatch)
    stopped("supervised", argv, monkeypatch, 3)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == [name.name + end for end in ("", "-2", "-3")]
    train("supervised", argv + ["--resume"], monkeypatch)
    assert differences(name, Path(f"{name}-3")) == [] and snapshot(name) == first
    assert len(list(Path("runs").iterdir())) == 3
    before = snapshot(tmp_path)
    with pytest.raises(Refusal, match="exists: --resume goes on there"):
        train("supervised", argv + ["--out", str(name), "--seed", "1"], monkeypatch)
    assert snapshot(tmp_path) == before


def test_a_save_that_breaks_off_leaves_the_old_checkpoint(tree, tmp_path, monkeypatch):
    numbers = dict(iters=6, log=1, evaluate=6, save=2)
    train("supervised", small("supervised", tree, tmp_path / "whole", **numbers), monkeypatch)
    argv, save, saves = small("supervised", tree, tmp_path / "run", **numbers), torch.save, []

    def half_a_save(content, file):
        saves.append(1)
        save(content, file)
        if len(saves) == 2:  # the second last.pt
            file.truncate(file.tell() // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half_a_save)
        train("supervised", argv, patch)
    assert list((tmp_path / "run").glob("*.tmp")), "the broken file should lie there"
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 2
    for name in ("last.tmp", "best.tmp", "log.tmp"):  # and any other that a kill may leave
        (tmp_path / "run" / name).write_bytes(b"half")
    train("supervised", argv + ["--resume"], monkeypatch)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


# ---- numbers that are not finite, images of nothing ----

POISONED = [(name, net) for name in tiny.SCRIPTS for net in NETWORKS[name]]


@pytest.mark.parametrize("name, net", POISONED)
def test_a_network_of_nan_stops_the_run_and_is_never_saved(name, net, tree, tmp_path, monkeypatch):
    """Found when the next line is due, named by its step; from the checkpoint it goes on."""
    whole = run.Run.step
    words = ["--warmup-iters", "0"] if name in ("mean_teacher", "u2pl") else []
    argv = small(name, tree, tmp_path / "run", *words, iters=8, log=2, evaluate=2, save=2)

    def step(self, number, *rest):
        whole(self, number, *rest)
        if number == 3:
            with torch.no_grad():
                next(nets[net].parameters()).fill_(math.nan)

    def restore(self, networks, *rest):
        nets.update(networks)
        return restored(self, networks, *rest)

    nets, restored = {}, run.Run.restore
    with monkeypatch.context() as patch, pytest.raises(Refusal, match="not finite at step 4\\b"):
        patch.setattr(run.Run, "step", step)
        patch.setattr(run.Run, "restore", restore)
        train(name, argv, patch)
    for file in ("last.pt", "best.pt"):
        saved = flat(torch.load(tmp_path / "run" / file, weights_only=True))
        assert saved[".step"] == 2
        assert all(x.isfinite().all() for x in saved.values() if torch.is_tensor(x))
    assert all(line.get("step", 0) <= 2 for line in log(tmp_path / "run"))
    train(name, argv + ["--resume"], monkeypatch)
    assert log(tmp_path / "run")[-1]["kind"] == "done"


@pytest.mark.parametrize("kind", ["void", "padding", "bf16"])
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_what_is_empty_or_rounded_stays_finite(name, kind, tmp_path, monkeypatch):
    """Masks of void and images of one colour; crops of padding nearly alone; networks in bf16."""
    root = tiny.draw_tree(tmp_path / "data")
    words = {"void": [], "padding": ["--scales", "0.03", "0.04"], "bf16": ["--amp", "bf16"]}[kind]
    for i in range(8 if kind == "void" else 0):
        Image.new("RGB", (48, 36), (90, 120, 30)).save(root / f"train/train{i}.jpg")
        Image.new("L", (48, 36), 11).save(root / f"trainannot/train{i}.png")
    if name in ("mean_teacher", "u2pl"):
        words += ["--warmup-iters", "1"]
    argv = small(name, root, tmp_path / "run", *words, iters=4, log=1)
    with monkeypatch.context() as patch:
        tiny.shrink(tiny.script(name), patch)
        found = recorder.watch(patch, tiny.script(name), argv)
    for step in found.steps:
        assert all(math.isfinite(x) for x in step.parts.values())
        tensors = [x for net in step.nets.values() for x in net.values()] + [*step.grads.values()]
        assert all(x.isfinite().all() for x in tensors)
        assert all(x.dtype in (torch.float32, torch.int64) for x in tensors)
        assert kind != "void" or step.parts["loss" if name == "supervised" else "sup"] == 0
        assert all(x.dtype != torch.bfloat16 for x in step.state.values())
        if kind == "bf16" and name in ("u2pl", "esl"):
            assert step.seen[-1]["rep"].dtype == torch.bfloat16
            lengths = step.state["bank"].norm(dim=1)
            assert ((lengths == 0) | ((lengths - 1).abs() < 1e-5)).all()
            assert step.parts["contrast"] > 0 or step is found.steps[0]


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_masks_of_unlabelled_images_are_never_opened(name, tmp_path, monkeypatch):
    """Nor an unlabelled image by a script that learns from labels alone."""
    root = tiny.draw_tree(tmp_path / "data")
    words = ["--unsup-weight", "0"] if name == "cps_fpl" else []
    for i in UNLABELED:
        (root / f"trainannot/train{i}.png").write_bytes(b"never opened")
        if name in ("supervised", "cps_fpl"):
            (root / f"train/train{i}.jpg").write_bytes(b"never opened")
    argv = small(name, root, tmp_path / "run", *words, iters=6, pictures=3)
    train(name, argv, monkeypatch)
    assert (tmp_path / "run/panels/000006-train.png").exists()
    if name == "cps_fpl":  # the lines then have what there is
        line = next(line for line in log(tmp_path / "run") if line["kind"] == "train")
        assert list(line)[3:-1] == ["loss", "sup", "pseudo_acc", "coverage"]
        assert line["loss"] == line["sup"] > 0


# ---- every flag has an effect ----

FLAGS = {
    "": """--lr 0.02|--lr-head 3|--weight-decay 0.1|--decay-on {decay}|--scales 0.5 1|--crop-size 40
        --ohem-kept 0.2|--seed 1|--split 1/2|--split-seed 3|--amp bf16|--batch-size 4
        --total-iters 4""",
    "mean_teacher": """--batch-size-unlabeled 4|--consistency mse|--consistency-weight 2
        --rampup-iters 5|--warmup-iters 1|--ema-decay 0.3|--teacher-bn average|--no-cutmix
        --cutmix-prob 1""",
    "cps_fpl": """--batch-size-unlabeled 4|--unsup-loss ce|--unsup-loss soft|--unsup-loss negative
        --unsup-weight 3|--T 0.5|--k-strategy n|--k-strategy fixed2|--k-strategy step|--k-max 4
        --weight linear|--weight convex|--weight none|--mean-over positives_and_next|--balance True
        --no-cutmix|--same-image-cutmix""",
    "ael_fpl": """--batch-size-unlabeled 4|--unsup-loss ce|--unsup-weight 2|--consistency-on all
        --T 0.5|--k-max 2|--weight linear|--weight none|--mean-over positives_and_next
        --balance True|--threshold 0.12|--gamma 1|--beta 0.5|--pooled 1|--bank-momentum 0.5
        --region-area 0.2|--paste-draws 1|--paste-draws 0|--paste-prob 0.5
        --paste-not 1 2 3 4 5 6 7 8|--paste-scales 1 2|--teacher-mode eval
        --ema-decay 0.3""",
    "u2pl": """--batch-size-unlabeled 4|--epochs 3|--alpha-0 0.4|--no-dpa|--eta 2
        --unreliable-loss binary|--unreliable-loss none|--contrast-weight 2|--anchors 3
        --negatives 4|--negatives-from reliable|--negatives-from all|--ranks 1 9|--delta-p 0.12
        --tau 0.1|--no-bank|--bank-sizes 9 4|--bank-dtype bf16|--keys 5|--warmup-iters 1
        --ema-decay 0.3|--no-cutmix|--cutmix-prob 1""",
    "esl": """--label hard|--label soft|--label topk --top-k 3|--label topk --top-k 2|--eta 0.8
        --unsup-weight 1|--contrast-weight 1|--no-contrast|--parts 2|--theta 0.5|--zeta 0.5
        --anchors 2|--anchor-share 0.5|--negatives 3|--sigma 0.1|--queue 2|--ema-decay 0.3
        --no-cutmix|--cutmix-prob 0.5|--batch-size-unlabeled 4""",
}


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_every_flag_has_an_effect_and_two_equal_runs_none(name, tmp_path, monkeypatch):
    """The networks after three steps differ from those of every other row."""
    script, found = tiny.script(name), {}
    tiny.shrink(script, monkeypatch)
    root = tiny.draw_tree(tmp_path / "data", val=1, test=0)
    base = {"esl": "--eta 0.5", "mean_teacher": "--warmup-iters 0 --seed 2"}
    base["u2pl"] = "--warmup-iters 0"
    decay = {"all": "weights"}.get(tiny.resolved(script, tiny.flags(root, "")).decay_on, "all")
    rows = f"{FLAGS['']}\n{FLAGS.get(name, '')}".format(decay=decay).replace("\n", "|").split("|")
    for words in ["", "--workers 1", *rows]:
        out = tmp_path / str(len(found))
        argv = small(name, root, out, *base.get(name, "").split(), *words.split(), iters=3)
        tiny.train(script, argv)
        found[words] = digest(torch.load(out / "last.pt", weights_only=True)["networks"])
    assert found[""] == found.pop("--workers 1")
    shared = {}
    for words, bits in found.items():
        shared.setdefault(bits, []).append(words)
    assert len(shared) == len(found) > 10, [same for same in shared.values() if len(same) > 1]


# ---- a start from the networks of another run ----

HEADS = {"cps_fpl": "CPS", "u2pl": "features", "esl": "features"}  # the others' are alike


def begun(name, argv, monkeypatch):
    """Returns the networks of a run as its first step finds them."""
    found, restore = {}, run.Run.restore

    def restored(self, networks, *rest):
        assert restore(self, networks, *rest) == 0
        for key, net in networks.items():
            found[key] = recorder.copied(net.state_dict())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "restore", restored)
        train(name, argv, patch)
    return found


@pytest.mark.parametrize("reader", tiny.SCRIPTS)
def test_a_run_starts_from_the_networks_of_any_other(
    reader, finished, tree, tmp_path, monkeypatch, capsys
):
    """Each from the one of its name, or the first; a head that does not fit stays random."""
    argv = small(reader, tree, tmp_path / "run")
    own = begun(reader, argv, monkeypatch)
    assert "starting from zero" in capsys.readouterr().out
    for writer in tiny.SCRIPTS:
        fits = HEADS.get(writer) == HEADS.get(reader)
        for file in ("last.pt", "best.pt"):
            path = finished(writer).out / file
            saved = torch.load(path, weights_only=True)
            capsys.readouterr()
            mine = begun(reader, argv + ["--init", str(path)], monkeypatch)
            words, taken = [], set()
            for name in NETWORKS[reader]:
                source = name if name in NETWORKS[writer] else NETWORKS[writer][0]
                twin = source in taken and name == "branch2"  # a pair of twins never disagrees
                taken.add(source)
                end = "" if fits and not twin else ", head random"
                words.append(f"{name} from its {source}{end}")
                for key, x in mine[name].items():
                    given = saved["networks"][source] if not end or "backbone" in key else own[name]
                    assert torch.equal(x, given[key]), (writer, name, key)
                changed = {
                    k.split(".")[0] for k, x in mine[name].items() if x.ne(own[name][k]).any()
                }
                assert changed == ({"backbone"} if end else {"backbone", "head"})
            line = f"run folder: {tmp_path}/run, starting from {path}, step {saved['step']}: "
            assert line + "; ".join(words) + "\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mean_teacher", "cps_fpl"])
def test_a_run_from_a_checkpoint_is_its_own_and_resumes_without_it(
    name, finished, tree, tmp_path, monkeypatch, capsys
):
    path = shutil.copy(finished("supervised").out / "best.pt", tmp_path / "start.pt")
    numbers = dict(iters=6, log=1, evaluate=3, save=2)
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(name, small(name, tree, tmp_path / "zero", **numbers), monkeypatch)
    train(name, small(name, tree, whole, "--init", str(path), **numbers), monkeypatch)
    zero, init = log(tmp_path / "zero"), log(whole)
    assert init[0]["args"]["init"] == str(path) and zero[0]["args"]["init"] == ""
    # only the networks come from there: steps, momenta and the best score are the run's own
    assert init[1]["loss"] != zero[1]["loss"] and init[1]["step"] == 1
    argv = small(name, tree, out, "--init", str(path), **numbers)
    for step, words in ((2, f"starting from {path}, step "), (5, "going on from step 4\n")):
        stopped(name, argv, monkeypatch, step)
        assert (out / "last.pt").exists() == (step == 5)
        if step == 5:
            path.unlink()  # not needed any more
        capsys.readouterr()
        train(name, argv + ["--resume"], monkeypatch)
        assert words in capsys.readouterr().out
        assert differences(whole, out) == []
        if step == 2:
            shutil.rmtree(out)
    other = [*small(name, tree, out, "--resume", **numbers), "--init", "other.pt"]
    with pytest.raises(Refusal, match=f"another recipe, --init {path} there and other.pt here"):
        train(name, other, monkeypatch)
    score = f"{100 * init[-1]['last']['miou']:.2f}"
    argv = ["--eval-only", "--checkpoint", str(out / "last.pt"), "--eval-on", "test"]
    for more in ([], ["--init", "no.pt"]):
        capsys.readouterr()
        train(name, argv + more, monkeypatch)
        printed = capsys.readouterr().out
        assert re.search(r"^mIoU +([\d.]+)$", printed, re.M)[1] == score
        assert "starting from" not in printed


def network(name, classes=3, **others):
    """Returns a real network on resnet18."""
    script, heads = tiny.script(name), dict(cps_fpl="CPSHead", u2pl="U2PLHead")
    words = dict(backbone="resnet18", stem="classic", weights="none", output_stride=16)
    args = script.Args(**words | dict(aux_weight=0.0, aspp_rates=(1, 2)) | others)
    return script.Network(args, classes, getattr(script, heads.get(name, "DeepLabV3Plus")))


def test_a_real_head_of_another_method_or_other_classes_stays_random(tmp_path):
    source, path = network("mean_teacher").state_dict(), tmp_path / "best.pt"
    content = {"script": "mean_teacher.py", "step": 7, "args": {}, "networks": {"student": source}}
    torch.save(content, path)
    for name, others, fits in (
        ("supervised", {}, True),
        ("supervised", dict(classes=4), False),
        ("supervised", dict(aux_weight=0.4), False),
        ("cps_fpl", {}, False),
        ("u2pl", {}, False),  # without the representation head no other part is taken
    ):
        net = network(name, **others)
        own = recorder.copied(net.state_dict())
        end = "" if fits else ", head random"
        words = f"{path}, step 7: net from its student{end}"
        assert run.load_init(str(path), {"net": net}) == words
        for key, value in net.state_dict().items():
            given = source if fits or key.startswith("backbone.") else own
            assert torch.equal(value, given[key]), key
    for others in (dict(stem="v1c"), dict(backbone="resnet50")):
        with pytest.raises(Refusal) as refusal:
            run.load_init(str(path), {"net": network("supervised", **others)})
        line = str(refusal.value)
        assert line.startswith(f"{path}: does not fit these flags (") and "\n" not in line


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_folder_of_ones_own_trains_from_a_checkpoint_of_other_classes(
    name, finished, tmp_path, monkeypatch, capsys
):
    """0 is ignored, 1 to 5 occur of 6 classes; there is no test part."""
    root = tiny.draw_folder(tmp_path / "folder", 6, void=0, first=1)
    init = finished(name).out / "best.pt"
    argv = tiny.own_folder(root, tmp_path / "run", 6, iters=2)
    argv += ["--ignore-index", "0", "--protocol", "slide", "--init", str(init)]
    train(name, argv + tiny.MORE.get(name, "").split(), monkeypatch)
    assert "head random" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["networks"]
    assert all(net["head.classify.1.weight"].shape[0] == 6 for net in saved.values())
    done = log(tmp_path / "run")[-1]
    assert done["on"] == "val" and len(done["last"]["iou"]) == 6
    masks = [np.asarray(Image.open(path)) for path in (root / "masks/val").iterdir()]
    found = np.bincount(np.concatenate([mask[mask > 0] for mask in masks]))
    constant = found.max() / found.sum() / (found > 0).sum()
    assert done["last"]["constant"] == pytest.approx(constant, abs=1e-12)


# ---- what a run prints, and what it leaves behind ----


@pytest.mark.smoke
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_plain_lines_or_a_live_line(terminal, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    train("supervised", small("supervised", tree, tmp_path / "run"), monkeypatch)
    text = capsys.readouterr()
    if terminal:
        assert "\r" in text.err and "step/s" in text.err and re.search(r"\b8/8\b", text.err)
        assert "mIoU" in text.out and "\r" not in text.out
        return
    assert text.err == ""
    lines = [line for line in text.out.splitlines() if line.startswith("step ")]
    for step in (2, 4, 6, 8):
        mine = [line for line in lines if line.startswith(f"step {step}/8  loss ")]
        assert len(mine) == 1 and re.search(r"ETA \d+:\d\d:\d\d$", mine[0])
    vals = [line[:19] for line in lines if "val mIoU" in line]
    assert vals == ["step 4/8  val mIoU ", "step 8/8  val mIoU "]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="no tensorboard here")
def test_tensorboard_writes_an_event_file_of_the_first_process(tree, tmp_path, monkeypatch):
    argv = small("supervised", tree, tmp_path / "run", "--tensorboard")
    supervised = tiny.script("supervised")
    args = tiny.resolved(supervised, argv)
    second = run.Group(1, 2, torch.device("cpu"))
    run.Run(args, supervised.__file__, second, supervised.load(args)).finish({}, "test")
    assert not (tmp_path / "run").exists()
    train("supervised", argv, monkeypatch)
    (path,) = (tmp_path / "run").glob("events.out.tfevents.*")
    content = path.read_bytes()
    assert b"train/loss" in content and b"eval/miou" in content


def test_no_loader_process_is_left_after_a_run(tree, tmp_path, monkeypatch):
    begin, started = multiprocessing.process.BaseProcess.start, []
    kind = multiprocessing.process.BaseProcess
    monkeypatch.setattr(kind, "start", lambda p: (started.append(p), begin(p)))
    argv = small("mean_teacher", tree, tmp_path / "run", iters=4, workers=1)
    train("mean_teacher", argv, monkeypatch)
    assert len(started) >= 2  # a loader process for each stream
    assert not any(process.is_alive() for process in started)
