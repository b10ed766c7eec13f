"""Contracts of a whole run, over all scripts: what it leaves, exact resume, flags, starts, scores.

A new script is covered by its rows in tiny.py and in FLAGS below.
"""

import functools
import hashlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import recorder
import tiny
from benchmarks.runs import differences, flat, log
from benchmarks.steps import take
from common import Refusal
from common.distributed import Group
from processes import digest, snapshot

UNLABELED = (1, 2, 3, 5, 6, 7)  # of train0 to train7, at 1/4
NETWORKS = {"supervised": ["student"], "cps_fpl": ["branch1", "branch2"]}
NETWORKS = {name: NETWORKS.get(name, ["student", "teacher"]) for name in tiny.SCRIPTS}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiny.draw_tree(tmp_path_factory.mktemp("run") / "data", val=3)


def small(name, tree, out, *words, **numbers):
    """Flags of a run of a few steps in which a method does all that it does."""
    return tiny.with_acting(name, [*tiny.flags(tree, out, **numbers), *words])


def train(name, argv, patch):
    with patch.context() as own:
        tiny.shrink(tiny.script(name), own)
        tiny.train(tiny.script(name), argv)


def watched(name, argv, patch):
    """Makes a run of the tiny script; returns what recorder.py saw of it."""
    with patch.context() as own:
        tiny.shrink(tiny.script(name), own)
        return recorder.watch(own, tiny.script(name), argv)


def stopped(name, argv, patch, step):
    """Makes a run that is interrupted in a step, before anything of it is logged."""
    with patch.context() as own, pytest.raises(KeyboardInterrupt):
        recorder.stop_in(own, step)
        train(name, argv, own)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Returns a function of a script's name: its recorded run, made once, in folder <name>."""
    folder = tmp_path_factory.mktemp("finished")

    @functools.cache
    def of(name):
        words = ["--lr", "0.1", "--seed", "1"]
        numbers = dict(iters=8, evaluate=3, save=8, pictures=4)
        argv = small(name, tree, folder / name, *words, **numbers)
        found = watched(name, argv, pytest.MonkeyPatch())
        found.out = folder / name
        found.log = log(found.out)
        found.args = tiny.resolved(tiny.script(name), argv)
        return found

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
    found, rows = finished(name), {}
    for path in (found.out / "panels").iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, f"{path.name} shows nothing"
            rows[path.name] = picture.height // 176
    assert picture.format == "PNG"
    vals = {f"00000{step}-val.png": 3 for step in (3, 6, 8)}  # a row for each of three images
    assert rows == vals | {"000004-train.png": 2, "000008-train.png": 2}


