"""Bad input, by kind of the user's mistake: exit code 2, one line, nothing left behind or changed.

One table. Every case is a command line as a user types it, in a folder with small data sets and a
finished run of every script with the tiny network; its words are the thing and the remedy.
"""

import gc
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import prepare_data
import sources
import supervised
import trees
import u2pl
from common import Refusal, run
from common.distributed import Group
from tiny import ROOT, SCRIPTS, draw_tree, flags, resolved, shrink, train
from tiny import script as module_of

TORCHRUN = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID".split()


class Exit(BaseException):
    """Stands for the end of the process."""


class Case(NamedTuple):
    """A mistake: what it is, the script, its flags, words of the line, what else is wrong."""

    name: str
    script: object
    flags: str
    words: str  # of the line, split at blanks; "_" may stand for one
    arrange: object = lambda patch: None  # called with monkeypatch, in the working folder

    @property
    def argv(self):
        """The whole command line: a script's small run, with these flags last."""
        small = flags("data", "out", iters=2, log=1, evaluate=2, save=2)
        return (self.script is not prepare_data) * small + self.flags.split()


# ---- the user's folder ----


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with data, and a run of every script in a folder of its name; supervised.py's: run.

    As draw_tree has it, the images are train0 to train7, val0, val1, test0 and test1.
    """
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_tree(folder / "data")
        for name in SCRIPTS:
            shrink(module_of(name), patch)
            out = "run" if name == "supervised" else name
            train(module_of(name), flags("data", out, iters=2, log=1, evaluate=2, save=2))
    for part in ("train", "val"):  # a data set of one's own
        trees.picture(folder / f"own/images/{part}/{part}.png", "RGB", 0, (48, 36))
        trees.picture(folder / f"own/masks/{part}/{part}.png", "L", 0, (48, 36))
    return folder


@pytest.fixture
def place(stock, tmp_path, monkeypatch):
    """A copy of that folder, the current one: home and temporary folder too."""
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "TMPDIR", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def put(name, content):
    """Arranges a file: bytes, a picture, or anything that torch.save takes."""

    def arrange(patch):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        elif isinstance(content, Image.Image):
            content.save(name)
        else:
            torch.save(content, name)

    return arrange


def cut(name):
    """Arranges that the second half of a file is lost."""
    return lambda patch: os.truncate(name, os.path.getsize(name) // 2)


def gone(name):
    return lambda patch: os.remove(name)


def environ(**variables):
    """Arranges variables of the environment."""
    return lambda patch: [patch.setenv(name, value) for name, value in variables.items()]


def torchrun(**variables):
    """Arranges torchrun's environment of one process, with other values."""
    usual = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost")
    return environ(**usual | {"MASTER_PORT": "29500"} | variables)


def spots(patch):
    """Three pixels of a mask have a value that no class has; row 30, column 7 is the first."""
    with Image.open(MASK) as mask:
        mask.load()
    for xy in ((7, 30), (9, 30), (3, 31)):
        mask.putpixel(xy, 17)
    mask.save(MASK)


class Trap:
    """A pickle that makes a folder where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def changed(change):
    """Arranges that change(content) was made in the run's last.pt."""

    def arrange(patch):
        content = torch.load(LAST, weights_only=True)
        change(content)
        torch.save(content, LAST)

    return arrange


def narrower(content):
    weights = content["networks"]["student"]
    weights["backbone.conv1.weight"] = weights["backbone.conv1.weight"][:4]


def resnet18(**other):
    """Arranges torchvision's resnet18 with other weights as w.pth."""
    state = supervised.torchvision.models.resnet18().state_dict()
    return put("w.pth", state | {f"{name}.weight": x for name, x in other.items()})


def absent(*modules):
    """Arranges that modules are not installed."""
    return lambda patch: [patch.setitem(sys.modules, name, None) for name in modules]


