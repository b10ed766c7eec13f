"""Contracts of a whole run, over all scripts: what it leaves, exact resume, flags, starts, scores,
two processes: the steps of one, one state on both.

A new script is covered by its rows in tiny.py and in FLAGS below.
"""

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import processes
import recorder
import tiny
from benchmarks.runs import bits, differences, flat, log
from benchmarks.steps import take
from common import Refusal
from common.distributed import Group
from processes import digest, snapshot
from recorder import assert_close

UNLABELED = (1, 2, 3, 5, 6, 7)  # of train0 to train7, at 1/4
NETWORKS = {"supervised": ["student"], "unimatch": ["student"], "cps_fpl": ["branch1", "branch2"]}
NETWORKS = {name: NETWORKS.get(name, ["student", "teacher"]) for name in tiny.SCRIPTS}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """No run at 1/4 opens the masks of unlabelled images: they are none."""
    root = tiny.draw_tree(tmp_path_factory.mktemp("run") / "data", val=3)
    spoil(root, "trainannot/train{}.png")
    return root


def spoil(root, name):
    for i in UNLABELED:
        (root / name.format(i)).write_bytes(b"never opened")


def small(name, tree, out, *words, **numbers):
    """Flags of a run of a few steps in which a method does all that it does."""
    return tiny.with_acting(name, [*tiny.flags(tree, out, **numbers), *words])


def watched(name, argv):
    """Makes a run of the tiny script; returns what recorder.py saw of it."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(tiny.script(name), patch)
        return recorder.watch(patch, tiny.script(name), argv)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Returns a function of a script's name: its recorded run, made once, in folder <name>."""
    folder = tmp_path_factory.mktemp("finished")

    @functools.cache
    def of(name):
        words = ["--lr", "0.1", "--seed", "1"]
        numbers = dict(iters=8, evaluate=3, save=8, pictures=4)
        argv = small(name, tree, folder / name, *words, **numbers)
        found = watched(name, argv)
        found.out = folder / name
        found.log = log(found.out)
        found.args = tiny.resolved(tiny.script(name), argv)
        return found

    return of


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_run_leaves_its_log_checkpoints_and_pictures(name, finished):
    """Means since the line before; tensors and plain values alone; the maps of a step."""
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

    for file in ("last.pt", "best.pt"):
        saved = torch.load(found.out / file, weights_only=True)
        kinds = {type(value) for value in flat(saved).values()}
        assert kinds <= {torch.Tensor, int, float, str, bool, type(None)}
        assert list(saved["networks"]) == NETWORKS[name] and saved["script"] == f"{name}.py"
        assert saved["sha256"] == found.log[0]["sha256"]  # the text that made it
        if file == "last.pt":
            assert list(saved["state"]) == tiny.STATE.get(name, "").split() and saved["step"] == 8
            momentum = "exp_avg" if name == "unimatch_v2" else "momentum_buffer"
            assert any(momentum in key for key in flat(saved))
            for key, x in saved["state"].items():
                assert torch.equal(x, found.steps[-1].state[key])

    rows = {}
    for path in (found.out / "panels").iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, f"{path.name} shows nothing"
            rows[path.name] = picture.height // 176
    assert picture.format == "PNG"
    vals = {f"00000{step}-val.png": 3 for step in (3, 6, 8)}  # a row for each of three images
    assert rows == vals | {"000004-train.png": 2, "000008-train.png": 2}


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_one_network_is_scored_in_eval_mode_and_eval_only_repeats_it(name, finished, capsys):
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
    for file, on, line in (("last", "test", done["last"]), ("best", "val", best)):
        capsys.readouterr()
        argv = ["--eval-only", "--checkpoint", str(found.out / f"{file}.pt"), "--eval-on", on]
        tiny.run(name, argv)
        printed = capsys.readouterr().out
        assert re.search(r"^mIoU +([\d.]+)$", printed, re.M)[1] == f"{100 * line['miou']:.2f}"
        step = 8 if file == "last" else best["step"]
        assert re.search(rf"IoU on {on}, % +step {step}$", printed, re.M)
    assert snapshot(found.out) == before
    args = tiny.resolved(script, [*argv, "--protocol", "slide"])  # it may have flags of its own
    assert (args.protocol, args.crop_size, args.lr) == ("slide", 32, 0.1)


