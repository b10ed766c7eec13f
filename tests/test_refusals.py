"""What a script refuses: one line on stderr, exit code 2, nothing written.

Every case runs the script's own `launch` in this process, with the tiny network where the case does
not need the real one; three more are processes of their own.
"""

import gc
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ael_fpl
import cps_fpl
import mean_teacher
import sources
import supervised
import u2pl
from common import Refusal, run
from common.distributed import Group
from tests.helpers import ROOT, Forked, draw_tree, flags, shrink, snapshot, train


class Exit(BaseException):
    """Stands for the end of the process."""


def refusal(module, argv, monkeypatch, capsys):
    """Returns the one line that a script prints before it ends with code 2; fails otherwise."""

    class System:  # os for common/run.py alone: loader processes need the real os._exit
        def __getattr__(self, name):
            return getattr(os, name)

        def _exit(self, code):
            raise Exit(code)

    capsys.readouterr()
    gc.freeze()  # what was there before need not be looked through
    with monkeypatch.context() as patch:
        patch.setattr(run, "os", System())
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds
        patch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        with pytest.raises(Exit) as end:
            run.launch(module.Args, module.preset, module.main)
        gc.collect()  # ends loader processes that the traceback kept
    gc.unfreeze()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.args == (2,)
    assert line.startswith(f"{Path(module.__file__).name}: ")
    return line


def refused(module, argv, words, tmp_path, monkeypatch, capsys):
    """Asserts that a command line is refused in words, and that nothing under tmp_path changed."""
    monkeypatch.chdir(tmp_path)
    before, folders = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    line = refusal(module, argv, monkeypatch, capsys)
    assert [word for word in words if word not in line] == [], line
    assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == (before, folders)


# ---- flags ----

FLAGS = [  # script, flags after those of a small run, words of the line
    (supervised, ["--no-such-flag", "3"], ["--no-such-flag"]),
    (supervised, ["--cutmix"], ["--cutmix"]),
    (supervised, ["--backbone", "resnet34"], ["resnet34", "resnet18", "resnet50", "resnet101"]),
    (supervised, ["--dataset", "kitti"], ["kitti", "camvid", "cityscapes"]),
    (mean_teacher, ["--consistency", "kl"], ["kl", "ce", "mse"]),
    (supervised, ["--batch-size", "two"], ["batch-size", "two"]),
    (supervised, ["--lr", "fast"], ["lr", "fast"]),
    (supervised, ["--batch-size"], ["batch-size"]),
    (supervised, ["--split", "1/0"], ["--split", "1/0", "all", "1/r"]),
    (supervised, ["--split", "half"], ["--split", "half", "all", "1/r"]),
    (supervised, ["--split", "1/9"], ["--split", "1/9", "2 to 8"]),
    (supervised, ["--batch-size", "1"], ["1", "labeled", "two"]),
    (supervised, ["--batch-size", "0"], ["0", "--batch-size"]),
    (mean_teacher, ["--batch-size-unlabeled", "1"], ["1", "unlabeled", "two"]),
    (mean_teacher, ["--batch-size-unlabeled", "3", "--cutmix"], ["--cutmix", "even"]),
    (mean_teacher, ["--split", "all", "--unlabeled-list", "x"], ["--unlabeled-list", "both"]),
    (supervised, ["--eval-only"], ["--eval-only", "--checkpoint"]),
    (supervised, ["--eval-only", "--checkpoint", "no.pt"], ["no.pt"]),
    (supervised, ["--weights", "no.pth"], ["--weights", "no.pth"]),
    (supervised, ["--stem", "wide"], ["wide", "classic", "deep", "v1c"]),
    (cps_fpl, ["--protocol", "windows"], ["windows", "whole", "slide"]),
    (mean_teacher, ["--split-family", "st"], ["st", "cps", "u2pl", "cac0", "cac1", "cac2"]),
    (supervised, ["--num-classes", "11"], ["--num-classes", "folder"]),
    (supervised, ["--ignore-index", "0"], ["--ignore-index", "folder"]),
    (supervised, ["--dataset", "folder"], ["--num-classes 0", "2 to 254"]),
    (cps_fpl, ["--dataset", "folder", "--num-classes", "255"], ["--num-classes 255", "2 to 254"]),
    (supervised, ["--init", "no.pt"], ["no.pt", "no such"]),
    (supervised, ["--data-root", "nowhere"], ["nowhere", "--data-root"]),
    (supervised, ["--labeled-list", "no.txt"], ["no.txt"]),
    (cps_fpl, ["--k-strategy", "n-2"], ["n-2", "n-1", "fixed2", "fixed3", "step"]),
    (cps_fpl, ["--unsup-loss", "kl"], ["kl", "fpl", "ce", "soft", "negative"]),
    (cps_fpl, ["--weight", "cubic"], ["cubic", "concave", "linear", "convex", "none"]),
    (cps_fpl, ["--mean-over", "all"], ["all", "positives", "positives_and_next"]),
    (cps_fpl, ["--evaluate", "branch3"], ["branch3", "branch1", "branch2", "mean"]),
    (cps_fpl, ["--recipe", "mine"], ["mine", "paper", "official"]),
    (cps_fpl, ["--T", "high"], ["--T", "high"]),
    (cps_fpl, ["--T"], ["--T"]),
    (cps_fpl, ["--k-max", "1.5"], ["--k-max", "1.5"]),
    (cps_fpl, ["--strict", "maybe"], ["--strict", "maybe"]),
    (cps_fpl, ["--ohem"], ["--ohem"]),  # --ohem-kept since it is a share
    (cps_fpl, ["--batch-size-unlabeled", "1"], ["1", "unlabeled", "two"]),
    (cps_fpl, ["--batch-size-unlabeled", "1", "--no-cutmix"], ["1", "unlabeled", "two"]),
    (cps_fpl, ["--batch-size", "1", "--unsup-weight", "0"], ["1", "labeled", "two"]),
    (u2pl, ["--unreliable-loss", "ce"], ["ce", "contrastive", "binary", "none"]),
    (u2pl, ["--negatives-from", "bank"], ["bank", "unreliable", "reliable", "all"]),
    (u2pl, ["--bank-dtype", "fp16"], ["fp16", "fp32", "bf16"]),
    (u2pl, ["--ranks", "3"], ["--ranks", "2 values"]),
    (u2pl, ["--ranks", "20", "3"], ["--ranks (20, 3)", "the first below"]),
    (u2pl, ["--batch-size-unlabeled", "3"], ["--cutmix", "even"]),
    (u2pl, ["--batch-size-unlabeled", "1", "--no-cutmix"], ["1", "unlabeled", "two"]),
]