def no_cuda(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def grown(patch):
    """The training images became one more."""
    shutil.copy(IMAGE, "data/train/train8.jpg")
    shutil.copy(MASK, "data/trainannot/train8.png")


def tiff(patch):
    """A TIFF of which half came: its directory stood at the end."""
    path = "own/images/train/b.tif"
    Image.effect_noise((48, 36), 9).convert("RGB").save(path, compression="tiff_lzw")
    put("own/masks/train/b.png", Image.new("L", (48, 36)))(patch)
    cut(path)(patch)


def unlabeled(patch):
    """Unlabelled images are empty, and their masks, which are never opened, are none."""
    for i in (1, 2, 3, 5, 6, 7):
        put(f"data/trainannot/train{i}.png", b"never opened")(patch)
        put(f"data/train/train{i}.jpg", b"")(patch)


def busy(patch):
    """The port of the master is taken."""
    taken = socket.create_server(("", 0))
    patch.setattr(socket, "taken", taken, raising=False)  # open as long as the test
    torchrun(MASTER_PORT=str(taken.getsockname()[1]))(patch)


# ---- the table ----

LIST, LISTED = "--labeled-list list.txt", "list.txt"
OWN = "--dataset folder --data-root own --num-classes 3"
OWN_ALL = f"{OWN} --split all"
MASK, IMAGE = "data/trainannot/train0.png", "data/train/train0.jpg"
EVERY = b"".join(b"train%d\n" % i for i in range(8))
RESUME, LAST, LOG = "--out run --resume", "run/last.pt", "run/log.jsonl"
SCORE, INIT = f"--eval-only --checkpoint {LAST}", f"--init {LAST}"
COCO = "own/annotations/instances_train2017.json"
MAKE = "make-split --dataset camvid --data-root data --out list.txt --labels"
W, NO_WEIGHTS = "--weights w.pth", "--weights_w.pth --weights_FILE --weights_none"
START = "start_with_torchrun"
UNLABELED = "--batch-size-unlabeled"
S, M, CPS, AEL, U2PL, ESL, P = supervised, mean_teacher, cps_fpl, ael_fpl, u2pl, esl, prepare_data

CASES = [
    # ---- the command line; test_recipes.py has ranges and choices of every flag ----
    Case("unknown flag", S, "--bach-size 4", "--bach-size --batch-size"),
    Case("another script's flag", S, "--cutmix", "--cutmix"),
    Case("a flag of old", CPS, "--ohem", "--ohem"),  # --ohem-kept since it is a share
    Case("a word that is no flag", S, "camvid", "camvid"),
    Case("flag without its value", S, "--lr", "--lr"),
    Case("bound without its value", CPS, "--T", "--T"),
    Case("neither yes nor no", CPS, "--strict maybe", "--strict maybe"),
    Case("one value of two", U2PL, "--ranks 3", "--ranks 2_values"),
    Case("no whole number", S, "--total-iters 1e3", "--total-iters 1e3 INT"),
    Case("no number", AEL, "--lr 1,5", "--lr 1,5 FLOAT"),
    Case("misspelt data set", S, "--dataset citiscapes", "citiscapes cityscapes camvid folder"),
    Case("number above its range", CPS, "--T 1.0 --unsup-loss ce", "--T_1.0 from to_0.9999"),
    Case("seed as large as a date", S, "--seed 20240131235959", "--seed_20240131235959 to_"),
    Case("range upside down", S, "--scales 2.0 0.5", "--scales_(2.0,_0.5) rising"),
    Case("range upside down", AEL, "--paste-scales 2.0 0.1", "--paste-scales_(2.0,_0.1) rising"),
    Case("no scale", AEL, "--paste-scales", "--paste-scales_() rising"),
    Case("ranks upside down", U2PL, "--ranks 20 3", "--ranks_(20,_3) the_first_below"),
    Case("equal ranks", U2PL, "--ranks 5 5", "--ranks_(5,_5) the_first_below"),
    Case("no code of ESL", ESL, "--recipe official", "no_code_of_ESL leave_--recipe_out"),
    Case("all classes kept", ESL, "--eta 1", "--eta_1.0 between_0_and_1 --label_soft"),
    Case("no class kept", ESL, "--eta 0", "--eta_0.0 between_0_and_1"),
    Case("batch of one", S, "--batch-size 1", "1_labeled two enlarge_the_batch"),
    Case("one label alone", CPS, "--batch-size 1 --unsup-weight 0", "1_labeled two"),
    Case("one unlabelled", M, f"{UNLABELED} 1", "1_unlabeled two"),
    Case("one unlabelled", AEL, f"{UNLABELED} 1", "1_unlabeled two"),
    Case("one unlabelled", U2PL, f"{UNLABELED} 1 --no-cutmix", "1_unlabeled two"),
    Case("odd batch for CutMix", M, f"--cutmix {UNLABELED} 3", f"--cutmix even_{UNLABELED}"),
    Case("odd batch for CutMix", U2PL, f"{UNLABELED} 3", f"--cutmix even_{UNLABELED}"),
    Case("batch that does not divide", M, "--dry-run --batch-size 6", "6_labelled 4_processes",
         environ(WORLD_SIZE="4")),
    Case("pool beyond the batch", AEL, "--pooled 3", "--pooled_3 2_labelled_images"),
    Case("nothing to paste", AEL, f"--paste-not {' '.join(map(str, range(11)))}",
         "--paste-not 0_to_10 --paste-draws_0"),
    Case("class that is none", AEL, "--paste-not 2 11", "--paste-not 0_to_10"),
    Case("no CUDA", S, "--device cuda", "--device_cuda no_CUDA leave_--device_out", no_cuda),
    Case("no TensorBoard", S, "--tensorboard", "--tensorboard pip_install_tensorboard",
         absent("tensorboard", "torch.utils.tensorboard")),
    Case("scoring nothing", S, "--eval-only", "--eval-only needs_--checkpoint"),
    Case("eval-on without eval-only", S, "--eval-on test", "--eval-on with_--eval-only"),
    Case("checkpoint of no use", S, f"--checkpoint {LAST}", "--checkpoint with_--eval-only --init"),
    # ---- the data; test_data.py and test_sources.py have every damage, layout and list ----
    Case("missing data root", S, "--data-root nowhere", "nowhere no_such_folder --data-root"),
    Case("data root is a file", S, f"--data-root {IMAGE}", f"{IMAGE} no_such_folder --data-root"),
    Case("data root of another data set", S, "--dataset voc --split 92",
         "data no_val_of_voc ImageSets/Segmentation/val.txt"),
    Case("missing image", S, LIST, "list.txt train9_has_no_image data/train/train9.jpg",
         put(LISTED, b"train0\ntrain9\n")),
    Case("missing mask", S, "", f"train0_has_no_mask {MASK}", gone(MASK)),
    Case("damaged image", S, "", f"{IMAGE} not_readable", cut(IMAGE)),
    Case("damaged TIFF", S, OWN_ALL, "own/images/train/b.tif not_readable", tiff),
    Case("damaged unlabelled image", M, "", "data/train/train not_readable", unlabeled),
    Case("stranger in a mask", S, "", f"{MASK} value_17 row_30 column_7 0_to_10", spots),
    Case("image a loader reads", S, "--workers 1", f"{IMAGE} not_readable", cut(IMAGE)),
    Case("mask a loader reads", S, "--workers 1", f"{MASK} 17 row_30 column_7", spots),
    Case("no number of classes", S, "--dataset folder --data-root own", "--num-classes_0 2_to_254"),
    Case("classes of a known data set", S, "--num-classes 11", "--num-classes --dataset_folder"),
    # ---- lists and splits ----
    Case("list that is not there", S, LIST, "list.txt not_a_readable_list No_such_file"),
    Case("empty list", S, LIST, "list.txt an_empty_list", put(LISTED, b"\n  \r\n")),
    Case("list of all images", M, LIST, "no_unlabeled --labeled-list", put(LISTED, EVERY)),
    Case("unlabelled list alone", M, "--unlabeled-list list.txt", "--labeled-list give_both",
         put(LISTED, EVERY)),
    Case("split of another data set", S, "--split 92", "--split_92 all 1/r"),
    Case("split in words", S, "--split half", "--split_half all 1/r"),
    Case("split beyond the images", S, "--split 1/9", "--split_1/9 2_to_8"),
    # ---- run folders ----
    Case("run folder that is there", S, "--out own", "own_exists --resume --out"),
    Case("run folder that is a file", S, "--out note", "note another_--out", put("note", b"mine")),
    Case("resume in a file", S, "--out note --resume", "note --out", put("note", b"mine")),
    Case("run folder below a file", S, "--out note/run", "note --out", put("note", b"mine")),
    *(Case(f"resume with other {flag.split()[0]}", script, f"--out {out} --resume {flag}",
           f"{out}/last.pt {flag.split()[0]}_{words} another_--out")
      for script, out, flag, words in (
          (S, "run", "--lr 0.5", "0.01_there_and_0.5_here"),
          (S, "run", "--seed 1", "0_there_and_1_here"),
          (S, "run", "--total-iters 4", "2_there_and_4_here"),
          (S, "run", "--scales 0.5 1.0", "[0.5,_2.0]_there_and_[0.5,_1.0]_here"),
          (S, "run", "--amp bf16", "none_there_and_bf16_here"),
          (S, "run", "--split 1/2", "1/4_there_and_1/2_here"),
          (S, "run", "--eval-every 1", "2_there_and_1_here"),
          (U2PL, "u2pl", "--bank-sizes 30 20", "[5000,_3000]_there_and_[30,_20]_here"),
          (U2PL, "u2pl", "--bank-dtype bf16", "fp32_there_and_bf16_here"),
          (U2PL, "u2pl", "--unreliable-loss none", "contrastive_there_and_none_here"),
          (U2PL, "u2pl", "--ranks 1 3", "[3,_20]_there_and_[1,_3]_here"))),
    Case("resume without a flag", U2PL, "--out u2pl --resume --no-bank",
         "u2pl/last.pt --bank_True_there_and_False_here"),
    Case("resume with other images", S, RESUME, f"{LAST} other_labeled_images --out", grown),
    Case("resume of a best.pt", S, RESUME, f"{LAST} a_best.pt --init_starts_from_it",
         lambda patch: os.replace("run/best.pt", LAST)),
    Case("resume of half a checkpoint", S, RESUME, f"{LAST} --init_starts_from_it",
         changed(lambda content: content.pop("lists"))),
    Case("log of bytes", S, RESUME, f"{LOG} line_1 move_the_file_away",
         put(LOG, b"\xff\xfe\n{}\n")),
    Case("log of numbers", S, RESUME, f"{LOG} line_1 move_the_file_away", put(LOG, b"3\n4\n")),
    Case("log that is a folder", S, RESUME, f"{LOG} Is_a_directory",
         lambda patch: (os.remove(LOG), os.mkdir(LOG))),
    # ---- checkpoints ----
    *(Case(f"{use}: {what}", script, use, f"{LAST} damaged,_or_no_checkpoint", arrange)
      for script, use in ((S, RESUME), (S, SCORE), (M, INIT))
      for what, arrange in (
          ("half a file", cut(LAST)),
          ("noise", put(LAST, bytes(range(256)) * 16)),
          ("an empty file", put(LAST, b"")),
          ("other content", put(LAST, {"state_dict": {}})),
          ("no flags", changed(lambda content: content.update(args=None))),
          ("a trap", changed(lambda content: content.update(step=Trap()))),
          ("an old trap", put(LAST, pickle.dumps(Trap(), 2))),
          ("a trap of today", put(LAST, pickle.dumps(Trap(), 4))))),
    *(Case(f"{use} {other}", module_of(name), use.format(other),
           f"{other}/last.pt {other}.py {name}.py")
      for use in ("--out {} --resume", "--eval-only --checkpoint {}/last.pt")
      for name, other in zip(SCRIPTS, [*SCRIPTS[1:], "mean_teacher"], strict=True)),
    Case("absent checkpoint", S, "--eval-only --checkpoint no.pt", "no.pt no_such_checkpoint"),
    Case("folder as a checkpoint", S, "--eval-only --checkpoint run", "run no_checkpoint"),
    Case("another network's checkpoint", S, f"{SCORE} --dataset shapes --split 1/16",
         f"{LAST} does_not_fit_these_flags head.classify"),
    Case("absent start", S, "--init no.pt", "no.pt no_such_checkpoint"),
    Case("weights to start from", S, "--init w.pth", "w.pth no_checkpoint_of_these_scripts",
         put("w.pth", {"conv1.weight": torch.zeros(1)})),
    Case("start of another width", M, INIT, f"{LAST} does_not_fit backbone.conv1.weight",
         changed(narrower)),
    Case("start without a layer", M, INIT, f"{LAST} does_not_fit backbone.layer4.0.weight",
         changed(lambda c: c["networks"]["student"].pop("backbone.layer4.0.weight"))),
    # ---- weights ----
    Case("absent weights", S, "--weights no.pth", "--weights_no.pth --weights_FILE --weights_none"),
    Case("weights that are a page", S, W, NO_WEIGHTS, put("w.pth", b"<!doctype html>")),
    Case("weights that are a list", S, W, NO_WEIGHTS, put("w.pth", [1, 2])),
    Case("malicious weights", S, W, NO_WEIGHTS, put("w.pth", {"conv1.weight": Trap()})),
    Case("malicious pickle", S, W, NO_WEIGHTS, put("w.pth", pickle.dumps(Trap(), 4))),
    Case("another network", S, W, "--weights_w.pth keys resnet18 bn1.bias",
         put("w.pth", {"features.0.weight": torch.zeros(64, 3, 3, 3)})),
    Case("a key too many", S, W, "--weights_w.pth layer9", resnet18(layer9=torch.zeros(1))),
    Case("another shape", S, W, "--weights_w.pth conv1", resnet18(conv1=torch.zeros(64, 1, 7, 7))),
    # ---- torchrun's environment ----
    Case("RANK alone", S, "", f"WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT {START}",
         environ(RANK="0")),
    Case("WORLD_SIZE alone", S, "", f"RANK LOCAL_RANK MASTER_ADDR MASTER_PORT {START}",
         environ(WORLD_SIZE="2")),
    Case("no MASTER_ADDR", S, "", f"MASTER_ADDR {START}", torchrun(MASTER_ADDR="")),
    Case("WORLD_SIZE two", S, "", f"WORLD_SIZE {START}", torchrun(WORLD_SIZE="two")),
    Case("WORLD_SIZE two, dry", S, "--dry-run", f"WORLD_SIZE {START}", environ(WORLD_SIZE="two")),
    Case("WORLD_SIZE 0", S, "", f"RANK, WORLD_SIZE {START}", torchrun(WORLD_SIZE="0")),
    Case("RANK zero", S, "", f"RANK {START}", torchrun(RANK="zero")),
    Case("MASTER_PORT http", S, "", f"MASTER_PORT {START}", torchrun(MASTER_PORT="http")),
    Case("MASTER_PORT 99999", S, "", f"MASTER_PORT {START}", torchrun(MASTER_PORT="99999")),
    Case("MASTER_PORT taken", S, "", "MASTER_PORT", busy),
    # ---- prepare_data.py; test_prepare.py has archives that are cut off, damaged or unsafe ----
    Case("no command", P, "", "Expected voc cityscapes camvid check"),
    Case("unknown data set", P, "ade20k", "ade20k voc cityscapes camvid coco"),
    Case("unknown data set to check", P, "check --dataset kitti", "kitti camvid folder"),
    Case("absent archive", P, "voc --root new --from own", "--from_own VOCtrainval https://"),
    Case("half a data set", P, "camvid --root data", "data train:_8_of_367 https://"),
    Case("absent root", P, "camvid --root nowhere", "nowhere no_such_folder https://"),
    Case("absent annotations", P, "coco --root own", f"{COCO} no_such_file https://"),
    Case("other annotations", P, "coco --root own", f"{COCO} https://", put(COCO, b"[1, 2]")),
    Case("no such folder of lists", P, "splits --family cps --from nowhere",
         "--from_nowhere no_such_folder"),
    Case("list that is there", P, f"{MAKE} 2", "--out_list.txt exists give_another",
         put(LISTED, b"mine")),
    Case("more labels than images", P, f"{MAKE} 9", "--labels_9 1_to_8"),
    Case("chart that is no PNG", P, "stats --dataset camvid --data-root data --out chart.jpg",
         "--out_chart.jpg .png"),
]  # fmt: skip


def everything(folder):
    """Returns all that a folder holds: {path: content of a file, or None}."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def arranged(case, patch, place):
    """Puts all in place for a case, in the working folder; returns what is there then."""
    if case.script is not prepare_data and "--weights" not in case.flags:
        shrink(case.script, patch)
    case.arrange(patch)
    return everything(place)


def judge(case, code, text):
    """Asserts code 2 and one line with the case's words."""
    (line,) = text.splitlines()
    assert code == 2 and line.startswith(f"{Path(case.script.__file__).name}: ")
    words = [word for word in case.words.split() if word not in line]
    assert [word for word in words if word.replace("_", " ") not in line] == [], line
    assert "weights_only" not in line  # nobody is told to trust a malicious file


class System:
    """Stands for os in common/run.py alone: loader processes need the real os._exit."""

    def __getattr__(self, name):
        return getattr(os, name)

    def _exit(self, code):
        raise Exit(code)


def ended(module, argv, monkeypatch, capfd):
    """Runs a script in this process; returns its exit code and all that it says on stderr."""
    capfd.readouterr()
    gc.freeze()  # what was there before need not be looked through
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")  # a process of its own would print them
        patch.setattr(run, "os", System())
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds
        patch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        with pytest.raises(Exit) as stop:
            if module is prepare_data:
                run.refusing(prepare_data.main)
            else:
                run.launch(module.Args, module.preset, module.main)
        gc.collect()  # ends loader processes that the traceback kept
    gc.unfreeze()
    said = [f"warning: {w.message}\n" for w in warned if w.category is not ResourceWarning]
    return *stop.value.args, capfd.readouterr().err + "".join(said)


def parameter(case):
    """Returns a case as pytest takes it."""
    name = f"{Path(case.script.__file__).stem}: {case.name}"
    return pytest.param(case, id=name, marks=[pytest.mark.smoke] * ("a loader reads" in name))


@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
def test_a_mistake_is_refused_in_one_line_and_changes_nothing(case, place, monkeypatch, capfd):
    before = arranged(case, monkeypatch, place)
    judge(case, *ended(case.script, case.argv, monkeypatch, capfd))
    assert everything(place) == before


def test_the_page_counts_them():
    assert f"a catalogue of {len(CASES)} mistakes" in (ROOT / "docs/reliability.md").read_text()


@pytest.mark.parametrize("name", ["image a loader reads", "absent archive"])
def test_so_it_is_as_a_process(name, place, monkeypatch):
    (case,) = (case for case in CASES if case.name == name)
    before = arranged(case, monkeypatch, place)
    command = [sys.executable, "-B", case.script.__file__, *case.argv]
    done = subprocess.run(command, capture_output=True, text=True)
    judge(case, done.returncode, done.stderr)
    assert everything(place) == before


def test_the_trap_springs_where_all_is_unpickled(place):
    torch.save({"step": Trap()}, "trap.pt")
    torch.load("trap.pt", weights_only=False)
    assert Path("sprung").is_dir()


@pytest.mark.smoke
def test_a_wrong_flag_is_refused_in_one_line_of_any_length(monkeypatch, capfd):
    name = "--" + "a-very-long-flag-name-" * 12  # tyro's box would break the line here
    code, text = ended(supervised, [name, "1"], monkeypatch, capfd)
    assert code == 2 and text.count("\n") == 1
    assert name.strip("-")[:40] in text and "│" not in text and "╭" not in text


# ---- what needs more than a line ----


def test_an_image_cut_at_any_byte_is_read_or_refused_and_nothing_else(tmp_path):
    tree = draw_tree(tmp_path / "data", train=2, val=1, test=0)
    images = sources.load(resolved(supervised, [*flags(tree, "out"), "--split", "all"]))
    for path in (tree / "train/train0.jpg", tree / "trainannot/train0.png"):
        whole = path.read_bytes()
        kept = 0
        for size in range(0, len(whole), 3):
            path.write_bytes(whole[:size])
            try:
                images.read(images.labeled[0], True)
                kept += 1
            except Refusal as error:
                assert path.name in str(error) and "\n" not in str(error)
        assert kept < 10, f"{path.name}: {kept} truncated files were read as whole"
        path.write_bytes(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_late_leaves_the_run_folder_whole(workers, tmp_path, monkeypatch, capfd):
    shrink(supervised, monkeypatch)
    tree, out = draw_tree(tmp_path / "data"), tmp_path / "out"
    cut(tree / "testannot/test1.png")(monkeypatch)  # opened after the last step only
    code, text = ended(supervised, flags(tree, out, workers=workers), monkeypatch, capfd)
    assert code == 2 and text.count("\n") == 1
    assert "testannot/test1.png" in text and "readable" in text
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 8
    assert not list(out.glob("*.tmp"))
    train(supervised, flags(draw_tree(tmp_path / "whole"), out) + ["--resume"])
    assert '"kind": "done"' in (out / "log.jsonl").read_text()


@pytest.mark.smoke
def test_a_batch_that_does_not_divide_over_the_processes_is_refused(tmp_path):
    argv = flags(draw_tree(tmp_path / "data"), "out") + ["--batch-size", "6"]
    args = resolved(mean_teacher, argv)
    images = sources.load(args)
    for name in ("labeled", "unlabeled"):
        for rank, world, words in (
            (0, 4, rf"^6 {name} .*\b4 processes"),
            (0, 6, f"^1 {name} .*BN"),
        ):
            with pytest.raises(Refusal, match=words):
                group = Group(rank, world, torch.device("cpu"))
                mean_teacher.open_stream(name, images, args, group, 0)
        third = mean_teacher.open_stream(name, images, args, Group(2, 3, torch.device("cpu")), 0)
        assert len(next(third)["image"]) == 2
