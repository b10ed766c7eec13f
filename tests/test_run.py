"""Contracts of a whole run, of one process and of two; a new script: rows in tiny.py and FLAGS."""

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import sys

import pytest
import torch
from PIL import Image

import processes
import recorder
import tiny
from benchmarks.runs import bits, differences, flat, log
from benchmarks.steps import take
from common.distributed import Group
from processes import digest, snapshot
from recorder import assert_close
from tiny import NETWORKS
from trees import entry

UNLABELED = (1, 2, 3, 5, 6, 7)  # of train0 to train7, at 1/4


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """No run at 1/4 opens the masks of unlabelled images: they are none."""
    root = tiny.draw_tree(tmp_path_factory.mktemp("run") / "data", val=3)
    for i in UNLABELED:
        (root / f"trainannot/train{i}.png").write_bytes(b"never opened")
    return root


def small(name, tree, out, *words, **numbers):
    """Flags of a run of a few steps in which a method does all that it does."""
    return tiny.with_acting(name, [*tiny.flags(tree, out, **numbers), *words])


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Returns a function of a script's name: its recorded run, made once, in folder <name>."""
    folder = tmp_path_factory.mktemp("finished")

    @functools.cache
    def of(name):
        words = "--lr 0.1 --seed 1".split()
        argv = small(name, tree, folder / name, *words, iters=8, evaluate=3, save=8, pictures=2)
        found = recorder.watched(name, argv)
        found.out = folder / name
        found.log = log(found.out)
        return found

    return of


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_run_leaves_its_log_checkpoints_and_pictures(name, finished):
    """Means since the line before; tensors and plain values alone; the maps of a step."""
    found = finished(name)
    lines = [line for line in found.log if line["kind"] == "train"]
    for step, line in zip((2, 4, 6, 8), lines, strict=True):
        one, two = found.steps[step - 2 : step]
        parts = {key: (x + two.parts[key]) / 2 for key, x in one.parts.items()}
        spent = {key: (x + two.spent[key]) / 2 for key, x in one.spent.items()}
        assert list(line) == ["kind", "step", "lr", *tiny.LINES[name].split(), "time"]
        assert line["step"] == step
        assert {key: line[key] for key in parts} == pytest.approx(parts, rel=1e-6, abs=1e-12)
        # poly: of the last step of the line
        assert line["lr"] == pytest.approx(0.1 * (1 - (step - 1) / 8) ** 0.9, rel=1e-12)
        assert list(line["time"]) == [*(f"{key}_ms" for key in spent), "step_ms", "elapsed_s"]
        *each, whole, _ = line["time"].values()
        assert each == pytest.approx([1e3 * mean for mean in spent.values()], abs=0.01)
        assert list(spent)[0] == "data" and min(each) > 0 and sum(each) < whole
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

    panels = (found.out / "panels").iterdir()
    rows = {path.name: Image.open(path).height // 176 for path in panels}
    vals = {f"00000{step}-val.png": 3 for step in (3, 6, 8)}  # a row for each of three images
    assert rows == vals | {f"00000{step}-train.png": 2 for step in (2, 4, 6, 8)}  # 2: warm-up


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_one_network_is_scored_in_eval_mode_and_eval_only_repeats_it(name, finished, capsys):
    found, script = finished(name), tiny.script(name)
    done, evals = found.log[-1], [line for line in found.log if line["kind"] == "eval"]
    best = max(evals, key=lambda line: line["miou"])
    assert done["on"] == "test" and done["best_step"] == best["step"]
    assert all(modes == {False} for _, modes in found.scored)
    warm = found.log[0]["args"].get("warmup_iters", 0)

    def scored(step):
        key = "student" if step <= warm else tiny.SCORED[name]
        return digest({"": found.steps[step - 1].nets[key]})

    steps = [3, 6, 8, 8]  # validations, then the last on test, and the best if it is another
    if best["step"] < 8:
        steps.append(best["step"])
    else:
        assert done["best"] == done["last"]
    assert [bits for bits, _ in found.scored] == [scored(step) for step in steps]
    before = snapshot(found.out)
    cases = ("last", "test", 8, done["last"]), ("best", "val", best["step"], best)
    for file, on, step, line in cases:
        capsys.readouterr()
        argv = ["--eval-only", "--checkpoint", str(found.out / f"{file}.pt"), "--eval-on", on]
        tiny.run(name, argv)
        scores = rf"IoU on {on}, % +step {step}\n(.*\n)*mIoU +{100 * line['miou']:.2f}\n"
        assert re.search(scores, capsys.readouterr().out)
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
    lines = re.findall(r"^step (./4)  (loss|val mIoU) .* ETA \d+:\d\d:\d\d$", text.out, re.M)
    assert lines == [("2/4", "loss"), ("4/4", "loss"), ("4/4", "val mIoU")]
    assert "\r" not in text.out and "\r" in text.err and "4/4" in text.err
    events = [path.read_bytes() for path in (tmp_path / "run").glob("events.out.tfevents.*")]
    assert [b"train/loss" in x and b"eval/miou" in x for x in events] == [True] * len(board)
    first = log(tmp_path / "run")[0]
    source = (tiny.ROOT / "mean_teacher.py").read_bytes()
    assert first["sha256"] == hashlib.sha256(source).hexdigest()
    common = tiny.ROOT / "common"
    files = sorted([*common.glob("*.py"), *common.glob("*.json")])
    whole = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    assert first["common"] == whole.hexdigest()[:16]
    assert (first["argv"], first["world"]) == (argv, 1) and "pillow" in first["versions"]
    assert first["args"].items() >= dict(cutmix=True, lr=0.003, batch_size_unlabeled=2).items()
    keys = {"labeled": ["train0", "train4"], "unlabeled": [f"train{i}" for i in UNLABELED]}
    keys |= {"val": ["val0", "val1", "val2"], "test": ["test0", "test1"]}
    lists = {name: [len(some), entry(some)["set"]] for name, some in keys.items()}
    assert first["lists"] == lists


RESUMED = [
    pytest.param(name, "--deterministic --ohem-kept 0.3", marks=pytest.mark.smoke)
    for name in tiny.SCRIPTS
]
RESUMED += [("u2pl", "--bank-dtype bf16"), ("mean_teacher", "--init {}")]
RESUMED += [("unimatch", "--partner crop --unsup-loss fpl --T 0.2 0.4")]


@pytest.mark.parametrize("name, words", RESUMED)
def test_a_resumed_run_equals_the_whole_one(name, words, tree, finished, tmp_path, request):
    """Stopped with nothing saved yet; long after a save and between two lines; right after a save.

    The log is cut back to the checkpoint, in mid-line; what is cut is kept.
    """
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    numbers, whole, out = dict(iters=7, log=2, evaluate=2, save=3), tmp_path / "a", tmp_path / "b"
    words = words.format(finished("supervised").out / "best.pt").split()
    tiny.run(name, small(name, tree, whole, *words, **numbers))
    argv = small(name, tree, out, "--resume", *words, **numbers)
    half, texts = '{"kind": "train", "st', []
    for step in (3, 6, 7):
        recorder.stopped(name, argv, step)
        (out / "last.tmp").write_bytes(b"half")  # a kill may leave it
        texts.append((out / "log.jsonl").read_text() + half)
        (out / "log.jsonl").write_text(texts[-1])
    tiny.run(name, argv)
    assert differences(whole, out) == []
    assert (out / "log-2.jsonl").read_text() == texts[0]
    two_lines = "".join(texts[1].splitlines(True)[-3:])  # of step 4, and the half one
    assert (out / "lost.jsonl").read_text() == two_lines + half
    assert torch.are_deterministic_algorithms_enabled() == ("--deterministic" in words)
    shutil.copytree(out, tmp_path / "before")  # finished: nothing changes
    tiny.run(name, argv)
    assert differences(tmp_path / "before", out) == []


@pytest.mark.parametrize("name, words", [("supervised", ""), ("cps_fpl", "--unsup-weight 0")])
def test_labels_alone_need_no_unlabelled_image(name, words, tmp_path):
    root = tiny.draw_tree(tmp_path / "data")
    for i in UNLABELED:
        (root / f"train/train{i}.jpg").write_bytes(b"never opened")
    tiny.run(name, small(name, root, tmp_path / "run", *words.split(), pictures=3))


SHARED = "--ohem-kept 0.2|--amp bf16|--seed 1"
FPL = "--T 0.5|--T 0.2 0.3 0.5|--weight linear|--weight none|--mean-over positives_and_next"
AEL = """--unsup-loss ce|--consistency-on all|--gamma 1|--beta 0.5|--pooled 1|--bank-momentum 0.5
    --region-area 0.2|--paste-draws 1|--paste-draws 0|--paste-prob 0.5|--paste-scales 1 2
    --paste-not 1 2 3 4 5 6 7 8|--ema-decay 0.3|--no-cutmix"""
U2PL = """--epochs 3|--alpha-0 0.4|--no-dpa|--eta 2|--unreliable-loss binary|--unreliable-loss none
    --contrast-weight 2|--anchors 3|--negatives 4|--ranks 1 9|--delta-p 0.12|--tau 0.1|--keys 5
    --bank-sizes 9 4|--warmup-iters 1"""
UNIMATCH = f"--unsup-loss fpl|{FPL}|--k-max 2|--unsup-loss ce|--views 1"
FLAGS = {  # the first of each is what the others are added to
    "supervised": """|--lr 0.02|--lr-head 3|--weight-decay 0.1|--decay-on weights|--scales 0.5 1
        --crop-size 40|--split 1/2|--split-seed 3|--batch-size 4|--total-iters 9""",
    "mean_teacher": """--warmup-iters 0 --seed 5|--consistency mse|--consistency-weight 2
        --rampup-iters 5|--warmup-iters 1|--ema-decay 0.3|--teacher-bn average|--no-cutmix
        --cutmix-prob 1""",
    "cps_fpl": f"""|{FPL}|--unsup-loss ce|--unsup-loss soft|--unsup-loss negative|--unsup-weight 3
        --k-strategy n|--k-strategy fixed2|--k-strategy step|--k-max 4|--weight convex
        --balance True|--no-cutmix|--same-image-cutmix""",
    "ael_fpl": f"""|{FPL}|{AEL}|--k-max 2|--unsup-weight 2|--balance True|--threshold 0.12
        --teacher-mode eval""",
    "u2pl": f"""--warmup-iters 0|{U2PL}|--negatives-from reliable|--negatives-from all
        --no-bank|--bank-dtype bf16|--ema-decay 0.3|--no-cutmix|--cutmix-prob 1""",
    "u2pl_ael": f"--warmup-iters 0 --seed 3|{U2PL}|--divide-by all|--contrast-after 2|"
    + AEL.replace("--unsup-loss ce|", ""),  # of this seed boxes are regions
    "esl": """--eta 0.5|--label hard|--label soft|--label topk --top-k 3|--label topk --top-k 2
        --eta 0.8|--unsup-weight 1|--contrast-weight 1|--no-contrast|--parts 2|--theta 0.5
        --zeta 0.5|--anchors 2|--anchor-share 0.5|--negatives 3|--sigma 0.1|--queue 2
        --ema-decay 0.3|--no-cutmix|--cutmix-prob 0.5""",
    "unimatch": f"""{UNIMATCH}|--unsup-loss ce --threshold 0.2|--no-feature-perturbation
        --partner crop""",
    "unimatch_v2": f"""{UNIMATCH}|--unsup-loss ce --threshold 0.5|--no-complementary-dropout
        --kept-whole 0|--freeze 2|--ema-decay 0.3|--partner reversed --batch-size-unlabeled 4""",
}


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_every_flag_has_an_effect_and_two_equal_runs_none(name, tmp_path):
    """The networks after two steps, u2pl.py's after three, differ from those of every other row."""
    script, found, alone = tiny.script(name), {}, Group(0, 1, torch.device("cpu"))
    base, *rows = re.split(r"\||\n", FLAGS[name])
    rows += SHARED.split("|") + ["--batch-size-unlabeled 4"] * (name != "supervised")
    steps = 3 if name.startswith("u2pl") else 2  # --epochs and --keys act in the third
    tree = tiny.draw_tree(tmp_path / "data")
    for words in ["", "  ", *rows]:
        argv = [*tiny.flags(tree, tmp_path / "run", iters=4), *words.split()]
        argv = tiny.with_acting(name, argv, f"{tiny.MORE.get(name, '')} {base}")
        watch = take(script, argv, alone, steps, tiny=True, kmeans=True)
        found[words] = digest(watch.networks)
    assert found[""] == found.pop("  ")
    assert len(set(found.values())) == len(found) > (10 if name in tiny.SCRIPTS[:9] else 1), found


HEADS = dict.fromkeys(("u2pl", "u2pl_ael", "esl"), "features") | {"cps_fpl": "CPS"}  # else plain


@pytest.mark.parametrize("reader", ["supervised", "mean_teacher", "cps_fpl", "u2pl"])
def test_a_run_starts_from_the_networks_of_any_other(reader, finished, tree, tmp_path, capsys):
    """Each from the one of its name, or the first; a head that does not fit stays random."""
    own = recorder.watched(reader, small(reader, tree, tmp_path / "zero", iters=1)).networks
    for writer in ("supervised", "cps_fpl", "esl"):  # one of each kind of head, and of names
        fits = HEADS.get(writer) == HEADS.get(reader)
        path = finished(writer).out / "best.pt"
        saved = torch.load(path, weights_only=True)
        argv = small(reader, tree, tmp_path / writer, "--init", str(path), iters=1)
        mine, words = recorder.watched(reader, argv).networks, []
        for name in NETWORKS[reader]:
            source = name if name in NETWORKS[writer] else NETWORKS[writer][0]
            words.append(f"{name} from its {source}" + ", head random (another head)" * (not fits))
            given = saved["networks"][source].items()
            given = {key: x for key, x in given if fits or "backbone" in key}
            assert digest({"": mine[name]}) == digest({"": own[name].state_dict() | given})
        line = f"starting from {path}, step {saved['step']}: {'; '.join(words)}\n"
        assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_own_classes_are_learnt_from_a_checkpoint_of_others(name, finished, tmp_path, capsys):
    """9 is ignored, 1 to 5 occur of 6 classes; there is no test part."""
    root = tiny.draw_folder(tmp_path / "folder", 6, void=9, first=1)
    argv = tiny.flags(root, tmp_path / "run", iters=2)
    argv += ["--init", str(finished(name).out / "best.pt")]
    argv += "--dataset folder --num-classes 6 --ignore-index 9 --protocol slide --lr 0.01".split()
    tiny.run(name, tiny.with_acting(name, argv))
    text = capsys.readouterr()
    assert "head random" in text.out and "\r" not in text.err
    done = log(tmp_path / "run")[-1]
    assert done["on"] == "val" and len(done["last"]["iou"]) == 6


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


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Returns a function of a script: the folder of its runs by both processes, steps by one."""
    folder = tmp_path_factory.mktemp("pairs")
    sure = tiny.draw_tree(folder / "sure", ids=11)
    tree = tiny.draw_tree(folder / "tree")

    @functools.cache
    def of(name):
        jobs, alone, rows = [], {}, [row for script, row in SHARED_OUT if script == name]
        for row in rows:
            numbers = dict(iters=6 if name == "ael_fpl" else 3, log=1, evaluate=9, save=9, batch=4)
            argv = tiny.flags(sure, folder / f"{name} {row}", **numbers)
            # of 48x36 pixels: a crop of 32 lies inside
            argv += f"--scales 1 1.5 {SHARED_OUT[name, row]}".split()
            unlabeled = "" if name == "supervised" else "--batch-size-unlabeled 4"
            jobs.append(dict(argv=tiny.with_acting(name, argv, unlabeled), bare=True))
        argv = tiny.flags(tree, folder / f"{name} whole", iters=7, evaluate=7, save=2, batch=4)
        argv += f"--seed 3 {tiny.MORE.get(name, '')}".split()
        cut = [*argv, "--out", f"{folder}/{name} cut"]
        jobs += [dict(argv=argv), dict(argv=cut, stop=6), dict(argv=[*cut, "--resume"])]
        process = processes.Forked([recorder.__file__, name, json.dumps(jobs)], 2)
        for row, job in zip(rows, jobs, strict=False):  # meanwhile, by one
            argv = [*job["argv"], "--out", f"{folder}/{name} {row} alone"]
            alone[row] = recorder.watched(name, argv, bare=True).steps
        processes.finish(process)
        return folder, alone

    return of


@pytest.mark.parametrize("name, row", SHARED_OUT)
def test_two_processes_take_the_steps_of_one(name, row, pairs):
    """They share out its images, masks and draws; gradients go over them once a step."""
    folder, alone = pairs(name)
    shares = recorder.left_by(folder / f"{name} {row}")
    for one, first, second in zip(alone[row], *shares, strict=True):
        for whole, *both in zip(one.seen, first.seen, second.seen, strict=True):
            images = torch.cat([share["image"] for share in both])
            if len(images) == 8:  # two halves of four: each process has its part of both
                images = images[[0, 1, 4, 5, 2, 3, 6, 7]]
            assert torch.equal(images, whole["image"])
        for key, x in first.grads.items():
            assert torch.equal(x, second.grads[key])  # one reduced sum on both
        # float32 sums of 12,000 pixels in another order, through six layers; the weights differ
        # by as little in the steps before
        assert_close(first.grads, one.grads, 5e-5)
        adamw = name == "unimatch_v2"  # divides a gradient by its size, a rounding error's too
        assert_close(first.nets, one.nets, 2e-3 if adamw else 2e-6)
        assert_close(first.state, one.state, 1e-5)
        unsure = {"K", "K_gt_1", "weight", "pseudo_acc", "unsure_acc", "coverage", "commonest"}
        for part in one.parts.keys() - unsure:
            mean = (first.parts[part] + second.parts[part]) / 2
            if part != "balance" or name == "ael_fpl":
                assert mean == pytest.approx(one.parts[part], rel=2e-5, abs=1e-7), part
        buckets = [0, 0] if name == "cps_fpl" else [0]  # one of each network that trains
        assert (first.reduced, second.reduced, one.reduced) == (buckets, buckets, [])


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_two_processes_have_one_state_and_resume_exactly(name, pairs):
    folder = pairs(name)[0]
    assert differences(folder / f"{name} whole", folder / f"{name} cut") == []
    for first, second in zip(*recorder.left_by(folder / f"{name} whole"), strict=True):
        one, other = (flat([x.nets, x.state]) for x in (first, second))
        assert one.keys() == other.keys()
        assert all(bits(x) == bits(other[key]) for key, x in one.items())  # BN's too: the first's
        assert not torch.equal(first.seen[-1]["image"], second.seen[-1]["image"])
        assert first.random != second.random  # the channels that dropout leaves out
    if name == "u2pl":
        assert first.state["pushed"].max() > 4 * 7  # more than one process brings in four steps
