"""Bad input, by kind of the user's mistake: exit code 2, one line, nothing left behind or changed.

One table. Every case is a command line as a user types it, in a folder with small data sets and a
finished run of every script with the tiny network; its words are the thing and the remedy.
"""

import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import prepare_data
import trees
from common import checkpoints, distributed, run
from tiny import SCRIPTS, draw_tree, flags, shrink, train
from tiny import script as module_of

S, M, CPS, AEL, U2PL, U2PL_AEL, ESL, UNI, V2 = map(module_of, SCRIPTS[:9])
P = prepare_data


class Case(NamedTuple):
    """A mistake: what it is, the script, its flags, words of the line, what else is wrong."""

    name: str
    script: object
    flags: str
    words: str  # of the line, split at blanks; "_" may stand for one
    arrange: object = lambda patch: None  # called with monkeypatch, in the working folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with data, and a run of every script in a folder of its name (supervised: run)."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_tree(folder / "data")
        for name in SCRIPTS:
            shrink(module_of(name), patch)
            out = "run" if name == "supervised" else name
            train(module_of(name), flags("data", out, iters=2, log=1, evaluate=2, save=2))
    (folder / "own/mine").mkdir(parents=True)  # a folder of something else
    return folder


@pytest.fixture
def place(stock, tmp_path, monkeypatch):
    """A copy of that folder, the current one: home and temporary folder too."""
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "TMPDIR", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def put(name, content):
    """Arranges a file: bytes, or anything that torch.save takes."""

    def arrange(patch):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            torch.save(content, name)

    return arrange


def environ(**variables):
    """Arranges variables of the environment."""
    return lambda patch: [patch.setenv(name, value) for name, value in variables.items()]


