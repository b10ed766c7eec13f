"""What a command line of few words becomes: presets, published lists, whole runs.

The headline command runs as processes of its own on a drawn tree with Cityscapes' names, where its
list comes from a file:// address. With SPLITS, a folder with the published lists, also on the real
names.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ael_fpl
import cps_fpl
import esl
import mean_teacher
import prepare_data
import supervised
import u2pl
from common import Refusal, run
from tests.helpers import ROOT, Forked, draw_tree, flags, log, shrink, train

SCRIPTS = {"supervised": supervised, "mean_teacher": mean_teacher, "cps_fpl": cps_fpl}
SCRIPTS |= {"ael_fpl": ael_fpl, "u2pl": u2pl, "esl": esl}

# ---- presets ----

VOC = ("92", "183", "366", "732", "1464", "all")
SHARES = ("1/16", "1/8", "1/4", "1/2", "all")
LARGE = ("resnet101", "v1c", "auto", "slide")  # backbone, stem, weights, protocol
SMALL = ("resnet18", "classic", "none", "whole")
OWN = ("resnet50", "classic", "auto", "whole")
U2PL = [  # data set, splits, those four, crop, --split where nothing is given
    ("voc", VOC, LARGE, 513, None),
    ("voc_aug", SHARES, LARGE, 513, None),
    ("cityscapes", SHARES, LARGE, 769, None),
    ("folder", ("all", "1/8"), OWN, 513, "all"),
    ("camvid", ("1/8", "1/2", "all"), SMALL, 128, "1/8"),
    ("shapes", ("1/16", "all"), SMALL, 64, "1/16"),
]
CPS = [
    ("voc", VOC, LARGE, 512, None),
    ("voc_aug", SHARES, LARGE, 512, None),
    ("cityscapes", (*SHARES, "1/32"), LARGE, 800, None),
    ("folder", ("all", "1/8"), OWN, 512, "all"),
    ("camvid", ("1/8", "1/2", "all"), SMALL, 128, "1/8"),
    ("shapes", ("1/16", "all"), SMALL, 64, "1/16"),
]
AEL = [(*row[:3], dict.get({512: 513, 800: 769}, row[3], row[3]), row[4]) for row in CPS]
PRESETS = [
    *(
        (name, "u2pl", *row)
        for name in ("supervised", "mean_teacher", "u2pl", "esl")
        for row in U2PL
    ),
    *(("cps_fpl", "cps", *row) for row in CPS),
    *(("ael_fpl", "cps", *row) for row in AEL),
]


def resolved(script, **flags_):
    return run.resolve(script.Args(**flags_), script.preset)


@pytest.mark.smoke
@pytest.mark.parametrize("name, family, dataset, splits, network, crop, default", PRESETS)
def test_network_evaluation_and_family_of_every_data_set(
    name, family, dataset, splits, network, crop, default
):
    script = SCRIPTS[name]
    recipes = ("paper",) if name == "esl" else ("paper", "official")  # no code of ESL is public
    for split, recipe in itertools.product(splits, recipes):
        args = resolved(script, dataset=dataset, split=split, recipe=recipe)
        assert (args.backbone, args.stem, args.weights, args.protocol) == network
        assert (args.crop_size, args.split_family, args.split) == (crop, family, split)
        assert (args.init, args.num_classes, args.ignore_index) == ("", 0, 255)
        if dataset == "folder":
            assert args.total_iters == (39_680 if name.endswith("fpl") else 20_000)
    if default:
        assert resolved(script, dataset=dataset).split == default
    else:
        with pytest.raises(Refusal, match="sets --split:"):
            resolved(script, dataset=dataset, total_iters=1)
    other = dict(stem="deep", protocol="whole", split_family="cac1", weights="w.pth", crop_size=99)
    args = resolved(script, dataset=dataset, split=splits[0], backbone="resnet50", **other)
    assert {flag: getattr(args, flag) for flag in other} == other  # explicit flags win


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_of_ones_own_needs_no_flag_but_its_classes(name):
    script = SCRIPTS[name]
    args = run.parse(script.Args, ["--dataset", "folder", "--num-classes", "5"])
    args = run.resolve(args, script.preset)
    assert (args.num_classes, args.split, args.split_seed) == (5, "all", None)
    if name in ("mean_teacher", "u2pl"):  # a tenth, as the small protocols
        assert (args.warmup_iters, args.batch_size_unlabeled) == (2000, 16)
    if name == "esl":
        assert (args.batch_size, args.batch_size_unlabeled, args.queue) == (8, 8, 256)
    if name == "supervised":
        matched = resolved(script, dataset="folder", num_classes=5, schedule="matched")
        assert matched.total_iters == 20_000
    if name == "cps_fpl":
        assert (args.T, args.unsup_weight, args.ohem_kept) == (0.9, 1.0, 0.0)
    if name == "ael_fpl":
        assert (args.T, args.paste_not, args.region_area, args.aux_weight) == (0.9, (), 0.03, 0.4)
    rates = {"cps_fpl": (0.0025, 1.0), "ael_fpl": (0.00125, 10.0)}  # VOC's
    assert (args.lr, args.lr_head) == rates.get(name, (0.001, 10.0))


def draw_folder(root, count=8, classes=5):
    """Draws a folder of one's own: images/<part>/*.jpg, masks/<part>/*.png, 0 is ignored."""
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 2)):
        for i in range(number):
            mask = rng.integers(0, classes + 1, (6, 8)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
            for kind, end, array in (
                ("images", "jpg", mask[..., None] * np.array([40, 17, 30], np.uint8)),
                ("masks", "png", mask),
            ):
                path = root / kind / part / f"{part} {i}.{end}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_of_ones_own_trains_from_a_checkpoint_of_other_classes(
    name, tmp_path, monkeypatch, capsys
):
    script = SCRIPTS[name]
    shrink(script, monkeypatch)
    train(script, flags(draw_tree(tmp_path / "camvid"), tmp_path / "first", iters=2))
    tree = draw_folder(tmp_path / "folder")
    argv = [*flags(tree, tmp_path / "run", iters=2), "--dataset", "folder", "--num-classes", "6"]
    argv += ["--ignore-index", "0", "--protocol", "slide", "--init", tmp_path / "first/best.pt"]
    train(script, list(map(str, argv)))
    assert "head random" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)["networks"]
    assert all(net["head.classify.1.weight"].shape[0] == 6 for net in saved.values())
    done = log(tmp_path / "run")[-1]
    assert done["on"] == "val" and len(done["last"]["iou"]) == 6
    # the frequencies of the classes 1 to 5 over the pixels that are not 0
    masks = [np.asarray(Image.open(path)) for path in (tree / "masks/val").iterdir()]
    found = np.bincount(np.concatenate([m[m > 0] for m in masks]))
    constant = found.max() / found.sum() / (found > 0).sum()
    assert done["last"]["constant"] == pytest.approx(constant, abs=1e-12)


