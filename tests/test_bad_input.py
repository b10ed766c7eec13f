"""Bad input, by kind of the user's mistake: exit code 2, one line, nothing left behind or changed.

One table. Every case is a command line as a user types it, in a folder with small data sets and two
finished runs of the tiny network; its words are the thing and the remedy. Three of the cases run as
processes of their own too. tests/test_refusals.py has more of the flags.
"""

import hashlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from test_prepare import REST, TRAIN, VAL, entry, tar_of, voc_files

import ael_fpl
import cps_fpl
import mean_teacher
import prepare_data
import supervised
import u2pl
from common import run
from common.data import SPLITS
from tests.helpers import ROOT, draw_tree, flags, shrink, snapshot, train

TORCHRUN = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RESTART_COUNT".split()
ENV = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what torchrun sets
ENV |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


class Exit(BaseException):
    """Stands for the end of the process."""


class Case(NamedTuple):
    """A mistake: what it is, the script, its flags, words of the line, what else is wrong."""

    name: str
    script: object
    flags: str
    words: str  # of the line, split at blanks; "_" may stand for one
    arrange: object = None  # called with monkeypatch, in the working folder
    environ: dict = {}

    @property
    def argv(self):
        """The whole command line: a script's small run, with these flags last."""
        small = flags("data", "out", iters=2, log=1, evaluate=2, save=2, workers=0)
        return (self.script is not prepare_data) * small + self.flags.split()


# ---- the user's folder ----


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with data, a run of supervised.py and one of mean_teacher.py."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_tree(folder / "data")
        for module, out in ((supervised, "run"), (mean_teacher, "mt")):
            shrink(module, patch)
            train(module, flags("data", out, iters=2, log=1, evaluate=2, save=2))
    for part in ("train", "val"):  # a data set of one's own
        for kind, where in (("RGB", "images"), ("L", "masks")):
            path = folder / f"own/{where}/{part}/{part}.png"
            path.parent.mkdir(parents=True)
            Image.new(kind, (48, 36)).save(path)
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
    """Arranges a file: bytes, text, a picture, or anything that torch.save takes."""

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


def moved(name, other):
    return lambda patch: os.replace(name, other)


def spot(patch):
    """One pixel of a mask has a value that no class has."""
    path = "data/trainannot/train0.png"
    with Image.open(path) as mask:
        mask.load()
    mask.putpixel((7, 30), 17)
    mask.save(path)


class Trap:
    """A pickle that makes a folder where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def trapped(patch):
    """A checkpoint that looks right, and is a trap."""
    torch.save(torch.load("run/last.pt", weights_only=True) | {"step": Trap()}, "run/last.pt")


def changed(drop="", **more):
    """Arranges a checkpoint with other content, or without one thing."""

    def arrange(patch):
        content = torch.load("run/last.pt", weights_only=True) | more
        content.pop(drop, None)
        torch.save(content, "run/last.pt")

    return arrange


def no_cuda(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def no_tensorboard(patch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        patch.setitem(sys.modules, name, None)


def voc(patch):
    """A tree of VOC in miniature, whose family cac1 has one split alone."""
    keys = {"train": [f"2007_00000{i}" for i in range(4)], "val": ["2008_000001"]}
    sets, one = {part: entry(some) for part, some in keys.items()}, entry(keys["train"][:1])
    patch.setitem(SPLITS, "voc", {"parts": sets, "cac1": {"92": one}})
    put("list.txt", "\n".join(keys["train"][:2]).encode())(patch)
    for part, some in {"train_aug": keys["train"], "val": keys["val"]}.items():
        put(f"voc/ImageSets/Segmentation/{part}.txt", "\n".join(some).encode())(patch)
        for key in some:
            put(f"voc/JPEGImages/{key}.jpg", Image.new("RGB", (48, 36)))(patch)
            put(f"voc/SegmentationClassAug/{key}.png", Image.new("L", (48, 36)))(patch)


def grown(patch):
    """The training images became one more."""
    shutil.copy(IMAGE, "data/train/train8.jpg")
    shutil.copy(MASK, "data/trainannot/train8.png")


def tiff(patch):
    """A TIFF of which half came: its directory stood at the end."""
    image, path = Image.effect_noise((48, 36), 9).convert("RGB"), "own/images/train/b.tif"
    image.save(path, compression="tiff_lzw")
    put("own/masks/train/b.png", Image.new("L", (48, 36)))(patch)
    cut(path)(patch)


def other_voc(patch):
    """Both of VOC's archives in miniature, and a folder with another mask than theirs."""
    *files, _ = voc_files()
    parts = {"train": entry([*TRAIN, *REST]), "val": entry(VAL)}
    patch.setitem(SPLITS, "voc", {"parts": parts, "cps": {"1464": entry(TRAIN)}})
    Path("from").mkdir()
    paths = [tar_of(Path("from") / n, f) for n, f in zip(prepare_data.ARCHIVES, files, strict=True)]
    sums = {p.name: ("https://none", hashlib.md5(p.read_bytes()).hexdigest()) for p in paths}
    patch.setattr(prepare_data, "ARCHIVES", sums)
    put(f"voc/SegmentationClass/{TRAIN[0]}.png", b"mine")(patch)