class Trap:
    """A pickle that makes a folder where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def changed(change, path="run/last.pt"):
    """Arranges that change(content) was made in a checkpoint."""

    def arrange(patch):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return arrange


def busy(patch):
    """The port of the master is taken."""
    taken = socket.create_server(("", 0))
    patch.setattr(socket, "taken", taken, raising=False)  # open as long as the test
    process = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost")
    environ(**process, MASTER_PORT=str(taken.getsockname()[1]))(patch)


def eight(patch):
    """This is the first of eight processes."""
    patch.setattr(distributed, "setup", lambda _: distributed.Group(0, 8, torch.device("cpu")))
    for script in map(module_of, SCRIPTS):
        patch.setattr(script, "parallel", lambda net, *_: net)


MASK, IMAGE = "data/trainannot/train0.png", "data/train/train0.jpg"
RESUME, LAST, LOG = "--out run --resume", "run/last.pt", "run/log.jsonl"
SCORE, INIT = f"--eval-only --checkpoint {LAST}", f"--init {LAST}"
MAKE = "make-split --dataset camvid --data-root data --out list.txt --labels"
RESNET18 = S.torchvision.models.resnet18().state_dict()
W, NO_WEIGHTS = "--weights w.pth", "--weights_w.pth --weights_FILE --weights_none"

CASES = [
    Case("unknown flag", S, "--bach-size 4", "--bach-size --batch-size"),
    Case("seed", S, f"--seed {2**32}", "--seed_4294967296: from_0_to_4294967295"),
    Case("one value of two", U2PL, "--ranks 3", "--ranks 2_values"),
    *(Case(f"share {value}", S, f"--ohem-kept {value}",
           f"--ohem-kept_{value}:_a_number_from_0_to_1") for value in ("-0.1", "1.0001", "nan")),
    Case("second of two", CPS, "--T 0.2 1.0", "--T_1.0:_a_number_from_1e-12_to_0.9999"),
    Case("no such backbone", S, "--backbone resnet19", "--backbone_resnet19: resnet18 timm/NAME"),
    Case("no timm", S, "--backbone timm/resnet18 --weights none", "pip_install_timm",
         lambda patch: patch.setitem(sys.modules, "timm", None)),
    Case("range upside down", S, "--scales 2.0 0.5", "--scales_(2.0,_0.5) rising"),
    Case("no code of ESL", ESL, "--recipe official", "no_code_of_ESL leave_--recipe_out"),
    *(Case(f"8 processes{how}: {words}", script, f"--batch-size 8{how} {words}", line, arrange)
      for how, arrange in ((" --dry-run", environ(WORLD_SIZE="8")), ("", eight))
      for script, words, line in (
          (S, "--batch-size 20", "20_label 8_processes"),
          (CPS, "--batch-size 16 --batch-size-unlabeled 20", "20_unlabel 8_processes"),
          *((script, f"{words} --batch-size-unlabeled 8", "CutMix even_--batch-size-unlabeled")
            for script, words in ((M, "--cutmix"), (U2PL, ""), (ESL, ""), (UNI, ""), (V2, ""))),
          *((script, "--batch-size-unlabeled 8 --pooled 2", "--pooled_2: 1_labelled")
            for script in (AEL, U2PL_AEL)))),
    Case("all classes of a label", ESL, "--label topk --top-k 11", "--top-k_11: below_11"),
    *(Case("nothing to paste", script, f"--paste-not {' '.join(map(str, range(11)))}",
           "--paste-not 0_to_10 --paste-draws_0") for script in (AEL, U2PL_AEL)),
    *(Case("equal ranks", script, "--ranks 3 3", "--ranks_(3,_3):_rising,_none_twice")
      for script in (U2PL, U2PL_AEL)),
    Case("one image for BN", S, "--batch-size 1", "1_labeled_image plain_BN_needs_two"),
    Case("no CUDA", S, "--device cuda", "--device_cuda no_CUDA leave_--device_out",
         lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False)),
    Case("no TensorBoard", S, "--tensorboard", "--tensorboard pip_install_tensorboard",
         lambda patch: patch.setitem(sys.modules, "tensorboard", None)),
    Case("eval-on without eval-only", S, "--eval-on test", "--eval-on with_--eval-only"),
    *(Case(f"eval-only with {words}", script, f"{SCORE} {words}",
           f"{names} of_no_use_with_--eval-only")
      for script, words, names in (
          (S, "--init no.pt --resume --out r9 --lr 0.5 --lr-head 1 --weight-decay 0",
           "--out,_--resume,_--init,_--lr,_--lr-head,_--weight-decay:"),
          (S, "--log-every 1 --eval-every 1 --save-every 1 --pictures-every 1 --total-iters 7",
           "--log-every,_--eval-every,_--save-every,_--pictures-every:"),
          (S, "--tensorboard --track trackio --compile --decay-on all",
           "--compile,_--tensorboard,_--track,_--decay-on:"),
          (CPS, "--weights none --weights-2 none --evaluate mean", "--weights,_--weights-2:"))),
    Case("mask a loader reads", S, "--workers 1", f"{MASK} 17 row_0 column_0",
         lambda patch: trees.picture(Path(MASK), "L", 17, (48, 36))),
    Case("partner", AEL, "--seed 1", "data/train/train not_readable_as_an_image",  # in no batch yet
         lambda patch: [os.truncate(f"data/train/train{i}.jpg", 200) for i in (5, 6)]),
    Case("list of all images", M, "--labeled-list list.txt", "no_unlabeled --labeled-list",
         put("list.txt", b"".join(b"train%d\n" % i for i in range(8)))),
    Case("below a file", S, f"--out {LOG}/new", f"{LOG}: a_file,_no_folder --out"),
    Case("run folder that is there", S, "--out own", "own_exists --resume --out"),
    Case("resume with other scales", S, f"{RESUME} --scales 0.5 1.0",
         f"{LAST} --scales_(0.5,_2.0)_there_and_(0.5,_1.0)_here another_--out"),
    Case("resume with other images", S, RESUME, f"{LAST} other_labeled_images --out",
         lambda patch: (os.remove(IMAGE), os.remove(MASK))),
    Case("resume of a best.pt", S, RESUME, f"{LAST} a_best.pt --init_starts_from_it",
         lambda patch: os.replace("run/best.pt", LAST)),
    Case("log of bytes", S, RESUME, f"{LAST} log.jsonl is_not_the_log --out --init",
         put(LOG, b"\xff\xfe\n{}\n")),
    *(Case(f"{use}: {what}", script, use, f"{LAST} damaged,_or_no_checkpoint", arrange)
      for script, use in ((S, RESUME), (S, SCORE), (M, INIT))
      for what, arrange in (
          ("half a file", lambda patch: os.truncate(LAST, 9999)),
          ("a trap", changed(lambda content: content.update(step=Trap()))))),
    *(Case(f"resume: {what}", U2PL, "--out u2pl --resume", f"u2pl/last.pt {what.replace(' ', '_')}",
           changed(change, "u2pl/last.pt"))
      for what, change in (
          ("optimizer is not", lambda content: content["optimizer"]["param_groups"].pop()),
          ("a momentum of shape (1,)", lambda content: content["optimizer"]["state"][0].update(
              momentum_buffer=torch.zeros(1))),
          ("state is not", lambda content: content["state"].pop("bank")),
          ("state bank is not", lambda content: content["state"].update(bank=torch.zeros(1))),
          ("step 13 of 2", lambda content: content.update(step=13)),
          ("best is not that of a run", lambda content: content["best"].update(step=3)),
          ("best is not valid for resuming", lambda content: content["best"].pop("step")),
          ("its meter is not valid", lambda content: content.update(meter=torch.zeros(2, 2))),
          ("holds no network 'teacher'", lambda content: content["networks"].pop("teacher")),
          ("of teacher is torch.float64", lambda content: content["networks"].update(
              teacher={key: x.double() for key, x in content["networks"]["teacher"].items()})),
          ("meter is not valid", lambda content: content.update(meter=[0.0])))),
    *(Case(f"resume {other}", module_of(name), f"--out {other} --resume",
           f"{other}/last.pt {other}.py {name}.py")
      for name, other in zip(SCRIPTS, [*SCRIPTS[1:], "mean_teacher"], strict=True)),
    Case("score mean_teacher", S, "--eval-only --checkpoint mean_teacher/last.pt",
         "by_mean_teacher.py,_not_by_supervised.py"),
    Case("absent checkpoint", S, "--eval-only --checkpoint no.pt", "no.pt no_such_checkpoint"),
    *(Case(f"{use} other classes", S, use, f"{LAST} class_0_is_building_there_and_sky_here",
           changed(lambda content: content["classes"][0].__setitem__(1, "building")))
      for use in (RESUME, SCORE)),
    Case("another network's checkpoint", S, f"{SCORE} --aux-weight 0.4",
         f"{LAST} does_not_fit_these_flags head.aux"),
    Case("weights that are a page", S, W, NO_WEIGHTS, put("w.pth", b"<!doctype html>")),
    Case("malicious weights", S, W, NO_WEIGHTS, put("w.pth", {"conv1.weight": Trap()})),
    Case("safetensors", S, "--weights w.safetensors", "w.safetensors keys_do_not_fit conv1",
         lambda patch: pytest.importorskip("safetensors.torch").save_file(
             RESNET18 | {"conv1.weight": torch.zeros(1)}, "w.safetensors")),
    Case("another shape", S, W, "--weights_w.pth conv1",
         put("w.pth", RESNET18 | {"conv1.weight": torch.zeros(64, 1, 7, 7)})),
    *(Case(f"weights of stem {other}", S, f"{W} --stem {stem}",
           f"--weights_w.pth keys_do_not_fit_resnet18 is_it_--stem_{other}?",
           put("w.pth", {first: torch.zeros(channels, 3, 3, 3)}))
      for other, stem, first, channels in (
          ("classic", "deep", "conv1.weight", 64),
          ("deep", "v1c", "conv1.0.weight", 64),
          ("v1c", "classic", "stem.0.weight", 32))),
    *(Case(words, script, f"--unsup-loss fpl {words}", line)
      for script in (CPS, AEL, UNI, V2)
      for words, line in (("--T 0.8 0.9 --fused on", "--fused_on twin"),
                          ("--T 0.9 0.9", "--T_(0.9,_0.9):_rising,_none_twice"),
                          ("--T 0.9 0.8", "rising"))),
    Case("several T and n", CPS, "--T 0.8 0.9 --k-strategy n", "--k-strategy_n-1"),
    *(Case(words, V2, words, line) for words, line in (
        ("--precise-bn 5", "--precise-bn: there_is_no_BN"),
        ("--backbone resnet18", "--backbone dinov2_vits14"))),
    Case("no process", S, "--dry-run", "WORLD_SIZE_0 start_with_torchrun", environ(WORLD_SIZE="0")),
    Case("numbers too large", S, "", "RANK,_WORLD_SIZE,_MASTER_PORT_not_set",
         environ(RANK="0", WORLD_SIZE="0", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="65536")),
    Case("WORLD_SIZE alone", S, "", "RANK LOCAL_RANK MASTER_ADDR MASTER_PORT start_with_torchrun",
         environ(WORLD_SIZE="2")),
    Case("MASTER_PORT taken", S, "", "MASTER_PORT", busy),
    *(Case(line, P, line, words) for line, words in (
        ("check --dataset folder --crop-size 0", "--crop-size_0: from_1_to"),
        ("stats --dataset camvid --split 1/2 --split-seed -1", "--split-seed_-1: from_0_to"),
        ("check --dataset folder --num-classes -1", "--num-classes_-1: from_0_to"),
        ("make-split --dataset camvid --out l --labels 0", "--labels_0: from_1_to"),
        ("make-split --dataset camvid --out l --labels 1 --seed -1", "--seed_-1: from_0_to"),
        ("cache --dataset camvid --out c --max-gb 0", "--max-gb_0.0: from_1e-12"),
        ("stats --dataset voc_aug --split-family cps", "or_folder_and_--split_other"),
        ("check --dataset voc --split 1/8 --split-family cps --split-seed 0", "no_--split-seed"),
        ("check --dataset camvid --split-seed 1", "--split-seed_1_does_nothing needs_--split"),
        ("stats --dataset voc --split 1/8 --split-seed 1 --labeled-list l", "no_--labeled-list"),
        ("cache --dataset shapes --out c", "--dataset_shapes it_needs_no_cache"),
        ("stats --dataset camvid --data-root data --out run", "--out_run: a_new_file,_with_.png"),
        ("check --dataset shapes --data-root d", "--data-root_d it_needs_--dataset"),
        ("splits --family unimatch --dataset cityscapes", "unimatch: no_list_of_cityscapes"),
        ("splits --family cps --from absent", "--from_absent: no_such_folder"),
        ("coco --root data", "instances_train2017.json: no_such_file https://"),
        ("voc --root new --from own", "--from_own VOCtrainval https://"),
        ("camvid --root absent", "absent: no_such_folder https://"),
        ("camvid --root data", "data train:_8_of_367 https://"))),
    Case("list that is there", P, f"{MAKE} 2", "--out_list.txt exists give_another",
         put("list.txt", b"mine")),
]  # fmt: skip


def everything(folder):
    """Returns all that a folder holds: {path: content of a file, or None}."""
    found = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    out = folder / "out"
    if [*out.glob("*")] == [out / "lock"]:  # nothing yet but its lock: free for the next start
        del found[out], found[out / "lock"]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.script.__name__}: {case.name}")
def test_a_mistake_is_refused_in_one_line_and_changes_nothing(
    case, place, monkeypatch, capfd, recwarn
):
    argv = case.flags.split()
    if "--eval-only" in argv:
        argv = ["--device", "cpu", *argv]
    elif case.script is not P:
        argv = [*flags("data", "out", iters=2, log=1, evaluate=2, save=2), *argv]
    if case.script is not P and "--weights" not in argv:
        shrink(case.script, monkeypatch)
    case.arrange(monkeypatch)
    monkeypatch.setattr(run, "os", SimpleNamespace(**vars(os) | {"_exit": sys.exit}))
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds
    monkeypatch.setattr(sys, "argv", [case.script.__file__, *argv])
    before = everything(place)
    with pytest.raises(SystemExit, match="^2$"), run.refusals():
        P.main() if case.script is P else train(case.script, argv)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{Path(case.script.__file__).name}: ")
    assert [word for word in case.words.split() if word not in line.replace(" ", "_")] == [], line
    assert "weights_only" not in line  # nobody is told to trust a malicious file
    assert "│" not in line and everything(place) == before
    # a process of its own would print them
    seen = [warning for warning in recwarn if "fork()" not in str(warning.message)]  # Python 3.12
    assert {warning.category for warning in seen} <= {ResourceWarning}


def test_classes_of_other_names_are_refused_or_their_head_stays_random(tmp_path):
    there, here = (torch.nn.ModuleDict({"head": torch.nn.Linear(4, 2)}) for _ in range(2))
    saved = dict(script="supervised.py", args={}, step=3, networks={"student": there.state_dict()})
    saved["classes"] = [[0, "road", [0, 0, 0]], [1, "car", [0, 0, 0]]]
    torch.save(saved, tmp_path / "last.pt")
    for names in (["car", "road"], ["class 0", "class 1"], ["road", "car"]):
        data, fits = SimpleNamespace(classes=names, named=list), names == ["road", "car"]
        said = checkpoints.load_init(tmp_path / "last.pt", {"student": here}, data)
        why = ", head random (other classes)" * (not fits)
        assert said.endswith(f"student from its student{why}")
        assert torch.equal(here["head"].weight, there["head"].weight) == fits
    unnamed = SimpleNamespace(classes=["class 0", "class 1"])  # these may be any
    checkpoints.check_classes(saved, unnamed)


def test_a_dry_run_says_how_many_images_a_process_has(place, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for words, found in ("--batch-size-unlabeled 4", ["2", "1"]), ("--unsup-weight 0", ["2"]):
        train(CPS, [*flags("data", "", batch=8), *words.split(), "--dry-run"])
        assert re.findall("labelled per process +(.*)", capsys.readouterr().out) == found