@pytest.mark.smoke
def test_the_first_line_of_the_log_says_what_ran_on_what(tree, tmp_path, monkeypatch, capsys):
    """And what is printed: lines, a live line on a terminal alone, files for TensorBoard."""
    board = ["--tensorboard"] * bool(importlib.util.find_spec("tensorboard"))
    argv = small("mean_teacher", tree, tmp_path / "run", "--lr", "0.003", *board, iters=4)
    monkeypatch.setattr(sys, "argv", ["mean_teacher.py", *argv])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tiny.run("mean_teacher", argv)
    text = capsys.readouterr()
    assert f"--eval-only --checkpoint {tmp_path}/run/best.pt" in text.out
    assert re.findall(r"^step (./4)  loss .* ETA \d+:\d\d:\d\d$", text.out, re.M) == ["2/4", "4/4"]
    assert re.findall(r"^step (./4)  val mIoU ", text.out, re.M) == ["4/4"]
    assert "\r" not in text.out and "\r" in text.err and "4/4" in text.err
    for path in (tmp_path / "run").glob("events.out.tfevents.*"):
        board.remove("--tensorboard")
        assert b"train/loss" in path.read_bytes() and b"eval/miou" in path.read_bytes()
    assert not board
    first, *others = log(tmp_path / "run")
    assert all(line["kind"] != "start" for line in others) and first["argv"] == argv
    source = (tiny.ROOT / "mean_teacher.py").read_bytes()
    assert first["sha256"] == hashlib.sha256(source).hexdigest()
    args = first["args"]
    assert (args["cutmix"], args["lr"], args["batch_size_unlabeled"]) == (True, 0.003, 2)
    assert {"pillow", "torch"} <= set(first["versions"]) and first["world"] == 1
    keys = {"labeled": ["train0", "train4"], "val": ["val0", "val1", "val2"]}
    keys |= {"unlabeled": [f"train{i}" for i in UNLABELED], "test": ["test0", "test1"]}
    for name, some in keys.items():
        set_hash = hashlib.sha1("\n".join(some).encode()).hexdigest()[:8]
        assert first["lists"][name] == [len(some), set_hash], name


RESUMED = [pytest.param(name, "", marks=pytest.mark.smoke) for name in tiny.SCRIPTS]
RESUMED += [("u2pl", "--bank-dtype bf16"), ("mean_teacher", "--init {}")]
RESUMED += [("unimatch", "--partner crop --unsup-loss fpl --T 0.2 0.4")]


@pytest.mark.parametrize("name, words", RESUMED)
def test_a_run_stopped_three_times_and_resumed_equals_the_whole_one(
    name, words, tree, finished, tmp_path
):
    """Nothing saved yet; long after a save and between two lines; right after a save.

    The log is cut back to the checkpoint, in mid-line; what is cut is kept.
    """
    numbers, whole, out = dict(iters=7, log=2, evaluate=2, save=3), tmp_path / "a", tmp_path / "b"
    words = words.format(finished("supervised").out / "best.pt").split()
    tiny.run(name, small(name, tree, whole, *words, **numbers))
    argv = small(name, tree, out, "--resume", *words, **numbers)
    half, texts = '{"kind": "train", "st', []
    for step, saved in ((3, None), (6, 3), (7, 6)):
        recorder.stopped(name, argv, step)
        assert not saved or torch.load(out / "last.pt", weights_only=True)["step"] == saved
        (out / "last.tmp").write_bytes(b"half")  # a kill may leave it
        texts.append((out / "log.jsonl").read_text() + half)
        (out / "log.jsonl").write_text(texts[-1])
    tiny.run(name, argv)
    assert differences(whole, out) == []
    assert (out / "log-2.jsonl").read_text() == texts[0]
    two_lines = "".join(texts[1].splitlines(True)[-3:])  # of step 4, and the half one
    assert (out / "lost.jsonl").read_text() == two_lines + half
    shutil.copytree(out, tmp_path / "before")  # finished: nothing changes
    tiny.run(name, argv)
    assert differences(tmp_path / "before", out) == []