BOUNDS = ("0.0", "1.0", "-0.5", "9.0", "nan", "inf")
NUMBERS = [  # numbers that cannot be: refused before anything is read, as the rest
    (supervised, ["--workers", "-1"], ["--workers", "-1"]),
    (supervised, ["--crop-size", "0"], ["--crop-size", "0"]),
    (supervised, ["--total-iters", "0"], ["--total-iters", "0"]),
    (supervised, ["--seed", "-1"], ["--seed", "-1"]),
    (supervised, ["--split-seed", "-1"], ["--split-seed", "-1"]),
    (supervised, ["--scales", "0.5", "0"], ["--scales", "0"]),
    (supervised, ["--eval-every", "0"], ["--eval-every", "0"]),
    (supervised, ["--save-every", "0"], ["--save-every", "0"]),
    (supervised, ["--ohem-kept", "-0.1"], ["--ohem-kept", "-0.1"]),
    (supervised, ["--ohem-kept", "5"], ["--ohem-kept", "5"]),
    *((cps_fpl, ["--T", T], [f"--T {T}: a number from"]) for T in BOUNDS),
    (cps_fpl, ["--T", "1.0", "--unsup-loss", "ce"], ["--T 1.0"]),
    (cps_fpl, ["--unsup-weight", "-1"], ["--unsup-weight", "-1"]),
    (ael_fpl, ["--unsup-loss", "soft"], ["soft", "fpl", "ce"]),
    (ael_fpl, ["--consistency-on", "labelled"], ["labelled", "mixed", "all"]),
    (ael_fpl, ["--teacher-mode", "frozen"], ["frozen", "train", "eval"]),
    (ael_fpl, ["--pooled", "3"], ["--pooled 3", "2 labelled images"]),
    (ael_fpl, ["--pooled", "0"], ["--pooled 0"]),
    (ael_fpl, ["--paste-not", *map(str, range(11))], ["--paste-not", "0 to 10", "--paste-draws 0"]),
    (ael_fpl, ["--paste-not", "2", "11"], ["--paste-not", "0 to 10"]),
    (ael_fpl, ["--paste-scales", "2.0", "0.1"], ["--paste-scales (2.0, 0.1)", "rising"]),
    (ael_fpl, ["--paste-scales"], ["--paste-scales ()", "rising"]),
    (ael_fpl, ["--paste-scales", "0", "1"], ["--paste-scales 0.0"]),
    (supervised, ["--scales", "2.0", "0.5"], ["--scales (2.0, 0.5)", "rising"]),
    (ael_fpl, ["--paste-not", "-1"], ["--paste-not"]),
    (ael_fpl, ["--paste-draws", "-1"], ["--paste-draws -1"]),
    (ael_fpl, ["--paste-prob", "1.5"], ["--paste-prob 1.5", "to 1"]),
    (ael_fpl, ["--bank-momentum", "2"], ["--bank-momentum 2.0", "to 1"]),
    (ael_fpl, ["--region-area", "5"], ["--region-area 5.0", "to 1"]),
    (ael_fpl, ["--threshold", "70"], ["--threshold 70.0", "to 1"]),
    (ael_fpl, ["--batch-size-unlabeled", "1"], ["1", "unlabeled", "two"]),
    (ael_fpl, ["--T", "1.0"], ["--T 1.0"]),
    (cps_fpl, ["--unsup-weight", "nan"], ["--unsup-weight", "nan"]),
    (cps_fpl, ["--k-max", "-1"], ["--k-max", "-1"]),
    (cps_fpl, ["--batch-size-unlabeled", "0"], ["--batch-size-unlabeled", "0"]),
    (u2pl, ["--ranks", "-1", "3"], ["--ranks -1"]),
    (u2pl, ["--bank-sizes", "5", "0"], ["--bank-sizes 0"]),
    (u2pl, ["--tau", "nan"], ["--tau nan"]),
    (u2pl, ["--contrast-weight", "-1"], ["--contrast-weight -1"]),
    (u2pl, ["--eta", "nan"], ["--eta nan"]),
    (u2pl, ["--cutmix-prob", "1.5"], ["--cutmix-prob 1.5", "to 1"]),
    (u2pl, ["--ema-decay", "2"], ["--ema-decay 2.0", "to 1"]),
    (u2pl, ["--warmup-iters", "-1"], ["--warmup-iters -1"]),
]