def zipped(*names, harm=None):
    """Arranges Cityscapes' zip of images with these members; harm: changes its bytes."""

    def arrange(patch):
        with io.BytesIO() as file:
            with zipfile.ZipFile(file, "w") as opened:
                for name in names:
                    opened.writestr(name, b"stored as it is")
            content = bytearray(file.getvalue())
        if harm:
            content = harm(content)
        put("cs/leftImg8bit_trainvaltest.zip", bytes(content))(patch)

    return arrange


def flipped(content):
    content[content.rindex(b"stored as it is")] ^= 1
    return content


def archives(patch):
    """Both of VOC's archives, cut off: their sums are those of the whole ones."""
    for name in prepare_data.ARCHIVES:
        put(f"from/{name}", b"the first half")(patch)


def busy(patch):
    """The port of the master is taken."""
    taken = socket.create_server(("", 0))
    patch.setattr(socket, "taken", taken, raising=False)  # open as long as the test
    patch.setenv("MASTER_PORT", str(taken.getsockname()[1]))


LIST = "--labeled-list list.txt"
OWN = "--dataset folder --data-root own --num-classes 3"
MASK, IMAGE = "data/trainannot/train0.png", "data/train/train0.jpg"
EVERY = b"".join(b"train%d\n" % i for i in range(8))
HTML = b"<!doctype html><html><body>404: not here</body></html>"
RESUME = "--out run --resume"
SCORE = "--eval-only --checkpoint run/last.pt"
CITY = "leftImg8bit/train/a/a_000000_000000_leftImg8bit.png"
ZIP = "cs/leftImg8bit_trainvaltest.zip"
PICKLE, PICKLE4 = (pickle.dumps(Trap(), protocol) for protocol in (2, 4))
S, M, P = supervised, mean_teacher, prepare_data