def test_a_folder_is_never_overwritten_and_resume_takes_the_newest(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = small("supervised", tree, "", iters=4, log=4, save=1)  # saved before the first line
    name = Path("runs/supervised-camvid-1_4-s0")
    tiny.run("supervised", argv + ["--resume"])  # nothing to go on with: the first name
    first = snapshot(name)
    tiny.run("supervised", argv)
    recorder.stopped("supervised", argv, 3)
    tiny.run("supervised", argv + ["--resume"])
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == [name.name + end for end in ("", "-2", "-3")]
    assert differences(name, Path(f"{name}-3")) == [] and snapshot(name) == first
    with pytest.raises(Refusal, match="exists: --resume goes on there"):
        tiny.run("supervised", argv + ["--out", str(name), "--seed", "1"])
    assert snapshot(name) == first


@pytest.mark.parametrize("name, words", [("supervised", ""), ("cps_fpl", "--unsup-weight 0")])
def test_labels_alone_need_no_unlabelled_image(name, words, tmp_path):
    root = tiny.draw_tree(tmp_path / "data")
    spoil(root, "train/train{}.jpg")
    argv = small(name, root, tmp_path / "run", *words.split(), iters=6, pictures=3)
    tiny.run(name, argv)
    if name == "cps_fpl":  # the lines then have what there is
        line = next(line for line in log(tmp_path / "run") if line["kind"] == "train")
        assert list(line)[3:-1] == ["loss", "sup", "pseudo_acc", "coverage"]
        assert line["loss"] == line["sup"] > 0


SHARED = "--ohem-kept 0.2|--amp bf16|--seed 1"
FPL = "--T 0.5|--T 0.2 0.3 0.5|--weight linear|--weight none|--mean-over positives_and_next"
AEL = """--unsup-loss ce|--consistency-on all|--gamma 1|--beta 0.5|--pooled 1|--bank-momentum 0.5
    --region-area 0.2|--paste-draws 1|--paste-draws 0|--paste-prob 0.5|--paste-scales 1 2
    --paste-not 1 2 3 4 5 6 7 8|--ema-decay 0.3|--no-cutmix"""
U2PL = """--epochs 3|--alpha-0 0.4|--no-dpa|--eta 2|--unreliable-loss binary|--unreliable-loss none
    --contrast-weight 2|--anchors 3|--negatives 4|--ranks 1 9|--delta-p 0.12|--tau 0.1|--keys 5
    --bank-sizes 9 4|--warmup-iters 1"""
UNIMATCH = f"{FPL}|--k-max 2|--unsup-loss ce|--views 1"
FLAGS = {
    "supervised": """--lr 0.02|--lr-head 3|--weight-decay 0.1|--decay-on weights|--scales 0.5 1
        --crop-size 40|--split 1/2|--split-seed 3|--batch-size 4|--total-iters 9""",
    "mean_teacher": """--consistency mse|--consistency-weight 2|--rampup-iters 5|--warmup-iters 1
        --ema-decay 0.3|--teacher-bn average|--no-cutmix|--cutmix-prob 1""",
    "cps_fpl": f"""{FPL}|--unsup-loss ce|--unsup-loss soft|--unsup-loss negative|--unsup-weight 3
        --k-strategy n|--k-strategy fixed2|--k-strategy step|--k-max 4|--weight convex
        --balance True|--no-cutmix|--same-image-cutmix""",
    "ael_fpl": f"""{FPL}|{AEL}|--k-max 2|--unsup-weight 2|--balance True|--threshold 0.12
        --teacher-mode eval""",
    "u2pl": f"""{U2PL}|--negatives-from reliable|--negatives-from all|--no-bank|--bank-dtype bf16
        --ema-decay 0.3|--no-cutmix|--cutmix-prob 1""",
    "u2pl_ael": f"{U2PL}|{AEL}|--divide-by all|--contrast-after 2".replace("--unsup-loss ce|", ""),
    "esl": """--label hard|--label soft|--label topk --top-k 3|--label topk --top-k 2|--eta 0.8
        --unsup-weight 1|--contrast-weight 1|--no-contrast|--parts 2|--theta 0.5|--zeta 0.5
        --anchors 2|--anchor-share 0.5|--negatives 3|--sigma 0.1|--queue 2|--ema-decay 0.3
        --no-cutmix|--cutmix-prob 0.5""",
    "unimatch": f"""{UNIMATCH}|--unsup-loss ce --threshold 0.2|--no-feature-perturbation
        --partner crop""",
    "unimatch_v2": f"""{UNIMATCH}|--unsup-loss ce --threshold 0.5|--no-complementary-dropout
        --kept-whole 0|--freeze 2|--ema-decay 0.3|--partner reversed --batch-size-unlabeled 4""",
}


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_every_flag_has_an_effect_and_two_equal_runs_none(name, tmp_path):
    """The networks after two steps, u2pl.py's after three, differ from those of every other row."""
    script, found, alone = tiny.script(name), {}, Group(0, 1, torch.device("cpu"))
    base = {"esl": "--eta 0.5", "mean_teacher": "--warmup-iters 0 --seed 5"}
    base["u2pl"] = "--warmup-iters 0"
    base["u2pl_ael"] = "--warmup-iters 0 --seed 6"  # boxes that are regions
    base["unimatch"] = base["unimatch_v2"] = "--unsup-loss fpl"
    steps = 3 if name.startswith("u2pl") else 2  # --epochs and --keys act in the third
    tree = tiny.draw_tree(tmp_path / "data")

    def flags(words):
        argv = [*tiny.flags(tree, tmp_path / "run", iters=4), *words.split()]
        return tiny.with_acting(name, argv, f"{tiny.MORE.get(name, '')} {base.get(name, '')}")

    rows = f"{SHARED}|{FLAGS[name]}".replace("\n", "|").split("|")
    rows += ["--batch-size-unlabeled 4"] * (name != "supervised")
    for words in ["", "  ", *rows]:
        watch = take(script, flags(words), alone, steps, tiny=True, kmeans=True)
        found[words] = digest(watch.networks)
    assert found[""] == found.pop("  ")
    assert len(set(found.values())) == len(found) > 10, found


HEADS = dict.fromkeys(("u2pl", "u2pl_ael", "esl"), "features") | {"cps_fpl": "CPS"}  # else plain


@pytest.mark.parametrize("reader", ["supervised", "mean_teacher", "cps_fpl", "u2pl"])
def test_a_run_starts_from_the_networks_of_any_other(reader, finished, tree, tmp_path, capsys):
    """Each from the one of its name, or the first; a head that does not fit stays random."""
    argv = small(reader, tree, tmp_path / "zero", iters=1)
    own = watched(reader, argv).networks
    for writer in ("supervised", "cps_fpl", "esl"):  # one of each kind of head, and of names
        fits = HEADS.get(writer) == HEADS.get(reader)
        path = finished(writer).out / "best.pt"
        saved = torch.load(path, weights_only=True)
        argv = small(reader, tree, tmp_path / writer, "--init", str(path), iters=1)
        mine = watched(reader, argv).networks
        words, taken = [], set()
        for name in NETWORKS[reader]:
            source = name if name in NETWORKS[writer] else NETWORKS[writer][0]
            twin = source in taken and name == "branch2"  # a pair of twins never disagrees
            taken.add(source)
            end = "" if fits and not twin else ", head random"
            words.append(f"{name} from its {source}{end}")
            for key, x in mine[name].state_dict().items():
                given = own[name].state_dict()
                if not end or "backbone" in key:
                    given = saved["networks"][source]
                assert torch.equal(x, given[key]), (writer, name, key)
        line = f"starting from {path}, step {saved['step']}: {'; '.join(words)}\n"
        assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_folder_of_ones_own_trains_from_a_checkpoint_of_other_classes(
    name, finished, tmp_path, capsys
):
    """9 is ignored, 1 to 5 occur of 6 classes; there is no test part."""
    root = tiny.draw_folder(tmp_path / "folder", 6, void=9, first=1)
    init = finished(name).out / "best.pt"
    more = {"network": ""} if name == "unimatch_v2" else {}
    argv = tiny.own_folder(root, tmp_path / "run", 6, iters=2, **more)
    argv = [word for word in argv if word not in ("--weights", "none")]  # --init has them
    argv += ["--ignore-index", "9", "--protocol", "slide", "--init", str(init)]
    tiny.run(name, tiny.with_acting(name, argv))
    text = capsys.readouterr()
    assert "head random" in text.out and "\r" not in text.err
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["networks"]
    last = "head.classify.2.weight" if more else "head.classify.1.weight"
    assert all(net[last].shape[0] == 6 for net in saved.values())
    done = log(tmp_path / "run")[-1]
    assert done["on"] == "val" and len(done["last"]["iou"]) == 6


SURE = "--scales 1 1.5 "  # of 48x36 pixels: a crop of 32 lies inside
SOFT = "--unsup-weight 20 --unsup-loss soft "  # a rounding cannot change the class that is taught
# Without BN and dropout, all pixels labelled and inside, a step is a mean over images. beta 0: no
# pixel is left out at random.
SHARED_OUT = {
    ("supervised", ""): "",
    ("mean_teacher", "squares"): "--consistency mse --cutmix --cutmix-prob 1 --warmup-iters 1",
    ("cps_fpl", "cutmix"): SOFT,
    ("cps_fpl", "same image"): SOFT + "--same-image-cutmix",
    ("unimatch", ""): "--no-feature-perturbation --threshold 0.13",
    ("unimatch_v2", ""): "--no-complementary-dropout --unsup-loss fpl",
    ("ael_fpl", "mixed"): "--beta 0 --lr 0.002",
    ("ael_fpl", "skip"): "--beta 0 --lr 0.002 --skip-absent --pooled 1",
}


def moved(argv, end):
    """Returns the flags of the same run in another folder."""
    place = argv.index("--out") + 1
    return [*argv[:place], argv[place] + end, *argv[place + 1 :]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns a function of a script: the folder of its runs, by both processes and by one."""
    folder = tmp_path_factory.mktemp("pairs")
    sure = tiny.draw_tree(folder / "sure", ids=11)
    tree = tiny.draw_tree(folder / "tree")

    @functools.cache
    def of(name):
        jobs, rows = [], [row for script, row in SHARED_OUT if script == name]
        for row in rows:
            numbers = dict(iters=6 if name == "ael_fpl" else 3, log=1, evaluate=9, save=9, batch=4)
            argv = tiny.flags(sure, folder / f"{name} {row}", **numbers)
            argv += (SURE + SHARED_OUT[name, row]).split()
            unlabeled = "" if name == "supervised" else "--batch-size-unlabeled 4"
            jobs.append(dict(argv=tiny.with_acting(name, argv, unlabeled), bare=True))
        numbers = dict(iters=7, log=2, evaluate=7, save=2, batch=4)
        more = ["--seed", "3", *tiny.MORE.get(name, "").split()]
        argv = [*tiny.flags(tree, folder / f"{name} whole", **numbers), *more]
        jobs.append(dict(argv=argv))
        argv = moved(argv, " cut")
        jobs += [dict(argv=argv, stop=6), dict(argv=argv + ["--resume"])]
        words = [str(tiny.ROOT / "tests/recorder.py"), name, json.dumps(jobs)]
        process = processes.Forked(words, 2)
        for row, job in zip(rows, jobs, strict=False):  # meanwhile, by one
            with pytest.MonkeyPatch.context() as patch:
                tiny.shrink(tiny.script(name), patch, bare=True)
                found = recorder.watch(patch, tiny.script(name), moved(job["argv"], " alone"))
            steps = [vars(step) for step in found.steps]
            torch.save(steps, f"{folder}/{name} {row} alone.steps")
        processes.finish(process)
        return folder

    return of


@pytest.mark.parametrize("name, row", SHARED_OUT)
def test_two_processes_take_the_steps_of_one(name, row, pairs):
    """They share out its images, masks and draws; gradients go over them once a step."""
    folder = pairs(name)
    wrapped, shares = recorder.left_by(folder / f"{name} {row}")
    assert wrapped[0] == wrapped[1] == ["DistributedDataParallel"] * len(wrapped[0])
    alone = torch.load(f"{folder}/{name} {row} alone.steps", weights_only=True)
    assert len(alone) == len(shares[0]) == len(shares[1]) >= 3
    for one, *two in zip(alone, *shares, strict=True):
        first, second = two
        for stream, batch in one["batch"].items():
            if stream != "paste":
                assert batch["inside"].all() and (batch.get("label", torch.ones(1)) != 255).all()
            for key, x in batch.items():
                assert torch.equal(torch.cat([share.batch[stream][key] for share in two]), x)
        for i, entry in enumerate(one["seen"]):
            images = torch.cat([share.seen[i]["image"] for share in two])
            if len(images) == 8:  # two halves of four: each process has its part of both
                images = images[[0, 1, 4, 5, 2, 3, 6, 7]]
            assert torch.equal(images, entry["image"])
        for key, x in first.grads.items():
            assert torch.equal(x, second.grads[key])  # one reduced sum on both
        # float32 sums of 12,000 pixels in another order, through six layers; the weights differ
        # by as little in the steps before
        assert_close(first.grads, one["grads"], 5e-5)
        adamw = name == "unimatch_v2"  # divides a gradient by its size, a rounding error's too
        assert_close(first.nets, one["nets"], 2e-3 if adamw else 2e-6)
        assert_close(first.state, one["state"], 1e-5)
        unsure = {"K", "K_gt_1", "weight", "pseudo_acc", "unsure_acc", "coverage"}
        for part in one["parts"].keys() - unsure:
            mean = (first.parts[part] + second.parts[part]) / 2
            if part != "balance" or name == "ael_fpl":
                assert mean == pytest.approx(one["parts"][part], rel=2e-5, abs=1e-7), part
        buckets = [0] * len(wrapped[0])
        assert (first.reduced, second.reduced, one["reduced"]) == (buckets, buckets, [])


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_two_processes_have_one_state_and_resume_exactly(name, pairs):
    folder = pairs(name)
    out = folder / f"{name} whole"
    assert differences(out, Path(f"{out} cut")) == []
    shares = recorder.left_by(out)[1]
    assert len(shares[0]) == len(shares[1]) == 7
    for first, second in zip(*shares, strict=True):  # BN's statistics too: those of the first
        one, other = (flat([x.nets, x.state]) for x in (first, second))
        assert one.keys() == other.keys()
        assert all(bits(x) == bits(other[key]) for key, x in one.items())
        assert not torch.equal(first.seen[-1]["image"], second.seen[-1]["image"])
        assert first.random != second.random  # the channels that dropout leaves out
    if name == "u2pl":
        assert first.state["pushed"].max() > 4 * 7  # more than one process brings in four steps