@pytest.mark.smoke
@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_one_network_is_scored_in_eval_mode_and_eval_only_repeats_it(
    name, finished, monkeypatch, capsys
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
    for file, on, line in (("last", "test", done["last"]), ("best", "val", best)):
        capsys.readouterr()
        argv = ["--eval-only", "--checkpoint", str(found.out / f"{file}.pt"), "--eval-on", on]
        train(name, argv, monkeypatch)
        printed = capsys.readouterr().out
        assert re.search(r"^mIoU +([\d.]+)$", printed, re.M)[1] == f"{100 * line['miou']:.2f}"
        step = 8 if file == "last" else best["step"]
        assert re.search(rf"IoU on {on}, % +step {step}$", printed, re.M)
    assert snapshot(found.out) == before
    args = tiny.resolved(script, [*argv, "--protocol", "slide"])  # it may have flags of its own
    assert (args.protocol, args.crop_size, args.lr) == ("slide", 32, 0.1)


@pytest.mark.smoke
def test_the_first_line_of_the_log_says_what_ran_on_what(tree, tmp_path, monkeypatch, capsys):
    argv = small("mean_teacher", tree, tmp_path / "run", "--lr", "0.003", iters=2)
    monkeypatch.setattr(sys, "argv", ["mean_teacher.py", *argv])
    train("mean_teacher", argv, monkeypatch)
    assert f"--eval-only --checkpoint {tmp_path}/run/best.pt" in capsys.readouterr().out
    first, *others = log(tmp_path / "run")
    assert all(line["kind"] != "start" for line in others) and first["argv"] == argv
    source = (tiny.ROOT / "mean_teacher.py").read_bytes()
    assert first["sha256"] == hashlib.sha256(source).hexdigest()
    args = first["args"]
    assert (args["cutmix"], args["lr"], args["batch_size_unlabeled"]) == (True, 0.003, 2)
    assert {"numpy", "pillow", "python", "torch", "torchvision"} <= set(first["versions"])
    assert first["device"].startswith("CPU") and first["world"] == 1
    keys = {"labeled": ["train0", "train4"], "val": ["val0", "val1", "val2"]}
    keys |= {"unlabeled": [f"train{i}" for i in UNLABELED], "test": ["test0", "test1"]}
    for name, some in keys.items():
        set_hash = hashlib.sha1("\n".join(some).encode()).hexdigest()[:8]
        assert first["lists"][name] == [len(some), set_hash], name


RESUMED = [pytest.param(name, "", marks=pytest.mark.smoke) for name in tiny.SCRIPTS]
RESUMED += [("cps_fpl", "--no-cutmix --precise-bn 2")]
RESUMED += [("ael_fpl", "--recipe official --teacher-mode eval")]
RESUMED += [("u2pl", "--bank-dtype bf16"), ("u2pl", "--no-bank --ranks 1 4 --fused off")]
RESUMED += [("esl", "--no-contrast --label hard"), ("mean_teacher", "--init {}")]


@pytest.mark.parametrize("name, words", RESUMED)
def test_a_run_stopped_in_any_step_and_resumed_equals_the_whole_one(
    name, words, tree, finished, tmp_path, monkeypatch
):
    """Nothing saved yet; right after a save and between two lines; long after a save.

    The log is cut back to the checkpoint, in mid-line; what is cut is kept.
    """
    numbers, whole, out = dict(iters=7, log=2, evaluate=2), tmp_path / "whole", tmp_path / "out"
    words = words.format(finished("supervised").out / "best.pt").split()
    train(name, small(name, tree, whole, *words, save=8, **numbers), monkeypatch)
    for step, save in ((3, 3), (4, 3), (7, 5)):
        argv = small(name, tree, out, *words, save=save, **numbers)
        stopped(name, argv, monkeypatch, step)
        at = (step - 1) // save * save
        assert at == 0 or torch.load(out / "last.pt", weights_only=True)["step"] == at
        (out / "last.tmp").write_bytes(b"half")  # a kill may leave it
        text = (out / "log.jsonl").read_text() + '{"kind": "train", "st'
        (out / "log.jsonl").write_text(text)
        train(name, argv + ["--resume"], monkeypatch)
        assert differences(whole, out, but=["save_every"]) == [], step
        lost = (out / "lost.jsonl" if at else out / "log-2.jsonl").read_text()
        assert text.endswith(lost) and lost.count("\n") == {3: 3, 4: 0, 7: 2}[step]
        if step < 7:
            shutil.rmtree(out)
    shutil.copytree(out, tmp_path / "before")  # finished: nothing changes
    train(name, argv + ["--resume"], monkeypatch)
    assert differences(tmp_path / "before", out) == []


def test_a_folder_is_never_overwritten_and_resume_takes_the_newest(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = small("supervised", tree, "", iters=4, log=4, save=1)  # saved before the first line
    name = Path("runs/supervised-camvid-1_4-s0")
    train("supervised", argv + ["--resume"], monkeypatch)  # nothing to go on with: the first name
    first = snapshot(name)
    train("supervised", argv, monkeypatch)
    stopped("supervised", argv, monkeypatch, 3)
    train("supervised", argv + ["--resume"], monkeypatch)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == [name.name + end for end in ("", "-2", "-3")]
    assert differences(name, Path(f"{name}-3")) == [] and snapshot(name) == first
    with pytest.raises(Refusal, match="exists: --resume goes on there"):
        train("supervised", argv + ["--out", str(name), "--seed", "1"], monkeypatch)
    assert snapshot(name) == first


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_masks_of_unlabelled_images_are_never_opened(name, tmp_path, monkeypatch):
    """Nor an unlabelled image by a script that learns from labels alone."""
    root = tiny.draw_tree(tmp_path / "data")
    words = ["--unsup-weight", "0"] if name == "cps_fpl" else []
    for i in UNLABELED:
        (root / f"trainannot/train{i}.png").write_bytes(b"never opened")
        if name in ("supervised", "cps_fpl"):
            (root / f"train/train{i}.jpg").write_bytes(b"never opened")
    train(name, small(name, root, tmp_path / "run", *words, iters=6, pictures=3), monkeypatch)
    if name == "cps_fpl":  # the lines then have what there is
        line = next(line for line in log(tmp_path / "run") if line["kind"] == "train")
        assert list(line)[3:-1] == ["loss", "sup", "pseudo_acc", "coverage"]
        assert line["loss"] == line["sup"] > 0


FLAGS = {
    "": """--lr 0.02|--lr-head 3|--weight-decay 0.1|--decay-on {decay}|--scales 0.5 1|--crop-size 40
        --ohem-kept 0.2|--seed 1|--split 1/2|--split-seed 3|--amp bf16|--batch-size 4
        --total-iters 9""",
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
        --region-area 0.2|--paste-draws 1|--paste-draws 0|--paste-prob 0.5|--ema-decay 0.3
        --paste-not 1 2 3 4 5 6 7 8|--paste-scales 1 2|--teacher-mode eval
        --no-cutmix""",
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
def test_every_flag_has_an_effect_and_two_equal_runs_none(name, tree, tmp_path):
    """The networks after three steps differ from those of every other row."""
    script, found, alone = tiny.script(name), {}, Group(0, 1, torch.device("cpu"))
    base = {"esl": "--eta 0.5", "mean_teacher": "--warmup-iters 0 --seed 2"}
    base["u2pl"] = "--warmup-iters 0"

    def flags(words):
        argv = [*tiny.flags(tree, tmp_path / "run", iters=4), *words.split()]
        return tiny.with_acting(name, argv, f"{tiny.MORE.get(name, '')} {base.get(name, '')}")

    decay = {"all": "weights"}.get(tiny.resolved(script, flags("")).decay_on, "all")
    rows = f"{FLAGS['']}\n{FLAGS.get(name, '')}".format(decay=decay).replace("\n", "|").split("|")
    for words in ["", "  ", *rows]:
        watch = take(script, flags(words), alone, 3, tiny=True, kmeans=True)
        found[words] = digest(watch.networks)
    assert found[""] == found.pop("  ")
    shared = {}
    for words, bits in found.items():
        shared.setdefault(bits, []).append(words)
    assert len(shared) == len(found) > 10, [same for same in shared.values() if len(same) > 1]


HEADS = {"cps_fpl": "CPS", "u2pl": "features", "esl": "features"}  # the others' are alike


@pytest.mark.parametrize("reader", tiny.SCRIPTS)
def test_a_run_starts_from_the_networks_of_any_other(
    reader, finished, tree, tmp_path, monkeypatch, capsys
):
    """Each from the one of its name, or the first; a head that does not fit stays random."""
    argv = small(reader, tree, tmp_path / "zero", iters=1)
    own = watched(reader, argv, monkeypatch).networks
    for writer in tiny.SCRIPTS:
        fits = HEADS.get(writer) == HEADS.get(reader)
        path = finished(writer).out / "best.pt"
        saved = torch.load(path, weights_only=True)
        argv = small(reader, tree, tmp_path / writer, "--init", str(path), iters=1)
        mine = watched(reader, argv, monkeypatch).networks
        words, taken = [], set()
        for name in NETWORKS[reader]:
            source = name if name in NETWORKS[writer] else NETWORKS[writer][0]
            twin = source in taken and name == "branch2"  # a pair of twins never disagrees
            taken.add(source)
            end = "" if fits and not twin else ", head random"
            words.append(f"{name} from its {source}{end}")
            for key, x in mine[name].state_dict().items():
                taken_over = not end or "backbone" in key
                given = saved["networks"][source] if taken_over else own[name].state_dict()
                assert torch.equal(x, given[key]), (writer, name, key)
        line = f"run folder: {tmp_path}/{writer}, starting from {path}, step {saved['step']}: "
        assert line + "; ".join(words) + "\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", tiny.SCRIPTS)
def test_a_folder_of_ones_own_trains_from_a_checkpoint_of_other_classes(
    name, finished, tmp_path, monkeypatch, capsys
):
    """9 is ignored, 1 to 5 occur of 6 classes; there is no test part."""
    root = tiny.draw_folder(tmp_path / "folder", 6, void=9, first=1)
    init = finished(name).out / "best.pt"
    argv = tiny.own_folder(root, tmp_path / "run", 6, iters=2)
    argv = [word for word in argv if word not in ("--weights", "none")]  # --init has them
    argv += ["--ignore-index", "9", "--protocol", "slide", "--init", str(init)]
    train(name, tiny.with_acting(name, argv), monkeypatch)
    assert "head random" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["networks"]
    assert all(net["head.classify.1.weight"].shape[0] == 6 for net in saved.values())
    done = log(tmp_path / "run")[-1]
    assert done["on"] == "val" and len(done["last"]["iou"]) == 6


@pytest.mark.smoke
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_plain_lines_or_a_live_line(terminal, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    train("supervised", small("supervised", tree, tmp_path / "run"), monkeypatch)
    text = capsys.readouterr()
    assert "\r" not in text.out and ("\r" in text.err and "8/8" in text.err) == terminal
    lines = re.findall(r"^step (./8)  loss .* ETA \d+:\d\d:\d\d$", text.out, re.M)
    assert lines == ["2/8", "4/8", "6/8", "8/8"]
    assert re.findall(r"^step (./8)  val mIoU ", text.out, re.M) == ["4/8", "8/8"]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="no tensorboard here")
def test_tensorboard_writes_an_event_file(tree, tmp_path, monkeypatch):
    argv = small("supervised", tree, tmp_path / "run", "--tensorboard")
    train("supervised", argv, monkeypatch)
    (path,) = (tmp_path / "run").glob("events.out.tfevents.*")
    content = path.read_bytes()
    assert b"train/loss" in content and b"eval/miou" in content