# ---- the headline command ----

HEADLINE = ["--dataset", "cityscapes", "--split", "1/16", "--T", "0.9"]
# cityscapesScripts' labels.py: the id of each of the 19 classes; all others are ignored
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
VOID = [*(i for i in range(34) if i not in IDS), 255]
CITIES = {"train": ("aachen", "ulm", "weimar", "zurich"), "val": ("frankfurt", "lindau")}
WITH_IDS = ("ulm", "zurich", "lindau")  # masks with all 34 ids; the others with the 19 classes


def set_hash(keys):
    return hashlib.sha1("\n".join(sorted(keys)).encode()).hexdigest()[:8]


def draw_cityscapes(root, labelled):
    """Draws a tree with official names; masks of val and of the labelled images alone.

    Returns {part: keys}, and the classes (19 where ignored) of val's pixels.
    """
    rng, keys, val = np.random.default_rng(0), {"train": [], "val": []}, []
    for part, cities in CITIES.items():
        for city, i in itertools.product(cities, range(8 if part == "train" else 2)):
            key = f"{city}_{i:06d}_000019"
            keys[part].append(key)
            path = root / f"leftImg8bit/{part}/{city}/{key}_leftImg8bit.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (36, 48, 3)).astype(np.uint8)).save(path)
            if part == "train" and key not in labelled:
                continue
            classes = rng.choice([*range(7), 19], (6, 8)).repeat(6, 0).repeat(6, 1)
            val += [classes.ravel()] if part == "val" else []
            if city in WITH_IDS:
                void = rng.choice(VOID, classes.shape)
                mask = np.where(classes == 19, void, np.array([*IDS, 0])[classes])
            else:
                mask = np.where(classes == 19, 255, classes)
            name = "labelIds" if city in WITH_IDS else "labelTrainIds"
            path = root / f"gtFine/{part}/{city}/{key}_gtFine_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8)).save(path)
    return keys, np.concatenate(val)