CASES = [
    # ---- the command line ----
    Case("unknown flag", S, "--bach-size 4", "--bach-size --batch-size"),
    Case("another script's flag", S, "--cutmix", "--cutmix"),
    Case("a word that is no flag", S, "camvid", "camvid"),
    Case("flag without its value", S, "--lr", "--lr"),
    Case("misspelt data set", S, "--dataset citiscapes", "citiscapes cityscapes camvid folder"),
    Case("misspelt recipe", cps_fpl, "--recipe offical", "offical paper official"),
    Case("misspelt loss", u2pl, "--unreliable-loss contrast", "contrast contrastive binary none"),
    Case("no whole number", S, "--total-iters 1e3", "--total-iters 1e3 INT"),
    Case("no number", ael_fpl, "--lr 1,5", "--lr 1,5 FLOAT"),
    Case("number below its range", S, "--workers -1", "--workers_-1 from_0"),
    Case("number above its range", cps_fpl, "--T 1.0", "--T_1.0 from to_0.9999"),
    Case("share above 1", u2pl, "--ema-decay 99", "--ema-decay_99 to_1"),
    Case("not a number", ael_fpl, "--unsup-weight nan", "--unsup-weight_nan from_0"),
    Case("crop of nothing", S, "--crop-size 0", "--crop-size_0 from_1"),
    Case("seed as large as a date", S, "--seed 20240131235959", "--seed_20240131235959 to_"),
    Case("range upside down", S, "--scales 2.0 0.5", "--scales (2.0,_0.5) rising"),
    Case("batch of one", S, "--batch-size 1", "1_labeled two enlarge_the_batch"),
    Case("odd batch for CutMix", M, "--cutmix --batch-size-unlabeled 3",
         "--cutmix even_--batch-size-unlabeled"),
    Case("odd batch for CutMix", u2pl, "--batch-size-unlabeled 3",
         "--cutmix even_--batch-size-unlabeled"),
    Case("batch that does not divide", M, "--dry-run --batch-size 6", "6_labelled 4_processes",
         environ={"WORLD_SIZE": "4"}),
    Case("no CUDA", S, "--device cuda", "--device_cuda leave_--device_out", no_cuda),
    Case("no TensorBoard", S, "--tensorboard", "pip_install_tensorboard", no_tensorboard),
    Case("scoring nothing", S, "--eval-only", "--eval-only needs_--checkpoint"),
    Case("eval-on without eval-only", S, "--eval-on test", "--eval-on with_--eval-only"),
    Case("checkpoint of no use", S, "--checkpoint run/last.pt", "--checkpoint --eval-only --init"),
    # ---- the data ----
    Case("missing data root", S, "--data-root nowhere", "nowhere no_such_folder --data-root"),
    Case("data root is a file", S, f"--data-root {IMAGE}", f"{IMAGE} no_such_folder --data-root"),
    Case("data root of another data set", S, "--dataset voc --split 92",
         "data no_val_of_voc ImageSets/Segmentation/val.txt"),
    Case("missing image", S, LIST, "list.txt train9_has_no_image data/train/train9.jpg",
         put("list.txt", b"train0\ntrain9\n")),
    Case("missing mask", S, "", f"train0_has_no_mask {MASK}", gone(MASK)),
    Case("missing mask of val", S, "", "val1_has_no_mask data/valannot/val1.png",
         gone("data/valannot/val1.png")),
    Case("damaged image", S, "", f"{IMAGE} not_readable", cut(IMAGE)),
    Case("image that is a page", S, "", f"{IMAGE} not_readable", put(IMAGE, HTML)),
    Case("damaged TIFF", S, f"{OWN} --split all", "own/images/train/b.tif not_readable", tiff),
    Case("damaged mask", S, "", f"{MASK} not_readable", cut(MASK)),
    Case("mask of another size", S, "", f"{MASK} 40x36 48x36 {IMAGE}",
         put(MASK, Image.new("L", (40, 36)))),
    Case("stranger in a mask", S, "", f"{MASK} value_17 row_30 column_7 0_to_10", spot),
    Case("coloured mask", S, "", f"{MASK} RGB 8-bit class_ids",
         put(MASK, Image.new("RGB", (48, 36)))),
    Case("16-bit mask", S, "", f"{MASK} I;16 8-bit", put(MASK, Image.new("I;16", (48, 36)))),
    Case("16-bit image", S, f"{OWN} --split all", "own/images/train/train.png I;16 8_bits",
         put("own/images/train/train.png", Image.new("I;16", (48, 36)))),
    Case("one image in train and val", S, f"{OWN} --split all", "own/images/val/val.png in_val",
         put("own/train.txt", b"images/val/val.png masks/val/val.png\n")),
    Case("no number of classes", S, "--dataset folder --data-root own", "--num-classes 2_to_254"),
    Case("classes of a known data set", S, "--num-classes 11", "--num-classes --dataset_folder"),
    Case("ignored value of no mask", S, f"{OWN} --ignore-index 256", "--ignore-index_256 0_to_255"),
    # ---- lists and splits ----
    Case("list that is not there", S, LIST, "list.txt not_a_readable_list No_such_file"),
    Case("empty list", S, LIST, "list.txt an_empty_list", put("list.txt", b"\n  \r\n")),
    Case("list of bytes", S, LIST, "list.txt not_a_readable_list", put("list.txt", b"\xff\xfe\0")),
    Case("list with a key twice", S, LIST, "list.txt:3 twice train0",
         put("list.txt", b"train0\ntrain4\ntrain0\n")),
    Case("list that leads out", S, LIST, "list.txt:1 .. etc", put("list.txt", b"../etc/a\n")),
    Case("list of three columns", S, LIST, "list.txt:1 two_columns", put("list.txt", b"a b c\n")),
    Case("list of all images", M, LIST, "no_unlabeled --labeled-list", put("list.txt", EVERY)),
    Case("unlabelled list alone", M, "--unlabeled-list list.txt", "--labeled-list give_both",
         put("list.txt", EVERY)),
    Case("list of another count", S, f"--dataset voc --data-root voc --split 92 {LIST}",
         "list.txt --split_92 leave_--split_out", voc),
    Case("split of another data set", S, "--split 92", "--split_92 all 1/r"),
    Case("split beyond the images", S, "--split 1/9", "--split_1/9 2_to_8"),
    Case("family without the split", S,
         "--dataset voc --data-root voc --split 183 --split-family cac1",
         "--split_183 cac1 all,_92 --split-seed --labeled-list", voc),
    Case("misspelt family", M, "--split-family u2p", "u2p cps u2pl cac0"),
    # ---- run folders ----
    Case("run folder that is there", S, "--out run", "run_exists --resume --out"),
    Case("run folder that is a file", S, "--out note", "note another_--out",
         put("note", b"mine")),
    Case("resume in a file", S, "--out note --resume", "note --out", put("note", b"mine")),
    Case("run folder below a file", S, "--out note/run", "note --out", put("note", b"mine")),
    Case("resume of another script", M, RESUME, "run/last.pt supervised.py mean_teacher.py"),
    Case("resume with another recipe", S, f"{RESUME} --lr 0.5", "run/last.pt --lr_0.01 0.5_here"),
    Case("resume with another split", S, f"{RESUME} --split 1/2", "run/last.pt --split 1/4 1/2"),
    Case("resume with other images", S, RESUME, "run/last.pt other_labeled_images --out", grown),
    Case("resume of a best.pt", S, RESUME, "run/last.pt a_best.pt --init_starts_from_it",
         moved("run/best.pt", "run/last.pt")),
    Case("resume of half a checkpoint", S, RESUME, "run/last.pt --init_starts_from_it",
         changed(drop="lists")),
    Case("resume with a log of bytes", S, RESUME, "run/log.jsonl line_1 move_the_file_away",
         put("run/log.jsonl", b"\xff\xfe\n{}\n")),
    Case("resume with a log of numbers", S, RESUME, "run/log.jsonl line_1 move_the_file_away",
         put("run/log.jsonl", b"3\n4\n")),
    Case("resume with a log that is a folder", S, RESUME, "run/log.jsonl Is_a_directory",
         lambda patch: (gone("run/log.jsonl")(patch), os.mkdir("run/log.jsonl"))),
    Case("resume of a cut-off file", S, RESUME, "run/last.pt damaged", cut("run/last.pt")),
    Case("resume of a trap", S, RESUME, "run/last.pt damaged", trapped),
    # ---- checkpoints and weights ----
    Case("absent checkpoint", S, "--eval-only --checkpoint no.pt", "no.pt no_such_checkpoint"),
    Case("folder as a checkpoint", S, "--eval-only --checkpoint run", "run no_checkpoint"),
    Case("damaged checkpoint", S, SCORE, "run/last.pt damaged", cut("run/last.pt")),
    Case("text as a checkpoint", S, SCORE, "run/last.pt no_checkpoint", put("run/last.pt", b"71")),
    Case("malicious checkpoint", S, SCORE, "run/last.pt damaged", trapped),
    Case("malicious pickle", S, SCORE, "run/last.pt damaged", put("run/last.pt", PICKLE)),
    Case("malicious pickle of today", S, SCORE, "run/last.pt damaged", put("run/last.pt", PICKLE4)),
    Case("checkpoint without flags", S, SCORE, "run/last.pt no_checkpoint", changed(args=None)),
    Case("another script's checkpoint", S, "--eval-only --checkpoint mt/last.pt",
         "mt/last.pt mean_teacher.py supervised.py"),
    Case("another network's checkpoint", S, f"{SCORE} --dataset shapes --split 1/16",
         "run/last.pt does_not_fit_these_flags head.classify"),
    Case("absent start", S, "--init no.pt", "no.pt no_such_checkpoint"),
    Case("weights to start from", S, "--init w.pth", "w.pth no_checkpoint_of_these_scripts",
         put("w.pth", {"conv1.weight": torch.zeros(1)})),
    Case("malicious start", S, "--init run/last.pt", "run/last.pt damaged", trapped),
    Case("absent weights", S, "--weights no.pth", "--weights_no.pth --weights_FILE --weights_none"),
    Case("weights that are a page", S, "--weights w.pth", "--weights_w.pth --weights_FILE",
         put("w.pth", HTML)),
    Case("malicious weights", S, "--weights w.pth", "--weights_w.pth --weights_FILE",
         put("w.pth", {"conv1.weight": Trap()})),
    Case("malicious pickle as weights", S, "--weights w.pth", "--weights_w.pth --weights_FILE",
         put("w.pth", PICKLE4)),
    Case("weights of another network", S, "--weights w.pth", "--weights_w.pth keys resnet18 bn1",
         put("w.pth", {"features.0.weight": torch.zeros(64, 3, 3, 3)})),
    # ---- torchrun's environment ----
    Case("RANK alone", S, "", "WORLD_SIZE MASTER_ADDR start_with_torchrun", environ={"RANK": "0"}),
    Case("no MASTER_ADDR", S, "", "MASTER_ADDR start_with_torchrun",
         environ=ENV | {"MASTER_ADDR": ""}),
    Case("WORLD_SIZE two", S, "", "WORLD_SIZE start_with_torchrun",
         environ=ENV | {"WORLD_SIZE": "two"}),
    Case("WORLD_SIZE two, dry", S, "--dry-run", "WORLD_SIZE torchrun",
         environ={"WORLD_SIZE": "two"}),
    Case("WORLD_SIZE 0", S, "", "WORLD_SIZE torchrun", environ=ENV | {"WORLD_SIZE": "0"}),
    Case("RANK zero", S, "", "RANK torchrun", environ=ENV | {"RANK": "zero"}),
    Case("MASTER_PORT http", S, "", "MASTER_PORT torchrun", environ=ENV | {"MASTER_PORT": "http"}),
    Case("MASTER_PORT 99999", S, "", "MASTER_PORT", environ=ENV | {"MASTER_PORT": "99999"}),
    Case("MASTER_PORT taken", S, "", "MASTER_PORT", busy, ENV),
    # ---- prepare_data.py ----
    Case("no command", P, "", "Expected voc cityscapes camvid check"),
    Case("unknown data set", P, "ade20k", "ade20k voc cityscapes camvid coco"),
    Case("unknown data set to check", P, "check --dataset kitti", "kitti camvid folder"),
    Case("absent archive", P, "voc --root new --from own", "--from_own VOCtrainval https://"),
    Case("truncated archive", P, "voc --root new --from from",
         "from/VOCtrainval md5 delete_it_and_run_again", archives),
    Case("truncated zip", P, "cityscapes --root cs", f"{ZIP} damaged_or_cut_off fetch_it_again",
         zipped(CITY, harm=lambda content: content[:-30])),
    Case("damaged member of a zip", P, "cityscapes --root cs", f"{ZIP} damaged fetch_it_again",
         zipped(CITY, "leftImg8bit/b", harm=flipped)),
    Case("malicious zip", P, "cityscapes --root cs", f"{ZIP} unsafe ../evil",
         zipped(CITY, "../evil")),
    Case("target with other content", P, "voc --root voc --from from",
         "voc/SegmentationClass/2007_000001.png another_file move_it_away", other_voc),
    Case("half a data set", P, "camvid --root data", "data train:_8_of_367 https://"),
    Case("absent root", P, "camvid --root nowhere", "nowhere no_such_folder https://"),
    Case("absent annotations", P, "coco --root own", "own/annotations no_such_file https://"),
    Case("annotations of another kind", P, "coco --root own", "instances_train2017.json https://",
         put("own/annotations/instances_train2017.json", b"[1, 2]")),
    Case("no such folder of lists", P, "splits --family cps --from nowhere",
         "--from_nowhere no_such_folder"),
    Case("list that is there", P,
         "make-split --dataset camvid --data-root data --labels 2 --out list.txt",
         "--out_list.txt exists give_another", put("list.txt", b"mine")),
    Case("more labels than images", P,
         "make-split --dataset camvid --data-root data --labels 9 --out list.txt",
         "--labels_9 1_to_8"),
    Case("chart that is no PNG", P, "stats --dataset camvid --data-root data --out chart.jpg",
         "--out_chart.jpg .png"),
]  # fmt: skip