@pytest.mark.parametrize("module, extra, words", FLAGS, ids=[" ".join(f[1]) for f in FLAGS])
def test_a_flag_that_cannot_be_is_refused(module, extra, words, tmp_path, monkeypatch, capsys):
    tree = draw_tree(tmp_path / "data")
    if "--weights" not in extra:
        shrink(module, monkeypatch)
    refused(module, flags(tree, "out") + extra, words, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("module, extra, words", NUMBERS, ids=[" ".join(f[1]) for f in NUMBERS])
def test_a_number_out_of_range_is_refused(module, extra, words, tmp_path, monkeypatch, capsys):
    shrink(module, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    refused(module, flags(tree, "out") + extra, words, tmp_path, monkeypatch, capsys)


@pytest.mark.smoke
def test_a_wrong_flag_is_refused_in_one_line_of_any_length(tmp_path, monkeypatch, capsys):
    name = "--" + "a-very-long-flag-name-" * 12  # tyro's box would break the line here
    line = refusal(supervised, [name, "1"], monkeypatch, capsys)
    assert name.strip("-")[:40] in line and "│" not in line and "╭" not in line


def test_a_data_set_of_which_nothing_is_known_names_what_to_give(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    argv = ["--dataset", "camvid", "--data-root", "empty", "--out", "out"]
    refused(supervised, argv, ["empty", "camvid"], tmp_path, monkeypatch, capsys)
    argv = ["--dataset", "voc", "--data-root", "empty", "--out", "out"]
    words = ["--split", "voc"]
    refused(supervised, argv, words, tmp_path, monkeypatch, capsys)


# ---- the data ----


def smaller_mask(tree):
    Image.new("L", (40, 36)).save(tree / "trainannot/train0.png")


def strange_value(tree):
    path = tree / "trainannot/train0.png"
    mask = Image.open(path).copy()
    for xy in ((7, 30), (9, 30), (3, 31)):
        mask.putpixel(xy, 17)
    mask.save(path)


def coloured_mask(tree):
    Image.new("RGB", (48, 36)).save(tree / "trainannot/train0.png")


def cut(name):
    def damage(tree):
        content = (tree / name).read_bytes()
        (tree / name).write_bytes(content[: len(content) // 2])

    return damage


def text(name, content):
    def damage(tree):
        (tree / name).write_bytes(content)

    return damage


def without(name):
    def damage(tree):
        (tree / name).unlink()

    return damage


LIST = ["--labeled-list", "data/list.txt"]
DAMAGES = [  # name, damage to the tree, flags, words of the line
    (
        "unreadable image",
        text("train/train0.jpg", b"no JPEG"),
        [],
        ["train/train0.jpg", "readable"],
    ),
    ("empty image", text("train/train0.jpg", b""), [], ["train/train0.jpg", "readable"]),
    ("truncated image", cut("train/train0.jpg"), [], ["train/train0.jpg", "readable"]),
    ("truncated mask", cut("trainannot/train0.png"), [], ["trainannot/train0.png", "readable"]),
    ("mask of another size", smaller_mask, [], ["trainannot/train0.png", "40x36", "48x36"]),
    ("coloured mask", coloured_mask, [], ["trainannot/train0.png", "RGB"]),
    (
        "strange label",
        strange_value,
        [],
        ["train0.png", "17", "row 30", "column 7"],
    ),
    (
        "labelled image without mask",
        without("trainannot/train0.png"),
        [],
        ["train0 has no mask", "trainannot/train0.png"],
    ),
    (
        "validation mask missing",
        without("valannot/val1.png"),
        [],
        ["val1 has no mask", "valannot/val1.png"],
    ),
    ("empty list", text("list.txt", b"\n  \r\n"), LIST, ["list.txt", "empty"]),
    ("list of an absent file", text("list.txt", b"train0\ntrain99\n"), LIST, ["list", "train99"]),
    (
        "list with a key twice",
        text("list.txt", b"train0\n\ntrain0\n"),
        LIST,
        ["list.txt:3", "twice"],
    ),
    ("list that is no text", text("list.txt", b"\xff\xfe\x00"), LIST, ["list.txt"]),
    ("list with a path out of the tree", text("list.txt", b"../../etc\n"), LIST, ["list.txt"]),
]
LOADER = [d[1:] for d in DAMAGES if d[0] in ("truncated image", "strange label")]


@pytest.mark.parametrize("name, damage, extra, words", DAMAGES, ids=[d[0] for d in DAMAGES])
def test_damaged_data_are_refused(name, damage, extra, words, tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    damage(draw_tree(tmp_path / "data"))  # train0 is in the first batch
    argv = flags("data", "out", workers=0) + extra
    refused(supervised, argv, words, tmp_path, monkeypatch, capsys)


@pytest.mark.smoke
@pytest.mark.parametrize("harm, extra, words", LOADER)
def test_damage_that_a_loader_process_meets_is_refused_alike(
    harm, extra, words, tmp_path, monkeypatch, capsys
):
    shrink(supervised, monkeypatch)
    harm(draw_tree(tmp_path / "data"))
    argv = flags("data", "out", workers=1) + extra
    refused(supervised, argv, words, tmp_path, monkeypatch, capsys)


def test_an_image_cut_at_any_byte_is_read_or_refused_and_nothing_else(tmp_path):
    tree = draw_tree(tmp_path / "data", train=2, val=1, test=0)
    args = run.resolve(run.parse(supervised.Args, flags(tree, "out")), supervised.preset)
    images = sources.load(run.replace(args, split="all"))
    for path in (tree / "train/train0.jpg", tree / "trainannot/train0.png"):
        whole, kept = path.read_bytes(), 0
        for size in range(0, len(whole), 3):
            path.write_bytes(whole[:size])
            try:
                images.read(images.labeled[0], True)
                kept += 1
            except Refusal as error:
                assert path.name in str(error) and "\n" not in str(error)
        assert kept < 10, f"{path.name}: {kept} truncated files were read as whole"
        path.write_bytes(whole)


def test_an_unlabelled_image_is_checked_but_its_mask_never_opened(tmp_path, monkeypatch, capsys):
    shrink(mean_teacher, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    for i in (1, 2, 3, 5, 6, 7):
        (tree / f"trainannot/train{i}.png").write_bytes(b"never opened")
    monkeypatch.chdir(tmp_path)
    train(mean_teacher, flags("data", "run"))
    for i in (1, 2, 3, 5, 6, 7):
        (tree / f"train/train{i}.jpg").write_bytes(b"")
    argv = flags("data", "out")
    refused(mean_teacher, argv, ["train/train", "readable"], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_late_leaves_the_run_folder_whole(workers, tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    tree = draw_tree(tmp_path / "data")
    cut("testannot/test1.png")(tree)  # opened after the last step only
    argv = flags(tree, tmp_path / "out", workers=workers)
    line = refusal(supervised, argv, monkeypatch, capsys)
    assert "testannot/test1.png" in line and "readable" in line
    saved = torch.load(tmp_path / "out/last.pt", weights_only=True)
    assert saved["step"] == 8 and not list((tmp_path / "out").glob("*.tmp"))
    draw_tree(tmp_path / "whole")
    argv = flags(tmp_path / "whole", tmp_path / "out") + ["--resume"]
    train(supervised, argv)
    assert '"kind": "done"' in (tmp_path / "out/log.jsonl").read_text()


# ---- processes and devices ----


@pytest.mark.smoke
def test_a_batch_that_does_not_divide_over_the_processes_is_refused(tmp_path, monkeypatch):
    argv = flags(draw_tree(tmp_path / "data"), "out") + ["--batch-size", "6"]
    args = run.resolve(run.parse(mean_teacher.Args, argv), mean_teacher.preset)
    images, cpu = sources.load(args), torch.device("cpu")
    for name in ("labeled", "unlabeled"):
        with pytest.raises(Refusal, match=rf"^6 {name} .*\b4 processes"):
            mean_teacher.open_stream(name, images, args, Group(0, 4, cpu), 0)
        with pytest.raises(Refusal, match=rf"^1 {name} .*\bBN\b"):
            mean_teacher.open_stream(name, images, args, Group(0, 6, cpu), 0)
        batch = next(mean_teacher.open_stream(name, images, args, Group(2, 3, cpu), 0))
        assert len(batch["image"]) == 2


ENVIRONMENTS = [
    ({"RANK": "0"}, ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "torchrun"]),
    ({"WORLD_SIZE": "2"}, ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "torchrun"]),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, ["MASTER_ADDR"]),
]


@pytest.mark.parametrize("variables, words", ENVIRONMENTS)
def test_half_of_torchruns_environment_is_refused(variables, words, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = flags(draw_tree(tmp_path / "data"), "out")
    refused(supervised, argv, words, tmp_path, monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    argv = flags(draw_tree(tmp_path / "data"), "out") + ["--device", "cuda"]
    refused(supervised, argv, ["--device cuda", "no CUDA"], tmp_path, monkeypatch, capsys)


def test_tensorboard_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    argv = flags(draw_tree(tmp_path / "data"), "out") + ["--tensorboard"]
    words = ["--tensorboard", "pip install tensorboard"]
    refused(supervised, argv, words, tmp_path, monkeypatch, capsys)


# ---- weights and checkpoints ----


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys):
    argv = flags(draw_tree(tmp_path / "data"), "out") + ["--weights", "w.pth"]
    state = supervised.torchvision.models.resnet18().state_dict()
    for content, words in (
        (b"no weights", []),
        ([1, 2], []),
        ({"conv1.weight": state["conv1.weight"]}, ["resnet18", "bn1.bias"]),
        (state | {"layer9.weight": torch.zeros(1)}, ["layer9.weight"]),
        (state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, ["conv1.weight"]),
    ):
        if isinstance(content, bytes):
            Path(tmp_path / "w.pth").write_bytes(content)
        else:
            torch.save(content, tmp_path / "w.pth")
        words = ["--weights w.pth", *words]
        refused(supervised, argv, words, tmp_path, monkeypatch, capsys)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path):
    path.write_bytes(
        torch.randint(0, 256, (4000,), generator=torch.Generator().manual_seed(0))
        .to(torch.uint8)
        .numpy()
        .tobytes()
    )


def nothing(path):
    path.write_bytes(b"")


def other_content(path):
    torch.save({"state_dict": {}}, path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def evil_zip(path):
    torch.save(torch.load(path, weights_only=True) | {"step": Evil()}, path)


def evil_pickle(path):
    path.write_bytes(pickle.dumps(Evil()))


@pytest.mark.parametrize("damage", [half, noise, nothing, other_content, evil_zip, evil_pickle])
@pytest.mark.parametrize("use", ["--resume", "--eval-only"])
def test_a_damaged_checkpoint_is_refused(use, damage, tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    argv = flags("data", "out", iters=2)
    train(supervised, argv)
    damage(tmp_path / "out/last.pt")
    argv += ["--resume"] if use == "--resume" else [use, "--checkpoint", "out/last.pt"]
    # includes that the folder "executed" does not appear
    refused(supervised, argv, ["out/last.pt", "damaged"], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("use", ["--resume", "--eval-only"])
@pytest.mark.parametrize(
    "writer, reader",
    [
        (supervised, mean_teacher),
        (mean_teacher, supervised),
        (cps_fpl, mean_teacher),
        (mean_teacher, u2pl),
    ],
)
def test_a_checkpoint_of_another_script_is_refused(
    writer, reader, use, tmp_path, monkeypatch, capsys
):
    shrink(writer, monkeypatch), shrink(reader, monkeypatch)
    draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    argv = flags("data", "out", iters=2)
    train(writer, argv)
    argv += ["--resume"] if use == "--resume" else [use, "--checkpoint", "out/last.pt"]
    words = ["out/last.pt", f"{writer.__name__}.py", f"{reader.__name__}.py"]
    refused(reader, argv, words, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "module, extra, words",
    [
        (supervised, ["--lr", "0.5"], ["--lr", "0.01", "0.5"]),
        (supervised, ["--seed", "1"], ["--seed", "0", "1"]),
        (supervised, ["--total-iters", "4"], ["--total-iters", "2", "4"]),
        (supervised, ["--scales", "0.5", "1.0"], ["--scales", "2.0", "1.0"]),
        (supervised, ["--amp", "bf16"], ["--amp", "none", "bf16"]),
        (supervised, ["--split", "1/2"], ["--split", "1/4", "1/2"]),
        (supervised, ["--eval-every", "1"], ["--eval-every", "4", "1"]),
        (u2pl, ["--bank-sizes", "30", "20"], ["--bank-sizes", "[5000, 3000]", "[30, 20]"]),
        (u2pl, ["--bank-dtype", "bf16"], ["--bank-dtype", "fp32", "bf16"]),
        (u2pl, ["--unreliable-loss", "none"], ["--unreliable-loss", "contrastive", "none"]),
        (u2pl, ["--no-bank"], ["--bank True there and False here"]),
        (u2pl, ["--ranks", "1", "3"], ["--ranks", "[3, 20]", "[1, 3]"]),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_and_the_flag_named(
    module, extra, words, tmp_path, monkeypatch, capsys
):
    shrink(module, monkeypatch)
    draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    train(module, flags("data", "out", iters=2))
    argv = flags("data", "out", iters=2) + ["--resume", *extra]
    words = ["out/last.pt", *words]
    refused(module, argv, words, tmp_path, monkeypatch, capsys)


def test_eval_only_with_a_flag_that_does_not_fit_the_checkpoint_is_refused(
    tmp_path, monkeypatch, capsys
):
    shrink(supervised, monkeypatch)
    draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    train(supervised, flags("data", "out", iters=2))
    argv = ["--eval-only", "--checkpoint", "out/last.pt", "--dataset", "cityscapes"]
    cityscapes = tmp_path / "cityscapes/leftImg8bit"
    for name in ("train/a/a_000000_000000", "val/b/b_000000_000000"):
        for part, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds")):
            path = cityscapes.parent / part / f"{name}_{end}.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (48, 36)).save(path)
    (tmp_path / "one.txt").write_text("a_000000_000000\n")
    argv += ["--labeled-list", "one.txt", "--unlabeled-list", "one.txt"]
    argv += ["--data-root", "cityscapes", "--split", "all", "--device", "cpu", "--workers", "0"]
    refused(supervised, argv, ["out/last.pt"], tmp_path, monkeypatch, capsys)


def test_an_existing_folder_is_refused_before_a_step_is_made(tmp_path, monkeypatch, capsys):
    shrink(supervised, monkeypatch)
    draw_tree(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    words = ["out exists", "--resume", "--out"]
    refused(supervised, flags("data", "out"), words, tmp_path, monkeypatch, capsys)


def another_backbone(path):
    saved = torch.load(path, weights_only=True)
    weight = saved["networks"]["student"]["backbone.conv1.weight"]
    saved["networks"]["student"]["backbone.conv1.weight"] = weight[:4]
    torch.save(saved, path)


def without_a_layer(path):
    saved = torch.load(path, weights_only=True)
    del saved["networks"]["student"]["backbone.layer4.0.weight"]
    torch.save(saved, path)


INITS = [  # damage to the file, words of the line
    *((damage, ["damaged"]) for damage in (half, noise, nothing, other_content, evil_zip)),
    (Path.unlink, ["no such checkpoint"]),
    (another_backbone, ["does not fit", "backbone.conv1.weight"]),
    (without_a_layer, ["does not fit", "backbone.layer4.0.weight"]),
]


@pytest.mark.parametrize("damage, words", INITS)
def test_a_file_to_start_from_is_refused_if_it_is_damaged_or_does_not_fit(
    damage, words, tmp_path, monkeypatch, capsys
):
    shrink(supervised, monkeypatch), shrink(mean_teacher, monkeypatch)
    draw_tree(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    train(supervised, flags("data", "first", iters=2))
    damage(tmp_path / "first/last.pt")
    argv = flags("data", "out") + ["--init", "first/last.pt"]
    words = ["first/last.pt", *words]
    refused(mean_teacher, argv, words, tmp_path, monkeypatch, capsys)


# ---- as a process ----


@pytest.mark.parametrize("case", ["unknown flag", "missing folder", "damage in a loader"])
def test_a_refusal_is_one_line_on_stderr_and_exit_code_2(case, tmp_path):
    argv = flags("data", "out", workers=1)
    if case == "unknown flag":
        argv, words = argv + ["--no-such-flag"], ["--no-such-flag"]
    elif case == "missing folder":
        words = ["data", "folder"]
    else:
        cut("train/train0.jpg")(draw_tree(tmp_path / "data"))
        words = ["train/train0.jpg", "readable"]
    before = snapshot(tmp_path)
    process = Forked([str(ROOT / "supervised.py"), *argv], folder=tmp_path, apart=True)
    (line,) = process.communicate()[1].splitlines()
    assert line.startswith("supervised.py: ") and all(word in line for word in words), line
    assert process.returncode == 2
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--checkpoint", "last.pt"], ["--eval-on", "test"]])
def test_flags_of_scoring_are_refused_where_nothing_is_scored(words):
    with pytest.raises(Refusal, match="with --eval-only"):
        run.parse(supervised.Args, words)


def test_a_run_by_list_is_not_named_by_a_split(tmp_path):
    (tmp_path / "l.txt").write_text("train0\n")
    words = ["--dataset", "camvid", "--labeled-list", str(tmp_path / "l.txt")]
    for module in (supervised, mean_teacher, cps_fpl, ael_fpl, u2pl):
        args = run.resolve(run.parse(module.Args, words), module.preset)
        assert (args.split, args.total_iters) == ("list", 600)


def test_a_best_checkpoint_in_place_of_the_last_one_is_refused(tmp_path, monkeypatch):
    tree, out = draw_tree(tmp_path / "data"), tmp_path / "run"
    shrink(supervised, monkeypatch)
    train(supervised, flags(tree, out, iters=2, evaluate=2, save=2))
    (out / "last.pt").write_bytes((out / "best.pt").read_bytes())
    with pytest.raises(Refusal, match="--init starts from it"):
        train(supervised, [*flags(tree, out, iters=2, evaluate=2, save=2), "--resume"])