def start(folder, argv, processes=1, **variables):
    """Runs `cps_fpl.py argv` in a folder, by torchrun with several processes; returns it ended."""
    words = ["tests.headline", "cps_fpl", *argv]
    if processes == 1:
        forked = Forked(["-m", *words], folder=folder, variables=variables, apart=True)
        out, err = forked.communicate()
        return SimpleNamespace(returncode=forked.returncode, stdout=out, stderr=err)
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node".split()]
    command += [str(processes), "-m", *words]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_headline_command_trains_on_a_list_that_it_fetches(tmp_path):
    labelled = ["weimar_000003_000019", "ulm_000006_000019"]  # no every 16th; of both kinds
    keys, val = draw_cityscapes(tmp_path / "data/cityscapes", labelled)
    source = tmp_path / "published.txt"
    rows = [f"/images/train/{k}.png\t/segmentation/train/{k}_gtFine.png\n" for k in labelled]
    source.write_text("".join(rows))  # as TorchSemiSeg's
    entry = {"images": 2, "set": set_hash(labelled), "url": source.as_uri()}
    parts = {part: {"images": len(keys[part]), "set": set_hash(keys[part])} for part in keys}
    families = {"parts": parts, "cps": {"1/16": entry}, "u2pl": {}}
    published = {"HEADLINE": json.dumps({"cityscapes": families})}
    sizes = ["--crop-size", "32", "--total-iters", "2", "--workers", "0", "--device", "cpu"]

    done = start(tmp_path, HEADLINE + sizes, processes=2, **published)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs/cps_fpl-cityscapes-1_16-s0"
    first, last = log(folder)[0], log(folder)[-1]
    assert first["world"] == 2 and first["argv"] == HEADLINE + sizes
    assert (first["args"]["T"], first["args"]["protocol"]) == (0.9, "slide")
    assert (first["args"]["split_family"], first["args"]["batch_size"]) == ("cps", 8)
    rest = sorted(set(keys["train"]) - set(labelled))
    expected = {"labeled": labelled, "unlabeled": rest, "val": keys["val"], "test": []}
    assert first["lists"] == {name: [len(k), set_hash(k)] for name, k in expected.items()}
    for name in ("last.pt", "best.pt"):
        saved = torch.load(folder / name, weights_only=True)
        assert saved["step"] == 2 and set(saved["networks"]) == {"branch1", "branch2"}
    # masks of both kinds are read right: the score of the best constant, by hand
    found = np.bincount(val, minlength=20)[:19]
    constant = found.max() / found.sum() / (found > 0).sum()
    assert last["kind"] == "done" and last["on"] == "val"
    assert last["last"]["constant"] == pytest.approx(constant, abs=1e-12)
    cached = tmp_path / "data/splits/cityscapes/cps/1_16.txt"
    assert sorted(cached.read_text().split()) == sorted(labelled)
    assert f"1_16.txt: 2 images, set {entry['set']}" in done.stdout
    assert not [p for p in cached.parent.iterdir() if p != cached]

    source.unlink()
    done = start(tmp_path, HEADLINE + sizes, **published)
    assert done.returncode == 0, done.stdout + done.stderr
    assert log(Path(f"{folder}-2"))[0]["lists"] == first["lists"]

    cached.write_text(f"{labelled[0]}\nulm_000005_000019\n")
    done = start(tmp_path, HEADLINE + sizes, **published)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("cps_fpl.py: data/splits/cityscapes/cps/1_16")
    assert entry["set"] in line and "delete it" in line
    assert not Path(f"{folder}-3").exists()


@pytest.mark.skipif("SPLITS" not in os.environ, reason="SPLITS: a folder of published lists")
def test_the_headline_command_finds_the_published_images(tmp_path, monkeypatch):
    lists, tree = Path(os.environ["SPLITS"]).resolve(), tmp_path / "data/cityscapes"
    if not list(lists.rglob("city/config_new/train.txt")):
        pytest.skip("SPLITS has no TorchSemiSeg")
    (config,) = (path.parent for path in lists.rglob("city/config_new/train.txt"))
    whole, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (8, 4)).save(whole)
    Image.new("L", (8, 4)).save(mask)
    chosen = config / "subset_train/train_aug_labeled_1-16.txt"
    keys = {}
    for part, path in (
        ("train", config / "train.txt"),
        ("val", config / "val.txt"),
        ("labelled", chosen),
    ):
        columns = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        keys[part] = [re.search(r"/([a-z-]+_\d{6}_\d{6})", c)[1] for c in columns]
    assert [len(keys[part]) for part in keys] == [2975, 500, 186]
    for part, kind, file, end in (
        ("train", "leftImg8bit", whole, "leftImg8bit"),
        ("val", "leftImg8bit", whole, "leftImg8bit"),
        ("labelled", "gtFine", mask, "gtFine_labelIds"),
        ("val", "gtFine", mask, "gtFine_labelTrainIds"),
    ):
        for key in keys[part]:
            city = tree / kind / ("val" if part == "val" else "train") / key.split("_")[0]
            city.mkdir(parents=True, exist_ok=True)
            os.link(file, city / f"{key}_{end}.png")
    monkeypatch.chdir(tmp_path)
    put = ["splits", "--family", "cps", "--dataset", "cityscapes", "--from", str(lists)]
    prepare_data.main(put)
    command = [sys.executable, str(ROOT / "cps_fpl.py"), *HEADLINE, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(None, 1) for line in done.stdout.splitlines()]
    # the sets as TorchSemiSeg publishes them
    for row in (
        ["labeled", "images         186, set b94f8275"],
        ["unlabeled", f"images       2789, set {set_hash({*keys['train']} - {*keys['labelled']})}"],
        ["val", "images             500, set 7a7abbc4"],
        ["T", "0.9"],
        ["stem", "v1c"],
        ["protocol", "slide"],
    ):
        assert row in rows, (row, rows)
    assert not (tmp_path / "runs").exists()