def parameter(case):
    """Returns a case as pytest takes it."""
    return pytest.param(case, id=f"{Path(case.script.__file__).stem}: {case.name}")


def everything(folder):
    """Returns all that a folder holds: files with their hashes, folders."""
    return snapshot(folder), sorted(folder.rglob("*"))


def judge(case, code, text, place, before):
    """Asserts code 2, one line with the case's words, and the folder as it was; returns it."""
    assert everything(place) == before
    (line,) = text.splitlines()
    assert code == 2 and line.startswith(f"{Path(case.script.__file__).name}: ")
    words = [word for word in case.words.split() if word not in line]
    assert [word for word in words if word.replace("_", " ") not in line] == [], line
    return line


def arranged(case, patch):
    """Puts all in place for a case, in the working folder."""
    for name, value in case.environ.items():
        patch.setenv(name, value)
    if case.script is not prepare_data and "--weights" not in case.flags:
        shrink(case.script, patch)
    if case.arrange:
        case.arrange(patch)


def refused(case, place, monkeypatch, capfd):
    """Runs a case in this process; returns the line that it ends with."""

    def end(code):
        raise Exit(code)

    arranged(case, monkeypatch)
    before = everything(place)
    capfd.readouterr()
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")  # a process of its own would print them
        patch.setattr(sys, "argv", [case.script.__file__, *case.argv])
        patch.setattr(os, "_exit", end)
        with pytest.raises(Exit) as stop:
            if case.script is prepare_data:
                run.refusing(prepare_data.main)
            else:
                run.launch(case.script.Args, case.script.preset, case.script.main)
    text = capfd.readouterr().err + "".join(f"warning: {w.message}\n" for w in warned)
    return judge(case, *stop.value.args, text, place, before)


# ---- the tests ----


@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
def test_a_mistake_is_refused_in_one_line_and_changes_nothing(case, place, monkeypatch, capfd):
    refused(case, place, monkeypatch, capfd)


def test_the_page_counts_them():
    assert f"a catalogue of {len(CASES)} mistakes" in (ROOT / "docs/reliability.md").read_text()


PROCESSES = ["misspelt data set", "malicious checkpoint", "absent archive"]


@pytest.mark.parametrize("name", PROCESSES)
def test_so_it_is_as_a_process(name, place, monkeypatch):
    (case,) = (case for case in CASES if case.name == name)
    arranged(case, monkeypatch)
    before = everything(place)
    command = [sys.executable, "-B", str(ROOT / Path(case.script.__file__).name), *case.argv]
    done = subprocess.run(command, capture_output=True, text=True)
    judge(case, done.returncode, done.stderr, place, before)


def test_the_trap_springs_where_all_is_unpickled(place, monkeypatch):
    trapped(monkeypatch)
    torch.load("run/last.pt", weights_only=False)
    assert Path("sprung").is_dir()


def test_nobody_is_told_to_trust_a_malicious_checkpoint(place, monkeypatch, capfd):
    (case,) = (case for case in CASES if case.name == "malicious checkpoint")
    assert "weights_only" not in refused(case, place, monkeypatch, capfd)


def test_the_same_run_without_a_mistake_is_not_refused(place, monkeypatch):
    case = Case("", supervised, "", "")
    arranged(case, monkeypatch)
    train(supervised, case.argv)
    assert Path("out/best.pt").is_file()
